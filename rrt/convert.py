"""Fold a pretrained model into one looped block and relax it: base checkpoint in, recursive checkpoint out.

    python -m rrt.convert --base gemma-2b --out runs/out/relaxed --num-loops 2 --lora-rank 512 --calibration text.jsonl

Without ``--calibration`` no data is needed, and the result is much further from the base. The work is done by
:mod:`rrt.folding.conversion`.
"""

import argparse
import math
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rrt.common.cli import CommandParser, human_bytes, human_count, run_command
from rrt.common.dtypes import add_dtype_flag, chosen_dtype, dtype_name
from rrt.errors import UserError
from rrt.folding.calibrated import CalibrationReport, LinearReport
from rrt.folding.calibration import CalibrationMetric
from rrt.folding.conversion import (
    CalibrationOptions,
    ConversionReport,
    PreparedConversion,
    prepare_conversion,
    run_conversion,
    workspace_directory,
)
from rrt.folding.flags import add_calibration_text_flags
from rrt.folding.fold import MatrixReport, VectorReport, folds_norms
from rrt.model.config import LORA_GROUP_OF_LINEAR, LORA_GROUPS, Init, LoraInit, NormInit, Place, RecursiveConfig
from rrt.model.flags import (
    add_lora_rank_flags,
    add_prefix_length_flag,
    add_rank_budget_flag,
    add_sharing_flag,
    add_untie_norms_flag,
    lora_ranks,
)
from rrt.model.sizes import Sizes, rank_table

CALIBRATION_FLAGS = (
    "--calibration-tokens",
    "--calibration-context",
    "--calibration-metric",
    "--calibration-memory",
    "--calibration-statistics",
    "--no-refit",
    "--no-align",
    "--device",
)
"""Flags that say how a calibration text is used, and mean nothing without one."""


def describe(conversion: PreparedConversion) -> str:
    """Describe what the command is about to do."""
    recursion, model, base = conversion.recursion, conversion.source.model, conversion.source.directory
    layers = recursion.layers_per_loop(model)
    norms = "norms and biases per depth" if recursion.untie_norms else "norms and biases tied"
    if folds_norms(recursion):
        norms = "norms folded into the linears" + (", biases per depth" if recursion.untie_norms else "")
    lora = f"LoRA rank {recursion.lora_rank} ({recursion.lora_init})" if recursion.lora_rank else "no LoRA"
    if recursion.low_rank_only:
        lora = f"B A of rank {recursion.lora_rank} alone, nothing shared"
    if recursion.prefix_length:
        lora += f"; {recursion.prefix_length} prefix vectors per depth"
    loops = f"{recursion.num_loops} loops x {layers} layers"
    if recursion.sharing != "cycle":
        loops += f" ({recursion.sharing})"
    averages_norms = recursion.init == "average" and not folds_norms(recursion)
    init = f"{recursion.init} (norms: {recursion.norm_init})" if averages_norms else recursion.init
    return "\n".join(
        (
            f"base  {base}: {model.family}, {conversion.before.model.num_layers} layers, {_size(conversion.before)}",
            f"new   {conversion.out}: {loops}, {_size(conversion.after)}",
            f"init  {lora if recursion.low_rank_only else f'{init}; {lora}'}; {norms}; seed {conversion.seed}",
            *_describe_calibration(conversion),
            *(f"notice: {notice}" for notice in conversion.notices),
        )
    )


def _describe_calibration(conversion: PreparedConversion) -> Iterator[str]:
    chosen = conversion.calibration
    if chosen is not None:
        rows, length = chosen.rows.shape[0], chosen.rows.shape[1] - 1
        align = "" if chosen.align else "neurons not aligned; "
        refit = "refit depth by depth" if chosen.refit else "no refit"
        yield (
            f"text  {rows * length:,} tokens in rows of {length}; metric: {chosen.metric}; {align}{refit}; "
            f"{chosen.device}; if interrupted, the same command goes on from {workspace_directory(conversion.out)}"
        )


def _size(sizes: Sizes) -> str:
    return (
        f"{human_count(sizes.total_params)} parameters ({human_count(sizes.non_embedding_params)} non-embedding), "
        f"{human_bytes(sizes.bytes)} {dtype_name(sizes.dtype)}"
    )


