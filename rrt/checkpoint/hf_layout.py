"""Published tensor layouts of the three families, as tables of names and shapes.

Nothing here reads tensors: :mod:`rrt.checkpoint.source` and :mod:`rrt.folding.unroll` do, by these tables.
"""

from dataclasses import dataclass

from rrt.model.config import Family, ModelConfig


@dataclass(frozen=True)
class HFTensor:
    """One tensor of an HF checkpoint and the parameters of our vanilla model that it holds.

    Three `targets` (q, k, v) mean a fused matrix, interleaved per head: [H, 3, D_h, ...].
    """

    key: str
    shape: tuple[int, ...]
    targets: tuple[str, ...]


_LLAMA_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn.q",
    "self_attn.k_proj": "attn.k",
    "self_attn.v_proj": "attn.v",
    "self_attn.o_proj": "attn.out",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.gate",
    "mlp.up_proj": "mlp.up",
    "mlp.down_proj": "mlp.down",
}
_NEOX_LAYER = {
    "input_layernorm": "attn_norm",
    "attention.query_key_value": "attn.q attn.k attn.v",
    "attention.dense": "attn.out",
    "post_attention_layernorm": "mlp_norm",
    "mlp.dense_h_to_4h": "mlp.up",
    "mlp.dense_4h_to_h": "mlp.down",
}
_LAYER_TABLES: dict[Family, dict[str, str]] = {"gemma": _LLAMA_LAYER, "llama": _LLAMA_LAYER, "gpt_neox": _NEOX_LAYER}
_LAYER_PREFIX: dict[Family, str] = {"gemma": "model.layers", "llama": "model.layers", "gpt_neox": "gpt_neox.layers"}
_EMBED: dict[Family, str] = {
    "gemma": "model.embed_tokens",
    "llama": "model.embed_tokens",
    "gpt_neox": "gpt_neox.embed_in",
}
_FINAL_NORM: dict[Family, str] = {"gemma": "model.norm", "llama": "model.norm", "gpt_neox": "gpt_neox.final_layer_norm"}
# As published first. A state_dict of transformers from version 5 calls GPT-NeoX's head as it calls the others'.
HEAD_KEYS: dict[Family, tuple[str, ...]] = {
    "gemma": ("lm_head.weight",),
    "llama": ("lm_head.weight",),
    "gpt_neox": ("embed_out.weight", "lm_head.weight"),
}
# Constants of a layer that old checkpoints carry along; they hold nothing that was learnt.
_LAYER_CONSTANTS: dict[Family, tuple[str, ...]] = {
    "gemma": ("self_attn.rotary_emb.inv_freq",),
    "llama": ("self_attn.rotary_emb.inv_freq",),
    "gpt_neox": ("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
}


def constant_keys(config: ModelConfig) -> dict[str, str]:
    """List keys to skip, which a checkpoint may hold besides `tensor_table`'s: key -> its name without the layer."""
    prefix = _LAYER_PREFIX[config.family]
    names = _LAYER_CONSTANTS[config.family]
    shared = f"{prefix.removesuffix('.layers')}.rotary_emb.inv_freq"  # where it was kept once for all layers
    of_layers = {f"{prefix}.{depth}.{name}": name for depth in range(config.num_layers) for name in names}
    return {shared: shared, **of_layers}


def tensor_table(config: ModelConfig) -> list[HFTensor]:
    """List every tensor of the family's HF checkpoint at this size, layer by layer, with shapes and targets."""
    width, inner = config.hidden_size, config.intermediate_size
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "attn_norm": (width,),
        "mlp_norm": (width,),
        "attn.q": (q_width, width),
        "attn.k": (kv_width, width),
        "attn.v": (kv_width, width),
        "attn.q attn.k attn.v": (3 * q_width, width),
        "attn.out": (width, q_width),
        "mlp.gate": (inner, width),
        "mlp.up": (inner, width),
        "mlp.down": (width, inner),
    }
    has_norm_bias = config.norm_type == "layernorm"
    table = [HFTensor(f"{_EMBED[config.family]}.weight", (config.vocab_size, width), ("embed",))]
    for depth in range(config.num_layers):
        for hf_name, names in _LAYER_TABLES[config.family].items():
            has_bias = has_norm_bias if "norm" in names else config.use_bias
            for leaf in ("weight", "bias") if has_bias else ("weight",):
                table.append(
                    HFTensor(
                        f"{_LAYER_PREFIX[config.family]}.{depth}.{hf_name}.{leaf}",
                        shapes[names] if leaf == "weight" else shapes[names][:1],
                        tuple(f"stack.layers.{depth}.{name}.{leaf}" for name in names.split()),
                    )
                )
    for leaf in ("weight", "bias") if has_norm_bias else ("weight",):
        table.append(HFTensor(f"{_FINAL_NORM[config.family]}.{leaf}", (width,), (f"norm.{leaf}",)))
    if not config.tie_embeddings:
        table.append(HFTensor(HEAD_KEYS[config.family][0], (config.vocab_size, width), ("head",)))
    return table
