"""The JSON files beside a tokenizer, as transformers 4 and 5 write them: special and added tokens, BOS, EOS."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from rrt.common.files import check_no_lfs_pointer, read_json
from rrt.errors import UserError

# What a checkpoint carries of its base, beside the weights and config.json.
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_TOKEN_LISTS = ("extra_special_tokens", "additional_special_tokens")


class TokenizerFiles:
    """The files of a tokenizer and the settings in them; a missing file is empty.

    Args:
        directory: where they are, or what they are made of.
        made: their contents by name, where they are not in `directory`.
    """

    def __init__(self, directory: Path, made: Mapping[str, bytes] | None = None) -> None:
        self.directory, self._made = directory, made
        config = self.read("config.json")
        ours = config.get("format") == "rrt"
        self._config: dict[str, Any] = config.get("model", {}) if ours else config
        if not isinstance(self._config, dict):
            raise UserError(f"{directory / 'config.json'}: field 'model': found {self._config!r}; expected an object")
        family = self._config.get("family" if ours else "model_type")
        self.family = family if isinstance(family, str) else None
        self.tokenizer_config = self.read("tokenizer_config.json")
        self._special_tokens_map = self.read("special_tokens_map.json")
        # A conversion of `tokenizer.model` may lie beside it, with added tokens of its own.
        self.tokenizer_json = self.read("tokenizer.json") if "tokenizer.model" in self else {}

    def __contains__(self, name: str) -> bool:
        return (self.directory / name).is_file() if self._made is None else name in self._made

    def content(self, name: str) -> bytes:
        """Return the content of a file that is there."""
        if self._made is not None:
            return self._made[name]
        try:
            check_no_lfs_pointer(self.directory / name)
            return (self.directory / name).read_bytes()
        except OSError as error:
            raise UserError(f"{self.directory / name}: cannot be read ({error.strerror})") from None

    def read(self, name: str) -> dict[str, Any]:
        """Read a file of JSON."""
        if self._made is not None:
            content: dict[str, Any] = json.loads(self._made.get(name, b"{}"))
            return content
        return read_json(self.directory / name) if name in self else {}

    def carried(self) -> dict[str, bytes]:
        """Return the files that a checkpoint carries along."""
        return {name: self.content(name) for name in TOKENIZER_FILES if name in self}

    def config_id(self, role: str) -> int | None:
        """Return `config.json`'s id of ``"bos"``, ``"eos"`` or ``"pad"``; the first of several."""
        return next(iter(self._ids("config.json", self._config, role)), None)

    def stop_ids(self) -> tuple[int, ...]:
        """Return the ids that end a generation: `generation_config.json`'s, else `config.json`'s."""
        named = self._ids("generation_config.json", self.read("generation_config.json"), "eos")
        return named or self._ids("config.json", self._config, "eos")

    def _ids(self, name: str, content: dict[str, Any], role: str) -> tuple[int, ...]:
        """Return the ids of one role, none if the field is missing, null or negative."""
        key = f"{role}_token_id"
        value = content.get(key)
        if value is None and name == "config.json":
            key = f"{role}_token_ids"  # of our own checkpoints
            value = content.get(key)
        values = value if isinstance(value, list) else [] if value is None else [value]
        ids = (self._integer(name, key, item) for item in values if item is not None)
        return tuple(token_id for token_id in ids if token_id >= 0)

    def _integer(self, name: str, key: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise UserError(f"{self.directory / name}: {key} is {value!r}; expected an integer")
        return value

    def names(self, role: str) -> bool:
        """True if a file of the tokenizer has an entry for the special token, null included."""
        return any(f"{role}_token" in content for content in (self.tokenizer_config, self._special_tokens_map))

    def special_token(self, role: str) -> str | None:
        """Return the string of a special token, from the first file that has it."""
        key = f"{role}_token"
        value = self.tokenizer_config.get(key, self._special_tokens_map.get(key))
        content = _content(value)
        if value is not None and content is None:
            raise UserError(f"{self.directory}: {key} is {value!r}; expected a string")
        return content

    def named_tokens(self) -> dict[str, str]:
        """Return the special tokens that have a name, such as ``eos_token``: what a chat template can use."""
        named = {}
        for content in (self._special_tokens_map, self.tokenizer_config):
            extra = content.get("extra_special_tokens")
            for key, value in (content | (extra if isinstance(extra, dict) else {})).items():
                if key.endswith("_token") and (token := _content(value)) is not None:
                    named[key] = token
                elif key.endswith("_token") and value is None:
                    named.pop(key, None)
        return named

    def special_strings(self) -> frozenset[str]:
        """Return every string that a file calls a special token."""
        return frozenset(self.named_tokens().values()) | frozenset(self._listed_tokens())

    def _listed_tokens(self) -> Iterator[str]:
        for content in (self.tokenizer_config, self._special_tokens_map):
            for key in _TOKEN_LISTS:
                listed = content.get(key)
                values = listed.values() if isinstance(listed, dict) else listed if isinstance(listed, list) else ()
                yield from (token for value in values if (token := _content(value)) is not None)

    def added_tokens(self) -> dict[int, tokenizers.AddedToken]:
        """Return the tokens that files other than the tokenizer that is read add to its vocabulary, by id."""
        added: dict[str, tuple[int, tokenizers.AddedToken]] = {}
        name = "tokenizer_config.json"
        for key, entry in _object(self.tokenizer_config, "added_tokens_decoder", self.directory / name).items():
            token_id = int(key) if key.isascii() and key.isdigit() else self._integer(name, "added_tokens_decoder", key)
            self._add(added, name, token_id, entry)
        listed = self.tokenizer_json.get("added_tokens") or []
        if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
            raise UserError(
                f"{self.directory / 'tokenizer.json'}: added_tokens is {listed!r}; expected a list of objects"
            )
        for entry in listed:
            token_id = self._integer("tokenizer.json", "added_tokens", _get(entry, "id"))
            self._add(added, "tokenizer.json", token_id, entry)
        for token, value in self.read("added_tokens.json").items():
            self._add(added, "added_tokens.json", self._integer("added_tokens.json", token, value), token)
        return dict(added.values())

    def _add(
        self, added: dict[str, tuple[int, tokenizers.AddedToken]], name: str, token_id: int, entry: object
    ) -> None:
        """Add a token from one file unless another file has it; two ids for one string are refused."""
        content = _content(entry)
        if content is None:
            raise UserError(f"{self.directory / name}: added token {token_id} is {entry!r}; expected its string")
        flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
        token = tokenizers.AddedToken(content, **{flag: bool(_get(entry, flag)) for flag in flags})
        known, _ = added.setdefault(content, (token_id, token))
        if known != token_id:
            raise UserError(
                f"{self.directory / name}: added token {content!r} has id {token_id}, in another file {known}; "
                "expected the same"
            )


def _content(value: object) -> str | None:
    """Return the string of a token, which may be an AddedToken object."""
    content = _get(value, "content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _get(entry: object, key: str) -> object:
    return entry.get(key) if isinstance(entry, dict) else None


def _object(content: dict[str, Any], key: str, path: Path) -> dict[str, Any]:
    value = content.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError(f"{path}: {key} is {value!r}; expected an object")
    return value
