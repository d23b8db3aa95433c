"""loop_kv_write, loop_kv_attention, loop_kv_prefill: native kernels and references against float64 oracles."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rrt.checkpoint.presets import preset
from rrt.model.transformer import apply_rope, rope_cos_sin
from rrt.ops import (
    loop_kv_attention,
    loop_kv_attention_reference,
    loop_kv_prefill,
    loop_kv_prefill_reference,
    loop_kv_write,
    loop_kv_write_reference,
)
from tests.util.loop_kv import (
    CASES,
    Case,
    assert_close,
    decode_inputs,
    make_rope,
    normal,
    oracle_decode,
    oracle_prefill,
    oracle_rope,
    prefill_inputs,
)
from tests.util.native import DTYPES, needs_native, threads
from tests.util.pairwise import pairwise


class Ops(NamedTuple):
    write: Callable[..., None]
    attention: Callable[..., Tensor]
    prefill: Callable[..., Tensor]


OPS = Ops(loop_kv_write, loop_kv_attention, loop_kv_prefill)
REFERENCES = Ops(loop_kv_write_reference, loop_kv_attention_reference, loop_kv_prefill_reference)
IMPLEMENTATIONS = {"op": OPS, "reference": REFERENCES}
BOTH = pytest.mark.parametrize("ops", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill new tensors with NaN, so that an element that nobody writes is noticed."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.isa
@pairwise(case=CASES, dtype=DTYPES, ops=IMPLEMENTATIONS, exhaustive=("op",))
def test_decode_matches_the_definition(case: Case, dtype: torch.dtype, ops: Ops) -> None:
    paged, inputs = decode_inputs(case, dtype)
    with poisoned_memory():
        out = ops.attention(**inputs)
    assert_close(out, oracle_decode(paged, inputs), dtype)


@pytest.mark.isa
@pairwise(case=CASES, dtype=DTYPES, ops=IMPLEMENTATIONS, exhaustive=("op",))
def test_prefill_matches_the_definition(case: Case, dtype: torch.dtype, ops: Ops) -> None:
    paged, inputs = prefill_inputs(case, dtype)
    with poisoned_memory():
        out = ops.prefill(**inputs)
    assert_close(out, oracle_prefill(paged, inputs), dtype)


any_shape = st.builds(
    lambda kv_heads, group, head_dim, page_size, lengths, rotary: Case(
        kv_heads * group,
        kv_heads,
        head_dim,
        page_size,
        tuple(context + chunk for context, chunk in lengths),
        tuple(chunk for _, chunk in lengths),
        min(rotary * 2, head_dim // 2 * 2),
    ),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 20),
    head_dim=st.integers(1, 70) | st.sampled_from([16, 32, 64]),
    page_size=st.integers(1, 9) | st.just(64),
    lengths=st.lists(st.tuples(st.integers(0, 90), st.integers(0, 40)), max_size=4),
    rotary=st.integers(0, 40),
)


@pytest.mark.fallback
@settings(max_examples=25)
@given(case=any_shape, dtype=st.sampled_from([torch.float64, torch.bfloat16]), seed=st.integers(0, 2**16))
def test_decode_and_prefill_match_the_definition_for_any_shape(case: Case, dtype: torch.dtype, seed: int) -> None:
    paged, inputs = decode_inputs(case, dtype, seed)
    assert_close(loop_kv_attention(**inputs), oracle_decode(paged, inputs), dtype)
    paged, inputs = prefill_inputs(case, dtype, seed)
    assert_close(loop_kv_prefill(**inputs), oracle_prefill(paged, inputs), dtype)


@pytest.mark.fallback
@pytest.mark.isa
@pairwise(rotary_dim=[0, 6, 20], dtype=DTYPES, ops=IMPLEMENTATIONS, exhaustive=("op",))
def test_write_puts_each_row_into_its_slot_and_nothing_else(rotary_dim: int, dtype: torch.dtype, ops: Ops) -> None:
    generator = torch.Generator().manual_seed(0)
    case = Case(2, 2, 20, 3, (), rotary_dim=rotary_dim)
    slots = [7, -1, 0, 14, -1, 8]
    k, v = (normal(generator, len(slots), 2, 20, dtype=dtype) for _ in range(2))
    k_cache, v_cache = (torch.full((5, 3, 2, 20), float("nan"), dtype=dtype) for _ in range(2))
    positions, cos_sin = make_rope(case, [4, 0, 9, 2, 0, 4], dtype, generator)
    if positions is not None:
        positions[1], positions[4] = 10**6, -3  # of rows that are skipped
    ops.write(k, v, k_cache, v_cache, torch.tensor(slots), positions, cos_sin)
    k_expected, v_expected = torch.full_like(k_cache, float("nan")), torch.full_like(v_cache, float("nan"))
    for row, slot in enumerate(slots):
        if slot >= 0:
            v_expected[slot // 3, slot % 3] = v[row]
            one = slice(row, row + 1)
            turned = oracle_rope(k[one], positions[one], cos_sin) if rotary_dim else k[one]
            k_expected[slot // 3, slot % 3] = turned[0].to(dtype)
    torch.testing.assert_close(v_cache, v_expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(k_cache, k_expected, equal_nan=True)
    unturned = slice(rotary_dim, None)
    torch.testing.assert_close(k_cache[..., unturned], k_expected[..., unturned], rtol=0, atol=0, equal_nan=True)


@BOTH
def test_fused_rotation_equals_the_models_before_the_operators(ops: Ops) -> None:
    generator = torch.Generator().manual_seed(1)
    config = preset("pythia-160m")
    heads, head_dim, length = config.num_heads, config.head_dim, 19
    q, k, v = (normal(generator, length, heads, head_dim) for _ in range(3))
    positions = torch.arange(length)
    cos, sin = rope_cos_sin(config, positions[None], torch.float64)
    cos_sin = torch.cat((cos[0], sin[0]), dim=1)

    def run(q: Tensor, k: Tensor, *rope: Tensor) -> Tensor:
        k_cache, v_cache = (torch.zeros(4, 6, heads, head_dim, dtype=torch.float64) for _ in range(2))
        ops.write(k, v, k_cache, v_cache, positions, *rope)
        tables = torch.arange(4, dtype=torch.int32)[None]
        ends = torch.tensor([0, length]).int(), torch.tensor([length]).int()
        prefilled = ops.prefill(q, k_cache, v_cache, tables, *ends, 0.3, *rope)
        decoded = ops.attention(q, k_cache, v_cache, tables.expand(length, 4), positions.int() + 1, 0.3, *rope)
        return torch.cat((k_cache.flatten(), prefilled.flatten(), decoded.flatten()))

    fused = run(q, k, positions.int(), cos_sin)
    q_turned, k_turned = (apply_rope(x[None], cos, sin)[0] for x in (q, k))
    assert not torch.allclose(k, k_turned)
    torch.testing.assert_close(fused, run(q_turned, k_turned), rtol=0, atol=1e-11)


@BOTH
@pytest.mark.parametrize("context", [255, 256, 257, 511, 512, 513, 32768])
def test_contexts_around_the_splits_and_the_longest(context: int, ops: Ops) -> None:
    case = Case(2, 1, 64, 64, (context,), (2,))
    paged, inputs = decode_inputs(case, torch.float64)
    assert_close(ops.attention(**inputs), oracle_decode(paged, inputs), torch.float64)
    paged, inputs = prefill_inputs(case, torch.float64)
    assert_close(ops.prefill(**inputs), oracle_prefill(paged, inputs), torch.float64)


@pytest.mark.isa
@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_far_from_zero_neither_overflow_nor_vanish(dtype: torch.dtype, ops: Ops) -> None:
    # Largest scores last, first, and all of them far below zero.
    case = Case(4, 1, 32, 16, (300, 300, 300))
    paged, inputs = decode_inputs(case, dtype)
    inputs["q"].fill_(4.0)
    for s, (first, last) in enumerate(((-30.0, 30.0), (30.0, -30.0), (-30.0, -29.0))):
        paged.k[s].copy_(torch.linspace(first, last, 300).to(dtype)[:, None, None].expand_as(paged.k[s]))
        slots = torch.arange(300)
        paged.k_cache[paged.block_tables[s, slots // 16].long(), slots % 16] = paged.k[s]
    assert_close(ops.attention(**inputs), oracle_decode(paged, inputs), dtype)


@BOTH
@pytest.mark.parametrize("scale", [0.0, -0.7])
@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_the_scale_may_be_anything(case: Case, scale: float, ops: Ops) -> None:
    for make, op, oracle in (
        (decode_inputs, ops.attention, oracle_decode),
        (prefill_inputs, ops.prefill, oracle_prefill),
    ):
        paged, inputs = make(case, torch.float32)
        inputs["scale"] = scale
        assert_close(op(**inputs), oracle(paged, inputs), torch.float32)


@BOTH
def test_a_context_of_zero_gives_zeros_and_reads_nothing(ops: Ops) -> None:
    _, inputs = decode_inputs(Case(4, 2, 24, 8, (9, 0, 0, 5), rotary_dim=8), torch.float32)
    inputs["q"][1:3] = float("nan")
    with poisoned_memory():
        out = ops.attention(**inputs)
    assert torch.equal(out[1:3], torch.zeros(2, 4, 24))
    assert out[[0, 3]].isfinite().all()


@BOTH
def test_batches_without_rows_heads_or_columns_are_accepted(ops: Ops) -> None:
    def run(rows: int, heads: int, kv_heads: int, head_dim: int, num_pages: int = 2) -> None:
        cache = torch.zeros(num_pages, 4, kv_heads, head_dim)
        new = torch.zeros(rows, kv_heads, head_dim)
        ops.write(new, new, cache, cache.clone(), torch.zeros(rows, dtype=torch.int64))
        q, tables = torch.zeros(rows, heads, head_dim), torch.zeros(rows, 1, dtype=torch.int32)
        ones = torch.ones(rows, dtype=torch.int32)
        assert ops.attention(q, cache, cache, tables, ones, 1.0).shape == q.shape
        starts = torch.arange(rows + 1, dtype=torch.int32)
        assert ops.prefill(q, cache, cache, tables, starts, ones, 1.0).shape == q.shape

    run(0, 4, 2, 8)
    run(0, 4, 2, 8, num_pages=0)
    run(3, 0, 2, 8)
    run(3, 0, 0, 8)
    run(3, 4, 2, 0)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inputs_of_any_strides_are_accepted(dtype: torch.dtype, ops: Ops) -> None:
    case = Case(4, 2, 32, 4, (9, 30, 2), (3, 9, 2), rotary_dim=8)

    def every_other(x: Tensor) -> Tensor:
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 77, dtype=x.dtype)
        wide[..., ::2] = x
        return wide[..., ::2]

    def inside_a_fused_projection(x: Tensor) -> Tensor:
        wide = torch.full((x.shape[0], x[0].numel() + 7), float("nan"), dtype=dtype)
        wide[:, 5:-2] = x.flatten(1)
        return wide[:, 5:-2].view(x.shape)

    def strided(inputs: dict[str, Any], heads: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        floats = ("k_cache", "v_cache", "cos_sin")
        return {
            name: value
            if not isinstance(value, Tensor) or name in floats
            else (heads(value) if name in ("q", "k", "v") else every_other(value))
            for name, value in inputs.items()
        }

    layouts = (inside_a_fused_projection, every_other, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1))
    _, decode = decode_inputs(case, dtype)
    _, prefill = prefill_inputs(case, dtype)
    write = {
        "k": decode["q"][:, :2],
        "v": decode["q"][:, 2:],
        "slot_mapping": torch.tensor([3, 11, 6]),
        "positions": decode["positions"],
        "cos_sin": decode["cos_sin"],
    }
    caches = torch.zeros(2, 1 + len(layouts), 3, 4, 2, 32, dtype=dtype)
    ops.write(**write, k_cache=caches[0, 0], v_cache=caches[1, 0])
    for i, heads in enumerate(layouts, 1):
        assert torch.equal(ops.attention(**strided(decode, heads)), ops.attention(**decode))
        assert torch.equal(ops.prefill(**strided(prefill, heads)), ops.prefill(**prefill))
        ops.write(**strided(write, heads), k_cache=caches[0, i], v_cache=caches[1, i])
        assert torch.equal(caches[:, i], caches[:, 0])


@pytest.mark.isa
@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_later_position_is_never_multiplied_in_even_by_zero(dtype: torch.dtype) -> None:
    # 0 * NaN would be seen.
    for case in (Case(1, 1, 32, 16, (75,), (75,)), Case(3, 1, 20, 16, (75,), (75,)), Case(2, 1, 32, 16, (75,), (3,))):
        paged, inputs = prefill_inputs(case, dtype)
        expected = loop_kv_prefill(**inputs)
        for last in range(case.contexts[0] - case.chunks[0], case.contexts[0]):
            page, offset = int(paged.block_tables[0, last // 16]), last % 16
            inputs["k_cache"] = paged.k_cache.index_put(
                (torch.tensor(page), torch.tensor(offset)), torch.tensor(float("nan"), dtype=dtype)
            )
            inputs["v_cache"] = paged.v_cache.index_put(
                (torch.tensor(page), torch.tensor(offset)), torch.tensor(float("inf"), dtype=dtype)
            )
            before = last - (case.contexts[0] - case.chunks[0])
            out = loop_kv_prefill(**inputs)
            assert torch.equal(out[:before], expected[:before]) and out[before:].isnan().all()


@pytest.mark.isa
@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 20])
def test_a_decode_row_is_bitwise_the_same_in_any_batch(head_dim: int, dtype: torch.dtype) -> None:
    case = Case(6, 2, head_dim, 16, (700, 3, 256, 64, 0, 257, 90), rotary_dim=4)
    _, inputs = decode_inputs(case, dtype)
    whole = loop_kv_attention(**inputs)
    per_row = ("q", "block_tables", "context_lens", "positions")
    for rows in ([0], [2], [5, 4], [6, 0, 3, 1], list(range(6, -1, -1)), [1] * 9):
        part = loop_kv_attention(**inputs | {name: inputs[name][rows] for name in per_row})
        assert torch.equal(part, whole[rows]), rows


@pytest.mark.isa
@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sequences_chunk_is_bitwise_the_same_in_any_batch(dtype: torch.dtype) -> None:
    case = Case(4, 2, 64, 16, (300, 20, 700, 90), (100, 20, 3, 1))
    _, inputs = prefill_inputs(case, dtype)
    whole = loop_kv_prefill(**inputs).split(case.chunks)
    queries = inputs["q"].split(case.chunks)
    for order in ([0], [2], [3, 1], [2, 3, 0, 1]):
        starts = torch.tensor([0] + [case.chunks[s] for s in order]).cumsum(0).int()
        part = loop_kv_prefill(
            **inputs
            | {name: inputs[name][order] for name in ("block_tables", "context_lens")}
            | {"q": torch.cat([queries[s] for s in order]), "query_start": starts}
        )
        assert torch.equal(part, torch.cat([whole[s] for s in order]))


@pytest.mark.isa
@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_neither_threads_nor_repetition_nor_the_pages_place_change_a_bit(dtype: torch.dtype) -> None:
    case = Case(8, 2, 64, 16, (1500, 40, 800), (300, 40, 2))
    _, decode = decode_inputs(case, dtype)
    _, prefill = prefill_inputs(case, dtype)
    shuffled = torch.randperm(decode["k_cache"].shape[0], generator=torch.Generator().manual_seed(5))

    def moved(inputs: dict[str, Any]) -> dict[str, Any]:
        inverse = shuffled.argsort()
        needed = (inputs["block_tables"] >= 0) & (inputs["block_tables"] < len(shuffled))
        tables = inverse[inputs["block_tables"].where(needed, 0).long()].int()
        caches = {name: inputs[name][shuffled] for name in ("k_cache", "v_cache")}
        return inputs | caches | {"block_tables": tables.where(needed, -1)}

    with threads(1):
        decoded, prefilled = loop_kv_attention(**decode), loop_kv_prefill(**prefill)
        assert torch.equal(loop_kv_attention(**moved(decode)), decoded)
        assert torch.equal(loop_kv_prefill(**moved(prefill)), prefilled)
    for number in (1, 2, 4):
        with threads(number):
            assert torch.equal(loop_kv_attention(**decode), decoded)
            assert torch.equal(loop_kv_prefill(**prefill), prefilled)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_prompt_in_chunks_or_token_by_token_matches_the_whole_prompt(dtype: torch.dtype, ops: Ops) -> None:
    length = 150
    case = Case(4, 2, 32, 16, (length,), (length,))
    paged, inputs = prefill_inputs(case, dtype)
    expected = oracle_prefill(paged, inputs)
    assert_close(ops.prefill(**inputs), expected, dtype)
    parts = []
    for begin, end in ((0, 70), (70, 71), (71, 150)):
        ends = {"query_start": torch.tensor([0, end - begin]).int(), "context_lens": torch.tensor([end]).int()}
        parts.append(ops.prefill(**inputs | ends | {"q": inputs["q"][begin:end]}))
    assert_close(torch.cat(parts), expected, dtype)
    decoded = ops.attention(
        inputs["q"],
        inputs["k_cache"],
        inputs["v_cache"],
        inputs["block_tables"].expand(length, -1),
        torch.arange(1, length + 1).int(),
        inputs["scale"],
    )
    assert_close(decoded, expected, dtype)


def write_arguments() -> dict[str, Any]:
    return {
        "k": torch.zeros(3, 2, 8),
        "v": torch.zeros(3, 2, 8),
        "k_cache": torch.zeros(4, 5, 2, 8),
        "v_cache": torch.zeros(4, 5, 2, 8),
        "slot_mapping": torch.tensor([0, -1, 19]),
        "positions": torch.tensor([0, 99, 8]).int(),
        "cos_sin": torch.zeros(9, 6),
    }


def attention_arguments() -> dict[str, Any]:
    return {
        "q": torch.zeros(3, 4, 8),
        "k_cache": torch.zeros(4, 5, 2, 8),
        "v_cache": torch.zeros(4, 5, 2, 8),
        "block_tables": torch.tensor([[3, 0], [-1, -1], [1, 99]]).int(),
        "context_lens": torch.tensor([10, 0, 5]).int(),
        "scale": 1.0,
        "positions": torch.tensor([8, 99, 4]).int(),
        "cos_sin": torch.zeros(9, 6),
    }


def prefill_arguments() -> dict[str, Any]:
    return attention_arguments() | {
        "query_start": torch.tensor([0, 2, 2, 3]).int(),
        "positions": torch.tensor([7, 8, 4]).int(),
    }


STRIDES = "expected a contiguous tensor (call .contiguous() once, when loading)"
CACHE_MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"k_cache": torch.zeros(4, 5, 2, 8).half()}, "k_cache: found dtype float16; expected float32"),
    ({"v_cache": torch.zeros(4, 5, 2, 8).double()}, "v_cache: found dtype float64; expected float32"),
    ({"v_cache": torch.zeros(4, 6, 2, 8)}, "v_cache: found shape [4, 6, 2, 8]; expected [4, 5, 2, 8]"),
    ({"k_cache": torch.zeros(4, 5, 16).view(4, 5, 8, 2).mT}, f"k_cache: found strides [80, 16, 1, 2]; {STRIDES}"),
    ({"v_cache": torch.zeros(4, 5, 2, 16)[..., :8]}, f"v_cache: found strides [160, 32, 16, 1]; {STRIDES}"),
    ({"positions": None}, "positions: found None; expected positions and cos_sin together"),
    ({"cos_sin": None}, "cos_sin: found None; expected positions and cos_sin together"),
    ({"positions": torch.zeros(3)}, "positions: found dtype float32; expected int32"),
    ({"cos_sin": torch.zeros(9, 6).double()}, "cos_sin: found dtype float64; expected float32"),
    ({"positions": torch.zeros(2).int()}, "positions: found shape [2]; expected [3]"),
    ({"cos_sin": torch.zeros(9)}, "cos_sin: found shape [9]; expected [max_positions, rotary_dim]"),
    ({"cos_sin": torch.zeros(9, 5)}, "cos_sin: found rotary_dim 5; expected an even number of at most 8"),
    ({"cos_sin": torch.zeros(9, 10)}, "cos_sin: found rotary_dim 10; expected an even number of at most 8"),
    ({"cos_sin": torch.zeros(9, 12)[:, ::2]}, f"cos_sin: found strides [12, 2]; {STRIDES}"),
    ({"positions": torch.tensor([8, 0, 9]).int()}, "positions[2]: found 9; expected a position in [0, 9)"),
    ({"positions": torch.tensor([-1, 99, 9]).int()}, "positions[0]: found -1; expected a position in [0, 9)"),
]
WRITE_MISTAKES: list[tuple[dict[str, Any], str]] = [
    *CACHE_MISTAKES,
    ({"k": torch.zeros(3, 2, 8).long()}, "k: found dtype int64; expected float32, float64, bfloat16 or float16"),
    ({"v": torch.zeros(3, 2, 8).bfloat16()}, "v: found dtype bfloat16; expected float32"),
    ({"slot_mapping": torch.zeros(3).int()}, "slot_mapping: found dtype int32; expected int64"),
    ({"k": torch.zeros(3, 16)}, "k: found shape [3, 16]; expected [M, H_kv, D_h]"),
    ({"v": torch.zeros(3, 1, 8)}, "v: found shape [3, 1, 8]; expected [3, 2, 8]"),
    ({"k_cache": torch.zeros(4, 5, 2, 9)}, "k_cache: found shape [4, 5, 2, 9]; expected [num_pages, page_size, 2, 8]"),
    ({"slot_mapping": torch.zeros(4).long()}, "slot_mapping: found shape [4]; expected [3]"),
    (
        {"slot_mapping": torch.tensor([0, 20, -9])},
        "slot_mapping[1]: found 20; expected a slot in [0, 20), or -1 to skip the row",
    ),
    (
        {"slot_mapping": torch.tensor([0, -1, -2])},
        "slot_mapping[2]: found -2; expected a slot in [0, 20), or -1 to skip the row",
    ),
]
ATTENTION_MISTAKES: list[tuple[dict[str, Any], str]] = [
    *CACHE_MISTAKES,
    ({"q": torch.zeros(3, 4, 8).int()}, "q: found dtype int32; expected float32, float64, bfloat16 or float16"),
    ({"block_tables": torch.zeros(3, 2).long()}, "block_tables: found dtype int64; expected int32"),
    ({"context_lens": torch.zeros(3).long()}, "context_lens: found dtype int64; expected int32"),
    (
        {"k_cache": torch.zeros(4, 5, 2, 9)},
        "k_cache: found shape [4, 5, 2, 9]; expected [num_pages, page_size, H_kv, 8]",
    ),
    ({"q": torch.zeros(3, 5, 8)}, "q: found 5 heads; expected a multiple of k_cache's 2"),
    (
        {"k_cache": torch.zeros(4, 5, 0, 8), "v_cache": torch.zeros(4, 5, 0, 8)},
        "q: found 4 heads; expected a multiple of k_cache's 0",
    ),
    ({"context_lens": torch.zeros(2).int()}, "context_lens: found shape [2]; expected [3]"),
    (
        {"context_lens": torch.tensor([10, 0, 11]).int()},
        "context_lens[2]: found 11; expected a length in [0, 10], what block_tables hold",
    ),
    (
        {"context_lens": torch.tensor([10, -1, 11]).int()},
        "context_lens[1]: found -1; expected a length in [0, 10], what block_tables hold",
    ),
    ({"context_lens": torch.tensor([10, 0, 6]).int()}, "block_tables[2, 1]: found 99; expected a page in [0, 4)"),
    (
        {"block_tables": torch.tensor([[3, -2], [4, 4], [1, 4]]).int()},
        "block_tables[0, 1]: found -2; expected a page in [0, 4)",
    ),
]
MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    *(("write", mistake, message) for mistake, message in WRITE_MISTAKES),
    *(("attention", mistake, message) for mistake, message in ATTENTION_MISTAKES),
    *(("prefill", mistake, message) for mistake, message in ATTENTION_MISTAKES),
    ("attention", {"q": torch.zeros(3, 32)}, "q: found shape [3, 32]; expected [M, H, D_h]"),
    ("prefill", {"q": torch.zeros(3, 32)}, "q: found shape [3, 32]; expected [T, H, D_h]"),
    (
        "attention",
        {"block_tables": torch.zeros(2, 2).int()},
        "block_tables: found shape [2, 2]; expected [3, max_pages]",
    ),
    ("prefill", {"block_tables": torch.zeros(3).int()}, "block_tables: found shape [3]; expected [S, max_pages]"),
    ("prefill", {"query_start": torch.zeros(4).long()}, "query_start: found dtype int64; expected int32"),
    ("prefill", {"query_start": torch.zeros(3).int()}, "query_start: found shape [3]; expected [4]"),
    ("prefill", {"query_start": torch.tensor([1, 2, 2, 3]).int()}, "query_start[0]: found 1; expected 0"),
    (
        "prefill",
        {"query_start": torch.tensor([0, 2, 1, 3]).int()},
        "query_start[2]: found 1; expected at least 2, the entry before",
    ),
    (
        "prefill",
        {"query_start": torch.tensor([0, 2, 2, 4]).int()},
        "query_start[3]: found 4; expected 3, the number of queries",
    ),
    (
        "prefill",
        {"context_lens": torch.tensor([1, 0, 5]).int()},
        "context_lens[0]: found 1; expected at least 2, the queries of the sequence",
    ),
]
ARGUMENTS = {"write": write_arguments, "attention": attention_arguments, "prefill": prefill_arguments}


def in_order(name: str, arguments: dict[str, Any]) -> tuple[Any, ...]:
    schema = getattr(torch.ops.rrt, f"loop_kv_{name}").default._schema
    return tuple(arguments[argument.name] for argument in schema.arguments)


@pytest.mark.fallback
@BOTH
@pytest.mark.parametrize(("name", "mistake", "message"), MISTAKES, ids=[f"{m[0]} {m[2]}" for m in MISTAKES])
def test_a_bad_argument_is_named_with_what_was_found_and_expected(
    name: str, mistake: dict[str, Any], message: str, ops: Ops
) -> None:
    arguments = ARGUMENTS[name]()
    getattr(ops, name)(**arguments)
    with pytest.raises(RuntimeError) as error:
        getattr(ops, name)(**arguments | mistake)
    assert str(error.value).splitlines()[0] == f"rrt::loop_kv_{name}: {message}"


@BOTH
def test_rotation_of_float64_takes_a_float64_table(ops: Ops) -> None:
    arguments = attention_arguments()
    for name in ("q", "k_cache", "v_cache"):
        arguments[name] = arguments[name].double()
    with pytest.raises(RuntimeError, match="cos_sin: found dtype float32; expected float64"):
        ops.attention(**arguments)


@BOTH
def test_a_refused_write_writes_nothing(ops: Ops) -> None:
    arguments = write_arguments() | {"k": torch.ones(3, 2, 8), "slot_mapping": torch.tensor([0, 1, 20])}
    with pytest.raises(RuntimeError, match="slot_mapping"):
        ops.write(**arguments)
    assert not arguments["k_cache"].any()


@pytest.mark.fallback
@pytest.mark.parametrize("rope", [False, True], ids=["", "rope"])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_registration_passes_opcheck(name: str, rope: bool) -> None:
    arguments = ARGUMENTS[name]() | ({} if rope else {"positions": None, "cos_sin": None})
    torch.library.opcheck(getattr(torch.ops.rrt, f"loop_kv_{name}").default, in_order(name, arguments))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_fake_kernel_refuses_what_the_kernels_refuse(name: str) -> None:
    arguments = ARGUMENTS[name]()
    meta = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in arguments.items()}
    out = getattr(OPS, name)(**meta)
    assert name == "write" or (out.shape == (3, 4, 8) and out.dtype == torch.float32 and out.is_meta)
    with pytest.raises(RuntimeError, match=r"v_cache: found shape \[4, 6, 2, 8\]; expected \[4, 5, 2, 8\]"):
        getattr(OPS, name)(**meta | {"v_cache": torch.zeros(4, 6, 2, 8, device="meta")})
