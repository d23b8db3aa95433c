"""bench/serving.py: forced agreement, what is counted, the bound, rivals, and the command end to end."""

import ctypes
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import serving, tabulate
from bench.generate import make_prompts
from bench.serving import parse_arguments, tables
from bench.serving_rivals import LlamaCpp, in_batches, plain_generation, transformers_generation
from bench.serving_variants import (
    CountingEngine,
    ForcedDrafts,
    PassSeconds,
    Requests,
    count_work,
    drawn_agreement,
    lossy_policy,
    make_engines,
    make_subjects,
    mixed_lengths,
    pass_seconds,
    serve,
    share_of_same,
    token_ids,
)
from rrt.checkpoint.presets import PRESETS
from rrt.data.tokenizer import load_tokenizer
from rrt.errors import UserError
from rrt.folding.conversion import convert
from rrt.model.config import LoraRanks, RecursiveConfig
from rrt.serve.engine import Engine
from rrt.serve.exits import Auto, Static, Verify
from rrt.serve.gate import PassCurve
from tests.util.decoding import make_decoder, make_model
from tests.util.models import make_hf_model
from tests.util.tokenizers import make_bpe_tokenizer

ROOT = Path(__file__).resolve().parents[2]
FREE_ROWS = PassCurve((1, 256), (1.0, 1.0), (1.0, 1.0), (0.0, 0.0))
REQUESTS = Requests([[1, 2, 3], [4, 5, 6]], [12, 12])
MIXED = Requests([[1, 2, 3], [4, 5], [6, 7, 8, 9], [10], [11, 12]], [5, 9, 1, 4, 7])


def parse(monkeypatch, flags):
    monkeypatch.setattr(sys, "argv", ["serving.py", *flags.split()])
    return parse_arguments()


def plain_decoder(looped="recursive-2"):
    return make_decoder(make_model("llama", looped, torch.float64), num_pages=200)


@pytest.mark.parametrize("looped", ["recursive-2", "relaxed-3-untied"])
def test_forced_agreement_takes_the_passes_that_it_should(looped):
    decoder = plain_decoder(looped)
    num_loops = decoder.cache.num_loops
    engine = CountingEngine(decoder)
    expected = token_ids(serve(engine, REQUESTS))
    assert engine.passes == 12 * num_loops
    agrees = drawn_agreement(2, 12, 0.6)
    assert 0 < agrees.sum() < 24
    # The requests run beside each other, and the slower one decides. The first token ends the prompt.
    each = torch.where(agrees[:, 1:], 1, num_loops)
    engine = ForcedDrafts(decoder, Verify(), expected, agrees)
    assert token_ids(serve(engine, REQUESTS)) == expected
    # The last token is not begun before it is certain, and ends with its last loop.
    assert engine.passes == num_loops + int((each[:, :-1].sum(1)).max()) + num_loops
    engine = CountingEngine(decoder, lossy_policy(agrees))
    for _ in range(2):  # requests that are added again exit where they did
        engine.reset_counts()
        serve(engine, REQUESTS)
        assert engine.passes == num_loops + int(each.sum(1).max())
    engine = ForcedDrafts(decoder, Auto(FREE_ROWS), expected, agrees)
    assert token_ids(serve(engine, REQUESTS)) == token_ids(serve(engine, REQUESTS)) == expected


def test_rows_and_head_rows_are_counted_for_each_token_after_the_first():
    decoder = plain_decoder()

    def counted(policy=None, requests=REQUESTS):
        engine = CountingEngine(decoder, policy)
        return count_work(engine, serve(engine, requests))

    assert counted() == {"passes": 24, "rows_per_token": 2, "head_rows_per_token": 1}
    # All leave after the first loop; of each but the last, a kv-only row follows.
    lossy = counted(Static(0))
    assert (lossy["agreed"], lossy["loops_per_token"], lossy["head_rows_per_token"]) == (1, 1, 1)
    assert lossy["rows_per_token"] == pytest.approx((11 + 10) / 11)
    verified = counted(Verify())
    assert 2 <= verified["rows_per_token"] < 3 and verified["loops_per_token"] == pytest.approx(2 - verified["agreed"])
    assert counted(Static(0), Requests([[1, 2]], [1])) == {"passes": 2}


def test_the_bound_counts_passes_of_block_and_head():
    parts = PassSeconds(block=1.0, mixed=2.0, drafted=2.0, skipped=2.0, head=0.0)
    lossy = {"is_exact": False}
    assert parts.bound(2, 1, 1, **lossy, in_step=True) == 1.0 and parts.bound(3, 3, 3, **lossy, in_step=False) == 1.0
    parts = PassSeconds(2.0, 2.0, 2.0, 2.0, 1.0)
    assert parts.bound(2, 1.2, 2.0, **lossy, in_step=True) == pytest.approx(5.0 / (1.2 * 3.0))


