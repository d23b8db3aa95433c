"""rrt._plan: host planning of the C++ headers as Python sees it, against its definition in numpy."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rrt.native import load_plan

plan = load_plan().module
pytestmark = pytest.mark.skipif(plan is None, reason=f"no rrt._plan: {load_plan().reason}")

LOOPS = st.integers(1, 8).flatmap(
    lambda num_loops: st.tuples(st.lists(st.integers(0, num_loops - 1), max_size=70), st.just(num_loops))
)


@given(LOOPS)
def test_rows_are_grouped_by_loop_as_a_stable_sort_groups_them(case):
    loops, num_loops = np.array(case[0], dtype=np.int32), case[1]
    order, offsets = plan.group_rows_by_loop(loops, num_loops)
    assert order.dtype == offsets.dtype == np.int64
    assert order.tolist() == np.argsort(loops, kind="stable").tolist()
    assert offsets.tolist() == [0, *np.cumsum(np.bincount(loops, minlength=num_loops))]


@given(LOOPS, st.integers(1, 13), st.integers(1, 40))
def test_blocks_tiles_and_pieces_cover_the_rows_in_order(case, tile_rows, block_rows):
    loops, num_loops = np.array(case[0], dtype=np.int32), case[1]
    order, offsets = plan.group_rows_by_loop(loops, num_loops)
    blocks = plan.plan_rows(offsets, tile_rows, block_rows)
    assert [block.begin for block in blocks] == list(range(0, len(loops), block_rows))
    assert sum(block.rows for block in blocks) == len(loops)
    for block in blocks:
        assert 0 < block.rows <= block_rows
        tiles, pieces = block.tiles, block.pieces
        for parts in (tiles, pieces):
            covered = [row for part in parts for row in range(part["begin"], part["begin"] + part["rows"])]
            assert covered == list(range(block.rows))
        assert tiles["rows"].max() - tiles["rows"].min() <= 1
        assert len(tiles) == -(-block.rows // tile_rows)
        tile_of_row = np.repeat(np.arange(len(tiles)), tiles["rows"])
        for piece in pieces:
            rows = slice(piece["begin"], piece["begin"] + piece["rows"])
            assert set(loops[order[block.begin :][rows]]) == {piece["loop"]}
            assert len(set(tile_of_row[rows])) == 1
        runs = np.split(pieces["loop"], block.present[1:-1])
        assert (block.present[0], block.present[-1]) == (0, len(pieces))
        assert [set(run) for run in runs] == [{loop} for loop in sorted(set(pieces["loop"]))]


@st.composite
def batches(draw):
    """(query_start or None, context_lens, group)."""
    decode = draw(st.booleans())
    queries = [1 if decode else draw(st.integers(0, 150)) for _ in range(draw(st.integers(0, 4)))]
    contexts = [draw(st.integers(0 if decode else count, 800)) for count in queries]
    starts = None if decode else np.cumsum([0, *queries], dtype=np.int32)
    return starts, np.array(contexts, dtype=np.int32), draw(st.integers(1, 80))


@given(batches())
def test_each_query_attends_to_each_of_its_slots_once(batch):
    starts, contexts, group = batch
    attention = plan.plan_attention(contexts, group, starts)
    num_queries = len(contexts) if starts is None else int(starts[-1])
    seen = np.zeros((num_queries, 1000), dtype=np.int64)
    for task in attention.tasks:
        assert task["num_queries"] == 1 or task["num_queries"] * group <= plan.TILE_ROWS
        for i in range(task["num_queries"]):
            end = min(task["split_end"] * plan.SPLIT_SLOTS, task["visible"] + i)
            seen[task["first_query"] + i, task["split_begin"] * plan.SPLIT_SLOTS : end] += 1
    expected = np.zeros_like(seen)
    for s, context in enumerate(contexts.tolist()):
        begin, end = (s, s + 1) if starts is None else starts[s : s + 2].tolist()
        for query in range(begin, end):
            expected[query, : context - (end - 1 - query)] = 1
    assert (seen == expected).all()
    assert attention.padding.tolist() == (np.flatnonzero(contexts == 0).tolist() if starts is None else [])
    assert attention.max_queries == max(attention.tasks["num_queries"], default=0)


@given(batches())
def test_partial_results_are_merged_once_each(batch):
    starts, contexts, group = batch
    attention = plan.plan_attention(contexts, group, starts)
    partial = attention.tasks[attention.tasks["partial"] >= 0]
    written = [row for task in partial for row in range(task["partial"], task["partial"] + task["num_queries"])]
    read = [
        row
        for merge in attention.merges
        for row in range(merge["partial"], merge["partial"] + merge["num_queries"] * merge["num_splits"])
    ]
    assert written == read == list(range(attention.num_partial))


def test_arrays_of_plans_outlive_the_plans_and_are_read_only():
    tasks = plan.plan_attention([300, 0, 7], 8).tasks
    pieces = plan.plan_rows([0, 3, 5], 4, 64)[0].pieces
    assert tasks["sequence"].tolist() == [0, 0, 2]
    assert pieces["loop"].tolist() == [0, 0, 1]
    for array in (tasks, pieces):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = array[1]


def test_lists_and_strided_arrays_are_taken_as_they_read():
    strided = np.array([[1, 9], [0, 9], [1, 9]], dtype=np.int32)[:, 0]
    for loops in ([1, 0, 1], strided, np.array([1, 0, 1], dtype=np.uint8), strided.astype(np.int64)):
        assert plan.group_rows_by_loop(loops, 2)[0].tolist() == [1, 0, 2]


def test_empty_batches_have_empty_plans():
    order, offsets = plan.group_rows_by_loop([], 3)
    assert (order.tolist(), offsets.tolist()) == ([], [0, 0, 0, 0])
    assert plan.plan_rows(offsets, 4, 64) == []
    attention = plan.plan_attention([], 8, [0])
    assert (len(attention.tasks), attention.num_partial, attention.num_scores) == (0, 0, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan.group_rows_by_loop([0, 3], 3), r"loops\[1\]: found 3; expected a loop in \[0, 3\)"),
        (lambda: plan.group_rows_by_loop([-1], 3), r"loops\[0\]: found -1; expected a loop in \[0, 3\)"),
        (lambda: plan.group_rows_by_loop([], -1), "num_loops: found -1; expected at least 0"),
        (lambda: plan.group_rows_by_loop([0, 2**31], 3), r"loops\[1\]: found 2147483648; expected an int32"),
        (lambda: plan.group_rows_by_loop([0.5], 3), r"loops: found float64 \[1\]; expected integers \[M\]"),
        (lambda: plan.group_rows_by_loop([[0]], 3), r"loops: found int64 \[1, 1\]; expected integers \[M\]"),
        (lambda: plan.group_rows_by_loop(np.zeros((2, 2), np.int32), 3), r"loops: found int32 \[2, 2\]; expected"),
        (lambda: plan.plan_rows([0, 2], 0, 1), "tile_rows: found 0; expected at least 1"),
        (lambda: plan.plan_rows([0, 2], 1, 0), "block_rows: found 0; expected at least 1"),
        (lambda: plan.plan_rows([], 1, 1), "offsets: found no entries; expected num_loops"),
        (lambda: plan.plan_rows([1, 2], 1, 1), r"offsets\[0\]: found 1; expected 0"),
        (lambda: plan.plan_rows([0, 2, 1], 1, 1), r"offsets\[2\]: found 1; expected at least 2"),
        (lambda: plan.plan_attention([1], 0), "group: found 0; expected at least 1"),
        (lambda: plan.plan_attention([1, -2], 1), r"context_lens\[1\]: found -2; expected at least 0"),
        (lambda: plan.plan_attention([1], 1, [0]), "query_start: found 1 entries; expected 2, one more than context"),
        (lambda: plan.plan_attention([1], 1, [1, 1]), r"query_start\[0\]: found 1; expected 0"),
        (lambda: plan.plan_attention([3, 3], 1, [0, 2, 1]), r"query_start\[2\]: found 1; expected at least 2"),
        (lambda: plan.plan_attention([3, 1], 1, [0, 1, 3]), r"context_lens\[1\]: found 1; expected at least 2, the"),
        (lambda: plan.PageTable(4, 2).slots([[1]], [0]), r"handles: found int64 \[1, 1\]; expected integers \[M\]"),
        (lambda: plan.PageTable(4, 2).slots([1], ["a"]), r"positions: found <U1 \[1\]; expected integers \[M\]"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
