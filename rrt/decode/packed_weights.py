"""Packed copies of a model's linears, for inference on many rows with unchanging weights.

N out, K in of a linear, B loops.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rrt import ops
from rrt.common.machine import is_intel_cpu
from rrt.decode.row_linears import should_pack_for_decode
from rrt.model.loop_linear import LoopLinear
from rrt.ops.precision import matmul_dtype

_HAS_PAIRS_ALONE = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
_HAS_FAST_MKL = torch.backends.mkl.is_available() and torch.cpu._is_avx512_supported() and is_intel_cpu()
"""With it PyTorch's float32 products take 0.9 of the time of packed ones (Skylake; Intel's AVX2 was not measured)."""


def should_pack_for_batches(weight: Tensor) -> bool:
    """Decide if a weight is packed for many rows: on CPUs, unless PyTorch multiplies its 16 bits as fast there.

    It does on tiles (AMX). With AVX512-BF16 alone packing bfloat16 saves what PyTorch reorders in every call, 5 %.
    """
    native_16_bits = weight.dtype.itemsize == 2 and matmul_dtype(weight) == weight.dtype
    packs_pairs = weight.dtype == torch.bfloat16 and _HAS_PAIRS_ALONE
    return should_pack_for_decode(weight) and (packs_pairs or not native_16_bits)


class PackedLinears:
    """A module's linears, packed for the native kernel; one with LoRA is packed once per loop, merged.

        packed = PackedLinears(model.stack, max_bytes)
        with packed.in_use(), torch.no_grad():
            model(...)

    Linears are packed in the module's order until `max_bytes` bytes are used. Those are left out for which packing
    is not faster, or would round a merged weight to 16 bits; in float32 on Intel's AVX-512 that is every linear without
    LoRA. Do not change the weights while this object lives.
    """

    @torch.no_grad()
    def __init__(self, module: nn.Module, max_bytes: int) -> None:
        self.num_bytes = 0
        self._packed: dict[LoopLinear, list[Tensor]] = {}
        for linear in module.modules():
            if not isinstance(linear, LoopLinear) or linear.weight is None:
                continue
            if not should_pack_for_batches(linear.weight):
                continue
            if linear.lora_a is not None and linear.weight.dtype.itemsize == 2:
                continue
            if linear.lora_a is None and linear.weight.dtype == torch.float32 and _HAS_FAST_MKL:
                continue
            copies = 1 if linear.lora_a is None else linear.num_loops
            num_bytes = copies * ops.pack_linear(linear.weight.to("meta")).nbytes
            if self.num_bytes + num_bytes > max_bytes:
                break
            packed = [ops.pack_linear(linear.merged_weight(loop)) for loop in range(copies)]
            self._packed[linear] = packed * (linear.num_loops // copies)
            self.num_bytes += num_bytes

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Run the module on its packed weights inside this context, without gradients."""
        before = {linear: linear.packed for linear in self._packed}
        try:
            for linear, packed in self._packed.items():
                linear.packed = packed
            yield
        finally:
            for linear, packed in before.items():
                linear.packed = packed
