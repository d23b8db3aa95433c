"""Keys and values of earlier positions, for incremental decoding of one batch."""

import torch
from torch import Tensor

from rrt.config import ModelConfig
from rrt.errors import UserError


class ContiguousCache:
    """A preallocated cache: every depth (loop and shared layer) keeps keys and values of its own.

    Holds k and v [L, batch, H_kv, max_length, D_h], `2 * L * H_kv * D_h` elements per token and sequence.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        shape = (config.num_layers, batch_size, config.num_kv_heads, max_length, config.head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.max_length = max_length
        self.length = 0

    def update(self, depth: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [batch, H_kv, T, D_h] of `depth`; return views of all [batch, H_kv, length + T, D_h].

        Raises:
            UserError: the cache is full, or k is of another batch size.
        """
        end = self.length + k.shape[2]
        if end > self.max_length:
            raise UserError(f"cache: position {end} does not fit; expected at most max_length = {self.max_length}")
        if k.shape[0] != self.k.shape[1]:
            raise UserError(f"cache: found a batch of {k.shape[0]}; expected {self.k.shape[1]}")
        self.k[depth, :, :, self.length : end] = k
        self.v[depth, :, :, self.length : end] = v
        return self.k[depth, :, :, :end], self.v[depth, :, :, :end]

    def advance(self, num_tokens: int) -> None:
        self.length += num_tokens
