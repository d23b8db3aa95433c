"""Training with torch.compile gives the losses that it gives without."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from rrt.errors import UserError
from rrt.model.config import RecursiveConfig
from tests.util.models import MIXED_RANKS
from tests.util.processes import run_on_two
from tests.util.training import (
    Flags,
    losses,
    make_inputs,
    train_here,
    train_until,
)
from train import early_exit, uptrain
from train.command import Command


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> Flags:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def train_traced(argv: list[str], command: Command[Any] = uptrain.COMMAND) -> int:
    """Trains with graphs as torch.compile takes them, but run by torch's own operators; how many there were."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        train_here(argv, command)
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


OPTIONS: dict[str, dict[str, Any]] = {
    "bf16 by layer": {"run__dtype": "bf16", "run__wrap": "layer", "run__checkpointing": "layer"},
    "fp32 by stack": {"run__lora": "merged", "run__checkpointing": "loop"},
}
TRAININGS: dict[str, tuple[Command[Any], dict[str, Any], int]] = {
    "uptraining": (uptrain.COMMAND, {}, 2),
    "exits": (early_exit.COMMAND, {"exits__coefficient": 0.1, "exits__distill": "last"}, 2),
    "frozen": (early_exit.COMMAND, {"exits__freeze": "true", "exits__head_lora_rank": 4}, 1),
}
"""Commands with settings and the loops that run."""


@pytest.mark.parametrize(
    ("training", "options"),
    [
        ("exits", "bf16 by layer"),
        ("frozen", "fp32 by stack"),
        pytest.param("uptraining", "bf16 by layer", marks=pytest.mark.slow),
        pytest.param("uptraining", "fp32 by stack", marks=pytest.mark.slow),
    ],
)
def test_graphs_of_the_layers_are_one_for_each_loop_that_runs_and_change_no_loss(
    tmp_path: Path, flags: Flags, training: str, options: str
) -> None:
    command, settings, loops = TRAININGS[training]
    settings = settings | OPTIONS[options]
    run_on_two(train_here, flags(tmp_path / "plain", 3, **settings), command)
    argv = flags(tmp_path / "compiled", 3, run__compile="true", **settings)
    graphs = run_on_two(train_traced, argv, command)
    assert set(graphs) == {1 + loops}  # one is the trial's
    tolerance = 2e-3 if "bf16" in options else 1e-6
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=tolerance)


def test_layers_of_different_ranks_have_graphs_of_their_own(tmp_path: Path) -> None:
    mixed = make_inputs(tmp_path, RecursiveConfig(num_loops=2, lora_rank=MIXED_RANKS))
    train_here(mixed(tmp_path / "plain", 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._dynamo.config, "recompile_limit", 1)
        graphs = train_traced(mixed(tmp_path / "compiled", 2, run__compile="true"))
    assert graphs == 1 + 2 * 2  # the trial's, and two layers at two loops
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_compiled_losses_are_those_of_the_plain_run_and_resume_bitwise(
    tmp_path: Path, flags: Flags, options: str
) -> None:
    train_here(flags(tmp_path / "plain", 6, **OPTIONS[options]))
    compiled = {"run__compile": "true", "run__save_every": 2, **OPTIONS[options]}
    train_here(flags(tmp_path / "whole", 6, **compiled))
    train_until(3, flags(tmp_path / "parts", 6, **compiled))
    train_here(flags(tmp_path / "parts", 6, **compiled))
    tolerance = 2e-3 if "bf16" in options else 1e-5
    assert losses(tmp_path / "whole") == pytest.approx(losses(tmp_path / "plain"), rel=tolerance)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def train_without_compiler(argv: list[str], cache: Path) -> None:
    from torch._inductor import config  # imported by torch.compile anyway

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config.cpp, "cxx", ("/no/such/compiler",))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
        train_here(argv)


def test_without_a_compiler_one_message_says_so(tmp_path: Path, flags: Flags) -> None:
    argv = flags(tmp_path / "run", 1, run__compile="true")
    errors = run_on_two(train_without_compiler, argv, tmp_path / "cache")
    for error in errors:
        assert isinstance(error, UserError) and "\n" not in str(error)
        assert str(error).startswith("field 'run.compile': found true, but torch.compile fails on cpu: ")
    assert not (tmp_path / "run" / "final").exists()
