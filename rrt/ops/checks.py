"""Argument checks of the operators; csrc/checks.cpp makes the same with the same words."""

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import SymInt, Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Checks:
    """Every check raises RuntimeError, as PyTorch's own operators do: what was found, and what was expected."""

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

    def shape(self, name: str, tensor: Tensor, *expected: str | int | SymInt) -> None:
        """A string stands for a dimension that may be anything."""
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
