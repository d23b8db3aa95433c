"""Few-shot accuracy on the paper's seven tasks, or any of the LM Evaluation Harness:

    python eval/fewshot.py --checkpoint models/gemma-b2-r512-15b/final --json fewshot.json

The harness (pip install 'relaxed-recursive-transformers[eval]') makes prompts and metrics, our model scores them: HF
directories, vanilla, recursive, relaxed and prefix checkpoints, at the last loop or, with --exit-loop, an earlier one.
Scores are those of the harness's own `hf` model on the exported checkpoint, several times faster. They differ, on
purpose, where a text spells a special token, such as a literal <s>: here it stays text, there it becomes the token.

Data sets come from the Hugging Face Hub, or with --data-dir from local files (eval/tasks/README.md). The average of
the seven tasks is the paper's: acc of lambada_openai and winogrande, acc_norm of the others.

On a CPU, unless PyTorch multiplies the 16-bit dtype as fast (on AMX tiles), scoring keeps packed copies of the weights
(--packed-gib).
Finished requests are kept (--cache), so that an interrupted run resumes when it is started again.
"""

import argparse
import gc
import hashlib
import importlib.util
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    gc.disable()  # modules make objects that stay: collecting garbage among them takes a quarter of the start

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.flags import (
    add_device_flag,
    check_least,
    check_output_file,
    choose_bos,
    choose_exit,
    notice_untrained,
)
from eval.harness_tasks import (
    PAPER_METRICS,
    available_tasks,
    compile_templates_once,
    load_tasks,
    paper_average,
    quiet_harness,
    run_harness,
)
from eval.response_cache import ResponseCache, code_digest
from eval.tables import Table, print_tables
from rrt.checkpoint.source import load_model, open_source
from rrt.common.cli import CommandParser, human_count, keep_freed_memory, run_command
from rrt.common.dtypes import add_dtype_flag, chosen_dtype, dtype_name
from rrt.common.files import sha256_file
from rrt.common.processes import pick_device
from rrt.common.provenance import fingerprint
from rrt.common.results import write_result
from rrt.data.tokenizer import check_vocab, load_tokenizer
from rrt.errors import UserError
from rrt.model.sizes import model_sizes

BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}


def tables(result: dict[str, Any]) -> list[Table]:
    """Make a table of all tasks: the paper's metric of its seven, every metric of others; last the average."""
    rows = []
    for name, task in result["tasks"].items():
        metrics = [key for key in task["metrics"] if "_stderr" not in key]
        for metric in [PAPER_METRICS[name]] if name in PAPER_METRICS else metrics:
            base, _, filter_name = metric.partition(",")
            stderr = task["metrics"].get(f"{base}_stderr" + (f",{filter_name}" if filter_name else ""))
            counts = ("" if task[key] is None else f"{task[key]:,}" for key in ("shots", "documents"))
            rows.append([name, *counts, metric, _format(task["metrics"][metric]), _format(stderr)])
    if average := result["average"]:
        rows.append(["average of seven", "", "", "", _format(average["value"]), _format(average.get("stderr"))])
    return [Table("", ["task", "shots", "documents", "metric", "value", "stderr"], rows, (0, 3))]


