"""The conversion study: its parts of the text, its steps through interruptions, and its report, without a model."""

import gzip
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import rrt.convert
from rrt.checkpoint.source import open_source
from rrt.common.results import result_header
from rrt.errors import UserError
from rrt.model.sizes import model_sizes
from runs import conversion_study, study_steps
from runs.conversion_arms import DECISIVE, MEASURES, TASKS, all_arms, choose_arms, result_path, trainings
from runs.conversion_study import Study, split_texts, write_texts
from runs.conversion_study import study_steps as list_steps
from runs.conversion_study_report import tokens_to_reach, write_report
from runs.study_results import add_results
from runs.study_steps import Outcome, Step, StepLog, run_steps
from tests.util.commands import run_main, run_program
from tests.util.models import make_hf_model
from tests.util.tokenizers import make_bpe_tokenizer, training_texts

ARMS = all_arms(30)
TEXTS = [f"document {number}" for number in range(59)]


def make_study(out: Path, **changes: Any) -> Study:
    study = Study(
        base=Path("base"),
        out=out,
        tasks=Path("tasks"),
        arms=tuple(choose_arms(ARMS, ["stepwise", "keep-15", "*-r64"])),
        tokens=(4096, 8192),
        num_seeds=3,
        max_tokens=None,
        fewshot_documents=200,
        calibration_tokens=1024,
        dtype="bfloat16",
        device="cpu",
        processes=2,
    )
    return replace(study, **changes)


# Text


def test_the_last_fifth_is_held_out_and_never_trained_or_calibrated_on(tmp_path: Path) -> None:
    train, heldout = split_texts(TEXTS)
    assert (train, heldout) == (TEXTS[:47], TEXTS[47:])
    repeated = split_texts([TEXTS[58], *TEXTS])
    assert repeated == (TEXTS[:47], TEXTS[47:])
    study = make_study(tmp_path)
    write_texts(study, TEXTS, 3)
    files = {path.stem: path.read_text().splitlines() for path in study.data.iterdir()}
    assert set(files) == {"natural", "natural-heldout", "draw1", "draw2"}
    assert [json.loads(line)["text"] for line in files["natural-heldout"]] == heldout
    assert [json.loads(line)["text"] for line in files["natural"]] == train
    for draw in ("draw1", "draw2"):
        assert sorted(files[draw]) == sorted(files["natural"]) != files[draw]
    assert files["draw1"] != files["draw2"]


@pytest.mark.parametrize(
    ("texts", "message"), [(TEXTS[:4], "found 4 documents; expected at least 5"), (["a"] * 9, "also held out")]
)
def test_too_little_text_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_texts(texts)


# Arms


@pytest.mark.timeout(600)
def test_every_arm_is_converted_by_its_command_and_has_the_loops_that_are_measured(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_bpe_tokenizer(make_hf_model(tmp_path / "base", "llama", vocab_size=420), "gpt_neox", vocab_size=420)
    # Of so small a base low-rank-only has no rank that saves parameters.
    arms = choose_arms(all_arms(6), ["stepwise", "keep-3", "*-r64"])
    arms = tuple(arm for arm in arms if not arm.name.startswith("low-rank-only"))
    study = make_study(tmp_path / "out", base=base, arms=arms)
    study = replace(study, calibration_tokens=512, num_seeds=1, tokens=())
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in training_texts()))
    steps = {step.name: step for step in list_steps(study)}
    found = {}
    for arm in study.arms[1:]:
        step = steps[f"convert {arm.name}"]
        assert step.command[1:3] == ("-m", "rrt.convert")
        # Text in place of the shards that an earlier step would make.
        shards = str(study.data / "natural")
        argv = [str(text) if word == shards else word for word in step.command[3:]]
        done = run_main(rrt.convert.main, argv, capsys, monkeypatch)
        assert done.code == 0, (arm.name, done.err)
        source = open_source(step.makes)
        sizes = model_sizes(source.model, source.recursion, source.dtype)
        found[arm.name] = source.recursion.num_loops, sizes.total_params
        assert source.recursion.num_loops == arm.loops, arm.name
    assert found["stepwise"][1] == found["keep-3"][1]
    assert len({found[f"{method}-r64"][1] for method in ("average-svd", "joint", "calibrated", "no-refit")}) == 1


