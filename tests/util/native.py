"""What the tests of native operators share: running a part of a test file again in another environment."""

import os
import subprocess
import sys
from pathlib import Path


def run_tests_of(file: str, tests: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The tests of `file` that the expression `tests` (as for pytest's -k) chooses, in a process of their own."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", file, "-k", tests],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
