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
from bench.gpu_steps import CUDA_TESTS, NCU_COLUMNS, SWITCHES, Machine, Step, find_test_files, make_steps
from tests.test_docs import help_of

ROOT = Path(__file__).resolve().parents[2]
INFO = {
    "native": {"library": "rrt/_native.so", "cuda": True, "stale": False, "plan": "rrt/_plan.so"},
    "gpus": [{"name": "NVIDIA H200", "capability": "9.0"}],
}
FAKE = """#!/bin/bash
# Stands in for python, ncu and compute-sanitizer: notes what it is asked for, and does what FAKE_* name.
case "$1" in bench/gpu_session.py) exec {python} "$@" ;; esac
[ "$1" != -c ] || {{ [ -e "$FAKE_LOG.built" ] && echo "$FAKE_BUILT" || echo "$FAKE_INFO"; exit; }}
variables="[commit ${{RRT_COMMIT:-}}] [blocking ${{CUDA_LAUNCH_BLOCKING:-}}] [pdl ${{RRT_PDL:-}}]"
variables="$variables [prefetch ${{RRT_PREFETCH:-}}]"
variables+=" [uncached ${{PYTORCH_NO_CUDA_MEMORY_CACHING:-}}]"
echo "$(basename "$0") $* $variables" >> "$FAKE_LOG"
[ "$1" != setup.py ] || [ "${{FAKE_FAIL:-}}" = setup.py ] || touch "$FAKE_LOG.built"
echo "${{FAKE_OUTPUT-ERROR SUMMARY: 0 errors}}"
while [ $# -gt 0 ]; do
  case "$1" in --json | --log | --log-file) mkdir -p "$(dirname "$2")" && echo '{{}}' > "$2" ;; esac
  [ "$1" != "${{FAKE_FAIL:-}}" ] || {{ echo "it broke"; exit 9; }}
  shift
done
"""


def machine(**changes):
    values = dict(python="python", info=INFO, num_gpus=1, tools=frozenset({"ncu", "compute-sanitizer"}))
    return Machine(**{**values, "modules": frozenset({"transformers"}), "has_model": True, **changes})


@pytest.fixture
def checkout(tmp_path):
    """A copy of the files that bench/gpu.sh itself needs, beside fakes of what it runs."""
    root = tmp_path / "checkout"
    names = ["bench/gpu.sh", "bench/gpu_session.py", "bench/gpu_steps.py", "bench/gpu_summary.py", "bench/gpu_pack.py"]
    names += ["bench/gpu_test_file.py"]
    names += ["eval/tables.py", "rrt/__init__.py", "rrt/errors.py", "rrt/version.py"]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    (root / "tests" / "model").mkdir(parents=True)
    (root / "tests" / "model" / "test_other.py").write_text("pytestmark = pytest.mark." + "gpu")
    (root / "bench" / "gpu_uptrain.sh").write_text('"$PYTHON" bench/gpu_uptrain.sh "$@"')
    (tmp_path / "fakes").mkdir()
    for name in ("python", "ncu", "compute-sanitizer"):
        path = tmp_path / "fakes" / name
        path.write_text(FAKE.format(python=sys.executable))
        path.chmod(0o755)
    return root


