"""Fits of one shared weight and a LoRA per loop: optimal where a closed form exists, monotone elsewhere."""

import pytest
import torch

from rrt.folding.svd import truncated_svd
from rrt.folding.tying import RIDGE, Metric, fit_lora, fit_tied, singular_gains

GENERATOR = torch.Generator()


def matrices(count, shape=(7, 5), seed=0):
    """Weights of loops that resemble each other in part."""
    GENERATOR.manual_seed(seed)
    common = torch.randn(shape, generator=GENERATOR)
    return [common + torch.randn(shape, generator=GENERATOR) for _ in range(count)]


def statistics(width, seed, rows=None):
    """A second moment whose eigenvalues differ, times a size of its own."""
    GENERATOR.manual_seed(100 + seed)
    x = torch.randn(rows or 3 * width, width, generator=GENERATOR).double() * torch.linspace(2.0, 0.5, width)
    x = x @ torch.linalg.qr(torch.randn(width, width, generator=GENERATOR).double()).Q
    return (1 + seed) * x.T @ x


def metrics(kind, count, shape=(7, 5)):
    if kind == "none":
        return None
    if kind == "common":
        return [Metric(statistics(shape[1], 0), statistics(shape[0], 1))] * count
    inputs = [statistics(shape[1], seed) for seed in range(count)]
    outputs = [statistics(shape[0], 10 + seed) for seed in range(count)]
    if kind == "inputs":
        return [Metric(inputs=matrix) for matrix in inputs]
    if kind == "outputs":
        return [Metric(outputs=matrix) for matrix in outputs]
    assert kind == "both"
    # Alike in part, as the loops of a model are.
    return [Metric(inputs[0] + 0.3 * c, outputs[0] + 0.3 * g) for c, g in zip(inputs, outputs, strict=True)]


def with_ridge(metric, shape):
    """The two sides as the objective has them: (C, G), scaled to the size that the loop counts with."""
    sides, size = [], 1.0
    given = [side for side in (metric.inputs, metric.outputs) if side is not None]
    for side, width in ((metric.inputs, shape[1]), (metric.outputs, shape[0])):
        eye = torch.eye(width).double()
        sides.append(eye if side is None else side / side.diagonal().mean() + RIDGE * eye)
    for side in given:
        size *= side.diagonal().mean().item() ** (1 / len(given))
    return sides[0] * size, sides[1]


def objective(weights, weight, lora_a, lora_b, chosen):
    sides = [with_ridge(metric, weights[0].shape) for metric in chosen or [Metric()] * len(weights)]
    return value(weights, weight, lora_a, lora_b, sides).item()


def value(weights, weight, lora_a, lora_b, sides):
    total = 0.0
    for loop, (original, (c, g)) in enumerate(zip(weights, sides, strict=True)):
        error = original.double() - weight - lora_b[loop] @ lora_a[loop]
        total = total + (g @ error @ c * error).sum()
    return total


def brute_force(weights, rank, chosen, starts=2):
    """The lowest objective that L-BFGS finds from random LoRAs."""
    outputs, inputs = weights[0].shape
    sides = [with_ridge(metric, weights[0].shape) for metric in chosen or [Metric()] * len(weights)]
    best = float("inf")
    for seed in range(starts):
        GENERATOR.manual_seed(seed)
        lora_a = 0.3 * torch.randn(len(weights), rank, inputs, generator=GENERATOR).double()
        lora_b = 0.3 * torch.randn(len(weights), outputs, rank, generator=GENERATOR).double()
        parameters = [torch.stack(weights).double().mean(0), lora_a, lora_b]
        for parameter in parameters:
            parameter.requires_grad_()
        optimizer = torch.optim.LBFGS(parameters, max_iter=200, history_size=30, line_search_fn="strong_wolfe")

        def closure(optimizer=optimizer, parameters=parameters):
            optimizer.zero_grad()
            found = value(weights, *parameters, sides)
            found.backward()
            return found

        optimizer.step(closure)
        best = min(best, closure().item())
    return best


@pytest.mark.parametrize("kind", ["none", "common", "inputs", "outputs"])
def test_two_loops_whose_metrics_share_a_side_have_the_optimum_in_closed_form(kind):
    weights, chosen = matrices(2), metrics(kind, 2)
    fit = fit_tied(weights, 1, chosen)
    assert len(fit.objectives) == 1 and fit.bound == fit.objectives[0]
    assert fit.objectives[0] == pytest.approx(brute_force(weights, 1, chosen), rel=1e-4)


