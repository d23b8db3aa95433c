"""Tokenizer libraries behind one interface: SentencePiece and the tokenizers library.

Added tokens are the strings that a directory's JSON files add to the vocabulary of its model. An ordinary one matches
whole wherever a text spells it, a special one (BOS, EOS, ``<|im_start|>``) only where the caller parses special tokens.
"""

import json
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers
from tokenizers import models

from rrt.errors import UserError

# Appended to a serialised SentencePiece model, where later fields win: normalizer_spec.add_dummy_prefix = false.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Backend(Protocol):
    """Interface of a tokenizer library: text to ids without BOS and EOS, and back.

    Attributes:
        vocab_size: one more than the largest id, added tokens included.
        special_ids: ids of special tokens, which decoding leaves out.
    """

    vocab_size: int
    special_ids: frozenset[int]

    def encode(self, texts: Sequence[str], parse_special: bool) -> list[list[int]]:
        """Encode texts; what spells a special token becomes it if `parse_special`, else stays text."""

    def decode(self, ids: list[int]) -> str:
        """Decode ids, none of them special."""

    def token_id(self, token: str) -> int | None: ...

    def token(self, token_id: int) -> str | None: ...

    def own_id(self, role: str) -> int | None:
        """Return the id of ``"bos"``, ``"eos"`` or ``"pad"`` if the model itself has it."""

    def leading_ids(self) -> list[int] | None:
        """Return what the post-processor of `tokenizer.json` puts before a text, None if there is no such file."""


