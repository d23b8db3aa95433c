"""Find the fastest tiling of each linear on this GPU, for the build to use: python bench/tile_sweep.py

Times every tiling of loop_lora_linear's decode kernels (csrc/loop_lora/cuda_tiles.h) on the linears of the presets, two
loops mixed (one row: one), weights not in the cache, in alternating order under CUDA graphs; prints the best of each
shape, and writes them into the table that the library is compiled with, one by one as they are measured. Lines of GPUs
with another number of multiprocessors stay. The operator's results do not depend on the tiling. Rebuild afterwards: pip
install -e . Without a rebuild, python bench/kernels.py --tiles FILE takes the --json result of this.
"""

import argparse
import itertools
import re
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
# Without this folder: its tabulate.py would take the place of a library that torch imports.
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]

from bench.linear_variants import (
    Adapters,
    Projection,
    Weights,
    make_variants,
    mixed_loops,
    normal,
    projections,
    with_tiling,
)
from bench.output import ResultFile, add_json_flag, check_device_flag, check_json_flag
from bench.timing import Timer, copies_beyond_cache, last_level_cache_bytes
from eval.tables import Table, format_seconds, print_tables
from rrt.checkpoint.presets import PRESETS, preset
from rrt.common.cli import CommandParser, run_command
from rrt.common.files import atomic_write
from rrt.errors import UserError

TABLE = ROOT / "csrc" / "loop_lora" / "cuda_tiles_measured.h"
ROWS = (1, 8, 16, 32, 64)
LOOPS = 2
TILE_OUTPUTS = 128
"""Outputs of a thread block of the row kernel: segments must begin at multiples."""


@dataclass(frozen=True, order=True)
class Line:
    """One line of the table: the fastest tiling for [outputs, inputs] and up to `rows` rows."""

    multiprocessors: int
    outputs: int
    inputs: int
    rows: int
    kernel: str
    """kColumns, kRows or kRows64."""
    slices: int

    def text(self) -> str:
        shape = f"{self.multiprocessors}, {self.outputs}, {self.inputs}, {self.rows}"
        return f"    {{{shape}, {{DecodeKernel::{self.kernel}, {self.slices}}}}},"


TILINGS: tuple[tuple[str, int], ...] = (
    ("kColumns", 1),
    *((kernel, slices) for kernel in ("kRows", "kRows64") for slices in (1, 2, 4, 8)),
)
_LINE = re.compile(
    r"^    \{(\d+), (\d+), (\d+), (\d+), \{DecodeKernel::(kColumns|kRows|kRows64), (\d)\}\},$", re.MULTILINE
)
_END = "    {},  // ends the table\n"


def read_lines(table: str) -> list[Line]:
    return [Line(*map(int, found[:4]), found[4], int(found[5])) for found in _LINE.findall(table)]


def replace_lines(table: str, measured: list[Line]) -> str:
    """Return the table's text with these lines in place of those of the same GPU, shape and rows."""
    replaced = {(line.multiprocessors, line.outputs, line.inputs, line.rows) for line in measured}
    kept = [
        line
        for line in read_lines(table)
        if (line.multiprocessors, line.outputs, line.inputs, line.rows) not in replaced
    ]
    text = _LINE.sub("", table)
    head, end, tail = text.partition(_END)
    lines = "".join(line.text() + "\n" for line in sorted([*kept, *measured]))
    return head.rstrip("\n") + "\n" + lines + end + tail


def shapes(presets: Iterable[str] = PRESETS) -> list[Projection]:
    """List the linears of the presets that the row kernel can run, each shape once."""
    every = [projection for name in presets for projection in projections(preset(name))]
    fitting = {
        (projection.outputs, projection.inputs): projection
        for projection in every
        if all(part.start % TILE_OUTPUTS == 0 for part in projection.slices())
    }
    return list(fitting.values())


