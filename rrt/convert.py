"""Fold a pretrained model into one looped block and relax it: base checkpoint in, recursive checkpoint out.

    python -m rrt.convert --base gemma-2b --out runs/out/relaxed --num-loops 2 --lora-rank 512

The rules of each initialisation are in :mod:`rrt.folding.fold`. Tensors stream from the base's files to the
checkpoint's, matrix by matrix: memory holds one matrix of every loop and the writer's buffer.
"""

import argparse
import time
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from rrt.checkpoint.format import CheckpointConfig, CheckpointWriter, make_provenance, write_checkpoint
from rrt.checkpoint.source import Source, meta_model, open_source
from rrt.checkpoint.tensor_files import dtype_name
from rrt.common.cli import human_bytes, human_count, run_command
from rrt.errors import UserError
from rrt.folding.fold import Folding, MatrixReport
from rrt.inspect import Sizes, model_sizes
from rrt.model.config import Init, LoraInit, LoraRanks, NormInit, RecursiveConfig, to_mapping
from rrt.model.flags import (
    add_dtype_flag,
    add_lora_rank_flags,
    add_prefix_length_flag,
    add_untie_norms_flag,
    chosen_dtype,
    lora_ranks,
)
from rrt.model.loop_linear import LoopLinear
from rrt.model.transformer import Layer
from rrt.rewrite import check_output, tokenizer_of
from rrt.tokenizer import Tokenizer

_GROUP_OF_LINEAR = {
    "attn.q": "q",
    "attn.k": "kv",
    "attn.v": "kv",
    "attn.out": "out",
    "mlp.gate": "ffn",
    "mlp.up": "ffn",
    "mlp.down": "ffn",
}


