"""eval/harness_lm.py against the harness's own `hf` model on the exported checkpoint: same requests, same scores."""

import functools

import pytest
import torch

from tests.util.models import FAMILIES, make_hf_model
from tests.util.tasks import write_task_files
from tests.util.tokenizers import make_bpe_tokenizer, training_texts

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")  # which the harness's hf model needs

import datasets
import lm_eval.utils
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from eval.harness_lm import HarnessLM, split_tokens
from eval.harness_tasks import PAPER_METRICS, compile_templates_once, load_tasks
from rrt.checkpoint.format import CheckpointConfig, write_checkpoint
from rrt.checkpoint.source import load_model, open_source
from rrt.common.provenance import make_provenance
from rrt.data.tokenizer import load_tokenizer
from rrt.errors import UserError
from rrt.folding.unroll import export
from rrt.model.config import LoraRanks, RecursiveConfig
from rrt.model.meta import meta_model

KINDS = {
    "gemma": RecursiveConfig(num_loops=2, lora_rank=LoraRanks.uniform(3)),
    "llama": RecursiveConfig(num_loops=2),
    "gpt_neox": RecursiveConfig(),
}
MAX_LENGTH = 96
"""Some of the requests are longer."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of each family: (a checkpoint of a kind of its own, its export with the same tokenizer)."""
    root = tmp_path_factory.mktemp("models")
    made = {}
    for family in FAMILIES:
        tokenizer = load_tokenizer(make_bpe_tokenizer(root / f"{family}-tokenizer", family))
        ids = dict(bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
        base = make_hf_model(root / f"{family}-base", family, num_layers=4, vocab_size=tokenizer.vocab_size, **ids)
        config, recursion = open_source(base).model, KINDS[family]
        out, generator = root / family, torch.Generator().manual_seed(0)
        described = CheckpointConfig(config, recursion, torch.float32)
        with write_checkpoint(out, described, make_provenance("test", None)) as writer:
            for name, parameter in meta_model(config, recursion).named_parameters():
                scale = 0.3 if "norm" in name or name.endswith("bias") else 0.15
                writer.add(name, scale * torch.randn(parameter.shape, generator=generator) + ("norm.weight" in name))
            tokenizer.save(writer.directory)
        export(out, root / f"{family}-hf")
        made[family] = out, root / f"{family}-hf"
    return made


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_task_files(tmp_path_factory.mktemp("data"), documents=5)


@pytest.fixture(scope="module")
def both(checkpoints):
    """Our model and the hf model on its export, made once for each kind of reading."""

    @functools.cache
    def make(family, bos, batch_tokens=300, max_length=MAX_LENGTH):
        _, exported = checkpoints[family]
        hf = HFLM(str(exported), device="cpu", dtype="float32", batch_size=16, add_bos_token=bos, max_length=max_length)
        # In the newest transformers the flag of the tokenizer alone does nothing for these classes.
        assert not bos or hf.tok_encode("word")[0] == hf.prefix_token_id
        return ours_alone(checkpoints, family, bos, batch_tokens, max_length), hf

    return make


def ours_alone(checkpoints, family, bos, batch_tokens=300, max_length=MAX_LENGTH):
    directory, _ = checkpoints[family]
    model, tokenizer = load_model(directory), load_tokenizer(directory)
    return HarnessLM(model, tokenizer, bos=bos, batch_tokens=batch_tokens, max_length=max_length)


def instances(kind, *arguments):
    return [Instance(kind, {}, args, index, ("test", index, 1)) for index, args in enumerate(arguments)]


def assert_same(found, expected):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert max(abs(a - b) for (a, _), (b, _) in zip(found, expected, strict=True)) <= 1e-4


def bos_cases():
    return [(family, bos) for family in FAMILIES for bos in (True, False) if not (family == "gpt_neox" and bos)]


@pytest.fixture(scope="module")
def requests_of_the_seven(data_dir):
    tasks, _ = load_tasks(list(PAPER_METRICS), data_dir, None)
    for task in tasks["tasks"].values():
        task.build_all_requests()
    requests = [request for task in tasks["tasks"].values() for request in task.instances]
    assert len(requests) == 5 * (1 + 4 + 2 + 2) + 18 + 19 + 18
    return requests


@pytest.mark.parametrize(("family", "bos"), bos_cases())
def test_the_seven_tasks_score_as_with_the_hf_model(both, requests_of_the_seven, family, bos):
    ours, hf = both(family, bos)
    assert_same(ours.loglikelihood(requests_of_the_seven), hf.loglikelihood(requests_of_the_seven))


def test_the_results_of_the_seven_tasks_are_those_of_the_hf_model(both, data_dir):
    results = []
    for lm in both("gemma", True):
        tasks, _ = load_tasks(list(PAPER_METRICS), data_dir, None)
        results.append(evaluate(lm, tasks, bootstrap_iters=0, log_samples=False)["results"])
    perplexities = [result["lambada_openai"].pop("perplexity,none") for result in results]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-4)
    assert results[0] == results[1]


