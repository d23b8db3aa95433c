"""Committed results are small pages, and bench/tabulate.py makes them from results."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench import output, prepare, tabulate, training
from bench.output import OUT, add_json_flag, check_json_flag, save_result
from rrt.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
MAX_FILE_LINES, MAX_ALL_LINES, MAX_ARCHIVE_BYTES = 500, 5_000, 100_000


def find_oversized(root: Path, names: list[str]) -> list[str]:
    """Complaints about tracked files of bench/results and runs that are too long, one by one and together.

    Raw results are compact archives of a topic.
    """
    results = [name for name in names if name.startswith(("bench/results/", "runs/"))]
    archives = [name for name in results if name.startswith("bench/results/") and name.endswith(".json.gz")]
    sizes = {name: (root / name).stat().st_size for name in archives}
    results = [name for name in results if name not in archives]
    lines = {name: (root / name).read_bytes().count(b"\n") for name in results}
    limits = {name: tabulate.MAX_LINES if name.startswith("bench/results/") else MAX_FILE_LINES for name in results}
    found = [f"{name}: {lines[name]} lines" for name in results if lines[name] > limits[name]]
    found += [f"{name}: raw results" for name in results if name.startswith("bench/results/") and name[-3:] != ".md"]
    found += [f"{name}: {size} bytes" for name, size in sizes.items() if size > MAX_ARCHIVE_BYTES]
    if sum(lines.values()) > MAX_ALL_LINES:
        found.append(f"{sum(lines.values())} lines in all")
    return found


def test_tracked_results_are_small():
    git = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if git.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in git.stdout.split("\0") if (ROOT / name).is_file()]
    assert any(name.startswith("bench/results/") for name in names)
    assert find_oversized(ROOT, names) == []


def test_results_that_are_too_large_are_found(tmp_path):
    sizes = {"bench/results/a.md": 80, "bench/results/b.md": 81, "bench/results/c.json": 1, "runs/d.json": 501}
    sizes |= {f"runs/{n}.txt": 500 for n in range(9)}
    for name, lines in {**sizes, "eval/e.py": 9_000}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x\n" * lines)
    archives = {"bench/results/d.json.gz": MAX_ARCHIVE_BYTES, "bench/results/e.json.gz": MAX_ARCHIVE_BYTES + 1}
    for name, size in archives.items():
        (tmp_path / name).write_bytes(b"\n" * size)
    found = find_oversized(tmp_path, [*sizes, *archives, "eval/e.py"])
    assert found == [
        "bench/results/b.md: 81 lines",
        "runs/d.json: 501 lines",
        "bench/results/c.json: raw results",
        "bench/results/e.json.gz: 100001 bytes",
        "5163 lines in all",
    ]
    assert find_oversized(tmp_path, ["bench/results/a.md", "runs/0.txt", "eval/e.py"]) == []


def losses_result(**changes: Any) -> dict[str, Any]:
    variant = {"peak_bytes": 2**30, "seconds": 2.0}
    case = {"tokens": 2048, "vocab": 9, "width": 8, "rounds": 2, "ratio": {"peak_bytes": 0.5, "seconds": 0.25}}
    header = {"command": "losses.py --json /x/y.json --rounds 2", "code_version": "0.1.0+abc", "torch": "2.13.0"}
    header |= {
        "device": "cpu: Abacus",
        "cpu_flags": ["avx2"],
        "cores": 2,
        "threads": 1,
        "created": "2026-11-05T10:00:00",
    }
    head, exits = (
        {**case, **dict.fromkeys(names, variant)} for names in (("chunked", "whole"), ("distilled", "plain"))
    )
    return {"kind": "losses", **header, "head": head, "exits": exits, **changes}


def bigram_result(**changes: Any) -> dict[str, Any]:
    header = {name: value for name, value in losses_result().items() if name not in ("kind", "head", "exits")}
    values = {"data": "x/data", "split": "heldout", "tokens": 1234, "loss": 3.0, "perplexity": 20.0855}
    return {"kind": "bigram", **header, **values, **changes}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["tabulate.py", *map(str, arguments)])
    tabulate.main()


def test_a_page_has_the_conditions_and_the_tables_of_its_results(tmp_path, monkeypatch):
    source, page = tmp_path / "losses.json", tmp_path / "2026-11_abacus_losses.md"
    source.write_text(json.dumps(losses_result()))
    run(monkeypatch, source, source, "--out", page, "--note", "One run.")
    text = page.read_text()
    assert text.startswith("# losses, abacus, 2026-11\n\n- One run.\n\n- command: `losses.py --rounds 2`\n")
    assert "- code 0.1.0+abc, 2026-11-05, torch 2.13.0\n- machine: cpu: Abacus, 2 cores, 1 threads, avx2\n" in text
    assert text.count("| chunked | 1.00 GiB | 2.00 s |") == 2 and "| ratio | 0.500 | 0.25 |" in text


def test_a_page_of_a_bigram_model(tmp_path, monkeypatch):
    source, page = tmp_path / "bigram.json", tmp_path / "2026-11_abacus_bigram.md"
    source.write_text(json.dumps(bigram_result()))
    run(monkeypatch, source, "--out", page)
    assert "| x/data | heldout | 1,234 | 3.00000 | 20.0855 |" in page.read_text()


def test_tables_with_times_and_ratios_say_how_the_two_relate():
    seconds = {"trainer": {"median": 1.0}, "bare loop": {"median": 1.1}}
    case = {"micro_batches": 1, "rounds": 8, "seconds": seconds, "speedup": {"bare loop": 0.99}}
    library = {"seconds": {"median": 1.0}, "bytes_per_second": 1e6, "ours": 1.08}
    sizes = {"documents": 1, "text_bytes": 9, "vocab_size": 9, "processes": 1, "rounds": 3}
    for table in (
        training.case_table("trainer", [case]),
        *prepare.tables({**sizes, "runs": {"encode_batch": library}}),
    ):
        last = "Ratios: medians of those within rounds, not of the times shown."
        assert table.text().endswith(f"\n{last}") and table.markdown().endswith(f"\n\n{last}")


@pytest.mark.parametrize(
    "changes, out, message",
    [
        (
            {"kind": "unheard-of"},
            "2026-11_abacus_losses.md",
            "field 'kind': found 'unheard-of'; expected one of bigram",
        ),
        ({"kind": ["losses"]}, "2026-11_abacus_losses.md", "field 'kind': found ['losses']; expected one of bigram"),
        (
            {"kind": None},
            "2026-11_abacus_losses.md",
            "field 'kind' is missing; expected a result of this version: make",
        ),
        *(
            ({name: ...}, "2026-11_abacus_losses.md", f"field '{name}' is missing; expected a whole result of kind")
            for name in ("command", "created", "cores", "head")
        ),
        ({"created": 7}, "2026-11_abacus_losses.md", "TypeError: 'int' object is not subscriptable; expected a whole"),
        ({}, "2026-12_abacus_losses.md", "expected MONTH_MACHINE_SUBJECT.md with month 2026-11"),
        ({}, "2026-11_losses.md", "expected MONTH_MACHINE_SUBJECT.md"),
    ],
)
def test_other_results_and_names_are_refused(tmp_path, monkeypatch, changes, out, message):
    result = {name: value for name, value in losses_result(**changes).items() if value is not ...}
    (tmp_path / "losses.json").write_text(json.dumps(result))
    with pytest.raises(UserError) as error:
        run(monkeypatch, tmp_path / "losses.json", "--out", tmp_path / out)
    assert message in str(error.value) and "\n" not in str(error.value) and not (tmp_path / out).exists()


def test_a_page_that_is_too_long_is_refused(tmp_path, monkeypatch):
    (tmp_path / "losses.json").write_text(json.dumps(losses_result()))
    page = tmp_path / "2026-11_abacus_losses.md"
    with pytest.raises(UserError, match="expected at most 80: name fewer results"):
        run(monkeypatch, *[tmp_path / "losses.json"] * 5, "--out", page)
    assert not page.exists()


def test_the_folder_for_results_is_made_when_a_result_goes_there(tmp_path, monkeypatch):
    (tmp_path / "bench").mkdir()
    monkeypatch.setattr(output, "OUT", tmp_path / "bench" / "out")
    monkeypatch.chdir(tmp_path)
    check_json_flag(Path("elsewhere.json"))
    assert not output.OUT.exists()
    for path in ("bench/out/x.json", "bench/out/y.json"):
        check_json_flag(Path(path))
        assert output.OUT.is_dir()


def test_json_without_a_path_goes_to_an_ignored_folder(tmp_path, monkeypatch, capsys):
    parser = tabulate.argparse.ArgumentParser()
    add_json_flag(parser, "kernels")
    assert parser.parse_args([]).json is None
    path = parser.parse_args(["--json"]).json
    assert path.parent == OUT and path.name.startswith("kernels-20") and path.suffix == ".json"
    ignored = subprocess.run(["git", "-C", str(ROOT), "check-ignore", "-q", str(path)])
    assert ignored.returncode in (0, 128)  # 128: not a git checkout
    with pytest.raises(UserError, match="--json: found"):
        check_json_flag(tmp_path / "absent" / "out.json")
    save_result(tmp_path / "out.json", "kernels", {"a": 1})
    assert json.loads((tmp_path / "out.json").read_text())["kind"] == "kernels"
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out.json'}\n"
    save_result(None, "kernels", {})
    assert capsys.readouterr().out == ""
