"""Cache of finished requests on disk, so that an interrupted evaluation resumes where it stopped.

Every request is a JSON line of its key and the model's response. Lines are appended batch by batch; a line that a
killed process left unfinished is skipped.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rrt.common.files import explain_no_space, sha256_file
from rrt.errors import UserError

CODE = Path(__file__).resolve().parents[1]


class ResponseCache:
    """Responses by key, in memory and, if there is a path, in its file."""

    def __init__(self, path: Path | None = None) -> None:
        self._responses: dict[str, Any] = {}
        self._file = None
        self._path = path
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        self._file.seek(0)
        line = b"\n"
        for line in self._file:
            self._read(line)
        if not line.endswith(b"\n"):
            self._file.write(b"\n")

    def _read(self, line: bytes) -> None:
        try:
            key, response = json.loads(line)
        except (ValueError, TypeError):  # cut short
            return
        self._responses[key] = response

    def __contains__(self, key: str) -> bool:
        return key in self._responses

    def __getitem__(self, key: str) -> Any:
        return self._responses[key]

    def __len__(self) -> int:
        return len(self._responses)

    def add(self, responses: Mapping[str, Any]) -> None:
        """Add responses; they are in the file when this returns, even if the process is killed afterwards."""
        self._responses |= responses
        if self._file is not None and self._path is not None:
            lines = "".join(json.dumps(entry) + "\n" for entry in responses.items()).encode()
            with explain_no_space(self._path, len(lines)):
                self._file.write(lines)
                self._file.flush()


def code_digest(root: Path = CODE) -> str:
    """Return the SHA-256 over the code that computes responses, Python and native, committed or not."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in ("eval", "rrt") for path in (root / folder).rglob("*")):
        if path.suffix in (".py", ".so"):
            digest.update(f"{path.relative_to(root)} {sha256_file(path)}\n".encode())
    return digest.hexdigest()
