"""The report of the conversion study: its tables and plots, and what is missing."""

import math
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from rrt.errors import UserError
from runs.conversion_arms import result_path
from runs.conversion_study_report import tokens_to_reach, write_report
from tests.util.studies import cells, write_one, write_study_file


def test_report_is_made_of_the_results_and_shows_what_is_missing(results: Path) -> None:
    report = write_report(results).read_text()
    after = "Right after conversion"
    assert cells(report, after, "base")[1:] == [
        *("134.50 M", "26.90 M", "", "30.40", "30.40", "30.40"),
        *("50.0", "50.0", "50.0", "50.0"),
    ]
    assert cells(report, after, "average + SVD, rank 64")[3:7] == ["33 s", *["3,344,216"] * 3]
    assert cells(report, after, "calibrated, rank 64")[3:] == ["9 min", *["93.00"] * 3, *["missing"] * 4]
    assert cells(report, after, "joint, without data, rank 128")[1:] == ["missing"] * 10
    assert "on 3 draws of the calibration text: text, 512 93.00, 94.00, 96.00" in report

    trained = "After training: perplexity of held-out text, context 512"
    assert cells(report, trained, "average + SVD, rank 64 | no")[2:] == [
        "3,344,216",
        "524.4 (500.0 to 550.0), 2 of 3",
        "78.66 (75.00 to 82.50), 2 of 3",
    ]
    assert cells(report, trained, "calibrated, rank 64 | no")[2] == "94.33 (93.00 to 96.00)"
    assert cells(report, trained, "calibrated, rank 64 | yes")[2:] == ["94.33 (93.00 to 96.00)", "missing", "missing"]
    assert cells(report, "After training on 0.205 M tokens", "calibrated, rank 64 | no")[2:] == ["25.0"] * 4
    for name in ("conversion", "uptraining", "training-loss"):
        assert f"](conversion-study-{name}.svg)" in report
        root = ElementTree.fromstring((results / f"conversion-study-{name}.svg").read_text())
        assert root.tag.endswith("svg")
    again = {path: path.read_text() for path in results.glob("*.svg")} | {results / "report.md": report}
    write_report(results)
    assert all(path.read_text() == text for path, text in again.items())
    assert str(results) not in report and max(map(len, report.partition("**")[0].splitlines())) <= 120


def test_report_says_how_many_tokens_the_papers_way_needs(results: Path) -> None:
    report = write_report(results).read_text()
    row = cells(report, "Tokens that average + SVD needs", "held-out text, context 512 | no")
    # From 524.4 to 78.66 over one doubling, to the 94.33 of the calibrated one's three texts.
    share = math.log(524.4 / 94.33) / math.log(524.4 / 78.66)
    assert row[2:4] == ["94.33", f"about {102_400 * 2**share / 1e6:.3g} M"]
    # 60 against 500, and 45 against 75, at the same seeds.
    assert row[5:] == [f"{math.log(60 / 500):+.3f}", f"{math.log(45 / 75):+.3f}"]
    row = cells(report, "Tokens that average + SVD needs", "held-out text, context 512 | yes")
    assert row[2:4] == ["94.33", "missing"] and row[5:] == ["missing", "missing"]


@pytest.mark.parametrize(
    ("curve", "target", "expected"),
    [
        ([(0, 15.0), (100, 6.0), (400, 4.0)], 5.0, ("about", 200)),
        ([(0, 15.0), (100, 6.0), (400, 4.0)], 4.0, ("about", 400)),
        ([(0, 15.0), (100, 6.0), (400, 4.0)], 3.9, ("more than", 400)),
        ([(0, 15.0), (100, 6.0), (400, 4.0)], 6.5, ("less than", 100)),
        ([(100, 6.0), (200, 6.5), (400, 4.0)], 6.0, ("less than", 100)),
        ([(0, 15.0)], 5.0, None),
        ([], 5.0, None),
    ],
)
def test_tokens_to_reach_a_loss_are_between_trainings_or_a_bound(curve: Any, target: float, expected: Any) -> None:
    assert tokens_to_reach(curve, target) == expected


def test_report_of_nothing_is_all_missing_and_old_plots_are_gone(results: Path) -> None:
    write_report(results)
    shutil.rmtree(results / "results")
    report = write_report(results).read_text()
    assert set(cells(report, "Right after conversion", "base")[1:]) == {"missing"}
    assert "Held-out loss over tokens of uptraining: missing" in report and not list(results.glob("*.svg"))
    write_study_file(results, arms=["base", "keep-15"], tokens=())
    report = write_report(results).read_text()
    assert "After training" not in report and "stepwise" not in report


def test_a_damaged_result_and_a_folder_without_a_study_are_one_line(results: Path, tmp_path: Path) -> None:
    result_path(results, "base", "model").write_text("{}")
    with pytest.raises(UserError, match="field 'conversion_seconds' is missing; expected a whole result"):
        write_report(results)
    with pytest.raises(UserError, match=r"study\.json: no such file"):
        write_report(tmp_path)


def test_report_says_which_models_are_in_another_dtype(results: Path) -> None:
    assert "measurements in missing." in write_report(results).read_text()
    for model, dtype in {"base": "bfloat16", "calibrated-r64": "bfloat16", "average-svd-r64": "float32"}.items():
        write_one(result_path(results, model, "code-512"), {"loss": 3.0, "tokens": 45678, "dtype": dtype})
    assert "in bfloat16; in float32: average-svd-r64." in " ".join(write_report(results).read_text().split())
