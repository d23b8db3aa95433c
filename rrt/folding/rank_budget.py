"""Distribution of a budget of LoRA parameters over the matrices of a block, by the error that each unit of rank saves.

    ranks = allocate({"a": [9.0, 4.0, 1.0], "b": [5.0, 0.1]}, cost={"a": 30, "b": 20}, budget=80)  # {"a": 2, "b": 1}

A matrix is one linear of one shared layer, such as ``layers.0.attn.q``. It has one rank for all its loops.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rrt.errors import UserError
from rrt.model.config import LORA_GROUP_OF_LINEAR, LoraRanks, ModelConfig, RecursiveConfig, linear_shapes

# Steps of the exact search below; a tenth of a second or so.
_MOST_STEPS = 10**8


def distribute_budget(
    model: ModelConfig, recursion: RecursiveConfig, gains: Mapping[str, Sequence[float]]
) -> LoraRanks:
    """Give each matrix its rank: in all as many parameters as the groups' ranks of `recursion` have, after caps.

    Args:
        gains: of each matrix, by names such as ``layers.0.attn.q``, the decrease of the conversion's error by each
            further unit of rank, in whatever metric it measures; min(N, K) of them, none larger than the one before.

    Raises:
        UserError: the budget is less than rank 1 for every matrix.
    """
    shapes = {
        f"layers.{layer}.{linear}": (linear, shape)
        for layer in range(recursion.layers_per_loop(model))
        for linear, shape in linear_shapes(model).items()
    }
    assert gains.keys() == shapes.keys()
    cost = {name: recursion.num_loops * sum(shape) for name, (_, shape) in shapes.items()}
    group_ranks = {
        name: min(getattr(recursion.lora_rank, LORA_GROUP_OF_LINEAR[linear]), *shape)
        for name, (linear, shape) in shapes.items()
    }
    budget = sum(cost[name] * rank for name, rank in group_ranks.items())
    return replace(recursion.lora_rank, matrices=allocate(gains, cost, budget))


def allocate(gains: Mapping[str, Sequence[float]], cost: Mapping[str, int], budget: int) -> dict[str, int]:
    """Choose ranks that together save the most error and cost exactly `budget`, or as much of it as can be met.

    Units of rank are taken by gain per cost, which is the optimum up to the last few. These are chosen by an exact
    search around it: matrices of equal cost are one class, of which the best n units are known, so that only the
    classes' numbers of units are searched. For the shapes of real models, whose costs have a large common divisor, the
    result is the optimum.

    Args:
        gains: of each matrix, the decrease of the error by each further unit of rank, none larger than the one before;
            a matrix's rank is at most their number.
        cost: parameters of a unit of rank of each matrix.
        budget: parameters of all ranks.

    Raises:
        UserError: the budget is less than rank 1 for every matrix.
    """
    if budget < sum(cost.values()):
        raise UserError(
            f"rank budget: found {budget:,} parameters; expected at least {sum(cost.values()):,}, rank 1 for each of "
            f"{len(cost)} matrices"
        )
    by_cost: dict[int, list[str]] = {}
    for name in gains:
        by_cost.setdefault(cost[name], []).append(name)
    classes = [_Class.of(each, names, gains) for each, names in by_cost.items()]
    ranks = dict.fromkeys(gains, 0)
    for each, count in zip(classes, _best_counts(classes, budget), strict=True):
        for name in each.units[:count]:
            ranks[name] += 1
    return ranks


@dataclass(frozen=True)
class _Class:
    """Matrices whose units of rank cost the same.

    Attributes:
        units: the matrix of each unit of rank, those of the largest gain first.
        total: gain of the first n units, for n from 0.
    """

    cost: int
    units: list[str]
    total: np.ndarray

    @classmethod
    def of(cls, cost: int, names: Sequence[str], gains: Mapping[str, Sequence[float]]) -> "_Class":
        units = sorted(
            (-gain, rank, order) for order, name in enumerate(names) for rank, gain in enumerate(gains[name])
        )
        total = np.concatenate(([0.0], np.cumsum([-negative for negative, _, _ in units])))
        return cls(cost, [names[order] for _, _, order in units], total)


def _best_counts(classes: Sequence[_Class], budget: int) -> list[int]:
    """Choose the number of units of each class: the largest spending up to `budget`, and of that the largest gain."""
    divisor = math.gcd(*(each.cost for each in classes))
    costs = [each.cost // divisor for each in classes]
    # An optimum is within about twice the largest cost of the greedy choice: beyond that, units of one class
    # could be exchanged for units of another at equal cost without loss, as gains do not increase.
    reach = min(2 * max(costs) + 1, math.isqrt(_MOST_STEPS // sum(costs)))
    greedy = _greedy_counts(classes, budget)
    lows = [max(0, count - reach) for count in greedy]
    sizes = [min(len(each.units), count + reach) - low for each, count, low in zip(classes, greedy, lows, strict=True)]
    room = budget // divisor - sum(cost * low for cost, low in zip(costs, lows, strict=True))
    room = min(room, sum(cost * size for cost, size in zip(costs, sizes, strict=True)))
    # Best gain of the classes so far for each spending beyond the lows, and each class's part in it.
    best = np.full(room + 1, -np.inf)
    best[0] = 0.0
    chosen = []
    for each, cost, low, size in zip(classes, costs, lows, sizes, strict=True):
        extended, count = np.full(room + 1, -np.inf), np.zeros(room + 1, dtype=np.int64)
        for more in range(min(size, room // cost) + 1):
            gain = best[: room + 1 - more * cost] + (each.total[low + more] - each.total[low])
            better = gain > extended[more * cost :]
            extended[more * cost :][better] = gain[better]
            count[more * cost :][better] = more
        best = extended
        chosen.append(count)
    spent = int(np.flatnonzero(best > -np.inf)[-1])
    counts = []
    for cost, low, count in reversed(list(zip(costs, lows, chosen, strict=True))):
        more = int(count[spent])
        counts.append(low + more)
        spent -= more * cost
    return counts[::-1]


def _greedy_counts(classes: Sequence[_Class], budget: int) -> list[int]:
    """Take units by gain per cost until the next one does not fit."""
    units = sorted(
        (-gain / each.cost, index) for index, each in enumerate(classes) for gain in np.diff(each.total).tolist()
    )
    counts = [0] * len(classes)
    for _, index in units:
        budget -= classes[index].cost
        if budget < 0:
            break
        counts[index] += 1
    return counts
