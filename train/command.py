"""What the training commands have in common: a recipe is read, then its run is estimated or done."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from train.architecture import TrainingSpec, check_distillation
from train.distributed import Processes, processes, raise_everywhere
from train.estimate import estimate_table
from train.recipe import DistillConfig, StartConfig, read_command
from train.trainer import InitialModel, Recipe, Trainer


class CommandRecipe(Recipe, Protocol):
    """The tables that the recipe of every command has."""

    @property
    def start(self) -> StartConfig: ...
    @property
    def distill(self) -> DistillConfig: ...


R = TypeVar("R", bound=CommandRecipe)


@dataclass(frozen=True)
class Command(Generic[R]):
    """A training command."""

    recipe: type[R]
    training: Callable[[R], TrainingSpec]
    """What a recipe trains, without its weights."""
    start: Callable[[R], InitialModel]
    """What it begins with. Opens and checks it."""

    def make_trainer(self, recipe: R, group: Processes) -> Trainer:
        """The recipe's run, when everything that can be checked beforehand has been.

        Raises:
            UserError: the start, the data and the recipe do not fit together.
        """
        check_distillation(recipe.distill, recipe.start)
        return Trainer(recipe, self.start(recipe), group)

    def run(self, description: str) -> None:
        """Do what the command line says; `description` is what `--help` begins with."""
        recipe, dry_run = read_command(self.recipe, description)
        if dry_run is not None:
            print(estimate_table(recipe, self.training(recipe), dry_run))
            return
        with processes(recipe.run.device, recipe.run.shard_size) as group:
            raise_everywhere(lambda: self.make_trainer(recipe, group)).run()
