"""Text through the engine: the texts of plain generation, stop strings, log-probabilities, and errors."""

from dataclasses import replace

import pytest
import torch

import rrt
from rrt.checkpoint.source import load_model
from rrt.data.tokenizer import load_tokenizer
from rrt.decode.decoder import Decoder
from rrt.decode.generation import generate
from rrt.decode.kv_cache import PagedCache
from rrt.errors import UserError
from rrt.serve.exits import Verify
from rrt.serve.requests import SamplingParams
from tests.util.models import make_hf_model
from tests.util.tokenizers import make_bpe_tokenizer, make_sentencepiece_tokenizer

PROMPTS = ["def main(", "import os\n", "class A:"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base") / "model"
    make_hf_model(directory, "gpt_neox", vocab_size=420)
    return make_bpe_tokenizer(directory, vocab_size=420)


@pytest.fixture(scope="module")
def expected(base):
    """New tokens of greedy decoding, all loops, and of what tokenizer."""
    model, tokenizer = load_model(base), load_tokenizer(base)
    decoder = Decoder(model, PagedCache(model.config, model.recursion, 64))
    return generate(decoder, [tokenizer.encode(text) for text in PROMPTS], 12, stop_ids=tokenizer.stop_ids), tokenizer


def test_completions_are_those_of_plain_generation(base, expected):
    tokens, tokenizer = expected
    llm = rrt.LLM(base, device="cpu", cache_bytes=2**22, policy=Verify())
    completions = llm.generate(PROMPTS, rrt.SamplingParams(max_new_tokens=12, logprobs=True))
    assert [completion.tokens for completion in completions] == tokens
    for completion in completions:
        ends = completion.tokens[-1] in tokenizer.stop_ids
        shown = completion.tokens[:-1] if ends else completion.tokens
        assert completion.text == tokenizer.decode(shown)
        assert completion.finish_reason == ("stop" if ends else "length")
        assert len(completion.logprobs) == len(completion.exit_loops) == len(completion.tokens)
    with_top = llm.generate(PROMPTS[:1], rrt.SamplingParams(max_new_tokens=12, logprobs=True, top_logprobs=2))[0]
    assert [top[0][0] for top in with_top.top_logprobs] == tokens[0]
    assert [top[0][1] for top in with_top.top_logprobs] == pytest.approx(with_top.logprobs)
    # The same again, from token ids.
    again = llm.generate([tokenizer.encode(text) for text in PROMPTS], SamplingParams(max_new_tokens=12))
    assert [completion.text for completion in again] == [completion.text for completion in completions]
    assert again[0].logprobs == []


def test_a_completion_has_the_space_that_stands_between_it_and_its_prompt(tmp_path):
    base = make_hf_model(tmp_path / "llama", "llama", vocab_size=420)
    make_sentencepiece_tokenizer(base, "llama")
    llm = rrt.LLM(base, device="cpu", cache_bytes=2**22)
    params = SamplingParams(max_new_tokens=8, temperature=9.0, n=20)
    completions = llm.generate(PROMPTS, params)
    texts = [text for text in PROMPTS for _ in range(20)]
    for prompt, completion in zip(texts, completions, strict=True):
        ended = completion.tokens[-1] in llm.tokenizer.stop_ids
        tokens = completion.tokens[:-1] if ended else completion.tokens
        assert prompt + completion.text == llm.tokenizer.decode([*llm.tokenizer.encode(prompt), *tokens])
    assert any(completion.text.startswith(" ") for completion in completions)


def test_a_stop_string_ends_its_text_alone(base):
    llm = rrt.LLM(base, device="cpu", cache_bytes=2**22)
    texts = [completion.text for completion in llm.generate(PROMPTS, SamplingParams(max_new_tokens=12))]
    index = max(range(3), key=lambda i: len(texts[i]))
    text = texts[index]
    stop = text[len(text) // 2 :][:3]
    params = [SamplingParams(max_new_tokens=12, stop=(stop,) if i == index else ()) for i in range(3)]
    completions = llm.generate(PROMPTS, params)
    assert completions[index].text == text[: text.find(stop)]
    assert completions[index].finish_reason == "stop" and len(completions[index].tokens) <= 12
    assert [completions[i].text for i in range(3) if i != index] == [texts[i] for i in range(3) if i != index]
    llm.engine.forget_prefixes()
    cache = llm.engine.decoder.cache
    assert cache.num_sequences == 0 and cache.num_used_pages == 0


def test_many_completions_of_a_prompt_have_seeds_of_their_own_and_share_its_pages(base):
    llm = rrt.LLM(base, device="cpu", cache_bytes=2**22)
    prompt = "import os\n" * 12
    assert len(llm.tokenizer.encode(prompt)) > 32
    params = SamplingParams(max_new_tokens=8, temperature=1.5, seed=7)
    several = llm.generate([prompt, PROMPTS[0]], replace(params, n=3))
    assert llm.engine.num_reused >= 2 * 32
    one_by_one = [
        llm.generate([text], replace(params, seed=seed))[0].tokens
        for text in (prompt, PROMPTS[0])
        for seed in (7, 8, 9)
    ]
    assert [completion.tokens for completion in several] == one_by_one
    assert len({tuple(tokens) for tokens in one_by_one}) == 6
    with pytest.raises(UserError, match="n: found 0; expected a whole number, 1 or more"):
        SamplingParams(n=0)


def test_bad_arguments_are_refused_and_nothing_stays_queued(base):
    llm = rrt.LLM(base, device="cpu", dtype=torch.float32, cache_bytes=2**22)
    for prompts, params, message in (
        ("text", None, "prompts: found a text; expected a list"),
        (["a", "b"], [SamplingParams()], "params: found 1; expected 2"),
        (["a", []], None, "prompt: found no token"),
        (["a", [420]], None, "found token 420"),
    ):
        with pytest.raises(UserError, match=message):
            llm.generate(prompts, params)
        assert not llm.engine.has_work
    for stop in ("text", ("",), ["a"]):
        with pytest.raises(UserError, match="stop: found"):
            SamplingParams(stop=stop)
    assert llm.generate([]) == []
    llm.engine.add([1, 2], SamplingParams())
    with pytest.raises(UserError, match="engine: found requests that were added to it"):
        llm.generate(["a"])
