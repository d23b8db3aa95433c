"""Run the GPU tests of some files, and go on behind a test that ends its process: python bench/gpu_test_file.py FILE...

A sticky CUDA error (an illegal address) or a call that hangs costs the process, not the tests behind it: those run in a
new one. Every test's outcome is a line of --log, written when it ends; what the log already has is not run again.
Exit status: 0 all passed or skipped, 1 some did not, 2 no test ran.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_PROCESSES = 6
"""Files in which more tests than this end their process have a fault that the first ones show."""
NO_TESTS = 5
PYTEST_ENDS = (0, 1, 2, NO_TESTS)
"""Exit statuses with which pytest ends by itself: all passed, some did not, a file does not load, nothing selected."""


def read_outcomes(log: Path) -> dict[str, dict[str, str]]:
    """Map each test to its last line; of a test that began and has no outcome, the process ended in it."""
    outcomes: dict[str, dict[str, str]] = {}
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else []:
        try:
            found = json.loads(line)
        except ValueError:  # cut off while it was written
            continue
        known = outcomes.get(found["test"])
        # A test that passed may fail while its fixtures end.
        if known is None or known["event"] in ("started", "passed"):
            outcomes[found["test"]] = found
    return outcomes


def close_open_tests(log: Path, message: str) -> None:
    """Write the outcome of the test in which the process ended, if there is one."""
    for test, found in read_outcomes(log).items():
        if found["event"] == "started":
            line = {"test": test, "event": "ended its process", "message": message, "seconds": 0}
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def run_files(python: str, files: list[str], log: Path, timeout: int, extra: list[str]) -> int:
    """Run all tests of the files, with as many processes as it takes; return the exit status."""
    # Of an earlier run of this program, which was cut off: that test is run again.
    outcomes = {test: found for test, found in read_outcomes(log).items() if found["event"] != "started"}
    log.write_text("".join(json.dumps(found) + "\n" for found in outcomes.values()), encoding="utf-8")
    environment = {**os.environ, "RRT_TEST_LOG": str(log)}
    status = 0
    for _ in range(MAX_PROCESSES):
        before = len(read_outcomes(log))
        command = [python, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "-p", "tests.util.progress"]
        command += ["--timeout", str(timeout), "--timeout-method=thread", *files, *extra]
        status = subprocess.run(command, cwd=ROOT, env=environment).returncode
        close_open_tests(log, f"exit status {status}")
        # A process that did not get to a test would not get to one next time.
        # pytest-timeout's thread ends a test that hangs, and with it the process, with status 1, as failures do.
        hung = next(reversed(read_outcomes(log).values()), {"event": ""})["event"] == "ended its process"
        if (status in PYTEST_ENDS and not hung) or len(read_outcomes(log)) == before:
            break
    outcomes = read_outcomes(log)
    counts = collections.Counter(found["event"] for found in outcomes.values())
    for test, found in outcomes.items():
        if found["event"] not in ("passed", "skipped"):
            print(f"{found['event']}: {test}: {found['message']}")
    print(
        f"{' '.join(files)}: " + (", ".join(f"{count} {event}" for event, count in counts.items()) or "no test ran"),
        flush=True,
    )
    if not counts:
        return 2
    return int(any(event not in ("passed", "skipped") for event in counts) or status not in (0, NO_TESTS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="file", help="a test file, from the repository's root")
    parser.add_argument("--log", type=Path, required=True, metavar="JSONL", help="outcomes, test by test")
    parser.add_argument("--timeout", type=int, default=60, metavar="S", help="of a test (default 60)")
    arguments, extra = parser.parse_known_args()
    sys.exit(run_files(sys.executable, arguments.files, arguments.log.resolve(), arguments.timeout, extra))


if __name__ == "__main__":
    main()
