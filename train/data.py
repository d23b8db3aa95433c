"""Training windows out of token shards, in an order that depends on the seed alone."""

import numpy as np
import torch
from torch import Tensor

from rrt.errors import UserError
from rrt.shards import Shard, TokenShards


class Windows:
    """Windows of `seq_len + 1` tokens (inputs and their next tokens), shuffled anew every epoch.

    Windows of one shard overlap by one token, so that in an epoch each token but the first is a target once;
    what is left at a shard's end and fills no window is not used. The k-th sample of a run is a function of
    (seed, k): resuming needs only a count, and the order is the same for any number of processes.

    Raises:
        UserError: the shards hold no full window.
    """

    def __init__(self, shards: TokenShards, seq_len: int, seed: int) -> None:
        self.shards = shards
        self.seq_len = seq_len
        self.seed = seed
        counts = [max(0, (len(shard.tokens) - 1) // seq_len) for shard in shards.shards]
        self._first_window = np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))
        if not len(self):
            raise UserError(
                f"{shards.directory}: split '{shards.split}' has {shards.num_tokens} tokens in "
                f"{len(shards.shards)} shard(s); expected at least data.seq_len + 1 = {seq_len + 1} in one of them"
            )
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        """Windows in one epoch."""
        return int(self._first_window[-1])

    def window(self, index: int) -> np.ndarray:
        """Tokens [seq_len + 1] of one window, in the shards' own order."""
        shard, start = self._locate(index)
        return shard.tokens[start : start + self.seq_len + 1]

    def sample(self, position: int) -> np.ndarray:
        """Tokens [seq_len + 1] of the `position`-th sample of the run."""
        return self.window(self._index(position))

    def place(self, position: int) -> str:
        """Where the `position`-th sample of the run lies, as arguments of ``python -m rrt.shards``."""
        shard, start = self._locate(self._index(position))
        return f"{shard.path} --start {start} --count {self.seq_len + 1}"

    def _index(self, position: int) -> int:
        epoch, place = divmod(position, len(self))
        if epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, epoch)).permutation(len(self))
            self._epoch = epoch
        return int(self._order[place])

    def _locate(self, index: int) -> tuple[Shard, int]:
        """A window's shard and first token in it."""
        shard = int(np.searchsorted(self._first_window, index, side="right")) - 1
        return self.shards.shards[shard], int(index - self._first_window[shard]) * self.seq_len

    def batch(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Samples `first` to `first + count` as (inputs, targets), each [count, seq_len] int64.

        Where documents begin with BOS so does every window, in place of its first input token.
        """
        rows = np.stack([self.sample(position) for position in range(first, first + count)]).astype(np.int64)
        tokens = torch.from_numpy(rows)
        inputs, targets = tokens[:, :-1].clone(), tokens[:, 1:]
        if self.shards.bos_id is not None:
            # Models pretrained with BOS put much of their attention there: a window always begins with it.
            inputs[:, 0] = self.shards.bos_id
        return inputs, targets
