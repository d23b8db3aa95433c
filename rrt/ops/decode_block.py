"""`decode_block`: one pass of few rows through all shared layers, in a single call.

Shapes: N rows, of which M = N - num_kv_only decode; D model width, K layers, H query heads, H_kv key/value heads, D_h
head width, F inner width of the feed-forward part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rrt.native import register_op
from rrt.ops.checks import Checks
from rrt.ops.elementwise import GATED_ACTIVATIONS, gated_activation_reference, rms_norm_reference
from rrt.ops.kv import (
    check_context_lens,
    check_pages,
    check_positions,
    check_slots,
    loop_kv_attention_reference,
    loop_kv_write_reference,
)
from rrt.ops.loop_lora import loop_lora_linear_reference
from rrt.ops.packing import packed_shape

_LINEAR_PARTS = ("weight", "bias", "lora_a", "lora_b")
PARAMETERS = (
    "attn_norm",
    "q_norm",
    "k_norm",
    "mlp_norm",
    *(f"{linear}.{part}" for linear in ("qkv", "out", "gate_up", "down") for part in _LINEAR_PARTS),
)
"""A layer's parameters, in the order in which `decode_block` takes them."""

_NUM_RANKS = 7

_check = Checks("decode_block")


def decode_block(
    x: Tensor,
    loops: Tensor,
    positions: Tensor,
    slot_mapping: Tensor,
    num_kv_only: int,
    block_tables: Tensor,
    context_lens: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cos_sin: Tensor,
    parameters: Sequence[Tensor | None],
    ranks: Sequence[int],
    num_loops: int,
    num_heads: int,
    inner_size: int,
    norm_eps: float,
    norm_plus_one: bool,
    activation: str,
    scale: float,
) -> Tensor:
    """Run rows, each at a loop of its own, through K sequential layers with RMSNorm and a gated feed-forward part.

    The same as `rms_norm`, `loop_lora_linear`, `loop_kv_write`, `loop_kv_attention` and `gated_activation` one after
    the other; of narrow layers, the calls take longer than the work. For CPUs; no gradients.

    Args:
        x: [N, D] float32, float64, bfloat16 or float16: kv-only rows, whose state is not changed, then decode rows.
        loops: int32 [N], each in [0, num_loops).
        positions, slot_mapping: int32 and int64 [N], as in `loop_kv_write`; a row without a slot (-1) has a
            position in range too.
        num_kv_only: number of kv-only rows.
        block_tables, context_lens: int32 [M, max_pages] and [M], as in `loop_kv_attention`.
        k_cache, v_cache: [K, num_pages, page_size, H_kv, D_h], contiguous; written in place.
        cos_sin: [max_positions, rotary_dim], as in `loop_kv_write`; a row without a slot (-1) has a
            position in range too.
        parameters: for each layer those of `PARAMETERS`, of x's dtype. Norm weights are [width], or [num_loops, width];
            q_norm and k_norm (over D_h, before the rotation) may be None. Linears are packed as in `loop_lora_linear`,
            with q, k, v and gate, up as segments; biases may be None, and lora_a and lora_b where the rank is 0.
        ranks: for each layer the LoRA's ranks of q, k, v, out, gate, up and down.
        norm_eps, norm_plus_one, activation: as in `rms_norm` and `gated_activation`.
        scale: factor on the attention scores.

    Returns:
        [N, D] of x's dtype. A row's result is bitwise the same whatever other rows there are; the reference does not
        promise that.

    Raises:
        RuntimeError: a dtype, device, shape, stride, loop, slot, length, page or position that does not fit.
    """
    out: Tensor = torch.ops.rrt.decode_block.default(
        x,
        loops,
        positions,
        slot_mapping,
        num_kv_only,
        block_tables,
        context_lens,
        k_cache,
        v_cache,
        cos_sin,
        parameters,
        ranks,
        num_loops,
        num_heads,
        inner_size,
        norm_eps,
        norm_plus_one,
        activation,
        scale,
    )
    return out


