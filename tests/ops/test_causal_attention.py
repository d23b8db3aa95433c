"""causal_attention: the native kernels and the reference against float64."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rrt.checkpoint.presets import preset
from rrt.errors import UserError
from rrt.model.config import RecursiveConfig
from rrt.model.transformer import RecursiveTransformer
from rrt.ops import (
    causal_attention,
    causal_attention_backward_reference,
    causal_attention_reference,
    prefers_native_attention,
)
from rrt.ops.precision import pretend_device
from tests.util.native import DTYPES, needs_native, threads
from tests.util.pairwise import pairwise
from tests.util.rounding import sum_error, unit_roundoff, weight_error

Attention = Callable[..., Tensor]


class _Reference(torch.autograd.Function):
    """The references of both operators as one differentiable function."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, seen_until: Tensor | None = None) -> Tensor:
        out, lse = causal_attention_reference(q, k, v, scale, seen_until)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = scale, seen_until
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (*causal_attention_backward_reference(grad, *ctx.saved_tensors, *ctx.rest), None, None)


IMPLEMENTATIONS = {"op": causal_attention, "reference": _Reference.apply}
BOTH = pytest.mark.parametrize("attention", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


@dataclass(frozen=True)
class Case:
    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int


CASES = [
    Case(2, 70, 8, 1, 256),
    Case(1, 129, 4, 4, 64),
    Case(3, 65, 6, 2, 80),
    Case(1, 64, 2, 2, 128),
    Case(2, 2, 6, 3, 20),
    Case(1, 600, 2, 1, 33),
    Case(1, 200, 2, 2, 1),
    Case(2, 100, 10, 2, 24),
    Case(1, 70, 7, 1, 40),
]


def inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Make q, k, v and the gradient of the result."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    return [
        torch.randn(case.batch, case.length, heads, case.head_dim, generator=generator, dtype=torch.float64).to(dtype)
        for heads in sizes
    ]


def results(
    attention: Attention, tensors: list[Tensor], scale: float, seen_until: Tensor | None = None
) -> list[Tensor]:
    """Compute the result and the gradients of q, k and v."""
    *leaves, grad = tensors
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = attention(*leaves, scale, seen_until)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@dataclass(frozen=True)
class Expected:
    """The result and the gradients of q, k and v in float64, and for each a norm that its error may have."""

    values: list[Tensor]
    errors: list[float]


