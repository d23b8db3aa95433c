"""Conversion of a base checkpoint into a recursive or relaxed one.

The rules of each initialisation are in :mod:`rrt.folding.fold`. Tensors stream from the base's files to the
checkpoint's, matrix by matrix: memory holds one matrix of every loop and the writer's buffer.
"""

import hashlib
import json
import time
import typing
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from tqdm import tqdm

from rrt.checkpoint.format import CheckpointConfig, CheckpointWriter, write_checkpoint
from rrt.checkpoint.source import Source, open_source
from rrt.common.files import NoSpaceError, check_output, free_bytes, locked_directory
from rrt.common.machine import free_memory_bytes
from rrt.common.processes import pick_device
from rrt.common.provenance import code_fingerprint, fingerprint, make_provenance
from rrt.common.schema import to_mapping
from rrt.data.tokenizer import Tokenizer, tokenizer_of
from rrt.errors import UserError
from rrt.folding.calibrated import CalibratedFolding, Calibration, CalibrationReport
from rrt.folding.calibration import CalibrationMetric, products_dtype
from rrt.folding.calibration_space import check_space
from rrt.folding.calibration_text import CalibrationText, calibration_rows
from rrt.folding.fold import Folding, MatrixReport, VectorReport, kept_depths
from rrt.folding.rank_budget import distribute_budget
from rrt.folding.views import KeptLayers
from rrt.folding.workspace import Workspace
from rrt.model.config import LORA_GROUP_OF_LINEAR, Init, LoraGroup, ModelConfig, RecursiveConfig, linear_shapes
from rrt.model.loop_linear import loop_linears
from rrt.model.meta import capped_lora_ranks, meta_model
from rrt.model.sizes import Sizes, model_sizes, without_sharing
from rrt.model.transformer import Layer

_TOKENS_PER_INPUT = 2
"""SmolLM2-135M in two loops, rank 64: with 1.3 tokens an input perplexity 10,442 before training, with 2.7 62.2."""


@dataclass(frozen=True)
class CalibrationOptions(CalibrationText):
    """What a calibrated conversion is asked for.

    Attributes:
        metric: see :mod:`rrt.folding.calibration`.
        refit: refit the LoRAs depth by depth after the joint fit.
        align: align the feed-forward neurons of depths that share a layer before the joint fit.
        memory: bytes that statistics of all depths may take, which are else computed twice; default half of what is
            free, in memory and on the disk of the output.
        device: "cpu", "cuda", "cuda:1", ...; "auto" is CUDA where available.
        statistics: directory in which the base's statistics are kept for further conversions with the same text and
            metric; they take no account of `memory` then.
    """

    metric: CalibrationMetric = "both"
    refit: bool = True
    align: bool = True
    memory: int | None = None
    device: str = "auto"
    statistics: Path | None = None


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
    calibration: Calibration | None


@dataclass(frozen=True)
class ConversionReport:
    """Result of a conversion: sizes before and after, what tying lost, and what is lost with LoRA."""

    out: Path
    before: Sizes
    after: Sizes
    matrices: tuple[MatrixReport, ...]
    vectors: tuple[VectorReport, ...]
    """The tied norms and biases; none where they are kept per depth."""
    notices: tuple[str, ...]
    calibration: CalibrationReport | None
    seconds: float


