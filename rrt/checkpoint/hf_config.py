"""`config.json` of the families in :mod:`rrt.checkpoint.families`, read and written as old and current transformers do.

A field that can change what a forward pass computes is implemented or refused by name. Any other that is not known
is named in one warning and ignored.
"""

import json
import logging
import re
from dataclasses import fields
from functools import cache
from typing import Any

from rrt.checkpoint.families import FAMILIES, FamilyFacts
from rrt.errors import UserError
from rrt.model.config import ModelConfig, RopeScaling

log = logging.getLogger(__name__)

# Fields of all families that are read here or in `rrt.data.tokenizer`.
_READ_KEYS = frozenset(
    """architectures model_type vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads
    head_dim intermediate_size hidden_act max_position_embeddings tie_word_embeddings rope_parameters rope_scaling
    rope_theta rms_norm_eps attention_bias mlp_bias bos_token_id eos_token_id pad_token_id torch_dtype dtype""".split()
)
# Known not to change what a forward pass computes: bookkeeping, training, classification heads, and the generation
# settings that transformers before version 5 kept in this file.
_INERT_KEYS = frozenset(
    """transformers_version _name_or_path use_cache initializer_range unk_token_id sep_token_id decoder_start_token_id
    classifier_dropout is_decoder id2label label2id num_labels problem_type output_attentions output_hidden_states
    return_dict use_return_dict chunk_size_feed_forward pretraining_tp gradient_checkpointing attn_implementation
    _attn_implementation _attn_implementation_autoset task_specific_params tokenizer_class finetuning_task prefix
    use_bfloat16 tf_legacy_loss cross_attention_hidden_size max_length min_length do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores
    return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens attention_dropout hidden_dropout
    attention_probs_dropout_prob hidden_dropout_prob embd_pdrop attn_pdrop resid_pdrop router_aux_loss_coef""".split()
)
# Change the forward pass and are not implemented; at these values, or null, they are off. Some are of other families:
# a fine-tuned or converted model may carry them.
_OFF_VALUES: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1.0,),
    "rotary_pct": (1.0,),
    "rotary_emb_base": (),
    "rope_interleaved": (False,),
    "rope_local_base_freq": (),
    "position_embedding_type": ("rope", "rotary"),
    "alibi": (False,),
    "use_alibi": (False,),
    "no_rope_layers": ([],),
    "no_rope_layer_interval": (0,),
    "nope_layer_interval": (0,),
    "sliding_window": (),
    "sliding_window_size": (),
    "use_sliding_window": (False,),
    "layer_types": ([],),
    "attention_chunk_size": (),
    "use_bidirectional_attention": (False,),
    "is_causal": (True,),
    "quantization_config": ({},),
    "final_logit_softcapping": (),
    "attn_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "clip_qkv": (),
    "qk_norm": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "attention_multiplier": (),
    "residual_multiplier": (1.0,),
    "embedding_multiplier": (1.0,),
    "scale_emb": (1.0,),
    "scale_depth": (),
    "dim_model_base": (),
    "mup_enabled": (False,),
    "use_mup": (False,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    "use_post_norm": (False,),
    "use_bias": (False,),
    "bias": (False,),
    "no_bias": (True,),
    "qkv_bias": (False,),
    "lm_head_bias": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({},),
    "torchscript": (False,),
}
# Where a field of ModelConfig has another name in config.json.
_HF_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
}
_SCALING_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


class _HFConfig:
    """Typed access to a parsed HF `config.json`; every failure names the file and the field."""

    def __init__(
        self, data: dict[str, Any], where: str, prefix: str = "", defaults: dict[str, Any] | None = None
    ) -> None:
        self.data, self.where, self.prefix, self.defaults = data, where, prefix, defaults or {}

    def fail(self, key: str, found: object, expected: str) -> UserError:
        shown = json.dumps(found, default=repr)
        return UserError(f"{self.where}: field '{self.prefix}{key}': found {shown}; expected {expected}")

    def _value(self, key: str) -> Any:
        return self.data.get(key, self.defaults.get(key))

    def number(self, key: str, kind: type) -> Any:
        value = self._value(key)
        expected = "a number" if kind is float else "an integer"
        if value is None and key not in self.data:
            raise UserError(f"{self.where}: missing field '{self.prefix}{key}'; expected {expected}")
        if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
            raise self.fail(key, value, expected)
        return kind(value)

    def optional_number(self, key: str, kind: type) -> Any:
        """Read a number that may be null."""
        return None if self._value(key) is None else self.number(key, kind)

    def choice(self, key: str, values: dict[str, str]) -> str:
        """Look up the name at `key` in the table `values`; null means the default."""
        value = self.data.get(key)
        value = self.defaults.get(key) if value is None else value
        if not isinstance(value, str) or value not in values:
            raise self.fail(key, value, f"one of {', '.join(values)}")
        return values[value]

    def object(self, key: str) -> "_HFConfig":
        """Return the JSON object at `key`, empty if it is absent."""
        value = self.data.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.fail(key, value, "an object")
        return _HFConfig(value or {}, self.where, f"{self.prefix}{key}.")

    def flag(self, key: str) -> bool:
        value = self.data.get(key)
        value = self.defaults.get(key, False) if value is None else value
        if not isinstance(value, bool):
            raise self.fail(key, value, "true or false")
        return value

    def tokens(self, key: str) -> tuple[int, ...]:
        """Return the ids of a special token: one, several (newer configs list stop tokens), or none (null or -1)."""
        value = self.data.get(key)
        values: list[Any] = value if isinstance(value, list) else [value]
        if any(isinstance(v, bool) or not (v is None or isinstance(v, int)) for v in values):
            raise self.fail(key, value, "a token id or null")
        return tuple(v for v in values if v is not None and v >= 0)

    def token(self, key: str) -> int | None:
        return next(iter(self.tokens(key)), None)


