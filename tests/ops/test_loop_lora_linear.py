"""loop_lora_linear and pack_linear: native kernels and references against a row-by-row float64 oracle."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rrt.ops import build_info, loop_lora_linear, loop_lora_linear_reference, pack_linear, pack_linear_reference
from tests.util.loop_lora import CASES, GRAD_CASES, MISTAKES, Case, assert_matches_oracle, make_inputs, pack_arguments
from tests.util.native import DTYPES, needs_native, threads
from tests.util.pairwise import pairwise


def packed_op(**inputs: Any) -> Tensor:
    return loop_lora_linear(**pack_arguments(inputs))


def packed_reference(**inputs: Any) -> Tensor:
    return loop_lora_linear_reference(**pack_arguments(inputs))


IMPLEMENTATIONS = {
    "op": loop_lora_linear,
    "packed": packed_op,
    "reference": loop_lora_linear_reference,
    "packed_reference": packed_reference,
}
BOTH = pytest.mark.parametrize("op", [loop_lora_linear, loop_lora_linear_reference], ids=["op", "reference"])
NATIVE = pytest.mark.parametrize("op", [loop_lora_linear, packed_op], ids=["op", "packed"])
ALL = pytest.mark.parametrize("op", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


@pytest.mark.isa
@pairwise(case=CASES, dtype=DTYPES, op=IMPLEMENTATIONS, exhaustive=("op", "packed"))
def test_matches_the_definition(case: Case, dtype: torch.dtype, op: Any) -> None:
    inputs = make_inputs(case, dtype)
    assert_matches_oracle(op(**inputs), inputs)


@pytest.mark.fallback
@settings(max_examples=30)
@given(
    m=st.integers(0, 12),
    k=st.integers(1, 70),
    outs_and_ranks=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 20)), min_size=1, max_size=4),
    num_loops=st.integers(1, 4),
    bias=st.sampled_from([False, True, "loops"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**16),
)
def test_matches_the_definition_for_any_shape(
    m: int,
    k: int,
    outs_and_ranks: list[tuple[int, int]],
    num_loops: int,
    bias: bool | str,
    dtype: torch.dtype,
    seed: int,
) -> None:
    outs, ranks = zip(*outs_and_ranks, strict=True)
    inputs = make_inputs(Case(m, k, sum(outs), 0, num_loops, bias, outs, ranks), dtype, seed)
    assert_matches_oracle(loop_lora_linear(**inputs), inputs)
    assert_matches_oracle(packed_op(**inputs), inputs)


@ALL
@pytest.mark.parametrize("loops", [[1] * 9, [2, 0, 1], list(range(8))], ids=str)
def test_all_rows_of_one_loop_or_each_of_its_own(loops: list[int], op: Any) -> None:
    inputs = make_inputs(Case(len(loops), 50, 21, 9, num_loops=8, bias=True), torch.float32)
    inputs["loops"] = torch.tensor(loops, dtype=torch.int32)
    assert_matches_oracle(op(**inputs), inputs)


@pytest.mark.isa
@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_and_unpacked_weights_give_the_same_bits(case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    assert torch.equal(packed_op(**inputs), loop_lora_linear(**inputs))


@needs_native
@NATIVE
def test_every_output_is_written(op: Any) -> None:
    inputs = make_inputs(Case(13, 64, 77, 5), torch.float32)
    for _ in range(3):
        # The allocator hands a freed block of this size out again.
        torch.full((13, 77), float("nan"))
        assert op(**inputs).isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (32, 8), (33, 7), (70, 131), (3, 40, 6), (2, 0, 5), (2, 5, 0)], ids=str)
def test_packing_puts_the_outputs_of_a_panel_side_by_side(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = torch.randn(shape).to(dtype)
    packed = pack_linear(weight)
    assert torch.equal(packed, pack_linear_reference(weight))
    *_, n, k = shape
    width = 2 if dtype == torch.bfloat16 else 1
    assert packed.shape == (*shape[:-2], -(-n // 32), -(-k // width), 32 * width)
    matrices, panels = (weight, packed) if weight.dim() == 3 else (weight[None], packed[None])
    assert packed.count_nonzero() == weight.count_nonzero()
    for i in range(0, n, 5):
        for j in range(0, k, 3):
            got = panels[:, i // 32, j // width, i % 32 * width + j % width]
            assert torch.equal(got, matrices[:, i, j])


@pytest.mark.isa
@needs_native
@NATIVE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_bitwise_the_same_in_any_batch(dtype: torch.dtype, op: Any) -> None:
    case = Case(23, 590, 37, 0, 3, True, (20, 17), (9, 300))
    inputs = make_inputs(case, dtype)
    whole = op(**inputs)
    few = ([5, 1, 22, 9], [4, 17, 2, 11, 20, 3, 8], list(range(8, 16)))  # other tiles than one row or many
    for rows in ([0], [7], [3, 4], [22, 0, 11], *few, list(range(22, -1, -1)), [5] * 9, [1, 22, 8] * 70):
        part = op(**{**inputs, "x": inputs["x"][rows], "loops": inputs["loops"][rows]})
        assert torch.equal(part, whole[rows]), rows


@needs_native
@NATIVE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype, op: Any) -> None:
    inputs = make_inputs(Case(6, 700, 301, 40, 2), dtype)
    with threads(1):
        single = op(**inputs)
    for several in (2, 4):
        with threads(several):
            assert torch.equal(op(**inputs), single)


@pytest.mark.isa
@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_value_survives_and_sums_round_to_nearest_even(dtype: torch.dtype) -> None:
    values = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    inputs = make_inputs(Case(2**16, 1, 3, 0, bias=True), dtype)
    inputs["weight"] = torch.ones(3, 1, dtype=dtype)
    inputs["bias"] = torch.tensor([0, 1.0, 3e-5], dtype=dtype)
    inputs["x"] = values.unsqueeze(1)
    x = inputs["x"].float()
    if dtype == torch.bfloat16 and build_info().cpu_isa in ("avx512_bf16", "amx_bf16"):
        x = torch.where(x.abs() < torch.finfo(dtype).tiny, 0.0, x)  # the instruction takes subnormals for zeros
    expected = (x + inputs["bias"].float()).to(dtype)
    torch.testing.assert_close(loop_lora_linear(**inputs), expected, rtol=0, atol=0, equal_nan=True)


@ALL
def test_other_loops_adapters_are_never_read(op: Any) -> None:
    inputs = make_inputs(Case(5, 24, 10, 6, num_loops=3), torch.float32)
    inputs["loops"].fill_(1)
    expected = op(**inputs)
    for name in ("lora_a", "lora_b"):
        inputs[name][0] = float("nan")
        inputs[name][2] = float("inf")
    assert torch.equal(op(**inputs), expected)


@BOTH
def test_columns_of_lora_b_beyond_a_segments_rank_are_never_read(op: Any) -> None:
    inputs = make_inputs(Case(5, 24, 10, 0, 2, segment_out=(6, 4), segment_rank=(3, 17)), torch.float32)
    expected = op(**inputs)
    inputs["lora_b"][:, :6, 3:] = float("nan")
    assert torch.equal(op(**inputs), expected)


@ALL
def test_x_and_loops_of_any_strides_are_accepted(op: Any) -> None:
    inputs = make_inputs(Case(6, 18, 7, 4), torch.float32)
    wide = torch.full((6, 40), float("nan"))
    wide[:, 3:21] = inputs["x"]
    every_other = torch.zeros(12, dtype=torch.int32)
    every_other[::2] = inputs["loops"]
    for x in (wide[:, 3:21], inputs["x"].T.contiguous().T):
        assert_matches_oracle(op(**{**inputs, "x": x, "loops": every_other[::2]}), inputs)
    same_rows = {**inputs, "x": inputs["x"][:1].expand(6, 18), "loops": inputs["loops"][:1].expand(6)}
    assert_matches_oracle(op(**same_rows), same_rows)


@pytest.mark.fallback
@BOTH
@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_bad_argument_is_named_with_what_was_found_and_expected(
    mistake: dict[str, Any], message: str, op: Any
) -> None:
    inputs = {**make_inputs(Case(4, 8, 6, 3), torch.float32), **mistake}
    with pytest.raises(RuntimeError) as error:
        op(**inputs)
    assert str(error.value).splitlines()[0] == f"rrt::loop_lora_linear: {message}"


PACKED_MISTAKES: list[tuple[dict[str, Any], str]] = [
    (
        {"segment_out": [], "segment_rank": []},
        "segment_out: found []; expected the packed weight's segments (one of all its rows, if there is one)",
    ),
    ({"segment_out": [33]}, "weight: found shape [1, 8, 32]; expected [2, 8, 32]"),
    ({"x": torch.zeros(4, 7)}, "weight: found shape [1, 8, 32]; expected [1, 7, 32]"),
    ({"lora_a": torch.zeros(2, 3, 8)}, "lora_a: found shape [2, 3, 8]; expected [loops, 1, 8, 32]"),
    ({"lora_b": torch.zeros(2, 6, 3)}, "lora_b: found shape [2, 6, 3]; expected [2, 1, 3, 32]"),
    ({"segment_rank": [4]}, "lora_b: found shape [2, 1, 3, 32]; expected [2, 1, 4, 32]"),
    ({"segment_rank": [-3]}, "segment_rank: found [-3]; expected no negative entry"),
    ({"segment_out": [6, 0]}, "segment_rank: found 1 entries; expected 2 as in segment_out"),
]


@pytest.mark.fallback
@BOTH
@pytest.mark.parametrize(("mistake", "message"), PACKED_MISTAKES, ids=[message for _, message in PACKED_MISTAKES])
def test_a_bad_packed_argument_is_named_too(mistake: dict[str, Any], message: str, op: Any) -> None:
    inputs = {**pack_arguments(make_inputs(Case(4, 8, 6, 3), torch.float32)), **mistake}
    with pytest.raises(RuntimeError) as error:
        op(**inputs)
    assert str(error.value).splitlines()[0] == f"rrt::loop_lora_linear: {message}"


@pytest.mark.fallback
@pytest.mark.parametrize("pack", [pack_linear, pack_linear_reference], ids=["op", "reference"])
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(4), "weight: found shape [4]; expected [N, K]"),
        (torch.zeros(4, 4).int(), "weight: found dtype int32; expected float32, float64, bfloat16 or float16"),
        (
            torch.zeros(4, 3).T,
            "weight: found strides [1, 3]; expected a contiguous tensor (call .contiguous() once, when loading)",
        ),
    ],
    ids=["shape", "dtype", "strides"],
)
def test_an_unpackable_weight_is_refused_by_name(weight: Tensor, message: str, pack: Any) -> None:
    with pytest.raises(RuntimeError) as error:
        pack(weight)
    assert str(error.value).splitlines()[0] == f"rrt::pack_linear: {message}"


def test_packed_weights_refuse_gradients() -> None:
    inputs = pack_arguments(make_inputs(Case(4, 8, 6, 3), torch.float32))
    inputs["x"].requires_grad_()
    with pytest.raises(RuntimeError, match="packed weights have no gradients; call it under"):
        loop_lora_linear(**inputs)
    with torch.no_grad():
        loop_lora_linear(**inputs)


def differentiable(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    inputs = make_inputs(case, dtype)
    return tuple(
        value.requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in inputs.values()
    )


@pytest.mark.fallback
@pytest.mark.parametrize("case", GRAD_CASES, ids=str)
def test_gradients_match_finite_differences(case: Case) -> None:
    # lora_b's columns beyond a segment's rank have zero gradient, which finite differences confirm.
    assert torch.autograd.gradcheck(loop_lora_linear, differentiable(case))
    assert torch.autograd.gradgradcheck(loop_lora_linear, differentiable(case))


@pytest.mark.fallback
def test_one_loops_infinities_stay_out_of_the_others_gradients() -> None:
    inputs = make_inputs(Case(6, 8, 5, 3, 2), torch.float64)
    inputs["loops"] = torch.tensor([0, 1, 0, 1, 0, 0], dtype=torch.int32)
    inputs["lora_a"][1] = torch.inf
    inputs["x"][3] = torch.nan
    leaves = {name: inputs[name].clone().requires_grad_() for name in ("x", "lora_a", "lora_b")}
    loop_lora_linear(**{**inputs, **leaves}).sum().backward()
    assert leaves["x"].grad[inputs["loops"] == 0].isfinite().all()
    assert leaves["lora_a"].grad[0].isfinite().all() and leaves["lora_b"].grad[0].isfinite().all()


@pytest.mark.parametrize("wanted", range(5))
def test_each_gradient_comes_alone_too(wanted: int) -> None:
    arguments = differentiable(GRAD_CASES[0])
    everything = torch.autograd.grad(loop_lora_linear(*arguments).square().sum(), arguments[:5])
    alone = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    alone[wanted].requires_grad_()
    (gradient,) = torch.autograd.grad(loop_lora_linear(*alone).square().sum(), [alone[wanted]])
    torch.testing.assert_close(gradient, everything[wanted])


@pytest.mark.fallback
@pytest.mark.parametrize("case", [GRAD_CASES[0], GRAD_CASES[1], replace(GRAD_CASES[0], m=0)], ids=str)
def test_registration_passes_opcheck(case: Case) -> None:
    torch.library.opcheck(torch.ops.rrt.loop_lora_linear.default, differentiable(case, torch.float32))


@pytest.mark.fallback
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_registration_of_packed_weights_passes_opcheck(dtype: torch.dtype) -> None:
    inputs = make_inputs(Case(4, 9, 40, 3, bias=True), dtype)
    torch.library.opcheck(torch.ops.rrt.pack_linear.default, (inputs["lora_a"],))
    torch.library.opcheck(torch.ops.rrt.loop_lora_linear.default, tuple(pack_arguments(inputs).values()))


def test_the_fake_kernel_refuses_what_the_kernels_refuse() -> None:
    inputs = make_inputs(Case(4, 8, 6, 3), torch.float32)
    meta = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in inputs.items()}
    assert loop_lora_linear(**meta).shape == (4, 6)
    with pytest.raises(RuntimeError, match=r"weight: found shape \[6, 9\]; expected \[N, 8\]"):
        loop_lora_linear(**{**meta, "weight": torch.zeros(6, 9, device="meta")})
