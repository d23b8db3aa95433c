"""Perplexity of every exit: python eval/perplexity.py --checkpoint runs/out/demo/relaxed --data runs/out/demo/data

Works on HF directories, vanilla, recursive and relaxed checkpoints, over token shards (of the model's own tokenizer)
or over text (.txt, .py, ...), .jsonl, .jsonl.zst, .jsonl.gz and .parquet files, which are tokenised on the way. One
pass over the data measures the exit after each loop, and each group of documents by itself (SlimPajama's subsets).
With `torchrun --nproc-per-node N eval/perplexity.py ...` N processes share the work.

packed: the documents, each with BOS and EOS as in training, are joined into one stream and cut into windows of
`--context` tokens; every token of the stream but the first is predicted exactly once, from the tokens before it in its
window. For tokenizers that add BOS every window begins with it, in place of the token before the window's first
target, as in training: Gemma without it is far off. `--bos no` keeps that token.
document: each document by itself, in windows of `--context`; its EOS is a target too. Windows begin as in packed, also
those in the middle of a document.
The table and "bos" in --json say which it was. Records without text are skipped and counted.

If the data turns out damaged midway, --json gets the figures up to there, with "complete": false.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.flags import add_stream_flags, check_least, check_output_file, choose_bos, choose_context, choose_exit
from eval.stream import (
    PAD,
    Corpus,
    Document,
    Window,
    batches,
    document_windows,
    make_batch,
    packed_windows,
    score_exits,
)
from eval.tables import Table, print_tables
from rrt.checkpoint.source import load_model, open_source
from rrt.common.cli import CommandParser, run_command
from rrt.common.dtypes import add_dtype_flag, chosen_dtype, dtype_name
from rrt.common.processes import Replica, replicas, report_error_once
from rrt.common.results import write_result
from rrt.data.corpus import skipped_notice
from rrt.data.tokenizer import check_vocab, load_tokenizer
from rrt.errors import UserError
from rrt.model.sizes import model_sizes


class LossSums:
    """Sums of losses (nats, fp64) [E, G], of targets [G] and of bytes of text [G], for exits E and groups G."""

    def __init__(self, num_exits: int) -> None:
        self.loss = torch.zeros(num_exits, 0, dtype=torch.float64)
        self.tokens = torch.zeros(0, dtype=torch.float64)
        self.text_bytes = torch.zeros(0, dtype=torch.float64)

    def make_room(self, num_groups: int) -> None:
        """Grow to this many groups."""
        more = num_groups - self.tokens.shape[0]
        if more:
            self.loss, self.tokens, self.text_bytes = (
                F.pad(sums, (0, more)) for sums in (self.loss, self.tokens, self.text_bytes)
            )

    def add(self, losses: Tensor, groups: Tensor) -> None:
        """Add losses [E, N] of targets in the groups [N]."""
        self.loss.index_add_(1, groups, losses.double().cpu())
        self.tokens += torch.bincount(groups, minlength=self.tokens.shape[0])

    def gather(self, replica: Replica) -> None:
        """Add up losses and targets of all processes; bytes are whole already, as each process reads all text."""
        self.loss, self.tokens = replica.sum(self.loss), replica.sum(self.tokens)

    def figures(self, loops: range, group: int | None = None, *, with_bytes: bool = True) -> list[dict[str, Any]]:
        """Compute mean loss, perplexity and bits per byte (None without bytes) of each exit, over one group or all."""
        groups = slice(None) if group is None else slice(group, group + 1)
        tokens, text_bytes = float(self.tokens[groups].sum()), float(self.text_bytes[groups].sum())
        rows = []
        for loop, loss in zip(loops, self.loss[:, groups].sum(1).tolist(), strict=True):
            bits = loss / math.log(2) / text_bytes if with_bytes and text_bytes else None
            mean = loss / tokens
            rows.append({"loop": loop, "loss": mean, "perplexity": perplexity(mean), "bits_per_byte": bits})
        return rows


def target_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy [n] in nats of logits [n, V]."""
    return F.cross_entropy(logits, targets, reduction="none")


