"""Tokenizers as the base models publish them: SentencePiece or ``tokenizer.json``.

Which file is read. Where a directory has both (google/gemma-2b, TinyLlama), `tokenizer.model` is: the
base was pretrained on SentencePiece's ids, and `tokenizer.json` is a conversion of it. As published
the two give the same ids. A `tokenizer.json` that transformers 5 wrote for Llama does not, nor does
transformers 5 itself: both drop one of a text's leading spaces.

Which text becomes a special token. None, unless `parse_special` is set: BOS and EOS come from `bos=` and
`encode_document` only, so text which spells ``</s>`` or ``<|endoftext|>`` is encoded as those characters
and a corpus cannot end its own documents. (transformers turns such text into the special token unless
`split_special_tokens` is set.) Only a symbol that the vocabulary declares as ordinary matches whole, such
as GPT-NeoX's runs of spaces, Gemma's runs of newlines, added tokens that no file calls special, and, in a
`tokenizer.model`, Gemma's ``<start_of_turn>``.

``decode(encode(text)) == text`` up to the normaliser of the tokenizer itself: SentencePiece reads the
character U+2581 as a space, GPT-NeoX composes to NFC. A lone surrogate, which JSON can spell and UTF-8
cannot, is read as U+FFFD.
"""

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rrt.common.gguf_file import GGUFFile, is_gguf
from rrt.data.chat import ChatTemplate, Message, find_chat_template
from rrt.data.gguf_tokenizer import gguf_tokenizer_files
from rrt.data.tokenizer_backends import Backend, SentencePieceBackend, TokenizersBackend
from rrt.data.tokenizer_files import TokenizerFiles
from rrt.errors import UserError

