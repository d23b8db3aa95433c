"""packed_linear and packed_gated_linear: native kernels and references against the linears that they pack."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rrt.ops import (
    GATED_ACTIVATIONS,
    gated_activation,
    gated_activation_reference,
    pack_linear,
    packed_gated_linear,
    packed_gated_linear_reference,
    packed_linear,
    packed_linear_reference,
)
from tests.util.native import needs_native

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 2e-2, torch.float16: 3e-3}
LINEARS = pytest.mark.parametrize("op", [packed_linear, packed_linear_reference], ids=["op", "reference"])
GATED = pytest.mark.parametrize("op", [packed_gated_linear, packed_gated_linear_reference], ids=["op", "reference"])
# (rows, K, N); 400 rows make three blocks, and sizes lie around panels of 32 outputs and chunks of 128 steps.
SHAPES = [(0, 3, 5), (1, 1, 1), (5, 17, 33), (13, 257, 64), (400, 129, 70)]


def make(rows: int, k: int, n: int, dtype: torch.dtype, *, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Make x, a weight whose products are about 1, and a bias."""
    generator = torch.Generator().manual_seed(rows + k + n)
    x = torch.randn(rows, k, generator=generator).to(dtype)
    weight = (torch.randn(n, k, generator=generator) * k**-0.5).to(dtype)
    return x, weight, torch.randn(n, generator=generator).to(dtype) if bias else None


@pytest.mark.isa
@pytest.mark.fallback
@LINEARS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_are_those_of_the_weight(shape: tuple[int, int, int], dtype: torch.dtype, op: Any) -> None:
    for bias in (False, True):
        x, weight, b = make(*shape, dtype, bias=bias)
        expected = F.linear(x.double(), weight.double(), None if b is None else b.double())
        found = op(x, pack_linear(weight), b, shape[2])
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.isa
@pytest.mark.fallback
@GATED
@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_gated_linear_is_two_linears_and_the_activation(
    shape: tuple[int, int, int], dtype: torch.dtype, activation: str, op: Any
) -> None:
    x, gate, gate_bias = make(*shape, dtype)
    up, up_bias = gate.flip(0).contiguous(), gate_bias.flip(0).contiguous()
    found = op(x, pack_linear(gate), pack_linear(up), gate_bias, up_bias, shape[2], activation)
    gates, ups = (F.linear(x.double(), w.double(), b.double()) for w, b in ((gate, gate_bias), (up, up_bias)))
    tolerance = 4 * TOLERANCES[dtype]
    torch.testing.assert_close(
        found.double(), gated_activation_reference(gates, ups, activation), rtol=tolerance, atol=tolerance
    )


@pytest.mark.isa
@needs_native
@pytest.mark.parametrize("activation", GATED_ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gated_linear_has_the_bits_of_its_parts(dtype: torch.dtype, activation: str) -> None:
    x, gate, bias = make(400, 129, 70, dtype)
    packed_gate, packed_up = pack_linear(gate), pack_linear(gate.flip(0).contiguous())
    parts = packed_linear(x, packed_gate, bias, 70), packed_linear(x, packed_up, None, 70)
    found = packed_gated_linear(x, packed_gate, packed_up, bias, None, 70, activation)
    assert torch.equal(found, gated_activation(*parts, activation))


@pytest.mark.isa
@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_bitwise_the_same_in_any_batch_and_shape(dtype: torch.dtype) -> None:
    x, weight, bias = make(400, 129, 70, dtype)
    packed = pack_linear(weight)
    whole = packed_linear(x, packed, bias, 70)
    for rows in ([7], [3, 390], list(range(200, 400)), list(range(399, -1, -1))):
        assert torch.equal(packed_linear(x[rows], packed, bias, 70), whole[rows]), rows
    assert torch.equal(packed_linear(x.view(4, 100, 129), packed, bias, 70), whole.view(4, 100, 70))
    gapped = F.pad(x, (3, 2))[:, 3:-2]
    assert torch.equal(packed_linear(gapped, packed, bias, 70), whole)
    assert torch.equal(packed_linear(x[9], packed, bias, 70), whole[9])


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"x": torch.zeros(2, 6).int()}, "x: found dtype int32; expected float32, float64, bfloat16 or float16"),
    ({"x": torch.tensor(1.0)}, "x: found shape []; expected [..., K]"),
    ({"out_features": -1}, "out_features: found -1; expected 0 to 2147483647"),
    ({"up": torch.zeros(2, 6, 32)}, "up: found shape [2, 6, 32]; expected [1, 6, 32]"),
    ({"up": torch.zeros(1, 6, 32).double()}, "up: found dtype float64; expected float32"),
    ({"up": torch.zeros(1, 32, 6).mT}, "up: found strides [192, 1, 6]; expected a contiguous tensor"),
    ({"up_bias": torch.zeros(9)}, "up_bias: found shape [9]; expected [8]"),
    ({"activation": "relu"}, "activation: found relu; expected silu or gelu_tanh"),
]


@pytest.mark.fallback
@GATED
@pytest.mark.parametrize(("mistake", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_bad_argument_is_named(mistake: dict[str, Any], message: str, op: Any) -> None:
    x, weight, bias = make(2, 6, 8, torch.float32)
    packed = pack_linear(weight)
    given = {
        **{"x": x, "gate": packed, "up": packed, "gate_bias": bias, "up_bias": bias},
        **{"out_features": 8, "activation": "silu"},
        **mistake,
    }
    with pytest.raises(RuntimeError) as error:
        op(**given)
    assert str(error.value).startswith(f"rrt::packed_gated_linear: {message}")


def test_a_gradient_is_refused() -> None:
    x, weight, bias = make(2, 6, 8, torch.float32)
    packed = pack_linear(weight)
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="rrt::packed_linear: has no gradient"):
        packed_linear(x, packed, bias, 8).sum().backward()
    with pytest.raises(RuntimeError, match="rrt::packed_gated_linear: has no gradient"):
        packed_gated_linear(x, packed, packed, bias, bias, 8, "silu").sum().backward()


@pytest.mark.fallback
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_registration_passes_opcheck(dtype: torch.dtype) -> None:
    x, weight, bias = make(3, 7, 40, dtype)
    packed = pack_linear(weight)
    torch.library.opcheck(torch.ops.rrt.packed_linear.default, (x, packed, bias, 40))
    gated = (x.view(1, 3, 7), packed, packed, bias, None, 40, "silu")
    torch.library.opcheck(torch.ops.rrt.packed_gated_linear.default, gated)
