"""The model's inference path: passes of the shared block over rows of many sequences and loops.

One pass runs the K shared layers once, for rows each at a loop of its own (see `rrt.decode.kv_cache.Rows`). Decode rows
go through the native operators, and a row's result is bitwise the same whatever other rows are in the pass. Prefill
chunks, which have many rows of one loop, go through `rrt.decode.merged_weights`.

Shapes as in `rrt.model.transformer`, and N kv-only and decode rows, M rows in all.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rrt import ops
from rrt.decode.kv_cache import DecodePlan, PagedCache, PassPlan, PrefillPlan
from rrt.decode.merged_weights import PrefillLinears
from rrt.errors import UserError
from rrt.model.loop_linear import LoopLinear
from rrt.model.transformer import MLP, Layer, RecursiveTransformer, rope_table
from rrt.native import load_native


class Decoder:
    """`RecursiveTransformer` on a `PagedCache`: embed the tokens, run the block loop by loop, take the logits.

        x = decoder.embed(tokens)
        for loop in range(num_loops):
            x = decoder.block(x, cache.plan(rows_at(loop)))
        logits = decoder.logits(x)

    Decode rows use the weights as they are now, on the CPU packed for few rows; prefill, norms and embedding use the
    model itself. So leave the model as it is while a decoder lives, and after a change make another. Writes the keys
    and values of the model's prefix vectors into the cache.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: RecursiveTransformer,
        cache: PagedCache,
        max_positions: int | None = None,
        merged_bytes: int = 0,
    ) -> None:
        """
        Args:
            max_positions: how long sequences may become; default what the base was trained for.
            merged_bytes: memory in which prefill may keep the weights merged with each loop's LoRA, so that a prompt
                costs no more than without LoRA. All of them are B times the shared weights that have LoRA, in bytes.

        Raises:
            UserError: the cache is for another configuration, dtype or device than the model has, or a number is too
                small.
        """
        weight = model.embed
        for name, found, expected in (
            ("configuration", (cache.config, cache.recursive), (model.config, model.recursive)),
            ("dtype", cache.k.dtype, weight.dtype),
            ("device", cache.k.device, weight.device),
        ):
            if found != expected:
                raise UserError(f"cache: found {name} {found}; expected the model's, {expected}")
        self.model = model
        self.cache = cache
        self.max_positions = model.config.max_position_embeddings if max_positions is None else max_positions
        if self.max_positions < 1:
            raise UserError(f"max_positions: found {self.max_positions}; expected at least 1")
        if merged_bytes < 0:
            raise UserError(f"merged_bytes: found {merged_bytes}; expected at least 0")
        self._linears = PrefillLinears(merged_bytes)
        self._scale = model.config.head_dim**-0.5
        self._cos_sin = rope_table(model.config, self.max_positions, weight.dtype, weight.device)
        self._layers = [_DecodeLayer(layer) for layer in _layers(model)]
        self._head = RowHead(model)
        self._write_prefix()

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens int64 [M] -> the rows [M, D] that enter loop 0."""
        with torch.inference_mode():
            return self.model.embed_tokens(tokens)

    @torch.inference_mode()
    def block(self, x: Tensor, plan: PassPlan) -> Tensor:
        """One pass: every row goes through the K layers at its own loop.

        Args:
            x: [M, D], the rows in the order of `Rows`.
            plan: what `PagedCache.plan` made of the rows.

        Returns:
            [M, D]: kv-only rows as they were, the others after their loop.

        Raises:
            RuntimeError: from the native operators; a position at or beyond `max_positions`, for instance.
        """
        sizes = [len(plan.decode.loops), *(len(prefill.positions) for prefill in plan.prefills)]
        if x.shape != (sum(sizes), self.model.config.hidden_size):
            expected = [sum(sizes), self.model.config.hidden_size]
            raise ValueError(f"x: found shape {list(x.shape)}; expected {expected}, as the plan has rows")
        first, *chunks = x.split(sizes)
        done = [self._decode(first, plan.decode)]
        done += [self._prefill(chunk, prefill) for chunk, prefill in zip(chunks, plan.prefills, strict=True)]
        return torch.cat(done) if chunks else done[0]

    def logits(self, x: Tensor, loops: Tensor | None = None) -> Tensor:
        """Final norm and head: [M, D] -> [M, V], each row for itself.

        Args:
            loops: int32 [M], the loop that each row exits after; default the last. Only a LoRA on the head tells them
                apart.
        """
        return self._head(x, loops)

    def _decode(self, x: Tensor, plan: DecodePlan) -> Tensor:
        if len(x) == 0:
            return x
        config, reading = self.model.config, slice(plan.num_kv_only, None)
        kept, x = x[: plan.num_kv_only], x[reading]
        loops, positions = plan.loops[reading], plan.positions[reading]
        for index, layer in enumerate(self._layers):
            rows = torch.cat((kept, x)) if len(kept) else x
            qkv = layer.qkv(layer.module.attn_norm(rows, plan.loops), plan.loops)
            q, k, v = qkv.unflatten(1, (-1, config.head_dim)).split(
                (config.num_heads, config.num_kv_heads, config.num_kv_heads), dim=1
            )
            k_cache, v_cache = self.cache.k[index], self.cache.v[index]
            ops.loop_kv_write(k, v, k_cache, v_cache, plan.slot_mapping, plan.positions, self._cos_sin)
            y = ops.loop_kv_attention(
                q[reading],
                k_cache,
                v_cache,
                plan.block_tables,
                plan.context_lens,
                self._scale,
                positions,
                self._cos_sin,
            )
            x = _add_residuals(layer.module, x, layer.out(y.flatten(1), loops), loops, layer.mlp)
        return torch.cat((kept, x)) if len(kept) else x

    def _prefill(self, x: Tensor, plan: PrefillPlan) -> Tensor:
        config, loop = self.model.config, plan.loop
        for index, layer in enumerate(_layers(self.model)):
            h = layer.attn_norm(x, loop)
            q, k, v = (
                self._linears(linear, h, loop).unflatten(1, (-1, config.head_dim))
                for linear in (layer.attn.q, layer.attn.k, layer.attn.v)
            )
            k_cache, v_cache = self.cache.k[index], self.cache.v[index]
            ops.loop_kv_write(k, v, k_cache, v_cache, plan.slot_mapping, plan.positions, self._cos_sin)
            y = ops.loop_kv_prefill(
                q,
                k_cache,
                v_cache,
                plan.block_tables,
                plan.query_start,
                plan.context_lens,
                self._scale,
                plan.positions,
                self._cos_sin,
            )
            attended = self._linears(layer.attn.out, y.flatten(1), loop)
            x = _add_residuals(layer, x, attended, loop, partial(self._linears.mlp, layer.mlp))
        return x

    def _write_prefix(self) -> None:
        prefix = self.model.stack.prefix
        if prefix is None:
            return
        if self.cache.num_sequences:
            raise UserError(
                f"cache: found {self.cache.num_sequences} sequences; expected none before the prefix is written"
            )
        heads = (self.model.config.num_kv_heads, self.model.config.head_dim)
        layers = _layers(self.model)
        for depth, vectors in enumerate(prefix):
            loop, index = divmod(depth, len(layers))
            k, v = (
                linear(vectors, loop).unflatten(1, heads) for linear in (layers[index].attn.k, layers[index].attn.v)
            )
            ops.loop_kv_write(k, v, self.cache.k[index], self.cache.v[index], self.cache.prefix_slots(loop))


def packs_rows(weight: Tensor) -> bool:
    """Whether weights like this one are packed for few rows: on CPUs. The reference would unpack them in every call."""
    return weight.device.type == "cpu" and load_native().handle is not None


class RowHead:
    """A model's final norm and head for rows of many loops, on the CPU a packed copy of the head.

    Leave the model as it is while it lives.
    """

    @torch.no_grad()
    def __init__(self, model: RecursiveTransformer) -> None:
        self._norm = model.norm
        lora_a = lora_b = None
        rank, self._last = 0, 0
        if model.head_lora_a is not None and model.head_lora_b is not None:
            # The last loop's is zero.
            lora_a, lora_b = (F.pad(lora, (0, 0, 0, 0, 0, 1)) for lora in (model.head_lora_a, model.head_lora_b))
            rank, self._last = lora_a.shape[1], model.recursive.num_loops - 1
        self._linear = _RowLinear(model.head_weight, None, lora_a, lora_b, segment_rank=[rank])

    @torch.inference_mode()
    def __call__(self, x: Tensor, loops: Tensor | None = None) -> Tensor:
        """x [M, D] -> [M, V]. `loops`: int32 [M], what each row exits after; default the last."""
        if loops is None or self._last == 0:
            loops = torch.full((len(x),), self._last, dtype=torch.int32, device=x.device)
        return self._linear(self._norm(x), loops)


class _RowLinear:
    """Linears of one input as one call of `loop_lora_linear`: weights stacked, each one's LoRA a segment."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        lora_a: Tensor | None = None,
        lora_b: Tensor | None = None,
        segment_out: Sequence[int] | None = None,
        segment_rank: Sequence[int] = (0,),
    ) -> None:
        self.bias = None if bias is None else bias.detach()
        self.segment_out = [weight.shape[0]] if segment_out is None else list(segment_out)
        self.segment_rank = list(segment_rank)
        lora_a = weight.new_empty(1, 0, weight.shape[1]) if lora_a is None else lora_a
        lora_b = weight.new_empty(1, weight.shape[0], 0) if lora_b is None else lora_b
        tensors = [tensor.detach() for tensor in (weight, lora_a, lora_b)]
        if packs_rows(weight):
            tensors = [ops.pack_linear(tensor) for tensor in tensors]
        self.weight, self.lora_a, self.lora_b = tensors

    @classmethod
    def fused(cls, *linears: LoopLinear) -> "_RowLinear":
        num_loops, rank = linears[0].num_loops, max(linear.rank for linear in linears)
        weight = _concatenate([linear.weight for linear in linears], dim=0)
        biases = [linear.bias for linear in linears if linear.bias is not None]
        lora_a = weight.new_empty(num_loops, 0, weight.shape[1])
        # Columns beyond a segment's own rank are not used, but must be finite.
        lora_b = weight.new_zeros(num_loops, weight.shape[0], rank)
        first = 0
        for linear in linears:
            end = first + linear.out_features
            if linear.lora_a is not None and linear.lora_b is not None:
                lora_a = torch.cat((lora_a, linear.lora_a), dim=1)
                lora_b[:, first:end, : linear.rank] = linear.lora_b
            first = end
        return cls(
            weight,
            _concatenate(biases, dim=-1) if biases else None,
            lora_a,
            lora_b,
            [linear.out_features for linear in linears],
            [linear.rank for linear in linears],
        )

    def __call__(self, x: Tensor, loops: Tensor) -> Tensor:
        """x [M, K], loops int32 [M] -> [M, N of all linears]."""
        return ops.loop_lora_linear(
            x, self.weight, self.bias, self.lora_a, self.lora_b, loops, self.segment_out, self.segment_rank
        )


