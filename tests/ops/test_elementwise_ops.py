"""rotary_embedding, rms_norm and gated_activation: the native kernels and the references against float64."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rrt import ops
from rrt.checkpoint.presets import preset
from rrt.model.config import RecursiveConfig
from rrt.model.transformer import RecursiveTransformer
from rrt.ops import build_info
from rrt.ops.precision import pretend_device
from tests.util.native import DTYPES, needs_native, threads
from tests.util.pairwise import pairwise
from tests.util.rounding import sum_error, unit_roundoff

EPS = 1e-5

Function = Callable[..., Tensor]


class _ReferenceNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, weight_plus_one: bool) -> Tensor:
        y, scale = ops.rms_norm_reference(x, weight, eps, weight_plus_one)
        ctx.save_for_backward(x, weight, scale)
        ctx.weight_plus_one = weight_plus_one
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (*ops.rms_norm_backward_reference(grad, *ctx.saved_tensors, ctx.weight_plus_one), None, None)


class _ReferenceGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return ops.gated_activation_reference(gate, up, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return (*ops.gated_activation_backward_reference(grad, *ctx.saved_tensors, ctx.activation), None)


OPS: dict[str, Function] = {
    "rotary": ops.rotary_embedding,
    "norm": ops.rms_norm,
    "gate": ops.gated_activation,
}
REFERENCES: dict[str, Function] = {
    "rotary": ops.rotary_embedding_reference,
    "norm": _ReferenceNorm.apply,
    "gate": _ReferenceGate.apply,
}
IMPLEMENTATIONS = {"op": OPS, "reference": REFERENCES}
BOTH = pytest.mark.parametrize("functions", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


def define_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate by a product of complex numbers."""
    half = cos.shape[-1]
    turned = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.complex(cos, sin)[:, :, None]
    return torch.cat((turned.real, turned.imag, x[..., 2 * half :]), dim=-1)


def define_norm(x: Tensor, weight: Tensor, eps: float, weight_plus_one: bool) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (weight + weight_plus_one)


def define_gate(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}[activation](gate) * up


DEFINITIONS: dict[str, Function] = {"rotary": define_rotary, "norm": define_norm, "gate": define_gate}


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rotary_inputs(
    batch: int, length: int, heads: int, head_dim: int, half: int, shared: bool, dtype: torch.dtype, seed: int = 0
) -> tuple[list[Tensor], list[Any]]:
    """Make the arguments that are differentiated, and the others."""
    angles = normal(1 if shared else batch, length, half, seed=seed + 1) * 9
    return [normal(batch, length, heads, head_dim, dtype=dtype, seed=seed)], [
        angles.cos().to(dtype),
        angles.sin().to(dtype),
    ]


def norm_inputs(
    shape: tuple[int, ...], plus_one: bool, dtype: torch.dtype, seed: int = 0
) -> tuple[list[Tensor], list[Any]]:
    return [normal(*shape, dtype=dtype, seed=seed), normal(shape[-1], dtype=dtype, seed=seed + 1)], [EPS, plus_one]


def gate_inputs(
    shape: tuple[int, ...], activation: str, dtype: torch.dtype, seed: int = 0
) -> tuple[list[Tensor], list[Any]]:
    gate = normal(*shape, dtype=dtype, seed=seed) * 3
    return [gate, normal(*shape, dtype=dtype, seed=seed + 1)], [activation]


