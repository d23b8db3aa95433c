"""`pairwise`: tests parametrized by few cases in which every two values of two parameters still meet."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(
    *, exhaustive: Collection[str] = (), **parameters: Sequence[Any] | Mapping[str, Any]
) -> pytest.MarkDecorator:
    """Parametrize a test as `pytest.mark.parametrize` does with a product, but by a covering array of strength two.

    `pairwise(op={"native": f, "reference": g}, case=CASES, dtype=DTYPES, exhaustive=("native",))` runs the native
    operator on every case in every dtype, and the reference in the few of these that cover all pairs.

    Args:
        exhaustive: names of values that meet every combination of the other parameters' values.
        parameters: the values of each; a mapping's keys name its values in the test's id.
    """
    values = [list(x.values()) if isinstance(x, Mapping) else list(x) for x in parameters.values()]
    names = [list(x) if isinstance(x, Mapping) else [str(value) for value in x] for x in parameters.values()]
    unknown = set(exhaustive).difference(*names)
    assert not unknown, f"exhaustive: found {unknown}, which no value is named"
    complete = {
        row
        for row in product(*(range(len(column)) for column in names))
        if any(column[i] in exhaustive for column, i in zip(names, row, strict=True))
    }
    rows = sorted(complete.union(cover_pairs([len(x) for x in values])))
    cases = [
        pytest.param(
            *(column[i] for column, i in zip(values, row, strict=True)),
            id="-".join(column[i] for column, i in zip(names, row, strict=True)),
        )
        for row in rows
    ]
    return pytest.mark.parametrize(tuple(parameters), cases)


def cover_pairs(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Choose rows of indices below `sizes` such that every pair of two columns' indices occurs in one, greedily."""
    missing = {
        ((a, i), (b, j))
        for a, b in combinations(range(len(sizes)), 2)
        for i in range(sizes[a])
        for j in range(sizes[b])
    }
    rows = []
    while missing:
        chosen = dict(min(missing))
        for column in range(len(sizes)):
            if column not in chosen:
                gains = [len(missing & set(_pairs_with((column, i), chosen.items()))) for i in range(sizes[column])]
                chosen[column] = gains.index(max(gains))
        rows.append(tuple(chosen[column] for column in range(len(sizes))))
        missing -= set(combinations(enumerate(rows[-1]), 2))
    return rows


def _pairs_with(entry: tuple[int, int], others: Iterable[tuple[int, int]]) -> list[tuple[tuple[int, int], ...]]:
    return [tuple(sorted((entry, other))) for other in others]