def prepare_conversion(
    base: str | Path,
    out: str | Path,
    recursion: RecursiveConfig,
    *,
    keep_layers: int | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    overwrite: bool = False,
    calibration: CalibrationOptions | None = None,
) -> PreparedConversion:
    """Open the base and check everything that can be checked before work starts. Arguments as in `convert`."""
    base, out = Path(base), Path(out)
    _check_offered(recursion, keep_layers)
    _check_calibration(recursion, calibration)
    source = open_source(base)
    if source.recursion.num_loops > 1 or source.recursion.is_relaxed:
        raise UserError(
            f"{base / 'config.json'}: field 'recursive': found a recursive or relaxed model (num_loops "
            f"{source.recursion.num_loops}, LoRA rank {source.recursion.lora_rank}); expected a vanilla base: "
            "python -m rrt.export unrolls it into one"
        )
    before = model_sizes(source.model, source.recursion, source.dtype)
    notices = []
    if keep_layers is not None:
        depths = _depths_to_keep(source.model, recursion.init, keep_layers)
        source = KeptLayers(source, depths)
        notices.append(f"kept are layers {', '.join(map(str, depths))} of the base's {before.model.num_layers}, from 0")
    check_output(out, base, overwrite)
    dtype = dtype or source.dtype
    keeps_vectors = recursion.untie_norms or recursion.lora_init == "low-rank-only" or calibration is None
    if not keeps_vectors and _has_more_than_gains(source.model):
        recursion = replace(recursion, untie_norms=True)
        notices.append("biases and norms of queries and keys are kept per depth, which calibration counts on")
    notices += _rank_caps(source.model, recursion)
    recursion = replace(recursion, lora_rank=capped_lora_ranks(source.model, recursion))
    if recursion.lora_rank.is_budget:
        recursion = replace(recursion, lora_rank=replace(recursion.lora_rank, matrices={}))
    if recursion.lora_init == "low-rank-only":
        folded, recursion = recursion, without_sharing(source.model, recursion)
        totals = [model_sizes(source.model, each, dtype).total_params for each in (recursion, folded)]
        notices.append(
            f"B A of rank {recursion.lora_rank} (0: the whole weight) at every depth has {totals[0]:,} parameters; "
            f"{folded.num_loops} loops with LoRA rank {folded.lora_rank} have {totals[1]:,}"
        )
    after = model_sizes(source.model, recursion, dtype)
    notices += _lack_of_saving(before, after)
    tokenizer = tokenizer_of(base, source.model.vocab_size)
    if tokenizer is None:
        notices.append(f"{base} has no tokenizer (tokenizer.model or tokenizer.json); the checkpoint will have none")
    chosen = None
    if calibration is not None:
        chosen = _open_calibration(calibration, source.model, tokenizer, out)
        notices += _lack_of_text(source.model, chosen)
        check_space(source.model, after, chosen, out, workspace_directory(out))
    return PreparedConversion(
        source, out, recursion, dtype, seed, overwrite, before, after, tokenizer, tuple(notices), chosen
    )


def convert(
    base: str | Path,
    out: str | Path,
    recursion: RecursiveConfig,
    *,
    keep_layers: int | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    overwrite: bool = False,
    calibration: CalibrationOptions | None = None,
    progress: bool = False,
) -> ConversionReport:
    """Fold the model in `base` as `recursion` says and write the checkpoint `out`, whole or not at all.

    Args:
        base: HF directory, GGUF file, or a vanilla checkpoint of ours.
        recursion: its LoRA ranks are capped, with a notice, at what the largest linear of a group can have. If they are
            a budget, its parameters are distributed over the matrices (`rrt.folding.rank_budget`).
        keep_layers: write so many of the base's layers as a vanilla model, the reduced-size baseline; `recursion.init`
            chooses them and the rest of `recursion` is the default's.
        dtype: of the stored parameters; default the base's.
        seed: of everything random. A matrix's values depend on it and the matrix's name only.
        calibration: with `recursion.lora_init` "calibrated"; "low-rank-only" may have one too.
        progress: show bars on stderr.

    Raises:
        UserError: the base is unusable or recursive already, `num_loops` does not divide its layers, `out` exists,
            values that are not finite or do not fit `dtype`, a rank budget is below rank 1 for each matrix or leaves no
            saving, `recursion` asks for what is not offered yet, or the calibration text cannot be used.
    """
    prepared = prepare_conversion(
        base,
        out,
        recursion,
        keep_layers=keep_layers,
        dtype=dtype,
        seed=seed,
        overwrite=overwrite,
        calibration=calibration,
    )
    return run_conversion(prepared, progress=progress)


def run_conversion(conversion: PreparedConversion, *, progress: bool = False) -> ConversionReport:
    """Carry out a conversion that `prepare_conversion` has checked.

    A calibrated one keeps its finished steps in the directory `workspace_directory` until it is done, and goes on from
    them if they are of the same conversion.
    """
    start = time.monotonic()
    if conversion.calibration is None:
        recursion = conversion.recursion
        folding = Folding(conversion.source, recursion, conversion.dtype, conversion.seed)
        if recursion.lora_rank.is_budget:
            gains = _measure_gains(folding, progress)
            recursion = _with_budget_distributed(conversion, gains)
            folding = Folding(conversion.source, recursion, conversion.dtype, conversion.seed)
        return _write(conversion, folding, None, start, progress)
    calibration, shared = conversion.calibration, None
    with ExitStack() as locks:
        if calibration.statistics is not None:
            locks.enter_context(locked_directory(calibration.statistics))
            settings = _statistics_settings(conversion, calibration)
            shared = Workspace(calibration.statistics, _hashed(settings), is_shared=True)
        locks.enter_context(locked_directory(workspace_directory(conversion.out)))
        return _run_calibrated(conversion, calibration, shared, start, progress)


