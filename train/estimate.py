"""Estimate of a run before it starts and without weights: memory of a process, FLOPs, hours.

The memory is traced, not a formula: one optimizer step of the same model, sharding and losses runs on fake tensors,
which have sizes but no memory, in a fake process group of the full size. The trace does not see the memory of the
libraries themselves (a CUDA context with NCCL: about 1 GiB) or the allocator's fragmentation.
"""

import gc
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
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rrt.common.cli import human_bytes, human_count
from rrt.errors import UserError
from rrt.model.config import ModelConfig, RecursiveConfig
from rrt.model.transformer import RecursiveTransformer
from rrt.ops.precision import pretend_device
from train.architecture import TrainingSpec, describe_model
from train.distributed import mesh_dimensions, set_last_micro_batch
from train.flops import peak_flops, run_flops_per_token
from train.recipe import DryRun, Recipe, RunConfig, accumulation
from train.teacher import ShardedTeacher
from train.trainer import set_up_model


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of tensor storages that operators made and that still exist.

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
        # FSDP frees gathered weights by resizing their storage, without an operator.
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
        gathered, accumulated, reduced: FSDP's unsharded weights in the compute dtype, unsharded fp32 gradients between
            micro-batches, and buffer of the largest reduce-scatter; 0 for a single process without FSDP.
        activations: kept by a forward for its backward, merged weights included.
        loss: logits of a chunk and matrices derived from them, and the head's gradient.
        teacher: this process's part; each of several processes also gathers a layer and the head at a time.
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
def fake_processes(count: int, shard_size: int) -> Iterator[DeviceMesh]:
    """Give the mesh of `count` processes, of which this one is the first and only this one exists."""
    dimensions = mesh_dimensions(count, shard_size)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield init_device_mesh("cpu", tuple(dimensions.values()), mesh_dim_names=tuple(dimensions))
    finally:
        dist.destroy_process_group()


def estimate_memory(spec: TrainingSpec, recipe: Recipe, world_size: int, device: str) -> Memory:
    """Trace the micro-batches of one step as process 0 of `world_size` runs them on a device of this type.

    Raises:
        UserError: the model cannot be built, the batch is not a whole number of micro-batches, or `run.shard_size`
            does not divide the processes.
    """
    run, micro_batches = recipe.run, accumulation(recipe, world_size)
    compute_dtype = torch.bfloat16 if run.dtype == "bf16" else torch.float32
    at_norm = 0

    def note(*_: object) -> None:
        nonlocal at_norm
        at_norm = memory.live

    with (
        fake_processes(world_size, run.shard_size) as mesh,
        FakeTensorMode(),
        LiveMemory() as memory,
        pretend_device(device),
    ):
        teacher, teacher_bytes = None, 0
        if spec.teacher is not None:
            teacher = ShardedTeacher(_make_model(*spec.teacher, compute_dtype), mesh)
            teacher_bytes = _local_bytes(teacher.model)
        model = _make_model(spec.model, spec.recursion, torch.float32)
        set_up_model(model, run, spec.objective, mesh)
        losses = spec.objective.bind(model, teacher)
        model.norm.register_forward_hook(note)
        gc.collect()
        memory.peak = memory.live
        whole, trained = (
            sum(p.numel() for p in model.parameters() if p.requires_grad or not only) for only in (False, True)
        )
        wrapped = isinstance(model, FSDPModule)
        gathered = whole * compute_dtype.itemsize if wrapped else 0
        tokens = torch.zeros(run.micro_batch, recipe.data.seq_len, dtype=torch.int64)
        # The second micro-batch adds to the gradients of the first; further ones take no more memory.
        traced = min(2, micro_batches)
        for micro in range(traced):
            set_last_micro_batch(model, micro == traced - 1)
            before, peak = memory.live, memory.peak
            memory.peak = before
            loss = losses(tokens, tokens)[0]
            activations = at_norm - before - (gathered if micro == 0 else 0)
            loss_bytes = memory.peak - at_norm
            memory.peak = max(peak, memory.peak)
            loss.backward()
            del loss
        gradients = _local_bytes(model, only_trained=True)
        return Memory(
            parameters=_local_bytes(model),
            optimizer=2 * gradients,
            gradients=gradients,
            gathered=gathered,
            accumulated=4 * trained if wrapped and micro_batches > 1 else 0,
            reduced=4 * max(_unit_sizes(model, run)) if wrapped else 0,
            activations=activations,
            loss=loss_bytes,
            teacher=teacher_bytes,
            peak=memory.peak + 2 * gradients,
        )


