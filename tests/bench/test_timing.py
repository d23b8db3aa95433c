"""bench/timing.py: alternating rounds, cold copies, samples of a GPU, medians and rates."""

import contextlib

import pytest
import torch
from torch import Tensor

from bench.timing import Rates, Timer, Variant, copies_beyond_cache, last_level_cache_bytes, median_interval, speedup

CPU = torch.device("cpu")


def test_copies_of_large_weights_two_of_small_many_of_a_tight_budget_fewer():
    mib = 2**20
    assert copies_beyond_cache(256 * mib, 600 * mib, cache_bytes=32 * mib, budget_bytes=2**40) == 2
    assert copies_beyond_cache(16 * mib, 40 * mib, cache_bytes=32 * mib, budget_bytes=2**40) == 9
    assert copies_beyond_cache(16 * mib, 40 * mib, cache_bytes=32 * mib, budget_bytes=200 * mib) == 5
    assert copies_beyond_cache(16 * mib, 40 * mib, cache_bytes=32 * mib, budget_bytes=0) == 2


def test_rounds_alternate_and_no_copy_is_read_again_before_all_others():
    calls: list[tuple[str, int]] = []
    sizes = {"one": 1, "three": 3, "two": 2}

    def variant(name: str) -> Variant:
        def call(copy: int) -> Tensor:
            calls.append((name, copy))
            return torch.empty(0)

        return Variant(call, sizes[name])

    copies = 5
    samples = Timer(CPU, seconds=0, min_rounds=4).measure({name: variant(name) for name in sizes}, copies)
    forward, backward = ["one", "three", "two"], ["two", "three", "one"]
    assert [name for name, _ in calls] == forward + backward + forward + backward
    reads = [(copy + i) % copies for name, copy in calls for i in range(sizes[name])]
    assert reads == [i % copies for i in range(len(reads))]
    assert all(len(values) == 4 and min(values) > 0 for values in samples.values())


class FakeGpu:
    """CUDA's calls as bench/timing.py makes them, on a clock of its own: launches take `host` seconds."""

    def __init__(self, monkeypatch, host: float) -> None:
        self.host, self.now, self.slept_until, self.busy_until = host, 0.0, 0.0, 0.0
        self.sleeps: list[int] = []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = max(gpu.now, gpu.busy_until)

            def query(self) -> bool:
                return gpu.now >= self.at

            def synchronize(self) -> None:
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, end: "Event") -> float:
                return (end.at - self.at) * 1e3

        def sleep(cycles: int) -> None:
            self.sleeps.append(cycles)
            self.busy_until = self.now + cycles / 1e9

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", sleep, raising=False)

    def launch(self) -> None:
        """Launch work of 3 ms."""
        self.now += self.host
        self.busy_until = max(self.now, self.busy_until) + 3e-3


def test_a_sample_on_a_gpu_has_no_time_of_the_host_in_it(monkeypatch):
    gpu, timer = FakeGpu(monkeypatch, host=1e-3), Timer(torch.device("cuda"), 0.0)
    assert [timer._time_launch(gpu.launch, 30) for _ in range(2)] == pytest.approx([1e-4, 1e-4])
    # It slept longer until the launch fitted in, and then as long at once.
    assert gpu.sleeps == [2**18, 2**19, 2**20, 2**20] and timer.hidden

    slow = FakeGpu(monkeypatch, host=10.0)
    timer = Timer(torch.device("cuda"), 0.0)
    timer._time_launch(slow.launch, 30)
    assert not timer.hidden  # and the result says so


def test_graphs_have_at_least_30_calls_and_whole_rounds_of_the_copies(monkeypatch):
    calls: list[int] = []

    def call(copy: int) -> Tensor:
        calls.append(copy)
        return torch.empty(0)

    class Graph:
        def replay(self) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda _: contextlib.nullcontext())
    divided: list[int] = []
    monkeypatch.setattr(Timer, "_time_launch", lambda _, __, number: divided.append(number) or 1.0)
    for copies, expected in ((1, 30), (4, 32), (31, 31), (64, 64)):
        calls.clear()
        Timer(torch.device("cuda"), 0.0, 1).measure({"one": Variant(call)}, copies)
        assert calls == [i % copies for i in range(expected)] and divided.pop() == expected


def test_speedup_is_the_median_of_the_rounds():
    assert speedup({"ours": [1.0, 2.0, 1.0], "base": [3.0, 2.0, 9.0]}, "ours", "base") == 3.0


def test_interval_of_a_median_by_ranks():
    # Of six values the median lies outside all of them with 2 * (1/2)^6 = 3.1 %; of five with 6.2 %.
    assert median_interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) == (1.0, 6.0)
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None
    # Of nine the next to outermost two do: 2 * (1 + 9) / 2^9 = 3.9 %, the next 2 * 46 / 2^9 = 18 %.
    assert median_interval([float(n) for n in range(9)]) == (1.0, 7.0)


def test_rates_are_the_best_of_several_ways():
    rates = Rates(Timer(CPU, 0, min_rounds=1), torch.float32, buffer_bytes=2**20)
    rates.probe()
    first = dict(rates.read)
    rates.probe()
    assert {"sum, float32", "dot, float32", "copy"} < set(first) and len(first) == 5
    assert all(rates.read[way] >= first[way] > 0 for way in first)
    assert rates.best_read()[1] == max(rates.read.values())


def test_size_of_the_last_level_cache_is_that_of_the_system_or_assumed(monkeypatch):
    size, _ = last_level_cache_bytes(CPU)
    assert size >= 2**16
    monkeypatch.setattr("bench.timing.Path.glob", lambda *_: iter(()))
    assert last_level_cache_bytes(CPU) == (64 * 2**20, False)
