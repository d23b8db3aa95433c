"""Tensor files, single or sharded: safetensors and PyTorch pickles read, safetensors written, tensor by tensor."""

import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rrt.common.files import check_no_lfs_pointer, read_json
from rrt.errors import UserError

MAX_SHARD_BYTES = 5 * 10**9

# Only the first four hold parameters; the others are read where a tensor is to be skipped or refused by name.
_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_SAFETENSORS_NAMES = {dtype: name for name, dtype in _SAFETENSORS_DTYPES.items()}


class TensorFiles:
    """The tensors of a checkpoint directory by key, read from disk one at a time.

    Found, in this order: `model.safetensors`, `model.safetensors.index.json`, `pytorch_model.bin`,
    `pytorch_model.bin.index.json`. Files are mapped, and mapped anew for every tensor (pickles: each time a
    32nd of the file was read), so that pages read once do not stay in this process's memory. Pickles are loaded
    with ``weights_only=True``. Pickles in torch's format from before 1.6 cannot be mapped and are read whole.
    Where two shards hold a tensor, the index decides.

    Attributes:
        path: the file found, of shards the index.

    Raises:
        UserError: no such files, a shard missing, truncated, not readable or a git-lfs pointer, a key that the index
            places in a shard that lacks it.
    """

    def __init__(self, directory: Path) -> None:
        self._shape: dict[str, tuple[int, ...]] = {}
        self._dtype: dict[str, torch.dtype] = {}
        self._file: dict[str, Path] = {}
        self._open_pickle: tuple[Path | None, dict[str, Tensor]] = (None, {})
        self._pickle_bytes_read = 0
        self.path, paths, index = self._find(directory)
        for path in paths:
            check_no_lfs_pointer(path)
            for key, shape, dtype in (
                _safetensors_header(path) if path.suffix == ".safetensors" else _pickle_header(path)
            ):
                if index.get(key, path.name) != path.name:
                    continue  # a stale copy: the index places this tensor in another shard
                if key in self._file:
                    raise UserError(f"{path}: tensor {key!r} is also in {self._file[key].name}")
                self._file[key], self._shape[key], self._dtype[key] = path, shape, dtype
        for key, file_name in index.items():
            if key not in self._file or self._file[key].name != file_name:
                raise UserError(f"{directory / file_name}: tensor {key!r} is missing; {self.path.name} places it there")

    @staticmethod
    def _find(directory: Path) -> tuple[Path, list[Path], dict[str, str]]:
        """Find the file that was looked for, the files that hold tensors, and the index (empty for a single file)."""
        for single in ("model.safetensors", "pytorch_model.bin"):
            path = directory / single
            if path.is_file():
                return path, [path], {}
            index_path = directory / f"{single}.index.json"
            if index_path.is_file():
                index = read_json(index_path).get("weight_map")
                if not isinstance(index, dict) or not all(isinstance(v, str) for v in index.values()):
                    raise UserError(f"{index_path}: field 'weight_map': expected an object of file names")
                names = sorted(set(index.values()))
                for name in names:
                    if Path(name).name != name:
                        raise UserError(f"{index_path}: field 'weight_map': found {name!r}; expected a plain file name")
                    if not (directory / name).is_file():
                        raise UserError(f"{directory / name}: no such file; {index_path.name} names it")
                return index_path, [directory / name for name in names], index
        raise UserError(
            f"{directory}: no weights; expected model.safetensors, model.safetensors.index.json, "
            "pytorch_model.bin or pytorch_model.bin.index.json"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def __contains__(self, key: str) -> bool:
        return key in self._file

    def file(self, key: str) -> Path:
        """Return the file that holds `key`."""
        return self._file[key]

    def shape(self, key: str) -> tuple[int, ...]:
        return self._shape[key]

    def dtype(self, key: str) -> torch.dtype:
        return self._dtype[key]

    def get(self, key: str) -> Tensor:
        """Return the tensor, backed by the mapped file: copy it to keep it, and do not write to it."""
        path = self._file[key]
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as stream:
                tensor: Tensor = stream.get_tensor(key)
            return tensor
        stale = zipfile.is_zipfile(path) and self._pickle_bytes_read > path.stat().st_size // 32
        if self._open_pickle[0] != path or stale:
            self._open_pickle = (None, {})
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
                        f"{path}: tensor {key!r}: found dtype {part.get_dtype()}; "
                        f"expected one of {', '.join(_SAFETENSORS_DTYPES)}"
                    )
                yield key, tuple(part.get_shape()), dtype
    except SafetensorError as error:
        raise UserError(f"{path}: damaged or truncated safetensors file ({error})") from None


