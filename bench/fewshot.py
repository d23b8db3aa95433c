"""Few-shot tasks on a real model: eval/fewshot.py's way of scoring against the LM Evaluation Harness's own `hf` model.

    python bench/fewshot.py --checkpoint models/smollm2-135m --data-dir data/tasks --json out.json

Each runs the harness's `evaluate` on the same documents of each task with the same weights: building requests, tokens,
scores, metrics and their standard errors all count; loading and packing, which is timed apart, do not. Each has a
process of its own that has scored a few documents before, and they take turns. The baseline is hf (on the export, if
DIR is a checkpoint of this package) at the batch size that is fastest on some of each task's documents. The table has
both accuracies, which must be equal in fp32, and the largest difference between two scores. The floor is the time of
the products that ours needs, of linears and head, at the best matmul rate of the run.

Tasks are those of the paper's seven with a file in --data-dir (eval/tasks/README.md). Run nothing else beside it.
"""

import argparse
import gc
import importlib.util
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

# In place of this folder, whose tabulate.py would be taken for the package that the harness imports.
BENCH = Path(__file__).resolve().parent
sys.path[:] = [str(BENCH.parent), *(path for path in sys.path if Path(path).resolve() != BENCH)]

from bench.output import add_json_flag, check_json_flag, save_result
from bench.timing import RATIOS_NOTE, Rates, Timer, spread
from eval.flags import check_least, choose_bos
from eval.harness_tasks import (
    PAPER_METRICS,
    available_tasks,
    compile_templates_once,
    load_tasks,
    quiet_harness,
    run_harness,
)
from eval.response_cache import ResponseCache
from eval.scoring import pack_rows
from eval.tables import Table, format_seconds, format_spread, print_tables
from rrt.checkpoint.source import HFSource, load_model, open_source
from rrt.common.cli import CommandParser, human_count, keep_freed_memory, run_command
from rrt.common.provenance import fingerprint
from rrt.data.tokenizer import load_tokenizer
from rrt.errors import UserError
from rrt.folding.unroll import export
from rrt.model.sizes import model_sizes

KIND = "fewshot-speed"
"""Of the result; "fewshot" is that of eval/fewshot.py."""
GOALS = {"fp32": 3.0, "bf16": 3.5}
"""Speedups over the baseline to reach, all tasks together."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

Scores = list[tuple[float, bool]]
lm: Any
"""The language model of this process, as the harness sees it."""


def load_ours(directory: Path, dtype: torch.dtype, threads: int, bos: bool, batch_tokens: int) -> float:
    """Load the model; return the seconds that packing its weights takes."""
    global lm
    from eval.harness_lm import HarnessLM

    quiet_harness()
    compile_templates_once()
    torch.set_num_threads(threads)
    model = load_model(directory, dtype)
    keep_freed_memory()
    lm = HarnessLM(model, load_tokenizer(directory), bos=bos, batch_tokens=batch_tokens)
    gc.freeze()  # on both sides; eval/fewshot.py does it too
    began = time.perf_counter()
    lm.scorer.pack()
    return time.perf_counter() - began


def load_hf(directory: Path, dtype: torch.dtype, threads: int, bos: bool) -> None:
    global lm
    from lm_eval.models.huggingface import HFLM

    quiet_harness()
    torch.set_num_threads(threads)
    lm = HFLM(str(directory), device="cpu", dtype=dtype, add_bos_token=bos)
    gc.freeze()


def run_task(name: str, data_dir: Path, documents: int, batch_size: int | None) -> dict[str, Any]:
    """Run a task on this process's model; return its seconds, its metric and its scores."""
    tasks, _ = load_tasks([name], data_dir, None)
    if batch_size is None:
        lm.scorer.cache = ResponseCache()
    else:
        lm.batch_size_per_gpu = batch_size
    began, cpu_began = time.perf_counter(), time.process_time()
    results = run_harness(lm, tasks, documents)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    requests = [request for task in tasks["tasks"].values() for request in task.instances]
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "documents": results[name]["documents"],
        "value": results[name]["metrics"][PAPER_METRICS[name]],
        "scores": [request.resps[0] for request in requests],
    }


def count_tokens(name: str, data_dir: Path, documents: int) -> dict[str, int]:
    """Count the tokens that ours reads with and without sharing, those scored, and the states that meet the head."""
    tasks, _ = load_tasks([name], data_dir, None)
    tasks["tasks"][name].build_all_requests(limit=documents)
    pairs = lm.encode_pairs(tasks["tasks"][name].instances)
    texts = {text.key: text for text in (lm.scorer.make_text(*pair) for pair in pairs if pair[1])}
    rows = list(pack_rows(list(texts.values()), lm.scorer.row_tokens))
    return {
        "one by one": sum(len(text.inputs) for text in texts.values()),
        "read": sum(row.length for row in rows),
        "scored": sum(len(text.targets) for text in texts.values()),
        "through the head": sum(len(set(row.layout()[-1])) for row in rows),
    }


