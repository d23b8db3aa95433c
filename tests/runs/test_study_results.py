"""Archives of the conversion study's results, with which another machine goes on."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rrt.errors import UserError
from runs import conversion_study, study_steps
from runs.conversion_arms import result_path
from runs.conversion_study_report import write_report
from runs.study_results import add_results, pack_results
from tests.util.commands import run_program
from tests.util.studies import ARMS, cells, write_perplexity, write_study_file


def test_a_study_goes_on_elsewhere_with_the_results_of_its_archive(
    results: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = write_report(results).read_text()
    packed = (results / "results.json.gz").read_bytes()
    write_report(results)
    assert (results / "results.json.gz").read_bytes() == packed

    other = tmp_path / "other"
    flags = ["--out", other, "--report", "--results", results / "results.json.gz"]
    done = run_program(conversion_study.main, flags, capsys, monkeypatch)
    added = len(list(results.glob("results/*/*.json")))
    assert done.code == 0 and f"results.json.gz: {added} results added" in done.out
    assert (other / "report.md").read_text() == report
    assert (other / "results.json.gz").read_bytes() == packed

    # What is there is kept, what is missing is added, and the plans of both are to be made.
    write_perplexity(other, "base", "code-512", 2.0)
    result_path(other, "base", "natural-512").unlink()
    write_study_file(other, arms=["base", "joint-r32"], tokens=(409_600,))
    assert "1 results added" in run_program(conversion_study.main, flags, capsys, monkeypatch).out
    assert cells((other / "report.md").read_text(), "Right after conversion", "base")[4:7] == ["30.40", "30.40", "2.00"]
    plan = json.loads((other / "study.json").read_text())["plan"]
    assert (plan["arms"], plan["tokens"]) == ([arm.name for arm in ARMS], [102_400, 204_800, 409_600])


def test_an_archive_names_no_directories_of_the_machine(results: Path) -> None:
    path = result_path(results, "base", "natural-512")
    found = json.loads(path.read_text())
    found["checkpoint"] = f"{results}/checkpoints/base"
    found["command"] = (
        f"perplexity.py --checkpoint {results}/checkpoints/base --data /home/me/text.jsonl --out={results}"
    )
    found["model"] = "org/name"
    found["note"] = '["/h/a.jsonl","/h/b.jsonl"]'
    path.write_text(json.dumps(found))
    pack_results(results, results / "packed.gz")
    packed = json.loads(gzip.decompress((results / "packed.gz").read_bytes()))["results"]["base"]["natural-512"]
    assert packed["checkpoint"] == "OUT/checkpoints/base"
    assert packed["command"] == "perplexity.py --checkpoint OUT/checkpoints/base --data text.jsonl --out=OUT"
    assert packed["model"] == "org/name"
    assert packed["note"] == '["a.jsonl","b.jsonl"]'
    assert packed["loss"] == found["loss"]


def test_a_part_on_another_machine_may_have_another_dtype_but_keeps_its_own(
    command: list[Any], tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_steps, "_run", lambda *_: False)

    def run(*flags: Any) -> Any:
        flags = ("--minutes", 0, "--arms", "keep-2", "--tokens", 4096, *flags)
        return run_program(conversion_study.main, [*command, *flags], capsys, monkeypatch)

    run("--dtype", "bfloat16")
    archive = (command[-1] / "results.json.gz").rename(tmp_path / "results.json.gz")
    shutil.rmtree(command[-1])
    assert "results added" in run("--results", archive, "--dtype", "float32").out
    assert "field 'dtype': found 'float32', and now 'bfloat16'" in run("--dtype", "bfloat16").err
    assert "not made, as said above" in run("--dtype", "float32").err
    assert "--print: found --results beside it" in run("--results", archive, "--print").err


def test_an_archive_of_another_study_or_none_at_all_is_one_line_and_adds_nothing(results: Path, tmp_path: Path) -> None:
    write_report(results)
    archive, other = results / "results.json.gz", tmp_path / "other"
    write_study_file(other)
    study = json.loads((other / "study.json").read_text())
    study["settings"]["calibration_tokens"] = 8192
    (other / "study.json").write_text(json.dumps(study))
    with pytest.raises(UserError, match="setting 'calibration_tokens': found 32768; expected 8192, as in"):
        add_results(other, [archive])
    packed = archive.read_bytes()
    content = json.loads(gzip.decompress(packed))
    bad = tmp_path / "bad.json.gz"
    for damaged, message in {
        packed[:-9]: "expected a results.json.gz of a study",
        b"{}": "expected a results.json.gz of a study",
        packed[:40] + b"x" * 40: "expected a results.json.gz of a study",
        gzip.compress(b'{"kind": "fewshot"}'): "field 'kind': found 'fewshot'; expected 'conversion-study-results'",
        gzip.compress(json.dumps({**content, "study": {}}).encode()): "field 'settings' is missing",
        gzip.compress(json.dumps({**content, "results": {"../x": {"model": {}}}}).encode()): "named '../x'",
        gzip.compress(
            json.dumps({**content, "results": {"..": {"model": {}}}}).encode()
        ): "named '..'; expected an arm",
    }.items():
        bad.write_bytes(damaged)
        with pytest.raises(UserError, match=message):
            add_results(tmp_path / "new", [bad])
    with pytest.raises(UserError, match="nowhere"):
        add_results(tmp_path / "new", [tmp_path / "nowhere"])
    assert not list((tmp_path / "new").iterdir()) and not (other / "results").exists()
    (tmp_path / "new" / "notes").touch()
    with pytest.raises(UserError, match="new: not empty and not an earlier study"):
        add_results(tmp_path / "new", [archive])
