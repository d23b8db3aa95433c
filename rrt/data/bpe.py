"""Training of a byte-level BPE tokenizer."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from rrt.common.files import atomic_write, write_json
from rrt.errors import UserError


def train_bpe(texts: Iterable[str], vocab_size: int, directory: Path, *, progress: bool = False) -> None:
    """Train a byte-level BPE on `texts` and write it into the existing `directory`.

    Every text can be encoded and is decoded exactly. ``<s>`` (id 0) starts a sequence and ``</s>`` (1)
    ends it, as in the Llama family; transformers' `AutoTokenizer` reads the directory too. A corpus
    too small for `vocab_size` gives a smaller vocabulary.

    Raises:
        UserError: `vocab_size` has no room for the 256 bytes and 2 special tokens, or no text came.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 2
    if vocab_size < smallest:
        raise UserError(f"vocab size is {vocab_size}; expected at least {smallest} (256 bytes, <s> and </s>)")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(alphabet),
        show_progress=progress,
    )
    seen = _CountedTexts(texts)
    tokenizer.train_from_iterator(iter(seen), trainer)
    if seen.characters == 0:
        raise UserError("no text to train a tokenizer on; expected at least one document that is not empty")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]
    )
    # Not by its `save`, whose error on a full disk is a bare `Exception`.
    atomic_write(directory / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_json(
        directory / "tokenizer_config.json",
        {
            # Naming LlamaTokenizer would make transformers rebuild it as a SentencePiece conversion.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": True,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "clean_up_tokenization_spaces": False,
        },
    )


class _CountedTexts:
    """Texts passed on with a count of their characters, to detect an empty corpus."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = texts
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for text in self._texts:
            self.characters += len(text)
            yield text
