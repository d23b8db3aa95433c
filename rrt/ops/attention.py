"""`causal_attention`: attention for training; its backward recomputes the softmax from each query's log-sum-exp.

Shapes: B sequences of T tokens, H query heads, H_kv key/value heads, D_h head width.
"""

import os
from typing import Any, NoReturn

import torch
from torch import Tensor

from rrt.errors import UserError
from rrt.native import register_op
from rrt.ops.checks import Checks, accumulation_dtype
from rrt.ops.elementwise import has_native_kernels

_check = Checks("causal_attention")
_backward_check = Checks("causal_attention_backward")


# Read once, so that it cannot change within a training.
_SETTING = os.environ.get("RRT_ATTENTION") or "auto"
_SETTINGS = ("auto", "native", "torch")
_TORCH_HAS_TILES = torch.cpu._is_amx_tile_supported()
# There, the native attention is chosen up to these sizes.
_MAX_LENGTH_ON_TILES = 512
_MAX_HEAD_DIM_ON_TILES = 64


def prefers_native_attention(q: Tensor) -> bool:
    """Decide if `causal_attention` attends to plain rows q [B, T, H, D_h], or PyTorch's `scaled_dot_product_attention`.

    RRT_ATTENTION=native or torch decides for all shapes but packed texts, which always take the native one where it
    exists; native only where there are kernels for q's device. Otherwise the native one is taken on CPUs, but where
    PyTorch has AMX only for rows of at most 512 tokens and heads of at most 64 elements. On a Xeon with AMX, PyTorch's
    time over ours was, in `bench/training.py --only attention`:

        heads of        tokens   float32   bfloat16
        pythia-160m     512      1.27      1.16
        tinyllama-1.1b  2048     0.82      0.65
        gemma-2b        512      0.98      0.50

    These are of the AVX-512 kernels. Those for tiles, which bfloat16 has by now, have been timed nowhere, so that what
    was measured decides. It does by the CPU and the shape, not by a measurement in the process: that would
    vary with what else the machine does, and with it the bits of a training that is resumed.

    Raises:
        UserError: RRT_ATTENTION has another value.
    """
    if _SETTING not in _SETTINGS:
        raise UserError(f"RRT_ATTENTION: found {_SETTING!r}; expected one of {', '.join(_SETTINGS)}")
    if _SETTING == "torch" or not has_native_kernels(q):
        return False
    if _SETTING == "native" or not _TORCH_HAS_TILES:
        return True
    return q.shape[1] <= _MAX_LENGTH_ON_TILES and q.shape[3] <= _MAX_HEAD_DIM_ON_TILES


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, seen_until: Tensor | None = None) -> Tensor:
    """Attend from every token to itself and those before it in its sequence; with gradients of q, k and v.

    A native kernel exists for CPUs. It keeps the inputs, the result and one number per query, and spreads B * H parts
    of a backward over the threads; where H_kv is less than H, that takes twice q's elements in float32 meanwhile. NaN
    or infinity may spread to other tokens, masked ones included. There is no second derivative.

    Args:
        q: [B, T, H, D_h] float32, float64, bfloat16 or float16; H is a multiple of H_kv, and query head h reads
            key/value head ``h // (H // H_kv)``. Any strides; heads whose elements are not adjacent are copied.
        k, v: [B, T, H_kv, D_h] of q's dtype.
        scale: factor on the scores, before the softmax.
        seen_until: int32 [B, T], contiguous, or None, for several texts packed into one row, those that begin alike
            after what they share: the index of the first token after each that does not see it. A token sees itself,
            and of those before it those whose number is larger than its index.

    Returns:
        [B, T, H, D_h] of q's dtype, accumulated in float32 (float64 for float64). The native kernel gives the same
        bits whatever the number of threads.

    Raises:
        RuntimeError: a dtype, device or shape that does not fit; the message names the argument, what was found and
            what was expected.
    """
    out: Tensor = torch.ops.rrt.causal_attention.default(q, k, v, scale, seen_until)[0]
    return out


