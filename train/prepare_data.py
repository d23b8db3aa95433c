"""Tokenise a corpus into token shards.

    python train/prepare_data.py --input python-stdlib --tokenizer runs/out/tokenizer --out runs/out/data
    python train/prepare_data.py --input 'slimpajama/train/*/*.jsonl.zst' \\
        --heldout-input 'slimpajama/test/*/*.jsonl.zst' --tokenizer models/gemma-2b --out data/slimpajama-gemma

The corpus is cut into units (groups of small files, byte ranges of large .jsonl files) that worker processes tokenise
in parallel. A finished unit stays in `<out>.partial` under a name that depends on its bytes and the tokenizer; so the
same command continues after an interruption, a corrected input repeats only its own units, and the output does not
depend on workers or interruptions. Records whose text is null or empty are skipped and counted; --strict refuses them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import gc
import hashlib
import io
import json
import multiprocessing
import os
import platform
import shutil
import signal
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from rrt.common.cli import CommandParser, human_bytes, human_count, run_command
from rrt.common.files import atomic_directory, atomic_file, check_output_directory, locked_directory
from rrt.data.corpus import (
    INPUT_HELP,
    PYTHON_STDLIB,
    Part,
    TextFilter,
    find_files,
    is_compressed,
    is_divisible,
    read_documents,
    skipped_notice,
    whole_file,
)
from rrt.data.shards import DEFAULT_SHARD_TOKENS, ShardWriter, document_bos, open_shards, token_dtype
from rrt.data.tokenizer import Tokenizer, load_tokenizer
from rrt.errors import UserError

UNIT_FORMAT = 2  # increase it when the same input gives other tokens, or their files change
SMALLEST_UNIT, LARGEST_UNIT = 1 << 20, 1 << 26
BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Unit:
    """A worker's work at a time, in one split; `name` is the same for the same work."""

    split: str
    parts: tuple[Part, ...]
    name: str

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(part.size for part in self.parts)


@dataclass(frozen=True)
class Job:
    """All the work, with the settings that workers share."""

    units: list[Unit]
    splits: tuple[str, ...]
    tokenizer: Tokenizer
    text_field: str
    is_strict: bool
    directory: Path

    def tokens_path(self, unit: Unit) -> Path:
        return self.directory / f"{unit.name}.bin"

    def documents_path(self, unit: Unit) -> Path:
        """Return the file that marks a finished unit, [documents + 1, 2] int64.

        A row has a document's tokens and bytes of text; the last one 0 and the number of records without text.
        """
        return self.directory / f"{unit.name}.npy"


def prepare_data(
    inputs: Sequence[str],
    tokenizer_directory: Path,
    out: Path,
    *,
    heldout_inputs: Sequence[str] = (),
    workers: int = 1,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    text_field: str = "text",
    bos: str = "auto",
    is_strict: bool = False,
    overwrite: bool = False,
) -> None:
    """Tokenise `inputs` into the shard directory `out`; the arguments are the command's options."""
    started = time.perf_counter()
    for option, value in (("--workers", workers), ("--shard-tokens", shard_tokens)):
        if value < 1:
            raise UserError(f"{option} is {value}; expected at least 1")
    check_output_directory(out, overwrite)
    tokenizer = load_tokenizer(tokenizer_directory).with_bos(bos)
    files = find_splits(inputs, heldout_inputs)
    settings = [UNIT_FORMAT, tokenizer.sha256, document_bos(tokenizer), tokenizer.eos_id, text_field]
    units = make_units(files, settings)
    print(
        f"tokenizer {tokenizer_directory}: {tokenizer.vocab_size} ids, written as {token_dtype(tokenizer.vocab_size)}"
    )
    for split, paths in files.items():
        size = sum(unit.size for unit in units if unit.split == split)
        print(f"{split}: {len(paths)} files, {human_bytes(size)}")
    source: dict[str, Any] = {"inputs": list(inputs), "heldout_inputs": list(heldout_inputs)}
    source |= {"text_field": text_field, "bos": bos}
    if PYTHON_STDLIB in inputs:
        source["python"] = platform.python_version()

    partial = out.with_name(f"{out.name}.partial")
    with locked_directory(partial):
        job = Job(units, tuple(files), tokenizer, text_field, is_strict, partial)
        finished = keep_finished(job, overwrite)
        workers = min(workers, len(units) - len(finished))
        print(f"{len(units) - len(finished)} units on {workers} worker processes, into {out}", flush=True)
        try:
            tokenise(job, finished, workers)
            skipped = write_shards(job, out, shard_tokens, source, overwrite)
        except BaseException as error:
            kept = sum(job.documents_path(unit).exists() for unit in units)
            if kept == 0 or isinstance(error, EmptyCorpusError):
                shutil.rmtree(partial)
                raise
            note = f"{kept} of {len(units)} units are finished and kept in {partial}: run the command again to go on"
            if isinstance(error, UserError):
                raise UserError(f"{error} ({note})") from None
            print(note, file=sys.stderr)
            raise
        shutil.rmtree(partial)
    print_summary(out, files, skipped, time.perf_counter() - started)


