"""`logit_statistics`: the logarithm of the softmax's sum and the argmax of each row, without the logits in memory.

Shapes: M rows, K in, V logits.
"""

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from rrt.native import register_op
from rrt.ops.checks import Checks, accumulation_dtype
from rrt.ops.packing import packed_shape, unpack_linear

_check = Checks("logit_statistics")


def logit_statistics(x: Tensor, packed: Tensor, num_logits: int) -> tuple[Tensor, Tensor]:
    """Compute log-sum-exp and argmax of each row of ``x W^T`` without that matrix in memory. For CPUs; no gradient.

    Args:
        x: [M, K] float32, float64, bfloat16 or float16. Any strides; rows whose elements are not adjacent are copied.
        packed: `pack_linear` of W [num_logits, K], of x's dtype.
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
    _check_arguments(x, packed, num_logits)
    wide = accumulation_dtype(x)
    logits = F.linear(x.to(wide), unpack_linear(packed, num_logits, x.shape[1]).to(wide))
    return logits.logsumexp(1), logits.argmax(1)


def _check_arguments(x: Tensor, packed: Tensor, num_logits: int) -> None:
    """Make the checks of csrc/packed_linear/op.cpp, in its order."""
    _check.float_dtype("x", x)
    _check.like("packed", packed, x, "x")
    _check.shape("x", x, "M", "K")
    if num_logits < 1:
        _check.fail("num_logits", num_logits, "at least 1")
    _check.shape("packed", packed, *packed_shape(x.dtype, num_logits, x.shape[1]))
    _check.contiguous("packed", packed)


def _fake(x: Tensor, packed: Tensor, num_logits: int) -> tuple[Tensor, Tensor]:
    _check_arguments(x, packed, num_logits)
    rows = x.shape[0]
    return x.new_empty(rows, dtype=accumulation_dtype(x)), x.new_empty(rows, dtype=torch.int64)


def _no_gradient(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise RuntimeError("rrt::logit_statistics: has no gradient")


register_op(
    "logit_statistics(Tensor x, Tensor packed, int num_logits) -> (Tensor, Tensor)", logit_statistics_reference, _fake
)
torch.library.register_autograd("rrt::logit_statistics", _no_gradient)
