"""Traffic of a training step between processes: collectives and bytes, counted where they are called."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from rrt.checkpoint.presets import preset
from rrt.model.config import LoraRanks, ModelConfig, RecursiveConfig
from rrt.model.transformer import RecursiveTransformer
from train.distributed import Wrap, set_last_micro_batch, shard_model
from train.estimate import fake_processes

_COLLECTIVES = {
    torch.ops.c10d._allgather_base_.default: "all-gather",
    torch.ops.c10d._reduce_scatter_base_.default: "reduce-scatter",
    torch.ops.c10d.allreduce_.default: "all-reduce",
}


class Traffic(TorchDispatchMode):
    """Dispatch mode that counts collectives.

    torch's `CommDebugMode` fails on modules that are called twice.

    Attributes:
        counts: collectives by kind; kinds without a name here are named by their operator.
        bytes: of the gathered, the unreduced or the reduced tensors. Each of n processes sends and receives
            (n - 1) / n of that, and twice as much in an all-reduce.
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


def trace_step(
    config: ModelConfig,
    recursion: RecursiveConfig,
    wrap: Wrap,
    processes: int,
    accumulation: int = 1,
) -> Traffic:
    """Count the traffic of one optimizer step in bf16 on tensors that have shapes but no memory."""
    traffic = Traffic()
    with fake_processes(processes, 0) as mesh, FakeTensorMode():
        model = RecursiveTransformer(config, recursion)
        shard_model(model, mesh, torch.bfloat16, wrap)
        for micro_batch in range(accumulation):
            set_last_micro_batch(model, micro_batch == accumulation - 1)
            with traffic:
                model(torch.zeros(1, 8, dtype=torch.long)).float().sum().backward()
    return traffic


def compare_traffic(name: str, num_loops: int, ranks: list[int]) -> list[dict[str, Any]]:
    """Count collectives and bytes of one optimizer step of a preset in bf16 on 8 processes, which are only simulated.

    The first record is the unrolled parent; the others have the factor by which they gather fewer bytes.
    """
    config = preset(name)
    cases: list[tuple[str, RecursiveConfig, Any]] = [("parent", RecursiveConfig(), "stack")]
    for rank in ranks:
        recursion = RecursiveConfig(num_loops=num_loops, lora_rank=LoraRanks.uniform(rank))
        cases += [(f"rank {rank}", recursion, wrap) for wrap in ("stack", "layer")]
    records: list[dict[str, Any]] = []
    for label, recursion, wrap in cases:
        traffic = trace_step(config, recursion, wrap, processes=8, accumulation=4)
        block = traffic.bytes["all-gather"] - 2 * _count_root_parameters(config)
        record = {
            "model": f"{name}, {label}",
            "num_loops": recursion.num_loops,
            "wrap": wrap,
            "counts": dict(traffic.counts),
            "bytes": dict(traffic.bytes),
            "block_gathered_bytes": block,
        }
        parent = records[0] if records else record
        record["fewer_bytes"] = parent["bytes"]["all-gather"] / record["bytes"]["all-gather"]
        record["fewer_block_bytes"] = parent["block_gathered_bytes"] / block
        records.append(record)
    return records


def _count_root_parameters(config: ModelConfig) -> int:
    """Count the parameters of embedding, head and final norm."""
    matrices = 1 if config.tie_embeddings else 2
    norm = config.hidden_size * (2 if config.norm_type == "layernorm" else 1)
    return matrices * config.vocab_size * config.hidden_size + norm
