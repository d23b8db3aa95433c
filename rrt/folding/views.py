"""Vanilla models seen changed, without a copy: some of a source's layers, or its norms' gains in its weights."""

import dataclasses

import torch
from torch import Tensor

from rrt.checkpoint.source import Source
from rrt.errors import UserError
from rrt.model.config import RecursiveConfig
from rrt.model.meta import parameter_shapes

READERS_OF_NORM = {
    "attn_norm": ("attn.q", "attn.k", "attn.v"),
    "mlp_norm": ("mlp.gate", "mlp.up"),
}
"""The linears of a layer that read each norm's output, and nothing else."""

_NORM_OF_READER = {linear: norm for norm, linears in READERS_OF_NORM.items() for linear in linears}


def read_finite(source: Source, name: str) -> Tensor:
    """Read a parameter.

    Raises:
        UserError: it has a value that is not finite.
    """
    tensor = source.get(name)
    if not tensor.isfinite().all():
        raise UserError(f"{source.place(name)}: found NaN or infinity; expected finite values")
    return tensor


class KeptLayers(Source):
    """Some layers of a vanilla source as a model of their own, in the order of `depths`."""

    def __init__(self, source: Source, depths: tuple[int, ...]) -> None:
        self.directory, self.dtype, self.recursion = source.directory, source.dtype, source.recursion
        self.model = dataclasses.replace(source.model, num_layers=len(depths))
        self._source, self._depths = source, depths

    def get(self, name: str) -> Tensor:
        return self._source.get(self._name(name))

    def place(self, name: str) -> str:
        return self._source.place(self._name(name))

    def _name(self, name: str) -> str:
        if not name.startswith("stack.layers."):
            return name
        layer, rest = name.removeprefix("stack.layers.").split(".", 1)
        return f"stack.layers.{self._depths[int(layer)]}.{rest}"


class FoldedNorms(Source):
    """A vanilla source whose norms' gains (and shifts) are part of the linears that read them: the same function.

    ``W (g * n + b) + c = (W diag(g)) n + (c + W b)`` for a normalised input n, so that the norms left are neutral and
    equal at every depth. What changes is fp64, the rest as stored. A norm with a shift, some of whose readers have no
    bias to take it, stays as it is. So do norms of queries and keys: the rotary embedding lies between them and the
    scores.
    """

    def __init__(self, source: Source) -> None:
        self.directory, self.dtype = source.directory, source.dtype
        self.model, self.recursion, self._source = source.model, source.recursion, source
        names = parameter_shapes(source.model, RecursiveConfig())
        layer = {name.removeprefix("stack.layers.0.") for name in names if name.startswith("stack.layers.0.")}
        self._folded = {
            norm
            for norm, linears in READERS_OF_NORM.items()
            if f"{norm}.bias" not in layer
            or all(f"{linear}.bias" in layer for linear in linears if f"{linear}.weight" in layer)
        }

    def get(self, name: str) -> Tensor:
        if not name.startswith("stack.layers."):
            return self._source.get(name)
        layer, rest = name.removeprefix("stack.layers.").split(".", 1)
        part, _, leaf = rest.rpartition(".")
        if part in self._folded:
            return torch.full_like(self._source.get(name), 0.0 if leaf == "bias" or self._adds_one else 1.0)
        norm = _NORM_OF_READER.get(part)
        if norm not in self._folded:
            return self._source.get(name)
        prefix = f"stack.layers.{layer}"
        if leaf == "weight":
            gain = read_finite(self._source, f"{prefix}.{norm}.weight").double()
            return read_finite(self._source, name).double() * (gain + 1.0 if self._adds_one else gain)
        if self.model.norm_type != "layernorm":
            return self._source.get(name)
        shift = read_finite(self._source, f"{prefix}.{norm}.bias").double()
        weight = read_finite(self._source, f"{prefix}.{part}.weight").double()
        return read_finite(self._source, name).double() + weight @ shift

    def place(self, name: str) -> str:
        return self._source.place(name)

    @property
    def _adds_one(self) -> bool:
        return self.model.norm_type == "rmsnorm_1p"