def expected(tensors: list[Tensor], scale: float, seen_until: Tensor | None = None) -> Expected:
    """Compute the result and the gradients of q, k and v by the definition.

    PyTorch's own function is no oracle: its kernel for CPUs makes NaN of a negative scale.
    """
    dtype, heads = tensors[0].dtype, tensors[1].shape[2]
    q, k, v, grad = (x.detach().double().transpose(1, 2) for x in tensors)
    k, v = (x.repeat_interleave(q.shape[1] // heads, 1) for x in (k, v))
    unseen = torch.ones(len(q), 1, q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    if seen_until is not None:
        for b, key in product(range(len(q)), range(q.shape[2])):
            unseen[b, 0, max(key + 1, int(seen_until[b, key])) :, key] = True
    p = (q @ k.mT * scale).masked_fill(unseen, float("-inf")).softmax(-1)
    p_grad = grad @ v.mT
    delta = (p * p_grad).sum(-1, keepdim=True)

    def in_order(p: Tensor, slope: Tensor, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
        own = [p @ v, slope @ k]
        shared = [x.unflatten(1, (heads, -1)).sum(2) for x in (slope.mT @ q, p.mT @ grad)]
        return [x.transpose(1, 2) for x in (*own, *shared)]

    # Sums accumulated wide err by their terms' magnitudes; roundings to `dtype`, of the result and of what is
    # multiplied, are independent of each other and add up by their squares.
    slope = p * ((grad.abs() @ v.abs().mT) + (p * p_grad.abs()).sum(-1, keepdim=True)) * abs(scale)
    magnitudes = in_order(p, slope, q.abs(), k.abs(), v.abs(), grad.abs())
    square = p.square() * (grad.square() @ v.square().mT + (p * p_grad).square().sum(-1, keepdim=True)) * scale**2
    squares = in_order(p.square(), square, q.square(), k.square(), v.square(), grad.square())
    values = in_order(p, p * (p_grad - delta) * scale, q, k, v, grad)
    wide = weight_error(dtype, q, k, scale) + sum_error(dtype, max(q.shape[2:]))
    rounding = unit_roundoff(dtype)
    errors = [
        float(wide * magnitude.norm() + rounding * (2 * value.norm() + 2 * square.sum().sqrt()))
        for value, magnitude, square in zip(values, magnitudes, squares, strict=True)
    ]
    return Expected(values, errors)


def assert_near(found: list[Tensor], wanted: Expected) -> None:
    for name, one, other, error in zip(("out", "q", "k", "v"), found, wanted.values, wanted.errors, strict=True):
        assert one.shape == other.shape
        assert float((one.double() - other).norm()) <= error, name


@pytest.mark.isa
@pairwise(case=CASES, dtype=DTYPES, attention=IMPLEMENTATIONS, exhaustive=("op",))
def test_matches_the_definition(case: Case, dtype: torch.dtype, attention: Attention) -> None:
    tensors, scale = inputs(case, dtype), case.head_dim**-0.5
    assert_near(results(attention, tensors, scale), expected(tensors, scale))


@pytest.mark.fallback
@settings(max_examples=30)
@given(
    case=st.builds(
        lambda batch, length, kv_heads, group, head_dim: Case(batch, length, kv_heads * group, kv_heads, head_dim),
        st.integers(1, 3),
        st.integers(2, 150),
        st.integers(1, 3),
        st.integers(1, 4),
        st.integers(1, 70),
    ),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.05, 0.3, -0.2]),
    seed=st.integers(0, 1000),
)
def test_matches_the_definition_for_any_shape(case: Case, dtype: torch.dtype, scale: float, seed: int) -> None:
    tensors = inputs(case, dtype, seed)
    assert_near(results(causal_attention, tensors, scale), expected(tensors, scale))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_far_from_zero_neither_overflow_nor_vanish(dtype: torch.dtype) -> None:
    q, k, v, grad = inputs(Case(1, 80, 2, 2, 16), dtype)
    tensors = [q * 8, k * 8, v, grad]
    assert_near(results(causal_attention, tensors, 1.0), expected(tensors, 1.0))


@pytest.mark.isa
@pairwise(
    beginning=[0, 1, 40, 64, 100], heads=[2, 4, 6, 8, 10], dtype=DTYPES, attention=IMPLEMENTATIONS, exhaustive=("op",)
)
def test_texts_in_a_row_see_what_they_share_and_themselves(
    beginning: int, heads: int, dtype: torch.dtype, attention: Attention
) -> None:
    tensors = inputs(Case(2, 290, heads, 2, 20), dtype)
    seen_until = torch.full((2, 290), 290, dtype=torch.int32)
    # Texts of 35 after a beginning; and of any lengths, two of which share 20 after what they share with a third.
    seen_until[0, beginning:] = beginning + (torch.arange(290 - beginning) // 35 + 1) * 35
    for first, end, until in ((0, 30, 250), (30, 80, 80), (80, 100, 250), (100, 170, 170), (170, 250, 250)):
        seen_until[1, first:end] = until
    seen_until[1, 280:] = -1
    assert_near(results(attention, tensors, 0.3, seen_until), expected(tensors, 0.3, seen_until))


@pytest.mark.isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_future_changes_nothing(dtype: torch.dtype) -> None:
    q, k, v, grad = inputs(Case(1, 150, 2, 1, 32), dtype)
    whole = results(causal_attention, [q, k, v, grad], 0.2)
    begun = results(causal_attention, [x[:, :90].contiguous() for x in (q, k, v, grad)], 0.2)
    assert torch.equal(whole[0][:, :90], begun[0])
    assert torch.equal(whole[1][:, :90], begun[1])


@pytest.mark.isa
@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_threads_nor_repetition_change_a_bit(dtype: torch.dtype) -> None:
    tensors = inputs(Case(2, 140, 6, 2, 40), dtype)
    first = results(causal_attention, tensors, 0.2)
    for number in (1, 2, 4, 4):
        with threads(number):
            again = results(causal_attention, tensors, 0.2)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@BOTH
def test_inputs_of_any_strides_are_accepted(attention: Attention) -> None:
    tensors = inputs(Case(2, 70, 4, 2, 24), torch.float32)
    wanted = expected(tensors, 0.2)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    elements_first = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in tensors]
    fused = torch.cat(tensors[:3], dim=2).split((4, 2, 2), dim=2)
    for others in (heads_first, elements_first, [*fused, tensors[3]]):
        assert_near(results(attention, list(others), 0.2), wanted)


@BOTH
@pytest.mark.parametrize(
    "case",
    [Case(0, 5, 2, 1, 8), Case(2, 0, 2, 1, 8), Case(2, 5, 0, 0, 8), Case(2, 900, 0, 2, 64), Case(2, 5, 2, 1, 0)],
)
def test_batches_without_tokens_heads_or_elements_are_accepted(case: Case, attention: Attention) -> None:
    tensors = inputs(case, torch.float32)
    found = results(attention, tensors, 1.0)
    assert [x.shape for x in found] == [tensors[i].shape for i in (0, 0, 1, 2)]
    assert all(torch.all(x == 0) for x in found)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001], ids=hex)
