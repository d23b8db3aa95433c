"""Corpora: documents of text files, JSON lines (plain, gzip, zstd), parquet and Python's standard library.

Everything streams: one document, or one compressed block, is in memory at a time. A text file is one
document; a line of JSON lines, or a row of parquet, is a record whose field `text` (or another) is the document.
Records whose text is null or empty are skipped and counted, or refused (:class:`TextFilter`); empty text files hold no
document. A byte order mark before a text or a record is dropped.
``python-stdlib`` in place of a file name means the sources of the running interpreter's library, a
corpus that every machine has; a fixed list of its packages is held out for evaluation.
"""

import codecs
import glob
import gzip
import json
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rrt.common.files import check_no_lfs_pointer
from rrt.errors import UserError

PYTHON_STDLIB = "python-stdlib"
SPLITS = ("train", "heldout")

TEXT_SUFFIXES = tuple(
    ".txt .text .md .rst .tex .html .py .pyi .c .h .cc .cpp .hpp .cu .cuh .java .js .ts .go .rs .sh".split()
)
LINES_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET_SUFFIX = ".parquet"
INPUT_HELP = (
    f"text files ({TEXT_SUFFIXES[0]}, {TEXT_SUFFIXES[2]}, .py, ...: one file, one document), JSON lines "
    f"({', '.join(LINES_SUFFIXES)}), {PARQUET_SUFFIX}, or {PYTHON_STDLIB}"
)

# Held out: whole packages, so that no held-out file has a sibling in training; about a tenth of the bytes.
STDLIB_HELDOUT = frozenset("concurrent email http json logging sqlite3 wsgiref".split())
# Left out: tests and what distributions package apart or drop (so that corpora of different machines are
# alike), and tables written as Python (character sets, help topics), which are data rather than text.
STDLIB_LEFT_OUT = frozenset(
    "test tests idle_test site-packages dist-packages __pycache__ idlelib tkinter turtledemo lib2to3 distutils "
    "ensurepip encodings pydoc_data".split()
)

_CHUNK_BYTES = 1 << 20
_PARQUET_ROWS = 64


@dataclass(frozen=True)
class Part:
    """A file, or the lines of a ``.jsonl`` file that begin in bytes [start, stop).

    `size` is what reading it counts for in progress: bytes on disk.
    """

    path: Path
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


@dataclass
class TextFilter:
    """Treatment of records whose text is null or empty: counted in `skipped`, or an error if `is_strict`."""

    is_strict: bool = False
    skipped: int = 0

    def check(self, text: str | None, text_field: str) -> str:
        """Return the text, or an empty string after counting that there is none.

        Raises:
            UserError: there is none and `is_strict`.
        """
        if text:
            return text
        if self.is_strict:
            found = "null" if text is None else "an empty string"
            raise UserError(f"field {text_field!r} is {found}; expected a text, or no --strict to skip such records")
        self.skipped += 1
        return ""


def skipped_notice(count: int) -> str:
    """Say that records were skipped."""
    return f"skipped {count:,} record{'' if count == 1 else 's'} without text"


def documents(
    inputs: str | Path | Sequence[str | Path],
    *,
    split: str = "train",
    text_field: str = "text",
    text_filter: TextFilter | None = None,
) -> Iterator[str]:
    """Read the documents of globs, files or ``python-stdlib``, in order.

    Only ``python-stdlib`` has a split of its own; of other inputs every document belongs to `split`.

    Raises:
        UserError: nothing matches, an unknown kind of file, or a file or line that cannot be read.
    """
    for path in find_files(inputs, split=split):
        yield from read_documents(whole_file(path), text_field=text_field, text_filter=text_filter)


def grouped_documents(
    path: Path, group_field: str, *, text_field: str = "text", text_filter: TextFilter | None = None
) -> Iterator[tuple[str, str | None]]:
    """Read the documents of a file, each with its record's `group_field`, or None where that is absent.

    Args:
        group_field: a path into the record, such as ``meta.redpajama_set_name``; an object on the way may be a
            string of JSON.
    """
    for text, record in _read_records(whole_file(path), text_field, text_filter or TextFilter(), group_field):
        yield text, _look_up(record, group_field)


