"""The command `python -m rrt.generate` against transformers' own generation."""

import pytest
import torch
import transformers

from rrt import generate
from rrt.checkpoint.source import load_model
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
    assert len(found) == len(PROMPTS)
    assert load_model(tmp_path / "prefix").recursion.prefix_length == 21


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens: found 0; expected 1 or more"),
        (["--max-new-tokens", "600"], r"prompts\[0\]: .* need \d+ positions; expected at most max_positions = 512"),
        (["--device", "abacus"], "--device: found 'abacus'"),
        (["--prompt", "", "--bos", "no"], r"prompts\[1\]: found no token"),
    ],
)
def test_bad_input_is_one_error(flags, message, bases, capsys):
    with pytest.raises(UserError, match=message):
        run(capsys, bases / "llama", "--device=cpu", *flags, prompts=["x"])


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path, capsys):
    make_hf_model(tmp_path, "llama", num_layers=1)
    with pytest.raises(UserError, match="no tokenizer"):
        run(capsys, tmp_path)