@torch.inference_mode()
def measure(
    projection: Projection, rows: int, rank: int, dtype: torch.dtype, timer: Timer
) -> tuple[dict[str, float], list[str]]:
    """Measure every tiling; return the median seconds of each that gives the bits of kColumns 1, and the others."""
    device = timer.device
    weight_bytes = projection.inputs * projection.outputs * dtype.itemsize
    held = 2 * weight_bytes + 6 * projection.adapter_numbers(rank) * dtype.itemsize
    budget = torch.cuda.mem_get_info(device)[0] // 2
    copies = copies_beyond_cache(weight_bytes, held, last_level_cache_bytes(device)[0], budget)
    weights = Weights.make(projection, copies, dtype, device, should_pack=False)
    loops = min(rows, LOOPS)
    adapters = Adapters.make(weights, rank, loops, should_pack=False)
    x = normal((rows, projection.inputs), 1, dtype, device)
    ours = make_variants(weights, adapters, x, mixed_loops(rows, loops).to(device))["ours"]
    variants = {f"{kernel} {slices}": with_tiling(ours, kernel, slices) for kernel, slices in TILINGS}
    expected = variants["kColumns 1"].call(0)
    wrong = [name for name, variant in variants.items() if not torch.equal(variant.call(0), expected)]
    samples = timer.measure({name: variant for name, variant in variants.items() if name not in wrong}, copies)
    return {name: statistics.median(values) for name, values in samples.items()}, wrong


def tables(result: dict[str, Any]) -> list[Table]:
    """Make the table of the median times of every shape and tiling; its last column names the fastest."""
    names = [f"{kernel} {slices}" for kernel, slices in TILINGS]
    rows = []
    for record in result["tilings"]:
        seconds = record["seconds"]
        shape = (str(record[key]) for key in ("outputs", "inputs", "rows"))
        times = (format_seconds(seconds[name]) if name in seconds else "wrong" for name in names)
        rows.append([*shape, *times, min(seconds, key=lambda name: seconds[name])])
    header = ["outputs", "inputs", "rows", *names, "fastest"]
    return [Table(f"Tilings, rank {result['rank']}, time by {result['timing']}", header, rows, (8,))]


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--preset", choices=tuple(PRESETS), nargs="+", default=tuple(PRESETS), help="whose shapes (default: all)"
    )
    parser.add_argument("--rank", type=int, default=128, metavar="R", help="LoRA rank (default 128)")
    parser.add_argument("--seconds-per-case", type=float, default=0.3, metavar="S", help="default 0.3")
    parser.add_argument(
        "--table",
        type=Path,
        default=TABLE,
        metavar="FILE",
        help="default: that of this checkout; a new one begins as its copy",
    )
    add_json_flag(parser, "tile-sweep")
    arguments = parser.parse_args()
    check_json_flag(arguments.json)
    check_device_flag("cuda")
    table = (arguments.table if arguments.table.exists() else TABLE).read_text()
    if _END not in table:
        raise UserError(f"--table: found no end of the table in {arguments.table}; expected the line {_END.strip()!r}")
    device = torch.device("cuda", torch.cuda.current_device())
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    timer = Timer(device, arguments.seconds_per_case)
    lines: list[Line] = []
    records: list[dict[str, Any]] = []
    wrong: list[str] = []
    result: dict[str, Any] = {"rank": arguments.rank, "timing": timer.method, "tilings": records, "wrong": wrong}
    file = ResultFile(arguments.json, "tile-sweep", device)
    cases = list(itertools.product(shapes(arguments.preset), ROWS))
    for projection, rows in tqdm(cases, unit="case", desc="tile sweep", disable=None):
        seconds, others = measure(projection, rows, arguments.rank, torch.bfloat16, timer)
        wrong += [f"{projection.name}, {rows} rows: {name} gives other bits than kColumns 1" for name in others]
        best = min(seconds, key=lambda name: seconds[name])
        kernel, slices = best.split()
        lines.append(Line(multiprocessors, projection.outputs, projection.inputs, rows, kernel, int(slices)))
        records.append({"outputs": projection.outputs, "inputs": projection.inputs, "rows": rows, "seconds": seconds})
        result["timing"] = timer.method
        atomic_write(arguments.table, replace_lines(table, lines))
        file.update(result)
    file.finish(result)
    print_tables(tables(result))
    print(f"{len(lines)} lines of {multiprocessors} multiprocessors in {arguments.table}; rebuild: pip install -e .")
    for line in wrong:
        print(f"WRONG: {line}")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
