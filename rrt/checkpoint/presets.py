"""Published base models: the fields of their `config.json` that decide shapes and the forward pass."""

from typing import Any

import torch

from rrt.checkpoint.hf_config import model_config_from_hf
from rrt.common.dtypes import parse_dtype
from rrt.errors import UserError
from rrt.model.config import ModelConfig


def _pythia(hidden_size: int, num_layers: int, num_heads: int) -> dict[str, Any]:
    return {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "vocab_size": 50304,
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "max_position_embeddings": 2048,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float16",
    }


PRESETS: dict[str, dict[str, Any]] = {
    # google/gemma-2b
    "gemma-2b": {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "vocab_size": 256000,
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "hidden_act": "gelu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000,
        "max_position_embeddings": 8192,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "torch_dtype": "bfloat16",
    },
    # TinyLlama/TinyLlama-1.1B-step-50K-105b
    "tinyllama-1.1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    },
    # EleutherAI/pythia-1b, -410m, -160m
    "pythia-1b": _pythia(hidden_size=2048, num_layers=16, num_heads=8),
    "pythia-410m": _pythia(hidden_size=1024, num_layers=24, num_heads=16),
    "pythia-160m": _pythia(hidden_size=768, num_layers=12, num_heads=12),
}


def _facts(name: str) -> dict[str, Any]:
    if name not in PRESETS:
        raise UserError(f"preset: found {name!r}; expected one of {', '.join(PRESETS)}")
    return PRESETS[name]


def preset(name: str) -> ModelConfig:
    """Return the `ModelConfig` of a published base model. Raises `UserError` for a name not in `PRESETS`."""
    return model_config_from_hf(_facts(name), f"preset {name}")


def preset_dtype(name: str) -> torch.dtype:
    """Return the dtype in which the weights of a preset were published."""
    return parse_dtype(_facts(name)["torch_dtype"])
