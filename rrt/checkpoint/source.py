"""Loading of models: HF directories, GGUF files and our own checkpoints, through one interface.

`open_source` detects the layout and hands out parameters by our names, one at a time, straight
from the files; `load_model` fills a model from it. Every key, shape and dtype is accounted for first.
"""

import dataclasses
import logging
from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor, nn

from rrt.checkpoint.families import FAMILIES
from rrt.checkpoint.format import is_checkpoint, read_checkpoint_config
from rrt.checkpoint.gguf_config import gguf_model_config
from rrt.checkpoint.gguf_tensors import GGUFTensors
from rrt.checkpoint.hf_config import model_config_from_hf
from rrt.checkpoint.hf_layout import HFTensor, constant_keys, tensor_table
from rrt.checkpoint.tensor_files import TensorFiles
from rrt.common.dtypes import PARAMETER_DTYPES, dtype_name
from rrt.common.files import read_json
from rrt.common.gguf_file import GGUFFile, is_gguf
from rrt.errors import UserError
from rrt.model.config import ModelConfig, RecursiveConfig
from rrt.model.loop_linear import merge_lora
from rrt.model.meta import first_loops, meta_model, parameter_shapes
from rrt.model.transformer import RecursiveTransformer

log = logging.getLogger(__name__)


def _check_tensors(
    files: TensorFiles | GGUFTensors,
    expected: dict[str, tuple[int, ...]],
    skipped: set[str] | frozenset[str] = frozenset(),
    dtypes: frozenset[torch.dtype] = PARAMETER_DTYPES,
) -> None:
    """Raise one `UserError` that lists every tensor missing, misshaped, of another dtype or unexpected."""
    problems = []
    for key, shape in expected.items():
        if key not in files:
            problems.append(f"{key!r}: missing, expected shape {list(shape)}")
        elif files.shape(key) != shape:
            problems.append(f"{_place(files, key)}: found shape {list(files.shape(key))}, expected {list(shape)}")
        elif files.dtype(key) not in dtypes:
            names = " or ".join(sorted(map(dtype_name, dtypes)))
            problems.append(f"{_place(files, key)}: found dtype {dtype_name(files.dtype(key))}, expected {names}")
    problems += [
        f"{_place(files, key)}: found shape {list(files.shape(key))}, expected no such tensor"
        for key in files
        if key not in expected and key not in skipped
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        described = "the metadata" if isinstance(files, GGUFTensors) else "config.json"
        raise UserError(f"{files.path}: tensors do not match {described}: {'; '.join(problems[:8])}{more}")


def _place(files: TensorFiles | GGUFTensors, key: str) -> str:
    return repr(key) if files.file(key) == files.path else f"{key!r} in {files.file(key).name}"


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


class Source(ABC):
    """A checkpoint opened for reading, by the names of `RecursiveTransformer`'s parameters."""

    directory: Path
    """The directory, or the GGUF file."""
    model: ModelConfig
    recursion: RecursiveConfig
    dtype: torch.dtype
    """The stored dtype (of the embedding, if they differ)."""

    @abstractmethod
    def get(self, name: str) -> Tensor:
        """Return parameter `name`, backed by the mapped file: copy it to keep it, do not write to it."""
        ...

    def place(self, name: str) -> str:
        """Name the file and the tensor in it that hold parameter `name`, for messages."""
        return f"{self.directory}: tensor '{name}'"


class HFSource(Source):
    """An HF directory as a vanilla model."""

    def __init__(self, directory: Path, model: ModelConfig) -> None:
        self.directory, self.model, self.recursion = directory, model, RecursiveConfig()
        self._files = TensorFiles(directory)
        head_keys = FAMILIES[model.family].head_keys
        head_key = next((key for key in head_keys if key in self._files), head_keys[0])
        table = [
            dataclasses.replace(entry, key=head_key) if entry.targets == ("head",) else entry
            for entry in tensor_table(model)
        ]
        self._where: dict[str, tuple[HFTensor, int]] = {
            target: (entry, part) for entry in table for part, target in enumerate(entry.targets)
        }
        constants = {key: name for key, name in constant_keys(model).items() if key in self._files}
        if constants:
            names = ", ".join(sorted(set(constants.values())))
            log.info("%s: skipped %d constant tensors (%s)", self._files.path, len(constants), names)
        embed_key = self._where["embed"][0].key
        expected = {entry.key: entry.shape for entry in table}
        tied_copy = model.tie_embeddings and head_key in self._files
        if tied_copy:
            expected[head_key] = expected[embed_key]
        _check_tensors(self._files, expected, skipped=set(constants))
        if tied_copy and not _equal(self._files.get(head_key), self._files.get(embed_key)):
            raise UserError(
                f"{self._files.file(head_key)}: '{head_key}' differs from '{embed_key}'; "
                "expected them equal, as config.json says tie_word_embeddings"
            )
        self.dtype = self._files.dtype(embed_key)
        others = sorted({dtype_name(self._files.dtype(key)) for key in expected} - {dtype_name(self.dtype)})
        if others:
            log.warning(
                "%s: tensors of %s beside %s, which is taken for all unless another dtype is asked for",
                self._files.path, ", ".join(others), dtype_name(self.dtype),
            )  # fmt: skip

    def get(self, name: str) -> Tensor:
        entry, part = self._where[name]
        tensor = self._files.get(entry.key)
        if len(entry.targets) == 1:
            return tensor
        heads, head_dim = self.model.num_heads, self.model.head_dim
        per_head = tensor.unflatten(0, (heads, len(entry.targets), head_dim))
        return per_head[:, part].flatten(0, 1)

    def place(self, name: str) -> str:
        key = self._where[name][0].key
        return f"{self._files.file(key)}: tensor '{key}'"


class GGUFSource(Source):
    """A GGUF file as a vanilla model."""

    def __init__(self, path: Path) -> None:
        file = GGUFFile(path)
        self.directory, self.model, self.recursion = path, gguf_model_config(file), RecursiveConfig()
        self._tensors = GGUFTensors(file, self.model)
        _check_tensors(self._tensors, self._tensors.expected, skipped=self._tensors.skipped)
        self.dtype = self._tensors.model_dtype

    def get(self, name: str) -> Tensor:
        return self._tensors.get(name)

    def place(self, name: str) -> str:
        return f"{self.directory}: tensor '{self._tensors.key(name)}'"


class CheckpointSource(Source):
    """One of our own checkpoints."""

    def __init__(self, directory: Path) -> None:
        config = read_checkpoint_config(directory / "config.json")
        self.directory, self.model, self.recursion = directory, config.model, config.recursion
        self.dtype = config.dtype
        self._files = TensorFiles(directory)
        shapes = parameter_shapes(config.model, config.recursion)
        _check_tensors(self._files, shapes, dtypes=frozenset((config.dtype,)))

    def get(self, name: str) -> Tensor:
        return self._files.get(name)

    def place(self, name: str) -> str:
        return f"{self._files.file(name)}: tensor '{name}'"


def open_source(directory: str | Path) -> Source:
    """Open an HF directory, a GGUF file or one of our checkpoints, checking every tensor's name, shape and dtype.

    Raises:
        UserError: it is no usable model; names the file, the field, found and expected.
    """
    directory = Path(directory)
    if is_gguf(directory):
        return GGUFSource(directory)
    if not directory.is_dir():
        found = "is a file" if directory.exists() else "no such directory"
        raise UserError(f"{directory}: {found}; expected an HF model directory, a GGUF file or a checkpoint")
    path = directory / "config.json"
    config = read_json(path)
    if is_checkpoint(config):
        return CheckpointSource(directory)
    return HFSource(directory, model_config_from_hf(config, str(path)))


class FirstLoops(Source):
    """The first loops of another source as a model of its own: a static exit, or K unlooped layers.

    A LoRA that the head has for its exit is merged into it.
    """

    def __init__(self, source: Source, num_loops: int) -> None:
        self.directory, self.dtype, self._source = source.directory, source.dtype, source
        self.model, self.recursion = first_loops(source.model, source.recursion, num_loops, str(source.directory))
        self._shapes = parameter_shapes(self.model, self.recursion)

    def get(self, name: str) -> Tensor:
        if name == "head" and self._source.recursion.head_lora_rank > self.recursion.head_lora_rank:
            return self._head_of_exit(self.recursion.num_loops - 1)
        stored, shape = self._source.get(name), self._shapes[name]
        if stored.shape == shape:
            return stored
        # Stacked over loops or depths, of which the first are kept.
        return stored[: shape[0]] if stored.dim() == len(shape) else stored[0]

    def place(self, name: str) -> str:
        return self._source.place(name)

    def _head_of_exit(self, loop: int) -> Tensor:
        """Merge the head [V, D] with the LoRA of an exit after `loop`, in fp32."""
        head = self._source.get("embed" if self._source.model.tie_embeddings else "head")
        return merge_lora(head, self._source.get("head_lora_a")[loop], self._source.get("head_lora_b")[loop])


def load_model(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    num_loops: int | None = None,
) -> RecursiveTransformer:
    """Load an HF directory, a GGUF file or one of our checkpoints.

    Tensors stream from the files, largest first, into parameters of the target dtype and device: peak
    memory stays within 1.2 times the model's size there (but pickles from before torch 1.6 are read whole).

    Args:
        dtype: of the parameters; default as stored.
        num_loops: run only this many of the checkpoint's loops (a static exit); default all. A LoRA that the head
            has for that exit is merged into it.

    Returns:
        The model in eval mode; `model(input_ids)` ([batch, T] int64) gives logits [batch, T, V].

    Raises:
        UserError: the directory is not a usable checkpoint (see `open_source`), `num_loops` is out of range or makes a
            loop the last that exits through a translator, or values are not finite or do not fit `dtype`.
    """
    source = open_source(directory)
    if num_loops is not None:
        source = FirstLoops(source, num_loops)
    model = meta_model(source.model, source.recursion)
    parameters = sorted(model.named_parameters(), key=lambda item: -item[1].numel())
    for name, meta in parameters:
        value = torch.empty(meta.shape, dtype=dtype or source.dtype, device=device)
        stored = source.get(name)
        value.copy_(stored)
        _check_finite(value, stored, source, name)
        module_name, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module_name), leaf, nn.Parameter(value))
    return model.eval()


def _check_finite(value: Tensor, stored: Tensor, source: Source, name: str) -> None:
    """Refuse NaN and infinity in `value`, a copy of the parameter `name` as `stored` in another dtype perhaps."""
    # By the extremes, which NaN spreads to: one pass that needs no memory, a tenth of the time of `isfinite`.
    if value.is_meta or value.numel() == 0 or torch.stack(value.aminmax()).isfinite().all():
        return
    if not stored.isfinite().all():
        raise UserError(f"{source.place(name)}: found NaN or infinity; expected finite values")
    raise UserError(
        f"{source.place(name)}: found {stored.abs().max().item():.3g}; expected at most "
        f"{torch.finfo(value.dtype).max:.3g} for {dtype_name(value.dtype)}: choose another dtype"
    )
