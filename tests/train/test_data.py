"""Training windows over real shard files of known tokens."""

import dataclasses
import json
import os
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rrt.data.shards import Shard, ShardWriter, TokenShards
from rrt.data.tokenizer import load_tokenizer
from rrt.errors import UserError
from tests.util.tokenizers import make_bpe_tokenizer
from train.data import Mixture, Windows, open_data
from train.recipe import DataConfig


def make_shards(*lengths: int) -> TokenShards:
    """Shards whose tokens are all different: 1000 * shard + position."""
    shards = [
        Shard(Path(f"{number}.bin"), np.arange(length, dtype=np.uint32) + 1000 * number, np.zeros(1, np.uint64), 0)
        for number, length in enumerate(lengths)
    ]
    return TokenShards(Path("data"), "train", shards, 10_000, None, 0, "")


def samples_of(*lengths: int, seq_len: int, seed: int = 0) -> Mixture:
    """The samples of one corpus."""
    return Mixture([Windows(make_shards(*lengths), seq_len, seed)])


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    seq_len=st.integers(1, 20),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 3),
)
def test_in_every_epoch_each_token_of_a_full_window_but_the_first_is_a_target_once(
    lengths: list[int], seq_len: int, seed: int, epoch: int
) -> None:
    expected = [
        1000 * number + position
        for number, length in enumerate(lengths)
        for position in range(1, (length - 1) // seq_len * seq_len + 1)
    ]
    if not expected:
        with pytest.raises(UserError, match=f"expected at least data.seq_len \\+ 1 = {seq_len + 1} in one of them"):
            Windows(make_shards(*lengths), seq_len, seed)
        return
    windows = Windows(make_shards(*lengths), seq_len, seed)
    inputs, targets = Mixture([windows]).batch(epoch * len(windows), len(windows))
    assert inputs.shape == targets.shape == (len(windows), seq_len)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)
    assert Counter(targets.flatten().tolist()) == Counter(expected)


def test_a_window_that_just_fits_is_used() -> None:
    assert len(Windows(make_shards(9), 8, 0)) == 1
    assert len(Windows(make_shards(8, 9, 17), 8, 0)) == 3
    with pytest.raises(UserError, match="data: split 'train' has 8 tokens in 1 shard"):
        Windows(make_shards(8), 8, 0)


def test_windows_begin_with_bos_where_documents_do() -> None:
    shards = dataclasses.replace(make_shards(41), bos_id=7)
    inputs, targets = Mixture([Windows(shards, 4, 0)]).batch(0, 10)
    assert inputs[:, 0].tolist() == [7] * 10
    assert torch.equal(targets[:, 1:], inputs[:, 1:] + 1) and sorted(targets.flatten().tolist()) == list(range(1, 41))


def test_epochs_are_shuffled_anew() -> None:
    samples = samples_of(401, seq_len=4)
    epochs = [samples.batch(epoch * 100, 100)[0][:, 0].tolist() for epoch in range(3)]
    assert len({tuple(order) for order in epochs}) == 3
    assert all(order != sorted(order) for order in epochs)


def test_the_order_depends_on_the_seed() -> None:
    first, again, other = (samples_of(401, seq_len=4, seed=seed).batch(0, 100)[0] for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_sample_depends_on_its_place_alone() -> None:
    whole = samples_of(101, 55, seq_len=4, seed=3).batch(0, 120)[0]
    samples = samples_of(101, 55, seq_len=4, seed=3)
    for start in (96, 3, 40, 0):  # in any order, within and across epochs
        assert torch.equal(samples.batch(start, 7)[0], whole[start : start + 7])


def test_the_place_of_a_sample_is_where_its_tokens_lie() -> None:
    samples = samples_of(35, 3, 52, seq_len=8, seed=1)
    for sample in range(20):
        path, _, start, _, count = samples.place(sample).split()
        inputs, _ = samples.batch(sample, 1)
        expected = 1000 * int(path.removesuffix(".bin")) + int(start)
        assert (int(inputs[0, 0]), inputs.shape[1] + 1) == (expected, int(count))


WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=5)


def corpora_of(*windows: int) -> list[Windows]:
    """Corpora of so many windows of 4 tokens; every token of corpus c is at least 100_000 * c."""
    corpora = []
    for number, count in enumerate(windows):
        tokens = np.arange(4 * count + 1, dtype=np.uint32) + 100_000 * number
        shards = dataclasses.replace(make_shards(), shards=[Shard(Path("0.bin"), tokens, np.zeros(1, np.uint64), 0)])
        corpora.append(Windows(shards, 4, 0, number))
    return corpora


