"""One page from many results: python eval/report.py runs/out/demo/*/ runs/out/demo/*.json --out report.html

Reads results (--json) of eval/perplexity.py, fewshot.py, exits.py, throughput.py and bigram.py, and the directories (or
metrics.jsonl) of training runs. Writes a single HTML file that needs no network: size against quality, loss curves,
exits, throughput, each with its tables.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.flags import check_output_file
from eval.report_page import KINDS, Results, render_page, render_sections
from eval.tables import expect_whole_result
from rrt.common.cli import CommandParser, run_command
from rrt.common.files import atomic_write, read_json
from rrt.errors import UserError

METRICS_FILE = "metrics.jsonl"


def read_results(paths: Sequence[Path]) -> Results:
    """Read files and run directories and sort them by kind.

    Raises:
        UserError: a path is missing, of an unknown kind, or lacks a field that the page shows.
    """
    results = Results()
    for path in paths:
        if path.is_dir() or path.name == METRICS_FILE:
            metrics = path / METRICS_FILE if path.is_dir() else path
            results.runs.append((metrics.parent, read_metrics(metrics)))
            continue
        result = read_json(path)
        kind = result.get("kind")
        if kind not in KINDS:
            raise UserError(
                f"{path}: field 'kind': found {kind!r}; expected a result of eval/ ({', '.join(KINDS)}), made again if "
                "it is older than this field, or the directory of a training run"
            )
        alone = Results()
        alone.by_kind[kind].append((path, result))
        with expect_whole_result(path, kind):
            render_sections(alone)
        results.by_kind[kind].append((path, result))
    return results


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read tokens and loss of the steps of a metrics.jsonl, without steps whose loss is null."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a training run's directory, which holds one")
    records = []
    for number_, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            if record["loss"] is not None:
                records.append({"tokens": int(record["tokens"]), "loss": float(record["loss"])})
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number_}: {type(error).__name__}: {error}; expected an object with tokens and loss"
            ) from None
    if not records:
        raise UserError(f"{path}: holds no step; expected at least one")
    return records


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT", help="JSON results, directories of runs")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="page to write (default report.html)")
    arguments = parser.parse_args()
    check_output_file("--out", arguments.out)
    results = read_results(arguments.results)
    atomic_write(arguments.out, render_page(results))
    print(f"wrote {arguments.out}: {len(arguments.results)} results")


if __name__ == "__main__":
    run_command(main)
