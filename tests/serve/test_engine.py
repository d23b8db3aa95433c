"""The engine against plain generation: the same tokens whatever the batch, the policy that verifies, and the pages."""

import pytest
import torch

from rrt.decode.generation import generate
from rrt.decode.passes import Chunk, PassRows
from rrt.errors import UserError
from rrt.serve.engine import Engine
from rrt.serve.exits import Confidence, Entropy, Margin, Never, Oracle, Static, Verify, parse_policy
from rrt.serve.requests import RequestError, SamplingParams
from tests.util import decoding
from tests.util.decoding import VOCABULARY, make_model


def make_decoder(model, num_pages=400, page_size=4):
    return decoding.make_decoder(model, num_pages, page_size)


LOOPED = ["vanilla", "recursive-2", "relaxed-2", "relaxed-3-untied", "prefix-2", "head-lora-3"]


def random_prompts(count, seed=0, longest=12):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def expected_tokens(model, prompts, params):
    """What each request gets alone."""
    decoder = make_decoder(model)
    return [
        generate(decoder, [prompt], one.max_new_tokens, samplings=[one], stop_ids=one.stop_ids)[0]
        for prompt, one in zip(prompts, params, strict=True)
    ]


def serve(engine, prompts, params, *, arrivals=None):
    """Serve requests that arrive before given passes; returns each one's tokens, and all that came out."""
    arrivals = arrivals or [0] * len(prompts)
    waiting = sorted(range(len(prompts)), key=lambda i: arrivals[i])
    ids, news, step = {}, [], 0
    while waiting or engine.has_work:
        while waiting and arrivals[waiting[0]] <= step:
            i = waiting.pop(0)
            ids[engine.add(prompts[i], params[i])] = i
        news += engine.step()
        step += 1
        assert step < 10_000
    outputs = [[] for _ in prompts]
    for new in news:
        outputs[ids[new.request_id]].append(new.token)
    return outputs, news


@pytest.mark.parametrize("policy", [Never(), Verify()])
@pytest.mark.parametrize("looped", LOOPED)
@pytest.mark.parametrize("family", ["gemma", "llama", "gpt_neox"])
def test_tokens_are_those_of_plain_generation_in_any_company(family, looped, policy):
    model = make_model(family, looped)
    prompts = random_prompts(7)
    params = [SamplingParams(max_new_tokens=1 + 3 * i) for i in range(7)]
    engine = Engine(make_decoder(model), policy, chunk_size=5, max_running=4)
    outputs, news = serve(engine, prompts, params, arrivals=[0, 0, 1, 4, 4, 9, 30])
    assert outputs == expected_tokens(model, prompts, params)
    assert [new.finish_reason for new in news].count("length") == 7
    assert {new.exit_loop for new in news} == {model.recursion.num_loops - 1}
    engine.decoder.cache.check()
    assert engine.decoder.cache.num_sequences == 0


@pytest.mark.parametrize("policy", [Never(), Verify()])
@pytest.mark.parametrize("looped", ["recursive-2", "relaxed-3-untied"])
def test_draws_of_a_seed_are_those_of_plain_generation(looped, policy):
    model = make_model("llama", looped)
    prompts = random_prompts(5, seed=1)
    params = [
        SamplingParams(temperature=1.0, seed=0, max_new_tokens=12),
        SamplingParams(temperature=0.7, top_k=5, seed=1, max_new_tokens=12),
        SamplingParams(temperature=1.3, top_p=0.8, seed=2, max_new_tokens=12),
        SamplingParams(temperature=2.0, seed=3, max_new_tokens=12),
        SamplingParams(max_new_tokens=12),
    ]
    outputs, _ = serve(Engine(make_decoder(model), policy), prompts, params, arrivals=[0, 2, 0, 5, 1])
    assert outputs == expected_tokens(model, prompts, params)


@pytest.mark.parametrize("policy", [Never(), Verify()])
def test_an_end_token_ends_its_request_alone_even_where_it_was_drafted(policy):
    model = make_model("llama", "recursive-2")
    prompts = random_prompts(4, seed=2)
    plain = expected_tokens(model, prompts, [SamplingParams(max_new_tokens=10)] * 4)
    params = [SamplingParams(max_new_tokens=10, stop_ids=frozenset({tokens[4]})) for tokens in plain]
    outputs, news = serve(Engine(make_decoder(model), policy), prompts, params)
    assert outputs == [tokens[: tokens.index(tokens[4]) + 1] for tokens in plain]
    assert [new.finish_reason for new in news].count("stop") == 4


