"""Tensors of a GGUF file as parameters of ours: dequantised, and in the order of rows that Hugging Face has."""

import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from rrt.checkpoint.gguf_config import ROPE_DIVISORS
from rrt.checkpoint.hf_layout import tensor_table
from rrt.common.gguf_file import GGUFFile
from rrt.errors import UserError
from rrt.model.config import ModelConfig

# llama.cpp's names for our parameters, those of all its architectures.
_MODEL_NAMES = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
_LAYER_NAMES = {
    "attn_norm": "attn_norm",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.q_norm": "attn_q_norm",
    "attn.k_norm": "attn_k_norm",
    "attn.out": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
_FUSED = "attn_qkv"
# ggml's codes of what is stored as numbers rather than blocks of them.
_PLAIN_DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
# Numbers dequantised at a time, so that memory holds little beside the result.
_SLAB = 2**22
# Numbers at a time that the package gguf dequantises fastest: given rows, it takes 16 of them.
_CHUNK = 2**16


class GGUFTensors:
    """The tensors of a GGUF file by name, and the parameters that they hold, one at a time.

    Attributes:
        expected: names and shapes of the tensors that a model of this size has.
        skipped: names of others that may be there.

    Raises:
        UserError: the package `gguf` is missing, a tensor is stored in a type that it cannot dequantise, or the
            file is truncated.
    """

    def __init__(self, file: GGUFFile, model: ModelConfig) -> None:
        self.path, self._file, self._model = file.path, file, model
        self._permutes = file.metadata["general.architecture"] == "llama"
        self._gguf = _import_gguf(file.path)
        self._row_sizes = {code: self._row_size(code) for code in {info.type for info in file.tensors.values()}}
        for info in file.tensors.values():
            per_block, block_size = self._row_sizes[info.type]
            row = info.shape[-1] if len(info.shape) > 1 else 1  # of vectors, single numbers are read
            if row % per_block:
                raise UserError(
                    f"{self.path}: tensor {info.name!r}: found rows of {row}; expected a multiple of {per_block}, as "
                    f"it is stored in {self.type_name(info.type)}"
                )
            file.check_length(info.name, math.prod(info.shape) // per_block * block_size)
        self.expected: dict[str, tuple[int, ...]] = {}
        self.skipped = {ROPE_DIVISORS}
        self._where: dict[str, tuple[str, int, int]] = {}
        for entry in tensor_table(model):
            key = _gguf_name(entry.targets)
            self.expected[key] = entry.shape
            for part, target in enumerate(entry.targets):
                self._where[target] = (key, part, len(entry.targets))

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.tensors)

    def __contains__(self, key: str) -> bool:
        return key in self._file.tensors

    def file(self, key: str) -> Path:
        """Return the file that holds `key`."""
        return self.path

    def shape(self, key: str) -> tuple[int, ...]:
        return self._file.tensors[key].shape

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype that a tensor is read in: float32 if it is quantised."""
        return _PLAIN_DTYPES.get(self._file.tensors[key].type, torch.float32)

    @property
    def model_dtype(self) -> torch.dtype:
        """The one dtype of all matrices, float32 if there are several. (Norms and biases are float32 in any file.)"""
        dtypes = {self.dtype(key) for key, shape in self.expected.items() if len(shape) > 1}
        return dtypes.pop() if len(dtypes) == 1 else torch.float32

    def type_name(self, code: int) -> str:
        """Return ggml's name of a storage type, its code if the package knows none."""
        try:
            return str(self._gguf.GGMLQuantizationType(code).name)
        except ValueError:
            return f"type {code}"

    def _row_size(self, code: int) -> tuple[int, int]:
        """Return how many numbers a block of a storage type has, and its bytes."""
        if code in _PLAIN_DTYPES:
            return 1, _PLAIN_DTYPES[code].itemsize
        try:
            kind = self._gguf.GGMLQuantizationType(code)
            per_block, size = self._gguf.GGML_QUANT_SIZES[kind]
            self._gguf.dequantize(np.zeros((1, size), np.uint8), kind)
        except (ValueError, KeyError, NotImplementedError):
            name = next(info.name for info in self._file.tensors.values() if info.type == code)
            raise UserError(
                f"{self.path}: tensor {name!r}: found storage {self.type_name(code)}, which the package gguf cannot "
                "dequantise; expected F32, F16, BF16, Q4_0, Q4_1, Q8_0, a K-quant or another that it can"
            ) from None
        return per_block, size

    def key(self, name: str) -> str:
        """Return the name in the file of the tensor that holds our parameter `name`."""
        return self._where[name][0]

    def get(self, name: str) -> Tensor:
        """Return our parameter `name` as Hugging Face has it, in memory of its own."""
        key, part, num_parts = self._where[name]
        shape = self.shape(key)
        rows = shape[0] // num_parts
        value = self._read(key, part * rows, (rows, *shape[1:]))
        if self._permutes and (".attn.q." in name or ".attn.k." in name):
            # llama.cpp rotates neighbouring dimensions, Hugging Face's models the halves of a head.
            pairs = value.unflatten(0, (-1, self._model.head_dim // 2, 2))
            value = pairs.transpose(1, 2).reshape(shape)
        if self._model.norm_type == "rmsnorm_1p" and len(shape) == 1:
            # Stored as 1 + weight.
            value = (value.float() - 1).to(value.dtype)
        return value

    def _read(self, key: str, first_row: int, shape: tuple[int, ...]) -> Tensor:
        """Dequantise rows of a tensor (of a vector: numbers) from `first_row` on."""
        info = self._file.tensors[key]
        per_block, block_size = self._row_sizes[info.type]
        columns = math.prod(shape[1:])
        row_bytes = columns * block_size // per_block
        value = torch.empty(shape, dtype=self.dtype(key))
        step = max(1, _SLAB // columns)
        for start in range(0, shape[0], step):
            rows = min(step, shape[0] - start)
            data = self._file.read_bytes(info.offset + (first_row + start) * row_bytes, (rows, row_bytes))
            if info.type in _PLAIN_DTYPES:
                part = torch.from_numpy(data.copy()).view(value.dtype)
            else:
                part = torch.from_numpy(self._dequantize(data, info.type))
            value[start : start + rows] = part.reshape(rows, *shape[1:])
        return value

    def _dequantize(self, data: np.ndarray, code: int) -> np.ndarray:
        """Dequantise rows of blocks, which follow each other without gaps: fp32, flat."""
        kind, (per_block, block_size) = self._gguf.GGMLQuantizationType(code), self._row_sizes[code]
        flat, step = data.view(np.ndarray).reshape(-1), max(1, _CHUNK // per_block) * block_size
        chunks = [self._gguf.dequantize(flat[None, i : i + step], kind)[0] for i in range(0, len(flat), step)]
        return np.concatenate(chunks)


def _import_gguf(path: Path) -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise UserError(f"{path}: reading GGUF needs the package gguf; install it with: pip install gguf") from None
    module: ModuleType = gguf
    return module


def _gguf_name(targets: tuple[str, ...]) -> str:
    """Return llama.cpp's name of the tensor that holds these parameters of ours."""
    name, leaf = targets[0], "weight"
    if name.endswith((".weight", ".bias")):
        name, _, leaf = name.rpartition(".")
    if not name.startswith("stack.layers."):
        return f"{_MODEL_NAMES[name]}.{leaf}"
    depth, layer_name = name.removeprefix("stack.layers.").split(".", 1)
    return f"blk.{depth}.{_FUSED if len(targets) > 1 else _LAYER_NAMES[layer_name]}.{leaf}"
