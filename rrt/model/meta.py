"""Models without memory (on torch's meta device), and the configuration of a model's first loops."""

import dataclasses

import torch

from rrt.errors import UserError
from rrt.model.config import LORA_GROUP_OF_LINEAR, LORA_GROUPS, LoraRanks, ModelConfig, RecursiveConfig, linear_shapes
from rrt.model.transformer import RecursiveTransformer


def meta_model(model: ModelConfig, recursion: RecursiveConfig) -> RecursiveTransformer:
    """Build the model without memory, for names, shapes and counts."""
    with torch.device("meta"):
        return RecursiveTransformer(model, recursion)


def parameter_shapes(model: ModelConfig, recursion: RecursiveConfig) -> dict[str, tuple[int, ...]]:
    """Return every parameter's name and shape."""
    return {name: tuple(p.shape) for name, p in meta_model(model, recursion).named_parameters()}


def capped_lora_ranks(model: ModelConfig, recursion: RecursiveConfig) -> LoraRanks:
    """Return the ranks of `recursion`, those of groups each at most what the largest linear of the group can have."""
    ranks, largest = recursion.lora_rank, dict.fromkeys(LORA_GROUPS, 0)
    for name, shape in linear_shapes(model).items():
        group = LORA_GROUP_OF_LINEAR[name]
        largest[group] = max(largest[group], min(shape))
    return dataclasses.replace(
        ranks,
        q=min(ranks.q, largest["q"]),
        kv=min(ranks.kv, largest["kv"]),
        out=min(ranks.out, largest["out"]),
        ffn=min(ranks.ffn, largest["ffn"]),
    )


def first_loops(
    model: ModelConfig, recursion: RecursiveConfig, num_loops: int, where: str
) -> tuple[ModelConfig, RecursiveConfig]:
    """Derive the configuration of a model that stops after its first `num_loops` loops.

    Args:
        where: names the model in errors.

    Raises:
        UserError: it has fewer loops, or the loop that would be the last exits through a translator.
    """
    trained = recursion.num_loops
    if not 1 <= num_loops <= trained:
        hint = " (fold a vanilla model with python -m rrt.convert first)" if trained == 1 else ""
        raise UserError(f"num_loops: found {num_loops}; {where} has {trained}: expected 1 to {trained}{hint}")
    if num_loops == trained:
        return model, recursion
    recursion.require_whole_loops(f"num_loops: found {num_loops}; {where} has {trained}")
    if recursion.exit_translators:
        raise UserError(
            f"num_loops: found {num_loops}; {where} has {trained} and exit translators, which a last loop cannot have: "
            f"expected {trained}, or exit there: exit_loop={num_loops - 1}"
        )
    exits = tuple(loop for loop in recursion.exit_loops if loop < num_loops - 1)
    model = dataclasses.replace(model, num_layers=recursion.layers_per_loop(model) * num_loops)
    if not recursion.head_lora_rank:
        return model, dataclasses.replace(recursion, num_loops=num_loops, exit_loops=exits)
    # The loop that becomes the last one gets a head of its own, merged with its LoRA.
    model = dataclasses.replace(model, tie_embeddings=False)
    return model, dataclasses.replace(recursion, num_loops=num_loops, exit_loops=(), head_lora_rank=0)