def find_files(inputs: str | Path | Sequence[str | Path], *, split: str = "train") -> list[Path]:
    """List the files that `inputs` name: in the order given, sorted within a glob, each once."""
    names = [inputs] if isinstance(inputs, str | Path) else inputs
    found: dict[Path, None] = {}
    for name in names:
        matches = stdlib_files(split) if str(name) == PYTHON_STDLIB else _expand(str(name))
        found.update(dict.fromkeys(matches))
    return list(found)


def stdlib_files(split: str) -> list[Path]:
    """List the standard library's sources in ``"train"`` or ``"heldout"``, sorted by their path in it."""
    if split not in SPLITS:
        raise UserError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        generated = parts[0].startswith(("config-", "_sysconfigdata"))
        if generated or not STDLIB_LEFT_OUT.isdisjoint(parts):
            continue
        if (parts[0] in STDLIB_HELDOUT) == (split == "heldout") and _is_utf8(path):
            files.append(path)
    if not files:
        raise UserError(f"{root}: no Python sources; this interpreter has no standard library to read")
    return files


def whole_file(path: Path) -> Part:
    """Make one part of all of `path`."""
    return Part(path, 0, path.stat().st_size)


def is_divisible(path: Path) -> bool:
    """True if parts of the file can be read without what precedes them."""
    return path.name.endswith(".jsonl")


def is_compressed(path: Path) -> bool:
    """True if the file's text is several times its size on disk."""
    return path.suffix in (".gz", ".zst", PARQUET_SUFFIX)


def read_documents(part: Part, *, text_field: str = "text", text_filter: TextFilter | None = None) -> Iterator[str]:
    """Read the documents of one part; records without text are counted in `text_filter`.

    Raises:
        UserError: naming the file, and the line or row of a bad record.
    """
    for text, _ in _read_records(part, text_field, text_filter or TextFilter()):
        yield text


