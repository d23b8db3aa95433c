"""Train from scratch: torchrun --nproc-per-node 8 train/pretrain.py --recipe train/recipes/gemma.toml#15b \\
    --model.config gemma-2b --model.num_layers 9 --model.tokenizer gemma-2b \\
    --data.path data/slimpajama-gemma --run.out runs/out/reduced

Small, on a laptop without a GPU:

    torchrun --nproc-per-node 2 train/pretrain.py --model.config runs/demo_scratch_base.json \\
        --model.tokenizer runs/out/demo-scratch/tokenizer --data.path runs/out/demo-scratch/data --data.seq_len 256 \\
        --optim.warmup_steps 2 --run.micro_batch 4 --run.tokens 65536 --run.batch_tokens 8192 \\
        --run.out runs/out/demo-scratch/base

For the paper's reduced-size baseline (the base's shape with K layers, no loop), for a looped model without a
base, and where no base can be downloaded.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rrt.common.cli import run_command
from rrt.common.processes import report_error_once
from rrt.common.schema import field_doc
from rrt.data.tokenizer import load_tokenizer
from rrt.model.config import ModelConfig, RecursiveConfig
from rrt.model.transformer import RecursiveTransformer
from train.architecture import (
    InitialModel,
    TrainingSpec,
    read_architecture,
    teacher_architecture,
    with_stand_in_teacher,
)
from train.command import Command
from train.objective import uptraining_objective
from train.recipe import DataConfig, DistillConfig, GuardConfig, OptimConfig, RunConfig, StartConfig


@dataclass(frozen=True)
class ArchitectureConfig:
    """The model to train."""

    config: str = field_doc("its shape: a preset such as gemma-2b, an HF config.json, or a model directory")
    tokenizer: str = field_doc("directory of the tokenizer that made the data")
    num_layers: int | None = field_doc("layers, if not as many as `config` says", default=None)
    num_loops: int = field_doc("loops over a block of num_layers / num_loops shared layers", default=1)


@dataclass(frozen=True)
class PretrainRecipe:
    model: ArchitectureConfig
    start: StartConfig
    distill: DistillConfig
    data: DataConfig
    optim: OptimConfig
    run: RunConfig
    guard: GuardConfig


def architecture(recipe: PretrainRecipe) -> tuple[ModelConfig, RecursiveConfig]:
    """Return the shape of the recipe's model."""
    config, _ = read_architecture(recipe.model.config, "model.config")
    if recipe.model.num_layers is not None:
        config = replace(config, num_layers=recipe.model.num_layers)
    recursion = RecursiveConfig(num_loops=recipe.model.num_loops, init="random")
    recursion.layers_per_loop(config)
    return config, recursion


def make_training_spec(recipe: PretrainRecipe) -> TrainingSpec:
    """Describe the recipe's training without data or tokenizer."""
    distill = with_stand_in_teacher(recipe.distill, recipe.start)
    return TrainingSpec(*architecture(recipe), uptraining_objective(distill), teacher=teacher_architecture(distill))


def open_initial_model(recipe: PretrainRecipe) -> InitialModel:
    """Describe a model with random weights, which are drawn when training starts."""
    config, recursion = architecture(recipe)
    tokenizer = load_tokenizer(recipe.model.tokenizer)
    config = replace(config, bos_token_id=tokenizer.bos_id, eos_token_ids=(tokenizer.eos_id,))

    def draw() -> Callable[[str], Tensor]:
        # Every process draws the whole model in one order, so that it is the same for any number of processes.
        model = RecursiveTransformer(config, recursion)
        model.init_weights(recipe.run.seed)
        return model.get_parameter

    return InitialModel(
        "pretrain",
        config,
        recursion,
        tokenizer,
        draw,
        None,
        objective=uptraining_objective(recipe.distill),
        teacher=recipe.distill.teacher_path,
    )


COMMAND = Command(PretrainRecipe, make_training_spec, open_initial_model)


@report_error_once
def main() -> None:
    COMMAND.run(__doc__ or "")


if __name__ == "__main__":
    run_command(main)
