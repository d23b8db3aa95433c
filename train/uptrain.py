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

from rrt.checkpoint.source import FirstLoops
from rrt.common.cli import run_command
from rrt.common.processes import report_error_once
from rrt.common.schema import field_doc
from rrt.data.tokenizer import load_tokenizer
from rrt.model.meta import first_loops
from train.architecture import TrainingSpec, open_start, planned_distillation, start_architecture, teacher_architecture
from train.command import Command
from train.objective import uptraining
from train.recipe import DataConfig, DistillConfig, GuardConfig, OptimConfig, RunConfig, StartConfig
from train.trainer import InitialModel


@dataclass(frozen=True)
class CheckpointConfig:
    """The model to uptrain."""

    path: str = field_doc("a checkpoint written by rrt.convert, or an HF directory (the full-size baseline)")
    num_loops: int | None = field_doc(
        "train its first loops only, as a model of their depth: 1 for K pretrained layers that are not looped; "
        "default all",
        default=None,
    )


@dataclass(frozen=True)
class UptrainRecipe:
    checkpoint: CheckpointConfig
    start: StartConfig
    distill: DistillConfig
    data: DataConfig
    optim: OptimConfig
    run: RunConfig
    guard: GuardConfig


def training(recipe: UptrainRecipe) -> TrainingSpec:
    """What the recipe trains, without its weights."""
    model, recursion = start_architecture(recipe.checkpoint.path, recipe.start)
    if recipe.checkpoint.num_loops is not None:
        model, recursion = first_loops(model, recursion, recipe.checkpoint.num_loops, "the checkpoint")
    distill = planned_distillation(recipe.distill, recipe.start)
    return TrainingSpec(model, recursion, uptraining(distill), teacher=teacher_architecture(distill))


def start(recipe: UptrainRecipe) -> InitialModel:
    """Open the checkpoint."""
    source = open_start(recipe.checkpoint.path, recipe.start)
    if recipe.checkpoint.num_loops is not None:
        source = FirstLoops(source, recipe.checkpoint.num_loops)
    return InitialModel(
        "uptrain",
        source.model,
        source.recursion,
        load_tokenizer(source.directory),
        lambda: source.get,
        source.directory,
        objective=uptraining(recipe.distill),
        teacher=recipe.distill.teacher_path,
    )


COMMAND = Command(UptrainRecipe, training, start)


@report_error_once
def main() -> None:
    COMMAND.run(__doc__ or "")


if __name__ == "__main__":
    run_command(main)
