"""Our checkpoint directory: both configurations, every shared tensor once, and the provenance.

- config.json: format, format_version, dtype, model (ModelConfig), recursive (RecursiveConfig)
- model.safetensors, or shards with an index over 5 GB; names as in `RecursiveTransformer.state_dict()`;
  LoRA stacked on the loop axis: lora_a [B, R, K], lora_b [B, N, R]
- tokenizer files, as the base published them
- provenance.json: stage, parent and its hash, command, code version, data, metrics
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rrt.checkpoint.tensor_files import MAX_SHARD_BYTES, SafetensorsWriter
from rrt.common.dtypes import dtype_name, parse_dtype
from rrt.common.files import atomic_directory, read_json, write_json
from rrt.common.schema import from_mapping, to_mapping
from rrt.errors import UserError
from rrt.model.config import ModelConfig, RecursiveConfig
from rrt.model.meta import parameter_shapes

FORMAT = "rrt"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class CheckpointConfig:
    """Contents of `config.json`. `dtype` is that of the stored tensors."""

    model: ModelConfig
    recursion: RecursiveConfig
    dtype: torch.dtype

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "dtype": dtype_name(self.dtype),
            "model": to_mapping(self.model),
            "recursive": to_mapping(self.recursion),
        }


def is_checkpoint(config_json: dict[str, Any]) -> bool:
    """Tell our parsed `config.json` from an HF one."""
    return config_json.get("format") == FORMAT


def read_checkpoint_config(path: Path) -> CheckpointConfig:
    """Read our `config.json`. Raises `UserError` for another format version or any wrong field."""
    data = read_json(path)
    version = data.get("format_version")
    if version != FORMAT_VERSION or not isinstance(version, int) or isinstance(version, bool):
        raise UserError(
            f"{path}: field 'format_version': found {version!r}; expected {FORMAT_VERSION}: convert the base again"
        )
    unknown = sorted(set(data) - {"format", "format_version", "dtype", "model", "recursive"})
    if unknown:
        raise UserError(
            f"{path}: unknown field {unknown[0]!r}; expected format, format_version, dtype, model, recursive"
        )
    for key, kind in (("dtype", str), ("model", dict), ("recursive", dict)):
        if not isinstance(data.get(key), kind):
            raise UserError(f"{path}: field '{key}': found {data.get(key)!r}; expected {kind.__name__}")
    try:
        dtype = parse_dtype(data["dtype"])
        model = from_mapping(ModelConfig, data["model"], str(path), "model.")
        recursion = from_mapping(RecursiveConfig, data["recursive"], str(path), "recursive.")
        recursion.check_fits(model)
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    return CheckpointConfig(model, recursion, dtype)


class CheckpointWriter:
    """A checkpoint directory that is being written; see `write_checkpoint`."""

    def __init__(self, directory: Path, config: CheckpointConfig, max_shard_bytes: int) -> None:
        self.directory = directory
        self.config = config
        self.tensors = SafetensorsWriter(directory, max_shard_bytes)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Store one parameter, cast to the checkpoint's dtype."""
        self.tensors.add(name, tensor.to(self.config.dtype))

    def finish(self, provenance: dict[str, Any]) -> None:
        self.tensors.finish()
        write_json(self.directory / "config.json", self.config.to_json())
        write_json(self.directory / "provenance.json", provenance)


@contextmanager
def write_checkpoint(
    out: Path,
    config: CheckpointConfig,
    provenance: dict[str, Any],
    *,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Iterator[CheckpointWriter]:
    """Write a checkpoint directory that appears at `out` only when complete.

    The block adds the tensors, may copy tokenizer files into `writer.directory` and may add to `provenance`.
    """
    size = sum(math.prod(shape) for shape in parameter_shapes(config.model, config.recursion).values())
    with atomic_directory(out, overwrite, needed=size * config.dtype.itemsize) as partial:
        writer = CheckpointWriter(partial, config, max_shard_bytes)
        yield writer
        writer.finish(provenance)
