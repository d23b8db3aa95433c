"""Tiny tokenizers in the layouts that the base models publish, trained on the spot."""

import contextlib
import io
import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

GEMMA_SYMBOLS = ["<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁▁"]
SPECIAL_TOKENS = {
    "gemma": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"},
    "llama": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "gpt_neox": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"},
}
TOKENIZER_CLASSES = {"gemma": "GemmaTokenizer", "llama": "LlamaTokenizer", "gpt_neox": "GPTNeoXTokenizer"}

KINDS = ("sp-gemma", "sp-llama", "json-gemma", "json-llama", "json-gpt_neox", "trained")
TEXTS = (
    "",
    " ",
    "  two leading spaces",
    "no leading space",
    "a\n\nb\n\n\n\n\nc\r\n\td    e     f",
    "\n",
    "nul \x00 and escape \x1b",
    "Zürich, Ελλάδα, 日本語, العربية",
    "emoji 🎉 and family 👨‍👩‍👧",
    "1234567890" * 3,
)


def training_texts() -> list[str]:
    """Read a few files of the standard library."""
    package = Path(sysconfig.get_path("stdlib")) / "json"
    return [path.read_text(encoding="utf-8") for path in sorted(package.glob("*.py"))]


def make_sentencepiece_tokenizer(directory: Path, family: str = "llama", vocab_size: int = 420) -> Path:
    """Write `tokenizer.model` and `tokenizer_config.json` as google/gemma-2b ("gemma") or TinyLlama ("llama") do."""
    directory.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any]
    if family == "gemma":
        settings = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "add_dummy_prefix": False}
        settings |= {"pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>"}
        settings |= {"user_defined_symbols": GEMMA_SYMBOLS}
    else:
        settings = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in training_texts() for line in text.split("\n") if line.strip()),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=2,
        **settings,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    _write_config(directory, family)
    return directory


def make_bpe_tokenizer(directory: Path, family: str = "gpt_neox", vocab_size: int = 420) -> Path:
    """Write `tokenizer.json` and `tokenizer_config.json` as Pythia, TinyLlama or Gemma do.

    For "llama" and "gemma" it is the conversion of what `make_sentencepiece_tokenizer` trains.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = (
        _neox_tokenizer(vocab_size) if family == "gpt_neox" else _converted_tokenizer(directory, family, vocab_size)
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_config(directory, family)
    return directory


def write_hf_config(directory: Path, family: str, **fields: Any) -> None:
    """Write a `config.json` with the fields that a tokenizer needs."""
    (directory / "config.json").write_text(json.dumps({"model_type": family, **fields}))


def set_config(directory: Path, **changes: object) -> None:
    """Change fields of `tokenizer_config.json`."""
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _write_config(directory: Path, family: str) -> None:
    config = {"tokenizer_class": TOKENIZER_CLASSES[family], **SPECIAL_TOKENS[family]}
    if family != "gpt_neox":
        config["add_bos_token"] = True
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def _neox_tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    space_runs = [" " * length for length in (8, 4, 2)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(space_runs),
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_texts(), trainer)
    tokenizer.add_tokens([AddedToken(run, normalized=True) for run in space_runs])
    return tokenizer


def _converted_tokenizer(directory: Path, family: str, vocab_size: int) -> tokenizers.Tokenizer:
    make_sentencepiece_tokenizer(directory, family, vocab_size)
    model_file = directory / "tokenizer.model"
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    model_file.unlink()
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = _merges(processor, vocab, GEMMA_SYMBOLS if family == "gemma" else [])
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    spaces = [normalizers.Replace(" ", "▁")]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if family == "llama":
        spaces.insert(0, normalizers.Prepend("▁"))
        steps.append(decoders.Strip(content=" ", left=1))
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(steps)
    bos = SPECIAL_TOKENS[family]["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, vocab[bos])])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIAL_TOKENS[family].values()])
    if family == "gemma":
        tokenizer.add_tokens([AddedToken(symbol, normalized=False) for symbol in GEMMA_SYMBOLS])
    return tokenizer


def _merges(processor: Any, vocab: dict[str, int], symbols: list[str]) -> list[tuple[str, str]]:
    """List the merges of a SentencePiece BPE: each piece's splits in two, in the order in which pieces win.

    Runs of spaces that are symbols win first; other symbols are found before merging.
    """

    def mergeable(piece: str) -> bool:
        i = vocab[piece]
        if piece in symbols:
            return piece.strip("▁") == ""
        return not (processor.is_control(i) or processor.is_byte(i) or processor.is_unknown(i))

    ordinary = {piece for piece in vocab if mergeable(piece)}
    ranked = sorted(
        ordinary, key=lambda piece: (piece not in symbols, -processor.get_score(vocab[piece]), vocab[piece])
    )
    return [
        (piece[:cut], piece[cut:])
        for piece in ranked
        for cut in range(1, len(piece))
        if piece[:cut] in ordinary and piece[cut:] in ordinary
    ]


@contextlib.contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Set environment variables for the length of a block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