def decode_block_reference(*arguments: Any) -> Tensor:
    """`decode_block` in plain PyTorch, on any device: same arguments and errors; rounds after each operation."""
    a = _Arguments(*arguments)
    a.check()
    outside = ((a.loops < 0) | (a.loops >= a.num_loops)).nonzero()
    if len(outside):
        row = int(outside[0])
        _check.fail(f"loops[{row}]", int(a.loops[row]), f"a loop in [0, {a.num_loops})")
    check_slots(_check, a.slot_mapping, a.k_cache[0])
    check_positions(_check, a.positions, a.cos_sin, torch.ones_like(a.positions, dtype=torch.bool))
    check_context_lens(_check, a.context_lens, a.block_tables, a.k_cache[0])
    check_pages(_check, a.block_tables, a.context_lens, a.k_cache[0])
    head_dim, decoding = a.k_cache.shape[4], slice(a.num_kv_only, None)
    heads = [a.num_heads, a.k_cache.shape[3], a.k_cache.shape[3]]

    def norm(values: Tensor, weight: Tensor | None, loops: Tensor) -> Tensor:
        if weight is None or len(values) == 0:
            return values
        if weight.dim() == 1:
            return a.norm(values, weight)
        return torch.stack([a.norm(row, weight[loop]) for row, loop in zip(values, loops.tolist(), strict=True)])

    kept, x = a.x[: a.num_kv_only], a.x[decoding]
    for index in range(len(a.k_cache)):
        layer, k_cache, v_cache = a.layer(index), a.k_cache[index], a.v_cache[index]
        normed = norm(torch.cat((kept, x)), layer["attn_norm"], a.loops)
        qkv = a.linear(index, "qkv", normed, a.loops)
        q, k, v = qkv.unflatten(1, (-1, head_dim)).split(heads, dim=1)
        q, k = norm(q, layer["q_norm"], a.loops), norm(k, layer["k_norm"], a.loops)
        loop_kv_write_reference(k, v, k_cache, v_cache, a.slot_mapping, a.positions, a.cos_sin)
        rope = (a.positions[decoding], a.cos_sin)
        y = loop_kv_attention_reference(q[decoding], k_cache, v_cache, a.block_tables, a.context_lens, a.scale, *rope)
        x = x + a.linear(index, "out", y.flatten(1), a.loops[decoding])
        normed = norm(x, layer["mlp_norm"], a.loops[decoding])
        gate, up = a.linear(index, "gate_up", normed, a.loops[decoding]).chunk(2, dim=1)
        x = x + a.linear(index, "down", gated_activation_reference(gate, up, a.activation), a.loops[decoding])
    return torch.cat((kept, x))


