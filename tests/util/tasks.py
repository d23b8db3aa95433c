"""Small files of the seven few-shot tasks in their data sets' schemas, of real sentences and some beyond ASCII."""

import json
import random
import re
import string
from pathlib import Path
from typing import Any

from tests.util.tokenizers import training_texts

BEYOND_ASCII = [
    "Der Käse «très bon» kostet 3 €, weil ich ihn mag.",
    "東京 は 今日 も 雨 です。",
    "A 🐍 is “naïve” about Ωmega… and more",
]


def sentences() -> list[str]:
    found = [
        " ".join(match.split())
        for text in training_texts()
        for match in re.findall(r"[A-Z][a-z]+ [^.\"`{}]{20,160}\.", text)
    ]
    return [*BEYOND_ASCII, *found]


def write_task_files(directory: Path, documents: int = 6, seed: int = 0, *, train: bool = False) -> Path:
    """Write `<task>.jsonl` of all seven tasks (and `<task>.train.jsonl`)."""
    directory.mkdir(parents=True, exist_ok=True)
    suffixes = ("", ".train") if train else ("",)
    for number, suffix in enumerate(suffixes):
        for task, records in task_records(documents, seed + number).items():
            if suffix and task == "lambada_openai":
                continue
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            (directory / f"{task}{suffix}.jsonl").write_text(lines, encoding="utf-8")
    return directory


def task_records(documents: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    rng = random.Random(seed)
    texts = sentences()
    pick = lambda: rng.choice(texts)  # noqa: E731
    words = lambda count: " ".join(pick().split()[:count])  # noqa: E731

    def question(name: str, number: int) -> dict[str, Any]:
        labels = list(string.ascii_uppercase[: 4 if number % 3 else 3])
        answers = [words(1 if number % 2 else 5) for _ in labels]
        choices = {"text": answers, "label": labels}
        return {"id": str(number), name: pick(), "choices": choices, "answerKey": rng.choice(labels)}

    def hellaswag(number: int) -> dict[str, Any]:
        first, second = pick(), pick()
        return {
            "ind": number,
            "activity_label": words(2),
            "ctx_a": f"[header] {first}",
            "ctx_b": second.lower() if number % 2 else "",
            "ctx": first,
            "endings": [f"[step] {words(12)}" for _ in range(4)],
            "source_id": f"wikihow~{number}",
            "split": "val",
            "split_type": "zeroshot",
            "label": str(rng.randrange(4)),
        }

    def winogrande(number: int) -> dict[str, Any]:
        head, tail = pick().split()[:6], pick().split()[:5]
        sentence = f"{' '.join(head)} because _ {' '.join(tail)}."
        return {"sentence": sentence, "option1": words(1), "option2": words(2), "answer": rng.choice("12")}

    def piqa(number: int) -> dict[str, Any]:
        return {"goal": pick(), "sol1": words(9), "sol2": words(4), "label": rng.randrange(2)}

    numbers = range(documents)
    return {
        "lambada_openai": [{"text": pick().rstrip(".") + " and " + words(1)} for _ in numbers],
        "hellaswag": [hellaswag(n) for n in numbers],
        "piqa": [piqa(n) for n in numbers],
        "winogrande": [winogrande(n) for n in numbers],
        "arc_easy": [question("question", n) for n in numbers],
        "arc_challenge": [question("question", n + 1) for n in numbers],
        "openbookqa": [question("question_stem", n) for n in numbers],
    }