@contextmanager
def process_with(load: Any, *arguments: Any) -> Iterator[tuple[Any, Any]]:
    """Start a process and call `load` in it; yield a function that calls others there, and what `load` returned."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as executor:
        loaded = executor.submit(load, *arguments).result()
        yield lambda function, *arguments: executor.submit(function, *arguments).result(), loaded


def measure(
    arguments: argparse.Namespace, dtype: str, names: list[str], hf_directory: Path, bos: bool
) -> dict[str, Any]:
    """Measure all tasks in one dtype."""
    data_dir, documents, threads = arguments.data_dir, arguments.documents, arguments.threads
    source = open_source(arguments.checkpoint)
    sizes = model_sizes(source.model, source.recursion, DTYPES[dtype])
    cases = []
    with ExitStack() as stack:
        load = (arguments.checkpoint, DTYPES[dtype], threads, bos, arguments.batch_tokens)
        ours, packing = stack.enter_context(process_with(load_ours, *load))
        hf, _ = stack.enter_context(process_with(load_hf, hf_directory, DTYPES[dtype], threads, bos))
        rates = Rates(Timer(torch.device("cpu"), 1.0), DTYPES[dtype], 2**26)
        for name in names:
            few = max(4, documents // 10)
            ours(run_task, name, data_dir, few, None)
            hf(run_task, name, data_dir, 2, arguments.hf_batch_sizes[0])
            trials = {
                size: hf(run_task, name, data_dir, few, size)["seconds"]
                for size in dict.fromkeys(arguments.hf_batch_sizes)
            }
            batch_size = min(trials, key=lambda size: trials[size])
            runs: dict[str, list[dict[str, Any]]] = {"ours": [], "hf": []}
            for index in range(arguments.rounds):
                for side in ("ours", "hf") if index % 2 == 0 else ("hf", "ours"):
                    run = (ours, None) if side == "ours" else (hf, batch_size)
                    runs[side].append(run[0](run_task, name, data_dir, documents, run[1]))
            rates.probe()
            tokens = ours(count_tokens, name, data_dir, documents)
            head = source.model.vocab_size * source.model.hidden_size
            flops = 2 * (tokens["read"] * sizes.non_embedding_params + tokens["through the head"] * head)
            one, other = (runs[side][0] for side in ("ours", "hf"))
            cases.append(
                {
                    "task": name,
                    "documents": one["documents"],
                    "requests": len(one["scores"]),
                    "tokens": tokens,
                    "floor_flops": flops,
                    "hf_batch_size": batch_size,
                    "metric": PAPER_METRICS[name],
                    "value": {side: of[0]["value"] for side, of in runs.items()},
                    "seconds": {side: [run["seconds"] for run in of] for side, of in runs.items()},
                    "cpu_seconds": {side: [run["cpu_seconds"] for run in of] for side, of in runs.items()},
                    "max_difference": max(
                        abs(a - b) for (a, _), (b, _) in zip(one["scores"], other["scores"], strict=True)
                    ),
                    "greedy_differences": sum(
                        a != b for (_, a), (_, b) in zip(one["scores"], other["scores"], strict=True)
                    ),
                }
            )
            print(f"\n{speed_table(dtype, cases[-1:], total=False).text()}", flush=True)
        for case in cases:
            case["floor_seconds"] = case["floor_flops"] / rates.best_matmul()[1]
    return {"dtype": dtype, "packing_seconds": packing, "cases": cases, "speedup": overall(cases)}


def overall(cases: list[dict[str, Any]]) -> float:
    """Return how many times faster ours is on all tasks together: the median over the rounds."""
    rounds = range(len(cases[0]["seconds"]["ours"]))
    totals = {side: [sum(case["seconds"][side][i] for case in cases) for i in rounds] for side in ("ours", "hf")}
    return statistics.median(b / a for a, b in zip(totals["ours"], totals["hf"], strict=True))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure all dtypes and return the result."""
    source, tokenizer = open_source(arguments.checkpoint), load_tokenizer(arguments.checkpoint)
    bos = choose_bos(arguments, tokenizer) is not None
    names = arguments.tasks or available_tasks(arguments.data_dir)
    sizes = model_sizes(source.model, source.recursion, torch.float32)
    print(
        f"{arguments.checkpoint}: {human_count(sizes.total_params)} parameters on the CPU, "
        f"{arguments.threads} threads, texts begin {'with' if bos else 'without'} BOS",
        flush=True,
    )
    with ExitStack() as stack:
        hf_directory = arguments.checkpoint
        if not isinstance(source, HFSource):
            hf_directory = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "exported"
            export(arguments.checkpoint, hf_directory)
        results = [measure(arguments, dtype, names, hf_directory, bos) for dtype in arguments.dtype]
    return {
        "checkpoint": str(arguments.checkpoint),
        "checkpoint_sha256": fingerprint(arguments.checkpoint),
        "parameters": sizes.total_params,
        "bos": bos,
        "batch_tokens": arguments.batch_tokens,
        "rounds": arguments.rounds,
        "results": results,
        "goals": GOALS,
    }


