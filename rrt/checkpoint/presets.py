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


def _llama_3_2(hidden_size: int, num_layers: int, num_heads: int, head_dim: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": hidden_size,
        "intermediate_size": 8192,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "torch_dtype": "bfloat16",
    }


def _smollm2(
    hidden_size: int, intermediate_size: int, num_layers: int, heads: tuple[int, int], rope_theta: float
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_interleaved": False,
        "rope_theta": rope_theta,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "bfloat16",
    }


def _qwen(model_type: str, sizes: tuple[int, int, int], heads: tuple[int, int], **fields: Any) -> dict[str, Any]:
    return {
        "architectures": [{"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}[model_type]],
        "model_type": model_type,
        "vocab_size": 151936,
        "hidden_size": sizes[0],
        "intermediate_size": sizes[1],
        "num_hidden_layers": sizes[2],
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "max_window_layers": sizes[2],
        "tie_word_embeddings": True,
        "bos_token_id": 151643,
        "torch_dtype": "bfloat16",
        **fields,
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
    # meta-llama/Llama-3.2-1B, -3B
    "llama-3.2-1b": _llama_3_2(hidden_size=2048, num_layers=16, num_heads=32, head_dim=64),
    "llama-3.2-3b": _llama_3_2(hidden_size=3072, num_layers=28, num_heads=24, head_dim=128),
    # HuggingFaceTB/SmolLM2-135M, -360M, -1.7B
    "smollm2-135m": _smollm2(576, 1536, num_layers=30, heads=(9, 3), rope_theta=100000),
    "smollm2-360m": _smollm2(960, 2560, num_layers=32, heads=(15, 5), rope_theta=100000),
    "smollm2-1.7b": _smollm2(2048, 8192, num_layers=24, heads=(32, 32), rope_theta=130000),
    # mistralai/Mistral-7B-v0.1
    "mistral-7b": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    },
    # Qwen/Qwen2.5-0.5B, -1.5B; Qwen/Qwen3-0.6B, -1.7B
    "qwen2.5-0.5b": _qwen(
        "qwen2",
        (896, 4864, 24),
        (14, 2),
        max_position_embeddings=32768,
        sliding_window=32768,
        eos_token_id=151643,
    ),
    "qwen2.5-1.5b": _qwen(
        "qwen2",
        (1536, 8960, 28),
        (12, 2),
        max_position_embeddings=131072,
        sliding_window=131072,
        eos_token_id=151643,
    ),
    "qwen3-0.6b": _qwen(
        "qwen3", (1024, 3072, 28), (16, 8), head_dim=128, max_position_embeddings=40960, eos_token_id=151645
    ),
    "qwen3-1.7b": _qwen(
        "qwen3", (2048, 6144, 28), (16, 8), head_dim=128, max_position_embeddings=40960, eos_token_id=151645
    ),
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
