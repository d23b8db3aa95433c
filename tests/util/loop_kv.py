"""Inputs of loop_kv_write, loop_kv_attention and loop_kv_prefill, and their float64 oracles."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.util.rounding import attention_error, unit_roundoff


@dataclass(frozen=True)
class Case:
    """Shapes of a batch: sequence s has `contexts[s]` positions, in prefill the last `chunks[s]` of them queries."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    contexts: tuple[int, ...]
    chunks: tuple[int, ...] = ()
    rotary_dim: int = 0


CASES = [
    Case(8, 1, 256, 16, (1, 17, 300), (1, 17, 21), rotary_dim=256),
    Case(8, 2, 64, 32, (33, 64, 5, 255), (33, 10, 0, 70), rotary_dim=64),
    Case(4, 4, 80, 64, (100, 1, 256, 257), (100, 1, 3, 2), rotary_dim=20),
    Case(6, 2, 128, 16, (600, 16), (65, 16)),
    Case(6, 3, 20, 1, (7, 70), (7, 66), rotary_dim=10),
    Case(18, 1, 64, 7, (65,), (2,)),
    Case(34, 2, 33, 5, (3, 129), (3, 30), rotary_dim=2),
    Case(3, 1, 1, 3, (4, 2), (4, 1)),
    Case(2, 1, 96, 16, (513, 0, 64), (5, 0, 64)),
    Case(2, 2, 16, 4, (), ()),
]


@dataclass
class Paged:
    """Filled caches and their block tables. All that no query may read is NaN, or a page that does not exist."""

    k: list[Tensor]
    v: list[Tensor]
    k_cache: Tensor
    v_cache: Tensor
    block_tables: Tensor
    context_lens: Tensor


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def make_paged(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Paged:
    pages = [-(-context // case.page_size) for context in case.contexts]
    num_pages = sum(pages) + 2
    cache = torch.full((num_pages, case.page_size, case.kv_heads, case.head_dim), float("nan"), dtype=dtype)
    order = torch.randperm(num_pages, generator=generator).tolist()
    tables = torch.tensor([-(2**31), 2**31 - 1, -1]).repeat(len(pages), max(pages, default=0) // 3 + 1).int()
    paged = Paged([], [], cache, cache.clone(), tables, torch.tensor(case.contexts, dtype=torch.int32))
    for s, context in enumerate(case.contexts):
        own = [order.pop() for _ in range(pages[s])]
        tables[s, : len(own)] = torch.tensor(own, dtype=torch.int32)
        for values, target in ((paged.k, paged.k_cache), (paged.v, paged.v_cache)):
            values.append(normal(generator, context, case.kv_heads, case.head_dim, dtype=dtype))
            position = torch.arange(context)
            target[torch.tensor(own, dtype=torch.int64)[position // case.page_size], position % case.page_size] = (
                values[s]
            )
    return paged


def make_rope(case: Case, positions: list[int], dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, Any]:
    """Make positions and cos_sin as the operators take them, of random numbers that tell cosines from sines."""
    if not case.rotary_dim:
        return None, None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    table = normal(generator, max(positions, default=0) + 1, case.rotary_dim, dtype=wide)
    return torch.tensor(positions, dtype=torch.int32), table


def decode_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[Paged, dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    paged = make_paged(case, dtype, generator)
    # A padding row's position lies outside the table.
    positions = [context - 1 for context in case.contexts]
    inputs = {
        "q": normal(generator, len(case.contexts), case.heads, case.head_dim, dtype=dtype),
        "k_cache": paged.k_cache,
        "v_cache": paged.v_cache,
        "block_tables": paged.block_tables,
        "context_lens": paged.context_lens,
        "scale": 0.7 * case.head_dim**-0.5,
    }
    return paged, inputs | dict(
        zip(("positions", "cos_sin"), make_rope(case, positions, dtype, generator), strict=True)
    )


def prefill_inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple[Paged, dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    paged = make_paged(case, dtype, generator)
    starts = [sum(case.chunks[:s]) for s in range(len(case.chunks) + 1)]
    positions = [p for n, c in zip(case.contexts, case.chunks, strict=True) for p in range(n - c, n)]
    inputs = {
        "q": normal(generator, starts[-1], case.heads, case.head_dim, dtype=dtype),
        "k_cache": paged.k_cache,
        "v_cache": paged.v_cache,
        "block_tables": paged.block_tables,
        "query_start": torch.tensor(starts, dtype=torch.int32),
        "context_lens": paged.context_lens,
        "scale": 0.7 * case.head_dim**-0.5,
    }
    return paged, inputs | dict(
        zip(("positions", "cos_sin"), make_rope(case, positions, dtype, generator), strict=True)
    )


def oracle_rope(x: Tensor, positions: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate x [M, heads, D_h] in float64, as complex numbers."""
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin.double()[positions.long()][:, None].chunk(2, dim=-1)
    turned = torch.complex(x[..., :half].double(), x[..., half : 2 * half].double()) * torch.complex(cos, sin)
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :].double()), dim=-1)


class Expected(NamedTuple):
    """A result in float64, and a bound of each element's error."""

    values: Tensor
    error: Tensor


def oracle(paged: Paged, inputs: dict[str, Any], starts: list[int]) -> Expected:
    """Attend in float64, sequence by sequence: queries [starts[s], starts[s + 1]) are the last positions of s."""
    q, scale, positions, cos_sin = (inputs[name] for name in ("q", "scale", "positions", "cos_sin"))
    expected = Expected(*(torch.zeros(q.shape, dtype=torch.float64) for _ in range(2)))
    for begin, end, k, v in zip(starts[:-1], starts[1:], paged.k, paged.v, strict=True):
        if begin == end or len(k) == 0:
            continue
        queries = q[begin:end].double()
        if cos_sin is not None:
            queries = oracle_rope(queries, positions[begin:end], cos_sin)
        queries = queries.transpose(0, 1)
        keys, values = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1) for x in (k, v))
        seen = torch.ones(end - begin, len(k), dtype=torch.bool).tril(len(k) - (end - begin))
        weights = (queries @ keys.mT * scale).masked_fill(~seen, float("-inf")).softmax(-1)
        error = attention_error(q.dtype, queries, keys, values, weights, scale)
        if cos_sin is not None:
            # The rotated query may be rounded to q's dtype, and its scores then err independently of each other.
            scores = (queries.square() @ keys.square().mT).sqrt().amax(-1, keepdim=True) * abs(scale)
            error = error + 2 * unit_roundoff(q.dtype) * scores * (weights.square() @ values.square()).sqrt()
        expected.values[begin:end], expected.error[begin:end] = (
            (weights @ values).transpose(0, 1),
            error.transpose(0, 1),
        )
    return expected


def oracle_decode(paged: Paged, inputs: dict[str, Any]) -> Expected:
    return oracle(paged, inputs, list(range(len(inputs["q"]) + 1)))


def oracle_prefill(paged: Paged, inputs: dict[str, Any]) -> Expected:
    return oracle(paged, inputs, inputs["query_start"].tolist())


def assert_close(actual: Tensor, expected: Expected, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype and actual.shape == expected.values.shape and actual.is_contiguous()
    assert (actual.double() - expected.values).norm() <= expected.error.norm()
