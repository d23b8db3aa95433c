"""Unroll a checkpoint into an ordinary Hugging Face directory that any tool for the base runs.

    python -m rrt.export --checkpoint runs/out/relaxed --out runs/out/unrolled

The work is done by :mod:`rrt.folding.unroll`.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from rrt.checkpoint.families import FAMILIES
from rrt.common.cli import CommandParser, human_bytes, human_count, run_command
from rrt.common.dtypes import add_dtype_flag, chosen_dtype, dtype_name
from rrt.folding.unroll import PreparedExport, prepare_export, run_export


def describe(prepared: PreparedExport) -> str:
    """Describe what the command is about to do."""
    model, recursion = prepared.source.model, prepared.source.recursion
    layers = recursion.layers_per_loop(model)
    architecture = FAMILIES[model.family].architecture
    return "\n".join(
        (
            f"from  {prepared.source.directory}: {recursion.num_loops} loops x {layers} layers, "
            f"LoRA rank {recursion.lora_rank}",
            f"to    {prepared.out}: {architecture}, {model.num_layers} layers, {_size(prepared)}",
            *(f"notice: {notice}" for notice in prepared.notices),
        )
    )


def _size(prepared: PreparedExport) -> str:
    sizes = prepared.after
    return f"{human_count(sizes.total_params)} parameters, {human_bytes(sizes.bytes)} {dtype_name(prepared.dtype)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``python -m rrt.export``; see the head of this file."""
    parser = CommandParser(prog="python -m rrt.export", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="one of our checkpoints, an HF directory or a .gguf",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="HF directory to create")
    add_dtype_flag(parser, "dtype of the written tensors")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    arguments = parser.parse_args(argv)
    prepared = prepare_export(
        arguments.checkpoint, arguments.out, dtype=chosen_dtype(arguments), overwrite=arguments.overwrite
    )
    print(describe(prepared), flush=True)
    start = time.monotonic()
    run_export(prepared, progress=True)
    print(f"wrote {prepared.out} in {time.monotonic() - start:.1f} s: {_size(prepared)}")


if __name__ == "__main__":
    run_command(main)
