"""Show the text of a token shard's tokens, document by document.

python -m rrt.shards data/train-00000.bin --start 4096 --count 2049 --tokenizer models/gemma-2b
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rrt.common.cli import CommandParser, run_command
from rrt.data.shards import META_FILE, open_shards
from rrt.data.tokenizer import Tokenizer, load_tokenizer
from rrt.errors import UserError


def show_text(path: Path, start: int, count: int, tokenizer: Tokenizer) -> str:
    """Decode tokens `start` to `start + count` of the shard file `path`, document by document.

    Raises:
        UserError: not a shard of a directory that `prepare_data.py` wrote, or tokens that it does not have, or
            another tokenizer's.
    """
    if path.is_dir():
        raise UserError(f"{path}: found a directory; expected one of its .bin files, such as train-00000.bin")
    split = path.name.rpartition("-")[0]
    if not split:
        raise UserError(f"{path}: not the name of a shard; expected one such as train-00000.bin")
    shards = open_shards(path.parent, split)
    shards.check_tokenizer(tokenizer)
    shard = next((shard for shard in shards.shards if shard.path == path), None)
    if shard is None:
        raise UserError(f"{path}: not one of the shards in {path.parent / META_FILE}")
    stop = start + count
    if not 0 <= start < stop <= len(shard.tokens):
        raise UserError(f"{path}: found tokens {start} to {stop}; expected some of 0 to {len(shard.tokens)}")
    first = int(np.searchsorted(shard.starts, start, side="right")) - 1
    last = int(np.searchsorted(shard.starts, stop, side="left"))
    pieces = []
    for document in range(first, last):
        begins, ends = int(shard.starts[document]), int(shard.starts[document]) + len(shard.document(document))
        shown = shard.tokens[max(start, begins) : min(stop, ends)]
        pieces.append(f"--- document {document}, tokens {begins} to {ends}\n{tokenizer.decode(shown.tolist())}")
    return "\n".join(pieces)


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``python -m rrt.shards``; see the head of this file."""
    parser = CommandParser(prog="python -m rrt.shards", description="Show the text of a shard's tokens.")
    parser.add_argument("shard", type=Path, help="a .bin file of a shard directory")
    parser.add_argument("--start", type=int, default=0, metavar="N", help="first token (default: 0)")
    parser.add_argument("--count", type=int, default=2048, metavar="N", help="tokens (default: 2048)")
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="tokenizer that made the shards")
    arguments = parser.parse_args(argv)
    print(show_text(arguments.shard, arguments.start, arguments.count, load_tokenizer(arguments.tokenizer)))


if __name__ == "__main__":
    run_command(main)
