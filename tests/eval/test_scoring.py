"""eval/scoring.py: rows with common beginnings give what each text gives alone, under any batching."""

import pytest
import torch

from eval import scoring
from eval.response_cache import ResponseCache
from eval.scoring import Scorer, batches, pack_rows
from rrt import ops
from rrt.checkpoint.source import open_source
from rrt.errors import UserError
from rrt.model.config import LoraRanks, RecursiveConfig
from rrt.model.transformer import RecursiveTransformer
from tests.util.models import FAMILIES, make_hf_model
from tests.util.native import needs_native

KINDS = {
    "vanilla": RecursiveConfig(),
    "relaxed": RecursiveConfig(num_loops=2, lora_rank=LoraRanks.uniform(3), untie_norms=True),
    "prefix": RecursiveConfig(num_loops=3, prefix_length=5),
    "LoRA on the head": RecursiveConfig(num_loops=3, head_lora_rank=2),
}
TRANSLATED = {
    "translators": RecursiveConfig(num_loops=3, exit_translators=True),
    "translators and LoRA": RecursiveConfig(num_loops=3, head_lora_rank=2, exit_translators=True),
}
MAX_LENGTH = 40


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    root = tmp_path_factory.mktemp("bases")
    return {family: open_source(make_hf_model(root / family, family)).model for family in FAMILIES}


def random_model(config, recursion):
    model = RecursiveTransformer(config, recursion).double().eval()
    model.init_weights()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    model.set_merge(True)
    return model


def tokens(length, seed):
    return torch.randint(3, 151, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def request_mix():
    """Choices behind one context, a context that is another's beginning, single tokens, repeats and long texts."""
    context, sentence = tokens(17, 1), tokens(11, 2)
    choices = [(context, tokens(length, 10 + length)) for length in (6, 1, 9, 4)]
    begin_alike = [(context, [*tokens(3, 99), *tokens(length, 30 + length)]) for length in (2, 5)]
    partial = [([*sentence, option], tokens(7, 3)) for option in (5, 6)]
    one_token = [(context, [token]) for token in (7, 8, 7)]
    longer = [(context + choices[2][1], tokens(5, 4))]
    lone = [(tokens(length, 50 + length), tokens(2, length)) for length in (1, 1, 2, 13, 30)]
    truncated = [(tokens(60, 5), tokens(3, 6)), (tokens(38, 7), tokens(4, 8)), (tokens(9, 9), tokens(MAX_LENGTH, 10))]
    return choices + begin_alike + partial + one_token + longer + lone + truncated + choices[:2]


@torch.no_grad()
def alone(model, context, continuation, exit_loop=None):
    """A request by itself: log-likelihood, and whether greedy decoding would give the continuation."""
    text = (context + continuation)[-(MAX_LENGTH + 1) :]
    logits = model(torch.tensor([text[:-1]]), exit_loop=exit_loop)[0, -len(continuation) :].log_softmax(-1)
    targets = torch.tensor(continuation)
    return logits.gather(1, targets[:, None]).sum().item(), bool((logits.argmax(-1) == targets).all())


@pytest.mark.parametrize("recursion", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_each_request_alone_under_any_batch_size(configs, family, recursion, monkeypatch):
    monkeypatch.setattr(scoring, "MASKED_ROW_TOKENS", 60)
    model = random_model(configs[family], recursion)
    requests = request_mix()
    # One whose every token is the argmax.
    with torch.no_grad():
        best = model(torch.tensor([requests[0][0]]))[0, -1].argmax().item()
    requests.append((requests[0][0], [best]))
    expected = [alone(model, *request) for request in requests]
    assert expected[-1][1] and not all(greedy for _, greedy in expected)
    for batch_tokens, min_shared in ((1, 1), (50, 1), (130, 8), (4096, 4)):
        monkeypatch.setattr(scoring, "MIN_SHARED_TOKENS", min_shared)
        scores = Scorer(model, MAX_LENGTH, batch_tokens).score(requests)
        assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
        assert max(abs(a - b) for (a, _), (b, _) in zip(scores, expected, strict=True)) <= 1e-10
    assert Scorer(model, MAX_LENGTH, 64).score([]) == []


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["prefix", "LoRA on the head", "translators", "translators and LoRA"])
def test_scores_of_an_exit_are_those_of_its_logits(configs, name, packed, monkeypatch):
    for module in ("eval.scoring", "rrt.decode.packed_weights"):
        monkeypatch.setattr(f"{module}.should_pack_for_batches", lambda weight: packed)
    model = random_model(configs["gemma"], {**KINDS, **TRANSLATED}[name])
    requests = request_mix()
    scores = []
    for loop in range(3):
        with torch.no_grad():
            best = model(torch.tensor([requests[0][0]]), exit_loop=loop)[0, -1].argmax().item()
        expected = [alone(model, *request, loop) for request in [*requests, (requests[0][0], [best])]]
        found = Scorer(model, MAX_LENGTH, 130, exit_loop=loop).score([*requests, (requests[0][0], [best])])
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected] and found[-1][1]
        assert max(abs(a - b) for (a, _), (b, _) in zip(found, expected, strict=True)) <= 1e-10
        scores.append(found[: len(requests)])
    assert Scorer(model, MAX_LENGTH, 130).score(requests) == scores[2]
    assert all(abs(a - b) > 1e-3 for (a, _), (b, _) in zip(scores[0], scores[2], strict=True))


