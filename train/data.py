"""Training windows from token shards: the k-th sample of a run is a function of the seed and k.

So resuming needs only a count, and the order is the same for any number of processes, each of which reads its own
samples from memory-mapped files. Nothing grows with the corpus: the shuffle is computed, not stored.

Documents follow each other as `Tokenizer.encode_documents` made them: with BOS in front where the family has it (Gemma,
Llama), with EOS at the end in all. Windows are cut across documents without a mask in between; from EOS and BOS a model
learns that another text begins. Where documents begin with BOS, so does every window.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rrt.common.cli import human_count
from rrt.data.shards import Shard, TokenShards, open_shards
from rrt.data.tokenizer import Tokenizer
from rrt.errors import UserError
from train.permutation import Permutation
from train.recipe import DataConfig


class Windows:
    """Windows of `seq_len + 1` tokens (inputs and their next tokens) of one corpus, shuffled anew every epoch.

    Windows of one shard overlap by one token, so that in an epoch each token but the first is a target once. The rest
    at a shard's end that fills no window is not used.

    Args:
        key: numbers that decide the order, together with the epoch.

    Raises:
        UserError: the shards hold no full window.
    """

    def __init__(self, shards: TokenShards, seq_len: int, *key: int) -> None:
        self.shards = shards
        self.seq_len = seq_len
        self._key = key
        counts = [max(0, (len(shard.tokens) - 1) // seq_len) for shard in shards.shards]
        self._first_window = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
        if not len(self):
            raise UserError(
                f"{shards.directory}: split '{shards.split}' has {shards.num_tokens} tokens in "
                f"{len(shards.shards)} shard(s); expected at least data.seq_len + 1 = {seq_len + 1} in one of them"
            )
        self._epoch = -1

    def __len__(self) -> int:
        """Return the number of windows in one epoch."""
        return int(self._first_window[-1])

    def locate(self, position: int) -> tuple[Shard, int]:
        """Find the corpus's `position`-th sample: its shard, and the index there of its first token."""
        epoch, rank = divmod(position, len(self))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, Permutation(len(self), *self._key, epoch)
        index = self._order[rank]
        shard = int(np.searchsorted(self._first_window, index, side="right")) - 1
        return self.shards.shards[shard], int(index - self._first_window[shard]) * self.seq_len


class Mixture:
    """Samples of several corpora of one tokenizer, in fixed shares; each corpus has epochs of its own.

    The corpora take turns as evenly as their shares allow: among the first n samples the count of each is its share
    of n to within the number of corpora.

    Args:
        weights: proportions of the corpora; None for those of their windows.
        skip: samples to leave out at the beginning of the order.
    """

    def __init__(self, corpora: Sequence[Windows], weights: Sequence[float] | None = None, skip: int = 0) -> None:
        self.corpora, self.skip = corpora, skip
        # Exact numbers: the counts must not depend on how far the run has come.
        exact = [Fraction(str(weight)) for weight in weights or map(len, corpora)]
        self.shares = [weight / sum(exact) for weight in exact]
        # The share of each corpus among itself and those after it.
        self._turns = [weight / sum(exact[index:]) for index, weight in enumerate(exact)]

    def place(self, sample: int) -> str:
        """Say where the run's `sample`-th sample lies, as arguments of ``python -m rrt.shards``."""
        shard, start, count = self._locate(sample)
        return f"{shard.path} --start {start} --count {count}"

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Read samples `first` to `first + count` as (inputs, targets), each [count, seq_len] int64.

        Where documents begin with BOS so does every window, in place of its first input token.
        """
        rows = []
        for sample in range(first, first + count):
            shard, start, length = self._locate(sample)
            rows.append(shard.tokens[start : start + length].astype(np.int64))
        tokens = torch.from_numpy(np.stack(rows))
        inputs, targets = tokens[:, :-1].clone(), tokens[:, 1:]
        bos_id = self.corpora[0].shards.bos_id
        if bos_id is not None:
            # Models pretrained with BOS put much of their attention there.
            inputs[:, 0] = bos_id
        return inputs, targets

    def describe(self, samples: int) -> str:
        """Describe each corpus in a line: its size, its share, and its epochs in a run of so many samples."""
        lines = []
        for corpus, share in zip(self.corpora, self.shares, strict=True):
            shards = corpus.shards
            mixed = f"{float(share):.1%} of the samples, " if len(self.corpora) > 1 else ""
            lines.append(
                f"data: {shards.directory} [{shards.split}], {human_count(shards.num_tokens)} tokens, "
                f"{mixed}{float(samples * share / len(corpus)):.2f} epochs\n"
            )
        if self.skip:
            lines.append(f"data: the first {human_count(self.skip * self.corpora[0].seq_len)} tokens are skipped\n")
        return "".join(lines)

    def _locate(self, sample: int) -> tuple[Shard, int, int]:
        """Find a sample: its shard, the index there of its first token, and its number of tokens, `seq_len + 1`."""
        corpus, position = self._turn(sample + self.skip)
        return *self.corpora[corpus].locate(position), self.corpora[corpus].seq_len + 1

    def _turn(self, rest: int) -> tuple[int, int]:
        """Return the index of the corpus that sample `rest` is of, and how many earlier samples are of that corpus."""
        for corpus, turn in enumerate(self._turns[:-1]):
            before = rest * turn.numerator // turn.denominator
            if (rest + 1) * turn.numerator // turn.denominator > before:
                return corpus, before
            rest -= before  # its number among the samples of the corpora after this one
        return len(self.corpora) - 1, rest


def open_data(config: DataConfig, tokenizer: Tokenizer, seed: int) -> Mixture:
    """Open the data that a recipe names.

    Raises:
        UserError: shards that are missing, damaged, too small, or made with another tokenizer.
    """
    corpora = []
    for index, path in enumerate(config.paths):
        shards = open_shards(Path(path), config.split)
        shards.check_tokenizer(tokenizer)
        corpora.append(Windows(shards, config.seq_len, seed, index))
    return Mixture(corpora, config.weights, math.ceil(config.offset / config.seq_len))