@pytest.mark.parametrize("policy", [Never(), Verify(), Static(0), Confidence(0.03)])
@pytest.mark.parametrize("seed", range(6))
def test_random_schedules_leak_no_page_and_lose_no_token(policy, seed):
    """Requests come, are cancelled, and preempted for want of pages."""
    looped = ["recursive-2", "relaxed-3-untied", "prefix-2"][seed % 3]
    model = make_model("llama", looped)
    generator = torch.Generator().manual_seed(seed)

    def number(end):
        return int(torch.randint(0, end, (), generator=generator))

    prompts = random_prompts(20, seed)
    params = [SamplingParams(max_new_tokens=1 + number(16)) for _ in prompts]
    longest = max(len(p) + q.max_new_tokens for p, q in zip(prompts, params, strict=True))
    page_size = [1, 4, 3][seed // 2]
    decoder = make_decoder(model, page_size=page_size)
    least = decoder.cache.pages_for(longest) + decoder.cache.num_used_pages
    decoder = make_decoder(model, num_pages=least + number(8), page_size=page_size)
    engine = Engine(decoder, policy, chunk_size=1 + number(8), max_running=2 + number(8))
    used_before = decoder.cache.num_used_pages
    ids, tokens, cancelled = {}, {}, set()
    queue = list(range(20))
    for _ in range(5000):
        if queue and number(2):
            index = queue.pop(0)
            ids[engine.add(prompts[index], params[index])] = index
        if ids and number(20) == 0:
            victim = list(ids)[number(len(ids))]
            if engine.cancel(victim):
                cancelled.add(victim)
        for new in engine.step():
            assert new.request_id not in cancelled
            tokens.setdefault(new.request_id, []).append(new.token)
        decoder.cache.check()
        if not queue and not engine.has_work:
            break
    assert not engine.has_work and decoder.cache.num_used_pages == used_before
    finished = [request for request in ids if request not in cancelled]
    assert finished and all(len(tokens[request]) == params[ids[request]].max_new_tokens for request in finished)
    assert engine.num_preemptions > 0
    if isinstance(policy, (Never, Verify)):
        expected = expected_tokens(model, prompts, params)
        assert all(tokens[request] == expected[ids[request]] for request in finished)


def test_too_few_pages_for_all_preempt_the_latest():
    model = make_model("llama", "recursive-2")
    prompts = [[1, 2, 3], [4, 5, 6, 7], [8, 9]]
    params = [SamplingParams(max_new_tokens=20)] * 3
    engine = Engine(make_decoder(model, num_pages=20), Verify())
    outputs, _ = serve(engine, prompts, params)
    assert outputs == expected_tokens(model, prompts, params) and engine.num_preemptions > 0


@pytest.mark.parametrize("looped", ["recursive-3", "relaxed-2", "head-lora-3"])
def test_a_static_exit_is_the_shallower_model(looped):
    model = make_model("llama", looped)
    prompts = random_prompts(3, seed=4)
    params = [SamplingParams(max_new_tokens=8)] * 3
    outputs, news = serve(Engine(make_decoder(model), Static(0)), prompts, params)
    for prompt, found in zip(prompts, outputs, strict=True):
        tokens = list(prompt)
        with torch.no_grad():
            for step in range(8):
                # The prompt goes through all loops, and so does its last token.
                exit_loop = None if step == 0 else 0
                tokens.append(int(model(torch.tensor([tokens]), exit_loop=exit_loop)[0, -1].argmax()))
        assert found == tokens[len(prompt) :]
    assert [new.exit_loop for new in news].count(0) == 3 * 7


def exits_by_reference(model, prompt, exits, count):
    """Tokens of greedy decoding with given exits, loop by loop without a cache of pages.

    A skipped loop's keys and values are those of the state at the exit, unchanged through its layers.
    """
    decoder = make_decoder(model)
    cache, num_loops = decoder.cache, model.recursion.num_loops
    sequence = cache.allocate()
    cache.append(sequence, len(prompt))
    x = decoder.embed(torch.tensor(prompt))
    for loop in range(num_loops):
        x = decoder.block(x, cache.plan(PassRows(chunks=[Chunk(sequence, loop, 0, len(prompt))])))
    tokens = [int(decoder.logits(x[-1:]).argmax())]
    for step in range(1, count):
        position = len(prompt) + step - 1
        cache.append(sequence, 1)
        state, leaves = decoder.embed(torch.tensor(tokens[-1:])), exits.get(step, num_loops - 1)
        for loop in range(num_loops):
            rows = PassRows([sequence], [loop], [position], num_kv_only=int(loop > leaves))
            after = decoder.block(state, cache.plan(rows))
            if loop <= leaves:
                state = after
        tokens.append(int(decoder.logits(state, torch.tensor([leaves], dtype=torch.int32)).argmax()))
    return tokens


@pytest.mark.parametrize("looped", ["relaxed-2", "relaxed-3-untied", "head-lora-3", "prefix-2"])
def test_replayed_exits_are_those_of_a_slow_reference(looped):
    model = make_model("llama", looped)
    prompts = random_prompts(4, seed=5)
    params = [SamplingParams(max_new_tokens=12)] * 4
    generator = torch.Generator().manual_seed(0)
    plan = {
        (request, step): int(torch.randint(0, model.recursion.num_loops, (), generator=generator))
        for request in range(4)
        for step in range(1, 12)
    }
    outputs, news = serve(Engine(make_decoder(model), Oracle(plan)), prompts, params)
    for request, prompt in enumerate(prompts):
        exits = {step: loop for (owner, step), loop in plan.items() if owner == request}
        assert outputs[request] == exits_by_reference(model, prompt, exits, 12)
    assert len({new.exit_loop for new in news}) == model.recursion.num_loops


@pytest.mark.parametrize("policy", [Confidence(1e-9), Margin(1e-12), Entropy(1e9)])
def test_thresholds_that_all_reach_are_the_first_exit(policy):
    model = make_model("llama", "recursive-3")
    prompts, params = random_prompts(2), [SamplingParams(max_new_tokens=6)] * 2
    outputs, _ = serve(Engine(make_decoder(model), policy), prompts, params)
    static, _ = serve(Engine(make_decoder(model), Static(0)), prompts, params)
    assert outputs == static
    full, _ = serve(Engine(make_decoder(model), Confidence(1.0)), prompts, params)
    assert full == expected_tokens(model, prompts, params)


def count_passes(engine, prompts, params):
    passes, news = 0, []
    for prompt, one in zip(prompts, params, strict=True):
        engine.add(prompt, one)
    while engine.has_work:
        news += engine.step()
        passes += 1
    return passes, news


@pytest.mark.parametrize(
    ("looped", "right_from"),
    [("recursive-2", 0), ("recursive-2", 1), ("recursive-3", 0), ("recursive-3", 1), ("recursive-3", 2)],
)
def test_passes_of_verification(looped, right_from, monkeypatch):
    """A token whose drafts are right from loop l on costs l + 1 passes, whatever the loops before said."""
    model = make_model("llama", looped)
    num_loops, count = model.recursion.num_loops, 15
    (expected,) = expected_tokens(model, [[1, 2, 3]], [SamplingParams(max_new_tokens=count)])
    engine = Engine(make_decoder(model), Verify())
    choose = engine._choose

    def forced(work):
        drafts = []
        for head, choice in zip(work.heads, choose(work), strict=True):
            right = expected[head.step] if head.step < count else 0
            token = right if head.loop >= right_from else (right + 1) % VOCABULARY
            drafts.append(choice if head.loop == num_loops - 1 else type(choice)(token, choice.exits))
        return drafts

    monkeypatch.setattr(engine, "_choose", forced)
    passes, news = count_passes(engine, [[1, 2, 3]], [SamplingParams(max_new_tokens=count)])
    # The first token ends the prompt, which has no drafts.
    assert [new.agreed_loop for new in news[1:]] == [right_from] * (count - 1)
    assert [new.token for new in news] == expected
    # The prompt, a row for each further token, and the last one to its end.
    assert passes == num_loops + (count - 2) * (right_from + 1) + num_loops
    engine.decoder.cache.check()
    assert engine.decoder.cache.num_used_pages == 0


def test_log_probabilities_are_bitwise_the_same_alone_and_in_company():
    # With LoRA, prompts are not: their chunks are joined, and products merged by size.
    model = make_model("llama", "recursive-2", dtype=torch.float32)
    prompts = random_prompts(12, seed=6)
    params = [SamplingParams(max_new_tokens=8, logprobs=True)] * 12
    engine = Engine(make_decoder(model), Verify())
    _, news = serve(engine, prompts, params, arrivals=[i % 5 for i in range(12)])
    together = {}
    for new in news:
        together.setdefault(new.request_id, []).append((new.token, new.logprob))
    order = sorted(range(12), key=lambda i: i % 5)
    for request, i in enumerate(order):
        _, alone = serve(Engine(make_decoder(model), Never()), [prompts[i]], [params[i]])
        assert [(new.token, new.logprob) for new in alone] == together[request]
        assert all(new.logprob is not None and new.logprob < 0 for new in alone)


def test_an_error_in_a_pass_loses_its_request_alone(monkeypatch):
    model = make_model("llama", "relaxed-3-untied")
    prompts = random_prompts(4, seed=8)
    params = [SamplingParams(max_new_tokens=9)] * 4
    expected = expected_tokens(model, prompts, params)
    for step in range(1, 14):
        engine = Engine(make_decoder(model), Verify())
        logits, calls = engine.decoder.logits, iter(range(1000))

        def broken(x, loops, logits=logits, calls=calls, step=step):
            found = logits(x, loops).clone()
            if next(calls) == step:
                found[0] = torch.nan
            return found

        monkeypatch.setattr(engine.decoder, "logits", broken)
        tokens = {engine.add(prompt, one): [] for prompt, one in zip(prompts, params, strict=True)}
        lost = set()
        while engine.has_work:
            try:
                for new in engine.step():
                    tokens[new.request_id].append(new.token)
            except RequestError as error:
                assert "found NaN or infinity" in str(error)
                lost |= error.request_ids
        assert len(lost) == 1
        for request, found in tokens.items():
            assert found == expected[request][: len(found)] and (request in lost or len(found) == 9)
        engine.decoder.cache.check()
        assert engine.decoder.cache.num_used_pages == 0


def test_another_owner_of_the_pages_is_an_error_rather_than_no_progress():
    model = make_model("llama", "recursive-2")
    decoder = make_decoder(model, num_pages=12)
    engine = Engine(decoder)
    engine.add([1, 2, 3], SamplingParams(max_new_tokens=20))
    engine.step()
    decoder.cache.append(decoder.cache.allocate(), 4 * (decoder.cache.num_free_pages // 2))
    with pytest.raises(RuntimeError, match="expected no other owner"):
        while engine.has_work:
            engine.step()


def test_bad_requests_are_refused_and_harm_no_other():
    model = make_model("llama", "recursive-2")
    engine = Engine(make_decoder(model, num_pages=12))
    good = engine.add([1, 2], SamplingParams(max_new_tokens=3))
    for prompt, params, message in (
        ([], SamplingParams(), "prompt: found no token"),
        ([1.7, 2.2], SamplingParams(), "prompt: found list"),
        ([1, VOCABULARY], SamplingParams(), f"found token {VOCABULARY}; expected tokens in"),
        ([1] * 60, SamplingParams(max_new_tokens=10), "69 positions; expected at most max_positions = 64"),
        ([1] * 40, SamplingParams(max_new_tokens=10), "need 26 pages; expected at most 12"),
    ):
        with pytest.raises(UserError, match=message):
            engine.add(prompt, params)
    with pytest.raises(UserError, match="max_new_tokens: found 0; expected 1 or more"):
        SamplingParams(max_new_tokens=0)
    with pytest.raises(UserError, match="temperature"):
        SamplingParams(temperature=-1.0)
    news = []
    while engine.has_work:
        news += engine.step()
    assert [new.request_id for new in news] == [good] * 3
    assert engine.step() == [] and not engine.cancel(good)


def test_engines_that_cannot_be_are_refused():
    model = make_model("llama", "recursive-2")
    for policy, message in (
        (Static(2), "static exit: found loop 2; expected one in"),
        (Confidence(0.0), "confidence exit: found threshold 0.0"),
        (Margin(2.0), "margin exit: found threshold 2.0"),
        (Entropy(-1.0), "entropy exit: found threshold -1.0"),
        (Entropy(float("nan")), "entropy exit: found threshold nan"),
        (Confidence(float("nan")), "confidence exit: found threshold nan"),
    ):
        with pytest.raises(UserError, match=message):
            Engine(make_decoder(model), policy)
    with pytest.raises(UserError, match="chunk_size: found 0"):
        Engine(make_decoder(model), chunk_size=0)
    other = make_model("llama", "cycle-rev-relaxed-prefix-3")
    with pytest.raises(UserError, match="early exits and a model with sharing 'cycle-rev'"):
        Engine(make_decoder(other), Verify())


@pytest.mark.parametrize("looped", ["cycle-rev-relaxed-prefix-3", "sequence-relaxed-prefix-untied-3"])
def test_models_whose_loops_run_other_layers_keep_one_loop_a_pass(looped):
    model = make_model("llama", looped)
    prompts = random_prompts(7)
    params = [SamplingParams(max_new_tokens=1 + 3 * i) for i in range(7)]
    engine = Engine(make_decoder(model), chunk_size=5, max_running=4)
    outputs, _ = serve(engine, prompts, params, arrivals=[0, 0, 1, 4, 4, 9, 30])
    assert outputs == expected_tokens(model, prompts, params)


def test_policies_are_read_from_flags():
    for text, policy in (
        ("static:1", Static(1)),
        ("confidence:0.9", Confidence(0.9)),
        ("margin:0.5", Margin(0.5)),
        ("entropy:2", Entropy(2.0)),
    ):
        assert parse_policy(text) == policy
    assert isinstance(parse_policy("never"), Never) and isinstance(parse_policy("verify"), Verify)
    for text in ("", "often", "static", "static:x", "confidence:", "verify:1"):
        with pytest.raises(UserError, match=f"--exit-policy: found '{text}'; expected never, verify"):
            parse_policy(text)
