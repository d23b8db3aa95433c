"""Tokens drawn from logits: the distribution, its cuts, and draws that depend on nothing else."""

import math

import pytest
import torch

from rrt.decode.sampling import GREEDY, Sampling, choose_tokens, most_probable
from rrt.errors import UserError

DRAWS = 4000


def frequencies(logits, sampling, draws=DRAWS):
    """Share of each token in draws of one row, each with a step of its own."""
    rows = logits.expand(draws, -1)
    tokens = torch.tensor(choose_tokens(rows, [sampling] * draws, range(draws)))
    return tokens.bincount(minlength=logits.shape[-1]) / draws


def assert_distributed(found, expected, draws=DRAWS):
    """Pearson's chi-squared test; what is never expected must not occur."""
    possible = expected > 0
    assert found[~possible].sum() == 0
    statistic = draws * ((found - expected)[possible].square() / expected[possible]).sum()
    degrees = int(possible.sum()) - 1
    # Mean and deviation of the statistic are `degrees` and sqrt(2 degrees); the seed makes the test repeatable.
    assert statistic < degrees + 4 * math.sqrt(2 * max(degrees, 1))


def make_logits(size=12, seed=0):
    return torch.randn(1, size, generator=torch.Generator().manual_seed(seed)) * 2


def cut(probabilities, top_k=0, top_p=1.0):
    """The distribution after top-k and then top-p, by sorting."""
    order = probabilities.argsort(descending=True)
    kept = order[: top_k or None]
    share = probabilities[kept] / probabilities[kept].sum()
    kept = kept[share.cumsum(0) - share < top_p]
    expected = torch.zeros_like(probabilities)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    return expected


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_draws_follow_the_tempered_softmax(temperature):
    logits = make_logits()
    expected = (logits[0].double() / temperature).softmax(0)
    assert_distributed(frequencies(logits, Sampling(temperature)), expected)


@pytest.mark.parametrize(("top_k", "top_p"), [(1, 1.0), (4, 1.0), (0, 0.7), (0, 0.05), (6, 0.6), (50, 0.9)])
def test_draws_come_from_the_cut_distribution(top_k, top_p):
    logits = make_logits()
    expected = cut(logits[0].double().softmax(0), top_k, top_p)
    assert_distributed(frequencies(logits, Sampling(1.0, top_k, top_p)), expected)


def test_top_p_finds_its_tokens_among_many():
    """A flat distribution, of which top-p keeps more than the candidates that are looked at first."""
    logits = make_logits(5000, seed=3) / 4
    probabilities = logits[0].double().softmax(0)
    kept = cut(probabilities, top_p=0.6) > 0
    assert 1000 < kept.sum() < 3500
    found = frequencies(logits, Sampling(1.0, 0, 0.6), 500)
    assert found[~kept].sum() == 0
    order = probabilities.argsort(descending=True)
    quarter = order[: int(kept.sum()) // 4]
    assert abs(found[quarter].sum() - probabilities[quarter].sum() / probabilities[kept].sum()) < 0.1


def test_a_row_draws_the_same_in_any_batch():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(6, 300, generator=generator)
    samplings = [GREEDY, Sampling(1.0), Sampling(0.7, 20), Sampling(1.3, 0, 0.8, seed=9), GREEDY, Sampling(2.0, 5, 0.5)]
    steps = [3, 0, 7, 2, 1, 2**31]
    together = choose_tokens(logits, samplings, steps)
    alone = [choose_tokens(logits[i : i + 1], [samplings[i]], [steps[i]])[0] for i in range(6)]
    assert together == alone
    assert together == choose_tokens(logits, samplings, steps)


def test_seeds_and_steps_draw_differently():
    logits = torch.zeros(1, 10**6)
    tokens = [choose_tokens(logits, [Sampling(1.0, seed=s)], [t])[0] for s in range(4) for t in range(4)]
    assert len(set(tokens)) == 16


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((1, 40), -torch.inf)
    logits[0, [7, 39]] = 0.0
    found = frequencies(logits, Sampling(1.0), 300)
    assert found[[7, 39]].sum() == 1 and found[7] > 0.3 and found[39] > 0.3
    assert choose_tokens(torch.tensor([[0.0, 50.0]]), [Sampling(1e-6)], [0]) == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [7, 128, 1000, 1280])
def test_the_most_probable_token_is_the_first_of_the_largest(dtype, size):
    # Few values, so that the largest come repeatedly.
    logits = torch.randint(-3, 4, (9, size), generator=torch.Generator().manual_seed(size)).to(dtype)
    best, largest = most_probable(logits)
    assert best.tolist() == [row.index(max(row)) for row in logits.tolist()]
    assert largest.tolist() == [max(row) for row in logits.tolist()]
    if dtype == torch.float64:
        logits[:, size // 2] = logits.amax(1) + 1e-10
        assert most_probable(logits)[0].tolist() == [size // 2] * len(logits)
    logits[3, size // 3] = torch.nan
    assert most_probable(logits.requires_grad_())[1].isnan().tolist() == [row == 3 for row in range(9)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ((-1.0,), "temperature: found -1.0; expected 0, or 1e-6 or more"),
        ((1e-46,), "temperature: found 1e-46"),
        ((math.nan,), "temperature: found nan"),
        ((1.0, -1), "top_k: found -1; expected a whole number, 0 or more"),
        ((1.0, 0, 0.0), "top_p: found 0.0; expected more than 0 and at most 1"),
        ((1.0, 0, 1.1), "top_p: found 1.1"),
        ((1.0, 0, 1.0, -3), "seed: found -3"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        Sampling(*values)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7), Sampling(0.7, 4), Sampling(0.7, 0, 0.9)])
@pytest.mark.parametrize("size", [7, 256])
def test_logits_that_are_not_finite_are_refused(value, sampling, size):
    logits = torch.zeros(2, size, dtype=torch.float16)
    logits[1, 3] = value
    with pytest.raises(UserError, match=r"logits: found NaN or infinity in float16; .* --dtype float32 or bfloat16"):
        choose_tokens(logits, [Sampling(), sampling], [0, 0])
