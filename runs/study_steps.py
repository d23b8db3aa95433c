"""Steps of a long study that survives interruption: each is a command and the path that it makes.

Steps whose results exist are left out, and with them what only these results needed. A part of the study starts no
step that would not end in its time; the next part goes on from there.
"""

import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STOP_SECONDS = 300
"""Time that an interrupted command has to save what it has done."""


@dataclass(frozen=True)
class Step:
    """A command and the path that it makes.

    Attributes:
        kind: steps of one kind take time in proportion to their `size`.
        needs: paths that earlier steps make.
        is_temporary: made for the steps that need it, and deleted when none of them is left.
        directory: deleted in place of `makes`, which lies in it.
        record: a result that is written when the command has ended, from what it made.
    """

    name: str
    kind: str
    command: tuple[str, ...]
    makes: Path
    needs: tuple[Path, ...] = ()
    size: float = 1.0
    is_temporary: bool = False
    directory: Path | None = None
    record: Path | None = None


def pending_steps(steps: Sequence[Step]) -> list[Step]:
    """Return the steps, in order, of which a result is missing or that make what such a step needs."""
    needed: set[Path] = set()
    pending = []
    for step in reversed(steps):
        is_made = step.makes.exists()
        is_wanted = not step.is_temporary or step.makes in needed
        lacks_record = step.record is not None and not step.record.exists()
        if lacks_record or (is_wanted and not is_made):
            pending.append(step)
            if not is_made:
                needed.update(step.needs)
    return pending[::-1]


def delete_unneeded(steps: Sequence[Step]) -> None:
    """Delete what temporary steps made and no pending step needs."""
    pending = pending_steps(steps)
    needed = {path for step in pending for path in (step.makes, *step.needs)}
    for step in steps:
        if step.is_temporary and step.makes not in needed:
            shutil.rmtree(step.directory or step.makes, ignore_errors=True)


class StepLog:
    """How long steps took: a file with a line of JSON for each attempt, read at the start and appended to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begun: dict[str, float] = {}
        """Seconds, by name, of interrupted attempts that were not finished since."""
        self._finished: dict[str, dict[str, tuple[float, float]]] = {}
        """Size and seconds by kind and name."""
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                with suppress(json.JSONDecodeError):  # a crash has cut it
                    self._count(json.loads(line))

    def add(self, step: Step, seconds: float, outcome: str) -> None:
        """Append an attempt that "finished", "failed" or was "interrupted"."""
        attempt = {"step": step.name, "kind": step.kind, "size": step.size, "seconds": seconds, "outcome": outcome}
        self._count(attempt)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(f"\n{json.dumps(attempt)}")

    def _count(self, attempt: dict[str, Any]) -> None:
        name = attempt["step"]
        if attempt["outcome"] != "failed":
            self._begun[name] = self._begun.get(name, 0.0) + attempt["seconds"]
        if attempt["outcome"] == "finished":
            self._finished.setdefault(attempt["kind"], {})[name] = attempt["size"], self._begun.pop(name)

    def seconds_of(self, step: Step) -> float | None:
        """Return the time of a finished step, with that of interrupted attempts that it went on from, or None."""
        return self._finished.get(step.kind, {}).get(step.name, (0.0, None))[1]

    def estimate(self, step: Step) -> float | None:
        """Estimate the seconds of a step from those of its kind that have finished; None without one."""
        finished = self._finished.get(step.kind)
        if not finished:
            return None
        sizes, seconds = zip(*finished.values(), strict=True)
        return float(step.size * sum(seconds) / sum(sizes))


@dataclass(frozen=True)
class Outcome:
    """End of a part: the steps that failed, and all that are left, the failed ones and what needs them included."""

    failed: tuple[Step, ...]
    left: tuple[Step, ...]


def run_steps(
    steps: Sequence[Step],
    log: StepLog,
    *,
    seconds: float,
    env: Mapping[str, str],
    write_record: Callable[[Step], None],
    keep: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Run the pending steps in order, as long as they fit into `seconds`; the first one in any case.

    A step that fails is reported; those that need what it makes are left, and others go on.

    Args:
        env: environment of the commands.
        write_record: writes the `record` of a step whose command has ended.
        keep: do not delete what temporary steps made.
    """
    began, has_run = clock(), False
    failed: list[Step] = []
    while True:
        if not keep:
            delete_unneeded(steps)
        pending = pending_steps(steps)
        step = next(iter(_without_failed(pending, failed)), None)
        if step is None:
            break
        elapsed = clock() - began
        if has_run and elapsed + (log.estimate(step) or 0.0) > seconds:
            break
        print(f"\n=== {_progress(step, steps, pending, log, elapsed)}", flush=True)
        if not step.makes.exists():
            has_run = True
            print(f"$ {shlex.join(step.command)}", flush=True)
            if not _run(step, log, env, clock):
                print(f"failed: {step.name}; what needs it is left, and the other steps go on", flush=True)
                failed.append(step)
                continue
        # A checkpoint may be made again, for results that are missing: its record stays the first one's.
        if step.record is not None and not step.record.exists():
            write_record(step)
    return Outcome(tuple(failed), tuple(pending_steps(steps)))


def describe_time_left(left: Sequence[Step], log: StepLog) -> str:
    """Say about how long these steps take, as far as steps of their kinds have finished."""
    estimates = [log.estimate(step) for step in left]
    text = f"about {format_duration(sum(estimate or 0.0 for estimate in estimates))}"
    unknown = estimates.count(None)
    return f"{text}, and {unknown} of kinds that have not run yet" if unknown else text


def format_duration(seconds: float) -> str:
    """Format a duration in hours and minutes, or in seconds: ``4000`` -> ``"1 h 7 min"``."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def _without_failed(pending: Sequence[Step], failed: Sequence[Step]) -> list[Step]:
    """Leave out failed steps and those that need what they, or steps that were left out, make."""
    unmade: set[Path] = set()
    rest = []
    for step in pending:
        if step in failed or not unmade.isdisjoint(step.needs):
            unmade.add(step.makes)
        else:
            rest.append(step)
    return rest


def _progress(step: Step, steps: Sequence[Step], pending: Sequence[Step], log: StepLog, elapsed: float) -> str:
    expected = log.estimate(step)
    own = "" if expected is None else f" (about {format_duration(expected)})"
    return (
        f"step {steps.index(step) + 1} of {len(steps)}: {step.name}{own}; {format_duration(elapsed)} gone; "
        f"{len(pending)} steps to go: {describe_time_left(pending, log)}"
    )


def _run(step: Step, log: StepLog, env: Mapping[str, str], clock: Callable[[], float]) -> bool:
    """Run a step's command; returns whether it made what it should. Stops it when this process is interrupted."""
    began = clock()
    step.makes.parent.mkdir(parents=True, exist_ok=True)
    outcome = "interrupted"
    process = subprocess.Popen(step.command, env=dict(env))
    try:
        is_done = process.wait() == 0 and step.makes.exists()
        outcome = "finished" if is_done else "failed"
    finally:
        if process.poll() is None:
            # A training saves where it is.
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        log.add(step, clock() - began, outcome)
    return is_done
