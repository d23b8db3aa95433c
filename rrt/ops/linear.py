"""`loop_lora_linear` and `loop_lora_prefill`: a relaxed linear for rows of many loops, and of one.

M rows, K in, N out, R rank.
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import SymInt, Tensor

from rrt.native import register_op
from rrt.ops.checks import Checks

MAX_SEGMENTS = 8

_check = Checks("loop_lora_linear")
_prefill_check = Checks("loop_lora_prefill")


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
        bias: [N], or [loops, N] if every loop has its own, or None.
        lora_a: [loops, R, K]; R may be 0.
        lora_b: [loops, N, R].
        loops: int32 [M], in any order, each in [0, loops).
        segment_out, segment_rank: for a fused projection (q,k,v) whose segments have adapters of their own.
            Segment s is the next ``segment_out[s]`` rows of the weight; its A is the next ``segment_rank[s]`` rows
            of lora_a [loops, sum(segment_rank), K], its B the first ``segment_rank[s]`` columns of those rows of
            lora_b [loops, N, max(segment_rank)] (the other columns are not read). At most 8 segments.

    On a CPU, weight, lora_a and lora_b may be given packed, all three, as `pack_linear` returns them: faster, and with
    one result. N and the ranks are then segment_out and segment_rank, which must be given ([N] and [R] if there is one
    segment); columns of lora_b beyond a segment's rank must be finite; there are no gradients.

    Returns:
        [M, N] of x's dtype. The native kernels accumulate in float32 (float64 for float64) and round once, but for
        A x, which is rounded to x's dtype where matrix instructions multiply it: bfloat16 on CPUs with AVX512-BF16
        (which take subnormal numbers for zeros), bfloat16 and float16 on CUDA. A row's result is bitwise the same
        whatever other rows are in the batch. The reference promises neither.
        Differentiable in x, weight, bias, lora_a and lora_b.

    Raises:
        RuntimeError: a dtype, device, shape, stride or loop that does not fit; the message names the argument,
            what was found and what was expected. Loops on a CUDA device are not looked at, which would wait for it: a
            row whose loop lies outside [0, loops) becomes NaN.
    """
    y: Tensor = torch.ops.rrt.loop_lora_linear.default(
        x, weight, bias, lora_a, lora_b, loops, segment_out, segment_rank
    )
    return y


def loop_lora_prefill(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    loop: int,
    segment_out: Sequence[int] = (),
    segment_rank: Sequence[int] = (),
) -> Tensor:
    """`loop_lora_linear` for many rows that all have one loop: a matrix product over K and then over the rank.

    The loop is a number here, since to find out that all rows have one would wait for the device.

    Args:
        loop: in [0, loops). The others are those of `loop_lora_linear`, and not packed.

    Returns:
        [M, N] of x's dtype. On CUDA, bfloat16 and float16 whose rows are whole 16-byte vectors are multiplied in
        float32, A x rounded to x's dtype and the result once, by tiles of up to 128 rows: a row's result is bitwise the
        same whatever other rows there are. What does not fit takes `loop_lora_linear`'s kernels. On CPUs it is
        PyTorch's products, rounded after each. Differentiable as `loop_lora_linear`.

    Raises:
        RuntimeError: a dtype, device, shape, stride or loop that does not fit.
    """
    y: Tensor = torch.ops.rrt.loop_lora_prefill.default(
        x, weight, bias, lora_a, lora_b, loop, segment_out, segment_rank
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
    _check_arguments(_check, x, weight, bias, lora_a, lora_b, loops, segment_out, segment_rank)
    if weight.dim() == 3:
        n, k, total_rank = sum(segment_out), x.shape[1], sum(segment_rank)
        weight, lora_a = _unpack(weight, n, k), _unpack(lora_a, total_rank, k)
        lora_b = _unpack(lora_b, n, max(segment_rank))
    num_loops = lora_a.shape[0]
    outside = ((loops < 0) | (loops >= num_loops)).nonzero()
    if len(outside):
        row = int(outside[0])
        _check.fail(f"loops[{row}]", int(loops[row]), f"a loop in [0, {num_loops})")
    tied_bias = None if bias is None or bias.dim() == 2 else bias
    y = F.linear(x, weight, tied_bias)
    if bias is not None and tied_bias is None:
        y = y + bias[loops.long()]
    for loop in range(num_loops):
        rows = (loops == loop).nonzero().squeeze(1)
        for out, rank in _segments(weight.shape[0], lora_a.shape[1], segment_out, segment_rank):
            shrunk = F.linear(x[rows], lora_a[loop, rank])
            delta = F.linear(shrunk, lora_b[loop, out, : shrunk.shape[1]])
            y[:, out] = y[:, out].index_add(0, rows, delta)
    return y


def loop_lora_prefill_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    loop: int,
    segment_out: Sequence[int] = (),
    segment_rank: Sequence[int] = (),
) -> Tensor:
    """`loop_lora_prefill` in plain PyTorch, on any device: same arguments and errors; rounds after each product."""
    _check_prefill_arguments(x, weight, bias, lora_a, lora_b, loop, segment_out, segment_rank)
    y = F.linear(x, weight, bias[loop] if bias is not None and bias.dim() == 2 else bias)
    for out, rank in _segments(weight.shape[0], lora_a.shape[1], segment_out, segment_rank):
        y[:, out] += F.linear(F.linear(x, lora_a[loop, rank]), lora_b[loop, out, : rank.stop - rank.start])
    return y