def test_the_bound_of_one_request_counts_the_loops_of_its_drafts_or_of_what_it_skipped():
    parts = PassSeconds(block=1.0, mixed=1.0, drafted=3.0, skipped=2.0, head=1.0)
    # Four rows in two passes of three loops: half of the further rows that a pass could have.
    assert parts.bound(3, 2, 4, is_exact=True, in_step=True) == pytest.approx(4.0 / (2 * (2.0 + 1.0)))
    assert parts.bound(3, 2, 4, is_exact=False, in_step=True) == pytest.approx(4.0 / (2 * (1.5 + 1.0)))
    assert parts.bound(3, 2, 9, is_exact=True, in_step=True) == pytest.approx(4.0 / (2 * (3.0 + 1.0)))


def test_a_gain_is_compared_with_the_bound_of_its_round():
    # The machine was half as fast in the second round.
    steady = {"never": [3.0, 3.0, 6.0], "lossy": [2.0, 4.0, 4.0], "late": [1.0]}
    compared = serving.compare_with_bound([2.0, 1.0, 2.0], steady, "lossy")
    assert compared == {"bound": 2.0, "of_bound": 0.75}
    assert serving.compare_with_bound([2.0, 1.0, 2.0], steady, "late") == {"bound": 2.0}


@pytest.mark.parametrize("requests", [MIXED, Requests([[1, 2]], [3])], ids=["five", "one"])
def test_parts_of_a_pass_are_timed_and_leave_no_pages(requests: Requests):
    decoder = plain_decoder()
    assert all(seconds > 0 for seconds in asdict(pass_seconds(decoder, requests, 2)).values())
    assert decoder.cache.num_used_pages == 0


def test_mixed_lengths_are_in_their_ranges_and_the_same_each_time():
    prompts = [[n] * 9 for n in range(50)]
    requests = mixed_lengths(prompts, (2, 9), (3, 5))
    assert requests == mixed_lengths(prompts, (2, 9), (3, 5))
    assert {len(prompt) for prompt in requests.prompts} == set(range(2, 10))
    assert set(requests.new_tokens) == {3, 4, 5} and requests.num_tokens == sum(requests.new_tokens)
    assert [len(batch.prompts) for batch in requests.batches(20)] == [20, 20, 10]


def test_rivals_give_every_request_of_a_batch_the_tokens_that_it_asked_for():
    decoder = plain_decoder()
    expected = token_ids(serve(Engine(decoder, max_running=2), MIXED))
    assert [len(tokens) for tokens in expected] == MIXED.new_tokens
    assert in_batches(plain_generation(decoder), MIXED, 2) == expected
    assert share_of_same(expected, expected) == 1 and share_of_same([[1, 2], [3]], [[1, 0], [3]]) == pytest.approx(
        2 / 3
    )

    class Padding:
        def generate(self, prompts, new_tokens):
            return [[7] * new_tokens for _ in prompts]

    padded = in_batches(transformers_generation(Padding()), MIXED, 2)
    assert [len(tokens) for tokens in padded] == MIXED.new_tokens


def test_policies_run_as_they_are_beside_those_of_forced_agreement(monkeypatch):
    decoder = plain_decoder()
    flags = "--preset smollm2-135m --policies never verify static:0 --agreement 0.5"
    engines = make_engines(decoder, [[1, 2]], parse(monkeypatch, flags), 3)
    assert list(engines) == ["never", "lossy 0.5", "verify 0.5", "auto 0.5", "verify", "static:0"]
    # The time of passes is measured once, for all engines.
    assert engines["auto 0.5"]().policy.curve is engines["auto 0.5"]().policy.curve is not None
    assert isinstance(engines["verify"]().policy, Verify) and engines["static:0"]().policy == Static(0)
    assert parse(monkeypatch, "--preset smollm2-135m --policies never").agreement == []
    some = make_engines(decoder, [[1, 2]], parse(monkeypatch, f"{flags} 1 --forced verify lossy"), 3)
    assert list(some)[1:5] == ["lossy 0.5", "verify 0.5", "lossy 1", "verify 1"]
    vanilla = make_decoder(make_model("llama", "vanilla", torch.float32))
    assert list(make_engines(vanilla, [[1, 2]], parse(monkeypatch, flags), 3)) == ["never"]


