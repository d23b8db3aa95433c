"""Training measured here: python bench/training.py

Sections (--only takes some of them):

- step: an optimizer step of a Llama of 26 M parameters over 4 x 512 tokens, against transformers' model in the same
  loop, with fused AdamW, and against itself with compiled layers
- attention: forward and backward of a layer's causal attention, with heads as three models have them, against PyTorch's
- elementwise: forward and backward of what lies between a layer's products, over 2048 tokens of TinyLlama's widths,
  against PyTorch's functions as the model calls them on a GPU
- relaxation: forward and backward of a layer of width 2048 that runs twice, with LoRA merged and plain, against none
- checkpointing: time and peak memory of activation checkpointing per layer and per loop
- trainer: the trainer's steps against a bare loop's: what data, logging and metrics cost, with one
  micro-batch of 4 x 512 tokens per step and with four
- traffic: collectives and bytes of a step of Gemma 2B on 8 GPUs against its unrolled parent; counted, not timed

    python bench/training.py --only relaxation --rows 8192 --dtype bf16 --json out.json
    python bench/training.py --only traffic trainer

Variants alternate; medians of the rounds, ratios within rounds. About 15 minutes on 2 cores
with the defaults, 10 more where the CPU has no bf16 (transformers' products are emulated there).
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.timing import Timer
from bench.training_cases import (
    measure_attention,
    measure_checkpointing,
    measure_elementwise,
    measure_relaxation,
    measure_step,
    measure_traffic,
    measure_trainer,
)
from rrt.common.cli import human_bytes, run_command
from rrt.common.dtypes import parse_dtype
from rrt.common.results import write_result
from rrt.errors import UserError

SECTIONS = ("step", "attention", "elementwise", "relaxation", "checkpointing", "trainer", "traffic")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=SECTIONS, help="these sections (default all)")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        nargs="+",
        default=["fp32", "bf16"],
        help="of step, attention, elementwise and relaxation",
    )
    parser.add_argument("--vocab", type=int, nargs="+", default=[16000], help="of step (default 16000)")
    parser.add_argument("--rows", type=int, nargs="+", default=[2048], help="tokens of relaxation (default 2048)")
    parser.add_argument("--rank", type=int, default=256, help="of relaxation (default 256)")
    parser.add_argument("--rounds", type=int, default=5, help="of each case (default 5)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the results here")
    arguments = parser.parse_args()
    for name in ("vocab", "rows", "rank", "rounds"):
        values = getattr(arguments, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            raise UserError(f"--{name}: found {values}; expected positive numbers")
    for rows in arguments.rows:
        if rows > 512 and rows % 512:
            raise UserError(f"--rows: found {rows}; expected a multiple of 512, or less")
    if arguments.json is not None and not arguments.json.absolute().parent.is_dir():
        raise UserError(f"--json: found {arguments.json}; expected a file in a directory that exists")
    return arguments


def run(arguments: argparse.Namespace) -> None:
    """Measure, print and write case by case."""
    timer = Timer(torch.device("cpu"), 0.0, arguments.rounds)
    cases: list[tuple[str, Any]] = []
    for name in arguments.dtype:
        dtype = parse_dtype(name)
        cases += [("step", lambda v=vocab, d=dtype: measure_step(timer, v, d)) for vocab in arguments.vocab]
        cases += [
            ("attention", lambda n=name, t=length, d=dtype: measure_attention(timer, n, t, d))
            for name, length in (("pythia-160m", 512), ("tinyllama-1.1b", 2048), ("gemma-2b", 512))
        ]
        cases += [
            ("elementwise", lambda n=name, d=dtype: measure_elementwise(timer, n, d))
            for name in ("rotary_embedding", "rms_norm", "gated_activation")
        ]
        cases += [
            ("relaxation", lambda r=rows, d=dtype: measure_relaxation(timer, r, arguments.rank, d))
            for rows in arguments.rows
        ]
    cases.append(("checkpointing", lambda: measure_checkpointing(timer)))
    cases += [("trainer", lambda m=micro_batches: measure_trainer(2 * arguments.rounds, m)) for micro_batches in (1, 4)]
    chosen = [(section, measure) for section, measure in cases if section in arguments.only]
    result: dict[str, Any] = {}
    for section, measure in tqdm(chosen, unit="case", desc="training", disable=None):
        record = measure().record()
        print_case(section, record)
        result.setdefault(section, []).append(record)
        if arguments.json is not None:  # what is measured stays, should a later case fail
            write_result(arguments.json, result)
    if "traffic" in arguments.only:
        result["traffic"] = measure_traffic("gemma-2b", num_loops=2, ranks=[0, 512])
        print_traffic(result["traffic"])
        if arguments.json is not None:
            write_result(arguments.json, result)


def print_case(section: str, record: dict[str, Any]) -> None:
    case = ", ".join(f"{name} {value}" for name, value in record.items() if isinstance(value, str | int))
    lines = [f"\n{section}: {case}"]
    peaks = record.get("peak_bytes", {})
    for name, seconds in record["seconds"].items():
        ratio = record["speedup"].get(name)
        against = "" if ratio is None else f"  {next(iter(record['seconds']))} is {ratio:.2f}x as fast"
        peak = f"  peak {human_bytes(peaks[name])}" if name in peaks else ""
        lines.append(f"  {name:14s} {seconds['median'] * 1e3:10.1f} ms{peak}{against}")
    tqdm.write("\n".join(lines))
    sys.stdout.flush()


def print_traffic(records: list[dict[str, Any]]) -> None:
    for record in records:
        counts = ", ".join(f"{count} {kind}" for kind, count in record["counts"].items())
        print(
            f"traffic: {record['model']}, {record['num_loops']} loop(s), wrap {record['wrap']}: {counts}; gathers "
            f"{human_bytes(record['bytes']['all-gather'])}, {record['fewer_bytes']:.2f}x less than the parent, "
            f"its block {record['fewer_block_bytes']:.2f}x less"
        )


def main() -> None:
    run(parse_arguments())


if __name__ == "__main__":
    run_command(main)