def pack_linear(weight: Tensor) -> Tensor:
    """A copy of a linear's weight (or lora_a, lora_b) in the order in which `loop_lora_linear` reads it on a CPU.

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
    size = _packed_size(weight)
    width = size[-1] // _PANEL
    n, k = weight.shape[-2:]
    padded = F.pad(weight, (0, size[-2] * width - k, 0, size[-3] * _PANEL - n))
    panels = padded.unflatten(-1, (size[-2], width)).unflatten(-3, (size[-3], _PANEL))
    return panels.transpose(-3, -2).reshape(size).contiguous()


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """``W x + b`` with a weight that `pack_linear` packed: `loop_lora_linear` without LoRA, for CPUs; no gradients.

    Args:
        x: [..., K].
        packed: what `pack_linear` made of W [N, K], of x's dtype.
        bias: [N], contiguous, or None.
        out_features: N.

    Returns:
        [..., N]; a row's result is bitwise the same whatever other rows there are.

    Raises:
        RuntimeError: a dtype, device or shape that does not fit.
    """
    rows = x.reshape(-1, x.shape[-1])
    lora_a = packed.new_empty(1, *_panel_size(x.dtype, 0, x.shape[-1]))
    lora_b = packed.new_empty(1, *_panel_size(x.dtype, out_features, 0))
    loops = torch.zeros(len(rows), dtype=torch.int32, device=x.device)
    y = loop_lora_linear(rows, packed, bias, lora_a, lora_b, loops, (out_features,), (0,))
    return y.view(*x.shape[:-1], out_features)


def logit_statistics(x: Tensor, packed: Tensor, num_logits: int) -> tuple[Tensor, Tensor]:
    """What a softmax over ``x W^T`` needs of it, without that matrix in memory. For CPUs; it has no gradient.

    Args:
        x: [M, K] float32, float64, bfloat16 or float16. Any strides; rows whose elements are not adjacent are copied.
        packed: what `pack_linear` made of W [num_logits, K], of x's dtype.
        num_logits: V, at least 1.

    Returns:
        For each row the logarithm of the sum of its exponentials, [M] float32 (float64 for float64), and the index of
        its largest logit, the first of equals, [M] int64. Accumulated in float32 (float64); a row's results are bitwise
        the same in any batch. The reference promises neither.

    Raises:
        RuntimeError: a dtype, device, shape or stride that does not fit.
    """
    log_sum_exp: Tensor
    argmax: Tensor
    log_sum_exp, argmax = torch.ops.rrt.logit_statistics.default(x, packed, num_logits)
    return log_sum_exp, argmax


def logit_statistics_reference(x: Tensor, packed: Tensor, num_logits: int) -> tuple[Tensor, Tensor]:
    """`logit_statistics` in plain PyTorch, on any device."""
    _check_statistics(x, packed, num_logits)
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = F.linear(x.to(wide), _unpack(packed, num_logits, x.shape[1]).to(wide))
    return logits.logsumexp(1), logits.argmax(1)


def _unpack(packed: Tensor, n: int, k: int) -> Tensor:
    width = packed.shape[-1] // _PANEL
    panels = packed.unflatten(-1, (_PANEL, width)).transpose(-3, -2)
    return panels.flatten(-2).flatten(-3, -2)[..., :n, :k]


_PANEL = 32  # csrc/loop_lora/launch.h


def _packed_size(weight: Tensor) -> list[Any]:
    check = Checks("pack_linear")
    check.float_dtype("weight", weight)
    if weight.dim() != 3:
        check.shape("weight", weight, "N", "K")
    check.contiguous("weight", weight)
    n, k = weight.shape[-2:]
    return [*weight.shape[:-2], *_panel_size(weight.dtype, n, k)]


def _panel_size(dtype: torch.dtype, n: Any, k: Any) -> tuple[Any, Any, int]:
    width = 2 if dtype == torch.bfloat16 else 1
    return (n + _PANEL - 1) // _PANEL, (k + width - 1) // width, _PANEL * width


def _check_statistics(x: Tensor, packed: Tensor, num_logits: int) -> None:
    """What csrc/loop_lora/op.cpp checks, in the same order."""
    check = Checks("logit_statistics")
    check.float_dtype("x", x)
    check.dtype("packed", packed, x.dtype)
    check.same_device("packed", packed, x, "x")
    check.shape("x", x, "M", "K")
    if num_logits < 1:
        check.fail("num_logits", num_logits, "at least 1")
    check.shape("packed", packed, *_panel_size(x.dtype, num_logits, x.shape[1]))
    check.contiguous("packed", packed)


def _logit_statistics_fake(x: Tensor, packed: Tensor, num_logits: int) -> tuple[Tensor, Tensor]:
    _check_statistics(x, packed, num_logits)
    rows, wide = x.shape[0], torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(rows, dtype=wide), x.new_empty(rows, dtype=torch.int64)


def _no_gradient(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise RuntimeError("rrt::logit_statistics: has no gradient")


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
    check: Checks,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    loops: Tensor | None,
    segment_out: Sequence[int],
    segment_rank: Sequence[int],
) -> None:
    """What csrc/loop_lora/op.cpp checks, in the same order, but for the loops' values.

    `loops` is None where all rows have one; packed weights are then not expected.
    """
    parameters = {"weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b}
    present = {name: tensor for name, tensor in parameters.items() if tensor is not None}
    check.float_dtype("x", x)
    for name, tensor in present.items():
        check.dtype(name, tensor, x.dtype)
    everything = present if loops is None else {**present, "loops": loops}
    if loops is not None:
        check.dtype("loops", loops, torch.int32)
    for name, tensor in everything.items():
        check.same_device(name, tensor, x, "x")
    check.shape("x", x, "M", "K")
    k = x.shape[1]
    n: Any
    total_rank: Any
    b_rank: Any
    packed = loops is not None and weight.dim() == 3
    _check_segment_lists(check, segment_out, segment_rank, packed)
    if packed:
        n, total_rank, b_rank = sum(segment_out), sum(segment_rank), max(segment_rank, default=0)
        check.shape("weight", weight, *_panel_size(x.dtype, n, k))
    else:
        check.shape("weight", weight, "N", k)
        n = weight.shape[0]
    if bias is not None and bias.dim() != 2:
        check.shape("bias", bias, n)
    if packed:
        check.shape("lora_a", lora_a, "loops", *_panel_size(x.dtype, total_rank, k))
    else:
        check.shape("lora_a", lora_a, "loops", "R", k)
        total_rank = lora_a.shape[1]
    if bias is not None and bias.dim() == 2:
        check.shape("bias", bias, lora_a.shape[0], n)
    if packed:
        check.shape("lora_b", lora_b, lora_a.shape[0], *_panel_size(x.dtype, n, b_rank))
    else:
        check.shape("lora_b", lora_b, lora_a.shape[0], n, "R")
        b_rank = lora_b.shape[2]
    if loops is not None:
        check.shape("loops", loops, x.shape[0])
    _check_segments(check, segment_out, segment_rank, n, total_rank, b_rank)
    for name, tensor in present.items():
        check.contiguous(name, tensor)


def _check_segment_lists(check: Checks, out: Sequence[int], rank: Sequence[int], packed: bool) -> None:
    if packed and not out:
        check.fail("segment_out", [], "the packed weight's segments (one of all its rows, if there is one)")
    if len(out) != len(rank):
        check.fail("segment_rank", f"{len(rank)} entries", f"{len(out)} as in segment_out")
    if len(out) > MAX_SEGMENTS:
        check.fail("segment_out", f"{len(out)} entries", f"at most {MAX_SEGMENTS}")
    lists = (("segment_out", out), ("segment_rank", rank))
    for name, values in lists:
        if max(values, default=0) > 2**31 - 1:
            check.fail(name, list(values), f"no entry above {2**31 - 1}")
    for name, values in lists:
        if min(values, default=0) < 0:
            check.fail(name, list(values), "no negative entry")


def _check_segments(
    check: Checks, out: Sequence[int], rank: Sequence[int], n: int | SymInt, a_rank: int | SymInt, b_rank: int | SymInt
) -> None:
    if not out:
        if a_rank != b_rank:
            check.fail("lora_b", f"rank {b_rank}", f"{a_rank} as in lora_a")
        return
    if sum(out) != n:
        check.fail("segment_out", list(out), f"a sum of {n}, the weight's rows")
    if sum(rank) != a_rank:
        check.fail("lora_a", f"rank {a_rank}", f"{sum(rank)}, the sum of segment_rank")
    if max(rank) != b_rank:
        check.fail("lora_b", f"rank {b_rank}", f"{max(rank)}, the largest of segment_rank")


def _check_prefill_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    loop: int,
    segment_out: Sequence[int],
    segment_rank: Sequence[int],
) -> None:
    _check_arguments(_prefill_check, x, weight, bias, lora_a, lora_b, None, segment_out, segment_rank)
    if not 0 <= loop < lora_a.shape[0]:
        _prefill_check.fail("loop", loop, f"a loop in [0, {lora_a.shape[0]})")


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
    _check_arguments(_check, x, weight, bias, lora_a, lora_b, loops, segment_out, segment_rank)
    return x.new_empty(x.shape[0], sum(segment_out) if weight.dim() == 3 else weight.shape[0])


def _loop_lora_prefill_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    loop: int,
    segment_out: Sequence[int] = (),
    segment_rank: Sequence[int] = (),
) -> Tensor:
    _check_prefill_arguments(x, weight, bias, lora_a, lora_b, loop, segment_out, segment_rank)
    return x.new_empty(x.shape[0], weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, lora_a, lora_b, loops, ctx.segment_out, ctx.segment_rank = inputs
    if weight.dim() == 3:
        raise RuntimeError(
            "rrt::loop_lora_linear: packed weights have no gradients; call it under torch.no_grad(), or unpacked"
        )
    ctx.bias_per_loop = bias is not None and bias.dim() == 2
    ctx.save_for_backward(x, weight, lora_a, lora_b, loops)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients by the chain rule through T = A_l x, each loop's over its own rows.

    Rows are chosen by masks, for their number is data, not shape; and on both sides of a product, so that one loop's
    infinities and NaN stay its own.
    """
    x, weight, lora_a, lora_b, loops = ctx.saved_tensors
    need_x, need_weight, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
    grad_x = grad @ weight if need_x else None
    grad_a = torch.zeros_like(lora_a) if need_a else None
    grad_b = torch.zeros_like(lora_b) if need_b else None
    segments = _segments(weight.shape[0], lora_a.shape[1], ctx.segment_out, ctx.segment_rank)
    for loop in range(lora_a.shape[0]):
        mine = (loops == loop).unsqueeze(1)
        grad_of_loop, x_of_loop = torch.where(mine, grad, 0), torch.where(mine, x, 0)
        for out, rank in segments:
            size = rank.stop - rank.start
            grad_y, a, b = grad_of_loop[:, out], lora_a[loop, rank], lora_b[loop, out, :size]
            grad_t = grad_y @ b
            if grad_x is not None:
                grad_x = grad_x + torch.where(mine, grad_t @ a, 0)
            if grad_a is not None:
                grad_a[loop, rank] = torch.where(mine, grad_t, 0).T @ x_of_loop
            if grad_b is not None:
                grad_b[loop, out, :size] = grad_y.T @ torch.where(mine, F.linear(x_of_loop, a), 0)
    grad_weight = grad.T @ x if need_weight else None
    grad_bias = None
    if need_bias and ctx.bias_per_loop:
        grad_bias = grad.new_zeros(lora_a.shape[0], grad.shape[1]).index_add(0, loops, grad)
    elif need_bias:
        grad_bias = grad.sum(0)
    return grad_x, grad_weight, grad_bias, grad_a, grad_b, None, None, None


