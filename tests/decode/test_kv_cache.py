"""The paged cache: pages that sequences and loops share or own, exact accounts, the tensors of a pass."""

import dataclasses

import pytest
import torch

from rrt.checkpoint.presets import preset
from rrt.decode.kv_cache import PagedCache, page_bytes
from rrt.decode.page_table import OutOfPages
from rrt.decode.passes import Chunk, PassRows
from rrt.errors import UserError
from rrt.model.config import RecursiveConfig

CONFIG = dataclasses.replace(
    preset("tinyllama-1.1b"), num_layers=6, num_heads=4, num_kv_heads=2, head_dim=6, hidden_size=24
)
RECURSIVE = RecursiveConfig(num_loops=3)
K = 2  # shared layers


def make_cache(num_pages=40, page_size=4, prefix_length=0):
    recursion = dataclasses.replace(RECURSIVE, prefix_length=prefix_length)
    cache = PagedCache(CONFIG, recursion, num_pages, page_size)
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    return cache


def write(cache, sequence, loop, values):
    """Append one position per value; keys hold the value, values its negative, each layer its own multiple."""
    start = cache.length(sequence, loop)
    cache.append(sequence, len(values), loop)
    rows = PassRows([sequence] * len(values), [loop] * len(values), range(start, start + len(values)))
    slots = cache.plan(rows).decode.slot_mapping
    for layer in range(K):
        scaled = torch.tensor(values, dtype=torch.float32)[:, None, None] * (layer + 1)
        cache.k[layer].flatten(0, 1)[slots] = scaled
        cache.v[layer].flatten(0, 1)[slots] = -scaled


def read(cache, sequence, loop):
    """Read the values at the sequence's positions at `loop`, in order; the same in all layers and heads."""
    length = cache.length(sequence, loop)
    if length == 0:
        return []
    [table] = cache._table.block_tables([cache._handle(sequence, loop)])
    pages = torch.from_numpy(table).long()
    first = cache.k[0, pages].flatten(0, 1)[cache.prefix_length :][:length]
    for layer in range(K):
        for held, sign in ((cache.k, 1), (cache.v, -1)):
            found = held[layer, pages].flatten(0, 1)[cache.prefix_length :][:length]
            assert torch.equal(found, sign * (layer + 1) * first)
    assert torch.equal(first, first[:, :1, :1].expand_as(first))
    return first[:, 0, 0].tolist()


def test_loops_and_sequences_grow_on_their_own():
    cache = make_cache()
    a, b = cache.allocate(), cache.allocate()
    write(cache, a, 0, [1, 2, 3, 4, 5])
    write(cache, a, 1, [6])
    write(cache, b, 0, [7, 8])
    write(cache, a, 1, [9, 10])
    assert [read(cache, a, loop) for loop in range(3)] == [[1, 2, 3, 4, 5], [6, 9, 10], []]
    assert [read(cache, b, loop) for loop in range(3)] == [[7, 8], [], []]
    assert cache.num_used_pages == 2 + 1 + 1
    cache.check()


def test_a_fork_shares_pages_until_either_side_appends():
    cache = make_cache()
    a = cache.allocate()
    for loop in range(3):
        write(cache, a, loop, [10 * loop + i for i in range(6)])
    used = cache.num_used_pages
    b = cache.fork(a)
    assert cache.num_used_pages == used
    write(cache, b, 1, [77])
    assert cache.num_used_pages == used + 1
    write(cache, a, 1, [88, 89])
    assert cache.num_used_pages == used + 1
    assert read(cache, a, 1) == [10, 11, 12, 13, 14, 15, 88, 89]
    assert read(cache, b, 1) == [10, 11, 12, 13, 14, 15, 77]
    assert read(cache, a, 2) == read(cache, b, 2) == [20, 21, 22, 23, 24, 25]
    cache.free(a)
    assert read(cache, b, 1) == [10, 11, 12, 13, 14, 15, 77]
    cache.free(b)
    assert cache.num_used_pages == 0
    cache.check()


def test_an_alias_reads_the_exited_loop_and_then_goes_its_own_way():
    cache = make_cache()
    a = cache.allocate()
    write(cache, a, 0, [1, 2, 3, 4, 5])
    write(cache, a, 2, [7])
    cache.alias(a, 2, 0)
    assert read(cache, a, 2) == [1, 2, 3, 4, 5]
    assert cache.num_used_pages == 2
    write(cache, a, 2, [6])
    write(cache, a, 0, [60])
    assert read(cache, a, 2) == [1, 2, 3, 4, 5, 6]
    assert read(cache, a, 0) == [1, 2, 3, 4, 5, 60]
    assert cache.num_used_pages == 3
    cache.check()


