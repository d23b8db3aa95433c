"""What each way to convert a real model is worth, right after conversion and after training:

    python runs/conversion_study.py --base models/smollm2-135m --text wikitext2_valid.jsonl.gz --data-dir data/tasks \\
        --out runs/out/conversion

Converts the base by every arm of runs/conversion_arms.py (average + SVD as in the paper, joint, calibrated, low rank
only, kept layers, ...), measures perplexity of held-out text and code and few-shot accuracy, uptrains the arms that
matter, with and without the base as teacher, and measures again. The last fifth of the documents of --text is held
out. Training mixes the others, by equal parts, with the sources of this Python's library, of which some packages are
held out as in the demo; the calibration text is of the part that is trained on. The report, its tables and plots are
made of the results alone: OUT/report.md and OUT/conversion-study-*.svg, which a page can take as they are; --report
makes them again at any time.

It takes many hours, in parts: no step begins that would not end within --minutes, and the same command goes on. Results
are kept, an interrupted conversion or training goes on where it was, and a checkpoint is deleted once it was measured
(--keep keeps it). OUT/study.json has the settings of a study; other ones need another --out. OUT/results.json.gz holds
all results, with which another machine goes on (--results). A smaller study, of a few arms:

    python runs/conversion_study.py --base models/smollm2-135m --text text.jsonl --out runs/out/small --seeds 1 \\
        --arms stepwise 'keep-*' average-svd-r32 --tokens 8192 --max-tokens 4096 --calibration-tokens 8192

Each number of --tokens is a training of its own, whose learning rate falls to zero by a cosine, rather than a point on
the way of one long training at a constant rate. In the middle of a training a model is worse than what its tokens could
have made of it, as its last steps were large, and by how much depends on the arm. Only ended trainings have comparable
perplexities, and say what a budget of so many tokens buys. This takes 7/4 of the tokens of the longest one alone.
"""

import argparse
import json
import os
import random
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rrt.checkpoint.source import open_source
from rrt.common.cli import CommandParser, run_command
from rrt.common.files import atomic_write, locked_directory, read_json, sha256_file, write_json
from rrt.common.machine import multiplies_bfloat16
from rrt.common.provenance import code_fingerprint, fingerprint
from rrt.data.corpus import INPUT_HELP, documents, find_files
from rrt.errors import UserError
from runs.conversion_arms import (
    BASE,
    MEASURES,
    TASKS,
    Arm,
    Training,
    all_arms,
    choose_arms,
    draw_name,
    draws,
    result_path,
    trainings,
)
from runs.conversion_study_report import write_report
from runs.study_results import add_results, merge_plans, study_file, write_model_record, write_training_record
from runs.study_steps import STOP_SECONDS, Step, StepLog, describe_time_left, pending_steps, run_steps