# Of a bare `tokenizer.model`; a tokenizer with files of its own says it itself.
FAMILY_ADDS_BOS = {"gemma": True, "llama": True, "mistral": True, "gpt_neox": False, "qwen2": False, "qwen3": False}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_ROLES = ("bos", "eos", "pad")

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with the rules of its model family; made by `load_tokenizer`.

    Attributes:
        vocab_size: one more than the largest id; a model's embedding may have more rows, never fewer.
        bos_id: beginning of sequence, None where the vocabulary has none.
        eos_id: end of sequence; separates training documents.
        pad_id: padding, None where the vocabulary has none.
        stop_ids: the tokens that end a generation: `generation_config.json`'s, which transformers obeys too, else
            `config.json`'s, else EOS.
        add_bos: whether a sequence starts with BOS (Gemma and Llama do, GPT-NeoX and SmolLM2 do not).
        sha256: hex digest of the file that `encode` reads; the same for every copy of the tokenizer.
        files: what a checkpoint carries along, name -> content: the tokenizer, its chat template and
            `generation_config.json` (never `config.json`).
        place: the directory or GGUF file that it was read from.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int | None
    stop_ids: tuple[int, ...]
    add_bos: bool
    sha256: str
    files: Mapping[str, bytes] = field(repr=False)
    place: Path
    _template: ChatTemplate | None = field(repr=False)
    _backend: Backend = field(repr=False)

    def encode(self, text: str, *, bos: bool | None = None, parse_special: bool = False) -> list[int]:
        """Encode `text`, after BOS if `bos` (None: the tokenizer's rule). EOS is never added.

        With `parse_special` text that spells a special token becomes it: for prompts that `apply_chat_template` wrote,
        which hold their BOS (``bos=False``), and never for a corpus.
        """
        return self.encode_batch([text], bos=bos, parse_special=parse_special)[0]

    def encode_batch(
        self, texts: Sequence[str], *, bos: bool | None = None, parse_special: bool = False
    ) -> list[list[int]]:
        """Encode each text as `encode` does, on all cores unless ``TOKENIZERS_PARALLELISM=false``."""
        try:
            batch = self._backend.encode(texts, parse_special)
        except (UnicodeEncodeError, TypeError, RuntimeError):  # how the libraries refuse surrogates
            batch = self._backend.encode([_LONE_SURROGATE.sub("\ufffd", text) for text in texts], parse_special)
        if not (self.add_bos if bos is None else bos):
            return batch
        if self.bos_id is None:
            raise UserError("bos: found True; expected False or None, for the tokenizer has no BOS token")
        return [[self.bos_id, *ids] for ids in batch]

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode training documents: BOS if texts begin with it, the text, EOS."""
        return [[*ids, self.eos_id] for ids in self.encode_batch(texts)]

    def encode_document(self, text: str) -> list[int]:
        """Encode one training document as `encode_documents` does."""
        return self.encode_documents([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """Decode `ids` to text. Special tokens, and ids that only a padded embedding has, are left out."""
        skipped = self._backend.special_ids | {self.bos_id, self.eos_id, self.pad_id}
        known = self.vocab_size
        return self._backend.decode([i for i in map(int, ids) if i not in skipped and 0 <= i < known])

    @property
    def chat_template(self) -> str | None:
        """The Jinja program that writes a conversation, None if the tokenizer has none."""
        return None if self._template is None else self._template.text

    def apply_chat_template(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Write a conversation as the text that the model was tuned on.

        Args:
            messages: objects such as ``{"role": "user", "content": "Hi"}``.
            add_generation_prompt: end with the beginning of the assistant's answer.
            variables: whatever else the template knows, such as ``tools`` or ``enable_thinking``.

        Returns:
            the text; encode it with ``bos=False, parse_special=True``.

        Raises:
            UserError: no template, or one that cannot be read or refuses the messages.
        """
        if self._template is None:
            raise UserError(
                f"{self.place}: no chat template; looked for chat_template.jinja, and chat_template in "
                "tokenizer_config.json and chat_template.json: expected an instruction-tuned model"
            )
        return self._template.render(messages, add_generation_prompt, **variables)

    def with_bos(self, choice: str) -> "Tokenizer":
        """Return the tokenizer with another rule of BOS: ``"yes"``, ``"no"``, or ``"auto"`` for its own.

        Raises:
            UserError: yes, of a tokenizer without BOS.
        """
        if choice == "yes" and self.bos_id is None:
            raise UserError(f"--bos: found yes; the tokenizer of {self.place} has no BOS: expected auto or no")
        return self if choice == "auto" else replace(self, add_bos=choice == "yes")

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files into the existing `directory`."""
        for name, content in self.files.items():
            (Path(directory) / name).write_bytes(content)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Read the tokenizer in a checkpoint (Hugging Face's or ours), a tokenizer directory or a GGUF file.

    BOS is the token that the tokenizer's own files name, else `config.json`'s, else the SentencePiece model's. Whether
    it begins a text: as the post-processor of `tokenizer.json` has it, which is how transformers does it, else as
    `add_bos_token` in `tokenizer_config.json`, else as the family that `config.json` names. Where these disagree, a
    warning says what was taken.

    EOS is the first of `config.json`'s, else the tokenizer's `eos_token`. An instruction-tuned model has several, and
    its `eos_token` is the one that ends a turn of a chat (Llama 3.1's ``<|eot_id|>``) while its config lists the one
    that ended documents in pretraining first (``<|end_of_text|>``). Added tokens are taken from
    `tokenizer_config.json`, `tokenizer.json` and `added_tokens.json`.

    Raises:
        UserError: no such directory, no tokenizer in it, a file that cannot be read, an unknown EOS,
            or special-token ids that the vocabulary does not have.
    """
    return _load(_open_files(Path(directory)))


def _open_files(directory: Path) -> TokenizerFiles:
    if is_gguf(directory):
        return TokenizerFiles(directory, gguf_tokenizer_files(GGUFFile(directory)))
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; expected one with tokenizer files, or a GGUF file")
    return TokenizerFiles(directory)


