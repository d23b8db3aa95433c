"""Uptrain a checkpoint: torchrun --nproc-per-node 8 train/uptrain.py --recipe train/recipes/gemma.toml#15b \\
    --checkpoint.path runs/out/relaxed --data.path data/slimpajama-gemma --run.out runs/out/uptrained

Small, on a laptop without a GPU (`make demo-scratch` does this and more):

    torchrun --nproc-per-node 2 train/uptrain.py --checkpoint.path runs/out/demo-scratch/recursive \\
        --data.path runs/out/demo-scratch/data --data.seq_len 256 --optim.warmup_steps 2 --run.micro_batch 4 \\
        --run.tokens 65536 --run.batch_tokens 8192 --run.out runs/out/demo-scratch/uptrained

All parameters train: the shared block, every LoRA, norms, embedding and head (arXiv 2410.20672, section 2.3). Running
the same command again continues from the latest `step-N/` in `run.out`. Without torchrun it runs in one process.
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
from train.architecture import (
    InitialModel,
    TrainingSpec,
    checkpoint_architecture,
    open_checkpoint,
    teacher_architecture,
    with_stand_in_teacher,
)
from train.command import Command
from train.objective import uptraining_objective
from train.recipe import DataConfig, DistillConfig, GuardConfig, OptimConfig, RunConfig, StartConfig

STALE_TRANSLATORS = (
    "the checkpoint's exits were fitted to the model as it was before this training: run python -m rrt.fit_exits again "
    "afterwards"
)


@dataclass(frozen=True)
class UptrainCheckpointConfig:
    """The model to uptrain."""

    path: str = field_doc(
        "a checkpoint written by rrt.convert, or an HF directory or .gguf file (the full-size baseline)"
    )
    num_loops: int | None = field_doc(
        "train its first loops only, as a model of their depth: 1 for K pretrained layers that are not looped; "
        "default all",
        default=None,
    )


@dataclass(frozen=True)
class UptrainRecipe:
    checkpoint: UptrainCheckpointConfig
    start: StartConfig
    distill: DistillConfig
    data: DataConfig
    optim: OptimConfig
    run: RunConfig
    guard: GuardConfig


def make_training_spec(recipe: UptrainRecipe) -> TrainingSpec:
    """Describe the recipe's training without weights."""
    model, recursion = checkpoint_architecture(recipe.checkpoint.path, recipe.start)
    if recipe.checkpoint.num_loops is not None:
        model, recursion = first_loops(model, recursion, recipe.checkpoint.num_loops, "the checkpoint")
    distill = with_stand_in_teacher(recipe.distill, recipe.start)
    return TrainingSpec(model, recursion, uptraining_objective(distill), teacher=teacher_architecture(distill))


def open_initial_model(recipe: UptrainRecipe) -> InitialModel:
    """Open the checkpoint."""
    source = open_checkpoint(recipe.checkpoint.path, recipe.start)
    if recipe.checkpoint.num_loops is not None:
        source = FirstLoops(source, recipe.checkpoint.num_loops)
    return InitialModel(
        "uptrain",
        source.model,
        source.recursion,
        load_tokenizer(source.directory),
        lambda: source.get,
        source.directory,
        objective=uptraining_objective(recipe.distill),
        teacher=recipe.distill.teacher_path,
        notices=(STALE_TRANSLATORS,) if source.recursion.exit_translators else (),
    )


COMMAND = Command(UptrainRecipe, make_training_spec, open_initial_model)


@report_error_once
def main() -> None:
    COMMAND.run(__doc__ or "")


if __name__ == "__main__":
    run_command(main)
