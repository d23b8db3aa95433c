"""The linear layer of a looped block: one shared weight and a LoRA per loop (arXiv 2410.20672, section 2.3).

Dimensions: N out, K in (of this linear), B loops, R rank, M rows.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rrt import ops
from rrt.ops.precision import matmul_dtype


def merge_lora(weight: Tensor | None, lora_a: Tensor, lora_b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Add a LoRA to its weight: ``W + B A``, computed and returned in `dtype`.

    Args:
        weight: W [N, K]; None for B A alone.
        lora_a, lora_b: A [R, K] and B [N, R] of one loop.
        dtype: default that of A, but fp32 for a narrower one.

    Returns:
        [N, K]
    """
    dtype = dtype or torch.promote_types(lora_a.dtype, torch.float32)
    if weight is None:
        return lora_b.to(dtype) @ lora_a.to(dtype)
    return torch.addmm(weight.to(dtype), lora_b.to(dtype), lora_a.to(dtype))


class LoopLinear(nn.Module):
    """``y = W x + b + B_l A_l x`` for loop l. There is no alpha: the LoRA is added unscaled.

    Parameters:
        weight [N, K], or None where B A stands alone; bias [N], or [B, N] if untied, or None; lora_a [B, R, K] and
        lora_b [B, N, R], or None at rank 0. Memory is uninitialised: load a checkpoint or call
        `RecursiveTransformer.init_weights`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        num_loops: int = 1,
        rank: int = 0,
        bias: bool = False,
        untie_bias: bool = False,
        low_rank_only: bool = False,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.num_loops = num_loops
        self.rank = min(rank, in_features, out_features)
        self.merge: bool | None = False
        self.packed: list[Tensor] = []
        """Each loop's merged weight in the native kernel's layout, while `PackedLinears` are in use."""
        has_weight = not (low_rank_only and self.rank)
        self.weight = nn.Parameter(torch.empty(out_features, in_features)) if has_weight else None
        bias_shape = (num_loops, out_features) if untie_bias and num_loops > 1 else (out_features,)
        self.bias = nn.Parameter(torch.empty(bias_shape)) if bias else None
        self.lora_a = nn.Parameter(torch.empty(num_loops, self.rank, in_features)) if self.rank else None
        self.lora_b = nn.Parameter(torch.empty(num_loops, out_features, self.rank)) if self.rank else None

    def loop_bias(self, loop: int) -> Tensor | None:
        """Return the bias [N] that `loop` uses, or None."""
        return self.bias if self.bias is None or self.bias.dim() == 1 else self.bias[loop]

    def merged_weight(self, loop: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return ``W + B_l A_l`` [N, K] of a loop l, computed in `dtype`, or the parameters' own."""
        if self.lora_a is None or self.lora_b is None:
            assert self.weight is not None
            return self.weight.to(dtype or self.weight.dtype)
        return merge_lora(self.weight, self.lora_a[loop], self.lora_b[loop], dtype or self.lora_a.dtype)

    def should_merge(self, rows: int) -> bool:
        """Decide whether `rows` rows are computed merged: as `merge` says or, if None, where that takes fewer FLOPs.

        Forward and backward take 6 R M (K + N) FLOPs plain; merged 6 R K N, or 8 R K N where checkpointing computes
        the merged weight again: fewer from M = 4 K N / (3 (K + N)), 1365 rows for 2048 x 2048. Never without a weight:
        B A apart take fewer at any rank that saves parameters.
        """
        if self.weight is None:
            return False
        if self.merge is not None:
            return self.merge
        return 3 * rows * (self.in_features + self.out_features) >= 4 * self.in_features * self.out_features

    def forward(self, x: Tensor, loop: int | Tensor) -> Tensor:
        """Apply the linear at `loop`.

        Args:
            x: [..., K]; [M, K] when `loop` is a tensor.
            loop: one loop for all rows, computed merged (one GEMM with W + B_l A_l) or plain (three GEMMs)
                as `should_merge` says; or an int32 tensor [M], one loop per row, by the native op.

        Returns:
            [..., N]
        """
        if isinstance(loop, Tensor):
            return self._forward_rows(x, loop)
        if self.packed:
            return ops.packed_linear(x, self.packed[loop], self.loop_bias(loop), self.out_features)
        rows = x.numel() // self.in_features
        dtype, wide = x.dtype, matmul_dtype(x, rows)
        x, bias = x.to(wide), self.loop_bias(loop)
        bias = None if bias is None else bias.to(wide)
        if self.lora_a is None or self.lora_b is None or self.should_merge(rows):
            return F.linear(x, self.merged_weight(loop, wide), bias).to(dtype)
        low_rank = F.linear(F.linear(x, self.lora_a[loop].to(wide)), self.lora_b[loop].to(wide))
        if self.weight is None:
            return (low_rank if bias is None else low_rank + bias).to(dtype)
        return (F.linear(x, self.weight.to(wide), bias) + low_rank).to(dtype)

    def _forward_rows(self, x: Tensor, loops: Tensor) -> Tensor:
        if self.weight is None:
            return self(x, 0)
        lora_a = x.new_empty(self.num_loops, 0, self.in_features) if self.lora_a is None else self.lora_a
        lora_b = x.new_empty(self.num_loops, self.out_features, 0) if self.lora_b is None else self.lora_b
        return ops.loop_lora_linear(x, self.weight, self.bias, lora_a, lora_b, loops)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, loops={self.num_loops}, rank={self.rank}"


def loop_linears(module: nn.Module) -> Iterator[tuple[str, LoopLinear]]:
    """Yield name and module of every `LoopLinear` within `module`."""
    for name, child in module.named_modules():
        if isinstance(child, LoopLinear):
            yield name, child
