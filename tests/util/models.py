"""Tiny random Hugging Face checkpoints of the three families, for tests of everything that reads them."""

from pathlib import Path
from typing import Any

import torch
import transformers

FAMILIES = ("gemma", "llama", "gpt_neox")

_KINDS = {"gemma": "Gemma", "llama": "Llama", "gpt_neox": "GPTNeoX"}
# MQA with a head width of its own, GQA with an untied head, and MHA with biases and partial rotary: small forms
# of Gemma 2B, TinyLlama and Pythia.
_OPTIONS: dict[str, dict[str, Any]] = {
    "gemma": dict(num_attention_heads=4, num_key_value_heads=1, head_dim=12),
    "llama": dict(num_attention_heads=4, num_key_value_heads=2),
    "gpt_neox": dict(num_attention_heads=4),
}


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
    """Write a random model of `family` ("gemma", "llama", "gpt_neox") as an HF directory without tokenizer.

    Norms and biases are far from their initial values, so that a tensor which is dropped or mixed up shows.
    `overrides` are fields of the transformers configuration.
    """
    sizes = dict(vocab_size=151, hidden_size=32, intermediate_size=80, max_position_embeddings=512)
    options = {**sizes, **_OPTIONS[family], **overrides}
    config = getattr(transformers, f"{_KINDS[family]}Config")(num_hidden_layers=num_layers, **options)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{_KINDS[family]}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.08 if parameter.dim() > 1 else 0.3))
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    return Path(directory)
