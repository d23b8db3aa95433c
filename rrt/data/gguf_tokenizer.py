"""The tokenizer in a GGUF file's metadata, as the files that Hugging Face directories have.

Byte-level BPE becomes a `tokenizer.json`, SentencePiece a `tokenizer.model`, always the same bytes for the same
metadata. So the ordinary loader reads them, and a checkpoint carries them like those of any other base.
"""

import json
import logging
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rrt.common.gguf_file import GGUFFile
from rrt.errors import UserError

log = logging.getLogger(__name__)

# Kinds of tokens, the same numbers in GGUF and SentencePiece.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def _byte_level(*, has_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": has_regex}


def _split_by(pattern: str) -> dict[str, Any]:
    """Return the rule that cuts texts at the matches of `pattern`, the merges of which stay within them."""
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _byte_level(has_regex=False)]}


@dataclass(frozen=True)
class _Splitting:
    """How a kind of byte-level BPE cuts texts into words before merging.

    Attributes:
        pre_tokenizer: the rule, as `tokenizer.json` has it.
        ignores_merges: whether a word that is in the vocabulary is its token, however merges would make it.
        adds_bos: whether texts begin with BOS where the file does not say.
    """

    pre_tokenizer: dict[str, Any]
    ignores_merges: bool = False
    adds_bos: bool = False


