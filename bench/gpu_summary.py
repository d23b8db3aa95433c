"""The tables at the end of a call of bench/gpu.sh, from the files that its steps left. Needs no torch."""

import collections
import csv
import io
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.gpu_steps import NCU_COLUMNS, SWITCHES, Step, read_json
from bench.gpu_test_file import read_outcomes
from eval.tables import Table

MAX_CHARACTERS = 11000
"""Of the tables that are printed: of a call's output perhaps only the end is seen."""
_STALL_PREFIX, _STALL_SUFFIX = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
_TO_MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3, "s": 1e6}
_TO_KILOBYTES = {"byte": 1e-3, "Kbyte": 1.0, "Mbyte": 1e3}

Record = Mapping[str, Any]


def summary(results: Path, steps: Sequence[Step], ran: Sequence[str]) -> str:
    """Make all tables that there are results for."""
    makers: list[Callable[[Path], Iterable[Table]]] = [
        failures_table,
        wrong_table,
        stress_table,
        sanitizer_table,
        ncu_table,
        tiles_table,
        kernel_tables,
        attention_table,
        gaps_table,
        switch_tables,
        speed_tables,
    ]
    made = [steps_table(results, steps, ran)]
    for make in makers:
        try:
            made += [table for table in make(results) if table.rows]
        except Exception as error:  # of a result that was cut off; the others are worth more than a traceback
            made.append(Table(f"{make.__name__}: not shown, {type(error).__name__}: {error}", [], []))
    return "\n\n".join(table.text() for table in made)


def shortened(text: str) -> str:
    """Cut tables to 11,000 characters."""
    if len(text) <= MAX_CHARACTERS:
        return text
    return text[:MAX_CHARACTERS].rpartition("\n")[0] + "\n(the rest is in tables.txt, in the archive)"


def steps_table(results: Path, steps: Sequence[Step], ran: Sequence[str]) -> Table:
    rows = []
    for step in steps:
        record = read_json(results / step.name / "step.json")
        if record is None:
            outcome, seconds = ("left out", "") if step.left_out else ("", "")
        else:
            outcome, seconds = record["outcome"], f"{record['seconds']:.0f}" if "seconds" in record else ""
        rows.append([str(step.part), step.name, outcome, seconds, "*" if step.name in ran else ""])
    return Table("Steps (*: of this call)", ["part", "step", "outcome", "s", ""], rows, (1, 2, 4))


def failures_table(results: Path) -> Iterable[Table]:
    """Count the tests, and list those that did not pass."""
    lines = [found for log in sorted(results.glob("tests-*/log.jsonl")) for found in read_outcomes(log).values()]
    if not lines:
        return
    counts = collections.Counter(found["event"] for found in lines)
    title = "Tests: " + ", ".join(f"{count} {event}" for event, count in counts.items())
    bad = [found for found in lines if found["event"] not in ("passed", "skipped")]
    rows = [[found["test"].rpartition("/")[2][:70], found["event"], found["message"][:90]] for found in bad[:25]]
    yield Table(title, ["test", "outcome", ""], rows or [["all passed or skipped", "", ""]], (0, 1, 2))


def wrong_table(results: Path) -> Iterable[Table]:
    """List the cases whose numbers are wrong, of whatever was measured or sanitized."""
    lines = []
    for log in sorted(results.glob("s*/log.txt")):  # smoke and sanitize-*
        found = log.read_text(errors="replace").splitlines()
        lines += [(log.parent.name, line.removeprefix("WRONG: ")) for line in found if line.startswith("WRONG: ")]
    for path in sorted((*results.glob("*/kernels.json"), *results.glob("*/tiles.json"))):
        lines += [(path.parent.name, line) for line in (read_json(path) or {}).get("wrong", [])]
    rows = [[step, line[:110]] for step, line in dict.fromkeys(lines)]
    yield Table(f"Wrong results: {len(rows)}", ["step", "case"], rows[:25], (0, 1))


def stress_table(results: Path) -> Iterable[Table]:
    result = read_json(results / "stress" / "stress.json")
    if result is not None:
        lines = result["differences"] or ["the same bits with RRT_PDL=0 and 1, eager and in graphs"]
        yield Table("Chains of operators", ["result"], [[line] for line in lines[:10]])


def sanitizer_table(results: Path) -> Iterable[Table]:
    rows = []
    for folder in sorted(results.glob("sanitize-*")):
        log = (folder / "log.txt").read_text(errors="replace") if (folder / "log.txt").is_file() else ""
        found = [line for line in log.splitlines() if "SUMMARY" in line or "cases agree" in line]
        rows.append([folder.name, "; ".join(line.strip("= ") for line in found[-2:])])
    yield Table("Sanitizers, of our kernels", ["tool", "result"], rows, (0, 1))


