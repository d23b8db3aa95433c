"""`rotary_embedding`, `rms_norm`, `gated_activation`: a layer's elementwise operations, each in one pass on CPUs.

Shapes: B sequences of T tokens, H heads, D_h head width, D model width.
"""

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from rrt.native import register_op
from rrt.ops.checks import Checks, accumulation_dtype
from rrt.ops.precision import device_type

GATED_ACTIVATIONS = ("silu", "gelu_tanh")

_rotary_check = Checks("rotary_embedding")
_norm_check = Checks("rms_norm")
_norm_backward_check = Checks("rms_norm_backward")
_gate_check = Checks("gated_activation")
_gate_backward_check = Checks("gated_activation_backward")


def has_native_kernels(tensor: Tensor) -> bool:
    """Tell if these operators, and `causal_attention`, run native kernels on `tensor`'s device: only on CPUs."""
    return _HAS_CPU_KERNELS and device_type(tensor) == "cpu"


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate elements i and R/2 + i of each head by angle i of its token, in the first R elements (Su et al., 2021).

    Args:
        x: [B, T, H, D_h] float32, float64, bfloat16 or float16. Any strides; heads whose elements are not adjacent are
            copied.
        cos, sin: [B or 1, T, R / 2] of x's dtype; R is at most D_h.

    Returns:
        [B, T, H, D_h] of x's dtype. The native kernel computes in float32 (float64) and rounds once; bfloat16 on CPUs
        with AVX512-BF16 flushes subnormal results to zero. Differentiable in x, any number of times.

    Raises:
        RuntimeError: a dtype, device or shape that does not fit; the message names the argument, what was found and
            what was expected.
    """
    y: Tensor = torch.ops.rrt.rotary_embedding.default(x, cos, sin)
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_plus_one: bool = False) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension; with gradients of x and weight, but no second.

    Args:
        x: [..., D] float32, float64, bfloat16 or float16.
        weight: [D] of x's dtype.
        weight_plus_one: the factor is ``1 + weight`` (Gemma), and 16 bits are rounded once, at the end; else the
            normed x is rounded before the weight multiplies it (Llama).

    Returns:
        [..., D] of x's dtype, computed in float32 (float64). The native kernel's results, gradients included, are
        bitwise the same whatever the number of threads, and a row's whatever other rows there are. It flushes
        subnormal results to zero where `rotary_embedding` does.

    Raises:
        RuntimeError: a dtype, device or shape that does not fit.
    """
    y: Tensor = torch.ops.rrt.rms_norm.default(x, weight, eps, weight_plus_one)[0]
    return y


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up``; with gradients of both, but no second derivative. Keeps no intermediate for them.

    Args:
        gate, up: of one shape, float32, float64, bfloat16 or float16.
        activation: "silu", or "gelu_tanh", the approximation of gelu by tanh.

    Returns:
        As `gate`. The native kernel computes in float32 (float64) and rounds once; an element's result is bitwise the
        same wherever it lies. It flushes subnormal results to zero where `rotary_embedding` does.

    Raises:
        RuntimeError: a dtype, device, shape or activation that does not fit.
    """
    y: Tensor = torch.ops.rrt.gated_activation.default(gate, up, activation)
    return y


def rotary_embedding_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`rotary_embedding` in plain PyTorch, on any device; rounds after each operation."""
    _check_rotary(x, cos, sin)
    half = cos.shape[2]
    first, second, kept = x.split((half, half, x.shape[3] - 2 * half), dim=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, kept), dim=-1)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, weight_plus_one: bool) -> tuple[Tensor, Tensor]:
    """`rms_norm` in plain PyTorch, on any device.

    Returns:
        The result, and each row's factor ``1 / sqrt(mean(x^2) + eps)``, float32 (float64) [rows].
    """
    _check_norm(_norm_check, x, weight)
    wide = x.to(accumulation_dtype(x))
    scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = wide * scale
    y = normed * (1.0 + weight.to(wide.dtype)) if weight_plus_one else weight * normed.to(x.dtype)
    return y.to(x.dtype), scale.flatten()


def rms_norm_backward_reference(
    out_grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, weight_plus_one: bool
) -> tuple[Tensor, Tensor]:
    """Compute gradients of x and weight in plain PyTorch; `scale` is `rms_norm_reference`'s second result."""
    _check_norm_backward(out_grad, x, weight, scale, weight_plus_one)
    wide = accumulation_dtype(x)
    scale = scale.view(*x.shape[:-1], 1)
    grad, normed, factor = out_grad.to(wide), x.to(wide) * scale, weight.to(wide) + weight_plus_one
    along = grad * factor
    x_grad = (along - normed * (along * normed).mean(-1, keepdim=True)) * scale
    return x_grad.to(x.dtype), (grad * normed).reshape(x.shape[:-1].numel(), x.shape[-1]).sum(0).to(weight.dtype)


def gated_activation_reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`gated_activation` in plain PyTorch, on any device; rounds after each operation."""
    _check_gate(_gate_check, gate, up, activation)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def gated_activation_backward_reference(
    out_grad: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Compute gradients of gate and up in plain PyTorch."""
    _check_gate_backward(out_grad, gate, up, activation)
    if activation == "silu":
        return torch.ops.aten.silu_backward(out_grad * up, gate), out_grad * F.silu(gate)
    gate_grad = torch.ops.aten.gelu_backward(out_grad * up, gate, approximate="tanh")
    return gate_grad, out_grad * F.gelu(gate, approximate="tanh")


