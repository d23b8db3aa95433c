"""Runs that are killed or interrupted, and resume as if they had not been."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemWriter

from rrt.checkpoint.source import open_source
from rrt.errors import UserError
from rrt.model.config import RecursiveConfig
from rrt.model.transformer import RecursiveTransformer
from tests.util.models import MIXED_RANKS
from tests.util.processes import forkserver, run_on, run_on_two
from tests.util.training import (
    Flags,
    command_line,
    losses,
    make_inputs,
    refuse_to_write,
    run_script,
    script_env,
    steps_kept,
    train,
    train_here,
    train_until,
)
from train import early_exit, uptrain
from train.checkpoints import complete_steps
from train.command import Command
from train.data import Mixture
from train.trainer import StepResult, Trainer


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> Flags:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


FROZEN = {"exits__freeze": "true", "exits__head_lora_rank": 4, "optim__lr": 0.05}
TRAININGS = {
    "uptraining": (uptrain.COMMAND, {}),
    "frozen model with a LoRA on its head": (early_exit.COMMAND, FROZEN),
}


@pytest.mark.parametrize(("training", "count"), [("uptraining", 2), ("frozen model with a LoRA on its head", 1)])
def test_runs_resume_bitwise(training: str, count: int, flags: Flags, tmp_path: Path) -> None:
    command, settings = TRAININGS[training]
    run_on(count, train_here, flags(tmp_path / "whole", run__save_every=3, **settings), command)
    argv = flags(tmp_path / "parts", run__save_every=3, **settings)
    run_on(count, train_until, 5, argv, command)
    assert steps_kept(tmp_path / "parts") == [3]
    run_on(count, train_here, argv, command)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    final = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("parts", "whole")]
    assert final[0] == final[1]


def test_a_model_of_mixed_ranks_resumes_bitwise_and_keeps_them(tmp_path: Path) -> None:
    recursion = RecursiveConfig(num_loops=2, lora_rank=MIXED_RANKS)
    mixed = make_inputs(tmp_path, recursion)
    run_on_two(train_here, mixed(tmp_path / "whole", 4, run__save_every=2))
    argv = mixed(tmp_path / "parts", 4, run__save_every=2)
    run_on_two(train_until, 3, argv)
    run_on_two(train_here, argv)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    final = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("parts", "whole")]
    assert final[0] == final[1]
    assert open_source(tmp_path / "parts" / "final").recursion == recursion


def uptrain_with_noise(step: int | None, argv: list[str]) -> None:
    """An uptraining that draws random numbers in every forward; it ends after `step` steps, if given."""
    embed = RecursiveTransformer.embed_tokens

    def embed_tokens(self: RecursiveTransformer, input_ids: torch.Tensor) -> torch.Tensor:
        embedded = embed(self, input_ids)
        return embedded + 0.1 * torch.randn_like(embedded)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecursiveTransformer, "embed_tokens", embed_tokens)
        train_here(argv) if step is None else train_until(step, argv)


def test_random_numbers_are_the_same_after_a_resumption(flags: Flags, tmp_path: Path) -> None:
    run_on_two(uptrain_with_noise, None, flags(tmp_path / "whole", 6, run__save_every=2))
    argv = flags(tmp_path / "parts", 6, run__save_every=2)
    run_on_two(uptrain_with_noise, 3, argv)
    run_on_two(uptrain_with_noise, None, argv)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    run_on_two(train_here, flags(tmp_path / "quiet", 1))
    assert losses(tmp_path / "quiet") != losses(tmp_path / "whole")[:1]


def steps_taken(argv: list[str]) -> int:
    """The number of optimizer steps that a training takes to its end."""
    taken, whole = 0, Trainer._train_step

    def count(self: Trainer, rate: float) -> StepResult:
        nonlocal taken
        taken += 1
        return whole(self, rate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_step", count)
        train_here(argv)
    return taken


def test_other_numbers_of_processes_go_on_with_the_same_data(flags: Flags, tmp_path: Path) -> None:
    settings = dict(steps=10, run__save_every=2, run__micro_batch=4)
    train_here(flags(tmp_path / "whole", **settings))
    out = tmp_path / "parts"
    run_on_two(train_until, 5, flags(out, **settings))
    assert steps_kept(out) == [2, 4]
    (out / ".step-99").mkdir()  # as a killed run leaves it
    (out / ".step-99" / "__0_0.distcp").write_bytes(b"partial")
    train_until(7, flags(out, **settings))
    assert steps_kept(out) == [4, 6]
    assert run_on_two(steps_taken, flags(out, **settings)) == (10 - 6, 10 - 6)
    assert losses(out) == pytest.approx(losses(tmp_path / "whole"), abs=2e-5)
    assert not list(out.glob(".*"))


def test_a_run_interrupted_before_its_first_checkpoint_starts_again(flags: Flags, tmp_path: Path) -> None:
    argv = flags(tmp_path / "run", steps=4)
    train_until(2, argv)
    assert len(losses(tmp_path / "run")) == 2
    train_here(argv)
    assert len(losses(tmp_path / "run")) == 4


def test_a_resumed_run_takes_the_optimizer_settings_of_its_recipe(flags: Flags, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train_until(5, flags(out, run__save_every=4))
    trainer = train(flags(out, optim__weight_decay=0.3, optim__beta2=0.9))
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.3, 0.0]
    assert {group["betas"] for group in trainer.optimizer.param_groups} == {(0.9, 0.9)}


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_one_message(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    refuse_to_write(monkeypatch, 4)
    with pytest.raises(UserError, match=r"step-4: cannot be written \(.*No space left.*\); earlier"):
        train_here(flags(out, run__save_every=2))
    assert steps_kept(out) == [2] and not list(out.glob(".*"))
    monkeypatch.undo()
    train_here(flags(out, run__save_every=2))


def two_processes(argv: list[str], command: Command[Any]) -> list[ForkServerProcess]:
    """A training by two new processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [forkserver().Process(target=_train, args=(rank, port, argv, command), daemon=True) for rank in range(2)]
    for process in started:
        process.start()
    return started


