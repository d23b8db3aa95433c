"""Predicted times of the CUDA kernels, without a GPU: python bench/kernel_model.py --device h200 --preset gemma-2b

Prints of every linear of a layer, of decode attention and of prefill the predicted time, the floor (as bench/kernels.py
counts it: bytes at a copy's bandwidth, or operations at the best matmul rate), the terms of the time, and what limits
the stream. Reads csrc/cuda/resources.txt, instructions.txt and tilings.txt. After a change of the kernels the last two
are written anew from the machine code of a build; measurements, once there are some, stand beside the prediction:

    python bench/kernel_model.py --write build/native-0123abcd
    python bench/kernel_model.py --device h200 --preset gemma-2b --measured gemma-2b.json

bench/kernel_times.py has the model.
"""

import argparse
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from bench import kernel_instructions, kernel_resources
from bench.attention_cases import AttentionSpec
from bench.kernel_times import (
    DEVICES,
    TILINGS,
    Device,
    Prediction,
    Tables,
    find_faster_tiling,
    predict_attention,
    predict_linear,
    predict_prefill,
)
from bench.linear_variants import projections
from bench.output import add_json_flag, check_json_flag, save_result
from eval.tables import Table, expect_whole_result, print_tables
from rrt.checkpoint.presets import preset
from rrt.common.cli import CommandParser, run_command
from rrt.common.files import atomic_write, read_json
from rrt.errors import UserError

PRESETS = ("gemma-2b", "tinyllama-1.1b", "pythia-1b")
ROWS = (1, 8, 16, 32, 64)
CHUNK = 256
"""New tokens of a prefill, as in bench/kernels.py."""
NOTABLY_FASTER = 0.95
"""Of the time with the tiling that the library chooses: others that take less are shown."""


