"""Tables of bench/kernels.py, and its results against the speeds that were set as goals."""

from collections.abc import Callable, Iterable
from typing import Any

from bench.linear_cases import BASELINES
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


def _against(record: Record, *names: str) -> float:
    """Speed over the fastest of the baselines; at rank 0 all are base."""
    speedups: dict[str, float] = record["speedup"]
    return min(speedups.get(name, speedups["base"]) for name in names)


def _place(record: Record) -> str:
    return f"{record['projection']}, M={record['rows']}, rank {record['rank']}, {record['loops']} loops"


def _bar(text: str, limit: float, values: Iterable[tuple[float, str]], *, at_most: bool = False) -> Record:
    """One goal: in how many cases it holds, and the worst case. `holds` is None if nothing measured decides it."""
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


def bars(result: Record) -> list[Record]:
    """The goals for this dtype on a CPU, computed from what was measured."""
    dtype, records = dtype_name(parse_dtype(result["dtype"])), result.get("linear", [])
    made = []

    def speed(text: str, limit: float, which: Callable[[Record], bool], *names: str) -> None:
        made.append(_bar(text, limit, [(_against(r, *names), _place(r)) for r in records if which(r)]))

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
    if dtype in ("float32", "bfloat16") and records:
        mixed = [r for r in records if _is_mixed(r) and "over_reading" in r]
        text = f"2 to 16 rows of 2 or 3 loops: at most {_NEAR_FLOOR}x what reading its bytes takes in the same rounds"
        over = [(r["over_reading"], _place(r)) for r in mixed]
        made.append(_bar(text, _NEAR_FLOOR, over, at_most=True))
        rate = result["rates"]["matmul"]["flops_per_second"]
        over = [(min(r["over_reading"], r["seconds"]["ours"]["median"] * rate / r["flops"]), _place(r)) for r in mixed]
        text = "the same, or its FLOPs at the best matmul rate of the run, if that is longer"
        made.append(_bar(text, _NEAR_FLOOR, over, at_most=True))
    if "overhead" in result:
        call, plan = result["overhead"]["call"], result["overhead"]["plan"]
        text = "one call of the linear op: at most 10 us more than F.linear"
        made.append(_bar(text, _CALL_ADDS_SECONDS, [(call["added"], "")], at_most=True))
        # The Python planner is not what the goal is about.
        seconds = [(plan["seconds"]["all"]["median"], "")] if plan["native"] else []
        text = f"rrt._plan, one pass of {plan['rows']} rows: at most 20 us"
        made.append(_bar(text, _PLAN_SECONDS, seconds, at_most=True))
    return made


def cuda_bars(result: Record) -> list[Record]:
    """The goals on a GPU, for bfloat16 and float16, computed from what was measured."""
    if dtype_name(parse_dtype(result["dtype"])) not in ("bfloat16", "float16"):
        return []
    layers = [
        record
        for record in result.get("layer", [])
        if record["rows"] in _LAYER_ROWS and record["rank"] in _LAYER_RANKS and record["loops"] == 2
    ]
    which = "whole layer, 8 to 64 rows of 2 loops, ranks 64 to 512"
    over = [(record["over_floor"]["ours"], _place(record)) for record in layers]
    made = [_bar(f"{which}: at most {_LAYER_NEAR_FLOOR}x the floor", _LAYER_NEAR_FLOOR, over, at_most=True)]
    for name, limit in _LAYER_SPEED.items():
        speeds = [(record["speedup"][name], _place(record)) for record in layers]
        made.append(_bar(f"{which}: over {name} at least {limit}x", limit, speeds))
    if "attention" in result:
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
        made.append(_bar(text, _ATTENTION_BANDWIDTH, fractions))
    return made


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} us"


def _rate(record: Record) -> str:
    """Achieved GB/s where bytes set the floor, else GFLOP/s or TFLOP/s."""
    seconds = record["seconds"]["ours"]["median"]
    if record["bound"] == "bytes":
        return f"{record['bytes'] / seconds / 1e9:.1f} GB/s"
    rate = record["flops"] / seconds
    return f"{rate / 1e12:.1f} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.0f} GFLOP/s"


