"""Calibrated initialisation: a shared block and its LoRAs, fitted where a text's tokens are and its loss feels it.

Passes, each depth by depth: the base forward and backward (:mod:`rrt.folding.calibration`), the joint fit of every
matrix of the block in the metric found (:mod:`rrt.folding.tying`), feed-forward neurons aligned before it
(:mod:`rrt.folding.neurons`), and base and converted model side by side, which refits the LoRAs
(:mod:`rrt.folding.refit`). Every finished depth is kept in a workspace: an interrupted conversion goes
on after it.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rrt.checkpoint.source import Source
from rrt.common.dtypes import dtype_name
from rrt.errors import UserError
from rrt.folding.calibration import BaseStatistics, CalibrationMetric, LinearStatistics, TextPass
from rrt.folding.fold import Folding, TiedLinear, energy_lost, matrix_report, seeded_generator
from rrt.folding.neurons import NEURON_LINEARS, NeuronLinear, ReorderedNeurons, match_neurons, reorder_statistics
from rrt.folding.refit import AdaptedLinear, DepthErrors, ErrorSums, SideBySide
from rrt.folding.tying import Metric, fit_lora, fit_tied, metric_norms, singular_gains
from rrt.folding.views import read_finite
from rrt.folding.workspace import Workspace
from rrt.model.config import ModelConfig, RecursiveConfig
from rrt.model.loop_linear import loop_linears, merge_lora
from rrt.model.meta import meta_model


@dataclass(frozen=True)
class Calibration:
    """What a conversion is calibrated on, and how.

    Attributes:
        rows: int64 [n, T + 1] of the text: inputs, and their next tokens.
        metric: see :mod:`rrt.folding.calibration`.
        refit: refit the LoRAs depth by depth after the joint fit.
        align: align the neurons of depths that share a layer before the joint fit.
        memory: bytes that statistics of all depths may take; where they take more, those of each depth are computed
            again when they are needed.
        device: of all passes and fits.
        statistics: directory of statistics that other conversions with this base, text and metric share; they are kept
            there whatever `memory` is.
    """

    rows: Tensor
    metric: CalibrationMetric = "both"
    refit: bool = True
    align: bool = True
    memory: int = 2**32
    device: torch.device = torch.device("cpu")
    statistics: Path | None = None


def keeps_statistics(model: ModelConfig, calibration: Calibration) -> bool:
    """Decide whether the statistics of all depths of a base are kept."""
    return calibration.statistics is not None or statistics_bytes(model, calibration) <= calibration.memory


def statistics_bytes(model: ModelConfig, calibration: Calibration) -> int:
    """Count the bytes of the statistics of all depths of a base."""
    both = calibration.metric == "both"
    layer = meta_model(model, RecursiveConfig()).stack.layers[0]
    numbers = sum(
        linear.in_features**2 + both * linear.out_features**2 + calibration.rows[:, 1:].numel()
        for _, linear in loop_linears(layer)
    )
    return torch.float32.itemsize * numbers * model.num_layers


@dataclass(frozen=True)
class LinearReport:
    """What one linear of the block loses, per loop.

    Attributes:
        name: such as ``stack.layers.0.attn.q``.
        rank: of its LoRA, after the cap.
        metric_loss: tr(G E C E^T) over tr(G W C W^T), of the joint fit, before the refit.
        output_loss: share of its outputs' energy over the calibration text that is error, in the converted model as
            written, whose inputs have drifted too.
        first_token_loss: likewise, over the first token of every row.
    """

    name: str
    rank: int
    metric_loss: tuple[float, ...]
    output_loss: tuple[float, ...]
    first_token_loss: tuple[float, ...]


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibrated block loses.

    Attributes:
        num_tokens: of the calibration text.
        linears: all linears of the block.
        stream_error: per depth, ||h' - h||^2 over ||h||^2 of the residual streams h' and h after it.
        first_token_stream_error: likewise, over the first token of every row.
    """

    num_tokens: int
    linears: tuple[LinearReport, ...]
    stream_error: tuple[float, ...]
    first_token_stream_error: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class CalibratedBlock:
    """The linears of a shared block that `run` fits to a base.

    Args:
        source: the base, vanilla, with folded norms.
        dtype: of the fitted tensors.
        seed: of everything random.
        workspace: of the conversion's steps.
        statistics: workspace of the base's statistics; it may be the same one.
    """

    def __init__(
        self,
        source: Source,
        recursion: RecursiveConfig,
        calibration: Calibration,
        dtype: torch.dtype,
        seed: int,
        workspace: Workspace,
        statistics: Workspace,
    ) -> None:
        self._source, self._recursion, self._dtype, self._seed = source, recursion, dtype, seed
        self._calibration, self._workspace, self._statistics = calibration, workspace, statistics
        self._layers_per_loop = recursion.layers_per_loop(source.model)
        self._places = recursion.places(source.model)
        self._text = TextPass(source, calibration.rows, calibration.device)
        self._ranks = [
            {name: linear.rank for name, linear in loop_linears(layer)}
            for layer in meta_model(source.model, recursion).stack.layers
        ]

    def run(self, *, progress: bool = False) -> CalibrationReport:
        """Fit everything that an earlier run has not."""
        with self._measured(progress, ("fit", "refit")) as (statistics, step):
            for layer in range(self._layers_per_loop):
                self._fit_layer(layer, statistics)
                for depth in self._depths(layer):
                    step("fit", depth)
            self._advance(statistics if self._calibration.refit else None, step)
        return self._report()

    def aligned_source(self) -> Source:
        """Return the base with its neurons in the order that the fitted linears are of, after `run`."""
        orders: dict[int, Tensor] = {}
        for layer in range(self._layers_per_loop):
            orders |= self._orders(layer)
        return ReorderedNeurons(self._source, orders)

    def measure_gains(self, *, progress: bool = False) -> dict[str, list[float]]:
        """Compute what each unit of rank saves of a matrix's error in the metric, by names such as ``layers.0.attn.q``.

        An error counts by its share of what the matrix computes, in the metric. Absolute errors tell less, though with
        gradients they estimate a change of the loss: see docs/CONVERSION.md.
        """
        gains: dict[str, list[float]] = {}
        with self._measured(progress, ("gains",)) as (statistics, step):
            for layer in range(self._layers_per_loop):
                gains |= self._layer_gains(layer, statistics)
                for depth in self._depths(layer):
                    step("gains", depth)
        return gains

    @contextmanager
    def _measured(
        self, progress: bool, further: tuple[str, ...]
    ) -> Iterator[tuple[BaseStatistics, Callable[[str, int], None]]]:
        """Yield the base's statistics, and a function that moves the bar on; `further` steps are still to come."""
        num_layers = self._source.model.num_layers
        keep = keeps_statistics(self._source.model, self._calibration)
        costs = _costs(self._calibration, keep)
        # Without a terminal the bar would fill a log file.
        with tqdm(
            total=sum(costs[name] for name in ("forward", "backward", *further)) * num_layers,
            desc="calibrating",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}",
            disable=None if progress else True,
        ) as bar:

            def step(name: str, depth: int) -> None:
                bar.set_description(f"{name} {depth + 1}/{num_layers}", refresh=False)
                bar.update(costs[name])

            statistics = BaseStatistics(self._text, self._calibration.metric, self._statistics, keep=keep, step=step)
            statistics.forward()
            if self._calibration.metric != "activations":
                statistics.backward()
            yield statistics, step

    def linear(self, layer: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return W' [N, K], A [B, R, K] and B [B, N, R] of one linear as they are stored, after `run`.

        W' is zero where B A stands alone.
        """
        depths = [self._workspace.load(f"refit-{depth:03d}") for depth in self._depths(layer)]
        lora_a, lora_b = (
            torch.stack([depth[f"{name}.{factor}"] for depth in depths]) for factor in ("lora_a", "lora_b")
        )
        return self._workspace.load(f"fit-{layer:03d}")[f"{name}.weight"], lora_a, lora_b

    def _depths(self, layer: int) -> list[int]:
        """Return the depths of a shared layer, loop by loop."""
        depths = {loop: depth for depth, (loop, place) in enumerate(self._places) if place == layer}
        return [depths[loop] for loop in sorted(depths)]

    def _fit_layer(self, layer: int, statistics: BaseStatistics) -> None:
        """Fit the linears of a shared layer jointly over its depths."""
        if self._workspace.has(f"fit-{layer:03d}"):
            return
        measured = self._measured_depths(layer, statistics)
        others = [name for name in self._ranks[layer] if name not in NEURON_LINEARS]
        # Matching neurons takes one thread, and the fits that do not depend on it run beside it. Of a large base it
        # takes minutes: it stays in this thread, where signals interrupt it.
        with ThreadPoolExecutor(1) as executor:
            fitting = executor.submit(self._fit_linears, layer, others, self._source, measured)
            source, measured = self._aligned(layer, measured)
            tensors = fitting.result()
        names = [name for name in self._ranks[layer] if name in NEURON_LINEARS]
        self._workspace.save(f"fit-{layer:03d}", tensors | self._fit_linears(layer, names, source, measured))

    def _fit_linears(
        self, layer: int, names: Iterable[str], source: Source, measured: list[dict[str, LinearStatistics]]
    ) -> dict[str, Tensor]:
        """Fit linears of a shared layer to those of `source`, with their statistics at its depths."""
        tensors: dict[str, Tensor] = {}
        for name in names:
            rank = self._ranks[layer][name]
            weights = self._weights(source, layer, name)
            metrics = [linears[name].metric for linears in measured]
            generator = seeded_generator(self._seed, f"stack.layers.{layer}.{name}.lora")
            if self._recursion.low_rank_only and rank:
                (weight,), (metric,) = weights, metrics
                lora_a, lora_b = fit_lora(weight, rank, metric, generator)
                parts = {"weight": torch.zeros_like(weight), "lora_a": lora_a[None], "lora_b": lora_b[None]}
                errors, norms = metric_norms([weight - lora_b @ lora_a], metrics), metric_norms(weights, metrics)
            else:
                # With three sweeps over two loops the fits take 2.5 times as long, for 1 % of perplexity.
                fit = fit_tied(weights, rank, metrics, 1 if len(weights) == 2 else 3, generator)
                parts = {"weight": fit.weight, "lora_a": fit.lora_a, "lora_b": fit.lora_b}
                errors, norms = fit.errors, fit.norms
            for part, tensor in parts.items():
                tensors[f"{name}.{part}"] = tensor.to(self._dtype)
                if not tensors[f"{name}.{part}"].isfinite().all():
                    raise UserError(
                        f"{self._source.directory}: stack.layers.{layer}.{name}.{part}: found "
                        f"{tensor.abs().max().item():.3g}; expected at most {torch.finfo(self._dtype).max:.3g} for "
                        f"{dtype_name(self._dtype)}: choose another --dtype"
                    )
            shares = [error / norm if norm else 0.0 for error, norm in zip(errors, norms, strict=True)]
            tensors[f"{name}.metric_loss"] = torch.tensor(shares, dtype=torch.float64)
        return tensors

    def _layer_gains(self, layer: int, statistics: BaseStatistics) -> dict[str, list[float]]:
        """Compute the gains of one shared layer's matrices, unless an earlier run has."""
        step = f"gains-{layer:03d}"
        if not self._workspace.has(step):
            source, measured = self._aligned(layer, self._measured_depths(layer, statistics))
            found = {}
            for name in self._ranks[layer]:
                weights = self._weights(source, layer, name)
                metrics = [linears[name].metric for linears in measured]
                gains = singular_gains(weights, metrics)
                found[name] = gains / (sum(metric_norms(weights, metrics)) or 1.0)
            self._workspace.save(step, found)
        return {f"layers.{layer}.{name}": gains.tolist() for name, gains in self._workspace.load(step).items()}

    def _weights(self, source: Source, layer: int, name: str) -> list[Tensor]:
        """Read a linear's weights at the depths of a shared layer."""
        return [
            read_finite(source, f"stack.layers.{depth}.{name}.weight").to(self._calibration.device)
            for depth in self._depths(layer)
        ]

    def _measured_depths(self, layer: int, statistics: BaseStatistics) -> list[dict[str, LinearStatistics]]:
        """Return the statistics of a shared layer's depths."""
        return [statistics.depth(depth) for depth in self._depths(layer)]

    def _aligned(
        self, layer: int, measured: list[dict[str, LinearStatistics]]
    ) -> tuple[Source, list[dict[str, LinearStatistics]]]:
        """Align the neurons of a shared layer's depths: return the base and the depths' statistics with them so."""
        depths = self._depths(layer)
        if self._calibration.align and len(depths) > 1 and not self._workspace.has(f"orders-{layer:03d}"):
            first, *others = (
                self._neuron_linears(layer, depth, linears) for depth, linears in zip(depths, measured, strict=True)
            )
            generator = seeded_generator(self._seed, f"neurons.{layer}")
            orders = [match_neurons(first, other, generator) for other in others]
            self._workspace.save(
                f"orders-{layer:03d}", {str(depth): order for depth, order in zip(depths[1:], orders, strict=True)}
            )
        aligned = [self._reordered(layer, depth, linears) for depth, linears in zip(depths, measured, strict=True)]
        return ReorderedNeurons(self._source, self._orders(layer)), aligned

    def _reordered(self, layer: int, depth: int, measured: dict[str, LinearStatistics]) -> dict[str, LinearStatistics]:
        """Reorder statistics of a depth as its neurons are aligned."""
        order = self._orders(layer).get(depth)
        return measured if order is None else reorder_statistics(measured, order)

    def _neuron_linears(self, layer: int, depth: int, measured: dict[str, LinearStatistics]) -> dict[str, NeuronLinear]:
        """Collect what matching needs to know of the linears at a depth."""
        linears = {}
        for name in NEURON_LINEARS:
            if name in measured:
                weight = read_finite(self._source, f"stack.layers.{depth}.{name}.weight").to(self._calibration.device)
                metric = measured[name].metric
                unit = self._unit_of_errors(weight, metric)
                linears[name] = NeuronLinear(weight, metric, self._ranks[layer][name], unit)
        return linears

    def _unit_of_errors(self, weight: Tensor, metric: Metric) -> float:
        """Return what makes errors of linears of different shapes comparable.

        With both sides `fit_tied` measures in units of the mean diagonals' geometric mean, sums over tokens of
        |g|^2 |x|^2 over sqrt(N K); the loss feels (g^T E x)^2, of which |g|^2 |x|^2 are the N K-fold. With inputs alone
        it measures |g|^2 |E x|^2, of which the N-th part is expected along g. Without gradients errors count by their
        share of what the linear computes.
        """
        outputs, inputs = weight.shape
        if self._calibration.metric == "both":
            return float(outputs * inputs) ** 0.5
        if self._calibration.metric == "inputs":
            return float(outputs)
        return sum(metric_norms([weight], [metric])) or 1.0

    def _orders(self, layer: int) -> dict[int, Tensor]:
        """Return the order of neurons that `_aligned` found, by depth; the others keep theirs."""
        step = f"orders-{layer:03d}"
        found = self._workspace.load(step) if self._workspace.has(step) else {}
        return {int(depth): order for depth, order in found.items()}

    def _advance(self, statistics: BaseStatistics | None, step: Callable[[str, int], None]) -> None:
        """Run base and converted model side by side, refitting LoRAs if there are statistics."""
        num_layers = self._source.model.num_layers
        done = next((d for d in range(num_layers, 0, -1) if self._workspace.has(f"streams-{d:03d}")), 0)
        for depth in range(done):
            step("refit", depth)
        device = self._calibration.device
        if done:
            streams = self._workspace.load(f"streams-{done:03d}", device)
        else:
            embedded = self._text.embed()
            streams = {"base": embedded, "converted": embedded.clone()}
        walk = SideBySide(TextPass(self.aligned_source(), self._calibration.rows, device), **streams)
        for depth in range(done, num_layers):
            loop, layer = self._places[depth]
            measured = None if statistics is None else self._reordered(layer, depth, statistics.depth(depth))
            linears, errors = walk.advance(depth, self._fitted(layer, loop), measured)
            self._workspace.save(f"refit-{depth:03d}", _result(linears, errors))
            self._workspace.save(f"streams-{depth + 1:03d}", {"base": walk.base, "converted": walk.converted})
            self._workspace.drop(f"streams-{depth:03d}")
            step("refit", depth)

    def _fitted(self, layer: int, loop: int) -> dict[str, AdaptedLinear]:
        """Read the linears of one depth as the joint fit left them."""
        tensors = self._workspace.load(f"fit-{layer:03d}", self._calibration.device)
        return {
            name: AdaptedLinear(
                tensors[f"{name}.weight"], tensors[f"{name}.lora_a"][loop], tensors[f"{name}.lora_b"][loop]
            )
            for name in self._ranks[layer]
        }

    def _report(self) -> CalibrationReport:
        depths = [self._workspace.load(f"refit-{depth:03d}") for depth in range(self._source.model.num_layers)]
        linears = []
        for layer, ranks in enumerate(self._ranks):
            fitted = self._workspace.load(f"fit-{layer:03d}")
            for name, rank in ranks.items():
                errors = [depths[depth][f"{name}.errors"].tolist() for depth in self._depths(layer)]
                linears.append(
                    LinearReport(
                        f"stack.layers.{layer}.{name}",
                        rank,
                        tuple(fitted[f"{name}.metric_loss"].tolist()),
                        tuple(share for share, _ in errors),
                        tuple(first for _, first in errors),
                    )
                )
        stream, first_tokens = zip(*(depth["stream.errors"].tolist() for depth in depths), strict=True)
        return CalibrationReport(self._calibration.rows[:, 1:].numel(), tuple(linears), stream, first_tokens)


def _result(linears: dict[str, AdaptedLinear], errors: DepthErrors) -> dict[str, Tensor]:
    """Name the tensors that a depth's refit leaves in the workspace."""
    tensors = {"stream.errors": _shares(errors.stream)}
    for name, linear in linears.items():
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = linear.lora_a, linear.lora_b
        tensors[f"{name}.errors"] = _shares(errors.linears[name])
    return tensors


def _shares(sums: ErrorSums) -> Tensor:
    return torch.tensor([sums.share, sums.first_share], dtype=torch.float64)


def _costs(calibration: Calibration, keep: bool) -> dict[str, float]:
    """Estimate what a depth takes in each pass, as multiples of its forward."""
    has_gradients = calibration.metric != "activations"
    measuring = 6.0 if has_gradients else 3.0
    again = 0.0 if keep else measuring
    return {
        "forward": 1.0,
        "backward": (measuring if keep else 2.0) if has_gradients else 0.0,
        "gains": 1.0 + (again if has_gradients else measuring),
        "fit": 3.0 + (again if has_gradients else measuring),
        "refit": 6.0 + again if calibration.refit else 3.0,
    }


class CalibratedFolding(Folding):
    """Maker of the new model's tensors, those of its linears fitted by `calibrate`, which comes first."""

    def __init__(
        self,
        source: Source,
        recursion: RecursiveConfig,
        dtype: torch.dtype,
        seed: int,
        calibration: Calibration,
        workspace: Workspace,
        statistics: Workspace,
    ) -> None:
        super().__init__(source, recursion, dtype, seed)
        self._block = CalibratedBlock(self.source, recursion, calibration, dtype, seed, workspace, statistics)

    def measure_gains(self, *, progress: bool = False) -> dict[str, list[float]]:
        """Compute what each unit of rank saves, by matrix, as `distribute_budget` takes it."""
        return self._block.measure_gains(progress=progress)

    def calibrate(self, *, progress: bool = False) -> CalibrationReport:
        """Fit all linears of the block."""
        report = self._block.run(progress=progress)
        self.source = self._block.aligned_source()
        return report

    def linear(self, layer: int, linear: str, rank: int) -> TiedLinear:
        name = f"stack.layers.{layer}.{linear}"
        factors = zip(("weight", "lora_a", "lora_b"), self._block.linear(layer, linear), strict=True)
        weight, lora_a, lora_b = (self._stored(factor, f"{name}.{part}") for part, factor in factors)
        originals = [self._base(layer, loop, f"{linear}.weight") for loop in range(self.recursion.num_loops)]
        lost = [energy_lost(original, weight) for original in originals]
        merged = [merge_lora(weight, *factors, torch.float64) for factors in zip(lora_a, lora_b, strict=True)]
        left = [float((original - found).square().sum()) for original, found in zip(originals, merged, strict=True)]
        report = matrix_report(name, rank, originals, lost, left)
        return TiedLinear(None if self.recursion.low_rank_only and rank else weight, lora_a, lora_b, report)
