"""Tables of bench/kernels.py, and its results against the goals that were set."""

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from bench.linear_variants import BASELINES
from eval.tables import Table, format_seconds, format_spread
from rrt.common.dtypes import dtype_name, parse_dtype

Record = dict[str, Any]

# Goals on a CPU, per dtype: how many times faster than the baselines, and how near the byte floor.
_MIXED_ROWS = range(2, 17)
_NEAR_FLOOR = 1.3
_CALL_ADDS_SECONDS = 10e-6
_PLAN_SECONDS = 20e-6

# On CUDA: of the whole layer with two loops mixed, and of attention against a copy that reads and writes.
_LAYER_ROWS, _LAYER_RANKS = range(8, 65), range(64, 513)
_LAYER_NEAR_FLOOR = 1.25
_LAYER_SPEED = {"unfused": 2.0, "concatenated": 1.4}
_ATTENTION_ROWS, _ATTENTION_CONTEXT, _ATTENTION_BANDWIDTH = 32, 1024, 0.75


def _is_mixed(record: Record) -> bool:
    return record["rows"] in _MIXED_ROWS and record["loops"] > 1


def _speedup_over(record: Record, *names: str) -> float:
    """Return the speedup over the fastest of these baselines; at rank 0 all are base."""
    speedups: dict[str, float] = record["speedup"]
    return min(speedups.get(name, speedups["base"]) for name in names)


def _name_case(record: Record) -> str:
    return f"{record['projection']}, M={record['rows']}, rank {record['rank']}, {record['loops']} loops"


def _goal(text: str, limit: float, values: Iterable[tuple[float, str]], *, at_most: bool = False) -> Record:
    """Count the cases in which a goal holds, and find the worst case. `holds` is None if none was measured."""
    found = list(values)
    held = sum(value <= limit if at_most else value >= limit for value, _ in found)
    worst = (max if at_most else min)(found, default=(None, None))
    return {
        "goal": text,
        "limit": limit,
        "holds": held == len(found) if found else None,
        "cases": len(found),
        "cases_that_hold": held,
        "worst": worst[0],
        "worst_case": worst[1],
    }


