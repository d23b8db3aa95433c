"""`pack_linear`, `packed_linear`, `packed_gated_linear`: weights in the order in which the CPU kernels read them.

Shapes: M rows, K in, N out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rrt.native import register_op
from rrt.ops.checks import Checks
from rrt.ops.elementwise import GATED_ACTIVATIONS, gated_activation_reference

PANEL_OUTPUTS = 32
"""Outputs that lie side by side in packed weights: kPanel of csrc/packed_linear/launch.h."""

_check = Checks("pack_linear")
_linear_check = Checks("packed_linear")
_gated_check = Checks("packed_gated_linear")

_LARGEST = 2**31 - 1


def pack_linear(weight: Tensor) -> Tensor:
    """Copy a linear's weight (or lora_a, lora_b) into the order in which `loop_lora_linear` reads it on a CPU.

    Args:
        weight: [N, K], or a stack of matrices [loops, N, K], contiguous; float32, float64, bfloat16 or float16.

    Returns:
        [ceil(N / 32), steps, 32 * width] (after the loops, if any) of weight's dtype and device: panels of 32 outputs,
        in each the columns in order, of each (bfloat16: of each two, width 2 and steps ceil(K / 2); else width 1 and
        steps K) the 32 outputs side by side. Missing outputs and columns are zeros. The layout is that of a process,
        not of a file: it may change.

    Raises:
        RuntimeError: another dtype, shape or stride.
    """
    packed: Tensor = torch.ops.rrt.pack_linear.default(weight)
    return packed


def pack_linear_reference(weight: Tensor) -> Tensor:
    """`pack_linear` in plain PyTorch, on any device."""
    shape = _check_weight(weight)
    panels, steps, width = shape[-3], shape[-2], shape[-1] // PANEL_OUTPUTS
    n, k = weight.shape[-2:]
    padded = F.pad(weight, (0, steps * width - k, 0, panels * PANEL_OUTPUTS - n))
    by_panel = padded.unflatten(-1, (steps, width)).unflatten(-3, (panels, PANEL_OUTPUTS))
    return by_panel.transpose(-3, -2).reshape(shape).contiguous()


def unpack_linear(packed: Tensor, n: int, k: int) -> Tensor:
    """Restore the [N, K] or [loops, N, K] that `pack_linear` packed."""
    width = packed.shape[-1] // PANEL_OUTPUTS
    by_panel = packed.unflatten(-1, (PANEL_OUTPUTS, width)).transpose(-3, -2)
    return by_panel.flatten(-2).flatten(-3, -2)[..., :n, :k]


def packed_shape(dtype: torch.dtype, n: Any, k: Any) -> tuple[Any, Any, int]:
    """Compute the shape of one packed matrix [N, K]; N and K may be SymInts."""
    width = 2 if dtype == torch.bfloat16 else 1
    return (n + PANEL_OUTPUTS - 1) // PANEL_OUTPUTS, (k + width - 1) // width, PANEL_OUTPUTS * width


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """``W x + b`` with a weight that `pack_linear` packed; no gradients.

    Args:
        x: [..., K].
        packed: `pack_linear` of W [N, K], of x's dtype.
        bias: [N], contiguous, or None.
        out_features: N.

    Returns:
        [..., N]; on a CPU a row's result is bitwise the same whatever other rows there are.

    Raises:
        RuntimeError: a dtype, device or shape that does not fit.
    """
    y: Tensor = torch.ops.rrt.packed_linear.default(x, packed, bias, out_features)
    return y


def packed_linear_reference(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """`packed_linear` in plain PyTorch, on any device."""
    _check_packed_linear(x, packed, bias, out_features)
    return F.linear(x, unpack_linear(packed, out_features, x.shape[-1]), bias)


def packed_gated_linear(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    out_features: int,
    activation: str,
) -> Tensor:
    """`gated_activation` of two packed linears of x in one pass: their results never leave the caches.

    Args:
        x: [..., K].
        gate, up: `pack_linear` of weights [N, K], of x's dtype.
        gate_bias, up_bias: [N], contiguous, or None.
        out_features: N.
        activation: one of `GATED_ACTIVATIONS`.

    Returns:
        [..., N]; on a CPU bitwise what the three operators compute one after the other.

    Raises:
        RuntimeError: a dtype, device or shape that does not fit, or another activation.
    """
    y: Tensor = torch.ops.rrt.packed_gated_linear.default(x, gate, up, gate_bias, up_bias, out_features, activation)
    return y


def packed_gated_linear_reference(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    out_features: int,
    activation: str,
) -> Tensor:
    """`packed_gated_linear` in plain PyTorch, on any device."""
    _check_packed_gated_linear(x, gate, up, gate_bias, up_bias, out_features, activation)
    gates = F.linear(x, unpack_linear(gate, out_features, x.shape[-1]), gate_bias)
    ups = F.linear(x, unpack_linear(up, out_features, x.shape[-1]), up_bias)
    return gated_activation_reference(gates, ups, activation)


def _check_weight(weight: Tensor) -> list[Any]:
    """Raise RuntimeError if `weight` cannot be packed; return the shape of the result."""
    _check.float_dtype("weight", weight)
    if weight.dim() != 3:
        _check.shape("weight", weight, "N", "K")
    _check.contiguous("weight", weight)
    return [*weight.shape[:-2], *packed_shape(weight.dtype, *weight.shape[-2:])]


# The checks of csrc/loop_lora/op.cpp, in its order; they return the shape of the result.


def _check_rows(check: Checks, x: Tensor, out_features: int) -> list[Any]:
    check.float_dtype("x", x)
    if x.dim() == 0:
        check.fail("x", "shape []", "[..., K]")
    if isinstance(out_features, int) and not 0 <= out_features <= _LARGEST:
        check.fail("out_features", out_features, f"0 to {_LARGEST}")
    return [*x.shape[:-1], out_features]


def _check_packed(
    check: Checks, name: str, weight: Tensor, bias_name: str, bias: Tensor | None, x: Tensor, n: int
) -> None:
    check.like(name, weight, x, "x")
    panels, steps, values = packed_shape(x.dtype, n, x.shape[-1])
    check.shape(name, weight, panels, steps, values)
    check.contiguous(name, weight)
    if bias is not None:
        check.like(bias_name, bias, x, "x")
        check.shape(bias_name, bias, n)
        check.contiguous(bias_name, bias)


def _check_packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None, out_features: int) -> list[Any]:
    shape = _check_rows(_linear_check, x, out_features)
    _check_packed(_linear_check, "weight", weight, "bias", bias, x, out_features)
    return shape


def _check_packed_gated_linear(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    out_features: int,
    activation: str,
) -> list[Any]:
    shape = _check_rows(_gated_check, x, out_features)
    _check_packed(_gated_check, "gate", gate, "gate_bias", gate_bias, x, out_features)
    _check_packed(_gated_check, "up", up, "up_bias", up_bias, x, out_features)
    if activation not in GATED_ACTIVATIONS:
        _gated_check.fail("activation", activation, " or ".join(GATED_ACTIVATIONS))
    return shape


register_op(
    "pack_linear(Tensor weight) -> Tensor",
    pack_linear_reference,
    fake=lambda weight: weight.new_empty(_check_weight(weight)),
)

register_op(
    "packed_linear(Tensor x, Tensor weight, Tensor? bias, int out_features) -> Tensor",
    packed_linear_reference,
    fake=lambda x, weight, bias, out_features: x.new_empty(_check_packed_linear(x, weight, bias, out_features)),
)

register_op(
    "packed_gated_linear(Tensor x, Tensor gate, Tensor up, Tensor? gate_bias, Tensor? up_bias, int out_features, "
    "str activation) -> Tensor",
    packed_gated_linear_reference,
    fake=lambda x, *args: x.new_empty(_check_packed_gated_linear(x, *args)),
)


def _no_gradient(name: str) -> Any:
    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"rrt::{name}: has no gradient; call it under torch.no_grad(), or F.linear on the weight")

    return refuse


for _name in ("packed_linear", "packed_gated_linear"):
    torch.library.register_autograd(f"rrt::{_name}", _no_gradient(_name))
