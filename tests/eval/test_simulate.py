"""eval/simulate.py against a simulator that goes step by step, and what must hold of any queue."""

from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.simulate import (
    Costs,
    Curve,
    Passes,
    Queue,
    depth_wise,
    draw_lengths,
    first_passes,
    sequence_wise,
    static,
    time_of,
)


@st.composite
def queues(draw):
    num_loops = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=12))
    exits = draw(st.lists(st.integers(0, num_loops - 1), min_size=sum(lengths), max_size=sum(lengths)))
    return Queue(np.array(lengths), np.array(exits), num_loops)


def step_by_step(queue, slots):
    """Every pass in turn: rows, tokens that start and leave, loops skipped, whether loops are mixed."""
    ends = np.cumsum(queue.lengths)
    waiting = [list(queue.exits[end - length : end]) for end, length in zip(ends, queue.lengths, strict=True)]
    busy: list[list] = []  # [exits of the tokens left, loop of the first of them]
    passes = []
    while waiting or busy:
        while waiting and len(busy) < slots:
            busy.append([waiting.pop(0), 0])
        loops = [loop for _, loop in busy]
        leaving = [tokens[0] for tokens, loop in busy if tokens[0] == loop]
        skipped = sum(queue.num_loops - 1 - loop for loop in leaving)
        passes.append((len(busy), loops.count(0), len(leaving), skipped, len(set(loops)) > 1))
        for slot in busy:
            if slot[0][0] == slot[1]:
                slot[:] = [slot[0][1:], 0]
            else:
                slot[1] += 1
        busy = [slot for slot in busy if slot[0]]
    return Passes(*np.array(passes).T)


def assert_same(found, expected):
    for field in fields(Passes):
        assert getattr(found, field.name).tolist() == getattr(expected, field.name).astype(int).tolist(), field.name


@settings(max_examples=200, deadline=None)
@given(queues(), st.integers(1, 6), st.integers(1, 7))
def test_every_pass_is_that_of_the_step_by_step_simulation(queue, slots, at_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eval.simulate._TOKENS_AT_ONCE", at_once)
        assert_same(depth_wise(queue, slots), step_by_step(queue, slots))
    assert_same(sequence_wise(queue, slots), step_by_step(queue.without_exits(), slots))


@settings(max_examples=100, deadline=None)
@given(queues(), st.integers(1, 6))
def test_tokens_are_conserved(queue, slots):
    for passes in (depth_wise(queue, slots), sequence_wise(queue, slots)):
        assert passes.starts.sum() == passes.exits.sum() == queue.num_tokens
        assert passes.rows.max() <= slots and (passes.rows > 0).all()
    assert depth_wise(queue, slots).rows.sum() == (queue.exits + 1).sum()
    assert sequence_wise(queue, slots).rows.sum() == queue.num_tokens * queue.num_loops
    assert depth_wise(queue, slots).skipped.sum() == (queue.num_loops - 1 - queue.exits).sum()


@settings(max_examples=100, deadline=None)
@given(queues(), st.integers(1, 6))
def test_depth_wise_at_full_depth_is_sequence_wise_in_lock_step(queue, slots):
    full = queue.without_exits()
    assert_same(depth_wise(full, slots), sequence_wise(queue, slots))
    assert not sequence_wise(queue, slots).is_mixed.any()
    # and as many steps of a model that does everything in one pass, each of num_loops passes
    whole = depth_wise(queue.without_exits(1), slots)
    assert sequence_wise(queue, slots).rows.tolist() == np.repeat(whole.rows, queue.num_loops).tolist()


@settings(max_examples=100, deadline=None)
@given(queues(), st.integers(1, 6), st.data())
def test_less_depth_never_takes_more_rows_and_one_slot_never_more_passes(queue, slots, data):
    token = data.draw(st.integers(0, queue.num_tokens - 1))
    exits = queue.exits.copy()
    exits[token] = data.draw(st.integers(0, int(exits[token])))
    earlier = Queue(queue.lengths, exits, queue.num_loops)
    assert depth_wise(earlier, slots).rows.sum() <= depth_wise(queue, slots).rows.sum()
    assert len(depth_wise(earlier, 1).rows) <= len(depth_wise(queue, 1).rows)
    # List schedules obey Graham's bound: never more than twice the least there could be.
    work = np.add.reduceat(queue.exits + 1, np.cumsum(queue.lengths) - queue.lengths)
    least = max(work.max(), -(-work.sum() // slots))
    assert least <= len(depth_wise(queue, slots).rows) <= work.sum() / slots + work.max()


def test_static_batching_waits_for_the_longest_of_each_group():
    queue = Queue(np.array([1, 3, 2, 2, 5]), np.zeros(13, dtype=int), 2)
    passes = static(queue, 2)
    assert passes.rows.tolist() == [2] * 6 + [2] * 4 + [1] * 10
    assert passes.starts.tolist() == [2, 0] * 5 + [1, 0] * 5
    assert passes.exits.tolist() == [0, 2] * 5 + [0, 1] * 5
    assert len(sequence_wise(queue, 2).rows) < len(passes.rows)


def test_a_sample_takes_the_slot_that_is_free_first():
    assert first_passes(np.array([5, 2, 1, 4, 1]), 2).tolist() == [0, 0, 2, 3, 5]
    assert first_passes(np.array([5, 2]), 10).tolist() == [0, 0]


def test_time_is_the_sum_of_the_parts():
    queue = Queue(np.array([2, 2]), np.array([0, 1, 1, 1]), 2)
    passes = depth_wise(queue, 2)  # rows 2 2 2 1; of these the second and third at both loops
    assert passes.rows.tolist() == [2, 2, 2, 1] and passes.is_mixed.tolist() == [0, 1, 1, 0]
    block = Curve((1, 2), (1.0, 1.5))
    costs = Costs(block)
    assert time_of(passes, costs, 2).total == pytest.approx(1.5 * 3 + 1)
    costs = replace(costs, mixed=Curve((2,), (2.0,)), embed=Curve((2,), (0.1,)), head=Curve((1, 2), (0.5, 0.6)))
    costs = replace(costs, kv_only=Curve((1,), (0.01,)), prefill=10.0)
    seconds = time_of(passes, costs, 2)
    assert seconds.block == pytest.approx(1.5 + 2 + 2 + 1)
    assert (seconds.kv_only, seconds.prefill) == (pytest.approx(0.01), 20.0)
    assert passes.exits.tolist() == [1, 1, 1, 1] and seconds.head == pytest.approx(4 * 0.5)
    everywhere = time_of(passes, replace(costs, head_everywhere=True), 2)
    assert everywhere.head == pytest.approx(3 * 0.6 + 0.5)
    with pytest.raises(ValueError, match="a pass has 2 rows; measured were up to 1"):
        time_of(passes, Costs(Curve((1,), (1.0,))), 2)


def test_drawn_exits_have_the_mean_that_was_asked_for():
    for num_loops, mean in ((2, 1.19), (3, 2.5), (3, 1.0), (4, 4.0)):
        queue = Queue.draw(np.full(100, 1000), num_loops, mean)
        assert queue.mean_loops == pytest.approx(mean, abs=0.01)
        assert 0 <= queue.exits.min() <= queue.exits.max() < num_loops


def test_drawn_lengths_are_exponential_within_their_limits():
    assert draw_lengths(3, 7, None).tolist() == [7, 7, 7]
    lengths = draw_lengths(20_000, 100, 20.0)
    assert lengths.min() == 1 and lengths.max() == 100
    assert lengths.mean() == pytest.approx(20 * (1 - np.exp(-5)), rel=0.03)
