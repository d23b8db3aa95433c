"""Flags of a calibration text, for the commands that read one."""

import argparse

from rrt.data.corpus import INPUT_HELP
from rrt.folding.calibration_text import CalibrationText


def add_calibration_text_flags(
    parser: argparse.ArgumentParser, purpose: str, *, num_tokens: int | None = None, required: bool = False
) -> None:
    """Add ``--calibration``, for `purpose`, with how much of it is read: by default `num_tokens`."""
    default = CalibrationText(()) if num_tokens is None else CalibrationText((), num_tokens)
    parser.add_argument(
        "--calibration",
        nargs="+",
        default=[],
        required=required,
        metavar="PATH",
        help=f"{purpose}: directories of token shards, or {INPUT_HELP}; of several each gives an equal share",
    )
    parser.add_argument(
        "--calibration-tokens",
        type=int,
        default=default.num_tokens,
        metavar="N",
        help=f"tokens of the text to use, rounded up to whole rows (default: {default.num_tokens})",
    )
    parser.add_argument(
        "--calibration-context",
        type=int,
        default=default.context,
        metavar="T",
        help=f"tokens that are read together (default: {default.context})",
    )
