"""Conversion of a base checkpoint into a recursive or relaxed one.

The rules of each initialisation are in :mod:`rrt.folding.fold`. Tensors stream from the base's files to the
checkpoint's, matrix by matrix: memory holds one matrix of every loop and the writer's buffer.
"""

import time
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from rrt.checkpoint.format import CheckpointConfig, CheckpointWriter, write_checkpoint
from rrt.checkpoint.source import Source, open_source
from rrt.common.files import check_output
from rrt.common.provenance import make_provenance
from rrt.data.tokenizer import Tokenizer, tokenizer_of
from rrt.errors import UserError
from rrt.folding.fold import Folding, MatrixReport
from rrt.model.config import LORA_GROUP_OF_LINEAR, LoraGroup, RecursiveConfig
from rrt.model.loop_linear import loop_linears
from rrt.model.meta import meta_model
from rrt.model.sizes import Sizes, model_sizes
from rrt.model.transformer import Layer


@dataclass(frozen=True)
class PreparedConversion:
    """A conversion that has been checked and can run; made by `prepare_conversion`."""

    source: Source
    out: Path
    recursion: RecursiveConfig
    dtype: torch.dtype
    seed: int
    overwrite: bool
    before: Sizes
    after: Sizes
    tokenizer: Tokenizer | None
    notices: tuple[str, ...]


@dataclass(frozen=True)
class ConversionReport:
    """Result of a conversion: sizes before and after, and per matrix what tying lost and LoRA kept."""

    out: Path
    before: Sizes
    after: Sizes
    matrices: tuple[MatrixReport, ...]
    notices: tuple[str, ...]
    seconds: float


def prepare_conversion(
    base: str | Path,
    out: str | Path,
    recursion: RecursiveConfig,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    overwrite: bool = False,
) -> PreparedConversion:
    """Open the base and check everything that can be checked before work starts. Arguments as in `convert`."""
    base, out = Path(base), Path(out)
    _check_offered(recursion)
    source = open_source(base)
    if source.recursion.num_loops > 1 or source.recursion.is_relaxed:
        raise UserError(
            f"{base / 'config.json'}: field 'recursive': found a recursive or relaxed model (num_loops "
            f"{source.recursion.num_loops}, LoRA rank {source.recursion.lora_rank}); expected a vanilla base: "
            "python -m rrt.export unrolls it into one"
        )
    check_output(out, base, overwrite)
    dtype = dtype or source.dtype
    after = model_sizes(source.model, recursion, dtype)
    tokenizer = tokenizer_of(base, source.model.vocab_size)
    notices = list(_rank_caps(source, recursion))
    if tokenizer is None:
        notices.append(f"{base} has no tokenizer (tokenizer.model or tokenizer.json); the checkpoint will have none")
    before = model_sizes(source.model, source.recursion, source.dtype)
    return PreparedConversion(source, out, recursion, dtype, seed, overwrite, before, after, tokenizer, tuple(notices))


def convert(
    base: str | Path,
    out: str | Path,
    recursion: RecursiveConfig,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = False,
) -> ConversionReport:
    """Fold the model in `base` as `recursion` says and write the checkpoint `out`, whole or not at all.

    Args:
        base: HF directory, GGUF file, or a vanilla checkpoint of ours.
        dtype: of the stored parameters; default the base's.
        seed: of everything random. A matrix's values depend on it and the matrix's name only.
        progress: show a bar over the matrices on stderr.

    Raises:
        UserError: the base is unusable or recursive already, `num_loops` does not divide its layers, `out` exists,
            values that are not finite or do not fit `dtype`, or `recursion` asks for what is not offered yet.
    """
    prepared = prepare_conversion(base, out, recursion, dtype=dtype, seed=seed, overwrite=overwrite)
    return run_conversion(prepared, progress=progress)