@pytest.fixture
def run(checkout, tmp_path):
    log = tmp_path / "log.txt"

    def call(
        *arguments: str, info: object = INFO, num_gpus: int = 1, **environment: str
    ) -> tuple[subprocess.CompletedProcess, list[str]]:
        log.write_text("")
        Path(f"{log}.built").unlink(missing_ok=True)

        def facts(info: object) -> str:
            return json.dumps([num_gpus, ["transformers"]]) + "\n" + json.dumps(info)

        values = dict(PYTHON=str(tmp_path / "fakes" / "python"), OUT=str(tmp_path / "out"), FAKE_LOG=str(log))
        values |= dict(FAKE_INFO=facts(info), FAKE_BUILT=facts(INFO), RRT_COMMIT="abc123")
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
    expected = ["bench/gpu_cases.py"] + ["bench/gpu_test_file.py"] * 3 + ["bench/pdl_stress.py"]
    expected += ["bench/kernels.py", "ncu", "bench/tile_sweep.py", "bench/kernels.py", "bench/gpu_test_file.py"]
    expected += ["bench/kernels.py"] * (4 * len(SWITCHES) + 3) + ["bench/training.py", "bench/serving.py"]
    expected += ["compute-sanitizer"] * 3
    assert programs == expected
    assert all("[commit abc123]" in line for line in log)
    assert [("[blocking 1]" in line) for line in log] == [program == "bench/gpu_cases.py" for program in programs]
    assert [("[uncached 1]" in line) for line in log] == [
        program in ("bench/gpu_cases.py", "compute-sanitizer") for program in programs
    ]
    tests = [line.split()[2] for line in log if "gpu_test_file" in line]
    assert tests == [*CUDA_TESTS, "tests/model/test_other.py"]
    for switch, measured in (("pdl", "--only layer"), ("prefetch", "--only attention")):
        lines = [line for line in log if f"switch-{switch}" in line]
        assert [line.partition(f"[{switch} ")[2][:1] for line in lines] == ["0", "1", "0", "1"]
        assert all(measured in line for line in lines)

    lines = done.stdout.splitlines()
    table = lines.index("Steps (*: of this call)")
    assert all(not line.endswith("s left") for line in lines[table:]) and lines[-1].startswith("all results: ")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gpu.tar.gz"]
    report = json.loads(archived(tmp_path, "report.json"))
    assert report["commit"] == "abc123" and report["info"] == INFO
    assert {step["outcome"] for step in report["steps"]} == {"passed"}
    assert set(report["left_out"]) == {"model", "uptrain", "generate"}
    assert "no model was brought along" in report["left_out"]["generate"]
    assert archived(tmp_path, "stress/stress.json") == "{}\n" and "Steps" in archived(tmp_path, "tables.txt")

    again, log = run("all")
    assert again.returncode == 0 and log == []
    named, log = run("stress", "ncu")
    assert named.returncode == 0 and [line.split()[0] for line in log] == ["python", "ncu"]
    _, log = run("all", "2", RRT_COMMIT="def456")
    assert len(log) == 4 and "[commit def456]" in log[0]


def test_a_failure_is_told_and_costs_no_other_step(run, tmp_path):
    done, log = run("all", "1", FAKE_FAIL="bench/pdl_stress.py")
    assert done.returncode == 1 and len(log) == 5
    assert "stress: failed in" in done.stdout and "    it broke" in done.stdout
    steps = {step["name"]: step["exit_status"] for step in json.loads(archived(tmp_path, "report.json"))["steps"]}
    assert steps["stress"] == 9 and sum(map(bool, steps.values())) == 1


def test_a_sanitizer_that_does_not_sum_up_has_not_passed(run):
    done, _ = run("sanitize-memcheck")
    assert done.returncode == 0
    done, _ = run("sanitize-memcheck", FAKE_OUTPUT="Error: the target did not connect")
    assert done.returncode == 1 and "sanitize-memcheck: failed" in done.stdout


def test_the_model_is_made_right_before_what_needs_it(run, checkout):
    (checkout / "bench" / "out" / "carry" / "model").mkdir(parents=True)
    (checkout / "bench" / "out" / "carry" / "model" / "config.json").write_text("{}")
    done, log = run("stress", "generate")
    words = [line.split()[1:3] for line in log]
    assert done.returncode == 0 and words[:2] == [
        ["bench/pdl_stress.py", "--rounds"],
        ["bench/gpu_pack.py", "--write-model"],
    ]
    assert words[2][0] == "bench/generate.py" and len(words) == 3
    _, log = run("all", "3")
    programs = [line.split()[1] for line in log]
    assert programs.index("bench/gpu_pack.py") == programs.index("bench/gpu_uptrain.sh") - 1
    _, log = run("all", "3")
    assert log == []  # what needs it is done


def test_without_a_gpu_nothing_runs(run, tmp_path):
    done, log = run("all", num_gpus=0)
    assert done.returncode == 3 and log == [] and "no GPU is visible" in done.stderr
    assert json.loads(archived(tmp_path, "report.json"))["steps"] == []


@pytest.mark.parametrize("arguments", [[], ["run"], ["all", "4"], ["all", "stress"], ["stress", "quickly"]])
def test_other_arguments_get_the_usage(run, arguments):
    done, log = run(*arguments)
    assert (
        done.returncode == 2 and log == [] and done.stderr.startswith("usage: bench/gpu.sh pack [flags] | list | all")
    )
    assert done.stderr.count("\n") == 1


def test_seconds_that_are_no_number_are_refused(run):
    done, log = run("all", GPU_SECONDS="soon")
    assert (done.returncode, log) == (2, [])
    assert done.stderr == "GPU_SECONDS: found soon; expected a number of seconds\n"


def test_a_call_too_short_for_a_step_says_what_is_left(run):
    done, log = run("all", "2", GPU_SECONDS="10")
    assert done.returncode == 75 and log == []
    assert (
        "4 steps are left (kernels-gemma-2b, ncu, tiles, kernels-tuned" in done.stdout and "call again" in done.stdout
    )


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


