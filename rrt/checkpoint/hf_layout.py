"""Tensors of a published checkpoint: names, shapes, and the parameters of ours that they hold.

Nothing here reads tensors: :mod:`rrt.checkpoint.source` and :mod:`rrt.folding.unroll` do, by these tables.
"""

from dataclasses import dataclass

from rrt.checkpoint.families import FAMILIES
from rrt.model.config import ModelConfig


@dataclass(frozen=True)
class HFTensor:
    """One tensor of an HF checkpoint and the parameters of our vanilla model that it holds.

    Three `targets` (q, k, v) mean a fused matrix, interleaved per head: [H, 3, D_h, ...].
    """

    key: str
    shape: tuple[int, ...]
    targets: tuple[str, ...]


def constant_keys(config: ModelConfig) -> dict[str, str]:
    """List keys to skip, which a checkpoint may hold besides `tensor_table`'s: key -> its name within a layer."""
    facts = FAMILIES[config.family]
    return {
        f"{facts.body}.layers.{depth}.{name}": name
        for depth in range(config.num_layers)
        for name in facts.layer_constants
    }


def tensor_table(config: ModelConfig) -> list[HFTensor]:
    """List every tensor of the family's HF checkpoint at this size, layer by layer, with shapes and targets."""
    facts = FAMILIES[config.family]
    width, inner = config.hidden_size, config.intermediate_size
    q_width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "attn_norm": (width,),
        "mlp_norm": (width,),
        "attn.q_norm": (config.head_dim,),
        "attn.k_norm": (config.head_dim,),
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
    table = [HFTensor(f"{facts.body}.{facts.embed}.weight", (config.vocab_size, width), ("embed",))]
    for depth in range(config.num_layers):
        for hf_name, names in facts.layer.items():
            has_bias = has_norm_bias if "norm" in names else _has_bias(config, names)
            for leaf in ("weight", "bias") if has_bias else ("weight",):
                table.append(
                    HFTensor(
                        f"{facts.body}.layers.{depth}.{hf_name}.{leaf}",
                        shapes[names] if leaf == "weight" else shapes[names][:1],
                        tuple(f"stack.layers.{depth}.{name}.{leaf}" for name in names.split()),
                    )
                )
    for leaf in ("weight", "bias") if has_norm_bias else ("weight",):
        table.append(HFTensor(f"{facts.body}.{facts.final_norm}.{leaf}", (width,), (f"norm.{leaf}",)))
    if not config.tie_embeddings:
        table.append(HFTensor(facts.head_keys[0], (config.vocab_size, width), ("head",)))
    return table


def _has_bias(config: ModelConfig, linear: str) -> bool:
    if linear.startswith("mlp."):
        return config.mlp_bias
    return config.out_bias if linear == "attn.out" else config.qkv_bias
