"""`ModelConfig` from a GGUF file's metadata, by llama.cpp's names.

As with `config.json`, a field that can change what a forward pass computes is implemented or refused by name; any
other that is not known is named in one warning and ignored.
"""

import math
from typing import Any

import numpy as np

from rrt.checkpoint.families import FAMILIES
from rrt.checkpoint.hf_config import warn_of_ignored
from rrt.common.gguf_file import GGUFFile
from rrt.errors import UserError
from rrt.model.config import Family, ModelConfig, RopeScaling

# `general.architecture`, which begins the keys of all that is the architecture's own. Mistral is stored as a Llama.
ARCHITECTURES: dict[str, Family] = {
    "llama": "llama",
    "gemma": "gemma",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gptneox": "gpt_neox",
}
ROPE_DIVISORS = "rope_freqs.weight"
_READ_KEYS = frozenset(
    """vocab_size context_length embedding_length block_count feed_forward_length attention.head_count
    attention.head_count_kv attention.key_length attention.value_length attention.layer_norm_rms_epsilon
    attention.layer_norm_epsilon attention.sliding_window rope.freq_base rope.dimension_count rope.scaling.type
    rope.scaling.factor rope.scale_linear use_parallel_residual""".split()
)
_INERT_KEYS = frozenset("tensor_data_layout rope.scaling.finetuned rope.scaling.original_context_length".split())
# Change the forward pass and are not implemented; at these values they are off.
_OFF_VALUES: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.max_alibi_bias": (0,),
    "attention.clamp_kqv": (0,),
    "attention.scale": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "rope.scaling.attn_factor": (0, 1),
}
# Of Llama 3, all sizes; the file has only what they lead to.
_LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR, _ORIGINAL_POSITIONS = 1.0, 4.0, 8192


