"""Latencies of requests that arrive while others run: the part of bench/serving.py behind --online.

An open loop: arrivals follow the clock alone, so that what a slow engine has not begun yet waits, and its waiting
counts. Of each request, since its arrival:

- time to first token;
- time per output token: from the first token to the last, over the tokens after the first;
- latency: to the last token;
- normalised latency: that over its tokens.
"""

import argparse
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.output import save_result
from bench.serving_variants import (
    Requests,
    count_work,
    cut_prompts,
    make_decoder,
    make_engines,
    make_subjects,
    mixed_lengths,
    serve,
    token_ids,
)
from eval.flags import check_least
from eval.svg import Series, plot_file
from eval.tables import Table, print_tables
from rrt.common.cli import keep_freed_memory
from rrt.common.dtypes import parse_dtype
from rrt.common.files import atomic_write
from rrt.decode.decoder import Decoder
from rrt.errors import UserError
from rrt.serve.engine import Engine
from rrt.serve.requests import NewToken, SamplingParams

KIND = "serving-latency"
MEASURES = {
    "first_token": "first token, s",
    "per_output_token": "per output token, ms",
    "latency": "latency, s",
    "normalised_latency": "normalised latency, ms",
}
"""Statistics, and their columns."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("online")
    group.add_argument("--online", action="store_true", help="latencies of requests that arrive, instead")
    group.add_argument(
        "--load", type=float, nargs="+", default=[0.5, 0.7, 0.9, 0.95], metavar="X",
        help="arrivals, as parts of what never completes (default 0.5 0.7 0.9 0.95)",
    )  # fmt: skip
    group.add_argument("--requests", type=int, default=200, metavar="N", help="that arrive (default 200)")
    group.add_argument(
        "--warm-up", type=int, metavar="N", help="first requests, not in the statistics (default a tenth of them)"
    )
    group.add_argument(
        "--max-running", type=int, default=16, metavar="N", help="most that are computed at once (default 16)"
    )
    group.add_argument("--plot", type=Path, metavar="SVG", help="also draw normalised latency over load here")


def check_flags(arguments: argparse.Namespace) -> None:
    if arguments.plot is not None and not arguments.online:
        raise UserError("--plot: found without --online; expected both")
    if not all(0 < load < math.inf for load in arguments.load):
        raise UserError(f"--load: found {arguments.load}; expected positive numbers")
    for flag in ("requests", "max_running"):
        check_least(f"--{flag.replace('_', '-')}", getattr(arguments, flag))
    if arguments.warm_up is None:
        arguments.warm_up = arguments.requests // 10
    if not 0 <= arguments.warm_up < arguments.requests:
        raise UserError(
            f"--warm-up: found {arguments.warm_up}; expected fewer than --requests, which are {arguments.requests}"
        )


@dataclass
class Timeline:
    """When a request arrived, and when each of its tokens came, in seconds."""

    arrival: float
    tokens: list[float] = field(default_factory=list)


class Clock:
    """The wall clock, and waiting for it."""

    def now(self) -> float:
        return time.perf_counter()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def poisson_arrivals(count: int, rate: float) -> list[float]:
    """Draw the seconds at which `count` requests arrive, `rate` a second on average; at every rate the same pattern."""
    draw, now, arrivals = random.Random(0), 0.0, []
    for _ in range(count):
        now += draw.expovariate(1.0)
        arrivals.append(now / rate)
    return arrivals


def serve_arrivals(
    engine: Engine, requests: Requests, arrivals: Sequence[float], clock: Clock | None = None
) -> tuple[list[Timeline], list[list[NewToken]]]:
    """Serve requests that arrive at these seconds from now; returns their timelines and tokens."""
    clock = clock or Clock()
    timelines = [Timeline(arrival) for arrival in arrivals]
    tokens: list[list[NewToken]] = [[] for _ in arrivals]
    places: dict[int, int] = {}
    arrived, began = 0, clock.now()
    while arrived < len(arrivals) or engine.has_work:
        while arrived < len(arrivals) and arrivals[arrived] <= clock.now() - began:
            params = SamplingParams(max_new_tokens=requests.new_tokens[arrived])
            places[engine.add(requests.prompts[arrived], params)] = arrived
            arrived += 1
        if not engine.has_work:
            clock.sleep(max(0.0, arrivals[arrived] - (clock.now() - began)))
            continue
        for new in engine.step():
            timelines[places[new.request_id]].tokens.append(clock.now() - began)
            tokens[places[new.request_id]].append(new)
    return timelines, tokens


def statistics_of(timelines: Sequence[Timeline]) -> dict[str, dict[str, float]]:
    """Return mean, median and 99th percentile of each of `MEASURES`, in seconds."""
    values = {
        "first_token": [t.tokens[0] - t.arrival for t in timelines],
        "per_output_token": [
            (t.tokens[-1] - t.tokens[0]) / (len(t.tokens) - 1) for t in timelines if len(t.tokens) > 1
        ],
        "latency": [t.tokens[-1] - t.arrival for t in timelines],
        "normalised_latency": [(t.tokens[-1] - t.arrival) / len(t.tokens) for t in timelines],
    }
    return {name: _summary(found) for name, found in values.items() if found}


def _summary(values: list[float]) -> dict[str, float]:
    numbers = torch.tensor(values, dtype=torch.float64)
    p50, p99 = numbers.quantile(torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
    return {"mean": float(numbers.mean()), "p50": p50, "p99": p99}


def measure(decoder: Decoder, requests: Requests, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the capacity of `never`, then each policy at each load."""
    serve(Engine(decoder, max_running=arguments.max_running), requests.batches(arguments.max_running)[0])  # as warm-up
    began = time.perf_counter()
    expected = token_ids(serve(Engine(decoder, max_running=arguments.max_running), requests))
    capacity = len(requests.prompts) / (time.perf_counter() - began)
    engines = make_engines(decoder, expected, arguments, arguments.max_running)
    points = []
    for load in arguments.load:
        arrivals = poisson_arrivals(len(requests.prompts), load * capacity)
        for name, make in engines.items():
            engine = make()
            timelines, tokens = serve_arrivals(engine, requests, arrivals)
            end = max(timeline.tokens[-1] for timeline in timelines)
            points.append(
                {
                    "load": load,
                    "variant": name,
                    "requests": len(timelines) - arguments.warm_up,
                    "tokens_per_second": requests.num_tokens / end,
                    "preemptions": engine.num_preemptions,
                    **count_work(engine, tokens),
                    **statistics_of(timelines[arguments.warm_up :]),
                }
            )
    return {
        "capacity_requests_per_second": capacity,
        "capacity_tokens_per_second": capacity * requests.num_tokens / len(requests.prompts),
        "points": points,
    }