ROOT = Path(__file__).resolve().parents[1]
BATCH_TOKENS, TRAIN_CONTEXT, LEARNING_RATE, WARMUP_STEPS = 4096, 512, 2e-4, 5
SAVE_EVERY = 10
"""Optimizer steps of a training that an interruption may cost."""
TRAINING_DTYPES = {"bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class Study:
    """The user's files and settings, and the arms.

    Attributes:
        tasks: directory of the few-shot tasks; None to leave them out.
        tokens: lengths of the trainings.
        max_tokens: per measurement of perplexity; None for all held-out tokens.
        fewshot_documents: of each task.
        dtype: of training and measurements.
    """

    base: Path
    out: Path
    tasks: Path | None
    arms: tuple[Arm, ...]
    tokens: tuple[int, ...]
    num_seeds: int
    max_tokens: int | None
    fewshot_documents: int
    calibration_tokens: int
    dtype: str
    device: str
    processes: int

    @property
    def data(self) -> Path:
        return self.out / "data"

    def checkpoint(self, model: str) -> Path:
        """Return where a model is while results need it."""
        return self.base if model == BASE.name else self.out / "checkpoints" / model

    def calibration_text(self, draw: int) -> Path:
        """Return the shards of a draw; the first one is in the order of the training text."""
        return self.data / (f"draw{draw}" if draw else "natural")

    def statistics(self, draw: int) -> Path:
        """Return where all conversions on a draw keep the base's statistics, which other code does not take."""
        return self.out / "statistics" / f"draw{draw}-{code_fingerprint()[:12]}"


# The text


def split_texts(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split documents into those to train and calibrate on and the last fifth, which is held out.

    A text that is held out is not trained on where it occurs again.

    Raises:
        UserError: there are fewer than five, or no other ones to train on.
    """
    if len(texts) < 5:
        raise UserError(f"--text: found {len(texts)} documents; expected at least 5, of which a fifth is held out")
    first = len(texts) - round(len(texts) / 5)
    heldout, known = list(texts[first:]), set(texts[first:])
    train = [text for text in texts[:first] if text not in known]
    if not train:
        raise UserError("--text: every document is also held out; expected others to train on")
    return train, heldout


def write_texts(study: Study, texts: Sequence[str], num_draws: int) -> None:
    """Write the parts of the text, and the training part once more in another order for each further draw."""
    train, heldout = split_texts(texts)
    parts = {"natural": train, "natural-heldout": heldout}
    for draw in range(1, num_draws):
        parts[f"draw{draw}"] = random.Random(draw).sample(train, len(train))
    for name, part in parts.items():
        path = study.data / f"{name}.jsonl"
        if not path.exists():
            atomic_write(path, "".join(json.dumps({"text": text}) + "\n" for text in part))


# Steps


def study_steps(study: Study) -> list[Step]:
    """List all steps in their order: data, every arm right after conversion, then the trainings."""
    steps = list(_data_steps(study))
    for arm in study.arms:
        steps += _conversion_steps(study, arm, 0)
    drawn = {draw_name(arm, 0) for arm in study.arms}
    for training in trainings(study.arms, study.tokens, study.num_seeds):
        if training.start not in drawn:
            drawn.add(training.start)
            steps += _conversion_steps(study, training.arm, training.seed)
        steps += _training_steps(study, training)
    return steps


def _data_steps(study: Study) -> Iterator[Step]:
    prepare = ("train/prepare_data.py", "--tokenizer", str(study.base))
    yield _step("held-out code", "data", ("runs/demo_excerpts.py", _heldout(study, "code")), _heldout(study, "code"))
    num_draws = max(len(draws(arm, study.num_seeds)) for arm in study.arms)
    inputs = {"code": "python-stdlib", "natural": study.data / "natural.jsonl"}
    inputs |= {f"draw{draw}": study.data / f"draw{draw}.jsonl" for draw in range(1, num_draws)}
    for name, text in inputs.items():
        makes = study.data / name
        yield _step(f"tokens of {name}", "data", (*prepare, "--input", text, "--out", makes), makes)


def _heldout(study: Study, kind: str) -> Path:
    return study.data / f"{kind}-heldout.jsonl"


def _conversion_steps(study: Study, arm: Arm, draw: int) -> Iterator[Step]:
    """Yield the conversion, unless the arm is the base, and its measurements; few-shot only of the first draw."""
    name = draw_name(arm, draw)
    checkpoint = study.checkpoint(name)
    if arm is not BASE:
        command = ("-m", "rrt.convert", "--base", study.base, "--out", checkpoint, *arm.flags)
        needs = ()
        if arm.needs_text:
            text = study.calibration_text(draw)
            command += ("--calibration", text, "--calibration-tokens", study.calibration_tokens)
            command += ("--calibration-statistics", study.statistics(draw))
            command += ("--device", study.device) if study.device != "auto" else ()
            needs = (text,)
        kind = f"conversion{', calibrated' if arm.needs_text else ''}"
        record = result_path(study.out, name, "model")
        yield _step(f"convert {name}", kind, command, checkpoint, needs, is_temporary=True, record=record)
    yield from _measurements(study, arm, name, checkpoint, has_fewshot=draw == 0)


def _training_steps(study: Study, training: Training) -> Iterator[Step]:
    """Yield a training and its measurements; few-shot only of the longest one of the first seed."""
    directory = study.checkpoint(training.name)
    start = study.checkpoint(training.start)
    corpora = [study.data / "natural", study.data / "code"]
    micro_batch = max(1, min(8, BATCH_TOKENS // TRAIN_CONTEXT // study.processes))
    command: tuple[object, ...] = ("train/uptrain.py", "--checkpoint.path", start, "--run.out", directory)
    command += ("--data.path", json.dumps([str(path) for path in corpora]), "--data.weights", "[1, 1]")
    command += ("--data.seq_len", TRAIN_CONTEXT, "--run.tokens", training.tokens, "--run.batch_tokens", BATCH_TOKENS)
    command += ("--run.micro_batch", micro_batch, "--run.seed", training.seed)
    command += ("--run.dtype", TRAINING_DTYPES[study.dtype], "--run.device", study.device)
    command += ("--optim.lr", LEARNING_RATE, "--optim.warmup_steps", WARMUP_STEPS, "--guard.loss_spike", "inf")
    command += ("--run.save_every", SAVE_EVERY, "--run.keep", 1, "--run.log_every", 5)
    if study.processes > 1:
        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", study.processes)
        # Time to save where it is when the study is interrupted.
        command = (*torchrun, "--shutdown-timeout", STOP_SECONDS - 10, *command)
    if training.is_distilled:
        command += ("--distill.teacher", study.base)
    yield _step(
        f"train {training.name}",
        f"training{' with a teacher' if training.is_distilled else ''}",
        command,
        directory / "final",
        (start, *corpora),
        size=training.tokens,
        is_temporary=True,
        directory=directory,
        record=result_path(study.out, training.name, "training"),
    )
    has_fewshot = training.tokens == max(study.tokens) and training.seed == 0
    yield from _measurements(study, training.arm, training.name, directory / "final", has_fewshot=has_fewshot)


def _measurements(study: Study, arm: Arm, name: str, checkpoint: Path, *, has_fewshot: bool) -> Iterator[Step]:
    needs = () if arm is BASE else (checkpoint,)
    # The exits before the last are not trained.
    last_exit = ("--exit-loop", arm.loops - 1) if arm.loops > 1 else ()
    common = ("--checkpoint", checkpoint, "--dtype", study.dtype, "--device", study.device, *last_exit)
    for measure, context in MEASURES.items():
        makes = result_path(study.out, name, measure)
        heldout = _heldout(study, measure.partition("-")[0])
        command = ("eval/perplexity.py", *common, "--data", heldout, "--context", context, "--json", makes)
        command += ("--max-tokens", study.max_tokens) if study.max_tokens is not None else ()
        # As many tokens in a forward pass as at the other context.
        command += ("--batch-size", max(1, 4096 // context))
        needed = needs if measure != "code-512" else (*needs, heldout)
        yield _step(f"{measure} of {name}", f"perplexity {measure}", command, makes, needed)
    if has_fewshot and study.tasks is not None:
        makes = result_path(study.out, name, "fewshot")
        command = ("eval/fewshot.py", *common, "--data-dir", study.tasks, "--tasks", ",".join(TASKS), "--json", makes)
        command += ("--limit", study.fewshot_documents, "--cache", study.out / "fewshot-cache")
        yield _step(f"few-shot of {name}", "few-shot", command, makes, needs)


def _step(
    name: str, kind: str, command: Sequence[object], makes: Path, needs: Sequence[Path] = (), **more: Any
) -> Step:
    """Make a step of a command's arguments, which begin with a script of this repository or `-m`."""
    words = [str(ROOT / word) if _is_script(word) else str(word) for word in command]
    return Step(name, kind, (sys.executable, *words), makes, tuple(needs), **more)


def _is_script(word: object) -> bool:
    return isinstance(word, str) and word.endswith(".py")


def delete_unneeded_statistics(study: Study, left: Sequence[Step]) -> None:
    """Delete the statistics of draws on which no step that is left calibrates."""
    needed = {word for step in left for word in step.command}
    for directory in study.statistics(0).parent.glob("draw*"):
        if str(directory) not in needed:
            shutil.rmtree(directory)


# The command


def open_study(study: Study, inputs: Sequence[str], name: str | None, num_layers: int) -> None:
    """Split the text, and keep the settings in OUT/study.json, or compare them with those that are there.

    Raises:
        UserError: results that are there were made with other settings, or OUT is something else.
    """
    path = study_file(study.out)
    texts = list(documents(list(inputs)))
    train, heldout = split_texts(texts)
    settings = {
        "base_sha256": fingerprint(study.base),
        "text_sha256": [sha256_file(file) for file in find_files(list(inputs))],
        "max_tokens": study.max_tokens,
        "fewshot_documents": study.fewshot_documents,
        "calibration_tokens": study.calibration_tokens,
        "dtype": study.dtype,
    }
    plan: dict[str, Any] = {
        "arms": [arm.name for arm in study.arms],
        "tokens": list(study.tokens),
        "num_seeds": study.num_seeds,
        "has_fewshot": study.tasks is not None,
    }
    if path.exists():
        before = read_json(path)
        for key, now in settings.items():
            # A study that began with --results has no dtype yet.
            if (found := before["settings"].get(key, now)) != now:
                raise UserError(
                    f"{path}: field '{key}': found {found!r}, and now {now!r}; expected the same settings in all parts "
                    "of a study: name another --out"
                )
        plan, name = merge_plans(num_layers, before["plan"], plan), name or before["base"]
    base = name or (study.base.name if study.base.is_dir() else study.base.stem)
    content = {"base": base, "num_layers": num_layers, "settings": settings, "plan": plan}
    content |= {"train_documents": len(train), "heldout_documents": len(heldout)}
    content |= {"batch_tokens": BATCH_TOKENS, "train_context": TRAIN_CONTEXT, "learning_rate": LEARNING_RATE}
    write_json(path, content)
    write_texts(study, texts, max(len(draws(arm, study.num_seeds)) for arm in study.arms))


def whole_study(study: Study) -> Study:
    """Return what all parts of a study are to make, of which `study` is one."""
    content = read_json(study_file(study.out))
    plan = content["plan"]
    arms = tuple(arm for arm in all_arms(content["num_layers"]) if arm.name in plan["arms"])
    return replace(study, arms=arms, tokens=tuple(plan["tokens"]), num_seeds=plan["num_seeds"])


def default_dtype(device: str) -> str:
    """Return bfloat16 where it is multiplied in hardware, else float32."""
    return "bfloat16" if device.startswith("cuda") or multiplies_bfloat16() else "float32"


def make_parser() -> CommandParser:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, metavar="DIR", help="pretrained model: HF directory or .gguf file")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help=f"natural text: {INPUT_HELP}")
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="few-shot tasks (eval/tasks/README.md); none: left out"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="results, report, and checkpoints in use"
    )
    parser.add_argument("--minutes", type=float, default=60.0, metavar="N", help="length of this part (default 60)")
    parser.add_argument(
        "--arms", nargs="+", default=[], metavar="NAME", help="only these, or patterns such as '*-r64' (default: all)"
    )
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=[102_400, 204_800, 409_600], metavar="N",
        help=f"lengths of the trainings, multiples of {BATCH_TOKENS}; 0 for none (default: 102400 204800 409600)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="of the arms that decide; the others have one (default 3)"
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="of each measurement of perplexity (default: all that are held out)"
    )
    parser.add_argument("--documents", type=int, default=200, metavar="N", help="of each few-shot task (default 200)")
    parser.add_argument(
        "--calibration-tokens", type=int, default=32_768, metavar="N", help="of each calibration (default 32768)"
    )
    parser.add_argument(
        "--dtype", choices=tuple(TRAINING_DTYPES), help="of training and measurements (default: bfloat16 where the "
        "machine multiplies it, else float32)",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="of a training (default: 2 on a CPU with as many cores, else 1)"
    )
    parser.add_argument("--name", help="of the base, in the report (default: its file name)")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints that were measured")
    parser.add_argument("--print", action="store_true", help="print the commands that are left instead of running them")
    parser.add_argument(
        "--results", type=Path, nargs="+", default=[], metavar="FILE", help="results.json.gz of the same study's parts "
        "elsewhere: what OUT lacks of them is added, and not made again",
    )  # fmt: skip
    parser.add_argument("--report", action="store_true", help="only make the report of the results that are there")
    return parser


