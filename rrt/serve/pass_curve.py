"""How long a pass takes by its rows, measured on a decoder before it serves."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from rrt.decode.decoder import Decoder
from rrt.decode.page_table import OutOfPages
from rrt.decode.passes import PassPlan, PassRows
from rrt.serve.gate import PassCurve

_ROUNDS = 5
_LONGEST = 1.0
"""Seconds of a pass beyond which no larger ones are measured."""


def measure_pass_curve(decoder: Decoder, block: Callable[[Tensor, PassPlan], Tensor], most_rows: int) -> PassCurve:
    """Time passes of 1, 2, 4, ... rows, each of a sequence of its own, and the head of as many.

    Sequences have one position: what long contexts add to a row is not in the curve. Rows of the head exit after the
    first loop, through its translator if it has one.

    Args:
        block: runs a pass, as the decoder's does.
    """
    cache, num_loops = decoder.cache, decoder.cache.num_loops
    sequences: list[int] = []
    rows: list[int] = []
    # Of rows at one loop, of rows at all loops in turn, and of the head.
    seconds: list[list[float]] = [[], [], []]
    try:
        while len(rows) < 2 or (rows[-1] < most_rows and seconds[1][-1] + seconds[2][-1] < _LONGEST):
            count = 2 * rows[-1] if rows else 1
            try:
                while len(sequences) < count:
                    sequences.append(cache.allocate())
                    cache.append(sequences[-1], 1)
            except OutOfPages:
                break
            plans = [
                cache.plan(PassRows(sequences, [i % loops for i in range(count)], [0] * count))
                for loops in (1, num_loops)
            ]
            x = decoder.embed(torch.zeros(count, dtype=torch.int64, device=cache.k.device))
            first = torch.zeros(count, dtype=torch.int32, device=x.device)
            calls = [*(partial(block, x, plan) for plan in plans), partial(decoder.logits, x, first)]
            for part, median in zip(seconds, _medians(calls), strict=True):
                # More rows never take less time, but for noise.
                part.append(max([median, *part[-1:]]))
            rows.append(count)
    finally:
        for sequence in sequences:
            cache.free(sequence)
    if len(rows) < 2:
        # The cache has no room for two sequences: as if every row cost as much as the first one.
        rows, seconds = [1, 2], [[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]]
    return PassCurve(tuple(rows), *map(tuple, seconds))


def _medians(calls: Sequence[Callable[[], Tensor]]) -> list[float]:
    """Time calls in turn, after one of each."""
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(1 + _ROUNDS):
        for call, times in zip(calls, samples, strict=True):
            began = time.perf_counter()
            result = call()
            if result.is_cuda:
                torch.cuda.synchronize(result.device)
            times.append(time.perf_counter() - began)
    return [statistics.median(times[1:]) for times in samples]