def causal_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, seen_until: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`causal_attention` in plain PyTorch, on any device; rounds as PyTorch does.

    Returns:
        The result, and [B, H, T] float32 (float64) the logarithm of the sum of each query's exponentials.
    """
    _check_inputs(_check, q, k, v, seen_until)
    q_heads, k_heads, v_heads = _heads(q, k, v)
    scores = _scores(q_heads, k_heads, scale, seen_until)
    out = scores.softmax(-1).to(v_heads.dtype) @ v_heads
    return out.transpose(1, 2).to(q.dtype).contiguous(), scores.logsumexp(-1)


def causal_attention_backward_reference(
    out_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    seen_until: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute gradients of q, k and v in plain PyTorch; `lse` is `causal_attention_reference`'s second result."""
    _check_backward(out_grad, q, k, v, out, lse, scale, seen_until)
    q_heads, k_heads, v_heads = _heads(q, k, v)
    p = (_scores(q_heads, k_heads, scale, seen_until) - lse[..., None]).exp()
    grad = out_grad.transpose(1, 2).to(p.dtype)
    delta = (grad * out.transpose(1, 2)).sum(-1, keepdim=True)
    slope = p * (grad @ v_heads.transpose(-1, -2) - delta) * scale
    grads = (slope @ k_heads, slope.transpose(-1, -2) @ q_heads, p.transpose(-1, -2) @ grad)
    q_grad, k_grad, v_grad = (grad.transpose(1, 2) for grad in grads)
    group = (k.shape[2], q.shape[2] // max(1, k.shape[2]))
    return (
        q_grad.to(q.dtype).contiguous(),
        k_grad.unflatten(2, group).sum(3).to(k.dtype),
        v_grad.unflatten(2, group).sum(3).to(v.dtype),
    )


def _heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return all three as [B, H, T, D_h] in at least float32, keys and values repeated for their query heads."""
    wide = accumulation_dtype(q)
    group = q.shape[2] // max(1, k.shape[2])
    return (
        q.transpose(1, 2).to(wide),
        k.repeat_interleave(group, 2).transpose(1, 2).to(wide),
        v.repeat_interleave(group, 2).transpose(1, 2).to(wide),
    )


def packed_texts_mask(seen_until: Tensor) -> Tensor:
    """Mask for several texts packed into one row.

    Args:
        seen_until: integers [B, T], as of `causal_attention`.

    Returns:
        bool [B, 1, T, T]: query i sees key j if j = i, or j < i < seen_until[j].
    """
    places = torch.arange(seen_until.shape[1], device=seen_until.device)
    until = torch.maximum(seen_until, places + 1)
    return (places[:, None] < until[:, None, None, :]).tril()


def _scores(q: Tensor, k: Tensor, scale: float, seen_until: Tensor | None) -> Tensor:
    """Compute scores [B, H, T, T], minus infinity at keys that a query does not see."""
    length = q.shape[2]
    mask = packed_texts_mask(q.new_full((1, length), length) if seen_until is None else seen_until)
    return (q @ k.transpose(-1, -2) * scale).masked_fill(~mask, float("-inf"))


def _check_inputs(check: Checks, q: Tensor, k: Tensor, v: Tensor, seen_until: Tensor | None) -> None:
    """Make the checks of csrc/attention/op.cpp, in its order."""
    check.float_dtype("q", q)
    for name, tensor in (("k", k), ("v", v)):
        check.dtype(name, tensor, q.dtype)
    for name, tensor in (("k", k), ("v", v)):
        check.same_device(name, tensor, q, "q")
    check.shape("q", q, "B", "T", "H", "D_h")
    batch, length, num_heads, head_dim = q.shape
    check.shape("k", k, batch, length, "H_kv", head_dim)
    check.shape("v", v, batch, length, k.shape[2], head_dim)
    check.multiple_of_kv_heads(num_heads, k.shape[2], "k")
    if seen_until is not None:
        check.dtype("seen_until", seen_until, torch.int32)
        check.same_device("seen_until", seen_until, q, "q")
        check.shape("seen_until", seen_until, batch, length)
        check.contiguous("seen_until", seen_until)


def _check_backward(
    out_grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    seen_until: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Make the backward's checks; return the tensors that its results are shaped like."""
    check = _backward_check
    _check_inputs(check, q, k, v, seen_until)
    for name, tensor in (("out_grad", out_grad), ("out", out)):
        check.like(name, tensor, q, "q")
        check.shape(name, tensor, *q.shape)
    check.dtype("lse", lse, accumulation_dtype(q))
    check.same_device("lse", lse, q, "q")
    check.shape("lse", lse, q.shape[0], q.shape[2], q.shape[1])
    check.contiguous("lse", lse)
    return q, k, v


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, scale: float, seen_until: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check_inputs(_check, q, k, v, seen_until)
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=accumulation_dtype(q))
    return q.new_empty(q.shape), lse


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.scale, seen_until = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, seen_until)


def _gradients(ctx: Any, out_grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, seen_until = ctx.saved_tensors
    backward = torch.ops.rrt.causal_attention_backward.default
    return (*backward(out_grad, *tensors, ctx.scale, seen_until), None, None)


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise RuntimeError("rrt::causal_attention: has no second derivative")


register_op(
    "causal_attention(Tensor q, Tensor k, Tensor v, float scale, Tensor? seen_until=None) -> (Tensor, Tensor)",
    causal_attention_reference,
    _forward_fake,
)
register_op(
    "causal_attention_backward(Tensor out_grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float scale, "
    "Tensor? seen_until=None) -> (Tensor, Tensor, Tensor)",
    causal_attention_backward_reference,
    fake=lambda *arguments: tuple(x.new_empty(x.shape) for x in _check_backward(*arguments)),
)
torch.library.register_autograd("rrt::causal_attention", _gradients, setup_context=_setup_context)
torch.library.register_autograd("rrt::causal_attention_backward", _no_second_derivative)
