"""Run every CUDA kernel instance once on small shapes, against the references: python bench/gpu_cases.py

For compute-sanitizer (bench/gpu.sh sanitize), with few launches. With PYTORCH_NO_CUDA_MEMORY_CACHING=1 memory comes
straight from the driver, so that an access out of a tensor's bounds is out of an allocation's. Each case is named
before it runs, so that the last line tells where a process ended; a wrong result costs no other case. --device cpu runs
the same cases on the CPU's kernels. Exit status 1 if a case is wrong.
"""

import argparse
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Without this folder: its tabulate.py would take the place of a library that torch imports.
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]

from bench.linear_variants import AGREEMENT, mixed_loops, normal
from bench.output import check_device_flag
from rrt import ops
from rrt.common.cli import CommandParser, run_command
from rrt.native import force_tiling

CPU = torch.device("cpu")
HALVES = (torch.bfloat16, torch.float16)
ALL_DTYPES = (torch.float32, torch.float64, *HALVES)

TILINGS: tuple[tuple[int, int], ...] = ((0, 1), *((rows, slices) for rows in (64, 128) for slices in (1, 2, 4, 8)))
"""Arguments of `force_tiling`: tile_rows, slices."""


Case = tuple[str, Callable[[], Tensor], Tensor]
"""Its name, the call, and what it should return."""


def linear(
    rows: int, inputs: int, segments: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype
) -> dict[str, Any]:
    """Make arguments of loop_lora_linear on the CPU: two of three loops present."""
    outputs, loops = sum(segments), 3
    return {
        "x": normal((rows, inputs), 1, dtype, CPU),
        "weight": normal((outputs, inputs), inputs, dtype, CPU),
        "bias": normal((loops, outputs), 1, dtype, CPU),
        "lora_a": normal((loops, sum(ranks), inputs), inputs, dtype, CPU),
        "lora_b": normal((loops, outputs, max(ranks)), max(1, *ranks), dtype, CPU),
        "loops": mixed_loops(rows, 2),
        "segment_out": segments,
        "segment_rank": ranks,
    }


def to_device(arguments: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in arguments.items()}


def linear_cases(device: torch.device) -> Iterator[Case]:
    # One tile of tokens of each size, and then two; the last tile of outputs is not full.
    for dtype, rows in itertools.product(HALVES, (7, 16, 31, 64, 70)):
        arguments = linear(rows, 264, (128, 40), (40, 8), dtype)
        expected = ops.loop_lora_linear_reference(**arguments)
        for tile_rows, slices in TILINGS if device.type == "cuda" else TILINGS[:1]:
            force_tiling(tile_rows, slices)
            yield (
                f"linear {dtype}, {rows} rows, tile rows {tile_rows}, {slices} slices",
                partial(ops.loop_lora_linear, **to_device(arguments, device)),
                expected,
            )
    force_tiling(0, 0)
    for dtype, ranks in itertools.product(ALL_DTYPES, ((5, 3), (0, 0))):
        arguments = linear(11, 45, (30, 7), ranks, dtype)
        yield (
            f"linear {dtype}, unaligned, ranks {ranks}",
            partial(ops.loop_lora_linear, **to_device(arguments, device)),
            ops.loop_lora_linear_reference(**arguments),
        )


def prefill_linear_cases(device: torch.device) -> Iterator[Case]:
    # The three tiles, on 132 multiprocessors; the last ones of tokens and outputs are not full.
    shapes = [(70, (128, 40), (40, 8)), (700, (2560, 77), (40, 0)), (1300, (2560, 77), (40, 0))]
    for dtype, (rows, segments, ranks) in itertools.product(HALVES, shapes):
        arguments = linear(rows, 264, segments, ranks, dtype)
        arguments["loop"] = int(arguments.pop("loops")[0])
        yield (
            f"prefill linear {dtype}, {rows} rows",
            partial(ops.loop_lora_prefill, **to_device(arguments, device)),
            ops.loop_lora_prefill_reference(**arguments),
        )


