"""`config.json` of the three families, read and written as old and current transformers do."""

import json
import re
from dataclasses import fields
from typing import Any

from rrt.errors import UserError
from rrt.model.config import Family, ModelConfig

ARCHITECTURES: dict[Family, str] = {
    "gemma": "GemmaForCausalLM",
    "llama": "LlamaForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
}
# Keys that do not change what a forward pass computes: bookkeeping, training, classification heads, and the
# generation settings that transformers before version 5 kept in this file.
_INERT_KEYS = frozenset(
    """architectures model_type transformers_version _name_or_path torch_dtype dtype use_cache initializer_range
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id classifier_dropout
    is_decoder id2label label2id num_labels problem_type output_attentions output_hidden_states return_dict
    use_return_dict chunk_size_feed_forward pretraining_tp gradient_checkpointing attn_implementation
    _attn_implementation _attn_implementation_autoset task_specific_params tokenizer_class finetuning_task prefix
    use_bfloat16 tf_legacy_loss cross_attention_hidden_size max_length min_length do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens""".split()
)
_COMMON_KEYS = frozenset(
    """vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size hidden_act
    max_position_embeddings tie_word_embeddings rope_parameters rope_theta""".split()
)
_FAMILY_KEYS: dict[Family, frozenset[str]] = {
    "gemma": frozenset(("num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_activation")),
    "llama": frozenset(("num_key_value_heads", "head_dim", "rms_norm_eps")),
    "gpt_neox": frozenset(
        """layer_norm_eps rotary_pct rotary_emb_base use_parallel_residual attention_bias
        partial_rotary_factor""".split()
    ),
}
# Features that exist but are not implemented here; at these values they are off.
_OFF_VALUES: dict[str, tuple[Any, ...]] = {
    "rope_scaling": ({"type": "default"}, {"rope_type": "default"}, None),
    "partial_rotary_factor": (None, 1.0),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "attention_dropout": (None, 0),
    "hidden_dropout": (None, 0),
    "attention_probs_dropout_prob": (None, 0),
    "hidden_dropout_prob": (None, 0),
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
# Where a field of ModelConfig has another name in config.json.
_HF_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "rotary_fraction": "rotary_pct",
}


