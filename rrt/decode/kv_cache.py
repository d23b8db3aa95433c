"""The key/value cache: pages of many sequences, each loop of a sequence with pages of its own."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from rrt.decode.page_table import make_page_table
from rrt.decode.passes import Chunk, DecodePlan, PassPlan, PassRows, PrefillPlan, send
from rrt.errors import UserError
from rrt.model.config import ModelConfig, RecursiveConfig


def page_bytes(config: ModelConfig, recursion: RecursiveConfig, page_size: int, dtype: torch.dtype) -> int:
    """Count the bytes of one page: keys and values of `page_size` positions of all K shared layers, at one loop."""
    heads = recursion.layers_per_loop(config) * page_size * config.num_kv_heads
    return 2 * heads * config.head_dim * dtype.itemsize


class PagedCache:
    """A paged key/value cache: every depth keeps its own entries, and sequences share common beginnings.

    A page belongs to one loop of one sequence and holds `page_size` positions of all K layers of the block: page p of
    the i-th layer that the loop runs is ``k[i, p]``, of k and v [K, num_pages, page_size, H_kv, D_h]. The loops of a
    sequence grow on their own: a token that leaves after the first loop appends nothing to the second.

    Keys and values of prefix vectors (`RecursiveConfig.prefix_length`) are held once: every sequence begins as a
    fork of them. They take the slots before position 0, and none of the lengths here count them.

    Every method raises ValueError for an unknown sequence, and for a loop, length or position out of range.
    Sequences are small integers, reused after `free`.
    """

    def __init__(
        self,
        config: ModelConfig,
        recursion: RecursiveConfig,
        num_pages: int,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        """Allocate all pages. Raises `UserError` if a size is not positive, or the prefix does not fit."""
        prefix_pages = recursion.num_loops * -(-recursion.prefix_length // max(page_size, 1))
        for name, value, least in (("page_size", page_size, 1), ("num_pages", num_pages, max(prefix_pages, 1))):
            if value < least:
                raise UserError(f"cache: {name}: found {value}; expected at least {least}")
        self.config = config
        self.recursion = recursion
        self.num_loops = recursion.num_loops
        self.prefix_length = recursion.prefix_length
        self.bytes_per_page = page_bytes(config, recursion, page_size, dtype)
        layers = recursion.layers_per_loop(config)
        shape = (layers, num_pages, page_size, config.num_kv_heads, config.head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self._table = make_page_table(num_pages, page_size)
        self._prefix = [self._table.create() for _ in range(self.num_loops)]
        for handle in self._prefix:
            self._table.append(handle, self.prefix_length)
        # [sequences, B]: the page table's handles; 0, which is none, where there is no sequence.
        self._handles = np.zeros((0, self.num_loops), dtype=np.int64)
        self._free_sequences: list[int] = []

    @classmethod
    def from_budget(
        cls,
        config: ModelConfig,
        recursion: RecursiveConfig,
        num_bytes: int,
        page_size: int = 16,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Self:
        """Make a cache of as many pages as fit into `num_bytes` bytes. Raises `UserError` if none does."""
        each = page_bytes(config, recursion, max(page_size, 1), dtype)
        if num_bytes < each:
            raise UserError(f"cache: found a budget of {num_bytes} bytes; expected at least {each}, one page")
        return cls(config, recursion, num_bytes // each, page_size, dtype, device)

    @property
    def num_pages(self) -> int:
        return self._table.num_pages

    @property
    def page_size(self) -> int:
        return self._table.page_size

    @property
    def num_free_pages(self) -> int:
        return self._table.num_free_pages

    @property
    def num_used_pages(self) -> int:
        """Pages held by sequences and by the prefix."""
        return self._table.num_used_pages

    @property
    def num_sequences(self) -> int:
        return len(self._handles) - len(self._free_sequences)

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values, those of free pages too."""
        return self.num_pages * self.bytes_per_page

    @property
    def num_used_bytes(self) -> int:
        return self.num_used_pages * self.bytes_per_page

    def pages_for(self, length: int) -> int:
        """Count the pages that a new sequence takes to reach `length` positions at every loop."""
        if length == 0:
            return 0
        shared = self.prefix_length // self.page_size
        return self.num_loops * (-(-(self.prefix_length + length) // self.page_size) - shared)

    def num_pages_of(self, sequences: Sequence[int]) -> int:
        """Count the pages that these sequences and the prefix hold, each of them once."""
        handles = {*self._prefix, *(self._handle(each, loop) for each in sequences for loop in range(self.num_loops))}
        return len(set().union(*(self._table.pages(handle) for handle in handles)))

    def allocate(self) -> int:
        """Start a sequence of length 0 at every loop. It takes no page before its first append."""
        return self._add([self._table.fork(handle) for handle in self._prefix])

    def length(self, sequence: int, loop: int) -> int:
        """Return the number of positions that the sequence holds at `loop`."""
        return self._table.length(self._handle(sequence, loop)) - self.prefix_length

    def append(self, sequence: int, count: int, loop: int | None = None) -> None:
        """Make room for `count` more positions at `loop`, or at every loop. Raises as `append_rows` does."""
        loops = range(self.num_loops) if loop is None else [loop]
        self.append_rows([sequence] * len(loops), loops, [count] * len(loops))

    def append_rows(self, sequences: ArrayLike, loops: ArrayLike, counts: ArrayLike) -> None:
        """Make room for counts[i] more positions of sequences[i] at loops[i], all [M].

        A page that is shared and partly filled is copied first, so write a pass's keys and values before a fork.

        Raises:
            OutOfPages: too few pages are free; nothing has changed.
        """
        copies = self._table.append_many(
            self._handles_of(sequences, loops), _integers("counts", counts).astype(np.int32)
        )
        if copies:
            sources, targets = torch.tensor(copies, device=self.k.device).unbind(1)
            for pages in (self.k, self.v):
                pages[:, targets] = pages[:, sources]

    def fork(self, sequence: int) -> int:
        """Start a sequence that shares all pages of `sequence`; later appends to either do not show in the other."""
        return self._add([self._table.fork(self._handle(sequence, loop)) for loop in range(self.num_loops)])

    def alias(self, sequence: int, loop: int, of_loop: int) -> None:
        """Let `loop` share the pages of `of_loop` in place of its own, as if both had the same keys and values.

        Raises:
            UserError: the cache holds prefix vectors, which lie in the pages and differ from loop to loop.
        """
        handle, source = self._handle(sequence, loop), self._handle(sequence, of_loop)
        if self.prefix_length:
            raise UserError(f"cache: alias: found prefix_length {self.prefix_length}; expected 0")
        self._table.alias(handle, source)

    def copy_rows(self, sequences: ArrayLike, positions: ArrayLike, from_loops: ArrayLike, to_loops: ArrayLike) -> None:
        """Give positions[i] of sequences[i] the keys and values at to_loops[i] that it has at from_loops[i]; all [M].

        Raises:
            ValueError: a position that a sequence has not, or in a page that is shared.
        """
        places = _integers("positions", positions).astype(np.int32)
        sources = self._tensor(self._slots(self._handles_of(sequences, from_loops), places))
        targets = self._tensor(self._slots(self._handles_of(sequences, to_loops), places))
        for pages in (self.k, self.v):
            entries = pages.flatten(1, 2)
            entries[:, targets] = entries[:, sources]

    def truncate(self, sequence: int, length: int, loop: int | None = None) -> None:
        """Drop the positions from `length` on, at `loop` or at every loop that has them."""
        lengths = [self.length(sequence, each) for each in range(self.num_loops)]
        most = max(lengths) if loop is None else self.length(sequence, loop)
        if not 0 <= length <= most:
            raise ValueError(f"length: found {length}; expected 0 to {most}, what the sequence holds")
        for each in range(self.num_loops) if loop is None else [loop]:
            kept = self.prefix_length + min(length, lengths[each])
            self._table.truncate(self._handle(sequence, each), kept)

    def truncate_rows(self, sequences: Sequence[int], lengths: Sequence[int]) -> None:
        """Drop the positions from lengths[i] on of sequences[i], at every loop that has them; all [M]."""
        if min(lengths, default=0) < 0:
            raise ValueError(f"lengths: found {min(lengths)}; expected 0 or more")
        loops = np.tile(np.arange(self.num_loops), len(sequences))
        handles = self._handles_of(np.repeat(_integers("sequences", sequences), self.num_loops), loops)
        for row, length in zip(handles.reshape(-1, self.num_loops).tolist(), lengths, strict=True):
            for handle in row:
                if self._table.length(handle) > self.prefix_length + length:
                    self._table.truncate(handle, self.prefix_length + length)

    def free(self, sequence: int) -> None:
        """Give up the sequence and its pages."""
        for loop in range(self.num_loops):
            self._table.free(self._handle(sequence, loop))
        self._handles[sequence] = 0
        self._free_sequences.append(sequence)

    def plan(self, rows: PassRows) -> PassPlan:
        """Make the tensors of a pass over `rows`, whose positions have been appended.

        A pass writes keys and values, so positions in shared pages are refused. To write there, truncate and append.
        """
        handles = self._handles_of(rows.sequences, rows.loops)
        positions = np.array(_integers("positions", rows.positions), dtype=np.int32)
        if len(positions) != len(handles):
            raise ValueError(f"positions: found {len(positions)}; expected {len(handles)}, one for each row")
        if not 0 <= rows.num_kv_only <= len(handles):
            raise ValueError(f"num_kv_only: found {rows.num_kv_only}; expected 0 to {len(handles)}, the rows")
        slots = self._slots(handles, positions)
        reading = slice(rows.num_kv_only, None)
        loops = np.array(rows.loops, dtype=np.int32)
        decode = DecodePlan(
            self._tensor(loops),
            int(loops[0]) if len(loops) and (loops == loops[0]).all() else None,
            self._tensor(positions),
            self._tensor(slots),
            rows.num_kv_only,
            self._tensor(self._table.block_tables(handles[reading])),
            self._tensor(positions[reading] + np.int32(self.prefix_length + 1)),
        )
        groups = groupby(rows.chunks, key=lambda chunk: chunk.loop)
        return PassPlan(decode, tuple(self._plan_prefill(loop, list(chunks)) for loop, chunks in groups))

    def prefix_slots(self, loop: int) -> Tensor:
        """Return the slots int64 [P] in which the prefix keeps its keys and values at `loop`."""
        handles = np.full(self.prefix_length, self._prefix[loop])
        return self._tensor(self._table.slots(handles, np.arange(self.prefix_length, dtype=np.int32)))

    def check(self) -> None:
        """Verify every invariant of the page accounting. Raises RuntimeError that names the broken one. For tests."""
        self._table.check()
        if self._table.num_sequences != (self.num_sequences + 1) * self.num_loops:
            raise RuntimeError("the page table holds sequences that no sequence of the cache owns")

    def _plan_prefill(self, loop: int, chunks: list[Chunk]) -> PrefillPlan:
        lengths = np.array([chunk.length for chunk in chunks], dtype=np.int32)
        starts = np.array([chunk.start for chunk in chunks], dtype=np.int32)
        for chunk in chunks:
            held = self.length(chunk.sequence, chunk.loop)
            if not 0 <= chunk.start <= chunk.start + chunk.length <= held:
                raise ValueError(
                    f"chunk: found start {chunk.start} and length {chunk.length}; expected them within the {held} "
                    "positions that the sequence holds"
                )
        handles = self._handles_of([chunk.sequence for chunk in chunks], [loop] * len(chunks))
        query_start = np.concatenate(([0], lengths.cumsum())).astype(np.int32)
        positions = np.arange(query_start[-1], dtype=np.int32) + np.repeat(starts - query_start[:-1], lengths)
        return PrefillPlan(
            loop,
            self._tensor(positions),
            self._tensor(self._slots(np.repeat(handles, lengths), positions)),
            self._tensor(self._table.block_tables(handles)),
            self._tensor(query_start),
            self._tensor(starts + lengths + np.int32(self.prefix_length)),
        )

    def _slots(self, handles: NDArray[np.int64], positions: NDArray[np.int32]) -> NDArray[np.int64]:
        if self.prefix_length and len(positions) and positions.min() < 0:
            raise ValueError(f"positions: found {positions.min()}; expected 0 or more")
        return self._table.slots(handles, positions + np.int32(self.prefix_length))

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return send(torch.from_numpy(array), self.k.device)

    def _add(self, handles: list[int]) -> int:
        if not self._free_sequences:
            first = len(self._handles)
            self._handles = np.concatenate((self._handles, np.zeros((first + 16, self.num_loops), dtype=np.int64)))
            self._free_sequences = list(range(len(self._handles) - 1, first - 1, -1))
        sequence = self._free_sequences.pop()
        self._handles[sequence] = handles
        return sequence

    def _handle(self, sequence: int, loop: int) -> int:
        """Look up one handle; the scheduler needs many in every pass, and arrays of one number would take longer."""
        handle = 0
        if 0 <= sequence < len(self._handles) and 0 <= loop < self.num_loops:
            handle = int(self._handles[sequence, loop])
        return handle or int(self._handles_of([sequence], [loop])[0])  # which says what is wrong

    def _handles_of(self, sequences: ArrayLike, loops: ArrayLike) -> NDArray[np.int64]:
        """Look up the page table's handles int64 [M]."""
        rows, columns = _integers("sequences", sequences), _integers("loops", loops)
        if len(rows) != len(columns):
            raise ValueError(f"loops: found {len(columns)}; expected {len(rows)}, one for each sequence")
        for name, values, end in (("sequence", rows, len(self._handles)), ("loop", columns, self.num_loops)):
            outside = (values < 0) | (values >= end)
            if outside.any():
                raise ValueError(f"{name}: found {values[outside][0]}; expected one in [0, {end})")
        handles = self._handles[rows, columns]
        if not handles.all():
            raise ValueError(f"sequence: found {rows[handles == 0][0]}; expected one that is allocated")
        return handles


def _integers(name: str, values: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name}: found {array.dtype} {list(array.shape)}; expected integers [M]")
    if array.size and not (array.min() >= -(2**31) and array.max() < 2**31):
        raise ValueError(f"{name}: found {array.max()}; expected numbers of 32 bits")
    return array.astype(np.int64)
