"""Sharded models on two gloo processes against one process, in double precision."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from bench.traffic import Traffic
from rrt.errors import UserError
from rrt.model.transformer import Checkpointing
from tests.util.processes import run_on
from tests.util.sharding import MODELS, SEQUENCES, backward, batch, build, build_sharded, next_token_loss, whole
from train.distributed import (
    Wrap,
    fill_parameters,
    full_parameters,
    processes,
    raise_everywhere,
    set_last_micro_batch,
    shard_model,
)
from train.objective import NEXT_TOKEN


def sharded_gradients(
    name: str,
    dtype: torch.dtype | None = None,
    wrap: Wrap = "stack",
    checkpointing: Checkpointing = "none",
    shard_size: int = 0,
) -> tuple[list[dict[str, Tensor]], list[float]]:
    """Gradients by parameter, and this process's loss, at accumulation 1, 2 and 3 where these divide its share."""
    with processes("cpu", shard_size) as group:
        model = build_sharded(name, group.mesh, dtype, wrap, checkpointing)
        gradients, losses = [], []
        share = SEQUENCES // group.world_size
        for accumulation in (count for count in (1, 2, 3) if share % count == 0):
            losses.append(backward(model, group, accumulation))
            gradients.append({key: whole(parameter.grad) for key, parameter in model.named_parameters()})
            model.zero_grad()
        return gradients, losses


def single_gradients(name: str) -> tuple[dict[str, Tensor], float]:
    model = build(name)
    inputs, targets = batch()
    loss = next_token_loss(model(inputs), targets)
    loss.backward()
    return {
        key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None
    }, loss.item()


def assert_gradients_equal_those_of_one_process(name: str, results: Sequence[Any]) -> None:
    expected, expected_loss = single_gradients(name)
    losses = [sum(parts) / len(parts) for parts in zip(*(losses for _, losses in results), strict=True)]
    assert losses == pytest.approx([expected_loss] * len(losses), abs=1e-12)
    for gradients in results[0][0]:
        assert gradients.keys() == expected.keys()
        for key, gradient in gradients.items():
            assert expected[key].abs().max() > 1e-9, key
            torch.testing.assert_close(
                gradient, expected[key], rtol=0, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}"
            )


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        *((name, "stack") for name in MODELS),
        *((name, "layer") for name in ("prefix", "sequence", "odd shapes", "relaxed, mixed ranks")),
    ],
)
def test_gradients_of_two_processes_are_those_of_one(name: str, wrap: Wrap) -> None:
    assert_gradients_equal_those_of_one_process(name, run_on(2, sharded_gradients, name, None, wrap))


@pytest.mark.parametrize(
    ("name", "checkpointing", "wrap"),
    [
        ("relaxed, three loops", "layer", "stack"),
        ("relaxed, three loops", "loop", "layer"),
        ("prefix", "layer", "layer"),
        ("prefix", "loop", "stack"),
    ],
)
def test_checkpointing_leaves_gradients_exact(name: str, checkpointing: Checkpointing, wrap: Wrap) -> None:
    results = run_on(2, sharded_gradients, name, None, wrap, checkpointing)
    assert_gradients_equal_those_of_one_process(name, results)


@pytest.mark.parametrize(("shard_size", "wrap"), [(1, "layer"), (2, "stack")])
def test_copies_of_the_shards_leave_gradients_exact(shard_size: int, wrap: Wrap) -> None:
    results = run_on(2, sharded_gradients, "relaxed, three loops", None, wrap, "none", shard_size)
    assert_gradients_equal_those_of_one_process("relaxed, three loops", results)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", ["stack", "layer"])
def test_two_copies_of_two_shards_leave_gradients_exact(wrap: Wrap) -> None:
    results = run_on(4, sharded_gradients, "relaxed, three loops", None, wrap, "none", 2)
    assert_gradients_equal_those_of_one_process("relaxed, three loops", results)


def test_bf16_computes_near_and_reduces_in_fp32() -> None:
    expected, expected_loss = single_gradients("relaxed")
    (gradients, losses), (_, other_losses) = run_on(2, sharded_gradients, "relaxed", torch.bfloat16)
    for accumulation in range(3):
        assert (losses[accumulation] + other_losses[accumulation]) / 2 == pytest.approx(expected_loss, rel=0.02)
        for key, gradient in gradients[accumulation].items():
            assert gradient.dtype == torch.float32
            similarity = torch.cosine_similarity(gradient.double().flatten(), expected[key].flatten(), dim=0)
            assert similarity > 0.97, key
    assert not torch.equal(gradients[0]["embed"].bfloat16().float(), gradients[0]["embed"])


def traffic_per_step(name: str, wrap: Wrap, accumulation: int, shard_size: int) -> tuple[Counter[str], Counter[str]]:
    with processes("cpu", shard_size) as group:
        model = build_sharded(name, group.mesh, torch.bfloat16, wrap)
        with Traffic() as traffic:
            backward(model, group, accumulation)
        return traffic.counts, traffic.bytes


@pytest.mark.parametrize(("wrap", "units", "accumulation"), [("stack", 2, 1), ("layer", 3, 3)])
def test_a_step_gathers_and_reduces_each_unit_once(wrap: Wrap, units: int, accumulation: int) -> None:
    """The stack or its two layers, and the root, for however many loops and micro-batches."""
    (counts, moved), _ = run_on(2, traffic_per_step, "relaxed, three loops", wrap, accumulation, 0)
    assert counts == {"all-gather": units, "reduce-scatter": units}
    parameters = sum(parameter.numel() for parameter in build("relaxed, three loops").parameters())
    assert moved == {"all-gather": 2 * parameters, "reduce-scatter": 4 * parameters}


