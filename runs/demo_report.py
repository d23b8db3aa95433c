"""Tables and loss curves of a finished demo: python runs/demo_report.py runs/out/demo

All numbers come from the JSON files of the demo's steps.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.tables import Table
from rrt.checkpoint.source import open_source
from rrt.common.cli import human_count, run_command
from rrt.common.files import atomic_write, read_json
from rrt.common.results import write_result
from rrt.errors import UserError
from rrt.model.sizes import model_sizes

# (title, training run, result before uptraining, result at the end)
MODELS = (
    ("base", "base", None, "base"),
    ("reduced-size", "reduced", None, "reduced"),
    ("recursive (stepwise)", "recursive-uptrained", "recursive-before", "recursive-after"),
    ("relaxed (average + SVD)", "relaxed-uptrained", "relaxed-before", "relaxed-after"),
    ("relaxed, distilled", "distilled-uptrained", "relaxed-before", "distilled-after"),
    ("recursive, with exits", "exits-trained", "recursive-after", "exits-after"),
)

# (task, metric, title) of runs/demo_tasks.py
TASKS = (("lambada_openai", "acc", "last word"), ("hellaswag", "acc_norm", "one of four endings"))


def read_curve(path: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_rows(out: Path) -> list[dict[str, Any]]:
    """Collect sizes, tokens, training speed and perplexities of each model."""
    rows = []
    for title, run, before, after in MODELS:
        source = open_source(out / run / "final")
        sizes = model_sizes(source.model, source.recursion, source.dtype)
        records = read_curve(out / run / "metrics.jsonl")
        speeds = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
        rows.append(
            {
                "model": title,
                "num_loops": source.recursion.num_loops,
                "non_embedding_params": sizes.non_embedding_params,
                "lora_params": sizes.lora_params,
                "tokens": records[-1]["tokens"],
                "median_tokens_per_second": statistics.median(speeds),
                "perplexity_before": None if before is None else read_json(out / f"{before}.json")["perplexity"],
                "perplexity": read_json(out / f"{after}.json")["perplexity"],
                "first_exit_perplexity": read_json(out / f"{after}.json")["exits"][0]["perplexity"],
            }
        )
    return rows


def read_fewshot_rows(out: Path) -> list[dict[str, Any]]:
    """Collect the accuracies, with their standard errors, of each model that has a few-shot result."""
    rows = []
    for title, run, *_ in MODELS:
        path = out / f"fewshot-{run}.json"
        if path.is_file():
            found = read_json(path)["tasks"]
            rows.append({"model": title, "documents": found[TASKS[0][0]]["documents"]})
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


def plot_curves(out: Path, path: Path) -> None:
    """Plot the training loss of every run over its tokens, averaged over ten steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    for title, run, _, _ in MODELS:
        records = read_curve(out / run / "metrics.jsonl")
        groups = [records[i : i + 10] for i in range(0, len(records), 10)]
        tokens = [group[-1]["tokens"] / 1e6 for group in groups]
        axes.plot(tokens, [sum(r["loss"] for r in group) / len(group) for group in groups], label=title)
    axes.set_xlabel("tokens (millions)")
    axes.set_ylabel("training loss (nats per token)")
    axes.set_title("From scratch: base, reduced-size. Further trained: the others")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError(f"arguments: found {len(sys.argv) - 1}; expected the demo's output directory")
    out = Path(sys.argv[1])
    rows = read_rows(out)
    shots = read_fewshot_rows(out)
    base, bigram = rows[0]["perplexity"], read_json(out / "bigram.json")["perplexity"]
    result = {"kind": "demo", "bigram_perplexity": bigram, "models": rows, "fewshot": shots}
    text = "\n\n".join(table.markdown() for table in tables(result)) + "\n"
    atomic_write(out / "report.md", text)
    write_result(out / "report.json", result)
    plot_curves(out, out / "curves.png")
    print(text)
    if base > bigram / 2:
        raise UserError(
            f"{out / 'base.json'}: field 'perplexity': found {base:.2f}; expected below half the bigram model's "
            f"({bigram / 2:.2f}): the base is not trained enough to compare with, raise DEMO_BASE_TOKENS"
        )


if __name__ == "__main__":
    run_command(main)
