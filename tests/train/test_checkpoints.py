"""Resumable checkpoints of a small model: complete or absent, in the background or not, damaged ones skipped."""

import errno
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from rrt.errors import UserError
from tests.util.processes import run_on_two
from tests.util.training import refuse_to_write
from train.checkpoints import STATE_FILE, TrainingStateWriter, latest_complete, load_step, step_directories
from train.distributed import AgreedError, processes


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with processes("cpu"):
        yield


class Run:
    """A model whose parameters and moments change with every step."""

    def __init__(self, seed: int = 0, sharded: bool = True) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.Linear(4, 6))
        if sharded:
            fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.step = 0

    def advance(self) -> None:
        self.model(torch.full((2, 6), 1.0 + self.step)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def state(self) -> list[torch.Tensor]:
        moments = [self.optimizer.state[p][key] for p in self.model.parameters() for key in ("exp_avg", "exp_avg_sq")]
        tensors = (*self.model.parameters(), *moments)
        whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
        return [tensor.detach().clone() for tensor in whole]


def save_steps(out: Path, *steps: int, keep: int = 9, background: bool = True, sharded: bool = True) -> list[Any]:
    """Advance a run and save it after each of `steps`; what its state was then."""
    run, states = Run(sharded=sharded), []
    writer = TrainingStateWriter(out, keep=keep, background=background)
    while run.step < max(steps):
        run.advance()
        if run.step in steps:
            writer.save(run.step, run.model, run.optimizer, {"a": run.step})
            states.append(run.state())
    writer.wait()
    writer.close()
    return states


def steps(out: Path) -> list[int]:
    return [step for step, _ in step_directories(out)]


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("background", [True, False])
def test_a_checkpoint_restores_every_tensor(background: bool, sharded: bool, tmp_path: Path) -> None:
    states = save_steps(tmp_path, 1, 3, background=background, sharded=sharded)
    for step, expected in zip((1, 3), states, strict=True):
        for resumed_sharded in (True, False):
            run = Run(seed=1, sharded=resumed_sharded)
            assert load_step(tmp_path / f"step-{step}", run.model, run.optimizer) == step
            assert all(torch.equal(found, tensor) for found, tensor in zip(run.state(), expected, strict=True))
    state = json.loads((tmp_path / "step-3" / STATE_FILE).read_text())
    assert (state["step"], state["a"]) == (3, 3)
    assert state["files"].keys() == {".metadata", "__0_0.distcp"}
    assert not list(tmp_path.glob(".*"))


def test_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 4, 8, keep=2)
    assert steps(tmp_path) == [4, 8] and latest_complete(tmp_path, warn=True) == tmp_path / "step-8"


def test_an_old_checkpoint_that_cannot_be_deleted_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("train.checkpoints.shutil.rmtree", refuse)
    save_steps(tmp_path, 1, 2, keep=1)
    assert latest_complete(tmp_path, warn=True) == tmp_path / "step-2"
    warning = capfd.readouterr().err
    assert warning.startswith(f"warning: {tmp_path / 'step-1'}: cannot be deleted (") and "Permission denied" in warning


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert latest_complete(tmp_path, warn=True) is None
    (tmp_path / "step-best").mkdir()
    (tmp_path / ".step-7").mkdir()
    assert latest_complete(tmp_path, warn=True) is None