@dataclass(frozen=True)
class _Arguments:
    """Arguments of the operator, in the order of its schema."""

    x: Tensor
    loops: Tensor
    positions: Tensor
    slot_mapping: Tensor
    num_kv_only: int
    block_tables: Tensor
    context_lens: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cos_sin: Tensor
    parameters: Sequence[Tensor | None]
    ranks: Sequence[int]
    num_loops: int
    num_heads: int
    inner_size: int
    norm_eps: float
    norm_plus_one: bool
    activation: str
    scale: float

    def layer(self, index: int) -> dict[str, Tensor | None]:
        """Name the parameters of a layer."""
        first = index * len(PARAMETERS)
        return dict(zip(PARAMETERS, self.parameters[first : first + len(PARAMETERS)], strict=True))

    def norm(self, values: Tensor, weight: Tensor) -> Tensor:
        return rms_norm_reference(values, weight, self.norm_eps, self.norm_plus_one)[0]

    def linear(self, index: int, name: str, x: Tensor, loops: Tensor) -> Tensor:
        """Apply one of a layer's linears."""
        layer = self.layer(index)
        weight, bias, lora_a, lora_b = (layer[f"{name}.{part}"] for part in _LINEAR_PARTS)
        assert weight is not None
        _, outs, ranks = self.linear_sizes(index)[name]
        if lora_a is None or lora_b is None:
            lora_a = x.new_empty(self.num_loops, *packed_shape(x.dtype, 0, x.shape[1]))
            lora_b = x.new_empty(self.num_loops, *packed_shape(x.dtype, sum(outs), 0))
        return loop_lora_linear_reference(x, weight, bias, lora_a, lora_b, loops, outs, ranks)

    def linear_sizes(self, index: int) -> dict[str, tuple[int, tuple[int, ...], Sequence[int]]]:
        """Return for each linear of a layer its inputs, and the outputs and rank of each segment."""
        ranks = self.ranks[index * _NUM_RANKS : (index + 1) * _NUM_RANKS]
        hidden, inner, head_dim = self.x.shape[1], self.inner_size, self.k_cache.shape[4]
        q_width, kv_width = self.num_heads * head_dim, self.k_cache.shape[3] * head_dim
        return {
            "qkv": (hidden, (q_width, kv_width, kv_width), ranks[:3]),
            "out": (q_width, (hidden,), ranks[3:4]),
            "gate_up": (hidden, (inner, inner), ranks[4:6]),
            "down": (inner, (hidden,), ranks[6:7]),
        }

    def check(self) -> Tensor:
        """Make csrc/decode_block/op.cpp's checks, in its order, but for indices' values; return an empty result."""
        check, x = _check, self.x
        check.float_dtype("x", x)
        check.like("k_cache", self.k_cache, x, "x")
        check.like("v_cache", self.v_cache, x, "x")
        check.dtype("cos_sin", self.cos_sin, torch.float64 if x.dtype == torch.float64 else torch.float32)
        check.same_device("cos_sin", self.cos_sin, x, "x")
        check.shape("x", x, "N", "D")
        rows, hidden = x.shape
        if not 0 <= self.num_kv_only <= rows:
            check.fail("num_kv_only", self.num_kv_only, f"0 to {rows}, the rows")
        for name, size in (("num_loops", self.num_loops), ("inner_size", self.inner_size)):
            if size < 1:
                check.fail(name, size, "at least 1")
        decoding = rows - self.num_kv_only
        for name, tensor, dtype, shape in (
            ("loops", self.loops, torch.int32, (rows,)),
            ("positions", self.positions, torch.int32, (rows,)),
            ("slot_mapping", self.slot_mapping, torch.int64, (rows,)),
            ("block_tables", self.block_tables, torch.int32, (decoding, "max_pages")),
            ("context_lens", self.context_lens, torch.int32, (decoding,)),
        ):
            check.dtype(name, tensor, dtype)
            check.same_device(name, tensor, x, "x")
            check.shape(name, tensor, *shape)
            check.contiguous(name, tensor)
        check.shape("k_cache", self.k_cache, "K", "num_pages", "page_size", "H_kv", "D_h")
        num_layers, _, _, num_kv_heads, head_dim = self.k_cache.shape
        check.shape("v_cache", self.v_cache, *self.k_cache.shape)
        check.contiguous("k_cache", self.k_cache)
        check.contiguous("v_cache", self.v_cache)
        if self.num_heads < 1 or num_kv_heads < 1 or self.num_heads % num_kv_heads:
            check.fail("num_heads", self.num_heads, f"a multiple of k_cache's {num_kv_heads}")
        check.shape("cos_sin", self.cos_sin, "max_positions", "rotary_dim")
        if self.cos_sin.shape[1] % 2 or self.cos_sin.shape[1] > head_dim:
            check.fail("cos_sin", f"rotary_dim {self.cos_sin.shape[1]}", f"an even number of at most {head_dim}")
        check.contiguous("cos_sin", self.cos_sin)
        if self.activation not in GATED_ACTIVATIONS:
            check.fail("activation", self.activation, " or ".join(GATED_ACTIVATIONS))
        expected = num_layers * len(PARAMETERS)
        if len(self.parameters) != expected:
            check.fail(
                "parameters",
                f"{len(self.parameters)} entries",
                f"{expected}, {len(PARAMETERS)} for each of k_cache's layers",
            )
        if len(self.ranks) != num_layers * _NUM_RANKS:
            total = num_layers * _NUM_RANKS
            check.fail("ranks", f"{len(self.ranks)} entries", f"{total}, {_NUM_RANKS} for each of k_cache's layers")
        for entry, rank in enumerate(self.ranks):
            if rank < 0:
                check.fail(f"ranks[{entry}]", rank, "0 or more")
        for index in range(num_layers):
            for norm, width in (
                ("attn_norm", hidden),
                ("q_norm", head_dim),
                ("k_norm", head_dim),
                ("mlp_norm", hidden),
            ):
                self._check_vector(index, norm, width, is_required=norm in ("attn_norm", "mlp_norm"))
            for name, (k, outs, ranks) in self.linear_sizes(index).items():
                n, total = sum(outs), sum(ranks)
                self._check_entry(index, f"{name}.weight", packed_shape(x.dtype, n, k))
                self._check_vector(index, f"{name}.bias", n)
                if total:
                    self._check_entry(index, f"{name}.lora_a", (self.num_loops, *packed_shape(x.dtype, total, k)))
                    self._check_entry(index, f"{name}.lora_b", (self.num_loops, *packed_shape(x.dtype, n, max(ranks))))
        return x.new_empty(x.shape)

    def _check_vector(self, layer: int, name: str, width: int, is_required: bool = False) -> None:
        """Check a norm's weight or a bias, which may be one for all loops or one for each."""
        tensor = self.layer(layer)[name]
        if tensor is not None or is_required:
            per_loop = tensor is not None and tensor.dim() == 2
            self._check_entry(layer, name, (self.num_loops, width) if per_loop else (width,))

    def _check_entry(self, layer: int, name: str, shape: Sequence[int]) -> None:
        tensor, name = self.layer(layer)[name], f"parameters: layer {layer}: {name}"
        if tensor is None:
            _check.fail(name, None, "a tensor")
        _check.like(name, tensor, self.x, "x")
        _check.shape(name, tensor, *shape)
        _check.contiguous(name, tensor)


register_op(
    "decode_block(Tensor x, Tensor loops, Tensor positions, Tensor slot_mapping, int num_kv_only, "
    "Tensor block_tables, Tensor context_lens, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor cos_sin, "
    "Tensor?[] parameters, int[] ranks, int num_loops, int num_heads, int inner_size, float norm_eps, "
    "bool norm_plus_one, str activation, float scale) -> Tensor",
    decode_block_reference,
    fake=lambda *arguments: _Arguments(*arguments).check(),
)
