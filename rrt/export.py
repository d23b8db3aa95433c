"""Unroll a checkpoint into an ordinary Hugging Face directory that any tool for Gemma, Llama or GPT-NeoX runs.

    python -m rrt.export --checkpoint runs/out/relaxed --out runs/out/unrolled

The work is done by :mod:`rrt.folding.unroll`.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rrt.checkpoint.hf_config import ARCHITECTURES
from rrt.common.cli import human_bytes, human_count, run_command
from rrt.common.dtypes import add_dtype_flag, chosen_dtype, dtype_name
from rrt.folding.unroll import ExportPlan, plan_export, run_export


def describe_plan(plan: ExportPlan) -> str:
    """What the command is about to do, for people."""
    model, recursion = plan.source.model, plan.source.recursion
    layers = recursion.layers_per_loop(model)
    return "\n".join(
        (
            f"from  {plan.source.directory}: {recursion.num_loops} loops x {layers} layers, "
            f"LoRA rank {recursion.lora_rank}",
            f"to    {plan.out}: {ARCHITECTURES[model.family]}, {model.num_layers} layers, {_size(plan)}",
            *(f"notice: {notice}" for notice in plan.notices),
        )
    )


def _size(plan: ExportPlan) -> str:
    return (
        f"{human_count(plan.after.total_params)} parameters, {human_bytes(plan.after.bytes)} {dtype_name(plan.dtype)}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """``python -m rrt.export``; see the head of this file."""
    parser = argparse.ArgumentParser(prog="python -m rrt.export", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="one of our checkpoints, or an HF directory"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="HF directory to create")
    add_dtype_flag(parser, "dtype of the written tensors")
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    arguments = parser.parse_args(argv)
    plan = plan_export(
        arguments.checkpoint, arguments.out, dtype=chosen_dtype(arguments), overwrite=arguments.overwrite
    )
    print(describe_plan(plan), flush=True)
    start = time.monotonic()
    run_export(plan, progress=True)
    print(f"wrote {plan.out} in {time.monotonic() - start:.1f} s: {_size(plan)}")


if __name__ == "__main__":
    run_command(main)
