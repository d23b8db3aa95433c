"""eval/perplexity.py and eval/bigram.py: every token counted once, exact under any batching, clear errors."""

import contextlib
import io
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from eval import perplexity
from eval.bigram import DISCOUNT, bigram_loss
from eval.stream import Document, batches, document_windows, make_batch, packed_windows, score_exits
from rrt.checkpoint.source import load_model
from rrt.data.shards import ShardWriter
from rrt.data.tokenizer import load_tokenizer
from rrt.errors import UserError
from rrt.folding.conversion import convert
from rrt.model.config import LoraRanks, RecursiveConfig
from tests.util.models import make_hf_model
from tests.util.processes import run_on_two
from tests.util.tokenizers import make_bpe_tokenizer, training_texts

ROOT = Path(__file__).resolve().parents[2]


def run(script, *arguments):
    command = [sys.executable, str(ROOT / "eval" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def measure(checkpoint, data, *flags):
    """The result of eval/perplexity.py in this process, and what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        out = measured_by(checkpoint, data, *flags)
    return out, printed.getvalue()


def measured_by(checkpoint, data, *flags):
    out = Path(checkpoint) / "result.json"
    out.unlink(missing_ok=True)
    before = sys.argv
    sys.argv = ["perplexity.py", *map(str, ("--checkpoint", checkpoint, "--data", data, "--json", out, *flags))]
    try:
        perplexity.main()
    finally:
        sys.argv = before
    return json.loads(out.read_text())


def stream_of(model_dir, texts):
    return torch.tensor([token for ids in load_tokenizer(model_dir).encode_documents(texts) for token in ids])


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A random Llama with the tokenizer of its vocabulary."""
    directory = tmp_path_factory.mktemp("model")
    tokenizer_dir = tmp_path_factory.mktemp("tokenizer")
    make_bpe_tokenizer(tokenizer_dir, "llama")
    vocab_size = load_tokenizer(tokenizer_dir).vocab_size
    make_hf_model(directory, "llama", num_layers=4, vocab_size=vocab_size)
    load_tokenizer(tokenizer_dir).save(directory)
    return directory


@pytest.fixture(scope="module")
def texts():
    return [text[:150] for text in list(training_texts())[:3]]


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


@pytest.fixture(scope="module")
def recursive_dir(model_dir, tmp_path_factory):
    """The model folded into two loops, with a LoRA."""
    converted = tmp_path_factory.mktemp("recursive") / "model"
    convert(model_dir, converted, RecursiveConfig(num_loops=2, init="average", lora_rank=LoraRanks.uniform(2)))
    return converted


def documents_of(lengths):
    tokens = np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1])
    return [Document(piece, 0, group) for group, piece in enumerate(tokens)]


@pytest.mark.parametrize("lengths", [[50], [1, 7, 3, 39], [11, 11, 11, 17], [10, 40]])
def test_packed_windows_predict_every_token_but_the_first_once_in_its_documents_group(lengths):
    cut = list(packed_windows(documents_of(lengths), context=10))
    assert [block.shape[1] for block in cut] == [11, 11, 11, 11, 10]
    expected = np.stack((np.arange(50), np.repeat(np.arange(len(lengths)), lengths)))
    assert np.array_equal(np.concatenate([block[:, 1:] for block in cut], axis=1), expected[:, 1:])


@pytest.mark.parametrize("bos_id", [None, 99])
def test_document_windows_never_cross_a_document(bos_id):
    cut = list(document_windows(documents_of([1, 25, 11, 2]), context=10, bos_id=bos_id))
    extra = int(bos_id is not None)
    groups = [set(block[1].tolist()) for block in cut]
    assert all(len(group) == 1 for group in groups)
    for group, length in enumerate([1, 25, 11, 2]):
        own = [block for block, found in zip(cut, groups, strict=True) if found == {group}]
        assert sum(block.shape[1] - 1 for block in own) == length - 1 + extra
        if own and bos_id is not None:
            assert own[0][0, 0] == bos_id


