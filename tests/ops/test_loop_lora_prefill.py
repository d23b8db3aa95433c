"""loop_lora_prefill, where all rows have one loop: operator and reference against the oracle of loop_lora_linear."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from rrt.ops import loop_lora_linear, loop_lora_prefill, loop_lora_prefill_reference
from tests.util.loop_lora import (
    CASES,
    GRAD_CASES,
    MISTAKES,
    Case,
    assert_matches_oracle,
    leaves,
    make_inputs,
    of_one_loop,
    pack_arguments,
)
from tests.util.native import DTYPES
from tests.util.pairwise import pairwise

IMPLEMENTATIONS = {"op": loop_lora_prefill, "reference": loop_lora_prefill_reference}
BOTH = pytest.mark.parametrize("op", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


@pairwise(case=CASES, dtype=DTYPES, op=IMPLEMENTATIONS, exhaustive=("op",))
def test_matches_the_definition(case: Case, dtype: torch.dtype, op: Any) -> None:
    inputs = make_inputs(case, dtype)
    for loop in {0, case.num_loops - 1}:
        inputs["loops"].fill_(loop)
        assert_matches_oracle(op(**of_one_loop(inputs, loop)), inputs)


@BOTH
def test_only_the_loops_own_adapters_and_columns_are_read(op: Any) -> None:
    case = Case(5, 24, 10, 0, 3, bias="loops", segment_out=(6, 4), segment_rank=(3, 17))
    inputs = of_one_loop(make_inputs(case, torch.float32), 1)
    expected = op(**inputs)
    for name in ("bias", "lora_a", "lora_b"):
        inputs[name][[0, 2]] = float("nan")
    inputs["lora_b"][:, :6, 3:] = float("nan")
    assert torch.equal(op(**inputs), expected)


@BOTH
def test_x_of_any_strides_is_accepted(op: Any) -> None:
    inputs = make_inputs(Case(6, 18, 7, 4), torch.float32)
    inputs["loops"].fill_(1)
    wide = torch.full((6, 40), float("nan"))
    wide[:, 3:21] = inputs["x"]
    for x in (wide[:, 3:21], inputs["x"].T.contiguous().T):
        assert_matches_oracle(op(**of_one_loop({**inputs, "x": x}, 1)), inputs)


@BOTH
@pytest.mark.parametrize(
    ("mistake", "message"),
    [(mistake, message) for mistake, message in MISTAKES if "loops" not in mistake],
    ids=[message for mistake, message in MISTAKES if "loops" not in mistake],
)
def test_a_bad_argument_is_named_with_what_was_found_and_expected(
    mistake: dict[str, Any], message: str, op: Any
) -> None:
    inputs = of_one_loop({**make_inputs(Case(4, 8, 6, 3), torch.float32), **mistake}, 1)
    with pytest.raises(RuntimeError) as error:
        op(**inputs)
    assert str(error.value).splitlines()[0] == f"rrt::loop_lora_prefill: {message}"


@BOTH
@pytest.mark.parametrize("loop", [-1, 2])
def test_a_loop_out_of_range_is_refused(loop: int, op: Any) -> None:
    inputs = make_inputs(Case(4, 8, 6, 3), torch.float32)
    with pytest.raises(RuntimeError, match=rf"rrt::loop_lora_prefill: loop: found {loop}; expected a loop in \[0, 2\)"):
        op(**of_one_loop(inputs, loop))


@BOTH
def test_packed_weights_are_refused(op: Any) -> None:
    inputs = of_one_loop(pack_arguments(make_inputs(Case(4, 8, 6, 3), torch.float32)), 1)
    with pytest.raises(RuntimeError, match=r"weight: found shape \[1, 8, 32\]; expected \[N, 8\]"):
        op(**inputs)


@pytest.mark.parametrize("case", GRAD_CASES, ids=str)
def test_gradients_match_finite_differences(case: Case) -> None:
    inputs = of_one_loop(make_inputs(case, torch.float64), 1)
    leaves(inputs)
    assert torch.autograd.gradcheck(loop_lora_prefill, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(loop_lora_prefill, tuple(inputs.values()))


@pytest.mark.parametrize("case", GRAD_CASES, ids=str)
def test_gradients_are_those_of_the_operator_for_rows_of_many_loops(case: Case) -> None:
    inputs = make_inputs(case, torch.float64)
    inputs["loops"].fill_(1)
    parameters = leaves(inputs)
    outputs = loop_lora_linear(**inputs), loop_lora_prefill(**of_one_loop(inputs, 1))
    theirs, ours = (torch.autograd.grad(y.square().sum(), parameters) for y in outputs)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("case", [*GRAD_CASES, Case(0, 4, 3, 2)], ids=str)
def test_registration_passes_opcheck(case: Case) -> None:
    inputs = of_one_loop(make_inputs(case, torch.float32), 1)
    leaves(inputs)
    torch.library.opcheck(torch.ops.rrt.loop_lora_prefill.default, tuple(inputs.values()))


def test_the_fake_kernel_refuses_what_the_kernels_refuse() -> None:
    inputs = of_one_loop(make_inputs(Case(4, 8, 6, 3), torch.float32), 1)
    meta = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in inputs.items()}
    assert loop_lora_prefill(**meta).shape == (4, 6)
    with pytest.raises(RuntimeError, match=r"weight: found shape \[6, 9\]; expected \[N, 8\]"):
        loop_lora_prefill(**{**meta, "weight": torch.zeros(6, 9, device="meta")})


def test_a_cpu_is_not_warned_that_pytorchs_products_run() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loop_lora_prefill(**of_one_loop(make_inputs(Case(4, 8, 6, 3), torch.float32), 0))
