"""Rows of a calibration text: from shards and from text, with BOS where texts have it, and errors of one line."""

import json

import pytest
import torch

from rrt.data.corpus import SPLITS
from rrt.data.shards import ShardWriter
from rrt.data.tokenizer import load_tokenizer
from rrt.errors import UserError
from rrt.folding.calibration_text import CalibrationText, calibration_rows
from tests.util.tokenizers import make_bpe_tokenizer, make_sentencepiece_tokenizer, training_texts


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """One that begins texts with BOS, and one that does not."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {
        "gemma": load_tokenizer(make_sentencepiece_tokenizer(root / "gemma", "gemma")),
        "gpt_neox": load_tokenizer(make_bpe_tokenizer(root / "gpt_neox", "gpt_neox")),
    }


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in training_texts()))
    return path


def stream_of(tokenizer):
    return torch.tensor([token for text in training_texts() for token in tokenizer.encode_document(text)])


def rows_of(paths, num_tokens, context, tokenizer):
    return calibration_rows(CalibrationText(tuple(paths), num_tokens, context), tokenizer, longest=50)


def write_shards(directory, tokenizer, shard_tokens=10**9):
    directory.mkdir()
    with ShardWriter(directory, tokenizer, shard_tokens) as writer:
        for text in training_texts():
            tokens = tokenizer.encode_document(text)
            writer.append(SPLITS[0], tokens, [len(tokens)], [len(text.encode())])
        writer.finish({})
    return directory


def test_rows_of_text_follow_each_other_and_overlap_by_the_label_of_the_last(tokenizers, text_file):
    stream = stream_of(tokenizers["gpt_neox"])
    rows = rows_of([str(text_file)], 100, 16, tokenizers["gpt_neox"])
    assert rows.dtype == torch.int64 and rows.shape == (7, 17)
    for index, row in enumerate(rows):
        assert torch.equal(row, stream[16 * index : 16 * index + 17])


def test_rows_begin_with_bos_where_texts_do(tokenizers, text_file):
    tokenizer, stream = tokenizers["gemma"], stream_of(tokenizers["gemma"])
    rows = rows_of([str(text_file)], 64, 16, tokenizer)
    assert (rows[:, 0] == tokenizer.bos_id).all()
    assert torch.equal(rows[2, 1:], stream[33:49])


def test_rows_of_shards_are_spread_evenly_over_all_of_them(tokenizers, tmp_path):
    tokenizer = tokenizers["gpt_neox"]
    stream = stream_of(tokenizer)
    whole = rows_of([str(write_shards(tmp_path / "one", tokenizer))], 64, 16, tokenizer)
    count = (len(stream) - 1) // 16
    for index, row in enumerate(whole):
        start = index * count // 4 * 16
        assert torch.equal(row, stream[start : start + 17])
    split = rows_of([str(write_shards(tmp_path / "many", tokenizer, 500))], 64, 16, tokenizer)
    assert split.shape == whole.shape and len(torch.unique(split, dim=0)) == 4


def test_paths_share_the_tokens(tokenizers, text_file, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("x = 1\n" * 500)
    rows = rows_of([str(text_file), str(other)], 80, 16, tokenizers["gpt_neox"])
    alone = [rows_of([str(path)], n, 16, tokenizers["gpt_neox"]) for path, n in ((text_file, 48), (other, 32))]
    assert torch.equal(rows, torch.cat(alone))


def test_too_little_text_says_how_much_was_found_and_is_needed(tokenizers, text_file, tmp_path):
    found = len(stream_of(tokenizers["gpt_neox"]))
    with pytest.raises(UserError, match=rf"text.jsonl: found {found:,} tokens; expected at least 1,000,001"):
        rows_of([str(text_file)], 1_000_000, 50, tokenizers["gpt_neox"])
    shards = write_shards(tmp_path / "shards", tokenizers["gpt_neox"])
    with pytest.raises(
        UserError, match=rf"shards: found {(found - 1) // 50 * 50:,} tokens; expected at least 1,000,000"
    ):
        rows_of([str(shards)], 1_000_000, 50, tokenizers["gpt_neox"])


def test_shards_of_another_tokenizer_are_refused(tokenizers, tmp_path):
    shards = write_shards(tmp_path / "shards", tokenizers["gpt_neox"])
    with pytest.raises(UserError, match="made with the tokenizer of sha256"):
        rows_of([str(shards)], 64, 16, tokenizers["gemma"])


def test_text_needs_a_tokenizer(text_file):
    with pytest.raises(UserError, match="the model has no tokenizer; expected token shards"):
        rows_of([str(text_file)], 64, 16, None)


def test_fewer_rows_than_paths_are_refused(tokenizers, text_file):
    with pytest.raises(UserError, match="--calibration-tokens: found 16; expected at least 16 for each of 2 paths"):
        rows_of([str(text_file)] * 2, 16, 16, tokenizers["gpt_neox"])


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (dict(num_tokens=0), "--calibration-tokens: found 0; expected 1 or more"),
        (dict(context=1), "--calibration-context: found 1; expected 2 or more"),
    ],
)
def test_sizes_below_the_least_are_told_by_their_flags(chosen, message):
    with pytest.raises(UserError) as caught:
        CalibrationText(("x",), **chosen)
    assert str(caught.value) == message