class SentencePieceBackend:
    """A `tokenizer.model` with the added tokens that lie beside it.

    Args:
        path: the `tokenizer.model`, for messages.
        content: its content.
        added: id and properties of added tokens, those of the model's own vocabulary included.
        special: strings of special tokens.
        legacy: whether text after an added token gets a leading space of its own, as transformers'
            `legacy` setting has it, rather than only the beginning of a text.
        tokenizer_json: content of the `tokenizer.json` beside it.
    """

    def __init__(
        self,
        path: Path,
        content: bytes,
        added: Mapping[int, tokenizers.AddedToken],
        special: frozenset[str],
        *,
        legacy: bool,
        tokenizer_json: dict[str, Any],
    ) -> None:
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(content)
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path}: not a SentencePiece model ({_one_line(error)})") from None
        self._path, self._tokenizer_json = path, tokenizer_json
        pieces = self._processor.vocab_size()
        self.vocab_size: int = max([pieces, *(token_id + 1 for token_id in added)])
        # As in transformers, control symbols and the unknown one are special tokens.
        tokens = {
            token_id: _special_token(self._processor.id_to_piece(token_id))
            for token_id in range(pieces)
            if self._processor.is_control(token_id) or self._processor.is_unknown(token_id)
        }
        controls = frozenset(token_id for token_id in tokens if self._processor.is_control(token_id))
        tokens |= added
        self._ids = {token.content: token_id for token_id, token in tokens.items()}
        self.special_ids = controls | {
            token_id for token_id, token in tokens.items() if token.special or token.content in special
        }
        ordinary = {token_id: token for token_id, token in tokens.items() if token_id not in self.special_ids}
        # Symbols that the model itself matches whole need no help, neither here nor for decoding.
        ordinary = {
            token_id: token
            for (token_id, token), ids in zip(
                ordinary.items(), self._processor.encode([t.content for t in ordinary.values()]), strict=True
            )
            if len(ids) > 2 or ids[-1:] != [token_id]
        }
        self._added_text = {token_id: token.content for token_id, token in ordinary.items()}
        self._ordinary = _Splitter(ordinary) if ordinary else None
        self._all = _Splitter({token_id: tokens[token_id] for token_id in self.special_ids} | ordinary)
        # Reads the beginning of a text like the rest of it.
        self._unprefixed = sentencepiece.SentencePieceProcessor(model_proto=content + _NO_DUMMY_PREFIX)
        self._inner = self._processor if legacy else self._unprefixed

    def encode(self, texts: Sequence[str], parse_special: bool) -> list[list[int]]:
        splitter = self._all if parse_special else self._ordinary
        if splitter is None:
            return self._encode_text(self._processor, texts)
        split = [splitter.split(text) for text in texts]
        first = iter(
            self._encode_text(self._processor, [p for parts in split for p in parts[:1] if isinstance(p, str)])
        )
        inner = iter(self._encode_text(self._inner, [p for parts in split for p in parts[1:] if isinstance(p, str)]))
        batch = []
        for parts in split:
            ids: list[int] = []
            for index, part in enumerate(parts):
                ids += [part] if isinstance(part, int) else next(inner if index else first)
            batch.append(ids)
        return batch

    @staticmethod
    def _encode_text(processor: Any, texts: Sequence[str]) -> list[list[int]]:
        threads = -1 if _parallelism_allowed() else 1
        ids: list[list[int]] = processor.encode(list(texts), num_threads=threads)
        return ids

    def decode(self, ids: list[int]) -> str:
        parts: list[str] = []
        run: list[int] = []
        # SentencePiece drops the leading space of what it decodes, which only a text's beginning has too many.
        processor = self._processor
        for token_id in ids:
            if token_id not in self._added_text:
                run.append(token_id)
                continue
            parts += [processor.decode(run), self._added_text[token_id]]
            processor, run = self._unprefixed, []
        return "".join([*parts, processor.decode(run)])

    def token_id(self, token: str) -> int | None:
        if token in self._ids:
            return self._ids[token]
        token_id: int = self._processor.piece_to_id(token)
        return token_id if self._processor.id_to_piece(token_id) == token else None

    def token(self, token_id: int) -> str | None:
        piece: str = self._processor.id_to_piece(token_id)
        return piece

    def own_id(self, role: str) -> int | None:
        token_id: int = getattr(self._processor, f"{role}_id")()
        return token_id if token_id >= 0 else None

    def leading_ids(self) -> list[int] | None:
        if "post_processor" not in self._tokenizer_json:
            return None
        # The post-processor alone: it needs one word, and no vocabulary.
        content = {"version": "1.0", "added_tokens": [], "post_processor": self._tokenizer_json["post_processor"]}
        content["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
        try:
            return _leading_ids(tokenizers.Tokenizer.from_str(json.dumps(content)))
        except Exception as error:  # the library raises nothing more specific
            place = self._path.with_name("tokenizer.json")
            raise UserError(f"{place}: field 'post_processor': cannot be read ({_one_line(error)})") from None


class TokenizersBackend:
    """A `tokenizer.json` of this content; `added` and `special` are what the files beside it say."""

    def __init__(
        self, path: Path, content: bytes, added: Mapping[int, tokenizers.AddedToken], special: frozenset[str]
    ) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing more specific
            raise UserError(f"{path}: not a tokenizer of the tokenizers library ({_one_line(error)})") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        for token_id, token in sorted(added.items()):
            if self._tokenizer.token_to_id(token.content) is None:
                self._tokenizer.add_tokens([token])
            found = self._tokenizer.token_to_id(token.content)
            if found != token_id:
                raise UserError(
                    f"{path.parent}: added token {token.content!r} has id {token_id}, and in {path.name} {found}; "
                    "expected the same"
                )
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        known = {token.content for token in self._tokenizer.get_added_tokens_decoder().values() if token.special}
        # Those that the file knows keep what it says of them, such as `rstrip`.
        self._tokenizer.add_special_tokens(
            [_special_token(token) for token in sorted(special - known) if token in vocabulary]
        )
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        own = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(
            token_id for token_id, token in own.items() if token.special or token.content in special
        )
        self._lock = threading.Lock()  # parsing is a setting of the one tokenizer

    def encode(self, texts: Sequence[str], parse_special: bool) -> list[list[int]]:
        with self._lock:
            self._tokenizer.encode_special_tokens = not parse_special
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        return self._tokenizer.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        return self._tokenizer.id_to_token(token_id)

    def own_id(self, role: str) -> int | None:
        return None

    def leading_ids(self) -> list[int] | None:
        return _leading_ids(self._tokenizer)


class _Splitter:
    """Cutting of texts at added tokens, with the tokenizers library's rules for them (`lstrip` and the like)."""

    def __init__(self, tokens: Mapping[int, tokenizers.AddedToken]) -> None:
        # A model that takes whatever lies between added tokens as one unknown word, id 0.
        self._tokenizer = tokenizers.Tokenizer(models.WordLevel({"": 0}, unk_token=""))
        self._ids = {}
        for token_id, token in tokens.items():
            self._tokenizer.add_tokens([token])
            self._ids[self._tokenizer.token_to_id(token.content)] = token_id

    def split(self, text: str) -> list[int | str]:
        """Split `text` into ids of added tokens and the texts between them."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return [
            text[start:stop] if token_id == 0 else self._ids[token_id]
            for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
        ]


def _special_token(content: str) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(content, special=True, normalized=False)


def _leading_ids(tokenizer: tokenizers.Tokenizer) -> list[int]:
    plain = tokenizer.encode("a", add_special_tokens=False).ids
    ids = tokenizer.encode("a", add_special_tokens=True).ids
    start = next((i for i in range(len(ids)) if ids[i : i + len(plain)] == plain), 0)
    return ids[:start]


def _parallelism_allowed() -> bool:
    """Read the tokenizers library's own switch, which is here for SentencePiece too."""
    return os.environ.get("TOKENIZERS_PARALLELISM", "true").lower() not in ("0", "false", "off", "no", "n", "f", "")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
