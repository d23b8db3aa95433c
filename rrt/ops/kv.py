"""`loop_kv_write`, `loop_kv_attention`, `loop_kv_prefill`: keys and values in pages, and attention over them.

On CUDA the values of slots, pages, lengths and positions are not checked, for that would wait for the device: a bad
slot is skipped, and a bad page or position makes its row NaN.

Shapes: M rows (T queries of prefill), H query heads, H_kv key/value heads, D_h head width, S sequences. A cache
is one shared layer's slice [num_pages, page_size, H_kv, D_h]; slot ``page * page_size + offset`` holds one
position. A block table lists a row's pages in order of its positions. A page belongs to one loop, but only the
cache's bookkeeping knows which: the operators need no loop.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import SymInt, Tensor

from rrt.native import register_op
from rrt.ops.checks import Checks

_write_check = Checks("loop_kv_write")
_attention_check = Checks("loop_kv_attention")
_prefill_check = Checks("loop_kv_prefill")


def loop_kv_write(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    positions: Tensor | None = None,
    cos_sin: Tensor | None = None,
) -> None:
    """Write a key and a value per row into its slot of the cache; rotate the key first if positions are given.

    Args:
        k, v: [M, H_kv, D_h] float32, float64, bfloat16 or float16. Any strides; heads whose elements are not
            adjacent are copied.
        k_cache, v_cache: [num_pages, page_size, H_kv, D_h], contiguous, of k's dtype; written in place.
        slot_mapping: int64 [M], each a slot in [0, num_pages * page_size), or -1 to skip the row (padding).
            Slots must differ: if two rows share one, its content is unspecified.
        positions, cos_sin: int32 [M] and [max_positions, rotary_dim] float32 (float64 for float64 k), or both
            None. Row ``positions[i]`` of cos_sin holds the cosines, then the sines, of rotary_dim / 2 angles; the
            first rotary_dim elements of each key head are rotated by them in halves (rotary position embedding),
            in cos_sin's dtype with one rounding at the end. A skipped row's position is not read.

    Raises:
        RuntimeError: a dtype, device, shape, stride, slot or position that does not fit; the message names the
            argument, what was found and what was expected.
    """
    torch.ops.rrt.loop_kv_write.default(k, v, k_cache, v_cache, slot_mapping, positions, cos_sin)


def loop_kv_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    positions: Tensor | None = None,
    cos_sin: Tensor | None = None,
) -> Tensor:
    """Attend from decode rows, one query each, over the pages of the row's own block table.

    Args:
        q: [M, H, D_h] of the cache's dtype; H is a multiple of H_kv, and query head h reads key/value head
            ``h // (H // H_kv)``. Any strides; heads whose elements are not adjacent are copied.
        k_cache, v_cache: [num_pages, page_size, H_kv, D_h], contiguous: float32, float64, bfloat16 or float16.
        block_tables: int32 [M, max_pages]. Entries beyond a row's context are not read.
        context_lens: int32 [M], each in [0, max_pages * page_size]: the query attends the first context_lens[i]
            positions of its pages, which include its own. 0 marks padding: the result is zeros.
        scale: factor on the scores, before the softmax.
        positions, cos_sin: to rotate q first, as in `loop_kv_write`; padding's positions are not read.

    Returns:
        [M, H, D_h] of q's dtype. The native kernel accumulates in float32 (float64 for float64); a row's result
        is bitwise the same whatever other rows are in the batch. The reference promises neither.

    Raises:
        RuntimeError: a dtype, device, shape, stride, length, page or position that does not fit.
    """
    out: Tensor = torch.ops.rrt.loop_kv_attention.default(
        q, k_cache, v_cache, block_tables, context_lens, scale, positions, cos_sin
    )
    return out


def loop_kv_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    positions: Tensor | None = None,
    cos_sin: Tensor | None = None,
) -> Tensor:
    """Attend causally from chunks of S sequences, whose queries are packed one after the other.

    The chunk's own keys and values have been written by `loop_kv_write` before.

    Args:
        q: [T, H, D_h], as in `loop_kv_attention`. Sequence s has queries [query_start[s], query_start[s + 1]).
        k_cache, v_cache: [num_pages, page_size, H_kv, D_h], as in `loop_kv_attention`.
        block_tables: int32 [S, max_pages]. Entries beyond a sequence's context are not read.
        query_start: int32 [S + 1], from 0 to T, never falling.
        context_lens: int32 [S], the positions of each sequence up to the end of its chunk, the chunk included:
            query i of a chunk of length c attends positions [0, context_lens[s] - c + i].
        scale: factor on the scores, before the softmax.
        positions, cos_sin: int32 [T] and the table, to rotate q first, as in `loop_kv_write`.

    Returns:
        [T, H, D_h] of q's dtype, accumulated as in `loop_kv_attention`.

    Raises:
        RuntimeError: a dtype, device, shape, stride, length, page or position that does not fit.
    """
    out: Tensor = torch.ops.rrt.loop_kv_prefill.default(
        q, k_cache, v_cache, block_tables, query_start, context_lens, scale, positions, cos_sin
    )
    return out


def loop_kv_write_reference(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    positions: Tensor | None = None,
    cos_sin: Tensor | None = None,
) -> None:
    """`loop_kv_write` in plain PyTorch, on any device: same arguments and errors."""
    check = _write_check
    _check_write(k, v, k_cache, v_cache, slot_mapping, positions, cos_sin)
    check_slots(check, slot_mapping, k_cache)
    kept = slot_mapping >= 0
    k, v, slots = k[kept], v[kept], slot_mapping[kept]
    if positions is not None and cos_sin is not None:
        check_positions(check, positions, cos_sin, kept)
        k = _rotate(k, positions[kept], cos_sin)
    k_cache.flatten(0, 1)[slots] = k
    v_cache.flatten(0, 1)[slots] = v


def loop_kv_attention_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    positions: Tensor | None = None,
    cos_sin: Tensor | None = None,
) -> Tensor:
    """`loop_kv_attention` in plain PyTorch, on any device: same arguments and errors; rounds as PyTorch does."""
    check = _attention_check
    _check_attention(check, q, k_cache, v_cache, block_tables, None, context_lens, positions, cos_sin)
    check_context_lens(check, context_lens, block_tables, k_cache)
    check_pages(check, block_tables, context_lens, k_cache)
    kept = context_lens > 0
    queries = q[kept]
    if positions is not None and cos_sin is not None:
        check_positions(check, positions, cos_sin, kept)
        queries = _rotate(queries, positions[kept], cos_sin)
    out = q.new_zeros(q.shape)
    for query, row in zip(queries, kept.nonzero().squeeze(1).tolist(), strict=True):
        keys, values = _gather(k_cache, v_cache, block_tables[row], int(context_lens[row]))
        out[row] = _attend(query[None], keys, values, scale)[0]
    return out


def loop_kv_prefill_reference(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    positions: Tensor | None = None,
    cos_sin: Tensor | None = None,
) -> Tensor:
    """`loop_kv_prefill` in plain PyTorch, on any device: same arguments and errors; rounds as PyTorch does."""
    check = _prefill_check
    _check_attention(check, q, k_cache, v_cache, block_tables, query_start, context_lens, positions, cos_sin)
    _check_query_start(query_start, q.shape[0])
    check_context_lens(check, context_lens, block_tables, k_cache)
    lengths = query_start.diff()
    if (short := _first(context_lens < lengths)) is not None:
        expected = f"at least {int(lengths[short])}, the queries of the sequence"
        check.fail(f"context_lens[{short[0]}]", int(context_lens[short]), expected)
    check_pages(check, block_tables, context_lens.where(lengths > 0, 0), k_cache)
    if positions is not None and cos_sin is not None:
        check_positions(check, positions, cos_sin, torch.ones_like(positions, dtype=torch.bool))
        q = _rotate(q, positions, cos_sin)
    out = q.new_empty(q.shape)
    for s, (begin, end) in enumerate(pairwise(query_start.tolist())):
        if begin < end:
            context = int(context_lens[s])
            keys, values = _gather(k_cache, v_cache, block_tables[s], context)
            own = torch.arange(context - (end - begin), context, device=q.device)
            mask = torch.arange(context, device=q.device) <= own[:, None]
            out[begin:end] = _attend(q[begin:end], keys, values, scale, mask)
    return out


def _rotate(x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the first rotary_dim elements of each head of x [M, heads, D_h], in cos_sin's dtype."""
    cos, sin = cos_sin[positions.long()].unsqueeze(1).chunk(2, dim=-1)
    turned, kept = x.split((cos_sin.shape[1], x.shape[2] - cos_sin.shape[1]), dim=-1)
    first, second = turned.to(cos.dtype).chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((turned.to(x.dtype), kept), dim=-1)