def cut_in_half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated shard": (lambda path: cut_in_half(path / "__0_0.distcp"), "__0_0.distcp: found "),
    "missing shard": (lambda path: (path / "__0_0.distcp").unlink(), "__0_0.distcp: no such file"),
    "missing plan": (lambda path: (path / ".metadata").unlink(), ".metadata: no such file"),
    "missing marker": (lambda path: (path / STATE_FILE).unlink(), "trainer.json: no such file"),
    "truncated marker": (lambda path: cut_in_half(path / STATE_FILE), "trainer.json: not valid JSON"),
    "marker of another kind": (
        lambda path: (path / STATE_FILE).write_text("{}"),
        "trainer.json: field 'files': found None",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_a_warning_that_names_it(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    damage, message = DAMAGES[kind]
    save_steps(tmp_path, 1, 2, 3)
    damage(tmp_path / "step-3")
    assert latest_complete(tmp_path, warn=True) == tmp_path / "step-2"
    warning = capfd.readouterr().err
    assert warning.startswith(f"warning: {tmp_path / 'step-3'}: damaged ({message}") and warning.count("\n") == 1


def test_a_run_whose_every_checkpoint_is_damaged_is_not_started_anew(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    for path in tmp_path.glob("step-*/__0_0.distcp"):
        path.unlink()
    with pytest.raises(UserError, match=r"every checkpoint is damaged \(step-2: .*; step-1: .*\); restore one"):
        latest_complete(tmp_path, warn=True)


def test_a_damaged_checkpoint_is_replaced_and_not_counted_among_those_kept(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3)
    for step in (2, 3):
        DAMAGES["missing shard"][0](tmp_path / f"step-{step}")
    save_steps(tmp_path, 3, keep=2)
    assert steps(tmp_path) == [1, 2, 3] and latest_complete(tmp_path, warn=True) == tmp_path / "step-3"
    save_steps(tmp_path, 4, keep=2)
    assert steps(tmp_path) == [3, 4]


@pytest.mark.parametrize("sharded", [True, False])
def test_training_goes_on_while_a_checkpoint_of_the_state_before_is_written(
    sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write, write = threading.Event(), FileSystemWriter.write_data

    def write_later(self: FileSystemWriter, *arguments: Any) -> Any:
        assert may_write.wait(60)
        return write(self, *arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", write_later)
    run = Run(sharded=sharded)
    run.advance()
    expected = run.state()
    writer = TrainingStateWriter(tmp_path, keep=2, background=True)
    writer.save(1, run.model, run.optimizer, {"a": 1})
    run.advance()
    assert not steps(tmp_path) and not writer.has_failed
    may_write.set()
    writer.save(2, run.model, run.optimizer, {"a": 2})
    assert 1 in steps(tmp_path)  # the next one waits for it
    writer.close()
    assert steps(tmp_path) == [1, 2]
    resumed = Run(seed=1)
    load_step(tmp_path / "step-1", resumed.model, resumed.optimizer)
    assert all(torch.equal(found, tensor) for found, tensor in zip(resumed.state(), expected, strict=True))


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_reported_and_leaves_the_checkpoint_before(
    background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_to_write(monkeypatch, 2)
    with pytest.raises(AgreedError, match=r"step-2: cannot be written \(.*No space left.*\); earlier checkpoints are"):
        save_steps(tmp_path, 1, 2, background=background)
    assert latest_complete(tmp_path, warn=False) == tmp_path / "step-1"
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_full_disk_that_torch_reports_by_a_position_is_told_with_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fall_short(*_: Any, **__: Any) -> None:
        raise OSError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr("train.checkpoints.save", fall_short)
    with pytest.raises(AgreedError, match=r"step-1: cannot be written \(\[enforce fail .*\); earlier"):
        save_steps(tmp_path, 1)
    monkeypatch.setattr("train.checkpoints.free_bytes", lambda path: 8)
    told = r"step-1: cannot be written \(No space left on device: \d+ B needed, 8 B free\); earlier"
    with pytest.raises(AgreedError, match=told):
        save_steps(tmp_path, 1)


def test_a_marker_that_cannot_be_written_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr("train.checkpoints.atomic_write", full_disk)
    with pytest.raises(AgreedError, match=r"step-1: cannot be written \(.*No space left.*trainer.json"):
        save_steps(tmp_path, 1)
    assert not list(tmp_path.iterdir())


def fail_on_one(out: Path) -> tuple[bool, str]:
    with processes("cpu") as group, pytest.MonkeyPatch.context() as patch:
        save_steps(out, 1)
        if group.rank == 1:
            refuse_to_write(patch, 2)
        run = Run()
        run.advance()
        writer = TrainingStateWriter(out, keep=1, background=True)
        writer.save(2, run.model, run.optimizer, {"a": 2})
        with pytest.raises(AgreedError) as caught:
            writer.wait()
        writer.close()
        return writer.has_failed, str(caught.value)


def test_a_checkpoint_that_one_process_cannot_write_fails_in_all(tmp_path: Path) -> None:
    results = run_on_two(fail_on_one, tmp_path)
    assert results[0] == results[1]
    assert "step-2: cannot be written" in results[0][1] and "No space left" in results[0][1]
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_a_checkpoint_that_cannot_be_read_is_one_message(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    shard = tmp_path / "step-1" / "__0_0.distcp"
    shard.write_bytes(bytes(shard.stat().st_size))
    run = Run()
    with pytest.raises(AgreedError, match="step-1: cannot be read"):
        load_step(tmp_path / "step-1", run.model, run.optimizer)
