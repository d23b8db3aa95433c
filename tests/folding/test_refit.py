"""Depth-by-depth refit: the optimum of its own objective, never worse than the LoRA before, for every kind."""

import pytest
import torch

from rrt.folding import calibration
from rrt.folding.calibration import LinearStatistics, TextPass, load_layer
from rrt.folding.refit import PRIOR_TOKENS, AdaptedLinear, Regression, SideBySide
from rrt.folding.tying import RIDGE, Metric
from rrt.model.loop_linear import loop_linears
from tests.util.calibration import ROWS, folded_base
from tests.util.models import ALL_FAMILIES

CPU = torch.device("cpu")
GENERATOR = torch.Generator()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=GENERATOR.manual_seed(seed))


def problem(rank, *, tokens=200, inputs=9, outputs=7, dtype=torch.float32):
    """A linear with a LoRA, and weighted tokens whose targets another matrix makes, with noise."""
    linear = AdaptedLinear(
        random(outputs, inputs).to(dtype),
        random(rank, inputs, seed=1).to(dtype),
        random(outputs, rank, seed=2).to(dtype),
    )
    x = random(tokens, inputs, seed=3) * torch.linspace(0.1, 2, inputs)
    y = x @ random(inputs, outputs, seed=4) + 0.1 * random(tokens, outputs, seed=5)
    g = random(30, outputs, seed=7) * torch.linspace(0.2, 3, outputs)
    return linear, x, y, random(tokens, seed=6).square(), g.T @ g


def regression_of(x, y, w):
    regression = Regression()
    for part in range(0, len(x), 64):
        regression.add(x[part : part + 64], y[part : part + 64], w[part : part + 64])
    return regression


def objective(linear, before, x, y, w, outputs):
    """The weighted squared error in the metric of the outputs, with the ridge towards the LoRA before, fp64."""
    outputs = torch.eye(y.shape[1]).double() if outputs is None else outputs.double()
    outputs = outputs / outputs.diagonal().mean() + RIDGE * torch.eye(len(outputs))
    error = y.double() - x.double() @ (linear.weight.double() + linear.lora_b.double() @ linear.lora_a.double()).T
    moved = linear.lora_b.double() @ linear.lora_a.double() - before.lora_b.double() @ before.lora_a.double()
    prior = PRIOR_TOKENS / len(x)
    ridge = (prior + RIDGE * (1 + prior)) * (x.double().square() * w.double()[:, None]).sum(0).mean()
    return ((error @ outputs * error).sum(1) * w).sum() + ridge * (moved * (outputs @ moved)).sum()