def report_table(report: ConversionReport) -> str:
    """Format, per shared layer and group, the share of all ||W||^2 that tying lost and that is lost with LoRA."""
    matrices: dict[str, dict[str, list[MatrixReport]]] = {}
    vectors: dict[str, list[VectorReport]] = {}
    for matrix in report.matrices:
        layer, linear = _place(matrix.name)
        for row in (layer, "all"):
            matrices.setdefault(row, {}).setdefault(LORA_GROUP_OF_LINEAR[linear], []).append(matrix)
    for vector in report.vectors:
        for row in (_place(vector.name)[0], "all"):
            vectors.setdefault(row, []).append(vector)
    matrices["all"] = matrices.pop("all")
    heads = [*LORA_GROUPS, "norms, biases"] if vectors else LORA_GROUPS
    shares = not report.after.recursion.low_rank_only
    lines = [
        "lost by tying -> with LoRA" if shares else "lost by low rank",
        f"{'layer':>5}" + "".join(f"{head:>18}" for head in heads),
    ]
    for row, by_group in matrices.items():
        cells = [_losses(by_group[group], shares) for group in LORA_GROUPS]
        if vectors:
            cells.append(f"{_mean_loss(vectors[row]):.1%} -> -")
        lines.append(f"{row:>5}" + "".join(f"{cell:>18}" for cell in cells))
    losses = _losses(report.matrices, shares).replace(" -> ", ", with LoRA ")
    total = f"of all ||W||^2 {'tying' if shares else 'low rank'} loses {losses}"
    if all(matrix.least_loss is not None for matrix in report.matrices):
        least = _share(report.matrices, lambda matrix: [matrix.least_loss or 0.0] * len(matrix.norms))
        total += f"; no fit of these ranks loses less than {least:.1%}"
    return "\n".join((*lines, total))


def _place(name: str) -> tuple[str, str]:
    """Split a name in the block into the layer's number and the name in the layer."""
    layer, _, rest = name.removeprefix("stack.layers.").partition(".")
    return layer, rest


def _mean_loss(vectors: Sequence[VectorReport]) -> float:
    return sum(vector.mean_tying_loss for vector in vectors) / len(vectors)


def _share(matrices: Sequence[MatrixReport], losses: Callable[[MatrixReport], Sequence[float]]) -> float:
    """Compute the share lost of the energy of several matrices at all loops, from each one's shares per loop."""
    lost = sum(loss * norm for matrix in matrices for loss, norm in zip(losses(matrix), matrix.norms, strict=True))
    return lost / (sum(sum(matrix.norms) for matrix in matrices) or 1.0)


def _losses(matrices: Sequence[MatrixReport], shares: bool) -> str:
    """Format the loss of several matrices; `shares` tells whether they share weights, so that two losses differ."""
    final = f"{_share(matrices, lambda matrix: matrix.final_loss):.1%}"
    if not shares:
        return final
    lost = f"{_share(matrices, lambda matrix: matrix.tying_loss):.1%}"
    if not any(matrix.rank for matrix in matrices):
        return f"{lost} -> -"
    return f"{lost} -> {final}"


def calibration_table(report: CalibrationReport, places: Sequence[Place]) -> str:
    """Format, per shared layer and group, the share of outputs that is error, and the error of the residual stream.

    Args:
        places: what each depth runs.
    """
    groups = list(LORA_GROUPS)
    by_group: dict[str, dict[str, list[LinearReport]]] = {}
    for linear in report.linears:
        layer, name = _place(linear.name)
        for row in (layer, "all"):
            by_group.setdefault(row, {}).setdefault(LORA_GROUP_OF_LINEAR[name], []).append(linear)
    by_group["all"] = by_group.pop("all")
    lines = [
        f"error after conversion over {report.num_tokens:,} tokens, in parentheses over first tokens",
        f"{'layer':>5}" + "".join(f"{group + ' outputs':>18}" for group in groups) + f"{'residual stream':>20}",
    ]
    for row, linears in by_group.items():
        cells = [_output_losses(linears[group]) for group in groups]
        depths = [depth for depth, place in enumerate(places) if row in ("all", str(place.layer))]
        streams = [
            [errors[depth] for depth in depths] for errors in (report.stream_error, report.first_token_stream_error)
        ]
        lines.append(f"{row:>5}" + "".join(f"{cell:>18}" for cell in cells) + f"{_with_first(*streams):>20}")
    metric_losses = [loss for linear in report.linears for loss in linear.metric_loss]
    last = f"{report.stream_error[-1]:.1%} ({report.first_token_stream_error[-1]:.2%})"
    lines.append(
        f"the joint fit loses {_mean(metric_losses):.1%} in its metric; the stream's error at the end is {last}"
    )
    return "\n".join(lines)


