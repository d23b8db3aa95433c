"""Models without memory (on torch's meta device), and the configuration of a model's first loops."""

import dataclasses

import torch

from rrt.errors import UserError
from rrt.model.config import LORA_GROUP_OF_LINEAR, LoraRanks, ModelConfig, RecursiveConfig
from rrt.model.loop_linear import loop_linears
from rrt.model.transformer import RecursiveTransformer


def meta_model(model: ModelConfig, recursion: RecursiveConfig) -> RecursiveTransformer:
    """Build the model without memory, for names, shapes and counts."""
    with torch.device("meta"):
        return RecursiveTransformer(model, recursion)


def parameter_shapes(model: ModelConfig, recursion: RecursiveConfig) -> dict[str, tuple[int, ...]]:
    """Return every parameter's name and shape."""
    return {name: tuple(p.shape) for name, p in meta_model(model, recursion).named_parameters()}


def capped_lora_ranks(model: ModelConfig, recursion: RecursiveConfig) -> LoraRanks:
    """Return the ranks of `recursion`, each at most what the largest linear of its group can have."""
    ranks = dict.fromkeys(LORA_GROUP_OF_LINEAR.values(), 0)
    for name, linear in loop_linears(meta_model(model, recursion).stack.layers[0]):
        ranks[LORA_GROUP_OF_LINEAR[name]] = max(ranks[LORA_GROUP_OF_LINEAR[name]], linear.rank)
    return LoraRanks(**ranks)


def first_loops(
    model: ModelConfig, recursion: RecursiveConfig, num_loops: int, where: str
) -> tuple[ModelConfig, RecursiveConfig]:
    """Derive the configuration of a model that stops after its first `num_loops` loops.

    Args:
        where: names the model in errors.

    Raises:
        UserError: it has fewer loops.
    """
    trained = recursion.num_loops
    if not 1 <= num_loops <= trained:
        hint = " (fold a vanilla model with python -m rrt.convert first)" if trained == 1 else ""
        raise UserError(f"num_loops: found {num_loops}; {where} has {trained}: expected 1 to {trained}{hint}")
    if num_loops == trained:
        return model, recursion
    recursion.require_whole_loops(f"num_loops: found {num_loops}; {where} has {trained}")
    exits = tuple(loop for loop in recursion.exit_loops if loop < num_loops - 1)
    model = dataclasses.replace(model, num_layers=recursion.layers_per_loop(model) * num_loops)
    if not recursion.head_lora_rank:
        return model, dataclasses.replace(recursion, num_loops=num_loops, exit_loops=exits)
    # The loop that becomes the last one gets a head of its own, merged with its LoRA.
    model = dataclasses.replace(model, tie_embeddings=False)
    return model, dataclasses.replace(recursion, num_loops=num_loops, exit_loops=(), head_lora_rank=0)
