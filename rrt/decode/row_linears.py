"""Linears of a layer, and the head, for decode rows: few rows, each at a loop of its own.

M rows, K in, N out, R rank of one linear.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rrt import ops
from rrt.decode.passes import DecodePlan
from rrt.model.loop_linear import LoopLinear
from rrt.model.transformer import MLP, Layer, RecursiveTransformer
from rrt.native import load_native


def should_pack_for_decode(weight: Tensor) -> bool:
    """Decide if a weight is packed for few rows: on CPUs, but not for the reference, which would unpack it per call."""
    return weight.device.type == "cpu" and load_native().handle is not None


class RowHead:
    """A model's final norm, exit translators and head for rows at any loops; on the CPU with packed copies.

    Do not change the model while this object lives.
    """

    @torch.no_grad()
    def __init__(self, model: RecursiveTransformer) -> None:
        self._norm, weight = model.norm, model.head_weight
        self._last = model.recursion.num_loops - 1
        # Without a LoRA one of rank 0 is in its place: the operator looks at every row's loop.
        num_loops = model.recursion.num_loops
        lora_a = weight.new_empty(num_loops, 0, weight.shape[1])
        lora_b = weight.new_empty(num_loops, weight.shape[0], 0)
        if model.head_lora_a is not None and model.head_lora_b is not None:
            # The last loop's is zero.
            lora_a, lora_b = (F.pad(lora, (0, 0, 0, 0, 0, 1)) for lora in (model.head_lora_a, model.head_lora_b))
        self._linear = _RowLinear(weight, None, lora_a, lora_b, segment_rank=[lora_a.shape[1]])
        self._translators: _RowLinear | None = None
        if model.exit_translator_weight is not None and model.exit_translator_bias is not None:
            # One below the other: every row goes through all of them, and keeps its loop's.
            maps, biases = model.exit_translator_weight, model.exit_translator_bias
            self._translators = _RowLinear(maps.flatten(0, 1), biases.flatten())

    @torch.inference_mode()
    def __call__(self, x: Tensor, loops: Tensor | None = None) -> Tensor:
        """Compute logits: x [M, D] -> [M, V]. `loops` int32 [M]: after which each row exits; default the last.

        Raises:
            RuntimeError: a loop that the model has not, where x lies on a CPU; on CUDA that row's logits are NaN.
        """
        normed = self._norm(x)
        if loops is None:
            loops = torch.full((len(x),), self._last, dtype=torch.int32, device=x.device)
        elif self._translators is not None:
            translated = self._translators(normed, torch.zeros_like(loops)).unflatten(1, (self._last, -1))
            chosen = loops.clamp(0, self._last - 1).long()[:, None, None].expand(-1, 1, x.shape[1])
            normed = torch.where((loops < self._last)[:, None], translated.gather(1, chosen).squeeze(1), normed)
        return self._linear(normed, loops)


class _RowLinear:
    """Linears of the same input fused into one `loop_lora_linear`: weights stacked, a segment for each LoRA."""

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
        if should_pack_for_decode(weight):
            tensors = [ops.pack_linear(tensor) for tensor in tensors]
        self.weight, self.lora_a, self.lora_b = tensors

    @classmethod
    def fused(cls, *linears: LoopLinear) -> "_RowLinear":
        # Without a weight, B A is computed once and stands for it.
        num_loops, ranks = linears[0].num_loops, [_row_rank(linear) for linear in linears]
        weights = [linear.merged_weight(0) if linear.weight is None else linear.weight for linear in linears]
        weight = _concatenate(weights, dim=0)
        biases = [linear.bias for linear in linears if linear.bias is not None]
        lora_a = weight.new_zeros(num_loops, sum(ranks), weight.shape[1])
        # Columns beyond a segment's own rank are not used, but must be finite.
        lora_b = weight.new_zeros(num_loops, weight.shape[0], max(ranks))
        first_out = first_rank = 0
        for linear, rank in zip(linears, ranks, strict=True):
            if rank and linear.lora_a is not None and linear.lora_b is not None:
                lora_a[:, first_rank : first_rank + linear.rank] = linear.lora_a
                lora_b[:, first_out : first_out + linear.out_features, : linear.rank] = linear.lora_b
            first_out += linear.out_features
            first_rank += rank
        return cls(
            weight,
            _concatenate(biases, dim=-1) if biases else None,
            lora_a,
            lora_b,
            [linear.out_features for linear in linears],
            ranks,
        )

    def __call__(self, x: Tensor, loops: Tensor) -> Tensor:
        """Apply the linears: x [M, K], loops int32 [M] -> [M, N of all linears]."""
        return ops.loop_lora_linear(
            x, self.weight, self.bias, self.lora_a, self.lora_b, loops, self.segment_out, self.segment_rank
        )

    def block_parameters(self, loop: int | None) -> list[Tensor | None]:
        """Return weight, bias, lora_a and lora_b as `ops.decode_block` takes them, of all loops or one alone."""
        lora_a, lora_b = (self.lora_a, self.lora_b) if any(self.segment_rank) else (None, None)
        if loop is not None and lora_a is not None and lora_b is not None:
            lora_a, lora_b = lora_a[loop : loop + 1], lora_b[loop : loop + 1]
        return [self.weight, _of_loop(self.bias, loop), lora_a, lora_b]


class DecodeLayer:
    """A shared layer's linears for decode rows."""

    def __init__(self, layer: Layer) -> None:
        self.module = layer
        self.qkv = _RowLinear.fused(layer.attn.q, layer.attn.k, layer.attn.v)
        self.out = _RowLinear.fused(layer.attn.out)
        gated = [] if layer.mlp.gate is None else [layer.mlp.gate]
        self.gate_up = _RowLinear.fused(*gated, layer.mlp.up)
        self.down = _RowLinear.fused(layer.mlp.down)
        self.linears = (self.qkv, self.out, self.gate_up, self.down)

    def mlp(self, x: Tensor, loops: Tensor) -> Tensor:
        mlp = self.module.mlp
        inner = self.gate_up(x, loops)
        if mlp.gate is None:
            return self.down(_activate_rows(mlp, inner), loops)
        gate, up = inner.chunk(2, dim=1)
        gated = mlp.gated(gate, up) if mlp.gates_natively(gate) else _activate_rows(mlp, gate) * up
        return self.down(gated, loops)

    def block_parameters(self, loop: int | None) -> list[Tensor | None]:
        """Return the layer's parameters in the order of `ops.BLOCK_PARAMETERS`, of all loops or one alone."""
        module = self.module
        norms = (module.attn_norm, module.attn.q_norm, module.attn.k_norm, module.mlp_norm)
        return [
            *(None if norm is None else _of_loop(norm.weight.detach(), loop) for norm in norms),
            *(parameter for linear in self.linears for parameter in linear.block_parameters(loop)),
        ]


