"""The model that a recipe trains: its shape by name, file, directory or recipe, and where its weights come from."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

from torch import Tensor

from rrt.checkpoint.format import is_checkpoint, read_checkpoint_config
from rrt.checkpoint.gguf_config import gguf_model_config
from rrt.checkpoint.hf_config import model_config_from_hf
from rrt.checkpoint.presets import PRESETS, preset
from rrt.checkpoint.source import Source, open_source
from rrt.common.cli import human_count
from rrt.common.files import read_json
from rrt.common.gguf_file import GGUFFile, is_gguf
from rrt.convert import recursive_flags
from rrt.data.tokenizer import Tokenizer
from rrt.errors import UserError
from rrt.model.config import ModelConfig, RecursiveConfig
from rrt.model.meta import capped_lora_ranks, meta_model
from rrt.model.sizes import without_sharing
from train.objective import NEXT_TOKEN, Objective
from train.recipe import ABSENT, DistillConfig, StartConfig

EXIT_FIELDS = ("exit_loops", "head_lora_rank", "exit_translators")
"""Fields of a checkpoint's `RecursiveConfig` that early-exit training or rrt.fit_exits sets; all others are from
rrt.convert."""


@dataclass(frozen=True)
class TrainingSpec:
    """A training as far as it can be described without weights, for a dry run."""

    model: ModelConfig
    recursion: RecursiveConfig
    objective: Objective = NEXT_TOKEN
    teacher: tuple[ModelConfig, RecursiveConfig] | None = None


@dataclass(frozen=True)
class InitialModel:
    """The model that training begins with, opened and checked."""

    stage: str
    """The name of this training in `provenance.json`."""
    model: ModelConfig
    recursion: RecursiveConfig
    tokenizer: Tokenizer
    open_parameters: Callable[[], Callable[[str], Tensor]]
    """Gives a function from a parameter's name to its initial value; not called when a run is resumed."""
    parent: Path | None
    """The checkpoint that the parameters come from."""
    objective: Objective = NEXT_TOKEN
    teacher: Path | None = None
    """The model that the objective distills from."""
    notices: tuple[str, ...] = ()
    """What to tell before training begins."""


def describe_model(model: ModelConfig, recursion: RecursiveConfig) -> str:
    """Describe a model in one line."""
    meta = meta_model(model, recursion)
    count, block = (sum(p.numel() for p in module.parameters()) for module in (meta, meta.stack))
    return (
        f"{model.family}, {model.num_layers} layers as {recursion.num_loops} loop(s) of "
        f"{recursion.layers_per_loop(model)}, LoRA rank {recursion.lora_rank}, {human_count(count)} parameters "
        f"({human_count(block)} in the block)"
    )


def read_architecture(name: str, field: str) -> tuple[ModelConfig, RecursiveConfig]:
    """Read the shape called `name`: a preset, a `config.json`, a directory that has one, or a GGUF file.

    Raises:
        UserError: none of these, naming `field`, or a configuration that is wrong.
    """
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if is_gguf(path):
        return gguf_model_config(GGUFFile(path)), RecursiveConfig()
    if file.is_file():
        values = read_json(file)
        if is_checkpoint(values):
            config = read_checkpoint_config(file)
            return config.model, config.recursion
        return model_config_from_hf(values, str(file)), RecursiveConfig()
    if name in PRESETS:
        return preset(name), RecursiveConfig()
    found = "missing" if name == ABSENT else f"found {name!r}"
    raise UserError(
        f"field '{field}': {found}; expected a config.json, a model directory, a GGUF file or one of "
        f"{', '.join(PRESETS)}"
    )


def checkpoint_architecture(checkpoint: str, start: StartConfig) -> tuple[ModelConfig, RecursiveConfig]:
    """Return the shape of a checkpoint or, where none is given, of the one that `start` describes.

    Raises:
        UserError: neither is given, or the checkpoint is folded or relaxed in another way than `start` says.
    """
    if start.base is None:
        if checkpoint == ABSENT:
            raise UserError("missing 'checkpoint.path', or 'start.base' in its place; give one of them")
        return read_architecture(checkpoint, "checkpoint.path")
    if checkpoint == ABSENT:
        model = read_architecture(start.base, "start.base")[0]
        return model, _described_recursion(start, model)
    model, recursion = read_architecture(checkpoint, "checkpoint.path")
    check_conversion(checkpoint, model, recursion, start)
    return model, recursion


