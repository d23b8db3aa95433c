"""Decoders of the Llama, Gemma and GPT-NeoX kinds, vanilla, recursive or relaxed, in one file.

The whole method: `LoopedStack` holds K shared layers and runs them B times; each linear adds the LoRA of
the loop it runs in (:class:`rrt.model.loop_linear.LoopLinear`). A vanilla model is one loop over all its layers.

Shapes, used across the package: batch sequences of T tokens, S keys, M rows, D model width, H query heads,
H_kv key/value heads, D_h head width, L depth, B loops, K shared layers per loop, R LoRA rank, V vocabulary,
P prefix length. Depth l runs the layer and loop `RecursiveConfig.places[l]`, by default l = loop * K + layer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rrt import ops
from rrt.errors import UserError
from rrt.model.config import ModelConfig, RecursiveConfig, linear_shapes
from rrt.model.loop_linear import LoopLinear
from rrt.ops import precision

Checkpointing = Literal["none", "layer", "loop"]
"""The unit that keeps only its input in the forward of training and is recomputed in the backward."""


@dataclass(frozen=True)
class ForwardContext:
    """Inputs that all layers and loops of one forward share: rotary angles, and which tokens each query sees.

    Without `mask` and `seen_until`, attention is plainly causal.
    """

    rope: tuple[Tensor, Tensor]
    """Cosines and sines [batch or 1, T, rotary_dim / 2], see `rope_cos_sin`."""
    mask: Tensor | None = None
    """bool [batch or 1, 1, T, P + T]; true where a query sees a key, prefix vectors first."""
    seen_until: Tensor | None = None
    """int32 [batch, T], contiguous: stands for `ops.packed_texts_mask` where the native operator takes it."""


class Norm(nn.Module):
    """RMSNorm, Gemma's RMSNorm with (1 + weight), or LayerNorm; computed in fp32 (fp64 for fp64 input)."""

    def __init__(self, config: ModelConfig, num_loops: int = 1, width: int | None = None) -> None:
        super().__init__()
        self.kind = config.norm_type
        self.eps = config.norm_eps
        width = config.hidden_size if width is None else width
        shape = (width,) if num_loops == 1 else (num_loops, width)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.empty(shape)) if self.kind == "layernorm" else None

    def forward(self, x: Tensor, loop: int | Tensor = 0) -> Tensor:
        """Normalise the last dimension of x.

        `loop` is one for all, or an int32 tensor [M] with one for each row of x [M, D] or [M, heads, D_h].
        """
        weight = _of_loop(self.weight, loop, x)
        if self.kind == "layernorm":
            bias = None if self.bias is None else _of_loop(self.bias, loop, x)
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


def rope_frequencies(config: ModelConfig, device: torch.device) -> Tensor:
    """Compute the rotary frequencies, fp32 [rotary_dim / 2], in radians per position."""
    exponents = torch.arange(0, config.rotary_dim, 2, device=device, dtype=torch.float32)
    frequencies = 1.0 / (config.rope_theta ** (exponents / config.rotary_dim))
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.original_max_position_embeddings is None:
        return frequencies / scaling.factor
    assert scaling.low_freq_factor is not None and scaling.high_freq_factor is not None
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return kept * frequencies + (1.0 - kept) * frequencies / scaling.factor