class _HFConfig:
    """Typed access to a parsed HF `config.json`; every failure names the file and the field."""

    def __init__(self, data: dict[str, Any], where: str, prefix: str = "") -> None:
        self.data, self.where, self.prefix = data, where, prefix

    def fail(self, key: str, found: object, expected: str) -> UserError:
        shown = json.dumps(found, default=repr)
        return UserError(f"{self.where}: field '{self.prefix}{key}': found {shown}; expected {expected}")

    def number(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.data.get(key)
        value = default if value is None else value
        expected = "a number" if kind is float else "an integer"
        if value is None:
            raise UserError(f"{self.where}: missing field '{self.prefix}{key}'; expected {expected}")
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
            raise self.fail(key, value, expected)
        return kind(value)

    def choice(self, key: str, values: dict[str, str], default: str) -> str:
        """Look up the name at `key` in the table `values`."""
        value = self.data.get(key)
        value = default if value is None else value
        if not isinstance(value, str) or value not in values:
            raise self.fail(key, value, f"one of {', '.join(values)}")
        return values[value]

    def object(self, key: str) -> "_HFConfig":
        """Return the JSON object at `key`, empty if it is absent."""
        value = self.data.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.fail(key, value, "an object")
        return _HFConfig(value or {}, self.where, f"{self.prefix}{key}.")

    def flag(self, key: str, default: bool) -> bool:
        value = self.data.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.fail(key, value, "true or false")
        return default if value is None else value

    def token(self, key: str) -> int | None:
        """Return a special token's id; of several (newer configs list stop tokens) the first."""
        value = self.data.get(key)
        if isinstance(value, list) and value:
            value = value[0]
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise self.fail(key, value, "a token id or null")
        return value


def model_config_from_hf(data: dict[str, Any], where: str) -> ModelConfig:
    """Read the `ModelConfig` from a parsed HF `config.json`, as old or current transformers write it.

    Args:
        where: the file's path, for errors.

    Raises:
        UserError: another architecture, a feature not implemented here (rope scaling, sliding windows,
            biases in Llama, ...), a key that is not known, or two places that contradict each other, each by
            name: nothing is ignored silently.
    """
    hf = _HFConfig(data, where)
    family = next((family for family in ARCHITECTURES if family == data.get("model_type")), None)
    if family is None:
        raise hf.fail("model_type", data.get("model_type"), ", ".join(ARCHITECTURES))
    architectures = data.get("architectures")
    if architectures and (not isinstance(architectures, list) or ARCHITECTURES[family] not in architectures):
        raise hf.fail("architectures", architectures, json.dumps([ARCHITECTURES[family]]))
    _refuse_unimplemented(hf, family)

    heads = hf.number("num_attention_heads", int)
    hidden_size = hf.number("hidden_size", int)
    # Gemma's heads may be of any width; the others' divide the model's, even where head_dim is written out.
    is_free = family == "gemma" and data.get("head_dim") is not None
    if not is_free and heads > 0 and hidden_size % heads:
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
        message = str(error)
    for ours, theirs in (*_HF_NAMES.items(), ("norm_eps", "layer_norm_eps" if is_neox else "rms_norm_eps")):
        message = re.sub(rf"\b{ours}\b", theirs, message)
    raise UserError(f"{where}: {message}")


def _refuse_unimplemented(hf: _HFConfig, family: Family) -> None:
    known = _INERT_KEYS | _COMMON_KEYS | _FAMILY_KEYS[family]
    for key, value in hf.data.items():
        if key in known:
            continue
        if key not in _OFF_VALUES:
            raise UserError(
                f"{hf.where}: field {key!r}: not known to this version; expected a config.json of "
                f"{ARCHITECTURES[family]} (if the field does not change the model, delete it)"
            )
        if value not in _OFF_VALUES[key]:
            off = json.dumps(_OFF_VALUES[key][-1])
            raise hf.fail(key, value, f"{off}: this feature is not implemented for {family}")
    if family == "gpt_neox" and hf.data.get("attention_bias") is False:
        raise hf.fail("attention_bias", False, "true for gpt_neox")


def _rope(hf: _HFConfig, family: Family) -> tuple[float, float]:
    """Read (rope_theta, rotary_fraction) from the top level (old) or `rope_parameters` (current)."""
    nested = hf.object("rope_parameters")
    for key, value in nested.data.items():
        if key in ("rope_type", "type"):
            if value not in ("default", None):
                raise nested.fail(key, value, '"default": rope scaling is not implemented')
        elif key not in ("rope_theta", "partial_rotary_factor"):
            raise nested.fail(key, value, "no such field: rope scaling is not implemented")
    theta = _agreed(10000.0, (hf, "rope_theta"), (hf, "rotary_emb_base"), (nested, "rope_theta"))
    factor = (nested, "partial_rotary_factor")
    if family == "gpt_neox":
        return theta, _agreed(0.25, (hf, "rotary_pct"), (hf, "partial_rotary_factor"), factor)
    if (fraction := _agreed(1.0, factor)) != 1.0:
        raise nested.fail("partial_rotary_factor", fraction, f"1.0 for {family}")
    return theta, fraction


def _agreed(default: float, *places: tuple[_HFConfig, str]) -> float:
    """Read a number that may be written in any of several places; refuse contradictions."""
    written = [(place, key) for place, key in places if place.data.get(key) is not None]
    values = [place.number(key, float) for place, key in written]
    for (place, key), value in zip(written[1:], values[1:], strict=True):
        if value != values[0]:
            first_place, first_key = written[0]
            raise place.fail(key, value, f"{values[0]}, as in '{first_place.prefix}{first_key}'")
    return values[0] if values else default


def _activation(hf: _HFConfig, family: Family) -> str:
    if family == "gemma":
        # Published Gemma configs say "gelu" in hidden_act and mean the tanh form. Versions of transformers
        # disagree on what "gelu" in hidden_activation means.
        hf.choice("hidden_activation", {"gelu_pytorch_tanh": "gelu_tanh"}, default="gelu_pytorch_tanh")
        return hf.choice("hidden_act", {"gelu": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}, default="gelu")
    return hf.choice("hidden_act", _ACTIVATIONS, default="silu" if family == "llama" else "gelu")


def model_config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Make the HF `config.json` of an unrolled model, readable by old and current transformers.

    Raises:
        UserError: the family's `config.json` cannot say what `config` says (a Llama with biases, ...).
    """
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
    data["rope_parameters"] = rope
    where = f"config.json of {ARCHITECTURES[config.family]}"
    read_back = model_config_from_hf(data, where)
    for field in fields(config):
        ours, theirs = getattr(config, field.name), getattr(read_back, field.name)
        if ours != theirs:
            raise UserError(f"{where}: field '{field.name}': found {ours!r}; expected {theirs!r} for this family")
    return data
