"""Facts about each family's published files: one entry of `FAMILIES` is all that a family with these parts needs.

:mod:`rrt.checkpoint.hf_config` reads `config.json` by them, :mod:`rrt.checkpoint.hf_layout` names tensors.
"""

from dataclasses import dataclass, field
from typing import Any

from rrt.model.config import Family


@dataclass(frozen=True)
class FamilyFacts:
    """Names and defaults of a family's files, as transformers defines them.

    Attributes:
        architecture: the class in `architectures` of `config.json`.
        fixed: fields of `ModelConfig` that are the same for all models of the family.
        defaults: fields of `config.json` with the values that absence means.
        activations: values of `hidden_act` and our names for them.
        config_names: where a field of `ModelConfig` has another name in `config.json` than in Llama's.
        own_keys: fields of `config.json` that Llama has not.
        layer: names of the tensors in ``BODY.layers.N``, without ``.weight`` and ``.bias``, and ours; several of ours
            are one matrix, interleaved per head.
        body, embed, final_norm: of the embedding ``BODY.EMBED``, and of the last norm.
        head_keys: of the output matrix, as published first.
        layer_constants: tensors in old checkpoints that hold nothing learnt.
    """

    architecture: str
    fixed: dict[str, Any]
    defaults: dict[str, Any]
    layer: dict[str, str]
    activations: dict[str, str] = field(
        default_factory=lambda: {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
    )
    config_names: dict[str, str] = field(default_factory=dict)
    own_keys: frozenset[str] = frozenset()
    body: str = "model"
    embed: str = "embed_tokens"
    final_norm: str = "norm"
    head_keys: tuple[str, ...] = ("lm_head.weight",)
    layer_constants: tuple[str, ...] = ("self_attn.rotary_emb.inv_freq",)


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
_LLAMA = {
    "gated_mlp": True,
    "norm_type": "rmsnorm",
    "rotary_fraction": 1.0,
    "parallel_residual": False,
    "scale_embeddings": False,
}
_LLAMA_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
_QWEN_DEFAULTS = _LLAMA_DEFAULTS | {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
_WINDOW_KEYS = frozenset(("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"))
_NO_BIAS = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}

FAMILIES: dict[Family, FamilyFacts] = {
    "gemma": FamilyFacts(
        architecture="GemmaForCausalLM",
        fixed=_LLAMA | {"norm_type": "rmsnorm_1p", "scale_embeddings": True, "mlp_bias": False},
        defaults=_LLAMA_DEFAULTS
        | {"head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True, "hidden_act": "gelu"},
        # Published Gemma configs say "gelu" in hidden_act and mean the tanh form.
        activations={"gelu": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
        own_keys=frozenset(("hidden_activation",)),
        layer=_LLAMA_LAYER,
    ),
    "llama": FamilyFacts(
        architecture="LlamaForCausalLM",
        fixed=_LLAMA,
        defaults=_LLAMA_DEFAULTS,
        layer=_LLAMA_LAYER,
    ),
    "mistral": FamilyFacts(
        architecture="MistralForCausalLM",
        fixed=_LLAMA | _NO_BIAS,
        defaults=_LLAMA_DEFAULTS
        | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        own_keys=frozenset(("sliding_window",)),
        layer=_LLAMA_LAYER,
    ),
    "qwen2": FamilyFacts(
        architecture="Qwen2ForCausalLM",
        fixed=_LLAMA | {"qkv_bias": True, "out_bias": False, "mlp_bias": False},
        defaults=_QWEN_DEFAULTS,
        own_keys=_WINDOW_KEYS,
        layer=_LLAMA_LAYER,
    ),
    "qwen3": FamilyFacts(
        architecture="Qwen3ForCausalLM",
        fixed=_LLAMA | {"mlp_bias": False, "qk_norm": True},
        defaults=_QWEN_DEFAULTS | {"head_dim": 128},
        own_keys=_WINDOW_KEYS,
        layer=_LLAMA_LAYER | {"self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm"},
    ),
    "gpt_neox": FamilyFacts(
        architecture="GPTNeoXForCausalLM",
        fixed={"gated_mlp": False, "norm_type": "layernorm", "scale_embeddings": False, "mlp_bias": True},
        defaults={
            "layer_norm_eps": 1e-5,
            "rotary_emb_base": 10000.0,
            "rotary_pct": 0.25,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "hidden_act": "gelu",
            "attention_bias": True,
            "use_parallel_residual": True,
        },
        config_names={
            "norm_eps": "layer_norm_eps",
            "rope_theta": "rotary_emb_base",
            "rotary_fraction": "rotary_pct",
        },
        own_keys=frozenset(("use_parallel_residual", "partial_rotary_factor")),
        layer={
            "input_layernorm": "attn_norm",
            "attention.query_key_value": "attn.q attn.k attn.v",
            "attention.dense": "attn.out",
            "post_attention_layernorm": "mlp_norm",
            "mlp.dense_h_to_4h": "mlp.up",
            "mlp.dense_4h_to_h": "mlp.down",
        },
        body="gpt_neox",
        embed="embed_in",
        final_norm="final_layer_norm",
        # A state_dict of transformers from version 5 calls this head as it calls the others'.
        head_keys=("embed_out.weight", "lm_head.weight"),
        layer_constants=("attention.bias", "attention.masked_bias", "attention.rotary_emb.inv_freq"),
    ),
}
