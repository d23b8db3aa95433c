"""Sizes of a model before or after it is made: parameters by kind, bytes, K/V cache, FLOPs per token.

    python -m rrt.inspect --preset gemma-2b --num-loops 2 --lora-rank 512
    python -m rrt.inspect --checkpoint runs/out/relaxed --json

The counts are made by :mod:`rrt.model.sizes`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from rrt.checkpoint.presets import PRESETS, preset, preset_dtype
from rrt.checkpoint.source import open_source
from rrt.common.cli import CommandParser, human_bytes, human_count, run_command
from rrt.common.dtypes import add_dtype_flag, chosen_dtype, dtype_name
from rrt.errors import UserError
from rrt.model.config import ModelConfig, RecursiveConfig
from rrt.model.flags import add_lora_rank_flags, add_prefix_length_flag, add_untie_norms_flag, lora_ranks
from rrt.model.meta import capped_lora_ranks
from rrt.model.sizes import Sizes, model_sizes, rank_table


def sizes_table(sizes: Sizes) -> str:
    """Format the sizes as a table, one line per quantity."""
    model, recursion = sizes.model, sizes.recursion
    rows = [
        ("family", model.family),
        (
            "depth",
            f"{model.num_layers} = {recursion.num_loops} loops x {recursion.layers_per_loop(model)} layers"
            + ("" if recursion.sharing == "cycle" else f" ({recursion.sharing})"),
        ),
        ("LoRA rank", str(recursion.lora_rank)),
    ]
    for kind in ("embedding", "shared", "lora", "prefix", "translator", "norm", "non_embedding", "total"):
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
    lines = [f"{label:<{width}}  {value}" for label, value in rows]
    if recursion.lora_rank.matrices:
        lines.append(rank_table(sizes))
    return "\n".join(lines)


def _recursive_config(arguments: argparse.Namespace) -> RecursiveConfig:
    return RecursiveConfig(
        num_loops=arguments.num_loops,
        lora_rank=lora_ranks(arguments),
        untie_norms=arguments.untie_norms,
        prefix_length=arguments.prefix_length,
    )


def _subject(arguments: argparse.Namespace) -> tuple[ModelConfig, RecursiveConfig, torch.dtype]:
    """Find the model that the flags name, with the dtype that ``--dtype auto`` means."""
    recursion = _recursive_config(arguments)
    if arguments.preset is not None:
        model = preset(arguments.preset)
        return model, _capped(model, recursion), preset_dtype(arguments.preset)
    source = open_source(arguments.checkpoint)
    if recursion == RecursiveConfig():
        return source.model, source.recursion, source.dtype
    if source.recursion.num_loops > 1 or source.recursion.is_relaxed:
        raise UserError(
            f"{arguments.checkpoint}: is recursive already (num_loops = {source.recursion.num_loops}); expected a "
            "vanilla model with the flags that describe looping"
        )
    return source.model, _capped(source.model, recursion), source.dtype


def _capped(model: ModelConfig, recursion: RecursiveConfig) -> RecursiveConfig:
    return replace(recursion, lora_rank=capped_lora_ranks(model, recursion))


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``python -m rrt.inspect``; see the head of this file."""
    parser = CommandParser(prog="python -m rrt.inspect", description=(__doc__ or "").split("\n")[0])
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--checkpoint", type=Path, metavar="DIR", help="HF directory, .gguf or checkpoint of ours")
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
    model, recursion, stored = _subject(arguments)
    sizes = model_sizes(model, recursion, chosen_dtype(arguments) or stored, arguments.context)
    print(json.dumps(sizes.to_json(), indent=2) if arguments.json else sizes_table(sizes))


if __name__ == "__main__":
    run_command(main)