def test_batches_hold_every_block_once_and_few_of_their_positions_are_padding():
    lengths = [2, 9, 4, 4, 11, 3, 8, 2, 2, 5]
    cut = [block for document in documents_of(lengths) for block in packed_windows([document], 10)]
    dealt = list(batches(cut, context=10, batch_size=2))
    assert sorted(int(block[0, 0]) for group in dealt for block in group) == [int(block[0, 0]) for block in cut]
    for group in dealt:
        batch = make_batch(group, bos_id=None)
        assert batch.inputs.numel() <= 20 and batch.num_targets == sum(block.shape[1] - 1 for block in group)


@pytest.mark.parametrize("mode", ["packed", "document"])
def test_loss_equals_the_slow_way_under_any_batch_size_to_nine_digits_in_fp64(model_dir, shard_dir, texts, mode):
    tokenizer = load_tokenizer(model_dir)
    model = load_model(model_dir, torch.float64)
    documents = [torch.tensor(ids) for ids in tokenizer.encode_documents(texts)]
    parts = [torch.cat(documents)] if mode == "packed" else documents
    count = sum(len(part) - 1 for part in parts)
    text_bytes = sum(len(text.encode()) for text in texts)
    means = {}
    for bos, bos_id in (("yes", tokenizer.bos_id), ("no", None)):
        means[bos] = sum(slow_loss(model, part, 33, bos_id=bos_id) * (len(part) - 1) for part in parts) / count
    for batch_size, bos in ((1, "auto"), (4, "no"), (100, "yes")):
        expected = means["no" if bos == "no" else "yes"]
        flags = ("--context", 33, "--batch-size", batch_size, "--bos", bos, "--mode", mode)
        result, printed = measure(model_dir, shard_dir, *flags, "--dtype", "float64")
        assert (result["tokens"], result["bos"], result["complete"]) == (count, bos != "no", True)
        assert result["loss"] == pytest.approx(expected, rel=1e-9)
        assert result["perplexity"] == pytest.approx(math.exp(expected), rel=1e-9)
        assert result["bits_per_byte"] == pytest.approx(expected * count / math.log(2) / text_bytes, rel=1e-9)
        assert f"{result['perplexity']:.4f}" in printed
    assert measure(model_dir, shard_dir, *flags)[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_files_of_every_kind_give_the_loss_of_their_shards(model_dir, shard_dir, texts, tmp_path):
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "id": [1, 2, 3]}), tmp_path / "documents.parquet")
    expected, _ = measure(model_dir, shard_dir, "--context", 64)
    for name in ("documents.jsonl", "documents.parquet"):
        result, _ = measure(model_dir, tmp_path / name, "--context", 64)
        for key in ("loss", "tokens", "bits_per_byte"):
            assert result[key] == pytest.approx(expected[key], rel=1e-9)
        assert result["groups"] == {}


