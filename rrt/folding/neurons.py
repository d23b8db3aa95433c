"""Order of feed-forward neurons: depths that share a layer are aligned before its weights are fitted.

The neurons of a feed-forward part may stand in any order, rows of gate and up and columns of down alike. Two depths of
a pretrained model have them in unrelated orders, and neurons that share weights should be as alike as possible. Of
neuron i at the first depth and neuron j at another, with vectors v_i and w_j of a linear and importances a_i and b_j,
sharing costs

    a_i b_j / (a_i + b_j) * ||v_i - w_j||_M^2

which is what the best common vector leaves of both. M is the metric of the side on which the vectors lie (of rows of up
that of the inputs), the mean of both depths', and of it only what the LoRAs cannot take: the two of a pair hold any 2R
directions of the difference of their weights, so that the leading 2R eigenvectors of M are left out. The cheapest
matching is an assignment problem. Of three and more depths each is matched to the first.
"""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from rrt.checkpoint.source import Source
from rrt.folding.calibration import LinearStatistics
from rrt.folding.tying import Metric

_READERS = ("mlp.gate", "mlp.up")
_WRITER = "mlp.down"
NEURON_LINEARS = (*_READERS, _WRITER)
"""Linears of a layer whose rows (of the last one, columns) are neurons."""

_GROUP = 2048
"""An assignment takes time in the third power: more neurons are matched in random groups of so many, in twice as many
rounds as there are groups. The result then is no longer the cheapest. An assignment runs on one thread, and those of a
round beside each other."""


@dataclass(frozen=True)
class NeuronLinear:
    """One linear at one depth, as matching sees it.

    Attributes:
        weight: [N, K].
        metric: as measured there.
        rank: of the LoRA.
        unit: what the metric's errors are divided by to be comparable with those of other linears.
    """

    weight: Tensor
    metric: Metric
    rank: int
    unit: float = 1.0


def match_neurons(
    reference: Mapping[str, NeuronLinear], other: Mapping[str, NeuronLinear], generator: torch.Generator
) -> Tensor:
    """Match the neurons of two depths: int64 [n], for each of the reference's the other's that shares its weights.

    Args:
        reference, other: those of `NEURON_LINEARS` that the layers have.
    """
    from scipy.optimize import linear_sum_assignment  # takes a second, which every start of a training would wait

    pairs = [_Pair.of(name, reference[name], other[name]) for name in NEURON_LINEARS if name in reference]
    order = torch.arange(pairs[0].num_neurons)
    num_groups = -(-len(order) // _GROUP)

    def match_group(group: Tensor) -> Tensor:
        costs = torch.stack([pair.costs(group, order[group]) for pair in pairs]).sum(0)
        _, columns = linear_sum_assignment(costs.cpu().numpy())
        return order[group][torch.from_numpy(columns)]

    with ThreadPoolExecutor(min(num_groups, torch.get_num_threads())) as executor:
        for _ in range(2 * num_groups if num_groups > 1 else 1):
            groups = torch.randperm(len(order), generator=generator).split(_GROUP)
            matched = list(executor.map(match_group, groups))
            order[torch.cat(groups)] = torch.cat(matched)
    return order


class ReorderedNeurons(Source):
    """A vanilla source whose feed-forward neurons stand in another order at some depths: the same function.

    Args:
        orders: of each such depth, the neurons [n] in their new order.
    """

    def __init__(self, source: Source, orders: Mapping[int, Tensor]) -> None:
        self.directory, self.dtype = source.directory, source.dtype
        self.model, self.recursion = source.model, source.recursion
        self._source, self._orders = source, orders

    def get(self, name: str) -> Tensor:
        tensor = self._source.get(name)
        if not name.startswith("stack.layers."):
            return tensor
        depth, linear = name.removeprefix("stack.layers.").split(".", 1)
        linear, _, leaf = linear.rpartition(".")
        order = self._orders.get(int(depth))
        if order is None or linear not in NEURON_LINEARS:
            return tensor
        if linear in _READERS:
            return tensor[order]
        return tensor[:, order] if leaf == "weight" else tensor

    def place(self, name: str) -> str:
        return self._source.place(name)


def reorder_statistics(statistics: dict[str, LinearStatistics], order: Tensor) -> dict[str, LinearStatistics]:
    """Reorder the neurons in the statistics of a depth's linears."""

    def reordered(name: str, metric: Metric) -> Metric:
        if name in _READERS:
            return Metric(metric.inputs, _both_sides(metric.outputs, order))
        return Metric(_both_sides(metric.inputs, order), metric.outputs) if name == _WRITER else metric

    return {
        name: LinearStatistics(reordered(name, linear.metric), linear.token_weights)
        for name, linear in statistics.items()
    }


def _both_sides(matrix: Tensor | None, order: Tensor) -> Tensor | None:
    return None if matrix is None else matrix[order][:, order]


@dataclass(frozen=True)
class _Pair:
    """A linear at two depths: neurons' vectors [n, d] where their squared distances count, and importances [n]."""

    vectors: tuple[Tensor, Tensor]
    importances: tuple[Tensor, Tensor]

    @property
    def num_neurons(self) -> int:
        return len(self.importances[0])

    @classmethod
    def of(cls, name: str, reference: NeuronLinear, other: NeuronLinear) -> "_Pair":
        vectors, importances, spaces, sizes = [], [], [], []
        for linear in (reference, other):
            weight = linear.weight.double()
            space, own = linear.metric.inputs, linear.metric.outputs
            if name == _WRITER:
                weight, space, own = weight.T, own, space
            size = _size(linear.metric) / linear.unit
            vectors.append(weight)
            importances.append(size * _shape(None if own is None else own.diagonal(), weight[:, 0]))
            shape = _shape(space, weight[0])
            spaces.append(shape if shape.ndim == 2 else torch.diag(shape))
            sizes.append(size)
        total = sum(sizes) or 1.0
        common = sizes[0] / total * spaces[0] + sizes[1] / total * spaces[1]
        values, directions = torch.linalg.eigh(common)
        left = max(0, len(values) - 2 * reference.rank)
        scaled = directions[:, :left] * values[:left].clamp(min=0.0).sqrt()
        return cls((vectors[0] @ scaled, vectors[1] @ scaled), (importances[0], importances[1]))

    def costs(self, first: Tensor, second: Tensor) -> Tensor:
        """Compute what sharing costs, of neurons `first` of one depth with neurons `second` of the other."""
        v, w = self.vectors[0][first], self.vectors[1][second]
        a, b = self.importances[0][first, None], self.importances[1][None, second]
        squares = v.square().sum(1)[:, None] + w.square().sum(1)[None] - 2.0 * (v @ w.T)
        return a * b / (a + b).clamp(min=torch.finfo(a.dtype).tiny) * squares.clamp(min=0.0)


def _size(metric: Metric) -> float:
    """Compute the size of a metric as the fit does: the geometric mean of its sides' mean diagonals."""
    sizes = [float(side.diagonal().double().mean()) for side in (metric.inputs, metric.outputs) if side is not None]
    return (sizes[0] * sizes[-1]) ** 0.5 if sizes else 1.0


def _shape(matrix: Tensor | None, like: Tensor) -> Tensor:
    """Return a side of a metric, or its diagonal, with mean diagonal 1; ones for none, and where nothing reached it."""
    if matrix is not None:
        matrix = matrix.to(like)
        mean = (matrix.diagonal() if matrix.ndim == 2 else matrix).mean()
        if mean > 0.0:
            return matrix / mean
    return torch.ones_like(like)
