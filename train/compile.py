"""torch.compile of a looped stack's layers."""

import torch

from rrt.errors import UserError
from rrt.model.loop_linear import loop_linears
from rrt.model.transformer import LoopedStack


def compile_layers(stack: LoopedStack, device: torch.device) -> None:
    """Compile the forward of each layer of `stack`, in place.

    Layers of equal LoRA ranks share their graphs, one for each loop. The hooks of FSDP and activation checkpointing
    stay outside the graphs, as they are on `__call__`.

    Raises:
        UserError: torch.compile does not work on this machine, for example without a C++ compiler.
    """
    check_compiler(device)
    config = torch._dynamo.config
    # A graph per loop and shape of layer, and more for other strides or modes; torch refuses to compile beyond its
    # limits.
    kinds = {tuple(linear.rank for _, linear in loop_linears(layer)) for layer in stack.layers}
    limit = 4 * stack.num_loops * len(kinds)
    config.recompile_limit = max(config.recompile_limit, limit)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, limit)
    for layer in stack.layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False)


def check_compiler(device: torch.device) -> None:
    """Try torch.compile on one addition.

    Raises:
        UserError: it fails.
    """

    @torch.compile(fullgraph=True)
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x + x

    try:
        twice(torch.ones(16, device=device))
    except Exception as error:  # whatever torch, its backend or their compilers raise
        needed = "Triton" if device.type == "cuda" else "a C++ compiler (g++, or the variable CXX)"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"field 'run.compile': found true, but torch.compile fails on {device.type}: {reason}; expected {needed}, "
            "or --run.compile false"
        ) from error
