"""Held-out text for the demo: python runs/demo_excerpts.py runs/out/demo/heldout.jsonl

A passage from the middle of each held-out file of the standard library, so that a few thousand tokens cover all.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rrt.common.cli import run_command
from rrt.common.files import atomic_write
from rrt.data.corpus import stdlib_files
from rrt.errors import UserError

MOST_CHARACTERS = 600


def excerpt(text: str) -> str:
    """Return the whole lines in the middle of `text`, up to MOST_CHARACTERS."""
    if len(text) <= MOST_CHARACTERS:
        return text
    start = text.find("\n", (len(text) - MOST_CHARACTERS) // 2) + 1
    stop = text.rfind("\n", start, start + MOST_CHARACTERS) + 1
    return text[start:stop]


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError(f"arguments: found {len(sys.argv) - 1}; expected the file to write")
    texts = (excerpt(path.read_text(encoding="utf-8")) for path in stdlib_files("heldout"))
    atomic_write(Path(sys.argv[1]), "".join(json.dumps({"text": text}) + "\n" for text in texts if text.strip()))


if __name__ == "__main__":
    run_command(main)
