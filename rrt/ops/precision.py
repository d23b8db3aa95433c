"""The dtype of matrix products per device: 16 bits, or float32 where a CPU would emulate them."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

_HAS_BF16_INSTRUCTIONS = platform.machine() != "x86_64" or torch.cpu._is_avx512_bf16_supported()
_pretended: list[str] = []


@contextmanager
def pretend_device(device: str) -> Iterator[None]:
    """Choose dtypes and kernels as for this device type inside the context, wherever the tensors are.

    For estimates on tensors without memory, and to compare kernels.
    """
    _pretended.append(device)
    try:
        yield
    finally:
        _pretended.pop()


def device_type(tensor: Tensor) -> str:
    """Return the device type to compute for, "cpu" or "cuda": the tensor's, or that of `pretend_device`."""
    return _pretended[-1] if _pretended else tensor.device.type


MIN_UPCAST_ROWS = 16
"""With fewer rows a product takes as long as reading its weight, and an upcast of the weight longer."""


def matmul_dtype(tensor: Tensor, rows: int = MIN_UPCAST_ROWS) -> torch.dtype:
    """Return the dtype for a product of `rows` rows: `tensor`'s, or float32 for 16 bits that would be emulated.

    torch emulates them on x86 CPUs without AVX512-BF16, several times slower than float32.
    """
    is_emulated = tensor.dtype.itemsize == 2 and device_type(tensor) == "cpu" and not _HAS_BF16_INSTRUCTIONS
    return torch.float32 if is_emulated and rows >= MIN_UPCAST_ROWS else tensor.dtype


_MAX_UPCAST_ELEMENTS = 2**25
"""Elements of a weight that are upcast at a time. A whole head in float32 would take gigabytes."""


def upcasting_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in `matmul_dtype`, rounded once: x [..., K], weight [N, K], bias [N] -> [..., N] of x's dtype."""
    wide = matmul_dtype(x, x.numel() // x.shape[-1])
    if wide == x.dtype:
        return F.linear(x, weight, bias)
    wide_x, rows_at_once = x.to(wide), max(1, _MAX_UPCAST_ELEMENTS // weight.shape[1])
    y = torch.cat([F.linear(wide_x, part.to(wide)) for part in weight.split(rows_at_once)], dim=-1)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)
