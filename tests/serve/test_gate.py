"""The gate's arithmetic, and the curve that it goes by."""

import pytest

from rrt.serve.exits import Auto, Verify
from rrt.serve.gate import Acceptance, Gate, PassCurve
from rrt.serve.pass_curve import measure_pass_curve
from tests.util.decoding import make_decoder, make_model


def taught(curve, num_loops, part_right, sequences, count=400):
    """Make a gate that has seen drafts of which a part is right, after all loops, and plans for so many texts."""
    gate = Gate(curve, num_loops)
    for i in range(count):
        for loop in range(num_loops - 1):
            gate.learn(loop, 0.6, (i * part_right) % 1 + part_right >= 1)
    gate.begin_pass(sequences)
    return gate


def test_a_curve_is_linear_between_and_beyond_its_points():
    curve = PassCurve((1, 2, 4), (1.0, 2.0, 3.0), (1.5, 2.0, 3.0), (0.5, 0.5, 1.5))
    assert [curve.at(curve.block, rows) for rows in (1, 1.5, 2, 3, 4, 6)] == [1.0, 1.5, 2.0, 2.5, 3.0, 4.0]
    assert [curve.at(curve.head, rows) for rows in (0, 2, 3, 5)] == [0.5, 0.5, 1.0, 2.0]


@pytest.mark.parametrize("num_loops", [2, 3])
@pytest.mark.parametrize("sequences", [1, 4, 16, 64])
@pytest.mark.parametrize("part_right", [0.05, 0.3, 0.55, 0.8, 0.95])
def test_drafts_begin_where_passes_of_all_their_rows_are_shorter(part_right, sequences, num_loops):
    """Against the closed form of passes and rows, where all drafts are alike."""
    curve = PassCurve((0, 1), (1.0, 1.05), (1.1, 1.15), (0.2, 0.21))
    gate = taught(curve, num_loops, part_right, sequences)
    wrong = 1 - part_right
    passes = num_loops - (num_loops - 1) * part_right
    rows = sequences * (num_loops + wrong * num_loops * (num_loops - 1) / 2) / passes
    verified = passes * (1.1 + 0.05 * rows + 0.2 + 0.01 * rows)
    plain = num_loops * (1 + 0.05 * sequences) + 0.2 + 0.01 * sequences
    # Prior experience, of twelve drafts, moves the border a little.
    if abs(verified / (0.95 * plain) - 1) > 0.03:
        assert gate.drafts == (verified < 0.95 * plain)
        assert gate.begins(0, 0.6) == gate.drafts


def test_only_the_better_drafts_begin():
    curve = PassCurve((0, 1), (1.0, 1.05), (1.0, 1.05), (0.1, 0.1))
    gate = Gate(curve, 2)
    for i in range(250):
        gate.learn(0, 0.9, i % 10 > 0)
        gate.learn(0, 0.2, i % 10 == 0)
    gate.begin_pass(16)
    assert gate.drafts and gate.begins(0, 0.9) and not gate.begins(0, 0.2)


def test_acceptance_goes_from_what_the_model_says_to_what_was_seen():
    acceptance = Acceptance()
    assert acceptance.chance(0.9) == pytest.approx(0.9, abs=0.05)
    for _ in range(50):
        acceptance.learn(0.9, False)
        acceptance.learn(0.2, True)
    assert acceptance.chance(0.9) < 0.05 and acceptance.chance(0.2) > 0.95
    begun, right = acceptance.shares(0.95)
    assert 0.4 < right <= begun < 0.5
    # What was seen fades.
    for _ in range(3000):
        acceptance.learn(0.9, True)
    assert acceptance.chance(0.9) > 0.95 and acceptance.shares(0.95)[0] > 0.9


@pytest.mark.parametrize("num_loops", [2, 3])
def test_rows_are_looked_at_now_and_then_where_no_draft_begins(num_loops):
    dear = PassCurve((1, 2), (1.0, 2.0), (1.0, 2.0), (1.0, 2.0))
    gate = taught(dear, num_loops, 0.5, 30)
    looks = []
    for _ in range(96 * num_loops):
        gate.begin_pass(30)
        looks.append(gate.looks)
    assert not gate.drafts and 2 * num_loops <= sum(looks) <= 4 * num_loops
    # Whole turns, so that every loop's rows come up.
    first = looks.index(True, looks.index(False))
    assert all(looks[first : first + num_loops])


