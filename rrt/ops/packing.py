"""`pack_linear` and `packed_linear`: weights in the order in which the CPU kernels read them.

Shapes: M rows, K in, N out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rrt.native import register_op
from rrt.ops.checks import Checks

PANEL_OUTPUTS = 32
"""Outputs that lie side by side in packed weights: kPanel of csrc/packed_linear/launch.h."""

_check = Checks("pack_linear")


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
    """``W x + b`` with a weight that `pack_linear` packed: `loop_lora_linear` without LoRA, for CPUs; no gradients.

    Args:
        x: [..., K].
        packed: `pack_linear` of W [N, K], of x's dtype.
        bias: [N], contiguous, or None.
        out_features: N.

    Returns:
        [..., N]; a row's result is bitwise the same whatever other rows there are.

    Raises:
        RuntimeError: a dtype, device or shape that does not fit.
    """
    rows = x.reshape(-1, x.shape[-1])
    lora_a = packed.new_empty(1, *packed_shape(x.dtype, 0, x.shape[-1]))
    lora_b = packed.new_empty(1, *packed_shape(x.dtype, out_features, 0))
    loops = torch.zeros(len(rows), dtype=torch.int32, device=x.device)
    y: Tensor = torch.ops.rrt.loop_lora_linear.default(rows, packed, bias, lora_a, lora_b, loops, (out_features,), (0,))
    return y.view(*x.shape[:-1], out_features)


def _check_weight(weight: Tensor) -> list[Any]:
    """Raise RuntimeError if `weight` cannot be packed; return the shape of the result."""
    _check.float_dtype("weight", weight)
    if weight.dim() != 3:
        _check.shape("weight", weight, "N", "K")
    _check.contiguous("weight", weight)
    return [*weight.shape[:-2], *packed_shape(weight.dtype, *weight.shape[-2:])]


register_op(
    "pack_linear(Tensor weight) -> Tensor",
    pack_linear_reference,
    fake=lambda weight: weight.new_empty(_check_weight(weight)),
)
