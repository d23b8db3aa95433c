"""Fold a pretrained model into one looped block and relax it: base checkpoint in, recursive checkpoint out.

    python -m rrt.convert --base gemma-2b --out runs/out/relaxed --num-loops 2 --lora-rank 512

The work is done by :mod:`rrt.folding.conversion`.
"""

import argparse
import typing
from collections.abc import Sequence
from pathlib import Path

from rrt.common.cli import human_bytes, human_count, run_command
from rrt.common.dtypes import add_dtype_flag, chosen_dtype, dtype_name
from rrt.common.schema import to_mapping
from rrt.folding.conversion import ConversionReport, PreparedConversion, prepare_conversion, run_conversion
from rrt.folding.fold import MatrixReport
from rrt.model.config import LORA_GROUP_OF_LINEAR, Init, LoraInit, LoraRanks, NormInit, RecursiveConfig
from rrt.model.flags import add_lora_rank_flags, add_prefix_length_flag, add_untie_norms_flag, lora_ranks
from rrt.model.sizes import Sizes


def describe(conversion: PreparedConversion) -> str:
    """Describe what the command is about to do."""
    recursion, model, base = conversion.recursion, conversion.source.model, conversion.source.directory
    layers = recursion.layers_per_loop(model)
    norms = "norms and biases per depth" if recursion.untie_norms else "norms and biases tied"
    lora = f"LoRA rank {recursion.lora_rank} ({recursion.lora_init})" if recursion.lora_rank else "no LoRA"
    if recursion.prefix_length:
        lora += f"; {recursion.prefix_length} prefix vectors per depth"
    init = f"{recursion.init} (norms: {recursion.norm_init})" if recursion.init == "average" else recursion.init
    return "\n".join(
        (
            f"base  {base}: {model.family}, {model.num_layers} layers, {_size(conversion.before)}",
            f"new   {conversion.out}: {recursion.num_loops} loops x {layers} layers, {_size(conversion.after)}",
            f"init  {init}; {lora}; {norms}; seed {conversion.seed}",
            *(f"notice: {notice}" for notice in conversion.notices),
        )
    )


def _size(sizes: Sizes) -> str:
    return (
        f"{human_count(sizes.total_params)} parameters ({human_count(sizes.non_embedding_params)} non-embedding), "
        f"{human_bytes(sizes.bytes)} {dtype_name(sizes.dtype)}"
    )


def report_table(report: ConversionReport) -> str:
    """Format, per shared layer and group, the share of ||W||^2 that tying lost and the part of it that LoRA keeps."""
    groups = list(to_mapping(LoraRanks()))
    by_layer: dict[str, dict[str, list[MatrixReport]]] = {}
    for matrix in report.matrices:
        layer, linear = matrix.name.removeprefix("stack.layers.").split(".", 1)
        for row in (layer, "all"):
            by_layer.setdefault(row, {}).setdefault(LORA_GROUP_OF_LINEAR[linear], []).append(matrix)
    by_layer["all"] = by_layer.pop("all")
    lines = ["lost by tying -> of that kept by LoRA", f"{'layer':>5}" + "".join(f"{group:>18}" for group in groups)]
    for row, matrices in by_layer.items():
        lines.append(f"{row:>5}" + "".join(f"{_lost_and_kept(matrices[group]):>18}" for group in groups))
    return "\n".join(lines)


def _lost_and_kept(matrices: list[MatrixReport]) -> str:
    lost = sum(matrix.mean_tying_loss for matrix in matrices) / len(matrices)
    kept = [matrix.mean_energy_kept for matrix in matrices if matrix.mean_energy_kept is not None]
    return f"{lost:.1%} -> {sum(kept) / len(kept):.1%}" if kept else f"{lost:.1%} -> -"


def recursive_flags(flags: Sequence[str]) -> RecursiveConfig:
    """Parse only the command's flags that describe the new model."""
    parser = argparse.ArgumentParser(prog="python -m rrt.convert")
    _add_recursive_flags(parser)
    return _recursive_config(parser.parse_args(flags))


def _add_recursive_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-loops",
        type=int,
        required=True,
        metavar="B",
        help="loops over the shared block of L/B layers; 1 keeps the model vanilla",
    )
    parser.add_argument(
        "--init",
        choices=("auto", *typing.get_args(Init)),
        default="auto",
        help="shared layers from the base's: stepwise (even interval, first and last kept), stepwise-fixed-start "
        "(even interval from the first), average (mean over the loops), lower (the first ones), random. auto, the "
        "default, is what the paper found best: stepwise for plain recursion, average with LoRA or prefixes",
    )
    add_lora_rank_flags(parser)
    offered = tuple(init for init in typing.get_args(LoraInit) if init != "joint")
    parser.add_argument(
        "--lora-init",
        choices=offered,
        default="svd",
        help="LoRA from the truncated SVD of what tying lost, or Gaussian A and zero B (default: svd)",
    )
    parser.add_argument(
        "--norm-init",
        choices=typing.get_args(NormInit),
        default="average",
        help="weights and biases of the norms under --init average: their mean, the first loop's, or zero "
        "(default: average)",
    )
    add_untie_norms_flag(parser)
    add_prefix_length_flag(parser)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", type=Path, required=True, metavar="DIR", help="HF directory, .gguf file or vanilla checkpoint of ours"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint directory to create")
    _add_recursive_flags(parser)
    add_dtype_flag(parser, "dtype of the stored parameters")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of everything random (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")


def _recursive_config(arguments: argparse.Namespace) -> RecursiveConfig:
    ranks = lora_ranks(arguments)
    best: Init = "average" if ranks or arguments.prefix_length else "stepwise"
    return RecursiveConfig(
        num_loops=arguments.num_loops,
        init=best if arguments.init == "auto" else arguments.init,
        norm_init=arguments.norm_init,
        lora_rank=ranks,
        lora_init=arguments.lora_init,
        untie_norms=arguments.untie_norms,
        prefix_length=arguments.prefix_length,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``python -m rrt.convert``; see the head of this file."""
    parser = argparse.ArgumentParser(prog="python -m rrt.convert", description=(__doc__ or "").split("\n")[0])
    _add_flags(parser)
    arguments = parser.parse_args(argv)
    conversion = prepare_conversion(
        arguments.base,
        arguments.out,
        _recursive_config(arguments),
        dtype=chosen_dtype(arguments),
        seed=arguments.seed,
        overwrite=arguments.overwrite,
    )
    print(describe(conversion), flush=True)
    report = run_conversion(conversion, progress=True)
    if conversion.recursion.num_loops > 1:
        print(report_table(report))
    print(f"wrote {report.out} in {report.seconds:.1f} s: {_size(report.after)}")


if __name__ == "__main__":
    run_command(main)
