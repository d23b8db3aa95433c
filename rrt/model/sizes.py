"""Parameters by kind, bytes, K/V bytes and FLOPs per token of any configuration.

Counts are those of the model's own parameters, built without memory.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, product
from statistics import median_low
from typing import Any

import torch

from rrt.common.dtypes import dtype_name
from rrt.common.schema import to_mapping
from rrt.errors import UserError
from rrt.model.config import (
    LORA_GROUP_OF_LINEAR,
    LoraGroup,
    LoraRanks,
    ModelConfig,
    RecursiveConfig,
    linear_shapes,
)
from rrt.model.loop_linear import LoopLinear, loop_linears
from rrt.model.meta import meta_model
from rrt.model.transformer import RecursiveTransformer

_STATISTICS: dict[str, Callable[[Sequence[int]], int]] = {"least": min, "median": median_low, "largest": max}


@dataclass(frozen=True)
class Sizes:
    """Parameters, memory and FLOPs of a model. The `*_params` down to `norm_params` add up to `total_params`.

    Attributes:
        embedding_params: embedding, and the head where it is a matrix of its own.
        shared_params: linears of the shared block, each counted once, with their tied biases.
        lora_params: A and B of all loops, those on the head included.
        prefix_params: prefix vectors of all depths.
        translator_params: maps and their biases that exits before the last loop go through.
        norm_params: all norms, the final one included, and biases of linears where they are kept per depth.
        non_embedding_params: everything but `embedding_params`; the paper's measure.
        bytes: of all parameters in `dtype`.
        kv_bytes_per_token: keys and values of one position at all depths, in `dtype`.
        flops_per_token: matrix products (2 per multiply-add) of one token's forward pass at full depth that
            attends to `context` positions; LoRA as products of their own (plain) or merged into the weights.
        merge_flops: of merging the LoRAs of all depths into their weights, once.
    """

    model: ModelConfig
    recursion: RecursiveConfig
    dtype: torch.dtype
    context: int
    embedding_params: int
    shared_params: int
    lora_params: int
    prefix_params: int
    translator_params: int
    norm_params: int
    non_embedding_params: int
    total_params: int
    bytes: int
    kv_bytes_per_token: int
    flops_per_token: dict[str, int]
    merge_flops: int

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        configs = {key: to_mapping(values.pop(name)) for key, name in (("model", "model"), ("recursive", "recursion"))}
        return {**values, "dtype": dtype_name(self.dtype), **configs}


def model_sizes(
    model: ModelConfig, recursion: RecursiveConfig, dtype: torch.dtype, context: int | None = None
) -> Sizes:
    """Count the sizes of a model; `context` in positions, default the longest of the base.

    Raises:
        UserError: `num_loops` does not divide `num_layers`, or the model cannot be built.
    """
    context = model.context_length if context is None else context
    if context < 1:
        raise UserError(f"context: found {context}; expected a positive number of positions")
    meta = meta_model(model, recursion)
    counts = dict.fromkeys(("embedding", "shared", "lora", "prefix", "translator", "norm"), 0)
    for name, parameter in meta.named_parameters():
        counts[_kind(name, parameter)] += parameter.numel()
    total = sum(counts.values())
    merged = sum(linear.rank * _weight_size(linear) for _, linear in loop_linears(meta.stack))
    return Sizes(
        model=model,
        recursion=recursion,
        dtype=dtype,
        context=context,
        **{f"{kind}_params": count for kind, count in counts.items()},
        non_embedding_params=total - counts["embedding"],
        total_params=total,
        bytes=total * dtype.itemsize,
        kv_bytes_per_token=2 * model.num_layers * model.num_kv_heads * model.head_dim * dtype.itemsize,
        flops_per_token={
            form: _flops_per_token(meta, context, merged=form == "merged") for form in ("plain", "merged")
        },
        merge_flops=2 * recursion.num_loops * merged,
    )


def rank_table(sizes: Sizes) -> str:
    """Format the LoRA rank of each linear in each shared layer, with each linear's least, median and largest."""
    model, recursion = sizes.model, sizes.recursion
    linears = list(linear_shapes(model))
    rows = {
        str(layer): [recursion.lora_rank.of(model, layer, linear) for linear in linears]
        for layer in range(recursion.layers_per_loop(model))
    }
    columns = list(zip(*rows.values(), strict=True))
    rows |= {name: [pick(column) for column in columns] for name, pick in _STATISTICS.items()}
    lines = [f"{'LoRA ranks':>10}" + "".join(f"{linear:>10}" for linear in linears)]
    lines += [f"{name:>10}" + "".join(f"{rank:>10}" for rank in ranks) for name, ranks in rows.items()]
    return "\n".join(lines)