def gguf_model_config(file: GGUFFile) -> ModelConfig:
    """Read the `ModelConfig` of a GGUF file.

    Raises:
        UserError: another architecture, a missing or wrong field, or a feature that changes the forward pass and is
            not implemented here, each by name.
    """
    architecture = file.value("general.architecture", str)
    if architecture not in ARCHITECTURES:
        file.fail("general.architecture", architecture, f"one of {', '.join(ARCHITECTURES)}")
    _check_unread(file, architecture)

    def read(key: str, kind: type, *default: Any) -> Any:
        return file.value(f"{architecture}.{key}", kind, *default)

    heads = read("attention.head_count", int)
    width = read("embedding_length", int)
    head_dim = read("attention.key_length", int, width // max(heads, 1))
    if (value_dim := read("attention.value_length", int, head_dim)) != head_dim:
        file.fail(f"{architecture}.attention.value_length", value_dim, f"{head_dim}, the width of queries and keys")
    family = ARCHITECTURES[architecture]
    window = read("attention.sliding_window", int, None)
    if window is not None and architecture == "llama":
        family = "mistral"
    facts = FAMILIES[family]
    theta = float(read("rope.freq_base", float, 10000.0))
    rotary = read("rope.dimension_count", int, head_dim)
    if "rotary_fraction" in facts.fixed and rotary != head_dim:
        file.fail(f"{architecture}.rope.dimension_count", rotary, f"{head_dim}, the width of a head")
    norm = "layer_norm_epsilon" if facts.fixed["norm_type"] == "layernorm" else "layer_norm_rms_epsilon"

    def has_bias(*linears: str) -> bool:
        return any(f"blk.0.{linear}.bias" in file.tensors for linear in linears)

    fields: dict[str, Any] = {
        "family": family,
        "vocab_size": read("vocab_size", int, None) or _embedding_rows(file),
        "hidden_size": width,
        "num_layers": read("block_count", int),
        "num_heads": heads,
        "num_kv_heads": read("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "intermediate_size": read("feed_forward_length", int),
        "max_position_embeddings": read("context_length", int),
        "activation": facts.activations[facts.defaults["hidden_act"]],
        "norm_eps": float(read(f"attention.{norm}", float)),
        "rope_theta": theta,
        "rotary_fraction": rotary / max(head_dim, 1),
        "rope_scaling": _rope_scaling(file, architecture, theta, head_dim),
        "sliding_window": window if "sliding_window" in facts.own_keys else None,
        "qkv_bias": has_bias("attn_q", "attn_qkv"),
        "out_bias": has_bias("attn_output"),
        "mlp_bias": has_bias("ffn_up"),
        "parallel_residual": read("use_parallel_residual", bool, True),
        "tie_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.value("tokenizer.ggml.bos_token_id", int, None),
        "eos_token_ids": gguf_end_ids(file),
        "pad_token_id": file.value("tokenizer.ggml.padding_token_id", int, None),
    }
    try:
        return ModelConfig(**fields | facts.fixed)
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None


def gguf_end_ids(file: GGUFFile) -> tuple[int, ...]:
    """Return the tokens that end a text, a turn or a message: the file's EOS first."""
    found = (file.value(f"tokenizer.ggml.{role}_token_id", int, None) for role in ("eos", "eot", "eom"))
    return tuple(dict.fromkeys(token_id for token_id in found if token_id is not None))


def _embedding_rows(file: GGUFFile) -> int:
    info = file.tensors.get("token_embd.weight")
    return info.shape[0] if info is not None and info.shape else 0


def _check_unread(file: GGUFFile, architecture: str) -> None:
    """Refuse what changes the forward pass and is not implemented; warn once of what is not known at all."""
    unknown = []
    for full_key, value in file.metadata.items():
        key = full_key.removeprefix(f"{architecture}.")
        if key == full_key or key in _READ_KEYS | _INERT_KEYS:
            continue
        if key not in _OFF_VALUES:
            unknown.append(full_key)
        elif value not in _OFF_VALUES[key]:
            file.fail(full_key, value, f"{_OFF_VALUES[key][0]}, or no such field: it is not implemented")
    if unknown:
        warn_of_ignored(str(file.path), tuple(sorted(unknown)))


def _rope_scaling(file: GGUFFile, architecture: str, theta: float, head_dim: int) -> RopeScaling | None:
    key = f"{architecture}.rope.scaling.type"
    kind = file.value(key, str, None)
    if kind not in (None, "none", "linear"):
        file.fail(key, kind, "none or linear: no other is implemented")
    factor = float(file.value(f"{architecture}.rope.scaling.factor", float, 1.0))
    if kind is None:
        # Of early files.
        factor = float(file.value(f"{architecture}.rope.scale_linear", float, 1.0))
    is_linear = kind != "none" and factor not in (0, 1)
    if ROPE_DIVISORS not in file.tensors:
        return RopeScaling("linear", factor) if is_linear else None
    if is_linear:
        file.fail(key, kind, f"none beside the tensor {ROPE_DIVISORS!r}")
    return _llama3_scaling(file, theta, head_dim)


def _llama3_scaling(file: GGUFFile, theta: float, head_dim: int) -> RopeScaling | None:
    """Recover Llama 3's scaling from what it divides each rotary frequency by.

    Frequencies that turn fewer than `_LOW_FREQ_FACTOR` times within the original context are divided by the factor,
    those that turn more than `_HIGH_FREQ_FACTOR` times by one. Between, the divisor gives the original context.
    """
    info = file.tensors[ROPE_DIVISORS]
    if info.type != 0 or info.shape != (head_dim // 2,):
        raise UserError(
            f"{file.path}: tensor {ROPE_DIVISORS!r}: found shape {list(info.shape)}, type {info.type}; expected "
            f"[{head_dim // 2}], type 0 (F32)"
        )
    file.check_length(info.name, 2 * head_dim)
    divisors = file.read_bytes(info.offset, (2 * head_dim,)).view("<f4").astype(np.float64)
    if np.all(divisors == 1):
        return None
    turns_per_token = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * math.pi)
    factor = float(divisors.max())
    between = (divisors > 1) & (divisors < factor)
    kept = (1 / divisors - 1 / factor) / (1 - 1 / factor)
    turns = _LOW_FREQ_FACTOR + kept * (_HIGH_FREQ_FACTOR - _LOW_FREQ_FACTOR)
    positions = [round(found) for found in (turns / turns_per_token)[between][:1] if np.isfinite(found)]
    for original in (*positions, _ORIGINAL_POSITIONS):
        share = np.clip((original * turns_per_token - _LOW_FREQ_FACTOR) / (_HIGH_FREQ_FACTOR - _LOW_FREQ_FACTOR), 0, 1)
        if np.allclose(divisors, 1 / (share + (1 - share) / factor), rtol=1e-4):
            return RopeScaling("llama3", factor, _LOW_FREQ_FACTOR, _HIGH_FREQ_FACTOR, original)
    raise UserError(
        f"{file.path}: tensor {ROPE_DIVISORS!r}: found divisors of the rotary frequencies that are not Llama 3's; "
        "no others are implemented"
    )
