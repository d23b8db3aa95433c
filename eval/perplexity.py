"""Token perplexity: python eval/perplexity.py --checkpoint runs/out/demo/base/final --data runs/out/demo/data

Works on HF directories, vanilla, recursive and relaxed checkpoints, over token shards (of the model's own
tokenizer) or over text (.txt, .py, ...), .jsonl, .jsonl.zst and .jsonl.gz files, which are tokenised on the way.

The documents, each with the BOS and EOS that training gives it, are joined into one stream and cut into blocks of
`--context` tokens; every token of the stream but the first is predicted exactly once, from the tokens before it in
its block. The last block may be shorter. For families that have BOS (Gemma, Llama) every block begins with it, in
place of the token before the block's first target, as in training; `--bos no` keeps that token.
"""

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rrt.cli import run_command
from rrt.corpus import documents
from rrt.errors import UserError
from rrt.loaders import load_model, open_source
from rrt.model import RecursiveTransformer
from rrt.recursive_args import add_dtype_flag, chosen_dtype
from rrt.results import write_result
from rrt.shards import open_shards
from rrt.tensors import dtype_name
from rrt.tokenizer import Tokenizer, check_vocab, load_tokenizer

Pieces = Iterable[tuple[np.ndarray, int]]
"""Consecutive pieces of a token stream, each with the bytes of text that it encodes."""


def shard_pieces(directory: Path, split: str, tokenizer: Tokenizer) -> tuple[Pieces, int]:
    """The stream of a split of token shards, and its length in tokens."""
    shards = open_shards(directory, split)
    shards.check_tokenizer(tokenizer)
    return ((shard.tokens, shard.text_bytes) for shard in shards.shards), shards.num_tokens


def text_pieces(path: str, text_field: str, tokenizer: Tokenizer) -> Pieces:
    """The stream of text files, tokenised a batch of documents at a time."""
    texts_left = documents(path, split="heldout", text_field=text_field)
    while texts := list(itertools.islice(texts_left, 64)):
        for text, ids in zip(texts, tokenizer.encode_documents(texts), strict=True):
            yield np.asarray(ids), len(text.encode("utf-8", "replace"))


def blocks(stream: Iterable[np.ndarray], context: int) -> Iterator[np.ndarray]:
    """Cut a stream into blocks of `context + 1` tokens that overlap by one; the last may be shorter."""
    held = np.empty(0, dtype=np.int64)
    for piece in stream:
        start = 0
        while start < len(piece):
            room = context + 1 - len(held)
            held = np.concatenate((held, piece[start : start + room].astype(np.int64)))
            start += room
            if len(held) == context + 1:
                yield held
                held = held[-1:]
    if len(held) > 1:
        yield held


def batches(stream: Iterable[np.ndarray], context: int, batch_size: int) -> Iterator[Tensor]:
    """Blocks stacked into [batch, context + 1]; a shorter last block comes alone."""
    for _, group in itertools.groupby(blocks(stream, context), key=len):
        while rows := list(itertools.islice(group, batch_size)):
            yield torch.from_numpy(np.stack(rows))


@torch.no_grad()
def block_loss(
    model: RecursiveTransformer, tokens: Tensor, exit_loop: int | None, head_rows: int, bos_id: int | None
) -> float:
    """Summed negative log-likelihood (nats) of `tokens[:, 1:]` [batch, T + 1] given what precedes in each row.

    `bos_id`, if any, takes the place of each row's first token.

    The head runs on `head_rows` positions at a time: logits of a whole batch would not fit with a large vocabulary.
    """
    num_loops = None if exit_loop is None else exit_loop + 1
    inputs = tokens[:, :-1].clone()
    if bos_id is not None:
        inputs[:, 0] = bos_id
    hidden = model.hidden_states(inputs, num_loops=num_loops)[-1].flatten(0, 1)
    targets = tokens[:, 1:].flatten()
    parts = zip(hidden.split(head_rows), targets.split(head_rows), strict=True)
    sums = [F.cross_entropy(model.logits(h).float(), t, reduction="sum").double() for h, t in parts]
    return float(torch.stack(sums).sum())


