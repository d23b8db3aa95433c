"""What a training step moves between processes: collectives and bytes, counted where they are called."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rrt.model.config import ModelConfig, RecursiveConfig
from rrt.model.transformer import RecursiveTransformer
from train.distributed import Wrap, set_last_micro_batch, shard_model
from train.estimate import fake_processes

_COLLECTIVES = {
    torch.ops.c10d._allgather_base_.default: "all-gather",
    torch.ops.c10d._reduce_scatter_base_.default: "reduce-scatter",
    torch.ops.c10d.allreduce_.default: "all-reduce",
}


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


def imagined_step(
    config: ModelConfig,
    recursion: RecursiveConfig,
    wrap: Wrap,
    processes: int,
    accumulation: int = 1,
) -> Traffic:
    """The traffic of one optimizer step in bf16 of a model of any size: its tensors have shapes but no memory."""
    traffic = Traffic()
    with fake_processes(processes, 0) as mesh, FakeTensorMode():
        model = RecursiveTransformer(config, recursion)
        shard_model(model, mesh, torch.bfloat16, wrap)
        for micro_batch in range(accumulation):
            set_last_micro_batch(model, micro_batch == accumulation - 1)
            with traffic:
                model(torch.zeros(1, 8, dtype=torch.long)).float().sum().backward()
    return traffic
