"""The key/value operators on a GPU, over the CPU's grid; test_cuda_attention.cpp runs their bodies without one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rrt.ops import loop_kv_attention, loop_kv_prefill, loop_kv_write, loop_kv_write_reference
from tests.util.loop_kv import CASES, Case, assert_close, decode_inputs, oracle_decode, oracle_prefill, prefill_inputs
from tests.util.native import DTYPES, on_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(20)]

LONG = Case(8, 1, 256, 16, (1, 255, 256, 257, 4096, 9000), rotary_dim=256)
GROUPED = Case(32, 4, 64, 16, (1500, 31, 700), (1500, 3, 50), rotary_dim=64)


def poison() -> None:
    for size in (1 << 16, 1 << 20, 1 << 24):
        torch.full((size,), float("nan"), device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, LONG, GROUPED], ids=str)
def test_decode_matches_the_definition(case: Case, dtype: torch.dtype) -> None:
    paged, inputs = decode_inputs(case, dtype)
    poison()
    assert_close(loop_kv_attention(**on_gpu(inputs)).cpu(), oracle_decode(paged, inputs), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, GROUPED], ids=str)
def test_prefill_matches_the_definition(case: Case, dtype: torch.dtype) -> None:
    paged, inputs = prefill_inputs(case, dtype)
    poison()
    assert_close(loop_kv_prefill(**on_gpu(inputs)).cpu(), oracle_prefill(paged, inputs), dtype)


@pytest.mark.parametrize("rotary_dim", [0, 20, 80])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_write_equals_the_reference(rotary_dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(7, 2, 80, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    rope: tuple[Any, Any] = (None, None)
    if rotary_dim:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        rope = (torch.arange(7, dtype=torch.int32), torch.randn(7, rotary_dim, generator=generator, dtype=wide))
    slots = torch.tensor([3, -1, 0, 47, 20, -1, 31])
    caches = [torch.zeros(3, 16, 2, 80, dtype=dtype) for _ in range(2)]
    on_device = [cache.cuda() for cache in caches]
    loop_kv_write_reference(k, v, *caches, slots, *rope)
    arguments = [value.cuda() if isinstance(value, Tensor) else value for value in (k, v, *on_device, slots, *rope)]
    loop_kv_write(*arguments)
    torch.testing.assert_close(arguments[2].cpu(), caches[0])
    assert torch.equal(arguments[3].cpu(), caches[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [LONG, GROUPED, CASES[4]], ids=str)
def test_a_decode_row_is_bitwise_the_same_in_any_batch(case: Case, dtype: torch.dtype) -> None:
    _, inputs = decode_inputs(case, dtype)
    inputs = on_gpu(inputs)
    whole = loop_kv_attention(**inputs)
    for rows in ([0], [len(case.contexts) - 1], list(range(len(case.contexts)))[::-1], [1] * 9):
        part = {
            name: value[rows]
            if name in ("q", "block_tables", "context_lens", "positions") and value is not None
            else value
            for name, value in inputs.items()
        }
        assert torch.equal(loop_kv_attention(**part), whole[rows]), rows


def test_a_page_that_is_not_there_makes_its_row_nan_and_no_other() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        _, inputs = decode_inputs(GROUPED, dtype)
        inputs = on_gpu(inputs)
        expected = loop_kv_attention(**inputs)
        inputs["block_tables"][1, 0] = 1 << 30
        result = loop_kv_attention(**inputs)
        assert result[1].isnan().all() and torch.equal(result[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_context_longer_than_its_table_makes_its_row_nan_and_no_other(dtype: torch.dtype) -> None:
    _, inputs = decode_inputs(GROUPED, dtype)
    inputs = on_gpu(inputs)
    expected = loop_kv_attention(**inputs)
    inputs["context_lens"][1] = 3000
    result = loop_kv_attention(**inputs)
    assert result[1].isnan().all() and torch.equal(result[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_without_a_page_are_zeros(dtype: torch.dtype) -> None:
    _, inputs = decode_inputs(GROUPED, dtype)
    inputs = on_gpu(inputs)
    inputs["context_lens"].zero_()
    inputs["block_tables"] = inputs["block_tables"][:, :0]
    assert (loop_kv_attention(**inputs) == 0).all()


def test_a_captured_graph_replays_with_new_queries_and_lengths() -> None:
    _, inputs = decode_inputs(GROUPED, torch.bfloat16)
    inputs = on_gpu(inputs)
    loop_kv_attention(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = loop_kv_attention(**inputs)
    for shorter in (0, 5, 20):
        inputs["q"].normal_()
        inputs["context_lens"].sub_(shorter)
        graph.replay()
        assert torch.equal(output, loop_kv_attention(**inputs))


def test_streams_do_not_disturb_each_other() -> None:
    calls = [on_gpu(decode_inputs(GROUPED, torch.bfloat16, seed)[1]) for seed in range(4)]
    expected = [loop_kv_attention(**call) for call in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    results: list[list[Tensor]] = [[] for _ in calls]
    for _ in range(50):
        for call, stream, result in zip(calls, streams, results, strict=True):
            with torch.cuda.stream(stream):
                result.append(loop_kv_attention(**call))
    torch.cuda.synchronize()
    for result, want in zip(results, expected, strict=True):
        assert all(torch.equal(one, want) for one in result)
