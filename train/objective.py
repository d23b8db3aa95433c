"""What a training run minimises: the exits of the model that have a loss, and how it is weighted."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from rrt.model import RecursiveTransformer
from train.distributed import as_forward
from train.losses import ExitWeights, Head, exit_losses


@dataclass(frozen=True)
class Objective:
    """Losses by exit."""

    weights: dict[int, ExitWeights]
    """By loop, from 0; -1 is the last loop, which always has an entry."""

    def bind(self, model: RecursiveTransformer) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """The function of (inputs, targets), each [batch, T] int64, that gives what `exit_losses` does.

        It is run as a forward of the sharded model: the product with the head needs its gathered weights.
        """
        loops = sorted(self.weights, key=lambda loop: loop % model.recursive.num_loops)

        def losses(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            states = model.hidden_states(inputs)
            exits = [model.norm(states[loop]).flatten(0, 1) for loop in loops]
            return exit_losses(
                exits, targets.flatten(), Head(model.head_weight), [self.weights[loop] for loop in loops]
            )

        return as_forward(model, losses)


NEXT_TOKEN = Objective({-1: ExitWeights(cross_entropy=1.0)})
"""Cross-entropy of the last loop."""