def without_sharing(model: ModelConfig, recursion: RecursiveConfig) -> RecursiveConfig:
    """Derive the model that shares nothing and has as many parameters: every linear a product B A of low rank.

    Its ranks are about equal for all linears, at most those at which the parameters of `recursion` are reached, and as
    near to them as ranks of groups get. Linears that B A would not make smaller at this rank keep their weights, as
    rank 0.

    Raises:
        UserError: `recursion` does not save parameters, or too few are left for rank 1.
    """
    loops, target = recursion.num_loops, model_sizes(model, recursion, torch.float32).total_params
    vanilla = model_sizes(model, RecursiveConfig(), torch.float32).total_params
    if target >= vanilla:
        raise UserError(
            f"field 'lora_init': found 'low-rank-only' in place of {loops} loops with LoRA rank {recursion.lora_rank}, "
            f"which save no parameters ({target:,} of {vanilla:,}); expected a lower rank"
        )
    dense, unit = (dict.fromkeys(LORA_GROUP_OF_LINEAR.values(), 0) for _ in range(2))
    for name, linear in loop_linears(meta_model(model, RecursiveConfig()).stack.layers[0]):
        group = LORA_GROUP_OF_LINEAR[name]
        dense[group] += model.num_layers * linear.in_features * linear.out_features
        unit[group] += model.num_layers * (linear.in_features + linear.out_features)
    fixed = vanilla - sum(dense.values())

    def parameters(ranks: Mapping[LoraGroup, int]) -> int:
        return fixed + sum(min(rank * unit[group], dense[group]) for group, rank in ranks.items())

    uniform = next(rank for rank in count() if parameters(dict.fromkeys(dense, rank + 1)) > target)
    if uniform == 0:
        raise UserError(
            f"field 'lora_init': found 'low-rank-only' in place of a model of {target:,} parameters; expected at least "
            f"{parameters(dict.fromkeys(dense, 1)):,}, those of rank 1 for every linear"
        )
    near = (
        dict(zip(dense, ranks, strict=True))
        for ranks in product(range(max(1, uniform - 1), uniform + 4), repeat=len(dense))
    )
    ranks = max(
        (ranks for ranks in near if parameters(ranks) <= target),
        key=lambda ranks: (parameters(ranks), -sum(abs(rank - uniform) for rank in ranks.values())),
    )
    chosen = {group: rank if rank * unit[group] < dense[group] else 0 for group, rank in ranks.items()}
    return RecursiveConfig(
        norm_init=recursion.norm_init,
        lora_rank=LoraRanks(q=chosen["q"], kv=chosen["kv"], out=chosen["out"], ffn=chosen["ffn"]),
        lora_init="low-rank-only",
        low_rank_only=True,
    )


def _kind(name: str, parameter: torch.nn.Parameter) -> str:
    leaf = name.rpartition(".")[2]
    if leaf in ("embed", "head"):
        return "embedding"
    if leaf in ("lora_a", "lora_b", "head_lora_a", "head_lora_b"):
        return "lora"
    if leaf == "prefix":
        return "prefix"
    if leaf.startswith("exit_translator_"):
        return "translator"
    is_untied_bias = leaf == "bias" and parameter.dim() == 2
    return "norm" if "norm" in name or is_untied_bias else "shared"


def _weight_size(linear: LoopLinear) -> int:
    return 0 if linear.weight is None else linear.weight.numel()


def _flops_per_token(model: RecursiveTransformer, context: int, *, merged: bool) -> int:
    config = model.config
    linears = [linear for _, linear in loop_linears(model.stack)]
    multiplies = sum(_weight_size(linear) for linear in linears)
    apart = [linear for linear in linears if not merged or linear.weight is None]
    multiplies += sum(linear.rank * (linear.in_features + linear.out_features) for linear in apart)
    multiplies *= model.recursion.num_loops
    # Scores and weighted sum over the positions attended to.
    attended = context + model.recursion.prefix_length
    multiplies += config.num_layers * 2 * config.num_heads * config.head_dim * attended
    return 2 * (multiplies + config.vocab_size * config.hidden_size)
