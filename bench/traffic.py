"""What a training step moves between processes: collectives and bytes, counted where they are called."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from rrt.config import ModelConfig, RecursiveConfig
from rrt.model import RecursiveTransformer
from train.distributed import Wrap, set_last_micro_batch, shard_model

_COLLECTIVES = {
    torch.ops.c10d._allgather_base_.default: "all-gather",
    torch.ops.c10d._reduce_scatter_base_.default: "reduce-scatter",
    torch.ops.c10d.allreduce_.default: "all-reduce",
}
Forward = Callable[[RecursiveTransformer, Tensor], Tensor]


class Traffic(TorchDispatchMode):
    """Counts the collectives of what runs under it.

    (`CommDebugMode` of torch does not survive modules that are called twice.)

    Attributes:
        counts: collectives by kind; those with tensors of any other kind are named by their operator.
        bytes: what they carry: the gathered, the unreduced or the reduced tensor. Of this each of n processes
            sends and receives (n - 1) / n, and twice that in an all-reduce.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d" and func is not torch.ops.c10d.barrier.default:
            kind = _COLLECTIVES.get(func, str(func))
            tensors = [tensor for arg in args for tensor in (arg if isinstance(arg, list) else [arg])]
            self.counts[kind] += 1
            self.bytes[kind] += max(tensor.nbytes for tensor in tensors if isinstance(tensor, Tensor))
        return func(*args, **(kwargs or {}))


@contextmanager
def imagined_processes(count: int) -> Iterator[None]:
    """Rank 0 of `count` processes of which the others do not exist: collectives return at once."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()


def imagined_step(
    config: ModelConfig,
    recursive: RecursiveConfig,
    wrap: Wrap,
    shape: tuple[int, ...],
    accumulation: int = 1,
    forward: Forward = lambda model, tokens: model(tokens).float().sum(),
) -> Traffic:
    """The traffic of one optimizer step in bf16 of a model of any size: its tensors have shapes but no memory.

    Args:
        shape: of the mesh: (processes,), or (copies, processes of a copy).
        forward: the loss of tokens [batch, T].
    """
    traffic = Traffic()
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copy", "shard")[-len(shape) :])
    with FakeTensorMode():
        model = RecursiveTransformer(config, recursive)
        shard_model(model, mesh, torch.bfloat16, wrap)
        for micro_batch in range(accumulation):
            set_last_micro_batch(model, micro_batch == accumulation - 1)
            with traffic:
                forward(model, torch.zeros(1, 8, dtype=torch.long)).backward()
    return traffic
