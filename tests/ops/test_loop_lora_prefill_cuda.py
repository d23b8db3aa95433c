"""loop_lora_prefill's CUDA kernels on a GPU; test_cuda_prefill.cpp runs their bodies without one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rrt.ops import loop_lora_linear, loop_lora_prefill, loop_lora_prefill_reference
from tests.util.loop_lora import CASES, MISTAKES, Case, assert_matches_oracle, leaves, make_inputs, of_one_loop
from tests.util.native import DTYPES, on_gpu
from tests.util.rounding import unit_roundoff

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(20)]

# Shapes that the matrix kernel takes: all tiles, with rows, outputs and ranks that end within one.
MATRIX_CASES = [
    Case(m, k, n, 0, loops, bias, outs, ranks)
    for m in (1, 65, 300, 2050)
    for k, n, loops, bias, outs, ranks in (
        (2048, 2560, 2, False, (2048, 256, 256), (64, 64, 128)),
        (264, 8192, 3, True, (8192,), (40,)),
        (1024, 2048, 1, False, (2048,), (0,)),
        (512, 93, 4, "loops", (5, 0, 88), (512, 8, 0)),
    )
]


def poisoned_call(inputs: dict[str, Any], loop: int) -> Tensor:
    """Call the operator with output and scratch in memory that held NaN."""
    inputs = on_gpu(of_one_loop(inputs, loop))
    for size in (1 << 16, 1 << 20, 1 << 24):
        torch.full((size,), float("nan"), device="cuda")
    return loop_lora_prefill(**inputs).cpu()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_shape_matches_the_definition(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    inputs["loops"].fill_(case.num_loops - 1)
    assert_matches_oracle(poisoned_call(inputs, case.num_loops - 1), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", MATRIX_CASES, ids=str)
def test_the_matrix_kernel_matches_fp64(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    found = poisoned_call(inputs, case.num_loops - 1)
    assert found.dtype == dtype and found.isfinite().all()
    exact = {name: x.double() if isinstance(x, Tensor) else x for name, x in on_gpu(inputs).items()}
    expected = loop_lora_prefill_reference(**of_one_loop(exact, case.num_loops - 1)).cpu()
    tolerance = 2 * unit_roundoff(dtype)  # A x and the result are rounded once each
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("case", MATRIX_CASES[-4:], ids=str)
def test_a_row_is_bitwise_the_same_in_any_batch(case: Case) -> None:
    inputs = on_gpu(of_one_loop(make_inputs(case, torch.bfloat16), 0))
    whole = loop_lora_prefill(**inputs)
    for rows in ([0], [case.m - 1], list(range(case.m - 1, -1, -7)), [3] * 70):
        assert torch.equal(loop_lora_prefill(**{**inputs, "x": inputs["x"][rows]}), whole[rows])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_captured_graph_replays_with_new_rows(dtype: torch.dtype) -> None:
    inputs = on_gpu(of_one_loop(make_inputs(Case(200, 512, 1024, 64, num_loops=3), dtype), 2))
    loop_lora_prefill(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = loop_lora_prefill(**inputs)
    for _ in range(3):
        inputs["x"].normal_()
        graph.replay()
        assert torch.equal(output, loop_lora_prefill(**inputs))


def test_gradients_are_those_of_the_operator_for_rows_of_many_loops() -> None:
    inputs = on_gpu(make_inputs(Case(6, 24, 16, 8, bias=True), torch.float64))
    inputs["loops"].fill_(1)
    parameters = leaves(inputs)
    outputs = loop_lora_linear(**inputs), loop_lora_prefill(**of_one_loop(inputs, 1))
    theirs, ours = (torch.autograd.grad(y.square().sum(), parameters) for y in outputs)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [(mistake, message) for mistake, message in MISTAKES if "loops" not in mistake]
    + [({"loop": 2}, "loop: found 2; expected a loop in [0, 2)")],
)
def test_a_bad_argument_is_named_as_the_reference_names_it(mistake: dict[str, Any], message: str) -> None:
    inputs = {**of_one_loop(make_inputs(Case(4, 8, 6, 3), torch.float32), 1), **mistake}
    with pytest.raises(RuntimeError) as error:
        loop_lora_prefill(**on_gpu(inputs))
    assert str(error.value).splitlines()[0] == f"rrt::loop_lora_prefill: {message}"
