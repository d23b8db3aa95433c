"""`loop_lora_linear`: one relaxed linear for rows of many loops. M rows, K in, N out, R rank."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import SymInt, Tensor

from rrt._build import register_op
from rrt.ops.checks import Checks

_check = Checks("loop_lora_linear")


def loop_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    loops: Tensor,
    segment_out: Sequence[int] = (),
    segment_rank: Sequence[int] = (),
) -> Tensor:
    """``y[i] = W x[i] + b + B[l] A[l] x[i]`` with ``l = loops[i]``: one relaxed linear for rows of many loops.

    Args:
        x: [M, K] float32, float64, bfloat16 or float16. Rows may lie at any stride; other layouts are copied.
        weight: [N, K], contiguous like the other parameters, all of x's dtype and device.
        bias: [N] or None.
        lora_a: [loops, R, K]; R may be 0.
        lora_b: [loops, N, R].
        loops: int32 [M], in any order, each in [0, loops).
        segment_out, segment_rank: for a fused projection (q,k,v) whose segments have adapters of their own.
            Segment s is the next ``segment_out[s]`` rows of the weight; its A is the next ``segment_rank[s]`` rows
            of lora_a [loops, sum(segment_rank), K], its B the first ``segment_rank[s]`` columns of those rows of
            lora_b [loops, N, max(segment_rank)] (the other columns are not read).

    Returns:
        [M, N] of x's dtype. The native kernel accumulates in float32 (float64 for float64) and rounds once; a
        row's result is bitwise the same whatever other rows are in the batch. The reference promises neither.
        Differentiable in x, weight, bias, lora_a and lora_b.

    Raises:
        RuntimeError: a dtype, device, shape, stride or loop that does not fit; the message names the argument,
            what was found and what was expected.
    """
    y: Tensor = torch.ops.rrt.loop_lora_linear.default(
        x, weight, bias, lora_a, lora_b, loops, segment_out, segment_rank
    )
    return y


def loop_lora_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    loops: Tensor,
    segment_out: Sequence[int] = (),
    segment_rank: Sequence[int] = (),
) -> Tensor:
    """`loop_lora_linear` in plain PyTorch, on any device: same arguments and errors; rounds after each product."""
    _check_arguments(x, weight, bias, lora_a, lora_b, loops, segment_out, segment_rank)
    num_loops = lora_a.shape[0]
    outside = ((loops < 0) | (loops >= num_loops)).nonzero()
    if len(outside):
        row = int(outside[0])
        _check.fail(f"loops[{row}]", int(loops[row]), f"a loop in [0, {num_loops})")
    y = F.linear(x, weight, bias)
    for loop in range(num_loops):
        rows = (loops == loop).nonzero().squeeze(1)
        for out, rank in _segments(weight.shape[0], lora_a.shape[1], segment_out, segment_rank):
            shrunk = F.linear(x[rows], lora_a[loop, rank])
            delta = F.linear(shrunk, lora_b[loop, out, : shrunk.shape[1]])
            y[:, out] = y[:, out].index_add(0, rows, delta)
    return y


def _segments(
    n: int, total_rank: int, segment_out: Sequence[int], segment_rank: Sequence[int]
) -> list[tuple[slice, slice]]:
    """Per segment the slice of the weight's rows and of lora_a's; everything is one segment if none is given."""
    if not segment_out:
        return [(slice(0, n), slice(0, total_rank))]
    segments = []
    out_begin = rank_begin = 0
    for out, rank in zip(segment_out, segment_rank, strict=True):
        segments.append((slice(out_begin, out_begin + out), slice(rank_begin, rank_begin + rank)))
        out_begin += out
        rank_begin += rank
    return segments


def _check_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    loops: Tensor,
    segment_out: Sequence[int],
    segment_rank: Sequence[int],
) -> None:
    """What csrc/loop_lora/op.cpp checks, in the same order, but for the loops' values."""
    parameters = {"weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b}
    present = {name: tensor for name, tensor in parameters.items() if tensor is not None}
    _check.float_dtype("x", x)
    for name, tensor in present.items():
        _check.dtype(name, tensor, x.dtype)
    _check.dtype("loops", loops, torch.int32)
    for name, tensor in [*present.items(), ("loops", loops)]:
        _check.same_device(name, tensor, x, "x")
    _check.shape("x", x, "M", "K")
    _check.shape("weight", weight, "N", x.shape[1])
    if bias is not None:
        _check.shape("bias", bias, weight.shape[0])
    _check.shape("lora_a", lora_a, "loops", "R", x.shape[1])
    _check.shape("lora_b", lora_b, lora_a.shape[0], weight.shape[0], "R")
    _check.shape("loops", loops, x.shape[0])
    _check_segments(segment_out, segment_rank, weight.shape[0], lora_a.shape[1], lora_b.shape[2])
    for name, tensor in present.items():
        _check.contiguous(name, tensor)


def _check_segments(
    out: Sequence[int], rank: Sequence[int], n: int | SymInt, a_rank: int | SymInt, b_rank: int | SymInt
) -> None:
    if len(out) != len(rank):
        _check.fail("segment_rank", f"{len(rank)} entries", f"{len(out)} as in segment_out")
    if not out:
        if a_rank != b_rank:
            _check.fail("lora_b", f"rank {b_rank}", f"{a_rank} as in lora_a")
        return
    for name, values in (("segment_out", out), ("segment_rank", rank)):
        if min(values) < 0:
            _check.fail(name, list(values), "no negative entry")
    if sum(out) != n:
        _check.fail("segment_out", list(out), f"a sum of {n}, the weight's rows")
    if sum(rank) != a_rank:
        _check.fail("lora_a", f"rank {a_rank}", f"{sum(rank)}, the sum of segment_rank")
    if max(rank) != b_rank:
        _check.fail("lora_b", f"rank {b_rank}", f"{max(rank)}, the largest of segment_rank")


def _loop_lora_linear_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    loops: Tensor,
    segment_out: Sequence[int] = (),
    segment_rank: Sequence[int] = (),
) -> Tensor:
    _check_arguments(x, weight, bias, lora_a, lora_b, loops, segment_out, segment_rank)
    return x.new_empty(x.shape[0], weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _bias, lora_a, lora_b, loops, ctx.segment_out, ctx.segment_rank = inputs
    ctx.save_for_backward(x, weight, lora_a, lora_b, loops)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients by the chain rule through T = A_l x. Rows are chosen by masks: their number is data, not shape."""
    x, weight, lora_a, lora_b, loops = ctx.saved_tensors
    need_x, need_weight, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
    grad_x = grad @ weight if need_x else None
    grad_a = torch.zeros_like(lora_a) if need_a else None
    grad_b = torch.zeros_like(lora_b) if need_b else None
    segments = _segments(weight.shape[0], lora_a.shape[1], ctx.segment_out, ctx.segment_rank)
    for loop in range(lora_a.shape[0]):
        grad_of_loop = torch.where((loops == loop).unsqueeze(1), grad, 0)
        for out, rank in segments:
            size = rank.stop - rank.start
            grad_y, a, b = grad_of_loop[:, out], lora_a[loop, rank], lora_b[loop, out, :size]
            grad_t = grad_y @ b
            if grad_x is not None:
                grad_x = grad_x + grad_t @ a
            if grad_a is not None:
                grad_a[loop, rank] = grad_t.T @ x
            if grad_b is not None:
                grad_b[loop, out, :size] = grad_y.T @ F.linear(x, a)
    grad_weight = grad.T @ x if need_weight else None
    grad_bias = grad.sum(0) if need_bias else None
    return grad_x, grad_weight, grad_bias, grad_a, grad_b, None, None, None


register_op(
    "loop_lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor loops, "
    "int[] segment_out=[], int[] segment_rank=[]) -> Tensor",
    loop_lora_linear_reference,
    _loop_lora_linear_fake,
)
torch.library.register_autograd("rrt::loop_lora_linear", _backward, setup_context=_setup_context)