def _output_losses(linears: Sequence[LinearReport]) -> str:
    losses = [loss for linear in linears for loss in linear.output_loss]
    return _with_first(losses, [loss for linear in linears for loss in linear.first_token_loss])


def _with_first(losses: Sequence[float], first: Sequence[float]) -> str:
    return f"{_mean(losses):.1%} ({_mean(first):.2%})"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def recursive_flags(flags: Sequence[str]) -> RecursiveConfig:
    """Parse only the command's flags that describe the new model.

    Raises:
        UserError: ``--num-loops`` is missing, or a value is out of range.
    """
    parser = CommandParser(prog="python -m rrt.convert")
    _add_recursive_flags(parser)
    arguments = parser.parse_args(flags)
    return _recursive_config(arguments, arguments.num_loops)


def _add_recursive_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--num-loops",
        type=int,
        metavar="B",
        help="loops over the shared block of L/B layers; 1 keeps the model vanilla",
    )
    add_sharing_flag(parser)
    parser.add_argument(
        "--init",
        choices=("auto", *typing.get_args(Init)),
        default="auto",
        help="shared layers from the base's: stepwise (even interval, first and last kept), stepwise-fixed-start "
        "(even interval from the first), average (mean over the loops), lower (the first ones), random. auto, the "
        "default, is what the paper found best: stepwise for plain recursion, average with LoRA or prefixes",
    )
    add_lora_rank_flags(parser)
    add_rank_budget_flag(parser)
    parser.add_argument(
        "--lora-init",
        choices=("auto", *typing.get_args(LoraInit)),
        default="auto",
        help="calibrated: shared weights and LoRAs together, such that on the text of --calibration the model does as "
        "the base (with --init average or auto); joint: likewise without data, nearest to the base's weights; svd, the "
        "paper's: LoRA from the truncated SVD of what tying lost; zero: Gaussian A and zero B; low-rank-only, a "
        "baseline: every linear of the base as a product B A, nothing shared, of as many parameters in all as the "
        "loops and ranks asked for, calibrated too with --calibration. auto, the default, is calibrated with "
        "--calibration, joint for two loops whose shared weights no other --init chooses, else svd",
    )
    parser.add_argument(
        "--norm-init",
        choices=typing.get_args(NormInit),
        default="folded",
        help="tied norms before attention and feed-forward: folded into the linears that read them, which loses none "
        "of their gains (default; biases and norms of q and k stay tied as --init ties weights); or, as in the paper, "
        "their mean, the first loop's, or zero under --init average, the kept layer's under the others",
    )
    add_untie_norms_flag(parser)
    add_prefix_length_flag(parser)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", type=Path, required=True, metavar="DIR", help="HF directory, .gguf file or vanilla checkpoint of ours"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint directory to create")
    _add_recursive_flags(parser)
    parser.add_argument(
        "--keep-layers",
        type=int,
        metavar="K",
        help="in place of --num-loops: keep K of the base's layers, chosen by --init (auto is stepwise), as a vanilla "
        "model, the reduced-size baseline",
    )
    _add_calibration_flags(parser)
    add_dtype_flag(parser, "dtype of the stored parameters")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of everything random (default: 0)")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")


def _add_calibration_flags(parser: argparse.ArgumentParser) -> None:
    default = CalibrationOptions(())
    add_calibration_text_flags(parser, "text for --lora-init calibrated, such as the model is for")
    parser.add_argument(
        "--calibration-metric",
        choices=typing.get_args(CalibrationMetric),
        default=default.metric,
        help="errors count by where inputs lie, tokens weighted by their gradients, and by the gradients of outputs "
        "(both, the default), by the first alone (inputs), or without a backward pass (activations)",
    )
    parser.add_argument(
        "--calibration-memory",
        type=float,
        metavar="GIB",
        help="space of files beside --out that statistics of all layers may take; if they take more, they are computed "
        "as often as they are needed (default: half of what memory and disk have free; without effect beside "
        "--calibration-statistics)",
    )
    parser.add_argument(
        "--calibration-statistics",
        type=Path,
        metavar="DIR",
        help="keep the base's statistics there, for further conversions with the same text and metric, of other ranks, "
        "loops or kinds (default: they are deleted at the end)",
    )
    parser.add_argument(
        "--no-refit", action="store_true", help="leave the LoRAs as the joint fit has them: for measurements"
    )
    parser.add_argument(
        "--no-align",
        action="store_true",
        help="leave the feed-forward neurons of depths that share a layer in the base's order: for measurements",
    )
    parser.add_argument(
        "--device",
        default=default.device,
        help="of a calibrated conversion: cpu, cuda, ... (default: CUDA if available)",
    )