def results(
    function: Function, leaves: list[Tensor], rest: list[Any], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Compute the result, and the gradients for a random one of it, rounded to `dtype`."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves, *rest)
    grad = normal(*out.shape, seed=7).to(dtype or out.dtype).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def sizes(name: str, leaves: list[Tensor], rest: list[Any], grad: Tensor) -> list[Tensor | float]:
    """Compute norms of the terms of the result and of each gradient where they may cancel, else zero."""
    if name == "norm":
        (x, weight), (eps, plus_one) = leaves, rest
        scale = (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
        of_weight = (grad * x * scale).abs().reshape(x.shape[:-1].numel(), x.shape[-1]).sum(0)
        return [0.0, (grad * (weight + plus_one) * scale).norm(), of_weight.norm()]
    return [0.0, (grad * leaves[1]).norm(), 0.0] if name == "gate" else [0.0, 0.0]


def assert_defined(name: str, functions: dict[str, Function], leaves: list[Tensor], rest: list[Any]) -> None:
    wide = [leaf.double() for leaf in leaves]
    wide_rest = [x.double() if isinstance(x, Tensor) else x for x in rest]
    expected = results(DEFINITIONS[name], wide, wide_rest, leaves[0].dtype)
    grad = normal(*expected[0].shape, seed=7)
    terms = sizes(name, wide, wide_rest, grad)
    # References round up to three times. Sums go over a row or over all rows; an exponential errs as 64 terms do.
    tolerance = 4 * unit_roundoff(leaves[0].dtype) + sum_error(leaves[0].dtype, max(64, *leaves[0].shape))
    for found, wanted, term in zip(results(functions[name], leaves, rest), expected, terms, strict=True):
        assert found.dtype == leaves[0].dtype and found.shape == wanted.shape
        assert float((found.double() - wanted).norm()) <= tolerance * float(wanted.norm() + term)


@pytest.mark.isa
@pairwise(
    case=[(2, 5, 3, 64, 32, True), (1, 3, 2, 80, 10, False), (3, 1, 1, 7, 3, False), (2, 4, 2, 6, 0, True)],
    dtype=DTYPES,
    functions=IMPLEMENTATIONS,
    exhaustive=("op",),
)
def test_rotary_is_a_complex_product(case: Any, dtype: torch.dtype, functions: dict[str, Function]) -> None:
    assert_defined("rotary", functions, *rotary_inputs(*case, dtype))


@pytest.mark.isa
@pairwise(
    shape=[(3, 70, 384), (130, 37), (64, 1), (5,)],
    plus_one=[False, True],
    dtype=DTYPES,
    functions=IMPLEMENTATIONS,
    exhaustive=("op",),
)
def test_norm_is_by_the_root_mean_square(
    shape: Any, plus_one: bool, dtype: torch.dtype, functions: dict[str, Function]
) -> None:
    assert_defined("norm", functions, *norm_inputs(shape, plus_one, dtype))


@pytest.mark.isa
@pairwise(
    shape=[(3, 70, 100), (17,), (1, 33)],
    activation=ops.GATED_ACTIVATIONS,
    dtype=DTYPES,
    functions=IMPLEMENTATIONS,
    exhaustive=("op",),
)
def test_gate_is_the_activation_times_up(
    shape: Any, activation: str, dtype: torch.dtype, functions: dict[str, Function]
) -> None:
    assert_defined("gate", functions, *gate_inputs(shape, activation, dtype))


@pytest.mark.fallback
@settings(max_examples=40)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 70),
    heads=st.integers(1, 4),
    head_dim=st.integers(1, 70),
    share=st.floats(0, 1),
    flag=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_shape(
    batch: int, length: int, heads: int, head_dim: int, share: float, flag: bool, dtype: torch.dtype, seed: int
) -> None:
    half = int(share * (head_dim // 2))
    assert_defined("rotary", OPS, *rotary_inputs(batch, length, heads, head_dim, half, flag, dtype, seed))
    assert_defined("norm", OPS, *norm_inputs((batch, length, head_dim), flag, dtype, seed))
    activation = ops.GATED_ACTIVATIONS[int(flag)]
    assert_defined("gate", OPS, *gate_inputs((batch, length, head_dim), activation, dtype, seed))


def cases(dtype: torch.dtype) -> list[tuple[str, list[Tensor], list[Any]]]:
    """Make inputs that are large enough to be spread over threads."""
    return [
        ("rotary", *rotary_inputs(2, 150, 8, 20, 7, False, dtype)),
        ("norm", *norm_inputs((2, 150, 150), False, dtype)),
        ("norm", *norm_inputs((2, 150, 150), True, dtype)),
        ("gate", *gate_inputs((2, 150, 151), "silu", dtype)),
        ("gate", *gate_inputs((2, 150, 151), "gelu_tanh", dtype)),
    ]


@pytest.mark.isa
@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_neither_threads_nor_repetition_change_a_bit(dtype: torch.dtype) -> None:
    for name, leaves, rest in cases(dtype):
        first = results(OPS[name], leaves, rest)
        for number in (1, 2, 4, 4):
            with threads(number):
                again = results(OPS[name], leaves, rest)
            assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.isa
@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_elements_bits_do_not_depend_on_its_neighbours(dtype: torch.dtype) -> None:
    (gate, up), _ = gate_inputs((501,), "silu", dtype)
    for activation in ops.GATED_ACTIVATIONS:
        whole = ops.gated_activation(gate, up, activation)
        for begin, end in ((0, 1), (3, 20), (100, 501)):
            assert torch.equal(whole[begin:end], ops.gated_activation(gate[begin:end], up[begin:end], activation))
    (x, weight), _ = norm_inputs((70, 33), False, dtype)
    whole = ops.rms_norm(x, weight, EPS)
    assert torch.equal(whole[13:40], ops.rms_norm(x[13:40], weight, EPS))
    assert torch.equal(whole[69], ops.rms_norm(x[69], weight, EPS))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_of_any_strides_are_accepted(dtype: torch.dtype, functions: dict[str, Function]) -> None:
    for name, leaves, rest in cases(dtype):
        apart = [leaf.repeat_interleave(2, -1)[..., ::2] for leaf in leaves]
        swapped = [leaf.transpose(0, -1).contiguous().transpose(0, -1) for leaf in leaves]
        assert not swapped[0].is_contiguous() and apart[0].stride(-1) == 2
        for others in (apart, swapped):
            assert_defined(name, functions, others, rest)
    # A part of a fused projection, as the model has q and k.
    x, rest = normal(2, 9, 6, 8, dtype=dtype), [normal(1, 9, 4, dtype=dtype)] * 2
    part = functions["rotary"](x[:, :, 1:4], *rest)
    torch.testing.assert_close(part, functions["rotary"](x, *rest)[:, :, 1:4])


@BOTH
def test_tensors_without_elements_are_accepted(functions: dict[str, Function]) -> None:
    dtype = torch.float32
    for shape in ((0, 3, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8), (2, 3, 2, 0)):
        half = min(4, shape[3] // 2)
        assert results(functions["rotary"], *rotary_inputs(*shape, half, False, dtype))[1].shape == shape
    for shape in ((0, 8), (3, 0), (2, 0, 8)):
        found = results(functions["norm"], *norm_inputs(shape, False, dtype))
        assert found[0].shape == shape and found[2].shape == shape[-1:] and not found[2].any()
        assert results(functions["gate"], *gate_inputs(shape, "silu", dtype))[2].shape == shape


@pytest.mark.isa
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ops.GATED_ACTIVATIONS)
def test_an_activation_far_from_zero_is_zero_or_its_argument(
    activation: str, dtype: torch.dtype, functions: dict[str, Function]
) -> None:
    far = torch.tensor([-1e12, -1e4, -100.0, 100.0, 1e4, 1e12], dtype=dtype)
    out, gate_grad, up_grad = results(functions["gate"], [far, torch.ones(6, dtype=dtype)], [activation])
    grad = normal(6, seed=7).to(dtype)
    torch.testing.assert_close(out, far.clamp(min=0), rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(up_grad, grad * far.clamp(min=0), rtol=1e-6, atol=1e-30)
    assert gate_grad[:3].abs().max() < 1e-30
    torch.testing.assert_close(gate_grad[3:], grad[3:])


@pytest.mark.isa
@BOTH
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0x7F800001], ids=hex)
def test_no_nan_is_lost(bits: int, functions: dict[str, Function]) -> None:
    bad = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    for name, leaves, rest in (
        ("rotary", *rotary_inputs(1, 2, 1, 40, 20, True, torch.float32)),
        ("norm", *norm_inputs((2, 40), False, torch.float32)),
        ("gate", *gate_inputs((2, 40), "silu", torch.float32)),
        ("gate", *gate_inputs((2, 40), "gelu_tanh", torch.float32)),
    ):
        for place in range(len(leaves)):
            spoilt = [leaf.clone() for leaf in leaves]
            spoilt[place].view(-1)[37] = bad
            assert functions[name](*spoilt, *rest).isnan().any(), name


@BOTH
def test_gradients_match_finite_differences(functions: dict[str, Function]) -> None:
    for name, leaves, rest in (
        ("rotary", *rotary_inputs(2, 3, 2, 7, 3, True, torch.float64)),
        ("norm", *norm_inputs((3, 5), False, torch.float64)),
        ("norm", *norm_inputs((3, 5), True, torch.float64)),
        ("gate", *gate_inputs((2, 4), "silu", torch.float64)),
        ("gate", *gate_inputs((2, 4), "gelu_tanh", torch.float64)),
    ):
        leaves = [leaf.requires_grad_() for leaf in leaves]
        assert torch.autograd.gradcheck(lambda *x, f=functions[name], rest=rest: f(*x, *rest), leaves), name


@pytest.mark.fallback
def test_the_rotation_has_a_second_derivative_and_the_others_refuse_it() -> None:
    leaves, rest = rotary_inputs(1, 3, 2, 6, 3, True, torch.float64)
    leaf = leaves[0].requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: ops.rotary_embedding(x, *rest), [leaf])
    for function, (leaves, rest) in (
        (ops.rms_norm, norm_inputs((3, 5), False, torch.float64)),
        (ops.gated_activation, gate_inputs((3, 5), "silu", torch.float64)),
    ):
        leaves = [leaf.requires_grad_() for leaf in leaves]
        (first,) = torch.autograd.grad(function(*leaves, *rest).sum(), leaves[:1], create_graph=True)
        with pytest.raises(RuntimeError, match="has no second derivative"):
            first.sum().backward()


@pytest.mark.fallback
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_registrations_pass_opcheck(dtype: torch.dtype) -> None:
    rrt = torch.ops.rrt
    (x,), angles = rotary_inputs(2, 3, 2, 8, 3, False, dtype)
    torch.library.opcheck(rrt.rotary_embedding.default, (x.requires_grad_(), *angles))
    leaves, rest = norm_inputs((2, 3, 8), False, dtype)
    torch.library.opcheck(rrt.rms_norm.default, (*(leaf.requires_grad_() for leaf in leaves), *rest))
    gates, activation = gate_inputs((2, 3, 8), "silu", dtype)
    torch.library.opcheck(rrt.gated_activation.default, (*(leaf.requires_grad_() for leaf in gates), *activation))
    with torch.no_grad():
        y, scale = rrt.rms_norm.default(*leaves, *rest)
        torch.library.opcheck(rrt.rms_norm_backward.default, (y, *leaves, scale, False))
        torch.library.opcheck(rrt.gated_activation_backward.default, (y, *gates, *activation))


zeros = torch.zeros
GOOD: dict[str, dict[str, Any]] = {
    "rotary_embedding": {"x": zeros(2, 5, 3, 8), "cos": zeros(2, 5, 4), "sin": zeros(2, 5, 4)},
    "rms_norm": {"x": zeros(2, 5, 8), "weight": zeros(8), "eps": EPS, "weight_plus_one": False},
    "rms_norm_backward": {
        "out_grad": zeros(2, 5, 8),
        "x": zeros(2, 5, 8),
        "weight": zeros(8),
        "scale": zeros(10),
        "weight_plus_one": False,
    },
    "gated_activation": {"gate": zeros(2, 5), "up": zeros(2, 5), "activation": "silu"},
    "gated_activation_backward": {
        "out_grad": zeros(2, 5),
        "gate": zeros(2, 5),
        "up": zeros(2, 5),
        "activation": "silu",
    },
}
MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    (
        "rotary_embedding",
        {"x": zeros(2, 5, 3, 8, dtype=torch.int64)},
        "x: found dtype int64; expected float32, float64",
    ),
    ("rotary_embedding", {"cos": zeros(2, 5, 4).half()}, "cos: found dtype float16; expected float32"),
    ("rotary_embedding", {"sin": zeros(2, 5, 4).double()}, "sin: found dtype float64; expected float32"),
    ("rotary_embedding", {"x": zeros(2, 5, 24)}, r"x: found shape \[2, 5, 24\]; expected \[B, T, H, D_h\]"),
    ("rotary_embedding", {"cos": zeros(3, 5, 4)}, r"cos: found shape \[3, 5, 4\]; expected \[2, 5, rotary_dim / 2\]"),
    ("rotary_embedding", {"cos": zeros(1, 6, 4)}, r"cos: found shape \[1, 6, 4\]; expected \[1, 5, rotary_dim / 2\]"),
    ("rotary_embedding", {"sin": zeros(2, 5, 3)}, r"sin: found shape \[2, 5, 3\]; expected \[2, 5, 4\]"),
    (
        "rotary_embedding",
        {"cos": zeros(2, 5, 5), "sin": zeros(2, 5, 5)},
        "cos: found 5 angles; expected at most half of x's D_h, 8",
    ),
    ("rms_norm", {"x": zeros(2, 8, dtype=torch.int32)}, "x: found dtype int32; expected float32"),
    ("rms_norm", {"x": zeros(())}, r"x: found shape \[\]; expected \[..., D\]"),
    ("rms_norm", {"weight": zeros(8).bfloat16()}, "weight: found dtype bfloat16; expected float32"),
    ("rms_norm", {"weight": zeros(2, 8)}, r"weight: found shape \[2, 8\]; expected \[8\]"),
    ("rms_norm_backward", {"out_grad": zeros(2, 4, 8)}, r"out_grad: found shape \[2, 4, 8\]; expected \[2, 5, 8\]"),
    ("rms_norm_backward", {"out_grad": zeros(2, 5, 8).half()}, "out_grad: found dtype float16; expected float32"),
    ("rms_norm_backward", {"scale": zeros(10).double()}, "scale: found dtype float64; expected float32"),
    ("rms_norm_backward", {"scale": zeros(2, 5)}, r"scale: found shape \[2, 5\]; expected \[10\]"),
    ("gated_activation", {"gate": zeros(2, 5).bool()}, "gate: found dtype bool; expected float32"),
    ("gated_activation", {"up": zeros(2, 5).half()}, "up: found dtype float16; expected float32"),
    ("gated_activation", {"up": zeros(2, 6)}, r"up: found shape \[2, 6\]; expected \[2, 5\]"),
    ("gated_activation", {"activation": "relu"}, "activation: found relu; expected silu or gelu_tanh"),
    ("gated_activation_backward", {"out_grad": zeros(5)}, r"out_grad: found shape \[5\]; expected \[2, 5\]"),
    ("gated_activation_backward", {"out_grad": zeros(2, 5).half()}, "out_grad: found dtype float16; expected float32"),
]