def speed_table(dtype: str, cases: list[dict[str, Any]], *, total: bool = True) -> Table:
    """Make the table of a dtype, with a row per task and one of all."""
    rows = []
    for case in cases:
        seconds = {side: spread(values) for side, values in case["seconds"].items()}
        ratios = [hf / ours for ours, hf in zip(case["seconds"]["ours"], case["seconds"]["hf"], strict=True)]
        floor = f"{seconds['ours']['median'] / case['floor_seconds']:.2f}" if "floor_seconds" in case else ""
        rows.append(
            [
                case["task"],
                f"{case['documents']:,}",
                f"{case['tokens']['read'] / case['tokens']['one by one']:.2f}",
                case["metric"],
                *(f"{case['value'][side]:.4f}" for side in ("ours", "hf")),
                f"{case['max_difference']:.1e}",
                format_seconds(seconds["ours"]["median"]),
                format_seconds(seconds["hf"]["median"]),
                format_spread(seconds["hf"]),
                str(case["hf_batch_size"]),
                f"{statistics.median(ratios):.2f}x",
                floor,
            ]
        )
    if total:
        times = [sum(statistics.median(case["seconds"][side]) for case in cases) for side in ("ours", "hf")]
        goal = f"{overall(cases):.2f}x"
        rows.append(["all", "", "", "", "", "", "", *map(format_seconds, times), "", "", goal, ""])
    header = "task documents read metric ours hf dll ours-time hf-time +- batch speedup time/floor".split()
    return Table(f"Few-shot tasks in {dtype}", header, rows, (0, 3))


def tables(result: dict[str, Any]) -> list[Table]:
    """Make a table of each dtype."""
    made = []
    for found in result["results"]:
        table = speed_table(found["dtype"], found["cases"])
        packing = format_seconds(found["packing_seconds"])
        goal = result["goals"][found["dtype"]]
        notes = [
            f"{human_count(result['parameters'])} parameters, packed in {packing}; goal {goal}x. Read: tokens that the "
            "model reads, of those of all requests. dll: largest difference of two log-likelihoods. Batch: hf's. "
            f"{RATIOS_NOTE}"
        ]
        made.append(replace(table, notes=notes))
    return made


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="HF model directory or a checkpoint of ours"
    )
    parser.add_argument(
        "--data-dir", type=Path, required=True, metavar="DIR", help="files of the tasks (eval/tasks/README.md)"
    )
    parser.add_argument(
        "--tasks",
        type=lambda text: [name.strip() for name in text.split(",") if name.strip()],
        metavar="NAMES",
        help="of the seven, with commas between them (default: those with a file)",
    )
    parser.add_argument("--documents", type=int, default=300, metavar="N", help="of each task (default 300)")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="one after the other (default fp32 bf16)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        metavar="N",
        help="torch threads (default: as torch has)",
    )
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="runs of each side (default 1)")
    parser.add_argument(
        "--bos", choices=("auto", "yes", "no"), default="auto", help="begin texts with BOS (default: as the tokenizer)"
    )
    parser.add_argument("--batch-tokens", type=int, default=2048, metavar="N", help="of ours (default 2048)")
    parser.add_argument(
        "--hf-batch-sizes", type=int, nargs="+", default=[4, 8, 16], metavar="N", help="to choose from (default 4 8 16)"
    )
    add_json_flag(parser, "fewshot")
    arguments = parser.parse_args()
    for module in ("lm_eval", "accelerate"):
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f"{module} is not installed; expected it: pip install 'relaxed-recursive-transformers[test]'"
            )
    for flag in ("documents", "threads", "batch_tokens", "rounds"):
        check_least(f"--{flag.replace('_', '-')}", getattr(arguments, flag))
    for size in arguments.hf_batch_sizes:
        check_least("--hf-batch-sizes", size)
    check_json_flag(arguments.json)
    os.environ["HF_HUB_OFFLINE"] = "1"
    result = run(arguments)
    save_result(arguments.json, KIND, result)
    print_tables(tables(result))


if __name__ == "__main__":
    run_command(main)
