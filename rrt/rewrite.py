"""What the commands share that read one checkpoint directory and write another."""

from pathlib import Path

from rrt.common.files import check_output_directory
from rrt.errors import UserError
from rrt.tokenizer import Tokenizer, check_vocab, load_tokenizer


def check_output(out: Path, source: Path, overwrite: bool) -> None:
    """Refuse to write over the directory that is read, or an `out` that `check_output_directory` refuses."""
    if source.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out}: holds the checkpoint that is read, {source}; expected another directory")
    check_output_directory(out, overwrite)


def tokenizer_of(directory: Path, vocab_size: int) -> Tokenizer | None:
    """The tokenizer in `directory`, None if it has none.

    Raises:
        UserError: it has one that cannot be read, or whose ids exceed the `vocab_size` embedding rows.
    """
    if not any((directory / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        return None
    tokenizer = load_tokenizer(directory)
    check_vocab(tokenizer, vocab_size, directory)
    return tokenizer