def model_config_from_hf(data: dict[str, Any], where: str) -> ModelConfig:
    """Read the `ModelConfig` from a parsed HF `config.json`, as old or current transformers write it.

    One warning lists the fields that are ignored because nothing is known about them.

    Args:
        where: the file's path, for errors.

    Raises:
        UserError: another architecture, a feature that changes the forward pass and is not implemented here
            (interleaved RoPE, soft caps, experts, ...), or two places that contradict each other, each by name.
    """
    hf = _HFConfig(data, where)
    family = next((family for family in FAMILIES if family == data.get("model_type")), None)
    if family is None:
        raise hf.fail("model_type", data.get("model_type"), ", ".join(FAMILIES))
    facts = FAMILIES[family]
    hf.defaults = facts.defaults
    architectures = data.get("architectures")
    if architectures and (not isinstance(architectures, list) or facts.architecture not in architectures):
        raise hf.fail("architectures", architectures, json.dumps([facts.architecture]))
    _check_unread(hf, facts)

    heads = hf.number("num_attention_heads", int)
    hidden_size = hf.number("hidden_size", int)
    is_fused = _is_fused(facts)
    head_dim = None if is_fused else hf.optional_number("head_dim", int)
    if head_dim is None:
        if heads > 0 and hidden_size % heads:
            raise hf.fail("num_attention_heads", heads, f"a divisor of hidden_size = {hidden_size}")
        head_dim = hidden_size // max(heads, 1)
    theta, fraction, scaling = _rope(hf, facts)
    attention_bias = hf.flag("attention_bias")
    kv_heads = None if is_fused else hf.optional_number("num_key_value_heads", int)
    config = {
        "family": family,
        "vocab_size": hf.number("vocab_size", int),
        "hidden_size": hidden_size,
        "num_layers": hf.number("num_hidden_layers", int),
        "num_heads": heads,
        "num_kv_heads": heads if kv_heads is None else kv_heads,
        "head_dim": head_dim,
        "intermediate_size": hf.number("intermediate_size", int),
        "max_position_embeddings": hf.number("max_position_embeddings", int),
        "activation": _activation(hf, facts),
        "norm_eps": hf.number(facts.config_names.get("norm_eps", "rms_norm_eps"), float),
        "rope_theta": theta,
        "rotary_fraction": fraction,
        "rope_scaling": scaling,
        "sliding_window": _sliding_window(hf, facts),
        "qkv_bias": attention_bias,
        "out_bias": attention_bias,
        "mlp_bias": hf.flag("mlp_bias"),
        "parallel_residual": hf.flag("use_parallel_residual"),
        "tie_embeddings": hf.flag("tie_word_embeddings"),
        "bos_token_id": hf.token("bos_token_id"),
        "eos_token_ids": hf.tokens("eos_token_id"),
        "pad_token_id": hf.token("pad_token_id"),
    }
    _check_biases(hf, facts)
    try:
        return ModelConfig(**config | facts.fixed)
    except UserError as error:
        message = str(error)
    for ours, theirs in (_HF_NAMES | facts.config_names).items():
        message = re.sub(rf"\b{ours}\b", theirs, message)
    raise UserError(f"{where}: {message}")


