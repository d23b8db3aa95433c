"""Processes and sharding: wrap a looped model with FSDP2, load it into shards and gather it again.

A weight of the looped stack is gathered once a step, by the first loop of the forward, and its gradient is reduced
once, when the backward has reached the first loop again: the block moves B times fewer bytes than the layers of its
full-size parent. The stack is one FSDP unit or, for large blocks, each of its layers is.
"""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from rrt.common.processes import join_processes
from rrt.errors import UserError
from rrt.model.transformer import RecursiveTransformer

T = TypeVar("T")
Wrap = Literal["stack", "layer"]


class AgreedError(UserError):
    """A user's error that every process raises."""


@dataclass(frozen=True)
class Processes:
    """This process's place among all processes, and its device."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh
    """[processes] that share one copy of the parameters, or [copies, processes of a copy] (hybrid sharding)."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def mesh_dimensions(world_size: int, shard_size: int) -> dict[str, int]:
    """Return the mesh's dimensions by name, for `world_size` processes of which `shard_size` (0: all) share one copy.

    Raises:
        UserError: `shard_size` does not divide `world_size`.
    """
    if not shard_size:
        return {"shard": world_size}
    if world_size % shard_size:
        raise UserError(f"field 'run.shard_size': found {shard_size}; expected a divisor of {world_size} process(es)")
    return {"copy": world_size // shard_size, "shard": shard_size}


@contextmanager
def processes(device: str = "auto", shard_size: int = 0) -> Iterator[Processes]:
    """Join the processes that torchrun started, or be the only one without it.

    Args:
        device: "cpu", "cuda", or "auto" for CUDA where it is available.
        shard_size: processes that share one copy of the parameters, neighbours by rank; 0 for all.

    Raises:
        UserError: CUDA was requested and is not available, more processes than GPUs were started, or `shard_size`
            does not divide their number.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    dimensions = mesh_dimensions(world_size, shard_size)
    target = join_processes(kind, "field 'run.device'")
    mesh = init_device_mesh(kind, tuple(dimensions.values()), mesh_dim_names=tuple(dimensions))
    try:
        yield Processes(dist.get_rank(), world_size, target, mesh)
    except AgreedError:
        dist.destroy_process_group()
        raise
    # Not after an error of this process alone: the others wait for it, and an orderly end of the group would hang.
    dist.destroy_process_group()


def raise_everywhere(action: Callable[[], T]) -> T:
    """Run `action` in every process and return its result; a user's error in any process is raised in all.

    Such an error is a `UserError`, or an `OSError` such as a missing file. Also a barrier: no process returns before
    all have run `action`.

    Raises:
        AgreedError: with the message of the first process that met an error.
    """
    result, message = None, None
    try:
        result = action()
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    for found in messages:
        if found is not None:
            raise AgreedError(found)
    return cast(T, result)


def broadcast_from_main(action: Callable[[], T]) -> T:
    """Run `action` in the first process and return its result in all; errors as in `raise_everywhere`."""
    result = raise_everywhere(action if dist.get_rank() == 0 else lambda: None)
    box = [result]
    dist.broadcast_object_list(box, src=0)
    return cast(T, box[0])


def _shard_dim(parameter: nn.Parameter, world_size: int) -> Shard:
    """Shard along the first dimension that divides evenly, as LoRA's first is only B loops long.

    If none does, along the first: FSDP pads no other.
    """
    shape = parameter.shape
    even = [dim for dim in range(parameter.dim()) if shape[dim] % world_size == 0]
    return Shard(even[0] if even else 0)


def shard_model(
    model: RecursiveTransformer, mesh: DeviceMesh, compute_dtype: torch.dtype | None, wrap: Wrap = "stack"
) -> None:
    """Wrap `model` in place: the looped stack or its layers are FSDP units; embedding, norm and head are the root's.

    A step makes one all-gather and one reduce-scatter for each unit, for any number of loops and micro-batches, and
    with a mesh of several copies one all-reduce of the scattered gradients. A single process that computes in the
    parameters' own dtype is not wrapped: FSDP would copy all its weights and gradients in every step.

    Args:
        mesh: of one dimension, or two: the parameters are sharded over the last and replicated over the first.
        compute_dtype: dtype of weights and activations in forward and backward; gradients are reduced in
            fp32. None computes in the parameters' own dtype.
        wrap: "stack" for the fewest collectives; "layer" overlaps them with computation and needs reduce-scatter
            buffers of one layer's size only.
    """
    if mesh.size() == 1 and compute_dtype is None:
        return
    policy = (
        MixedPrecisionPolicy()
        if compute_dtype is None
        else MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    )

    def placement(parameter: nn.Parameter) -> Shard:
        return _shard_dim(parameter, mesh.size(-1))

    def shard(module: nn.Module, **options: bool) -> None:
        fully_shard(module, mesh=mesh, mp_policy=policy, shard_placement_fn=placement, **options)

    # Not resharded after the forward: the next loop, or the backward, needs the same weights.
    if wrap == "layer":
        for layer in model.stack.layers:
            shard(layer, reshard_after_forward=False)
            layer.register_forward_hook(functools.partial(_finish_at_first_loop, model))
    if wrap == "stack" or model.stack.prefix is not None:
        shard(model.stack, reshard_after_forward=False)
    shard(model)


_in_last_micro_batch: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def _finish_at_first_loop(model: nn.Module, layer: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    """Forward hook: let the layer's backward reduce and free only in loop 0, which it reaches last."""
    finish = args[1] == 0 and _in_last_micro_batch.get(model, True)
    assert isinstance(layer, FSDPModule)
    if output.requires_grad:
        output.register_hook(lambda _: _set_finish(layer, finish))


def _set_finish(module: FSDPModule, finish: bool) -> None:
    module.set_requires_gradient_sync(finish)
    module.set_reshard_after_backward(finish)


def as_forward(model: nn.Module, function: Callable[..., T]) -> Callable[..., T]:
    """Wrap `function` so that FSDP treats it as `model.forward`: weights gathered, backward prepared.

    For functions that use the root's weights (embedding, norm, head) outside the model's own forward. Without FSDP it
    is `function` itself.
    """
    model.as_forward = function  # type: ignore[assignment]
    register_fsdp_forward_method(model, "as_forward")
    return cast(Callable[..., T], model.as_forward)


def set_last_micro_batch(model: nn.Module, last: bool) -> None:
    """Keep gathered weights and unreduced gradients between micro-batches; reduce and free after the last.

    Weights freed after the last are gathered anew in the next step, as the optimizer has changed them.
    """
    if isinstance(model, FSDPModule):
        _in_last_micro_batch[model] = last
        _set_finish(model, last)


@torch.no_grad()
def fill_parameters(model: nn.Module, get: Callable[[str], Tensor]) -> None:
    """Set every parameter of a sharded model from `get(name)`; each process keeps its own part.

    Without communication: each process reads (mapped) tensors one at a time.
    """
    for name, parameter in model.named_parameters():
        stored = get(name).to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            stored = distribute_tensor(stored, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(stored)


def full_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Gather the parameters whole and yield each with its name. A collective: all processes must iterate to the end."""
    for name, parameter in model.named_parameters():
        yield name, (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()
