"""Parameters by kind, bytes, K/V bytes and FLOPs per token of any configuration.

Counts are those of the model's own parameters, built without memory.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any

import torch

from rrt.common.dtypes import dtype_name
from rrt.common.schema import to_mapping
from rrt.errors import UserError
from rrt.model.config import ModelConfig, RecursiveConfig, linear_shapes
from rrt.model.loop_linear import loop_linears
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
    counts = dict.fromkeys(("embedding", "shared", "lora", "prefix", "norm"), 0)
    for name, parameter in meta.named_parameters():
        counts[_kind(name, parameter)] += parameter.numel()
    total = sum(counts.values())
    merged = sum(linear.rank * linear.weight.numel() for _, linear in loop_linears(meta.stack))
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


def _kind(name: str, parameter: torch.nn.Parameter) -> str:
    leaf = name.rpartition(".")[2]
    if leaf in ("embed", "head"):
        return "embedding"
    if leaf in ("lora_a", "lora_b", "head_lora_a", "head_lora_b"):
        return "lora"
    if leaf == "prefix":
        return "prefix"
    is_untied_bias = leaf == "bias" and parameter.dim() == 2
    return "norm" if "norm" in name or is_untied_bias else "shared"


def _flops_per_token(model: RecursiveTransformer, context: int, *, merged: bool) -> int:
    config = model.config
    linears = [linear for _, linear in loop_linears(model.stack)]
    multiplies = sum(linear.weight.numel() for linear in linears)
    if not merged:
        multiplies += sum(linear.rank * (linear.in_features + linear.out_features) for linear in linears)
    multiplies *= model.recursion.num_loops
    # Scores and weighted sum over the positions attended to.
    attended = context + model.recursion.prefix_length
    multiplies += config.num_layers * 2 * config.num_heads * config.head_dim * attended
    return 2 * (multiplies + config.vocab_size * config.hidden_size)