@pytest.mark.parametrize("mode", ["packed", "document"])
def test_slimpajamas_subsets_have_figures_of_their_own_that_add_up(model_dir, texts, tmp_path, mode):
    names = ["RedPajamaC4", "RedPajamaBook", "RedPajamaC4"]
    data = tmp_path / "test.jsonl"
    records = [{"text": text, "meta": {"redpajama_set_name": name}} for text, name in zip(texts, names, strict=True)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    result, printed = measure(model_dir, data, "--context", 33, "--mode", mode)
    assert set(result["groups"]) == set(names) and "RedPajamaBook" in printed
    assert sum(group["tokens"] for group in result["groups"].values()) == result["tokens"]
    total = sum(group["tokens"] * group["exits"][0]["loss"] for group in result["groups"].values())
    assert total / result["tokens"] == pytest.approx(result["loss"], rel=1e-12)
    if mode == "document":  # a subset's figures are those of its documents alone
        data.write_text(json.dumps(records[1]) + "\n")
        alone, _ = measure(model_dir, data, "--context", 33, "--mode", mode)
        assert alone["exits"][0] == pytest.approx(result["groups"]["RedPajamaBook"]["exits"][0], rel=1e-6)


def test_every_exit_is_measured_in_one_pass_and_alone(recursive_dir, shard_dir, texts):
    bos_id = load_tokenizer(recursive_dir).bos_id
    result, _ = measure(recursive_dir, shard_dir, "--context", 100, "--dtype", "float64")
    model = load_model(recursive_dir, torch.float64)
    losses = [slow_loss(model, stream_of(recursive_dir, texts), 100, loop, bos_id) for loop in (0, 1)]
    assert [row["loss"] for row in result["exits"]] == pytest.approx(losses, rel=1e-9)
    assert result["loss"] == result["exits"][1]["loss"] and abs(losses[0] - losses[1]) > 1e-3
    first, _ = measure(recursive_dir, shard_dir, "--context", 100, "--dtype", "float64", "--exit-loop", 0)
    assert [row["loop"] for row in first["exits"]] == [0] and first["loss"] == pytest.approx(losses[0], rel=1e-12)


def test_a_model_without_exits_is_measured_at_its_end(model_dir, shard_dir, tmp_path):
    convert(model_dir, tmp_path / "sequence", RecursiveConfig(num_loops=2, sharing="sequence"))
    result, _ = measure(tmp_path / "sequence", shard_dir, "--context", 100)
    assert [row["loop"] for row in result["exits"]] == [1]
    with pytest.raises(UserError, match=r"--exit-loop: found 0; .*sequence was made with sharing 'sequence'"):
        measure(tmp_path / "sequence", shard_dir, "--exit-loop", 0)


def test_two_processes_share_the_work_and_add_to_the_same_loss(recursive_dir, shard_dir):
    flags = ("--context", 33, "--batch-size", 1, "--dtype", "float64")
    alone, _ = measure(recursive_dir, shard_dir, *flags)
    first, second = run_on_two(process_of_two, str(recursive_dir), str(shard_dir), *flags)
    assert first["processes"] == 2 and second is None
    for key in ("loss", "tokens", "bits_per_byte"):
        assert first[key] == pytest.approx(alone[key], rel=1e-14)


def process_of_two(checkpoint, data, *flags):
    sys.argv = ["perplexity.py", *map(str, ("--checkpoint", checkpoint, "--data", data, *flags))]
    with pytest.MonkeyPatch.context() as patch:
        written = []
        patch.setattr(perplexity, "tables", lambda result: written.append(result) or [])
        perplexity.main()
    return written[0] if written else None


def broken_copy(model_dir, broken):
    """A model of finite weights whose losses are NaN."""
    shutil.copytree(model_dir, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][:] = 3e38
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    return broken


def test_two_processes_that_meet_nan_before_all_groups_were_read_say_so(model_dir, texts, tmp_path):
    data = tmp_path / "test.jsonl"
    records = [{"text": f"{text[:40]}", "meta": {"redpajama_set_name": f"set {i}"}} for i, text in enumerate(texts)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = ("--context", 5, "--batch-size", 1)
    for error in run_on_two(process_of_two, str(broken_copy(model_dir, tmp_path / "broken")), str(data), *flags):
        assert "expected a finite number" in str(error)


def test_logits_of_a_batch_never_exist_whole(model_dir, monkeypatch):
    model = load_model(model_dir)
    rows = []
    logits = model.logits
    monkeypatch.setattr("eval.stream._LOGITS_AT_ONCE", 7 * model.config.vocab_size)
    monkeypatch.setattr(model, "logits", lambda x, loop: rows.append(x.shape[0]) or logits(x, loop))
    batch = make_batch(list(packed_windows(documents_of([65]), 32)), None)
    losses = score_exits(model, batch, range(1), perplexity.target_losses)
    assert max(rows) == 7 and sum(rows) == 64 == losses.shape[1]
    whole = F.cross_entropy(model(batch.inputs).flatten(0, 1), batch.targets.flatten(), reduction="none")
    torch.testing.assert_close(losses[0], whole)


def test_a_damaged_record_midway_keeps_the_figures_up_to_it(model_dir, texts, tmp_path):
    data = tmp_path / "damaged.jsonl"
    lines = [json.dumps({"text": text}) for text in texts * 30]
    data.write_text("\n".join([*lines, "{", *lines]))
    with pytest.raises(UserError, match=r"damaged\.jsonl:91: not valid JSON"):
        measure(model_dir, data, "--context", 33)
    result = json.loads((model_dir / "result.json").read_text())
    assert not result["complete"] and result["bits_per_byte"] is None
    assert 0 < result["tokens"] < len(stream_of(model_dir, texts)) * 30


def test_records_without_text_are_counted_and_the_table_names_the_bos_of_windows(model_dir, texts, tmp_path, capsys):
    data = tmp_path / "gaps.jsonl"
    records = [{"text": text} for text in (None, *texts, "", None)]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    result, table = measure(model_dir, data, "--context", 33)
    assert result["records_without_text"] == 3 and result["tokens"] == len(stream_of(model_dir, texts)) - 1
    assert f"notice: {data}: skipped 3 records without text\n" in capsys.readouterr().err
    assert result["bos"] and "context 33, BOS before every window" in table
    result, table = measure(model_dir, data, "--context", 33, "--bos", "no")
    assert not result["bos"] and "no BOS before windows" in table


def test_bad_input_ends_with_one_line_and_no_result(model_dir, shard_dir, tmp_path):
    other = tmp_path / "other"
    make_bpe_tokenizer(tmp_path / "tok", "gpt_neox")
    shutil.copytree(model_dir, other)
    load_tokenizer(tmp_path / "tok").save(other)
    (tmp_path / "empty.txt").write_text("")
    broken = broken_copy(model_dir, tmp_path / "broken")
    cases = [
        ((model_dir, shard_dir, "--exit-loop", 1), "--exit-loop: found 1"),
        ((model_dir, shard_dir, "--context", 100000), "--context: found 100000"),
        ((model_dir, shard_dir, "--batch-size", 0), "--batch-size: found 0"),
        ((model_dir, shard_dir, "--max-tokens", 0), "--max-tokens: found 0"),
        ((model_dir, shard_dir, "--device", "abacus"), "--device: found 'abacus'"),
        ((model_dir, shard_dir, "--split", "dev"), "no split 'dev'"),
        ((model_dir, shard_dir, "--group-field", "meta.set"), "--group-field: found 'meta.set' with token shards"),
        ((broken, shard_dir), "expected a finite number"),
        ((other, shard_dir), "made with the tokenizer"),
        ((model_dir, tmp_path / "empty.txt"), "empty.txt"),
        ((tmp_path / "nowhere", shard_dir), "no such directory"),
    ]
    for (checkpoint, data, *flags), message in cases:
        out = tmp_path / "out.json"
        with pytest.raises(UserError) as error:
            measure(checkpoint, data, *flags, "--json", out)
        assert "\n" not in str(error.value) and message in str(error.value)
        assert not out.exists()


def test_the_command_ends_bad_input_with_one_line(model_dir, shard_dir):
    done = run("perplexity.py", "--checkpoint", model_dir, "--data", shard_dir, "--exit-loop", 7)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: --exit-loop: found 7")


def test_bigram_probabilities_sum_to_one_and_follow_the_formula():
    train = np.array([0, 1, 0, 1, 0, 2, 3, 3, 1, 0])
    vocab_size = 5
    for first in range(vocab_size):
        losses = [bigram_loss(train, np.array([first, second]), vocab_size) for second in range(vocab_size)]
        assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1.0)
    # Token 0 was followed 3 times: by 1, 1, 2. Token 1 occurs 3 times among 10 tokens, plus one of 5 for smoothing.
    expected = (2 - DISCOUNT) / 3 + DISCOUNT * 2 / 3 * (3 + 1) / (10 + 5)
    assert bigram_loss(train, np.array([0, 1]), vocab_size) == pytest.approx(-math.log(expected))
