"""Choice of few test cases out of a product of many."""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Choose combinations of one value per axis such that any two values of different axes meet in one of them.

    Greedy and deterministic. Ten by eight by four values, 320 cases as a product, take about 80 this way.
    """

    def pairs(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(combinations(enumerate(case), 2))

    cases = list(product(*(range(len(axis)) for axis in axes)))
    missing = set().union(*map(pairs, cases))
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        chosen.append(tuple(axis[index] for axis, index in zip(axes, best, strict=True)))
    return chosen
