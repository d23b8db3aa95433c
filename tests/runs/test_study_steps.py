"""Steps of the conversion study, which stand-ins make: once each, in order, through interruptions and failures."""

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runs import conversion_study, study_steps
from runs.conversion_arms import choose_arms, result_path
from runs.conversion_study import study_steps as list_steps
from runs.study_steps import Outcome, Step, StepLog, run_steps
from tests.util.studies import ARMS, make_study, write_study_file


class StandIn:
    """Processes that make at once what their step makes, or are interrupted or fail where they are told to."""

    def __init__(self, steps: Sequence[Step], monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = {step.command: step for step in steps}
        self.begun: list[str] = []
        self.interrupted_at: set[int] = set()
        self.failing: set[str] = set()
        self.most_checkpoints = 0
        self.seconds = 0.0
        self.stopped = 0
        monkeypatch.setattr(subprocess, "Popen", lambda command, env: StandInProcess(self, self.steps[command]))

    def clock(self) -> float:
        return self.seconds

    def run(self, minutes: float = 1e9) -> Outcome:
        steps = list(self.steps.values())
        out = next(step.makes for step in steps if step.name == "natural-512 of base").parents[2]
        log = StepLog(out / "steps.jsonl")
        return run_steps(steps, log, seconds=60 * minutes, env={}, write_record=self.write_record, clock=self.clock)

    def write_record(self, step: Step) -> None:
        assert step.record is not None and step.makes.exists()
        step.record.parent.mkdir(parents=True, exist_ok=True)
        step.record.write_text("{}")


class StandInProcess:
    def __init__(self, world: StandIn, step: Step) -> None:
        self.world, self.step = world, step
        self.code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        world, step = self.world, self.step
        if self.code is not None:
            return self.code
        for path in step.needs:
            assert path.exists() or path == Path("base"), (step.name, path)
        world.begun.append(step.name)
        world.seconds += 60
        if len(world.begun) in world.interrupted_at:
            (step.directory or step.makes.with_suffix(".partial")).mkdir(parents=True, exist_ok=True)
            raise KeyboardInterrupt
        if step.name in world.failing:
            self.code = 1
            return 1
        step.makes.parent.mkdir(parents=True, exist_ok=True)
        step.makes.mkdir() if step.is_temporary or step.kind == "data" else step.makes.write_text("{}")
        checkpoints = [each for each in world.steps.values() if each.is_temporary and each.makes.exists()]
        world.most_checkpoints = max(world.most_checkpoints, len(checkpoints))
        self.code = 0
        return 0

    def poll(self) -> int | None:
        return self.code

    def terminate(self) -> None:
        self.world.stopped += 1
        self.code = -15


def test_everything_is_made_once_and_in_order_and_checkpoints_do_not_pile_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = list_steps(make_study(tmp_path / "out"))
    assert len({step.name for step in steps}) == len(steps)
    world = StandIn(steps, monkeypatch)
    assert world.run() == Outcome((), ())
    assert world.begun == [step.name for step in steps]
    # The starts of five trained arms, and what is being measured.
    assert world.most_checkpoints <= 7
    assert not any(path.is_dir() for path in (tmp_path / "out" / "checkpoints").iterdir())
    made = {path for path in tmp_path.rglob("results/*/*.json")}
    models = Counter(path.parent.name for path in made)
    assert models["average-svd-r64"] == models["calibrated-b3-r64"] == 5
    assert models["calibrated-r64-draw2"] == models["stepwise-4096-distilled-seed0"] == 4
    assert models["stepwise-8192-distilled-seed0"] == 5
    before = len(world.begun)
    assert world.run() == Outcome((), ()) and len(world.begun) == before


def test_an_interrupted_study_goes_on_from_the_step_that_was_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = list_steps(make_study(tmp_path / "out", num_seeds=1))
    world = StandIn(steps, monkeypatch)
    world.interrupted_at = {1, 7, 30, 31, len(steps) // 2, len(steps)}
    for _ in world.interrupted_at:
        with pytest.raises(KeyboardInterrupt):
            world.run()
    assert world.run() == Outcome((), ())
    assert world.stopped == len(world.interrupted_at)
    repeated = {name for name, count in Counter(world.begun).items() if count > 1}
    assert set(world.begun) == {step.name for step in steps}
    assert len(world.begun) == len(steps) + len(world.interrupted_at) and len(repeated) <= 6


def test_a_checkpoint_is_made_again_only_for_results_that_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    steps = list_steps(make_study(out, num_seeds=1))
    world = StandIn(steps, monkeypatch)
    world.run()
    world.begun.clear()
    result_path(out, "joint-r64", "code-512").unlink()
    result_path(out, "low-rank-only-r64-4096-plain-seed0", "natural-512").unlink()
    record = result_path(out, "joint-r64", "model")
    record.write_text('{"conversion_seconds": 1.0}')
    world.run()
    trained = "low-rank-only-r64-4096-plain-seed0"
    assert world.begun == [
        "convert joint-r64",
        "code-512 of joint-r64",
        "convert low-rank-only-r64",
        f"train {trained}",
        f"natural-512 of {trained}",
    ]
    assert record.read_text() == '{"conversion_seconds": 1.0}'


def test_a_lost_record_of_a_checkpoint_that_is_there_is_written_without_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    steps = list_steps(make_study(out, arms=tuple(choose_arms(ARMS, ["stepwise"])), tokens=()))
    world = StandIn(steps, monkeypatch)
    (out / "checkpoints" / "stepwise").mkdir(parents=True)
    world.run()
    assert "convert stepwise" not in world.begun and result_path(out, "stepwise", "model").exists()


def test_conversions_on_a_draw_share_statistics_which_are_deleted_when_none_is_left(tmp_path: Path) -> None:
    study = make_study(tmp_path / "out")
    shared: dict[str, set[str]] = {}
    for step in list_steps(study):
        if "--calibration-statistics" in step.command:
            directory = step.command[step.command.index("--calibration-statistics") + 1]
            shared.setdefault(directory, set()).add(step.name)
    first, *others = (str(study.statistics(draw)) for draw in range(3))
    # Two loops of rank 64 with and without refit, three loops, and low rank only.
    assert len(shared[first]) == 4 and [shared[each] for each in others] == [
        {"convert calibrated-r64-draw1"},
        {"convert calibrated-r64-draw2"},
    ]
    for directory in (first, *others):
        Path(directory).mkdir(parents=True)
    left = [step for step in list_steps(study) if step.name == "convert calibrated-r64-draw2"]
    conversion_study.delete_unneeded_statistics(study, left)
    assert list(study.statistics(0).parent.iterdir()) == [study.statistics(2)]
    mine = study.statistics(0).parent / "mine"
    mine.touch()
    for empty in (study, make_study(tmp_path / "new")):
        conversion_study.delete_unneeded_statistics(empty, [])
    assert list(study.statistics(0).parent.iterdir()) == [mine]


def test_a_part_with_other_arms_leaves_statistics_that_the_study_still_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_study(tmp_path / "out")
    part = replace(whole, arms=tuple(choose_arms(ARMS, ["joint-r64"])), tokens=(), num_seeds=1)
    write_study_file(whole.out, [arm.name for arm in whole.arms], whole.tokens)
    assert conversion_study.whole_study(part) == whole
    monkeypatch.setattr(conversion_study, "run_steps", lambda *_, **__: Outcome((), ()))
    monkeypatch.setattr(conversion_study, "write_report", lambda out: out / "report.md")
    monkeypatch.setattr(conversion_study, "write_model_record", lambda *_: None)
    whole.statistics(1).mkdir(parents=True)
    stale = whole.statistics(0).with_name("draw0-of-other-code")
    stale.mkdir()
    conversion_study.run_study(part, 60.0, keep=False)
    assert whole.statistics(1).is_dir() and not stale.exists()


def test_no_step_begins_that_would_not_end_in_time_but_one_always_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each takes a minute.
    steps = list_steps(make_study(tmp_path / "out", num_seeds=1, tokens=()))
    world = StandIn(steps, monkeypatch)
    assert len(world.run(minutes=10).left) == len(steps) - 10
    # Unknown kinds have begun until then; 2.5 minutes are time for two more.
    assert len(world.run(minutes=2.5).left) == len(steps) - 12
    assert len(world.run(minutes=0).left) == len(steps) - 13
    assert world.begun == [step.name for step in steps[:13]]


def test_a_failed_step_holds_up_only_what_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    steps = list_steps(make_study(tmp_path / "out", num_seeds=1))
    world = StandIn(steps, monkeypatch)
    world.failing = {"convert calibrated-r64", "natural-512 of stepwise"}
    outcome = world.run()
    assert [step.name for step in outcome.failed] == ["natural-512 of stepwise", "convert calibrated-r64"]
    left = {step.name for step in outcome.left}
    # What is missing of an arm that was measured needs its checkpoint, which is kept.
    assert left == world.failing | {step.name for step in steps if "calibrated-r64" in step.name}
    assert (tmp_path / "out/checkpoints/stepwise").exists()
    assert "failed: convert calibrated-r64; what needs it is left" in capsys.readouterr().out
    world.failing = set()
    assert world.run() == Outcome((), ())


def test_a_command_that_makes_nothing_has_failed(tmp_path: Path) -> None:
    step = Step("nothing", "kind", (sys.executable, "-S", "-c", ""), tmp_path / "out")
    log = StepLog(tmp_path / "steps.jsonl")
    outcome = run_steps([step], log, seconds=60, env=os.environ, write_record=lambda _: None)
    assert outcome == Outcome((step,), (step,)) and log.estimate(step) is None


def test_times_of_steps_are_estimated_from_their_kind_and_outlast_crashes(tmp_path: Path) -> None:
    def step(name: str, size: float, kind: str = "training") -> Step:
        return Step(name, kind, (), tmp_path / name, size=size)

    log = StepLog(tmp_path / "steps.jsonl")
    log.add(step("a", 100), 5.0, "failed")
    log.add(step("a", 100), 30.0, "interrupted")
    assert (log.seconds_of(step("a", 100)), log.estimate(step("b", 50))) == (None, None)
    log.add(step("a", 100), 20.0, "finished")
    log.add(step("b", 300), 50.0, "finished")
    with log.path.open("a") as stream:
        stream.write('\n{"step": "b", "ki')
    log.add(step("a", 100), 50.0, "finished")
    again = StepLog(log.path)
    assert again.seconds_of(step("a", 100)) == 50.0
    assert again.estimate(step("c", 200)) == 50.0
    assert again.estimate(step("c", 1, "few-shot")) is None
    assert study_steps.describe_time_left([step("c", 14400), step("d", 1, "few-shot")], again) == (
        "about 1 h 0 min, and 1 of kinds that have not run yet"
    )


def test_an_interruption_ends_the_command_that_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training ends by SIGTERM, on which it saves; here a process that notes the signal."""
    noted = tmp_path / "noted"
    code = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(sys.argv[1]).touch(), sys.exit(0)))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    popen = subprocess.Popen

    def begin(command: Sequence[str], env: dict[str, str]) -> "subprocess.Popen[str]":
        process = popen(command, env=env, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        wait = process.wait

        def interrupted(timeout: float | None = None) -> int:
            process.wait = wait  # type: ignore[method-assign]
            raise KeyboardInterrupt

        process.wait = interrupted  # type: ignore[method-assign, assignment]
        return process

    monkeypatch.setattr(subprocess, "Popen", begin)
    step = Step("sleep", "kind", (sys.executable, "-S", "-c", code, str(noted)), tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        run_steps([step], StepLog(tmp_path / "log"), seconds=60, env=os.environ, write_record=lambda _: None)
    assert noted.exists()
    assert '"interrupted"' in (tmp_path / "log").read_text()