def rope_cos_sin(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute rotary cosines and sines [batch or 1, T, rotary_dim / 2] of `positions` [batch or 1, T]."""
    angles = positions[..., None].float() * rope_frequencies(config, positions.device)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rope_table(config: ModelConfig, num_positions: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make the native operators' `cos_sin` [num_positions, rotary_dim]: each position's cosines, then its sines.

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
    """Causal attention with separate q, k, v projections (MHA, GQA, MQA), optional q and k norms and prefix vectors."""

    def __init__(self, config: ModelConfig, recursion: RecursiveConfig, index: int) -> None:
        super().__init__()
        self.config = config
        self.q, self.k, self.v = (
            _linear(config, recursion, index, f"attn.{name}", config.qkv_bias) for name in ("q", "k", "v")
        )
        self.out = _linear(config, recursion, index, "attn.out", config.out_bias)
        norm_loops = recursion.num_loops if recursion.untie_norms else 1
        self.q_norm = Norm(config, norm_loops, config.head_dim) if config.qk_norm else None
        self.k_norm = Norm(config, norm_loops, config.head_dim) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        loop: int,
        context: ForwardContext,
        prefix: Tensor | None = None,
        selected_tokens: Tensor | None = None,
    ) -> Tensor:
        """Attend within x [batch, T, D] and to prefix [P, D] -> [batch, T, D], or [N, D] of the selected tokens."""
        return self.out(_select(self.mix(x, loop, context, prefix), selected_tokens), loop)

    def mix(self, x: Tensor, loop: int, context: ForwardContext, prefix: Tensor | None = None) -> Tensor:
        """Compute the heads' results [batch, T, H * D_h], the input of `out`; x and prefix as in `forward`."""
        q, k, v = (self._split_heads(linear(x, loop)) for linear in (self.q, self.k, self.v))
        q, k = self.normalize(q, k, loop)
        q, k = apply_rope(q, *context.rope), apply_rope(k, *context.rope)
        if prefix is not None:
            # Prefix keys carry no position: every query sees them alike.
            prefix_k, prefix_v = (heads.expand(len(x), -1, -1, -1) for heads in self.prefix_heads(prefix, loop))
            k, v = torch.cat((prefix_k, k), dim=1), torch.cat((prefix_v, v), dim=1)
        if context.seen_until is not None or (context.mask is None and ops.prefers_native_attention(q)):
            y = ops.causal_attention(q, k, v, self.config.head_dim**-0.5, context.seen_until)
        else:
            q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=context.mask, is_causal=context.mask is None, enable_gqa=k.shape[1] != q.shape[1]
            ).transpose(1, 2)
        return y.flatten(2)

    def normalize(self, q: Tensor, k: Tensor, loop: int | Tensor) -> tuple[Tensor, Tensor]:
        """Apply the q and k norms, if there are any, to heads [..., H, D_h] and [..., H_kv, D_h]."""
        if self.q_norm is None or self.k_norm is None:
            return q, k
        return self.q_norm(q, loop), self.k_norm(k, loop)

    def prefix_heads(self, prefix: Tensor, loop: int) -> tuple[Tensor, Tensor]:
        """Compute keys and values [P, H_kv, D_h] of prefix vectors [P, D]."""
        k, v = self._split_heads(self.k(prefix, loop)), self._split_heads(self.v(prefix, loop))
        return k if self.k_norm is None else self.k_norm(k, loop), v

    def _split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim))


class MLP(nn.Module):
    """GeGLU, SwiGLU (`gated_mlp`) or the plain two-matrix feed-forward."""

    def __init__(self, config: ModelConfig, recursion: RecursiveConfig, index: int) -> None:
        super().__init__()
        self.activation = config.activation
        self.gate = _linear(config, recursion, index, "mlp.gate", config.mlp_bias) if config.gated_mlp else None
        self.up = _linear(config, recursion, index, "mlp.up", config.mlp_bias)
        self.down = _linear(config, recursion, index, "mlp.down", config.mlp_bias)

    def forward(self, x: Tensor, loop: int) -> Tensor:
        return self.down(self.inner(x, loop), loop)

    def inner(self, x: Tensor, loop: int) -> Tensor:
        """Compute the input [..., intermediate_size] of `down`."""
        if self.gate is None:
            return self.activate(self.up(x, loop))
        return self._gated_linears(self.gate, self.up, x, loop)

    def _gated_linears(self, gate: LoopLinear, up: LoopLinear, x: Tensor, loop: int) -> Tensor:
        if not (gate.packed and up.packed and self.gates_natively(x)):
            return self.gated(gate(x, loop), up(x, loop))
        biases = gate.loop_bias(loop), up.loop_bias(loop)
        return ops.packed_gated_linear(x, gate.packed[loop], up.packed[loop], *biases, up.out_features, self.activation)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """Multiply the activation of `gate` by `up`."""
        if self.gates_natively(gate):
            return ops.gated_activation(gate, up, self.activation)
        return self.activate(gate) * up

    def gates_natively(self, x: Tensor) -> bool:
        """True if `gated` is a native operator, whose result for an element does not depend on its place in x."""
        return self.activation in ops.GATED_ACTIVATIONS and ops.has_native_kernels(x)

    def activate(self, x: Tensor) -> Tensor:
        if self.activation == "silu":
            return F.silu(x)
        return F.gelu(x, approximate="tanh" if self.activation == "gelu_tanh" else "none")