def _check_unread(hf: _HFConfig, facts: FamilyFacts) -> None:
    """Refuse what changes the forward pass and is not implemented; warn once of what is not known at all."""
    known = _READ_KEYS | _INERT_KEYS | facts.own_keys | set(facts.config_names.values())
    unknown = []
    for key, value in hf.data.items():
        if key in known or (key in _OFF_VALUES and (value is None or value in _OFF_VALUES[key])):
            continue
        if key == "layer_types" and _layer_types(hf) == {"full_attention"}:
            continue
        if key == "quantization_config" and isinstance(value, dict) and value.get("quant_method") == "gguf":
            # transformers keeps where dequantised weights came from; a directory never holds ggml's blocks.
            unknown.append(key)
            continue
        if key in _OFF_VALUES:
            off = json.dumps(_OFF_VALUES[key][0]) if any(_OFF_VALUES[key]) or False in _OFF_VALUES[key] else "null"
            raise hf.fail(key, value, f"{off}, or no such field: it is not implemented for {hf.data['model_type']}")
        if key == "auto_map" and isinstance(value, dict) and "AutoModelForCausalLM" in value:
            raise hf.fail(key, value, "no model class: a checkpoint with code of its own may compute anything")
        unknown.append(key)
    if unknown:
        warn_of_ignored(hf.where, tuple(sorted(unknown)))


@cache
def warn_of_ignored(where: str, keys: tuple[str, ...]) -> None:
    """Warn once of fields without a known meaning, however often a command opens the file."""
    log.warning("%s: ignored fields that are not known to change the model: %s", where, ", ".join(map(repr, keys)))


def _check_biases(hf: _HFConfig, facts: FamilyFacts) -> None:
    for key, name in (("attention_bias", "qkv_bias"), ("mlp_bias", "mlp_bias")):
        if name in facts.fixed and hf.data.get(key) not in (None, facts.fixed[name]):
            raise hf.fail(key, hf.data[key], f"{json.dumps(facts.fixed[name])} for {hf.data['model_type']}")


def _sliding_window(hf: _HFConfig, facts: FamilyFacts) -> int | None:
    if "sliding_window" not in facts.own_keys:
        return None
    window: int | None = hf.optional_number("sliding_window", int)
    if "use_sliding_window" not in facts.own_keys:
        return window
    layers = hf.number("num_hidden_layers", int)
    first = hf.number("max_window_layers", int)
    types = _layer_types(hf) or {"full_attention" if layer < first else "sliding_attention" for layer in range(layers)}
    if not hf.flag("use_sliding_window") or window is None or types == {"full_attention"}:
        return None
    if len(types) > 1:
        key = "max_window_layers" if hf.data.get("layer_types") is None else "layer_types"
        raise hf.fail(key, hf.data.get(key, first), "windows in all layers, or in none")
    return window


def _layer_types(hf: _HFConfig) -> set[str]:
    """Return the kinds of attention that layers have, none if the file does not say."""
    types = hf.data.get("layer_types")
    if types is None:
        return set()
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or not all(isinstance(kind, str) and kind in kinds for kind in types):
        raise hf.fail("layer_types", types, f"a list of {' and '.join(kinds)}")
    return set(types)


def _rope(hf: _HFConfig, facts: FamilyFacts) -> tuple[float, float, RopeScaling | None]:
    """Read (rope_theta, rotary_fraction, scaling) from the top level (old) or `rope_parameters` (current)."""
    names = facts.config_names
    old, current = hf.object("rope_scaling"), hf.object("rope_parameters")
    theta_key = names.get("rope_theta", "rope_theta")
    theta_places = {theta_key: hf, "rope_theta": hf}
    theta = _agreed(
        facts.defaults[theta_key],
        *((place, key) for key, place in theta_places.items()),
        (old, "rope_theta"),
        (current, "rope_theta"),
    )
    scalings = [(place, scaling) for place in (old, current) if (scaling := _scaling(place)) is not None]
    if len(scalings) == 2 and scalings[0][1] != scalings[1][1]:
        raise hf.fail("rope_scaling", old.data, f"{json.dumps(current.data)}, as in 'rope_parameters'")
    scaling = scalings[0][1] if scalings else None
    factor = (current, "partial_rotary_factor")
    if "rotary_fraction" in names:
        places = ((hf, names["rotary_fraction"]), (hf, "partial_rotary_factor"), factor)
        return theta, _agreed(facts.defaults[names["rotary_fraction"]], *places), scaling
    fixed: float = facts.fixed["rotary_fraction"]
    if (fraction := _agreed(fixed, factor)) != fixed:
        raise current.fail("partial_rotary_factor", fraction, f"{fixed} for {hf.data['model_type']}")
    return theta, fixed, scaling