def perplexity(loss: float) -> float:
    """Return exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def evaluate(arguments: argparse.Namespace, replica: Replica) -> tuple[dict[str, Any], UserError | None]:
    """Measure, and return the result and the error that ended it early, if any."""
    source = open_source(arguments.checkpoint)
    tokenizer = load_tokenizer(arguments.checkpoint)
    check_vocab(tokenizer, source.model.vocab_size, arguments.checkpoint)
    context = choose_context(arguments, source.model.context_length)
    check_least("--max-tokens", arguments.max_tokens)
    limit = math.inf if arguments.max_tokens is None else arguments.max_tokens
    last = choose_exit(source, arguments.exit_loop)
    every_exit = arguments.exit_loop is None and source.recursion.runs_whole_loops
    loops = range(0 if every_exit else last, last + 1)
    corpus = Corpus(arguments.data, arguments.split, arguments.text_field, arguments.group_field, tokenizer)
    bos_id = choose_bos(arguments, tokenizer)
    check_output_file("--json", arguments.json)
    dtype = chosen_dtype(arguments) or source.dtype
    model = load_model(arguments.checkpoint, dtype, replica.device)
    model.set_merge(True)

    sums, began, dealt = LossSums(len(loops)), time.perf_counter(), 0

    def documents() -> Iterator[Document]:
        for document in corpus.documents():
            sums.make_room(len(corpus.groups))
            sums.text_bytes[document.group] += document.text_bytes
            yield document

    def windows() -> Iterator[Window]:
        if arguments.mode == "packed":
            return packed_windows(documents(), context)
        return document_windows(documents(), context, bos_id)

    stopped, is_finite = None, True
    with tqdm(unit="tok", unit_scale=True, desc="perplexity", disable=None if replica.is_main else True) as bar:
        try:
            # Every process reads all of the data and computes its share of the batches.
            for index, chosen in enumerate(batches(windows(), context, arguments.batch_size)):
                dealt += sum(window.shape[1] - 1 for window in chosen)
                if is_finite and index % replica.count == replica.rank:
                    batch = make_batch(chosen, bos_id)
                    losses = score_exits(model, batch, loops, target_losses)
                    sums.add(losses, batch.groups[batch.targets != PAD])
                    is_finite = bool(losses.isfinite().all())
                    bar.set_postfix(ppl=f"{perplexity(float(sums.loss[-1].sum() / sums.tokens.sum())):.3f}")
                bar.total = None if corpus.num_tokens is None else max(dealt, min(corpus.num_tokens, limit))
                bar.update(dealt - bar.n)
                # One of several processes reads on: to add up their sums, all need to know every group.
                if dealt >= limit or (not is_finite and replica.count == 1):
                    break
        except UserError as error:
            stopped = error
    sums.gather(replica)
    count = int(sums.tokens.sum())
    if count == 0:
        raise stopped or UserError(f"{arguments.data}: found no text; expected at least two tokens")
    if not sums.loss.isfinite().all():
        raise UserError(
            f"{arguments.checkpoint}: the loss is {float(sums.loss.sum())} after {count:,} tokens in "
            f"{dtype_name(dtype)}; expected a finite number: try --dtype float32 or bfloat16"
        )
    # A limit in tokens, or an error, cuts a document, of whose part the bytes are unknown.
    with_bytes = stopped is None and arguments.max_tokens is None
    exits = sums.figures(loops, with_bytes=with_bytes)
    groups = {
        name: {"tokens": int(sums.tokens[group]), "exits": sums.figures(loops, group, with_bytes=with_bytes)}
        for group, name in enumerate(corpus.groups)
        if sums.tokens[group] > 0
    }
    return {
        "kind": "perplexity",
        "checkpoint": str(arguments.checkpoint),
        "data": str(arguments.data),
        "split": arguments.split,
        "complete": stopped is None,
        "mode": arguments.mode,
        "non_embedding_params": model_sizes(source.model, source.recursion, dtype).non_embedding_params,
        "num_loops": source.recursion.num_loops,
        "context": context,
        "bos": bos_id is not None,
        "records_without_text": corpus.text_filter.skipped,
        "dtype": dtype_name(dtype),
        "tokens": count,
        "exits": exits,
        "groups": groups if set(groups) != {""} else {},
        "exit_loop": loops[-1],
        **{name: exits[-1][name] for name in ("loss", "perplexity", "bits_per_byte")},
        "processes": replica.count,
        "tokens_per_second": count / (time.perf_counter() - began),
    }, stopped


def tables(result: dict[str, Any]) -> list[Table]:
    """Make a table with a row per exit, of all tokens and of each group."""
    groups = {"all": {"tokens": result["tokens"], "exits": result["exits"]}, **result["groups"]}
    rows = [
        [
            name or "(none)",
            f"{group['tokens']:,}",
            str(row["loop"]),
            f"{row['perplexity']:.4f}",
            f"{row['loss']:.5f}",
            "" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}",
        ]
        for name, group in groups.items()
        for row in group["exits"]
    ]
    title = (
        f"{result['checkpoint']}: {result['tokens']:,} tokens, {result['mode']}, context {result['context']}, "
        f"{'BOS before every window' if result['bos'] else 'no BOS before windows'}, "
        f"{result['dtype']}, {result['tokens_per_second']:,.0f} tok/s"
    )
    return [Table(title, ["group", "tokens", "exit after loop", "perplexity", "nats", "bits/byte"], rows)]


@report_error_once
def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_stream_flags(parser)
    parser.add_argument(
        "--mode", choices=("packed", "document"), default="packed", help="see above (default packed, as in the paper)"
    )
    parser.add_argument(
        "--exit-loop", type=int, metavar="N", help="only the exit after loop N, counted from 0 (default: all loops)"
    )
    parser.add_argument(
        "--group-field", metavar="F", help="path to a record's group (default meta.redpajama_set_name where present)"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="stop after the batch that reaches N tokens")
    add_dtype_flag(parser, "dtype to compute in")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result here")
    arguments = parser.parse_args()
    with replicas(arguments.device) as replica:
        result, stopped = evaluate(arguments, replica)
        if replica.is_main:
            if result["records_without_text"]:
                print(f"notice: {arguments.data}: {skipped_notice(result['records_without_text'])}", file=sys.stderr)
            if arguments.json is not None:
                write_result(arguments.json, result, replica.device)
            print_tables(tables(result))
        replica.wait(stopped)  # torchrun ends all processes when one ends: not before the result is written


if __name__ == "__main__":
    run_command(main)