@pytest.mark.parametrize(("kind", "count"), [("none", 3), ("inputs", 3), ("both", 3), ("both", 2)])
def test_sweeps_lower_the_stated_objective_towards_the_optimum(kind, count):
    weights, chosen = matrices(count), metrics(kind, count)
    fit = fit_tied(weights, 1, chosen, sweeps=100)
    stated = objective(weights, fit.weight, fit.lora_a, fit.lora_b, chosen)
    assert fit.objectives[-1] == pytest.approx(stated, rel=1e-9)
    assert sum(fit.errors) == pytest.approx(stated, rel=1e-9)
    norms = objective(weights, 0.0, fit.lora_a, 0 * fit.lora_b, chosen)
    assert sum(fit.norms) == pytest.approx(norms, rel=1e-9)
    for before, after in zip(fit.objectives, fit.objectives[1:], strict=False):
        assert after <= before * (1 + 1e-12)
    optimum = brute_force(weights, 1, chosen)
    assert 0.999 * optimum <= stated <= 1.1 * optimum
    assert (fit.bound is None) == (kind == "both")
    if fit.bound is not None:
        assert 0 < fit.bound <= 1.001 * optimum


@pytest.mark.parametrize("kind", ["none", "inputs", "both"])
@pytest.mark.parametrize("count", [2, 3])
def test_a_fit_is_never_worse_than_the_average_with_the_best_loras(kind, count):
    weights, chosen = matrices(count, (20, 30)), metrics(kind, count, (20, 30))
    mean = torch.stack(weights).double().mean(0)
    loras = [fit_lora(w - mean, 4, chosen and chosen[loop]) for loop, w in enumerate(weights)]
    average = objective(weights, mean, [a for a, _ in loras], [b for _, b in loras], chosen)
    assert fit_tied(weights, 4, chosen).objectives[-1] < 0.97 * average


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (30, 30)])
def test_two_loops_reach_with_rank_r_what_average_and_svd_reach_with_rank_2r(shape):
    first, second = matrices(2, shape)
    fit = fit_tied([first, second], 5)
    mean = (first.double() + second.double()) / 2
    lora_a, lora_b = truncated_svd(first - mean, 10, torch.Generator())
    lost = (first - mean - lora_b @ lora_a).square().sum().item()
    assert fit.errors == pytest.approx((lost, lost), rel=1e-9)
    assert (second - mean + lora_b @ lora_a).square().sum().item() == pytest.approx(lost, rel=1e-9)
    # The unrolled weights are the same, not only as good.
    torch.testing.assert_close(fit.weight + fit.lora_b[0] @ fit.lora_a[0], mean + lora_b @ lora_a)
    torch.testing.assert_close(fit.weight + fit.lora_b[1] @ fit.lora_a[1], mean - lora_b @ lora_a)


def test_three_loops_have_a_bound_that_the_fit_comes_near():
    weights = matrices(3, (40, 30))
    fit = fit_tied(weights, 6, sweeps=20)
    assert 0.7 * fit.objectives[-1] < fit.bound < fit.objectives[-1]
    assert fit_tied(weights, 0).bound == pytest.approx(fit_tied(weights, 0).objectives[-1], rel=1e-9)


@pytest.mark.parametrize("kind", ["none", "inputs", "both"])
def test_loras_have_orthonormal_rows_and_the_energy_in_b_largest_first(kind):
    fit = fit_tied(matrices(2, (20, 30)), 4, metrics(kind, 2, (20, 30)))
    for lora_a, lora_b in zip(fit.lora_a, fit.lora_b, strict=True):
        torch.testing.assert_close(lora_a @ lora_a.T, torch.eye(4).double())
        gram = lora_b.T @ lora_b
        torch.testing.assert_close(gram, torch.diag(gram.diagonal()), rtol=0, atol=1e-9 * gram.max().item())
        assert (gram.diagonal().diff() <= 0).all() and gram.diagonal().min() > 0