def _run_calibrated(
    conversion: PreparedConversion, calibration: Calibration, shared: Workspace | None, start: float, progress: bool
) -> ConversionReport:
    workspace = Workspace(workspace_directory(conversion.out), _fingerprint(conversion, calibration))
    statistics = shared or workspace
    try:
        folding = _calibrated_folding(conversion, conversion.recursion, calibration, workspace, statistics)
        if conversion.recursion.lora_rank.is_budget:
            recursion = _with_budget_distributed(conversion, folding.measure_gains(progress=progress))
            folding = _calibrated_folding(conversion, recursion, calibration, workspace, statistics)
        calibrated = folding.calibrate(progress=progress)
    except UserError as error:
        if not isinstance(error, NoSpaceError):
            workspace.remove()
        raise
    report = _write(conversion, folding, calibrated, start, progress)
    workspace.remove()
    return report


def workspace_directory(out: Path) -> Path:
    """Return the directory that a calibrated conversion to `out` works in."""
    return out.with_name(f"{out.name}.calibration")


def _with_budget_distributed(conversion: PreparedConversion, gains: dict[str, list[float]]) -> RecursiveConfig:
    recursion = conversion.recursion
    return replace(recursion, lora_rank=distribute_budget(conversion.source.model, recursion, gains))


def _calibrated_folding(
    conversion: PreparedConversion,
    recursion: RecursiveConfig,
    calibration: Calibration,
    workspace: Workspace,
    statistics: Workspace,
) -> CalibratedFolding:
    source, dtype, seed = conversion.source, conversion.dtype, conversion.seed
    return CalibratedFolding(source, recursion, dtype, seed, calibration, workspace, statistics)


def _fingerprint(conversion: PreparedConversion, calibration: Calibration) -> str:
    """Hash all that the steps of a calibrated conversion depend on."""
    settings = {
        **_statistics_settings(conversion, calibration),
        "recursion": to_mapping(conversion.recursion),
        "dtype": str(conversion.dtype),
        "refit": calibration.refit,
        "align": calibration.align,
        "seed": conversion.seed,
    }
    return _hashed(settings)


def _statistics_settings(conversion: PreparedConversion, calibration: Calibration) -> dict[str, object]:
    """List what the base's statistics depend on."""
    return {
        "code": code_fingerprint(),
        "base": fingerprint(conversion.source.directory),
        "rows": hashlib.sha256(calibration.rows.numpy().tobytes()).hexdigest(),
        "context": calibration.rows.shape[1] - 1,
        "metric": calibration.metric,
        "products": str(products_dtype(calibration.device)),
    }


