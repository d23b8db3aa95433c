"""Whether drafts are worth their rows: by how often they have been right, and by what passes cost.

Without drafts, N texts go through the loops in step. A token of each takes B passes at one loop, and the head once:

    B block(N) + head(N)

With drafts rows of all loops share a pass, every row is looked at, and those on wrong drafts come on top. If a share
s_j of the drafts of loop j begins, and p_j of these are right, a token takes

    P = B - sum of s_j p_j passes, and W = B + sum of s_j (1 - p_j) (B - 1 - j) rows, so that for one of each text

    P (mixed(N W / P) + head(N W / P))

seconds are needed. The gate lets those drafts begin whose chance of being right exceeds a least one, chosen to make
this time shortest, and none if the first one is not longer by some percent. With few texts, whose passes take as long
as reading the weights, rows are nearly free; with many each has its price. Where no draft begins, rows are looked at
every now and then, from which the gate learns that drafts have become better.

The curve is of short contexts, and of passes alone. How much longer those of the engine take, with drafts and without,
is learned from them.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass

_NUM_BINS = 12
_PRIOR = 0.25
"""Drafts that stand for no experience, of each confidence."""
_MEMORY = 512
"""Drafts of a loop after which older ones count half."""
_PLAN_EVERY = 16
_LOOK_EVERY = 32
_MARGIN = 0.95
"""Where no drafts begin, they do only if the predicted time is shorter than this part of the time without."""
_PASSES_REMEMBERED = 256
"""Passes after which the seconds of an older one count 1 / e."""
_PRIOR_PASSES = 8
"""Passes as long as the curve says, where there is no experience of a kind."""
_SLOWEST = 4.0
"""Times the predicted seconds: what is beyond is not the pass's."""


@dataclass(frozen=True)
class PassCurve:
    """Measured seconds of the parts of a pass by its rows.

    Attributes:
        rows: increasing numbers of rows, at least two.
        block, mixed, head: seconds for so many at one loop, at all loops in turn, and of the head; they do not fall.
    """

    rows: tuple[int, ...]
    block: tuple[float, ...]
    mixed: tuple[float, ...]
    head: tuple[float, ...]

    def at(self, seconds: tuple[float, ...], rows: float) -> float:
        """Interpolate one of the three, or go on with the slope of its last two points."""
        i = min(max(bisect_right(self.rows, rows) - 1, 0), len(self.rows) - 2)
        slope = (seconds[i + 1] - seconds[i]) / (self.rows[i + 1] - self.rows[i])
        return max(seconds[i] + (rows - self.rows[i]) * slope, 0.0)


class Acceptance:
    """How often drafts of one loop are right, by their confidence. Older ones fade.

    Without experience all confidences are as frequent, and drafts as good as theirs.
    """

    def __init__(self) -> None:
        self._right = [_PRIOR * (i + 0.5) / _NUM_BINS for i in range(_NUM_BINS)]
        self._seen = [_PRIOR] * _NUM_BINS

    def chance(self, confidence: float) -> float:
        """Predict whether a draft is right."""
        i = _bin(confidence)
        return self._right[i] / self._seen[i]

    def chances(self) -> list[float]:
        """Return the chances of drafts of all confidences."""
        return [right / seen for right, seen in zip(self._right, self._seen, strict=True)]

    def learn(self, confidence: float, is_right: bool) -> None:
        if sum(self._seen) >= _MEMORY:
            self._right = [count / 2 for count in self._right]
            self._seen = [count / 2 for count in self._seen]
        i = _bin(confidence)
        self._seen[i] += 1
        self._right[i] += is_right

    def shares(self, least: float) -> tuple[float, float]:
        """Return which part of all drafts have this chance or a better one, and which part are right among them."""
        counts = zip(self._right, self._seen, strict=True)
        begun = [(right, seen) for right, seen in counts if right / seen >= least]
        total = sum(self._seen)
        return sum(seen for _, seen in begun) / total, sum(right for right, _ in begun) / total