@pytest.mark.parametrize("sides", ["none", "inputs", "outputs", "both"])
def test_fit_lora_is_the_best_of_its_rank_in_the_metric(sides):
    residual = matrices(1, (12, 9))[0]
    c = statistics(9, 0) if sides in ("inputs", "both") else None
    g = statistics(12, 1) if sides in ("outputs", "both") else None
    metric = Metric(c, g)
    lora_a, lora_b = fit_lora(residual, 3, metric)
    c, g = with_ridge(metric, residual.shape)
    error = residual.double() - lora_b @ lora_a
    found = (g @ error @ c * error).sum().item()

    def root(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors * values.sqrt() @ vectors.T

    whitened = torch.linalg.svdvals(root(g) @ residual.double() @ root(c))
    assert found == pytest.approx(whitened[3:].square().sum().item(), rel=1e-9)


@pytest.mark.parametrize("kind", ["none", "common", "inputs"])
def test_gains_of_two_loops_are_the_differences_of_the_objective_at_each_rank(kind):
    weights, chosen = matrices(2), metrics(kind, 2)
    objectives = [fit_tied(weights, rank, chosen).objectives[-1] for rank in range(6)]
    gains = singular_gains(weights, chosen)
    assert gains.shape == (5,) and (gains.diff() <= 1e-9).all()
    expected = -torch.tensor(objectives).double().diff()
    torch.testing.assert_close(gains, expected, rtol=1e-6, atol=1e-9 * objectives[0])


@pytest.mark.parametrize(("kind", "count"), [("none", 3), ("inputs", 3), ("both", 3), ("both", 2)])
def test_gains_never_rise_and_add_up_to_about_all_that_tying_loses(kind, count):
    weights, chosen = matrices(count), metrics(kind, count)
    gains = singular_gains(weights, chosen)
    assert gains.shape == (5,) and (gains.diff() <= 1e-9).all() and (gains >= 0).all()
    assert gains.sum().item() == pytest.approx(fit_tied(weights, 0, chosen).objectives[0], rel=0.1)


@pytest.mark.parametrize("kind", ["none", "inputs", "both"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_equal_weights_are_shared_whole_and_their_loras_wait_with_zero_b(kind, count):
    weights = matrices(1) * count
    fit = fit_tied(weights, 2, metrics(kind, count))
    torch.testing.assert_close(fit.weight, weights[0].double(), rtol=1e-9, atol=1e-9)
    assert fit.lora_b.count_nonzero() == 0 and fit.lora_a.norm(dim=2).min() > 0.99
    assert sum(fit.errors) < 1e-15 * sum(fit.norms)


@pytest.mark.parametrize("kind", ["none", "inputs", "both"])
@pytest.mark.parametrize("count", [2, 3])
def test_full_rank_loses_nothing_and_rank_zero_has_no_loras(kind, count):
    weights, chosen = matrices(count), metrics(kind, count)
    full = fit_tied(weights, 999, chosen)
    assert full.lora_a.shape == (count, 5, 5) and full.lora_b.shape == (count, 7, 5)
    assert sum(full.errors) < 1e-12 * sum(full.norms)
    none = fit_tied(weights, 0, chosen)
    assert none.lora_a.shape == (count, 0, 5) and none.lora_b.shape == (count, 7, 0)
    if kind == "none":
        torch.testing.assert_close(none.weight, torch.stack(weights).double().mean(0))


@pytest.mark.parametrize("count", [2, 3])
def test_zero_matrices_and_metrics_that_nothing_reached_give_finite_fits(count):
    zeros = fit_tied([torch.zeros(7, 5)] * count, 2, metrics("both", count))
    assert zeros.weight.count_nonzero() == 0 and zeros.errors == (0.0,) * count
    weights = matrices(count)
    unreached = [Metric(torch.zeros(5, 5)), *metrics("inputs", count)[1:]]
    fit = fit_tied(weights, 1, unreached)
    assert fit.weight.isfinite().all() and fit.lora_b.isfinite().all()
    # The others have the shared weight for themselves: as if there were no such loop.
    alone = fit_tied(weights[1:], 1, unreached[1:], sweeps=50)
    assert fit_tied(weights, 1, unreached, sweeps=50).objectives[-1] == pytest.approx(
        alone.objectives[-1], abs=1e-6 * sum(fit.norms)
    )
    nothing = fit_tied(weights, 1, [Metric(torch.zeros(5, 5))] * count)
    assert nothing.errors == pytest.approx(tuple((1 + RIDGE) * e for e in fit_tied(weights, 1).errors), rel=1e-9)


def test_singular_and_slightly_indefinite_statistics_are_taken():
    weights = matrices(2, (20, 30))
    singular = [Metric(statistics(30, seed, rows=4), statistics(20, seed, rows=3)) for seed in range(2)]
    fit = fit_tied(weights, 3, singular)
    assert fit.weight.isfinite().all() and fit.objectives[-1] < fit.objectives[0]
    # One direction owns the statistics, as activations of a first token do; what fp32 rounds may then turn negative.
    massive = 1e8 * torch.ones(30, 30) + torch.diag(torch.tensor([-3e5] + [0.0] * 29))
    assert torch.linalg.eigvalsh(massive).min() < -RIDGE * massive.diagonal().mean()
    fit = fit_tied(weights, 3, [Metric(massive)] * 2)
    assert fit.weight.isfinite().all() and 0 < sum(fit.errors) < sum(fit.norms)


def test_a_loop_counts_by_the_size_of_its_statistics():
    weights, shape = matrices(2), statistics(5, 0)
    even, uneven = (fit_tied(weights, 1, [Metric(shape), Metric(scale * shape)]) for scale in (1.0, 9.0))
    assert even.errors[0] == pytest.approx(even.errors[1], rel=1e-9)
    # The distance is shared out inversely: errors a and b with a + b fixed and a^2 + 9 b^2 least, in units of it.
    assert uneven.errors[0] == pytest.approx(9 * uneven.errors[1], rel=1e-6)
    both = [Metric(shape, statistics(7, 1)), Metric(9.0 * shape, 9.0 * statistics(7, 1))]
    sized = fit_tied(weights, 1, both)
    assert sized.errors[0] == pytest.approx(9 * sized.errors[1], rel=1e-2)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_the_unit_of_the_statistics_is_free(count, scale):
    weights, chosen = matrices(count), metrics("both", count)
    scaled = [Metric(scale * metric.inputs, scale * metric.outputs) for metric in chosen]
    expected, found = fit_tied(weights, 1, chosen), fit_tied(weights, 1, scaled)
    assert found.objectives[-1] == pytest.approx(scale * expected.objectives[-1], rel=1e-6)
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-4, atol=1e-5)
