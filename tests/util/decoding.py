"""Small random models in the families' forms, and their paged decoding by whole prompts and by tokens."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from rrt.checkpoint.presets import preset
from rrt.decode.decoder import Decoder
from rrt.decode.kv_cache import PagedCache
from rrt.decode.passes import Chunk, PassRows
from rrt.model.config import LoraRanks, RecursiveConfig
from rrt.model.transformer import RecursiveTransformer
from tests.util.models import MIXED_RANKS

FAMILIES = {
    "gemma": ("gemma-2b", dict(num_heads=4, num_kv_heads=1, head_dim=16)),
    "llama": ("tinyllama-1.1b", dict(num_heads=6, num_kv_heads=2, head_dim=8)),
    "qwen2": ("qwen2.5-0.5b", dict(num_heads=4, num_kv_heads=2, head_dim=12)),
    "qwen3": ("qwen3-0.6b", dict(num_heads=6, num_kv_heads=3, head_dim=16)),
    "gpt_neox": ("pythia-410m", dict(num_heads=4, num_kv_heads=4, head_dim=8)),
}
RANKS = LoraRanks(q=3, kv=5, out=0, ffn=7)
LOOPED = {
    "vanilla": RecursiveConfig(),
    "recursive-2": RecursiveConfig(num_loops=2),
    "recursive-3": RecursiveConfig(num_loops=3),
    "relaxed-2": RecursiveConfig(num_loops=2, lora_rank=RANKS),
    "relaxed-3-untied": RecursiveConfig(num_loops=3, lora_rank=LoraRanks(q=0, kv=2, out=9, ffn=4), untie_norms=True),
    "relaxed-mixed-2": RecursiveConfig(num_loops=2, lora_rank=MIXED_RANKS),
    "relaxed-mixed-untied-3": RecursiveConfig(num_loops=3, lora_rank=MIXED_RANKS, untie_norms=True),
    "prefix-2": RecursiveConfig(num_loops=2, prefix_length=5),
    "head-lora-3": RecursiveConfig(num_loops=3, head_lora_rank=5),
    "translators-2": RecursiveConfig(num_loops=2, lora_rank=RANKS, exit_translators=True),
    "translators-head-lora-3": RecursiveConfig(num_loops=3, head_lora_rank=5, exit_translators=True),
    "relaxed-prefix-untied-3": RecursiveConfig(num_loops=3, lora_rank=RANKS, untie_norms=True, prefix_length=8),
    "sequence-relaxed-prefix-untied-3": RecursiveConfig(
        num_loops=3, sharing="sequence", lora_rank=RANKS, untie_norms=True, prefix_length=8
    ),
    "low-rank-only": RecursiveConfig(lora_rank=LoraRanks(q=3, kv=0, out=5, ffn=7), low_rank_only=True),
    "cycle-rev-relaxed-prefix-3": RecursiveConfig(num_loops=3, sharing="cycle-rev", lora_rank=RANKS, prefix_length=5),
}
VOCABULARY = 97


def make_model(
    family: str = "llama",
    looped: str = "relaxed-2",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **overrides: Any,
) -> RecursiveTransformer:
    """Make a random model whose norms, biases and LoRAs are far from their initial values."""
    name, heads = FAMILIES[family]
    sizes = dict(vocab_size=VOCABULARY, hidden_size=48, num_layers=6, intermediate_size=72, max_position_embeddings=64)
    config = dataclasses.replace(preset(name), **{**sizes, **heads, **overrides})
    model = RecursiveTransformer(config, LOOPED[looped]).to(dtype)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * (0.1 if parameter.dim() > 1 else 0.3))
    return model.requires_grad_(False).eval()


def make_decoder(model: RecursiveTransformer, num_pages: int = 60, page_size: int = 4, **options: Any) -> Decoder:
    """Make a decoder with a cache of its own that is full of NaN."""
    cache = PagedCache(model.config, model.recursion, num_pages, page_size, dtype=model.embed.dtype)
    # What no row wrote must not be read: it would show as NaN.
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    return Decoder(model, cache, **options)


def random_tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def prefill(decoder: Decoder, sequence: int, tokens: Tensor, start: int = 0) -> Tensor:
    """Run all loops over the tokens at [start, start + len) as one chunk -> the state [T, D] after the last."""
    cache = decoder.cache
    cache.append(sequence, len(tokens))
    x = decoder.embed(tokens)
    for loop in range(cache.num_loops):
        x = decoder.block(x, cache.plan(PassRows(chunks=[Chunk(sequence, loop, start, len(tokens))])))
    return x


def decode(decoder: Decoder, sequences: list[int], tokens: Any, positions: list[int]) -> Tensor:
    """Run all loops over one token of each sequence -> the states [M, D]."""
    cache = decoder.cache
    for sequence in sequences:
        cache.append(sequence, 1)
    x = decoder.embed(torch.as_tensor(tokens))
    for loop in range(cache.num_loops):
        x = decoder.block(x, cache.plan(PassRows(sequences, [loop] * len(sequences), positions)))
    return x


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert found.isfinite().all()
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
