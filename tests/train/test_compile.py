"""Training with torch.compile gives the losses that it gives without."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.util.processes import run_on_two
from tests.util.training import (
    Flags,
    losses,
    make_inputs,
    run_script,
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


EXITS: dict[str, Any] = {"exits__coefficient": 0.1, "exits__distill": "last"}
FROZEN: dict[str, Any] = {"exits__freeze": "true", "exits__head_lora_rank": 4}
OPTIONS = {
    "bf16 by layer": {"run__dtype": "bf16", "run__wrap": "layer", "run__checkpointing": "layer"},
    "fp32 by stack": {"run__lora": "merged", "run__checkpointing": "loop"},
}


@pytest.mark.parametrize("options", ["bf16 by layer", pytest.param("fp32 by stack", marks=pytest.mark.slow)])
def test_graphs_of_the_layers_are_one_for_each_loop_and_change_no_loss(
    tmp_path: Path, flags: Flags, options: str
) -> None:
    run_on_two(train_here, flags(tmp_path / "plain", 4, **OPTIONS[options]))
    argv = flags(tmp_path / "compiled", 4, run__compile="true", **OPTIONS[options])
    graphs = run_on_two(train_traced, argv)
    assert set(graphs) == {1 + 2}  # one is the trial's
    tolerance = 2e-3 if "bf16" in options else 1e-6
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=tolerance)


@pytest.mark.parametrize(("settings", "loops"), [(EXITS, 2), (FROZEN, 1)], ids=["exits", "frozen"])
def test_exits_are_trained_through_graphs_of_the_loops_that_run(
    tmp_path: Path, flags: Flags, settings: dict[str, Any], loops: int
) -> None:
    train_here(flags(tmp_path / "plain", 4, **settings), early_exit.COMMAND)
    graphs = train_traced(flags(tmp_path / "compiled", 4, run__compile="true", **settings), early_exit.COMMAND)
    assert graphs == 1 + loops  # one is the trial's
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-6)


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


def test_without_a_compiler_one_line_says_so(tmp_path: Path, flags: Flags) -> None:
    argv = flags(tmp_path / "run", 1, run__compile="true")
    run = run_script(argv, CXX="/no/such/compiler", TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    assert run.returncode == 2
    assert (
        run.stderr.strip()
        .splitlines()[-1]
        .startswith("error: field 'run.compile': found true, but torch.compile fails on cpu")
    )
    assert not (tmp_path / "run" / "final").exists()
