"""What a run will take, before it runs and without weights: memory of a process, FLOPs, hours.

Memory is no formula: an optimizer step of the very model, sharding and losses that would run is traced on tensors that
have sizes but no memory, in a process group that pretends to have all the processes. What the trace does not see is
what the libraries take for themselves (a CUDA context with NCCL: about 1 GiB) and what the allocator wastes.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rrt.cli import human_bytes, human_count
from rrt.config import ModelConfig, RecursiveConfig
from rrt.errors import UserError
from rrt.model import RecursiveTransformer
from rrt.products import choices_of
from train.distributed import set_last_micro_batch
from train.flops import peak_flops, run_flops_per_token
from train.objective import NEXT_TOKEN, Objective
from train.recipe import DryRun, RunConfig
from train.teacher import ShardedTeacher
from train.trainer import Recipe, accumulation, describe, set_up_model


class LiveMemory(TorchDispatchMode):
    """Bytes of the tensor storages that operators made and that still exist.

    Attributes:
        live, peak: bytes now, and at most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._watch((leaf._local_tensor if isinstance(leaf, DTensor) else leaf).untyped_storage())
        return result

    def __enter__(self) -> "LiveMemory":
        # FSDP frees gathered weights by shrinking their storage, which no operator does.
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = self._resize(storage, size)
            self._watch(storage)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, lambda _: self._set_size(key, 0))
        self._set_size(key, storage.nbytes())

    def _set_size(self, key: int, size: int) -> None:
        self.live += size - self._sizes.pop(key, 0)
        if size:
            self._sizes[key] = size
        else:
            self._storages.pop(key, None)
        self.peak = max(self.peak, self.live)


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. They do not all exist at the same time: `peak` is less than their sum.

    Attributes:
        parameters, optimizer, gradients: this process's part, fp32; AdamW keeps two moments.
        gathered: whole weights in the compute dtype.
        accumulated: whole fp32 gradients between micro-batches.
        reduced: buffer of the largest reduce-scatter.
        activations: what a forward keeps for its backward, merged weights included.
        loss: logits of a chunk with what the losses make of them, and the head's gradient.
        teacher: this process's part of its weights.
    """

    parameters: int
    optimizer: int
    gradients: int
    gathered: int
    accumulated: int
    reduced: int
    activations: int
    loss: int
    teacher: int
    peak: int


@contextmanager
def pretended_processes(count: int, shard_size: int) -> Iterator[DeviceMesh]:
    """The mesh of `count` processes, of which this one is the first and the only one."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        shape = (count // shard_size, shard_size) if shard_size else (count,)
        yield init_device_mesh("cpu", shape, mesh_dim_names=("copy", "shard")[-len(shape) :])
    finally:
        dist.destroy_process_group()


def estimate_memory(
    model: ModelConfig,
    recursive: RecursiveConfig,
    recipe: Recipe,
    world_size: int,
    device: str,
    objective: Objective = NEXT_TOKEN,
    teacher: tuple[ModelConfig, RecursiveConfig] | None = None,
) -> Memory:
    """Trace the micro-batches of one step as process 0 of `world_size` runs them on a device of this type.

    Args:
        teacher: the shape of the model that `objective` distills from, if it does.

    Raises:
        UserError: the model cannot be built, or the batch is not a whole number of micro-batches.
    """
    run, micro_batches = recipe.run, accumulation(recipe, world_size)
    at_norm = 0

    def note(*_: object) -> None:
        nonlocal at_norm
        at_norm = memory.live

    with (
        pretended_processes(world_size, run.shard_size) as mesh,
        FakeTensorMode(),
        LiveMemory() as memory,
        choices_of(device),
    ):
        module = RecursiveTransformer(model, recursive).train()
        set_up_model(module, run, mesh)
        compute_dtype = torch.bfloat16 if run.dtype == "bf16" else torch.float32
        sharded = teacher and ShardedTeacher(RecursiveTransformer(*teacher).to(compute_dtype), mesh)
        losses = objective.bind(module, sharded)
        module.norm.register_forward_hook(note)
        parameters = sum(p.to_local().nbytes for p in module.parameters())  # type: ignore[attr-defined]
        whole = sum(p.numel() for p in module.parameters())
        memory.peak = memory.live
        tokens = torch.zeros(run.micro_batch, recipe.data.seq_len, dtype=torch.int64)
        activations = loss_bytes = 0
        # A second micro-batch meets the gradients of the first; further ones meet the same.
        for micro in range(min(2, micro_batches)):
            set_last_micro_batch(module, micro == min(2, micro_batches) - 1)
            before = memory.live
            peak, memory.peak = memory.peak, memory.live
            loss = losses(tokens, tokens)[0]
            gathered = whole * compute_dtype.itemsize
            activations = at_norm - before - (gathered if micro == 0 else 0)
            loss_bytes = memory.peak - at_norm
            memory.peak = max(peak, memory.peak)
            loss.backward()
            del loss
        unit = max(_unit_sizes(module, run))
        optimizer = 2 * parameters
        return Memory(
            parameters=parameters,
            optimizer=optimizer,
            gradients=parameters,
            gathered=gathered,
            accumulated=4 * whole if micro_batches > 1 else 0,
            reduced=4 * unit,
            activations=activations,
            loss=loss_bytes,
            teacher=0 if sharded is None else sum(p.to_local().nbytes for p in sharded.model.parameters()),  # type: ignore[attr-defined]
            peak=memory.peak + optimizer,
        )


