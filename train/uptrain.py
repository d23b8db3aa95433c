"""Uptrain a checkpoint: torchrun --nproc-per-node 8 train/uptrain.py --recipe train/recipes/gemma_15b.toml \\
    --checkpoint.path runs/out/relaxed --data.path data/slimpajama-gemma --run.out runs/out/uptrained

Small, on a laptop without a GPU (`make demo` does this and more):

    torchrun --nproc-per-node 2 train/uptrain.py --checkpoint.path runs/out/demo/recursive \\
        --data.path runs/out/demo/data --data.seq_len 256 --optim.warmup_steps 2 --run.micro_batch 4 \\
        --run.tokens 65536 --run.batch_tokens 8192 --run.out runs/out/demo/uptrained

All parameters train: the shared block, every LoRA, norms, embedding and head (PAPER, Uptraining). Running the
same command again continues from the newest `step-N/` in `run.out`. It also runs without torchrun, alone.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rrt.cli import run_command
from rrt.config import doc
from rrt.loaders import open_source
from rrt.processes import first_reports_errors
from rrt.tokenizer import load_tokenizer
from train.architecture import (
    Training,
    check_distillation,
    check_start,
    planned_distillation,
    start_architecture,
    teacher_architecture,
)
from train.distributed import Processes, agree, processes
from train.estimate import estimate_table
from train.objective import uptraining
from train.recipe import DataConfig, DistillConfig, GuardConfig, OptimConfig, RunConfig, StartConfig, read_command
from train.trainer import Start, Trainer


@dataclass(frozen=True)
class CheckpointConfig:
    """The model to uptrain."""

    path: str = doc("a checkpoint written by rrt.convert, or an HF directory (the full-size baseline)")


@dataclass(frozen=True)
class UptrainRecipe:
    checkpoint: CheckpointConfig
    start: StartConfig
    distill: DistillConfig
    data: DataConfig
    optim: OptimConfig
    run: RunConfig
    guard: GuardConfig


def training(recipe: UptrainRecipe) -> Training:
    """What the recipe trains, without its weights."""
    model, recursive = start_architecture(recipe.checkpoint.path, recipe.start)
    distill = planned_distillation(recipe.distill, recipe.start)
    return Training(model, recursive, uptraining(distill), teacher=teacher_architecture(distill))


def make_trainer(recipe: UptrainRecipe, group: Processes) -> Trainer:
    """Open the checkpoint and check that it, the data and the recipe fit together."""
    check_distillation(recipe.distill, recipe.start)
    path = Path(recipe.checkpoint.path)
    source = open_source(path)
    check_start(recipe.checkpoint.path, source.recursive, recipe.start)
    start = Start(
        "uptrain",
        source.model,
        source.recursive,
        load_tokenizer(path),
        lambda: source.get,
        path,
        objective=uptraining(recipe.distill),
        teacher=None if recipe.distill.teacher is None else Path(recipe.distill.teacher),
    )
    return Trainer(recipe, start, group)


@first_reports_errors
def main() -> None:
    recipe, dry_run = read_command(UptrainRecipe, __doc__ or "")
    if dry_run is not None:
        print(estimate_table(recipe, training(recipe), dry_run))
        return
    with processes(recipe.run.device, recipe.run.shard_size) as group:
        agree(lambda: make_trainer(recipe, group)).run()


if __name__ == "__main__":
    run_command(main)
