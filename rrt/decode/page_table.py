"""Page accounting of the key/value cache, without tensors: the pages that hold each sequence's positions.

A sequence here is a virtual one: one loop of one request. Pages are counted by reference, so that sequences share
them; a shared page that is partly filled is copied before it is appended to. Full pages are never written again,
hence never copied.
"""

from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rrt.native import load_plan, warn_without_plan

_MAX = 2**31 - 1
_native = load_plan().module


class _OutOfPages(RuntimeError):
    """Fewer pages are free than an append needs. Raised before anything has changed."""


OutOfPages: type[RuntimeError] = _OutOfPages if _native is None else _native.OutOfPages


def make_page_table(num_pages: int, page_size: int) -> "PageTable":
    """Make a native page table (csrc/kv_cache/page_table.h), or, where it is not built, a Python one with a warning.

    Raises:
        ValueError: a number below 1 or above 2**31 - 1.
    """
    warn_without_plan()
    table: PageTable = (PageTable if _native is None else _native.PageTable)(num_pages, page_size)
    return table


def _invalid(name: str, found: int, expected: str) -> NoReturn:
    raise ValueError(f"{name}: found {found}; expected {expected}")


@dataclass
class _Sequence:
    length: int = 0
    pages: list[int] = field(default_factory=list)


