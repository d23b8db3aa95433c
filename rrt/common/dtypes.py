"""Names of dtypes, and the ``--dtype`` flag."""

import argparse

import torch

from rrt.errors import UserError

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
DTYPE_NAMES = tuple(_DTYPES)
PARAMETER_DTYPES = frozenset(_DTYPES.values())


def parse_dtype(name: str) -> torch.dtype:
    """Parse a name: ``"bf16"`` or ``"bfloat16"`` -> `torch.bfloat16`. Raises `UserError` for an unknown one."""
    if name not in _DTYPES:
        raise UserError(f"dtype: found {name!r}; expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Format a dtype: `torch.bfloat16` -> ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def add_dtype_flag(parser: argparse.ArgumentParser, purpose: str) -> None:
    """Add ``--dtype``; read it with `chosen_dtype`."""
    parser.add_argument(
        "--dtype", choices=("auto", *DTYPE_NAMES), default="auto", help=f"{purpose}; auto: as stored (default: auto)"
    )


def chosen_dtype(arguments: argparse.Namespace) -> torch.dtype | None:
    """Read ``--dtype``; None for auto."""
    return None if arguments.dtype == "auto" else parse_dtype(arguments.dtype)