def _perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def pick_device(name: str) -> torch.device:
    """`name` as a device that is there; "auto" is CUDA where available."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: found {name!r}; expected one that is there ({error})".splitlines()[0]) from None


def evaluate(arguments: argparse.Namespace) -> tuple[dict[str, Any], torch.device]:
    """Measure; returns the result and the device it ran on."""
    source = open_source(arguments.checkpoint)
    tokenizer = load_tokenizer(arguments.checkpoint)
    check_vocab(tokenizer, source.model.vocab_size, arguments.checkpoint)
    longest = source.model.max_position_embeddings
    context = min(2048, longest) if arguments.context is None else arguments.context
    limits = (
        ("--context", context, longest),
        ("--batch-size", arguments.batch_size, None),
        ("--max-tokens", 1 if arguments.max_tokens is None else arguments.max_tokens, None),
    )
    for flag, value, largest in limits:
        if value < 1 or (largest is not None and value > largest):
            limit = "" if largest is None else f", at most max_position_embeddings = {largest}"
            raise UserError(f"{flag}: found {value}; expected a positive number{limit}")
    if arguments.exit_loop is not None and not 0 <= arguments.exit_loop < source.recursive.num_loops:
        raise UserError(
            f"--exit-loop: found {arguments.exit_loop}; {arguments.checkpoint} has {source.recursive.num_loops} "
            f"loop(s): expected 0 to {source.recursive.num_loops - 1}"
        )
    if Path(arguments.data).is_dir():
        pieces, total = shard_pieces(Path(arguments.data), arguments.split, tokenizer)
    else:
        pieces, total = text_pieces(arguments.data, arguments.text_field, tokenizer), None

    bos_id = tokenizer.bos_id if arguments.bos == "yes" or (arguments.bos == "auto" and tokenizer.add_bos) else None
    if arguments.bos == "yes" and bos_id is None:
        raise UserError(f"--bos: found yes; the tokenizer of {arguments.checkpoint} has no BOS: expected auto or no")
    if arguments.json is not None and (arguments.json.is_dir() or not arguments.json.absolute().parent.is_dir()):
        raise UserError(f"--json: found {arguments.json}; expected a file in a directory that exists")
    device = pick_device(arguments.device)
    dtype = chosen_dtype(arguments) or source.dtype
    model = load_model(arguments.checkpoint, dtype, device)
    model.set_merge(True)

    began, count, loss, text_bytes = time.perf_counter(), 0, 0.0, 0

    def stream() -> Iterator[np.ndarray]:
        nonlocal text_bytes
        for tokens, size in pieces:
            text_bytes += size
            yield tokens

    head_rows = max(1, 2**26 // source.model.vocab_size)  # logits of 256 MiB in fp32
    if arguments.max_tokens is not None:
        total = arguments.max_tokens if total is None else min(total, arguments.max_tokens)
    with tqdm(total=total, unit="tok", unit_scale=True, desc="perplexity", disable=None) as bar:
        for tokens in batches(stream(), context, arguments.batch_size):
            loss += block_loss(model, tokens.to(device), arguments.exit_loop, head_rows, bos_id)
            count += tokens[:, 1:].numel()
            bar.update(tokens[:, 1:].numel())
            if not loss < math.inf:
                raise UserError(
                    f"{arguments.checkpoint}: the loss is {loss} after {count:,} tokens in {dtype_name(dtype)}; "
                    "expected a finite number: try --dtype float32 or bfloat16"
                )
            bar.set_postfix(ppl=f"{_perplexity(loss / count):.3f}")
            if arguments.max_tokens is not None and count >= arguments.max_tokens:
                break
    if count == 0:
        raise UserError(f"{arguments.data}: found no text; expected at least two tokens")
    return {
        "checkpoint": str(arguments.checkpoint),
        "data": str(arguments.data),
        "split": arguments.split,
        "exit_loop": source.recursive.num_loops - 1 if arguments.exit_loop is None else arguments.exit_loop,
        "num_loops": source.recursive.num_loops,
        "context": context,
        "bos": bos_id is not None,
        "dtype": dtype_name(dtype),
        "tokens": count,
        "loss": loss / count,
        "perplexity": _perplexity(loss / count),
        # Of whole documents only: a limit in tokens cuts one, whose bytes are not known.
        "bits_per_byte": None if arguments.max_tokens is not None else loss / math.log(2) / text_bytes,
        "tokens_per_second": count / (time.perf_counter() - began),
    }, device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="HF model directory or a checkpoint of this package")
    parser.add_argument("--data", required=True, help="token shard directory, a text or JSON-lines file or glob")
    parser.add_argument("--split", default="heldout", help="split of the shards (default heldout)")
    parser.add_argument("--text-field", default="text", help="field of JSON lines that is the document (default text)")
    parser.add_argument(
        "--exit-loop", type=int, metavar="N", help="exit after loop N, counted from 0 (default: the last loop)"
    )
    parser.add_argument(
        "--context", type=int, metavar="T", help="block length, tokens (default 2048 or the model's maximum)"
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="blocks per forward (default 8)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="stop after the batch that reaches N tokens")
    parser.add_argument(
        "--bos", choices=("auto", "yes", "no"), default="auto", help="begin blocks with BOS (default auto: by family)"
    )
    add_dtype_flag(parser, "dtype to compute in")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: cuda where available)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result here")
    arguments = parser.parse_args()
    result, device = evaluate(arguments)
    bits = "" if result["bits_per_byte"] is None else f"{result['bits_per_byte']:.4f} bits/byte  "
    print(
        f"{result['checkpoint']}: perplexity {result['perplexity']:.4f}  loss {result['loss']:.5f} nats/token  "
        f"{bits}({result['tokens']:,} tokens, context {result['context']}, "
        f"exit after loop {result['exit_loop']} of 0..{result['num_loops'] - 1}, "
        f"{result['tokens_per_second']:,.0f} tok/s)"
    )
    if arguments.json is not None:
        write_result(arguments.json, result, device)


if __name__ == "__main__":
    run_command(main)