def test_no_nan_is_lost(bits: int) -> None:
    bad = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for place in range(4):
        tensors = inputs(Case(1, 70, 2, 2, 8), torch.float32)
        tensors[place][0, 66, 0, 3] = bad
        *_, q_grad, k_grad, v_grad = found = results(causal_attention, tensors, 0.3)
        seen = (found[0][0, 66:, 0] if place < 3 else v_grad[0, :66, 0], q_grad[0, 66, 0], k_grad[0, 66, 0])
        assert all(x.isnan().any() for x in seen)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_whose_scores_are_all_minus_infinity_becomes_nan(dtype: torch.dtype, attention: Attention) -> None:
    q, k, v, _ = inputs(Case(1, 70, 1, 1, 8), dtype)
    q[0, 0], k[0, 0] = 3e38, -3e38
    out = attention(q, k, v, 1.0)
    assert out[0, 0].isnan().all()


@BOTH
def test_gradients_of_a_sum_are_taken(attention: Attention) -> None:
    leaves = [x.requires_grad_() for x in inputs(Case(2, 70, 4, 2, 24), torch.float64)[:3]]
    found = torch.autograd.grad(attention(*leaves, 0.3).sum(), leaves)
    ones = torch.ones(2, 70, 4, 24, dtype=torch.float64)
    for one, other in zip(found, expected([*leaves, ones], 0.3).values[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_second_derivative_is_refused() -> None:
    leaves = [x.requires_grad_() for x in inputs(Case(1, 5, 2, 2, 4), torch.float64)[:3]]
    (first,) = torch.autograd.grad(causal_attention(*leaves, 1.0).sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        first.sum().backward()


def test_gradients_match_finite_differences() -> None:
    leaves = [x.requires_grad_() for x in inputs(Case(1, 5, 4, 2, 3), torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda *x: causal_attention(*x, 0.7), leaves)


@pytest.mark.fallback
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registration_passes_opcheck(dtype: torch.dtype) -> None:
    *leaves, grad = inputs(Case(2, 5, 4, 2, 8), dtype)
    seen_until = torch.tensor([[5, 5, 4, 4, 5]] * 2, dtype=torch.int32)
    for rest in ((0.3,), (0.3, seen_until)):
        torch.library.opcheck(torch.ops.rrt.causal_attention.default, (*(x.requires_grad_() for x in leaves), *rest))
    with torch.no_grad():
        out, lse = torch.ops.rrt.causal_attention.default(*leaves, 0.3)
        torch.library.opcheck(torch.ops.rrt.causal_attention_backward.default, (grad, *leaves, out, lse, 0.3))


GOOD = Case(2, 5, 4, 2, 8)
MISTAKES: list[tuple[dict[str, Tensor], str]] = [
    ({"q": torch.zeros(2, 5, 4, 8, dtype=torch.int64)}, "q: found dtype int64; expected float32, float64, bfloat16"),
    ({"k": torch.zeros(2, 5, 2, 8, dtype=torch.bfloat16)}, "k: found dtype bfloat16; expected float32"),
    ({"v": torch.zeros(2, 5, 2, 8, dtype=torch.float64)}, "v: found dtype float64; expected float32"),
    ({"q": torch.zeros(2, 5, 32)}, r"q: found shape \[2, 5, 32\]; expected \[B, T, H, D_h\]"),
    ({"k": torch.zeros(2, 6, 2, 8)}, r"k: found shape \[2, 6, 2, 8\]; expected \[2, 5, H_kv, 8\]"),
    ({"v": torch.zeros(2, 5, 1, 8)}, r"v: found shape \[2, 5, 1, 8\]; expected \[2, 5, 2, 8\]"),
    ({"q": torch.zeros(2, 5, 3, 8)}, "q: found 3 heads; expected a multiple of k's 2"),
    ({"seen_until": torch.zeros(2, 5, dtype=torch.int64)}, "seen_until: found dtype int64; expected int32"),
    ({"seen_until": torch.zeros(2, 4, dtype=torch.int32)}, r"seen_until: found shape \[2, 4\]; expected \[2, 5\]"),
    (
        {"seen_until": torch.zeros(5, 2, dtype=torch.int32).T},
        r"seen_until: found strides \[1, 2\]; expected a contiguous",
    ),
]
BACKWARD_MISTAKES: list[tuple[dict[str, Tensor], str]] = [
    ({"out_grad": torch.zeros(2, 5, 4, 8, dtype=torch.float16)}, "out_grad: found dtype float16; expected float32"),
    ({"out": torch.zeros(2, 5, 4, 7)}, r"out: found shape \[2, 5, 4, 7\]; expected \[2, 5, 4, 8\]"),
    ({"lse": torch.zeros(2, 4, 5, dtype=torch.float64)}, "lse: found dtype float64; expected float32"),
    ({"lse": torch.zeros(2, 5, 4)}, r"lse: found shape \[2, 5, 4\]; expected \[2, 4, 5\]"),
    ({"lse": torch.zeros(2, 5, 4).transpose(1, 2)}, r"lse: found strides \[20, 1, 4\]; expected a contiguous tensor"),
]


def arguments(backward: bool) -> dict[str, Tensor]:
    q, k, v, grad = inputs(GOOD, torch.float32)
    if not backward:
        return {"q": q, "k": k, "v": v}
    return {"out_grad": grad, "q": q, "k": k, "v": v, "out": torch.zeros_like(q), "lse": torch.zeros(2, 4, 5)}


@pytest.mark.fallback
@pytest.mark.parametrize(
    ("backward", "mistake", "message"),
    [(backward, *rest) for backward in (False, True) for rest in MISTAKES]
    + [(True, *rest) for rest in BACKWARD_MISTAKES],
)
def test_a_bad_argument_is_named_with_what_was_found_and_expected(
    backward: bool, mistake: dict[str, Tensor], message: str
) -> None:
    given = {**arguments(backward), **mistake}
    name = "causal_attention_backward" if backward else "causal_attention"
    reference: Callable[..., Any] = causal_attention_backward_reference if backward else causal_attention_reference
    op = getattr(torch.ops.rrt, name)
    for run in (op, reference):
        with pytest.raises(RuntimeError, match=f"rrt::{name}: {message}"):
            run(**given, scale=1.0)
    with pytest.raises(RuntimeError, match=f"rrt::{name}: {message}"):
        op(**{key: tensor.to("meta") for key, tensor in given.items()}, scale=1.0)


@needs_native
def test_the_model_trains_through_the_operator_as_through_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64; with a mask, or on a device without a kernel, PyTorch's own function runs."""
    config = replace(
        preset("tinyllama-1.1b"),
        vocab_size=99,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        intermediate_size=40,
    )
    model = RecursiveTransformer(config, RecursiveConfig(num_loops=2)).double()
    model.init_weights()
    ids = torch.randint(config.vocab_size, (2, 70), generator=torch.Generator().manual_seed(0))
    calls = 0
    native = causal_attention

    def counted(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return native(*args)

    monkeypatch.setattr("rrt.ops.causal_attention", counted)

    def logits_and_gradients() -> list[Tensor]:
        logits = model(ids)
        logits.square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad()
        return [logits.detach(), *gradients]

    ours = logits_and_gradients()
    assert calls == config.num_layers  # On tiles too, since rows and heads are short.
    with pretend_device("cuda"):
        theirs = logits_and_gradients()
    seen_until = ((torch.arange(70) // 20 + 1) * 20).int().expand(2, 70)
    rows = {"seen_until": seen_until, "positions": torch.arange(70).expand(2, 70)}
    with pretend_device("cuda"):
        masked = model(ids, **rows)
    assert calls == config.num_layers
    torch.testing.assert_close(model(ids, **rows), masked, rtol=1e-10, atol=1e-12)
    assert calls == 2 * config.num_layers
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@needs_native
def test_with_tiles_in_use_pytorchs_attention_is_taken_where_it_was_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def is_native(length: int, head_dim: int, device: str = "cpu") -> bool:
        with pretend_device(device):
            return prefers_native_attention(torch.empty(1, length, 1, head_dim))

    monkeypatch.setattr("rrt.ops.attention._SETTING", "auto")
    monkeypatch.setattr("rrt.ops.attention._TORCH_HAS_TILES", True)
    assert is_native(512, 64)
    assert not is_native(513, 64)
    assert not is_native(512, 65)
    monkeypatch.setattr("rrt.ops.attention._SETTING", "native")
    assert is_native(513, 256)
    assert not is_native(513, 256, "cuda")
    monkeypatch.setattr("rrt.ops.attention._SETTING", "torch")
    assert not is_native(1, 1)
    monkeypatch.setattr("rrt.ops.attention._SETTING", "auto")
    monkeypatch.setattr("rrt.ops.attention._TORCH_HAS_TILES", False)
    assert is_native(4096, 256)
    assert not is_native(1, 1, "cuda")
    monkeypatch.setattr("rrt.ops.attention._SETTING", "ours")
    with pytest.raises(UserError, match="RRT_ATTENTION: found 'ours'; expected one of auto, native, torch"):
        is_native(1, 1)


@needs_native
def test_the_model_calls_pytorchs_attention_where_it_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(
        preset("tinyllama-1.1b"), vocab_size=9, hidden_size=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8
    )
    model = RecursiveTransformer(replace(config, intermediate_size=8), RecursiveConfig(num_loops=1)).double()
    model.init_weights()
    ids = torch.zeros(1, 5, dtype=torch.int64)
    ours = model(ids)
    monkeypatch.setattr("rrt.ops.attention._SETTING", "torch")
    monkeypatch.setattr("rrt.ops.causal_attention", None)
    torch.testing.assert_close(model(ids), ours, rtol=1e-10, atol=1e-12)