def _train(rank: int, port: int, argv: list[str], command: Command[Any]) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    train_here(argv, command)


def wait_for_steps(out: Path, count: int) -> None:
    """Return when a run in progress has recorded so many steps, or an earlier part of it had."""
    end, path = time.monotonic() + 100, out / "metrics.jsonl"
    while count and not (path.is_file() and len(path.read_text().splitlines()) >= count):
        assert time.monotonic() < end
        time.sleep(0.002)


def wait_for_end(out: Path) -> None:
    """Return when a run in progress begins to write `final/`."""
    end = time.monotonic() + 100
    while not [*out.glob(".final.*"), *out.glob("final")]:
        assert time.monotonic() < end
        time.sleep(0.0005)


STEPS_PER_KILL = 8


def kill_repeatedly(kills: int, early: int, late: int, out: Path, argv: list[str], command: Command[Any]) -> None:
    """Kill a run at random moments and let it finish.

    Args:
        kills: around random ones of its steps.
        early: while it starts, until it has loaded its checkpoint.
        late: while it writes `final/`.
    """
    moments = random.Random(0)
    startup_seconds = 0.0
    earlier = moments.sample(range(1, kills), early)  # not before a first start has been timed
    for kill in range(kills):
        for _ in range(earlier.count(kill)):
            kill_after(two_processes(argv, command), moments.uniform(0, startup_seconds))
            assert not (out / "final").exists(), "the start is too fast for so late a kill"
        began, started = time.monotonic(), two_processes(argv, command)
        if not kill:
            wait_for_steps(out, 1)
            startup_seconds = time.monotonic() - began
        wait_for_steps(out, kill * STEPS_PER_KILL + moments.randrange(STEPS_PER_KILL))
        kill_after(started, moments.uniform(0, 0.05))
        assert not (out / "final").exists(), "the run is too short for so many kills"
    for _ in range(late):
        started = two_processes(argv, command)
        wait_for_end(out)
        kill_after(started, moments.uniform(0, 0.01))
        if (out / "final").exists():  # and so complete
            return
    started = two_processes(argv, command)
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0]


def kill_after(started: list[ForkServerProcess], seconds: float) -> None:
    time.sleep(seconds)
    for process in started:
        process.kill()
    for process in started:
        process.join()


SLOW = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.mark.parametrize(
    ("kills", "early", "late", "training"),
    [
        (2, 0, 0, "uptraining"),
        pytest.param(15, 8, 4, "uptraining", marks=SLOW),
        pytest.param(5, 2, 1, "frozen model with a LoRA on its head", marks=SLOW),
    ],
)
def test_a_run_killed_at_random_moments_has_the_losses_of_one_that_was_not(
    kills: int, early: int, late: int, training: str, flags: Flags, tmp_path: Path
) -> None:
    command, settings = TRAININGS[training]
    settings = dict(steps=STEPS_PER_KILL * kills + 6, run__micro_batch=4, **settings)
    run_on_two(train_here, flags(tmp_path / "whole", **settings), command)
    argv = flags(tmp_path / "killed", run__save_every=2, **settings)
    kill_repeatedly(kills, early, late, tmp_path / "killed", argv, command)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    final = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("killed", "whole")]
    assert final[0] == final[1]
    assert not list((tmp_path / "killed").glob(".*"))