def _format(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def check_arguments(arguments: argparse.Namespace) -> None:
    check_least("--num-fewshot", arguments.num_fewshot, 0)
    check_least("--limit", arguments.limit)
    check_least("--batch-tokens", arguments.batch_tokens)
    if not 0 <= arguments.packed_gib < math.inf:
        raise UserError(f"--packed-gib: found {arguments.packed_gib}; expected 0 or more")
    check_output_file("--json", arguments.json)
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed; expected it: pip install 'relaxed-recursive-transformers[eval]'")
    if arguments.tasks is None:
        arguments.tasks = choose_tasks(arguments.data_dir)
    if not arguments.tasks:
        raise UserError("--tasks: found none; expected names with commas between them")
    if repeated := {name for name in arguments.tasks if arguments.tasks.count(name) > 1}:
        raise UserError(f"--tasks: found {sorted(repeated)[0]!r} twice; expected each once")


def choose_tasks(data_dir: Path | None) -> list[str]:
    """Return the paper's seven tasks; of local files those that are there, and print a notice that names the others."""
    if data_dir is None:
        return list(PAPER_METRICS)
    names = available_tasks(data_dir)
    if missing := ", ".join(name for name in PAPER_METRICS if name not in names):
        print(f"notice: {data_dir} has no file of {missing}: left out, and no average of seven", file=sys.stderr)
    return names


def open_cache(directory: Path, **identity: object) -> tuple[ResponseCache, Path]:
    """Open the cache of responses that depend on `identity` and the request alone."""
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    path = directory / f"{name}.jsonl"
    return ResponseCache(path), path


def evaluate_checkpoint(arguments: argparse.Namespace) -> tuple[dict[str, Any], torch.device]:
    """Evaluate, and return the result and the device it ran on."""
    source = open_source(arguments.checkpoint)
    tokenizer = load_tokenizer(arguments.checkpoint)
    check_vocab(tokenizer, source.model.vocab_size, arguments.checkpoint)
    exit_loop = choose_exit(source, arguments.exit_loop)
    notice_untrained(source, [exit_loop])
    bos = choose_bos(arguments, tokenizer) is not None
    device = pick_device(arguments.device)
    dtype = chosen_dtype(arguments) or source.dtype
    batch_tokens = arguments.batch_tokens or BATCH_TOKENS.get(device.type, BATCH_TOKENS["cpu"])

    # An exit is the last loop of a shorter model, but for one with a translator, which a last loop cannot have.
    translates = source.recursion.exit_translators and exit_loop < source.recursion.num_loops - 1
    num_loops = None if translates else exit_loop + 1
    # Weights are read and hashed, which holds no interpreter lock, while the harness is imported, which does.
    with ThreadPoolExecutor(2) as executor:
        loading = executor.submit(load_model, arguments.checkpoint, dtype, device, num_loops)
        hashing = executor.submit(fingerprint, arguments.checkpoint)
        from eval.harness_lm import HarnessLM

        quiet_harness()
        compile_templates_once()
        tasks, files = load_tasks(arguments.tasks, arguments.data_dir, arguments.num_fewshot)
        model, checkpoint_sha256 = loading.result(), hashing.result()
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    # Merging a LoRA into a square weight costs as much as its own products on half as many rows as the weight has.
    model.set_merge(batch_tokens >= source.model.hidden_size)
    identity = {
        "checkpoint_sha256": checkpoint_sha256,
        "tokenizer_sha256": tokenizer.sha256,
        "dtype": dtype_name(dtype),
        "exit_loop": exit_loop,
    }
    made_by = {"device": device.type, "torch": torch.__version__, "code_sha256": code_digest()}
    cache, cache_path = open_cache(arguments.cache, **identity, **made_by)
    cached = len(cache)
    parameters = human_count(sum(parameter.numel() for parameter in model.parameters()))
    print(
        f"{arguments.checkpoint}: {parameters} parameters in {dtype_name(dtype)} on {device}, exit after loop "
        f"{exit_loop} of 0..{source.recursion.num_loops - 1}, texts begin {'with' if bos else 'without'} BOS\n"
        f"{len(tasks['tasks'])} tasks: {', '.join(tasks['tasks'])}\n"
        f"finished requests: {cached:,} in {cache_path}",
        flush=True,
    )
    packed_bytes = int(arguments.packed_gib * 2**30)
    if device.type == "cpu":
        keep_freed_memory()
    lm = HarnessLM(
        model,
        tokenizer,
        bos=bos,
        batch_tokens=batch_tokens,
        cache=cache,
        packed_bytes=packed_bytes,
        exit_loop=exit_loop if translates else None,
        progress=True,
    )
    began = time.perf_counter()
    results = run_harness(lm, tasks, arguments.limit)
    return {
        "kind": "fewshot",
        "checkpoint": str(arguments.checkpoint),
        **identity,
        "non_embedding_params": model_sizes(source.model, source.recursion, dtype).non_embedding_params,
        "num_loops": source.recursion.num_loops,
        "bos": bos,
        "limit": arguments.limit,
        "num_fewshot": arguments.num_fewshot,
        "batch_tokens": batch_tokens,
        "max_length": lm.max_length,
        "versions": {name: version(name) for name in ("lm_eval", "datasets", "tokenizers", "sentencepiece")},
        "data": {name: {"path": str(path), "sha256": sha256_file(path)} for name, path in files.items()},
        "tasks": results,
        "average": paper_average(results),
        "requests": sum(len(task.instances) for task in tasks["tasks"].values()),
        "computed": len(cache) - cached,
        "seconds": time.perf_counter() - began,
    }, device


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="HF model directory, .gguf file or checkpoint of this package",
    )
    parser.add_argument(
        "--tasks",
        type=lambda text: [name.strip() for name in text.split(",") if name.strip()],
        metavar="NAMES",
        help="tasks, groups or tags of the harness, with commas between them (default: the paper's seven, "
        f"{','.join(PAPER_METRICS)}; with --data-dir those of them that have a file there)",
    )
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="read the seven tasks from files here (eval/tasks/README.md)"
    )
    parser.add_argument(
        "--exit-loop", type=int, metavar="N", help="exit after loop N, counted from 0 (default: the last loop)"
    )
    parser.add_argument(
        "--num-fewshot",
        type=int,
        metavar="N",
        help="examples before each question (default: each task's own, 0 for the seven)",
    )
    parser.add_argument(
        "--bos",
        choices=("auto", "yes", "no"),
        default="auto",
        help="begin texts with BOS (default auto: as the tokenizer does; Gemma scores nothing without it)",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N documents of each task")
    parser.add_argument(
        "--batch-tokens",
        type=int,
        metavar="N",
        help=f"most tokens in a forward pass (default {BATCH_TOKENS['cpu']}, on CUDA {BATCH_TOKENS['cuda']})",
    )
    parser.add_argument(
        "--packed-gib",
        type=float,
        default=4.0,
        metavar="N",
        help="most memory for packed copies of the weights on a CPU, GiB (default 4; 0: none, slower)",
    )
    add_dtype_flag(parser, "dtype to compute in")
    add_device_flag(parser)
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rrt" / "fewshot",
        metavar="DIR",
        help="where finished requests are kept, a file for each checkpoint, dtype and state of the code "
        "(default ~/.cache/rrt/fewshot)",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result here")
    arguments = parser.parse_args()
    check_arguments(arguments)
    result, device = evaluate_checkpoint(arguments)
    # Written before anything is printed: a closed pipe must not cost the run.
    if arguments.json is not None:
        write_result(arguments.json, result, device)
    print_tables(tables(result))


if __name__ == "__main__":
    run_command(main)
