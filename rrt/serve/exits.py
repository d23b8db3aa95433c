"""When a row may leave before the last loop, and what the token that it leaves with is worth.

A policy looks at the logits after the loops that it names. Under a lossy policy a row that exits is done: its token is
final, and the loops that it skips get their keys and values from its state at the exit. `Verify` is exact: the token
after an early loop is a draft only, with which the next position starts while this one goes on; what the last loop says
stands. `Auto` is `Verify` that begins only drafts which are predicted to pay.

Shapes: M rows, V vocabulary.
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rrt.checkpoint.exit_thresholds import load_exit_thresholds
from rrt.errors import UserError
from rrt.model.config import RecursiveConfig
from rrt.serve.gate import PassCurve

POLICY_HELP = (
    "when a token may leave before the last loop: never (default); verify: early tokens are drafts that the last loop "
    "verifies, for the same text in fewer passes; auto: verify where that is predicted to pay; or, for another text, "
    "static:LOOP, confidence:P, margin:P, entropy:NATS, or calibrated:AGREEMENT, by confidences in the checkpoint's "
    "exit_thresholds.json, which eval/exits.py --calibrate writes"
)


class ExitPolicy(Protocol):
    """Decides which rows exit after a loop before the last."""

    @property
    def is_exact(self) -> bool:
        """Whether early tokens are drafts that the last loop verifies; else they are final."""

    def looks_after(self, loop: int) -> bool:
        """Tell whether logits are wanted after `loop`, which is not the last."""

    def scores(self, logits: Tensor) -> Tensor | None:
        """Reduce logits [M, V] to the number [M] that `exits` decides by; None if it needs none."""

    def exits(self, score: float, loop: int, request: int, step: int) -> bool:
        """Decide for a row after `loop`, which gives token number `step` of a request."""

    def check(self, recursion: RecursiveConfig) -> None:
        """Raise `UserError` if the policy does not fit a model."""


class _Policy:
    is_exact = False

    def looks_after(self, loop: int) -> bool:
        return True

    def scores(self, logits: Tensor) -> Tensor | None:
        return None

    def exits(self, score: float, loop: int, request: int, step: int) -> bool:
        return True

    def check(self, recursion: RecursiveConfig) -> None:
        if recursion.sharing != "cycle" and any(self.looks_after(loop) for loop in range(recursion.num_loops - 1)):
            raise UserError(
                f"exit policy: found early exits and a model with sharing '{recursion.sharing}', whose loops run "
                "different layers; expected the policy never, or sharing 'cycle'"
            )


class Never(_Policy):
    """Every token goes through all loops."""

    def looks_after(self, loop: int) -> bool:
        return False


class Verify(_Policy):
    """Drafts after every early loop, verified by the last: full depth's tokens in fewer passes."""

    is_exact = True


@dataclass(frozen=True)
class Auto(Verify):
    """`Verify`, but a draft begins only where the chance that it is right is worth its row (`rrt.serve.gate`).

    Attributes:
        curve: seconds of passes; default measured when the engine is made.
    """

    curve: PassCurve | None = None

    def scores(self, logits: Tensor) -> Tensor:
        return top_probabilities(logits)


@dataclass(frozen=True)
class Static(_Policy):
    """Every token exits after `loop`. Lossy."""

    loop: int

    def looks_after(self, loop: int) -> bool:
        return loop == self.loop

    def check(self, recursion: RecursiveConfig) -> None:
        super().check(recursion)
        if not 0 <= self.loop < recursion.num_loops:
            raise UserError(f"static exit: found loop {self.loop}; expected one in [0, {recursion.num_loops})")


