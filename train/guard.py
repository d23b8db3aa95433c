"""Bad steps, kept from the weights: loss or gradient norm not finite, or far above the recent ones."""

import math
import statistics
from collections import deque
from typing import Any

from train.recipe import GuardConfig


class Guard:
    """Judges each step by the recent ones. Processes that pass the same numbers get the same answers."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._recent = {name: deque[float](maxlen=config.window) for name in ("loss", "gradient norm")}
        self._skipped_in_a_row = 0
        self.last_was_bad = False
        """True if the last step was bad; spoilt weights may be the cause."""
        self.must_stop = False
        """True if the last bad step ends the run; otherwise it is skipped."""

    def diagnose(self, loss: float, grad_norm: float) -> str | None:
        """Describe what is wrong with a step, or return None and count it among the recent ones."""
        found = {"loss": loss, "gradient norm": grad_norm}
        fault = self._not_finite(found) or self._spike(found)
        self.last_was_bad = fault is not None
        if fault is None:
            self._skipped_in_a_row = 0
            for name, recent in self._recent.items():
                recent.append(found[name])
        else:
            self.must_stop = self.config.on_bad_step == "stop" or self._skipped_in_a_row >= self.config.max_skips
            # Not counted if it ends the run: the step is retried on resume.
            self._skipped_in_a_row += not self.must_stop
        return fault

    def _not_finite(self, found: dict[str, float]) -> str | None:
        if all(map(math.isfinite, found.values())):
            return None
        return ", ".join(f"{name} {value}" for name, value in found.items()) + "; expected finite numbers"

    def _spike(self, found: dict[str, float]) -> str | None:
        for name, limit in (("loss", self.config.loss_spike), ("gradient norm", self.config.grad_spike)):
            recent = self._recent[name]
            if 2 * len(recent) >= self.config.window and found[name] > limit * (median := statistics.median(recent)):
                return f"{name} {found[name]:.4g}; expected at most {limit:g} x the recent median {median:.4g}"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what the guard remembers, as JSON's types that restore it exactly."""
        return {
            "recent": {name: list(recent) for name, recent in self._recent.items()},
            "skipped_in_a_row": self._skipped_in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, recent in self._recent.items():
            recent.clear()
            recent.extend(state["recent"][name])
        self._skipped_in_a_row = state["skipped_in_a_row"]
