"""Perplexity of a bigram model, a baseline that a trained model must clearly beat:
python eval/bigram.py --train runs/out/demo-scratch/data --data runs/out/demo-scratch/data

Counts token pairs of one split and predicts every token of another from the token before it, with absolute discounting
of the pair counts, interpolated with the unigram distribution; unigrams are smoothed by one.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.tables import Table
from rrt.common.cli import CommandParser, run_command
from rrt.common.results import write_result
from rrt.data.shards import TokenShards, open_shards
from rrt.errors import UserError

DISCOUNT = 0.75


def _concatenate(shards: TokenShards) -> np.ndarray:
    return np.concatenate([shard.tokens for shard in shards.shards]).astype(np.int64)


def bigram_loss(train: np.ndarray, test: np.ndarray, vocab_size: int) -> float:
    """Return the mean negative log-likelihood (nats) of test[1:], each token given the one before it."""
    pairs, counts = np.unique(train[:-1] * vocab_size + train[1:], return_counts=True)
    first = pairs // vocab_size
    context_count = np.bincount(first, weights=counts, minlength=vocab_size)
    context_types = np.bincount(first, minlength=vocab_size)
    unigram = np.bincount(train, minlength=vocab_size) + 1.0
    unigram /= unigram.sum()

    wanted = test[:-1] * vocab_size + test[1:]
    place = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    count = np.where(pairs[place] == wanted, counts[place], 0)
    total = np.maximum(context_count[test[:-1]], 1)
    # A context never seen leaves all its mass to the unigrams.
    backoff = np.where(context_count[test[:-1]] > 0, DISCOUNT * context_types[test[:-1]] / total, 1.0)
    probability = np.maximum(count - DISCOUNT, 0) / total + backoff * unigram[test[1:]]
    return float(-np.log(probability).mean())


def tables(result: dict[str, Any]) -> list[Table]:
    """Make the table of the result's one perplexity."""
    row = [result["data"], result["split"], f"{result['tokens']:,}", f"{result['loss']:.5f}"]
    header = ["bigram model of", "split", "tokens", "loss", "perplexity"]
    return [Table("", header, [[*row, f"{result['perplexity']:.4f}"]], (0, 1))]


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="token shards to count")
    parser.add_argument("--train-split", default="train", help="split to count (default train)")
    parser.add_argument("--data", required=True, help="token shards to predict")
    parser.add_argument("--split", default="heldout", help="split to predict (default heldout)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result here")
    arguments = parser.parse_args()
    train, test = open_shards(arguments.train, arguments.train_split), open_shards(arguments.data, arguments.split)
    if train.tokenizer_sha256 != test.tokenizer_sha256:
        raise UserError(f"{arguments.data}: made with another tokenizer than {arguments.train}; expected the same")
    for shards in (train, test):
        if shards.num_tokens < 2:
            raise UserError(f"{shards.directory}: split '{shards.split}' has no text; expected at least two tokens")
    loss = bigram_loss(_concatenate(train), _concatenate(test), train.vocab_size)
    result: dict[str, Any] = {
        "kind": "bigram",
        "data": arguments.data,
        "split": arguments.split,
        "tokens": test.num_tokens - 1,
    }
    result |= {"loss": loss, "perplexity": math.exp(loss)}
    if arguments.json is not None:
        write_result(arguments.json, result)
    print(f"bigram model of {arguments.train}: perplexity {math.exp(loss):.4f} over {test.num_tokens - 1:,} tokens")


if __name__ == "__main__":
    run_command(main)
