"""Tiny random Hugging Face checkpoints of all families, for tests of everything that reads them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rrt.model.config import LoraRanks

# Elsewhere where it is used: processes that run a test's function need not wait for it.
if TYPE_CHECKING:
    import transformers

MIXED_RANKS = LoraRanks(
    out=2,
    matrices={
        "layers.0.attn.q": 3,
        "layers.0.attn.k": 6,
        "layers.0.mlp.up": 7,
        "layers.1.attn.v": 5,
        "layers.1.attn.out": 0,
        "layers.1.mlp.down": 11,
    },
)
"""Ranks that differ between the linears and the layers of a block of two shared layers or more, many of them 0."""

FAMILIES = ("gemma", "llama", "gpt_neox")
"""Those of the paper, whose tokenizers are made by `tests/util/tokenizers.py`."""

ALL_FAMILIES = ("gemma", "llama", "mistral", "qwen2", "qwen3", "gpt_neox")

_KINDS = {
    "gemma": "Gemma",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gpt_neox": "GPTNeoX",
}
# MQA with a head width of its own, GQA with an untied head, and MHA with biases and partial rotary: small forms
# of Gemma 2B, TinyLlama and Pythia. Likewise biases on q, k, v and a tied head (Qwen2), q and k norms (Qwen3).
_OPTIONS: dict[str, dict[str, Any]] = {
    "mistral": dict(num_attention_heads=4, num_key_value_heads=2, head_dim=12, sliding_window=None),
    "qwen2": dict(num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen3": dict(num_attention_heads=4, num_key_value_heads=2, head_dim=12, tie_word_embeddings=True),
    "gemma": dict(num_attention_heads=4, num_key_value_heads=1, head_dim=12),
    "llama": dict(num_attention_heads=4, num_key_value_heads=2),
    "gpt_neox": dict(num_attention_heads=4),
}


# All that parity with transformers is tested on: head dims that are no power of two, GQA, MQA, MHA, tied and untied
# heads, partial rotary, sequential NeoX, other rotary bases.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma-mqa": ("Gemma", dict(num_attention_heads=4, num_key_value_heads=1, head_dim=24)),
    "gemma-mha-untied": (
        "Gemma",
        dict(num_attention_heads=3, num_key_value_heads=3, head_dim=40, tie_word_embeddings=False),
    ),
    "llama-gqa": ("Llama", dict(hidden_size=60, num_attention_heads=6, num_key_value_heads=2, head_dim=14)),
    "llama-mha-tied-theta": (
        "Llama",
        dict(
            num_attention_heads=4,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        ),
    ),
    "llama-3": (
        "Llama",
        dict(
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        ),
    ),
    "llama-linear-scaling-biases": (
        "Llama",
        dict(
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
        ),
    ),
    # Eight heads of 8 in a width of 40.
    "smollm2-narrow": (
        "Llama",
        dict(hidden_size=40, num_attention_heads=8, num_key_value_heads=4, head_dim=8, tie_word_embeddings=True),
    ),
    "mistral": ("Mistral", dict(num_attention_heads=4, num_key_value_heads=2, sliding_window=1024)),
    "qwen2": ("Qwen2", dict(num_attention_heads=4, num_key_value_heads=2)),
    "qwen3": ("Qwen3", dict(num_attention_heads=4, num_key_value_heads=2, head_dim=24, tie_word_embeddings=True)),
    "qwen3-biases": ("Qwen3", dict(num_attention_heads=3, num_key_value_heads=3, head_dim=10, attention_bias=True)),
    "neox-parallel": ("GPTNeoX", dict(num_attention_heads=4)),
    "neox-sequential": (
        "GPTNeoX",
        dict(
            num_attention_heads=3,
            hidden_size=60,
            use_parallel_residual=False,
            rope_parameters={"rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.5},
        ),
    ),
    "neox-full-rotary-tied": (
        "GPTNeoX",
        dict(
            num_attention_heads=4,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        ),
    ),
}


def make_variant(name: str, seed: int = 0, **overrides: Any) -> "transformers.PreTrainedModel":
    """Make a random transformers model of a variant; norms, biases and logits are far from their initial values."""
    import transformers

    kind, options = VARIANTS[name]
    sizes = dict(
        vocab_size=151, hidden_size=64, intermediate_size=96, num_hidden_layers=4, max_position_embeddings=1024
    )
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **options, **overrides})
    return _random_model(kind, config, seed)


def make_hf_model(
    directory: Path,
    family: str,
    *,
    num_layers: int = 6,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    max_shard_size: str = "50GB",
    **overrides: Any,
) -> Path:
    """Write a random model of `family` (of `ALL_FAMILIES`) as an HF directory without tokenizer.

    Norms and biases are far from their initial values, so that a tensor which is dropped or mixed up shows.
    `overrides` are fields of the transformers configuration.
    """
    import transformers

    sizes = dict(vocab_size=151, hidden_size=32, intermediate_size=80, max_position_embeddings=512)
    options = {**sizes, **_OPTIONS[family], **overrides}
    config = getattr(transformers, f"{_KINDS[family]}Config")(num_hidden_layers=num_layers, **options)
    model = _random_model(_KINDS[family], config, seed)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return Path(directory)


def _random_model(kind: str, config: "transformers.PretrainedConfig", seed: int) -> "transformers.PreTrainedModel":
    import transformers

    torch.manual_seed(seed)
    model: transformers.PreTrainedModel = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.08 if parameter.dim() > 1 else 0.3))
    return model
