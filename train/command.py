"""The common part of the training commands: read a recipe, then train, or estimate what training will take."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from train.architecture import InitialModel, TrainingSpec, check_distillation
from train.distributed import Processes, processes, raise_everywhere
from train.estimate import estimate_table
from train.recipe import DistillConfig, Recipe, StartConfig, read_command
from train.trainer import Trainer


class CommandRecipe(Recipe, Protocol):
    """The tables of every command's recipe."""

    @property
    def start(self) -> StartConfig: ...
    @property
    def distill(self) -> DistillConfig: ...


R = TypeVar("R", bound=CommandRecipe)


@dataclass(frozen=True)
class Command(Generic[R]):
    """A training command."""

    recipe: type[R]
    make_training_spec: Callable[[R], TrainingSpec]
    """Describes a recipe's training without weights."""
    open_initial_model: Callable[[R], InitialModel]
    """Opens and checks the model that a recipe's training begins with."""

    def make_trainer(self, recipe: R, group: Processes) -> Trainer:
        """Make the trainer of a recipe's run, with everything checked that can be checked beforehand.

        Raises:
            UserError: the initial model, the data and the recipe do not fit together.
        """
        check_distillation(recipe.distill, recipe.start)
        return Trainer(recipe, self.open_initial_model(recipe), group)

    def run(self, description: str) -> None:
        """Train or estimate as the command line says; `description` is printed first by `--help`."""
        recipe, dry_run = read_command(self.recipe, description)
        if dry_run is not None:
            print(estimate_table(recipe, self.make_training_spec(recipe), dry_run))
            return
        with processes(recipe.run.device, recipe.run.shard_size) as group:
            raise_everywhere(lambda: self.make_trainer(recipe, group)).run()