@pytest.mark.parametrize("prefix_length", [0, 3])
def test_copied_rows_are_those_of_the_other_loop(prefix_length):
    cache = make_cache(prefix_length=prefix_length)
    first, second = cache.allocate(), cache.allocate()
    for sequence, values in ((first, [1, 2, 3, 4, 5, 6]), (second, [7, 8])):
        write(cache, sequence, 0, values)
        write(cache, sequence, 1, [-value for value in values])
    cache.append(first, 6, 2)
    cache.append(second, 2, 2)
    cache.copy_rows([first] * 6 + [second, second], [*range(6), 0, 1], [0, 0, 1, 1, 0, 0, 1, 0], [2] * 8)
    assert read(cache, first, 2) == [1, 2, -3, -4, 5, 6] and read(cache, second, 2) == [-7, 8]
    assert read(cache, first, 0) == [1, 2, 3, 4, 5, 6] and read(cache, second, 1) == [-7, -8]
    fork = cache.fork(first)
    with pytest.raises(ValueError, match="no other sequence shares"):
        cache.copy_rows([fork], [0], [0], [2])
    with pytest.raises(ValueError, match=r"positions\[0\]: found"):
        cache.copy_rows([second], [5], [0], [2])


def test_truncated_positions_are_written_anew_without_touching_a_fork():
    cache = make_cache()
    a = cache.allocate()
    cache.append(a, 7)
    for loop in range(3):
        cache.truncate(a, 0, loop)
        write(cache, a, loop, [1, 2, 3, 4, 5, 6, 7])
    b = cache.fork(a)
    cache.truncate(a, 2)
    cache.truncate(b, 6, loop=1)
    assert [cache.length(a, loop) for loop in range(3)] == [2, 2, 2]
    assert [cache.length(b, loop) for loop in range(3)] == [7, 6, 7]
    write(cache, a, 1, [30])
    write(cache, b, 1, [70])
    assert read(cache, a, 1) == [1, 2, 30]
    assert read(cache, b, 1) == [1, 2, 3, 4, 5, 6, 70]
    assert read(cache, b, 0) == [1, 2, 3, 4, 5, 6, 7]
    cache.truncate(b, 6)
    assert [cache.length(b, loop) for loop in range(3)] == [6, 6, 6]


def test_appends_of_many_rows_copy_every_shared_page():
    cache = make_cache()
    a, other = cache.allocate(), cache.allocate()
    write(cache, a, 0, [1, 2])
    write(cache, a, 2, [3])
    write(cache, other, 0, [4])
    forks = [cache.fork(a) for _ in range(3)]
    used = cache.num_used_pages
    cache.append_rows([*forks, forks[0], other], [0, 0, 0, 2, 0], [1, 3, 1, 1, 1])
    assert cache.num_used_pages == used + 3 + 1 + 1  # pages copied at loop 0 and loop 2, and one that forks[1] grew by
    for fork in forks:
        cache.truncate(fork, 2, loop=0)
        assert read(cache, fork, 0) == [1, 2]
    cache.truncate(forks[0], 1, loop=2)
    assert read(cache, forks[0], 2) == [3]


