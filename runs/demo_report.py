"""Table, loss curves and text samples of a finished demo: python runs/demo_report.py runs/out/demo

All numbers come from the JSON files of the demo's steps.
"""

import json
import statistics
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
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


@dataclass(frozen=True)
class DemoModel:
    """A row of a demo's table: names of its files, without suffix; no run for a model that was not trained."""

    title: str
    run: str | None
    before: str | None
    """Perplexity before the run."""
    after: str


MODELS = (
    DemoModel("base", None, None, "base"),
    DemoModel("half the layers, not looped", "kept-uptrained", "kept-before", "kept-after"),
    DemoModel("recursive", "recursive-uptrained", "recursive-before", "recursive-after"),
    DemoModel("relaxed", "relaxed-uptrained", "relaxed-before", "relaxed-after"),
    DemoModel("relaxed, calibrated", "calibrated-uptrained", "calibrated-before", "calibrated-after"),
)

SAMPLES = {"base": "base", "relaxed": "relaxed, uptrained", "calibrated": "calibrated, uptrained"}
SAMPLE_WIDTH = 38


def read_curve(path: Path) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_rows(out: Path, models: Sequence[DemoModel]) -> list[dict[str, Any]]:
    """Collect sizes, tokens, training speed and perplexities of each model."""
    rows = []
    for model in models:
        result = read_json(out / f"{model.after}.json")
        source = open_source(result["checkpoint"])
        sizes = model_sizes(source.model, source.recursion, source.dtype)
        records = [] if model.run is None else read_curve(out / model.run / "metrics.jsonl")
        speeds = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
        before = None if model.before is None else read_json(out / f"{model.before}.json")["perplexity"]
        rows.append(
            {
                "model": model.title,
                "num_loops": source.recursion.num_loops,
                "total_params": sizes.total_params,
                "non_embedding_params": sizes.non_embedding_params,
                "lora_params": sizes.lora_params,
                "tokens": records[-1]["tokens"] if records else 0,
                "median_tokens_per_second": statistics.median(speeds) if speeds else None,
                "perplexity_before": before,
                "perplexity": result["perplexity"],
                "first_exit_perplexity": result["exits"][0]["perplexity"],
            }
        )
    return rows


def tables(result: dict[str, Any]) -> list[Table]:
    """Make the table of the models' sizes and perplexities."""
    models = result["models"]
    rows = [
        [
            row["model"],
            *(human_count(row[key]) for key in ("total_params", "non_embedding_params", "lora_params", "tokens")),
            "" if row["perplexity_before"] is None else f"{row['perplexity_before']:,.2f}",
            f"{row['perplexity']:,.2f}",
            f"{row['perplexity'] / models[0]['perplexity']:.2f}",
        ]
        for row in models
    ]
    header = [
        "model",
        "parameters",
        "non-embedding",
        "of these LoRA",
        "tokens",
        "perplexity before",
        "after",
        "over base",
    ]
    note = (
        f"Perplexity of {result['heldout_tokens']:,} held-out tokens of the standard library, windows of "
        f"{result['context']}, {result['dtype']}."
    )
    return [Table("", header, rows, notes=[note])]


def side_by_side(texts: dict[str, str], width: int) -> str:
    """Format texts as columns of `width` characters, each under its title."""
    columns = [
        [title, "-" * len(title)] + [part for line in text.splitlines() for part in _wrap(line, width)]
        for title, text in texts.items()
    ]
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join("  ".join(cell.ljust(width) for cell in row).rstrip() for row in rows)


def _wrap(line: str, width: int) -> list[str]:
    wrap = textwrap.TextWrapper(width, replace_whitespace=False, drop_whitespace=False)
    return wrap.wrap(line.replace("\t", "    ")) or [""]


def plot_curves(out: Path, path: Path, models: Sequence[DemoModel], title: str, steps: int = 10) -> None:
    """Plot the training loss of every run over its tokens, averaged over `steps` steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    for model in models:
        if model.run is None:
            continue
        records = read_curve(out / model.run / "metrics.jsonl")
        groups = [records[i : i + steps] for i in range(0, len(records), steps)]
        tokens = [group[-1]["tokens"] / 1e6 for group in groups]
        axes.plot(tokens, [sum(r["loss"] for r in group) / len(group) for group in groups], label=model.title)
    axes.set_xlabel("tokens (millions)")
    axes.set_ylabel("training loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def demo_directory() -> Path:
    """Return the command line's one argument."""
    if len(sys.argv) != 2:
        raise UserError(f"arguments: found {len(sys.argv) - 1}; expected the demo's output directory")
    return Path(sys.argv[1])


def main() -> None:
    out = demo_directory()
    base = read_json(out / "base.json")
    samples = {name: (out / f"sample-{name}.txt").read_text(encoding="utf-8") for name in SAMPLES}
    result = {
        "kind": "demo",
        "models": read_rows(out, MODELS),
        "heldout_tokens": base["tokens"],
        "context": base["context"],
        "dtype": base["dtype"],
        "samples": samples,
    }
    text = "\n\n".join(table.markdown() for table in tables(result))
    text += "\n\n~~~text\n" + side_by_side({SAMPLES[name]: text for name, text in samples.items()}, SAMPLE_WIDTH)
    text += "\n~~~\n"
    atomic_write(out / "report.md", text)
    write_result(out / "report.json", result)
    plot_curves(out, out / "curves.png", MODELS, "Uptraining with the base as teacher", steps=4)
    print(text)


if __name__ == "__main__":
    run_command(main)