class Layer(nn.Module):
    """One shared decoder layer, sequential or with parallel residual; `index` in [0, K)."""

    def __init__(self, config: ModelConfig, recursion: RecursiveConfig, index: int) -> None:
        super().__init__()
        norm_loops = recursion.num_loops if recursion.untie_norms else 1
        self.parallel_residual = config.parallel_residual
        self.attn_norm = Norm(config, norm_loops)
        self.attn = Attention(config, recursion, index)
        self.mlp_norm = Norm(config, norm_loops)
        self.mlp = MLP(config, recursion, index)

    def forward(
        self,
        x: Tensor,
        loop: int,
        context: ForwardContext,
        prefix: Tensor | None = None,
        selected_tokens: Tensor | None = None,
    ) -> Tensor:
        """Run the layer at `loop`: x [batch, T, D] -> [batch, T, D], or [N, D] of the selected tokens."""
        attended = self.attn(self.attn_norm(x, loop), loop, context, prefix, selected_tokens)
        x = _select(x, selected_tokens)
        if self.parallel_residual:
            return x + attended + self.mlp(self.mlp_norm(x, loop), loop)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x, loop), loop)


class LoopedStack(nn.Module):
    """K shared layers that run B times; exits are taken from the hidden state after each loop.

    Where the loops of a layer follow each other (sharing "sequence"), a loop here is the next K depths.
    """

    def __init__(self, config: ModelConfig, recursion: RecursiveConfig) -> None:
        super().__init__()
        self.num_loops = recursion.num_loops
        recursion.check_fits(config)
        self.places = recursion.places(config)
        self.layers = nn.ModuleList(Layer(config, recursion, k) for k in range(recursion.layers_per_loop(config)))
        self.checkpointing: Checkpointing = "none"
        shape = (config.num_layers, recursion.prefix_length, config.hidden_size)
        self.prefix = nn.Parameter(torch.empty(shape)) if recursion.prefix_length else None

    def forward(
        self,
        x: Tensor,
        context: ForwardContext,
        num_loops: int | None = None,
        selected_tokens: Tensor | None = None,
    ) -> list[Tensor]:
        """Run the first `num_loops` loops (default all): x [batch, T, D] -> the state [batch, T, D] after each.

        The last of them holds only the selected tokens, [N, D], if any are named.
        """
        num_loops = self.num_loops if num_loops is None else num_loops
        exits = []
        for loop in range(num_loops):
            selected = selected_tokens if loop == num_loops - 1 else None
            x = self._run("loop", self._run_loop, x, loop, context, selected)
            exits.append(x)
        return exits

    def _run_loop(self, x: Tensor, loop: int, context: ForwardContext, selected_tokens: Tensor | None) -> Tensor:
        first, end = loop * len(self.layers), (loop + 1) * len(self.layers)
        for depth, place in enumerate(self.places[first:end], first):
            prefix = None if self.prefix is None else self.prefix[depth]
            selected = selected_tokens if depth == end - 1 else None
            x = self._run("layer", self.layers[place.layer], x, place.loop, context, prefix, selected)
        return x

    def _run(self, unit: Checkpointing, function: Callable[..., Tensor], *args: object) -> Tensor:
        """Call `function(*args)`; if it is the unit of checkpointing, its backward recomputes its activations."""
        if self.checkpointing != unit or not torch.is_grad_enabled():
            return function(*args)
        # The re-entrant kind silently loses the parameters' gradients under FSDP. No dropout: no random state.
        output: Tensor = checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
        return output


