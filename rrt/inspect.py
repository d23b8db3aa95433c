"""Sizes of a model before or after it is made: parameters by kind, bytes, K/V cache, FLOPs per token.

    python -m rrt.inspect --preset gemma-2b --num-loops 2 --lora-rank 512
    python -m rrt.inspect --checkpoint runs/out/relaxed --json

Counts are those of the model's own parameters, built without memory.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rrt.checkpoint.presets import PRESETS, preset, preset_dtype
from rrt.checkpoint.source import meta_model, open_source
from rrt.checkpoint.tensor_files import dtype_name
from rrt.common.cli import human_bytes, human_count, run_command
from rrt.errors import UserError
from rrt.model.config import ModelConfig, RecursiveConfig, to_mapping
from rrt.model.flags import (
    add_dtype_flag,
    add_lora_rank_flags,
    add_prefix_length_flag,
    add_untie_norms_flag,
    chosen_dtype,
    lora_ranks,
)
from rrt.model.loop_linear import LoopLinear
from rrt.model.transformer import RecursiveTransformer


@dataclass(frozen=True)
class Sizes:
    """What a model of one configuration takes. The `*_params` down to `norm_params` add up to `total_params`.

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
    recursive: RecursiveConfig
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
        configs = {name: to_mapping(values.pop(name)) for name in ("model", "recursive")}
        return {**values, "dtype": dtype_name(self.dtype), **configs}


def model_sizes(
    model: ModelConfig, recursive: RecursiveConfig, dtype: torch.dtype, context: int | None = None
) -> Sizes:
    """Sizes of the model of these configurations; `context` in positions, default the base's longest.

    Raises:
        UserError: `num_loops` does not divide `num_layers`, or the model cannot be built.
    """
    context = model.max_position_embeddings if context is None else context
    if context < 1:
        raise UserError(f"context: found {context}; expected a positive number of positions")
    meta = meta_model(model, recursive)
    counts = dict.fromkeys(("embedding", "shared", "lora", "prefix", "norm"), 0)
    for name, parameter in meta.named_parameters():
        counts[_kind(name, parameter)] += parameter.numel()
    total = sum(counts.values())
    return Sizes(
        model=model,
        recursive=recursive,
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
        merge_flops=2 * recursive.num_loops * sum(linear.rank * linear.weight.numel() for linear in _linears(meta)),
    )


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


def _linears(model: RecursiveTransformer) -> list[LoopLinear]:
    return [module for module in model.stack.modules() if isinstance(module, LoopLinear)]


def _flops_per_token(model: RecursiveTransformer, context: int, *, merged: bool) -> int:
    config = model.config
    linears = _linears(model)
    multiplies = sum(linear.weight.numel() for linear in linears)
    if not merged:
        multiplies += sum(linear.rank * (linear.in_features + linear.out_features) for linear in linears)
    multiplies *= model.recursive.num_loops
    # Scores and weighted sum over the positions attended to.
    attended = context + model.recursive.prefix_length
    multiplies += config.num_layers * 2 * config.num_heads * config.head_dim * attended
    return 2 * (multiplies + config.vocab_size * config.hidden_size)


def sizes_table(sizes: Sizes) -> str:
    """A table for people, one line per quantity."""
    model, recursive = sizes.model, sizes.recursive
    rows = [
        ("family", model.family),
        ("depth", f"{model.num_layers} = {recursive.num_loops} loops x {recursive.layers_per_loop(model)} layers"),
        ("LoRA rank", str(recursive.lora_rank)),
    ]
    for kind in ("embedding", "shared", "lora", "prefix", "norm", "non_embedding", "total"):
        count = getattr(sizes, f"{kind}_params")
        rows.append(
            (f"{kind.replace('_', '-').replace('lora', 'LoRA')} parameters", f"{human_count(count):>9}  {count:,}")
        )
    rows += [
        (f"parameters in {dtype_name(sizes.dtype)}", human_bytes(sizes.bytes)),
        ("K/V cache per token", human_bytes(sizes.kv_bytes_per_token)),
    ]
    forms = sizes.flops_per_token if sizes.lora_params else {"plain": sizes.flops_per_token["plain"]}
    for form, flops in forms.items():
        label = f", LoRA {form}" if sizes.lora_params else ""
        rows.append((f"FLOPs per token at {sizes.context} positions{label}", f"{human_count(flops):>9}"))
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)


def _recursive_config(arguments: argparse.Namespace) -> RecursiveConfig:
    return RecursiveConfig(
        num_loops=arguments.num_loops,
        lora_rank=lora_ranks(arguments),
        untie_norms=arguments.untie_norms,
        prefix_length=arguments.prefix_length,
    )


def _subject(arguments: argparse.Namespace) -> tuple[ModelConfig, RecursiveConfig, torch.dtype]:
    """What the flags ask about, with the dtype that ``--dtype auto`` means."""
    asked = _recursive_config(arguments)
    if arguments.preset is not None:
        return preset(arguments.preset), asked, preset_dtype(arguments.preset)
    source = open_source(arguments.checkpoint)
    if asked == RecursiveConfig():
        return source.model, source.recursive, source.dtype
    if source.recursive.num_loops > 1 or source.recursive.is_relaxed:
        raise UserError(
            f"{arguments.checkpoint}: is recursive already (num_loops = {source.recursive.num_loops}); expected a "
            "vanilla model with the flags that describe looping"
        )
    return source.model, asked, source.dtype


def main(argv: Sequence[str] | None = None) -> None:
    """``python -m rrt.inspect``; see the head of this file."""
    parser = argparse.ArgumentParser(prog="python -m rrt.inspect", description=(__doc__ or "").split("\n")[0])
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--checkpoint", type=Path, metavar="DIR", help="HF directory or a checkpoint of ours")
    subject.add_argument("--preset", choices=tuple(PRESETS), help="a published base model, without its weights")
    parser.add_argument("--num-loops", type=int, default=1, metavar="B", help="loops to fold into (default: 1, none)")
    add_lora_rank_flags(parser)
    add_untie_norms_flag(parser)
    add_prefix_length_flag(parser)
    add_dtype_flag(parser, "dtype that bytes are counted in")
    parser.add_argument(
        "--context", type=int, metavar="N", help="positions that a token attends to, for FLOPs (default: the longest)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    arguments = parser.parse_args(argv)
    model, recursive, stored = _subject(arguments)
    sizes = model_sizes(model, recursive, chosen_dtype(arguments) or stored, arguments.context)
    print(json.dumps(sizes.to_json(), indent=2) if arguments.json else sizes_table(sizes))


if __name__ == "__main__":
    run_command(main)