def run(arguments: argparse.Namespace) -> None:
    """Measure every model, write the result and print it."""
    torch.set_num_threads(arguments.threads)
    length = arguments.prompt_tokens[1] + arguments.new_tokens[1]
    cases: list[dict[str, Any]] = []
    for subject in make_subjects(arguments):
        prompts = cut_prompts(arguments, subject, arguments.requests)
        requests = mixed_lengths(prompts, arguments.prompt_tokens, arguments.new_tokens)
        for name in arguments.dtype:
            decoder = make_decoder(subject, parse_dtype(name), length, arguments.max_running)
            keep_freed_memory()
            case = {"model": subject.name, "dtype": name, **measure(decoder, requests, arguments)}
            cases.append(case)
            print(f"\n{latency_table(case).text()}", flush=True)
    result = {
        "prompt_tokens": arguments.prompt_tokens,
        "new_tokens": arguments.new_tokens,
        "torch_threads": arguments.threads,
        "max_running": arguments.max_running,
        "warm_up": arguments.warm_up,
        "cases": cases,
    }
    save_result(arguments.json, KIND, result)
    if arguments.plot is not None:
        atomic_write(arguments.plot, plot(result))
        print(f"wrote {arguments.plot}", flush=True)
    print_tables(tables(result))


def latency_table(case: dict[str, Any], notes: Sequence[str] = ()) -> Table:
    """Make the table of a model's latencies, with a row per load and variant."""
    rows = [
        [
            f"{point['load']:g}",
            point["variant"],
            str(point["requests"]),
            *(_cell(point.get(name), 1e3 if unit.endswith("ms") else 1.0) for name, unit in MEASURES.items()),
        ]
        for point in case["points"]
    ]
    title = (
        f"{case['model']}, {case['dtype']}: latencies, p50 / p99 (mean); capacity of never "
        f"{case['capacity_requests_per_second']:.2f} requests/s, {case['capacity_tokens_per_second']:.1f} tokens/s"
    )
    return Table(title, ["load", "variant", "requests", *MEASURES.values()], rows, (1,), gap_after=1, notes=notes)


def _cell(summary: dict[str, float] | None, scale: float) -> str:
    if summary is None:
        return ""
    p50, p99, mean = (f"{scale * summary[name]:.3g}" for name in ("p50", "p99", "mean"))
    return f"{p50} / {p99} ({mean})"


def tables(result: dict[str, Any]) -> list[Table]:
    (least_prompt, prompt), (least_new, new) = result["prompt_tokens"], result["new_tokens"]
    note = (
        f"Prompts of {least_prompt} to {prompt} tokens, {least_new} to {new} new ones, at most {result['max_running']} "
        f"at once; Poisson arrivals, the same for every variant; the first {result['warm_up']} requests are left out. "
        "Agreement behind a policy's name is forced."
    )
    return [latency_table(case, [note] if case is result["cases"][-1] else []) for case in result["cases"]]


def plot(result: dict[str, Any]) -> str:
    """Draw mean normalised latency over load, a line for each policy (and model, if there are several)."""
    series: dict[str, list[tuple[float, float]]] = {}
    for case in result["cases"]:
        prefix = f"{case['model']}, {case['dtype']}: " if len(result["cases"]) > 1 else ""
        for point in case["points"]:
            milliseconds = 1e3 * point["normalised_latency"]["mean"]
            series.setdefault(f"{prefix}{point['variant']}", []).append((point["load"], milliseconds))
    lines = [Series(name, sorted(points)) for name, points in series.items()]
    label = "load: arrivals over the capacity of never"
    return plot_file("Mean normalised latency", lines, label, "ms a token", log_y=True)
