"""Turn results into a page of Markdown for bench/results/:

    python bench/tabulate.py RESULT.json [...] --out bench/results/2026-11_epyc-avx512bf16_kernels-gemma-bf16.md \
        --note "One run."

RESULT.json comes from --json of a benchmark or an evaluation, or is the demo's report.json. The page has the command,
code version, machine and date of each result, and the tables that its benchmark prints; of bench/kernels.py a summary.
Pages are named MONTH_MACHINE_SUBJECT.md and have at most 80 lines. Raw results are committed as small archives alone.
"""

import argparse
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eval.flags import check_output_file
from eval.tables import Table, expect_whole_result
from rrt.common.cli import CommandParser, run_command
from rrt.common.files import atomic_write, read_json
from rrt.errors import UserError

MAX_LINES = 80
MODULES = {
    "bigram": "eval.bigram",
    "demo": "runs.demo_report",
    "demo-scratch": "runs.demo_scratch_report",
    "exits": "eval.exits",
    "fewshot": "eval.fewshot",
    "fewshot-speed": "bench.fewshot",
    "generation-speed": "bench.generate",
    "kernels": "bench.kernel_report",
    "losses": "bench.losses",
    "perplexity": "eval.perplexity",
    "prepare": "bench.prepare",
    "serving-http": "bench.serving_http",
    "serving-latency": "bench.serving_online",
    "serving-speed": "bench.serving",
    "throughput": "eval.throughput",
    "throughput-paper": "eval.paper_study",
    "tile-sweep": "bench.tile_sweep",
    "training": "bench.training",
}
"""The module with the tables of each kind of result: its `summary_tables` if it has them, else its `tables`."""


def read_result(path: Path) -> dict[str, Any]:
    """Read a result.

    Raises:
        UserError: it is of an unknown kind, or lacks a field that the page shows.
    """
    result: dict[str, Any] = read_json(path)
    kind = result.get("kind")
    if kind is None:
        raise UserError(f"{path}: field 'kind' is missing; expected a result of this version: make it again")
    if kind not in tuple(MODULES):
        raise UserError(f"{path}: field 'kind': found {kind!r}; expected one of {', '.join(MODULES)}")
    with expect_whole_result(path, kind):
        make_page("", [result], [])
    return result


def result_tables(result: dict[str, Any]) -> list[Table]:
    module = import_module(MODULES[result["kind"]])
    make: Callable[[dict[str, Any]], list[Table]] = getattr(module, "summary_tables", None) or module.tables
    return make(result)


def describe(result: dict[str, Any]) -> list[str]:
    """List command (without its output files), code version, date and machine as Markdown items."""
    command = re.sub(r" --(json|plot)( [^-]\S*)?", "", result["command"])
    cores = f"{result['cores']} cores, {result['threads']} threads"
    machine = [result["device"], cores, " ".join(result.get("cpu_flags", ()))]
    if "native" in result:
        machine.append(f"native operators: {result['native']['cpu_isa']}")
    return [
        f"- command: `{command}`",
        f"- code {result['code_version']}, {result['created'][:10]}, torch {result['torch']}",
        f"- machine: {', '.join(filter(None, machine))}",
    ]


def make_page(title: str, results: list[dict[str, Any]], notes: list[str]) -> str:
    """Make the page's Markdown; notes stand below its title."""
    parts = [f"# {title}", *(["\n".join(f"- {note}" for note in notes)] if notes else [])]
    for result in results:
        parts += ["\n".join(describe(result)), *(table.markdown() for table in result_tables(result))]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULT", help="JSON results")
    parser.add_argument("--out", type=Path, required=True, metavar="PAGE", help="Markdown file to write")
    parser.add_argument("--note", action="append", default=[], metavar="TEXT", help="a caveat below the title")
    arguments = parser.parse_args()
    check_output_file("--out", arguments.out)
    month, _, rest = arguments.out.stem.partition("_")
    machine, _, subject = rest.partition("_")
    results = [read_result(path) for path in arguments.results]
    months = {result["created"][:7] for result in results}
    if not subject or months != {month}:
        found = ", ".join(sorted(months))
        raise UserError(f"--out: found {arguments.out.name}; expected MONTH_MACHINE_SUBJECT.md with month {found}")
    page = make_page(f"{subject}, {machine}, {month}", results, arguments.note)
    if (lines := page.count("\n")) > MAX_LINES:
        raise UserError(f"--out: the page has {lines} lines; expected at most {MAX_LINES}: name fewer results")
    atomic_write(arguments.out, page)
    print(f"wrote {arguments.out}: {lines} lines")


if __name__ == "__main__":
    run_command(main)
