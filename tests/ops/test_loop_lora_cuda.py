"""loop_lora_linear's CUDA kernels on a GPU, over the CPU's grid; test_cuda_decode.cpp runs their bodies without one."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rrt.native import force_order, force_tiling
from rrt.ops import loop_lora_linear, loop_lora_linear_reference
from tests.util.loop_lora import CASES, Case, assert_matches_oracle, make_inputs
from tests.util.native import DTYPES, on_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(20)]

# Shapes that the tensor-core kernel takes, narrow and wide tiles, and more rows than a tile has tokens.
DECODE_CASES = [
    Case(m, k, n, 0, loops, bias, outs, ranks)
    for m in (1, 7, 8, 16, 31, 64, 130)
    for k, n, loops, bias, outs, ranks in (
        (2048, 2560, 2, False, (2048, 256, 256), (64, 64, 64)),
        (264, 8192, 3, True, (8192,), (40,)),
        (1024, 2048, 1, False, (2048,), (0,)),
        (512, 96, 4, "loops", (96,), (512,)),
        (16384, 192, 2, False, (192,), (64,)),  # shrink is split over its parts
    )
]

NOTHING_TO_MULTIPLY = [Case(0, 64, 32, 8, bias=True), Case(3, 0, 32, 8, bias=True)]


def poisoned_call(inputs: dict[str, Any]) -> Tensor:
    """Call the operator with output and scratch in memory that held NaN."""
    for size in (1 << 16, 1 << 20, 1 << 24):
        torch.full((size,), float("nan"), device="cuda")
    return loop_lora_linear(**on_gpu(inputs)).cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_the_definition(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    assert_matches_oracle(poisoned_call(inputs), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*DECODE_CASES, *NOTHING_TO_MULTIPLY], ids=str)
def test_the_tensor_core_kernel_matches_the_definition(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    assert_matches_oracle(poisoned_call(inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [DECODE_CASES[25], DECODE_CASES[29], CASES[5], CASES[11]], ids=str)
def test_a_row_is_bitwise_the_same_in_any_batch(case: Case, dtype: torch.dtype) -> None:
    inputs = on_gpu(make_inputs(case, dtype))
    whole = loop_lora_linear(**inputs)
    m = case.m
    for rows in ([0], [m - 1], [m // 2, 0], list(range(m - 1, -1, -1)), [m // 3] * 9, [0, m - 1] * 50):
        part = loop_lora_linear(**{**inputs, "x": inputs["x"][rows], "loops": inputs["loops"][rows]})
        assert torch.equal(part, whole[rows]), rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_strides_and_address_of_x_change_no_bit(dtype: torch.dtype) -> None:
    inputs = on_gpu(make_inputs(Case(5, 512, 96, 40), dtype))
    x = inputs["x"]
    expected = loop_lora_linear(**inputs)
    wide = torch.full((5, 601), float("nan"), device="cuda", dtype=dtype)
    wide[:, 3:515] = x
    shifted = torch.empty(5 * 512 + 1, device="cuda", dtype=dtype)[1:].view(5, 512)
    for other in (wide[:, 3:515], shifted.copy_(x), x.T.contiguous().T):
        assert torch.equal(loop_lora_linear(**{**inputs, "x": other}), expected)
        first = {**inputs, "x": other[:1], "loops": inputs["loops"][:1]}
        assert torch.equal(loop_lora_linear(**first), expected[:1])


def test_rows_that_overlap_are_copied_into_rows() -> None:
    inputs = on_gpu(make_inputs(Case(2, 64, 32, 8), torch.bfloat16))
    inputs["x"] = inputs["x"].flatten().unfold(0, 64, 1)[:2]  # of which clone makes columns
    dense = inputs["x"].contiguous()
    assert torch.equal(loop_lora_linear(**inputs), loop_lora_linear(**{**inputs, "x": dense}))


@pytest.mark.parametrize("m", [1, 16, 31, 64, 130])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_tiling_gives_the_same_bits(dtype: torch.dtype, m: int) -> None:
    inputs = on_gpu(make_inputs(Case(m, 2056, 2560, 0, 2, True, (2048, 256, 256), (64, 72, 8)), dtype))
    try:
        force_tiling(0, 1)
        expected = loop_lora_linear(**inputs)
        for tile_rows in (64, 128):
            for slices in (1, 2, 4, 8):
                for order in (0, 1):
                    force_tiling(tile_rows, slices)
                    force_order(order)
                    assert torch.equal(loop_lora_linear(**inputs), expected), (tile_rows, slices, order)
    finally:
        force_tiling(0, 0)
        force_order(-1)
    assert torch.equal(loop_lora_linear(**inputs), expected)


@pytest.mark.parametrize(
    "m, k, n, dtype", [(8400, 64, 256000, torch.bfloat16), (600000, 16, 8, torch.float32)], ids=["outputs", "rows"]
)
def test_more_than_32_bits_or_a_grid_dimension_hold(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.float32).to(dtype)

    inputs = {"weight": normal(n, k), "bias": None, "lora_a": normal(2, 8, k), "lora_b": normal(2, n, 8)}
    x, loops = normal(m, k), torch.arange(m, device="cuda", dtype=torch.int32) % 2
    whole = loop_lora_linear(x=x, loops=loops, **inputs)
    rows = [0, 1, m // 2, m - 2, m - 1]
    assert torch.equal(loop_lora_linear(x=x[rows], loops=loops[rows], **inputs), whole[rows])


def test_a_loop_out_of_range_makes_its_row_nan_and_no_other() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        inputs = on_gpu(make_inputs(Case(5, 64, 32, 8), dtype))
        expected = loop_lora_linear(**inputs)
        for bad in (2, -1, 31, 1 << 30):
            loops = inputs["loops"].clone()
            loops[3] = bad
            result = loop_lora_linear(**{**inputs, "loops": loops})
            assert result[3].isnan().all() and torch.equal(result[[0, 1, 2, 4]], expected[[0, 1, 2, 4]])


def test_a_captured_graph_replays_with_new_rows_and_loops() -> None:
    inputs = on_gpu(make_inputs(Case(16, 512, 1024, 64, num_loops=3), torch.bfloat16))
    loop_lora_linear(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = loop_lora_linear(**inputs)
    for seed in range(3):
        fresh = on_gpu(make_inputs(Case(16, 512, 1024, 64, num_loops=3), torch.bfloat16, seed))
        inputs["x"].copy_(fresh["x"])
        inputs["loops"].copy_(fresh["loops"])
        graph.replay()
        assert torch.equal(output, loop_lora_linear(**inputs))


def test_streams_do_not_disturb_each_other() -> None:
    calls = [on_gpu(make_inputs(Case(8, 1024, 2048, 128, num_loops=2), torch.bfloat16, seed)) for seed in range(4)]
    expected = [loop_lora_linear(**call) for call in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    results: list[list[Tensor]] = [[] for _ in calls]
    for _ in range(50):
        for call, stream, result in zip(calls, streams, results, strict=True):
            with torch.cuda.stream(stream):
                result.append(loop_lora_linear(**call))
    torch.cuda.synchronize()
    for result, want in zip(results, expected, strict=True):
        assert all(torch.equal(one, want) for one in result)


def test_gradients_are_those_of_the_reference() -> None:
    inputs = on_gpu(make_inputs(Case(6, 24, 16, 8, bias=True), torch.float64))
    names = ("x", "weight", "bias", "lora_a", "lora_b")
    gradients = []
    for op in (loop_lora_linear, loop_lora_linear_reference):
        leaves = {name: inputs[name].clone().requires_grad_() for name in names}
        op(**{**inputs, **leaves}).square().sum().backward()
        gradients.append([leaves[name].grad for name in names])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_without_dependent_launches_the_bits_are_the_same() -> None:
    program = (
        "import torch; from tests.util.loop_lora import Case, make_inputs\n"
        "from tests.util.native import on_gpu\n"
        "from rrt.ops import loop_lora_linear\n"
        "y = loop_lora_linear(**on_gpu(make_inputs(Case(16, 2048, 2048, 64), torch.bfloat16)))\n"
        "print(hash(y.cpu().view(torch.int16).numpy().tobytes()))"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=Path(__file__).parents[2],
            env={**os.environ, "RRT_PDL": switch, "PYTHONHASHSEED": "0"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for switch in ("0", "1")
    ]
    assert outputs[0] == outputs[1]
