"""logit_statistics: the native kernel and the reference against a softmax in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rrt.ops import logit_statistics, logit_statistics_reference, pack_linear
from tests.util.native import DTYPES, needs_native, threads
from tests.util.pairwise import pairwise
from tests.util.rounding import sum_error, unit_roundoff

Statistics = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
IMPLEMENTATIONS = {"op": logit_statistics, "reference": logit_statistics_reference}
BOTH = pytest.mark.parametrize("statistics", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


def inputs(rows: int, outputs: int, columns: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Make x [rows, columns] and W [outputs, columns], small enough for logits of about 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    weight = torch.randn(outputs, columns, generator=generator, dtype=torch.float64)
    return x.to(dtype), (weight * max(1, columns) ** -0.5).to(dtype)


def check(statistics: Statistics, x: Tensor, weight: Tensor) -> None:
    log_sum_exp, argmax = statistics(x, pack_linear(weight), len(weight))
    logits = x.double() @ weight.double().T
    assert log_sum_exp.dtype == torch.promote_types(x.dtype, torch.float32) and argmax.dtype == torch.int64
    # A logit's error becomes the logarithm's; so does the relative error of the sum of exponentials.
    magnitudes = x.double().abs() @ weight.double().abs().T
    error = sum_error(x.dtype, x.shape[1]) * magnitudes.amax(1)
    expected = logits.logsumexp(1)
    rounding = unit_roundoff(log_sum_exp.dtype) * (expected.abs() + 1)
    assert torch.all((log_sum_exp - expected).abs() <= error + sum_error(x.dtype, len(weight)) + rounding)
    # Where two logits are equal but for rounding, either is the largest.
    assert torch.all(logits.amax(1) - logits.gather(1, argmax[:, None])[:, 0] <= 2 * error)


@pytest.mark.isa
@pairwise(
    shape=[(1, 1, 1), (3, 31, 40), (13, 33, 129), (200, 1025, 64), (5, 2100, 17), (0, 40, 8)],
    dtype=DTYPES,
    statistics=IMPLEMENTATIONS,
    exhaustive=("op",),
)
def test_matches_the_definition(shape: tuple[int, int, int], dtype: torch.dtype, statistics: Statistics) -> None:
    check(statistics, *inputs(*shape, dtype))


@pytest.mark.fallback
@pytest.mark.isa
@settings(max_examples=30)
@given(
    rows=st.integers(1, 30),
    outputs=st.integers(1, 1200),
    columns=st.integers(0, 150),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_matches_the_definition_for_any_shape(
    rows: int, outputs: int, columns: int, dtype: torch.dtype, seed: int
) -> None:
    check(logit_statistics, *inputs(rows, outputs, columns, dtype, seed))


@pytest.mark.isa
@BOTH
def test_the_argmax_is_the_first_of_equals(statistics: Statistics) -> None:
    weight = torch.zeros(3000, 4)
    weight[[70, 71, 1500, 2999]] = 1.0
    x = torch.tensor([[1.0, 0, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 0]])
    assert statistics(x, pack_linear(weight), 3000)[1].tolist() == [70, 0, 0]


@pytest.mark.isa
@BOTH
def test_logits_far_from_zero_neither_overflow_nor_vanish(statistics: Statistics) -> None:
    weight = torch.linspace(-1, 1, 2100)[:, None]
    x = torch.tensor([[1e4], [-1e4], [3e38]])
    log_sum_exp, argmax = statistics(x, pack_linear(weight), 2100)
    assert argmax.tolist() == [2099, 0, 2099]
    torch.testing.assert_close(log_sum_exp, torch.tensor([1e4, 1e4, 3e38]), rtol=1e-5, atol=0)


@pytest.mark.isa
@BOTH
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001, 0x7F800000], ids=hex)  # NaNs and infinity
def test_nan_and_infinity_stay_in_their_row(bits: int, statistics: Statistics) -> None:
    x, weight = inputs(3, 100, 8, torch.float32)
    bad = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for place in (0, 40, 99) if bad.isnan() else ():  # infinity may make a logit of minus infinity, which is no harm
        broken = weight.clone()
        broken[place, 2] = bad
        assert not statistics(x, pack_linear(broken), 100)[0].isfinite().any()
    x[1, 2] = bad
    assert statistics(x, pack_linear(weight), 100)[0].isfinite().tolist() == [True, False, True]


@pytest.mark.isa
@BOTH
@pytest.mark.parametrize("place", [32, 40, 47, 48, 49])
def test_beside_nan_the_largest_is_one_of_the_logits(place: int, statistics: Statistics) -> None:
    x, weight = torch.ones(1, 1), torch.arange(50.0)[:, None] % 32
    weight[33], weight[place] = 40.0, torch.nan
    assert 0 <= int(statistics(x, pack_linear(weight), 50)[1]) < 50


@pytest.mark.isa
@BOTH
@pytest.mark.parametrize("outputs", [32, 33, 70])
def test_rows_of_minus_infinity_have_no_sum(outputs: int, statistics: Statistics) -> None:
    x = torch.tensor([[-float("inf")], [1.0]])
    log_sum_exp = statistics(x, pack_linear(torch.ones(outputs, 1)), outputs)[0]
    assert not log_sum_exp[0].isfinite() and log_sum_exp[1].isfinite()


@pytest.mark.isa
@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_bitwise_the_same_in_any_batch_and_with_any_threads(dtype: torch.dtype) -> None:
    x, weight = inputs(210, 1500, 590, dtype)
    packed = pack_linear(weight)
    whole = logit_statistics(x, packed, 1500)
    for number in (1, 3):
        with threads(number):
            for rows in (slice(0, 1), slice(7, 30), slice(0, 210)):
                part = logit_statistics(x[rows], packed, 1500)
                assert all(torch.equal(one, other[rows]) for one, other in zip(part, whole, strict=True))


@BOTH
def test_rows_of_any_strides_are_accepted(statistics: Statistics) -> None:
    x, weight = inputs(10, 50, 12, torch.float32)
    packed = pack_linear(weight)
    expected = statistics(x, packed, 50)
    apart, across = torch.zeros(10, 40), x.T.contiguous().T
    apart[:, 3:15] = x
    for other in (apart[:, 3:15], across):
        for one, two in zip(statistics(other, packed, 50), expected, strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.fallback
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, "x: found dtype int64; expected float32, float64, bfloat16"),
        ({"x": torch.zeros(2, 8, dtype=torch.float64)}, "packed: found dtype float32; expected float64"),
        ({"x": torch.zeros(8)}, r"x: found shape \[8\]; expected \[M, K\]"),
        ({"x": torch.zeros(2, 9)}, r"packed: found shape \[2, 8, 32\]; expected \[2, 9, 32\]"),
        ({"num_logits": 65}, r"packed: found shape \[2, 8, 32\]; expected \[3, 8, 32\]"),
        ({"num_logits": 0}, "num_logits: found 0; expected at least 1"),
        ({"packed": torch.zeros(2, 32, 8).mT}, r"packed: found strides \[256, 1, 8\]; expected a contiguous tensor"),
    ],
)
def test_a_bad_argument_is_named_with_what_was_found_and_expected(mistake: dict[str, Any], message: str) -> None:
    x, weight = inputs(2, 64, 8, torch.float32)
    given = {"x": x, "packed": pack_linear(weight), "num_logits": 64, **mistake}
    meta = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in given.items()}
    for run in (
        lambda: torch.ops.rrt.logit_statistics(**given),
        lambda: logit_statistics_reference(*given.values()),
        lambda: torch.ops.rrt.logit_statistics(**meta),
    ):
        with pytest.raises(RuntimeError, match=f"rrt::logit_statistics: {message}"):
            run()


def test_a_gradient_is_refused() -> None:
    x, weight = inputs(3, 40, 7, torch.float32)
    log_sum_exp, _ = logit_statistics(x.requires_grad_(), pack_linear(weight), 40)
    with pytest.raises(RuntimeError, match="rrt::logit_statistics: has no gradient"):
        log_sum_exp.sum().backward()


@pytest.mark.fallback
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration_passes_opcheck(dtype: torch.dtype) -> None:
    x, weight = inputs(3, 40, 7, dtype)
    torch.library.opcheck(torch.ops.rrt.logit_statistics.default, (x, pack_linear(weight), 40))