def _read_records(
    part: Part, text_field: str, text_filter: TextFilter, group_field: str = ""
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read documents with their records; of parquet only the columns of the two fields."""
    name = part.path.name
    check_no_lfs_pointer(part.path)
    if name.endswith(LINES_SUFFIXES):
        yield from _read_lines(part, text_field, text_filter)
    elif name.endswith(PARQUET_SUFFIX):
        yield from _read_parquet(part.path, text_field, text_filter, group_field.partition(".")[0])
    elif name.endswith(TEXT_SUFFIXES):
        text = _decode(part.path.read_bytes().removeprefix(codecs.BOM_UTF8), str(part.path))
        if text:
            yield text, {}
    else:
        raise UserError(f"{part.path}: unknown kind of file; expected {INPUT_HELP}")


def _look_up(record: dict[str, Any], field: str) -> str | None:
    value: Any = record
    for name in field.split("."):
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                return None
        if not isinstance(value, dict) or name not in value:
            return None
        value = value[name]
    return None if value is None else str(value)


def _expand(pattern: str) -> list[Path]:
    matches = [Path(match) for match in sorted(glob.glob(_escape_existing(pattern), recursive=True))]
    files = [path for path in matches if path.is_file()]
    if not files:
        if any(path.is_dir() for path in matches):
            raise UserError(f"{pattern}: is a directory; expected files, such as '{pattern}/**/*.jsonl'")
        if matches:
            raise UserError(f"{pattern}: found a broken link, or no ordinary file; expected {INPUT_HELP}")
        raise UserError(f"{pattern}: no file matches; expected {INPUT_HELP}")
    for path in files:
        if not path.name.endswith((*LINES_SUFFIXES, *TEXT_SUFFIXES, PARQUET_SUFFIX)):
            raise UserError(f"{path}: unknown kind of file; expected {INPUT_HELP}")
    return files


def _escape_existing(pattern: str) -> str:
    """Take the longest beginning of a glob that exists as a path literally, whatever characters its name has."""
    path = Path(pattern)
    existing = next((part for part in (path, *path.parents) if part.exists()), Path())
    return str(Path(glob.escape(str(existing)), path.relative_to(existing)))


def _is_utf8(path: Path) -> bool:
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _decode(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def _read_lines(part: Part, text_field: str, text_filter: TextFilter) -> Iterator[tuple[str, dict[str, Any]]]:
    lines: Iterable[bytes]
    if is_divisible(part.path):
        lines = _plain_lines(part)
    else:
        lines = _split_lines(_gzip_chunks(part.path) if part.path.suffix == ".gz" else _zstd_chunks(part.path))
    for number, line in enumerate(lines):
        # Of every line: files that were joined have a byte order mark where each began.
        line = line.removeprefix(codecs.BOM_UTF8)
        if line.isspace() or not line:
            continue
        try:
            record = _record_of(line, text_field)
            text = text_filter.check(_text_of(record, text_field), text_field)
        except UserError as error:
            raise UserError(f"{part.path}:{_lines_before(part) + number + 1}: {error}") from None
        if text:
            yield text, record


def _read_parquet(
    path: Path, text_field: str, text_filter: TextFilter, group_column: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow; install it with: pip install pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in {text_field, group_column} if name in file.schema_arrow.names]
            if text_field not in columns:
                raise UserError(f"{path}: {_no_field(text_field, file.schema_arrow.names)}")
            row = 0
            for batch in file.iter_batches(_PARQUET_ROWS, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    try:
                        text = text_filter.check(_text_of(record, text_field), text_field)
                    except UserError as error:
                        raise UserError(f"{path}: row {row}: {error}") from None
                    if text:
                        yield text, record
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: damaged or not a parquet file ({str(error).splitlines()[0]})") from None


def _no_field(field: str, names: Iterable[str]) -> str:
    found = ", ".join(map(repr, list(names)[:8])) or "none"
    return f"no field {field!r} (fields found: {found}); name the one with the text"


def _record_of(line: bytes, text_field: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text ({error.reason} at byte {error.start} of the line)") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON ({error}); expected an object with field {text_field!r}") from None
    if not isinstance(record, dict):
        raise UserError(f"found a JSON {type(record).__name__}; expected an object with field {text_field!r}")
    return record


def _text_of(record: dict[str, Any], text_field: str) -> str | None:
    if text_field not in record:
        raise UserError(_no_field(text_field, record))
    text = record[text_field]
    if text is not None and not isinstance(text, str):
        raise UserError(f"field {text_field!r} is a {type(text).__name__}; expected a string")
    return text


def _plain_lines(part: Part) -> Iterator[bytes]:
    with part.path.open("rb") as stream:
        if part.start > 0:
            # A line belongs to the part in which it begins: skip the rest of one begun before.
            stream.seek(part.start - 1)
            stream.readline()
        while stream.tell() < part.stop and (line := stream.readline()):
            yield line


def _lines_before(part: Part) -> int:
    """Count the lines that begin before the part; read only to say where an error is."""
    if part.start == 0:
        return 0
    with part.path.open("rb") as stream:
        count, left = 0, part.start - 1
        while left > 0 and (chunk := stream.read(min(left, _CHUNK_BYTES))):
            count += chunk.count(b"\n")
            left -= len(chunk)
    return count + 1


def _split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest: list[bytes] = []
    for chunk in chunks:
        head, *tail = chunk.split(b"\n")
        rest.append(head)
        if tail:
            yield b"".join(rest)
            yield from tail[:-1]
            rest = [tail[-1]]
    if last := b"".join(rest):
        yield last


def _gzip_chunks(path: Path) -> Iterator[bytes]:
    with gzip.open(path, "rb") as stream:
        try:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise UserError(f"{path}: damaged or not a gzip file ({error})") from None


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    import zstandard  # here, so that a machine without it can do all but read such files

    with path.open("rb") as stream:
        try:
            yield from _zstd_frames(stream)
        except zstandard.ZstdError as error:
            raise UserError(f"{path}: damaged or not a zstd file ({error})") from None


def _zstd_frames(stream: BinaryIO) -> Iterator[bytes]:
    import zstandard

    # By hand, not `stream_reader`: that one takes a file cut in the middle of a frame for its end.
    context = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = None
    data = b""
    while data := data or stream.read(_CHUNK_BYTES // 8):
        frame = frame or context.decompressobj()
        yield frame.decompress(data)
        data = b""
        if frame.eof:
            data, frame = frame.unused_data, None
    if frame is not None:
        raise zstandard.ZstdError("ends within a frame")