def _load(files: TokenizerFiles) -> Tokenizer:
    directory = files.directory
    backend, source = _load_backend(files)
    special = _special_ids(files, backend, source)
    eos_id = special["eos"]
    if eos_id is None:
        raise UserError(
            f"{directory}: the end-of-sequence token is unknown; expected eos_token_id in config.json "
            "or eos_token in tokenizer_config.json"
        )
    add_bos, bos_id = _bos_rule(files, backend, special["bos"])
    names = files.named_tokens()
    for role, token_id in (("bos", bos_id), ("eos", eos_id)):
        token = None if token_id is None or files.names(role) else backend.token(token_id)
        if token is not None:
            names.setdefault(f"{role}_token", token)
    return Tokenizer(
        vocab_size=backend.vocab_size,
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=special["pad"],
        stop_ids=files.stop_ids() or (eos_id,),
        add_bos=add_bos,
        sha256=hashlib.sha256(files.content(source)).hexdigest(),
        files=files.carried(),
        place=directory,
        _template=find_chat_template(files, names),
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
    """Load the tokenizer in `directory` (or GGUF file), None if it has none.

    Raises:
        UserError: it has one that cannot be read, or whose ids exceed the `vocab_size` embedding rows.
    """
    files = _open_files(directory)
    if not any(name in files for name in ("tokenizer.model", "tokenizer.json")):
        return None
    tokenizer = _load(files)
    check_vocab(tokenizer, vocab_size, directory)
    return tokenizer


def _load_backend(files: TokenizerFiles) -> tuple[Backend, str]:
    """Return the tokenizer and the name of its file."""
    added, special = files.added_tokens(), files.special_strings()
    name = "tokenizer.model"
    if name in files:
        legacy = files.tokenizer_config.get("legacy") is True
        return SentencePieceBackend(
            files.directory / name, files.content(name), added, special,
            legacy=legacy, tokenizer_json=files.tokenizer_json,
        ), name  # fmt: skip
    name = "tokenizer.json"
    if name in files:
        return TokenizersBackend(files.directory / name, files.content(name), added, special), name
    raise UserError(f"{files.directory}: no tokenizer; looked for tokenizer.model and tokenizer.json")


def _special_ids(files: TokenizerFiles, backend: Backend, source: str) -> dict[str, int | None]:
    """Find the ids of BOS, EOS and padding; None where there is no such token."""
    special: dict[str, int | None] = {}
    for role in _ROLES:
        configured = files.config_id(role)
        if configured is not None and not 0 <= configured < backend.vocab_size:
            raise UserError(
                f"{files.directory}: {role}_token_id is {configured}; expected an id of {source}, "
                f"below {backend.vocab_size}"
            )
        token = files.special_token(role)
        named = None if token is None else backend.token_id(token)
        if token is not None and named is None and role != "pad" and (role == "bos" or configured is None):
            raise UserError(f"{files.directory}: {role}_token {token!r} is not in the vocabulary of {source}")
        if role == "bos" and files.names(role):
            # Null says that there is none: the config.json of Qwen has an id all the same.
            special[role] = named
        else:
            special[role] = next((i for i in (configured, named, backend.own_id(role)) if i is not None), None)
    return special


def _bos_rule(files: TokenizerFiles, backend: Backend, bos_id: int | None) -> tuple[bool, int | None]:
    """Decide whether texts begin with BOS, and with which id; print a notice where files or family disagree."""
    explicit = files.tokenizer_config.get("add_bos_token")
    expected = FAMILY_ADDS_BOS.get(files.family or "")
    leading = backend.leading_ids()
    if leading is not None:
        source, adds = "tokenizer.json", bool(leading)
        bos_id = leading[0] if leading else bos_id
    elif isinstance(explicit, bool):
        source, adds = "tokenizer_config.json", explicit
    else:
        return (bos_id is not None if expected is None else expected and bos_id is not None), bos_id
    adds = adds and bos_id is not None
    others = []
    if isinstance(explicit, bool) and explicit != adds:
        others.append(f"add_bos_token in tokenizer_config.json is {str(explicit).lower()}")
    if expected is not None and expected != adds:
        others.append(f"{files.family} models mostly begin {'with' if expected else 'without'} one")
    if others:
        log.warning(
            "%s: texts begin %s BOS, as in transformers, though %s (--bos, where a command has it, decides otherwise)",
            files.directory / source, "with" if adds else "without", " and ".join(others),
        )  # fmt: skip
    return adds, bos_id