@pytest.mark.parametrize("with_outputs", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_refit_is_the_optimum_of_its_objective(rank, with_outputs):
    linear, x, y, w, g = problem(rank)
    outputs = g if with_outputs else None
    found = regression_of(x, y, w).refit(linear, outputs)
    assert torch.equal(found.weight, linear.weight)
    best = objective(found, linear, x, y, w, outputs)
    assert best < objective(linear, linear, x, y, w, outputs)
    # No step of gradient descent from it, and no other start, finds better.
    for start in (found, AdaptedLinear(linear.weight, random(rank, 9, seed=8), random(7, rank, seed=9))):
        factors = [start.lora_a.double().clone().requires_grad_(), start.lora_b.double().clone().requires_grad_()]
        optimizer = torch.optim.LBFGS(factors, max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

        def loss(factors=factors, optimizer=optimizer):
            optimizer.zero_grad()
            value = objective(AdaptedLinear(linear.weight, *factors), linear, x, y, w, outputs)
            value.backward()
            return value

        optimizer.step(loss)
        assert loss() > best * (1 - 1e-4)


def test_a_lora_that_cannot_be_bettered_is_kept():
    linear, x, y, w, g = problem(3, dtype=torch.bfloat16)
    once = regression_of(x, y, w).refit(linear, g)
    # Rounded to 16 bits the optimum is no optimum, and a second one may be worse.
    targets = x @ once.merged().T
    assert regression_of(x, targets, w).refit(once, g) is once


def test_without_rank_or_tokens_that_matter_nothing_changes():
    linear, x, y, w, g = problem(3)
    assert regression_of(x, y, 0 * w).refit(linear, g) is linear
    bare, x, y, w, g = problem(0)
    assert regression_of(x, y, w).refit(bare, g) is bare


def uniform_statistics(source, depth):
    """Every token and output counts alike."""
    tokens = ROWS[:, 1:].numel()
    return {
        name: LinearStatistics(Metric(torch.eye(linear.in_features), None), torch.ones(tokens))
        for name, linear in loop_linears(load_layer(source, depth, CPU))
    }


def other_layers(source, depth, rank=3, noise=0.05):
    """The layer's linears with noise on the weights and LoRAs that do nothing yet."""
    result = {}
    for seed, (name, linear) in enumerate(loop_linears(load_layer(source, depth, CPU))):
        weight = linear.weight + noise * random(*linear.weight.shape, seed=seed)
        result[name] = AdaptedLinear(weight, random(rank, weight.shape[1]), torch.zeros(len(weight), rank))
    return result


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    monkeypatch.setattr(calibration, "products_dtype", lambda device: torch.float32)


def walk(source, *, refit, noise=0.05):
    text = TextPass(source, ROWS, CPU)
    embedded = text.embed()
    side_by_side, errors = SideBySide(text, embedded, embedded.clone()), []
    for depth in range(source.model.num_layers):
        statistics = uniform_statistics(source, depth) if refit else None
        linears, found = side_by_side.advance(depth, other_layers(source, depth, noise=noise), statistics)
        errors.append(found)
    return side_by_side, errors, linears


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_base_beside_itself_has_no_error(tmp_path, family):
    source = folded_base(tmp_path / "base", family, num_layers=2)
    _, errors, _ = walk(source, refit=False, noise=0.0)
    assert all(found.stream.share < 1e-12 for found in errors)
    assert all(sums.share < 1e-12 for found in errors for sums in found.linears.values())


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_refit_lowers_the_error_of_the_stream_at_every_depth(tmp_path, family):
    source = folded_base(tmp_path / "base", family, num_layers=3)
    _, plain, before = walk(source, refit=False)
    _, refitted, after = walk(source, refit=True)
    for depth in range(3):
        assert 0 < refitted[depth].stream.share < plain[depth].stream.share
    for name, linear in after.items():
        assert torch.equal(linear.weight, before[name].weight) and not torch.equal(linear.lora_b, before[name].lora_b)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_errors_are_those_of_the_two_models(tmp_path, family):
    """Against whole forward passes of layers with and without the noise."""
    source = folded_base(tmp_path / "base", family, num_layers=2)
    _, errors, _ = walk(source, refit=False)
    text = TextPass(source, ROWS, CPU)
    base = converted = text.embed()
    for depth in range(2):
        layers = [load_layer(source, depth, CPU), load_layer(source, depth, CPU)]
        outputs = [{}, {}]
        for layer, seen in zip(layers, outputs, strict=True):
            for name, linear in loop_linears(layer):
                linear.register_forward_hook(lambda _, __, output, name=name, seen=seen: seen.update({name: output}))
        for name, linear in other_layers(source, depth).items():
            layers[1].get_submodule(name).weight.data = linear.merged()
        base, converted = layers[0](base, 0, text.context), layers[1](converted, 0, text.context)
        for name, expected in outputs[0].items():
            share = (outputs[1][name] - expected).square().sum() / expected.square().sum()
            assert errors[depth].linears[name].share == pytest.approx(share.item(), rel=1e-3)
        first = (converted - base)[:, 0].square().sum() / base[:, 0].square().sum()
        assert errors[depth].stream.first_share == pytest.approx(first.item(), rel=1e-3)
