"""Token shards: tokenised documents on disk, memory-mapped by training and evaluation.

A directory holds `meta.json` and, per split ("train", "heldout"), files `<split>-00000.bin` with token
ids and `<split>-00000.idx` with the index of each document's first token in its `.bin`. Everything is
little-endian: ids uint16 where the vocabulary fits, else uint32; starts uint64. A document lies in one
shard, whole, with the special tokens that `Tokenizer.encode_document` gave it.

`meta.json`: `format`, `version`, `dtype`, the tokenizer (`sha256`, `vocab_size`, `bos_id` if documents
begin with one, else null, `eos_id`), and `splits`: a list of shards each with `file`, `tokens`,
`documents` and `text_bytes`, the UTF-8 bytes of the text that the tokens encode (for bits per byte).
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from rrt.common.files import read_json, write_json
from rrt.data.corpus import SPLITS
from rrt.data.tokenizer import Tokenizer
from rrt.errors import UserError

FORMAT = "rrt-tokens"
VERSION = 1
META_FILE = "meta.json"
DEFAULT_SHARD_TOKENS = 500_000_000
_STARTS_DTYPE = np.dtype("<u8")
_TOKEN_DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
Tokens = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Shard:
    """One shard: `tokens` [tokens] uint16 or uint32, `starts` [documents] uint64, both memory-mapped."""

    path: Path
    tokens: Tokens
    starts: npt.NDArray[np.uint64]
    text_bytes: int

    def document(self, index: int) -> Tokens:
        """Return the tokens of one document [length]."""
        stop = self.starts[index + 1] if index + 1 < len(self.starts) else len(self.tokens)
        return self.tokens[int(self.starts[index]) : int(stop)]


@dataclass(frozen=True)
class TokenShards:
    """One split of a shard directory, opened by `open_shards`.

    Attributes:
        num_tokens, num_documents, text_bytes: totals over `shards`.
        bos_id: the token that begins every document, or None.
        eos_id: the token that ends every document.
        bos: how `bos_id` was chosen: ``"auto"``, by the tokenizer, or ``"yes"`` or ``"no"``, by `--bos`.
    """

    directory: Path
    split: str
    shards: list[Shard]
    vocab_size: int
    bos_id: int | None
    eos_id: int
    tokenizer_sha256: str
    bos: str = "auto"

    @property
    def num_tokens(self) -> int:
        return sum(len(shard.tokens) for shard in self.shards)

    @property
    def num_documents(self) -> int:
        return sum(len(shard.starts) for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        return sum(shard.text_bytes for shard in self.shards)

    def documents(self) -> Iterator[Tokens]:
        """Yield every document's tokens [length], in the order of the corpus."""
        for shard in self.shards:
            for index in range(len(shard.starts)):
                yield shard.document(index)

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer other than the one that made the shards; `--bos` may have overruled its BOS."""
        if self.bos in ("yes", "no"):
            tokenizer = tokenizer.with_bos(self.bos)
        where = self.directory / META_FILE
        if tokenizer.sha256 != self.tokenizer_sha256:
            raise UserError(
                f"{where}: made with the tokenizer of sha256 {self.tokenizer_sha256[:12]}, found one of "
                f"{tokenizer.sha256[:12]}; prepare the data again with this tokenizer"
            )
        for name, found, expected in (
            ("bos_id", document_bos(tokenizer), self.bos_id),
            ("eos_id", tokenizer.eos_id, self.eos_id),
        ):
            if found != expected:
                raise UserError(
                    f"{where}: documents were made with {name} {expected}, the tokenizer has {found}; "
                    "prepare the data again with this tokenizer"
                )


@dataclass(frozen=True)
class ShardMeta:
    """Entry of one shard in `meta.json`."""

    file: str
    tokens: int
    documents: int
    text_bytes: int


def open_shards(directory: str | Path, split: str) -> TokenShards:
    """Map the shards of `split` ("train" or "heldout") of a directory that `prepare_data.py` wrote.

    Raises:
        UserError: no such directory or split, another format or version, a missing file, or a file
            whose size is not what `meta.json` says.
    """
    directory = Path(directory)
    path = directory / META_FILE
    if not path.is_file():
        raise UserError(f"{directory}: no {META_FILE}; expected a directory written by train/prepare_data.py")
    meta = read_json(path)
    if meta.get("format") != FORMAT:
        raise UserError(f"{path}: format is {meta.get('format')!r}; expected {FORMAT!r}")
    if meta.get("version") != VERSION:
        raise UserError(f"{path}: version is {meta.get('version')!r}; expected {VERSION}")
    try:
        dtype = _TOKEN_DTYPES[meta["dtype"]]
        made_by = meta["tokenizer"]
        sha256, vocab_size, eos_id = str(made_by["sha256"]), int(made_by["vocab_size"]), int(made_by["eos_id"])
        bos_id = None if made_by["bos_id"] is None else int(made_by["bos_id"])
        listed = {name: [ShardMeta(**shard) for shard in shards] for name, shards in meta["splits"].items()}
        bos = str(meta.get("source", {}).get("bos", "auto"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}); prepare the data again") from None
    if split not in listed:
        raise UserError(f"{directory}: no split {split!r}; it has {', '.join(listed) or 'none'}")
    return TokenShards(
        directory=directory,
        split=split,
        shards=[_open_shard(directory, shard, dtype) for shard in listed[split]],
        vocab_size=vocab_size,
        bos_id=bos_id,
        eos_id=eos_id,
        tokenizer_sha256=sha256,
        bos=bos,
    )


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the dtype of token ids on disk."""
    return _TOKEN_DTYPES["uint16" if vocab_size <= 2**16 else "uint32"]


