"""Training windows over real shard files of known tokens."""

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rrt.errors import UserError
from rrt.shards import Shard, TokenShards
from train.data import Windows


def make_shards(*lengths: int) -> TokenShards:
    """Shards whose tokens are all different: 1000 * shard + position."""
    shards = [
        Shard(Path(f"{number}.bin"), np.arange(length, dtype=np.uint32) + 1000 * number, np.zeros(1, np.uint64), 0)
        for number, length in enumerate(lengths)
    ]
    return TokenShards(Path("data"), "train", shards, 10_000, None, 0, "")


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
    inputs, targets = windows.batch(epoch * len(windows), len(windows))
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
    inputs, targets = Windows(shards, 4, 0).batch(0, 10)
    assert inputs[:, 0].tolist() == [7] * 10
    assert torch.equal(targets[:, 1:], inputs[:, 1:] + 1) and sorted(targets.flatten().tolist()) == list(range(1, 41))


def test_epochs_are_shuffled_anew() -> None:
    windows = Windows(make_shards(401), 4, 0)
    epochs = [windows.batch(epoch * 100, 100)[0][:, 0].tolist() for epoch in range(3)]
    assert len({tuple(order) for order in epochs}) == 3
    assert all(order != sorted(order) for order in epochs)


def test_the_order_depends_on_the_seed() -> None:
    first, again, other = (Windows(make_shards(401), 4, seed).batch(0, 100)[0] for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_sample_depends_on_its_place_alone() -> None:
    whole = Windows(make_shards(101, 55), 4, 3).batch(0, 120)[0]
    windows = Windows(make_shards(101, 55), 4, 3)
    for start in (96, 3, 40, 0):  # in any order, within and across epochs
        assert torch.equal(windows.batch(start, 7)[0], whole[start : start + 7])


def test_the_place_of_a_sample_is_where_its_tokens_lie() -> None:
    windows = Windows(make_shards(35, 3, 52), seq_len=8, seed=1)
    for position in range(2 * len(windows)):
        path, _, start, _, count = windows.place(position).split()
        tokens = windows.sample(position)
        assert (tokens[0], len(tokens)) == (1000 * int(path.removesuffix(".bin")) + int(start), int(count))
