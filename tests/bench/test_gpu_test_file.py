"""bench/gpu_test_file.py: every test of a file has an outcome, whatever some of them do to their process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

CONFTEST = """
import sys
sys.path.insert(0, {root!r})
from tests.conftest import no_cuda_error_outlives_its_test
"""

# A fake of torch, which also takes a second less to import: after `broken` every wait for the GPU fails, as after an
# illegal address.
TORCH = """
import types
broken = []
def synchronize():
    if broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\\nmore lines")
cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
"""
TESTS = """
import os, time
import pytest
from torch import broken

pytestmark = pytest.mark.GPU

def test_a(): pass
def test_a_and_more(): pass
def test_fails(): assert not broken, "poisoned"; assert 1 == 2
def test_breaks_it(): broken.append(1)
def test_behind(): assert not broken
def test_crashes(): os.abort()
def test_hangs(): time.sleep(60)
@pytest.mark.skip
def test_skipped(): pass
@pytest.mark.parametrize("x", [1, 2])
def test_last(x): assert not broken
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: as in pyproject.toml\naddopts = -m 'not gpu'\n")
    (tmp_path / "conftest.py").write_text(CONFTEST.format(root=str(ROOT)))
    (tmp_path / "fakes").mkdir()
    (tmp_path / "fakes" / "torch.py").write_text(TORCH)
    log = tmp_path / "log.jsonl"

    def run_tests(text: str, *others: str) -> tuple[subprocess.CompletedProcess[str], dict[str, tuple[str, str]]]:
        # Written so that this file is not taken for one that needs a GPU.
        (tmp_path / "test_it.py").write_text(text.replace("mark.GPU", "mark." + "gpu"))
        command = [sys.executable, str(ROOT / "bench" / "gpu_test_file.py"), str(tmp_path / "test_it.py")]
        command += [str(tmp_path / name) for name in others]
        command += ["--log", str(log), "--timeout", "1", "--rootdir", str(tmp_path), "-c", str(tmp_path / "pytest.ini")]
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'fakes'}:{ROOT}"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
        found = map(json.loads, log.read_text().splitlines() if log.exists() else [])
        outcomes = {line["test"].partition("::")[2]: (line["event"], line["message"]) for line in found}
        return done, outcomes

    return run_tests


def test_one_test_that_loses_the_gpu_crashes_or_hangs_costs_no_other(run):
    done, outcomes = run(TESTS)
    assert done.returncode == 1, done.stdout + done.stderr
    events = {test: event for test, (event, _) in outcomes.items()}
    assert events == {
        "test_a": "passed",
        "test_a_and_more": "passed",
        "test_fails": "failed",
        "test_breaks_it": "sticky CUDA error",
        "test_behind": "passed",
        "test_crashes": "ended its process",
        "test_hangs": "ended its process",
        "test_skipped": "skipped",
        "test_last[1]": "passed",
        "test_last[2]": "passed",
    }
    assert outcomes["test_breaks_it"][1] == "CUDA error: an illegal memory access was encountered"
    assert "1 == 2" in outcomes["test_fails"][1]
    assert "sticky CUDA error: test_it.py::test_breaks_it: CUDA error: an illegal memory access" in done.stdout
    assert "5 passed, 1 failed, 1 sticky CUDA error, 2 ended its process, 1 skipped" in done.stdout

    again, same = run(TESTS)
    assert same == outcomes and again.returncode == 1  # what has an outcome is not run again


def test_a_run_that_was_cut_off_goes_on_with_the_test_that_it_was_in(run, tmp_path):
    lines = [("test_one", "started"), ("test_one", "passed"), ("test_two", "started")]
    text = "".join(
        json.dumps({"test": f"test_it.py::{t}", "event": e, "message": "", "seconds": 0}) + "\n" for t, e in lines
    )
    (tmp_path / "log.jsonl").write_text(text)
    program = "import pytest\npytestmark = pytest.mark.GPU\ndef test_one(): assert 0\ndef test_two(): pass\n"
    done, outcomes = run(program)
    assert {test: event for test, (event, _) in outcomes.items()} == {"test_one": "passed", "test_two": "passed"}
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_file_that_does_not_load_is_a_failure(run):
    done, outcomes = run("import no_such_module\n")
    assert done.returncode == 1 and "No module named" in next(iter(outcomes.values()))[1]
    assert done.stdout.count("1 error in") == 1  # and is not tried again


def test_several_files_are_one_run(run, tmp_path):
    (tmp_path / "test_more.py").write_text(f"import pytest\n@pytest.mark.{'gpu'}\ndef test_more(): pass\n")
    done, outcomes = run("import pytest\n@pytest.mark.GPU\ndef test_one(): pass\n", "test_more.py")
    assert done.returncode == 0 and list(outcomes) == ["test_one", "test_more"]


def test_a_file_without_gpu_tests_is_told(run):
    done, outcomes = run("def test_on_the_cpu(): pass\n")
    assert (done.returncode, outcomes) == (2, {}) and "no test ran" in done.stdout
