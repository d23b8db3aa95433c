"""Distribution of a rank budget: the optimum by brute force, met exactly, on shapes of real models too."""

import itertools
import math
import random

import pytest

from rrt.checkpoint.presets import preset
from rrt.errors import UserError
from rrt.folding.rank_budget import allocate, distribute_budget
from rrt.model.config import LoraRanks, RecursiveConfig, linear_shapes
from rrt.model.meta import meta_model
from rrt.model.sizes import model_sizes


def random_gains(rng: random.Random, ranks: int) -> list[float]:
    """Gains that fall as singular values do, some of them equal."""
    return sorted((float(rng.choice((rng.expovariate(1), rng.randint(0, 3)))) for _ in range(ranks)), reverse=True)


def saved(gains: dict[str, list[float]], ranks: dict[str, int]) -> float:
    return sum(sum(gains[name][:rank]) for name, rank in ranks.items())


def spent(cost: dict[str, int], ranks: dict[str, int]) -> int:
    return sum(cost[name] * rank for name, rank in ranks.items())


@pytest.mark.parametrize("seed", range(40))
def test_ranks_are_the_optimum_of_all_that_spend_as_much_as_can_be(seed: int) -> None:
    rng = random.Random(seed)
    names = "abcd"[: rng.randint(2, 4)]
    gains = {name: random_gains(rng, rng.randint(1, 6)) for name in names}
    cost = {name: rng.choice(((6, 4, 11), (3, 5, 7), (10, 20, 30))[seed % 3]) for name in names}
    budget = rng.randint(sum(cost.values()), sum(cost[name] * len(gains[name]) for name in names))
    ranks = allocate(gains, cost, budget)
    choices = [
        dict(zip(names, each, strict=True)) for each in itertools.product(*(range(len(g) + 1) for g in gains.values()))
    ]
    most = max(spent(cost, choice) for choice in choices if spent(cost, choice) <= budget)
    best = max(saved(gains, choice) for choice in choices if spent(cost, choice) == most)
    assert spent(cost, ranks) == most
    assert saved(gains, ranks) == pytest.approx(best, abs=1e-12)


def test_units_go_where_a_parameter_saves_most() -> None:
    gains = {"wide": [100.0, 90.0, 1.0], "narrow": [30.0, 29.0, 28.0]}
    assert allocate(gains, {"wide": 40, "narrow": 10}, 70) == {"wide": 1, "narrow": 3}
    assert allocate(gains, {"wide": 10, "narrow": 40}, 70) == {"wide": 3, "narrow": 1}
    assert allocate({"a": [9.0, 4.0, 1.0], "b": [5.0, 0.1]}, {"a": 30, "b": 20}, 80) == {"a": 2, "b": 1}


def test_a_matrix_may_get_none_and_all_get_all_that_they_can() -> None:
    gains = {"a": [5.0, 4.0, 3.0], "b": [0.0, 0.0]}
    assert allocate(gains, {"a": 1, "b": 1}, 3) == {"a": 3, "b": 0}
    assert allocate(gains, {"a": 1, "b": 1}, 99) == {"a": 3, "b": 2}


def test_a_budget_that_no_sum_of_costs_meets_is_not_exceeded() -> None:
    ranks = allocate({"a": [3.0] * 9, "b": [1.0] * 9}, {"a": 6, "b": 10}, 33)
    assert spent({"a": 6, "b": 10}, ranks) == 32


def test_a_budget_below_one_rank_each_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^rank budget: found 15 parameters; expected at least 16, rank 1 for each of 2 "
    ):
        allocate({"a": [1.0], "b": [1.0]}, {"a": 6, "b": 10}, 15)


@pytest.mark.parametrize(
    ("name", "num_loops", "rank"),
    [
        ("smollm2-135m", 2, 64),
        ("smollm2-135m", 3, 1),
        ("smollm2-135m", 2, 250),
        ("gemma-2b", 2, 512),
        ("pythia-410m", 3, 7),
    ],
)
def test_real_shapes_cost_what_the_uniform_rank_costs(name: str, num_loops: int, rank: int) -> None:
    model, rng = preset(name), random.Random(0)
    recursion = RecursiveConfig(num_loops=num_loops, lora_rank=LoraRanks.uniform(rank, is_budget=True))
    gains = {
        f"layers.{layer}.{linear}": [rng.uniform(1, 3) * math.exp(-i / 80) / (layer + 1) for i in range(min(shape))]
        for layer in range(recursion.layers_per_loop(model))
        for linear, shape in linear_shapes(model).items()
    }
    for values in gains.values():
        values.sort(reverse=True)
    ranks = distribute_budget(model, recursion, gains)
    assert ranks.is_budget and str(ranks).startswith(f"budget {rank}, {len(gains)} matrices ")
    distributed = RecursiveConfig(num_loops=num_loops, lora_rank=ranks)
    expected = model_sizes(model, recursion, meta_model(model, recursion).embed.dtype)
    found = model_sizes(model, distributed, meta_model(model, distributed).embed.dtype)
    assert found.lora_params == expected.lora_params and found.total_params == expected.total_params
    assert len(set(ranks.matrices.values())) > 3
    cost = {key: sum(linear_shapes(model)[key.split(".", 2)[2]]) for key in gains}
    uniform = {key: min(rank, len(values)) for key, values in gains.items()}
    assert spent(cost, dict(ranks.matrices)) == spent(cost, uniform)
    assert saved(gains, dict(ranks.matrices)) > saved(gains, uniform)
