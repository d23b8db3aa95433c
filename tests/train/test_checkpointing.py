"""Activation checkpointing: the tensors kept from the forward for the backward."""

import torch
from torch import Tensor

from rrt.model.transformer import Checkpointing, ForwardContext, rope_cos_sin
from tests.util.sharding import build


def kept_bytes(checkpointing: Checkpointing) -> tuple[int, int, int]:
    """Bytes of activations kept for the backward of the stack, and of the hidden states, and the number of layers."""
    model = build("recursive")
    stack = model.stack
    stack.checkpointing = checkpointing
    x = torch.randn(2, 8, model.config.hidden_size, dtype=model.embed.dtype, requires_grad=True)
    rope = rope_cos_sin(model.config, torch.arange(8)[None], x.dtype)
    other = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *rope)}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        stack(x, ForwardContext(rope))
    total = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in other)
    return total, x.nbytes, model.config.num_layers


def test_only_the_inputs_of_layers_or_of_loops_are_kept() -> None:
    everything, state, depth = kept_bytes("none")
    assert everything > 4 * depth * state
    assert kept_bytes("layer")[0] == depth * state
    assert kept_bytes("loop")[0] == build("recursive").recursion.num_loops * state
