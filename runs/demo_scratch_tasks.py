"""Two made-up few-shot tasks for the demo from scratch: python runs/demo_scratch_tasks.py runs/out/demo-scratch/tasks

They have the records, prompts and metrics of two data sets; their text is code of the standard library's held-out
packages. So their scores compare the demo's models with each other, and with nothing else:
- lambada_openai.jsonl: the last word of a few lines, one that occurs in them before
- hellaswag.jsonl: how a few lines go on, beside three endings from other packages
"""

import json
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rrt.common.cli import run_command
from rrt.common.files import atomic_write
from rrt.data.corpus import stdlib_files
from rrt.errors import UserError

DOCUMENTS = 400
CONTEXT_LINES, ENDING_LINES = 6, 2
MAX_CHARACTERS = 600
"""Of a passage: the demo's models read 512 tokens, of two or three characters each."""

Passage = tuple[str, list[str]]
"""Name of its package, and its lines."""


def cut_passages() -> list[Passage]:
    """Cut the held-out files into passages of equally many lines, without empty lines and long passages."""
    found, size = [], CONTEXT_LINES + ENDING_LINES
    for path in stdlib_files("heldout"):
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        parts = [lines[start : start + size] for start in range(0, len(lines) - size + 1, size)]
        found += [(path.parent.name, part) for part in parts if len("\n".join(part)) <= MAX_CHARACTERS]
    return found


def make_last_words(found: list[Passage]) -> list[dict[str, object]]:
    """Make records in LAMBADA's form: each passage up to its last word that occurs before."""
    records: list[dict[str, object]] = []
    for _, lines in found:
        text = "\n".join(lines)
        context = len("\n".join(lines[: CONTEXT_LINES // 2]))
        for word in reversed(list(re.finditer(r"(?<= )[A-Za-z_]{2,}(?=[\s:,)])", text))):
            if word.start() > context and re.search(rf"\b{word.group()}\b", text[: word.start()]):
                records.append({"text": text[: word.end()]})
                break
    return records


def make_endings(found: list[Passage], rng: random.Random) -> list[dict[str, object]]:
    """Make records in HellaSwag's form: each passage's ending and those of three other packages, in random order."""
    records: list[dict[str, object]] = []
    ends: dict[str, list[str]] = {}
    for package, lines in found:
        ends.setdefault(package, []).append(_one_line(lines[CONTEXT_LINES:]))
    for package, lines in found:
        others = [rng.choice(ends[other]) for other in rng.sample([name for name in ends if name != package], 3)]
        label = rng.randrange(4)
        right = _one_line(lines[CONTEXT_LINES:])
        records.append(
            {
                "activity_label": package,
                "ctx_a": _one_line(lines[:CONTEXT_LINES]),
                "ctx_b": "",
                "endings": [*others[:label], right, *others[label:]],
                "label": label,
            }
        )
    return records


def _one_line(lines: list[str]) -> str:
    """Join lines with single spaces, as in HellaSwag's texts."""
    return " ".join(" ".join(lines).split())


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError(f"arguments: found {len(sys.argv) - 1}; expected the directory to write the tasks to")
    rng = random.Random(0)
    found = cut_passages()
    rng.shuffle(found)
    for task, records in (("lambada_openai", make_last_words(found)), ("hellaswag", make_endings(found, rng))):
        records = records[:DOCUMENTS]
        path = Path(sys.argv[1]) / f"{task}.jsonl"
        atomic_write(path, "".join(json.dumps(record) + "\n" for record in records))
        print(f"wrote {path}: {len(records)} documents, made up: no benchmark")


if __name__ == "__main__":
    run_command(main)
