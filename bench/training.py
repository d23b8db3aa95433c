"""Training steps and their parts against transformers, PyTorch and bare loops: python bench/training.py

Sections (--only takes some of them):

- step: an optimizer step of a Llama of 26 M parameters (or of --preset) over 4 x 512 tokens, against transformers'
  model in the same loop, with fused AdamW, and against itself with compiled layers; with --device cuda also
  transformers' compiled, with peak memory and MFU
- attention: forward and backward of a layer's causal attention, with heads as three models have them, against PyTorch's
- elementwise: forward and backward of rotary embedding, RMSNorm and gated SiLU over 2048 tokens of TinyLlama's widths,
  against PyTorch's functions
- relaxation: forward and backward of a layer of width 2048 that runs twice, with LoRA merged and plain, against none
- checkpointing: time and peak memory of activation checkpointing per layer and per loop
- trainer: the trainer's steps, with data, logging and metrics, against a bare loop's, with one micro-batch of 4 x 512
  tokens per step and with four
- traffic: collectives and bytes of a step of Gemma 2B on 8 GPUs against its unrolled parent; counted, not timed

    python bench/training.py --only relaxation --rows 8192 --dtype bf16 --json out.json
    python bench/training.py --only traffic trainer
    python bench/training.py --device cuda --only step --preset smollm2-135m --tokens 8 1024 --dtype bf16

Variants alternate; figures are medians of the rounds, ratios are taken within rounds. About 15 minutes on 2 cores with
the defaults, 10 more where the CPU has no bf16 (transformers' products are emulated there).
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

# Without this folder: its tabulate.py would take the place of a library that torch imports.
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]

from bench.output import add_json_flag, check_json_flag, save_result
from bench.timing import RATIOS_NOTE, Timer
from bench.traffic import compare_traffic
from bench.trainer_cases import measure_trainer
from bench.training_cases import (
    SMALL_LLAMA,
    STEP_VARIANTS,
    measure_attention,
    measure_checkpointing,
    measure_elementwise,
    measure_relaxation,
    measure_step,
)
from eval.tables import Table, format_seconds, format_spread, print_tables
from rrt.checkpoint.presets import PRESETS, preset
from rrt.common.cli import CommandParser, human_bytes, run_command
from rrt.common.dtypes import parse_dtype
from rrt.common.results import write_result
from rrt.errors import UserError

KIND = "training"
STEP_CASES = {
    "cpu": (STEP_VARIANTS,),
    # One by one: to compile transformers' whole model may take minutes, and then the others are measured.
    "cuda": (("ours", "transformers"), ("ours", "ours, compiled"), ("ours", "transformers, compiled")),
}
"""Variants that alternate, by device."""
SECTIONS = ("step", "attention", "elementwise", "relaxation", "checkpointing", "trainer", "traffic")


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=SECTIONS, help="these sections (default all)")
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        nargs="+",
        default=["fp32", "bf16"],
        help="of step, attention, elementwise and relaxation",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of step (default cpu)")
    parser.add_argument(
        "--preset", choices=tuple(PRESETS), help="shapes of step's model (a Llama's) instead of its own"
    )
    parser.add_argument(
        "--tokens", type=int, nargs=2, default=[4, 512], metavar="N", help="of step: batch and length (default 4 512)"
    )
    parser.add_argument("--vocab", type=int, nargs="+", help="of step (default 16000, with --preset as it has)")
    parser.add_argument("--rows", type=int, nargs="+", default=[2048], help="tokens of relaxation (default 2048)")
    parser.add_argument("--rank", type=int, default=256, help="of relaxation (default 256)")
    parser.add_argument("--rounds", type=int, default=5, help="of each case (default 5)")
    add_json_flag(parser, "training")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and (set(arguments.only) != {"step"} or not torch.cuda.is_available()):
        found = "no GPU is visible to torch" if set(arguments.only) == {"step"} else "other sections than step"
        raise UserError(f"--device: found cuda, and {found}; expected a GPU, and --only step")
    model = SMALL_LLAMA if arguments.preset is None else preset(arguments.preset)
    if model.family != "llama":
        raise UserError(f"--preset: found {arguments.preset}, of family {model.family}; expected one of family llama")
    arguments.vocab = arguments.vocab or [model.vocab_size]
    arguments.model = model
    for name in ("vocab", "rows", "rank", "rounds", "tokens"):
        values = getattr(arguments, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            raise UserError(f"--{name}: found {values}; expected positive numbers")
    for rows in arguments.rows:
        if rows > 512 and rows % 512:
            raise UserError(f"--rows: found {rows}; expected a multiple of 512, or less")
    check_json_flag(arguments.json)
    return arguments


def run(arguments: argparse.Namespace) -> None:
    """Measure, print and write case by case."""
    timer = Timer(torch.device("cpu"), 0.0, arguments.rounds)
    device, tokens = torch.device(arguments.device), tuple(arguments.tokens)
    cases: list[tuple[str, Any]] = []
    for name in arguments.dtype:
        dtype = parse_dtype(name)
        models = [replace(arguments.model, vocab_size=vocab) for vocab in arguments.vocab]
        cases += [
            ("step", lambda m=model, d=dtype, v=variants: measure_step(timer, m, d, tokens, device, v))
            for model in models
            for variants in STEP_CASES[arguments.device]
        ]
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
        tqdm.write(f"\n{case_table(section, [record]).text()}")
        sys.stdout.flush()
        result.setdefault(section, []).append(record)
        if arguments.json is not None:  # kept should a later case fail
            write_result(arguments.json, {"kind": KIND, **result}, device)
    if "traffic" in arguments.only:
        result["traffic"] = compare_traffic("gemma-2b", num_loops=2, ranks=[0, 512])
        print_tables([traffic_table(result["traffic"])])
    save_result(arguments.json, KIND, result, device)


def case_table(section: str, records: list[dict[str, Any]]) -> Table:
    """Make a table with a row per case and variant; each ratio says how many times as fast the first variant is."""
    rows = []
    for record in records:
        fields = {name: value for name, value in record.items() if name not in ("rounds", "floor_bytes")}
        case = ", ".join(f"{name} {value}" for name, value in fields.items() if isinstance(value, str | int))
        ours = next(iter(record["seconds"]))
        for name, seconds in record["seconds"].items():
            ratio = record["speedup"].get(name)
            rows.append(
                [
                    case,
                    name,
                    format_seconds(seconds["median"]),
                    format_spread(seconds),
                    "" if ratio is None else f"{ours} {ratio:.2f}x as fast",
                    human_bytes(record["peak_bytes"][name]) if "peak_bytes" in record else "",
                ]
            )
    header = ["case", "variant", "time", "+-", "", "peak memory"]
    if not any(row[-1] for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return Table(f"{section}, {records[0]['rounds']} rounds", header, rows, (0, 1, 4), notes=[RATIOS_NOTE])


def traffic_table(records: list[dict[str, Any]]) -> Table:
    """Make a table with a row per model: collectives, bytes gathered, and how much less that is than of its parent."""
    rows = [
        [
            record["model"],
            str(record["num_loops"]),
            record["wrap"],
            ", ".join(f"{count} {kind}" for kind, count in record["counts"].items()),
            human_bytes(record["bytes"]["all-gather"]),
            f"{record['fewer_bytes']:.2f}x less",
            f"{record['fewer_block_bytes']:.2f}x less",
        ]
        for record in records
    ]
    header = ["traffic", "loops", "wrap", "collectives", "gathers", "in all", "of the block"]
    return Table("Traffic of a step on 8 processes, against the unrolled parent", header, rows, (0, 2, 3))


def tables(result: dict[str, Any]) -> list[Table]:
    made = [case_table(section, result[section]) for section in SECTIONS[:-1] if section in result]
    return [*made, *([traffic_table(result["traffic"])] if "traffic" in result else [])]


def main() -> None:
    run(parse_arguments())


if __name__ == "__main__":
    run_command(main)
