"""rrt._plan: how the C++ page table takes arguments from Python. test_page_table.py holds its behaviour."""

import numpy as np
import pytest

from rrt.native import load_plan

plan = load_plan().module
pytestmark = pytest.mark.skipif(plan is None, reason=f"no rrt._plan: {load_plan().reason}")


@pytest.fixture
def table():
    """Two sequences of three positions each, in pages of two."""
    table = plan.PageTable(4, 2)
    table.append_many([table.create(), table.create()], [3, 3])
    return table


def test_lists_and_strided_arrays_are_taken_as_they_read(table):
    first = table.slots([2**32, 2**32 + 1, 2**32], [0, 1, 2])
    assert first.dtype == np.int64 and first.shape == (3,)
    strided = np.array([[2**32, 9], [2**32 + 1, 9], [2**32, 9]])[:, 0]
    for handles in (strided, strided.astype(np.uint64), strided.tolist()):
        for positions in ([0, 1, 2], np.arange(3, dtype=np.int32), np.arange(3, dtype=np.uint8), np.arange(3)):
            assert table.slots(handles, positions).tolist() == first.tolist()


def test_empty_batches_have_empty_results(table):
    assert table.append_many([], []) == []
    assert table.slots([], []).shape == (0,)
    assert table.block_tables([]).shape == (0, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda table: table.slots([[1]], [0]), r"handles: found int64 \[1, 1\]; expected integers \[M\]"),
        (lambda table: table.slots(np.zeros((2, 2), np.int64), [0]), r"handles: found int64 \[2, 2\]; expected"),
        (lambda table: table.slots([1], ["a"]), r"positions: found <U1 \[1\]; expected integers \[M\]"),
        (lambda table: table.slots([1], [0.5]), r"positions: found float64 \[1\]; expected integers \[M\]"),
        (lambda table: table.slots([1, 1], [0, 2**31]), r"positions\[1\]: found 2147483648; expected an int32"),
        (lambda table: table.slots([1, 1], [0]), "positions: found 1 entries; expected 2 as in handles"),
        (lambda table: table.append_many([1], [1, 2]), "counts: found 2 entries; expected 1 as in handles"),
    ],
)
def test_bad_arguments_are_named(table, call, message):
    with pytest.raises(ValueError, match=message):
        call(table)
