"""Fit early exits to a looped checkpoint without training: one pass over a text, and a regression for each exit.

    python -m rrt.fit_exits --checkpoint runs/out/relaxed --calibration text.jsonl --out runs/out/relaxed-exits

The text should be of the kind that the model will write: exits fitted on prose alone do badly on code. The work is done
by :mod:`rrt.folding.exit_translators`.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rrt.common.cli import CommandParser, run_command
from rrt.common.dtypes import add_dtype_flag, chosen_dtype
from rrt.folding.calibration_text import CalibrationText
from rrt.folding.exit_translators import HELD_OUT, ExitFigures, ExitFitReport, fit_exits
from rrt.folding.flags import add_calibration_text_flags


def figures_table(report: ExitFitReport) -> str:
    """Format agreement with the last loop and perplexity of each exit, before the fit and after it."""
    rows = [("exit", "agreement before", "agreement after", "perplexity before", "perplexity after")]
    for loop, (before, after) in enumerate(zip(report.before, report.after, strict=True)):
        (old, old_perplexity), (new, new_perplexity) = _cells(before), _cells(after)
        rows.append((f"loop {loop}", old, new, old_perplexity, new_perplexity))
    rows.append(("last", "", "", "", _cells(report.last)[1]))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [f"{report.num_held_out:,} tokens that were not fitted, of {report.num_tokens + report.num_held_out:,}"]
    lines += ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(lines)


def _cells(figures: ExitFigures) -> tuple[str, str]:
    return f"{figures.agreement:.1%}", f"{figures.perplexity:,.2f}"


def _make_parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m rrt.fit_exits", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="looped checkpoint of ours")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint directory to create")
    add_calibration_text_flags(
        parser,
        f"text such as the model will write, of which one row in {HELD_OUT} is held out for the figures",
        num_tokens=65536,
        required=True,
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: CUDA if available)")
    add_dtype_flag(parser, "dtype to compute in; the checkpoint keeps its own")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``python -m rrt.fit_exits``; see the head of this file."""
    arguments = _make_parser().parse_args(argv)
    report = fit_exits(
        arguments.checkpoint,
        arguments.out,
        CalibrationText(tuple(arguments.calibration), arguments.calibration_tokens, arguments.calibration_context),
        dtype=chosen_dtype(arguments),
        device=arguments.device,
        overwrite=arguments.overwrite,
        progress=True,
    )
    for notice in report.notices:
        print(f"notice: {notice}")
    print(figures_table(report))
    print(f"wrote {report.out} in {report.seconds:.1f} s")


if __name__ == "__main__":
    run_command(main)