def test_single_precision_scores_differ_by_rounding_only_between_batch_sizes(configs):
    model = random_model(configs["llama"], KINDS["relaxed"]).float()
    by_size = [Scorer(model, MAX_LENGTH, size).score(request_mix()) for size in (1, 77, 4096)]
    for scores in by_size[1:]:
        assert max(abs(a - b) for (a, _), (b, _) in zip(scores, by_size[0], strict=True)) <= 1e-4


@pytest.mark.parametrize("packed", [False, True])
def test_the_head_with_a_large_vocabulary_gives_the_same_packed_and_in_pieces(packed, configs, monkeypatch):
    model = random_model(configs["gemma"], KINDS["vanilla"])
    for module in ("eval.scoring", "rrt.decode.packed_weights"):
        monkeypatch.setattr(f"{module}.should_pack_for_batches", lambda weight: False)
    expected = Scorer(model, MAX_LENGTH, 4096).score(request_mix())
    for module in ("eval.scoring", "rrt.decode.packed_weights"):
        monkeypatch.setattr(f"{module}.should_pack_for_batches", lambda weight: packed)
    monkeypatch.setitem(scoring.LOGITS_ELEMENTS, "cpu", 3 * 151)
    monkeypatch.setattr(scoring, "MIN_LOGITS_ROWS", 1)
    others = Scorer(model, MAX_LENGTH, 4096).score(request_mix())
    assert [value for value, _ in others] == pytest.approx([value for value, _ in expected], abs=1e-12)
    assert [greedy for _, greedy in others] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("packed", [False, True])
def test_a_state_that_predicts_several_tokens_goes_through_the_head_once(packed, configs, monkeypatch):
    model = random_model(configs["llama"], KINDS["vanilla"])
    context, endings = tokens(20, 1), [tokens(length, length) for length in (1, 2, 4, 3)]
    expected = [alone(model, context, ending) for ending in endings]
    read = []

    def counted(function):
        return lambda hidden, *rest: read.append(len(hidden)) or function(hidden, *rest)

    for module in ("eval.scoring", "rrt.decode.packed_weights"):
        monkeypatch.setattr(f"{module}.should_pack_for_batches", lambda weight: packed)
    if packed:
        monkeypatch.setattr(scoring.ops, "logit_statistics", counted(scoring.ops.logit_statistics))
    else:
        monkeypatch.setattr(model, "logits", counted(model.logits))
    scores = Scorer(model, MAX_LENGTH, 4096).score([(context, ending) for ending in endings])
    assert sum(read) == 1 + sum(len(ending) - 1 for ending in endings)
    assert [value for value, _ in scores] == pytest.approx([value for value, _ in expected], abs=1e-10)