def _described_recursion(start: StartConfig, model: ModelConfig) -> RecursiveConfig:
    recursion = recursive_flags(shlex.split(start.convert)) if start.convert else RecursiveConfig()
    return without_sharing(model, recursion) if recursion.lora_init == "low-rank-only" else recursion


def open_checkpoint(checkpoint: str, start: StartConfig) -> Source:
    """Open the checkpoint that training begins with.

    Raises:
        UserError: it is not usable, or folded or relaxed in another way than `start` says.
    """
    source = open_source(checkpoint)
    check_conversion(checkpoint, source.model, source.recursion, start)
    return source


def check_conversion(checkpoint: str, model: ModelConfig, recursion: RecursiveConfig, start: StartConfig) -> None:
    """Check that a checkpoint has the family, fold and relaxation that `start` describes, if it describes any.

    Sizes may differ, so that a row can be tried with a small model; LoRA ranks are compared as capped for that model.

    Raises:
        UserError: the first field in which they differ.
    """
    if start.base is None:
        return
    family = read_architecture(start.base, "start.base")[0].family
    if model.family != family:
        raise UserError(
            f"field 'checkpoint.path': {checkpoint} has family {model.family}; expected {family}, as the recipe's "
            f"start.base = '{start.base}' says"
        )
    recursion, described = (_without_unused(each, model) for each in (recursion, _described_recursion(start, model)))
    for name in (field.name for field in fields(RecursiveConfig) if field.name not in EXIT_FIELDS):
        found, expected = getattr(recursion, name), getattr(described, name)
        if found != expected:
            raise UserError(
                f"field 'checkpoint.path': {checkpoint} has {name} {found}; expected {expected}, as the recipe's "
                f"start.convert = '{start.convert}' says"
            )


def _without_unused(recursion: RecursiveConfig, model: ModelConfig) -> RecursiveConfig:
    """Return `recursion` with defaults for what has no effect on the fold of `model`, so that equal folds are equal."""
    default = RecursiveConfig()
    if recursion.init == "random" or (recursion.untie_norms and recursion.num_loops > 1):
        recursion = replace(recursion, norm_init=default.norm_init)
    elif recursion.num_loops == 1 and recursion.norm_init == "folded":
        recursion = replace(recursion, norm_init="average")
    if recursion.init != "average" and recursion.norm_init != "folded":
        recursion = replace(recursion, norm_init="average")
    if recursion.num_loops == 1:
        recursion = replace(recursion, sharing=default.sharing)
    if not recursion.lora_rank:
        recursion = replace(recursion, lora_init=default.lora_init)
    ranks = capped_lora_ranks(model, recursion)
    if ranks.is_budget:
        # Conversion distributed it by the base's weights; flags say the budget alone.
        ranks = replace(ranks, matrices={})
    return replace(recursion, lora_rank=ranks)


def teacher_architecture(distill: DistillConfig) -> tuple[ModelConfig, RecursiveConfig] | None:
    """Return the teacher's shape, if there is one."""
    return None if distill.teacher is None else read_architecture(distill.teacher, "distill.teacher")


def with_stand_in_teacher(distill: DistillConfig, start: StartConfig) -> DistillConfig:
    """Put the base in the place of a teacher that is yet to be made, for a dry run: all the paper's have its shape."""
    if distill.teacher is None and start.teacher is not None:
        return replace(distill, teacher=start.base)
    return distill


def check_distillation(distill: DistillConfig, start: StartConfig) -> None:
    """Check that a teacher is given if the recipe's row needs one.

    Raises:
        UserError: it is missing.
    """
    if distill.teacher is None and start.teacher is not None:
        raise UserError(
            f"field 'distill.teacher': missing; expected the final/ of the row that start.teacher names, "
            f"'{start.teacher}' (runs/paper.py makes it first)"
        )
