"""The flag --json of the benchmarks, and where their results go: bench/out/, which git ignores.

`python bench/tabulate.py` makes the tables in bench/results/ from them.
"""

import argparse
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from eval.flags import check_output_file
from rrt.common.files import write_json
from rrt.common.results import result_header, write_result
from rrt.errors import UserError
from rrt.ops import build_info

OUT = Path(__file__).resolve().parent / "out"


def add_json_flag(parser: argparse.ArgumentParser, bench: str) -> None:
    """Add `--json [OUT]`; without OUT the result is named after the benchmark and the time."""
    default = OUT / f"{bench}-{datetime.now():%Y-%m-%d-%H%M%S}.json"
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=default,
        metavar="OUT",
        help=f"also write the results to OUT (default bench/out/{bench}-DATE.json)",
    )


def check_json_flag(path: Path | None) -> None:
    """Refuse a path that could not be written, before anything is measured. Make bench/out/ if the path is in it."""
    if path is not None and path.resolve().parent == OUT:
        OUT.mkdir(exist_ok=True)
    check_output_file("--json", path)


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")


def check_device_flag(device: str) -> None:
    """Refuse a GPU that is not there, and to take the PyTorch references for our kernels on one."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: found cuda; no GPU is visible to torch: expected cpu")
    if device == "cuda" and not build_info().cuda:
        found = build_info().reason or "it was built without CUDA"
        raise UserError(
            f"--device: found cuda without our kernels in the native library ({found}); expected them: "
            "RRT_WITH_CUDA=1 RRT_WITH_NATIVE=1 pip install --no-build-isolation --no-deps -e ."
        )


def save_result(path: Path | None, kind: str, values: dict[str, Any], device: torch.device | str = "cpu") -> None:
    """Write a result of this kind, if a path is given, and say where."""
    if path is not None:
        write_result(path, {"kind": kind, **values}, device)
        print(f"wrote {path}", flush=True)


class ResultFile:
    """A result that is written again, atomically, after each of its records, so that a run cut off loses none.

    Field `complete` is False until `finish`. Without a path nothing is written.
    """

    def __init__(self, path: Path | None, kind: str, device: torch.device | str = "cpu") -> None:
        self._path, self._kind = path, kind
        self._header = None if path is None else result_header(device)

    def update(self, values: dict[str, Any], complete: bool = False) -> None:
        if self._path is not None and self._header is not None:
            write_json(self._path, {"kind": self._kind, **self._header, **values, "complete": complete})

    def finish(self, values: dict[str, Any]) -> None:
        """Write the whole result, and say where."""
        self.update(values, complete=True)
        if self._path is not None:
            print(f"wrote {self._path}", flush=True)
