"""Conversions of small bases, and the tensors of both under our names."""

from pathlib import Path
from typing import Any

from torch import Tensor

from rrt.checkpoint.source import open_source
from rrt.folding.conversion import ConversionReport, convert
from rrt.model.config import LoraRanks, RecursiveConfig
from rrt.model.meta import parameter_shapes

LINEARS = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.gate", "mlp.up", "mlp.down")

Tensors = dict[str, Tensor]


def fold(
    base: Path, out: Path, *, num_loops: int = 2, rank: int | LoraRanks = 0, **options: Any
) -> tuple[Tensors, Tensors, ConversionReport]:
    """Convert, and return ({our name: tensor} of the base, the same of the new checkpoint, the report)."""
    arguments = {name: options.pop(name) for name in ("dtype", "seed", "overwrite") if name in options}
    ranks = rank if isinstance(rank, LoraRanks) else LoraRanks.uniform(rank)
    recursion = RecursiveConfig(num_loops=num_loops, lora_rank=ranks, **options)
    report = convert(base, out, recursion, **arguments)
    return tensors(base), tensors(out), report


def tensors(directory: Path) -> Tensors:
    source = open_source(directory)
    return {name: source.get(name) for name in parameter_shapes(source.model, source.recursion)}


def block_names(new: Tensors) -> list[tuple[int, str]]:
    """(layer, name inside the layer) of every tied parameter of the block."""
    names = [name.removeprefix("stack.layers.").split(".", 1) for name in new if name.startswith("stack.")]
    return [(int(layer), name) for layer, name in names if "lora" not in name]


def linears(new: Tensors) -> list[str]:
    return [name.removesuffix(".weight") for name in new if name.endswith(".weight") and name.count(".") == 5]


def gains(base: Tensors, depth: int, norm: str, family: str) -> Tensor:
    """What a norm of the base multiplies by, in fp64."""
    weight = base[f"stack.layers.{depth}.{norm}.weight"].double()
    return weight + 1 if family == "gemma" else weight