def _make_model(model: ModelConfig, recursion: RecursiveConfig, dtype: torch.dtype) -> RecursiveTransformer:
    """Make a model in its dtype: fake tensors cannot be converted in place."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return RecursiveTransformer(model, recursion).train()
    finally:
        torch.set_default_dtype(default)


def _local_bytes(model: RecursiveTransformer, only_trained: bool = False) -> int:
    """Return the bytes of this process's part of the parameters."""
    chosen = (p for p in model.parameters() if p.requires_grad or not only_trained)
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in chosen)


def _unit_sizes(model: RecursiveTransformer, run: RunConfig) -> Iterator[int]:
    """Yield the number of trained parameters of each FSDP unit."""

    def count(module: torch.nn.Module) -> int:
        return sum(p.numel() for p in module.parameters() if p.requires_grad)

    yield count(model) - count(model.stack)
    yield from map(count, [model.stack] if run.wrap == "stack" else model.stack.layers)


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


def estimate_table(recipe: Recipe, spec: TrainingSpec, dry_run: DryRun) -> str:
    """Format what a dry run prints."""
    run, processes = recipe.run, dry_run.processes
    tokens = run.steps * run.batch_tokens
    device = "cpu" if run.device == "cpu" else "cuda"
    settings = [run.checkpointing, *(kind for kind in ("none", "layer", "loop") if kind != run.checkpointing)]
    estimates = {}
    for kind in settings:
        changed = replace(recipe, run=replace(run, checkpointing=kind))  # type: ignore[type-var]
        estimates[kind] = estimate_memory(spec, changed, processes, device)
    memory = estimates[run.checkpointing]
    rows = [
        (text.format(run.checkpointing), getattr(memory, name))
        for name, text in _PARTS.items()
        if getattr(memory, name)
    ]
    others = ", ".join(f"{kind} {human_bytes(estimates[kind].peak)}" for kind in settings[1:])
    flops = run_flops_per_token(
        spec.model,
        spec.recursion,
        recipe.data.seq_len,
        run,
        spec.objective,
        spec.teacher,
    )
    width = max(len(label) for label, _ in rows)
    return "\n".join(
        [
            describe_model(spec.model, spec.recursion),
            f"loss: {spec.objective.describe(spec.recursion.num_loops)}",
            f"train: {run.steps:,} steps of {human_count(run.batch_tokens)} tokens = {human_count(tokens)}; "
            f"{processes} process(es) x {accumulation(recipe, processes)} micro-batch(es) x {run.micro_batch} x "
            f"{recipe.data.seq_len}; {run.dtype}",
            f"memory of one process on {device}, traced, without the libraries' own"
            f"{' and as it is without run.compile' if run.compile else ''}:",
            *(f"  {label:<{width}}  {human_bytes(size):>12}" for label, size in rows),
            f"  peak with checkpointing: {others}",
            f"work: {human_count(flops)}FLOPs per token; {describe_hours(tokens * flops, run, dry_run)}",
        ]
    )


def describe_hours(flops: float, run: RunConfig, dry_run: DryRun) -> str:
    """Say how many hours so much work takes."""
    if run.device == "cpu" and run.peak_flops is None:
        return "for hours on CPUs give --run.peak_flops"
    peak = run.peak_flops or peak_flops(dry_run.gpu)
    if peak is None:
        raise UserError(f"command line: --gpu: found {dry_run.gpu!r}, whose peak is not known; give --run.peak_flops")
    found = flops / (peak * dry_run.mfu * dry_run.processes) / 3600
    return f"{found:,.1f} hours on {dry_run.processes} x {peak / 1e12:.4g} TFLOP/s at {dry_run.mfu:.0%} MFU"
