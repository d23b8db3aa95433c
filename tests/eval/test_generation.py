"""eval/generation.py: texts are those of each prompt alone, whatever shares its passes, and are kept as they finish."""

import dataclasses

import pytest
import torch

from eval import generation
from eval.generation import Prompt, generate_texts
from eval.response_cache import ResponseCache
from rrt.checkpoint.source import load_model
from rrt.data.tokenizer import load_tokenizer
from rrt.decode.generation import generate
from rrt.serve.engine import Engine
from tests.util.decoding import make_decoder, make_model
from tests.util.real import real_model
from tests.util.tokenizers import make_bpe_tokenizer

STOPS = ((), ("e", "\n"), ("th", "a", "zzz"), ("in the", " "))


@pytest.fixture(scope="module")
def model_and_tokenizer(tmp_path_factory):
    tokenizer = load_tokenizer(make_bpe_tokenizer(tmp_path_factory.mktemp("tokenizer"), "llama"))
    return make_model("llama", "relaxed-2", vocab_size=tokenizer.vocab_size), tokenizer


def mixed_prompts(tokenizer):
    """Prompts of all lengths, with stops and most new tokens of their own."""
    texts = [f"Text {'and more ' * (n % 4)}number {n}" for n in range(12)]
    return [
        Prompt(tuple(tokenizer.encode(text)[:30]), STOPS[n % 4], 3 + 5 * (n % 5))
        for n, text in enumerate([*texts, *texts[:2]])
    ]


def text_alone(model, tokenizer, prompt):
    """The text by plain generation of this prompt alone, cut as the harness cuts."""

    def has_stopped(tokens):
        return any(stop in tokenizer.decode(tokens) for stop in prompt.until)

    decoder = make_decoder(model, num_pages=100)
    stop_ids = tokenizer.stop_ids
    (tokens,) = generate(decoder, [prompt.tokens], prompt.max_new_tokens, stop_ids=stop_ids, should_stop=has_stopped)
    text = tokenizer.decode(tokens[:-1] if tokens[-1] in stop_ids else tokens)
    for stop in prompt.until:
        text = text.split(stop)[0]
    return text


@pytest.mark.parametrize("cache_bytes", [2 << 30, 1])
def test_texts_of_mixed_prompts_are_those_of_each_alone(model_and_tokenizer, monkeypatch, cache_bytes):
    model, tokenizer = model_and_tokenizer
    monkeypatch.setattr(generation, "CACHE_BYTES", cache_bytes)  # 1: the longest alone fits
    prompts = mixed_prompts(tokenizer)
    expected = [text_alone(model, tokenizer, prompt) for prompt in prompts]
    assert len(set(expected)) > 6
    assert generate_texts(model, tokenizer, prompts, ResponseCache()) == expected


def test_an_end_token_ends_a_text_and_is_none_of_it(model_and_tokenizer):
    model, tokenizer = model_and_tokenizer
    prompt = Prompt(tuple(tokenizer.encode("Text and more")), (), 8)
    (tokens,) = generate(make_decoder(model), [prompt.tokens], 8)
    ended = dataclasses.replace(tokenizer, stop_ids=(tokens[3],))
    text = tokenizer.decode(tokens[: tokens.index(tokens[3])])
    assert generate_texts(model, ended, [prompt], ResponseCache()) == [text]


def test_what_is_finished_is_in_the_cache_when_the_run_is_interrupted(model_and_tokenizer, tmp_path, monkeypatch):
    model, tokenizer = model_and_tokenizer
    short, long = (Prompt(tuple(tokenizer.encode("Text")), (), count) for count in (2, 20))
    step, passes = Engine.step, 0

    def interrupted(engine):
        nonlocal passes
        passes += 1
        if passes > 12:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate_texts(model, tokenizer, [long, short], ResponseCache(tmp_path / "responses.jsonl"))
    monkeypatch.undo()
    cache = ResponseCache(tmp_path / "responses.jsonl")
    assert short.key in cache and long.key not in cache
    expected = [text_alone(model, tokenizer, prompt) for prompt in (long, short)]
    assert generate_texts(model, tokenizer, [long, short], cache) == expected and len(cache) == 2


@pytest.mark.real
def test_texts_of_a_real_model_are_those_of_each_prompt_alone():
    model, tokenizer = load_model(real_model(), torch.float32), load_tokenizer(real_model())
    texts = (
        "Question: What is 2 + 3?\nAnswer:",
        "Q: Who wrote Hamlet?\nA:",
        "def fib(n):\n",
        "Once upon a time",
        "1, 2, 3,",
    )
    stops = (("\n",), ("\n\n", "Q:"), ("return",), (), (" 7", "8"))
    prompts = [
        Prompt(tuple(tokenizer.encode(text)), until, 12 + 8 * n)
        for n, (text, until) in enumerate(zip(texts, stops, strict=True))
    ]
    expected = [text_alone(model, tokenizer, prompt) for prompt in prompts]
    assert generate_texts(model, tokenizer, prompts, ResponseCache()) == expected and all(expected)