@dataclass(frozen=True)
class ConversionPlan:
    """Everything that is known before the first tensor is read; made by `plan_conversion`."""

    source: Source
    out: Path
    recursive: RecursiveConfig
    dtype: torch.dtype
    seed: int
    overwrite: bool
    before: Sizes
    after: Sizes
    tokenizer: Tokenizer | None
    notices: tuple[str, ...]


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did: sizes before and after, and per matrix what tying lost and LoRA kept."""

    out: Path
    before: Sizes
    after: Sizes
    matrices: tuple[MatrixReport, ...]
    notices: tuple[str, ...]
    seconds: float


def plan_conversion(
    base: str | Path,
    out: str | Path,
    recursive: RecursiveConfig,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> ConversionPlan:
    """Open the base and check everything that can be checked before work starts. Arguments as in `convert`."""
    base, out = Path(base), Path(out)
    _check_offered(recursive)
    source = open_source(base)
    if source.recursive.num_loops > 1 or source.recursive.is_relaxed:
        raise UserError(
            f"{base / 'config.json'}: field 'recursive': found a recursive or relaxed model (num_loops "
            f"{source.recursive.num_loops}, LoRA rank {source.recursive.lora_rank}); expected a vanilla base: "
            "python -m rrt.export unrolls it into one"
        )
    check_output(out, base, overwrite)
    dtype = dtype or source.dtype
    after = model_sizes(source.model, recursive, dtype)
    tokenizer = tokenizer_of(base, source.model.vocab_size)
    notices = list(_rank_caps(source, recursive))
    if tokenizer is None:
        notices.append(f"{base} has no tokenizer (tokenizer.model or tokenizer.json); the checkpoint will have none")
    before = model_sizes(source.model, source.recursive, source.dtype)
    return ConversionPlan(source, out, recursive, dtype, seed, overwrite, before, after, tokenizer, tuple(notices))


def convert(
    base: str | Path,
    out: str | Path,
    recursive: RecursiveConfig,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = False,
) -> ConversionReport:
    """Fold the model in `base` as `recursive` says and write the checkpoint `out`, whole or not at all.

    Args:
        base: HF directory, or a vanilla checkpoint of ours.
        dtype: of the stored parameters; default the base's.
        seed: of everything random. A matrix's values depend on it and the matrix's name only.
        progress: show a bar over the matrices on stderr.

    Raises:
        UserError: the base is unusable or recursive already, `num_loops` does not divide its layers, `out` exists,
            values that are not finite or do not fit `dtype`, or `recursive` asks for what is not offered yet.
    """
    plan = plan_conversion(base, out, recursive, dtype=dtype, seed=seed, overwrite=overwrite)
    return run_conversion(plan, progress=progress)


def run_conversion(plan: ConversionPlan, *, progress: bool = False) -> ConversionReport:
    """Carry out a plan of `plan_conversion`."""
    start = time.monotonic()
    folding = Folding(plan.source, plan.recursive, plan.dtype, plan.seed)
    config = CheckpointConfig(plan.source.model, plan.recursive, plan.dtype)
    provenance = make_provenance("convert", plan.source.directory, seed=plan.seed)
    with write_checkpoint(plan.out, config, provenance, overwrite=plan.overwrite) as writer:
        matrices = tuple(_write_tensors(folding, writer, progress))
        if plan.tokenizer is not None:
            plan.tokenizer.save(writer.directory)
        provenance["notices"] = plan.notices
        provenance["matrices"] = [matrix.to_json() for matrix in matrices]
    return ConversionReport(plan.out, plan.before, plan.after, matrices, plan.notices, time.monotonic() - start)


def _check_offered(recursive: RecursiveConfig) -> None:
    default = RecursiveConfig()
    for name in ("head_lora_rank", "exit_loops"):
        if getattr(recursive, name) != getattr(default, name):
            raise UserError(
                f"field '{name}': found {getattr(recursive, name)}; expected {getattr(default, name)}: "
                "conversion does not make this"
            )
    if recursive.lora_init == "joint":
        raise UserError("field 'lora_init': found 'joint'; expected 'svd' or 'zero': conversion does not make this")


def _rank_caps(source: Source, recursive: RecursiveConfig) -> Iterator[str]:
    """A notice for each group in which a linear is too small for the rank that was asked."""
    capped: dict[tuple[str, int], list[str]] = {}
    for name, linear in _linears(meta_model(source.model, recursive).stack.layers[0]):
        group = _GROUP_OF_LINEAR[name]
        if linear.rank < getattr(recursive.lora_rank, group):
            capped.setdefault((group, linear.rank), []).append(name)
    for (group, rank), names in capped.items():
        asked = getattr(recursive.lora_rank, group)
        yield f"LoRA rank of group {group}: {asked} is capped at {rank}, the smaller side of {', '.join(names)}"


def _linears(layer: torch.nn.Module) -> list[tuple[str, LoopLinear]]:
    return [(name, module) for name, module in layer.named_modules() if isinstance(module, LoopLinear)]


def _write_tensors(folding: Folding, writer: CheckpointWriter, progress: bool) -> Iterator[MatrixReport]:
    """Make and store every parameter of the new model; yields a report per linear of the block."""
    model = meta_model(folding.source.model, folding.recursive)
    for name, parameter in model.named_parameters():
        if name == "stack.prefix":
            writer.add(name, folding.prefix(tuple(parameter.shape)))
        elif not name.startswith("stack."):
            writer.add(name, folding.unlooped(name))
    layers = typing.cast(list[Layer], list(model.stack.layers))
    matrices = sum(len(_linears(layer)) for layer in layers)
    # Without a terminal the bar would fill a log file.
    with tqdm(total=matrices, unit="matrix", desc="converting", disable=None if progress else True) as bar:
        for index, layer in enumerate(layers):
            _write_vectors(folding, writer, index, layer)
            for name, linear in _linears(layer):
                weight = folding.shared(index, f"{name}.weight")
                lora_a, lora_b, report = folding.lora(index, name, weight, linear.rank)
                writer.add(f"{report.name}.weight", weight)
                if linear.rank:
                    writer.add(f"{report.name}.lora_a", lora_a)
                    writer.add(f"{report.name}.lora_b", lora_b)
                bar.update()
                yield report


def _write_vectors(folding: Folding, writer: CheckpointWriter, index: int, layer: Layer) -> None:
    """Norms and biases of one shared layer."""
    untied = folding.recursive.untie_norms and folding.recursive.num_loops > 1
    for name, _ in layer.named_parameters():
        if "norm" in name or name.endswith(".bias"):
            make = folding.untied if untied else folding.shared
            writer.add(f"stack.layers.{index}.{name}", make(index, name))


def describe_plan(plan: ConversionPlan) -> str:
    """What the command is about to do, for people."""
    recursive, model = plan.recursive, plan.source.model
    layers = recursive.layers_per_loop(model)
    norms = "norms and biases per depth" if recursive.untie_norms else "norms and biases tied"
    lora = f"LoRA rank {recursive.lora_rank} ({recursive.lora_init})" if recursive.lora_rank else "no LoRA"
    if recursive.prefix_length:
        lora += f"; {recursive.prefix_length} prefix vectors per depth"
    init = f"{recursive.init} (norms: {recursive.norm_init})" if recursive.init == "average" else recursive.init
    return "\n".join(
        (
            f"base  {plan.source.directory}: {model.family}, {model.num_layers} layers, {_size(plan.before)}",
            f"new   {plan.out}: {recursive.num_loops} loops x {layers} layers, {_size(plan.after)}",
            f"init  {init}; {lora}; {norms}; seed {plan.seed}",
            *(f"notice: {notice}" for notice in plan.notices),
        )
    )


def _size(sizes: Sizes) -> str:
    return (
        f"{human_count(sizes.total_params)} parameters ({human_count(sizes.non_embedding_params)} non-embedding), "
        f"{human_bytes(sizes.bytes)} {dtype_name(sizes.dtype)}"
    )


def report_table(report: ConversionReport) -> str:
    """Per shared layer and group: share of ||W||^2 that tying lost, and of that what the LoRA keeps."""
    groups = list(to_mapping(LoraRanks()))
    by_layer: dict[str, dict[str, list[MatrixReport]]] = {}
    for matrix in report.matrices:
        layer, linear = matrix.name.removeprefix("stack.layers.").split(".", 1)
        for row in (layer, "all"):
            by_layer.setdefault(row, {}).setdefault(_GROUP_OF_LINEAR[linear], []).append(matrix)
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
    """What the command's flags that describe the new model say, without the others."""
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
        "--base", type=Path, required=True, metavar="DIR", help="HF directory, or a vanilla checkpoint of ours"
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
    """``python -m rrt.convert``; see the head of this file."""
    parser = argparse.ArgumentParser(prog="python -m rrt.convert", description=(__doc__ or "").split("\n")[0])
    _add_flags(parser)
    arguments = parser.parse_args(argv)
    plan = plan_conversion(
        arguments.base,
        arguments.out,
        _recursive_config(arguments),
        dtype=chosen_dtype(arguments),
        seed=arguments.seed,
        overwrite=arguments.overwrite,
    )
    print(describe_plan(plan), flush=True)
    report = run_conversion(plan, progress=True)
    if plan.recursive.num_loops > 1:
        print(report_table(report))
    print(f"wrote {report.out} in {report.seconds:.1f} s: {_size(report.after)}")


if __name__ == "__main__":
    run_command(main)
