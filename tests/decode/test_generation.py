"""Generation step by step: what is drawn, what ends a sequence, and what a caller sees meanwhile."""

import pytest
import torch

from rrt.decode.generation import generate, generate_steps
from rrt.decode.sampling import GREEDY, Sampling
from rrt.errors import UserError
from tests.util.decoding import make_decoder, make_model, random_tokens

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = [random_tokens(n, seed=n).tolist() for n in (3, 9, 1, 5)]
SAMPLINGS = [Sampling(1.5, seed=4), GREEDY, Sampling(0.9, 20, 0.9, seed=7), Sampling(1.5, seed=5)]


@pytest.fixture(scope="module")
def decoder():
    return make_decoder(make_model("llama", "relaxed-2", torch.float32), num_pages=300)


def test_a_drawn_text_depends_on_its_seed_alone(decoder):
    together = generate(decoder, PROMPTS, 15, samplings=SAMPLINGS)
    for prompt, sampling, tokens in zip(PROMPTS, SAMPLINGS, together, strict=True):
        assert generate(decoder, [prompt], 15, samplings=[sampling]) == [tokens]
    assert together[1] == generate(decoder, PROMPTS[1:2], 15)[0]
    seeds = [Sampling(1.5, seed=seed) for seed in range(4)]
    assert len({tuple(tokens) for tokens in generate(decoder, PROMPTS[:1] * 4, 15, samplings=seeds)}) == 4


def test_draws_follow_the_model(decoder):
    """First tokens of many seeds, against the softmax of the model's own logits."""
    draws = 600
    samplings = [Sampling(1.0, seed=seed) for seed in range(draws)]
    tokens = []
    for start in range(0, draws, 50):
        tokens += [new[0] for new in generate(decoder, PROMPTS[:1] * 50, 1, samplings=samplings[start : start + 50])]
    expected = decoder.model(torch.tensor(PROMPTS[:1]))[0, -1].softmax(0)
    found = torch.tensor(tokens).bincount(minlength=len(expected)) / draws
    top = expected.topk(5).indices
    deviation = (expected[top] * (1 - expected[top]) / draws).sqrt()
    assert ((found - expected)[top].abs() <= 4 * deviation).all()


def test_any_of_several_end_tokens_ends_a_sequence(decoder):
    plain = generate(decoder, PROMPTS, 15)
    stops = {plain[0][3], plain[1][6]}
    expected = [tokens[: next((i + 1 for i, t in enumerate(tokens) if t in stops), 15)] for tokens in plain]
    assert generate(decoder, PROMPTS, 15, stop_ids=stops) == expected
    assert len(expected[0]) <= 4 and len(expected[1]) <= 7


def test_steps_come_one_by_one_and_closing_gives_pages_back(decoder):
    expected = generate(decoder, PROMPTS, 15)
    used = decoder.cache.num_used_pages
    steps = generate_steps(decoder, PROMPTS, 15, has_ended=lambda index, token: index == 2)
    assert decoder.cache.num_sequences == 0
    assert next(steps) == {i: tokens[0] for i, tokens in enumerate(expected)}
    assert next(steps) == {i: tokens[1] for i, tokens in enumerate(expected) if i != 2}
    assert decoder.cache.num_sequences == len(PROMPTS)
    steps.close()
    assert (decoder.cache.num_used_pages, decoder.cache.num_sequences) == (used, 0)


def test_arguments_are_checked_before_the_first_step(decoder):
    with pytest.raises(UserError, match=r"samplings: found 1; expected 4, one for each prompt"):
        generate_steps(decoder, PROMPTS, 2, samplings=[GREEDY])
    with pytest.raises(UserError, match=r"prompts\[0\]: found no token"):
        generate_steps(decoder, [[]], 2)