def read_ncu(text: str) -> list[dict[str, tuple[str, str]]]:
    """Read ncu's CSV of raw metrics: of each kernel, value and unit of each metric."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    header, units, *rows = csv.reader(io.StringIO("\n".join(lines[start:])))
    kernels = [row for row in rows if len(row) == len(header)]
    return [{name: (value, unit) for name, value, unit in zip(header, row, units, strict=True)} for row in kernels]


def _number(cell: tuple[str, str] | None) -> float | None:
    try:
        return float(cell[0].replace(",", "")) if cell is not None else None
    except ValueError:
        return None


def ncu_table(results: Path) -> Iterable[Table]:
    """Show of each profiled kernel what limits it, with its three largest reasons not to issue."""
    path = results / "ncu" / "ncu.csv"
    rows = []
    for kernel in read_ncu(path.read_text(errors="replace")) if path.is_file() else []:
        cells = []
        for title, metric in NCU_COLUMNS.items():
            number, unit = _number(kernel.get(metric)), kernel.get(metric, ("", ""))[1]
            if number is not None and title == "us":
                number *= _TO_MICROSECONDS.get(unit, 1.0)
            elif number is not None and title == "shared kB":
                number *= _TO_KILOBYTES.get(unit, 1e-3)
            cells.append("" if number is None else f"{number:,.1f}" if number < 1000 else f"{number:,.0f}")
        stalls = {
            name.removeprefix(_STALL_PREFIX).removesuffix(_STALL_SUFFIX): number
            for name, cell in kernel.items()
            if name.startswith(_STALL_PREFIX) and name.endswith(_STALL_SUFFIX) and (number := _number(cell)) is not None
        }
        largest = sorted(stalls, key=lambda name: -stalls[name])[:3]
        name = kernel.get("Kernel Name", ("", ""))[0]
        for words in ("void ", "rrt::", "device::", "(anonymous namespace)::", "<unnamed>::", "(int)"):
            name = name.replace(words, "")
        rows.append([name.partition("(")[0][-44:], *cells, ", ".join(f"{name} {stalls[name]:.1f}" for name in largest)])
    columns = ["kernel", *NCU_COLUMNS, "warps stalled per issue"]
    yield Table("Profile (ncu; clocks as they are)", columns, rows, (0, len(columns) - 1))


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


def tiles_table(results: Path) -> Iterable[Table]:
    result = read_json(results / "tiles" / "tiles.json")
    rows = []
    for record in result["tilings"] if result else []:
        seconds = record["seconds"]
        best = min(seconds, key=lambda name: seconds[name])
        shape = f"{record['outputs']}x{record['inputs']}"
        rows.append([shape, str(record["rows"]), best, _us(seconds[best]), _us(seconds["kColumns 1"])])
    yield Table("Fastest tilings", ["shape", "M", "tiling", "us", "columns us"], rows, (0, 2))


def _kernel_results(results: Path, pattern: str) -> Iterable[tuple[str, Record]]:
    for path in sorted(results.glob(f"{pattern}/kernels.json")):
        result = read_json(path)
        if result is not None:
            yield path.parent.name, result


def kernel_tables(results: Path) -> Iterable[Table]:
    """Show every layer, and of each projection the case of rank 64 with most loops, in microseconds."""
    layers, singles = [], []
    for name, result in _kernel_results(results, "kernels-*"):
        for record in result.get("layer", []):
            layers.append([name.removeprefix("kernels-"), *_linear_cells(record)])
        for record in result.get("linear", []):
            if record["rank"] == 64 and record["loops"] == min(2, record["rows"]):
                singles.append([name.removeprefix("kernels-"), record["projection"], *_linear_cells(record)])
    columns = [
        "rank",
        "loops",
        "M",
        "ours us",
        "/floor",
        "base us",
        "tuned us",
        "over unfused",
        "over concat.",
        "merged",
    ]
    yield Table("Whole layer", ["model", *columns], layers, (0,), gap_after=2)
    yield Table("Projections, rank 64", ["model", "projection", *columns], singles, (0, 1), gap_after=2)


def _linear_cells(record: Record) -> list[str]:
    seconds, speed = record["seconds"], record["speedup"]
    return [
        *(str(record[key]) for key in ("rank", "loops", "rows")),
        _us(seconds["ours"]["median"]),
        f"{record['over_floor']['ours']:.2f}" if "over_floor" in record else "",
        *(_us(seconds[name]["median"]) if name in seconds else "" for name in ("base", "tuned")),
        *(f"{speed[name]:.2f}x" if name in speed else "" for name in ("unfused", "concatenated", "merged")),
    ]


def attention_table(results: Path) -> Iterable[Table]:
    rows = []
    for _, result in _kernel_results(results, "kernels-*"):
        for record in result.get("attention", []):
            copy = result["rates"]["read_bandwidth"]["all"]["copy"]
            seconds = record["seconds"]["ours"]["median"]
            fastest = min(record["speedup"], key=record["speedup"].get)
            rows.append(
                [
                    record["kind"],
                    *(str(record[key]) for key in ("count", "context")),
                    _us(seconds),
                    f"{record['bytes'] / seconds / copy:.0%}",
                    f"{record['speedup'][fastest]:.2f}x",
                    f"{fastest} ({record['sdpa_backends'][fastest]})",
                ]
            )
    columns = ["attention", "count", "context", "us", "of a copy's rate", "over the fastest", "which is"]
    yield Table("Attention", columns, rows, (0, 6))


def _by_switch(results: Path, switch: str) -> dict[str, list[Record]]:
    """Return the results with a switch at 0 and at 1, those of every turn."""
    return {
        value: [result for _, result in _kernel_results(results, f"switch-{switch}-{value}-*")] for value in ("0", "1")
    }


def gaps_table(results: Path) -> Iterable[Table]:
    """Show what a second call adds, without dependent launch and with it: medians of the turns."""
    gaps: dict[tuple[str, int, bool], dict[str, list[Record]]] = {}
    for value, found in _by_switch(results, "pdl").items():
        for record in (record for result in found for record in result.get("overhead", {}).get("gaps", [])):
            case = record["projection"], record["rows"], record["chained"]
            gaps.setdefault(case, {"0": [], "1": []})[value].append(record)
    rows = []
    for (projection, num_rows, chained), by_value in gaps.items():
        ones, both = [], []
        for records in by_value.values():
            ones.append(statistics.median([record["one"]["median"] for record in records] or [math.nan]))
            both.append(statistics.median([record["gap"] for record in records] or [math.nan]))
        cells = [*map(_us, ones), *(f"{gap * 1e6:+.1f}" for gap in (*both, both[1] - both[0]))]
        rows.append([projection, str(num_rows), "yes" if chained else "no", *cells])
    columns = ["projection", "M", "chained", "one, off", "one, on", "gap, off", "gap, on", "on less off"]
    yield Table("Graphs of two calls less twice those of one (gap), RRT_PDL off and on, us", columns, rows, (0, 2))


def switch_tables(results: Path) -> Iterable[Table]:
    """Compare layers and attention with each switch at 0 and at 1: medians of the turns."""
    times = ["off us", "on us", "on is as fast"]
    layers = _switch_rows(results, "layer", ("rank", "loops", "rows"))
    yield Table("Whole layer with switches off and on", ["switch", "rank", "loops", "M", *times], layers, (0,))
    attention = _switch_rows(results, "attention", ("kind", "count", "context"))
    yield Table("Attention with switches off and on", ["switch", "kind", "count", "context", *times], attention, (0, 1))


def _switch_rows(results: Path, section: str, keys: Sequence[str]) -> list[list[str]]:
    """Return the rows of the cases, told apart by these keys, that a switch's results have at both values."""
    rows = []
    for switch in (name.removeprefix("RRT_").lower() for name in SWITCHES):
        times: dict[str, dict[tuple[Any, ...], list[float]]] = {"0": {}, "1": {}}
        for value, found in _by_switch(results, switch).items():
            for record in (record for result in found for record in result.get(section, [])):
                case = tuple(record[key] for key in keys)
                times[value].setdefault(case, []).append(record["seconds"]["ours"]["median"])
        for case in sorted(times["0"].keys() & times["1"].keys()):
            off, on = (statistics.median(times[value][case]) for value in "01")
            rows.append([f"RRT_{switch.upper()}", *map(str, case), _us(off), _us(on), f"{off / on:.2f}x"])
    return rows


