"""Tables and loss curves of a finished demo from scratch: python runs/demo_scratch_report.py runs/out/demo-scratch

All numbers come from the JSON files of the demo's steps.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.tables import Table
from rrt.common.cli import human_count, run_command
from rrt.common.files import atomic_write, read_json
from rrt.common.results import write_result
from rrt.errors import UserError
from runs.demo_report import DemoModel, demo_directory, plot_curves, read_rows

MODELS = (
    DemoModel("base", "base", None, "base"),
    DemoModel("reduced-size", "reduced", None, "reduced"),
    DemoModel("recursive (stepwise)", "recursive-uptrained", "recursive-before", "recursive-after"),
    DemoModel("relaxed (average + SVD)", "relaxed-uptrained", "relaxed-before", "relaxed-after"),
    DemoModel("relaxed, distilled", "distilled-uptrained", "relaxed-before", "distilled-after"),
    DemoModel("recursive, with exits", "exits-trained", "recursive-after", "exits-after"),
)

# (task, metric, title) of runs/demo_scratch_tasks.py
TASKS = (("lambada_openai", "acc", "last word"), ("hellaswag", "acc_norm", "one of four endings"))


def read_fewshot_rows(out: Path) -> list[dict[str, Any]]:
    """Collect the accuracies, with their standard errors, of each model that has a few-shot result."""
    rows = []
    for model in MODELS:
        path = out / f"fewshot-{model.run}.json"
        if path.is_file():
            found = read_json(path)["tasks"]
            rows.append({"model": model.title, "documents": found[TASKS[0][0]]["documents"]})
            rows[-1] |= {task: [found[task]["metrics"][name] for name in (m, f"{m}_stderr")] for task, m, _ in TASKS}
    return rows


def tables(result: dict[str, Any]) -> list[Table]:
    """Make the tables of the models' sizes and perplexities, and of their few-shot accuracies in percent."""
    models, shots = result["models"], result["fewshot"]
    rows = [
        [
            row["model"],
            *(human_count(row[key]) for key in ("non_embedding_params", "lora_params", "tokens")),
            "" if row["perplexity_before"] is None else f"{row['perplexity_before']:.2f}",
            f"{row['perplexity']:.2f}",
            f"{row['perplexity'] / models[0]['perplexity']:.2f}",
            f"{row['first_exit_perplexity']:.2f}" if row["num_loops"] > 1 else "",
        ]
        for row in models
    ]
    header = ["model", "non-embedding parameters", "of these LoRA", "tokens", "perplexity before", "after", "over base"]
    bigram = result["bigram_perplexity"]
    floor = (
        f"Held-out packages of the standard library. A bigram model has {bigram:.2f}; half of it is {bigram / 2:.2f}."
    )
    accuracies = [
        [
            row["model"],
            *(" ± ".join(f"{100 * value:.1f}" for value in row[task] if value is not None) for task, *_ in TASKS),
        ]
        for row in shots
    ]
    heads = [f"{title} ({task}, {metric})" for task, metric, title in TASKS]
    made_up = "Tasks in the form of LAMBADA and HellaSwag, made up of held-out code: no benchmark."
    return [
        Table("", [*header, "exit after the first loop"], rows, notes=[floor]),
        Table(
            "",
            [f"few-shot, %, of {shots[0]['documents']} documents", *heads],
            [*accuracies, ["by chance", "0.0", "25.0"]],
            notes=[made_up],
        ),
    ]


def main() -> None:
    out = demo_directory()
    rows = read_rows(out, MODELS)
    shots = read_fewshot_rows(out)
    base, bigram = rows[0]["perplexity"], read_json(out / "bigram.json")["perplexity"]
    result = {"kind": "demo-scratch", "bigram_perplexity": bigram, "models": rows, "fewshot": shots}
    text = "\n\n".join(table.markdown() for table in tables(result)) + "\n"
    atomic_write(out / "report.md", text)
    write_result(out / "report.json", result)
    plot_curves(out, out / "curves.png", MODELS, "From scratch: base, reduced-size. Further trained: the others")
    print(text)
    if base > bigram / 2:
        raise UserError(
            f"{out / 'base.json'}: field 'perplexity': found {base:.2f}; expected below half the bigram model's "
            f"({bigram / 2:.2f}): the base is not trained enough to compare with, raise DEMO_BASE_TOKENS"
        )


if __name__ == "__main__":
    run_command(main)