def document_bos(tokenizer: Tokenizer) -> int | None:
    """Return the token that begins every document of `tokenizer`, or None."""
    return tokenizer.bos_id if tokenizer.add_bos else None


def _index_path(tokens_path: Path) -> Path:
    return tokens_path.with_suffix(".idx")


def _open_shard(directory: Path, meta: ShardMeta, dtype: np.dtype[Any]) -> Shard:
    path = directory / meta.file
    tokens = _map_array(path, dtype, meta.tokens)
    starts = _map_array(_index_path(path), _STARTS_DTYPE, meta.documents)
    if len(starts) and (starts[0] != 0 or starts[-1] >= len(tokens)):
        raise UserError(f"{_index_path(path)}: documents lie outside {path.name}; prepare the data again")
    return Shard(path, tokens, starts, meta.text_bytes)


def _map_array(path: Path, dtype: np.dtype[Any], length: int) -> npt.NDArray[Any]:
    if not path.is_file():
        raise UserError(f"{path}: no such file, though {META_FILE} names it; prepare the data again")
    size, expected = path.stat().st_size, length * dtype.itemsize
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise UserError(f"{path}: {state}: found {size} bytes, expected {expected}; prepare the data again")
    if length == 0:
        return np.empty(0, dtype)
    # A plain array over the map: np.memmap's own slicing is several times slower.
    return np.memmap(path, dtype=dtype, mode="r", shape=(length,)).view(np.ndarray)


class ShardWriter:
    """Writer of a shard directory: `append` documents in order, then `finish`.

    Use it as a context manager. Without `finish` there is no `meta.json`, so nothing that opens.

    Args:
        directory: an existing, empty directory.
        tokenizer: the one that made the documents' tokens.
        shard_tokens: a shard holds at most this many tokens, a single longer document excepted.
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer, shard_tokens: int = DEFAULT_SHARD_TOKENS) -> None:
        self._directory = directory
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._open: dict[str, _ShardFiles] = {}
        self._closed: dict[str, list[ShardMeta]] = {}

    def append(self, split: str, tokens: npt.ArrayLike, lengths: npt.ArrayLike, text_bytes: npt.ArrayLike) -> None:
        """Write documents that lie one after the other in `tokens`.

        Args:
            split: "train" or "heldout".
            tokens: ids of all the documents [sum of lengths].
            lengths: tokens of each document [documents], at least 1.
            text_bytes: UTF-8 bytes of each document's text [documents].
        """
        assert split in SPLITS
        ids = np.asarray(tokens)
        sizes = np.asarray(text_bytes, dtype=np.int64)
        ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
        assert len(sizes) == len(ends) and len(ids) == (int(ends[-1]) if len(ends) else 0)
        first, written = 0, 0
        while first < len(ends):
            files = self._files(split)
            room = self._shard_tokens - files.tokens
            stop = int(np.searchsorted(ends, written + room, side="right"))
            if stop <= first and files.tokens > 0:
                self._close(split)
                continue
            stop = max(stop, first + 1)
            files.append(ids[written : int(ends[stop - 1])], ends[first:stop] - written, int(sizes[first:stop].sum()))
            first, written = stop, int(ends[stop - 1])

    def finish(self, source: dict[str, Any]) -> None:
        """Close the shards and write `meta.json`, with `source` saying where the text came from."""
        for split in list(self._open):
            self._close(split)
        meta = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": self._dtype.name,
            "tokenizer": {
                "sha256": self._tokenizer.sha256,
                "vocab_size": self._tokenizer.vocab_size,
                "bos_id": document_bos(self._tokenizer),
                "eos_id": self._tokenizer.eos_id,
            },
            "splits": {
                split: [asdict(shard) for shard in self._closed[split]] for split in SPLITS if split in self._closed
            },
            "source": source,
        }
        write_json(self._directory / META_FILE, meta)

    def _files(self, split: str) -> "_ShardFiles":
        if split not in self._open:
            number = len(self._closed.setdefault(split, []))
            self._open[split] = _ShardFiles(self._directory / f"{split}-{number:05d}.bin", self._dtype)
        return self._open[split]

    def _close(self, split: str) -> None:
        self._closed[split].append(self._open.pop(split).close())

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        for files in self._open.values():
            files.close()
        self._open.clear()


class _ShardFiles:
    """The two files of a shard being written."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.tokens = 0
        self._path = path
        self._dtype = dtype
        self._documents = 0
        self._text_bytes = 0
        self._tokens_file: BinaryIO = path.open("wb")
        self._starts_file: BinaryIO = _index_path(path).open("wb")

    def append(self, ids: npt.NDArray[Any], ends: npt.NDArray[np.int64], text_bytes: int) -> None:
        ids.astype(self._dtype, copy=False).tofile(self._tokens_file)
        starts = np.concatenate(([0], ends[:-1])) + self.tokens
        starts.astype(_STARTS_DTYPE).tofile(self._starts_file)
        self.tokens += len(ids)
        self._documents += len(ends)
        self._text_bytes += text_bytes

    def close(self) -> ShardMeta:
        self._tokens_file.close()
        self._starts_file.close()
        return ShardMeta(self._path.name, self.tokens, self._documents, self._text_bytes)