def _scaling(place: _HFConfig) -> RopeScaling | None:
    """Read the change of the rotary frequencies that an object describes, None if it describes none."""
    name = "rope_type" if place.data.get("rope_type") is not None else "type"
    kind = place.data.get(name)
    if kind is not None and (not isinstance(kind, str) or kind not in ("default", *_SCALING_KEYS)):
        raise place.fail(name, kind, f"one of default, {', '.join(_SCALING_KEYS)}: no other is implemented")
    own = _SCALING_KEYS.get(kind or "default", ("factor", "original_max_position_embeddings"))
    for key, value in place.data.items():
        if value is not None and key not in (*own, "type", "rope_type", "rope_theta", "partial_rotary_factor"):
            raise place.fail(key, value, "no such field: this rope scaling is not implemented")
    if kind in (None, "default"):
        if kind is None and place.data.get("factor") not in (None, 1):
            raise place.fail("rope_type", None, f"one of {', '.join(_SCALING_KEYS)} beside 'factor'")
        return None
    values = {key: place.number(key, int if key == "original_max_position_embeddings" else float) for key in own}
    if kind == "linear" and values["factor"] == 1:
        return None
    try:
        return RopeScaling("linear" if kind == "linear" else "llama3", **values)
    except UserError as error:
        raise UserError(f"{place.where}: {str(error).replace('rope_scaling.', place.prefix)}") from None


def _agreed(default: float, *places: tuple[_HFConfig, str]) -> float:
    """Read a number that may be written in any of several places; refuse contradictions."""
    written = [(place, key) for place, key in places if place.data.get(key) is not None]
    values = [place.number(key, float) for place, key in written]
    for (place, key), value in zip(written[1:], values[1:], strict=True):
        if value != values[0]:
            first_place, first_key = written[0]
            raise place.fail(key, value, f"{values[0]}, as in '{first_place.prefix}{first_key}'")
    return values[0] if values else default


def _activation(hf: _HFConfig, facts: FamilyFacts) -> str:
    if "hidden_activation" in facts.own_keys and hf.data.get("hidden_activation") is not None:
        # Gemma's; versions of transformers disagree on what "gelu" means here.
        hf.choice("hidden_activation", {"gelu_pytorch_tanh": "gelu_tanh"})
    return hf.choice("hidden_act", facts.activations)


def model_config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Make the HF `config.json` of an unrolled model, readable by old and current transformers.

    Raises:
        UserError: the family's `config.json` cannot say what `config` says (a Mistral with biases, ...).
    """
    facts = FAMILIES[config.family]
    activation = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[config.activation]
    scaling = config.rope_scaling
    scaling_data = {} if scaling is None else {key: getattr(scaling, key) for key in _SCALING_KEYS[scaling.kind]}
    rope_type = "default" if scaling is None else scaling.kind
    rope = {"rope_type": rope_type, "rope_theta": config.rope_theta, **scaling_data}
    ends = config.eos_token_ids
    data: dict[str, Any] = {
        "architectures": [facts.architecture],
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
        "eos_token_id": (list(ends) if len(ends) > 1 else ends[0]) if ends else None,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": dtype,
        "use_cache": True,
        facts.config_names.get("norm_eps", "rms_norm_eps"): config.norm_eps,
        facts.config_names.get("rope_theta", "rope_theta"): config.rope_theta,
    }
    if not _is_fused(facts):
        data |= {"num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim}
    if "qkv_bias" not in facts.fixed:
        data["attention_bias"] = config.qkv_bias
    if "mlp_bias" not in facts.fixed:
        data["mlp_bias"] = config.mlp_bias
    if "hidden_activation" in facts.own_keys:
        data["hidden_activation"] = activation
    if "use_parallel_residual" in facts.own_keys:
        data["use_parallel_residual"] = config.parallel_residual
    if "sliding_window" in facts.own_keys:
        data["sliding_window"] = config.sliding_window
    if "use_sliding_window" in facts.own_keys:
        windows = 0 if config.sliding_window else config.num_layers
        data |= {"use_sliding_window": config.sliding_window is not None, "max_window_layers": windows}
    if "rotary_fraction" in facts.config_names:
        rope["partial_rotary_factor"] = data[facts.config_names["rotary_fraction"]] = config.rotary_fraction
    if scaling is not None:
        data["rope_scaling"] = {"rope_type": scaling.kind, **scaling_data}
    data["rope_parameters"] = rope
    where = f"config.json of {facts.architecture}"
    read_back = model_config_from_hf(data, where)
    for entry in fields(config):
        ours, theirs = getattr(config, entry.name), getattr(read_back, entry.name)
        if ours != theirs:
            raise UserError(f"{where}: field '{entry.name}': found {ours!r}; expected {theirs!r} for this family")
    return data


def _is_fused(facts: FamilyFacts) -> bool:
    """True if q, k and v are one matrix, so that there are as many heads of each, of one width."""
    return any(" " in ours for ours in facts.layer.values())