def _hashed(settings: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _write(
    conversion: PreparedConversion,
    folding: Folding,
    calibration: CalibrationReport | None,
    start: float,
    progress: bool,
) -> ConversionReport:
    """Write the checkpoint, and report; `start` is when the conversion began, by `time.monotonic`."""
    model, recursion = conversion.source.model, folding.recursion
    config = CheckpointConfig(model, recursion, conversion.dtype)
    provenance = make_provenance("convert", conversion.source.directory, seed=conversion.seed)
    with write_checkpoint(conversion.out, config, provenance, overwrite=conversion.overwrite) as writer:
        vectors: list[VectorReport] = []
        matrices = tuple(_write_tensors(folding, writer, vectors, progress))
        if conversion.tokenizer is not None:
            conversion.tokenizer.save(writer.directory)
        provenance["notices"] = conversion.notices
        provenance["matrices"] = [matrix.to_json() for matrix in matrices]
        provenance["vectors"] = [vector.to_json() for vector in vectors]
        if calibration is not None:
            provenance["calibration"] = calibration.to_json()
    return ConversionReport(
        conversion.out,
        conversion.before,
        model_sizes(model, recursion, conversion.dtype),
        matrices,
        tuple(vectors),
        conversion.notices,
        calibration,
        time.monotonic() - start,
    )


def _check_offered(recursion: RecursiveConfig, keep_layers: int | None) -> None:
    default = RecursiveConfig()
    if keep_layers is not None:
        for field in fields(RecursiveConfig):
            found, expected = getattr(recursion, field.name), getattr(default, field.name)
            if field.name != "init" and found != expected:
                raise UserError(
                    f"field '{field.name}': found {found}; expected {expected} with keep_layers: layers are kept as is"
                )
    for name in ("head_lora_rank", "exit_translators", "exit_loops"):
        if getattr(recursion, name) != getattr(default, name):
            raise UserError(
                f"field '{name}': found {getattr(recursion, name)}; expected {getattr(default, name)}: "
                "conversion does not make this"
            )
    if recursion.low_rank_only:
        raise UserError(
            "field 'low_rank_only': found true; expected false: conversion sets it for lora_init 'low-rank-only', with "
            "the ranks that have as many parameters as the loops and ranks asked for"
        )
    if recursion.lora_init == "low-rank-only":
        why = "with lora_init 'low-rank-only', which has the parameters of the loops and ranks asked for"
        if recursion.num_loops == 1:
            raise UserError(f"field 'num_loops': found 1; expected at least 2 {why}")
        if recursion.prefix_length:
            raise UserError(f"field 'prefix_length': found {recursion.prefix_length}; expected 0 {why}")
        if recursion.lora_rank.is_budget:
            raise UserError(f"field 'lora_rank.is_budget': found true; expected false {why}")
    if recursion.lora_init in ("joint", "calibrated"):
        if not recursion.lora_rank:
            raise UserError(
                f"field 'lora_init': found '{recursion.lora_init}' without LoRA; expected a rank: --lora-rank"
            )
        if recursion.init != "average":
            raise UserError(
                f"field 'init': found '{recursion.init}'; expected 'average' (--init average or auto) with lora_init "
                f"'{recursion.lora_init}', which makes shared weights and LoRAs together"
            )


def _check_calibration(recursion: RecursiveConfig, calibration: CalibrationOptions | None) -> None:
    if calibration is None:
        if recursion.lora_init == "calibrated":
            raise UserError("field 'lora_init': found 'calibrated' without a text; expected one: --calibration")
        return
    if recursion.lora_init not in ("calibrated", "low-rank-only"):
        raise UserError(
            f"field 'lora_init': found '{recursion.lora_init}' beside a calibration text; expected 'calibrated' or "
            "'low-rank-only', or no --calibration"
        )
    for name, expected in (("prefix_length", 0), ("norm_init", "folded")):
        if getattr(recursion, name) != expected:
            raise UserError(
                f"field '{name}': found {getattr(recursion, name)}; expected {expected} with a calibration text"
            )
    if recursion.num_loops == 1:
        raise UserError("field 'num_loops': found 1; expected 2 or more with a calibration text")


def _has_more_than_gains(model: ModelConfig) -> bool:
    """Tell whether layers have vectors that folding leaves: biases, also of a LayerNorm, or norms of queries, keys."""
    return model.qkv_bias or model.out_bias or model.mlp_bias or model.qk_norm or model.norm_type == "layernorm"


def _open_calibration(
    options: CalibrationOptions, model: ModelConfig, tokenizer: Tokenizer | None, out: Path
) -> Calibration:
    """Read the text, and choose a device and how much memory to take."""
    device = pick_device(options.device)
    rows = calibration_rows(options, tokenizer, model.context_length)
    memory = options.memory
    if memory is None:
        # What an interrupted conversion has left counts as free: it goes on as it began.
        kept = sum(file.stat().st_size for file in workspace_directory(out).glob("*.safetensors"))
        memory = min(free_memory_bytes(torch.device("cpu")), free_bytes(out) + kept) // 2
    if options.statistics is not None:
        _check_statistics_directory(options.statistics, out)
    return Calibration(rows, options.metric, options.refit, options.align, memory, device, options.statistics)


def _check_statistics_directory(path: Path, out: Path) -> None:
    """Raise `UserError` if statistics cannot outlive a conversion to `out` there."""
    if path.exists() and not path.is_dir():
        raise UserError(f"--calibration-statistics: found {path}, a file; expected a directory")
    inside = path.resolve()
    for kept in (out, workspace_directory(out)):
        if kept.resolve() in (inside, *inside.parents):
            raise UserError(f"--calibration-statistics: found {path}; expected a directory apart from {kept}")


def _depths_to_keep(model: ModelConfig, init: Init, keep_layers: int) -> tuple[int, ...]:
    if init in ("average", "random"):
        raise UserError(
            f"field 'init': found '{init}'; expected 'stepwise', 'stepwise-fixed-start' or 'lower', which choose the "
            "layers to keep"
        )
    if not 1 <= keep_layers <= model.num_layers:
        raise UserError(f"keep_layers: found {keep_layers}; expected 1 to {model.num_layers}, the base's layers")
    return kept_depths(init, model.num_layers, keep_layers)


def _rank_caps(model: ModelConfig, recursion: RecursiveConfig) -> Iterator[str]:
    """Yield a notice for each group in which a linear is too small for the rank in `recursion`."""
    capped: dict[tuple[LoraGroup, int], list[str]] = {}
    for name, shape in linear_shapes(model).items():
        group = LORA_GROUP_OF_LINEAR[name]
        if min(shape) < getattr(recursion.lora_rank, group):
            capped.setdefault((group, min(shape)), []).append(name)
    for (group, rank), names in capped.items():
        rank_wanted = getattr(recursion.lora_rank, group)
        yield f"LoRA rank of group {group}: {rank_wanted} is capped at {rank}, the smaller side of {', '.join(names)}"


def _lack_of_saving(before: Sizes, after: Sizes) -> Iterator[str]:
    """Yield a notice if the LoRA takes as many parameters as sharing saves. For a budget that is an error."""
    ranks = after.recursion.lora_rank
    if after.total_params < before.total_params or not (after.recursion.num_loops > 1 or ranks.is_budget):
        return
    text = f"this saves no parameters: {after.total_params:,} instead of the base's {before.total_params:,}"
    if ranks.is_budget:
        raise UserError(f"LoRA rank {ranks}: {text}; expected a smaller budget")
    yield f"{text}; a lower --lora-rank does"


def _lack_of_text(model: ModelConfig, calibration: Calibration) -> Iterator[str]:
    """Yield a notice if the text has few tokens for the inputs of some linear, whose covariance is noise then."""
    widest = max(inputs for _, inputs in linear_shapes(model).values())
    found = calibration.rows[:, 1:].numel()
    if found < _TOKENS_PER_INPUT * widest:
        yield (
            f"{found:,} calibration tokens are few for linears of {widest:,} inputs; expected "
            f"{_TOKENS_PER_INPUT * widest:,} or more (--calibration-tokens)"
        )


def _measure_gains(folding: Folding, progress: bool) -> dict[str, list[float]]:
    """Measure what each unit of rank saves, by matrix."""
    layers = meta_model(folding.source.model, folding.recursion).stack.layers
    names = [(index, name) for index, layer in enumerate(layers) for name, _ in loop_linears(layer)]
    with tqdm(names, unit="matrix", desc="distributing ranks", disable=None if progress else True) as bar:
        return {f"layers.{index}.{name}": folding.gains(index, name) for index, name in bar}


def _write_tensors(
    folding: Folding, writer: CheckpointWriter, vectors: list[VectorReport], progress: bool
) -> Iterator[MatrixReport]:
    """Make and store every parameter of the new model; yield a report per linear of the block, append the vectors'."""
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
            vectors.extend(_write_vectors(folding, writer, index, layer))
            for name, linear in loop_linears(layer):
                made = folding.linear(index, name, linear.rank)
                if made.weight is not None:
                    writer.add(f"{made.report.name}.weight", made.weight)
                if linear.rank:
                    writer.add(f"{made.report.name}.lora_a", made.lora_a)
                    writer.add(f"{made.report.name}.lora_b", made.lora_b)
                bar.update()
                yield made.report


def _write_vectors(folding: Folding, writer: CheckpointWriter, index: int, layer: Layer) -> Iterator[VectorReport]:
    """Make and store the norms and biases of one shared layer; yield a report per tied one."""
    untied = folding.recursion.untie_norms and folding.recursion.num_loops > 1
    for name, _ in layer.named_parameters():
        if "norm" in name or name.endswith(".bias"):
            vector = (folding.untied if untied else folding.shared)(index, name)
            writer.add(f"stack.layers.{index}.{name}", vector)
            if folding.recursion.num_loops > 1 and not untied:
                yield folding.vector_report(index, name, vector)
