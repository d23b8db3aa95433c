"""What a device computes products of matrices in."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

_HAS_BF16_INSTRUCTIONS = platform.machine() != "x86_64" or torch.cpu._is_avx512_bf16_supported()
_choices: list[str] = []


@contextmanager
def pretend_device(device: str) -> Iterator[None]:
    """Compute as on a device of this type wherever the tensors are: for estimates on tensors without memory."""
    _choices.append(device)
    try:
        yield
    finally:
        _choices.pop()


def device_type(tensor: Tensor) -> str:
    """ "cpu" or "cuda": what to compute as."""
    return _choices[-1] if _choices else tensor.device.type


EMULATED_FROM_ROWS = 16
"""With fewer rows a product takes as long as it takes to read the weight, which is then better not widened."""


def product_dtype(tensor: Tensor, rows: int = EMULATED_FROM_ROWS) -> torch.dtype:
    """What to compute a product of `rows` rows in: `tensor`'s dtype, or fp32 for 16 bits that would be emulated.

    torch emulates them on x86 CPUs without AVX512-BF16, several times slower than fp32.
    """
    emulated = tensor.dtype.itemsize == 2 and device_type(tensor) == "cpu" and not _HAS_BF16_INSTRUCTIONS
    return torch.float32 if emulated and rows >= EMULATED_FROM_ROWS else tensor.dtype


_WIDENED_AT_ONCE = 2**25
"""Elements of a weight. A whole head in fp32 would take gigabytes."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``, computed in `product_dtype`: x [..., K], weight [N, K] and bias [N] give [..., N] of x's dtype."""
    wide = product_dtype(x, x.numel() // x.shape[-1])
    if wide == x.dtype:
        return F.linear(x, weight, bias)
    wide_x, at_once = x.to(wide), max(1, _WIDENED_AT_ONCE // weight.shape[1])
    y = torch.cat([F.linear(wide_x, part.to(wide)) for part in weight.split(at_once)], dim=-1)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)