def _gather(k_cache: Tensor, v_cache: Tensor, block_table: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Collect keys and values [context, H_kv, D_h] of the first `context` positions of a block table."""
    pages = block_table[: -(-context // k_cache.shape[1])].long()
    return k_cache[pages].flatten(0, 1)[:context], v_cache[pages].flatten(0, 1)[:context]


def _attend(q: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Attend from q [T, H, D_h] to keys and values [S, H_kv, D_h] under `mask` bool [T, S] -> [T, H, D_h]."""
    q, keys, values = (x.transpose(0, 1) for x in (q, keys, values))
    return F.scaled_dot_product_attention(q, keys, values, mask, scale=scale, enable_gqa=True).transpose(0, 1)


def _first(bad: Tensor) -> tuple[int, ...] | None:
    """Return the index of the first true entry, or None."""
    found = bad.nonzero()
    return tuple(found[0].tolist()) if len(found) else None


def _check_write(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    positions: Tensor | None = None,
    cos_sin: Tensor | None = None,
) -> None:
    """Make the checks of csrc/kv_cache/op.cpp, in its order, but for the slots' and positions' values."""
    check = _write_check
    check.float_dtype("k", k)
    for name, tensor in (("v", v), ("k_cache", k_cache), ("v_cache", v_cache)):
        check.like(name, tensor, k, "k")
    check.dtype("slot_mapping", slot_mapping, torch.int64)
    check.same_device("slot_mapping", slot_mapping, k, "k")
    check.shape("k", k, "M", "H_kv", "D_h")
    check.shape("v", v, *k.shape)
    _check_cache(check, k_cache, v_cache, k.shape[1], k.shape[2])
    check.shape("slot_mapping", slot_mapping, k.shape[0])
    _check_rope(check, positions, cos_sin, k, "k")


def _check_attention(
    check: Checks,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor | None,
    context_lens: Tensor,
    positions: Tensor | None = None,
    cos_sin: Tensor | None = None,
) -> torch.Size:
    """Make both attention operators' checks, in csrc/kv_cache/op.cpp's order, but for the values of indices.

    `loop_kv_attention` has no query_start. Returns the result's shape.
    """
    check.float_dtype("q", q)
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        check.like(name, tensor, q, "q")
    for name, index in (("block_tables", block_tables), ("query_start", query_start), ("context_lens", context_lens)):
        if index is not None:
            check.dtype(name, index, torch.int32)
            check.same_device(name, index, q, "q")
    check.shape("q", q, "M" if query_start is None else "T", "H", "D_h")
    _check_cache(check, k_cache, v_cache, "H_kv", q.shape[2])
    check.multiple_of_kv_heads(q.shape[1], k_cache.shape[2], "k_cache")
    rows: int | SymInt = q.shape[0]
    if query_start is None:
        check.shape("block_tables", block_tables, rows, "max_pages")
    else:
        check.shape("block_tables", block_tables, "S", "max_pages")
        rows = block_tables.shape[0]
        check.shape("query_start", query_start, rows + 1)
    check.shape("context_lens", context_lens, rows)
    _check_rope(check, positions, cos_sin, q, "q")
    return q.shape


def _check_cache(
    check: Checks, k_cache: Tensor, v_cache: Tensor, num_kv_heads: str | int | SymInt, head_dim: int | SymInt
) -> None:
    check.shape("k_cache", k_cache, "num_pages", "page_size", num_kv_heads, head_dim)
    check.shape("v_cache", v_cache, *k_cache.shape)
    check.contiguous("k_cache", k_cache)
    check.contiguous("v_cache", v_cache)


def _check_rope(check: Checks, positions: Tensor | None, cos_sin: Tensor | None, x: Tensor, x_name: str) -> None:
    if positions is None and cos_sin is None:
        return
    if positions is None:
        check.fail("positions", None, "positions and cos_sin together")
    if cos_sin is None:
        check.fail("cos_sin", None, "positions and cos_sin together")
    check.dtype("positions", positions, torch.int32)
    check.dtype("cos_sin", cos_sin, torch.float64 if x.dtype == torch.float64 else torch.float32)
    check.same_device("positions", positions, x, x_name)
    check.same_device("cos_sin", cos_sin, x, x_name)
    check.shape("positions", positions, x.shape[0])
    check.shape("cos_sin", cos_sin, "max_positions", "rotary_dim")
    if cos_sin.shape[1] % 2 or cos_sin.shape[1] > x.shape[2]:
        check.fail("cos_sin", f"rotary_dim {cos_sin.shape[1]}", f"an even number of at most {x.shape[2]}")
    check.contiguous("cos_sin", cos_sin)


def _check_values(check: Checks, name: str, values: Tensor, bad: Tensor, expected: str) -> None:
    if (index := _first(bad)) is not None:
        check.fail(f"{name}{list(index)}", int(values[index]), expected)


def check_slots(check: Checks, slot_mapping: Tensor, k_cache: Tensor) -> None:
    num_slots = k_cache.shape[0] * k_cache.shape[1]
    outside = (slot_mapping < -1) | (slot_mapping >= num_slots)
    _check_values(check, "slot_mapping", slot_mapping, outside, f"a slot in [0, {num_slots}), or -1 to skip the row")


def check_positions(check: Checks, positions: Tensor, cos_sin: Tensor, kept: Tensor) -> None:
    end = cos_sin.shape[0]
    outside = kept & ((positions < 0) | (positions >= end))
    _check_values(check, "positions", positions, outside, f"a position in [0, {end})")


def check_context_lens(check: Checks, context_lens: Tensor, block_tables: Tensor, k_cache: Tensor) -> None:
    most = block_tables.shape[1] * k_cache.shape[1]
    outside = (context_lens < 0) | (context_lens > most)
    _check_values(check, "context_lens", context_lens, outside, f"a length in [0, {most}], what block_tables hold")


def check_pages(check: Checks, block_tables: Tensor, context_lens: Tensor, k_cache: Tensor) -> None:
    num_pages, page_size = k_cache.shape[:2]
    first_position = torch.arange(block_tables.shape[1], device=block_tables.device) * page_size
    needed = first_position < context_lens[:, None]
    outside = needed & ((block_tables < 0) | (block_tables >= num_pages))
    _check_values(check, "block_tables", block_tables, outside, f"a page in [0, {num_pages})")


def _check_query_start(query_start: Tensor, num_queries: int) -> None:
    check = _prefill_check
    if query_start[0] != 0:
        check.fail("query_start[0]", int(query_start[0]), "0")
    if (fall := _first(query_start.diff() < 0)) is not None:
        s = fall[0] + 1
        check.fail(f"query_start[{s}]", int(query_start[s]), f"at least {int(query_start[s - 1])}, the entry before")
    if query_start[-1] != num_queries:
        last = len(query_start) - 1
        check.fail(f"query_start[{last}]", int(query_start[-1]), f"{num_queries}, the number of queries")


register_op(
    "loop_kv_write(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, "
    "Tensor? positions=None, Tensor? cos_sin=None) -> ()",
    loop_kv_write_reference,
    fake=_check_write,
)
register_op(
    "loop_kv_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor context_lens, "
    "float scale, Tensor? positions=None, Tensor? cos_sin=None) -> Tensor",
    loop_kv_attention_reference,
    fake=lambda q, k_cache, v_cache, tables, lengths, scale, *rope: q.new_empty(
        _check_attention(_attention_check, q, k_cache, v_cache, tables, None, lengths, *rope)
    ),
)
register_op(
    "loop_kv_prefill(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, Tensor query_start, "
    "Tensor context_lens, float scale, Tensor? positions=None, Tensor? cos_sin=None) -> Tensor",
    loop_kv_prefill_reference,
    fake=lambda q, k_cache, v_cache, tables, starts, lengths, scale, *rope: q.new_empty(
        _check_attention(_prefill_check, q, k_cache, v_cache, tables, starts, lengths, *rope)
    ),
)
