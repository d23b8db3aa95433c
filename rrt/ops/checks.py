"""Argument checks of the operators; csrc/checks.cpp makes the same ones with the same words."""

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import SymInt, Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that operators sum in: float64 for float64, else float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


@dataclass(frozen=True)
class Checks:
    """Checks of one operator's arguments.

    Each raises RuntimeError, as PyTorch's own operators do, and names what was found and what was expected.
    """

    op: str

    def fail(self, name: str, found: object, expected: str) -> NoReturn:
        raise RuntimeError(f"rrt::{self.op}: {name}: found {found}; expected {expected}")

    def float_dtype(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype not in FLOAT_DTYPES:
            self.fail(name, f"dtype {dtype_name(tensor.dtype)}", "float32, float64, bfloat16 or float16")

    def dtype(self, name: str, tensor: Tensor, expected: torch.dtype) -> None:
        if tensor.dtype != expected:
            self.fail(name, f"dtype {dtype_name(tensor.dtype)}", dtype_name(expected))

    def same_device(self, name: str, tensor: Tensor, first: Tensor, first_name: str) -> None:
        if tensor.device != first.device:
            self.fail(name, f"device {tensor.device}", f"{first_name}'s, {first.device}")

    def like(self, name: str, tensor: Tensor, first: Tensor, first_name: str) -> None:
        """Check that `tensor` has dtype and device of the operator's first argument."""
        self.dtype(name, tensor, first.dtype)
        self.same_device(name, tensor, first, first_name)

    def shape(self, name: str, tensor: Tensor, *expected: str | int | SymInt) -> None:
        """Check each dimension; a string names one that may have any size."""
        shape = tensor.shape
        if len(shape) != len(expected) or any(
            not isinstance(want, str) and size != want for size, want in zip(shape, expected, strict=True)
        ):
            self.fail(name, f"shape {list(shape)}", f"[{', '.join(str(size) for size in expected)}]")

    def contiguous(self, name: str, tensor: Tensor) -> None:
        if not tensor.is_contiguous():
            self.fail(
                name,
                f"strides {list(tensor.stride())}",
                "a contiguous tensor (call .contiguous() once, when loading)",
            )

    def multiple_of_kv_heads(self, num_heads: int, num_kv_heads: int, k_name: str) -> None:
        """Check that the heads of argument `q` share out evenly among the key/value heads of argument `k_name`."""
        if num_heads % num_kv_heads if num_kv_heads > 0 else num_heads:
            self.fail("q", f"{num_heads} heads", f"a multiple of {k_name}'s {num_kv_heads}")
