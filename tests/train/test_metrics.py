"""Metrics of a run: files, TensorBoard, W&B, progress lines."""

import json
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rrt.errors import UserError
from train import metrics
from train.metrics import Meter, MetricsWriter, import_wandb, progress_line


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def test_speed_is_of_the_steps_since_the_last_reading_and_eta_of_all(clock: Clock) -> None:
    meter = Meter(10, 20, tokens_per_step=1000, flops_per_token=6e6, peak_flops=1e10)
    clock.now += 4.0
    assert meter.read(12) == {"tokens_per_second": 500.0, "mfu": 0.3, "eta_seconds": 16.0}
    clock.now += 2.0  # a checkpoint
    meter.restart(12)
    clock.now += 4.0
    assert meter.read(14) == {"tokens_per_second": 500.0, "mfu": 0.3, "eta_seconds": 15.0}


def test_without_a_peak_there_is_no_mfu(clock: Clock) -> None:
    meter = Meter(0, 2, 1000, 6e6, None)
    clock.now += 1.0
    record = {"step": 1, "loss": 2.5, "lr": 1e-4, "grad_norm": 0.5, "memory_bytes": 2**30, **meter.read(1)}
    assert progress_line(record, 2) == (
        "step 1/2  loss 2.5000  lr 1.00e-04  grad norm 0.50  1,000 tok/s  mem 1.00 GiB  ETA 0:00:01"
    )
    line = progress_line({**record, "mfu": 0.4123, "eta_seconds": 7322}, 2)
    assert "1,000 tok/s  MFU 41.2%  mem 1.00 GiB  ETA 2:02:02" in line


def read_lines(out: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_every_record_is_a_line_of_json_and_its_numbers_curves(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0, None, {})
    writer.write({"step": 1, "loss": 2.0, "tokens": 64})
    writer.write({"step": 2, "loss": math.nan, "tokens": 128, "fault": "loss nan"})
    writer.write({"step": 3, "loss": 1.0, "tokens": 192})
    writer.close()
    assert read_lines(tmp_path)[1] == {"step": 2, "loss": None, "tokens": 128, "fault": "loss nan"}
    board = EventAccumulator(str(tmp_path / "tb"))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(1, 2.0), (3, 1.0)]
    assert [event.value for event in board.Scalars("train/tokens")] == [64, 128, 192]


def test_a_resumed_run_cuts_off_the_steps_that_it_repeats(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0, None, {})
    for step in (1, 2, 3):
        writer.write({"step": step, "loss": 1.0})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "lo')  # killed while it wrote
    writer = MetricsWriter(tmp_path, 1, None, {})
    writer.write({"step": 2, "loss": 0.5})
    writer.close()
    assert read_lines(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]


def test_wandb_where_it_is_not_installed_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"field 'run.wandb': the wandb package cannot be imported .*; pip install"):
        import_wandb()


def test_wandb_gets_the_settings_and_every_number_and_a_resumed_run_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []

    class Run:
        def define_metric(self, name: str, step_metric: str) -> None:
            calls.append(("metric", (name, step_metric)))

        def log(self, values: dict[str, Any]) -> None:
            calls.append(("log", values))

        def finish(self) -> None:
            calls.append(("finish", None))

    def init(**settings: Any) -> Run:
        calls.append(("init", settings))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))  # type: ignore[arg-type]
    for step in (0, 1):
        writer = MetricsWriter(tmp_path, step, "project", {"run": {"seed": 3}})
        writer.write({"step": step + 1, "loss": 2.0, "fault": "text"})
        writer.close()
    names = [name for name, _ in calls]
    assert names == ["init", "metric", "log", "finish"] * 2
    assert calls[0] == calls[4]
    assert calls[0][1] == {
        "project": "project",
        "id": (tmp_path / "wandb-id").read_text(),
        "resume": "allow",
        "name": tmp_path.name,
        "dir": str(tmp_path),
        "config": {"run": {"seed": 3}},
    }
    assert calls[1][1] == ("train/*", "step")
    assert calls[6] == ("log", {"step": 2, "train/loss": 2.0})