def test_a_build_of_the_plan_that_fails_is_not_tried_again(run):
    info = {**INFO, "native": {**INFO["native"], "plan": None}}
    for builds in (["bench/gpu_pack.py"], []):
        done, log = run("stress", info=info, FAKE_FAIL="--plan-only")
        assert done.returncode == 0 and [line.split()[1] for line in log] == [*builds, "bench/pdl_stress.py"]


def test_without_a_library_nothing_is_measured(run, tmp_path):
    """Else the PyTorch references would pass for our kernels; so it is too if what was built does not load."""
    stale = {**INFO, "native": {**INFO["native"], "stale": True}}
    built = json.dumps([1, []]) + "\n" + json.dumps(stale)
    for changes in (dict(FAKE_FAIL="setup.py"), dict(FAKE_BUILT=built)):
        done, log = run("all", info=stale, **changes)
        assert done.returncode == 1 and len(log) == 1 and "nothing else was run" in done.stdout
    done, log = run("all", info=stale, GPU_SECONDS="30")
    assert done.returncode == 75 and log == []
    run("all", info=stale, FAKE_FAIL="setup.py")
    assert "it broke" in archived(tmp_path, "build/log.txt")


def test_why_the_package_does_not_load_is_told_and_the_gpu_found_all_the_same(tmp_path, monkeypatch, capsys):
    (tmp_path / "rrt").mkdir()
    (tmp_path / "rrt" / "info.py").write_text("raise RuntimeError('no such symbol')")
    (tmp_path / "torch.py").write_text("import types\ncuda = types.SimpleNamespace(device_count=lambda: 2)\n")
    monkeypatch.setattr(gpu_session, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = gpu_session.read_machine(sys.executable)
    assert found.num_gpus == 2 and found.info == {} and not found.has_library
    error = capsys.readouterr().err
    assert "does not import torch and rrt.info:" in error and error.endswith("RuntimeError: no such symbol\n")
    assert gpu_session.read_machine("no-such-python").num_gpus == 0


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
        assert f"--tool {tool} --error-exitcode 9 --launch-timeout 0" in steps[f"sanitize-{tool}"]
        assert "--kernel-name kns=rrt" in steps[f"sanitize-{tool}"]
    assert "--clock-control none" in steps["ncu"] and "--kernel-name regex:.*rrt.*" in steps["ncu"]
    assert f"--metrics {','.join(NCU_COLUMNS.values())} " in steps["ncu"]
    assert "--rows 1 8 16 32 64 --ranks 64 512 --loops 1 2" in steps["kernels-gemma-2b"]
    assert all(step.limit <= 240 for step in make_steps(machine(), Path("/results"), CUDA_TESTS))


def test_every_step_is_a_command_with_flags_that_exist():
    for step in make_steps(machine(), Path("/results"), find_test_files()):
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
    read = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cu"))
    assert all(f'"{name}"' in read for name in SWITCHES)


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


def test_tests_that_had_no_time_are_left_and_other_steps_are_not(session):
    steps = [step("tests-x", "sleep 30", group="tests", limit=1), step("slow", "sleep 30", limit=1)]
    call = session(60)
    assert call.run(steps) == steps[:1] and outcomes(call, steps) == dict.fromkeys(("tests-x", "slow"), "out of time")
    later = session(60)
    assert later.run(steps) == steps[:1] and later.ran == ["tests-x"]


def test_large_files_stay_out_of_the_archive_and_of_a_large_one_all_but_results(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_session, "MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(gpu_session, "MAX_TAIL_BYTES", 4)
    results = tmp_path / "results" / "step"
    results.mkdir(parents=True)
    for name, content in (("a.json", b"0" * 1000), ("b.json", b"0" * 1001), ("log.txt", b"0" * 996 + b"last")):
        (results / name).write_bytes(content)
    (results / "c.bin").write_bytes(os.urandom(1000))

    def packed() -> dict[str, int]:
        write_archive(tmp_path / "results", tmp_path / "out.tar.gz")
        with tarfile.open(tmp_path / "out.tar.gz") as archive:
            return {member.name.rpartition("/")[2]: member.size for member in archive.getmembers()}

    assert packed() == {"a.json": 1000, "c.bin": 1000, "log.txt": 1000}
    monkeypatch.setattr(gpu_session, "MAX_ARCHIVE_BYTES", 900)
    assert packed() == {"a.json": 1000, "log.txt": 4}


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
    assert made["kernels-tuned"].optional == ("--tiles", Path(sweep[sweep.index("--json") + 1]))


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
