"""Small models of every shape that sharding must handle, and a batch that processes share."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from rrt.model.config import LoraRanks, ModelConfig, RecursiveConfig
from rrt.model.transformer import Checkpointing, RecursiveTransformer
from tests.util.models import MIXED_RANKS
from train.distributed import Processes, Wrap, fill_parameters, set_last_micro_batch, shard_model
from train.objective import NEXT_TOKEN

GEMMA = ModelConfig(
    family="gemma",
    vocab_size=62,
    hidden_size=16,
    num_layers=6,
    num_heads=4,
    num_kv_heads=1,
    head_dim=6,
    intermediate_size=20,
    max_position_embeddings=64,
    activation="gelu_tanh",
    gated_mlp=True,
    norm_type="rmsnorm_1p",
    norm_eps=1e-6,
    rope_theta=10000.0,
    rotary_fraction=1.0,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    parallel_residual=False,
    tie_embeddings=True,
    scale_embeddings=True,
)
NEOX = dataclasses.replace(
    GEMMA,
    family="gpt_neox",
    num_kv_heads=4,
    head_dim=8,
    activation="gelu",
    gated_mlp=False,
    norm_type="layernorm",
    rotary_fraction=0.25,
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    parallel_residual=True,
    tie_embeddings=False,
    scale_embeddings=False,
)
ODD = dataclasses.replace(GEMMA, vocab_size=61, hidden_size=15, num_heads=3, intermediate_size=21)
RANKS = LoraRanks.uniform(4)
MODELS = {
    "vanilla, tied head": (GEMMA, RecursiveConfig()),
    "vanilla, untied head": (NEOX, RecursiveConfig()),
    "recursive": (GEMMA, RecursiveConfig(num_loops=2)),
    "relaxed": (GEMMA, RecursiveConfig(num_loops=2, lora_rank=RANKS)),
    "relaxed, three loops": (GEMMA, RecursiveConfig(num_loops=3, lora_rank=LoraRanks(q=2, ffn=6))),
    "relaxed, mixed ranks": (GEMMA, RecursiveConfig(num_loops=3, lora_rank=MIXED_RANKS)),
    "relaxed, untied norms and biases": (NEOX, RecursiveConfig(num_loops=3, lora_rank=RANKS, untie_norms=True)),
    "prefix": (GEMMA, RecursiveConfig(num_loops=2, prefix_length=3)),
    "low rank only": (NEOX, RecursiveConfig(lora_rank=LoraRanks(q=2, out=3, ffn=6), low_rank_only=True)),
    "sequence": (GEMMA, RecursiveConfig(num_loops=2, sharing="sequence", lora_rank=RANKS)),
    "odd shapes": (ODD, RecursiveConfig(num_loops=3, lora_rank=LoraRanks.uniform(5), untie_norms=True)),
}
SEQUENCES, LENGTH = 12, 7


def build(name: str) -> RecursiveTransformer:
    """Make a model whose every parameter is random, so that every one has a gradient."""
    model = RecursiveTransformer(*MODELS[name]).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    return model


def build_sharded(
    name: str,
    mesh: torch.distributed.DeviceMesh,
    dtype: torch.dtype | None,
    wrap: Wrap = "stack",
    checkpointing: Checkpointing = "none",
) -> RecursiveTransformer:
    start = build(name)
    model = build(name) if dtype is None else build(name).float()
    model.set_merge(True)
    model.stack.checkpointing = checkpointing
    shard_model(model, mesh, dtype, wrap)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    fill_parameters(model, start.get_parameter)
    return model


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 61, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(2))
    return tokens[:, :-1], tokens[:, 1:]


def backward(model: RecursiveTransformer, group: Processes, accumulation: int) -> float:
    """Run the backward of this process's share of `batch()`; returns the mean loss of the share."""
    inputs, targets = (part.chunk(group.world_size)[group.rank].chunk(accumulation) for part in batch())
    total = 0.0
    for micro in range(accumulation):
        set_last_micro_batch(model, micro == accumulation - 1)
        loss = NEXT_TOKEN.bind(model)(inputs[micro], targets[micro])[0] / accumulation
        loss.backward()
        total += loss.item()
    return total


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the mean cross-entropy of whole logits [batch, T, V]."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def whole(tensor: Tensor | None) -> Tensor:
    assert isinstance(tensor, DTensor)
    return tensor.full_tensor()
