"""The engine against plain generation: the same tokens whatever the batch, the policy that verifies, and the pages."""

from collections import Counter
from dataclasses import replace

import pytest
import scipy.stats
import torch

from rrt.checkpoint.exit_thresholds import Calibration, save_exit_thresholds
from rrt.decode.generation import generate
from rrt.decode.graphed_block import GraphedBlock
from rrt.decode.packed_weights import should_pack_for_batches
from rrt.decode.passes import Chunk, PassRows
from rrt.errors import UserError
from rrt.serve.engine import Engine
from rrt.serve.exits import Auto, Confidence, Entropy, Margin, Never, Oracle, Static, Verify, parse_policy
from rrt.serve.gate import PassCurve
from rrt.serve.requests import RequestError, SamplingParams
from tests.util import decoding
from tests.util.decoding import VOCABULARY, make_model
from tests.util.models import make_hf_model


def make_decoder(model, num_pages=400, page_size=4):
    return decoding.make_decoder(model, num_pages, page_size)


# Rows cost nothing beside the weights, something, and everything.
FREE, FAIR, DEAR = (PassCurve((1, 2), (1.0, 1.0 + row), (1.0, 1.0 + row), (0.1, 0.1 + row)) for row in (0.0, 0.1, 1.0))
LOOPED = ["vanilla", "recursive-2", "relaxed-2", "relaxed-3-untied", "prefix-2", "head-lora-3", "translators-2"]


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


@pytest.mark.parametrize("policy", [Never(), Verify(), Auto(FAIR)], ids=["never", "verify", "auto"])
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


def test_verified_draws_have_the_distribution_of_the_model():
    """Chi-square of texts of three tokens, whose third row begins on a draft of the second one."""
    model, prompt, count = make_model("llama", "relaxed-2"), [3, 1, 4], 1000
    expected = {(): float(count)}
    for _ in range(3):
        beginnings = list(expected)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens] for tokens in beginnings]))[:, -1]
        values, following = logits.topk(3)
        expected = {
            (*tokens, token): expected[tokens] * chance
            for tokens, row, chances in zip(beginnings, following.tolist(), values.softmax(-1).tolist(), strict=True)
            for token, chance in zip(row, chances, strict=True)
        }
    assert len(expected) == 27 and min(expected.values()) > 5
    engine = Engine(make_decoder(model, num_pages=1600), Verify())
    params = [SamplingParams(temperature=1.0, top_k=3, seed=seed, max_new_tokens=3) for seed in range(count)]
    outputs, news = serve(engine, [prompt] * count, params)
    assert 0.05 < sum(new.agreed_loop == 0 for new in news) / len(news) < 0.95
    found = Counter(map(tuple, outputs))
    assert set(found) <= set(expected)
    statistic = sum((found[tokens] - mean) ** 2 / mean for tokens, mean in expected.items())
    assert scipy.stats.chi2.sf(statistic, len(expected) - 1) > 1e-3


