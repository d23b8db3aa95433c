"""Flags of commands that serve, and what they default to."""

import argparse
from typing import get_args

import torch

from rrt.common.machine import free_memory_bytes
from rrt.serve.exits import POLICY_HELP
from rrt.serve.scheduler import SkippedKV

_MOST_CACHE_BYTES = 4 << 30


def add_exit_flags(parser: argparse.ArgumentParser) -> None:
    """Add --exit-policy and --skipped-kv."""
    parser.add_argument("--exit-policy", default="never", metavar="POLICY", help=POLICY_HELP)
    parser.add_argument(
        "--skipped-kv",
        choices=get_args(SkippedKV),
        default="propagate",
        help="keys and values of loops that a token skips by an exit that nothing verifies: propagate: of the state at "
        "its exit; share: those of its exit's loop; defer: the loops run later for these alone (default: propagate)",
    )


def default_cache_bytes(device: torch.device) -> int:
    """Return the memory for keys and values where none is named: half of what is free, at most 4 GiB."""
    return min(free_memory_bytes(device) // 2, _MOST_CACHE_BYTES)
