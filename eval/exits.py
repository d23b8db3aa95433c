"""Cost and savings of early exits: python eval/exits.py --checkpoint DIR --data FILE --out runs/out/exits

Runs the model over samples of a corpus, one per document and at most `--context` tokens long, and records the
prediction of every loop at every token. From that:

- static exits: each loop's perplexity, its agreement with the last loop, and its few-shot accuracy (--fewshot)
- the oracle's trajectories: the earliest loop whose most probable token is the last loop's (for eval/throughput.py)
- confidence against agreement; agreement, loops and perplexity by one threshold for all loops
- with --calibrate 0.95, thresholds for that agreement of early exits with full depth, saved into the checkpoint as
  exit_thresholds.json for serving (fitted on every other sample, measured on the others)

The recording streams to `--out` and goes on where it stopped; `torchrun` shares the work.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.calibration import calibrate, reliability, threshold_curve
from eval.flags import (
    add_stream_flags,
    check_least,
    check_output_file,
    choose_bos,
    choose_context,
    notice_untrained,
)
from eval.stream import (
    PAD,
    Corpus,
    Window,
    batches,
    document_windows,
    make_batch,
    score_exits,
)
from eval.tables import Table, print_tables
from eval.trajectories import SAMPLES_PER_PART, Recording, Totals, Trajectories, digest_samples, read_trajectories
from rrt.checkpoint.exit_thresholds import save_exit_thresholds
from rrt.checkpoint.source import load_model, open_source
from rrt.common.cli import CommandParser, run_command
from rrt.common.dtypes import add_dtype_flag, chosen_dtype, dtype_name
from rrt.common.files import read_json
from rrt.common.processes import Replica, replicas, report_error_once
from rrt.common.provenance import fingerprint
from rrt.common.results import write_result
from rrt.data.tokenizer import check_vocab, load_tokenizer
from rrt.errors import UserError
from rrt.model.transformer import RecursiveTransformer

CURVE_THRESHOLDS = (0.0, *(i / 20 for i in range(1, 19)), 0.925, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0)


def loss_confidence_token(logits: Tensor, targets: Tensor) -> Tensor:
    """Reduce logits [n, V] to [n, 3]: loss in nats, the largest probability, and its token (exact in fp32)."""
    top, token = logits.max(-1)
    total = logits.logsumexp(-1)
    loss = total - logits.gather(-1, targets[:, None]).squeeze(-1)
    return torch.stack((loss, (top - total).exp(), token.to(logits.dtype)), dim=-1)


def record(
    model: RecursiveTransformer, samples: list[Window], context: int, batch_size: int, bos_id: int | None
) -> tuple[Trajectories, Totals]:
    """Compute the trajectories of a few samples, and their totals."""
    numbered = [np.stack((window[0], np.full(window.shape[1], i))) for i, window in enumerate(samples)]
    found, sample_ids = [], []
    for windows in batches(numbered, context, batch_size):
        batch = make_batch(windows, bos_id)
        found.append(score_exits(model, batch, range(model.recursion.num_loops), loss_confidence_token).cpu())
        sample_ids.append(batch.groups[batch.targets != PAD])
    order = torch.cat(sample_ids).argsort(stable=True)
    loss, confidence, token = torch.cat(found, dim=1)[:, order].unbind(-1)
    trajectories = Trajectories(
        lengths=np.array([window.shape[1] - 1 for window in samples], dtype=np.int32),
        top_tokens_agree=(token == token[-1]).numpy(),
        confidence=confidence[:-1].float().numpy(),
        loss=loss.numpy(),
    )
    return trajectories, Totals(loss.double().sum(1).numpy(), (token[:, None] == token[None]).sum(-1).numpy())


def make_recording(arguments: argparse.Namespace, replica: Replica) -> None:
    """Record the samples that `--out` lacks."""
    source = open_source(arguments.checkpoint)
    num_loops = source.recursion.num_loops
    if num_loops < 2:
        raise UserError(f"{arguments.checkpoint}: has 1 loop and no exit before its end; expected a looped checkpoint")
    source.recursion.require_whole_loops(f"{arguments.checkpoint}: found a model")
    tokenizer = load_tokenizer(arguments.checkpoint)
    check_vocab(tokenizer, source.model.vocab_size, arguments.checkpoint)
    context = choose_context(arguments, source.model.context_length)
    check_least("--samples", arguments.samples)
    bos_id = choose_bos(arguments, tokenizer)
    corpus = Corpus(arguments.data, arguments.split, arguments.text_field, None, tokenizer)
    dtype = chosen_dtype(arguments) or source.dtype
    settings = {"data": arguments.data, "split": arguments.split, "text_field": arguments.text_field}
    settings |= {"context": context, "samples": arguments.samples, "bos": bos_id is not None}
    settings |= {"num_loops": num_loops, "dtype": dtype_name(dtype)}
    settings["checkpoint_sha256"] = fingerprint(Path(arguments.checkpoint))
    if replica.is_main:
        Recording(arguments.out, settings)  # makes the directory, which the others then find
    replica.wait()
    recording = Recording(arguments.out, settings)
    if replica.is_main:
        notice_untrained(source, range(num_loops))
    model = load_model(arguments.checkpoint, dtype, replica.device)
    model.set_merge(True)

    def samples() -> Iterator[Window]:
        for document in corpus.documents():
            yield from itertools.islice(document_windows([document], context, bos_id), 1)

    left = itertools.islice(samples(), arguments.samples)
    hidden, stopped = None if replica.is_main else True, None
    with tqdm(total=arguments.samples, unit="sample", desc="recording", disable=hidden) as bar:
        try:
            for part in itertools.count():
                windows = list(itertools.islice(left, SAMPLES_PER_PART))
                digest = digest_samples([window[0] for window in windows])
                is_mine = part % replica.count == replica.rank
                # Checked once more after the last window: a recording of more samples is one of other data.
                is_done = is_mine and recording.has(part, digest)
                if not windows:
                    break
                if is_mine and not is_done:
                    trajectories, totals = record(model, windows, context, arguments.batch_size, bos_id)
                    if not np.isfinite(totals.loss).all():
                        raise UserError(
                            f"{arguments.checkpoint}: the loss is {totals.loss} in {dtype_name(dtype)}; expected "
                            "finite numbers: try --dtype float32 or bfloat16"
                        )
                    recording.write(part, digest, trajectories, totals)
                bar.update(len(windows))
        except UserError as error:
            stopped = error
    replica.wait(stopped)


def read_fewshot_accuracy(paths: list[Path], checkpoint: str) -> dict[int, float]:
    """Read the average of the seven tasks after each loop from results of eval/fewshot.py on this checkpoint."""
    found: dict[int, float] = {}
    own = fingerprint(Path(checkpoint)) if paths else None
    for path in paths:
        result = read_json(path)
        if not isinstance(result.get("average"), dict) or "exit_loop" not in result:
            raise UserError(f"{path}: no average of the seven tasks; expected a result of eval/fewshot.py")
        if result.get("checkpoint_sha256") != own:
            raise UserError(f"{path}: field 'checkpoint_sha256': is not that of {checkpoint}; expected the same")
        found[int(result["exit_loop"])] = float(result["average"]["value"])
    return found


def analyse(arguments: argparse.Namespace, accuracy: dict[int, float]) -> dict[str, Any]:
    """Make the result from the recording and the few-shot accuracy after each loop."""
    found, totals, meta = read_trajectories(arguments.out)
    tokens, last = found.num_tokens, found.num_loops - 1
    exit_loops = found.oracle_exits()
    pairs, loss = totals.pair_agreement / tokens, totals.loss / tokens
    fit, held_back = (found.samples(slice(start, None, 2)) for start in (0, 1))
    if arguments.calibrate and not held_back.num_tokens:
        count = len(found.lengths)
        raise UserError(
            f"{arguments.data}: found {count} sample(s), one per document; expected at least 2 to calibrate"
        )
    agreements = arguments.calibrate or ((0.9, 0.95, 0.99) if held_back.num_tokens else ())
    calibrations = [calibrate(fit, held_back, wanted) for wanted in agreements]
    if arguments.calibrate:
        path = save_exit_thresholds(
            arguments.checkpoint, found.num_loops, calibrations, data=arguments.data, tokens=fit.num_tokens
        )
        print(f"wrote {path}")
    return {
        "kind": "exits",
        "checkpoint": str(arguments.checkpoint),
        **{name: meta[name] for name in ("checkpoint_sha256", "data", "context", "bos", "dtype", "num_loops")},
        "samples": len(found.lengths),
        "tokens": tokens,
        "static": [
            {
                "loop": loop,
                "loss": float(loss[loop]),
                "perplexity": float(np.exp(loss[loop])),
                "agreement": float(pairs[loop, last]),
                "fewshot": accuracy.get(loop),
            }
            for loop in range(found.num_loops)
        ],
        "pair_agreement": pairs.tolist(),
        "oracle": {
            "mean_loops": float(exit_loops.mean()) + 1,
            "share": (np.bincount(exit_loops, minlength=found.num_loops) / tokens).tolist(),
        },
        "reliability": [reliability(found, loop) for loop in range(last)],
        "thresholds": threshold_curve(found, CURVE_THRESHOLDS),
        "calibrations": [asdict(entry) for entry in calibrations],
        "saved": bool(arguments.calibrate),
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """Make the tables of static exits beside the oracle's, and of thresholds with their measured agreement."""
    static = [
        [
            str(row["loop"]),
            f"{row['perplexity']:.4f}",
            f"{row['agreement']:.2%}",
            f"{share:.2%}",
            "" if row["fewshot"] is None else f"{row['fewshot']:.1%}",
        ]
        for row, share in zip(result["static"], result["oracle"]["share"], strict=True)
    ]
    calibrations = [
        [
            str(row["agreement"]),
            ", ".join("never" if value is None else f"{value:.5f}" for value in row["thresholds"]),
            "" if row["measured_agreement"] is None else f"{row['measured_agreement']:.4f}",
            f"{row['mean_loops']:.4f}",
        ]
        for row in result["calibrations"]
    ]
    oracle = f"With oracle exits a token takes {result['oracle']['mean_loops']:.4f} of {result['num_loops']} loops."
    shown = [
        Table(
            f"{result['samples']:,} samples, {result['tokens']:,} tokens; exit of all tokens after a loop",
            ["loop", "perplexity", "agrees with last", "oracle exits", "few-shot"],
            static,
            (),
            notes=[oracle],
        ),
    ]
    if calibrations:
        shown.append(
            Table("Thresholds", ["wanted agreement", "thresholds", "measured", "loops/token"], calibrations, ())
        )
    return shown


@report_error_once
def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_stream_flags(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the recording")
    parser.add_argument("--samples", type=int, default=20_000, metavar="N", help="most samples (default 20,000)")
    parser.add_argument(
        "--calibrate", type=float, nargs="+", metavar="A", help="save thresholds for these agreements, such as 0.95"
    )
    parser.add_argument(
        "--fewshot", type=Path, nargs="+", default=[], metavar="JSON", help="results of eval/fewshot.py, one per exit"
    )
    add_dtype_flag(parser, "dtype to compute in")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result here")
    arguments = parser.parse_args()
    check_output_file("--json", arguments.json)
    for wanted in arguments.calibrate or ():
        if not 0 < wanted <= 1:
            raise UserError(f"--calibrate: found {wanted}; expected a share of tokens in (0, 1]")
    accuracy = read_fewshot_accuracy(arguments.fewshot, arguments.checkpoint)
    with replicas(arguments.device) as replica:
        make_recording(arguments, replica)
        if replica.is_main:
            result = analyse(arguments, accuracy)
            if arguments.json is not None:
                write_result(arguments.json, result, replica.device)
            print_tables(tables(result))


if __name__ == "__main__":
    run_command(main)