class EmptyCorpusError(UserError):
    """There is nothing to tokenise, and so no finished unit to keep."""


def find_splits(inputs: Sequence[str], heldout_inputs: Sequence[str]) -> dict[str, list[Path]]:
    """Find the files of each split; a file that is held out is not trained on."""
    stdlib = [PYTHON_STDLIB] if PYTHON_STDLIB in inputs else []
    heldout = find_files([*stdlib, *heldout_inputs], split="heldout")
    held_out = {path.resolve() for path in heldout}
    train = [path for path in find_files(inputs, split="train") if path.resolve() not in held_out]
    if not train:
        raise UserError("--input: every file is held out by --heldout-input; expected others to train on")
    return {"train": train, "heldout": heldout} if heldout else {"train": train}


def make_units(files: dict[str, list[Path]], settings: list[Any]) -> list[Unit]:
    """Cut the corpus into units of similar work, in order; they depend on the files, not on the workers."""
    wholes = {split: [whole_file(path) for path in paths] for split, paths in files.items()}
    total = sum(part.size for parts in wholes.values() for part in parts)
    # A power of two, so that a corrected file seldom moves the borders of other units.
    unit_bytes = min(max(1 << (total // 4096).bit_length(), SMALLEST_UNIT), LARGEST_UNIT)
    units = []
    for split, parts in wholes.items():
        group: list[Part] = []
        weight = 0
        for part in (piece for whole in parts for piece in cut_part(whole, unit_bytes)):
            cost = part.size * (4 if is_compressed(part.path) else 1)
            if group and weight + cost > unit_bytes:
                units.append(make_unit(split, group, settings))
                group, weight = [], 0
            group.append(part)
            weight += cost
        if group:
            units.append(make_unit(split, group, settings))
    return units


def cut_part(part: Part, unit_bytes: int) -> Iterator[Part]:
    """Cut `part` into ranges of `unit_bytes`, if its kind of file can be read from the middle."""
    if not is_divisible(part.path):
        yield part
        return
    for start in range(0, part.stop, unit_bytes):
        yield Part(part.path, start, min(start + unit_bytes, part.stop))


def make_unit(split: str, parts: list[Part], settings: list[Any]) -> Unit:
    """Make a unit, named after everything that decides its tokens (time and size stand for a file's content)."""
    identity: list[Any] = [settings]
    for part in parts:
        status = part.path.stat()
        identity.append([str(part.path.absolute()), status.st_size, status.st_mtime_ns, part.start, part.stop])
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return Unit(split, tuple(parts), f"unit-{digest[:32]}")


def keep_finished(job: Job, overwrite: bool) -> set[str]:
    """Return the names of the units that an earlier run finished, and remove its other files.

    Raises:
        UserError: all finished units are of other inputs or options, and `overwrite` is false.
    """
    itemsize = token_dtype(job.tokenizer.vocab_size).itemsize
    finished: set[str] = set()
    for unit in job.units:
        with suppress(OSError, ValueError, IndexError):
            rows = np.load(job.documents_path(unit))
            if job.is_strict and rows[-1, 1] > 0:
                continue  # again, to name the record
            if job.tokens_path(unit).stat().st_size == int(rows[:, 0].sum()) * itemsize:
                finished.add(unit.name)
    earlier = [path for pattern in ("unit-*", ".unit-*") for path in job.directory.glob(pattern)]
    if not finished and not overwrite and any(path.suffix == ".npy" for path in earlier):
        raise UserError(
            f"{job.directory}: holds finished units of other inputs or options; repeat that command to go on with it, "
            "or add --overwrite to start anew"
        )
    for path in earlier:
        if path.stem not in finished or path.suffix not in (".bin", ".npy"):
            path.unlink()
    if finished:
        print(f"continuing an interrupted run: {len(finished)} of {len(job.units)} units were finished")
    elif earlier:
        print(f"starting anew: {job.directory} holds an interrupted run of other inputs or options")
    return finished


def tokenise(job: Job, finished: set[str], workers: int) -> None:
    """Tokenise the units that are not finished in worker processes, with a progress bar over bytes."""
    todo = [index for index, unit in enumerate(job.units) if unit.name not in finished]
    total = sum(unit.size for unit in job.units)
    with worker_pool(job, workers) as connections, progress_bar(total) as bar:
        bar.update(total - sum(job.units[index].size for index in todo))
        queue = iter(todo)
        busy: dict[Connection, int] = {}
        for connection, index in zip(connections, queue, strict=False):
            connection.send(index)
            busy[connection] = index
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                index = busy.pop(ready)
                try:
                    failure = ready.recv()
                except EOFError:
                    raise UserError(
                        "a worker process was killed, perhaps for lack of memory; use fewer --workers"
                    ) from None
                if failure is not None:
                    raise failure
                bar.update(job.units[index].size)
                if (index := next(queue, -1)) >= 0:
                    ready.send(index)
                    busy[ready] = index


@contextmanager
def progress_bar(total: int) -> Iterator["tqdm[Any]"]:
    """Show bytes done of `total` with the time left, seldom if the output is not a terminal."""
    interval = 0.2 if sys.stderr.isatty() else 30.0
    with tqdm(total=total, unit="B", unit_scale=True, mininterval=interval, smoothing=0.05, desc="tokenising") as bar:
        yield bar


@contextmanager
def worker_pool(job: Job, workers: int) -> Iterator[list[Connection]]:
    """Start workers and yield a connection to each; they end with the context, however it ends.

    They are forked before any thread exists, and share the loaded tokenizer's memory.
    """
    context = multiprocessing.get_context("fork")
    processes, connections = [], []
    for _ in range(workers):
        ours, theirs = context.Pipe()
        connections.append(ours)
        process = context.Process(target=run_worker, args=(job, theirs, connections), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
    try:
        yield connections
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


def run_worker(job: Job, connection: Connection, parents: list[Connection]) -> None:
    """Run a worker: receive the index of a unit, tokenise it, answer with None or the error, until the parent ends."""
    # The parent's garbage is not to be collected here: its finalizers may end a thread, say, that was not forked.
    gc.freeze()
    for parent in parents:
        parent.close()  # the fork's copies, which would hide the parent's death if kept open
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core is all the parallelism there is
    with suppress(EOFError, ConnectionError):
        while True:
            unit = job.units[connection.recv()]
            failure: Exception | None = None
            try:
                write_unit(job, unit)
            except (UserError, OSError) as error:
                failure = error
            except Exception:
                failure = RuntimeError(f"in a worker process:\n{traceback.format_exc()}")
            connection.send(failure)


def write_unit(job: Job, unit: Unit) -> None:
    """Tokenise one unit into its two files; the second one marks both as complete."""
    dtype = token_dtype(job.tokenizer.vocab_size)
    rows: list[tuple[int, int]] = []
    text_filter = TextFilter(job.is_strict)
    texts = (
        text for part in unit.parts for text in read_documents(part, text_field=job.text_field, text_filter=text_filter)
    )
    with atomic_file(job.tokens_path(unit)) as stream:
        for batch in batches(texts):
            documents = job.tokenizer.encode_documents(batch)
            for document, text in zip(documents, batch, strict=True):
                stream.write(np.array(document, dtype).data)
                rows.append((len(document), len(text.encode("utf-8", "replace"))))
    table = io.BytesIO()  # as `np.save` to a file hides that the disk is full
    np.save(table, np.array([*rows, (0, text_filter.skipped)], np.int64))
    with atomic_file(job.documents_path(unit), table.tell()) as stream:
        stream.write(table.getbuffer())


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group texts into lists of about `BATCH_CHARACTERS`."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def write_shards(job: Job, out: Path, shard_tokens: int, source: dict[str, Any], overwrite: bool) -> int:
    """Join the units into shards; `out` appears when it is complete. Returns the number of records without text."""
    size = sum(job.tokens_path(unit).stat().st_size for unit in job.units)
    print(f"joining {len(job.units)} units, {human_bytes(size)} of tokens", flush=True)
    dtype = token_dtype(job.tokenizer.vocab_size)
    documents = dict.fromkeys(job.splits, 0)
    skipped = dict.fromkeys(job.splits, 0)
    with (
        atomic_directory(out, overwrite, needed=size) as directory,
        ShardWriter(directory, job.tokenizer, shard_tokens) as writer,
    ):
        for unit in job.units:
            rows: npt.NDArray[np.int64] = np.load(job.documents_path(unit))
            skipped[unit.split] += int(rows[-1, 1])
            rows = rows[:-1]
            documents[unit.split] += len(rows)
            if len(rows):
                tokens = np.memmap(job.tokens_path(unit), dtype, mode="r")
                writer.append(unit.split, tokens, lengths=rows[:, 0], text_bytes=rows[:, 1])
        for split, count in documents.items():
            if count == 0:
                found = f" ({skipped_notice(skipped[split])})" if skipped[split] else ""
                raise EmptyCorpusError(f"the {split} files hold no document that is not empty{found}; expected one")
        writer.finish({**source, "records_without_text": skipped})
    return sum(skipped.values())


def print_summary(out: Path, files: dict[str, list[Path]], skipped: int, seconds: float) -> None:
    """Print the table of splits."""
    print(f"\n{'split':<8} {'shards':>6} {'documents':>11} {'tokens':>10} {'text':>11} {'bytes/token':>11}")
    text_bytes = 0
    for split in files:
        shards = open_shards(out, split)
        text_bytes += shards.text_bytes
        print(
            f"{split:<8} {len(shards.shards):>6} {shards.num_documents:>11,} {human_count(shards.num_tokens):>10} "
            f"{human_bytes(shards.text_bytes):>11} {shards.text_bytes / shards.num_tokens:>11.2f}"
        )
    if skipped:
        print(skipped_notice(skipped))
    print(f"wrote {out} in {seconds:.1f} s ({text_bytes / seconds / 1e6:.1f} MB of text per second)")


def main() -> None:
    """Run the command described at the head of this file."""
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, metavar="GLOB", help=INPUT_HELP)
    parser.add_argument("--heldout-input", nargs="+", default=[], metavar="GLOB", help="files of the held-out split")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, metavar="DIR", help="checkpoint or tokenizer directory"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to create")
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes (default: cores)"
    )
    parser.add_argument(
        "--shard-tokens",
        type=int,
        default=DEFAULT_SHARD_TOKENS,
        metavar="N",
        help=f"most tokens in a shard (default: {DEFAULT_SHARD_TOKENS:,})",
    )
    parser.add_argument("--text-field", default="text", metavar="NAME", help="JSON field of the text (default: text)")
    parser.add_argument(
        "--bos",
        choices=("auto", "yes", "no"),
        default="auto",
        help="begin documents with BOS (default auto: as the tokenizer's files say, else its family)",
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse records whose text is null or empty, instead of skipping them"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    arguments = parser.parse_args()
    prepare_data(
        arguments.input,
        arguments.tokenizer,
        arguments.out,
        heldout_inputs=arguments.heldout_input,
        workers=arguments.workers,
        shard_tokens=arguments.shard_tokens,
        text_field=arguments.text_field,
        bos=arguments.bos,
        is_strict=arguments.strict,
        overwrite=arguments.overwrite,
    )


if __name__ == "__main__":
    run_command(main)
