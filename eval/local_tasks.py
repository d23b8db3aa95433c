"""The paper's seven tasks from local files, checked record by record against the schema of each data set.

`eval/tasks/README.md` has the schemas; prompts and metrics are the harness's own.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pyarrow.parquet
import yaml
from lm_eval.tasks._yaml_loader import load_yaml  # no public function reads a task's file with its functions

from eval.harness_tasks import FILE_FORMATS
from rrt.errors import UserError

OVERLAYS = Path(__file__).parent / "tasks"
STOCK_TASKS = Path(lm_eval.__file__).parent / "tasks"

Rule = tuple[Callable[[object, dict[str, Any]], bool], str]
"""A check of a field's value, given the record, whose earlier fields are checked; and the expectation in words."""


def stock_file(task: str) -> Path:
    """Return the path of the harness's own file of one of the seven tasks."""
    path = STOCK_TASKS / _overlay(task)["include"]
    if not path.is_file():
        raise UserError(f"lm-eval {lm_eval.__version__}: has no {path}; expected it, as in lm-eval 0.4.13")
    return path


def data_files(task: str, directory: Path, num_fewshot: int) -> dict[str, Path]:
    """Find the file of each split that is needed.

    Raises:
        UserError: a split has no file or more than one.
    """
    overlay = _overlay(task)
    scored = overlay["test_split"] or overlay["validation_split"]
    files = {scored: _find(directory, task)}
    if num_fewshot and overlay["training_split"]:
        files[overlay["training_split"]] = _find(directory, f"{task}.train")
    return files


def local_task(task: str, files: dict[str, Path]) -> dict[str, Any]:
    """Configure `task` for the harness's `TaskManager` to read `files` (of `data_files`).

    Raises:
        UserError: a file cannot be read, has no record, or has one that violates the task's schema.
    """
    splits = {split: _dataset(task, path) for split, path in files.items()}
    config: dict[str, Any] = load_yaml(stock_file(task))
    for name in ("training_split", "validation_split", "test_split"):
        split = _overlay(task)[name]
        config[name] = split if split in splits else None

    if "process_docs" in config:
        config["process_docs"] = _once_per_split(config["process_docs"])
    return {**config, "dataset_name": None, "custom_dataset": lambda **_: splits}


def _once_per_split(process: Callable[[datasets.Dataset], datasets.Dataset]) -> Callable[..., datasets.Dataset]:
    """Keep what a task makes of its records: the harness makes it anew whenever it looks at them, five times a run."""
    made: list[tuple[datasets.Dataset, datasets.Dataset]] = []

    def processed(records: datasets.Dataset) -> datasets.Dataset:
        for known, result in made:
            if known is records:
                return result
        made.append((records, process(records)))
        return made[-1][1]

    return processed


def _overlay(task: str) -> dict[str, Any]:
    overlay: dict[str, Any] = yaml.safe_load((OVERLAYS / f"{task}.yaml").read_text(encoding="utf-8"))
    return overlay


def _find(directory: Path, name: str) -> Path:
    if not directory.is_dir():
        raise UserError(f"--data-dir: found {directory}; expected a directory")
    names = [f"{name}.{suffix}" for suffix in FILE_FORMATS]
    found = [directory / name for name in names if (directory / name).is_file()]
    if len(found) != 1:
        having = " and ".join(path.name for path in found) or "none"
        expected = f"{', '.join(names[:-1])} or {names[-1]}"
        raise UserError(f"{directory}: found {having}; expected {expected} (see eval/tasks/README.md)")
    return found[0]


def _dataset(task: str, path: Path) -> datasets.Dataset:
    records = list(_records(task, path))
    try:
        return datasets.Dataset.from_list(records)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: found fields of different types ({error}); expected one in all records") from None


def _records(task: str, path: Path) -> Iterator[dict[str, Any]]:
    """Read the records of a file, reduced to the task's own fields: others may have no common type."""
    schema = SCHEMAS[task]
    count = 0
    for place, record in _read(path):
        count += 1
        if not isinstance(record, dict):
            raise UserError(f"{path}: {place}: found {_short(record)}; expected an object")
        for name, (is_right, expected) in schema.items():
            if name not in record or not is_right(record[name], record):
                found = _short(record[name]) if name in record else "no such field"
                raise UserError(f"{path}: {place}: field '{name}': found {found}; expected {expected}")
        yield {name: record[name] for name in schema}
    if count == 0:
        raise UserError(f"{path}: found no record; expected at least one")


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield records and their places, lines of JSON or rows of Parquet, counted from 1."""
    if path.suffix == ".parquet":
        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowException as error:
            raise UserError(f"{path}: not a Parquet file ({error})") from None
        yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
        return
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
        try:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    yield f"line {number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}: line {number}: not valid JSON ({error})") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: not a whole gzip file ({error})") from None


def _is_text(value: object, _: dict[str, Any]) -> bool:
    return isinstance(value, str)


def _is_context_and_word(value: object, _: dict[str, Any]) -> bool:
    """Return True for a text with words on both sides of its last space, where the harness cuts."""
    if not isinstance(value, str):
        return False
    context, _space, word = value.rpartition(" ")
    return bool(context.strip() and word.strip())


def _has_blank(value: object, _: dict[str, Any]) -> bool:
    return isinstance(value, str) and "_" in value


def _are_texts(value: object, _: dict[str, Any]) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text for text in value)


def _is_ending(value: object, record: dict[str, Any]) -> bool:
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(record["endings"])


def _is_solution(value: object, _: dict[str, Any]) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in (0, 1)


def _is_option(value: object, _: dict[str, Any]) -> bool:
    return value in ("1", "2")


def _is_choices(value: object, record: dict[str, Any]) -> bool:
    if not isinstance(value, dict):
        return False
    text, label = value.get("text"), value.get("label")
    return _are_texts(text, record) and _are_texts(label, record) and len(text) == len(label)


def _is_label(value: object, record: dict[str, Any]) -> bool:
    return value in record["choices"]["label"]


def _is_label_after_spaces(value: object, record: dict[str, Any]) -> bool:
    return isinstance(value, str) and value.lstrip() in record["choices"]["label"]


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


TEXT: Rule = (_is_text, "a text")
CHOICES: Rule = (_is_choices, "an object with 'text' and 'label', lists of equally many texts")
LABEL = "one of the labels in 'choices'"
_ARC: dict[str, Rule] = {"question": TEXT, "choices": CHOICES, "answerKey": (_is_label, LABEL)}
SCHEMAS: dict[str, dict[str, Rule]] = {
    "lambada_openai": {"text": (_is_context_and_word, "a text of at least two words, the last of them at its end")},
    "hellaswag": {
        "activity_label": TEXT,
        "ctx_a": TEXT,
        "ctx_b": TEXT,
        "endings": (_are_texts, "a list of texts that are not empty"),
        "label": (_is_ending, "the index of one of 'endings', an integer or digits"),
    },
    "piqa": {
        "goal": TEXT,
        "sol1": TEXT,
        "sol2": TEXT,
        "label": (_is_solution, "0 or 1, an integer"),
    },
    "winogrande": {
        "sentence": (_has_blank, "a text with a '_'"),
        "option1": TEXT,
        "option2": TEXT,
        "answer": (_is_option, "'1' or '2', a string"),
    },
    "arc_easy": _ARC,
    "arc_challenge": _ARC,
    "openbookqa": {"question_stem": TEXT, "choices": CHOICES, "answerKey": (_is_label_after_spaces, LABEL)},
}
