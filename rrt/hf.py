"""The published layouts of the three families: `config.json` and tensor names, as tables.

Nothing here reads tensors; :mod:`rrt.loaders` and :mod:`rrt.export` do, by these tables.
"""

from dataclasses import dataclass
from typing import Any

from rrt.config import Family, ModelConfig
from rrt.errors import UserError

ARCHITECTURES: dict[Family, str] = {
    "gemma": "GemmaForCausalLM",
    "llama": "LlamaForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
}

# Keys that do not change what a forward pass computes.
_INERT_KEYS = frozenset(
    """architectures model_type transformers_version _name_or_path torch_dtype dtype use_cache initializer_range
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id classifier_dropout is_decoder id2label label2id
    problem_type output_attentions output_hidden_states return_dict chunk_size_feed_forward pretraining_tp max_length
    min_length do_sample temperature top_p top_k num_return_sequences attn_implementation
    _attn_implementation_autoset task_specific_params tokenizer_class finetuning_task length_penalty
    repetition_penalty num_beams num_beam_groups diversity_penalty""".split()
)
_COMMON_KEYS = frozenset(
    """vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act
    max_position_embeddings tie_word_embeddings rope_parameters head_dim rope_theta""".split()
)
_FAMILY_KEYS: dict[Family, frozenset[str]] = {
    "gemma": frozenset(("num_key_value_heads", "rms_norm_eps", "hidden_activation")),
    "llama": frozenset(("num_key_value_heads", "rms_norm_eps")),
    "gpt_neox": frozenset(
        """layer_norm_eps rotary_pct rotary_emb_base use_parallel_residual attention_bias
        partial_rotary_factor""".split()
    ),
}
# Features that exist but are not implemented here; at these values they are off.
_OFF_VALUES: dict[str, tuple[Any, ...]] = {
    "rope_scaling": (None,),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "attention_dropout": (None, 0, 0.0),
    "hidden_dropout": (None, 0, 0.0),
    "use_bidirectional_attention": (None, False),
    "quantization_config": (None,),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "tie_encoder_decoder": (None, False),
    "pruned_heads": (None, {}),
    "torchscript": (None, False),
}
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