def run_conversion(conversion: PreparedConversion, *, progress: bool = False) -> ConversionReport:
    """Carry out a conversion that `prepare_conversion` has checked."""
    start = time.monotonic()
    folding = Folding(conversion.source, conversion.recursion, conversion.dtype, conversion.seed)
    config = CheckpointConfig(conversion.source.model, conversion.recursion, conversion.dtype)
    provenance = make_provenance("convert", conversion.source.directory, seed=conversion.seed)
    with write_checkpoint(conversion.out, config, provenance, overwrite=conversion.overwrite) as writer:
        matrices = tuple(_write_tensors(folding, writer, progress))
        if conversion.tokenizer is not None:
            conversion.tokenizer.save(writer.directory)
        provenance["notices"] = conversion.notices
        provenance["matrices"] = [matrix.to_json() for matrix in matrices]
    return ConversionReport(
        conversion.out, conversion.before, conversion.after, matrices, conversion.notices, time.monotonic() - start
    )


def _check_offered(recursion: RecursiveConfig) -> None:
    default = RecursiveConfig()
    for name in ("head_lora_rank", "exit_loops"):
        if getattr(recursion, name) != getattr(default, name):
            raise UserError(
                f"field '{name}': found {getattr(recursion, name)}; expected {getattr(default, name)}: "
                "conversion does not make this"
            )
    if recursion.lora_init == "joint":
        raise UserError("field 'lora_init': found 'joint'; expected 'svd' or 'zero': conversion does not make this")


def _rank_caps(source: Source, recursion: RecursiveConfig) -> Iterator[str]:
    """Yield a notice for each group in which a linear is too small for the rank in `recursion`."""
    capped: dict[tuple[LoraGroup, int], list[str]] = {}
    for name, linear in loop_linears(meta_model(source.model, recursion).stack.layers[0]):
        group = LORA_GROUP_OF_LINEAR[name]
        if linear.rank < getattr(recursion.lora_rank, group):
            capped.setdefault((group, linear.rank), []).append(name)
    for (group, rank), names in capped.items():
        rank_wanted = getattr(recursion.lora_rank, group)
        yield f"LoRA rank of group {group}: {rank_wanted} is capped at {rank}, the smaller side of {', '.join(names)}"


def _write_tensors(folding: Folding, writer: CheckpointWriter, progress: bool) -> Iterator[MatrixReport]:
    """Make and store every parameter of the new model; yield a report per linear of the block."""
    model = meta_model(folding.source.model, folding.recursion)
    for name, parameter in model.named_parameters():
        if name == "stack.prefix":
            writer.add(name, folding.prefix(tuple(parameter.shape)))
        elif not name.startswith("stack."):
            writer.add(name, folding.unlooped(name))
    layers = typing.cast(list[Layer], list(model.stack.layers))
    matrices = sum(len(list(loop_linears(layer))) for layer in layers)
    # Without a terminal the bar would fill a log file.
    with tqdm(total=matrices, unit="matrix", desc="converting", disable=None if progress else True) as bar:
        for index, layer in enumerate(layers):
            _write_vectors(folding, writer, index, layer)
            for name, linear in loop_linears(layer):
                weight = folding.shared(index, f"{name}.weight")
                lora_a, lora_b, report = folding.lora(index, name, weight, linear.rank)
                writer.add(f"{report.name}.weight", weight)
                if linear.rank:
                    writer.add(f"{report.name}.lora_a", lora_a)
                    writer.add(f"{report.name}.lora_b", lora_b)
                bar.update()
                yield report


def _write_vectors(folding: Folding, writer: CheckpointWriter, index: int, layer: Layer) -> None:
    """Make and store the norms and biases of one shared layer."""
    untied = folding.recursion.untie_norms and folding.recursion.num_loops > 1
    for name, _ in layer.named_parameters():
        if "norm" in name or name.endswith(".bias"):
            make = folding.untied if untied else folding.shared
            writer.add(f"stack.layers.{index}.{name}", make(index, name))