def make_study(arguments: argparse.Namespace, num_layers: int) -> Study:
    """Check the flags.

    Raises:
        UserError: one is out of range.
    """
    for flag in ("seeds", "documents", "calibration_tokens", "processes", "max_tokens"):
        value = getattr(arguments, flag)
        if value is not None and value < 1:
            raise UserError(f"--{flag.replace('_', '-')}: found {value}; expected 1 or more")
    tokens = tuple(sorted({*arguments.tokens} - {0}))
    for count in tokens:
        if count < 0 or count % BATCH_TOKENS:
            raise UserError(f"--tokens: found {count}; expected multiples of {BATCH_TOKENS}, the tokens of a step")
    if arguments.data_dir is not None and not arguments.data_dir.is_dir():
        raise UserError(f"--data-dir: found {arguments.data_dir}, which is no directory; expected the tasks' files")
    processes = arguments.processes
    if processes is None:
        processes = min(2, len(os.sched_getaffinity(0))) if arguments.device == "cpu" else 1
    if BATCH_TOKENS // TRAIN_CONTEXT % processes:
        raise UserError(f"--processes: found {processes}; expected 1, 2, 4 or 8, which share {BATCH_TOKENS} tokens")
    return Study(
        arguments.base,
        arguments.out,
        arguments.data_dir,
        tuple(choose_arms(all_arms(num_layers), arguments.arms)),
        tokens,
        # Without a training there is one model of each arm.
        arguments.seeds if tokens else 1,
        arguments.max_tokens,
        arguments.documents,
        arguments.calibration_tokens,
        arguments.dtype or default_dtype(arguments.device),
        arguments.device,
        processes,
    )