@needs_native
def test_a_batch_is_one_row_without_padding(configs, monkeypatch):
    model = random_model(configs["llama"], KINDS["relaxed"])
    shapes = []
    whole = model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda ids, **rest: shapes.append(ids.shape) or whole(ids, **rest))
    Scorer(model, MAX_LENGTH, 100).score(request_mix())
    assert len(shapes) > 1 and all(rows == 1 and 50 <= length <= 100 for rows, length in shapes[:-1])
    assert sum(length for _, length in shapes) == sum(row.length for row in rows_of(request_mix(), 100))


@needs_native
def test_layers_are_packed_and_the_last_ends_with_the_scored_tokens(configs, monkeypatch):
    model = random_model(configs["llama"], KINDS["relaxed"])
    scorer = Scorer(model, MAX_LENGTH, 4096)
    context, endings = tokens(20, 1), [tokens(length, length) for length in (1, 2, 4, 3)]
    rows = []

    def count(name, products):
        native = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda x, *rest: rows.extend([x[..., 0].numel()] * products) or native(x, *rest))

    count("packed_linear", 1)
    count("packed_gated_linear", 2)
    scorer.score([(context, ending) for ending in endings])
    read, scored = 20 + 0 + 1 + 3 + 2, 1 + 0 + 1 + 3 + 2
    per_layer = 7  # q, k, v, out, gate, up, down
    assert len(rows) == per_layer * model.config.num_layers
    assert rows == [read] * (len(rows) - 4) + [scored] * 4
    head = scorer._packed_head.nbytes
    rows.clear()
    heads_alone = Scorer(model, MAX_LENGTH, 4096, packed_bytes=head)
    nothing = Scorer(model, MAX_LENGTH, 4096, packed_bytes=head - 1)
    assert heads_alone._packed_head is not None and heads_alone._packed_layers.num_bytes == 0
    assert nothing._packed_head is None and nothing._packed_layers.num_bytes < head
    requests = [(context, ending) for ending in endings]
    for limited in (heads_alone, Scorer(model, MAX_LENGTH, 4096, packed_bytes=0)):
        found = [value for value, _ in limited.score(requests)]
        assert found == pytest.approx([value for value, _ in scorer.score(requests)], abs=1e-10)
    assert not rows


def rows_of(requests, row_tokens=10_000):
    scorer = Scorer(None, MAX_LENGTH, 1)
    texts = [scorer.make_text(*request) for request in requests]
    return list(pack_rows(list({text.key: text for text in texts}.values()), row_tokens))


def seen(row):
    """What each token of a row sees, as the tokens there and itself."""
    row_tokens, _, seen_until, _ = row.layout()
    return [[row_tokens[j] for j in range(i + 1) if j == i or i < seen_until[j]] for i in range(len(row_tokens))]


def test_a_context_is_computed_once_for_all_its_choices():
    context = tokens(30, 1)
    rows = rows_of([(context, tokens(length, length)) for length in (5, 6, 7, 8)])
    assert [row.length for row in rows] == [30 + 4 + 5 + 6 + 7] and not rows[0].is_causal


def test_beginnings_of_beginnings_are_computed_once_and_seen_by_their_texts_alone():
    question, name, other = tokens(5, 1), tokens(6, 2), tokens(7, 3)
    requests = [([*question, *name], [*begin, end, 9]) for begin in ([4, 5, 6, 7], [8]) for end in (1, 2)]
    requests.append(([*question, *other], [3, 3]))
    (row,) = rows_of(requests)
    assert row.length == 5 + 6 + (4 + 1 + 1) + (1 + 1 + 1) + 7 + 1
    inputs = [context + continuation[:-1] for context, continuation in requests]
    assert all(any(text[:place] in seen(row) for text in inputs) for place in range(1, 12))
    assert all(any(part == text[: len(part)] for text in inputs) for part in seen(row))
    assert all(text in seen(row) for text in inputs)


def test_texts_of_a_row_have_the_positions_and_scored_places_that_they_have_alone():
    for row in rows_of(request_mix(), 60):
        row_tokens, positions, _, scored = row.layout()
        parts = seen(row)
        assert [len(part) - 1 for part in parts] == positions and len(row_tokens) == row.length
        predicting = iter(scored)
        for text in row.texts:
            for place in range(len(text.inputs) - len(text.targets), len(text.inputs)):
                assert parts[next(predicting)] == text.inputs[: place + 1]


