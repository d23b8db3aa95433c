"""Run the steps of bench/gpu.sh within the time of a call, go on where the last call ended, and report. Needs no torch.

bench/gpu.sh explains the arguments, the environment and the exit status.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.gpu_pack import unpack
from bench.gpu_steps import (
    CARRY,
    MODEL,
    PARTS,
    ROOT,
    Machine,
    Step,
    find_test_files,
    find_tools,
    make_steps,
    python_of,
    read_json,
)
from bench.gpu_summary import shortened, summary

FAILED, USAGE, NO_GPU, STEPS_LEFT = 1, 2, 3, 75
RESERVE = 8.0
"""Seconds at the end of a call for the report."""
KILL_AFTER = 5.0
"""Seconds between the signal that asks a step to end and the one that ends it."""
MAX_FILE_BYTES = 2 << 20
"""Larger files stay out of the archive."""
MAX_ARCHIVE_BYTES = 15 << 20
"""A larger archive might not come back: then it has only results, and the ends of logs."""
MAX_TAIL_BYTES = 20 << 10
RESULTS = (".json", ".jsonl", ".csv", ".h")
MODULES = ("transformers",)


class Session:
    """One call: runs steps until its time is up, and keeps report and archive up to date.

    Attributes:
        results: folder with a folder per step.
        ran: names of the steps that this call has run.
        steps: all that there are, for the report.
    """

    def __init__(
        self,
        results: Path,
        archive: Path,
        seconds: float,
        commit: str | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.results, self.commit, self.ran = results, commit, list[str]()
        self._archive, self._clock, self._end = archive, clock, clock() + seconds
        self.facts: dict[str, Any] = {}
        self.steps: Sequence[Step] = ()

    def left(self) -> float:
        """Return the seconds that steps of this call may still take."""
        return self._end - self._clock() - RESERVE

    def is_done(self, step: Step) -> bool:
        """Return True if an earlier call, with the same commit, ran the step to its own end or limit.

        What is missing here is never done: there is such a step only where one is needed. But what Python does
        instead of rrt._plan is not worth a second try to build it.
        """
        record = read_json(self.results / step.name / "step.json")
        if record is None or record["commit"] != self.commit or is_left(step, record["outcome"]):
            return False
        return record["outcome"] != "passed" if step.name == "build-plan" else step.group not in ("build", "model")

    def run(self, steps: Sequence[Step], again: bool = False) -> list[Step]:
        """Run what is not done, in order; return what the time was too short for."""
        left: list[Step] = []
        for step in steps:
            if step.left_out is not None or (self.is_done(step) and not again):
                continue
            if self.left() < step.least:
                left.append(step)
                continue
            if is_left(step, self.run_step(step, again)):
                left.append(step)
            self.report()
        return left

    def run_step(self, step: Step, again: bool = False) -> str:
        """Run a step for as long as its limit and the call allow; return its outcome."""
        folder = self.results / step.name
        record = read_json(folder / "step.json")
        if again or (record is not None and record["commit"] != self.commit):
            shutil.rmtree(folder, ignore_errors=True)  # else it was cut off, and goes on with what it has
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "step.json", {"name": step.name, "outcome": "cut off", "commit": self.commit})
        allowed = min(step.limit, self.left())
        print(f"{step.name}: begins, {self.left():.0f} s left", flush=True)
        began = self._clock()
        command = step.words()
        status = run_limited(command, {**os.environ, **step.environment}, folder / "log.txt", allowed)
        seconds = self._clock() - began
        if status is None:
            outcome = "out of time" if allowed == step.limit else "cut off"
        else:
            text = (folder / "log.txt").read_text(encoding="utf-8", errors="replace") if step.expected_text else ""
            outcome = "passed" if status == 0 and step.expected_text in text else "failed"
        write_json(
            folder / "step.json",
            {
                "name": step.name,
                "part": step.part,
                "outcome": outcome,
                "exit_status": status,
                "seconds": round(seconds, 1),
                "limit": step.limit,
                "command": command,
                "environment": dict(step.environment),
                "commit": self.commit,
                "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            },
        )
        self.ran.append(step.name)
        print(f"{step.name}: {outcome} in {seconds:.0f} s", flush=True)
        if outcome != "passed":
            for line in tail(folder / "log.txt", 5):
                print(f"    {line[:200]}", flush=True)
        return outcome

    def report(self) -> str:
        """Write report.json, tables.txt and the archive; return the tables, shortened."""
        records = [read_json(self.results / step.name / "step.json") for step in self.steps]
        text = summary(self.results, self.steps, self.ran)
        write_json(
            self.results / "report.json",
            {
                "commit": self.commit,
                **self.facts,
                "steps": [record for record in records if record is not None],
                "left_out": {step.name: step.left_out for step in self.steps if step.left_out is not None},
            },
        )
        (self.results / "tables.txt").write_text(text + "\n", encoding="utf-8")
        write_archive(self.results, self._archive)
        return shortened(text)


def is_left(step: Step, outcome: str) -> bool:
    """Return True if the step goes on in the next call: of a file of tests, those that had no time."""
    return outcome == "cut off" or (outcome == "out of time" and step.group == "tests")


def run_limited(command: Sequence[str], environment: Mapping[str, str], log: Path, seconds: float) -> int | None:
    """Run a command with its output in a file; return its exit status, or None if it had to be ended.

    It is ended together with all processes that it started.
    """
    with log.open("a", encoding="utf-8") as file:
        file.write(f"+ {' '.join(command)}\n")
        file.flush()
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            file.write(f"{command[0]}: {error}\n")
            return 127
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:  # also when this process is ended itself
            if process.poll() is None:
                end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(KILL_AFTER)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process that hangs in the driver may never end
        process.wait(KILL_AFTER)


def tail(path: Path, count: int) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()[-count:] if path.is_file() else []


def write_json(path: Path, value: object) -> None:
    """Write atomically: this process may be ended at any time."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    beside.replace(path)


