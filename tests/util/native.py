"""Shared by the tests of the native operators: which need the library, their dtypes, threads and devices."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from rrt.ops import build_info

needs_native = pytest.mark.skipif(build_info().library is None, reason=f"no native library: {build_info().reason}")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if isinstance(value, Tensor) else value for name, value in inputs.items()}
