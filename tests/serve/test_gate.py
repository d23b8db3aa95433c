"""The gate's arithmetic, and the curve that it goes by."""

import pytest

from rrt.serve.exits import Auto, Verify
from rrt.serve.gate import Acceptance, Gate, PassCurve
from rrt.serve.pass_curve import measure_pass_curve
from tests.util.decoding import make_decoder, make_model


def test_a_curve_is_linear_between_and_beyond_its_points():
    curve = PassCurve((1, 2, 4), (1.0, 2.0, 3.0), (0.5, 0.5, 1.5))
    assert [curve.block_seconds(rows) for rows in (1, 1.5, 2, 3, 4, 6)] == [1.0, 1.5, 2.0, 2.5, 3.0, 4.0]
    assert [curve.head_seconds(rows) for rows in (0, 2, 3, 5)] == [0.5, 0.5, 1.0, 2.0]


@pytest.mark.parametrize("rows", [1, 4, 16, 64])
@pytest.mark.parametrize("knee", [2.0, 8.0, 40.0])
def test_a_draft_begins_where_its_chance_exceeds_the_share_of_rows_in_a_pass(rows, knee):
    """With a linear curve, without a head: x / (1 + x) for x = rows / knee."""
    curve = PassCurve((0, 1), (1.0, 1.0 + 1 / knee), (0.0, 0.0))
    x = rows / knee
    least = x / (1 + x)
    for chance, begins in ((least + 1e-6, True), (least - 1e-6, False)):
        gate = Gate(curve, 2)
        gate.observe(rows, rows, 0, rows)
        assert gate.begin([chance], rows) == [begins]


def test_the_best_drafts_begin_until_a_row_costs_more_than_it_brings():
    curve = PassCurve((1, 6, 7), (1.0, 1.5, 2.5), (0.0, 0.0, 0.0))
    gate = Gate(curve, 2)
    gate.observe(4, 4.0, 0, 4)
    # A useful row costs 1.3 / 4 = 0.325, another one 0.1, and from the sixth on 1.
    assert gate.begin([0.3, 0.95, 0.35, 0.6], 4) == [False, True, False, True]
    assert gate.begin([0.3, 0.95, 0.35, 0.6], 1) == [False, True, True, True]


def test_the_price_of_a_row_follows_the_passes():
    curve = PassCurve((0, 1), (1.0, 1.1), (0.0, 0.2))
    gate = Gate(curve, 2)
    for _ in range(100):
        gate.observe(10, 8.0, 5, 4)
    # (1 + 10 * 0.1 + 5 * 0.2) / 8 is 0.375, and without drafts (1 + 4 * 0.1 + 2 * 0.2) / 4 would be 0.45.
    least = 0.1 / 0.375
    assert gate.begin([least - 1e-3], 10) == [False] and gate.begin([least + 1e-3], 10) == [True]
    for _ in range(100):
        gate.observe(10, 5.0, 10, 4)
    # Now it is 0.8, but need not be.
    least = 0.1 / 0.45
    assert gate.begin([least - 1e-3], 10) == [False] and gate.begin([least + 1e-3], 10) == [True]


def test_acceptance_goes_from_what_the_model_says_to_what_was_seen():
    acceptance = Acceptance()
    assert acceptance.chance(0.9) == 0.9
    for _ in range(50):
        acceptance.learn(0.9, False)
        acceptance.learn(0.2, True)
    assert acceptance.chance(0.9) < 0.05 and acceptance.chance(0.2) > 0.95
    # What was seen fades.
    for _ in range(3000):
        acceptance.learn(0.9, True)
    assert acceptance.chance(0.9) > 0.95 and acceptance.num_seen <= 512


def test_rows_are_looked_at_only_where_drafts_would_pay_but_for_some():
    dear = PassCurve((1, 2), (1.0, 2.0), (1.0, 2.0))
    gate = Gate(dear, 3)
    gate.observe(30, 30.0, 15, 30)
    for _ in range(200):
        gate.learn(1, 0.8, True)
    looks = [gate.wants_draft(1) for _ in range(640)]
    assert sum(looks) == 10
    # One loop's looks are not another one's, though their rows take turns.
    for _ in range(200):
        gate.learn(0, 0.8, True)
    turns = [(gate.wants_draft(0), gate.wants_draft(1)) for _ in range(640)]
    assert [sum(each) for each in zip(*turns, strict=True)] == [10, 10]
    cheap = Gate(PassCurve((1, 2), (1.0, 1.0), (1.0, 1.0)), 3)
    cheap.observe(30, 30.0, 15, 30)
    for _ in range(200):
        cheap.learn(1, 0.8, True)
    assert all(cheap.wants_draft(1) for _ in range(100))


def test_a_measured_curve_rises_and_gives_its_pages_back():
    decoder = make_decoder(make_model("llama", "relaxed-2"), num_pages=60)
    curve = measure_pass_curve(decoder, decoder.block, 20)
    assert curve.rows == (1, 2, 4, 8, 16)
    for seconds in (curve.block, curve.head):
        assert len(seconds) == 5 and list(seconds) == sorted(seconds) and seconds[0] > 0
    assert decoder.cache.num_sequences == 0
    # With room for one row alone no draft is worth one.
    small = make_decoder(make_model("llama", "relaxed-2"), num_pages=2)
    curve = measure_pass_curve(small, small.block, 20)
    gate = Gate(curve, 2)
    gate.observe(1, 1.0, 1, 1)
    assert gate.begin([1.0], 1) == [False]
    assert isinstance(Auto(curve), Verify)