def test_arms_are_named_once_and_those_that_decide_come_first() -> None:
    names = [arm.name for arm in ARMS]
    assert len(set(names)) == len(names) == len({arm.title for arm in ARMS}) == 21
    assert names[:5] == ["base", "stepwise", "keep-15", *DECISIVE]
    assert {arm.name: arm.num_seeds for arm in ARMS if arm.num_seeds} == {
        "stepwise": 1,
        "keep-15": 1,
        "average-svd-r64": 3,
        "calibrated-r64": 3,
        "low-rank-only-r64": 1,
    }
    assert not any("b3" in arm.name for arm in all_arms(4))
    order = [training.name for training in trainings(ARMS, (8192, 4096), 3)]
    assert order[:5] == [
        *(f"{arm}-{tokens}-plain-seed0" for tokens in (4096, 8192) for arm in DECISIVE),
        "stepwise-4096-plain-seed0",
    ]
    seeds = [(name[-1], "distilled" in name) for name in order]
    assert list(dict.fromkeys(seeds)) == [
        ("0", False),
        ("0", True),
        ("1", False),
        ("2", False),
        ("1", True),
        ("2", True),
    ]
    assert len(set(order)) == len(order) == 2 * 2 * (5 + 2 + 2)


def test_arms_are_chosen_by_patterns_and_the_base_is_always_there() -> None:
    assert [arm.name for arm in choose_arms(ARMS, ["keep-*", "joint-r32"])] == ["base", "keep-15", "joint-r32"]
    assert choose_arms(ARMS, []) == ARMS
    with pytest.raises(UserError, match=r"--arms: found 'joint-r31'; expected names, or patterns: base, stepwise"):
        choose_arms(ARMS, ["stepwise", "joint-r31"])


# Steps