class DecodeBlock:
    """All layers of a model for decode rows as one native call, which takes the place of about ten for each layer."""

    @staticmethod
    def fits(model: RecursiveTransformer) -> bool:
        """Decide if the operator computes this model where it lies: on CPUs, for layers of the Llama kind."""
        config = model.config
        return (
            should_pack_for_decode(model.embed)
            and config.norm_type != "layernorm"
            and config.gated_mlp
            and config.activation in ops.GATED_ACTIVATIONS
            and not config.parallel_residual
        )

    def __init__(self, model: RecursiveTransformer, layers: Sequence[DecodeLayer]) -> None:
        self._config = model.config
        # The operator takes the layers in one order, each row at one loop in all of them. Where that does not give what
        # a loop runs, it gets the layers of each loop with the parameters of their loops alone.
        self._splits_loops = model.recursion.sharing != "cycle"
        self._num_loops = 1 if self._splits_loops else model.recursion.num_loops
        places, step = model.recursion.places(model.config), len(layers)
        runs = [places[first : first + step] for first in range(0, len(places) if self._splits_loops else step, step)]
        self._parameters = [
            [
                parameter
                for loop, layer in run
                for parameter in layers[layer].block_parameters(loop if self._splits_loops else None)
            ]
            for run in runs
        ]
        self._ranks = [
            [rank for _, layer in run for linear in layers[layer].linears for rank in linear.segment_rank]
            for run in runs
        ]
        self._scale = model.config.head_dim**-0.5

    def __call__(self, x: Tensor, plan: DecodePlan, k_cache: Tensor, v_cache: Tensor, cos_sin: Tensor) -> Tensor:
        """Run the layers: x [N, D] -> [N, D], kv-only rows as they were."""
        config, loops, run = self._config, plan.loops, 0
        if self._splits_loops:
            assert plan.loop is not None
            loops, run = torch.zeros_like(loops), plan.loop
        return ops.decode_block(
            x,
            loops,
            plan.positions,
            plan.slot_mapping,
            plan.num_kv_only,
            plan.block_tables,
            plan.context_lens,
            k_cache,
            v_cache,
            cos_sin,
            self._parameters[run],
            self._ranks[run],
            self._num_loops,
            config.num_heads,
            config.intermediate_size,
            config.norm_eps,
            config.norm_type == "rmsnorm_1p",
            config.activation,
            self._scale,
        )


def _of_loop(vectors: Tensor | None, loop: int | None) -> Tensor | None:
    """Take one loop of a norm's weight or a bias, [N] or [B, N]; None takes it as it is."""
    return vectors if vectors is None or loop is None or vectors.dim() == 1 else vectors[loop]


def _row_rank(linear: LoopLinear) -> int:
    """Return the rank that a LoRA is stored with: as it is, or with zeros up to a multiple of 8.

    The CUDA kernels of 16-bit dtypes read 16 bytes at a time. For other ranks, as a budget gives them, a slower one
    runs.
    """
    if linear.weight is None:
        return 0
    is_cpu = linear.weight.device.type == "cpu"
    return linear.rank if is_cpu or linear.weight.dtype.itemsize != 2 else -(-linear.rank // 8) * 8


def _activate_rows(mlp: MLP, x: Tensor) -> Tensor:
    """Apply the activation to x [M, N], so that a row's bits do not depend on the other rows.

    PyTorch's CPU loops compute whole vectors and the elements left over by different formulas, and split tensors of
    32768 or more elements among threads at any element. So pieces are smaller than that, and rows that end within a
    vector are computed one by one.
    """
    if x.device.type != "cpu":
        return mlp.activate(x)
    rows = max(1, 32767 // x.shape[1]) if x.shape[1] % 64 == 0 else 1
    return torch.cat([mlp.activate(piece.contiguous()) for piece in x.split(rows)])


def _concatenate(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate without copying a single tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
