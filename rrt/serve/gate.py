"""Whether a draft is worth a row: by its predicted chance of being right, and by what rows cost.

Passes are the price of rows. A pass of R rows, of which U are useful (their tokens will stand), takes T(R) seconds, so
that a useful row costs T / U. A draft that is right with chance q gives q useful rows more; it is worth its row where
q T / U exceeds what the row adds to T. For T(R) = t0 + R t1 and certain rows alone this says q > x / (1 + x), where
x = R t1 / t0: with few rows in flight, which leave the time at that of reading the weights, nearly every draft is worth
it, with many none.

Where passes of certain rows alone would be cheaper for each, that is the price: else drafts that are too dear would
make others seem worth it.

Looking for a draft costs a row of the head, and is itself only worth it if drafts then are. Where it is not, some rows
are still looked at, from which the gate learns that drafts have become better, or passes emptier.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

_NUM_BINS = 12
_PRIOR_WEIGHT = 2.0
_MEMORY = 512
"""Drafts of a loop after which older ones count half."""
_FIRST_LOOKS = 24
_LOOK_EVERY = 64
_WEIGHT = 1 / 16
"""Of a pass in the averages."""


@dataclass(frozen=True)
class PassCurve:
    """Measured seconds of the block and the head by their rows.

    Attributes:
        rows: increasing numbers of rows, at least two.
        block, head: seconds for so many, which do not fall.
    """

    rows: tuple[int, ...]
    block: tuple[float, ...]
    head: tuple[float, ...]

    def block_seconds(self, rows: float) -> float:
        return self._at(self.block, rows)

    def head_seconds(self, rows: float) -> float:
        return self._at(self.head, rows)

    def _at(self, seconds: tuple[float, ...], rows: float) -> float:
        """Interpolate, or go on with the slope of the last two."""
        i = min(max(bisect_right(self.rows, rows) - 1, 0), len(self.rows) - 2)
        slope = (seconds[i + 1] - seconds[i]) / (self.rows[i + 1] - self.rows[i])
        return max(seconds[i] + (rows - self.rows[i]) * slope, 0.0)


class Acceptance:
    """How often drafts of one loop are right, by their confidence. Older ones fade."""

    def __init__(self) -> None:
        self._right = [0.0] * _NUM_BINS
        self._seen = [0.0] * _NUM_BINS

    @property
    def num_seen(self) -> float:
        return sum(self._seen)

    def chance(self, confidence: float) -> float:
        """Predict whether a draft is right; without experience, as the model says itself."""
        return self._of_bin(_bin(confidence), confidence)

    def learn(self, confidence: float, is_right: bool) -> None:
        if self.num_seen >= _MEMORY:
            self._right = [count / 2 for count in self._right]
            self._seen = [count / 2 for count in self._seen]
        self._seen[_bin(confidence)] += 1
        self._right[_bin(confidence)] += is_right

    def mean_gain(self, value: float, cost: float) -> float:
        """Return what drafts bring on average if each is begun only where its chance times `value` exceeds `cost`."""
        total = self.num_seen
        if total == 0:
            return max(value - cost, 0.0)
        middles = ((i + 0.5) / _NUM_BINS for i in range(_NUM_BINS))
        gains = (max(self._of_bin(i, middle) * value - cost, 0.0) for i, middle in enumerate(middles))
        return sum(seen / total * gain for seen, gain in zip(self._seen, gains, strict=True))

    def _of_bin(self, i: int, confidence: float) -> float:
        return (self._right[i] + _PRIOR_WEIGHT * confidence) / (self._seen[i] + _PRIOR_WEIGHT)


class Gate:
    """Decides which rows are looked at for drafts, and which drafts begin.

    Args:
        curve: of passes.
        num_loops: of the model.
    """

    def __init__(self, curve: PassCurve, num_loops: int) -> None:
        self._curve = curve
        self._loops = [Acceptance() for _ in range(num_loops - 1)]
        # Averages over the last passes.
        self._rows = self._useful = self._heads = self._seconds = self._plain_price = 0.0
        self._num_unlooked = [0] * (num_loops - 1)

    def observe(self, rows: int, useful: float, heads: int, sequences: int) -> None:
        """Take note of a pass.

        Args:
            rows: of which `useful` are expected to stand.
            heads: that had logits taken.
            sequences: that the rows are of.
        """
        num_loops, curve = len(self._loops) + 1, self._curve
        seconds = curve.block_seconds(rows) + curve.head_seconds(heads)
        plain = (curve.block_seconds(sequences) + curve.head_seconds(sequences / num_loops)) / sequences
        weight = _WEIGHT if self._rows else 1.0
        self._rows += weight * (rows - self._rows)
        self._useful += weight * (useful - self._useful)
        self._heads += weight * (heads - self._heads)
        self._seconds += weight * (seconds - self._seconds)
        self._plain_price += weight * (plain - self._plain_price)

    def wants_draft(self, loop: int) -> bool:
        """Decide if a row is looked at after `loop`, which is not the last."""
        acceptance, curve = self._loops[loop], self._curve
        head = curve.head_seconds(self._heads + 1) - curve.head_seconds(self._heads)
        gain = acceptance.mean_gain(self._price, self._row_seconds(self._rows))
        if acceptance.num_seen < _FIRST_LOOKS or gain > head:
            return True
        self._num_unlooked[loop] += 1
        return self._num_unlooked[loop] % _LOOK_EVERY == 0

    def chance(self, loop: int, confidence: float) -> float:
        """Predict whether the draft of a loop is right."""
        return self._loops[loop].chance(confidence)

    def learn(self, loop: int, confidence: float, is_right: bool) -> None:
        """Take note of a draft that has been verified."""
        self._loops[loop].learn(confidence, is_right)

    def begin(self, chances: Sequence[float], rows: int) -> list[bool]:
        """Decide which drafts begin in the next pass, which has `rows` rows without them."""
        begins = [False] * len(chances)
        for i in sorted(range(len(chances)), key=lambda i: -chances[i]):
            if chances[i] * self._price <= self._row_seconds(rows):
                break
            begins[i] = True
            rows += 1
        return begins

    @property
    def _price(self) -> float:
        """Seconds that a useful row costs, by these passes or by passes without drafts, if those are cheaper."""
        return min(self._seconds / max(self._useful, 1.0), self._plain_price)

    def _row_seconds(self, rows: float) -> float:
        """Seconds that a row adds to a pass."""
        return self._curve.block_seconds(rows + 1) - self._curve.block_seconds(rows)


def _bin(confidence: float) -> int:
    return min(int(confidence * _NUM_BINS), _NUM_BINS - 1)
