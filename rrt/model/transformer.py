"""Gemma, Llama and GPT-NeoX decoders, vanilla, recursive or relaxed, in one file.

The whole method: `LoopedStack` holds K shared layers and runs them B times; each linear adds the LoRA of
the loop it runs in (:class:`rrt.model.loop_linear.LoopLinear`). A vanilla model is one loop over all its layers.

Shapes, used across the package: batch sequences of T tokens, S keys, M rows, D model width, H query heads,
H_kv key/value heads, D_h head width, L depth, B loops, K shared layers per loop, R LoRA rank, V vocabulary,
P prefix length. `depth = loop * K + layer`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rrt import ops
from rrt.errors import UserError
from rrt.model.config import ModelConfig, RecursiveConfig
from rrt.model.loop_linear import LoopLinear
from rrt.ops import precision

Checkpointing = Literal["none", "layer", "loop"]
"""What keeps only its input in the forward of training, and is computed again in the backward."""


class Cache(Protocol):
    """What incremental decoding needs of a key/value cache; every depth keeps its own entries."""

    length: int
    """Positions held before this forward."""

    def update(self, depth: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [batch, T, H_kv, D_h] of `depth`; return all keys and values [batch, S, H_kv, D_h]."""
        ...

    def advance(self, num_tokens: int) -> None:
        """Called once per forward, after every depth has appended its `num_tokens` positions."""
        ...


@dataclass(frozen=True)
class Branches:
    """What tokens see where texts lie in a row behind what they begin with alike (`RecursiveTransformer.forward`)."""

    of: Tensor
    """int32 [batch, T], contiguous."""

    def mask(self) -> Tensor:
        """bool [batch, 1, T, T]"""
        keys, queries = self.of[:, None, None, :], self.of[:, None, :, None]
        return ((keys == 0) | (keys == queries)).tril()


class Norm(nn.Module):
    """RMSNorm, Gemma's RMSNorm with (1 + weight), or LayerNorm; computed in fp32 (fp64 for fp64 input)."""

    def __init__(self, config: ModelConfig, num_loops: int = 1) -> None:
        super().__init__()
        self.kind = config.norm_type
        self.eps = config.norm_eps
        shape = (config.hidden_size,) if num_loops == 1 else (num_loops, config.hidden_size)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape)) if self.kind == "layernorm" else None

    def forward(self, x: Tensor, loop: int | Tensor = 0) -> Tensor:
        """x [..., D] -> [..., D]; `loop` is one for all, or an int32 tensor [M] with one for each row of x [M, D]."""
        weight = self.weight if self.weight.dim() == 1 else self.weight[loop]
        if self.kind == "layernorm":
            bias = self.bias if self.bias is None or self.bias.dim() == 1 else self.bias[loop]
            if weight.dim() == 1:
                return F.layer_norm(x, x.shape[-1:], weight, bias, self.eps)
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            normed = F.layer_norm(wide, x.shape[-1:], eps=self.eps) * weight.to(wide.dtype)
            return (normed if bias is None else normed + bias.to(wide.dtype)).to(x.dtype)
        if weight.dim() == 1 and weight.dtype == x.dtype and ops.has_native_kernels(x):
            return ops.rms_norm(x, weight, self.eps, self.kind == "rmsnorm_1p")
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = F.rms_norm(wide, x.shape[-1:], eps=self.eps)
        if self.kind == "rmsnorm_1p":
            return (normed * (1.0 + weight.to(wide.dtype))).to(x.dtype)
        return weight * normed.to(x.dtype)


