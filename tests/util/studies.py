"""A conversion study and its results, written without a model."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rrt.common.results import result_header
from runs.conversion_arms import TASKS, all_arms, choose_arms, result_path
from runs.conversion_study import Study

ARMS = all_arms(30)

HEADER = result_header()


def make_study(out: Path, **changes: Any) -> Study:
    study = Study(
        base=Path("base"),
        out=out,
        tasks=Path("tasks"),
        arms=tuple(choose_arms(ARMS, ["stepwise", "keep-15", "*-r64"])),
        tokens=(4096, 8192),
        num_seeds=3,
        max_tokens=None,
        fewshot_documents=200,
        calibration_tokens=1024,
        dtype="bfloat16",
        device="cpu",
        processes=2,
    )
    return replace(study, **changes)


def write_study_file(out: Path, arms: Sequence[str] | None = None, tokens: Sequence[int] = (102_400, 204_800)) -> None:
    settings = {"calibration_tokens": 32768, "fewshot_documents": 200}
    content = {
        "base": "SmolLM2",
        "num_layers": 30,
        "settings": settings,
        "plan": {
            "arms": [arm.name for arm in ARMS if arms is None or arm.name in arms],
            "tokens": list(tokens),
            "num_seeds": 3,
            "has_fewshot": True,
        },
        **{"train_documents": 47, "heldout_documents": 12, "batch_tokens": 4096, "train_context": 512},
        "learning_rate": 2e-4,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "study.json").write_text(json.dumps(content))


def write_one(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**HEADER, **values}))


def write_perplexity(out: Path, model: str, measure: str, perplexity: float) -> None:
    path = result_path(out, model, measure)
    write_one(path, {"loss": math.log(perplexity), "perplexity": perplexity, "tokens": 45678})


def write_fewshot(out: Path, model: str, share: float) -> None:
    tasks = {task: {"metrics": {"acc": 0.0, "acc_norm": share}} for task in TASKS}
    write_one(result_path(out, model, "fewshot"), {"tasks": tasks})


def write_model(out: Path, model: str, parameters: int, seconds: float | None) -> None:
    sizes = {"total_params": parameters, "lora_params": parameters // 5}
    write_one(result_path(out, model, "model"), {**sizes, "conversion_seconds": seconds})


def write_training(out: Path, model: str) -> None:
    steps = range(1, 51)
    result = {"tokens": [4096 * step for step in steps], "loss": [10 / step for step in steps]}
    write_one(result_path(out, model, "training"), result)


def cells(report: str, title: str, start: str) -> list[str]:
    """The cells of the first row that begins with `start`, in the table under `title`."""
    table = report.partition(f"**{title}")[2]
    line = next(line for line in table.splitlines() if line.startswith(f"| {start} |"))
    return line.strip("| ").split(" | ")