@pytest.mark.parametrize(("family", "bos"), bos_cases())
def test_every_form_of_request_scores_as_with_the_hf_model(both, family, bos):
    ours, hf = both(family, bos)
    long = " ".join(training_texts()[0].split()[:150])
    requests = instances(
        "loglikelihood",
        ("", "An empty context"),
        ("", "x"),  # not " x": transformers 5 drops a space at the beginning of a text for Llama
        ("Trailing spaces go along  ", "to the continuation"),
        ("ends in a line\n", "and goes on"),
        ("One", "a"),
        ("The same context", " b"),
        ("The same context", " c"),
        ("The same context", " c and more"),
        ("The same context", " c and more"),
        ("Fünf Schnäbel 東京 🐍 für “", "Ωmega…” 雨"),
        ("Fünf Schnäbel 東京 🐍", " ∑"),
        (long, " cut from the left"),
        (long[:200], long[200:300]),
        ("x" * 300, "x"),
    )
    assert_same(ours.loglikelihood(requests), hf.loglikelihood(requests))


def test_examples_before_the_question_score_as_with_the_hf_model(both, tmp_path):
    data = write_task_files(tmp_path / "data", documents=5, train=True)
    responses = []
    for lm in both("llama", True, max_length=512):
        tasks, files = load_tasks(["piqa", "arc_easy"], data, 2)
        found = evaluate(lm, tasks, bootstrap_iters=0, log_samples=False)
        assert found["n-shot"] == {"piqa": 2, "arc_easy": 2} and "piqa.train.jsonl" in files
        requests = [request for task in tasks["tasks"].values() for request in task.instances]
        assert all(request.args[0].count("Answer:") == 3 for request in requests)
        responses.append([request.resps[0] for request in requests])
    assert_same(*responses)


@pytest.mark.parametrize("family", FAMILIES)
def test_rolling_perplexity_of_documents_of_any_length_as_with_the_hf_model(checkpoints, both, family):
    # The hf model would give the first window a BOS of its own besides the prefix token.
    ours, hf = both(family, False)
    texts = [training_texts()[0][:3000], "Short.", "é", training_texts()[1][:700]]
    requests = instances("loglikelihood_rolling", *((text,) for text in texts))
    found, expected = ours.loglikelihood_rolling(requests), hf.loglikelihood_rolling(requests)
    assert found == pytest.approx(expected, abs=1e-3, rel=1e-6)
    assert ours.loglikelihood_rolling(instances("loglikelihood_rolling", ("",))) == [0]


def test_windows_of_documents_begin_with_bos_and_score_every_token_once(checkpoints):
    ours = ours_alone(checkpoints, "gemma", True, max_length=10)
    tokens = list(range(100, 135))
    windows = ours._windows(tokens)
    assert windows[0] == ([2], tokens[:9]) and windows[1] == ([2, 108], tokens[9:18])
    assert [token for _, scored in windows for token in scored] == tokens
    for context, scored in windows:
        assert context[0] == 2 and len(context) + len(scored) - 1 <= 10
    assert ours._windows(tokens[:10]) == [([2], tokens[:10])] and ours._windows([]) == []
    requests = instances("loglikelihood_rolling", (training_texts()[0][:300],))
    pieces = [(ours.model_tokenizer.encode(request.args[0], bos=False)) for request in requests]
    scores = [sum(value for value, _ in ours.scorer.score(ours._windows(piece))) for piece in pieces]
    assert ours.loglikelihood_rolling(requests) == scores and len(pieces[0]) > 30


def spanning_pairs(encode, count):
    """Find texts with a cut that a token of the whole spans, and that leaves the continuation a token of its own."""
    found = []
    for word in " ".join(training_texts()[0].split()[:300]).split():
        for cut in range(1, len(word)):
            context, whole = encode(f"The {word[:cut]}"), encode(f"The {word}")
            if whole[: len(context)] != context and len(whole) > len(context):
                found.append((f"The {word[:cut]}", word[cut:]))
    assert len(found) >= count
    return found[:count]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_that_spans_context_and_continuation_scores_as_with_the_hf_model(both, family):
    ours, hf = both(family, family != "gpt_neox")
    requests = instances("loglikelihood", *spanning_pairs(hf.tok_encode, 8))
    found = ours.loglikelihood(requests)
    assert_same(found, hf.loglikelihood(requests))
    # The harness scores the context's own tokens and the rest of the joint encoding, not the joint encoding.
    for request, (value, _) in zip(requests, found, strict=True):
        context, continuation = request.args
        whole, length = hf.tok_encode(context + continuation), len(hf.tok_encode(context))
        assert abs(ours.scorer.score([(whole[:length], whole[length:])])[0][0] - value) > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_stops_and_reads_as_with_the_hf_model(both, family):
    ours, hf = both(family, family != "gpt_neox")
    long = " ".join(training_texts()[0].split()[:150])
    contexts = ["def f(", "Ein Käse", "A longer context that goes on", long]
    requests = instances(
        "generate_until",
        *((context, {"until": [], "max_gen_toks": 24}) for context in contexts),
        *((context, {"until": ["e", "\n"], "max_gen_toks": 16, "do_sample": False}) for context in contexts),
        *((context, {"max_gen_toks": 3, "temperature": 0.0, "until": "zzz"}) for context in contexts),
    )
    expected = hf.generate_until(requests)
    assert any(expected[:4]) and expected[:4] != expected[4:8]
    assert ours.generate_until(requests) == expected
    cached = len(ours.scorer.cache)
    assert ours.generate_until(requests) == expected and len(ours.scorer.cache) == cached