class StandIn:
    """Processes that make at once what their step makes, or are interrupted or fail where they are told to."""

    def __init__(self, steps: Sequence[Step], monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = {step.command: step for step in steps}
        self.begun: list[str] = []
        self.interrupted_at: set[int] = set()
        self.failing: set[str] = set()
        self.most_checkpoints = 0
        self.seconds = 0.0
        self.stopped = 0
        monkeypatch.setattr(subprocess, "Popen", lambda command, env: StandInProcess(self, self.steps[command]))

    def clock(self) -> float:
        return self.seconds

    def run(self, minutes: float = 1e9) -> Outcome:
        steps = list(self.steps.values())
        out = next(step.makes for step in steps if step.name == "natural-512 of base").parents[2]
        log = StepLog(out / "steps.jsonl")
        return run_steps(steps, log, seconds=60 * minutes, env={}, write_record=self.write_record, clock=self.clock)

    def write_record(self, step: Step) -> None:
        assert step.record is not None and step.makes.exists()
        step.record.parent.mkdir(parents=True, exist_ok=True)
        step.record.write_text("{}")


class StandInProcess:
    def __init__(self, world: StandIn, step: Step) -> None:
        self.world, self.step = world, step
        self.code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        world, step = self.world, self.step
        if self.code is not None:
            return self.code
        for path in step.needs:
            assert path.exists() or path == Path("base"), (step.name, path)
        world.begun.append(step.name)
        world.seconds += 60
        if len(world.begun) in world.interrupted_at:
            (step.directory or step.makes.with_suffix(".partial")).mkdir(parents=True, exist_ok=True)
            raise KeyboardInterrupt
        if step.name in world.failing:
            self.code = 1
            return 1
        step.makes.parent.mkdir(parents=True, exist_ok=True)
        step.makes.mkdir() if step.is_temporary or step.kind == "data" else step.makes.write_text("{}")
        checkpoints = [each for each in world.steps.values() if each.is_temporary and each.makes.exists()]
        world.most_checkpoints = max(world.most_checkpoints, len(checkpoints))
        self.code = 0
        return 0

    def poll(self) -> int | None:
        return self.code

    def terminate(self) -> None:
        self.world.stopped += 1
        self.code = -15


def test_everything_is_made_once_and_in_order_and_checkpoints_do_not_pile_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = list_steps(make_study(tmp_path / "out"))
    assert len({step.name for step in steps}) == len(steps)
    world = StandIn(steps, monkeypatch)
    assert world.run() == Outcome((), ())
    assert world.begun == [step.name for step in steps]
    # The starts of five trained arms, and what is being measured.
    assert world.most_checkpoints <= 7
    assert not any(path.is_dir() for path in (tmp_path / "out" / "checkpoints").iterdir())
    made = {path for path in tmp_path.rglob("results/*/*.json")}
    models = Counter(path.parent.name for path in made)
    assert models["average-svd-r64"] == models["calibrated-b3-r64"] == 5
    assert models["calibrated-r64-draw2"] == models["stepwise-4096-distilled-seed0"] == 4
    assert models["stepwise-8192-distilled-seed0"] == 5
    before = len(world.begun)
    assert world.run() == Outcome((), ()) and len(world.begun) == before


def test_an_interrupted_study_goes_on_from_the_step_that_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = list_steps(make_study(tmp_path / "out", num_seeds=1))
    world = StandIn(steps, monkeypatch)
    world.interrupted_at = {1, 7, 30, 31, len(steps) // 2, len(steps)}
    for _ in world.interrupted_at:
        with pytest.raises(KeyboardInterrupt):
            world.run()
    assert world.run() == Outcome((), ())
    assert world.stopped == len(world.interrupted_at)
    repeated = {name for name, count in Counter(world.begun).items() if count > 1}
    assert set(world.begun) == {step.name for step in steps}
    assert len(world.begun) == len(steps) + len(world.interrupted_at) and len(repeated) <= 6


def test_a_checkpoint_is_made_again_only_for_results_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    steps = list_steps(make_study(out, num_seeds=1))
    world = StandIn(steps, monkeypatch)
    world.run()
    world.begun.clear()
    result_path(out, "joint-r64", "code-512").unlink()
    result_path(out, "low-rank-only-r64-4096-plain-seed0", "natural-512").unlink()
    world.run()
    trained = "low-rank-only-r64-4096-plain-seed0"
    assert world.begun == [
        "convert joint-r64",
        "code-512 of joint-r64",
        "convert low-rank-only-r64",
        f"train {trained}",
        f"natural-512 of {trained}",
    ]


def test_a_lost_record_of_a_checkpoint_that_is_there_is_written_without_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    steps = list_steps(make_study(out, arms=tuple(choose_arms(ARMS, ["stepwise"])), tokens=()))
    world = StandIn(steps, monkeypatch)
    (out / "checkpoints" / "stepwise").mkdir(parents=True)
    world.run()
    assert "convert stepwise" not in world.begun and result_path(out, "stepwise", "model").exists()


def test_conversions_on_a_draw_share_statistics_which_are_deleted_when_none_is_left(tmp_path: Path) -> None:
    study = make_study(tmp_path / "out")
    shared: dict[str, set[str]] = {}
    for step in list_steps(study):
        if "--calibration-statistics" in step.command:
            directory = step.command[step.command.index("--calibration-statistics") + 1]
            shared.setdefault(directory, set()).add(step.name)
    first, *others = (str(study.statistics(draw)) for draw in range(3))
    # Two loops of rank 64 with and without refit, three loops, and low rank only.
    assert len(shared[first]) == 4 and [shared[each] for each in others] == [
        {"convert calibrated-r64-draw1"},
        {"convert calibrated-r64-draw2"},
    ]
    for directory in (first, *others):
        Path(directory).mkdir(parents=True)
    left = [step for step in list_steps(study) if step.name == "convert calibrated-r64-draw2"]
    conversion_study.delete_unneeded_statistics(study, left)
    assert list(study.statistics(0).parent.iterdir()) == [study.statistics(2)]
    mine = study.statistics(0).parent / "mine"
    mine.touch()
    for empty in (study, make_study(tmp_path / "new")):
        conversion_study.delete_unneeded_statistics(empty, [])
    assert list(study.statistics(0).parent.iterdir()) == [mine]


def test_no_step_begins_that_would_not_end_in_time_but_one_always_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each takes a minute.
    steps = list_steps(make_study(tmp_path / "out", num_seeds=1, tokens=()))
    world = StandIn(steps, monkeypatch)
    assert len(world.run(minutes=10).left) == len(steps) - 10
    # Unknown kinds have begun until then; 2.5 minutes are time for two more.
    assert len(world.run(minutes=2.5).left) == len(steps) - 12
    assert len(world.run(minutes=0).left) == len(steps) - 13
    assert world.begun == [step.name for step in steps[:13]]


def test_a_failed_step_holds_up_only_what_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    steps = list_steps(make_study(tmp_path / "out", num_seeds=1))
    world = StandIn(steps, monkeypatch)
    world.failing = {"convert calibrated-r64", "natural-512 of stepwise"}
    outcome = world.run()
    assert [step.name for step in outcome.failed] == ["natural-512 of stepwise", "convert calibrated-r64"]
    left = {step.name for step in outcome.left}
    # What is missing of an arm that was measured needs its checkpoint, which is kept.
    assert left == world.failing | {step.name for step in steps if "calibrated-r64" in step.name}
    assert (tmp_path / "out/checkpoints/stepwise").exists()
    assert "failed: convert calibrated-r64; what needs it is left" in capsys.readouterr().out
    world.failing = set()
    assert world.run() == Outcome((), ())


def test_a_command_that_makes_nothing_has_failed(tmp_path: Path) -> None:
    step = Step("nothing", "kind", (sys.executable, "-S", "-c", ""), tmp_path / "out")
    log = StepLog(tmp_path / "steps.jsonl")
    outcome = run_steps([step], log, seconds=60, env=os.environ, write_record=lambda _: None)
    assert outcome == Outcome((step,), (step,)) and log.estimate(step) is None


def test_times_of_steps_are_estimated_from_their_kind_and_outlast_crashes(tmp_path: Path) -> None:
    def step(name: str, size: float, kind: str = "training") -> Step:
        return Step(name, kind, (), tmp_path / name, size=size)

    log = StepLog(tmp_path / "steps.jsonl")
    log.add(step("a", 100), 5.0, "failed")
    log.add(step("a", 100), 30.0, "interrupted")
    assert (log.seconds_of(step("a", 100)), log.estimate(step("b", 50))) == (None, None)
    log.add(step("a", 100), 20.0, "finished")
    log.add(step("b", 300), 50.0, "finished")
    with log.path.open("a") as stream:
        stream.write('\n{"step": "b", "ki')
    log.add(step("a", 100), 50.0, "finished")
    again = StepLog(log.path)
    assert again.seconds_of(step("a", 100)) == 50.0
    assert again.estimate(step("c", 200)) == 50.0
    assert again.estimate(step("c", 1, "few-shot")) is None
    assert study_steps.describe_time_left([step("c", 14400), step("d", 1, "few-shot")], again) == (
        "about 1 h 0 min, and 1 of kinds that have not run yet"
    )


def test_an_interruption_ends_the_command_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training ends by SIGTERM, on which it saves; here a process that notes the signal."""
    noted = tmp_path / "noted"
    code = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(sys.argv[1]).touch(), sys.exit(0)))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    popen = subprocess.Popen

    def begin(command: Sequence[str], env: dict[str, str]) -> "subprocess.Popen[str]":
        process = popen(command, env=env, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        wait = process.wait

        def interrupted(timeout: float | None = None) -> int:
            process.wait = wait  # type: ignore[method-assign]
            raise KeyboardInterrupt

        process.wait = interrupted  # type: ignore[method-assign, assignment]
        return process

    monkeypatch.setattr(subprocess, "Popen", begin)
    step = Step("sleep", "kind", (sys.executable, "-S", "-c", code, str(noted)), tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run_steps([step], StepLog(tmp_path / "log"), seconds=60, env=os.environ, write_record=lambda _: None)
    assert noted.exists()
    assert '"interrupted"' in (tmp_path / "log").read_text()


# Report


def write_study_file(out: Path, arms: Sequence[str] | None = None, tokens: Sequence[int] = (102_400, 204_800)) -> None:
    settings = {"calibration_tokens": 32768, "fewshot_documents": 200}
    content = {
        "base": "SmolLM2",
        "num_layers": 30,
        "settings": settings,
        "plan": {
            "arms": [arm.name for arm in ARMS if arms is None or arm.name in arms],
            "tokens": list(tokens),
            "num_seeds": 3,
            "has_fewshot": True,
        },
        **{"train_documents": 47, "heldout_documents": 12, "batch_tokens": 4096, "train_context": 512},
        "learning_rate": 2e-4,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "study.json").write_text(json.dumps(content))


HEADER = result_header()


def write_one(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**HEADER, **values}))


def write_perplexity(out: Path, model: str, measure: str, perplexity: float) -> None:
    path = result_path(out, model, measure)
    write_one(path, {"loss": math.log(perplexity), "perplexity": perplexity, "tokens": 45678})


def write_fewshot(out: Path, model: str, share: float) -> None:
    tasks = {task: {"metrics": {"acc": 0.0, "acc_norm": share}} for task in TASKS}
    write_one(result_path(out, model, "fewshot"), {"tasks": tasks})


def write_model(out: Path, model: str, parameters: int, seconds: float | None) -> None:
    sizes = {"total_params": parameters, "lora_params": parameters // 5}
    write_one(result_path(out, model, "model"), {**sizes, "conversion_seconds": seconds})


def write_training(out: Path, model: str) -> None:
    steps = range(1, 51)
    result = {"tokens": [4096 * step for step in steps], "loss": [10 / step for step in steps]}
    write_one(result_path(out, model, "training"), result)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A study of which the base and the decisive pair are there, apart from the third seed and distillation."""
    out = tmp_path / "out"
    write_study_file(out)
    write_model(out, "base", 134_500_000, None)
    write_model(out, "average-svd-r64", 100_950_000, 33.3)
    write_model(out, "calibrated-r64", 100_950_000, 512.0)
    for measure in MEASURES:
        write_perplexity(out, "base", measure, 30.4)
        write_perplexity(out, "average-svd-r64", measure, 3_344_216.0)
        for draw, perplexity in enumerate((93.0, 94.0, 96.0)):
            write_perplexity(out, "calibrated-r64" + (f"-draw{draw}" if draw else ""), measure, perplexity)
    for arm, ends in {"average-svd-r64": (500.0, 75.0), "calibrated-r64": (60.0, 45.0)}.items():
        for tokens, end in zip((102_400, 204_800), ends, strict=True):
            for seed in (0, 1):
                write_perplexity(out, f"{arm}-{tokens}-plain-seed{seed}", "natural-512", end * 1.1**seed)
        write_training(out, f"{arm}-204800-plain-seed0")
    write_fewshot(out, "base", 0.5)
    write_fewshot(out, "calibrated-r64-204800-plain-seed0", 0.25)
    return out


def cells(report: str, title: str, start: str) -> list[str]:
    """The cells of the first row that begins with `start`, in the table under `title`."""
    table = report.partition(f"**{title}")[2]
    line = next(line for line in table.splitlines() if line.startswith(f"| {start} |"))
    return line.strip("| ").split(" | ")


def test_report_is_made_of_the_results_and_shows_what_is_missing(results: Path) -> None:
    report = write_report(results).read_text()
    after = "Right after conversion"
    assert cells(report, after, "base")[1:] == [
        *("134.50 M", "26.90 M", "", "30.40", "30.40", "30.40"),
        *("50.0", "50.0", "50.0", "50.0"),
    ]
    assert cells(report, after, "average + SVD, rank 64")[3:7] == ["33 s", *["3,344,216"] * 3]
    assert cells(report, after, "calibrated, rank 64")[3:] == ["9 min", *["93.00"] * 3, *["missing"] * 4]
    assert cells(report, after, "joint, without data, rank 128")[1:] == ["missing"] * 10
    assert "on 3 draws of the calibration text: text, 512 93.00, 94.00, 96.00" in report

    trained = "After training: perplexity of held-out text, context 512"
    assert cells(report, trained, "average + SVD, rank 64 | no")[2:] == [
        "3,344,216",
        "524.4 (500.0 to 550.0), 2 of 3",
        "78.66 (75.00 to 82.50), 2 of 3",
    ]
    assert cells(report, trained, "calibrated, rank 64 | no")[2] == "94.33 (93.00 to 96.00)"
    assert cells(report, trained, "calibrated, rank 64 | yes")[2:] == ["94.33 (93.00 to 96.00)", "missing", "missing"]
    assert cells(report, "After training on 0.205 M tokens", "calibrated, rank 64 | no")[2:] == ["25.0"] * 4
    for name in ("conversion", "uptraining", "training-loss"):
        assert f"](conversion-study-{name}.svg)" in report
        root = ElementTree.fromstring((results / f"conversion-study-{name}.svg").read_text())
        assert root.tag.endswith("svg")
    again = {path: path.read_text() for path in results.glob("*.svg")} | {results / "report.md": report}
    write_report(results)
    assert all(path.read_text() == text for path, text in again.items())
    assert str(results) not in report and max(map(len, report.partition("**")[0].splitlines())) <= 120


def test_report_says_how_many_tokens_the_papers_way_needs(results: Path) -> None:
    report = write_report(results).read_text()
    row = cells(report, "Tokens that average + SVD needs", "held-out text, context 512 | no")
    # From 524.4 to 78.66 over one doubling, to the 94.33 of the calibrated one's three texts.
    share = math.log(524.4 / 94.33) / math.log(524.4 / 78.66)
    assert row[2:4] == ["94.33", f"about {102_400 * 2**share / 1e6:.3g} M"]
    # 60 against 500, and 45 against 75, at the same seeds.
    assert row[5:] == [f"{math.log(60 / 500):+.3f}", f"{math.log(45 / 75):+.3f}"]
    row = cells(report, "Tokens that average + SVD needs", "held-out text, context 512 | yes")
    assert row[2:4] == ["94.33", "missing"] and row[5:] == ["missing", "missing"]


@pytest.mark.parametrize(
    ("curve", "target", "expected"),
    [
        ([(0, 15.0), (100, 6.0), (400, 4.0)], 5.0, ("about", 200)),
        ([(0, 15.0), (100, 6.0), (400, 4.0)], 4.0, ("about", 400)),
        ([(0, 15.0), (100, 6.0), (400, 4.0)], 3.9, ("more than", 400)),
        ([(0, 15.0), (100, 6.0), (400, 4.0)], 6.5, ("less than", 100)),
        ([(100, 6.0), (200, 6.5), (400, 4.0)], 6.0, ("less than", 100)),
        ([(0, 15.0)], 5.0, None),
        ([], 5.0, None),
    ],
)
def test_tokens_to_reach_a_loss_are_between_trainings_or_a_bound(curve: Any, target: float, expected: Any) -> None:
    assert tokens_to_reach(curve, target) == expected


def test_report_of_nothing_is_all_missing_and_old_plots_are_gone(results: Path) -> None:
    write_report(results)
    shutil.rmtree(results / "results")
    report = write_report(results).read_text()
    assert set(cells(report, "Right after conversion", "base")[1:]) == {"missing"}
    assert "Held-out loss over tokens of uptraining: missing" in report and not list(results.glob("*.svg"))
    write_study_file(results, arms=["base", "keep-15"], tokens=())
    report = write_report(results).read_text()
    assert "After training" not in report and "stepwise" not in report


def test_a_damaged_result_and_a_folder_without_a_study_are_one_line(results: Path, tmp_path: Path) -> None:
    result_path(results, "base", "model").write_text("{}")
    with pytest.raises(UserError, match="field 'conversion_seconds' is missing; expected a whole result"):
        write_report(results)
    with pytest.raises(UserError, match=r"study\.json: no such file"):
        write_report(tmp_path)


def test_a_study_goes_on_elsewhere_with_the_results_of_its_archive(
    results: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = write_report(results).read_text()
    packed = (results / "results.json.gz").read_bytes()
    write_report(results)
    assert (results / "results.json.gz").read_bytes() == packed

    other = tmp_path / "other"
    flags = ["--out", other, "--report", "--results", results / "results.json.gz"]
    done = run_program(conversion_study.main, flags, capsys, monkeypatch)
    added = len(list(results.glob("results/*/*.json")))
    assert done.code == 0 and f"results.json.gz: {added} results added" in done.out
    assert (other / "report.md").read_text() == report
    assert (other / "results.json.gz").read_bytes() == packed

    # What is there is kept, what is missing is added, and the plans of both are to be made.
    write_perplexity(other, "base", "code-512", 2.0)
    result_path(other, "base", "natural-512").unlink()
    write_study_file(other, arms=["base", "joint-r32"], tokens=(409_600,))
    assert "1 results added" in run_program(conversion_study.main, flags, capsys, monkeypatch).out
    assert cells((other / "report.md").read_text(), "Right after conversion", "base")[4:7] == ["30.40", "30.40", "2.00"]
    plan = json.loads((other / "study.json").read_text())["plan"]
    assert (plan["arms"], plan["tokens"]) == ([arm.name for arm in ARMS], [102_400, 204_800, 409_600])


def test_a_part_on_another_machine_may_have_another_dtype_but_keeps_its_own(
    command: list[Any], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_steps, "_run", lambda *_: False)

    def run(*flags: Any) -> Any:
        flags = ("--minutes", 0, "--arms", "keep-2", "--tokens", 4096, *flags)
        return run_program(conversion_study.main, [*command, *flags], capsys, monkeypatch)

    run("--dtype", "bfloat16")
    archive = (command[-1] / "results.json.gz").rename(tmp_path / "results.json.gz")
    shutil.rmtree(command[-1])
    assert "results added" in run("--results", archive, "--dtype", "float32").out
    assert "field 'dtype': found 'float32', and now 'bfloat16'" in run("--dtype", "bfloat16").err
    assert "not made, as said above" in run("--dtype", "float32").err
    assert "--print: found --results beside it" in run("--results", archive, "--print").err


def test_an_archive_of_another_study_or_none_at_all_is_one_line_and_adds_nothing(results: Path, tmp_path: Path) -> None:
    write_report(results)
    archive, other = results / "results.json.gz", tmp_path / "other"
    write_study_file(other)
    study = json.loads((other / "study.json").read_text())
    study["settings"]["calibration_tokens"] = 8192
    (other / "study.json").write_text(json.dumps(study))
    with pytest.raises(UserError, match="setting 'calibration_tokens': found 32768; expected 8192, as in"):
        add_results(other, [archive])
    packed = archive.read_bytes()
    content = json.loads(gzip.decompress(packed))
    bad = tmp_path / "bad.json.gz"
    for damaged, message in {
        packed[:-9]: "expected a results.json.gz of a study",
        b"{}": "expected a results.json.gz of a study",
        packed[:40] + b"x" * 40: "expected a results.json.gz of a study",
        gzip.compress(b'{"kind": "fewshot"}'): "field 'kind': found 'fewshot'; expected 'conversion-study-results'",
        gzip.compress(json.dumps({**content, "study": {}}).encode()): "field 'settings' is missing",
        gzip.compress(json.dumps({**content, "results": {"../x": {"model": {}}}}).encode()): "named '../x'",
        gzip.compress(
            json.dumps({**content, "results": {"..": {"model": {}}}}).encode()
        ): "named '..'; expected an arm",
    }.items():
        bad.write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            add_results(tmp_path / "new", [bad])
    with pytest.raises(UserError, match="nowhere"):
        add_results(tmp_path / "new", [tmp_path / "nowhere"])
    assert not list((tmp_path / "new").iterdir()) and not (other / "results").exists()
    (tmp_path / "new" / "notes").touch()
    with pytest.raises(UserError, match="new: not empty and not an earlier study"):
        add_results(tmp_path / "new", [archive])


def test_report_says_which_models_are_in_another_dtype(results: Path) -> None:
    assert "measurements in missing." in write_report(results).read_text()
    for model, dtype in {"base": "bfloat16", "calibrated-r64": "bfloat16", "average-svd-r64": "float32"}.items():
        write_one(result_path(results, model, "code-512"), {"loss": 3.0, "tokens": 45678, "dtype": dtype})
    assert "in bfloat16; in float32: average-svd-r64." in " ".join(write_report(results).read_text().split())


# Command


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "tiny"
    make_hf_model(directory, "gpt_neox", num_layers=4, vocab_size=420, max_position_embeddings=2048)
    return make_bpe_tokenizer(directory, vocab_size=420)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number} " * 400}) + "\n" for number in range(10)))
    return path


@pytest.fixture
def command(base: Path, text: Path, tmp_path: Path) -> Iterator[list[Any]]:
    yield ["--base", base, "--text", text, "--out", tmp_path / "out"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens", 4096, 5000], "--tokens: found 5000; expected multiples of 4096"),
        (["--arms", "no-such"], "--arms: found 'no-such'; expected names, or patterns: base, stepwise, keep-2"),
        (["--seeds", 0], "--seeds: found 0; expected 1 or more"),
        (["--calibration-tokens", -1], "--calibration-tokens: found -1; expected 1 or more"),
        (["--processes", 3], "--processes: found 3; expected 1, 2, 4 or 8"),
        (["--data-dir", "nowhere"], "--data-dir: found nowhere, which is no directory"),
        (["--text", "nowhere.jsonl"], "nowhere.jsonl: no file matches"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(
    flags: list[Any], message: str, command: list[Any], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run_program(conversion_study.main, [*command, *flags], capsys, monkeypatch)
    assert (done.code, done.err.count("\n")) == (2, 1) and message in done.err
    assert not (command[-1] / "study.json").exists()


def test_commands_are_printed_without_running_them(
    command: list[Any], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run_program(
        conversion_study.main, [*command, "--arms", "keep-2", "--tokens", 4096, "--print"], capsys, monkeypatch
    )
    assert done.code == 0 and not command[-1].exists()
    names = re.findall("^# (.*)", done.out, flags=re.M)
    measured = ["natural-512", "natural-2048", "code-512"]
    trained = [f"keep-2-4096-{kind}-seed0" for kind in ("plain", "distilled")]
    assert names == [
        *("held-out code", "tokens of code", "tokens of natural"),
        *(f"{measure} of base" for measure in measured),
        "convert keep-2",
        *(f"{measure} of keep-2" for measure in measured),
        *(name for model in trained for name in (f"train {model}", *(f"{m} of {model}" for m in measured))),
    ]


def test_settings_of_a_study_stay_the_same_and_its_plan_grows(
    command: list[Any], text: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = command[-1]

    def run(*flags: Any) -> Any:
        return run_program(conversion_study.main, [*command, "--minutes", 0, *flags], capsys, monkeypatch)

    monkeypatch.setattr(study_steps, "_run", lambda *_: False)
    old = out / "statistics" / "draw0-of-other-code"
    assert "not made, as said above: held-out code;" in run("--arms", "keep-2", "--tokens", 4096).err
    old.mkdir(parents=True)
    assert "calibrated" not in (out / "report.md").read_text()
    run("--arms", "calibrated-r64", "--tokens", 8192, "--seeds", 2, "--name", "Tiny")
    assert not old.exists()
    plan = json.loads((out / "study.json").read_text())
    assert plan["plan"] == {
        "arms": ["base", "keep-2", "calibrated-r64"],
        "tokens": [4096, 8192],
        "num_seeds": 3,
        "has_fewshot": False,
    }
    assert plan["base"] == "Tiny"
    done = run("--max-tokens", 5)
    assert "study.json: field 'max_tokens': found None, and now 5; expected the same settings" in done.err
    text.write_text(text.read_text() + '{"text": "more"}\n')
    assert "field 'text_sha256'" in run().err
    report = run_program(conversion_study.main, ["--out", out, "--report"], capsys, monkeypatch)
    assert (report.code, report.out) == (0, f"report: {out}/report.md\n")
    missing = run_program(conversion_study.main, ["--out", out], capsys, monkeypatch)
    assert missing.err == "error: --base: missing; expected it, or --report\n"


def test_a_folder_of_something_else_and_a_second_study_at_once_are_refused(
    command: list[Any], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = command[-1]
    with conversion_study.locked_directory(out):
        done = run_program(conversion_study.main, command, capsys, monkeypatch)
        assert "another process writes here; wait for it" in done.err
    (out / "mine").touch()
    done = run_program(conversion_study.main, command, capsys, monkeypatch)
    assert "not empty and not an earlier study" in done.err and os.listdir(out) == ["mine"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_study_of_a_tiny_model_runs_in_parts(command: list[Any], tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    program = [sys.executable, str(root / "runs" / "conversion_study.py"), *map(str, command)]
    program += ["--arms", "average-svd-r64", "--tokens", "204800", "--seeds", "1", "--processes", "1"]
    out = command[-1]

    def begin(minutes: float) -> "subprocess.Popen[str]":
        arguments = [*program, "--minutes", str(minutes)]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)

    first = begin(0).communicate()[0]
    assert "=== step 1 of 18: held-out code" in first and "17 of 18 steps are left" in first
    part = begin(60)
    assert part.stdout is not None
    # The first training, in the middle: on SIGTERM it saves where it is.
    assert any(line.startswith("step 20/50 ") for line in part.stdout)
    part.terminate()
    stopped = part.communicate()[0]
    assert part.returncode == 143 and stopped.endswith("interrupted\n"), stopped
    rest = begin(60).communicate()[0]
    assert rest.count("resuming from") == 1 and "all 18 steps are done" in rest, rest
    report = (out / "report.md").read_text()
    assert cells(report, "Right after conversion", "average + SVD, rank 64")[1] != "missing"
    assert cells(report, "After training: perplexity of held-out code", "average + SVD, rank 64 | yes")[3] != "missing"
    assert not [path for path in (out / "checkpoints").iterdir() if path.is_dir()]
