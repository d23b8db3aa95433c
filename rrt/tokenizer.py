"""Train a byte-level BPE tokenizer on text files.

python -m rrt.tokenizer train --input python-stdlib --vocab-size 2048 --out runs/out/tokenizer
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rrt.common.cli import CommandParser, run_command
from rrt.common.files import atomic_directory, check_output_directory
from rrt.data.bpe import train_bpe
from rrt.data.corpus import INPUT_HELP, TextFilter, documents, skipped_notice
from rrt.data.tokenizer import load_tokenizer


def _train_command(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    check_output_directory(out, arguments.overwrite)
    text_filter = TextFilter(arguments.strict)
    texts = documents(arguments.input, text_field=arguments.text_field, text_filter=text_filter)
    print(f"training a byte-level BPE of {arguments.vocab_size} ids on {' '.join(arguments.input)}")
    with atomic_directory(out, arguments.overwrite) as directory:
        train_bpe(texts, arguments.vocab_size, directory, progress=sys.stderr.isatty())
        trained = load_tokenizer(directory)
    if text_filter.skipped:
        print(skipped_notice(text_filter.skipped))
    print(f"wrote {out}: {trained.vocab_size} ids, BOS {trained.bos_id}, EOS {trained.eos_id}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``python -m rrt.tokenizer``; see the head of this file."""
    parser = CommandParser(prog="python -m rrt.tokenizer", description="Train a tokenizer.")
    commands = parser.add_subparsers(required=True)
    train = commands.add_parser("train", help="train a byte-level BPE and write a tokenizer directory")
    train.add_argument("--input", nargs="+", required=True, metavar="GLOB", help=INPUT_HELP)
    train.add_argument("--vocab-size", type=int, required=True, metavar="N", help="ids, special tokens included")
    train.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to create")
    train.add_argument("--text-field", default="text", metavar="NAME", help="JSON field (default: text)")
    train.add_argument(
        "--strict", action="store_true", help="refuse records whose text is null or empty, instead of skipping them"
    )
    train.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    train.set_defaults(run=_train_command)
    arguments = parser.parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    run_command(main)
