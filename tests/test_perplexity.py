"""eval/perplexity.py and eval/bigram.py: every token counted once, exact under any batching, clear errors."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models_util import make_hf_model
from safetensors.torch import load_file, save_file
from tokenizers_util import make_bpe_tokenizer, training_texts

from eval.bigram import DISCOUNT, bigram_loss
from eval.perplexity import batches, blocks
from rrt.loaders import load_model
from rrt.shards import ShardWriter
from rrt.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def run(script, *arguments):
    command = [sys.executable, str(ROOT / "eval" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A random Llama with the tokenizer of its vocabulary."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer_dir = tmp_path_factory.mktemp("tokenizer")
    make_bpe_tokenizer(tokenizer_dir, "llama")
    vocab_size = load_tokenizer(tokenizer_dir).vocab_size
    make_hf_model(directory, "llama", num_layers=4, vocab_size=vocab_size)
    for file in load_tokenizer(tokenizer_dir).files:
        shutil.copy(file, directory)
    return directory


@pytest.fixture(scope="module")
def texts():
    return [text[:700] for text in list(training_texts())[:3]]


@pytest.fixture(scope="module")
def shard_dir(model_dir, texts, tmp_path_factory):
    directory = tmp_path_factory.mktemp("shards")
    tokenizer = load_tokenizer(model_dir)
    with ShardWriter(directory, tokenizer, shard_tokens=200) as writer:
        for split in ("train", "heldout"):
            for ids, text in zip(tokenizer.encode_documents(texts), texts, strict=True):
                writer.append(split, ids, [len(ids)], [len(text.encode())])
        writer.finish({})
    return directory


@torch.no_grad()
def slow_loss(model, stream, context, exit_loop=None, bos_id=None):
    """Mean loss of stream[1:], each token from those before it in its block, one token at a time."""
    losses = []
    for target in range(1, len(stream)):
        start = (target - 1) // context * context
        inputs = stream[None, start:target].clone()
        if bos_id is not None:
            inputs[0, 0] = bos_id
        logits = model(inputs, exit_loop=exit_loop)[0, -1]
        losses.append(F.cross_entropy(logits.double(), stream[target]))
    return torch.stack(losses).mean().item()


@pytest.mark.parametrize("pieces", [[50], [1, 7, 0, 42], [11, 11, 11, 17], [10, 40]])
def test_blocks_predict_every_token_but_the_first_once(pieces):
    stream = np.arange(50)
    parts = np.split(stream, np.cumsum(pieces)[:-1])
    cut = list(blocks(parts, context=10))
    assert [len(block) for block in cut] == [11, 11, 11, 11, 10]
    assert np.array_equal(np.concatenate([block[1:] for block in cut]), stream[1:])
    assert [tuple(batch.shape) for batch in batches(parts, 10, batch_size=3)] == [(3, 11), (1, 11), (1, 10)]


def test_perplexity_of_shards_equals_the_slow_way_under_any_batch_size(model_dir, shard_dir, texts, tmp_path):
    tokenizer = load_tokenizer(model_dir)
    stream = torch.tensor([token for ids in tokenizer.encode_documents(texts) for token in ids])
    for batch_size, bos in ((1, "auto"), (4, "auto"), (100, "yes"), (4, "no")):
        bos_id = None if bos == "no" else tokenizer.bos_id
        expected = slow_loss(load_model(model_dir), stream, context=33, bos_id=bos_id)
        out = tmp_path / f"{batch_size}.json"
        done = run("perplexity.py", "--checkpoint", model_dir, "--data", shard_dir, "--context", 33,
                   "--batch-size", batch_size, "--bos", bos, "--json", out)  # fmt: skip
        assert done.returncode == 0, done.stderr
        result = json.loads(out.read_text())
        assert result["tokens"] == len(stream) - 1 and result["bos"] == (bos != "no")
        assert result["loss"] == pytest.approx(expected, rel=1e-6)
        assert result["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
        text_bytes = sum(len(text.encode()) for text in texts)
        assert result["bits_per_byte"] == pytest.approx(expected * (len(stream) - 1) / math.log(2) / text_bytes)
    assert f"{result['perplexity']:.4f}" in done.stdout


def test_text_and_jsonl_files_give_the_loss_of_their_shards(model_dir, shard_dir, texts, tmp_path):
    lines = tmp_path / "documents.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    results = []
    for data in (shard_dir, lines):
        out = tmp_path / "out.json"
        done = run("perplexity.py", "--checkpoint", model_dir, "--data", data, "--context", 64, "--json", out)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(out.read_text()))
    for key in ("loss", "tokens", "bits_per_byte"):
        assert results[0][key] == pytest.approx(results[1][key], rel=1e-9)


def test_exit_loop_measures_a_recursive_checkpoint_after_that_loop(model_dir, shard_dir, texts, tmp_path):
    converted = tmp_path / "recursive"
    command = [sys.executable, "-m", "rrt.convert", "--base", model_dir, "--out", converted, "--num-loops", "2"]
    subprocess.run([*map(str, command), "--init", "average", "--lora-rank", "2"], check=True, capture_output=True)
    stream = torch.tensor([t for ids in load_tokenizer(model_dir).encode_documents(texts) for t in ids])[:60]
    shards = tmp_path / "short"
    shards.mkdir()
    with ShardWriter(shards, load_tokenizer(model_dir)) as writer:
        writer.append("heldout", stream, [len(stream)], [100])
        writer.finish({})
    losses = []
    for exit_loop in (0, 1):
        out = tmp_path / "out.json"
        flags = ("--checkpoint", converted, "--data", shards, "--exit-loop", exit_loop, "--json", out)
        assert run("perplexity.py", *flags).returncode == 0
        losses.append(json.loads(out.read_text())["loss"])
        expected = slow_loss(load_model(converted), stream, 256, exit_loop, load_tokenizer(converted).bos_id)
        assert losses[-1] == pytest.approx(expected, rel=1e-6)
    assert abs(losses[0] - losses[1]) > 1e-3


def test_bad_input_ends_with_one_line_and_no_result(model_dir, shard_dir, tmp_path):
    other = tmp_path / "other"
    make_bpe_tokenizer(tmp_path / "tok", "gpt_neox")
    shutil.copytree(model_dir, other)
    for file in load_tokenizer(tmp_path / "tok").files:
        shutil.copy(file, other)
    (tmp_path / "empty.txt").write_text("")
    broken = tmp_path / "broken"
    shutil.copytree(model_dir, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    cases = [
        ((model_dir, shard_dir, "--exit-loop", 1), "--exit-loop: found 1"),
        ((model_dir, shard_dir, "--context", 100000), "--context: found 100000"),
        ((model_dir, shard_dir, "--batch-size", 0), "--batch-size: found 0"),
        ((model_dir, shard_dir, "--max-tokens", 0), "--max-tokens: found 0"),
        ((model_dir, shard_dir, "--device", "abacus"), "--device: found 'abacus'"),
        ((model_dir, shard_dir, "--split", "dev"), "no split 'dev'"),
        ((broken, shard_dir), "expected a finite number"),
        ((other, shard_dir), "made with the tokenizer"),
        ((model_dir, tmp_path / "empty.txt"), "empty.txt"),
        ((tmp_path / "nowhere", shard_dir), "no such directory"),
    ]
    for (checkpoint, data, *flags), message in cases:
        out = tmp_path / "out.json"
        done = run("perplexity.py", "--checkpoint", checkpoint, "--data", data, "--json", out, *flags)
        assert done.returncode == 2, (message, done.stderr)
        assert done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
        assert not out.exists()


def test_bigram_probabilities_sum_to_one_and_follow_the_formula():
    train = np.array([0, 1, 0, 1, 0, 2, 3, 3, 1, 0])
    vocab_size = 5
    for first in range(vocab_size):
        losses = [bigram_loss(train, np.array([first, second]), vocab_size) for second in range(vocab_size)]
        assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1.0)
    # Token 0 was followed 3 times: by 1, 1, 2. Token 1 occurs 3 times among 10 tokens, plus one of 5 for smoothing.
    expected = (2 - DISCOUNT) / 3 + DISCOUNT * 2 / 3 * (3 + 1) / (10 + 5)
    assert bigram_loss(train, np.array([0, 1]), vocab_size) == pytest.approx(-math.log(expected))