def predict_all(device: Device, tables: Tables, name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Predict every case that the flags choose, and the whole layer, as records like those of bench/kernels.py."""
    config = preset(name)
    records: list[dict[str, Any]] = []

    def add(case: dict[str, Any], prediction: Prediction) -> Prediction:
        values = {"seconds": prediction.seconds, "floor_seconds": prediction.floor, "over_floor": prediction.over_floor}
        values |= {"bound": prediction.bound, "terms": prediction.terms}
        records.append({"device": device.name, "preset": name, **case, **values})
        return prediction

    for rank in arguments.ranks:
        parts: dict[int, list[Prediction]] = {m: [] for m in arguments.rows}
        for projection in projections(config):
            for m in arguments.rows:
                loops = min(m, arguments.loops)
                case = {"kind": "linear", "projection": projection.name, "rank": rank, "loops": loops, "rows": m}
                parts[m].append(add(case, predict_linear(device, tables, projection, m, rank, loops)))
                best, tiling = find_faster_tiling(device, tables, projection, m, rank, loops)
                records[-1] |= {"best_seconds": best.seconds, "best_tiling": tiling}
        for m, own in parts.items():
            total = {term: sum(part.terms[term] for part in own) for term in own[0].terms}
            slowest = max(own, key=lambda part: part.seconds - part.floor)
            case = {"kind": "layer", "projection": "layer", "rank": rank, "loops": min(m, arguments.loops), "rows": m}
            add(case, Prediction(total, sum(part.floor for part in own), slowest.bound))
        for projection in projections(config):
            for m in arguments.prefill_rows:
                case = {"kind": "linear prefill", "projection": projection.name, "rank": rank, "loops": 1, "rows": m}
                add(case, predict_prefill(device, tables, projection, m, rank))
    heads, no_cases, cpu = (config.num_heads, config.num_kv_heads, config.head_dim), ([], [], []), torch.device("cpu")
    spec = AttentionSpec(*heads, *no_cases, CHUNK, 32, torch.bfloat16, cpu, cache_bytes=0, budget_bytes=0)
    for kind, count in [*(("decode", count) for count in arguments.attention_rows), ("prefill", 1)]:
        for context in arguments.contexts:
            queries = 1 if kind == "decode" else min(CHUNK, context)
            case = {"kind": kind, "count": count, "context": context}
            add(case, predict_attention(device, tables, spec, kind, count, context, queries))
    return records


def read_measured(path: Path, device: Device, name: str) -> dict[tuple[Any, ...], float]:
    """Map cases to the seconds of ours, from a result of bench/kernels.py; raise `UserError` for other shapes."""
    result = read_json(path)
    with expect_whole_result(path, "kernels"):
        if result["shapes"] != name:
            raise UserError(f"{path}: found shapes of {result['shapes']}; expected {name}: see --preset")
        if device.name not in result["device"].lower():
            raise UserError(f"{path}: found device {result['device']}; expected one like {device.name}: see --device")
        found: dict[tuple[Any, ...], float] = {}
        for record in [*result.get("linear", []), *result.get("layer", [])]:
            key = (record["projection"], record["rank"], record["loops"], record["rows"])
            kind = "layer" if record["projection"] == "layer" else "linear"
            found[kind, *key] = record["seconds"]["ours"]["median"]
            if "prefill" in record["seconds"]:
                found["linear prefill", *key] = record["seconds"]["prefill"]["median"]
        for record in result.get("attention", []):
            found[record["kind"], record["count"], record["context"]] = record["seconds"]["ours"]["median"]
    return found


def add_measured(records: list[dict[str, Any]], measured: dict[tuple[Any, ...], float]) -> int:
    """Add `measured_seconds` to the records of which there is a measurement; return to how many."""
    count = 0
    for record in records:
        names = ("projection", "rank", "loops", "rows") if "rows" in record else ("count", "context")
        key = (record["kind"], *(record[name] for name in names))
        if key in measured:
            record["measured_seconds"] = measured[key]
            count += 1
    return count


def case_cells(record: dict[str, Any]) -> list[str]:
    if "rows" in record:
        name = record["projection"] + (", prefill" if record["kind"] == "linear prefill" else "")
        return [name, *(str(record[column]) for column in ("rank", "loops", "rows"))]
    return [f"attention, {record['kind']} of {record['count']}", "", "", str(record["context"])]


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}" if seconds else ""


def make_table(records: list[dict[str, Any]]) -> Table:
    """Make a device's and preset's table of predictions, with the terms, and the measurements if there are any."""
    has_measured = any("measured_seconds" in record for record in records)
    header = (
        "case,rank,loops,rows,time,floor,time/floor,gap,begin,stream,shrink,end,then,bound,faster tile/slices".split(
            ","
        )
    )
    rows = []
    for record in records:
        terms = record["terms"]
        then = terms.get("add", 0.0) + terms.get("combine", 0.0)
        times = [record["seconds"], record["floor_seconds"]]
        own = [terms.get(name, 0.0) for name in ("gap", "begin", "stream", "shrink", "end")]
        cells = [*case_cells(record), *map(microseconds, times), f"{record['over_floor']:.2f}"]
        best = record.get("best_seconds", math.inf)
        faster = f"{record['best_tiling']}: {microseconds(best)}" if best < NOTABLY_FASTER * record["seconds"] else ""
        cells += [*map(microseconds, [*own, then]), record["bound"], faster]
        if has_measured:
            seconds = record.get("measured_seconds")
            cells += [microseconds(seconds or 0.0), f"{seconds / record['seconds']:.2f}" if seconds else ""]
        rows.append(cells)
    title = f"{records[0]['preset']} on {records[0]['device']}: predicted microseconds (rows: of attention the context)"
    return Table(title, [*header, *(["measured", "measured/time"] if has_measured else [])], rows, (0, 13, 14), 1)


def list_tilings() -> str:
    """Compile csrc/tests/list_tilings.cpp and return the tilings of all presets' decode products, one a line."""
    cases = []
    gpus = {(each.multiprocessors, kernel_resources.SHARED_BYTES[each.arch]) for each in DEVICES.values()}
    for gpu in sorted(gpus):
        for projection in {p for name in PRESETS for p in projections(preset(name))}:
            fits = all(part.start % 128 == 0 for part in projection.slices())
            cases += [(*gpu, projection.outputs, projection.inputs, m, int(fits)) for m in ROWS]
    text = "\n".join(" ".join(map(str, case)) for case in sorted(set(cases)))
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "list_tilings"
        source = ROOT / "csrc" / "tests" / "list_tilings.cpp"
        subprocess.run(["c++", "-std=c++17", "-I", ROOT / "csrc", "-o", program, source], check=True)
        return subprocess.run([program], input=text, capture_output=True, text=True, check=True).stdout


def find_objects(build: Path) -> list[Path]:
    """List the objects with CUDA code below a build, or the file itself."""
    objects = [build] if build.is_file() else sorted(build.rglob("*.cu.o"))
    if not objects:
        raise UserError(f"--write: found no *.cu.o below {build}; expected a build with RRT_WITH_CUDA=1, or a library")
    return objects


def write_tables(build: Path, disassembler: Path | None) -> None:
    kernels = kernel_instructions.read_objects(find_objects(build), kernel_instructions.find_disassembler(disassembler))
    atomic_write(kernel_instructions.EXPECTED, kernel_instructions.format_table(kernels))
    atomic_write(TILINGS, "multiprocessors outputs inputs rows tile slices\n" + list_tilings())
    print(f"wrote {kernel_instructions.EXPECTED} and {TILINGS}")


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEVICES, nargs="+", default=list(DEVICES), help="default: all")
    parser.add_argument("--preset", choices=PRESETS, nargs="+", default=list(PRESETS), help="default: all")
    for flag, default, purpose in (
        ("--rows", list(ROWS), f"decode rows M of the linears, of {' '.join(map(str, ROWS))}"),
        ("--ranks", [64, 512], "LoRA ranks"),
        ("--prefill-rows", [1024, 8192], "rows of loop_lora_prefill"),
        ("--attention-rows", [32], "decode rows of attention"),
        ("--contexts", [1024, 4096, 16384], "context lengths of attention"),
    ):
        text = f"{purpose} (default {' '.join(map(str, default))})"
        parser.add_argument(flag, type=int, nargs="+", metavar="N", default=default, help=text)
    parser.add_argument(
        "--loops", type=int, metavar="N", default=2, help="loops that the rows are mixed of (default 2)"
    )
    parser.add_argument(
        "--measured", type=Path, metavar="FILE", help="confront with bench/kernels.py's --json of a GPU"
    )
    parser.add_argument(
        "--write", type=Path, metavar="BUILD", help="read a build's or a library's machine code instead"
    )
    parser.add_argument(
        "--nvdisasm", type=Path, metavar="PATH", help="where cuobjdump and nvdisasm are (default: PATH, triton)"
    )
    add_json_flag(parser, "kernel-model")
    arguments = parser.parse_args()
    check_json_flag(arguments.json)
    if unknown := set(arguments.rows) - set(ROWS):
        raise UserError(f"--rows: found {min(unknown)}; expected some of {' '.join(map(str, ROWS))}")
    for name, least in (("ranks", 0), ("prefill_rows", 1), ("attention_rows", 1), ("contexts", 1), ("loops", 1)):
        value = getattr(arguments, name)
        smallest = value if isinstance(value, int) else min(value)
        if smallest < least:
            raise UserError(f"--{name.replace('_', '-')}: found {smallest}; expected {least} or more")
    if arguments.measured and (len(arguments.device) > 1 or len(arguments.preset) > 1):
        raise UserError("--measured: found with several devices or presets; expected one --device and one --preset")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.write is not None:
        write_tables(arguments.write, arguments.nvdisasm)
        return
    tables = Tables.read()
    groups = [
        predict_all(DEVICES[device], tables, name, arguments)
        for device in arguments.device
        for name in arguments.preset
    ]
    if arguments.measured is not None:
        measured = read_measured(arguments.measured, DEVICES[arguments.device[0]], arguments.preset[0])
        if not add_measured(groups[0], measured):
            raise UserError(f"{arguments.measured}: found none of the cases; see --rows, --ranks, --loops, --contexts")
    save_result(arguments.json, "kernel-model", {"predictions": [record for group in groups for record in group]})
    print_tables(make_table(group) for group in groups)


if __name__ == "__main__":
    run_command(main)
