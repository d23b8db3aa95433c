"""Data preparation against the tokenizer library alone: python bench/prepare.py --json

Both tokenise the same documents (Python's standard library, repeated) on the same number of processes. The library's
side has the documents in memory and throws its results away; ours is `train/prepare_data.py` from end to end: it reads
JSON lines, tokenises, adds BOS and EOS, and writes shards to disk. The runs alternate; figures are medians over rounds,
ratios are taken within rounds.
"""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tokenizers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.output import add_json_flag, check_json_flag, save_result
from bench.timing import RATIOS_NOTE, speedup, spread
from eval.tables import Table, format_seconds, format_spread, print_tables
from rrt.common.cli import CommandParser, human_bytes, run_command
from rrt.data.bpe import train_bpe
from rrt.data.corpus import PYTHON_STDLIB, documents
from train.prepare_data import batches, prepare_data

OURS = "prepare_data.py"


def make_corpus(text_bytes: int) -> list[str]:
    """Repeat the standard library's documents up to about `text_bytes`."""
    texts, size = [], 0
    for text in itertools.cycle(list(documents(PYTHON_STDLIB))):
        texts.append(text)
        size += len(text.encode())
        if size >= text_bytes:
            return texts
    raise AssertionError("a cycle does not end")


def encode(tokenizer: tokenizers.Tokenizer, method: str, parts: list[list[str]]) -> None:
    for part in parts:
        getattr(tokenizer, method)(part, add_special_tokens=False)


def run_library(tokenizer: tokenizers.Tokenizer, method: str, parts: list[list[str]], processes: int) -> None:
    """Encode with the library in forked processes, which share the documents."""
    context = multiprocessing.get_context("fork")
    shares = [parts[start::processes] for start in range(processes)]
    started = [context.Process(target=encode, args=(tokenizer, method, share)) for share in shares]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        raise RuntimeError("a process of the library's failed")


def run_ours(corpus_path: Path, tokenizer: Path, out: Path, workers: int) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        prepare_data([str(corpus_path)], tokenizer, out, workers=workers, overwrite=True)


def measure(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Time each run, round by round, in alternating order; the first round is warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in tqdm(range(rounds + 1), desc="rounds", mininterval=1 if sys.stderr.isatty() else 30):
        for name in list(runs) if turn % 2 else reversed(list(runs)):
            began = time.perf_counter()
            runs[name]()
            if turn > 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def tables(result: dict[str, Any]) -> list[Table]:
    """Make the table of text per second of ours and of the library's methods."""
    rows = [
        [
            name,
            format_seconds(run["seconds"]["median"]),
            format_spread(run["seconds"]),
            f"{run['bytes_per_second'] / 1e6:.2f}",
            f"{run['ours']:.2f}x",
        ]
        for name, run in result["runs"].items()
    ]
    title = (
        f"{result['documents']} documents, {human_bytes(result['text_bytes'])}, vocabulary {result['vocab_size']}, "
        f"{result['processes']} processes, {result['rounds']} rounds"
    )
    header = ["variant", "time", "+-", "MB of text/s", "ours is as fast"]
    return [Table(title, header, rows, notes=[RATIOS_NOTE])]


def main() -> None:
    parser = CommandParser(description=(__doc__ or "").splitlines()[0])
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--processes", type=int, default=cores, metavar="N", help="of both sides (default: cores)")
    parser.add_argument("--megabytes", type=int, default=40, metavar="N", help="of text (default: 40)")
    parser.add_argument("--vocab-size", type=int, default=8192, metavar="N", help="of the BPE (default: 8192)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    add_json_flag(parser, "prepare")
    arguments = parser.parse_args()
    check_json_flag(arguments.json)

    texts = make_corpus(arguments.megabytes * 10**6)
    size = sum(len(text.encode()) for text in texts)
    with tempfile.TemporaryDirectory() as work:
        directory, path = Path(work) / "tokenizer", Path(work) / "corpus.jsonl"
        directory.mkdir()
        train_bpe(documents(PYTHON_STDLIB), arguments.vocab_size, directory)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process per core is all the parallelism there is
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        parts = list(batches(texts))
        count = arguments.processes
        print(
            f"{len(texts)} documents, {human_bytes(size)}, in {count} processes; {arguments.rounds} rounds", flush=True
        )
        runs: dict[str, Callable[[], None]] = {
            OURS: partial(run_ours, path, directory, Path(work) / "out", count),
            "encode_batch": partial(run_library, tokenizer, "encode_batch", parts, count),
            "encode_batch_fast": partial(run_library, tokenizer, "encode_batch_fast", parts, count),
        }
        seconds = measure(runs, arguments.rounds)

    shape = {"processes": count, "text_bytes": size, "documents": len(texts), "vocab_size": arguments.vocab_size}
    runs_of = {
        name: {
            "seconds": spread(values),
            "bytes_per_second": size / statistics.median(values),
            "ours": speedup(seconds, OURS, name),
        }
        for name, values in seconds.items()
    }
    result = {**shape, "rounds": arguments.rounds, "runs": runs_of}
    save_result(arguments.json, "prepare", result)
    print_tables(tables(result))


if __name__ == "__main__":
    run_command(main)
