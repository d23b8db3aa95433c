"""torch.compile of a looped stack's layers."""

import torch

from rrt.errors import UserError
from rrt.model.transformer import LoopedStack


def compile_layers(stack: LoopedStack, device: torch.device) -> None:
    """Compile the forward of each layer of `stack`, in place.

    All layers share their graphs, one for each loop. The hooks of FSDP and activation checkpointing stay outside of
    them: they are on what calls a layer's forward.

    Raises:
        UserError: torch.compile does not work here, as where there is no compiler.
    """
    check_compiler(device)
    config = torch._dynamo.config
    # One per loop, and again for other strides or modes; past its limit torch refuses.
    config.recompile_limit = max(config.recompile_limit, 4 * stack.num_loops)
    for layer in stack.layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, dynamic=False)


def check_compiler(device: torch.device) -> None:
    """Compile one addition.

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
