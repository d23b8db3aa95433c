"""Timing of alternating variants on cold weights, and the machine's best read bandwidth and matmul rate."""

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ROUNDS = 200
GRAPH_CALLS = 30
"""Least calls of a CUDA graph, so that its own begin and end hardly count."""
MAX_SLEEP_CYCLES = 2**27
"""About 70 ms of a GPU's clock."""
ASSUMED_CACHE_BYTES = 64 * 2**20
"""Used where the system does not tell the size of its last-level cache."""

Samples = dict[str, list[float]]
"""Seconds of one call, round by round, of each variant; entry i of every list is from the same round."""


@dataclass(frozen=True)
class Variant:
    """One way to compute a case."""

    call: Callable[[int], Tensor]
    """Given the index of the copy of the weights to read."""
    copies_read: int = 1
    """How many consecutive copies a call reads, modulo their number."""


def copies_beyond_cache(read_bytes: int, held_bytes: int, cache_bytes: int, budget_bytes: int) -> int:
    """Choose how many copies of the weights to rotate through, so that none is in the cache when its turn comes.

    Between two uses of a copy all the others are read: 4 times the cache, unless the budget allows fewer (then at
    least two).

    Args:
        read_bytes: bytes that a call reads of a copy, at least.
        held_bytes: memory of a copy.
    """
    wanted = 1 + math.ceil(4 * cache_bytes / read_bytes)
    return min(wanted, max(2, budget_bytes // held_bytes))


class Timer:
    """Timer of the variants of one case: every round runs each once, every other round in the opposite order.

    On a CPU a sample is one call. On CUDA it is a CUDA graph that goes through all copies until it has at least 30
    calls, divided by their number; if any variant cannot be captured, all later ones are launched one by one between
    two events instead. The GPU sleeps before the first event until everything is launched, so that no sample has time
    of the host in it.

    Attributes:
        method: how time was taken: "clock", "CUDA graphs" or "CUDA events".
        hidden: on CUDA, False if some launches took longer than the longest sleep: samples then have the host's time.
    """

    def __init__(self, device: torch.device, seconds: float, min_rounds: int = 3) -> None:
        self.device = device
        self.seconds = seconds
        self.min_rounds = min_rounds
        self.method = "clock" if device.type == "cpu" else "CUDA graphs"
        self.hidden = True
        self._sleep_cycles = 2**18

    def measure(self, variants: dict[str, Variant], copies: int) -> Samples:
        """Run rounds until `seconds` are spent, at least `min_rounds`. Call each variant once before, as warm-up."""
        runs = self._cpu_runs(variants, copies) if self.device.type == "cpu" else self._cuda_runs(variants, copies)
        samples: Samples = {name: [] for name in runs}
        began = time.perf_counter()
        for rounds in range(1, MAX_ROUNDS + 1):
            for name in runs if rounds % 2 else reversed(runs):
                samples[name].append(runs[name]())
            if rounds >= self.min_rounds and time.perf_counter() - began >= self.seconds:
                break
        return samples

    def _cpu_runs(self, variants: dict[str, Variant], copies: int) -> dict[str, Callable[[], float]]:
        turn = 0

        def run(variant: Variant) -> float:
            nonlocal turn
            index, turn = turn, (turn + variant.copies_read) % copies
            began = time.perf_counter()
            result = variant.call(index)
            seconds = time.perf_counter() - began
            del result  # not while the clock runs
            return seconds

        return {name: partial(run, variant) for name, variant in variants.items()}

    def _cuda_runs(self, variants: dict[str, Variant], copies: int) -> dict[str, Callable[[], float]]:
        calls = copies * math.ceil(GRAPH_CALLS / copies)

        def chain(variant: Variant) -> None:
            for turn in range(calls):
                variant.call(turn * variant.copies_read % copies)

        launches: dict[str, Callable[[], object]] = {}
        torch.cuda.synchronize(self.device)
        if self.method == "CUDA graphs":
            try:
                for name, variant in variants.items():
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        chain(variant)
                    launches[name] = graph.replay
            except RuntimeError:  # the op waits for the device, which cannot be captured
                self.method = "CUDA events"
                torch.cuda.synchronize(self.device)
        if self.method == "CUDA events":
            launches = {name: partial(chain, variant) for name, variant in variants.items()}
        for launch in launches.values():
            launch()
        return {name: partial(self._time_launch, launch, calls) for name, launch in launches.items()}

    def _time_launch(self, launch: Callable[[], object], calls: int) -> float:
        """Return the GPU's seconds per call. Sleep longer from now on if it woke before the host had launched all."""
        while True:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(self._sleep_cycles)
            begin.record()
            launch()
            end.record()
            slept = not begin.query()
            end.synchronize()
            if slept or self._sleep_cycles >= MAX_SLEEP_CYCLES:
                self.hidden &= slept
                milliseconds: float = begin.elapsed_time(end)
                return milliseconds / 1e3 / calls
            self._sleep_cycles *= 2


def spread(samples: list[float]) -> dict[str, float]:
    """Return the median and the quartiles of some times, in seconds."""
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return {"median": median, "lower_quartile": low, "upper_quartile": high}


def speedup(samples: Samples, ours: str, other: str) -> float:
    """Return how many times faster `ours` is than `other`: the median over the rounds, each of which ran both."""
    return statistics.median(round_ratios(samples, ours, other))


def round_ratios(samples: Samples, ours: str, other: str) -> list[float]:
    """Return how many times faster `ours` is than `other` in each round."""
    return [b / a for a, b in zip(samples[ours], samples[other], strict=True)]


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Return the narrowest interval between two of the values that holds their median with this confidence, by ranks.

    Of any distribution: the median lies outside if all values but the k outermost fall on its other side. None if there
    are too few values, fewer than six for 95 %.
    """
    ordered, outside, chosen = sorted(values), 0.0, None
    for k in range(len(ordered) // 2):
        outside += 2 * math.comb(len(ordered), k) / 2 ** len(ordered)
        if outside > 1 - confidence:
            break
        chosen = ordered[k], ordered[-1 - k]
    return chosen


RATIOS_NOTE = "Ratios: medians of those within rounds, not of the times shown."
"""Below tables that have both: where a machine's speed changes from round to round, they may disagree."""


def _product(x: Tensor, weight: Tensor) -> Variant:
    return Variant(lambda _: F.linear(x, weight))


@dataclass
class Rates:
    """Best read bandwidth (bytes/s) and matmul rate (FLOP/s) of the machine, over several ways to measure each.

    `probe` is called several times in a run, as a machine's speed changes. A way's rate is its median in one probe;
    the best probe counts, then the best way. `timer` is not that of the cases, which falls back to events for good if
    one of them cannot be captured in a CUDA graph.

    Attributes:
        is_quick: on a CPU, leave out the largest product, which takes most of a probe.
    """

    timer: Timer
    dtype: torch.dtype
    buffer_bytes: int
    read: dict[str, float] = field(default_factory=dict)
    matmul: dict[str, float] = field(default_factory=dict)
    is_quick: bool = False

    def probe(self) -> None:
        for rates, ways in ((self.read, self._reads()), (self.matmul, self._matmuls())):
            variants = {name: variant for name, (variant, _) in ways.items()}
            for variant in variants.values():
                variant.call(0)
            for name, samples in self.timer.measure(variants, copies=1).items():
                rates[name] = max(rates.get(name, 0.0), ways[name][1] / statistics.median(samples))

    def _reads(self) -> dict[str, tuple[Variant, int]]:
        """List ways to go through a buffer once, with the bytes they move. Ones, not zeros: those share one page."""
        device, half = self.timer.device, self.buffer_bytes // 8
        numbers = torch.ones(2 * half, device=device)
        first, second = numbers[:half], numbers[half:]
        ways = {
            "sum, float32": (Variant(lambda _: numbers.sum()), numbers.nbytes),
            "dot, float32": (Variant(lambda _: torch.dot(first, second)), numbers.nbytes),
            # Written bytes count too: this is how peak bandwidth is usually quoted.
            "copy": (Variant(lambda _: second.copy_(first)), numbers.nbytes),
        }
        for width in (2048, 16384):
            rows = max(1, self.buffer_bytes // (width * self.dtype.itemsize))
            weight = torch.randn(width, device=device, dtype=self.dtype).repeat(rows, 1)
            x = torch.randn(1, width, device=device, dtype=self.dtype)
            ways[f"F.linear of one row, [{rows}, {width}]"] = (_product(x, weight), weight.nbytes)
        return ways

    def _matmuls(self) -> dict[str, tuple[Variant, int]]:
        """List products of square matrices, each with its FLOPs. Random numbers: ones would take less power."""
        device, ways = self.timer.device, {}
        sizes = (4096, 8192) if device.type == "cuda" else (512, 1024, 2048)
        for size in sizes[:2] if self.is_quick else sizes:
            x = torch.randn(size, size, device=device, dtype=self.dtype)
            ways[f"F.linear of {size} rows, [{size}, {size}]"] = (_product(x, x), 2 * size**3)
        return ways

    def best_read(self) -> tuple[str, float]:
        return max(self.read.items(), key=lambda item: item[1])

    def best_matmul(self) -> tuple[str, float]:
        return max(self.matmul.items(), key=lambda item: item[1])

    def floor(self, num_bytes: int, flops: int) -> tuple[float, str]:
        """Return the larger of the seconds for bytes and for FLOPs at the best rates, and which ("bytes", "flops")."""
        by_bytes, by_flops = num_bytes / self.best_read()[1], flops / self.best_matmul()[1]
        return (by_bytes, "bytes") if by_bytes >= by_flops else (by_flops, "flops")

    def summary(self) -> dict[str, object]:
        read, matmul = self.best_read(), self.best_matmul()
        return {
            "read_bandwidth": {"way": read[0], "bytes_per_second": read[1], "all": self.read},
            "matmul": {"way": matmul[0], "flops_per_second": matmul[1], "all": self.matmul},
        }


def last_level_cache_bytes(device: torch.device) -> tuple[int, bool]:
    """Add up the last-level caches that serve our cores, in bytes; False beside it if the size is assumed."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size, True
    cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    by_level: dict[int, dict[str, int]] = {}
    for cpu in cpus:
        for cache in Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"):
            try:
                level, size, sharers = (
                    (cache / name).read_text().strip() for name in ("level", "size", "shared_cpu_list")
                )
                by_level.setdefault(int(level), {})[sharers] = int(size.removesuffix("K")) * 1024
            except (OSError, ValueError):  # Some virtual machines leave out files.
                continue
    if not by_level:
        return ASSUMED_CACHE_BYTES, False
    return sum(by_level[max(by_level)].values()), True