def test_generative_and_perplexity_tasks_of_the_harness_end_with_the_results_of_the_hf_model(both):
    documents = [{"text": text[:400], "answer": "e"} for text in training_texts()[:3]]
    shared = dict(
        custom_dataset=lambda **_: {"test": datasets.Dataset.from_list(documents)},
        test_split="test",
        doc_to_text="{{text}}",
        doc_to_target="{{answer}}",
    )
    generative = dict(
        shared,
        task="answers",
        output_type="generate_until",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 8},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    )
    perplexity = dict(
        shared,
        task="pages",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    )
    results, answers = [], []
    for lm in both("llama", False):
        tasks = TaskManager(include_defaults=False).load([generative, perplexity])
        results.append(evaluate(lm, tasks, bootstrap_iters=0, log_samples=False)["results"])
        answers.append([request.resps[0] for request in tasks["tasks"]["answers"].instances])
    assert answers[0] == answers[1] and any(answers[0])
    assert results[0]["answers"] == results[1]["answers"]
    for metric in ("bits_per_byte,none", "word_perplexity,none"):
        assert results[0]["pages"][metric] == pytest.approx(results[1]["pages"][metric], rel=1e-5)


def test_generation_goes_in_batches_that_fit_the_cache(checkpoints, monkeypatch):
    requests = instances("generate_until", *((f"Text {n} of {n}", {"max_gen_toks": 5 + n % 2}) for n in range(9)))
    expected = ours_alone(checkpoints, "llama", True).generate_until(requests)
    monkeypatch.setattr("eval.generation.CACHE_BYTES", 1)
    monkeypatch.setattr("eval.generation.MAX_SEQUENCES", 3)
    assert ours_alone(checkpoints, "llama", True).generate_until(requests) == expected


def test_generation_that_samples_or_is_too_long_is_refused(checkpoints):
    ours = ours_alone(checkpoints, "llama", True)
    with pytest.raises(UserError, match="task test: asks for sampling"):
        ours.generate_until(instances("generate_until", ("a", {"do_sample": True, "temperature": 0.7})))
    with pytest.raises(UserError, match="task test: found 96 tokens to generate; expected at least 1 and fewer than"):
        ours.generate_until(instances("generate_until", ("a", {"max_gen_toks": MAX_LENGTH})))


def test_generation_through_a_translator_is_refused(checkpoints):
    directory, _ = checkpoints["llama"]
    ours = HarnessLM(load_model(directory), load_tokenizer(directory), bos=True, batch_tokens=300, exit_loop=0)
    message = "task test: generates text, .*; expected tasks that score texts with --exit-loop 0"
    with pytest.raises(UserError, match=message):
        ours.generate_until(instances("generate_until", ("a", {"max_gen_toks": 3})))


def test_a_continuation_that_merges_into_the_context_is_scored_from_where_the_tokens_part():
    assert split_tokens([1, 2, 3], [1, 2, 3, 4]) == ([1, 2, 3], [4])
    assert split_tokens([1, 2, 3], [1, 2, 9, 4]) == ([1, 2, 3], [4])  # the harness counts, it does not compare
    assert split_tokens([1, 2, 3], [1, 2, 9]) == ([1, 2], [9])
    assert split_tokens([1, 2, 3], [1, 9]) == ([1], [9])
    assert split_tokens([1, 2, 3], [1, 2, 3]) == ([1, 2, 3], [])
    assert split_tokens([1], [9]) == ([9], [])


def test_empty_continuations_are_certain_and_do_not_stop_the_run(checkpoints):
    ours = ours_alone(checkpoints, "llama", True)
    found = ours.loglikelihood(instances("loglikelihood", ("A context", ""), ("", ""), ("A context", " goes on")))
    assert found[:2] == [(0.0, True), (0.0, True)] and found[2][0] < 0


def test_scores_do_not_depend_on_the_batch_size(checkpoints, requests_of_the_seven):
    found = [
        ours_alone(checkpoints, "gemma", True, batch_tokens).loglikelihood(requests_of_the_seven)
        for batch_tokens in (1, 150, 5000)
    ]
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_a_template_is_compiled_once_and_says_the_same(monkeypatch):
    environment, compiled = lm_eval.utils.env, []
    original = environment.from_string
    monkeypatch.setattr(environment, "from_string", lambda text: compiled.append(text) or original(text))
    compile_templates_once()
    texts = [lm_eval.utils.apply_template(text, {"a": n}) for n in (1, 2) for text in ("{{a}} is", "{{a + 1}}")]
    assert texts == ["1 is", "2", "2 is", "3"]
    assert compiled == ["{{a}} is", "{{a + 1}}"]
