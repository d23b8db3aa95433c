"""Order of feed-forward neurons: matchings against brute force, reordered models, and what aligned depths lose."""

import itertools
from dataclasses import replace

import pytest
import torch

from rrt.checkpoint.source import load_model, open_source
from rrt.folding import calibration, neurons
from rrt.folding.calibrated import CalibratedBlock, Calibration
from rrt.folding.neurons import NeuronLinear, ReorderedNeurons, match_neurons, reorder_statistics
from rrt.folding.tying import Metric
from rrt.folding.views import FoldedNorms, KeptLayers
from rrt.folding.workspace import Workspace
from rrt.model.config import LoraRanks, RecursiveConfig
from tests.util.calibration import folded_base, loaded, measure
from tests.util.models import make_hf_model

NAMES = ("mlp.gate", "mlp.up", "mlp.down")


def random_metric(generator, *widths):
    sides = []
    for width in widths:
        factor = torch.randn(width, 3 * width, dtype=torch.float64, generator=generator)
        sides.append(factor @ factor.T)
    return Metric(*sides)


def random_linears(generator, num_neurons, width, rank=0):
    """Make linears of unlike units, without which other neurons than theirs would be matched."""
    units = dict(zip(NAMES, (1.0, 30.0, 0.03), strict=True))
    linears = {}
    for name in NAMES:
        shape = (width, num_neurons) if name == "mlp.down" else (num_neurons, width)
        weight = torch.randn(shape, dtype=torch.float64, generator=generator)
        linears[name] = NeuronLinear(weight, random_metric(generator, shape[1], shape[0]), rank, units[name])
    return linears


def shared_cost(name, pair, i, j, rank):
    """What the best common vector of two neurons leaves, by its definition, outside of the leading 2R directions."""
    sizes, vectors, importances, spaces = [], [], [], []
    for linear, neuron in zip(pair, (i, j), strict=True):
        inputs, outputs = linear.metric.inputs, linear.metric.outputs
        size = float((inputs.diagonal().mean() * outputs.diagonal().mean()).sqrt()) / linear.unit
        own, space = (inputs, outputs) if name == "mlp.down" else (outputs, inputs)
        vectors.append((linear.weight.T if name == "mlp.down" else linear.weight)[neuron])
        importances.append(size * float(own[neuron, neuron] / own.diagonal().mean()))
        spaces.append(size * space / space.diagonal().mean())
        sizes.append(size)
    values, directions = torch.linalg.eigh(sum(spaces) / sum(sizes))
    values[len(values) - 2 * rank :] = 0.0
    metric = (directions * values) @ directions.T
    common = sum(a * v for a, v in zip(importances, vectors, strict=True)) / sum(importances)
    return sum(a * float((v - common) @ metric @ (v - common)) for a, v in zip(importances, vectors, strict=True))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_cheapest_of_all_matchings_is_found(rank):
    generator = torch.Generator().manual_seed(rank + 4)
    reference, other = (random_linears(generator, 5, 4, rank) for _ in range(2))
    costs = [
        [sum(shared_cost(name, (reference[name], other[name]), i, j, rank) for name in NAMES) for j in range(5)]
        for i in range(5)
    ]
    best = min(itertools.permutations(range(5)), key=lambda order: sum(costs[i][j] for i, j in enumerate(order)))
    found = match_neurons(reference, other, generator).tolist()
    assert found == list(best) and found != list(range(5))
    alike = [{name: replace(x, unit=1.0) for name, x in pair.items()} for pair in (reference, other)]
    assert match_neurons(*alike, generator).tolist() != found


