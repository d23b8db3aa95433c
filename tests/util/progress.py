"""A line of JSON for every test that starts and ends, for runs that may be ended in the middle of a test.

    RRT_TEST_LOG=progress.jsonl python -m pytest -p tests.util.progress ...

bench/gpu_test_file.py reads the lines and goes on behind the test that ended its process: tests that the file already
has are left out.
"""

import json
import os
from pathlib import Path

import pytest

STICKY_STATUS = 70
"""Exit status of a process that a sticky CUDA error ended: no later call on that GPU could succeed in it."""


def note(test: str, event: str, message: str = "", seconds: float = 0.0) -> None:
    """Append a line to the file that RRT_TEST_LOG names, if it does; it is on the disk when this returns."""
    path = os.environ.get("RRT_TEST_LOG")
    if path:
        line = {"test": test, "event": event, "message": message, "seconds": round(seconds, 3)}
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    path = Path(os.environ.get("RRT_TEST_LOG", ""))
    known = (
        {json.loads(line)["test"] for line in path.read_text(encoding="utf-8").splitlines()} if path.is_file() else ()
    )
    if left_out := [item for item in items if item.nodeid in known]:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid not in known]


def pytest_runtest_logstart(nodeid: str) -> None:
    note(nodeid, "started")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.failed or report.skipped:
        crash = getattr(report.longrepr, "reprcrash", None) if report.failed else None
        text = crash.message if crash is not None else report.longreprtext if report.failed else ""
        note(report.nodeid, report.outcome, text.strip().partition("\n")[0], report.duration)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        note(report.nodeid, "failed", "not collected: " + report.longreprtext.strip().splitlines()[-1])


def end_on_sticky_error(test: str, error: BaseException) -> None:
    """End this process, whose CUDA context is lost, after a line that names the test."""
    note(test, "sticky CUDA error", str(error).strip().partition("\n")[0])
    os._exit(STICKY_STATUS)
