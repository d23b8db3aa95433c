"""Linears of prefill chunks, whose many rows are all at one loop: LoRA merged into weights, and kept.

M rows, K in, N out, R rank of one linear.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from rrt import ops
from rrt.model.loop_linear import LoopLinear
from rrt.model.transformer import MLP
from rrt.ops import precision


class PrefillLinears:
    """Relaxed linears applied to chunks, each by the fewest operations.

    With a merged weight W + B_l A_l a chunk costs what it does without LoRA, so merged weights are kept, in at most
    `merged_bytes` bytes. A linear beyond that takes the cheaper of two ways: separate products with W, A_l and B_l,
    2 M R (K + N) FLOPs more than without LoRA; or a weight merged for this chunk alone, 2 N K R more. On CUDA the
    separate products are one operator's, or the library's where `is_faster_apart` says so.
    """

    def __init__(self, merged_bytes: int) -> None:
        self.merged = MergedWeights(merged_bytes)

    def __call__(self, linear: LoopLinear, x: Tensor, loop: int) -> Tensor:
        """Apply `linear` at `loop`: x [M, K] -> [M, N]. For inference: kept weights pass no gradients on."""
        if linear.weight is None or linear.lora_a is None or linear.lora_b is None:
            return linear(x, loop)
        weight = self.merged.get(linear, loop)
        if weight is None and len(x) * (linear.in_features + linear.out_features) > linear.weight.numel():
            weight = linear.merged_weight(loop)
        if weight is not None:
            return precision.upcasting_linear(x, weight, linear.loop_bias(loop))
        if x.is_cuda and x.element_size() == 2:
            is_hopper = torch.cuda.get_device_capability(x.device) >= (9, 0)
            if is_hopper and is_faster_apart(len(x), linear.out_features, linear.in_features, linear.rank):
                return multiply_apart(linear, x, loop)
            return ops.loop_lora_prefill(x, linear.weight, linear.bias, linear.lora_a, linear.lora_b, loop)
        return linear(x, loop)

    def mlp(self, mlp: MLP, x: Tensor, loop: int) -> Tensor:
        """Apply the feed-forward part of a layer: [M, D] -> [M, D]."""
        inner = self(mlp.up, x, loop)
        inner = mlp.activate(inner) if mlp.gate is None else mlp.gated(self(mlp.gate, x, loop), inner)
        return self(mlp.down, inner, loop)


def is_faster_apart(m: int, n: int, k: int, rank: int) -> bool:
    """Decide by arithmetic if three products of the library take less time than `ops.loop_lora_prefill` on an H200.

    Only Hopper's asynchronous instructions, which the library has and the operator has not, reach its full rate: 770
    TFLOP/s, assumed, of which `mma` gets 450. Apart, [M, N] is read and written once more, at 4.3 TB/s, and one more
    kernel is launched, for 3 us. Both read W, which takes longer than multiplying few rows. None of it is measured.
    On other GPUs the library has the operator's instructions.
    """
    weight_seconds = 2 * n * k / 4.3e12
    products, low_rank = 2 * m * n * k, 2 * m * rank * (k + n)
    fused = max(weight_seconds, (products + low_rank) / 450e12)
    apart = max(weight_seconds, products / 770e12) + low_rank / 770e12 + 4 * m * n / 4.3e12 + 3e-6
    return apart < fused


def multiply_apart(linear: LoopLinear, x: Tensor, loop: int) -> Tensor:
    """Apply a linear with W and LoRA as three products: x [M, K] -> [M, N]."""
    assert linear.weight is not None and linear.lora_a is not None and linear.lora_b is not None
    y = F.linear(x, linear.weight, linear.loop_bias(loop))
    return y.addmm_(F.linear(x, linear.lora_a[loop]), linear.lora_b[loop].T)


class MergedWeights:
    """A cache of merged weights W + B_l A_l [N, K], of at most `max_bytes` bytes, that notices changed parameters.

    The first weights that are requested stay: passes use all of them in the same order, so that an LRU cache would
    evict each just before its next use.

    A weight is merged again after its W, A or B was changed in place as PyTorch's version counters tell (`copy_`,
    `load_state_dict`), was replaced by another parameter or other memory, or after a step of any optimizer (fused ones
    leave the counters alone). Writes through `.data` go unnoticed. Parameters made under `torch.inference_mode` have
    no counters, so their merged weights are not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: dict[tuple[LoopLinear, int], _Merged] = {}
        self._steps = _optimizer_steps()

    def get(self, linear: LoopLinear, loop: int) -> Tensor | None:
        """Return the merged weight of a linear with LoRA, or None if there is no room for it."""
        kept = self._kept.get((linear, loop))
        if kept is not None:
            unchanged = all(source.is_still(now) for source, now in zip(kept.sources, _sources(linear), strict=True))
            if unchanged and kept.steps == self._steps.count:
                return kept.weight
            self.num_bytes -= kept.weight.nbytes
            # Freed before another takes its place.
            del self._kept[linear, loop], kept
        assert linear.weight is not None
        if self.num_bytes + linear.weight.nbytes > self.max_bytes or any(x.is_inference() for x in _sources(linear)):
            return None
        weight = linear.merged_weight(loop).detach()
        sources = tuple(_Source(x, x.detach(), x._version) for x in _sources(linear))
        self._kept[linear, loop] = _Merged(weight, sources, self._steps.count)
        self.num_bytes += weight.nbytes
        return weight


@dataclass(frozen=True)
class _Source:
    """A parameter and its version at the time of merging."""

    parameter: Tensor
    memory: Tensor  # held, so that no other parameter can take its address
    version: int

    def is_still(self, now: Tensor) -> bool:
        return now is self.parameter and now.data_ptr() == self.memory.data_ptr() and now._version == self.version


@dataclass(frozen=True)
class _Merged:
    weight: Tensor
    sources: tuple[_Source, ...]
    steps: int


class _Steps:
    count = 0


@cache
def _optimizer_steps() -> _Steps:
    """Count the steps of all optimizers of this process, from the first call on."""
    steps = _Steps()

    def count_one(*_: Any) -> None:
        steps.count += 1

    register_optimizer_step_post_hook(count_one)
    return steps


def _sources(linear: LoopLinear) -> tuple[Tensor, ...]:
    return tuple(x for x in (linear.weight, linear.lora_a, linear.lora_b) if x is not None)
