"""The command `python -m rrt.generate` against transformers' own generation."""

import dataclasses

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
    for ours, theirs in ((bases / family, bases / family), (relaxed, unrolled)):
        found = run(capsys, ours, "--max-new-tokens", "20", "--device", "cpu")
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
    monkeypatch.setattr(generate, "load_tokenizer", lambda directory: dataclasses.replace(tokenizer, eos_id=last))
    found = run(capsys, base, "--max-new-tokens", "20", "--device", "cpu", prompts=PROMPTS[:1])
    assert found == [tokenizer.decode(ids[:-1])]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens: found 0; expected 1 or more"),
        (["--max-new-tokens", "600"], r"--prompt number 1: found \d+ tokens .* expected at most 512 together"),
        (["--device", "abacus"], "--device: found 'abacus'"),
        (["--prompt", "", "--bos", "no"], "--prompt number 2: found no token"),
    ],
)
def test_bad_input_is_one_error(flags, message, bases, capsys):
    with pytest.raises(UserError, match=message):
        run(capsys, bases / "llama", "--device=cpu", *flags, prompts=["x"])


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path, capsys):
    make_hf_model(tmp_path, "llama", num_layers=1)
    with pytest.raises(UserError, match="no tokenizer"):
        run(capsys, tmp_path)
