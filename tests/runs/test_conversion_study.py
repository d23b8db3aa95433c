"""The conversion study's command: the parts of the text, its flags, its settings and its directory."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rrt.errors import UserError
from runs import conversion_study, study_steps
from runs.conversion_study import split_texts, write_texts
from tests.util.commands import run_program
from tests.util.studies import cells, make_study

TEXTS = [f"document {number}" for number in range(59)]


def test_the_last_fifth_is_held_out_and_never_trained_or_calibrated_on(tmp_path: Path) -> None:
    train, heldout = split_texts(TEXTS)
    assert (train, heldout) == (TEXTS[:47], TEXTS[47:])
    repeated = split_texts([TEXTS[58], *TEXTS])
    assert repeated == (TEXTS[:47], TEXTS[47:])
    study = make_study(tmp_path)
    write_texts(study, TEXTS, 3)
    files = {path.stem: path.read_text().splitlines() for path in study.data.iterdir()}
    assert set(files) == {"natural", "natural-heldout", "draw1", "draw2"}
    assert [json.loads(line)["text"] for line in files["natural-heldout"]] == heldout
    assert [json.loads(line)["text"] for line in files["natural"]] == train
    for draw in ("draw1", "draw2"):
        assert sorted(files[draw]) == sorted(files["natural"]) != files[draw]
    assert files["draw1"] != files["draw2"]


@pytest.mark.parametrize(
    ("texts", "message"), [(TEXTS[:4], "found 4 documents; expected at least 5"), (["a"] * 9, "also held out")]
)
def test_too_little_text_is_refused(texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        split_texts(texts)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tokens", 4096, 5000], "--tokens: found 5000; expected multiples of 4096"),
        (["--arms", "no-such"], "--arms: found 'no-such'; expected names, or patterns: base, stepwise, keep-2"),
        (["--seeds", 0], "--seeds: found 0; expected 1 or more"),
        (["--calibration-tokens", -1], "--calibration-tokens: found -1; expected 1 or more"),
        (["--processes", 3], "--processes: found 3; expected 1, 2, 4 or 8"),
        (["--data-dir", "nowhere"], "--data-dir: found nowhere, which is no directory"),
        (["--text", "nowhere.jsonl"], "nowhere.jsonl: no file matches"),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(
    flags: list[Any], message: str, command: list[Any], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run_program(conversion_study.main, [*command, *flags], capsys, monkeypatch)
    assert (done.code, done.err.count("\n")) == (2, 1) and message in done.err
    assert not (command[-1] / "study.json").exists()


def test_commands_are_printed_without_running_them(
    command: list[Any], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run_program(
        conversion_study.main, [*command, "--arms", "keep-2", "--tokens", 4096, "--print"], capsys, monkeypatch
    )
    assert done.code == 0 and not command[-1].exists()
    names = re.findall("^# (.*)", done.out, flags=re.M)
    measured = ["natural-512", "natural-2048", "code-512"]
    trained = [f"keep-2-4096-{kind}-seed0" for kind in ("plain", "distilled")]
    assert names == [
        *("held-out code", "tokens of code", "tokens of natural"),
        *(f"{measure} of base" for measure in measured),
        "convert keep-2",
        *(f"{measure} of keep-2" for measure in measured),
        *(name for model in trained for name in (f"train {model}", *(f"{m} of {model}" for m in measured))),
    ]


def test_settings_of_a_study_stay_the_same_and_its_plan_grows(
    command: list[Any], text: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = command[-1]

    def run(*flags: Any) -> Any:
        return run_program(conversion_study.main, [*command, "--minutes", 0, *flags], capsys, monkeypatch)

    monkeypatch.setattr(study_steps, "_run", lambda *_: False)
    old = out / "statistics" / "draw0-of-other-code"
    assert "not made, as said above: held-out code;" in run("--arms", "keep-2", "--tokens", 4096).err
    old.mkdir(parents=True)
    assert "calibrated" not in (out / "report.md").read_text()
    run("--arms", "calibrated-r64", "--tokens", 8192, "--seeds", 2, "--name", "Tiny")
    assert not old.exists()
    plan = json.loads((out / "study.json").read_text())
    assert plan["plan"] == {
        "arms": ["base", "keep-2", "calibrated-r64"],
        "tokens": [4096, 8192],
        "num_seeds": 3,
        "has_fewshot": False,
    }
    assert plan["base"] == "Tiny"
    done = run("--max-tokens", 5)
    assert "study.json: field 'max_tokens': found None, and now 5; expected the same settings" in done.err
    text.write_text(text.read_text() + '{"text": "more"}\n')
    assert "field 'text_sha256'" in run().err
    report = run_program(conversion_study.main, ["--out", out, "--report"], capsys, monkeypatch)
    assert (report.code, report.out) == (0, f"report: {out}/report.md\n")
    missing = run_program(conversion_study.main, ["--out", out], capsys, monkeypatch)
    assert missing.err == "error: --base: missing; expected it, or --report\n"


def test_a_folder_of_something_else_and_a_second_study_at_once_are_refused(
    command: list[Any], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = command[-1]
    with conversion_study.locked_directory(out):
        done = run_program(conversion_study.main, command, capsys, monkeypatch)
        assert "another process writes here; wait for it" in done.err
    (out / "mine").touch()
    done = run_program(conversion_study.main, command, capsys, monkeypatch)
    assert "not empty and not an earlier study" in done.err and os.listdir(out) == ["mine"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_study_of_a_tiny_model_runs_in_parts(command: list[Any], tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    program = [sys.executable, str(root / "runs" / "conversion_study.py"), *map(str, command)]
    program += ["--arms", "average-svd-r64", "--tokens", "204800", "--seeds", "1", "--processes", "1"]
    out = command[-1]

    def begin(minutes: float) -> "subprocess.Popen[str]":
        arguments = [*program, "--minutes", str(minutes)]
        return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path)

    first = begin(0).communicate()[0]
    assert "=== step 1 of 18: held-out code" in first and "17 of 18 steps are left" in first
    part = begin(60)
    assert part.stdout is not None
    # The first training, in the middle: on SIGTERM it saves where it is.
    assert any(line.startswith("step 20/50 ") for line in part.stdout)
    part.terminate()
    stopped = part.communicate()[0]
    assert part.returncode == 143 and stopped.endswith("interrupted\n"), stopped
    rest = begin(60).communicate()[0]
    assert rest.count("resuming from") == 1 and "all 18 steps are done" in rest, rest
    report = (out / "report.md").read_text()
    assert cells(report, "Right after conversion", "average + SVD, rank 64")[1] != "missing"
    assert cells(report, "After training: perplexity of held-out code", "average + SVD, rank 64 | yes")[3] != "missing"
    assert not [path for path in (out / "checkpoints").iterdir() if path.is_dir()]
