"""GGUF files, llama.cpp's format: metadata and a table of tensors, read from the mapped file.

The file begins with the bytes "GGUF", a version, two counts, the metadata (keys with typed values) and the table;
tensors follow, each from an aligned offset. The `gguf` package reads the same, but takes seconds for a vocabulary.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from rrt.errors import UserError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Codes of value types, and their forms for `struct`.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOAT32, _STRING, _ARRAY = 6, 8, 9
_MAX_DIMS = 4
_REQUIRED = object()
_KINDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


@dataclass(frozen=True)
class GGUFTensorInfo:
    """Place and form of a tensor in the file.

    Attributes:
        shape: as torch has it, rows first.
        type: ggml's code of the storage type, such as 0 for F32 and 2 for Q4_0.
        offset: of the first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


def is_gguf(path: Path) -> bool:
    """True if `path` is named as a GGUF file or begins as one; whether it can be read is another question."""
    if path.suffix == ".gguf":
        return not path.is_dir()
    try:
        with path.open("rb") as stream:
            return stream.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


class GGUFFile:
    """Metadata and table of tensors of one GGUF file.

    Attributes:
        metadata: values by key: numbers, strings, booleans, or lists of these.
        tensors: by name, in the order of the file.

    Raises:
        UserError: no such file, no GGUF file, a version or byte order that is not read, one part of a split model,
            or a file that ends too early.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GGUFTensorInfo] = {}
        try:
            with path.open("rb") as stream:
                start = stream.read(24)
                self._check_start(start)
                with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    self._read(data)
        except FileNotFoundError:
            raise UserError(f"{path}: no such file") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        parts = self.value("split.count", int, 0)
        if parts > 1:
            self.fail(
                "split.count", parts, "a model in one file: `llama-gguf-split --merge` of llama.cpp joins the parts"
            )

    def _check_start(self, start: bytes) -> None:
        if not start.startswith(_MAGIC):
            found = "a git-lfs pointer" if start.startswith(b"version https://git-lfs") else repr(start[:4])
            raise UserError(f"{self.path}: not a GGUF file: found {found} at its beginning; expected {_MAGIC!r}")
        if len(start) < 24:
            raise UserError(f"{self.path}: truncated: found {len(start)} bytes; expected 24 or more")
        version = int.from_bytes(start[4:8], "little")
        if version & 0xFFFF == 0:
            raise UserError(f"{self.path}: big-endian GGUF file; expected a little-endian one")
        if version not in _VERSIONS:
            raise UserError(f"{self.path}: found GGUF version {version}; expected {' or '.join(map(str, _VERSIONS))}")

    def _read(self, data: mmap.mmap) -> None:
        cursor = _Cursor(self.path, data)
        num_tensors, num_values = cursor.unpack("QQ")
        for _ in range(num_values):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.unpack("I")[0], key)
        table = []
        for _ in range(num_tensors):
            name = cursor.string()
            (num_dims,) = cursor.unpack("I")
            if num_dims > _MAX_DIMS or name in self.tensors:
                fault = f"{num_dims} dimensions" if num_dims > _MAX_DIMS else "a second one of this name"
                raise UserError(f"{self.path}: tensor {name!r}: found {fault}; the file is damaged")
            shape = tuple(reversed(cursor.unpack(f"{num_dims}Q")))
            table.append((name, shape, *cursor.unpack("IQ")))
        alignment = self.value("general.alignment", int, 32)
        if alignment < 1:
            self.fail("general.alignment", alignment, "1 or more")
        start = math.ceil(cursor.position / alignment) * alignment
        for name, shape, kind, offset in table:
            self.tensors[name] = GGUFTensorInfo(name, shape, kind, start + offset)

    def check_length(self, name: str, size: int) -> None:
        """Raise `UserError` unless the file holds all `size` bytes of a tensor."""
        found, expected = self.path.stat().st_size, self.tensors[name].offset + size
        if found < expected:
            raise UserError(
                f"{self.path}: truncated: found {found} bytes; expected {expected} or more, as tensor {name!r} ends "
                "there: download it again"
            )

    def read_bytes(self, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        """Map part of the file as bytes of this shape: copy it to keep it. Every call maps anew, so that pages read
        once do not stay in this process's memory."""
        mapped: np.ndarray = np.memmap(self.path, dtype=np.uint8, mode="r", offset=offset, shape=shape)
        return mapped

    def value(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """Return a value of metadata, `default` where it is missing.

        Raises:
            UserError: it is of another type than `kind` (int, float, str or bool), or missing without a default.
        """
        if key not in self.metadata:
            if default is _REQUIRED:
                raise UserError(f"{self.path}: missing field '{key}'; expected {_KINDS[kind]}")
            return default
        return self._checked(key, self.metadata[key], kind, _KINDS[kind])

    def values(self, key: str, kind: type) -> list[Any] | None:
        """Return a list of metadata, None where it is missing. Raises `UserError` for another type."""
        found = self.metadata.get(key)
        if found is None:
            return None
        expected = f"a list, each {_KINDS[kind]}"
        if not isinstance(found, list):
            self.fail(key, found, expected)
        for item in found[:1]:  # all items of a list are of one type
            self._checked(key, item, kind, expected)
        return found

    def _checked(self, key: str, found: Any, kind: type, expected: str) -> Any:
        is_kind = isinstance(found, (int, float) if kind is float else kind)
        if not is_kind or (isinstance(found, bool) and kind is not bool):
            self.fail(key, found, expected)
        return found

    def fail(self, key: str, found: object, expected: str) -> NoReturn:
        """Raise the `UserError` for a value of metadata that cannot be used."""
        shown = repr(found) if len(repr(found)) <= 80 else f"{repr(found)[:77]}..."
        raise UserError(f"{self.path}: field '{key}': found {shown}; expected {expected}")


class _Cursor:
    """A position in the mapped file, from which values are read in turn."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position = path, data, 8

    def unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(f"<{form}", self._take(struct.calcsize(f"<{form}")))

    def _take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self.data):
            raise UserError(f"{self.path}: truncated or damaged: found {len(self.data)} bytes; its header needs more")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def string(self) -> str:
        text = self._take(*self.unpack("Q"))
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            # Vocabularies of early conversions have bytes that are no text.
            return text.decode("utf-8", errors="replace")

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            item_kind, length = self.unpack("IQ")
            if item_kind in _SCALARS:
                size = length * struct.calcsize(f"<{_SCALARS[item_kind]}")
                return np.frombuffer(self._take(size), np.dtype(_SCALARS[item_kind]).newbyteorder("<")).tolist()
            if item_kind != _STRING:
                raise UserError(f"{self.path}: field '{key}': found a list of type {item_kind}; expected 0 to 8")
            return [self.string() for _ in range(length)]
        if kind not in _SCALARS:
            raise UserError(f"{self.path}: field '{key}': found a value of type {kind}; expected 0 to 12")
        (value,) = self.unpack(_SCALARS[kind])
        # The shortest decimal of that float32: 1e-05, as config.json has it, and not 9.999999747378752e-06.
        return float(str(np.float32(value))) if kind == _FLOAT32 else value