def write_archive(results: Path, archive: Path) -> None:
    """Pack all results but files of more than 2 MiB, atomically; if that is too much, without what can be spared."""
    beside = archive.with_name(archive.name + ".tmp")
    for spares in (False, True):
        with tarfile.open(beside, "w:gz", compresslevel=6) as tar:
            for path in sorted(results.rglob("*")):
                name = f"{results.name}/{path.relative_to(results)}"
                if not path.is_file() or path.suffix == ".tmp":
                    continue
                if spares and path.suffix in (".txt", ".log"):
                    content = path.read_bytes()[-MAX_TAIL_BYTES:]
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
                elif path.stat().st_size <= MAX_FILE_BYTES and (not spares or path.suffix in RESULTS):
                    tar.add(path, name)
        if beside.stat().st_size <= MAX_ARCHIVE_BYTES:
            break
    beside.replace(archive)


def read_commit(environment: Mapping[str, str]) -> str | None:
    """Return the commit that RRT_COMMIT, git or the packed files name, with "-dirty" if the files differ from it.

    The packed files count where git has no history, or one that does not know their commit: that of a copy.
    """
    if commit := environment.get("RRT_COMMIT", "").strip():
        return commit
    packed = CARRY / "commit"
    commit = packed.read_text(encoding="utf-8").strip() if packed.is_file() else None
    if commit is not None and ask_git("cat-file", "-e", commit.removesuffix("-dirty")) is None:
        return commit
    return ask_git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def ask_git(*words: str) -> str | None:
    try:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def read_machine(python: str) -> Machine:
    """Ask the interpreter, in one process, for the GPUs, the library, and the packages that some steps need."""
    program = (
        "import json, importlib.util as u, torch\n"
        f"print(json.dumps([torch.cuda.device_count(), [m for m in {MODULES} if u.find_spec(m)]]), flush=True)\n"
        "import rrt.info\n"
        "print(json.dumps(rrt.info.collect_info()))"
    )
    num_gpus, modules, info = 0, list[str](), dict[str, Any]()
    try:
        done = subprocess.run([python, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
        lines, errors = [line for line in done.stdout.splitlines() if line[:1] in "[{"], done.stderr
        num_gpus, modules = json.loads(lines[0])
        info = json.loads(lines[1])
    except (OSError, subprocess.SubprocessError) as error:
        print(f"gpu.sh: {python}: {error}", file=sys.stderr)
    except (ValueError, IndexError):
        print(
            f"gpu.sh: {python} does not import torch and rrt.info:",
            *errors.splitlines()[-15:],
            sep="\n",
            file=sys.stderr,
        )
    has_model, has_weights = (CARRY / "model" / "config.json").is_file(), (MODEL / "config.json").is_file()
    return Machine(python, info, num_gpus, find_tools(), frozenset(modules), has_model, has_weights)


def choose(steps: Sequence[Step], words: Sequence[str]) -> tuple[list[Step], bool] | None:
    """Return the steps that the arguments name, and whether they run again; None if they name none."""
    if words[:1] == ["all"]:
        parts = words[1:] or [str(part) for part in PARTS]
        if set(parts) <= {str(part) for part in PARTS}:
            return [step for step in steps if str(step.part) in parts], False
        return None
    if words and set(words) <= {name for step in steps for name in (step.group, step.name)}:
        return [step for step in steps if {step.group, step.name} & set(words)], True
    return None


def usage(steps: Sequence[Step]) -> str:
    groups = " | ".join(dict.fromkeys(step.group for step in steps))
    return f"usage: bench/gpu.sh pack [flags] | list | all [{' | '.join(map(str, PARTS))}]... | [{groups}]..."


def main() -> int:
    environment = os.environ
    words = sys.argv[1:]
    python = python_of(environment)
    out = Path(environment.get("OUT") or ROOT / "bench" / "out").resolve()
    results = Path(environment.get("GPU_RESULTS") or ROOT / "bench" / "out" / "gpu").resolve()
    commit = read_commit(environment)
    try:
        seconds = float(environment.get("GPU_SECONDS") or 580)
    except ValueError:
        print(f"GPU_SECONDS: found {environment['GPU_SECONDS']}; expected a number of seconds", file=sys.stderr)
        return USAGE
    # Of a machine with nothing, whose library is built too.
    every = make_steps(Machine(python), results, find_test_files())
    if words != ["list"] and choose(every, words) is None:
        print(usage(every), file=sys.stderr)
        return USAGE
    out.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    session = Session(results, out / "gpu.tar.gz", seconds, commit)
    if commit is not None:
        environment["RRT_COMMIT"] = commit
    for line in unpack():
        print(line)
    if (CARRY / "site").is_dir():
        environment["PYTHONPATH"] = f"{environment.get('PYTHONPATH', '')}:{CARRY / 'site'}"
    machine = read_machine(python)
    session.facts = {"info": machine.info, "python": python}
    if machine.num_gpus == 0 and words not in (["list"], ["build"]):
        print(f"gpu.sh: no GPU is visible to {python}: nothing was run", file=sys.stderr)
        session.report()
        return NO_GPU
    session.steps = steps = make_steps(machine, results, find_test_files())
    if words == ["list"]:
        for step in steps:
            state = "done" if session.is_done(step) else f"left out: {step.left_out}" if step.left_out else ""
            print(f"{step.part}  {step.group:9} {step.name:36} {step.limit:4} s  {state}".rstrip())
        return 0
    selected, again = choose(steps, words) or ([], False)  # a build or a switch that there is not
    # Whatever is asked for needs the library; without rrt._plan, Python plans.
    left = session.run([step for step in steps if step.group == "build"])
    if not machine.has_library:
        machine = read_machine(python)
        session.facts["info"] = machine.info
        if not machine.has_library:
            print(f"\n{session.report()}\nall results: {session._archive}")
            print("there is no library that is of these sources and has the CUDA kernels: nothing else was run")
            return STEPS_LEFT if left else FAILED
    to_run = [step for step in selected if step.group != "build" and (step.group != "model" or again)]
    for index, step in enumerate(to_run):
        if str(MODEL) in step.command and step.left_out is None and (again or not session.is_done(step)):
            to_run[index:index] = [step for step in steps if step.group == "model" and step not in to_run]
            break
    left = session.run(to_run, again)
    print(f"\n{session.report()}")
    print(f"all results: {session._archive}")
    if left:
        print(f"{len(left)} steps are left ({', '.join(step.name for step in left)[:300]}): call again")
        return STEPS_LEFT
    records = [read_json(results / step.name / "step.json") for step in selected]
    return FAILED if any(record and record["outcome"] != "passed" for record in records) else 0


if __name__ == "__main__":
    # Ended from outside, it still ends its step and leaves the archive as it is.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
