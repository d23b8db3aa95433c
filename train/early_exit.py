"""Train the exits after every loop: torchrun --nproc-per-node 8 train/early_exit.py \\
    --recipe train/recipes/gemma.toml#15b --checkpoint.path models/gemma-b2-r512-15b/final --exits.distill last \\
    --data.path data/slimpajama-gemma --run.out models/gemma-b2-r512-exits

Small, on a laptop without a GPU (after `make demo`):

    torchrun --nproc-per-node 2 train/early_exit.py --checkpoint.path runs/out/demo-scratch/recursive-uptrained/final \\
        --data.path runs/out/demo-scratch/data --data.seq_len 256 --optim.warmup_steps 2 --run.micro_batch 4 \\
        --run.tokens 65536 --run.batch_tokens 8192 --run.out runs/out/demo-scratch/exits

Each exit goes through the model's own final norm and head (arXiv 2410.20672, section 2.4). From an uptrained checkpoint
this is post-training; from a converted one it is co-training, uptraining with the exits' losses. The settings of the
paper: `--exits.weighting weighted`; `aggressive` with a coefficient of 0.3, 0.1, 0.05 or 0.01; `--exits.distill last`;
`--exits.freeze true --exits.head_lora_rank 128`. The `config.json` of `final/` lists the trained exits as `exit_loops`.
Exit translators that the checkpoint has from `python -m rrt.fit_exits` are trained along; `--exits.freeze true` trains
them alone, or them and the LoRA.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rrt.checkpoint.source import Source
from rrt.common.cli import run_command
from rrt.common.processes import report_error_once
from rrt.common.schema import field_doc
from rrt.data.tokenizer import load_tokenizer
from rrt.errors import UserError
from rrt.folding.fold import seeded_generator
from rrt.model.config import RecursiveConfig
from rrt.model.meta import parameter_shapes
from train.architecture import (
    InitialModel,
    TrainingSpec,
    checkpoint_architecture,
    open_checkpoint,
    teacher_architecture,
    with_stand_in_teacher,
)
from train.command import Command
from train.objective import early_exit_objective
from train.recipe import DataConfig, DistillConfig, ExitsConfig, GuardConfig, OptimConfig, RunConfig, StartConfig


@dataclass(frozen=True)
class EarlyExitCheckpointConfig:
    """The model whose exits are trained."""

    path: str = field_doc("a recursive checkpoint: uptrained (post-training) or fresh from rrt.convert (co-training)")


@dataclass(frozen=True)
class EarlyExitRecipe:
    checkpoint: EarlyExitCheckpointConfig
    start: StartConfig
    exits: ExitsConfig
    distill: DistillConfig
    data: DataConfig
    optim: OptimConfig
    run: RunConfig
    guard: GuardConfig


def with_exits(recursion: RecursiveConfig, exits: ExitsConfig) -> RecursiveConfig:
    """Return the checkpoint's configuration with the exits that the recipe trains.

    Raises:
        UserError: the checkpoint has no state to exit from, or a LoRA on the head of another rank than the recipe asks
            for, or nothing is left to train.
    """
    recursion.require_whole_loops("field 'checkpoint.path': found a model")
    rank = exits.head_lora_rank
    if exits.freeze and not rank and not recursion.exit_translators:
        raise UserError(
            "field 'exits.head_lora_rank': found 0; expected a positive rank with exits.freeze, or a checkpoint with "
            "exit translators: python -m rrt.fit_exits"
        )
    if recursion.head_lora_rank and rank != recursion.head_lora_rank:
        raise UserError(
            f"field 'exits.head_lora_rank': found {rank}; expected the checkpoint's, {recursion.head_lora_rank}"
        )
    return replace(recursion, exit_loops=tuple(range(recursion.num_loops - 1)), head_lora_rank=rank)


def initial_values(source: Source, recursion: RecursiveConfig, seed: int) -> Callable[[str], Tensor]:
    """Return a function from a parameter's name to its initial value: the checkpoint's, or B = 0 in a new head LoRA."""
    shapes = parameter_shapes(source.model, recursion)

    def get(name: str) -> Tensor:
        if not name.startswith("head_lora_") or source.recursion.head_lora_rank:
            return source.get(name)
        if name == "head_lora_b":
            return torch.zeros(shapes[name])
        return torch.randn(shapes[name], generator=seeded_generator(seed, name)) / math.sqrt(shapes[name][-1])

    return get


def make_training_spec(recipe: EarlyExitRecipe) -> TrainingSpec:
    """Describe the recipe's training without weights."""
    model, recursion = checkpoint_architecture(recipe.checkpoint.path, recipe.start)
    distill = with_stand_in_teacher(recipe.distill, recipe.start)
    return TrainingSpec(
        model,
        with_exits(recursion, recipe.exits),
        early_exit_objective(recipe.exits, distill, recursion.num_loops),
        teacher_architecture(distill),
    )


def open_initial_model(recipe: EarlyExitRecipe) -> InitialModel:
    """Open the checkpoint."""
    source = open_checkpoint(recipe.checkpoint.path, recipe.start)
    objective = early_exit_objective(recipe.exits, recipe.distill, source.recursion.num_loops)
    recursion = with_exits(source.recursion, recipe.exits)
    return InitialModel(
        "early-exit",
        source.model,
        recursion,
        load_tokenizer(source.directory),
        lambda: initial_values(source, recursion, recipe.run.seed),
        source.directory,
        objective=objective,
        teacher=recipe.distill.teacher_path,
    )


COMMAND = Command(EarlyExitRecipe, make_training_spec, open_initial_model)


@report_error_once
def main() -> None:
    COMMAND.run(__doc__ or "")


if __name__ == "__main__":
    run_command(main)
