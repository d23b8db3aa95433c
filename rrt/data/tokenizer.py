"""Tokenizers as the base models publish them: SentencePiece or ``tokenizer.json``.

Which file is read. Where a directory has both (google/gemma-2b, TinyLlama), `tokenizer.model` is: the
base was pretrained on SentencePiece's ids, and `tokenizer.json` is a conversion of it. As published
the two give the same ids. A `tokenizer.json` that transformers 5 wrote for Llama does not, nor does
transformers 5 itself: both drop one of a text's leading spaces.

Which text becomes a special token. None: BOS and EOS come from `bos=` and `encode_document` only, so
text which spells ``</s>`` or ``<|endoftext|>`` is encoded as those characters and a corpus cannot end
its own documents. (transformers turns such text into the special token unless `split_special_tokens`
is set.) Only a symbol that the vocabulary declares as ordinary matches whole, such as GPT-NeoX's runs
of spaces, Gemma's runs of newlines and, in a `tokenizer.model`, Gemma's ``<start_of_turn>``.

``decode(encode(text)) == text`` up to the normaliser of the tokenizer itself: SentencePiece reads the
character U+2581 as a space, GPT-NeoX composes to NFC. A lone surrogate, which JSON can spell and UTF-8
cannot, is read as U+FFFD.
"""

import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers

from rrt.common.files import read_json, sha256_file
from rrt.errors import UserError

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
FAMILY_ADDS_BOS = {"gemma": True, "llama": True, "mistral": True, "qwen2": False, "qwen3": False, "gpt_neox": False}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class _Backend(Protocol):
    """Interface of a tokenizer library: text to ids without special tokens, and back."""

    vocab_size: int
    special_ids: frozenset[int]

    def encode(self, texts: Sequence[str]) -> list[list[int]]: ...

    def decode(self, ids: list[int]) -> str: ...

    def token_id(self, token: str) -> int | None: ...

    def own_id(self, role: str) -> int | None:
        """Return the id of ``"bos"``, ``"eos"`` or ``"pad"`` if the file itself has it."""

    def adds_bos(self, bos_id: int | None) -> bool:
        """True if the file itself asks for BOS at the start of a text."""


class _SentencePiece:
    def __init__(self, path: Path) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path}: not a SentencePiece model ({_one_line(error)})") from None
        self.vocab_size: int = self._processor.vocab_size()
        self.special_ids = frozenset(i for i in range(self.vocab_size) if self._processor.is_control(i))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        threads = -1 if _parallelism_allowed() else 1
        ids: list[list[int]] = self._processor.encode(list(texts), num_threads=threads)
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._processor.decode(ids)
        return text

    def token_id(self, token: str) -> int | None:
        token_id: int = self._processor.piece_to_id(token)
        return token_id if self._processor.id_to_piece(token_id) == token else None

    def own_id(self, role: str) -> int | None:
        token_id: int = getattr(self._processor, f"{role}_id")()
        return token_id if token_id >= 0 else None

    def adds_bos(self, bos_id: int | None) -> bool:
        return bos_id is not None


