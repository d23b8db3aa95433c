"""Results of a conversion study: its conversions and trainings, and all in one file with which it goes on elsewhere."""

import gzip
import json
import re
import statistics
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.tables import expect_whole_result
from rrt.checkpoint.source import open_source
from rrt.common.files import atomic_file, locked_directory, read_json, write_json
from rrt.common.results import write_result
from rrt.errors import UserError
from rrt.model.sizes import model_sizes
from runs.conversion_arms import BASE, all_arms, result_path
from runs.study_steps import Step

KIND = "conversion-study-results"


def write_model_record(out: Path, name: str, checkpoint: Path, seconds: float | None) -> None:
    """Write a model's sizes, and the seconds of its conversion."""
    source = open_source(checkpoint)
    sizes = model_sizes(source.model, source.recursion, source.dtype)
    result = {
        "kind": "conversion",
        "model": name,
        **{field: getattr(sizes, field) for field in ("total_params", "non_embedding_params", "lora_params")},
        "num_loops": source.recursion.num_loops,
        "conversion_seconds": seconds,
    }
    provenance = source.directory / "provenance.json"
    if name != BASE.name and provenance.is_file():
        made = read_json(provenance)
        result["conversion_command"] = made["command"]
        result["calibration"] = {
            key: value for key, value in (made.get("calibration") or {}).items() if key.endswith("stream_error")
        }
    write_result(result_path(out, name, "model"), result)


def write_training_record(step: Step, dtype: str) -> None:
    """Write a training's losses, which its directory, soon deleted, has for every step."""
    assert step.directory is not None and step.record is not None
    lines = (step.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    speeds = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    result = {
        "kind": "training",
        "training_command": read_json(step.makes / "provenance.json")["command"],
        "dtype": dtype,
        "tokens": [record["tokens"] for record in records],
        "loss": [record["loss"] for record in records],
        "median_tokens_per_second": statistics.median(speeds) if speeds else None,
    }
    write_result(step.record, result)


def study_file(out: Path) -> Path:
    """Return the path of a study's settings and plan in `out`, which may not have begun.

    Raises:
        UserError: `out` is something else.
    """
    path = out / "study.json"
    if not path.exists() and out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out}: not empty and not an earlier study; expected a directory to create")
    return path


def pack_results(out: Path, archive: Path) -> None:
    """Write study.json and the results of the study in `out`; the same results make the same bytes.

    Absolute paths are cut to the file's name, and paths in `out` go from there on, as ``OUT/results/...``.
    """
    results: dict[str, dict[str, Any]] = {}
    for path in sorted(out.glob("results/*/*.json")):
        results.setdefault(path.parent.name, {})[path.stem] = _shorten_paths(read_json(path), out)
    content = {"kind": KIND, "study": read_json(out / "study.json"), "results": results}
    with atomic_file(archive) as file:
        file.write(gzip.compress(json.dumps(content, separators=(",", ":"), sort_keys=True).encode(), mtime=0))


def _shorten_paths(value: Any, out: Path) -> Any:
    if isinstance(value, dict):
        return {key: _shorten_paths(child, out) for key, child in value.items()}
    if isinstance(value, list):
        return [_shorten_paths(child, out) for child in value]
    if not isinstance(value, str):
        return value
    value = re.sub(rf"(?<![\w./-]){re.escape(str(out.absolute()))}(?![\w.-])", "OUT", value)
    value = re.sub(rf"(?<![\w./-]){re.escape(str(out))}(?=/)", "OUT", value)
    return re.sub(r"""(?<![\w./-])/(?:[^\s/,:"']+/)+""", "", value)


def add_results(out: Path, archives: Sequence[Path]) -> None:
    """Add those results of archives that the study in `out` lacks, which may not have begun, and say how many.

    Raises:
        UserError: a file cannot be read, is no archive, or is of a study with other settings; `out` is in use.
    """
    for archive in archives:
        with locked_directory(out):
            print(f"{archive}: {_add(out, archive)} results added")


def _add(out: Path, archive: Path) -> int:
    try:
        content = json.loads(gzip.decompress(archive.read_bytes()))
    except (OSError, EOFError, ValueError, zlib.error) as error:
        found = getattr(error, "strerror", None) or error
        raise UserError(f"--results: {archive}: found {found}; expected a results.json.gz of a study") from None
    with expect_whole_result(archive, KIND):
        if content["kind"] != KIND:
            raise UserError(f"--results: {archive}: field 'kind': found {content['kind']!r}; expected {KIND!r}")
        theirs, results = content["study"], content["results"]
        path = study_file(out)
        # Each result has its own, and a part of a study that of its machine.
        theirs["settings"].pop("dtype", None)
        study = read_json(path) if path.exists() else theirs
        for key, found in theirs["settings"].items():
            if found != study["settings"][key]:
                raise UserError(
                    f"--results: {archive}: setting '{key}': found {found!r}; expected {study['settings'][key]!r}, as "
                    f"in {path}: results of one study only"
                )
        study["plan"] = merge_plans(study["num_layers"], study["plan"], theirs["plan"])
        named = [(model, name, values) for model, measures in results.items() for name, values in measures.items()]
        for word in {word for model, name, _ in named for word in (model, name)}:
            if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", word):
                raise UserError(f"--results: {archive}: found a result named {word!r}; expected an arm and a measure")
    missing = {result_path(out, model, name): values for model, name, values in named}
    missing = {result: values for result, values in missing.items() if not result.exists()}
    write_json(path, study)
    for result, values in missing.items():
        result.parent.mkdir(parents=True, exist_ok=True)
        write_json(result, values)
    return len(missing)


def merge_plans(num_layers: int, plan: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Merge what two parts of a study are to make."""
    planned = {*plan["arms"], *other["arms"]}
    return {
        "arms": [arm.name for arm in all_arms(num_layers) if arm.name in planned],
        "tokens": sorted({*plan["tokens"], *other["tokens"]}),
        "num_seeds": max(plan["num_seeds"], other["num_seeds"]),
        "has_fewshot": plan["has_fewshot"] or other["has_fewshot"],
    }