class _HFConfig:
    """Typed access to a parsed HF `config.json`; every failure names the file and the field."""

    def __init__(self, data: dict[str, Any], where: str) -> None:
        self.data, self.where = data, where

    def fail(self, key: str, found: object, expected: str) -> UserError:
        return UserError(f"{self.where}: field '{key}': found {found!r}; expected {expected}")

    def number(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.data.get(key)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{self.where}: missing field '{key}'; expected {kind.__name__}")
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
            raise self.fail(key, value, kind.__name__)
        return kind(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.data.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.fail(key, value, "true or false")
        return default if value is None else value

    def token(self, key: str) -> int | None:
        """A special token's id; of several (newer configs list stop tokens) the first."""
        value = self.data.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self.fail(key, value, "a token id or null")
        return value


def model_config_from_hf(data: dict[str, Any], where: str) -> ModelConfig:
    """The `ModelConfig` of a parsed HF `config.json`, as old or current transformers write it.

    Args:
        where: the file's path, for errors.

    Raises:
        UserError: another architecture, a feature not implemented here (rope scaling, sliding windows,
            biases in Llama, ...), or a key that is not known, each by name: nothing is ignored silently.
    """
    hf = _HFConfig(data, where)
    families: dict[Any, Family] = {"gemma": "gemma", "llama": "llama", "gpt_neox": "gpt_neox"}
    family = families.get(data.get("model_type"))
    if family is None:
        raise hf.fail("model_type", data.get("model_type"), "gemma, llama or gpt_neox")
    architectures = data.get("architectures")
    if architectures and ARCHITECTURES[family] not in architectures:
        raise hf.fail("architectures", architectures, ARCHITECTURES[family])
    _refuse_unimplemented(hf, family)

    heads = hf.number("num_attention_heads", int)
    hidden_size = hf.number("hidden_size", int)
    if "head_dim" not in data and heads > 0 and hidden_size % heads:
        raise hf.fail("num_attention_heads", heads, f"a divisor of hidden_size = {hidden_size}")
    theta, fraction = _rope(hf, family)
    is_neox = family == "gpt_neox"
    config = {
        "family": family,
        "vocab_size": hf.number("vocab_size", int),
        "hidden_size": hidden_size,
        "num_layers": hf.number("num_hidden_layers", int),
        "num_heads": heads,
        "num_kv_heads": heads if is_neox else hf.number("num_key_value_heads", int, default=heads),
        "head_dim": hf.number("head_dim", int, default=256 if family == "gemma" else hidden_size // max(heads, 1)),
        "intermediate_size": hf.number("intermediate_size", int),
        "max_position_embeddings": hf.number(
            "max_position_embeddings", int, default=8192 if family == "gemma" else 2048
        ),
        "activation": _activation(hf, family),
        "gated_mlp": not is_neox,
        "norm_type": {"gemma": "rmsnorm_1p", "llama": "rmsnorm", "gpt_neox": "layernorm"}[family],
        "norm_eps": hf.number("layer_norm_eps", float, 1e-5) if is_neox else hf.number("rms_norm_eps", float, 1e-6),
        "rope_theta": theta,
        "rotary_fraction": fraction,
        "use_bias": is_neox,
        "parallel_residual": is_neox and hf.flag("use_parallel_residual", True),
        "tie_embeddings": hf.flag("tie_word_embeddings", family == "gemma"),
        "scale_embeddings": family == "gemma",
        "bos_token_id": hf.token("bos_token_id"),
        "eos_token_id": hf.token("eos_token_id"),
        "pad_token_id": hf.token("pad_token_id"),
    }
    try:
        return ModelConfig(**config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _refuse_unimplemented(hf: _HFConfig, family: Family) -> None:
    known = _INERT_KEYS | _COMMON_KEYS | _FAMILY_KEYS[family]
    for key, value in hf.data.items():
        if key in known:
            continue
        if key not in _OFF_VALUES:
            raise UserError(
                f"{hf.where}: field '{key}': not known to this version; expected a config.json of "
                f"{ARCHITECTURES[family]} (if the field does not change the model, delete it)"
            )
        if value not in _OFF_VALUES[key]:
            raise hf.fail(key, value, f"{_OFF_VALUES[key][-1]!r}: this feature is not implemented for {family}")
    if family == "gpt_neox" and hf.data.get("attention_bias") is False:
        raise hf.fail("attention_bias", False, "true for gpt_neox")


def _rope(hf: _HFConfig, family: Family) -> tuple[float, float]:
    """(rope_theta, rotary_fraction) from the top level (old) or `rope_parameters` (current)."""
    rope = hf.data.get("rope_parameters")
    if rope is not None and not isinstance(rope, dict):
        raise hf.fail("rope_parameters", rope, "an object")
    nested = _HFConfig(dict(rope or {}), f"{hf.where}: rope_parameters")
    if nested.data.get("rope_type", nested.data.get("type", "default")) != "default":
        raise nested.fail("rope_type", nested.data.get("rope_type", nested.data.get("type")), "'default'")
    extra = sorted(set(nested.data) - {"rope_type", "type", "rope_theta", "partial_rotary_factor"})
    if extra:
        raise nested.fail(extra[0], nested.data[extra[0]], "no such field: not implemented")
    old_theta = hf.number("rotary_emb_base" if family == "gpt_neox" else "rope_theta", float, 10000.0)
    if family != "gpt_neox":
        if nested.data.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise nested.fail("partial_rotary_factor", nested.data["partial_rotary_factor"], f"1.0 for {family}")
        return nested.number("rope_theta", float, old_theta), 1.0
    old_fraction = hf.number("rotary_pct", float, hf.number("partial_rotary_factor", float, 0.25))
    return (
        nested.number("rope_theta", float, hf.number("rope_theta", float, old_theta)),
        nested.number("partial_rotary_factor", float, old_fraction),
    )


def _activation(hf: _HFConfig, family: Family) -> str:
    if family == "gemma":
        # Published Gemma configs say "gelu" in hidden_act and mean the tanh form; hidden_activation wins if set.
        name = hf.data.get("hidden_activation") or hf.data.get("hidden_act") or "gelu_pytorch_tanh"
        if name not in ("gelu", "gelu_pytorch_tanh"):
            raise hf.fail("hidden_activation", name, "'gelu_pytorch_tanh'")
        return "gelu_tanh"
    name = hf.data.get("hidden_act") or {"llama": "silu", "gpt_neox": "gelu"}[family]
    if name not in _ACTIVATIONS:
        raise hf.fail("hidden_act", name, f"one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def model_config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """An HF `config.json` for an unrolled model, readable by old and current transformers."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    activation = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[config.activation]
    data: dict[str, Any] = {
        "architectures": [ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": activation,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if config.family == "gpt_neox":
        rope["partial_rotary_factor"] = config.rotary_fraction
        data |= {
            "layer_norm_eps": config.norm_eps,
            "rotary_pct": config.rotary_fraction,
            "rotary_emb_base": config.rope_theta,
            "use_parallel_residual": config.parallel_residual,
            "attention_bias": True,
        }
    else:
        data |= {
            "rms_norm_eps": config.norm_eps,
            "num_key_value_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "rope_theta": config.rope_theta,
        }
    if config.family == "gemma":
        data["hidden_activation"] = activation
    return data | {"rope_parameters": rope}


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
HEAD_KEY: dict[Family, str] = {"gemma": "lm_head.weight", "llama": "lm_head.weight", "gpt_neox": "embed_out.weight"}
# Constants that old checkpoints carry along; they hold nothing that was learnt. Matched at the end of a key.
KNOWN_EXTRAS: dict[Family, tuple[str, ...]] = {
    "gemma": (".rotary_emb.inv_freq",),
    "llama": (".rotary_emb.inv_freq",),
    "gpt_neox": (".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
}


def tensor_table(config: ModelConfig) -> list[HFTensor]:
    """Every tensor of the family's HF checkpoint at this size, layer by layer, with shapes and targets."""
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
        table.append(HFTensor(HEAD_KEY[config.family], (config.vocab_size, width), ("head",)))
    return table
