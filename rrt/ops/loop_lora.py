"""`loop_lora_linear` and `loop_lora_prefill`: a relaxed linear for rows of many loops, and for rows of one.

Shapes: M rows, K in, N out, R rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import SymInt, Tensor

from rrt.native import register_op
from rrt.ops.checks import Checks
from rrt.ops.packing import packed_shape, unpack_linear

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
        (which flush subnormal numbers to zero), bfloat16 and float16 on CUDA. A row's result is bitwise the same
        whatever other rows are in the batch, if lora_b is finite. The reference promises neither.
        On sm_90 weight may be read while earlier kernels still run: nothing shortly before on the stream may write it.
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
        same whatever other rows there are. Any other input takes `loop_lora_linear`'s kernels. On CPUs it is
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
    arguments = _Arguments(x, weight, bias, lora_a, lora_b, loops, segment_out, segment_rank)
    _, n = arguments.check(_check)
    if arguments.is_packed:
        k, total_rank = x.shape[1], sum(segment_rank)
        weight, lora_a = unpack_linear(weight, n, k), unpack_linear(lora_a, total_rank, k)
        lora_b = unpack_linear(lora_b, n, max(segment_rank))
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
        for out, rank in _segments(n, lora_a.shape[1], segment_out, segment_rank):
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
    _, n = _Arguments(x, weight, bias, lora_a, lora_b, loop, segment_out, segment_rank).check(_prefill_check)
    y = F.linear(x, weight, bias[loop] if bias is not None and bias.dim() == 2 else bias)
    for out, rank in _segments(n, lora_a.shape[1], segment_out, segment_rank):
        y[:, out] += F.linear(F.linear(x, lora_a[loop, rank]), lora_b[loop, out, : rank.stop - rank.start])
    return y


@dataclass(frozen=True)
class _Arguments:
    """Arguments of both operators, in the order of their schemas."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    loops: Tensor | int
    """One loop per row, or the loop of all rows; only the former takes packed weights."""
    segment_out: Sequence[int] = ()
    segment_rank: Sequence[int] = ()

    @property
    def is_packed(self) -> bool:
        return isinstance(self.loops, Tensor) and self.weight.dim() == 3

    def check(self, check: Checks) -> tuple[Any, Any]:
        """Make the checks of csrc/loop_lora/op.cpp in its order, but for each row's loop; return the result's shape."""
        x, weight, bias, lora_a, lora_b = self.x, self.weight, self.bias, self.lora_a, self.lora_b
        loops = self.loops if isinstance(self.loops, Tensor) else None
        named = {"weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b}
        parameters = {name: tensor for name, tensor in named.items() if tensor is not None}
        check.float_dtype("x", x)
        for name, tensor in parameters.items():
            check.dtype(name, tensor, x.dtype)
        if loops is not None:
            check.dtype("loops", loops, torch.int32)
        for name, tensor in {**parameters, **({} if loops is None else {"loops": loops})}.items():
            check.same_device(name, tensor, x, "x")
        check.shape("x", x, "M", "K")
        self._check_segment_lists(check)
        k = x.shape[1]
        n: Any = sum(self.segment_out)
        if self.is_packed:
            check.shape("weight", weight, *packed_shape(x.dtype, n, k))
        else:
            check.shape("weight", weight, "N", k)
            n = weight.shape[0]
        if bias is not None and bias.dim() != 2:
            check.shape("bias", bias, n)
        a_rank: Any = sum(self.segment_rank)
        b_rank: Any = max(self.segment_rank, default=0)
        if self.is_packed:
            check.shape("lora_a", lora_a, "loops", *packed_shape(x.dtype, a_rank, k))
        else:
            check.shape("lora_a", lora_a, "loops", "R", k)
            a_rank = lora_a.shape[1]
        num_loops = lora_a.shape[0]
        if bias is not None and bias.dim() == 2:
            check.shape("bias", bias, num_loops, n)
        if self.is_packed:
            check.shape("lora_b", lora_b, num_loops, *packed_shape(x.dtype, n, b_rank))
        else:
            check.shape("lora_b", lora_b, num_loops, n, "R")
            b_rank = lora_b.shape[2]
        if loops is not None:
            check.shape("loops", loops, x.shape[0])
        self._check_segments(check, n, a_rank, b_rank)
        for name, tensor in parameters.items():
            check.contiguous(name, tensor)
        if not isinstance(self.loops, Tensor) and not 0 <= self.loops < num_loops:
            check.fail("loop", self.loops, f"a loop in [0, {num_loops})")
        return x.shape[0], n

    def _check_segment_lists(self, check: Checks) -> None:
        out, rank = self.segment_out, self.segment_rank
        if self.is_packed and not out:
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

    def _check_segments(self, check: Checks, n: int | SymInt, a_rank: int | SymInt, b_rank: int | SymInt) -> None:
        out, rank = self.segment_out, self.segment_rank
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


def _segments(
    n: int, total_rank: int, segment_out: Sequence[int], segment_rank: Sequence[int]
) -> list[tuple[slice, slice]]:
    """List per segment the slice of the weight's rows and of lora_a's; everything is one segment if none is given."""
    if not segment_out:
        return [(slice(0, n), slice(0, total_rank))]
    segments = []
    out_begin = rank_begin = 0
    for out, rank in zip(segment_out, segment_rank, strict=True):
        segments.append((slice(out_begin, out_begin + out), slice(rank_begin, rank_begin + rank)))
        out_begin += out
        rank_begin += rank
    return segments


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    arguments = _Arguments(*inputs)
    if arguments.is_packed:
        raise RuntimeError(
            "rrt::loop_lora_linear: packed weights have no gradients; call it under torch.no_grad(), or unpacked"
        )
    ctx.has_bias_per_loop = arguments.bias is not None and arguments.bias.dim() == 2
    ctx.segment_out, ctx.segment_rank = arguments.segment_out, arguments.segment_rank
    is_tensor = isinstance(arguments.loops, Tensor)
    ctx.loop = None if is_tensor else arguments.loops
    loops = arguments.loops if is_tensor else None
    ctx.save_for_backward(arguments.x, arguments.weight, arguments.lora_a, arguments.lora_b, loops)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Compute gradients by the chain rule through T = A_l x, each loop's over its own rows."""
    x, weight, lora_a, lora_b, loops = ctx.saved_tensors
    need_x, need_weight, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
    grad_x = grad @ weight if need_x else None
    grad_a = torch.zeros_like(lora_a) if need_a else None
    grad_b = torch.zeros_like(lora_b) if need_b else None
    segments = _segments(weight.shape[0], lora_a.shape[1], ctx.segment_out, ctx.segment_rank)
    for loop, rows in _rows_by_loop(ctx.loop, loops, lora_a.shape[0]):
        grad_of_loop, x_of_loop = _zero_other_rows(rows, grad), _zero_other_rows(rows, x)
        for out, rank in segments:
            size = rank.stop - rank.start
            grad_y, a, b = grad_of_loop[:, out], lora_a[loop, rank], lora_b[loop, out, :size]
            grad_t = grad_y @ b
            if grad_x is not None:
                grad_x = grad_x + _zero_other_rows(rows, grad_t @ a)
            if grad_a is not None:
                grad_a[loop, rank] = _zero_other_rows(rows, grad_t).T @ x_of_loop
            if grad_b is not None:
                grad_b[loop, out, :size] = grad_y.T @ _zero_other_rows(rows, F.linear(x_of_loop, a))
    grad_weight = grad.T @ x if need_weight else None
    grad_bias = None
    if need_bias and not ctx.has_bias_per_loop:
        grad_bias = grad.sum(0)
    elif need_bias:
        grad_bias = grad.new_zeros(lora_a.shape[0], grad.shape[1])
        if loops is None:
            grad_bias[ctx.loop] = grad.sum(0)
        else:
            grad_bias = grad_bias.index_add(0, loops, grad)
    return grad_x, grad_weight, grad_bias, grad_a, grad_b, None, None, None


def _rows_by_loop(loop: int | None, loops: Tensor | None, num_loops: int) -> Iterator[tuple[int, Tensor | None]]:
    """Yield each loop with a mask [M, 1] of its rows; or the one loop of all rows, without a mask.

    Exactly one of `loop` and `loops` is given.
    """
    if loops is None:
        assert loop is not None
        yield loop, None
    else:
        for i in range(num_loops):
            yield i, (loops == i).unsqueeze(1)


def _zero_other_rows(rows: Tensor | None, values: Tensor) -> Tensor:
    """Keep `rows` of the values and set the others to zero.

    By a mask: an index's length would depend on data, which tracing forbids. Applied on both sides of a product, so
    that one loop's infinities and NaN stay its own.
    """
    return values if rows is None else torch.where(rows, values, 0)


def _register(name: str, loops: str, reference: Any, check: Checks, cpu: Any = None) -> None:
    def fake(*inputs: Any) -> Tensor:
        arguments = _Arguments(*inputs)
        return arguments.x.new_empty(arguments.check(check))

    register_op(
        f"{name}(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, {loops}, "
        "int[] segment_out=[], int[] segment_rank=[]) -> Tensor",
        reference,
        fake,
        cpu=cpu,
    )
    torch.library.register_autograd(f"rrt::{name}", _backward, setup_context=_setup_context)


_register("loop_lora_linear", "Tensor loops", loop_lora_linear_reference, _check)
_register("loop_lora_prefill", "int loop", loop_lora_prefill_reference, _prefill_check, cpu=loop_lora_prefill_reference)
