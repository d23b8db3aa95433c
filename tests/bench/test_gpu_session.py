"""bench/gpu.sh without a GPU: order, limits, resumption, archive and tables, against fakes of all that it runs."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from bench import gpu_session, gpu_steps
from bench.gpu_session import Session, run_limited, write_archive
from bench.gpu_steps import CUDA_TESTS, Machine, Step, find_switches, find_test_files, make_steps
from tests.test_docs import help_of

ROOT = Path(__file__).resolve().parents[2]
INFO = {
    "native": {"library": "rrt/_native.so", "cuda": True, "stale": False, "plan": "rrt/_plan.so"},
    "gpus": [{"name": "NVIDIA H200", "capability": "9.0"}],
}
FAKE = """#!/bin/bash
# Stands in for python, ncu and compute-sanitizer: notes what it is asked for, and does what FAKE_* name.
case "$1" in bench/gpu_session.py) exec {python} "$@" ;; esac
[ "$1" != -c ] || {{ echo "$FAKE_INFO"; exit; }}
variables="[commit ${{RRT_COMMIT:-}}] [blocking ${{CUDA_LAUNCH_BLOCKING:-}}] [pdl ${{RRT_PDL:-}}]"
echo "$(basename "$0") $* $variables" >> "$FAKE_LOG"
while [ $# -gt 0 ]; do
  case "$1" in --json | --log | --log-file) mkdir -p "$(dirname "$2")" && echo '{{}}' > "$2" ;; esac
  [ "$1" != "${{FAKE_FAIL:-}}" ] || {{ echo "it broke"; exit 9; }}
  shift
