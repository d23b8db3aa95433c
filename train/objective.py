"""The loss of a training run: which exits of the model have one, and how they are weighted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from rrt.errors import UserError
from rrt.model.transformer import RecursiveTransformer
from train.distributed import as_forward
from train.losses import Divergence, ExitWeights, Head, Teacher, exit_losses
from train.recipe import DistillConfig, ExitsConfig
from train.teacher import ShardedTeacher

PART_NAMES = ("cross_entropy", "from_teacher", "from_last_exit")
"""The parts of an exit's loss, in the order of `exit_losses`."""


DistilledFrom = Literal["none", "last", "teacher"]


def _exit_weights(distill: DistillConfig, coefficient: float, source: DistilledFrom) -> ExitWeights:
    """Return the weights of an exit that is distilled from `source`; they add up to `coefficient`."""
    divergence = 0.0 if source == "none" else coefficient * distill.weight
    return ExitWeights(
        cross_entropy=coefficient - divergence,
        teacher=divergence if source == "teacher" else 0.0,
        last_exit=divergence if source == "last" else 0.0,
    )


def exit_coefficients(exits: ExitsConfig, num_loops: int) -> list[float]:
    """Return the weights in the total loss of the exits after each loop, in order."""
    if exits.weighting == "aggressive":
        return [exits.coefficient] * (num_loops - 1) + [1.0]
    return [(loop + 1) / (num_loops * (num_loops + 1) / 2) for loop in range(num_loops)]


@dataclass(frozen=True)
class Objective:
    """The losses of a model's exits."""

    weights: tuple[ExitWeights, ...]
    """One for the last loop's exit alone, or one for the exit of every loop in order."""
    divergence: Divergence = "forward_kl"
    temperature: float = 1.0
    frozen: bool = False
    """Train only what exits before the last have of their own: a LoRA on the head, translators."""

    def should_train(self, name: str) -> bool:
        """Decide by its name if a parameter is trained; what exits have of their own is if they are."""
        if name.startswith(("head_lora_", "exit_translator_")):
            return len(self.weights) > 1
        return not self.frozen

    def exit_loops(self, num_loops: int) -> list[int]:
        """Return the loops after which the loss needs logits."""
        needs_last = any(weights.last_exit for weights in self.weights)
        return [
            loop
            for loop, weights in enumerate(self.weights, num_loops - len(self.weights))
            if weights != ExitWeights() or (needs_last and loop == num_loops - 1)
        ]

    def bind(
        self, model: RecursiveTransformer, teacher: ShardedTeacher | None = None
    ) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Make the function of (inputs, targets), each [batch, T] int64, that returns what `exit_losses` returns.

        It runs as a forward of the sharded model: the product with the head needs its gathered weights.
        """

        from_teacher: Teacher | None = None
        num_loops = model.recursion.num_loops
        run = self.exit_loops(num_loops)[-1] + 1  # the loss needs no later loop
        weights = self.weights[: len(self.weights) - (num_loops - run)]

        def losses(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            lora = (model.head_lora_a, model.head_lora_b) if len(self.weights) > 1 else ()
            exits = list(enumerate(model.hidden_states(inputs, num_loops=run)))[-len(weights) :]
            loss, parts = exit_losses(
                [model.head_input(state, loop).flatten(0, 1) for loop, state in exits],
                targets.flatten(),
                Head(model.head_weight, *lora),
                weights,
                teacher=from_teacher,
                divergence=self.divergence,
                temperature=self.temperature,
            )
            return loss, F.pad(parts, (0, 0, 0, num_loops - run))

        inside = as_forward(model, losses)
        if teacher is None:
            return inside

        def distilled(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal from_teacher
            with teacher.read(inputs) as from_teacher:
                return inside(inputs, targets)

        return distilled

    def named_parts(self, parts: list[float], num_loops: int) -> dict[str, float]:
        """Name the flattened parts of `exit_losses` by part and loop; empty if the loss has one part only."""
        named = {}
        for index, weights in enumerate(self.weights):
            loop = num_loops - len(self.weights) + index
            has_part = (weights != ExitWeights(), weights.teacher > 0, weights.last_exit > 0)
            for column, (name, is_there) in enumerate(zip(PART_NAMES, has_part, strict=True)):
                if is_there:
                    named[f"{name}_loop_{loop}"] = parts[index * len(PART_NAMES) + column]
        return named if len(named) > 1 else {}

    def describe(self, num_loops: int) -> str:
        """Describe the loss in words."""
        terms = []
        for loop, weights in enumerate(self.weights, num_loops - len(self.weights)):
            kinds = (
                (weights.cross_entropy, "cross-entropy"),
                (weights.teacher, f"{self.divergence} from the teacher"),
                (weights.last_exit, f"{self.divergence} from the last loop"),
            )
            parts = [f"{weight:.4g} {kind}" for weight, kind in kinds if weight]
            terms.append(f"loop {loop}: {' + '.join(parts) or 'none'}")
        return "; ".join(terms)


def uptraining_objective(distill: DistillConfig) -> Objective:
    """Return the objective of uptraining: the last loop's loss, distilled if there is a teacher."""
    return Objective((_last_exit(distill, 1.0),), distill.loss, distill.temperature)


def early_exit_objective(exits: ExitsConfig, distill: DistillConfig, num_loops: int) -> Objective:
    """Return the objective of early exits: the losses of all loops.

    Raises:
        UserError: there are no loops before the last, or a teacher is asked for and missing, or given and unused.
    """
    if num_loops < 2:
        raise UserError("field 'num_loops': found 1; expected a recursive model: python -m rrt.convert makes one")
    if exits.distill == "teacher" and distill.teacher is None:
        raise UserError("field 'distill.teacher': missing; expected a model for exits.distill = 'teacher'")
    if exits.freeze and distill.teacher is not None and exits.distill != "teacher":
        raise UserError(
            f"field 'distill.teacher': found {distill.teacher!r}; expected none: with exits.freeze nothing learns from "
            "it unless exits.distill is 'teacher'"
        )
    *early, last = exit_coefficients(exits, num_loops)
    weights = [_exit_weights(distill, coefficient, exits.distill) for coefficient in early]
    weights.append(ExitWeights() if exits.freeze else _last_exit(distill, last))
    return Objective(tuple(weights), distill.loss, distill.temperature, exits.freeze)


def _last_exit(distill: DistillConfig, coefficient: float) -> ExitWeights:
    return _exit_weights(distill, coefficient, "none" if distill.teacher is None else "teacher")


NEXT_TOKEN = Objective((ExitWeights(cross_entropy=1.0),))
"""Cross-entropy of the last loop."""
