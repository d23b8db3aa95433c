"""The covering array behind the tests that are parametrized pairwise."""

from itertools import combinations, product

import pytest

from tests.util.pairwise import cover_pairs, pairwise


@pytest.mark.parametrize("sizes", [(15, 4, 4), (4, 2, 4, 2), (3, 3, 3, 3), (5, 1), (2, 0)], ids=str)
def test_every_pair_occurs_in_fewer_rows_than_the_product_has(sizes: tuple[int, ...]) -> None:
    rows = cover_pairs(sizes)
    for a, b in combinations(range(len(sizes)), 2):
        assert {(row[a], row[b]) for row in rows} == set(product(range(sizes[a]), range(sizes[b])))
    assert len(sizes) == 2 or len(rows) <= 1.5 * max(x * y for x, y in combinations(sizes, 2))


def test_an_exhaustive_value_meets_every_combination_of_the_others() -> None:
    functions = {"op": max, "reference": min}
    cases = pairwise(x=range(5), y="abcd", z="ef", function=functions, exhaustive=("op",)).args[1]
    values = {case.values for case in cases}
    assert len(values) == len(cases)
    natives = {value[:3] for value in values if value[3] is max}
    assert natives == set(product(range(5), "abcd", "ef"))
    assert 5 <= len(values) - len(natives) < 20
    with pytest.raises(AssertionError, match=r"exhaustive: found .*native.*, which no value is named"):
        pairwise(function=functions, exhaustive=("native",))
