"""The command `python -m rrt.generate` against transformers' own generation."""

import dataclasses
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from rrt import generate
from rrt.checkpoint.source import load_model
from rrt.data.tokenizer import load_tokenizer
from rrt.errors import UserError
from rrt.folding.conversion import convert
from rrt.folding.unroll import export
from rrt.model.config import LoraRanks, RecursiveConfig
from tests.util.models import FAMILIES, make_hf_model
from tests.util.real import real_model_directory
from tests.util.tokenizers import make_bpe_tokenizer

PROMPTS = ["def main(", "import json\n\nclass Decoder", "x"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A small base of each family, with a tokenizer."""
    root = tmp_path_factory.mktemp("bases")
    for family in FAMILIES:
        directory = make_hf_model(root / family, family, num_layers=4, vocab_size=420)
        make_bpe_tokenizer(directory, family)
    return root


def texts_of_transformers(directory, prompts, count):
    """Let transformers continue the prompts, one at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    texts = []
    for prompt in prompts:
        ids = torch.tensor([tokenizer(prompt).input_ids])
        out = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=0)
        texts.append(tokenizer.decode(out[0], skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return texts


def run(capsys, directory, *flags, prompts=PROMPTS):
    """Run the command; returns the texts that it prints."""
    generate.main(["--checkpoint", str(directory), *(f"--prompt={prompt}" for prompt in prompts), *flags])
    out = capsys.readouterr().out
    assert out.endswith("\n")
    return out.removesuffix("\n").split("\n---\n")


@torch.no_grad()
def continue_naively(model, ids, count, eos_id):
    """Append the most probable tokens to `ids`, each from a forward of its own, up to and including `eos_id`."""
    for _ in range(count):
        ids = [*ids, int(model(torch.tensor([ids]))[0, -1].argmax())]
        if ids[-1] == eos_id:
            break
    return ids


@pytest.mark.parametrize("family", FAMILIES)
def test_text_equals_transformers_on_the_base_and_on_the_unrolled_model(family, bases, tmp_path, capsys):
    relaxed, unrolled = tmp_path / "relaxed", tmp_path / "unrolled"
    convert(bases / family, relaxed, RecursiveConfig(num_loops=2, init="average", lora_rank=LoraRanks.uniform(5)))
    export(relaxed, unrolled)
    for ours, theirs, policy in (
        (bases / family, bases / family, "never"),
        (relaxed, unrolled, "never"),
        (relaxed, unrolled, "verify"),
        (relaxed, unrolled, "auto"),
    ):
        found = run(capsys, ours, "--max-new-tokens", "20", "--device", "cpu", "--exit-policy", policy)
        assert found == texts_of_transformers(theirs, PROMPTS, 20)
        assert all(len(text) > len(prompt) for text, prompt in zip(found, PROMPTS, strict=True))


def test_prefix_vectors_have_room_in_the_cache(bases, tmp_path, capsys):
    convert(bases / "llama", tmp_path / "prefix", RecursiveConfig(num_loops=2, prefix_length=21))
    found = run(capsys, tmp_path / "prefix", "--max-new-tokens", "40", "--device", "cpu")
    model, tokenizer = load_model(tmp_path / "prefix"), load_tokenizer(tmp_path / "prefix")
    for prompt, text in zip(PROMPTS, found, strict=True):
        ids = continue_naively(model, tokenizer.encode(prompt), 40, tokenizer.eos_id)
        assert tokenizer.decode(ids) == text


def test_a_text_ends_with_the_end_token(bases, capsys, monkeypatch):
    base = bases / "llama"
    model, tokenizer = load_model(base), load_tokenizer(base)
    prompt = tokenizer.encode(PROMPTS[0])
    *_, last = ids = continue_naively(model, prompt, 4, None)
    assert last not in ids[len(prompt) : -1]
    unused = next(token for token in range(tokenizer.vocab_size) if token not in ids)
    stopping = dataclasses.replace(tokenizer, stop_ids=(unused, last))
    monkeypatch.setattr(generate, "load_tokenizer", lambda directory: stopping)
    found = run(capsys, base, "--max-new-tokens", "20", "--device", "cpu", prompts=PROMPTS[:1])
    assert found == [tokenizer.decode(ids[:-1])]


def test_a_stop_string_ends_the_text_before_it(bases, capsys):
    """Cut from the middle of the text, so that it is split over tokens and shorter ones lie before it."""
    base = bases / "llama"
    whole = run(capsys, base, "--max-new-tokens", "20", "--device", "cpu")
    stops = [text[len(prompt) + 5 :][:4] for text, prompt in zip(whole, PROMPTS, strict=True)]
    flags = [f"--stop={stop}" for stop in stops]
    found = run(capsys, base, "--max-new-tokens", "20", "--device", "cpu", *flags)
    for text, cut, prompt in zip(whole, found, PROMPTS, strict=True):
        new = text[len(prompt) :]
        assert cut == prompt + new[: min(place for place in map(new.find, stops) if place >= 0)]
        # Alone, a prompt is streamed: the same text.
        assert run(capsys, base, "--max-new-tokens", "20", "--device", "cpu", *flags, prompts=[prompt]) == [cut]


def test_text_is_printed_as_it_comes(bases, capsys, monkeypatch):
    pieces = []
    # A random model repeats itself, here in halves of characters, unless tokens are drawn.
    flags = ["--max-new-tokens=20", "--device=cpu", "--temperature=3"]
    monkeypatch.setattr("builtins.print", lambda *args, **options: pieces.append((args, options)))
    generate.main(["--checkpoint", str(bases / "llama"), "--prompt=x", *flags])
    monkeypatch.undo()
    printed = [args[0] for args, options in pieces if options.get("flush") and args]
    assert len(printed) > 5
    assert ["".join(printed)] == run(capsys, bases / "llama", *flags, prompts=["x"])


def test_the_same_seed_draws_the_same_text(bases, capsys):
    flags = ["--max-new-tokens=20", "--device=cpu", "--temperature=1.5", "--top-k=50", "--top-p=0.95"]
    first = run(capsys, bases / "llama", *flags, "--seed=3", prompts=["x", "x"])
    assert run(capsys, bases / "llama", *flags, "--seed=3", prompts=["x", "x"]) == first
    # Each prompt has a seed of its own, and gets the same text alone.
    assert first[0] != first[1]
    assert run(capsys, bases / "llama", *flags, "--seed=4", prompts=["x"]) == first[1:]


def test_verified_exits_give_the_same_text_and_show_their_depth(bases, tmp_path, capsys):
    convert(bases / "llama", tmp_path / "looped", RecursiveConfig(num_loops=2))
    flags = ("--max-new-tokens", "16", "--device", "cpu")
    plain = run(capsys, tmp_path / "looped", *flags)
    assert run(capsys, tmp_path / "looped", *flags, "--exit-policy", "verify") == plain
    shown = run(capsys, tmp_path / "looped", *flags, "--exit-policy", "verify", "--show-depth")
    assert shown != plain and all("\x1b[33m" in text for text in shown)
    assert [re.sub(r"\x1b\[\d*m", "", text) for text in shown] == plain
    first = run(capsys, tmp_path / "looped", *flags, "--exit-policy", "static:0", "--show-depth")
    assert first != plain and all("\x1b[32m" in text for text in first)


def test_a_chat_is_rendered_by_the_template_and_the_answer_alone_is_printed(bases, tmp_path, capsys):
    base = Path(shutil.copytree(bases / "llama", tmp_path / "chat"))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}assistant:"
    (base / "chat_template.jinja").write_text(template, encoding="utf-8")
    found = run(
        capsys, base, "--chat", "--system=Be brief.", "--max-new-tokens=12", "--device=cpu", prompts=["Hi", "x"]
    )
    tokenizer, model = load_tokenizer(base), load_model(base, torch.float32)
    for message, answer in zip(("Hi", "x"), found, strict=True):
        text = f"system: Be brief.</s>user: {message}</s>assistant:"
        ids = tokenizer.encode(text, bos=False, parse_special=True)
        assert ids.count(tokenizer.eos_id) == 2
        new = continue_naively(model, ids, 12, tokenizer.eos_id)[len(ids) :]
        assert answer == tokenizer.decode(new)


def test_text_that_spells_a_special_token_becomes_it_only_where_asked(bases, capsys):
    flags = ["--max-new-tokens=1", "--device=cpu"]
    assert run(capsys, bases / "llama", *flags, prompts=["a</s>b"])[0].startswith("a</s>b")
    assert not run(capsys, bases / "llama", *flags, "--parse-special", prompts=["a</s>b"])[0].startswith("a</s>")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens: found 0; expected 1 or more"),
        (["--max-new-tokens", "600"], r"--prompt number 1: found \d+ tokens .* expected at most 513 together"),
        (["--device", "abacus"], "--device: found 'abacus'"),
        (["--prompt", "", "--bos", "no"], "--prompt number 2: found no token"),
        (["--temperature", "-1"], "--temperature: found -1.0; expected 0, or 1e-6 or more"),
        (["--top-p", "0"], "--top-p: found 0.0; expected more than 0"),
        (["--stop", ""], "--stop: found an empty text"),
        (["--exit-policy", "often"], "--exit-policy: found 'often'; expected never, verify"),
        (["--exit-policy", "static:1"], "static exit: found loop 1; expected one in"),
        (["--system", "Be brief."], "--system: expected with --chat alone"),
        (["--chat", "--bos", "yes"], "--bos: found yes with --chat; expected auto"),
        (["--chat"], "no chat template; looked for chat_template.jinja"),
    ],
)
def test_bad_input_is_one_error(flags, message, bases, capsys):
    with pytest.raises(UserError, match=message):
        run(capsys, bases / "llama", "--device=cpu", *flags, prompts=["x"])


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path, capsys):
    make_hf_model(tmp_path, "llama", num_layers=1)
    with pytest.raises(UserError, match="no tokenizer"):
        run(capsys, tmp_path)


@pytest.mark.real
def test_a_real_model_continues_and_answers_as_in_transformers(capsys):
    """Greedy and in fp32, streamed and in a batch; the answer is that of transformers' own template and end tokens."""
    base, count = real_model_directory(), 48
    flags = [f"--max-new-tokens={count}", "--device=cpu", "--dtype=float32"]
    prompts = ["The capital of France is", "def fibonacci(n):\n    ", "日本の首都は"]
    expected = texts_of_transformers(base, prompts, count)
    assert run(capsys, base, *flags, prompts=prompts) == expected
    assert run(capsys, base, *flags, prompts=prompts[2:]) == expected[2:]

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    message = "Write one short sentence about the sea, with an emoji."
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": message}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model.generate(**ids, max_new_tokens=count, do_sample=False)[0, ids["input_ids"].shape[1] :]
    answer = tokenizer.decode(out, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert run(capsys, base, *flags, "--chat", "--system=Be brief.", prompts=[message]) == [answer]