def _load_pickle(path: Path, device: str) -> dict[str, Tensor]:
    try:
        value: Any = torch.load(path, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused: expected a pickle of tensors only ({_first_line(error)})") from None
    except Exception as error:  # A damaged pickle is a program gone astray: it can fail in any way.
        raise UserError(f"{path}: cannot be read, or damaged or truncated ({_first_line(error)})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: found a pickled {type(value).__name__}; expected a dict of tensors")
    return value


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _pickle_header(path: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    for key, tensor in _load_pickle(path, "meta").items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path}: {key!r}: found {type(tensor).__name__}; expected a tensor")
        yield key, tuple(tensor.shape), tensor.dtype


class SafetensorsWriter:
    """Writer of `model.safetensors`, or of shards with an index once `max_shard_bytes` is exceeded.

    Each tensor goes to its file at once, so memory holds one. The header, which the format puts first, is
    written last into space kept for it (padded with blanks, as the format allows).
    Call `add` per tensor and `finish` once.
    """

    HEADER_BYTES = 2**18

    def __init__(self, directory: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
        self.directory = directory
        self.max_shard_bytes = max_shard_bytes
        self.total_bytes = 0
        self._file: BinaryIO | None = None
        self._header: dict[str, Any] = {}
        self._header_size = 0
        self._shard_bytes = 0
        self._shards: list[list[str]] = []

    def add(self, key: str, tensor: Tensor) -> None:
        entry = {"dtype": _SAFETENSORS_NAMES[tensor.dtype], "shape": list(tensor.shape)}
        entry_size = len(json.dumps({key: entry})) + 64  # and its offsets
        full = self._shard_bytes + tensor.nbytes > self.max_shard_bytes
        if self._file is not None and (full or self._header_size + entry_size > self.HEADER_BYTES):
            self._close_shard()
        if self._file is None:
            self._open_shard()
        assert self._file is not None
        # Viewed as bytes: numpy has no bfloat16. Not by `tofile`, which misses errors of its last block.
        self._file.write(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        end = self._shard_bytes + tensor.nbytes
        self._header[key] = {**entry, "data_offsets": [self._shard_bytes, end]}
        self._header_size += entry_size
        self._shard_bytes = end
        self.total_bytes += tensor.nbytes

    def _shard_path(self, index: int) -> Path:
        return self.directory / f"shard-{index}.safetensors"

    def _open_shard(self) -> None:
        self._file = self._shard_path(len(self._shards)).open("wb")
        self._file.seek(8 + self.HEADER_BYTES)
        self._header = {"__metadata__": {"format": "pt"}}
        self._header_size = len(json.dumps(self._header))
        self._shard_bytes = 0

    def _close_shard(self) -> None:
        assert self._file is not None
        self._file.seek(0)
        self._file.write(self.HEADER_BYTES.to_bytes(8, "little"))
        self._file.write(json.dumps(self._header).encode("ascii").ljust(self.HEADER_BYTES))
        self._file.close()
        self._shards.append([key for key in self._header if key != "__metadata__"])
        self._file = None

    def finish(self) -> None:
        if self._file is not None:
            self._close_shard()
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