def rope_cos_sin(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rotary cosines and sines [batch or 1, T, rotary_dim / 2] of `positions` [batch or 1, T]."""
    exponents = torch.arange(0, config.rotary_dim, 2, device=positions.device, dtype=torch.float32)
    inverse_frequencies = 1.0 / (config.rope_theta ** (exponents / config.rotary_dim))
    angles = positions[..., None].float() * inverse_frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rope_table(config: ModelConfig, num_positions: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The native operators' `cos_sin` [num_positions, rotary_dim]: cosines, then sines, of each angle.

    The values are those of `rope_cos_sin`, rounded to the model's `dtype`, and held in fp32 (fp64 for fp64).
    """
    cos, sin = rope_cos_sin(config, torch.arange(num_positions, device=device)[None], dtype)
    return torch.cat((cos[0], sin[0]), dim=-1).to(torch.promote_types(dtype, torch.float32))


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first `rotary_dim` dimensions of each head of x [batch, T, heads, D_h]."""
    if ops.has_native_kernels(x):
        return ops.rotary_embedding(x, cos, sin)
    return ops.rotary_embedding_reference(x, cos, sin)


class Attention(nn.Module):
    """Causal attention with separate q, k, v projections (MHA, GQA, MQA) and optional prefix vectors."""

    def __init__(self, config: ModelConfig, recursion: RecursiveConfig) -> None:
        super().__init__()
        self.config = config
        ranks, width = recursion.lora_rank, config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim

        def linear(inputs: int, outputs: int, rank: int) -> LoopLinear:
            return _linear(config, recursion, inputs, outputs, rank)

        self.q = linear(config.hidden_size, width, ranks.q)
        self.k = linear(config.hidden_size, kv_width, ranks.kv)
        self.v = linear(config.hidden_size, kv_width, ranks.kv)
        self.out = linear(width, config.hidden_size, ranks.out)

    def forward(
        self,
        x: Tensor,
        loop: int,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | Branches | None,
        depth: int,
        cache: Cache | None,
        prefix: Tensor | None,
        asked: Tensor | None = None,
    ) -> Tensor:
        """x [batch, T, D] -> [batch, T, D], or [N, D] of the tokens asked.

        `mask`: bool [batch or 1, 1, T, P + S], or None for plain causal. Branches stand for their mask where the native
        operator takes them.
        """
        q, k, v = (self._split_heads(linear(x, loop)) for linear in (self.q, self.k, self.v))
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if cache is not None:
            k, v = cache.update(depth, k, v)
        if prefix is not None:
            # Prefix keys carry no position: every query sees them alike.
            k = torch.cat((self._prefix_heads(self.k(prefix, loop), x.shape[0]), k), dim=1)
            v = torch.cat((self._prefix_heads(self.v(prefix, loop), x.shape[0]), v), dim=1)
        causal = mask is None and x.shape[1] > 1
        if isinstance(mask, Branches) or (causal and ops.has_native_kernels(x)):
            branches = mask.of if isinstance(mask, Branches) else None
            y = ops.causal_attention(q, k, v, self.config.head_dim**-0.5, branches)
        else:
            q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1]
            ).transpose(1, 2)
        return self.out(_only(asked, y.flatten(2)), loop)

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim))

    def _prefix_heads(self, x: Tensor, batch: int) -> Tensor:
        return self._split_heads(x).expand(batch, -1, -1, -1)


class MLP(nn.Module):
    """GeGLU, SwiGLU (`gated_mlp`) or the plain two-matrix feed-forward."""

    def __init__(self, config: ModelConfig, recursion: RecursiveConfig) -> None:
        super().__init__()
        self.activation = config.activation
        hidden, inner, rank = config.hidden_size, config.intermediate_size, recursion.lora_rank.ffn
        self.gate = _linear(config, recursion, hidden, inner, rank) if config.gated_mlp else None
        self.up = _linear(config, recursion, hidden, inner, rank)
        self.down = _linear(config, recursion, inner, hidden, rank)

    def forward(self, x: Tensor, loop: int) -> Tensor:
        if self.gate is None:
            return self.down(self.activate(self.up(x, loop)), loop)
        return self.down(self.gated(self.gate(x, loop), self.up(x, loop)), loop)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """The activation of `gate` times `up`."""
        if self.gates_natively(gate):
            return ops.gated_activation(gate, up, self.activation)
        return self.activate(gate) * up

    def gates_natively(self, x: Tensor) -> bool:
        """Whether `gated` is a native operator, which gives an element's result wherever it lies in x."""
        return self.activation in ops.GATED_ACTIVATIONS and ops.has_native_kernels(x)

    def activate(self, x: Tensor) -> Tensor:
        if self.activation == "silu":
            return F.silu(x)
        return F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")


class Layer(nn.Module):
    """One shared decoder layer, sequential or with parallel residual."""

    def __init__(self, config: ModelConfig, recursion: RecursiveConfig) -> None:
        super().__init__()
        norm_loops = recursion.num_loops if recursion.untie_norms else 1
        self.parallel_residual = config.parallel_residual
        self.attn_norm = Norm(config, norm_loops)
        self.attn = Attention(config, recursion)
        self.mlp_norm = Norm(config, norm_loops)
        self.mlp = MLP(config, recursion)

    def forward(
        self,
        x: Tensor,
        loop: int,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | Branches | None,
        depth: int,
        cache: Cache | None,
        prefix: Tensor | None,
        asked: Tensor | None = None,
    ) -> Tensor:
        """x [batch, T, D] -> [batch, T, D], or [N, D] of the tokens asked (`RecursiveTransformer.hidden_states`)."""
        attended = self.attn(self.attn_norm(x, loop), loop, rope, mask, depth, cache, prefix, asked)
        x = _only(asked, x)
        if self.parallel_residual:
            return x + attended + self.mlp(self.mlp_norm(x, loop), loop)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x, loop), loop)