def speed_tables(results: Path) -> Iterable[Table]:
    """Show training, uptraining, generation and serving."""
    rows = []
    training = read_json(results / "training" / "training.json") or {}
    for record in training.get("step", []):
        for name, seconds in record["seconds"].items():
            tokens = record["tokens"] / seconds["median"]
            mfu = f", MFU {record['mfu'][name]:.1%}" if name in record.get("mfu", {}) else ""
            peak = record.get("peak_bytes", {}).get(name)
            memory = "" if peak is None else f", {peak / 2**30:.1f} GiB"
            rows.append(["training step", name, f"{tokens:,.0f} tokens/s{mfu}{memory}"])
    metrics = results / "uptrain" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    steps = [line for line in lines if "tokens_per_second" in line]
    if steps:
        speed = statistics.median(line["tokens_per_second"] for line in steps[1:] or steps)
        mfu = f", MFU {steps[-1]['mfu']:.1%}" if "mfu" in steps[-1] else ""
        memory = f", {steps[-1]['memory_bytes'] / 2**30:.1f} GiB"
        losses = f", loss {steps[0]['loss']:.3f} to {steps[-1]['loss']:.3f}"
        rows.append(["uptraining", f"{len(steps)} records", f"{speed:,.0f} tokens/s{mfu}{memory}{losses}"])
    for case in (read_json(results / "generate" / "generate.json") or {}).get("cases", []):
        for name, speed in case["tokens_per_second"].items():
            rows.append(["generate", f"{case['prompts']} prompts, {name}", f"{speed:,.0f} tokens/s"])
    for case in (read_json(results / "serving" / "serving.json") or {}).get("cases", []):
        for name, found in case["variants"].items():
            what = f"{case['model']}, {case['in_flight']} in flight, {name}"
            rows.append(
                ["serving", what, f"{found['tokens_per_second']:,.0f} tokens/s, {found['over_never']:.2f}x never"]
            )
    yield Table("Whole models", ["", "what", "result"], rows, (0, 1, 2))