def cpu_goals(result: Record) -> list[Record]:
    """Evaluate the goals for this dtype on a CPU."""
    dtype, records = dtype_name(parse_dtype(result["dtype"])), result.get("linear", [])
    made = []

    def speed(text: str, limit: float, applies: Callable[[Record], bool], *names: str) -> None:
        made.append(_goal(text, limit, [(_speedup_over(r, *names), _name_case(r)) for r in records if applies(r)]))

    if dtype == "float32":
        speed(
            "2 to 16 rows of 2 or 3 loops, rank 0: over base at least 1.5x",
            1.5,
            lambda r: _is_mixed(r) and r["rank"] == 0,
            "base",
        )
        speed(
            "2 to 16 rows of 2 or 3 loops, every rank: over unfused and concatenated at least 1.5x",
            1.5,
            _is_mixed,
            "unfused",
            "concatenated",
        )
        speed("everywhere: over unfused at least 0.95x", 0.95, lambda _: True, "unfused")
    elif dtype == "bfloat16":
        speed(
            "2 to 16 rows of 2 or 3 loops, rank 128 up: over unfused and concatenated at least 1.1x",
            1.1,
            lambda r: _is_mixed(r) and r["rank"] >= 128,
            "unfused",
            "concatenated",
        )
        speed(
            "the same, square projections: at least 1.3x",
            1.3,
            lambda r: _is_mixed(r) and r["rank"] >= 128 and list(r["segments"]) == [r["inputs"]],
            "unfused",
            "concatenated",
        )
        speed("everywhere: over unfused at least 0.85x", 0.85, lambda _: True, "unfused")
        if result.get("native", {}).get("cpu_isa") == "amx_bf16":
            many = (64, 128)
            speed("64 and 128 rows: over unfused at least 0.95x", 0.95, lambda r: r["rows"] in many, "unfused")
            speed(
                "64 and 128 rows, rank 128 up: over unfused at least 1.1x",
                1.1,
                lambda r: r["rows"] in many and r["rank"] >= 128,
                "unfused",
            )
            over = [(r["over_floor"]["ours"], _name_case(r)) for r in result.get("layer", [])]
            text = f"whole layer: at most {_NEAR_FLOOR}x what its bytes or FLOPs take"
            made.append(_goal(text, _NEAR_FLOOR, over, at_most=True))
    if dtype in ("float32", "bfloat16") and records:
        mixed = [r for r in records if _is_mixed(r) and "over_reading" in r]
        text = f"2 to 16 rows of 2 or 3 loops: at most {_NEAR_FLOOR}x what reading its bytes takes in the same rounds"
        over = [(r["over_reading"], _name_case(r)) for r in mixed]
        made.append(_goal(text, _NEAR_FLOOR, over, at_most=True))
        rate = result["rates"]["matmul"]["flops_per_second"]
        over = [
            (min(r["over_reading"], r["seconds"]["ours"]["median"] * rate / r["flops"]), _name_case(r)) for r in mixed
        ]
        text = "the same, or its FLOPs at the best matmul rate of the run, if that is longer"
        made.append(_goal(text, _NEAR_FLOOR, over, at_most=True))
    if "overhead" in result:
        call, plan = result["overhead"]["call"], result["overhead"]["plan"]
        text = "one call of the linear op: at most 10 us more than F.linear"
        made.append(_goal(text, _CALL_ADDS_SECONDS, [(call["added"], "")], at_most=True))
        # The goal is one of the native planner.
        seconds = [(plan["seconds"]["all"]["median"], "")] if plan["native"] else []
        text = f"rrt._plan, one pass of {plan['rows']} rows: at most 20 us"
        made.append(_goal(text, _PLAN_SECONDS, seconds, at_most=True))
    return made


def cuda_goals(result: Record) -> list[Record]:
    """Evaluate the goals on a GPU, which are set for bfloat16 and float16 only."""
    if dtype_name(parse_dtype(result["dtype"])) not in ("bfloat16", "float16"):
        return []
    layers = [
        record
        for record in result.get("layer", [])
        if record["rows"] in _LAYER_ROWS and record["rank"] in _LAYER_RANKS and record["loops"] == 2
    ]
    cases = "whole layer, 8 to 64 rows of 2 loops, ranks 64 to 512"
    over = [(record["over_floor"]["ours"], _name_case(record)) for record in layers]
    made = [_goal(f"{cases}: at most {_LAYER_NEAR_FLOOR}x the floor", _LAYER_NEAR_FLOOR, over, at_most=True)]
    for name, limit in _LAYER_SPEED.items():
        speeds = [(record["speedup"][name], _name_case(record)) for record in layers]
        made.append(_goal(f"{cases}: over {name} at least {limit}x", limit, speeds))
    if result.get("attention"):
        copy = result["rates"]["read_bandwidth"]["all"]["copy"]
        fractions = [
            (record["bytes"] / record["seconds"]["ours"]["median"] / copy, f"context {record['context']}")
            for record in result["attention"]
            if record["kind"] == "decode"
            and record["count"] == _ATTENTION_ROWS
            and record["context"] >= _ATTENTION_CONTEXT
        ]
        rows = f"{_ATTENTION_ROWS} rows, contexts from {_ATTENTION_CONTEXT}"
        text = f"decode attention of {rows}: at least {_ATTENTION_BANDWIDTH:.0%} of a copy's bandwidth"
        made.append(_goal(text, _ATTENTION_BANDWIDTH, fractions))
    return made


def _format_rate(record: Record) -> str:
    """Format the achieved GB/s where bytes set the floor, else GFLOP/s or TFLOP/s."""
    seconds = record["seconds"]["ours"]["median"]
    if record["bound"] == "bytes":
        return f"{record['bytes'] / seconds / 1e9:.1f} GB/s"
    rate = record["flops"] / seconds
    return f"{rate / 1e12:.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.0f} GFLOP/s"


