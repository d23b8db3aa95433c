"""Shapes of models by name, file or directory, without their weights."""

from pathlib import Path

from rrt.checkpoint import is_checkpoint, read_checkpoint_config
from rrt.config import ModelConfig, RecursiveConfig
from rrt.errors import UserError
from rrt.files import read_json
from rrt.hf import model_config_from_hf
from rrt.presets import PRESETS, preset
from train.recipe import DistillConfig


def read_architecture(name: str, field: str) -> tuple[ModelConfig, RecursiveConfig]:
    """The shape called `name`: a preset, a `config.json`, or a directory that has one, ours or Hugging Face's.

    Raises:
        UserError: none of these, naming `field`, or a configuration that is wrong.
    """
    path = Path(name)
    file = path / "config.json" if path.is_dir() else path
    if file.is_file():
        values = read_json(file)
        if is_checkpoint(values):
            config = read_checkpoint_config(file)
            return config.model, config.recursive
        return model_config_from_hf(values, str(file)), RecursiveConfig()
    if name in PRESETS:
        return preset(name), RecursiveConfig()
    raise UserError(
        f"field '{field}': found {name!r}; expected a config.json, a model directory or one of {', '.join(PRESETS)}"
    )


def teacher_shape(distill: DistillConfig) -> tuple[ModelConfig, RecursiveConfig] | None:
    """The shape of the teacher, if there is one."""
    return None if distill.teacher is None else read_architecture(distill.teacher, "distill.teacher")