def _setup_prefill_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, lora_a, lora_b, ctx.loop, ctx.segment_out, ctx.segment_rank = inputs
    ctx.bias_per_loop = bias is not None and bias.dim() == 2
    ctx.save_for_backward(x, weight, lora_a, lora_b)


def _prefill_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """As `_backward`, of the one loop."""
    x, weight, lora_a, lora_b = ctx.saved_tensors
    need_x, need_weight, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
    grad_x = grad @ weight if need_x else None
    grad_a = torch.zeros_like(lora_a) if need_a else None
    grad_b = torch.zeros_like(lora_b) if need_b else None
    for out, rank in _segments(weight.shape[0], lora_a.shape[1], ctx.segment_out, ctx.segment_rank):
        size = rank.stop - rank.start
        a, b = lora_a[ctx.loop, rank], lora_b[ctx.loop, out, :size]
        grad_t = grad[:, out] @ b
        if grad_x is not None:
            grad_x = grad_x + grad_t @ a
        if grad_a is not None:
            grad_a[ctx.loop, rank] = grad_t.T @ x
        if grad_b is not None:
            grad_b[ctx.loop, out, :size] = grad[:, out].T @ F.linear(x, a)
    grad_weight = grad.T @ x if need_weight else None
    grad_bias = grad.sum(0) if need_bias else None
    if grad_bias is not None and ctx.bias_per_loop:
        every = grad.new_zeros(lora_a.shape[0], grad.shape[1])
        every[ctx.loop] = grad_bias
        grad_bias = every
    return grad_x, grad_weight, grad_bias, grad_a, grad_b, None, None, None


register_op(
    "loop_lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor loops, "
    "int[] segment_out=[], int[] segment_rank=[]) -> Tensor",
    loop_lora_linear_reference,
    _loop_lora_linear_fake,
)
register_op(
    "loop_lora_prefill(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, int loop, "
    "int[] segment_out=[], int[] segment_rank=[]) -> Tensor",
    loop_lora_prefill_reference,
    _loop_lora_prefill_fake,
    cpu=loop_lora_prefill_reference,
)
register_op(
    "logit_statistics(Tensor x, Tensor packed, int num_logits) -> (Tensor, Tensor)",
    logit_statistics_reference,
    _logit_statistics_fake,
)
register_op("pack_linear(Tensor weight) -> Tensor", pack_linear_reference, lambda w: w.new_empty(_packed_size(w)))
torch.library.register_autograd("rrt::logit_statistics", _no_gradient)
torch.library.register_autograd("rrt::loop_lora_linear", _backward, setup_context=_setup_context)
torch.library.register_autograd("rrt::loop_lora_prefill", _prefill_backward, setup_context=_setup_prefill_context)
