"""The guard: which steps are bad, and when it stops a run."""

import json
import math

import pytest

from train.guard import Guard
from train.recipe import GuardConfig


def guard_after(losses: list[float], **settings: object) -> Guard:
    guard = Guard(GuardConfig(**settings))  # type: ignore[arg-type]
    for loss in losses:
        assert guard.diagnose(loss, 1.0) is None
    return guard


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (1.0, math.inf), (-math.inf, math.nan)])
def test_numbers_that_are_not_finite_are_a_fault_from_the_first_step_on(loss: float, norm: float) -> None:
    fault = Guard(GuardConfig()).diagnose(loss, norm)
    assert fault == f"loss {loss}, gradient norm {norm}; expected finite numbers"


def test_a_spike_is_measured_by_the_median_of_the_recent_good_steps() -> None:
    guard = guard_after([100.0, 2.0, 3.0, 30.0, 4.0], window=4, loss_spike=20.0)
    assert guard.diagnose(70.1, 1.0) == "loss 70.1; expected at most 20 x the recent median 3.5"  # of 2, 3, 30, 4
    assert guard.diagnose(70.0, 1.0) is None
    assert guard.diagnose(340.0, 1.0) is None  # 20 x the median of 3, 30, 4, 70


def test_nothing_is_a_spike_before_half_the_window() -> None:
    guard = guard_after([1.0, 100.0, 1.0], window=8, loss_spike=1.5)
    assert guard.diagnose(1.0, 1.0) is None
    assert guard.diagnose(100.0, 1.0) is not None


def test_a_bad_step_does_not_count_as_recent() -> None:
    guard = guard_after([1.0] * 4, window=4)
    for _ in range(20):
        assert guard.diagnose(3.0, 1.0) is not None


def test_the_gradient_norm_has_a_limit_of_its_own() -> None:
    assert guard_after([1.0] * 4, window=4).diagnose(1.0, 1e9) is None
    fault = guard_after([1.0] * 4, window=4, grad_spike=5.0).diagnose(1.0, 6.0)
    assert fault == "gradient norm 6; expected at most 5 x the recent median 1"


def test_a_skipping_guard_stops_after_too_many_faults_in_a_row() -> None:
    guard = guard_after([1.0] * 4, window=4, on_bad_step="skip", max_skips=2)
    for stops in (False, False, True):
        assert guard.diagnose(math.nan, 1.0) is not None
        assert guard.must_stop is stops
    guard = guard_after([1.0] * 4, window=4, on_bad_step="skip", max_skips=2)
    for loss in (math.nan, math.nan, 1.0, math.nan, math.nan):
        guard.diagnose(loss, 1.0)
    assert not guard.must_stop


def test_the_default_is_to_stop() -> None:
    guard = Guard(GuardConfig())
    guard.diagnose(math.nan, 1.0)
    assert guard.must_stop


def test_a_step_that_stops_the_run_is_not_remembered() -> None:
    guard = guard_after([1.0] * 4, window=4, on_bad_step="skip", max_skips=1)
    guard.diagnose(math.nan, 1.0)
    assert guard.last_was_bad
    before = guard.state_dict()
    guard.diagnose(math.nan, 1.0)
    assert guard.must_stop and guard.state_dict() == before


def test_the_state_survives_json_exactly() -> None:
    guard = guard_after([0.1 * step for step in range(1, 8)], window=6, on_bad_step="skip", max_skips=2)
    guard.diagnose(math.nan, 1.0)
    other = Guard(guard.config)
    other.load_state_dict(json.loads(json.dumps(guard.state_dict())))
    assert other.state_dict() == guard.state_dict()
    for loss in (1 / 3, 5.0, math.nan, math.nan, math.nan, 0.4):
        assert other.diagnose(loss, 1.0) == guard.diagnose(loss, 1.0)
        assert other.must_stop == guard.must_stop