_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = _Splitting(_byte_level(has_regex=True))
_SINGLE_DIGITS = _Splitting(
    {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, _byte_level(has_regex=True)],
    }
)
_LLAMA3_RULE = _split_by(rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}")
_LLAMA3 = _Splitting(_LLAMA3_RULE, ignores_merges=True, adds_bos=True)
_QWEN2 = _Splitting(_split_by(rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"))
_SPLITTINGS = {
    **dict.fromkeys(("gpt-2", "olmo", "mpt", "phi-2"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _SINGLE_DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _Splitting(_LLAMA3_RULE)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), _QWEN2),
}


def gguf_tokenizer_files(file: GGUFFile) -> dict[str, bytes]:
    """Make the files of a Hugging Face directory's tokenizer: name -> content; none if the file has no tokenizer.

    `config.json`, one of them, has the ids of special tokens alone.

    Raises:
        UserError: another kind of tokenizer, another splitting of texts into words, or a missing or wrong field, each
            by name.
    """
    kind = file.value("tokenizer.ggml.model", str, "none")
    if kind in ("none", "no_vocab"):
        return {}
    vocabulary = _Vocabulary(file)
    if kind == "gpt2":
        splitting = _splitting(file)
        adds_bos = file.value("tokenizer.ggml.add_bos_token", bool, splitting.adds_bos)
        files = {"tokenizer.json": _json(_byte_level_bpe(file, vocabulary, splitting, adds_bos))}
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    elif kind == "llama":
        adds_bos = file.value("tokenizer.ggml.add_bos_token", bool, True)
        files = {"tokenizer.model": _sentencepiece_model(file, vocabulary)}
        is_gemma = file.value("general.architecture", str).startswith("gemma")
        settings = {"tokenizer_class": "GemmaTokenizer" if is_gemma else "LlamaTokenizer", "legacy": False}
    else:
        file.fail("tokenizer.ggml.model", kind, "gpt2 (byte-level BPE) or llama (SentencePiece)")
    settings |= {f"{role}_token": token for role in _ROLES if (token := vocabulary.special_token(role)) is not None}
    settings |= {
        "add_bos_token": adds_bos and vocabulary.special_id("bos") is not None,
        "add_eos_token": file.value("tokenizer.ggml.add_eos_token", bool, False),
        "clean_up_tokenization_spaces": False,
    }
    files["tokenizer_config.json"] = _json(settings)
    files["config.json"] = files["generation_config.json"] = _json(vocabulary.generation_ids())
    template = file.value("tokenizer.chat_template", str, None)
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    return files


class _Vocabulary:
    """Tokens with their kinds, and the special ones by role."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self.tokens = _required(file, "tokenizer.ggml.tokens", str)
        kinds = file.values("tokenizer.ggml.token_type", int)
        self.kinds: list[int] = [_NORMAL] * len(self.tokens) if kinds is None else kinds
        _check_length(file, "tokenizer.ggml.token_type", self.kinds, len(self.tokens))
        if len(set(self.tokens)) < len(self.tokens):
            repeated = Counter(self.tokens).most_common(1)[0][0]
            file.fail("tokenizer.ggml.tokens", repeated, "each token once")

    def special_id(self, role: str) -> int | None:
        """Return the id of a special token, None if the file has none."""
        key = f"tokenizer.ggml.{_ROLES.get(role, role)}_token_id"
        found: int | None = self._file.value(key, int, None)
        if found is not None and not 0 <= found < len(self.tokens):
            self._file.fail(key, found, f"an id of tokenizer.ggml.tokens, below {len(self.tokens)}")
        return found

    def special_token(self, role: str) -> str | None:
        token_id = self.special_id(role)
        return None if token_id is None else self.tokens[token_id]

    def generation_ids(self) -> dict[str, Any]:
        """Return BOS, padding, and what ends a generation: a text, a turn or a message."""
        ends = list(dict.fromkeys(i for role in ("eos", "eot", "eom") if (i := self.special_id(role)) is not None))
        ids = {
            "bos_token_id": self.special_id("bos"),
            "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
            "pad_token_id": self.special_id("pad"),
        }
        return {key: value for key, value in ids.items() if value is not None}


def _splitting(file: GGUFFile) -> _Splitting:
    name = file.value("tokenizer.ggml.pre", str, "default")
    if name == "default":
        log.warning(
            "%s: field 'tokenizer.ggml.pre' does not say how texts are cut into words; taken as GPT-2's, so ids may "
            "not be those that the model knows", file.path,
        )  # fmt: skip
        return _GPT2
    if name not in _SPLITTINGS:
        file.fail("tokenizer.ggml.pre", name, f"one of {', '.join(_SPLITTINGS)}")
    return _SPLITTINGS[name]


def _byte_level_bpe(file: GGUFFile, vocabulary: _Vocabulary, splitting: _Splitting, adds_bos: bool) -> dict[str, Any]:
    """Make the content of `tokenizer.json`."""
    merges = []
    for merge in _required(file, "tokenizer.ggml.merges", str):
        cut = merge.find(" ", 1)
        if cut < 0:
            file.fail("tokenizer.ggml.merges", merge, "two tokens with a space between")
        merges.append([merge[:cut], merge[cut + 1 :]])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": token_id, "content": token, **flags, "special": kind == _CONTROL}
        for token_id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    bos_id, bos = vocabulary.special_id("bos"), vocabulary.special_token("bos")
    starts = [bos] if adds_bos and bos is not None else []
    text = [[{"Sequence": {"id": name, "type_id": 0}}] for name in "AB"]
    start = [{"SpecialToken": {"id": token, "type_id": 0}} for token in starts]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": splitting.pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": start + text[0],
            "pair": start + text[0] + start + text[1],
            "special_tokens": {token: {"id": token, "ids": [bos_id], "tokens": [token]} for token in starts},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": splitting.ignores_merges,
            "vocab": {token: token_id for token_id, token in enumerate(vocabulary.tokens)},
            "merges": merges,
        },
    }


def _sentencepiece_model(file: GGUFFile, vocabulary: _Vocabulary) -> bytes:
    """Make the content of `tokenizer.model`: a ModelProto of sentencepiece_model.proto, in protobuf's wire format."""
    scores = _required(file, "tokenizer.ggml.scores", float)
    _check_length(file, "tokenizer.ggml.scores", scores, len(vocabulary.tokens))
    if vocabulary.kinds.count(_UNKNOWN) != 1:
        file.fail("tokenizer.ggml.token_type", vocabulary.kinds.count(_UNKNOWN), "one unknown token (type 2)")
    pieces = (
        _field(1, _field(1, _piece(token, kind).encode()) + _float_field(2, score) + _int_field(3, kind))
        for token, kind, score in zip(vocabulary.tokens, vocabulary.kinds, scores, strict=True)
    )
    trainer = _int_field(3, 2) + _int_field(4, len(vocabulary.tokens)) + _int_field(35, _BYTE in vocabulary.kinds)
    unknown = vocabulary.kinds.index(_UNKNOWN)
    ids = {role: vocabulary.special_id(role) for role in ("bos", "eos", "pad")} | {"unk": unknown}
    for number, role in enumerate(("unk", "bos", "eos", "pad")):
        token_id = ids[role]
        trainer += _int_field(40 + number, -1 if token_id is None else token_id)
        # A role that no token has is named by an empty text, which is no token: the default would be "<s>".
        trainer += _field(45 + number, b"" if token_id is None else vocabulary.tokens[token_id].encode())
    normalizer = (
        _field(1, b"identity")
        + _field(2, b"")
        + _int_field(3, file.value("tokenizer.ggml.add_space_prefix", bool, True))
        + _int_field(4, file.value("tokenizer.ggml.remove_extra_whitespaces", bool, False))
        + _int_field(5, True)
    )
    return b"".join([*pieces, _field(2, trainer), _field(3, normalizer)])


def _piece(token: str, kind: int) -> str:
    """Return a token as SentencePiece spells it: llama.cpp writes the spaces of user-defined ones as such."""
    return token.replace(" ", "\u2581") if kind == _USER_DEFINED else token


def _varint(value: int) -> bytes:
    value &= 2**64 - 1
    digits = list(_base128(value))
    return bytes([digit | 0x80 for digit in digits[:-1]] + digits[-1:])


def _base128(value: int) -> Iterator[int]:
    yield value & 0x7F
    while value := value >> 7:
        yield value & 0x7F


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _int_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(int(value))


def _float_field(number: int, value: float) -> bytes:
    return _varint(number << 3 | 5) + struct.pack("<f", value)


def _required(file: GGUFFile, key: str, kind: type) -> list[Any]:
    found = file.values(key, kind)
    if not found:
        raise UserError(f"{file.path}: missing field '{key}'; expected a list, as the file has a tokenizer")
    return found


def _check_length(file: GGUFFile, key: str, found: list[Any], expected: int) -> None:
    if len(found) != expected:
        file.fail(key, f"{len(found)} entries", f"{expected}, one for each token")


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, indent=2).encode()