@settings(max_examples=60)
@given(weights=WEIGHTS, first=st.integers(0, 10**10))
def test_every_stretch_of_a_mixture_has_the_shares_that_the_weights_ask_for(weights: list[float], first: int) -> None:
    mixture = Mixture(corpora_of(*range(3, 3 + len(weights))), weights)
    turns = [mixture._turn(sample) for sample in range(first, first + 200)]
    for corpus, share in enumerate(mixture.shares):
        positions = [position for found, position in turns if found == corpus]
        assert abs(len(positions) - 200 * share) <= 2 * len(weights)
        # One after the other, from where the samples before have brought the corpus.
        assert positions == list(range(positions[0], positions[0] + len(positions))) if positions else True
        assert not positions or abs(positions[0] - first * share) <= len(weights)


def test_each_corpus_of_a_mixture_has_its_own_epochs() -> None:
    mixture = Mixture(corpora_of(5, 20), [1, 1])
    inputs = mixture.batch(0, 40)[0][:, 0].tolist()
    small, large = ([first for first in inputs if first // 100_000 == corpus] for corpus in (0, 1))
    assert Counter(small) == Counter(dict.fromkeys(range(0, 20, 4), 4))
    assert Counter(large) == Counter(dict.fromkeys(range(100_000, 100_080, 4), 1))
    assert {tuple(small[5 * epoch : 5 * epoch + 5]) for epoch in range(4)} != {tuple(small[:5])}


def test_without_weights_all_corpora_end_their_epochs_together() -> None:
    mixture = Mixture(corpora_of(5, 20, 7))
    assert len(set(mixture.batch(0, 32)[0][:, 0].tolist())) == 32


def test_a_sample_of_a_mixture_depends_on_its_number_alone() -> None:
    weights = [0.3, 0.5, 0.2]
    whole = Mixture(corpora_of(5, 20, 7), weights).batch(0, 60)[0]
    later = Mixture(corpora_of(5, 20, 7), weights)
    for start in (50, 3, 27):
        assert torch.equal(later.batch(start, 7)[0], whole[start : start + 7])
    skipped = Mixture(corpora_of(5, 20, 7), weights, skip=11)
    assert torch.equal(skipped.batch(2, 5)[0], whole[13:18])
    assert skipped.place(2) == later.place(13)


def test_a_corpus_of_sixty_billion_tokens_takes_no_memory(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_bpe_tokenizer(tmp_path / "tokenizer"))
    (tmp_path / "data").mkdir()
    with ShardWriter(tmp_path / "data", tokenizer) as writer:
        writer.append("train", [1], [1], [1])
        writer.finish({})
    tokens = 60_000_000_000
    os.truncate(tmp_path / "data" / "train-00000.bin", 2 * tokens)  # a sparse file
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    meta["splits"]["train"][0]["tokens"] = tokens
    (tmp_path / "data" / "meta.json").write_text(json.dumps(meta))
    tracemalloc.start()
    samples = open_data(DataConfig(str(tmp_path / "data")), tokenizer, seed=0)
    for first in (0, 10**6, 10**9):
        assert not samples.batch(first, 4)[1].any()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(samples.corpora[0]) == 29_296_874 and peak < 2**20


def test_every_corpus_must_be_of_the_models_tokenizer(tmp_path: Path) -> None:
    directories = [make_bpe_tokenizer(tmp_path / str(size), vocab_size=size) for size in (300, 310)]
    for directory in directories:
        with ShardWriter(directory, load_tokenizer(directory)) as writer:
            writer.append("train", [1] * 40, [40], [40])
            writer.finish({})
    config = DataConfig((str(directories[0]), str(directories[1])), seq_len=4)
    with pytest.raises(UserError, match=f"^{directories[1]}/meta.json: made with the tokenizer of sha256"):
        open_data(config, load_tokenizer(directories[0]), seed=0)
    twice = dataclasses.replace(config, path=(config.paths[0],) * 2, weights=(1, 3), offset=9)
    mixed = open_data(twice, load_tokenizer(directories[0]), seed=0)
    assert mixed.skip == 3  # whole samples, none of them seen before
    assert "25.0% of the samples, 1.11 epochs" in mixed.describe(40)
