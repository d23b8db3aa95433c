"""The covering array behind the tests that are parametrized pairwise."""

from itertools import combinations, product

import pytest

from tests.util.pairwise import cover_pairs


@pytest.mark.parametrize("sizes", [(15, 4, 4), (4, 2, 4, 2), (3, 3, 3, 3), (5, 1), (2, 0)], ids=str)
def test_every_pair_occurs_in_fewer_rows_than_the_product_has(sizes: tuple[int, ...]) -> None:
    rows = cover_pairs(sizes)
    for a, b in combinations(range(len(sizes)), 2):
        assert {(row[a], row[b]) for row in rows} == set(product(range(sizes[a]), range(sizes[b])))
    assert len(sizes) == 2 or len(rows) <= 1.5 * max(x * y for x, y in combinations(sizes, 2))