def test_a_preset_is_looped_in_all_ways_and_one_loop_has_no_rank(monkeypatch):
    flags = "--preset smollm2-135m --num-loops 1 2 3 --lora-rank 0 64"
    subjects = make_subjects(parse(monkeypatch, flags))
    ways = [(subject.recursion.num_loops, subject.recursion.lora_rank.q) for subject in subjects]
    assert ways == [(1, 0), (2, 0), (2, 64), (3, 0), (3, 64)]
    assert [subject.name for subject in subjects][:2] == ["smollm2-135m, 1 loop", "smollm2-135m, 2 loops, rank 0"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--preset smollm2-135m --prompt-tokens 9 3", "--prompt-tokens: found [9, 3]; expected a number, or the least"),
        ("--preset smollm2-135m --new-tokens 1 2 3", "--new-tokens: found [1, 2, 3]"),
        ("--preset smollm2-135m --in-flight 4 0", "--in-flight: found 0; expected 1 or more"),
        ("--preset smollm2-135m --agreement 1.5", "--agreement: found [1.5]; expected numbers from 0 to 1"),
        ("--preset smollm2-135m --policies sometimes", "--policies: found 'sometimes'; expected never, verify"),
        ("--preset smollm2-135m --policies static:2", "static exit: found loop 2; expected one in [0, 2)"),
        ("--preset smollm2-135m --policies calibrated:0.9", "--policies: found 'calibrated:0.9' with --preset"),
        ("--preset smollm2-135m --num-loops 7", "field 'num_loops': found 7"),
        ("--checkpoint x --num-loops 2", "--num-loops: found with --checkpoint, which has them; expected --preset"),
        ("--preset smollm2-135m --transformers", "--transformers: expected with --checkpoint"),
        ("--checkpoint x --online --llama-cpp y", "--llama-cpp: expected with --checkpoint, and not with --online"),
        ("--preset smollm2-135m --plot x.svg", "--plot: found without --online; expected both"),
        ("--preset smollm2-135m --online --load 0.5 0", "--load: found [0.5, 0.0]; expected positive numbers"),
        ("--preset smollm2-135m --online --requests 9 --warm-up 9", "--warm-up: found 9; expected fewer than"),
        ("--checkpoint x --llama-cpp absent.gguf", "--llama-cpp: "),
    ],
)  # fmt: skip
def test_bad_flags_are_one_line_before_anything_is_measured(monkeypatch, flags, message):
    with pytest.raises(UserError) as error:
        make_subjects(parse(monkeypatch, flags))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_prompts_are_distinct_windows_of_more_than_the_documents_beginnings(tmp_path):
    make_hf_model(tmp_path / "base", "llama", num_layers=2, vocab_size=420)
    make_bpe_tokenizer(tmp_path / "base", "llama")
    prompts = make_prompts(tmp_path / "base", 300, 16)
    assert {len(prompt) for prompt in prompts} == {16} and len(set(map(tuple, prompts))) == 300
    assert make_prompts(tmp_path / "base", 5, 16) == prompts[:5]
    text = tmp_path / "text.txt"
    text.write_text("a b c d e f g h i j k l m n o p\n" * 30)
    own = make_prompts(tmp_path / "base", 3, 16, [str(text)])
    assert len(own) == 3 and own[0] == load_tokenizer(tmp_path / "base").encode(text.read_text())[:16]
    with pytest.raises(UserError, match="prompts: found 0 of 10000000 tokens"):
        make_prompts(tmp_path / "base", 1, 10_000_000)


def test_a_result_of_random_weights_has_all_variants_and_makes_a_page(monkeypatch, one_thread):
    tiny = {**PRESETS["smollm2-135m"], "vocab_size": 97, "hidden_size": 36, "intermediate_size": 48}
    monkeypatch.setitem(PRESETS, "smollm2-135m", {**tiny, "num_hidden_layers": 4})
    flags = (
        "--preset smollm2-135m --num-loops 1 2 --lora-rank 3 --in-flight 2 --mixed --agreement 0.5 --policies verify"
    )
    arguments = parse(monkeypatch, f"{flags} --prompt-tokens 5 --new-tokens 6 --threads 1 --rounds 2")
    result = serving.run(arguments)
    assert [(case["model"], case["lengths"], case["requests"]) for case in result["cases"]] == [
        (f"smollm2-135m, {model}", *lengths)
        for model in ("1 loop", "2 loops, rank 3")
        for lengths in (("equal", 2), ("mixed", 6))
    ]
    assert list(result["cases"][0]["variants"]) == ["never", "generate"]
    looped = result["cases"][2]["variants"]
    assert list(looped) == ["never", "lossy 0.5", "verify 0.5", "auto 0.5", "verify", "generate"]
    assert all(found["tokens_per_second"] > 0 for found in looped.values())
    assert looped["never"]["same"] == looped["verify 0.5"]["same"] == 1 and "bound" not in looped["never"]
    assert looped["verify"]["bound"] > 0 and 0 <= looped["verify"]["agreed"] <= 1
    (table,) = tabulate.result_tables({"kind": "serving-speed", **json.loads(json.dumps(result))})
    assert "| smollm2-135m, 2 loops, rank 3 | float32 | mixed | 2 | verify 0.5 |" in table.markdown()
    assert "mixed: 1 to 5 and 1 to 6, 3 requests for each in flight" in table.markdown()