def test_a_gate_follows_the_number_of_texts():
    curve = PassCurve((1, 2), (1.0, 1.1), (1.0, 1.1), (0.1, 0.1))
    gate = taught(curve, 2, 0.6, 1)
    assert gate.drafts and gate.looks
    # Not at once: texts come and go, and a change costs passes.
    gate.begin_pass(200)
    gate.begin_pass(0)
    assert gate.drafts
    for _ in range(64):
        gate.begin_pass(200)
    assert not gate.drafts
    for _ in range(160):
        gate.begin_pass(2)
    assert gate.drafts


def test_a_gate_does_not_waver():
    """Between the border of beginning and that of ending, what is goes on."""
    curve = PassCurve((0, 1), (1.0, 1.05), (1.0, 1.05), (0.1, 0.1))
    gate = taught(curve, 2, 0.7, 1)
    states = []
    for sequences in [*range(1, 60), *range(60, 0, -1)]:
        for _ in range(48):
            gate.begin_pass(sequences)
        states.append(gate.drafts)
    # How many texts there are when drafts end, and when they begin again.
    ends, begins = states.index(False), states[::-1].index(False)
    assert 0 < begins < ends


@pytest.mark.parametrize("slow_drafts", [1.0, 1.6])
def test_a_gate_goes_by_the_passes_that_it_sees(slow_drafts):
    """Where passes with drafts are slower than the curve says, they end, and are tried again much later."""
    curve = PassCurve((0, 1), (1.0, 1.05), (1.0, 1.05), (0.1, 0.1))
    gate = taught(curve, 2, 0.7, 4)
    states = []
    for _ in range(4000):
        slowness = 1.5 * (slow_drafts if gate.drafts else 1.0)  # what all passes have in common decides nothing
        rows = 6 if gate.drafts else 4
        gate.learn_seconds(rows, rows, slowness * (1 + 0.05 * rows + 0.1))
        gate.begin_pass(4)
        states.append(gate.drafts)
    assert states[0]
    if slow_drafts == 1:
        # Those without are tried, too.
        assert 0.9 * len(states) < sum(states) < len(states)
    else:
        assert sum(states) < 0.1 * len(states) and any(states[1000:])


def test_one_pass_that_hangs_decides_nothing():
    curve = PassCurve((0, 1), (1.0, 1.05), (1.0, 1.05), (0.1, 0.1))
    gate = taught(curve, 2, 0.7, 4)
    for i in range(100):
        gate.learn_seconds(6, 6, 1000.0 if i == 50 else 1.4)
        gate.begin_pass(4)
        assert gate.drafts


def test_a_measured_curve_rises_and_gives_its_pages_back():
    decoder = make_decoder(make_model("llama", "relaxed-2"), num_pages=60)
    curve = measure_pass_curve(decoder, decoder.block, 20)
    assert curve.rows == (1, 2, 4, 8, 16)
    for seconds in (curve.block, curve.mixed, curve.head):
        assert len(seconds) == 5 and list(seconds) == sorted(seconds) and seconds[0] > 0
    assert decoder.cache.num_sequences == 0
    # With room for one row alone no draft is worth one.
    small = make_decoder(make_model("llama", "relaxed-2"), num_pages=2)
    assert not taught(measure_pass_curve(small, small.block, 20), 2, 1.0, 1).drafts
    assert isinstance(Auto(curve), Verify)


def test_a_measured_curve_has_the_head_with_its_translators(monkeypatch):
    decoder = make_decoder(make_model("llama", "translators-2"), num_pages=60)
    logits, exits = decoder.logits, set()

    def counted(x, loops=None):
        exits.update([None] if loops is None else loops.tolist())
        return logits(x, loops)

    monkeypatch.setattr(decoder, "logits", counted)
    measure_pass_curve(decoder, decoder.block, 4)
    assert exits == {0}