@pytest.mark.parametrize("prefix_length", [0, 4, 6])
def test_accounts_are_exact(prefix_length):
    cache = make_cache(prefix_length=prefix_length)
    held = 3 * -(-prefix_length // 4)
    assert (cache.num_pages, cache.num_used_pages) == (40, held)
    assert cache.bytes_per_page == K * 4 * 2 * 6 * 4 * 2  # layers, positions, heads, width, bytes, keys and values
    assert cache.num_bytes == cache.k.nbytes + cache.v.nbytes == 40 * cache.bytes_per_page
    for length in (0, 1, 2, 3, 8, 9):
        sequence = cache.allocate()
        assert cache.num_used_pages == held
        cache.append(sequence, length)
        assert cache.num_used_pages == held + cache.pages_for(length)
        assert cache.num_free_pages == 40 - cache.num_used_pages
        assert cache.num_used_bytes == cache.num_used_pages * cache.bytes_per_page
        assert cache.num_sequences == 1
        cache.check()
        cache.free(sequence)
        assert (cache.num_used_pages, cache.num_sequences) == (held, 0)
    cache.check()


def test_a_budget_buys_as_many_pages_as_fit():
    each = page_bytes(CONFIG, RECURSIVE, 4, torch.bfloat16)
    assert each == K * 4 * 2 * 6 * 2 * 2
    cache = PagedCache.from_budget(CONFIG, RECURSIVE, 11 * each - 1, 4, torch.bfloat16)
    assert (cache.num_pages, cache.num_bytes, cache.k.dtype) == (10, 10 * each, torch.bfloat16)
    with pytest.raises(UserError, match=f"found a budget of {each - 1} bytes; expected at least {each}, one page"):
        PagedCache.from_budget(CONFIG, RECURSIVE, each - 1, 4, torch.bfloat16)


def test_out_of_pages_leaves_everything_as_it_was():
    cache = make_cache(num_pages=7)
    a = cache.allocate()
    write(cache, a, 0, [1, 2, 3])
    write(cache, a, 1, [4])
    b = cache.fork(a)
    before = [cache.k.clone(), cache.num_free_pages]
    with pytest.raises(OutOfPages):
        cache.append_rows([b, b, a, b], [0, 1, 0, 2], [1, 1, 2, 9])
    with pytest.raises(OutOfPages):
        cache.append(a, 14)
    assert torch.equal(cache.k.nan_to_num(-1), before[0].nan_to_num(-1))
    assert cache.num_free_pages == before[1]
    assert [read(cache, s, loop) for s in (a, b) for loop in range(3)] == [[1, 2, 3], [4], []] * 2
    cache.check()


def test_prefix_is_held_once_and_comes_before_position_0():
    cache = make_cache(prefix_length=6)
    for loop in range(3):
        slots = cache.prefix_slots(loop)
        assert (slots.dtype, len(slots)) == (torch.int64, 6)
        cache.k[:, slots // 4, slots % 4] = -1.0 - loop
    used = cache.num_used_pages
    sequences = [cache.allocate() for _ in range(3)]
    assert cache.num_used_pages == used
    for i, sequence in enumerate(sequences):
        for loop in range(3):
            write(cache, sequence, loop, [100 * i + loop, 5])
    for i, sequence in enumerate(sequences):
        for loop in range(3):
            assert read(cache, sequence, loop) == [100 * i + loop, 5]
            pages = cache.plan(PassRows([sequence], [loop], [1])).decode.block_tables[0].long()
            assert (cache.k[:, pages].flatten(1, 2)[:, :6] == -1 - loop).all()
    # Of each prefix, the full page is shared and the partly filled one copied.
    assert cache.num_used_pages == used + 3 * 3
    cache.truncate(sequences[0], 0)
    write(cache, sequences[0], 1, [9])
    assert read(cache, sequences[0], 1) == [9]
    assert cache.length(sequences[0], 0) == 0


def test_a_pass_of_all_kinds_of_rows():
    cache = make_cache(page_size=4)
    a, b = cache.allocate(), cache.allocate()
    cache.append(a, 6)
    cache.append(b, 3)
    chunks = [Chunk(a, 1, 2, 3), Chunk(b, 1, 0, 2), Chunk(b, 0, 1, 1)]
    plan = cache.plan(PassRows([a, b, a], [2, 0, 1], [5, 2, 3], num_kv_only=1, chunks=chunks))
    pages = {(s, loop): cache._table.pages(cache._handle(s, loop)) for s in (a, b) for loop in range(3)}
    decode = plan.decode
    assert decode.num_kv_only == 1
    assert decode.loops.tolist() == [2, 0, 1]
    assert decode.positions.tolist() == [5, 2, 3]
    assert decode.slot_mapping.tolist() == [pages[a, 2][1] * 4 + 1, pages[b, 0][0] * 4 + 2, pages[a, 1][0] * 4 + 3]
    assert decode.block_tables.tolist() == [[pages[b, 0][0], 0], pages[a, 1]]
    assert decode.context_lens.tolist() == [3, 4]
    first, second = plan.prefills
    assert (first.loop, second.loop) == (1, 0)
    assert first.positions.tolist() == [2, 3, 4, 0, 1]
    page_a, page_b = pages[a, 1], pages[b, 1][0]
    assert first.slot_mapping.tolist() == [
        page_a[0] * 4 + 2,
        page_a[0] * 4 + 3,
        page_a[1] * 4,
        page_b * 4,
        page_b * 4 + 1,
    ]
    assert first.block_tables.tolist() == [page_a, [page_b, 0]]
    assert first.query_start.tolist() == [0, 3, 5]
    assert first.context_lens.tolist() == [5, 2]
    assert (second.positions.tolist(), second.query_start.tolist(), second.context_lens.tolist()) == ([1], [0, 1], [2])
    int32 = {decode.loops, decode.positions, decode.block_tables, decode.context_lens, first.positions}
    int32 |= {first.block_tables, first.query_start, first.context_lens}
    assert {tensor.dtype for tensor in int32} == {torch.int32}
    assert {decode.slot_mapping.dtype, first.slot_mapping.dtype} == {torch.int64}


def test_a_plan_of_no_rows_is_empty():
    plan = make_cache().plan(PassRows())
    assert len(plan.decode.loops) == len(plan.decode.block_tables) == len(plan.prefills) == 0


def test_freed_sequences_are_refused_and_their_numbers_used_again():
    cache = make_cache()
    sequences = [cache.allocate() for _ in range(40)]
    assert len(set(sequences)) == cache.num_sequences == 40
    cache.free(sequences[7])
    for call in (cache.fork, cache.free, lambda s: cache.append(s, 1), lambda s: cache.length(s, 0)):
        with pytest.raises(ValueError, match=f"sequence: found {sequences[7]}; expected one that is allocated"):
            call(sequences[7])
    assert cache.allocate() == sequences[7]
    assert cache.length(sequences[7], 0) == 0


def test_bad_arguments_are_named():
    for arguments, message in (
        ((0, 4), "cache: num_pages: found 0; expected at least 1"),
        ((4, 0), "cache: page_size: found 0; expected at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            PagedCache(CONFIG, RECURSIVE, *arguments)
    with pytest.raises(UserError, match="cache: num_pages: found 5; expected at least 6"):
        make_cache(num_pages=5, prefix_length=5)
    cache = make_cache(prefix_length=2)
    a = cache.allocate()
    cache.append(a, 3)
    for call, message in (
        (lambda: cache.append(a, 1, loop=3), r"loop: found 3; expected one in \[0, 3\)"),
        (lambda: cache.append(-1, 1), r"sequence: found -1; expected one in \[0, 16\)"),
        (lambda: cache.append(a, -1), "count: found -1"),
        (lambda: cache.alias(a, 0, -1), "loop: found -1"),
        (lambda: cache.truncate(a, 4), "length: found 4; expected 0 to 3, what the sequence holds"),
        (lambda: cache.truncate(a, -1, loop=0), "length: found -1; expected 0 to 3"),
        (lambda: cache.plan(PassRows([a], [0], [-1])), "positions: found -1; expected 0 or more"),
        (lambda: cache.plan(PassRows([a], [0], [3])), r"positions\[0\]: found 5; expected a position in \[0, 5\)"),
        (lambda: cache.plan(PassRows([a], [0], [1, 2])), "positions: found 2; expected 1, one for each row"),
        (lambda: cache.plan(PassRows([a], [0], [1], num_kv_only=2)), "num_kv_only: found 2; expected 0 to 1"),
        (lambda: cache.plan(PassRows(chunks=[Chunk(a, 0, 0, -1)])), "chunk: found start 0 and length -1"),
        (
            lambda: cache.plan(PassRows(chunks=[Chunk(a, 0, 2, 2)])),
            "chunk: found start 2 and length 2; expected them within",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    cache.check()


def test_a_pass_never_writes_into_shared_pages():
    cache = make_cache()
    first = cache.allocate()
    cache.append(first, 6)
    second = cache.fork(first)
    for rows in (PassRows([first], [0], [2]), PassRows([second], [0], [2]), PassRows(chunks=[Chunk(second, 0, 1, 3)])):
        with pytest.raises(ValueError, match="expected one in a page that no other sequence shares"):
            cache.plan(rows)
    cache.truncate(second, 2)
    cache.append(second, 1)
    cache.plan(PassRows([second], [0], [2]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (dict(sequences=[0.9], loops=[0], positions=[0]), "sequences: found float64"),
        (dict(sequences=[0], loops=[0], positions=[1.7]), "positions: found float64"),
        (dict(sequences=[0, 0], loops=[0], positions=[0, 0]), "loops: found 1; expected 2, one for each sequence"),
        (dict(sequences=[0], loops=[0], positions=[0, 1]), "positions: found 2; expected 1, one for each row"),
        (dict(sequences=[0], loops=[0], positions=[2**31]), "positions: found 2147483648; expected numbers of 32 bits"),
        (dict(chunks=[Chunk(0, 0, 100, 0)]), "chunk: found start 100 and length 0; expected them within the 6"),
        (dict(chunks=[Chunk(0, 0, -5, 5)]), "chunk: found start -5 and length 5"),
        (dict(chunks=[Chunk(0, 0, 2, -1)]), "chunk: found start 2 and length -1"),
    ],
)
def test_rows_that_cannot_be_are_named(rows, message):
    cache = make_cache()
    assert cache.allocate() == 0
    cache.append(0, 6)
    with pytest.raises(ValueError, match=message):
        cache.plan(PassRows(**rows))


def test_counts_are_whole_numbers():
    cache = make_cache()
    with pytest.raises(ValueError, match="counts: found float64"):
        cache.append(cache.allocate(), 1.9)


def test_alias_is_refused_where_loops_have_prefixes_of_their_own():
    cache = make_cache(prefix_length=3)
    with pytest.raises(UserError, match="cache: alias: found prefix_length 3; expected 0"):
        cache.alias(cache.allocate(), 1, 0)
