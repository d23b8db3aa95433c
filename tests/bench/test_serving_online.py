"""bench/serving_online.py: arrivals that nothing delays, statistics by hand, and the same requests for every policy."""

import json
import sys

import pytest
import torch

from bench import serving, serving_online, tabulate
from bench.serving_online import Timeline, plot, poisson_arrivals, serve_arrivals, statistics_of
from bench.serving_variants import Requests
from rrt.checkpoint.presets import PRESETS
from rrt.serve.engine import Engine
from tests.util.decoding import make_decoder, make_model


class SteppedClock:
    """Stands still but for sleeping, and for passes of `PacedEngine`, which take a second."""

    def __init__(self):
        self.seconds, self.slept = 100.0, []

    def now(self):
        return self.seconds

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.seconds += seconds


class PacedEngine(Engine):
    def __init__(self, clock, **options):
        super().__init__(make_decoder(make_model("llama", "vanilla", torch.float32)), **options)
        self.clock = clock

    def step(self):
        self.clock.seconds += 1.0
        return super().step()


REQUESTS = Requests([[1, 2], [3], [4, 5, 6]], [3, 2, 1])


def test_requests_join_when_they_arrive_and_an_idle_engine_waits():
    clock = SteppedClock()
    timelines, tokens = serve_arrivals(PacedEngine(clock), REQUESTS, [0.0, 1.5, 10.0], clock)
    assert [timeline.arrival for timeline in timelines] == [0.0, 1.5, 10.0]
    # The second joins the pass after its arrival.
    assert [timeline.tokens for timeline in timelines] == [[1, 2, 3], [3, 4], [11]]
    assert [[new.finish_reason for new in news] for news in tokens] == [
        [None, None, "length"],
        [None, "length"],
        ["length"],
    ]
    assert clock.slept == [6.0]


def test_waiting_for_a_slow_engine_counts():
    clock = SteppedClock()
    timelines, _ = serve_arrivals(PacedEngine(clock, max_running=1), REQUESTS, [0.0, 0.25, 0.5], clock)
    assert [timeline.tokens for timeline in timelines] == [[1, 2, 3], [4, 5], [6]] and clock.slept == []
    assert statistics_of(timelines[2:])["first_token"]["mean"] == 5.5


def test_statistics_of_a_trace_by_hand():
    timelines = [Timeline(1.0, [3.0, 4.0, 7.0]), Timeline(2.0, [3.0]), Timeline(4.0, [4.5, 5.0])]
    found = statistics_of(timelines)
    assert found["first_token"] == {"mean": pytest.approx(3.5 / 3), "p50": 1.0, "p99": pytest.approx(1.98)}
    # One token has no time between tokens.
    assert found["per_output_token"] == {"mean": 1.25, "p50": 1.25, "p99": pytest.approx(1.985)}
    assert found["latency"] == {"mean": pytest.approx(8 / 3), "p50": 1.0, "p99": pytest.approx(5.9)}
    assert found["normalised_latency"]["mean"] == pytest.approx((2.0 + 1.0 + 0.5) / 3)
    assert "per_output_token" not in statistics_of(timelines[1:2])


def test_arrivals_are_a_poisson_process_of_the_rate_in_one_pattern():
    arrivals = poisson_arrivals(20_000, 4.0)
    assert arrivals == sorted(arrivals) and arrivals[-1] == pytest.approx(5_000, rel=0.03)
    gaps = torch.tensor(arrivals).diff()
    assert float(gaps.std()) == pytest.approx(0.25, rel=0.05)
    assert poisson_arrivals(5, 8.0) == pytest.approx([seconds / 2 for seconds in arrivals[:5]])


def test_all_policies_get_the_same_requests_at_the_same_times(monkeypatch, tmp_path, one_thread, capsys):
    tiny = {**PRESETS["smollm2-135m"], "vocab_size": 97, "hidden_size": 36, "intermediate_size": 48}
    monkeypatch.setitem(PRESETS, "smollm2-135m", {**tiny, "num_hidden_layers": 4})
    seen, serve = [], serving_online.serve_arrivals

    def watched(engine, requests, arrivals):
        seen.append((requests, arrivals))
        return serve(engine, requests, [0.0] * len(arrivals))  # without the waiting

    monkeypatch.setattr(serving_online, "serve_arrivals", watched)
    out, drawn = tmp_path / "out.json", tmp_path / "out.svg"
    flags = (
        f"--preset smollm2-135m --lora-rank 3 --online --load 0.5 2 --requests 8 --warm-up 3 --json {out} --threads 1"
    )
    more = f"--max-running 2 --agreement 0.8 --policies static:0 --prompt-tokens 6 --new-tokens 2 5 --plot {drawn}"
    monkeypatch.setattr(sys, "argv", ["serving.py", *flags.split(), *more.split()])
    serving.main()
    assert len(seen) == 10 and all(requests == seen[0][0] for requests, _ in seen)
    assert {len(prompt) for prompt in seen[0][0].prompts} <= set(range(1, 7))
    assert all(arrivals == seen[0][1] for _, arrivals in seen[:5])
    assert all(arrivals == pytest.approx([seconds / 4 for seconds in seen[0][1]]) for _, arrivals in seen[5:])
    result = json.loads(out.read_text())
    (case,) = result["cases"]
    names = ["never", "lossy 0.8", "verify 0.8", "auto 0.8", "static:0"]
    assert [(point["load"], point["variant"]) for point in case["points"]] == [
        (x, n) for x in (0.5, 2.0) for n in names
    ]
    assert {point["requests"] for point in case["points"]} == {5}
    assert all(set(serving_online.MEASURES) <= set(point) for point in case["points"])
    assert seen[0][1] == pytest.approx(poisson_arrivals(8, 0.5 * case["capacity_requests_per_second"]))
    (table,) = tabulate.result_tables(result)
    assert "| 0.5 | lossy 0.8 | 5 |" in table.markdown() and "the first 3 requests are left out" in table.markdown()
    svg = drawn.read_text()
    assert svg == plot(result) and svg.count("<polyline") == 5 and "verify 0.8" in svg
    assert f"wrote {drawn}" in capsys.readouterr().out