class _TokenizersJson:
    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"{path}: not a tokenizer of the tokenizers library ({_one_line(error)})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # special-token strings in text stay text
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def own_id(self, role: str) -> int | None:
        return None

    def adds_bos(self, bos_id: int | None) -> bool:
        return self._tokenizer.encode("", add_special_tokens=True).ids[:1] == [bos_id]


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer with the rules of its model family; made by `load_tokenizer`.

    Attributes:
        vocab_size: one more than the largest id; a model's embedding may have more rows, never fewer.
        bos_id: beginning of sequence, None where the vocabulary has none.
        eos_id: end of sequence; separates training documents.
        pad_id: padding, None where the vocabulary has none.
        add_bos: whether a sequence starts with BOS (Gemma and Llama do, GPT-NeoX does not).
        sha256: hex digest of the file that `encode` reads; the same for every copy of the tokenizer.
        files: what a checkpoint needs to carry the tokenizer (never `config.json`).
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int | None
    add_bos: bool
    sha256: str
    files: tuple[Path, ...]
    _backend: _Backend = field(repr=False)

    def encode(self, text: str, *, bos: bool | None = None) -> list[int]:
        """Encode `text`, after BOS if `bos` (None: the family's rule). EOS is never added."""
        return self.encode_batch([text], bos=bos)[0]

    def encode_batch(self, texts: Sequence[str], *, bos: bool | None = None) -> list[list[int]]:
        """Encode each text, on all cores unless ``TOKENIZERS_PARALLELISM=false``."""
        try:
            batch = self._backend.encode(texts)
        except (UnicodeEncodeError, TypeError, RuntimeError):  # how the libraries refuse surrogates
            batch = self._backend.encode([_LONE_SURROGATE.sub("\ufffd", text) for text in texts])
        if not (self.add_bos if bos is None else bos):
            return batch
        if self.bos_id is None:
            raise UserError("bos: found True; expected False or None, for the tokenizer has no BOS token")
        return [[self.bos_id, *ids] for ids in batch]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode training documents: BOS if the family has it, the text, EOS."""
        return [[*ids, self.eos_id] for ids in self.encode_batch(texts)]

    def encode_document(self, text: str) -> list[int]:
        """Encode one training document as `encode_documents` does."""
        return self.encode_documents([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """Decode `ids` to text. Special tokens, and ids that only a padded embedding has, are left out."""
        skipped = self._backend.special_ids | {self.bos_id, self.eos_id, self.pad_id}
        known = self._backend.vocab_size
        return self._backend.decode([i for i in map(int, ids) if i not in skipped and 0 <= i < known])

    def save(self, directory: str | Path) -> None:
        """Copy the tokenizer's files into the existing `directory`."""
        for file in self.files:
            shutil.copyfile(file, Path(directory) / file.name)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Read the tokenizer in a checkpoint (Hugging Face's or ours) or tokenizer directory.

    The ids of BOS, EOS and padding come from `config.json`, else `tokenizer_config.json`, else
    `special_tokens_map.json`, else the SentencePiece model. Whether BOS is added: `add_bos_token` in
    `tokenizer_config.json`, else the family that `config.json` names, else the tokenizer's own file.

    Raises:
        UserError: no such directory, no tokenizer in it, a file that cannot be read, an unknown EOS,
            or special-token ids that the vocabulary does not have.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; expected one with tokenizer files")
    backend, source = _load_backend(directory)
    settings = _Settings(directory)
    added = settings.added_tokens
    vocab_size = max([backend.vocab_size, *(token_id + 1 for token_id in added.values())])

    special: dict[str, int | None] = {}
    for role in ("bos", "eos", "pad"):
        token_id = settings.special_id(role)
        token = settings.special_token(role)
        if token_id is None and token is not None:
            token_id = added.get(token, backend.token_id(token))
            if token_id is None:
                raise UserError(f"{directory}: {role}_token {token!r} is not in the vocabulary of {source.name}")
        if token_id is None:
            token_id = backend.own_id(role)
        if token_id is not None and not 0 <= token_id < vocab_size:
            raise UserError(
                f"{directory}: {role}_token_id is {token_id}; expected an id of {source.name}, below {vocab_size}"
            )
        special[role] = token_id

    if special["eos"] is None:
        raise UserError(
            f"{directory}: the end-of-sequence token is unknown; expected eos_token_id in config.json "
            "or eos_token in tokenizer_config.json"
        )
    add_bos = settings.add_bos
    if add_bos is None:
        add_bos = backend.adds_bos(special["bos"])
    if add_bos and special["bos"] is None:
        raise UserError(
            f"{directory}: sequences start with BOS here but the token is unknown; expected bos_token_id "
            "in config.json or bos_token in tokenizer_config.json"
        )
    return Tokenizer(
        vocab_size=vocab_size,
        bos_id=special["bos"],
        eos_id=special["eos"],
        pad_id=special["pad"],
        add_bos=add_bos,
        sha256=sha256_file(source),
        files=tuple(directory / name for name in TOKENIZER_FILES if (directory / name).is_file()),
        _backend=backend,
    )


def check_vocab(tokenizer: Tokenizer, vocab_size: int, where: str | Path) -> None:
    """Refuse a tokenizer whose ids can exceed the `vocab_size` rows of the embedding in `where`."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{where}: vocab_size is {vocab_size} but the tokenizer has {tokenizer.vocab_size} ids; "
            "expected at least as many embedding rows as ids"
        )


def tokenizer_of(directory: Path, vocab_size: int) -> Tokenizer | None:
    """Load the tokenizer in `directory`, None if it has none.

    Raises:
        UserError: it has one that cannot be read, or whose ids exceed the `vocab_size` embedding rows.
    """
    if not any((directory / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        return None
    tokenizer = load_tokenizer(directory)
    check_vocab(tokenizer, vocab_size, directory)
    return tokenizer


class _Settings:
    """Settings of a tokenizer in the JSON files of its directory; a missing file is empty."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        config = self._read("config.json")
        ours = config.get("format") == "rrt"
        self._config: dict[str, Any] = config.get("model", {}) if ours else config
        if not isinstance(self._config, dict):
            raise UserError(f"{directory / 'config.json'}: field 'model': found {self._config!r}; expected an object")
        self._family = self._config.get("family" if ours else "model_type")
        self._tokenizer_config = self._read("tokenizer_config.json")
        self._special_tokens_map = self._read("special_tokens_map.json")
        self.added_tokens: dict[str, int] = {}
        for token, token_id in self._read("added_tokens.json").items():
            self.added_tokens[token] = self._integer("added_tokens.json", token, token_id)

    def _read(self, name: str) -> dict[str, Any]:
        path = self._directory / name
        return read_json(path) if path.is_file() else {}

    def special_id(self, role: str) -> int | None:
        """Return `config.json`'s id of ``"bos"``, ``"eos"`` or ``"pad"``; the first of several."""
        key = f"{role}_token_id"
        value = self._config.get(key, self._config.get(f"{key}s"))
        if isinstance(value, list) and value:
            value = value[0]
        return None if value is None else self._integer("config.json", key, value)

    def special_token(self, role: str) -> str | None:
        """Return the string of a special token, from the first file that has it."""
        key = f"{role}_token"
        value = self._tokenizer_config.get(key, self._special_tokens_map.get(key))
        if isinstance(value, dict):
            value = value.get("content")
        if value is not None and not isinstance(value, str):
            raise UserError(f"{self._directory}: {key} is {value!r}; expected a string")
        return value

    def _integer(self, name: str, key: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"{self._directory / name}: {key} is {value!r}; expected an integer")
        return value

    @property
    def add_bos(self) -> bool | None:
        """True if sequences start with BOS; None if no file says."""
        explicit = self._tokenizer_config.get("add_bos_token")
        if isinstance(explicit, bool):
            return explicit
        return FAMILY_ADDS_BOS.get(self._family) if isinstance(self._family, str) else None


def _load_backend(directory: Path) -> tuple[_Backend, Path]:
    for name, backend in (("tokenizer.model", _SentencePiece), ("tokenizer.json", _TokenizersJson)):
        path = directory / name
        if path.is_file():
            return backend(path), path
    raise UserError(f"{directory}: no tokenizer; looked for tokenizer.model and tokenizer.json")


def _parallelism_allowed() -> bool:
    """Read the tokenizers library's own switch, which is here for SentencePiece too."""
    return os.environ.get("TOKENIZERS_PARALLELISM", "true").lower() not in ("0", "false", "off", "no", "n", "f", "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