# The checks of csrc/elementwise/op.cpp, in its order. Those of operators with one result return its shape; those of
# backward operators, the tensors that the gradients are shaped like.


def _check_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> torch.Size:
    check = _rotary_check
    check.float_dtype("x", x)
    check.like("cos", cos, x, "x")
    check.like("sin", sin, x, "x")
    check.shape("x", x, "B", "T", "H", "D_h")
    shared = cos.dim() == 3 and cos.shape[0] == 1
    check.shape("cos", cos, 1 if shared else x.shape[0], x.shape[1], "rotary_dim / 2")
    check.shape("sin", sin, *cos.shape)
    if 2 * cos.shape[2] > x.shape[3]:
        check.fail("cos", f"{cos.shape[2]} angles", f"at most half of x's D_h, {x.shape[3]}")
    return x.shape


def _check_norm(check: Checks, x: Tensor, weight: Tensor) -> None:
    check.float_dtype("x", x)
    check.like("weight", weight, x, "x")
    if x.dim() == 0:
        check.fail("x", "shape []", "[..., D]")
    check.shape("weight", weight, x.shape[-1])


def _check_norm_backward(
    out_grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor, weight_plus_one: bool
) -> tuple[Tensor, Tensor]:
    check = _norm_backward_check
    _check_norm(check, x, weight)
    check.like("out_grad", out_grad, x, "x")
    check.shape("out_grad", out_grad, *x.shape)
    check.dtype("scale", scale, accumulation_dtype(x))
    check.same_device("scale", scale, x, "x")
    check.shape("scale", scale, x.shape[:-1].numel())
    check.contiguous("scale", scale)
    return x, weight


def _check_gate(check: Checks, gate: Tensor, up: Tensor, activation: str) -> torch.Size:
    check.float_dtype("gate", gate)
    check.like("up", up, gate, "gate")
    check.shape("up", up, *gate.shape)
    if activation not in GATED_ACTIVATIONS:
        check.fail("activation", activation, " or ".join(GATED_ACTIVATIONS))
    return gate.shape


def _check_gate_backward(out_grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    _check_gate(_gate_backward_check, gate, up, activation)
    _gate_backward_check.like("out_grad", out_grad, gate, "gate")
    _gate_backward_check.shape("out_grad", out_grad, *gate.shape)
    return gate, up


def _norm_fake(x: Tensor, weight: Tensor, eps: float, weight_plus_one: bool) -> tuple[Tensor, Tensor]:
    _check_norm(_norm_check, x, weight)
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1].numel(), dtype=accumulation_dtype(x))


def _setup_rotary(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _rotary_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    cos, sin = ctx.saved_tensors
    return rotary_embedding(grad, cos, -sin), None, None


def _setup_norm(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.weight_plus_one = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _norm_gradients(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return (*torch.ops.rrt.rms_norm_backward.default(grad, *ctx.saved_tensors, ctx.weight_plus_one), None, None)


def _setup_gate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _gate_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.rrt.gated_activation_backward.default(grad, *ctx.saved_tensors, ctx.activation), None)


def _no_second_derivative(name: str) -> Any:
    def refuse(ctx: Any, *grads: Tensor | None) -> NoReturn:
        raise RuntimeError(f"rrt::{name}: has no second derivative")

    return refuse


register_op(
    "rotary_embedding(Tensor x, Tensor cos, Tensor sin) -> Tensor",
    rotary_embedding_reference,
    fake=lambda x, cos, sin: x.new_empty(_check_rotary(x, cos, sin)),
)
register_op(
    "rms_norm(Tensor x, Tensor weight, float eps, bool weight_plus_one) -> (Tensor, Tensor)",
    rms_norm_reference,
    _norm_fake,
)
register_op(
    "rms_norm_backward(Tensor out_grad, Tensor x, Tensor weight, Tensor scale, bool weight_plus_one) -> "
    "(Tensor, Tensor)",
    rms_norm_backward_reference,
    fake=lambda *arguments: tuple(x.new_empty(x.shape) for x in _check_norm_backward(*arguments)),
)
register_op(
    "gated_activation(Tensor gate, Tensor up, str activation) -> Tensor",
    gated_activation_reference,
    fake=lambda gate, up, activation: gate.new_empty(_check_gate(_gate_check, gate, up, activation)),
)
register_op(
    "gated_activation_backward(Tensor out_grad, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)",
    gated_activation_backward_reference,
    fake=lambda *arguments: tuple(x.new_empty(x.shape) for x in _check_gate_backward(*arguments)),
)
torch.library.register_autograd("rrt::rotary_embedding", _rotary_gradients, setup_context=_setup_rotary)
torch.library.register_autograd("rrt::rms_norm", _norm_gradients, setup_context=_setup_norm)
torch.library.register_autograd("rrt::gated_activation", _gate_gradients, setup_context=_setup_gate)
for _name in ("rms_norm", "gated_activation"):
    torch.library.register_autograd(f"rrt::{_name}_backward", _no_second_derivative(_name))
_HAS_CPU_KERNELS = torch._C._dispatch_has_kernel_for_dispatch_key("rrt::rms_norm", "CPU")
