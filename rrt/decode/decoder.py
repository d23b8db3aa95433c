"""The inference path: passes of the shared block over rows of many sequences and loops.

One pass runs the K shared layers once, for rows each at a loop of its own (`rrt.decode.passes.PassRows`). Decode rows
go through the native operators, and a row's result is bitwise independent of the other rows in the pass. So it is of
rows of prefill chunks where packed weights are the faster ones, as on most CPUs; elsewhere, and where merged weights
are kept, chunks go through `rrt.decode.merged_weights`.

Shapes as in `rrt.model.transformer`, and N kv-only and decode rows, M rows in all.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor

from rrt import ops
from rrt.decode.kv_cache import PagedCache
from rrt.decode.merged_weights import PrefillLinears
from rrt.decode.packed_weights import should_pack_for_batches
from rrt.decode.passes import DecodePlan, PassPlan, PrefillPlan
from rrt.decode.row_linears import DecodeBlock, DecodeLayer, RowHead
from rrt.errors import UserError
from rrt.model.config import Place
from rrt.model.loop_linear import loop_linears
from rrt.model.transformer import Layer, RecursiveTransformer, rope_table


class Decoder:
    """A `RecursiveTransformer` on a `PagedCache`: embed tokens, run the block loop by loop, take the logits.

        x = decoder.embed(tokens)
        for loop in range(num_loops):
            x = decoder.block(x, cache.plan(rows_at(loop)))
        logits = decoder.logits(x)

    Decode rows use a copy of the weights, which is made here and on the CPU packed; so does prefill where packed
    weights are the faster ones. Else prefill uses the model itself, as norms and embedding do. So do not change the
    model while a decoder lives; after a change, make another.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: RecursiveTransformer,
        cache: PagedCache,
        max_positions: int | None = None,
        merged_bytes: int = 0,
    ) -> None:
        """Write the keys and values of the model's prefix vectors into the cache, and pack weights on the CPU.

        Args:
            max_positions: length of the longest sequence; default the model's `context_length`.
            merged_bytes: memory in which prefill may keep the weights merged with each loop's LoRA, so that a prompt
                costs no more than without LoRA. All of them are B times the shared weights that have LoRA, in bytes.

        Raises:
            UserError: the cache is for another configuration, dtype or device than the model has, or a number is too
                small.
        """
        weight = model.embed
        for name, found, expected in (
            ("configuration", (cache.config, cache.recursion), (model.config, model.recursion)),
            ("dtype", cache.k.dtype, weight.dtype),
            ("device", cache.k.device, weight.device),
        ):
            if found != expected:
                raise UserError(f"cache: found {name} {found}; expected the model's, {expected}")
        self.model = model
        self.cache = cache
        self.max_positions = model.config.context_length if max_positions is None else max_positions
        if self.max_positions < 1:
            raise UserError(f"max_positions: found {self.max_positions}; expected at least 1")
        if merged_bytes < 0:
            raise UserError(f"merged_bytes: found {merged_bytes}; expected at least 0")
        self._linears = PrefillLinears(merged_bytes)
        has_lora = any(linear.rank for _, linear in loop_linears(model.stack))
        self._prefills_packed = should_pack_for_batches(weight) and not (has_lora and merged_bytes)
        self._scale = model.config.head_dim**-0.5
        self._cos_sin = rope_table(model.config, self.max_positions, weight.dtype, weight.device)
        self._layers = [DecodeLayer(layer) for layer in _layers(model)]
        self._places = model.recursion.places(model.config)
        self._block = DecodeBlock(model, self._layers) if DecodeBlock.fits(model) else None
        self._head = RowHead(model)
        self._write_prefix()

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed tokens int64 [M] into the rows [M, D] that enter loop 0."""
        with torch.inference_mode():
            return self.model.embed_tokens(tokens)

    @torch.inference_mode()
    def block(self, x: Tensor, plan: PassPlan) -> Tensor:
        """Run one pass: every row goes through the K layers at its own loop.

        Args:
            x: [M, D], the rows in the order of `PassRows`.
            plan: of the same rows, by `PagedCache.plan`.

        Returns:
            [M, D]: kv-only rows as they were, the others after their loop.

        Raises:
            UserError: the rows are at several loops that run different layers, or kv-only in a model without exits.
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
        """Apply the final norm and head to each row: [M, D] -> [M, V].

        Args:
            loops: int32 [M], the loop after which each row exits; default the last. It matters only where exits
                have a LoRA on the head, or translators.

        Raises:
            RuntimeError: a loop that the model has not, where x lies on a CPU; on CUDA that row's logits are NaN.
        """
        return self._head(x, loops)

    def _decode(self, x: Tensor, plan: DecodePlan) -> Tensor:
        if len(x) == 0:
            return x
        sharing = self.model.recursion.sharing
        if sharing != "cycle" and plan.loop is None:
            raise UserError(
                f"rows of a pass: found several loops; expected one: with sharing '{sharing}' they run different layers"
            )
        if plan.num_kv_only:
            self.model.recursion.require_whole_loops(f"rows of a pass: found {plan.num_kv_only} kv-only ones")
        if self._block is not None:
            return self._block(x, plan, self.cache.k, self.cache.v, self._cos_sin)
        reading = slice(plan.num_kv_only, None)
        kept, x = x[: plan.num_kv_only], x[reading]
        positions = plan.positions[reading]
        for index, (layer, all_loops) in enumerate(self._layers_of(plan)):
            loops = all_loops[reading]
            rows = torch.cat((kept, x)) if len(kept) else x
            qkv = layer.qkv(layer.module.attn_norm(rows, all_loops), all_loops)
            q, k, v = self._split_heads(qkv)
            q, k = layer.module.attn.normalize(q, k, all_loops)
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
            x = _add_residuals(layer.module, x, layer.out(y.flatten(1), loops), loops, partial(layer.mlp, loops=loops))
        return torch.cat((kept, x)) if len(kept) else x

    def _prefill(self, x: Tensor, plan: PrefillPlan) -> Tensor:
        packed = self._prefills_packed
        for index, (loop, layer_index) in enumerate(self._places_of(plan.loop)):
            decode_layer = self._layers[layer_index]
            layer, loops = decode_layer.module, torch.full((len(x),), loop, dtype=torch.int32, device=x.device)
            h = layer.attn_norm(x, loop)
            if packed:
                q, k, v = self._split_heads(decode_layer.qkv(h, loops))
            else:
                q, k, v = (
                    self._linears(linear, h, loop).unflatten(1, (-1, self.model.config.head_dim))
                    for linear in (layer.attn.q, layer.attn.k, layer.attn.v)
                )
            q, k = layer.attn.normalize(q, k, loop)
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
            y = y.flatten(1)
            if packed:
                mlp = partial(decode_layer.mlp, loops=loops)
                x = _add_residuals(layer, x, decode_layer.out(y, loops), loop, mlp)
            else:
                attended = self._linears(layer.attn.out, y, loop)
                x = _add_residuals(layer, x, attended, loop, partial(self._linears.mlp, layer.mlp, loop=loop))
        return x

    def _places_of(self, loop: int) -> tuple[Place, ...]:
        """Return what the K depths of `loop` run."""
        return self._places[loop * len(self._layers) : (loop + 1) * len(self._layers)]

    def _layers_of(self, plan: DecodePlan) -> list[tuple[DecodeLayer, Tensor]]:
        """Return the K layers that the rows go through, with the loops int32 [N] at which."""
        if plan.loop is None or self.model.recursion.sharing == "cycle":
            return [(layer, plan.loops) for layer in self._layers]
        places = self._places_of(plan.loop)
        return [(self._layers[place.layer], torch.full_like(plan.loops, place.loop)) for place in places]

    def _split_heads(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Split a fused projection [M, .] into heads [M, H or H_kv, D_h] of queries, keys and values."""
        config = self.model.config
        sizes = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        return qkv.unflatten(1, (-1, config.head_dim)).split(sizes, dim=1)

    def _write_prefix(self) -> None:
        prefix = self.model.stack.prefix
        if prefix is None:
            return
        if self.cache.num_sequences:
            raise UserError(
                f"cache: found {self.cache.num_sequences} sequences; expected none before the prefix is written"
            )
        layers = _layers(self.model)
        for depth, (place, vectors) in enumerate(zip(self._places, prefix, strict=True)):
            loop, index = divmod(depth, len(layers))
            k, v = layers[place.layer].attn.prefix_heads(vectors, place.loop)
            ops.loop_kv_write(k, v, self.cache.k[index], self.cache.v[index], self.cache.prefix_slots(loop))


def _add_residuals(
    layer: Layer, x: Tensor, attended: Tensor, loop: int | Tensor, mlp: Callable[[Tensor], Tensor]
) -> Tensor:
    """Finish a layer after attention, sequential or with parallel residual: [M, D] -> [M, D]."""
    residual = x + attended
    return residual + mlp(layer.mlp_norm(x if layer.parallel_residual else residual, loop))


def _layers(model: RecursiveTransformer) -> list[Layer]:
    return cast(list[Layer], list(model.stack.layers))
