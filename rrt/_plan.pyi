"""Host planning from the C++ headers csrc/*/plan.h and csrc/kv_cache/page_table.h (csrc/python/plan.cpp).

Not everywhere built: rrt.native.load_plan imports it. Arrays of the dtype named here are read in place, other
integers (lists, say) are copied. Every function raises ValueError for an argument out of its range.
"""

from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

source_digest: Final[str]
"""Of the sources the module was built from."""

# loop_lora

class RowBlock:
    """Rows `[begin, begin + rows)` of the order of `group_rows_by_loop`. Arrays are read-only."""

    @property
    def begin(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def tiles(self) -> NDArray[np.void]:
        """Tiles of nearly equal size, of any loops: records (begin, rows), counted from the block's begin."""

    @property
    def pieces(self) -> NDArray[np.void]:
        """The parts of tiles that are of one loop, sorted by it: records (begin, rows, loop)."""

    @property
    def present(self) -> NDArray[np.int64]:
        """[loops present + 1]: `pieces[present[i] : present[i + 1]]` are of one loop."""

def group_rows_by_loop(loops: ArrayLike, num_loops: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows sorted by loop, stably: loop l has `order[offsets[l] : offsets[l + 1]]`.

    Args:
        loops: int32 [M], in [0, num_loops).
        num_loops: at least 0.

    Returns:
        order [M] and offsets [num_loops + 1].
    """

def plan_rows(offsets: ArrayLike, tile_rows: int, block_rows: int) -> list[RowBlock]:
    """Blocks of at most `block_rows` rows, in tiles of at most `tile_rows`, of rows grouped by `offsets` int64."""

# kv_cache

SPLIT_SLOTS: Final[int]
"""A context is cut every so many slots."""
TILE_ROWS: Final[int]
"""Rows (queries x query heads of one key/value head) that share one reading of keys and values."""
MAX_SPLIT_QUERIES: Final[int]
"""Tiles of so few queries take the pieces of their context in tasks of their own."""

class AttentionPlan:
    """Arrays are read-only."""

    @property
    def tasks(self) -> NDArray[np.void]:
        """Records (sequence, first_query, num_queries, visible, split_begin, split_end, partial).

        `visible`: slots that the first query sees; each next one sees one more. `partial`: where the task's
        results lie among the partial ones, counted in queries; -1: they are final.
        """

    @property
    def should_merge(self) -> NDArray[np.void]:
        """Records (first_query, num_queries, num_splits, partial)."""

    @property
    def padding(self) -> NDArray[np.int64]:
        """Queries without a context."""

    @property
    def num_partial(self) -> int:
        """Queries of all partial results."""

    @property
    def max_queries(self) -> int:
        """Of one task."""

    @property
    def num_scores(self) -> int:
        """Query-slot pairs, about."""

def plan_attention(context_lens: ArrayLike, group: int, query_start: ArrayLike | None = None) -> AttentionPlan:
    """Which task of `loop_kv_attention` (query_start None) or `loop_kv_prefill` attends to which slots.

    Args:
        context_lens: int32 [S], at least 0 and the sequence's number of queries.
        group: query heads per key/value head.
        query_start: int32 [S + 1], from 0 and never falling; None: one query per sequence with a context.
    """

class OutOfPages(RuntimeError):
    """Fewer pages are free than an append needs. Raised before anything has changed."""

class PageTable:
    """As rrt.decode.page_table.PageTable, which documents it."""

    def __init__(self, num_pages: int, page_size: int) -> None: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def page_size(self) -> int: ...
    @property
    def num_free_pages(self) -> int: ...
    @property
    def num_used_pages(self) -> int: ...
    @property
    def num_sequences(self) -> int: ...
    def create(self) -> int: ...
    def length(self, handle: int) -> int: ...
    def pages(self, handle: int) -> list[int]: ...
    def refcount(self, page: int) -> int: ...
    def pages_needed(self, handle: int, count: int) -> int: ...
    def append(self, handle: int, count: int) -> list[tuple[int, int]]: ...
    def append_many(self, handles: ArrayLike, counts: ArrayLike) -> list[tuple[int, int]]: ...
    def fork(self, handle: int) -> int: ...
    def alias(self, handle: int, of: int) -> None: ...
    def truncate(self, handle: int, length: int) -> None: ...
    def free(self, handle: int) -> None: ...
    def slots(self, handles: ArrayLike, positions: ArrayLike) -> NDArray[np.int64]: ...
    def block_tables(self, handles: ArrayLike) -> NDArray[np.int32]: ...
    def check(self) -> None: ...