def test_most_of_more_neurons_than_a_group_are_matched_in_rounds(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    reference = random_linears(generator, 40, 6)
    order = torch.randperm(40, generator=generator)
    back = torch.argsort(order)
    other = {}
    for name, linear in reference.items():
        inputs, outputs = linear.metric.inputs, linear.metric.outputs
        if name == "mlp.down":
            other[name] = NeuronLinear(linear.weight[:, order], Metric(inputs[order][:, order], outputs), 0)
        else:
            other[name] = NeuronLinear(linear.weight[order], Metric(inputs, outputs[order][:, order]), 0)
    assert match_neurons(reference, other, generator).tolist() == back.tolist()
    monkeypatch.setattr(neurons, "_GROUP", 30)
    found = match_neurons(reference, other, generator)
    assert sorted(found.tolist()) == list(range(40))
    assert (found == back).sum() >= 30


def test_neurons_that_nothing_reaches_and_ranks_that_take_all_are_no_trouble():
    generator = torch.Generator().manual_seed(1)
    reference, other = (random_linears(generator, 5, 4) for _ in range(2))
    nothing = {name: NeuronLinear(x.weight, Metric(0 * x.metric.inputs, None), 0) for name, x in reference.items()}
    for pair in ((nothing, other), (other, nothing), (nothing, nothing)):
        assert sorted(match_neurons(*pair, generator).tolist()) == list(range(5))
    all_taken = random_linears(generator, 5, 4, rank=2)
    assert match_neurons(all_taken, other, generator).tolist() == list(range(5))


def random_orders(model, depths):
    generator = torch.Generator().manual_seed(3)
    return {depth: torch.randperm(model.intermediate_size, generator=generator) for depth in depths}


@pytest.mark.parametrize("family", ["gemma", "llama", "gpt_neox"])
def test_reordered_neurons_compute_the_same(family, tmp_path):
    make_hf_model(tmp_path / "base", family)
    source = open_source(tmp_path / "base")
    reordered = ReorderedNeurons(source, random_orders(source.model, (0, 2)))
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = load_model(tmp_path / "base", torch.float64)(tokens)
        assert (loaded(reordered)(tokens) - expected).abs().max() < 1e-12
    name = "stack.layers.{}.mlp.up.weight"
    assert not torch.equal(reordered.get(name.format(0)), source.get(name.format(0)))
    assert torch.equal(reordered.get(name.format(1)), source.get(name.format(1)))
    assert reordered.place(name.format(0)) == source.place(name.format(0))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("metric", ["both", "inputs", "activations"])
def test_reordered_statistics_are_those_of_the_reordered_base(family, metric, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "products_dtype", lambda device: torch.float32)
    source = folded_base(tmp_path / "base", family, num_layers=3)
    orders = random_orders(source.model, range(3))
    before = measure(source, tmp_path / "before", metric=metric)
    expected = measure(ReorderedNeurons(source, orders), tmp_path / "after", metric=metric)
    for depth in range(3):
        at_depth = {name: linear for (place, name), linear in before.items() if place == depth}
        for name, linear in reorder_statistics(at_depth, orders[depth]).items():
            wanted = expected[depth, name]
            torch.testing.assert_close(linear.token_weights, wanted.token_weights, rtol=1e-3, atol=1e-9)
            for side in ("inputs", "outputs"):
                found, right = getattr(linear.metric, side), getattr(wanted.metric, side)
                assert (found is None) == (right is None)
                if right is not None:
                    torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-5 * float(right.abs().max()))


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("metric", ["both", "inputs", "activations"])
def test_layers_that_are_others_with_their_neurons_shuffled_lose_nothing(family, metric, refit, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration, "products_dtype", lambda device: torch.float32)
    make_hf_model(tmp_path / "base", family, vocab_size=420)
    half = KeptLayers(FoldedNorms(open_source(tmp_path / "base")), (0, 1, 2) * 3)
    source = ReorderedNeurons(half, random_orders(half.model, range(3, 9)))
    recursion = RecursiveConfig(
        num_loops=3, init="average", lora_rank=LoraRanks.uniform(1), lora_init="calibrated", untie_norms=True
    )
    rows = torch.randint(0, 420, (8, 25), generator=torch.Generator().manual_seed(0))
    losses = {}
    for align in (True, False):
        chosen = Calibration(rows, metric, refit=refit, align=align)
        workspace = Workspace(tmp_path / f"{align}", f"{align}")
        block = CalibratedBlock(source, recursion, chosen, torch.float64, 0, workspace, workspace)
        report = block.run()
        losses[align] = {
            linear.name.rpartition("layers.")[2]: sum(linear.metric_loss) + sum(linear.output_loss)
            for linear in report.linears
        }
        for depth in range(9):
            weight, lora_a, lora_b = block.linear(depth % 3, "mlp.up")
            expected = block.aligned_source().get(f"stack.layers.{depth}.mlp.up.weight")
            found = weight + lora_b[depth // 3] @ lora_a[depth // 3]
            assert torch.allclose(found, expected.double(), atol=1e-3) == align
    for name, loss in losses[True].items():
        assert loss < 1e-7
        if "mlp" in name:
            assert losses[False][name] > 1e-3