class _DecodeLayer:
    """A shared layer's linears for decode rows."""

    def __init__(self, layer: Layer) -> None:
        self.module = layer
        self.qkv = _RowLinear.fused(layer.attn.q, layer.attn.k, layer.attn.v)
        self.out = _RowLinear.fused(layer.attn.out)
        gated = [] if layer.mlp.gate is None else [layer.mlp.gate]
        self.gate_up = _RowLinear.fused(*gated, layer.mlp.up)
        self.down = _RowLinear.fused(layer.mlp.down)

    def mlp(self, x: Tensor, loops: Tensor) -> Tensor:
        mlp = self.module.mlp
        inner = self.gate_up(x, loops)
        if mlp.gate is None:
            return self.down(_activate_rows(mlp, inner), loops)
        gate, up = inner.chunk(2, dim=1)
        gated = mlp.gated(gate, up) if mlp.gates_natively(gate) else _activate_rows(mlp, gate) * up
        return self.down(gated, loops)


def _activate_rows(mlp: MLP, x: Tensor) -> Tensor:
    """The activation of x [M, N], bit for bit the same for a row whatever the others are.

    PyTorch's CPU loops compute whole vectors and the elements left over by different formulas, and split what has
    32768 elements or more among threads anywhere. So a piece has fewer, and rows that end in the middle of a vector
    come one by one.
    """
    if x.device.type != "cpu":
        return mlp.activate(x)
    rows = max(1, 32767 // x.shape[1]) if x.shape[1] % 64 == 0 else 1
    return torch.cat([mlp.activate(piece.contiguous()) for piece in x.split(rows)])


def _add_residuals(
    layer: Layer, x: Tensor, attended: Tensor, loop: int | Tensor, mlp: Callable[[Tensor, Any], Tensor]
) -> Tensor:
    """What follows attention in a layer, sequential or with parallel residual: [M, D] -> [M, D]."""
    residual = x + attended
    return residual + mlp(layer.mlp_norm(x if layer.parallel_residual else residual, loop), loop)


def _concatenate(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """One tensor stays as it is, without a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


def _layers(model: RecursiveTransformer) -> list[Layer]:
    return cast(list[Layer], list(model.stack.layers))