def _time_cells(record: Record) -> list[str]:
    seconds = record["seconds"]["ours"]
    over_floor = f"{record['over_floor']['ours']:.2f}"
    return [format_seconds(seconds["median"]), format_spread(seconds), _format_rate(record), over_floor]


_TIME_HEADER = ["time", "+-", "rate", "time/floor"]


def _speedup_cells(record: Record, names: Iterable[str]) -> list[str]:
    return [f"{record['speedup'][name]:.2f}x" if name in record["speedup"] else "" for name in names]


def _measured_baselines(records: list[Record]) -> list[str]:
    return [name for name in BASELINES if any(name in record["speedup"] for record in records)]


def linear_table(records: list[Record], title: str) -> Table:
    """Make a table with a row per case; "over" columns say how many times faster ours is than that baseline."""
    baselines = _measured_baselines(records)
    has_reading = any("over_reading" in record for record in records)
    reading = ["time/reading"] if has_reading else []
    rows = [
        [
            record["projection"],
            *(str(record[key]) for key in ("rank", "loops", "rows")),
            *_time_cells(record),
            *([f"{record['over_reading']:.2f}"] if has_reading else []),
            *_speedup_cells(record, baselines),
        ]
        for record in records
    ]
    over = (f"over {name}" for name in baselines)
    header = ["projection", "rank", "loops", "rows", *_TIME_HEADER, *reading, *over]
    return Table(f"{title}: time of ours (median, +- half the quartiles' distance)", header, rows, gap_after=2)


def linear_summary(records: list[Record]) -> Table:
    """Make the table of medians and the worst case of all linears, by number of rows and by rank."""
    baselines = _measured_baselines(records)
    groups: dict[str, list[Record]] = {}
    for key, name in (("rows", "M = {}"), ("rank", "rank {}")):
        for value in sorted({record[key] for record in records}):
            groups[name.format(value)] = [record for record in records if record[key] == value]

    def cell(values: list[float], worst: Callable[[list[float]], float]) -> str:
        return f"{statistics.median(values):.2f} ({worst(values):.2f})" if values else ""

    rows = [
        [
            name,
            str(len(group)),
            cell([record["over_floor"]["ours"] for record in group], max),
            cell([record["over_reading"] for record in group if "over_reading" in record], max),
            *(cell([r["speedup"][base] for r in group if base in r["speedup"]], min) for base in baselines),
        ]
        for name, group in groups.items()
    ]
    header = ["cases", "number", "time/floor", "time/reading", *(f"over {name}" for name in baselines)]
    return Table("Linears, all projections and numbers of loops: median (worst case) of ours", header, rows)


def attention_table(records: list[Record]) -> Table:
    """Make a table with a row per case; "over" columns compare with SDPA on gathered keys and values."""
    baselines = list(dict.fromkeys(name for record in records for name in record["speedup"]))
    rows = [
        [
            record["kind"],
            str(record["count"]),
            str(record["context"]),
            *_time_cells(record),
            *_speedup_cells(record, baselines),
            record.get("sdpa_backends", {}).get("sdpa", ""),
        ]
        for record in records
    ]
    header = ["attention", "count", "context", *_TIME_HEADER, *(f"over {name}" for name in baselines), "sdpa by"]
    return Table("Attention over pages (rows of decode, chunks of prefill): time of ours", header, rows, gap_after=1)


