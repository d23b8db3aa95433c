"""Permutations that are computed: each number once, in orders that look random."""

import itertools
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from train.permutation import Permutation, keyed_uint64s


@settings(max_examples=40)
@given(size=st.integers(1, 1500), key=st.lists(st.integers(0, 2**64), max_size=3))
@example(size=1, key=[0])
@example(size=2, key=[0])
@example(size=2**11, key=[0])
@example(size=2**11 + 1, key=[0])
def test_every_number_comes_once(size: int, key: list[int]) -> None:
    permutation = Permutation(size, *key)
    assert sorted(permutation) == list(range(size)) and len(permutation) == size
    assert list(Permutation(size, *key)) == list(permutation)


def test_a_place_beyond_the_end_is_refused() -> None:
    for place in (-1, 5):
        with pytest.raises(IndexError):
            Permutation(5, 0)[place]


def test_the_key_decides_the_order() -> None:
    keys = [(0, 0), (0, 1), (1, 0), (1, 1), (11,), (0, 0, 0)]
    assert len({tuple(Permutation(50, *key)) for key in keys}) == len(keys)
    assert len({number for key in keys for number in keyed_uint64s(*key, count=3)}) == 3 * len(keys)


@pytest.mark.parametrize("size", [2, 3, 5, 8])
def test_a_number_and_its_neighbour_land_on_every_pair_of_places_about_equally_often(size: int) -> None:
    pairs = list(itertools.permutations(range(size), 2))
    keys = 100 * len(pairs)
    for first in range(0, size - 1, 3):
        found = Counter()
        for key in range(keys):
            permutation = Permutation(size, key)
            found[permutation[first], permutation[first + 1]] += 1
        squares = sum((found[pair] - 100) ** 2 / 100 for pair in pairs)
        freedom = len(pairs) - 1
        assert squares < freedom + 5 * (2 * freedom) ** 0.5


def test_the_order_keeps_nothing_of_the_order_before() -> None:
    size = 20_000
    order = list(Permutation(size, 3))
    moved = sum(abs(value - place) for place, value in enumerate(order)) / size**2
    stride = sum(abs(order[i + 1] - order[i]) for i in range(size - 1)) / size**2
    assert moved == pytest.approx(1 / 3, rel=0.03) and stride == pytest.approx(1 / 3, rel=0.03)
    assert sum(order[i + 1] == order[i] + 1 for i in range(size - 1)) < 10


def test_the_size_costs_nothing() -> None:
    permutation = Permutation(10**15, 1)
    values = [permutation[place] for place in range(2000)]
    assert len(set(values)) == 2000 and 0.4 < sum(values) / 2000 / 10**15 < 0.6