class LoopedStack(nn.Module):
    """K shared layers run B times. Returns the hidden state after each loop, which is where exits are taken."""

    def __init__(self, config: ModelConfig, recursion: RecursiveConfig) -> None:
        super().__init__()
        self.num_loops = recursion.num_loops
        self.layers = nn.ModuleList(Layer(config, recursion) for _ in range(recursion.layers_per_loop(config)))
        self.checkpointing: Checkpointing = "none"
        shape = (config.num_layers, recursion.prefix_length, config.hidden_size)
        self.prefix = nn.Parameter(torch.empty(shape)) if recursion.prefix_length else None

    def forward(
        self,
        x: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | Branches | None = None,
        cache: Cache | None = None,
        num_loops: int | None = None,
        asked: Tensor | None = None,
    ) -> list[Tensor]:
        """x [batch, T, D] -> the state [batch, T, D] after each of the first `num_loops` loops (default all).

        Of the last one only the tokens asked, [N, D], if any are named.
        """
        num_loops = self.num_loops if num_loops is None else num_loops
        exits = []
        for loop in range(num_loops):
            x = self._run("loop", self._run_loop, x, loop, rope, mask, cache, asked if loop == num_loops - 1 else None)
            exits.append(x)
        return exits

    def _run_loop(
        self,
        x: Tensor,
        loop: int,
        rope: tuple[Tensor, Tensor],
        mask: Tensor | Branches | None,
        cache: Cache | None,
        asked: Tensor | None,
    ) -> Tensor:
        for index, layer in enumerate(self.layers):
            depth = loop * len(self.layers) + index
            prefix = None if self.prefix is None else self.prefix[depth]
            last = index == len(self.layers) - 1
            x = self._run("layer", layer, x, loop, rope, mask, depth, cache, prefix, asked if last else None)
        return x

    def _run(self, unit: Checkpointing, function: Callable[..., Tensor], *args: object) -> Tensor:
        """`function(*args)`; if it is the unit of checkpointing, its backward computes its activations again."""
        if self.checkpointing != unit or not torch.is_grad_enabled():
            return function(*args)
        # The re-entrant kind silently loses the parameters' gradients under FSDP. No dropout: no random state.
        output: Tensor = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
        return output


