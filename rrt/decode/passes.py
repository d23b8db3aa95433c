"""Rows of one pass of the shared block, and the tensors that a cache plans for them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor


@dataclass(frozen=True)
class Chunk:
    """Consecutive positions of one sequence at one loop, prefilled together."""

    sequence: int
    loop: int
    start: int
    length: int


@dataclass(frozen=True)
class PassRows:
    """Rows of one pass, in this order: kv-only rows, decode rows, prefill chunks.

    A kv-only row writes the keys and values of its unchanged state at each layer, so that later tokens see a token
    that exited at an earlier loop. Each row has a loop of its own; a chunk has one for all its rows.

    Loop b is depths b K to b K + K - 1. Only with sharing "cycle" do they run the same layers in the same order for
    every b: else all kv-only and decode rows of a pass are at one loop; and none are kv-only with "sequence", which has
    no exits.
    """

    sequences: ArrayLike = ()
    """int64 [N]: the sequence of each kv-only and decode row."""
    loops: ArrayLike = ()
    """int32 [N]"""
    positions: ArrayLike = ()
    """int32 [N]: the row writes this position, and attends to those up to it."""
    num_kv_only: int = 0
    """Number of kv-only rows, the first of the N rows."""
    chunks: Sequence[Chunk] = ()
    """Prefill chunks; their rows follow the N rows. Neighbours at the same loop are computed together."""


@dataclass(frozen=True)
class DecodePlan:
    """Tensors of the kv-only and decode rows of a pass: N rows, of which M decode."""

    loops: Tensor
    """int32 [N]"""
    loop: int | None
    """The loop of all N rows, or None if they differ."""
    positions: Tensor
    """int32 [N]"""
    slot_mapping: Tensor
    """int64 [N]"""
    num_kv_only: int
    block_tables: Tensor
    """int32 [M, max_pages]"""
    context_lens: Tensor
    """int32 [M]"""


@dataclass(frozen=True)
class PrefillPlan:
    """Tensors of neighbouring chunks at one loop: T rows of S chunks."""

    loop: int
    positions: Tensor
    """int32 [T]"""
    slot_mapping: Tensor
    """int64 [T]"""
    block_tables: Tensor
    """int32 [S, max_pages]"""
    query_start: Tensor
    """int32 [S + 1]"""
    context_lens: Tensor
    """int32 [S]"""


@dataclass(frozen=True)
class PassPlan:
    """Tensors of a pass that describe the cache, the same for all of its layers."""

    decode: DecodePlan
    prefills: tuple[PrefillPlan, ...]


def send(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host to a device, without waiting for what the device does before."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