def test_the_checkpoint_being_written_completes_after_ctrl_c(
    flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = FileSystemWriter.write_data

    def interrupt_and_write(self: FileSystemWriter, *arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.2)  # the main thread is interrupted meanwhile
        return write(self, *arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", interrupt_and_write)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            train_here(flags(tmp_path / "run", 100_000, run__save_every=2))
    finally:
        signal.signal(signal.SIGINT, before)
        dist.destroy_process_group()  # a command leaves that to the end of its process
    assert complete_steps(tmp_path / "run") == [2]
    assert not (tmp_path / "run" / "final").exists()


def uptrain_signalled(argv: list[str], at: int, name: signal.Signals) -> None:
    """An uptraining whose last process gets a signal while it fetches its micro-batch number `at` (from 0)."""
    batch, fetched = Mixture.batch, 0

    def fetch(self: Mixture, first: int, count: int) -> Any:
        nonlocal fetched
        if fetched == at and os.environ.get("RANK") != "0":
            os.kill(os.getpid(), name)
        fetched += 1
        return batch(self, first, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mixture, "batch", fetch)
        train_here(argv)


def test_an_interrupted_run_saves_its_last_finished_step_within_a_micro_batch(flags: Flags, tmp_path: Path) -> None:
    settings = dict(steps=4, run__micro_batch=2)  # two micro-batches a step
    run_on_two(train_here, flags(tmp_path / "whole", **settings))
    for at, saved in ((2, [1]), (3, [2]), (0, [])):  # within a step, at its end, in the first
        out = tmp_path / f"stopped-{at}"
        assert run_on_two(uptrain_signalled, flags(out, **settings), at, signal.SIGUSR1) == (None, None)
        assert steps_kept(out) == saved
        assert not (out / "final").exists()
        run_on_two(train_here, flags(out, **settings))
        assert losses(out) == losses(tmp_path / "whole")


@pytest.mark.parametrize(("at", "said"), [(9, "saved step 2 of 6"), (1, "no step was finished")])
def test_an_interrupted_run_says_that_the_same_command_resumes_it(
    at: int,
    said: str,
    flags: Flags,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    uptrain_signalled(flags(tmp_path / "run", steps=6), at, signal.SIGTERM)
    assert capsys.readouterr().out.splitlines()[-1] == f"SIGTERM: {said}; the same command goes on from there"


def wait_for_checkpoint(out: Path, process: "subprocess.Popen[Any]") -> None:
    end = time.monotonic() + 100
    while not steps_kept(out):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)


def descendants(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                child = int(path.parent.name)
                found += [child, *descendants(child)]
    return found


@pytest.mark.slow
def test_two_processes_killed_under_torchrun_resume_bitwise(flags: Flags, tmp_path: Path) -> None:
    assert run_script(flags(tmp_path / "whole", 60, run__save_every=5), processes=2).returncode == 0
    out = tmp_path / "killed"
    argv = flags(out, 60, run__save_every=5)
    with subprocess.Popen(command_line(argv, 2), stdout=subprocess.DEVNULL, env=script_env()) as process:
        wait_for_checkpoint(out, process)
        for pid in [process.pid, *descendants(process.pid)]:
            os.kill(pid, signal.SIGKILL)
    assert not (out / "final").exists()
    result = run_script(argv, processes=2)
    assert (result.returncode, result.stderr) == (0, "")
    assert losses(out) == losses(tmp_path / "whole")


@pytest.mark.slow
def test_workers_of_a_killed_torchrun_train_on_until_one_of_them_is_signalled(flags: Flags, tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = flags(out, 100_000, run__save_every=2, run__micro_batch=4)
    with subprocess.Popen(command_line(argv, 2), stdout=subprocess.DEVNULL, env=script_env()) as process:
        wait_for_checkpoint(out, process)
        workers = descendants(process.pid)
        process.kill()
    assert len(workers) == 2
    try:
        wait_for_steps(out, len(losses(out)) + 10)
        with pytest.raises(UserError, match="another training run writes to it"):
            train_here(argv)
    finally:
        os.kill(workers[1], signal.SIGTERM)
    end = time.monotonic() + 100
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert steps_kept(out)[-1] == len(losses(out)) >= 10 and not (out / "final").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "to_worker", "exit_code"), [("SIGTERM", False, 1), ("SIGUSR1", False, 1), ("SIGUSR1", True, 0)]
)
def test_torchrun_passes_the_signal_on_and_itself_ends_as_documented(
    name: str, to_worker: bool, exit_code: int, flags: Flags, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    argv = flags(out, 100_000, run__save_every=2, run__micro_batch=4)
    env = script_env(PET_SIGNALS_TO_HANDLE="SIGTERM,SIGUSR1")
    with subprocess.Popen(command_line(argv, 2), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env) as process:
        wait_for_checkpoint(out, process)
        os.kill(descendants(process.pid)[0] if to_worker else process.pid, getattr(signal, name))
        printed = process.communicate(timeout=100)[0].decode()
    assert process.returncode == exit_code
    assert (
        printed.splitlines()[-1]
        == f"{name}: saved step {steps_kept(out)[-1]} of 100000; the same command goes on from there"
    )