@pytest.mark.slow
def test_command_measures_a_relaxed_checkpoint_and_writes_json(tmp_path):
    base, relaxed, out = tmp_path / "base", tmp_path / "relaxed", tmp_path / "out.json"
    make_hf_model(base, "llama", num_layers=4, vocab_size=420)
    make_bpe_tokenizer(base, "llama")
    convert(base, relaxed, RecursiveConfig(num_loops=2, lora_rank=LoraRanks.uniform(5)))
    flags = "--in-flight 1 3 --agreement 0.5 --prompt-tokens 5 --new-tokens 6 --threads 1 --rounds 2 --transformers"
    command = [sys.executable, str(ROOT / "bench" / "serving.py"), "--checkpoint", str(relaxed), *flags.split()]
    done = subprocess.run([*command, "--mixed", "--json", str(out)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [case["in_flight"] for case in result["cases"]] == [1, 1, 3, 3]
    for case in result["cases"]:
        assert list(case["variants"]) == ["never", "lossy 0.5", "verify 0.5", "auto 0.5", "generate", "transformers"]
        assert all(found["tokens_per_second"] > 0 for found in case["variants"].values())
        assert case["variants"]["transformers"]["same"] > 0.8
    assert "verify 0.5" in tables(result)[0].markdown()


class FakeLlama:
    """Stands for llama_cpp: the token after a sequence is the sum of all its tokens, modulo the vocabulary."""

    vocab_size = 11

    def __init__(self):
        self.sequences, self.rows = {}, []
        for name in ("log_set", "backend_init", "model_get_vocab", "get_memory", "model_default_params"):
            setattr(self, f"llama_{name}", lambda *_: None)
        self.llama_log_callback = lambda function: function
        self.llama_model_load_from_file = lambda path, params: path.endswith(b".gguf")
        self.llama_context_default_params = self.llama_init_from_model = lambda *_: SimpleNamespace()
        self.llama_vocab_n_tokens = lambda _: self.vocab_size
        self.llama_memory_clear = lambda *_: self.sequences.clear()

    def llama_batch_init(self, size, *_):
        values = {name: [None] * size for name in ("token", "pos", "n_seq_id", "logits")}
        return SimpleNamespace(**values, seq_id=[[None] for _ in range(size)], n_tokens=0)

    def llama_decode(self, _, batch):
        self.rows, self.ends = [*self.rows, batch.n_tokens], {}
        for i in range(batch.n_tokens):
            tokens = self.sequences.setdefault(batch.seq_id[i][0], [])
            assert batch.pos[i] == len(tokens) and batch.n_seq_id[i] == 1
            tokens.append(batch.token[i])
            if batch.logits[i]:
                self.ends[i] = sum(tokens) % self.vocab_size
        return 0

    def llama_get_logits_ith(self, _, i):
        logits = (ctypes.c_float * self.vocab_size)(*(float(j == self.ends[i]) for j in range(self.vocab_size)))
        return ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))


def test_llama_cpp_continues_a_batch_and_its_sequences_leave_when_they_are_done(monkeypatch):
    fake = FakeLlama()
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    rival = LlamaCpp(Path("model.gguf"), 20, 3, 1)
    found = in_batches(rival, MIXED, 3)
    for tokens, prompt, count in zip(found, MIXED.prompts, MIXED.new_tokens, strict=True):
        expected = list(prompt)
        for _ in range(count):
            expected.append(sum(expected) % 11)
        assert tokens == expected[len(prompt) :]
    # The prompts at once, then a row for each that goes on: five, nine and one tokens; four and seven.
    assert fake.rows == [9, *[2] * 4, *[1] * 4, 3, *[2] * 3, *[1] * 3]
    with pytest.raises(UserError, match=r"--llama-cpp: model\.bin: llama\.cpp cannot read it"):
        LlamaCpp(Path("model.bin"), 20, 3, 1)