def run_study(study: Study, minutes: float, keep: bool) -> None:
    """Run one part, and say what is left.

    Raises:
        UserError: steps failed.
    """
    log = StepLog(study.out / "steps.jsonl")
    if not result_path(study.out, BASE.name, "model").exists():
        write_model_record(study.out, BASE.name, study.base, None)

    def write_record(step: Step) -> None:
        if step.directory is not None:
            write_training_record(step, study.dtype)
        else:
            write_model_record(study.out, step.makes.name, step.makes, log.seconds_of(step))

    # The commands run where this one does, so that relative paths mean the same; rrt need not be installed.
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    steps, planned = study_steps(study), study_steps(whole_study(study))
    delete_unneeded_statistics(study, planned)
    outcome = run_steps(steps, log, seconds=60 * minutes, env=env, write_record=write_record, keep=keep)
    print(f"\nreport: {write_report(study.out)}")
    delete_unneeded_statistics(study, pending_steps(planned))
    if outcome.left:
        left = describe_time_left(outcome.left, log)
        print(f"{len(outcome.left)} of {len(steps)} steps are left, {left}; the same command goes on:")
        print(shlex.join([Path(sys.executable).name, *sys.argv]))
    else:
        print(f"all {len(steps)} steps are done")
    if outcome.failed:
        names = ", ".join(step.name for step in outcome.failed)
        raise UserError(f"{study.out}: not made, as said above: {names}; the same command tries again")


def main() -> None:
    arguments = make_parser().parse_args()
    if arguments.report:
        add_results(arguments.out, arguments.results)
        print(f"report: {write_report(arguments.out)}")
        return
    for flag in ("base", "text"):
        if not getattr(arguments, flag):
            raise UserError(f"--{flag}: missing; expected it, or --report")
    num_layers = open_source(arguments.base).model.num_layers
    study = make_study(arguments, num_layers)
    if arguments.print:
        if arguments.results:
            raise UserError("--print: found --results beside it; expected it alone, as it writes nothing")
        for step in pending_steps(study_steps(study)):
            print(f"# {step.name}\n{shlex.join(step.command)}")
        return
    add_results(arguments.out, arguments.results)
    with locked_directory(study.out):
        open_study(study, arguments.text, arguments.name, num_layers)
        run_study(study, arguments.minutes, arguments.keep)


if __name__ == "__main__":
    run_command(main)