def _unit_sizes(model: RecursiveTransformer, run: RunConfig) -> Iterator[int]:
    """Parameters of each unit of FSDP."""
    stack = sum(p.numel() for p in model.stack.parameters())
    yield sum(p.numel() for p in model.parameters()) - stack
    if run.wrap == "stack":
        yield stack
    else:
        yield from (sum(p.numel() for p in layer.parameters()) for layer in model.stack.layers)


_PARTS = {
    "parameters": "parameters, this process's part in fp32",
    "optimizer": "optimizer, two moments of these",
    "gradients": "gradients, this process's part in fp32",
    "gathered": "gathered parameters",
    "accumulated": "gradients of all parameters between micro-batches",
    "reduced": "buffer of the largest reduce-scatter",
    "activations": "activations, with checkpointing: {}",
    "loss": "loss: a chunk's logits, gradient of the head",
    "teacher": "teacher, this process's part",
    "peak": "peak (not all at the same time)",
}


def estimate_table(
    recipe: Recipe,
    model: ModelConfig,
    recursive: RecursiveConfig,
    dry_run: DryRun,
    objective: Objective = NEXT_TOKEN,
    teacher: tuple[ModelConfig, RecursiveConfig] | None = None,
) -> str:
    """What training this model will take, for people. FLOPs and hours are those of the student."""
    run, processes = recipe.run, dry_run.processes
    device = "cpu" if run.device == "cpu" else "cuda"
    settings = [run.checkpointing, *(kind for kind in ("none", "layer", "loop") if kind != run.checkpointing)]
    estimates = {}
    for kind in settings:
        changed = replace(recipe, run=replace(run, checkpointing=kind))  # type: ignore[type-var]
        estimates[kind] = estimate_memory(model, recursive, changed, processes, device, objective, teacher)
    memory = estimates[run.checkpointing]
    rows = [(text.format(run.checkpointing), getattr(memory, name)) for name, text in _PARTS.items()]
    others = ", ".join(f"{kind} {human_bytes(estimates[kind].peak)}" for kind in settings[1:])
    flops = run_flops_per_token(model, recursive, recipe.data.seq_len, run)
    peak = run.peak_flops or peak_flops(dry_run.gpu)
    if peak is None:
        raise UserError(f"command line: --gpu: found {dry_run.gpu!r}, whose peak is not known; give --run.peak_flops")
    tokens = run.steps * run.batch_tokens
    hours = tokens * flops / (peak * dry_run.mfu * processes) / 3600
    width = max(len(label) for label, _ in rows)
    return "\n".join(
        [
            describe(model, recursive),
            f"train: {run.steps:,} steps of {human_count(run.batch_tokens)} tokens = {human_count(tokens)}; "
            f"{processes} process(es) x {accumulation(recipe, processes)} micro-batch(es) x {run.micro_batch} x "
            f"{recipe.data.seq_len}; {run.dtype}",
            f"memory of one process on {device}, traced, without the libraries' own:",
            *(f"  {label:<{width}}  {human_bytes(size):>12}" for label, size in rows),
            f"  peak with checkpointing: {others}",
            f"work: {human_count(flops)}FLOPs per token; {hours:,.1f} hours on {processes} x "
            f"{peak / 1e12:.0f} TFLOP/s at {dry_run.mfu:.0%} MFU",
        ]
    )