def _spread(record: Record) -> str:
    """Half the distance of the quartiles, over the median."""
    ours = record["seconds"]["ours"]
    if "lower_quartile" not in ours:
        return ""
    return f"{(ours['upper_quartile'] - ours['lower_quartile']) / 2 / ours['median']:.0%}"


def _print_table(header: list[str], rows: list[list[str]], gap_after: int) -> None:
    """Right-aligned columns; a blank line where any of the first `gap_after` columns changes."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    before = None
    for row in [header, *rows]:
        if before is not None and row[:gap_after] != before:
            print()
        before = row[:gap_after]
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def _speedups(record: Record, names: Iterable[str]) -> list[str]:
    return [f"{record['speedup'][name]:.2f}x" if name in record["speedup"] else "" for name in names]


def print_linear(records: list[Record], title: str) -> None:
    """One line per case; "over" columns tell how many times faster ours is than that baseline."""
    baselines = [name for name in BASELINES if any(name in record["speedup"] for record in records)]
    reading = any("over_reading" in record for record in records)
    header = [
        "projection",
        "rank",
        "loops",
        "rows",
        "time",
        "+-",
        "rate",
        "time/floor",
        *(["time/reading"] if reading else []),
    ]
    rows = [
        [
            record["projection"],
            str(record["rank"]),
            str(record["loops"]),
            str(record["rows"]),
            _time(record["seconds"]["ours"]["median"]),
            _spread(record),
            _rate(record),
            f"{record['over_floor']['ours']:.2f}",
            *([f"{record['over_reading']:.2f}"] if reading else []),
            *_speedups(record, baselines),
        ]
        for record in records
    ]
    print(f"\n{title}. Times are of ours (median, +- half the quartiles' distance); over: how many times faster it is")
    _print_table([*header, *(f"over {name}" for name in baselines)], rows, gap_after=2)


def print_attention(records: list[Record]) -> None:
    baselines = ("sdpa", "sdpa grouped")
    header = ["attention", "count", "context", "time", "+-", "rate", "time/floor"]
    rows = [
        [
            record["kind"],
            str(record["count"]),
            str(record["context"]),
            _time(record["seconds"]["ours"]["median"]),
            _spread(record),
            _rate(record),
            f"{record['over_floor']['ours']:.2f}",
            *_speedups(record, baselines),
        ]
        for record in records
    ]
    print("\nAttention over pages; over: how many times faster ours is than on gathered keys and values")
    _print_table([*header, *(f"over {name}" for name in baselines)], rows, gap_after=1)


def print_overhead(overhead: Record) -> None:
    call, plan = overhead["call"], overhead["plan"]
    times = ", ".join(f"{name} {_time(values['median'])}" for name, values in call["seconds"].items())
    print(f"\nOne call on a tiny input: {times}; ours adds {_time(call['added'])}")
    steps = ", ".join(f"{name} {_time(values['median'])}" for name, values in plan["seconds"].items())
    print(f"Planning {plan['rows']} rows ({'rrt._plan' if plan['native'] else 'in Python'}): {steps}")


def print_bars(result: Record) -> None:
    """The rates that the floors stand on, and the goals."""
    if "rates" in result:
        read, matmul = result["rates"]["read_bandwidth"], result["rates"]["matmul"]
        print(f"\nbest read bandwidth {read['bytes_per_second'] / 1e9:.1f} GB/s ({read['way']})")
        print(f"best matmul rate {matmul['flops_per_second'] / 1e12:.3f} TFLOP/s ({matmul['way']})")
        print(f"time by {result['timing']}")
    if not result["bars"]:
        print("no goals are set for what was measured")
        return
    print("\nGoals")
    for bar in result["bars"]:
        verdict = {True: "holds", False: "FAILS", None: "not measured"}[bar["holds"]]
        text = f"{verdict:>12}  {bar['goal']}"
        if bar["cases"] == 1 and not bar["worst_case"]:
            text += f": {_time(bar['worst'])}"
        elif bar["cases"]:
            text += (
                f": {bar['cases_that_hold']} of {bar['cases']} cases, worst {bar['worst']:.2f} ({bar['worst_case']})"
            )
        print(text)