done
"""


def machine(**changes):
    values = dict(python="python", info=INFO, tools=frozenset({"ncu", "compute-sanitizer"}))
    values |= dict(modules=frozenset({"transformers", "lm_eval", "datasets"}), has_model=True, has_data=True)
    return Machine(**{**values, "switches": ("RRT_PDL",), **changes})


@pytest.fixture
def checkout(tmp_path):
    """A copy of the files that bench/gpu.sh itself needs, beside fakes of what it runs."""
    root = tmp_path / "checkout"
    names = ["bench/gpu.sh", "bench/gpu_session.py", "bench/gpu_steps.py", "bench/gpu_summary.py", "bench/gpu_pack.py"]
    names += ["eval/tables.py", "rrt/__init__.py", "rrt/errors.py", "rrt/version.py", "csrc/cuda/launch.h"]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / "tests" / "model").mkdir(parents=True)
    (root / "tests" / "model" / "test_other.py").write_text("pytestmark = pytest.mark." + "gpu")
    (tmp_path / "fakes").mkdir()
    for name in ("python", "ncu", "compute-sanitizer"):
        path = tmp_path / "fakes" / name
        path.write_text(FAKE.format(python=sys.executable))
        path.chmod(0o755)
    return root


@pytest.fixture
def run(checkout, tmp_path):
    log = tmp_path / "log.txt"

    def call(*arguments: str, info: object = INFO, **environment: str) -> tuple[subprocess.CompletedProcess, list[str]]:
        log.write_text("")
        values = dict(PYTHON=str(tmp_path / "fakes" / "python"), OUT=str(tmp_path / "out"), FAKE_LOG=str(log))
        values |= dict(FAKE_INFO=json.dumps([info, ["transformers"]]), RRT_COMMIT="abc123")
        values |= environment
        path = f"{tmp_path / 'fakes'}:{os.environ['PATH']}"
        command = ["bash", str(checkout / "bench" / "gpu.sh"), *arguments]
        done = subprocess.run(
            command, env={**os.environ, "PATH": path, **values}, capture_output=True, text=True, timeout=120
        )
        return done, log.read_text().splitlines()

    return call


def archived(tmp_path: Path, name: str) -> str:
    with tarfile.open(tmp_path / "out" / "gpu.tar.gz") as archive:
        file = archive.extractfile(f"gpu/{name}")
        assert file is not None
        return file.read().decode()


def test_all_runs_the_parts_in_order_reports_last_and_does_nothing_twice(run, tmp_path):
    done, log = run("all")
    assert done.returncode == 0, done.stdout + done.stderr
    programs = [line.split()[1] if line.startswith("python ") else line.split()[0] for line in log]
    expected = ["bench/gpu_cases.py"] * 4 + ["bench/gpu_test_file.py"] * 3 + ["bench/pdl_stress.py"]
    expected += ["bench/gpu_test_file.py"] + ["compute-sanitizer"] * 3
    expected += ["ncu", "bench/tile_sweep.py"] + ["bench/kernels.py"] * 3
    expected += ["bench/kernels.py"] * (2 * len(find_switches()) + 3) + ["bench/training.py", "bench/serving.py"]
    assert programs == expected
    assert all("[commit abc123]" in line for line in log)
    assert [("[blocking 1]" in line) for line in log] == [program == "bench/gpu_cases.py" for program in programs]
    tests = [line.split()[2] for line in log if "gpu_test_file" in line]
    assert tests == [*CUDA_TESTS, "tests/model/test_other.py"]
    assert sum("[pdl 0]" in line for line in log) == sum("[pdl 1]" in line for line in log) == 1

    lines = done.stdout.splitlines()
    table = lines.index("Steps (*: of this call)")
    assert all(not line.endswith("s left") for line in lines[table:]) and lines[-1].startswith("all results: ")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gpu.tar.gz"]
    report = json.loads(archived(tmp_path, "report.json"))
    assert report["commit"] == "abc123" and report["info"] == INFO
    assert {step["outcome"] for step in report["steps"]} == {"passed"}
    assert set(report["left_out"]) == {"uptrain", "generate", "fewshot"}
    assert "no model was brought along" in report["left_out"]["generate"]
    assert archived(tmp_path, "stress/stress.json") == "{}\n" and "Steps" in archived(tmp_path, "tables.txt")

    again, log = run("all")
    assert again.returncode == 0 and log == []
    named, log = run("stress", "ncu")
    assert named.returncode == 0 and [line.split()[0] for line in log] == ["python", "ncu"]
    _, log = run("all", "2", RRT_COMMIT="def456")
    assert len(log) == 5 and "[commit def456]" in log[0]


def test_a_failure_is_told_and_costs_no_other_step(run, tmp_path):
    done, log = run("all", "1", FAKE_FAIL="racecheck")
    assert done.returncode == 1 and len(log) == 12
    assert "sanitize-racecheck: failed in" in done.stdout and "    it broke" in done.stdout
    steps = {step["name"]: step["exit_status"] for step in json.loads(archived(tmp_path, "report.json"))["steps"]}
    assert steps["sanitize-racecheck"] == 9 and sum(map(bool, steps.values())) == 1


def test_without_a_gpu_nothing_runs(run, tmp_path):
    done, log = run("all", info={**INFO, "gpus": []})
    assert done.returncode == 3 and log == [] and "no GPU is visible" in done.stderr
    assert json.loads(archived(tmp_path, "report.json"))["steps"] == []


@pytest.mark.parametrize("arguments", [[], ["run"], ["all", "4"], ["all", "stress"], ["stress", "quickly"]])
def test_other_arguments_get_the_usage(run, arguments):
    done, log = run(*arguments)
    assert (
        done.returncode == 2 and log == [] and done.stderr.startswith("usage: bench/gpu.sh pack [flags] | list | all")
    )
    assert done.stderr.count("\n") == 1


def test_a_call_too_short_for_a_step_says_what_is_left(run):
    done, log = run("all", "2", GPU_SECONDS="10")
    assert done.returncode == 75 and log == []
    assert "5 steps are left (ncu, tiles, kernels-gemma-2b" in done.stdout and "call again" in done.stdout


@pytest.mark.parametrize(
    "native, builds",
    [
        ({}, []),
        ({"stale": True}, ["setup.py"]),
        ({"cuda": False}, ["setup.py"]),
        ({"library": None}, ["setup.py"]),
        ({"plan": None}, ["bench/gpu_pack.py"]),
    ],
)
def test_it_builds_only_what_is_missing_or_stale_and_first(run, native, builds):
    """A build is never taken for done: another machine starts without it."""
    for _ in range(2):
        done, log = run("stress", info={**INFO, "native": {**INFO["native"], **native}})
        assert done.returncode == 0 and [line.split()[1] for line in log] == [*builds, "bench/pdl_stress.py"]


def test_without_a_library_nothing_is_measured(run, tmp_path):
    stale = {**INFO, "native": {**INFO["native"], "stale": True}}
    done, log = run("all", info=stale, FAKE_FAIL="setup.py")
    assert done.returncode == 1 and len(log) == 1
    assert "the library was not built: nothing else was run" in done.stdout and "it broke" in done.stdout
    assert "it broke" in archived(tmp_path, "build/log.txt")


def test_binaries_that_were_brought_along_are_put_into_place(run, checkout):
    carry = checkout / "bench" / "out" / "carry"
    (carry / "native").mkdir(parents=True)
    (carry / "native" / "_native.so").write_bytes(b"built elsewhere")
    (carry / "commit").write_text("of the pack\n")
    done, log = run("stress", RRT_COMMIT="")
    assert done.returncode == 0 and "unpacked rrt/_native.so" in done.stdout
    assert (checkout / "rrt" / "_native.so").read_bytes() == b"built elsewhere"
    assert "[commit of the pack]" in log[0]


def test_git_names_the_commit_unless_it_does_not_know_the_packed_one(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session, "CARRY", tmp_path)
    assert gpu_session.read_commit({"RRT_COMMIT": "from outside"}) == "from outside"
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    if not head:
        pytest.skip("not a git checkout")
    assert gpu_session.read_commit({}).removesuffix("-dirty") == head
    (tmp_path / "commit").write_text(f"{head}-dirty\n")
    assert gpu_session.read_commit({}).removesuffix("-dirty") == head
    (tmp_path / "commit").write_text("0" * 40 + "\n")  # the history here is that of a copy
    assert gpu_session.read_commit({}) == "0" * 40


def test_the_table_that_the_library_is_compiled_with_stays_as_it_is():
    """Else the library would be stale in the next part."""
    steps = make_steps(machine(), Path("/results"), [])
    (tiles,) = (step.command for step in steps if step.name == "tiles")
    assert tiles[tiles.index("--table") + 1].startswith("/results/")


def test_kernels_are_filtered_clocks_left_alone_and_m_1_measured():
    steps = {step.name: " ".join(step.command) for step in make_steps(machine(), Path("/results"), CUDA_TESTS)}
    for tool in ("memcheck", "racecheck", "synccheck"):
        assert f"--tool {tool} --error-exitcode 9 --kernel-name kns=rrt" in steps[f"sanitize-{tool}"]
    assert "--clock-control none" in steps["ncu"] and "--kernel-name regex:.*rrt.*" in steps["ncu"]
    assert "--rows 1 8 16 32 64 --ranks 64 512 --loops 1 2" in steps["kernels-gemma-2b"]
    assert all(step.limit <= 240 for step in make_steps(machine(), Path("/results"), CUDA_TESTS))


def test_every_step_is_a_command_with_flags_that_exist():
    for step in make_steps(machine(switches=find_switches()), Path("/results"), find_test_files()):
        words = list(step.command)
        script = next(word for word in words if word.endswith((".py", ".sh")))
        assert (ROOT / script).is_file(), step
        if script.endswith(".py"):
            for flag in (word for word in words[words.index(script) :] if word.startswith("--")):
                assert f"{flag} " in help_of(script) or f"{flag}]" in help_of(script), (step.name, flag)


def test_files_with_gpu_tests_are_found_those_of_the_kernels_first():
    found = find_test_files()
    assert tuple(found[:3]) == CUDA_TESTS and all((ROOT / path).is_file() for path in found)
    assert "tests/train/test_trainer.py" in found and not any("test_gpu" in path for path in found)
    assert "RRT_PDL" in find_switches()


# A session's own limits, with steps that take a moment.


def step(name: str, program: str, **changes: object) -> Step:
    values = dict(part=1, group=name, name=name, limit=20, command=("bash", "-c", program), least=0)
    return Step(**{**values, **changes})


@pytest.fixture
def session(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session, "RESERVE", 0.0)
    monkeypatch.setattr(gpu_session, "KILL_AFTER", 0.3)
    (tmp_path / "results").mkdir()

    def make(seconds: float, commit: str | None = "one") -> Session:
        return Session(tmp_path / "results", tmp_path / "gpu.tar.gz", seconds, commit)

    return make


def outcomes(session: Session, steps: list[Step]) -> dict[str, str]:
    session.steps = steps
    session.report()
    report = json.loads((session.results / "report.json").read_text())
    return {record["name"]: record["outcome"] for record in report["steps"]}


def test_a_step_beyond_its_limit_is_ended_with_its_children_and_is_done(session, tmp_path):
    program = f"trap '' TERM; (sleep 3; touch {tmp_path}/late) & echo started; wait"
    steps = [step("slow", program, limit=1), step("next", "exit 3")]
    call = session(60)
    assert call.run(steps) == []
    assert outcomes(call, steps) == {"slow": "out of time", "next": "failed"}
    assert "started" in (call.results / "slow" / "log.txt").read_text()
    assert session(60).run(steps) == [] and all(session(60).is_done(each) for each in steps)
    time.sleep(3.2)
    assert not (tmp_path / "late").exists()


def test_a_step_that_the_call_cuts_off_goes_on_with_its_files_in_the_next(session):
    program = 'cd "$RESULT"; if [ -e half ]; then echo whole > whole; else touch half; sleep 30; fi'
    steps = [step("first", "true"), step("long", program), step("last", "true")]
    call = session(1.5)
    results = call.results
    steps[1] = step("long", program, environment={"RESULT": str(results / "long")})
    assert [left.name for left in call.run(steps)] == ["long", "last"] or call.left() > 0
    assert outcomes(call, steps)["long"] == "cut off"
    later = session(60)
    assert later.run(steps) == [] and later.ran == ["long", "last"]
    assert outcomes(later, steps) == {"first": "passed", "long": "passed", "last": "passed"}
    assert (results / "long" / "whole").exists()


def test_other_code_runs_again_from_nothing(session):
    steps = [step("only", "true")]
    call = session(60)
    call.run(steps)
    (call.results / "only" / "old").write_text("")
    assert session(60).run(steps) == [] and (call.results / "only" / "old").exists()
    other = session(60, commit="two")
    other.run(steps)
    assert other.ran == ["only"] and not (call.results / "only" / "old").exists()


def test_results_are_in_the_archive_after_every_step(session, tmp_path):
    peek = f"tar -tzf {tmp_path}/gpu.tar.gz"
    steps = [step("first", "echo hello"), step("second", peek)]
    call = session(60)
    call.steps = steps
    call.run(steps)
    listed = (call.results / "second" / "log.txt").read_text()
    assert "results/first/log.txt" in listed and "results/first/step.json" in listed and "results/report.json" in listed


def test_large_files_stay_out_of_the_archive(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session, "MAX_FILE_BYTES", 1000)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "small").write_bytes(b"0" * 1000)
    (tmp_path / "results" / "large").write_bytes(b"0" * 1001)
    write_archive(tmp_path / "results", tmp_path / "out.tar.gz")
    with tarfile.open(tmp_path / "out.tar.gz") as archive:
        assert archive.getnames() == ["results", "results/small"]


def test_a_flag_whose_file_no_step_has_left_is_left_out(session, tmp_path):
    """The linears are measured even if the sweep of tilings failed."""
    file = tmp_path / "tiles.json"
    each = step("kernels", "", command=("echo", "got"), optional=("--tiles", file))
    call = session(60)
    call.run([each], again=True)
    assert (call.results / "kernels" / "log.txt").read_text().splitlines()[-1] == "got"
    file.write_text("{}")
    call.run([each], again=True)
    assert (call.results / "kernels" / "log.txt").read_text().splitlines()[-1] == f"got --tiles {file}"
    made = {each.name: each for each in make_steps(machine(), tmp_path, [])}
    sweep = made["tiles"].command
    assert made["kernels-gemma-2b"].optional == ("--tiles", Path(sweep[sweep.index("--json") + 1]))


def test_a_program_that_is_not_there_is_a_failure(tmp_path):
    assert run_limited(("no-such-program",), os.environ, tmp_path / "log.txt", 5) == 127
    assert "no-such-program" in (tmp_path / "log.txt").read_text()


def test_a_call_ended_from_outside_ends_its_step(tmp_path):
    program = f"""
import signal, sys
from pathlib import Path
from bench.gpu_session import run_limited
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
print("ready", flush=True)
run_limited(("bash", "-c", "sleep 3; touch {tmp_path}/late"), dict(), Path("{tmp_path}/log.txt"), 60)
"""
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(0.5)
        process.terminate()
        assert process.wait(20) == 1
    time.sleep(3)
    assert not (tmp_path / "late").exists()


def test_the_architecture_is_the_visible_gpus():
    assert machine().cuda_archs == "90a-real"
    assert machine(info={"gpus": [{"capability": "12.0"}]}).cuda_archs == "120"
    assert gpu_steps.make_steps(machine(info={}), Path("/r"), [])[0].environment["CUDAARCHS"] == "90a-real"