def overhead_table(overhead: Record) -> Table:
    """Make the table of the times of one call of the linear op on a tiny input, and of the steps of planning a pass."""
    call, plan = overhead["call"], overhead["plan"]
    planner = "rrt._plan" if plan["native"] else "in Python"
    times = {f"call of {name}": values for name, values in call["seconds"].items()}
    times |= {f"planning {plan['rows']} rows, {name} ({planner})": values for name, values in plan["seconds"].items()}
    for record in overhead.get("gaps", []):
        case = f"{record['projection']}, {record['rows']} rows"
        times |= {f"graph of {calls} call, {case}": record[calls] for calls in ("one", "two")}
    rows = [[name, format_seconds(values["median"]), format_spread(values)] for name, values in times.items()]
    gaps = [
        f"{record['projection']} of {record['rows']} rows{'' if record['chained'] else ' (not chained)'} "
        f"{record['gap'] * 1e6:+.1f} us"
        for record in overhead.get("gaps", [])
    ]
    notes = [f"Two calls in a graph less twice one: {', '.join(gaps)}."] if gaps else []
    return Table("Overhead", ["", "time", "+-"], rows, notes=notes)


def goals_table(result: Record) -> Table:
    """Make the table of a result's goals; its notes name the best rates, from which the floors are computed."""
    rows = []
    for goal in result["goals"]:
        verdict = {True: "holds", False: "FAILS", None: "not measured"}[goal["holds"]]
        worst = ""
        if goal["cases"]:
            is_time = goal["cases"] == 1 and not goal["worst_case"]
            worst = format_seconds(goal["worst"]) if is_time else f"{goal['worst']:.2f}"
        cases = f"{goal['cases_that_hold']} of {goal['cases']}" if goal["cases"] else ""
        rows.append([goal["goal"], verdict, cases, worst, goal["worst_case"] or ""])
    notes = []
    if "rates" in result:
        read, matmul = result["rates"]["read_bandwidth"], result["rates"]["matmul"]
        notes = [
            f"Best read bandwidth {read['bytes_per_second'] / 1e9:.1f} GB/s ({read['way']}), best matmul rate "
            f"{matmul['flops_per_second'] / 1e12:.3f} TFLOP/s ({matmul['way']}); time by {result['timing']}."
        ]
        if not result.get("host_time_hidden", True):
            notes.append("Some launches took longer than the GPU can be made to wait: times have the host's in them.")
    if not rows:
        notes.append("No goals are set for these cases.")
    return Table("Goals", ["goal", "", "cases", "worst", "worst case"], rows, (0, 1, 4), notes=notes)


def tables(result: Record) -> list[Table]:
    """Make the tables of all cases for the terminal."""
    made = []
    if "linear" in result:
        made.append(linear_table(result["linear"], "Linears"))
    if "layer" in result:
        made.append(linear_table(result["layer"], "Whole layer, its projections one after the other"))
    if "head" in result:
        made.append(linear_table(result["head"], "Head"))
    if "attention" in result:
        made.append(attention_table(result["attention"]))
    if "overhead" in result:
        made.append(overhead_table(result["overhead"]))
    return [*made, goals_table(result)]


def summary_tables(result: Record) -> list[Table]:
    """Make the tables of a page in bench/results/: the goals, medians of the linears, and chosen cases of the rest.

    Of the layer every other number of rows, at the least and the largest rank; of attention the shortest and the
    longest context.
    """
    made = [goals_table(result)]
    if result.get("linear"):
        made.append(linear_summary(result["linear"]))
    if layer := result.get("layer"):
        ranks = {pick(record["rank"] for record in layer) for pick in (min, max)}
        rows = sorted({record["rows"] for record in layer})[::2]
        chosen = [r for r in layer if r["rank"] in ranks and r["rows"] in rows and r["loops"] == min(2, r["rows"])]
        shown = chosen or layer  # without a run of two loops, all
        loops = sorted({record["loops"] for record in shown})
        names = ["1 loop" if count == 1 else f"{count} loops mixed" for count in loops]
        made.append(linear_table(shown, f"Whole layer, {' or '.join(names)}"))
    if "head" in result:
        made.append(linear_table(result["head"][::2], "Head"))
    if result.get("attention"):
        contexts = {pick(record["context"] for record in result["attention"]) for pick in (min, max)}
        made.append(attention_table([record for record in result["attention"] if record["context"] in contexts]))
    if "overhead" in result:
        made.append(overhead_table(result["overhead"]))
    return made
