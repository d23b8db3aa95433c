"""Linears of prefill chunks: many rows, all of one loop, which is known before.

M rows, K in, N out, R rank of one linear.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from rrt import ops
from rrt.model.loop_linear import LoopLinear
from rrt.model.transformer import MLP
from rrt.ops import precision


class PrefillLinears:
    """Applies relaxed linears to chunks, each by the fewest operations.

    A merged weight W + B_l A_l makes a chunk cost what the base model's does, so merged weights are kept in
    `merged_bytes` bytes of memory. What does not fit takes whichever multiplies least: W, A_l and B_l one after the
    other, 2 M R (K + N) operations more than the base; or a weight merged for this chunk alone, 2 N K R more.
    """

    def __init__(self, merged_bytes: int) -> None:
        self.merged = MergedWeights(merged_bytes)

    def __call__(self, linear: LoopLinear, x: Tensor, loop: int) -> Tensor:
        """x [M, K] -> [M, N] at `loop`. For inference: a merged weight that is kept passes no gradients on."""
        if linear.lora_a is None or linear.lora_b is None:
            return linear(x, loop)
        weight = self.merged.get(linear, loop)
        if weight is None and len(x) * (linear.in_features + linear.out_features) > linear.weight.numel():
            weight = linear.merged_weight(loop)
        if weight is not None:
            return precision.upcasting_linear(x, weight, linear.loop_bias(loop))
        if x.is_cuda and x.element_size() == 2:
            return ops.loop_lora_prefill(x, linear.weight, linear.bias, linear.lora_a, linear.lora_b, loop)
        return linear(x, loop)

    def mlp(self, mlp: MLP, x: Tensor, loop: int) -> Tensor:
        """The feed-forward part of a layer: [M, D] -> [M, D]."""
        inner = self(mlp.up, x, loop)
        inner = mlp.activate(inner) if mlp.gate is None else mlp.gated(self(mlp.gate, x, loop), inner)
        return self(mlp.down, inner, loop)


class MergedWeights:
    """W + B_l A_l [N, K] of linears and loops, kept within `max_bytes` bytes and merged again after a change.

    The first that are asked for stay. Passes need all of them in the same order: to replace the oldest would be to
    replace each just before its next use.

    A change of W, A or B is one in place, as PyTorch's version counters tell it (`copy_`, `load_state_dict`), or other
    memory or another parameter in its place, or a step of any optimizer, since fused ones count nothing. Nor does what
    is written through `.data`, which is not seen. Parameters made under `torch.inference_mode` have no counters: of
    them nothing is kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: dict[tuple[LoopLinear, int], _Merged] = {}
        self._steps = _optimizer_steps()

    def get(self, linear: LoopLinear, loop: int) -> Tensor | None:
        """The merged weight of a linear that has LoRA, or None where there is no room for it."""
        kept = self._kept.get((linear, loop))
        if kept is not None:
            unchanged = all(source.is_still(now) for source, now in zip(kept.sources, _sources(linear), strict=True))
            if unchanged and kept.steps == self._steps.count:
                return kept.weight
            self.num_bytes -= kept.weight.nbytes
            # Freed before another takes its place.
            del self._kept[linear, loop], kept
        if self.num_bytes + linear.weight.nbytes > self.max_bytes or any(x.is_inference() for x in _sources(linear)):
            return None
        weight = linear.merged_weight(loop).detach()
        sources = tuple(_Source(x, x.detach(), x._version) for x in _sources(linear))
        self._kept[linear, loop] = _Merged(weight, sources, self._steps.count)
        self.num_bytes += weight.nbytes
        return weight


@dataclass(frozen=True)
class _Source:
    """A parameter as it was merged."""

    parameter: Tensor
    memory: Tensor  # held, so that no other parameter can come to lie there
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
    """How many steps the optimizers of this process have made since the first call."""
    steps = _Steps()

    def count_one(*_: Any) -> None:
        steps.count += 1

    register_optimizer_step_post_hook(count_one)
    return steps


def _sources(linear: LoopLinear) -> tuple[Tensor, ...]:
    return tuple(x for x in (linear.weight, linear.lora_a, linear.lora_b) if x is not None)
