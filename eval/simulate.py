"""A queue of samples through a number of slots, pass by pass: static, sequence-wise and depth-wise batching.

Plain numpy, no model. A pass runs the shared block once over one row of every busy slot; a row is one token at one
loop. A sample holds its slot until its last token has left, then the next of the queue takes it.

- static: the queue in groups as large as there are slots; all of a group's rows run until its longest sample ends
- sequence-wise (continuous batching): every token runs all loops
- depth-wise: a token leaves after its own exit loop, and its slot's next token starts in the next pass

Since a slot is never idle while it has a sample, a sample takes as many passes as its tokens have loops in all, and
the schedule is a list schedule of those. Shapes: S samples, N tokens of all samples one after the other, P passes.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.integer[Any]]

_TOKENS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Queue:
    """Samples in the order in which they are served.

    Attributes:
        lengths: tokens to generate of each sample [S], at least 1.
        exits: loop at which each token leaves [N], in [0, num_loops).
        num_loops: loops of the model, B.
    """

    lengths: Ints
    exits: Ints
    num_loops: int

    @property
    def num_tokens(self) -> int:
        return len(self.exits)

    @property
    def mean_loops(self) -> float:
        return float(self.exits.mean()) + 1

    def without_exits(self, num_loops: int | None = None) -> "Queue":
        """Return the same samples, every token through all loops (of a model of `num_loops`, if given)."""
        loops = self.num_loops if num_loops is None else num_loops
        return Queue(self.lengths, np.full(self.num_tokens, loops - 1, dtype=np.int8), loops)

    @classmethod
    def draw(cls, lengths: Ints, num_loops: int, mean_loops: float, seed: int = 0) -> "Queue":
        """Draw exits at random: the loops beyond the first are binomial, with a mean of `mean_loops` in all."""
        share = (mean_loops - 1) / max(num_loops - 1, 1)
        exits = np.random.default_rng(seed).binomial(num_loops - 1, share, int(lengths.sum()))
        return cls(lengths, exits.astype(np.int8), num_loops)


def draw_lengths(samples: int, longest: int, scale: float | None, seed: int = 0) -> Ints:
    """Draw the tokens of each sample: exponential with this scale, in [1, longest]; without a scale all `longest`."""
    if scale is None:
        return np.full(samples, longest)
    lengths = np.random.default_rng(seed).exponential(scale, samples).round()
    return np.clip(lengths, 1, longest).astype(np.int64)


@dataclass(frozen=True)
class Passes:
    """Counts of each pass, int64 [P] each.

    Attributes:
        rows: rows of the block.
        starts: those of them whose token comes from the embedding.
        exits: those whose token leaves after the pass.
        skipped: loops that the leaving tokens skip; each still needs keys and values for later tokens.
        is_mixed: 1 where rows are at more than one loop.
    """

    rows: Ints
    starts: Ints
    exits: Ints
    skipped: Ints
    is_mixed: Ints


def first_passes(work: Ints, slots: int) -> Ints:
    """Return the pass [S] in which each sample starts if it takes the first free slot, for `work` [S] passes."""
    free = [0] * min(slots, len(work))
    starts = np.empty(len(work), dtype=np.int64)
    for sample, passes in enumerate(work.tolist()):
        starts[sample] = free[0]
        heapq.heapreplace(free, free[0] + passes)
    return starts


def depth_wise(queue: Queue, slots: int) -> Passes:
    """Simulate continuous depth-wise batching."""
    ends = np.cumsum(queue.lengths)
    loops_before = np.concatenate(([0], np.cumsum(queue.exits + np.int64(1))))
    work = loops_before[ends] - loops_before[ends - queue.lengths]
    starts = first_passes(work, slots)
    num_passes = int((starts + work).max())
    # [B, P]: rows at each loop, and of these the rows whose token leaves.
    at_loop, leaving = (np.zeros((queue.num_loops, num_passes), dtype=np.int64) for _ in range(2))
    for first, last in _spans(ends):
        tokens = slice(int(ends[first] - queue.lengths[first]), int(ends[last - 1]))
        shift = starts[first:last] - loops_before[ends[first:last] - queue.lengths[first:last]]
        begins = loops_before[:-1][tokens] + np.repeat(shift, queue.lengths[first:last])
        at_loop[0] += np.bincount(begins, minlength=num_passes)
        for loop in range(queue.num_loops - 1):
            leaving[loop] += np.bincount(begins[queue.exits[tokens] == loop] + loop, minlength=num_passes)
    for loop in range(1, queue.num_loops):  # the others are at the next loop in the next pass
        at_loop[loop, 1:] = (at_loop[loop - 1] - leaving[loop - 1])[:-1]
    leaving[-1] = at_loop[-1]
    skips = np.arange(queue.num_loops - 1, -1, -1)
    return Passes(
        rows=at_loop.sum(0),
        starts=at_loop[0],
        exits=leaving.sum(0),
        skipped=skips @ leaving,
        is_mixed=((at_loop > 0).sum(0) > 1).astype(np.int64),
    )


def sequence_wise(queue: Queue, slots: int) -> Passes:
    """Simulate continuous batching: no token leaves early, so that all rows of a pass are at the same loop."""
    starts = first_passes(queue.lengths, slots)
    ends = starts + queue.lengths
    busy = np.cumsum(np.bincount(starts, minlength=ends.max() + 1) - np.bincount(ends))[:-1]
    return _in_lock_step(busy, queue.num_loops)


def static(queue: Queue, slots: int) -> Passes:
    """Simulate groups of `slots` samples; a row whose sample has ended runs on, and counts for nothing."""
    borders = np.arange(0, len(queue.lengths), slots)
    sizes = np.diff(np.append(borders, len(queue.lengths)))
    longest = np.maximum.reduceat(queue.lengths, borders)
    return _in_lock_step(np.repeat(sizes, longest), queue.num_loops)


def _in_lock_step(rows: Ints, num_loops: int) -> Passes:
    """Make the passes of steps with `rows` rows each, which all go through all loops together."""
    loop = np.tile(np.arange(num_loops), len(rows))
    rows = np.repeat(rows, num_loops)
    none = np.zeros_like(rows)
    return Passes(rows, np.where(loop == 0, rows, 0), np.where(loop == num_loops - 1, rows, 0), none, none)


def _spans(ends: Ints) -> Iterator[tuple[int, int]]:
    """Yield ranges of samples of about `_TOKENS_AT_ONCE` tokens each, at least one sample."""
    first = 0
    while first < len(ends):
        done = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + _TOKENS_AT_ONCE, side="right")))
        yield first, last
        first = last


@dataclass(frozen=True)
class Curve:
    """Seconds of a pass by its number of rows: linear between measured points, constant below the first.

    No rows take no time; beyond the last point the time is unknown.
    """

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def total(self, rows: Ints) -> float:
        """Add up the seconds of passes with `rows` [P] rows each.

        Raises:
            ValueError: a pass has more rows than were measured.
        """
        counts = np.bincount(rows, minlength=1)
        counts[0] = 0
        if len(counts) > self.rows[-1] + 1:
            raise ValueError(f"a pass has {len(counts) - 1} rows; measured were up to {self.rows[-1]}")
        return float(counts @ np.interp(np.arange(len(counts)), self.rows, self.seconds))


@dataclass(frozen=True)
class Costs:
    """Times of the parts of a pass; None takes no time.

    Attributes:
        block: all layers of one loop, rows at the same loop.
        mixed: the same, rows at different loops (default: as `block`).
        embed: of the tokens that start.
        head: final norm and logits, of the tokens that leave (an oracle knows them; see `head_everywhere`).
        kv_only: keys and values of skipped loops, on top of the pass.
        prefill: seconds of one sample's prompt, all loops.
        head_everywhere: the head on every row, as an exit that looks at the logits needs it.
    """

    block: Curve
    mixed: Curve | None = None
    embed: Curve | None = None
    head: Curve | None = None
    kv_only: Curve | None = None
    prefill: float = 0.0
    head_everywhere: bool = False


@dataclass(frozen=True)
class Seconds:
    """Seconds of a queue by part of the passes."""

    block: float
    embed: float
    head: float
    kv_only: float
    prefill: float

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


def time_of(passes: Passes, costs: Costs, num_samples: int) -> Seconds:
    """Add up the time of all passes."""
    mixed = passes.is_mixed.astype(bool)
    in_mixed = (costs.mixed or costs.block).total(passes.rows[mixed])
    head_rows = passes.rows if costs.head_everywhere else passes.exits
    return Seconds(
        block=costs.block.total(passes.rows[~mixed]) + in_mixed,
        embed=0.0 if costs.embed is None else costs.embed.total(passes.starts),
        head=0.0 if costs.head is None else costs.head.total(head_rows),
        kv_only=0.0 if costs.kv_only is None else costs.kv_only.total(passes.skipped),
        prefill=costs.prefill * num_samples,
    )
