"""Flags that the evaluation commands share, and checks of their values before any work."""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from rrt.checkpoint.source import Source
from rrt.data.tokenizer import Tokenizer
from rrt.errors import UserError


def add_stream_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a checkpoint, a corpus and its windows."""
    parser.add_argument(
        "--checkpoint", required=True, help="HF model directory, .gguf file or checkpoint of this package"
    )
    parser.add_argument("--data", required=True, help="token shard directory, or files (a name or a glob)")
    parser.add_argument("--split", default="heldout", help="split of the shards, or of python-stdlib (default heldout)")
    parser.add_argument("--text-field", default="text", help="field of a record that is the document (default text)")
    parser.add_argument(
        "--context", type=int, metavar="T", help="most positions of a window (default 2048 or the model's maximum)"
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="windows of --context positions per forward (default 8)"
    )
    parser.add_argument(
        "--bos",
        choices=("auto", "yes", "no"),
        default="auto",
        help="begin windows with BOS (default auto: as the tokenizer's files say, else its family)",
    )
    add_device_flag(parser)


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where available)")


def choose_context(arguments: argparse.Namespace, longest: int) -> int:
    """Check --batch-size, and return --context, at most `longest`."""
    context: int = min(2048, longest) if arguments.context is None else arguments.context
    if not 0 < context <= longest:
        raise UserError(f"--context: found {context}; expected a positive number, at most context_length = {longest}")
    check_least("--batch-size", arguments.batch_size)
    return context


def check_least(flag: str, value: int | None, least: int = 1) -> None:
    """Refuse a number below `least`; None stands for a flag that was not given."""
    if value is not None and value < least:
        raise UserError(f"{flag}: found {value}; expected {least} or more")


def choose_exit(source: Source, exit_loop: int | None) -> int:
    """Return the loop after which to exit, the last by default.

    Raises:
        UserError: `source` has no exits, or none after that loop.
    """
    num_loops = source.recursion.num_loops
    if exit_loop is None:
        return num_loops - 1
    if num_loops == 1:
        raise UserError(
            f"--exit-loop: found {exit_loop}; {source.directory} is not looped and has no exits: expected none"
        )
    if not 0 <= exit_loop < num_loops:
        raise UserError(
            f"--exit-loop: found {exit_loop}; {source.directory} has {num_loops} loops: expected 0 to {num_loops - 1}"
        )
    if exit_loop != num_loops - 1:
        source.recursion.require_whole_loops(f"--exit-loop: found {exit_loop}; {source.directory} was made")
    return exit_loop


def notice_untrained(source: Source, loops: Iterable[int]) -> None:
    """Print a notice that names exits, of those after these loops, that were not trained."""
    exits = (*source.recursion.exit_loops, source.recursion.num_loops - 1)
    if untrained := ", ".join(str(loop) for loop in loops if loop not in exits):
        print(f"notice: {source.directory}: exits that were not trained: after loop {untrained}", file=sys.stderr)


def choose_bos(arguments: argparse.Namespace, tokenizer: Tokenizer) -> int | None:
    """Return the BOS that texts and windows begin with, or None."""
    tokenizer = tokenizer.with_bos(arguments.bos)
    return tokenizer.bos_id if tokenizer.add_bos else None


def check_output_file(flag: str, path: Path | None) -> None:
    """Refuse an output file that could not be written, before any work."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise UserError(f"{flag}: found {path}; expected a file in a directory that exists")