def test_copies_of_the_shards_add_an_all_reduce_per_unit() -> None:
    (counts, moved), _ = run_on(2, traffic_per_step, "relaxed, three loops", "stack", 3, 1)
    parameters = sum(parameter.numel() for parameter in build("relaxed, three loops").parameters())
    assert counts["all-reduce"] == 2
    assert moved["all-reduce"] == 4 * parameters


@pytest.mark.parametrize("wrap", ["stack", "layer"])
@pytest.mark.parametrize(("compute_dtype", "sharded"), [(None, False), (torch.bfloat16, True)])
def test_one_process_is_wrapped_only_to_compute_in_another_dtype(
    compute_dtype: torch.dtype | None, sharded: bool, wrap: Wrap
) -> None:
    with processes("cpu") as group:
        model = build_sharded("relaxed, three loops", group.mesh, compute_dtype, wrap)
        assert {isinstance(parameter, DTensor) for parameter in model.parameters()} == {sharded}
        inputs = torch.arange(12)[None]
        for last in (False, True):
            set_last_micro_batch(model, last)
            NEXT_TOKEN.bind(model)(inputs, inputs)[0].backward()
        assert all(isinstance(parameter.grad, DTensor) == sharded for parameter in model.parameters())


def placements(name: str) -> dict[str, tuple[tuple[int, ...], int]]:
    with processes("cpu") as group:
        found = {}
        for key, parameter in build_sharded(name, group.mesh, None).named_parameters():
            assert isinstance(parameter, DTensor)
            (placement,) = parameter.placements
            assert isinstance(placement, Shard)
            found[key] = (tuple(parameter.shape), placement.dim)
        return found


def test_tensors_with_an_odd_number_of_loops_are_sharded_on_an_even_dimension() -> None:
    found, _ = run_on(2, placements, "relaxed, three loops")
    loras = {key: value for key, value in found.items() if "lora" in key}
    assert loras
    for key, (shape, dim) in found.items():
        assert shape[dim] % 2 == 0, key
    assert {dim for _, dim in loras.values()} == {1}


def round_trip(name: str) -> dict[str, Tensor]:
    with processes("cpu") as group:
        return dict(full_parameters(build_sharded(name, group.mesh, None)))


@pytest.mark.parametrize("name", ["relaxed, three loops", "odd shapes"])
def test_parameters_are_filled_and_gathered_exactly(name: str) -> None:
    for gathered in run_on(2, round_trip, name):
        for key, parameter in build(name).named_parameters():
            assert torch.equal(gathered[key], parameter), key


def disagree(kind: type[Exception], path: Path) -> None:
    with processes("cpu") as group:

        def action() -> None:
            if group.rank == 1:
                raise kind("only here") if kind is UserError else kind(28, "No space left on device", str(path))

        raise_everywhere(action)


@pytest.mark.parametrize(
    ("kind", "message"), [(UserError, "only here"), (OSError, "/some/file: No space left on device")]
)
def test_an_error_of_one_process_is_raised_in_all(kind: type[Exception], message: str) -> None:
    for result in run_on(2, disagree, kind, Path("/some/file")):
        assert isinstance(result, UserError)
        assert str(result) == message


def rank_after_agreement() -> int:
    with processes("cpu") as group:
        return raise_everywhere(lambda: group.rank)


def test_agreement_gives_each_process_its_own_result() -> None:
    assert run_on(2, rank_after_agreement) == (0, 1)


def test_without_torchrun_the_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with processes("cpu") as group:
        assert (group.rank, group.world_size, group.device.type) == (0, 1, "cpu")
        model = build_sharded("relaxed", group.mesh, None)
        assert dict(full_parameters(model)).keys() == dict(build("relaxed").named_parameters()).keys()


def join_in_shards_of_three() -> None:
    with processes("cpu", 3):
        pass


def test_a_shard_size_that_does_not_divide_the_processes_is_refused() -> None:
    for result in run_on(2, join_in_shards_of_three):
        assert isinstance(result, UserError)
        assert str(result) == "field 'run.shard_size': found 3; expected a divisor of 2 process(es)"


def ask_for_cuda() -> None:
    with processes("cuda"):
        pass


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="there are two GPUs")
def test_too_few_gpus_are_the_same_error_in_every_process() -> None:
    for result in run_on(2, ask_for_cuda):
        assert isinstance(result, UserError)
        assert str(result) == (
            f"field 'run.device': found {torch.cuda.device_count()} GPU(s); expected one for each of 2 process(es)"
        )


@pytest.mark.gpu
def test_bf16_loss_on_cuda_is_that_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    losses = {}
    for device in ("cpu", "cuda"):
        with processes(device) as group:
            start = build("relaxed")
            model = build("relaxed").float().to(group.device)
            model.set_merge(True)
            shard_model(model, group.mesh, torch.bfloat16)
            fill_parameters(model, start.get_parameter)
            inputs, targets = (part.to(group.device) for part in batch())
            loss = next_token_loss(model(inputs), targets)
            loss.backward()
            losses[device] = loss.item()
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.01)