@pytest.mark.fallback
@pytest.mark.parametrize(("name", "mistake", "message"), MISTAKES)
def test_a_bad_argument_is_named_with_what_was_found_and_expected(
    name: str, mistake: dict[str, Any], message: str
) -> None:
    given = {**GOOD[name], **mistake}
    op, reference = getattr(torch.ops.rrt, name), getattr(ops, f"{name}_reference")
    for run in (op, reference):
        with pytest.raises(RuntimeError, match=f"rrt::{name}: {message}"):
            run(**given)
    with pytest.raises(RuntimeError, match=f"rrt::{name}: {message}"):
        op(**{key: value.to("meta") if isinstance(value, Tensor) else value for key, value in given.items()})


@needs_native
@pytest.mark.parametrize("name", ["gemma-2b", "tinyllama-1.1b", "pythia-160m"])
def test_the_model_trains_through_the_operators_as_through_pytorchs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64; on a device without kernels, PyTorch's own functions run."""
    config = replace(
        preset(name),
        vocab_size=99,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        intermediate_size=40,
    )
    model = RecursiveTransformer(config, RecursiveConfig(num_loops=2, untie_norms=name == "gemma-2b")).double()
    model.init_weights()
    ids = torch.randint(config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    calls: list[str] = []

    def counted(op: str, native: Function) -> Function:
        return lambda *args: calls.append(op) or native(*args)

    for op in ("rotary_embedding", "rms_norm", "gated_activation"):
        monkeypatch.setattr(f"rrt.ops.{op}", counted(op, getattr(ops, op)))

    def logits_and_gradients() -> list[Tensor]:
        logits = model(ids)
        logits.square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad()
        return [logits.detach(), *gradients]

    ours = logits_and_gradients()
    layers = config.num_layers
    expected = {"rotary_embedding": 2 * layers, "rms_norm": 2 * layers + 1, "gated_activation": layers}
    if name == "pythia-160m":
        expected = {"rotary_embedding": 2 * layers}
    assert {op: calls.count(op) for op in dict.fromkeys(calls)} == expected
    calls.clear()
    with pretend_device("cuda"):
        theirs = logits_and_gradients()
    assert not calls
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.fallback
def test_only_cpus_have_the_kernels() -> None:
    assert ops.has_native_kernels(torch.zeros(1)) == (build_info().library is not None)
    assert not ops.has_native_kernels(torch.zeros(1, device="meta"))