class RecursiveTransformer(nn.Module):
    """The language model. `forward(input_ids)` gives logits; see :func:`rrt.load_model` to get one.

    Raises:
        UserError: from the constructor, if `num_loops` does not divide `num_layers`.
    """

    def __init__(self, config: ModelConfig, recursion: RecursiveConfig | None = None) -> None:
        super().__init__()
        self.config = config
        self.recursion = recursion = recursion or RecursiveConfig()
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.stack = LoopedStack(config, recursion)
        self.norm = Norm(config)
        self.head = None if config.tie_embeddings else nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        rank = min(recursion.head_lora_rank, config.vocab_size, config.hidden_size)
        # [B-1, R, D] and [B-1, V, R]: the last loop exits through the head as it is.
        early = recursion.num_loops - 1
        self.head_lora_a = nn.Parameter(torch.empty(early, rank, config.hidden_size)) if rank else None
        self.head_lora_b = nn.Parameter(torch.empty(early, config.vocab_size, rank)) if rank else None

    def forward(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        branches: Tensor | None = None,
        cache: Cache | None = None,
        exit_loop: int | None = None,
    ) -> Tensor:
        """Logits of every position.

        Args:
            input_ids: [batch, T] int64.
            attention_mask: bool or 0/1 [batch, S], false on left padding; S counts the cached positions too.
            positions, branches: int64 and int32 [batch, T], both or none, without mask and cache: several texts in a
                row that begin alike. A token sees those before it that are of branch 0, the beginning, or of its own
                branch, and `positions` says where in its text it is.
            cache: keys and values of earlier positions; this call's are appended.
            exit_loop: exit after this loop, in [0, B), through the shared norm and head; default the last.

        Returns:
            [batch, T, V] in the parameters' dtype.
        """
        last = self.recursion.num_loops - 1 if exit_loop is None else exit_loop
        exits = self.hidden_states(
            input_ids,
            attention_mask=attention_mask,
            positions=positions,
            branches=branches,
            cache=cache,
            num_loops=last + 1,
        )
        return self.logits(exits[-1], last)

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        branches: Tensor | None = None,
        cache: Cache | None = None,
        num_loops: int | None = None,
        asked: Tensor | None = None,
    ) -> list[Tensor]:
        """The states [batch, T, D] after each of the first `num_loops` loops (default all), before the final norm.

        Args:
            asked: int64 [N], places in [0, batch * T): the last state of these tokens alone, [N, D], is given. What
                follows attention in the last layer is not computed for the others.

        The other arguments are those of `forward`.
        """
        loops = self.recursion.num_loops
        if num_loops is not None and not 1 <= num_loops <= loops:
            raise UserError(
                f"exit_loop: found {num_loops - 1} (num_loops {num_loops}); expected a loop in [0, {loops})"
            )
        x = self.embed_tokens(input_ids)
        mask: Tensor | Branches | None
        if positions is None and branches is None:
            past = 0 if cache is None else cache.length
            positions, mask = self._positions_and_mask(input_ids, past, attention_mask)
        else:
            given = {"positions": positions, "branches": branches, "attention_mask": attention_mask, "cache": cache}
            found = [name for name, value in given.items() if value is not None]
            if positions is None or branches is None or len(found) > 2:
                raise UserError(f"positions and branches: found {', '.join(found)}; expected these two, or neither")
            mask = self._mask_of_branches(input_ids, positions, branches)
        rope = rope_cos_sin(self.config, positions, x.dtype)
        exits: list[Tensor] = self.stack(x, rope, mask, cache, num_loops, asked)
        if cache is not None:
            cache.advance(input_ids.shape[1])
        return exits

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """input_ids [...] -> what the first loop reads, [..., D]."""
        x = F.embedding(input_ids, self.embed)
        if self.config.scale_embeddings:
            # The factor is rounded to the model's dtype first, as the published Gemma code does.
            x = x * torch.tensor(math.sqrt(self.config.hidden_size), dtype=x.dtype)
        return x

    def logits(self, hidden: Tensor, loop: int | None = None) -> Tensor:
        """Final norm and head, with its LoRA for an exit after `loop` (default the last): [..., D] -> [..., V]."""
        normed = self.norm(hidden)
        logits = precision.upcasting_linear(normed, self.head_weight)
        if self.head_lora_a is None or self.head_lora_b is None or loop in (None, self.recursion.num_loops - 1):
            return logits
        return logits + precision.upcasting_linear(
            precision.upcasting_linear(normed, self.head_lora_a[loop]), self.head_lora_b[loop]
        )

    @property
    def head_weight(self) -> nn.Parameter:
        """The head's matrix [V, D]: the embedding where they are tied."""
        return self.embed if self.head is None else self.head

    def _positions_and_mask(
        self, input_ids: Tensor, past: int, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Positions [batch or 1, T] and the attention mask, None where plain causal attention is meant."""
        length, device = input_ids.shape[1], input_ids.device
        prefix_length = self.recursion.prefix_length
        queries = torch.arange(past, past + length, device=device)
        if attention_mask is None:
            positions = queries[None]
            if prefix_length == 0 and (past == 0 or length == 1):
                return positions, None
        else:
            expected = (input_ids.shape[0], past + length)
            if tuple(attention_mask.shape) != expected:
                raise UserError(f"attention_mask: found shape {tuple(attention_mask.shape)}; expected {expected}")
            positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        keys = torch.arange(past + length, device=device)
        mask = (keys[None, :] <= queries[:, None])[None, None]
        if attention_mask is not None:
            # A padded query still sees itself: a row without any key would become NaN and spread.
            own = (keys[None, :] == queries[:, None])[None, None]
            mask = mask & attention_mask.bool()[:, None, None, :] | own
        return positions, F.pad(mask, (prefix_length, 0), value=True)

    def _mask_of_branches(self, input_ids: Tensor, positions: Tensor, branches: Tensor) -> Tensor | Branches:
        for name, tensor in (("positions", positions), ("branches", branches)):
            if tensor.shape != input_ids.shape:
                expected = tuple(input_ids.shape)
                raise UserError(f"{name}: found shape {tuple(tensor.shape)}; expected {expected}, as input_ids")
        seen, prefix_length = Branches(branches.int().contiguous()), self.recursion.prefix_length
        if prefix_length == 0 and ops.has_native_kernels(self.embed):
            return seen
        return F.pad(seen.mask(), (prefix_length, 0), value=True)

    def set_merge(self, merge: bool | None) -> None:
        """Compute every LoRA merged into its weight, or as separate products; None: as is cheaper for the rows."""
        for module in self.modules():
            if isinstance(module, LoopLinear):
                module.merge = merge

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Initialise for training from scratch: normal weights, identity norms, zero biases and LoRA B.

        Linears get a standard deviation of 1/sqrt(D) (0.022 at D = 2048), those that write to the residual stream
        1/sqrt(2 L D), the head 0.02. An embedding that is not the head gets 1, so that a token's own vector is not
        drowned by what the first layers add to it (a small model learns several times slower at 0.02).
        """
        generator = torch.Generator(device=self.embed.device).manual_seed(seed)
        width, depth = self.config.hidden_size, self.config.num_layers
        for name, parameter in self.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            if leaf in ("bias", "lora_b", "head_lora_b"):
                parameter.zero_()
            elif "norm" in name:
                parameter.fill_(0.0 if self.config.norm_type == "rmsnorm_1p" else 1.0)
            elif leaf in ("embed", "head"):
                untied_embedding = leaf == "embed" and self.head is not None
                parameter.normal_(0.0, 1.0 if untied_embedding else 0.02, generator=generator)
            else:
                residual = name.endswith((".out.weight", ".down.weight"))
                std = (2 * depth * width if residual else width) ** -0.5
                parameter.normal_(0.0, std, generator=generator)


def _only(asked: Tensor | None, x: Tensor) -> Tensor:
    """Of x [batch, T, D] the tokens asked, [N, D]; None: all, as they are."""
    return x if asked is None else x.flatten(0, 1)[asked]


def _linear(config: ModelConfig, recursion: RecursiveConfig, inputs: int, outputs: int, rank: int) -> LoopLinear:
    return LoopLinear(
        inputs,
        outputs,
        num_loops=recursion.num_loops,
        rank=rank,
        bias=config.use_bias,
        untie_bias=recursion.untie_norms,
    )