class PageTable:
    """Pages of `page_size` positions, handed out to sequences. Not thread-safe.

    The readable form of csrc/kv_cache/page_table.h: same methods, same page numbers, same errors. Every method
    raises ValueError for an argument out of its range and for a handle that was freed.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        for name, value in (("num_pages", num_pages), ("page_size", page_size)):
            if not 1 <= value <= _MAX:
                _invalid(name, value, f"1 to {_MAX}")
        self.num_pages = num_pages
        self.page_size = page_size
        self._refcounts = [0] * num_pages
        # A stack: the page freed last, its memory still warm, is taken first.
        self._free = list(range(num_pages - 1, -1, -1))
        self._sequences: dict[int, _Sequence] = {}
        self._next_handle = 1

    @property
    def num_free_pages(self) -> int:
        return len(self._free)

    @property
    def num_used_pages(self) -> int:
        return self.num_pages - len(self._free)

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    def create(self) -> int:
        """Start an empty sequence; returns its handle. Handles are never reused: a freed one stays an error."""
        handle = self._next_handle
        self._next_handle += 1
        self._sequences[handle] = _Sequence()
        return handle

    def length(self, handle: int) -> int:
        return self._at(handle).length

    def pages(self, handle: int) -> list[int]:
        return list(self._at(handle).pages)

    def refcount(self, page: int) -> int:
        """Count the sequences that hold the page; 0 for a free one."""
        if not 0 <= page < self.num_pages:
            _invalid("page", page, f"a page in [0, {self.num_pages})")
        return self._refcounts[page]

    def pages_needed(self, handle: int, count: int) -> int:
        """Count the free pages that `append(handle, count)` would take, that of a copy included."""
        sequence = self._at(handle)
        if not 0 <= count <= _MAX - sequence.length:
            _invalid("count", count, f"0 to {_MAX - sequence.length}")
        new_pages = self._pages_of(sequence.length + count) - len(sequence.pages)
        return new_pages + self._needs_copy(sequence, count)

    def append(self, handle: int, count: int) -> list[tuple[int, int]]:
        """Make room for `count` more positions.

        Returns:
            Copies (source page, target page) that the caller makes before it writes to the new positions. It
            writes before it forks.

        Raises:
            OutOfPages: too few pages are free; nothing has changed.
        """
        return self.append_many([handle], [count])

    def append_many(self, handles: ArrayLike, counts: ArrayLike) -> list[tuple[int, int]]:
        """Append to many sequences, int64 [M] and int32 [M]: to all, or to none. A handle may come repeatedly."""
        rows, numbers = _rows(handles, counts, "counts")
        copies: list[tuple[int, int]] = []
        undo: list[tuple[_Sequence, int, int | None]] = []
        try:
            for handle, count in zip(rows, numbers, strict=True):
                sequence = self._at(handle)
                length = sequence.length
                copied_from = self._append_one(handle, count)
                undo.append((sequence, length, copied_from))
                if copied_from is not None:
                    copies.append((copied_from, sequence.pages[length // self.page_size]))
        except (OutOfPages, ValueError):
            # In reverse, so that the free pages come back in their order.
            for sequence, length, copied_from in reversed(undo):
                self._cut(sequence, length)
                if copied_from is not None:
                    self._release(sequence.pages[-1])
                    sequence.pages[-1] = copied_from
                    self._refcounts[copied_from] += 1
            raise
        return copies

    def fork(self, handle: int) -> int:
        """Start a sequence of the same length that shares all pages."""
        source = self._at(handle)
        forked = self.create()
        self._share(self._at(forked), source)
        return forked

    def alias(self, handle: int, of: int) -> None:
        """Let `handle` share the pages of `of` in place of its own; later appends to either stay its own."""
        sequence, source = self._at(handle), self._at(of)
        if sequence is not source:
            self._cut(sequence, 0)
            self._share(sequence, source)

    def truncate(self, handle: int, length: int) -> None:
        """Drop the positions from `length` on."""
        sequence = self._at(handle)
        if not 0 <= length <= sequence.length:
            _invalid("length", length, f"0 to {sequence.length}")
        self._cut(sequence, length)

    def free(self, handle: int) -> None:
        self._cut(self._at(handle), 0)
        del self._sequences[handle]

    def slots(self, handles: ArrayLike, positions: ArrayLike) -> NDArray[np.int64]:
        """Look up the slots to write, `page * page_size + offset` int64 [M].

        `handles` int64 [M] and `positions` int32 [M] name a position of a sequence each.
        Positions in shared pages are refused: a write would show in the other sequences. Truncate and append instead.
        """
        rows, places = _rows(handles, positions, "positions")
        slots = np.empty(len(rows), dtype=np.int64)
        for i, (handle, position) in enumerate(zip(rows, places, strict=True)):
            sequence = self._at(handle)
            if not 0 <= position < sequence.length:
                _invalid(f"positions[{i}]", position, f"a position in [0, {sequence.length}), what the sequence holds")
            column, offset = divmod(position, self.page_size)
            page = sequence.pages[column]
            if self._refcounts[page] > 1:
                _invalid(f"positions[{i}]", position, "one in a page that no other sequence shares")
            slots[i] = page * self.page_size + offset
        return slots

    def block_tables(self, handles: ArrayLike) -> NDArray[np.int32]:
        """Return the pages of each sequence, int32 [M, most pages of one], padded with zeros; handles int64 [M]."""
        tables = [self._at(handle).pages for handle in _integers("handles", handles)]
        padded = np.zeros((len(tables), max(map(len, tables), default=0)), dtype=np.int32)
        for row, pages in zip(padded, tables, strict=True):
            row[: len(pages)] = pages
        return padded

    def check(self) -> None:
        """Verify every invariant. Raises RuntimeError that names the broken one. For tests."""
        holders = [0] * self.num_pages
        for sequence in self._sequences.values():
            if len(sequence.pages) != self._pages_of(sequence.length):
                raise RuntimeError("a sequence has another number of pages than its length needs")
            for page in sequence.pages:
                holders[page] += 1
        if holders != self._refcounts:
            raise RuntimeError("a reference count is not the number of holders")
        for page in self._free:
            if holders[page]:
                raise RuntimeError("a free page is in use, or free twice")
            holders[page] = 1
        if 0 in holders:
            raise RuntimeError("a page is neither free nor used")

    def _at(self, handle: int) -> _Sequence:
        sequence = self._sequences.get(handle)
        if sequence is None:
            _invalid("handle", handle, "a sequence that was created and not freed")
        return sequence

    def _pages_of(self, length: int) -> int:
        return -(-length // self.page_size)

    def _needs_copy(self, sequence: _Sequence, count: int) -> bool:
        return count > 0 and sequence.length % self.page_size > 0 and self._refcounts[sequence.pages[-1]] > 1

    def _append_one(self, handle: int, count: int) -> int | None:
        """Append to one sequence; returns the page to copy into its last one, if any."""
        sequence = self._at(handle)
        needed = self.pages_needed(handle, count)
        if needed > len(self._free):
            raise OutOfPages(f"found {len(self._free)} free pages of {self.num_pages}; expected {needed} or more")
        copied_from = None
        if self._needs_copy(sequence, count):
            copied_from = sequence.pages[-1]
            self._refcounts[copied_from] -= 1
            sequence.pages[-1] = self._take()
        sequence.length += count
        while len(sequence.pages) < self._pages_of(sequence.length):
            sequence.pages.append(self._take())
        return copied_from

    def _take(self) -> int:
        page = self._free.pop()
        self._refcounts[page] = 1
        return page

    def _release(self, page: int) -> None:
        self._refcounts[page] -= 1
        if self._refcounts[page] == 0:
            self._free.append(page)

    def _cut(self, sequence: _Sequence, length: int) -> None:
        while len(sequence.pages) > self._pages_of(length):
            self._release(sequence.pages.pop())
        sequence.length = length

    def _share(self, sequence: _Sequence, source: _Sequence) -> None:
        sequence.pages = list(source.pages)
        sequence.length = source.length
        for page in sequence.pages:
            self._refcounts[page] += 1


def _integers(name: str, values: ArrayLike) -> list[int]:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name}: found {array.dtype} {list(array.shape)}; expected integers [M]")
    integers: list[int] = array.tolist()
    return integers


def _rows(handles: ArrayLike, values: ArrayLike, name: str) -> tuple[list[int], list[int]]:
    rows, numbers = _integers("handles", handles), _integers(name, values)
    if len(rows) != len(numbers):
        raise ValueError(f"{name}: found {len(numbers)} entries; expected {len(rows)} as in handles")
    return rows, numbers
