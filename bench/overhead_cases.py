"""Costs beside the arithmetic: one call of the linear op on a tiny input, host planning of a decode pass, and on CUDA
the gap between two calls in a graph."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bench.linear_variants import Adapters, Projection, Weights, mixed_loops, normal
from bench.timing import spread
from rrt import ops
from rrt.decode.page_table import PageTable, make_page_table

PASS_ROWS = 256
_PAGE_SIZE = 16
_CALLS = 100
"""Per sample: a single call is near the clock's resolution."""


def measure_call(device: torch.device, should_pack: bool, samples: int) -> dict[str, Any]:
    """Time one call, float32, one row of 16 numbers: ours and F.linear, alternating, and how much ours adds.

    On CUDA this is the time until the call returns, not until the device is done.
    """
    x, weight = torch.ones(1, 16, device=device), torch.ones(16, 16, device=device)
    a, b = torch.ones(2, 4, 16, device=device), torch.ones(2, 16, 4, device=device)
    loops = torch.zeros(1, dtype=torch.int32, device=device)
    w, a, b = (ops.pack_linear(tensor) if should_pack else tensor for tensor in (weight, a, b))
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: ops.loop_lora_linear(x, w, None, a, b, loops, (16,), (4,)),
        "F.linear": lambda: F.linear(x, weight),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for sample in range(samples + 1):
        for name, call in calls.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            for _ in itertools.repeat(None, _CALLS):
                call()
            if sample > 0:  # the first is warm-up
                seconds[name].append((time.perf_counter() - began) / _CALLS)
    added = [ours - baseline for ours, baseline in zip(seconds["ours"], seconds["F.linear"], strict=True)]
    return {"seconds": {name: spread(values) for name, values in seconds.items()}, "added": statistics.median(added)}


def measure_planning(samples: int) -> dict[str, Any]:
    """Time planning a decode pass of 256 rows with contexts of about 1000, one row in 16 of which begins a page."""
    table = make_page_table(num_pages=PASS_ROWS * (1024 // _PAGE_SIZE + 1), page_size=_PAGE_SIZE)
    handles = np.array([table.create() for _ in range(PASS_ROWS)], dtype=np.int64)
    lengths = (1000 + np.arange(PASS_ROWS) % _PAGE_SIZE).astype(np.int32)
    table.append_many(handles, lengths)
    one_each = np.ones(PASS_ROWS, dtype=np.int32)
    steps: dict[str, Callable[[], object]] = {
        "append_many": lambda: table.append_many(handles, one_each),
        "slots": lambda: table.slots(handles, lengths),
        "block_tables": lambda: table.block_tables(handles),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*steps, "all")}
    for sample in range(samples + 1):
        clock = [time.perf_counter()]
        for step in steps.values():
            step()
            clock.append(time.perf_counter())
        for handle, length in zip(handles.tolist(), lengths.tolist(), strict=True):
            table.truncate(handle, length)
        if sample > 0:
            for name, (begin, end) in zip(steps, itertools.pairwise(clock), strict=True):
                seconds[name].append(end - begin)
            seconds["all"].append(clock[-1] - clock[0])
    return {
        "rows": PASS_ROWS,
        "native": not isinstance(table, PageTable),
        "seconds": {name: spread(values) for name, values in seconds.items()},
    }


_FLUSH_BYTES = 2**28
"""Beyond any GPU's second-level cache."""
_GAP_ROWS, _GAP_LOOPS, _GAP_RANK = (1, 8, 64), 2, 64


def measure_gaps(
    device: torch.device, dtype: torch.dtype, projections: Sequence[Projection], samples: int
) -> list[dict[str, Any]]:
    """Time CUDA graphs of one call of the linear op and of two, the second on weights of its own and after the first.

    `gap` is the time of two less twice that of one: below zero where the second call's beginning hides under the
    first. Of each projection whose outputs can be the next one's inputs the second call reads what the first wrote;
    of the others both read x, and only the order of the stream chains them.
    """
    flush = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.int32, device=device)
    found = []
    for projection, rows in itertools.product(projections, _GAP_ROWS):
        loops = min(rows, _GAP_LOOPS)
        weights = Weights.make(projection, 2, dtype, device, should_pack=False)
        adapters = Adapters.make(weights, _GAP_RANK, loops, should_pack=False)
        x, loop_of_row = normal((rows, projection.inputs), 1, dtype, device), mixed_loops(rows, loops).to(device)
        chained = projection.inputs == projection.outputs
        operands = [(weights.plain[i], weights.bias, adapters.lora_a[i], adapters.lora_b[i]) for i in range(2)]
        rest = (loop_of_row, projection.segments, adapters.ranks)
        y = ops.loop_lora_linear(x, *operands[0], *rest)  # warm-up
        graphs = {}
        for calls in (1, 2):
            graphs[calls] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[calls]):
                y = ops.loop_lora_linear(x, *operands[0], *rest)
                if calls == 2:
                    ops.loop_lora_linear(y if chained else x, *operands[1], *rest)
        seconds: dict[int, list[float]] = {1: [], 2: []}
        for sample in range(min(samples, 50) + 1):
            for calls, graph in graphs.items():
                flush.sum()  # read, not written: written lines would still have to leave the cache
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda._sleep(2**19)  # the launch of so small a graph takes less
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                if sample > 0:
                    seconds[calls].append(begin.elapsed_time(end) / 1e3)
        gap = statistics.median(two - 2 * one for one, two in zip(seconds[1], seconds[2], strict=True))
        found.append(
            {
                "projection": projection.name,
                "rows": rows,
                "chained": chained,
                "one": spread(seconds[1]),
                "two": spread(seconds[2]),
                "gap": gap,
            }
        )
    return found
