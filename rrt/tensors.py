"""Tensor files: safetensors and PyTorch pickles, single or sharded, read one tensor at a time; sharded writing."""

import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rrt.errors import UserError
from rrt.files import read_json

MAX_SHARD_BYTES = 5 * 10**9

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
DTYPE_NAMES = tuple(_DTYPES)
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def parse_dtype(name: str) -> torch.dtype:
    """``"bf16"`` or ``"bfloat16"`` -> `torch.bfloat16`. Raises `UserError` for another name."""
    if name not in _DTYPES:
        raise UserError(f"dtype: found {name!r}; expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


class TensorFiles:
    """The tensors of a checkpoint directory by key, read from disk one at a time.

    Found, in this order: `model.safetensors`, `model.safetensors.index.json`, `pytorch_model.bin`,
    `pytorch_model.bin.index.json`. Files are mapped, and mapped anew for every tensor (pickles: every
    256 MB), so that pages read once do not stay in this process's memory. Pickles are loaded with
    ``weights_only=True``. Pickles in torch's format from before 1.6 cannot be mapped and are read whole.

    Raises:
        UserError: no such files, a shard missing, truncated or not readable, a key that the index places
            in a shard that lacks it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._shape: dict[str, tuple[int, ...]] = {}
        self._dtype: dict[str, torch.dtype] = {}
        self._file: dict[str, Path] = {}
        self._open_pickle: tuple[Path, dict[str, Tensor]] | None = None
        self._pickle_bytes_read = 0
        paths, index = self._find(directory)
        for path in paths:
            for key, shape, dtype in (
                _safetensors_header(path) if path.suffix == ".safetensors" else _pickle_header(path)
            ):
                if key in self._file:
                    raise UserError(f"{path}: tensor '{key}' is also in {self._file[key].name}")
                self._file[key], self._shape[key], self._dtype[key] = path, shape, dtype
        for key, file_name in index.items():
            if key not in self._file or self._file[key].name != file_name:
                raise UserError(f"{directory / file_name}: tensor '{key}' is missing; the index places it there")

    @staticmethod
    def _find(directory: Path) -> tuple[list[Path], dict[str, str]]:
        if not directory.is_dir():
            raise UserError(f"{directory}: no such directory; expected a checkpoint directory")
        for single in ("model.safetensors", "pytorch_model.bin"):
            path = directory / single
            if path.is_file():
                return [path], {}
            index_path = directory / f"{single}.index.json"
            if index_path.is_file():
                index = read_json(index_path).get("weight_map")
                if not isinstance(index, dict) or not all(isinstance(v, str) for v in index.values()):
                    raise UserError(f"{index_path}: field 'weight_map': expected an object of file names")
                paths = [directory / name for name in sorted(set(index.values()))]
                for shard in paths:
                    if not shard.is_file():
                        raise UserError(f"{shard}: no such file; {index_path.name} names it")
                return paths, index
        raise UserError(
            f"{directory}: no weights; expected model.safetensors, model.safetensors.index.json, "
            "pytorch_model.bin or pytorch_model.bin.index.json"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __contains__(self, key: str) -> bool:
        return key in self._file

    def file_name(self, key: str) -> str:
        """The file that holds `key`."""
        return self._file[key].name

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shape[key]

    def dtype(self, key: str) -> torch.dtype:
        return self._dtype[key]

    def get(self, key: str) -> Tensor:
        """The tensor, backed by the mapped file: copy what you keep, and do not write to it."""
        path = self._file[key]
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as stream:
                tensor: Tensor = stream.get_tensor(key)
            return tensor
        if self._open_pickle is None or self._open_pickle[0] != path or self._pickle_bytes_read > 256 * 2**20:
            self._open_pickle = None
            self._open_pickle = (path, _load_pickle(path, "cpu"))
            self._pickle_bytes_read = 0
        tensor = self._open_pickle[1][key]
        self._pickle_bytes_read += tensor.nbytes
        return tensor


def _safetensors_header(path: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    try:
        with safe_open(path, framework="pt") as stream:
            for key in stream.keys():  # noqa: SIM118 (safe_open is not a mapping)
                part = stream.get_slice(key)
                dtype = _SAFETENSORS_DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise UserError(
                        f"{path}: tensor '{key}': found dtype {part.get_dtype()}; "
                        f"expected one of {', '.join(_SAFETENSORS_DTYPES)}"
                    )
                yield key, tuple(part.get_shape()), dtype
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or truncated safetensors file ({error})") from None


def _load_pickle(path: Path, device: str) -> dict[str, Tensor]:
    try:
        value: Any = torch.load(path, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: refused: expected a pickle of tensors only ({reason})") from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged or truncated PyTorch file ({str(error).splitlines()[0]})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: found a pickled {type(value).__name__}; expected a dict of tensors")
    return value


def _pickle_header(path: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    for key, tensor in _load_pickle(path, "meta").items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path}: '{key}': found {type(tensor).__name__}; expected a tensor")
        yield key, tuple(tensor.shape), tensor.dtype


class SafetensorsWriter:
    """Write `model.safetensors`, or shards with an index once `max_shard_bytes` is exceeded.

    Tensors are buffered up to one shard, so memory stays below `max_shard_bytes` plus one tensor.
    Call `add` per tensor and `finish` once.
    """

    def __init__(self, directory: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.directory = directory
        self.max_shard_bytes = max_shard_bytes
        self.total_bytes = 0
        self._buffer: dict[str, Tensor] = {}
        self._buffer_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, key: str, tensor: Tensor) -> None:
        if self._buffer and self._buffer_bytes + tensor.nbytes > self.max_shard_bytes:
            self._flush()
        self._buffer[key] = tensor.detach().cpu().contiguous()
        self._buffer_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def _shard_path(self, index: int) -> Path:
        return self.directory / f"shard-{index}.safetensors"

    def _flush(self) -> None:
        save_file(self._buffer, self._shard_path(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._buffer))
        self._buffer, self._buffer_bytes = {}, 0

    def finish(self) -> None:
        self._flush()
        if len(self._shards) == 1:
            self._shard_path(0).rename(self.directory / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for index, keys in enumerate(self._shards):
            name = f"model-{index + 1:05d}-of-{len(self._shards):05d}.safetensors"
            self._shard_path(index).rename(self.directory / name)
            weight_map |= dict.fromkeys(keys, name)
        content = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self.directory / "model.safetensors.index.json").write_text(json.dumps(content, indent=2) + "\n")