@pytest.mark.parametrize("policy", [Never(), Verify()])
def test_an_end_token_ends_its_request_alone_even_where_it_was_drafted(policy):
    model = make_model("llama", "recursive-2")
    prompts = random_prompts(4, seed=2)
    plain = expected_tokens(model, prompts, [SamplingParams(max_new_tokens=10)] * 4)
    params = [SamplingParams(max_new_tokens=10, stop_ids=frozenset({tokens[4]})) for tokens in plain]
    outputs, news = serve(Engine(make_decoder(model), policy), prompts, params)
    assert outputs == [tokens[: tokens.index(tokens[4]) + 1] for tokens in plain]
    assert [new.finish_reason for new in news].count("stop") == 4


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        (Never(), {"keeps_prefixes": True}),
        (Verify(), {}),
        (Auto(FAIR), {"keeps_prefixes": True}),
        (Static(0), {}),
        (Confidence(0.03), {"skipped_kv": "share", "keeps_prefixes": True}),
        (Confidence(0.02), {"skipped_kv": "defer"}),
    ],
    ids=["never", "verify", "auto", "static", "share", "defer"],
)
@pytest.mark.parametrize("seed", range(6))
def test_random_schedules_leak_no_page_and_change_no_token(policy, options, seed):
    """Requests come, some of them with beginnings that others had, are cancelled, and preempted for want of pages."""
    looped = ["recursive-2", "relaxed-3-untied", "prefix-2"][seed % 3]
    model = make_model("llama", looped)
    generator = torch.Generator().manual_seed(seed)

    def number(end):
        return int(torch.randint(0, end, (), generator=generator))

    prompts = random_prompts(20, seed)
    for prompt in prompts[::3]:
        prompt[:0] = prompts[1][: number(10)]
    params = [SamplingParams(max_new_tokens=1 + number(16)) for _ in prompts]
    longest = max(len(p) + q.max_new_tokens for p, q in zip(prompts, params, strict=True))
    page_size = [1, 4, 3][seed // 2]
    decoder = make_decoder(model, page_size=page_size)
    least = decoder.cache.pages_for(longest) + decoder.cache.num_used_pages
    decoder = make_decoder(model, num_pages=least + number(8), page_size=page_size)
    engine = Engine(decoder, policy, chunk_size=1 + number(8), max_running=2 + number(8), **options)
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
    assert not engine.has_work and engine.num_preemptions > 0
    engine.forget_prefixes()
    assert decoder.cache.num_used_pages == used_before
    decoder = make_decoder(model)
    skipped_kv = options.get("skipped_kv", "propagate")
    finished = [request for request in ids if request not in cancelled]
    for request in finished:
        prompt, one = prompts[ids[request]], params[ids[request]]
        if isinstance(policy, (Never, Verify)):
            (expected,) = expected_tokens(model, [prompt], [one])
        else:
            (expected,), _ = serve(Engine(decoder, policy, skipped_kv=skipped_kv), [prompt], [one])
        assert tokens[request] == expected
    assert finished


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


def exits_by_reference(model, prompt, exits, count, skipped_kv):
    """Tokens of greedy decoding with given exits, loop by loop without a cache of pages.

    A skipped loop's keys and values are those of the state at the exit, unchanged through its layers; those of the
    exit's loop; or those that it would have computed.
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
            if loop > leaves and skipped_kv == "share":
                cache.copy_rows([sequence], [position], [leaves], [loop])
                continue
            is_kept = loop > leaves and skipped_kv == "propagate"
            state = decoder.block(state, cache.plan(PassRows([sequence], [loop], [position], num_kv_only=int(is_kept))))
            if loop == leaves:
                left = state
        tokens.append(int(decoder.logits(left, torch.tensor([leaves], dtype=torch.int32)).argmax()))
    return tokens


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_a_static_exit_says_what_its_translator_says(family):
    model = make_model(family, "translators-head-lora-3")
    prompt = random_prompts(1, seed=4)[0]
    # Deferred loops leave all keys and values as they are at full depth.
    engine = Engine(make_decoder(model), Static(1), skipped_kv="defer")
    (tokens,), news = serve(engine, [prompt], [SamplingParams(max_new_tokens=8)])
    assert [new.exit_loop for new in news[1:]] == [1] * 7
    logits = [model(torch.tensor([prompt + tokens]), exit_loop=loop)[0, len(prompt) : -1] for loop in range(3)]
    assert tokens[1:] == logits[1].argmax(-1).tolist()
    assert tokens[1:] != logits[2].argmax(-1).tolist()


@pytest.mark.parametrize("skipped_kv", ["propagate", "share", "defer"])
@pytest.mark.parametrize("looped", ["relaxed-2", "relaxed-3-untied", "translators-head-lora-3", "prefix-2"])
def test_replayed_exits_are_those_of_a_slow_reference(looped, skipped_kv):
    model = make_model("llama", looped)
    prompts = random_prompts(4, seed=5)
    params = [SamplingParams(max_new_tokens=12)] * 4
    generator = torch.Generator().manual_seed(0)
    plan = {
        (request, step): int(torch.randint(0, model.recursion.num_loops, (), generator=generator))
        for request in range(4)
        for step in range(1, 12)
    }
    decoder = make_decoder(model)
    outputs, news = serve(Engine(decoder, Oracle(plan), skipped_kv=skipped_kv), prompts, params)
    # So few pages that requests begin again, and exit where they did.
    scarce = Engine(make_decoder(model, num_pages=model.recursion.num_loops * 8), Oracle(plan), skipped_kv=skipped_kv)
    assert serve(scarce, prompts, params)[0] == outputs and scarce.num_preemptions > 0
    for request, prompt in enumerate(prompts):
        exits = {step: loop for (owner, step), loop in plan.items() if owner == request}
        assert outputs[request] == exits_by_reference(model, prompt, exits, 12, skipped_kv)
    assert len({new.exit_loop for new in news}) == model.recursion.num_loops
    decoder.cache.check()
    assert decoder.cache.num_sequences == 0


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


def count_begun(curve, agrees, count=60):
    """Serve texts whose drafts agree or do not, and count passes; return them and what verification of all takes."""
    model = make_model("llama", "recursive-2")
    passes = {}
    for policy in (Never(), Auto(curve), Verify()):
        engine = Engine(make_decoder(model), policy)
        choose = engine._choose

        def forced(work, choose=choose):
            choices = choose(work)
            for i, (head, choice) in enumerate(zip(work.heads, choices, strict=True)):
                token = (7 * head.step) % VOCABULARY if head.loop or agrees(head.step) else VOCABULARY - 1
                choices[i] = replace(choice, token=token)
            return choices

        engine._choose = forced
        name = type(policy).__name__
        passes[name], _ = count_passes(engine, [[1, 2, 3]], [SamplingParams(max_new_tokens=count)])
    return passes


@pytest.mark.parametrize(
    ("curve", "agrees", "like"),
    [
        (FREE, lambda step: True, "Verify"),
        (FAIR, lambda step: True, "Verify"),
        # One row costs as much as all weights: no draft is worth it, however good.
        (DEAR, lambda step: True, "Never"),
        (FREE, lambda step: step % 2 == 0, "Verify"),
    ],
)
def test_the_gate_begins_drafts_that_are_worth_a_row(curve, agrees, like):
    passes = count_begun(curve, agrees)
    assert passes["Never"] > passes["Verify"]
    # At first it takes drafts to be as good as their probability, which here is small.
    assert abs(passes["Auto"] - passes[like]) <= 4


def test_the_gate_learns_that_drafts_are_wrong():
    model, count = make_model("llama", "recursive-2"), 60
    engine = Engine(make_decoder(model), Auto(FAIR))
    gate, drafted = engine._scheduler._gate, []
    choose = engine._choose

    def forced(work):
        drafted.append(gate.drafts)
        return [
            replace(choice, token=head.loop, confidence=0.9)
            for head, choice in zip(work.heads, choose(work), strict=True)
        ]

    engine._choose = forced
    count_passes(engine, [[1, 2, 3]], [SamplingParams(max_new_tokens=count)])
    # After the prompt, until so many were wrong that the next plan has none.
    assert all(drafted[3:16]) and not any(drafted[40:])


@pytest.mark.parametrize("policy", [Never(), Auto(DEAR)])
def test_rows_that_do_not_leave_early_go_in_step(policy):
    model = make_model("llama", "relaxed-3-untied")
    prompts, params = random_prompts(4, seed=11), [SamplingParams(max_new_tokens=20)] * 4
    engine = Engine(make_decoder(model), policy)
    choose, loops = engine._choose, []

    def watched(work):
        loops.append(set(work.rows.loops))
        return choose(work)

    engine._choose = watched
    outputs, _ = serve(engine, prompts, params, arrivals=[0, 4, 5, 9])
    assert outputs == expected_tokens(model, prompts, params)
    assert all(len(each) <= 1 for each in loops)


def test_requests_that_begin_alike_share_pages_and_get_the_same_tokens():
    model = make_model("llama", "prefix-2")
    decoder = make_decoder(model)
    prompt = random_prompts(1, seed=3, longest=2)[0] + list(range(20))
    prompts = [[*prompt, i] for i in range(5)] + [prompt, prompt[:9], list(range(30, 50))]
    params = [SamplingParams(max_new_tokens=6)] * len(prompts)
    expected = expected_tokens(model, prompts, params)
    engine = Engine(decoder, Verify(), keeps_prefixes=True, chunk_size=7)
    # Together they wait for the first one's prompt; later its pages are there, those of the answers too.
    assert serve(engine, prompts, params)[0] == expected
    reused = engine.num_reused
    whole = (5 + len(prompt)) // 4 * 4 - 5
    assert reused >= 5 * whole
    longer = [[*prompts[0], *expected[0], 1, 2]]
    assert serve(engine, longer, params[:1])[0] == expected_tokens(model, longer, params[:1])
    assert engine.num_reused - reused == (5 + len(prompts[0]) + 5) // 4 * 4 - 5
    assert decoder.cache.num_sequences > 0
    engine.forget_prefixes()
    decoder.cache.check()
    assert decoder.cache.num_sequences == 0


def test_kept_pages_make_room_for_requests():
    model = make_model("llama", "recursive-2")
    engine = Engine(make_decoder(model, num_pages=24), keeps_prefixes=True)
    prompts = random_prompts(12, seed=7, longest=14)
    params = [SamplingParams(max_new_tokens=12)] * 12
    outputs, _ = serve(engine, prompts, params, arrivals=[20 * i for i in range(12)])
    assert outputs == expected_tokens(model, prompts, params)
    assert engine.num_preemptions == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("looped", ["recursive-2", "relaxed-2"])
def test_log_probabilities_are_bitwise_the_same_alone_and_among_44_others(looped, family, dtype):
    model = make_model(family, looped, dtype=dtype)
    if not should_pack_for_batches(model.embed):
        pytest.skip("prompts do not go through packed weights here")
    prompts = random_prompts(45, seed=6)
    params = [SamplingParams(max_new_tokens=8, logprobs=True)] * 45
    # In company prompts are cut into chunks, and begin again when pages run out.
    company = Engine(make_decoder(model, num_pages=40), Verify(), chunk_size=11, keeps_prefixes=True)
    _, news = serve(company, prompts, params, arrivals=[i % 5 for i in range(45)])
    assert company.num_preemptions > 0
    together = {}
    for new in news:
        together.setdefault(new.request_id, []).append((new.token, new.logprob))
    order = sorted(range(45), key=lambda i: i % 5)
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
        logits, calls, lost = engine.decoder.logits, iter(range(1000)), set()

        def broken(x, loops, logits=logits, calls=calls, step=step, lost=lost):
            found = logits(x, loops).clone()
            # Of a row that counts: the first one after its last loop from then on.
            if not lost and next(calls) >= step and (loops == 2).any():
                found[int((loops == 2).nonzero()[0])] = torch.nan
            return found

        monkeypatch.setattr(engine.decoder, "logits", broken)
        tokens = {engine.add(prompt, one): [] for prompt, one in zip(prompts, params, strict=True)}
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


def test_a_draft_that_is_not_finite_is_none(monkeypatch):
    model = make_model("llama", "recursive-2")
    prompts, params = random_prompts(3, seed=9), [SamplingParams(max_new_tokens=9)] * 3
    engine = Engine(make_decoder(model), Verify())
    logits = engine.decoder.logits

    def broken(x, loops):
        found = logits(x, loops).clone()
        found[loops == 0] = torch.nan
        return found

    monkeypatch.setattr(engine.decoder, "logits", broken)
    outputs, news = serve(engine, prompts, params)
    assert outputs == expected_tokens(model, prompts, params)
    assert {new.agreed_loop for new in news} == {1}


@pytest.mark.parametrize("policy", [Never(), Verify(), Static(0)])
def test_padded_passes_give_the_same_tokens(policy):
    """As on CUDA, but without graphs."""
    model = make_model("llama", "relaxed-3-untied")
    prompts, params = random_prompts(6, seed=10), [SamplingParams(max_new_tokens=3 + 2 * i) for i in range(6)]
    arrivals = [0, 0, 3, 4, 9, 9]
    plain, _ = serve(Engine(make_decoder(model), policy), prompts, params, arrivals=arrivals)
    engine = Engine(make_decoder(model), policy)
    engine._block = GraphedBlock(engine.decoder)
    assert serve(engine, prompts, params, arrivals=arrivals)[0] == plain
    assert engine._block.num_recordings > 2


def test_kept_texts_stay_where_their_pages_would_not_be_enough():
    model = make_model("llama", "recursive-2")
    decoder = make_decoder(model, num_pages=30)
    engine = Engine(decoder, keeps_prefixes=True)
    shared = list(range(24))
    serve(engine, [shared], [SamplingParams(max_new_tokens=1)])
    assert decoder.cache.num_used_pages == 12
    # The first takes what is left, so that the second waits; and it then finds its beginning.
    first = engine.add(random_prompts(1, seed=3, longest=1)[0] + [50] * 20, SamplingParams(max_new_tokens=14))
    second = engine.add([*shared, *range(50, 70)], SamplingParams(max_new_tokens=10))
    ended = []
    while engine.has_work:
        ended += [new.request_id for new in engine.step() if new.finish_reason]
    assert ended == [first, second]
    assert engine.num_reused == 24 and engine.num_preemptions == 0


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
    with pytest.raises(UserError, match="max_new_tokens: found 0; expected a whole number, 1 or more"):
        SamplingParams(max_new_tokens=0)
    with pytest.raises(UserError, match="temperature"):
        SamplingParams(temperature=-1.0)
    for wrong, message in (
        ({"max_new_tokens": 2.5}, "max_new_tokens: found 2.5; expected a whole number"),
        ({"stop_ids": None}, "stop_ids: found None; expected a set of token ids"),
        ({"top_k": 1.5}, "top_k: found 1.5; expected a whole number"),
        ({"seed": 1.5}, "seed: found 1.5; expected a whole number"),
    ):
        with pytest.raises(UserError, match=message):
            SamplingParams(**wrong)
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
        (Confidence([0.9]), "confidence exit: found threshold"),
    ):
        with pytest.raises(UserError, match=message):
            Engine(make_decoder(model), policy)
    with pytest.raises(UserError, match="chunk_size: found 0"):
        Engine(make_decoder(model), chunk_size=0)
    with pytest.raises(UserError, match="skipped_kv: found 'drop'; expected propagate, share, defer"):
        Engine(make_decoder(model), skipped_kv="drop")
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


def test_policies_are_read_from_flags(tmp_path):
    for text, policy in (
        ("static:1", Static(1)),
        ("confidence:0.9", Confidence(0.9)),
        ("margin:0.5", Margin(0.5)),
        ("entropy:2", Entropy(2.0)),
    ):
        assert parse_policy(text, tmp_path) == policy
    for text, kind in (("never", Never), ("verify", Verify), ("auto", Auto)):
        assert type(parse_policy(text, tmp_path)) is kind
    for text in ("", "often", "static", "static:x", "confidence:", "verify:1", "calibrated"):
        with pytest.raises(UserError, match=f"--exit-policy: found '{text}'; expected never, verify"):
            parse_policy(text, tmp_path)
    missing = r"exit_thresholds.json: no such file; python eval/exits.py --calibrate 0.9 writes it"
    with pytest.raises(UserError, match=missing):
        parse_policy("calibrated:0.9", tmp_path)


def test_thresholds_of_a_checkpoint_are_those_of_its_loops(tmp_path):
    model = make_model("llama", "recursive-3")
    make_hf_model(tmp_path / "model", "llama", num_layers=3, vocab_size=VOCABULARY)
    calibrations = [Calibration(0.9, (None, 0.05), 0.9, 2.5), Calibration(0.5, (0.01, None), 0.5, 1.5)]
    save_exit_thresholds(tmp_path / "model", 3, calibrations)
    prompts, params = random_prompts(3), [SamplingParams(max_new_tokens=10)] * 3
    for agreement, loops in ((0.9, {1, 2}), (0.5, {0, 2})):
        policy = parse_policy(f"calibrated:{agreement}", tmp_path / "model")
        _, news = serve(Engine(make_decoder(model), policy), prompts, params)
        assert {new.exit_loop for new in news} == loops
    with pytest.raises(UserError, match="found 2 thresholds; expected 1, one for each loop before the last"):
        Engine(make_decoder(make_model("llama", "recursive-2")), policy)


def test_the_most_probable_tokens_are_reported_and_final_ones_alone():
    model = make_model("llama", "recursive-2")
    params = SamplingParams(temperature=1.5, max_new_tokens=6, logprobs=True, top_logprobs=3)
    outputs, news = serve(Engine(make_decoder(model), Verify()), [[1, 2, 3]], [params])
    tokens = [1, 2, 3, *outputs[0]]
    logs = model(torch.tensor([tokens]))[0, 2:-1].log_softmax(-1)
    for row, new in zip(logs, news, strict=True):
        best = row.topk(3)
        assert [token for token, _ in new.top_logprobs] == best.indices.tolist()
        assert [logprob for _, logprob in new.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-6)
    with pytest.raises(UserError, match="top_logprobs: found -1"):
        SamplingParams(top_logprobs=-1)
