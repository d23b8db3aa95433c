"""Tasks of the LM Evaluation Harness: loading them, running them on a model, and the average of the paper's seven."""

import contextlib
import difflib
import functools
import logging
import math
import os
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rrt.errors import UserError

PAPER_METRICS = {
    "lambada_openai": "acc",
    "hellaswag": "acc_norm",
    "piqa": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc_norm",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
}
"""The seven tasks, each with its metric in the paper's average."""
FILE_FORMATS = ("jsonl", "jsonl.gz", "parquet")
BOOTSTRAP_ITERATIONS = 1000
"""Iterations for standard errors of metrics that are not means, such as LAMBADA's perplexity."""
SEED, FEWSHOT_SEED = 0, 1234  # the harness's own


def quiet_harness() -> None:
    """Leave of what the harness and the data set library print only errors, and the harness's own bars."""
    import datasets

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()


def compile_templates_once() -> None:
    """Let the harness compile each template of a prompt once in this process, not for every document: 2 ms of each."""
    import lm_eval.utils

    environment: Any = lm_eval.utils.env
    environment.from_string = functools.cache(environment.from_string)


def available_tasks(data_dir: Path) -> list[str]:
    """Return those of the paper's seven tasks that have a file in `data_dir`; raise `UserError` if none has."""
    if not data_dir.is_dir():
        raise UserError(f"--data-dir: found {data_dir}; expected a directory")
    names = [
        name for name in PAPER_METRICS if any((data_dir / f"{name}.{suffix}").is_file() for suffix in FILE_FORMATS)
    ]
    if not names:
        raise UserError(f"--data-dir: found no file of a task in {data_dir}; expected some (see eval/tasks/README.md)")
    return names


def load_tasks(names: list[str], data_dir: Path | None, num_fewshot: int | None) -> tuple[Any, dict[str, Path]]:
    """Load the harness's tasks of these names; return them and the local files that they read.

    Raises:
        UserError: an unknown name, a task that cannot be loaded or run, or local files that violate their schema.
    """
    from lm_eval.tasks import TaskManager

    from eval import local_tasks

    files: dict[str, Path] = {}
    specs: list[Any] = []
    if data_dir is not None:
        for name in names:
            if name not in PAPER_METRICS:
                raise UserError(f"--data-dir: found task {name!r}; expected one of {', '.join(PAPER_METRICS)}")
        for name in names:
            own = local_tasks.data_files(name, data_dir, num_fewshot or 0)
            files |= {path.name: path for path in own.values()}
            specs.append(local_tasks.local_task(name, own))
    else:
        specs = [str(local_tasks.stock_file(name)) if name in PAPER_METRICS else name for name in names]
    # Indexing all tasks of the harness takes 10 seconds.
    manager = TaskManager(include_defaults=any(spec in names for spec in specs))
    for spec in specs:
        if spec in names and spec not in manager.task_index:
            near = difflib.get_close_matches(spec, manager.all_tasks, n=3) or list(PAPER_METRICS)
            raise UserError(
                f"--tasks: found {spec!r}, which lm-eval does not know; expected for instance {', '.join(near)}"
            )
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name, spec in zip(names, specs, strict=True):
        try:
            part = manager.load([spec])
        except Exception as error:  # a data set's source or a task's own code may raise anything
            if data_dir is not None:
                raise
            raise UserError(
                f"task {name}: cannot be loaded ({type(error).__name__}: {' '.join(str(error).split())[:200]}); "
                "expected its data set on the Hub or in the local Hub cache, or --data-dir with local files"
            ) from error
        for kind in loaded:
            loaded[kind] |= part.get(kind, {})
    for name, task in loaded["tasks"].items():
        for flag, reason in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "needs images")):
            if getattr(task, flag, False):
                raise UserError(f"task {name}: {reason}; expected a task on text alone")
        default = task.get_config("num_fewshot")
        if num_fewshot is not None and default != 0:  # a task whose own number is 0 has no examples
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif default is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return loaded, files


def run_harness(lm: Any, tasks: Any, limit: int | None) -> dict[str, dict[str, Any]]:
    """Evaluate; return metrics, number of documents, shots and version of each task and group."""
    from lm_eval.evaluator import evaluate

    random.seed(SEED)
    np.random.seed(FEWSHOT_SEED)
    torch.manual_seed(FEWSHOT_SEED)
    os.environ["DISABLE_MULTIPROC"] = "1"  # the bootstrap would fork this process, once per core
    with contextlib.redirect_stdout(sys.stderr):
        found = evaluate(lm, tasks, limit=limit, bootstrap_iters=BOOTSTRAP_ITERATIONS, log_samples=False)
    return {
        name: {
            "metrics": {
                key.removesuffix(",none"): value if isinstance(value, int | float) else None
                for key, value in metrics.items()
                if "," in key
            },
            "documents": found["n-samples"].get(name, {}).get("effective"),
            "shots": found["n-shot"].get(name),
            "version": found["versions"].get(name),
        }
        for name, metrics in found["results"].items()
    }


def paper_average(tasks: dict[str, dict[str, Any]]) -> dict[str, float] | None:
    """Average the seven tasks, with the standard error; None unless all are there."""
    if not all(name in tasks for name in PAPER_METRICS):
        return None
    values, errors = (
        [tasks[name]["metrics"][metric + suffix] for name, metric in PAPER_METRICS.items()]
        for suffix in ("", "_stderr")
    )
    average = {"value": sum(values) / len(values)}
    if None not in errors:  # a single document has none
        average["stderr"] = math.sqrt(sum(error**2 for error in errors)) / len(errors)
    return average