def _calibration_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> CalibrationOptions | None:
    if not arguments.calibration:
        if arguments.lora_init == "calibrated":
            raise UserError("--calibration: missing; expected text or token shards with --lora-init calibrated")
        for flag in CALIBRATION_FLAGS:
            name = flag.removeprefix("--").replace("-", "_")
            if getattr(arguments, name) != parser.get_default(name):
                raise UserError(f"{flag}: found without --calibration; expected beside the text that it is about")
        return None
    memory = arguments.calibration_memory
    if memory is not None and not 0 <= memory < math.inf:
        raise UserError(f"--calibration-memory: found {memory}; expected 0 or more, in GiB")
    return CalibrationOptions(
        tuple(arguments.calibration),
        arguments.calibration_tokens,
        arguments.calibration_context,
        arguments.calibration_metric,
        not arguments.no_refit,
        not arguments.no_align,
        None if memory is None else int(memory * 2**30),
        arguments.device,
        arguments.calibration_statistics,
    )


def _recursive_config(arguments: argparse.Namespace, num_loops: int | None) -> RecursiveConfig:
    if num_loops is None:
        raise UserError("--num-loops: missing; expected the number of loops over the shared block")
    if arguments.lora_init == "low-rank-only":
        for flag, default in (("init", "auto"), ("sharing", "cycle")):
            if (found := getattr(arguments, flag)) != default:
                raise UserError(
                    f"--{flag}: found {found} beside --lora-init low-rank-only; expected none: nothing is shared"
                )
    ranks = lora_ranks(arguments)
    best: Init = "average" if ranks or arguments.prefix_length else "stepwise"
    init = best if arguments.init == "auto" else arguments.init
    # Of more loops, joint has no closed form, and svd stays the paper's.
    best_lora: LoraInit = "joint" if ranks and num_loops == 2 and init == "average" else "svd"
    if getattr(arguments, "calibration", None):
        best_lora = "calibrated"
    return RecursiveConfig(
        num_loops=num_loops,
        sharing=arguments.sharing,
        init=init,
        norm_init=arguments.norm_init,
        lora_rank=ranks,
        lora_init=best_lora if arguments.lora_init == "auto" else arguments.lora_init,
        untie_norms=arguments.untie_norms,
        prefix_length=arguments.prefix_length,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``python -m rrt.convert``; see the head of this file."""
    parser = CommandParser(prog="python -m rrt.convert", description=(__doc__ or "").split("\n")[0])
    _add_flags(parser)
    arguments = parser.parse_args(argv)
    num_loops = arguments.num_loops
    if arguments.keep_layers is not None:
        if num_loops is not None:
            raise UserError(f"--keep-layers: found beside --num-loops {num_loops}; expected one of the two")
        if arguments.calibration:
            raise UserError("--keep-layers: found beside --calibration; expected no text: layers are kept as they are")
        num_loops = 1
    conversion = prepare_conversion(
        arguments.base,
        arguments.out,
        _recursive_config(arguments, num_loops),
        keep_layers=arguments.keep_layers,
        dtype=chosen_dtype(arguments),
        seed=arguments.seed,
        overwrite=arguments.overwrite,
        calibration=_calibration_options(parser, arguments),
    )
    print(describe(conversion), flush=True)
    report = run_conversion(conversion, progress=True)
    if report.calibration is not None:
        print(calibration_table(report.calibration, report.after.recursion.places(report.after.model)))
    elif conversion.recursion.num_loops > 1 or conversion.recursion.low_rank_only:
        print(report_table(report))
    if report.after.recursion.lora_rank.matrices:
        print(rank_table(report.after))
    print(f"wrote {report.out} in {report.seconds:.1f} s: {_size(report.after)}")


if __name__ == "__main__":
    run_command(main)