def test_one_token_continuations_share_the_whole_row():
    context = tokens(30, 1)
    rows = rows_of([(context, [token]) for token in range(50, 54)])
    assert [(row.length, row.is_causal) for row in rows] == [(30, True)]


def test_two_options_in_the_context_share_what_is_before_them():
    before, after = tokens(12, 1), tokens(6, 2)
    (row,) = rows_of([([*before, option], after) for option in (4, 5)])
    assert row.length == 12 + 2 * 6


def test_short_beginnings_are_not_shared_and_rows_stay_within_their_limit():
    few = [([1, 2, 3, *tokens(20, seed)], tokens(3, seed)) for seed in range(5)]
    assert [row.length for row in rows_of(few)] == [5 * 25]
    rows = rows_of([(tokens(20, 0), tokens(10, seed)) for seed in range(9)], 50)
    assert len(rows) == 3 and all(row.length <= 50 for row in rows)
    assert [len(row.texts) for row in rows_of([(tokens(20, seed), tokens(10, seed)) for seed in range(3)], 10)] == [
        1
    ] * 3


def test_a_row_ends_where_the_next_text_shares_least():
    documents = [(tokens(20, seed), [choice, 3]) for seed in range(4) for choice in (5, 6, 7)]
    rows = rows_of(documents, 50)  # of 20 + 3 tokens each, so that a third would begin in the same row
    assert [row.length for row in rows] == [46, 46]


@pytest.mark.parametrize("batch_tokens", [1, 64, 200, 10_000])
def test_batches_hold_every_row_once_within_the_budget_with_padding(batch_tokens):
    rows = rows_of(request_mix(), 60)
    found = list(batches(rows, batch_tokens))
    assert sorted(map(id, (row for batch in found for row in batch))) == sorted(map(id, rows))
    for batch in found:
        longest = max(row.length for row in batch)
        assert len(batch) == 1 or longest * len(batch) <= batch_tokens
        assert len({row.is_causal for row in batch}) == 1


def test_finished_requests_are_not_computed_again(configs, tmp_path):
    model = random_model(configs["llama"], KINDS["vanilla"])
    requests = request_mix()
    first = Scorer(model, MAX_LENGTH, 60, ResponseCache(tmp_path / "cache.jsonl")).score(requests)

    class Unused:
        def __getattr__(self, name):
            raise AssertionError(f"the model was used: {name}")

    again = Scorer(Unused(), MAX_LENGTH, 60, ResponseCache(tmp_path / "cache.jsonl")).score(requests)
    assert again == first


def test_of_equal_logits_only_the_first_is_the_greedy_token(configs):
    model = random_model(configs["llama"], KINDS["vanilla"])
    with torch.no_grad():
        best = model(torch.tensor([tokens(9, 1)]))[0, -1].argmax().item()
        twin = 150 if best != 150 else 149
        model.head[twin] = model.head[best]
    scores = Scorer(model, MAX_LENGTH, 60).score([(tokens(9, 1), [best]), (tokens(9, 1), [twin])])
    assert scores[0][0] == scores[1][0]
    assert [greedy for _, greedy in scores] == [best < twin, twin < best]


def test_a_continuation_longer_than_the_model_reads_is_refused_before_any_work(configs):
    cache = ResponseCache()
    scorer = Scorer(random_model(configs["llama"], KINDS["vanilla"]), MAX_LENGTH, 60, cache)
    with pytest.raises(UserError, match="continuation of 41 tokens; expected at most 40"):
        scorer.score([*request_mix(), ([1], tokens(41, 0))])
    assert len(cache) == 0


def test_a_model_without_finite_numbers_is_refused_and_what_was_done_is_kept(configs, monkeypatch):
    model = random_model(configs["llama"], KINDS["vanilla"]).float()
    cache = ResponseCache()
    scorer = Scorer(model, MAX_LENGTH, 1, cache)
    scorer.score(request_mix()[:3])
    done = len(cache)
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match="is nan in float32; expected a finite number"):
        scorer.score(request_mix())
    assert len(cache) == done == 3