def cache_arguments(heads: int, dim: int, contexts: list[int], chunks: list[int], dtype: torch.dtype) -> dict[str, Any]:
    """Make arguments of loop_kv_prefill on the CPU; one key/value head for every 4 heads, rotated queries."""
    page_size, kv_heads = 16, heads // 4
    pages = [-(-context // page_size) for context in contexts]
    tables = torch.full((len(contexts), max(pages)), -1, dtype=torch.int32)
    order = torch.randperm(sum(pages)).int().split(pages)
    for table, own in zip(tables, order, strict=True):
        table[: len(own)] = own
    positions = torch.cat(
        [torch.arange(context - chunk, context) for context, chunk in zip(contexts, chunks, strict=True)]
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    angles = torch.rand(max(contexts), dim // 4, dtype=wide)
    return {
        "q": normal((sum(chunks), heads, dim), 1, dtype, CPU),
        "k_cache": normal((sum(pages), page_size, kv_heads, dim), 1, dtype, CPU),
        "v_cache": normal((sum(pages), page_size, kv_heads, dim), 1, dtype, CPU),
        "block_tables": tables,
        "query_start": torch.tensor([0, *itertools.accumulate(chunks)], dtype=torch.int32),
        "context_lens": torch.tensor(contexts, dtype=torch.int32),
        "scale": dim**-0.5,
        "positions": positions.int(),
        "cos_sin": torch.cat([angles.cos(), angles.sin()], dim=1),
    }


def attention_cases(device: torch.device) -> Iterator[Case]:
    shapes = [(dim, dtype) for dim, dtype in itertools.product((64, 80, 128, 256), HALVES)]
    for dim, dtype in [*shapes, *((20, dtype) for dtype in ALL_DTYPES)]:
        arguments = cache_arguments(8, dim, [300, 5], [21, 5], dtype)
        yield (
            f"prefill {dtype}, head dim {dim}",
            partial(ops.loop_kv_prefill, **to_device(arguments, device)),
            ops.loop_kv_prefill_reference(**arguments),
        )
        # The contexts of the first fill several pieces, which are then combined.
        arguments = cache_arguments(8, dim, [600, 3], [1, 1], dtype)
        del arguments["query_start"]
        yield (
            f"decode {dtype}, head dim {dim}",
            partial(ops.loop_kv_attention, **to_device(arguments, device)),
            ops.loop_kv_attention_reference(**arguments),
        )


def write_cases(device: torch.device) -> Iterator[Case]:
    for dtype in ALL_DTYPES:
        prefill = cache_arguments(8, 80, [40], [5], dtype)
        arguments = {
            "k": normal((5, 2, 80), 1, dtype, CPU),
            "v": normal((5, 2, 80), 1, dtype, CPU),
            **{name: prefill[name] for name in ("k_cache", "v_cache", "positions", "cos_sin")},
            "slot_mapping": torch.tensor([3, -1, 0, 47, 20]),
        }
        ours = to_device({name: value.clone() for name, value in arguments.items()}, device)
        ops.loop_kv_write_reference(**arguments)

        def write(ours: dict[str, Any] = ours) -> Tensor:
            ops.loop_kv_write(**ours)
            return torch.stack([ours["k_cache"], ours["v_cache"]])

        yield f"write {dtype}", write, torch.stack([arguments["k_cache"], arguments["v_cache"]])


FAMILIES = {
    "linear": linear_cases,
    "prefill-linear": prefill_linear_cases,
    "attention": attention_cases,
    "write": write_cases,
}


def run(device: torch.device, families: Iterable[str] = FAMILIES) -> tuple[int, int]:
    """Run all cases and return how many, and how many of them disagree with their references."""
    torch.manual_seed(0)
    count = wrong = 0
    for name, call, expected in itertools.chain.from_iterable(FAMILIES[family](device) for family in families):
        print(f"running: {name}", flush=True)
        ours, wanted = call(), expected.double()
        difference = float((ours.cpu().double() - wanted).norm() / wanted.norm())
        if not difference <= AGREEMENT[ours.dtype]:
            wrong += 1
            limit = f"{AGREEMENT[ours.dtype]:.0e}"
            print(f"WRONG: {name}: differs by {difference:.2g} of the norm; expected {limit}", flush=True)
        count += 1
    return count, wrong


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default cuda")
    parser.add_argument(
        "--only", choices=tuple(FAMILIES), nargs="+", default=tuple(FAMILIES), help="cases of these operators"
    )
    arguments = parser.parse_args()
    check_device_flag(arguments.device)
    count, wrong = run(torch.device(arguments.device), arguments.only)
    print(f"{count - wrong} of {count} cases agree with their references on {arguments.device}")
    sys.exit(int(wrong > 0))


if __name__ == "__main__":
    run_command(main)