class Slowness:
    """How much longer passes take than the curve says, with drafts and without.

    Older ones fade, also while passes are of the other kind: then these are thought to be as the curve says, and will
    be tried again if that would be better.
    """

    def __init__(self) -> None:
        self._seconds = [0.0, 0.0]
        self._predicted = [0.0, 0.0]

    def learn(self, drafts: bool, predicted: float, seconds: float) -> None:
        for sums in (self._seconds, self._predicted):
            sums[:] = [each * (1 - 1 / _PASSES_REMEMBERED) for each in sums]
        self._seconds[drafts] += min(max(seconds, predicted), _SLOWEST * predicted)
        self._predicted[drafts] += predicted

    def of(self, drafts: bool) -> float:
        """Return the factor of passes with drafts, or of those without."""
        prior = _PRIOR_PASSES / _PASSES_REMEMBERED * sum(self._predicted)
        return (self._seconds[drafts] + prior) / (self._predicted[drafts] + prior) if prior else 1.0


class Gate:
    """Decides which rows are looked at for drafts, and which drafts begin.

    Args:
        curve: of passes.
        num_loops: of the model.
    """

    def __init__(self, curve: PassCurve, num_loops: int) -> None:
        self._curve, self._num_loops = curve, num_loops
        self._loops = [Acceptance() for _ in range(num_loops - 1)]
        self._slowness = Slowness()
        self._least, self._sequences = math.inf, 0.0
        self._num_passes = 0

    @property
    def drafts(self) -> bool:
        """Whether any drafts begin now."""
        return self._least < math.inf

    def begin_pass(self, sequences: int) -> None:
        """Take note of a pass, which has decode rows of so many texts."""
        if sequences == 0:
            return
        # Plans are for an average, and last: to change between rows in step and rows at all loops costs passes.
        self._sequences += (sequences - self._sequences) * (1 / _PLAN_EVERY if self._sequences else 1)
        if self._num_passes % _PLAN_EVERY == 0:
            self._least = self._best_least(self._sequences)
        self._num_passes += 1

    @property
    def looks(self) -> bool:
        """Whether rows of this pass are looked at after early loops."""
        # Whole turns of all loops, of which one has the rows that are at an early one.
        return self.drafts or self._num_passes // self._num_loops % _LOOK_EVERY == 0

    def begins(self, loop: int, confidence: float) -> bool:
        """Decide if a draft of a loop begins."""
        return self._loops[loop].chance(confidence) >= self._least

    def learn(self, loop: int, confidence: float, is_right: bool) -> None:
        """Take note of a draft that has been verified."""
        self._loops[loop].learn(confidence, is_right)

    def learn_seconds(self, rows: int, heads: int, seconds: float) -> None:
        """Take note of how long the pass has taken that was begun last, if it had no prompts."""
        curve = self._curve
        predicted = curve.at(curve.mixed if self.drafts else curve.block, rows)
        predicted += curve.at(curve.head, heads) if heads else 0.0
        self._slowness.learn(self.drafts, predicted, seconds)

    def _best_least(self, sequences: float) -> float:
        curve, best = self._curve, math.inf
        plain = self._num_loops * curve.at(curve.block, sequences) + curve.at(curve.head, sequences)
        plain *= self._slowness.of(drafts=False)
        shortest = plain if self.drafts else _MARGIN * plain
        for least in sorted({chance for acceptance in self._loops for chance in acceptance.chances()}, reverse=True):
            seconds = self._seconds(sequences, least)
            if seconds < shortest:
                best, shortest = least, seconds
        return best

    def _seconds(self, sequences: float, least: float) -> float:
        """Predict the seconds of one token of each text where drafts of this chance or a better one begin."""
        passes = rows = float(self._num_loops)
        for loop, acceptance in enumerate(self._loops):
            begun, right = acceptance.shares(least)
            passes -= right
            rows += (begun - right) * (self._num_loops - 1 - loop)
        rows_of_pass, curve = sequences * rows / passes, self._curve
        seconds = passes * (curve.at(curve.mixed, rows_of_pass) + curve.at(curve.head, rows_of_pass))
        return seconds * self._slowness.of(drafts=True)


def _bin(confidence: float) -> int:
    return min(int(confidence * _NUM_BINS), _NUM_BINS - 1)
