"""Provenance of a checkpoint: its parent and hash, the command and the code version that made it."""

import functools
import hashlib
import os
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rrt.common.files import sha256_file
from rrt.version import __version__


def fingerprint(directory: Path) -> str:
    """Compute the SHA-256 over the names and bytes of a checkpoint's configuration and weight files.

    Of a single file, as a GGUF file is, its own.
    """
    if directory.is_file():
        return sha256_file(directory)
    digest = hashlib.sha256()
    patterns = ("config.json", "*.safetensors", "pytorch_model*.bin")
    for path in sorted(path for pattern in patterns for path in directory.glob(pattern)):
        digest.update(f"{path.name} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


def code_version() -> str:
    """Return the package's version, with the git commit if it runs from a checkout.

    RRT_COMMIT takes the commit's place, for files that were copied from a checkout without their history.
    """
    if commit := os.environ.get("RRT_COMMIT", "").strip():
        return f"{__version__}+{commit}"
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return __version__
    return f"{__version__}+{commit}"


@functools.cache
def code_fingerprint() -> str:
    """Compute the SHA-256 over the names and bytes of the package's sources, as they are when it is first asked for.

    Unlike `code_version` it tells two states of a checkout apart that is being edited, and is the same after a commit
    that changes none of them.
    """
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)} {sha256_file(path)}\n".encode())
    return digest.hexdigest()


def make_provenance(stage: str, parent: Path | None, **details: Any) -> dict[str, Any]:
    """Describe where a checkpoint comes from: stage, parent and its hash, command line, code version, time.

    `details` (data, metrics, ...) are added as they are.
    """
    return {
        "stage": stage,
        "parent": None if parent is None else {"path": str(parent), "sha256": fingerprint(parent)},
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "code_version": code_version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **details,
    }
