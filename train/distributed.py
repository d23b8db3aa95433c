"""Processes and sharding: how a looped model is wrapped by FSDP2, loaded into shards and gathered again.

The looped stack is one FSDP unit that keeps its gathered weights from the first loop of the forward to the
end of the backward: each weight is gathered once a step however often it is used, so the block moves B
times fewer bytes than the layers of its full-size parent.
"""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from rrt.cli import EXIT_USER_ERROR
from rrt.errors import UserError
from rrt.model import RecursiveTransformer

T = TypeVar("T")


class AgreedError(UserError):
    """Bad input that every process knows of."""


class LoneError(UserError):
    """Bad input that one process met by itself."""


@dataclass(frozen=True)
class Processes:
    """This process among the others, and the device it computes on."""

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Join the processes that torchrun started, or be the only one without it.

    Args:
        device: "cpu", "cuda", or "auto" for CUDA where it is available.

    Raises:
        UserError: CUDA was asked for and is not there, or more processes than GPUs were started.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if kind == "cuda":
        # Asked of all local processes, not of this one's rank, so that all of them end here together.
        count, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if count > gpus:
            raise UserError(f"field 'run.device': found {gpus} GPU(s); expected one for each of {count} process(es)")
        torch.cuda.set_device(local_rank)
    target = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    backend = "nccl" if kind == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, device_id=target if kind == "cuda" else None)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(kind, (dist.get_world_size(),))
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), target, mesh)
    except AgreedError:
        dist.destroy_process_group()
        raise
    except UserError as error:  # the others wait for this process: leaving the group in order would hang
        raise LoneError(str(error)) from error
    dist.destroy_process_group()


def agree(action: Callable[[], T]) -> T:
    """Run `action` in every process; if it is bad input for any, it is a `UserError` in all.

    Bad input is a `UserError`, or the operating system's refusal of a file. Also a barrier: nobody returns
    before everybody has run `action`.
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


def from_main(action: Callable[[], T]) -> T:
    """What `action` gives the first process, in all of them; errors as in `agree`."""
    result = agree(action if dist.get_rank() == 0 else lambda: None)
    box = [result]
    dist.broadcast_object_list(box, src=0)
    return cast(T, box[0])


def only_main_reports_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Errors that all processes meet alike are printed by the first; all end with the same exit code."""

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except UserError as error:
            if int(os.environ.get("RANK", "0")) == 0 or isinstance(error, LoneError):
                raise
            sys.exit(EXIT_USER_ERROR)

    return wrapped


def _shard_dim(parameter: nn.Parameter, world_size: int) -> Shard:
    """Shard along the first dimension that divides evenly: LoRA's first is only B loops long.

    Where none does, along the first: FSDP pads no other.
    """
    shape = parameter.shape
    even = [dim for dim in range(parameter.dim()) if shape[dim] % world_size == 0]
    return Shard(even[0] if even else 0)


def shard_model(model: RecursiveTransformer, mesh: DeviceMesh, compute_dtype: torch.dtype | None) -> None:
    """Wrap `model` in place: the looped stack as one unit, embedding, norm and head as the root's.

    Args:
        compute_dtype: dtype of weights and activations in forward and backward; gradients are reduced in
            fp32. None computes in the parameters' own dtype.
    """
    policy = (
        MixedPrecisionPolicy()
        if compute_dtype is None
        else MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    )

    def placement(parameter: nn.Parameter) -> Shard:
        return _shard_dim(parameter, mesh.size())

    fully_shard(model.stack, mesh=mesh, mp_policy=policy, reshard_after_forward=False, shard_placement_fn=placement)
    fully_shard(model, mesh=mesh, mp_policy=policy, shard_placement_fn=placement)


def set_last_micro_batch(model: nn.Module, last: bool) -> None:
    """Between micro-batches keep gathered weights and unreduced gradients; reduce and free at the last.

    Freeing at the last is what makes the optimizer's new weights be gathered in the next step.
    """
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(last)
    model.set_reshard_after_backward(last)


@torch.no_grad()
def fill_parameters(model: nn.Module, get: Callable[[str], Tensor]) -> None:
    """Set every parameter of a sharded model from `get(name)`, each process keeping its own part.

    No communication: each process reads (mapped) tensors one at a time.
    """
    for name, parameter in model.named_parameters():
        stored = get(name).to(parameter.device, parameter.dtype)
        if isinstance(parameter, DTensor):
            stored = distribute_tensor(stored, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.copy_(stored)


def full_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter gathered whole, one at a time. A collective: all processes must iterate to the end."""
    for name, parameter in model.named_parameters():
        yield name, (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()