class RecursiveTransformer(nn.Module):
    """The language model. `forward(input_ids)` gives logits; see :func:`rrt.load_model` to get one.

    Raises:
        UserError: from the constructor, if `num_loops` does not divide `num_layers` or a matrix's rank is not possible.
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
        # [B-1, R, D] and [B-1, V, R]: the last loop exits through the head alone.
        early = recursion.num_loops - 1
        self.head_lora_a = nn.Parameter(torch.empty(early, rank, config.hidden_size)) if rank else None
        self.head_lora_b = nn.Parameter(torch.empty(early, config.vocab_size, rank)) if rank else None
        # [B-1, D, D] and [B-1, D]
        width, translates = config.hidden_size, recursion.exit_translators
        self.exit_translator_weight = nn.Parameter(torch.empty(early, width, width)) if translates else None
        self.exit_translator_bias = nn.Parameter(torch.empty(early, width)) if translates else None

    def forward(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        seen_until: Tensor | None = None,
        exit_loop: int | None = None,
    ) -> Tensor:
        """Compute the logits of every position, each from the tokens up to it.

        Args:
            input_ids: [batch, T] int64.
            positions, seen_until: int64 and int32 [batch, T], both or neither, for several texts packed into one row;
                those that begin alike come after what they share. `positions` are those in the unpacked texts, and
                `seen_until` the index of the first token after each that does not see it.
            exit_loop: exit after this loop, in [0, B), as `logits` says; default the last.

        Returns:
            [batch, T, V] in the parameters' dtype.

        Raises:
            UserError: `exit_loop` is out of range, `positions` and `seen_until` do not fit `input_ids`, or a text is
                longer than the base's sliding window.
        """
        loops = self.recursion.num_loops
        last = loops - 1 if exit_loop is None else exit_loop
        if not 0 <= last < loops:
            raise UserError(f"exit_loop: found {last}; expected a loop in [0, {loops})")
        if last != loops - 1:
            self.recursion.require_whole_loops(f"exit_loop: found {last}")
        exits = self.hidden_states(input_ids, positions=positions, seen_until=seen_until, num_loops=last + 1)
        return self.logits(exits[-1], last)

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        seen_until: Tensor | None = None,
        num_loops: int | None = None,
        selected_tokens: Tensor | None = None,
    ) -> list[Tensor]:
        """Compute the states [batch, T, D] after each of the first `num_loops` loops (default all), before the norm.

        Args:
            selected_tokens: int64 [N], indices in [0, batch * T): the last state is that of these tokens alone,
                [N, D]. The others skip the last layer after its attention.

        The other arguments and errors are those of `forward`.
        """
        loops = self.recursion.num_loops
        if num_loops is not None and not 1 <= num_loops <= loops:
            raise UserError(f"num_loops: found {num_loops}; expected 1 to {loops}")
        if num_loops not in (None, loops):
            self.recursion.require_whole_loops(f"num_loops: found {num_loops} of {loops}")
        x = self.embed_tokens(input_ids)
        exits: list[Tensor] = self.stack(x, self._context(x, positions, seen_until), num_loops, selected_tokens)
        return exits

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """Embed input_ids [...] -> [..., D], the input of loop 0."""
        x = F.embedding(input_ids, self.embed)
        if self.config.scale_embeddings:
            # The factor is rounded to the model's dtype first, as the published Gemma code does.
            x = x * torch.tensor(math.sqrt(self.config.hidden_size), dtype=x.dtype)
        return x

    def logits(self, hidden: Tensor, loop: int | None = None) -> Tensor:
        """Apply the final norm and the head, with what an exit after `loop` (default the last) has: -> [..., V].

        An exit before the last may have a translator, see `head_input`, and a LoRA on the head.
        """
        normed = self.head_input(hidden, loop)
        logits = precision.upcasting_linear(normed, self.head_weight)
        if self.head_lora_a is None or self.head_lora_b is None or self._is_last(loop):
            return logits
        return logits + precision.upcasting_linear(
            precision.upcasting_linear(normed, self.head_lora_a[loop]), self.head_lora_b[loop]
        )

    def head_input(self, hidden: Tensor, loop: int | None = None) -> Tensor:
        """Compute what the head reads of the state after `loop` (default the last): [..., D] -> [..., D].

        That is norm(h), or of an exit with a translator T_b norm(h) + c_b, which predicts norm(h) of the last loop.
        """
        normed = self.norm(hidden)
        if self.exit_translator_weight is None or self.exit_translator_bias is None or self._is_last(loop):
            return normed
        return precision.upcasting_linear(normed, self.exit_translator_weight[loop], self.exit_translator_bias[loop])

    def _is_last(self, loop: int | None) -> bool:
        return loop is None or loop == self.recursion.num_loops - 1

    @property
    def head_weight(self) -> nn.Parameter:
        """The head's matrix [V, D]: the embedding where they are tied."""
        return self.embed if self.head is None else self.head

    def _context(self, x: Tensor, positions: Tensor | None, seen_until: Tensor | None) -> ForwardContext:
        """Make the context of a forward of x [batch, T, D]."""
        expected, prefix_length = tuple(x.shape[:2]), self.recursion.prefix_length
        for name, tensor in (("positions", positions), ("seen_until", seen_until)):
            if tensor is not None and tensor.shape != expected:
                raise UserError(f"{name}: found shape {tuple(tensor.shape)}; expected {expected}, as input_ids")
        if (positions is None) != (seen_until is None):
            found = "positions" if seen_until is None else "seen_until"
            raise UserError(f"positions and seen_until: found {found} alone; expected both, or neither")
        self._check_window(expected[1], positions)
        if positions is None or seen_until is None:
            rope = rope_cos_sin(self.config, torch.arange(expected[1], device=x.device)[None], x.dtype)
            if prefix_length == 0:
                return ForwardContext(rope)
            seen_until = torch.full((1, expected[1]), expected[1], dtype=torch.int32, device=x.device)
        else:
            rope, seen_until = rope_cos_sin(self.config, positions, x.dtype), seen_until.int().contiguous()
            if prefix_length == 0 and ops.has_native_kernels(x):
                return ForwardContext(rope, seen_until=seen_until)
        return ForwardContext(rope, F.pad(ops.packed_texts_mask(seen_until), (prefix_length, 0), value=True))

    def _check_window(self, length: int, positions: Tensor | None) -> None:
        window = self.config.sliding_window
        if window is None or length <= window:
            return
        longest = length if positions is None else int(positions.max()) + 1
        if longest > window:
            raise UserError(
                f"input_ids: found a text of {longest} tokens; expected at most sliding_window = {window}: the base "
                "sees no further back, and windows are not implemented"
            )

    def set_merge(self, merge: bool | None) -> None:
        """Compute every LoRA merged into its weight, as separate products, or (None) by the cheaper of the two."""
        for module in self.modules():
            if isinstance(module, LoopLinear):
                module.merge = merge

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> None:
        """Initialise for training from scratch: normal weights, identity norms, zero biases and LoRA B.

        Linears get a standard deviation of 1/sqrt(D) (0.022 at D = 2048), those that write to the residual stream
        1/sqrt(2 L D), the head 0.02. An embedding that is not the head gets 1, so that a token's own vector is not
        drowned by the outputs of the first layers (a small model learns several times slower at 0.02). Exit translators
        begin as the identity.
        """
        generator = torch.Generator(device=self.embed.device).manual_seed(seed)
        width, depth = self.config.hidden_size, self.config.num_layers
        for name, parameter in self.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            if leaf in ("bias", "lora_b", "head_lora_b", "exit_translator_bias"):
                parameter.zero_()
            elif leaf == "exit_translator_weight":
                parameter.copy_(torch.eye(width).expand_as(parameter))
            elif "norm" in name:
                parameter.fill_(0.0 if self.config.norm_type == "rmsnorm_1p" else 1.0)
            elif leaf in ("embed", "head"):
                untied_embedding = leaf == "embed" and self.head is not None
                parameter.normal_(0.0, 1.0 if untied_embedding else 0.02, generator=generator)
            else:
                residual = name.endswith((".out.weight", ".down.weight"))
                std = (2 * depth * width if residual else width) ** -0.5
                parameter.normal_(0.0, std, generator=generator)


def _select(x: Tensor, tokens: Tensor | None) -> Tensor:
    """Take the rows [N, D] of x [batch, T, D] at `tokens`; None takes x as it is."""
    return x if tokens is None else x.flatten(0, 1)[tokens]


def _of_loop(parameter: Tensor, loop: int | Tensor, x: Tensor) -> Tensor:
    """Return a norm's parameter [D], or of parameters kept per loop [B, D] what `loop` selects for x: [D] or [M, D]."""
    if parameter.dim() == 1:
        return parameter
    chosen = parameter[loop]
    return chosen[:, None] if chosen.dim() == 2 and x.dim() == 3 else chosen


def _linear(config: ModelConfig, recursion: RecursiveConfig, layer: int, name: str, bias: bool) -> LoopLinear:
    outputs, inputs = linear_shapes(config)[name]
    return LoopLinear(
        inputs,
        outputs,
        num_loops=recursion.num_loops,
        rank=recursion.lora_rank.of(config, layer, name),
        bias=bias,
        untie_bias=recursion.untie_norms,
        low_rank_only=recursion.low_rank_only,
    )
