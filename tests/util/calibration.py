"""Small random bases, calibration texts and statistics of them by plain autograd, for tests of the calibrated init."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rrt.checkpoint.source import Source, open_source
from rrt.folding.calibration import BaseStatistics, CalibrationMetric, LinearStatistics, TextPass
from rrt.folding.views import FoldedNorms
from rrt.folding.workspace import Workspace
from rrt.model.loop_linear import loop_linears
from rrt.model.meta import meta_model
from rrt.model.transformer import RecursiveTransformer
from tests.util.models import make_hf_model

ROWS = torch.randint(0, 151, (6, 25), generator=torch.Generator().manual_seed(3))
"""Calibration rows: 6 of 24 tokens."""


def folded_base(directory: Path, family: str, **options: object) -> Source:
    """Write a random base and open it with its norms folded."""
    return FoldedNorms(open_source(make_hf_model(directory, family, **options)))


def loaded(source: Source, dtype: torch.dtype = torch.float64) -> RecursiveTransformer:
    """Load a whole model from a source, in `dtype`."""
    model = meta_model(source.model, source.recursion)
    for name, _ in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(source.get(name).to(dtype)))
    return model


def measure(
    source: Source, directory: Path, *, metric: CalibrationMetric = "both", keep: bool = True, rows: Tensor = ROWS
) -> dict[tuple[int, str], LinearStatistics]:
    """Measure the statistics of all depths, by depth and linear."""
    text = TextPass(source, rows, torch.device("cpu"))
    statistics = BaseStatistics(text, metric, Workspace(directory, "test"), keep=keep, step=lambda *_: None)
    statistics.forward()
    if metric != "activations":
        statistics.backward()
    return {
        (depth, name): linear
        for depth in range(source.model.num_layers)
        for name, linear in statistics.depth(depth).items()
    }


def linears_by_depth(model: RecursiveTransformer) -> dict[tuple[int, str], nn.Module]:
    return {
        (depth, name): linear for depth, layer in enumerate(model.stack.layers) for name, linear in loop_linears(layer)
    }


def recorded_pass(source: Source, rows: Tensor) -> dict[tuple[int, str], tuple[Tensor, Tensor, Tensor]]:
    """Run the whole model forward and backward: per depth and linear x_t [tokens, K], g_t and y_t [tokens, N], fp64."""
    model, seen = loaded(source), {}
    for key, linear in linears_by_depth(model).items():
        linear.register_forward_hook(lambda _, inputs, output, key=key: seen.__setitem__(key, (inputs[0], output)))
    logits = model(rows[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
    gradients = torch.autograd.grad(loss, [output for _, output in seen.values()])
    return {
        key: tuple(tensor.detach().flatten(0, 1) for tensor in (inputs, gradient, output))
        for (key, (inputs, output)), gradient in zip(seen.items(), gradients, strict=True)
    }