@dataclass(frozen=True)
class Confidence(_Policy):
    """A token exits where its probability reaches a threshold. Lossy.

    Attributes:
        threshold: of all early loops; or one for each, where None never exits.
    """

    threshold: float | tuple[float | None, ...]

    def looks_after(self, loop: int) -> bool:
        return not isinstance(self.threshold, tuple) or self.threshold[loop] is not None

    def scores(self, logits: Tensor) -> Tensor:
        return top_probabilities(logits)

    def exits(self, score: float, loop: int, request: int, step: int) -> bool:
        least = self.threshold[loop] if isinstance(self.threshold, tuple) else self.threshold
        return least is not None and score >= least

    def check(self, recursion: RecursiveConfig) -> None:
        thresholds = (
            self.threshold if isinstance(self.threshold, tuple) else (self.threshold,) * (recursion.num_loops - 1)
        )
        if len(thresholds) != recursion.num_loops - 1:
            raise UserError(
                f"confidence exit: found {len(thresholds)} thresholds; expected {recursion.num_loops - 1}, one for "
                "each loop before the last"
            )
        for threshold in thresholds:
            if threshold is not None and not (isinstance(threshold, float | int) and 0 < threshold <= 1):
                raise UserError(f"confidence exit: found threshold {threshold}; expected more than 0 and at most 1")
        super().check(recursion)


@dataclass(frozen=True)
class Margin(_Policy):
    """A token exits where its probability exceeds the second one's by `threshold`. Lossy."""

    threshold: float

    def scores(self, logits: Tensor) -> Tensor:
        first, second = logits.float().topk(2).values.unbind(-1)
        # Both over the sum of all.
        return top_probabilities(logits) * -torch.expm1(second - first)

    def exits(self, score: float, loop: int, request: int, step: int) -> bool:
        return score >= self.threshold

    def check(self, recursion: RecursiveConfig) -> None:
        super().check(recursion)
        if not 0 < self.threshold <= 1:
            raise UserError(f"margin exit: found threshold {self.threshold}; expected more than 0 and at most 1")


@dataclass(frozen=True)
class Entropy(_Policy):
    """A token exits where the entropy of its distribution, in nats, is at most `threshold`. Lossy."""

    threshold: float

    def scores(self, logits: Tensor) -> Tensor:
        logs = logits.float().log_softmax(-1)
        return torch.special.entr(logs.exp()).sum(-1)

    def exits(self, score: float, loop: int, request: int, step: int) -> bool:
        return score <= self.threshold

    def check(self, recursion: RecursiveConfig) -> None:
        super().check(recursion)
        if not self.threshold >= 0:
            raise UserError(f"entropy exit: found threshold {self.threshold}; expected 0 or more")


@dataclass(frozen=True)
class Oracle(_Policy):
    """Replays exits: token `step` of request `id` exits after ``loops[id, step]``, others after the last. Lossy.

    For studies of what exits would give.
    """

    loops: Mapping[tuple[int, int], int]

    def exits(self, score: float, loop: int, request: int, step: int) -> bool:
        return self.loops.get((request, step)) == loop


def top_probabilities(logits: Tensor) -> Tensor:
    """Return the largest probability of each row: logits [M, V] -> float32 or float64 [M]."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return logits.log_softmax(-1).amax(-1).exp()


def parse_policy(text: str, checkpoint: Path) -> ExitPolicy:
    """Make the policy that a flag names, as `POLICY_HELP` has them.

    Raises:
        UserError: there is none of this name, or its number cannot be read; or the checkpoint has no thresholds.
    """
    name, _, number = text.partition(":")
    for exact in (Never, Verify, Auto):
        if text == exact.__name__.lower():
            return exact()
    with suppress(ValueError):
        if name == "calibrated":
            return Confidence(load_exit_thresholds(checkpoint, float(number)))
        if name == "static":
            return Static(int(number))
        if name == "confidence":
            return Confidence(float(number))
        if name == "margin":
            return Margin(float(number))
        if name == "entropy":
            return Entropy(float(number))
    raise UserError(
        f"--exit-policy: found '{text}'; expected never, verify, auto, static:LOOP, confidence:P, margin:P, "
        "entropy:NATS or calibrated:AGREEMENT"
    )
