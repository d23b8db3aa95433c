import gc
import gzip
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from rrt.data.shards import open_shards
from rrt.data.tokenizer import load_tokenizer
from rrt.errors import UserError
from tests.util.files import files_of_at_most
from tests.util.tokenizers import make_bpe_tokenizer, make_sentencepiece_tokenizer, set_config, training_texts
from train import prepare_data as module
from train.prepare_data import prepare_data

SCRIPT = Path(__file__).resolve().parents[2] / "train" / "prepare_data.py"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sentencepiece_tokenizer(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SMALLEST_UNIT", 4096)


@pytest.fixture
def texts() -> list[str]:
    lines = "\n".join(training_texts()).split("\n")
    return ["\n".join(lines[start : start + 7]) or "empty" for start in range(0, len(lines), 7)]


@pytest.fixture
def corpus(tmp_path: Path, texts: list[str]) -> Path:
    """Four kinds of file whose documents are `texts`, in the order of the files' names."""
    directory = tmp_path / "corpus"
    directory.mkdir()
    quarter = len(texts) // 4

    def lines(part: int) -> bytes:
        stop = None if part == 2 else (part + 1) * quarter
        return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts[part * quarter : stop])

    (directory / "a.jsonl").write_bytes(lines(0))
    (directory / "b.jsonl.gz").write_bytes(gzip.compress(lines(1)))
    (directory / "c.jsonl.zst").write_bytes(zstandard.compress(lines(2)))
    (directory / "d.txt").write_text("one document\nof two lines\n")
    texts.append("one document\nof two lines\n")
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def leftovers(directory: Path) -> list[str]:
    """Files in the output's parent other than the corpus."""
    return sorted(path.name for path in directory.iterdir() if path.name != "corpus")


def test_the_shards_hold_every_document_as_the_tokenizer_makes_it(
    corpus: Path, texts: list[str], tokenizer: Path, tmp_path: Path, small_units: None
) -> None:
    prepare_data([f"{corpus}/*"], tokenizer, tmp_path / "out", workers=2)
    shards = open_shards(tmp_path / "out", "train")
    loaded = load_tokenizer(tokenizer)
    shards.check_tokenizer(loaded)
    assert [document.tolist() for document in shards.documents()] == [loaded.encode_document(text) for text in texts]
    assert shards.text_bytes == sum(len(text.encode()) for text in texts)
    assert leftovers(tmp_path) == ["out"]


def test_a_family_without_bos_gets_none(corpus: Path, texts: list[str], tmp_path: Path) -> None:
    neox = make_bpe_tokenizer(tmp_path / "neox", "gpt_neox")
    prepare_data([f"{corpus}/*"], neox, tmp_path / "out")
    loaded = load_tokenizer(neox)
    first = next(open_shards(tmp_path / "out", "train").documents()).tolist()
    assert first == [*loaded.encode(texts[0], bos=False), 0]


@pytest.mark.parametrize(
    ("family", "bos", "bos_id"), [("llama", "no", None), ("llama", "yes", 1), ("gpt_neox", "yes", 0)]
)
def test_bos_overrules_the_tokenizer_and_is_recorded(
    corpus: Path, texts: list[str], tmp_path: Path, family: str, bos: str, bos_id: int | None
) -> None:
    directory = make_bpe_tokenizer(tmp_path / "tokenizer", family)
    prepare_data([f"{corpus}/*"], directory, tmp_path / "out", bos=bos)
    shards, loaded = open_shards(tmp_path / "out", "train"), load_tokenizer(directory)
    expected = [*loaded.encode(texts[0], bos=bos == "yes"), loaded.eos_id]
    assert next(shards.documents()).tolist() == expected
    assert (shards.bos_id, shards.bos) == (bos_id, bos)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["source"]["bos"] == bos and meta["tokenizer"]["bos_id"] == bos_id
    shards.check_tokenizer(loaded)  # chosen, so no mistake


def test_bos_of_a_tokenizer_without_one_is_refused(corpus: Path, tmp_path: Path) -> None:
    directory = make_bpe_tokenizer(tmp_path / "tokenizer")
    set_config(directory, bos_token=None)
    with pytest.raises(UserError, match=r"--bos: found yes; the tokenizer of .* has no BOS: expected auto or no"):
        prepare_data([f"{corpus}/*"], directory, tmp_path / "out", bos="yes")
    assert not (tmp_path / "out").exists()


def test_the_output_does_not_depend_on_the_number_of_workers(
    corpus: Path, tokenizer: Path, tmp_path: Path, small_units: None
) -> None:
    outputs = []
    for workers in (1, 2, 5):
        prepare_data([f"{corpus}/*"], tokenizer, tmp_path / str(workers), workers=workers, shard_tokens=3000)
        outputs.append(contents(tmp_path / str(workers)))
    assert outputs[0] == outputs[1] == outputs[2]
    assert len(open_shards(tmp_path / "1", "train").shards) > 2


def test_held_out_files_are_a_split_of_their_own_and_not_trained_on(
    corpus: Path, texts: list[str], tokenizer: Path, tmp_path: Path
) -> None:
    prepare_data([f"{corpus}/*"], tokenizer, tmp_path / "out", heldout_inputs=[f"{corpus}/d.txt"])
    assert open_shards(tmp_path / "out", "train").num_documents == len(texts) - 1
    assert open_shards(tmp_path / "out", "heldout").num_documents == 1


def interrupt_after(units: int) -> Callable[[list[object]], object]:
    """A `wait` that ends the parent as Ctrl-C would, once so many units are done."""
    done = 0
    real_wait = module.wait

    def wait(connections: list[object]) -> object:
        nonlocal done
        if done >= units:
            raise KeyboardInterrupt
        ready = real_wait(connections)[:1]
        done += len(ready)
        return ready

    return wait


@pytest.fixture
def interrupted(
    corpus: Path, tokenizer: Path, tmp_path: Path, small_units: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """The output's path, after a run that was interrupted with four units done."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(module, "wait", interrupt_after(4))
        with pytest.raises(KeyboardInterrupt):
            prepare_data([f"{corpus}/*"], tokenizer, out, workers=2)
    assert leftovers(tmp_path) == ["out.partial"]
    yield out


def test_an_interrupted_run_continues_and_ends_the_same(
    interrupted: Path, corpus: Path, tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("out.partial/*.npy")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "wait", interrupt_after(1))
        with pytest.raises(KeyboardInterrupt):
            prepare_data([f"{corpus}/*"], tokenizer, interrupted, workers=1)
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("out.partial/*.npy")}
    assert len(before) >= 4 and before.items() < after.items()

    prepare_data([f"{corpus}/*"], tokenizer, interrupted, workers=2)
    assert "continuing an interrupted run" in capsys.readouterr().out
    prepare_data([f"{corpus}/*"], tokenizer, tmp_path / "at-once")
    assert contents(interrupted) == contents(tmp_path / "at-once")
    assert leftovers(tmp_path) == ["at-once", "out"]


def test_another_tokenizer_or_option_starts_anew(
    interrupted: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_sentencepiece_tokenizer(tmp_path / "gemma", "gemma")
    (tmp_path / "out.partial" / "notes.txt").write_text("not ours")
    with pytest.raises(UserError, match="finished units of other inputs or options"):
        prepare_data([f"{corpus}/*"], other, interrupted)
    assert len(list(tmp_path.glob("out.partial/unit-*.npy"))) >= 4
    assert (tmp_path / "out.partial" / "notes.txt").exists()
    prepare_data([f"{corpus}/*"], other, interrupted, overwrite=True)
    assert "starting anew" in capsys.readouterr().out
    open_shards(interrupted, "train").check_tokenizer(load_tokenizer(other))


def test_a_worker_does_not_collect_the_parents_garbage(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Left:
        def __init__(self) -> None:
            self.cycle, self.owner = self, os.getpid()

        def __del__(self) -> None:
            if os.getpid() != self.owner:
                os.abort()

    left, write_unit = [Left()], module.write_unit

    def write(job: Any, unit: Any) -> None:
        left.clear()
        gc.collect()
        write_unit(job, unit)

    monkeypatch.setattr(module, "write_unit", write)
    prepare_data([f"{corpus}/*"], tokenizer, tmp_path / "out")
    assert leftovers(tmp_path) == ["out"]


def test_a_file_that_changed_is_done_again_and_the_others_are_kept(
    interrupted: Path, corpus: Path, texts: list[str], tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (corpus / "d.txt").open("a") as stream:
        stream.write("a third line\n")
    prepare_data([f"{corpus}/*"], tokenizer, interrupted)
    assert "continuing" in capsys.readouterr().out
    documents = [document.tolist() for document in open_shards(interrupted, "train").documents()]
    changed = [*texts[:-1], texts[-1] + "a third line\n"]
    assert documents == load_tokenizer(tokenizer).encode_documents(changed)


def test_a_unit_that_a_crash_left_damaged_is_done_again(
    interrupted: Path, corpus: Path, tokenizer: Path, tmp_path: Path
) -> None:
    tokens, rows = (sorted(tmp_path.glob(f"out.partial/*.{suffix}")) for suffix in ("bin", "npy"))
    tokens[0].write_bytes(tokens[0].read_bytes()[:-2])
    rows[1].write_bytes(rows[1].read_bytes()[:20])
    (tmp_path / "out.partial" / ".unit-0.bin.partial-123").write_bytes(b"half")
    prepare_data([f"{corpus}/*"], tokenizer, interrupted)
    prepare_data([f"{corpus}/*"], tokenizer, tmp_path / "at-once")
    assert contents(interrupted) == contents(tmp_path / "at-once")


def test_a_bad_line_leaves_no_output_and_keeps_finished_units(
    corpus: Path, texts: list[str], tokenizer: Path, tmp_path: Path, small_units: None
) -> None:
    good = (corpus / "a.jsonl").read_bytes()
    bad = corpus / "e.jsonl"
    bad.write_bytes(good + b"{}\n")
    with pytest.raises(UserError, match=r"e\.jsonl:\d+: no field 'text'.*units are finished and kept in") as caught:
        prepare_data([f"{corpus}/*"], tokenizer, tmp_path / "out", workers=1)
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == ["out.partial"]

    bad.write_bytes(good)
    prepare_data([f"{corpus}/*"], tokenizer, tmp_path / "out", workers=1)
    assert open_shards(tmp_path / "out", "train").num_documents == len(texts) + len(texts) // 4 - 1 + 1


def test_records_without_text_are_skipped_and_counted_per_split_over_an_interruption(
    corpus: Path,
    texts: list[str],
    tokenizer: Path,
    tmp_path: Path,
    small_units: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("a.jsonl", "e.jsonl"):
        with (corpus / name).open("a") as stream:
            stream.write('{"text": null}\n{"text": ""}\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "wait", interrupt_after(4))
        with pytest.raises(KeyboardInterrupt):
            prepare_data([f"{corpus}/[a-d]*"], tokenizer, tmp_path / "out", workers=2)
    (corpus / "e.jsonl").write_text('{"text": "held out"}\n{"text": null}\n')
    heldout = [str(corpus / "e.jsonl")]
    prepare_data([f"{corpus}/[a-d]*"], tokenizer, tmp_path / "out", heldout_inputs=heldout)
    printed = capsys.readouterr().out
    assert "continuing" in printed and "\nskipped 3 records without text\n" in printed
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["source"]["records_without_text"] == {"train": 2, "heldout": 1}
    shards = open_shards(tmp_path / "out", "train")
    assert shards.num_documents == len(texts) and shards.text_bytes == sum(len(text.encode()) for text in texts)


def test_strict_refuses_records_without_text_also_where_an_earlier_run_skipped_them(
    corpus: Path, tokenizer: Path, tmp_path: Path, small_units: None
) -> None:
    line = (corpus / "a.jsonl").read_bytes().count(b"\n") + 1
    with (corpus / "a.jsonl").open("a") as stream:
        stream.write('{"text": null}\n')
    (corpus / "e.jsonl").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        prepare_data([f"{corpus}/*"], tokenizer, tmp_path / "out", workers=1)
    (corpus / "e.jsonl").write_text('{"text": "whole"}')
    with pytest.raises(UserError, match=rf"a\.jsonl:{line}: field 'text' is null.*units are finished and kept"):
        prepare_data([f"{corpus}/*"], tokenizer, tmp_path / "out", workers=1, is_strict=True)
    assert leftovers(tmp_path) == ["out.partial"]


@pytest.mark.parametrize("kind", ["a unit", "the join"])
def test_a_full_disk_is_told_in_one_line_with_the_path_and_what_is_kept(
    corpus: Path, texts: list[str], tokenizer: Path, tmp_path: Path, small_units: None, kind: str
) -> None:
    if kind == "a unit":
        with pytest.raises(UserError) as caught, files_of_at_most(300):
            prepare_data([f"{corpus}/*"], tokenizer, tmp_path / "out", workers=1)
        place = f"{tmp_path}/out.partial/unit-[0-9a-f]+.bin"
    else:
        with (
            pytest.raises(UserError) as caught,
            pytest.MonkeyPatch.context() as patch,
            files_of_at_most(100_000),
        ):
            tokenise = module.tokenise
            limit = (2000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
            patch.setattr(
                module, "tokenise", lambda *job: (tokenise(*job), resource.setrlimit(resource.RLIMIT_FSIZE, limit))
            )
            prepare_data([f"{corpus}/*"], tokenizer, tmp_path / "out", workers=1)
        place = str(tmp_path / "out")
        assert re.search(r"needed, .* were free\); .* units are finished and kept in", str(caught.value))
        assert leftovers(tmp_path) == ["out.partial"]
    assert re.match(f"{place}: larger than files may be", str(caught.value)) and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out.partial/.*"))
    prepare_data([f"{corpus}/*"], tokenizer, tmp_path / "out")
    assert open_shards(tmp_path / "out", "train").num_documents == len(texts)


def test_an_existing_output_is_replaced_only_when_asked(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_data([f"{corpus}/d.txt"], tokenizer, out)
    before = contents(out)
    with pytest.raises(UserError, match="--overwrite"):
        prepare_data([f"{corpus}/a.jsonl"], tokenizer, out)
    with pytest.raises(UserError, match="no file matches"):
        prepare_data([f"{corpus}/none*.txt"], tokenizer, out, overwrite=True)
    assert contents(out) == before
    prepare_data([f"{corpus}/a.jsonl"], tokenizer, out, overwrite=True)
    assert contents(out) != before


def test_two_runs_into_one_output_are_refused(corpus: Path, tokenizer: Path, tmp_path: Path) -> None:
    with (
        module.locked_directory(tmp_path / "out.partial"),
        pytest.raises(UserError, match=r"another process writes here"),
    ):
        prepare_data([f"{corpus}/*"], tokenizer, tmp_path / "out")


def test_a_killed_worker_is_reported(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "write_unit", lambda job, unit: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="a worker process was killed"):
        prepare_data([f"{corpus}/*"], tokenizer, tmp_path / "out")
    assert leftovers(tmp_path) == []


def test_a_bug_in_a_worker_keeps_its_traceback(
    corpus: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "batches", lambda texts: 1 / 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        prepare_data([f"{corpus}/*"], tokenizer, tmp_path / "out")


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_the_standard_library_has_both_splits(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "corpus"
    for name in ("ast.py", "asyncio/locks.py", "json/decoder.py", "test/test_ast.py"):
        (library / name).parent.mkdir(parents=True, exist_ok=True)
        (library / name).write_text(f"# {name}")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(library))
    prepare_data(["python-stdlib"], tokenizer, tmp_path / "out")
    decode = load_tokenizer(tokenizer).decode
    assert [decode(d) for d in open_shards(tmp_path / "out", "train").documents()] == ["# ast.py", "# asyncio/locks.py"]
    assert [decode(d) for d in open_shards(tmp_path / "out", "heldout").documents()] == ["# json/decoder.py"]


def test_the_command_works_from_any_directory_and_ends_with_a_table(
    corpus: Path, tokenizer: Path, tmp_path: Path
) -> None:
    done = run("--input", "*.jsonl*", "--tokenizer", tokenizer, "--out", tmp_path / "out", cwd=corpus)
    assert done.returncode == 0, done.stderr
    shards = open_shards(tmp_path / "out", "train")
    table = done.stdout.splitlines()
    assert any(line.startswith("train") and f" {shards.num_documents} " in line for line in table)
    assert "MB of text per second" in table[-1]


def test_the_command_ends_on_bad_input_with_one_line_and_exit_code_2(tmp_path: Path, tokenizer: Path) -> None:
    done = run("--input", "none*.txt", "--tokenizer", tokenizer, "--out", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert [line[:32] for line in done.stderr.splitlines()] == ["error: none*.txt: no file matche"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "none*.txt"], "none*.txt: no file matches"),
        (["--input", "empty.txt"], "the train files hold no document"),
        (["--input", "empty.jsonl"], "the train files hold no document that is not empty; expected one"),
        (["--input", "null.jsonl"], "the train files hold no document that is not empty (skipped 2 records without"),
        (["--input", "corpus/a.jsonl", "--heldout-input", "empty.txt"], "the heldout files hold no document"),
        (["--input", "corpus/a.jsonl", "--heldout-input", "empty.jsonl"], "the heldout files hold no document"),
        (["--input", "corpus/a.jsonl", "--heldout-input", "null.jsonl"], "the heldout files hold no document"),
        (["--input", "null.jsonl", "--strict"], "null.jsonl:1: field 'text' is null; expected a text"),
        (["--input", "corpus/d.txt", "--heldout-input", "corpus/d.txt"], "--input: every file is held out"),
        (["--input", "cut.jsonl.gz"], "cut.jsonl.gz: damaged or not a gzip file"),
        (["--input", "cut.jsonl.zst"], "cut.jsonl.zst: damaged or not a zstd file"),
        (["--input", "bad.jsonl"], "bad.jsonl:2: not valid JSON"),
        (["--input", "corpus/a.jsonl", "--text-field", "body"], "corpus/a.jsonl:1: no field 'body'"),
        (["--input", "corpus/a.jsonl", "--tokenizer", "corpus"], "corpus: no tokenizer; looked for"),
        (["--input", "corpus/a.jsonl", "--workers", "0"], "--workers is 0; expected at least 1"),
        (["--input", "corpus/a.jsonl", "--shard-tokens", "0"], "--shard-tokens is 0; expected at least 1"),
    ],
)
def test_bad_input_is_told_in_one_line_and_leaves_no_output(
    corpus: Path,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    shutil.copytree(tokenizer, tmp_path / "tok")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "null.jsonl").write_text('{"text": null}\n{"text": ""}\n')
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "a"}\n{\n')
    for name in ("b.jsonl.gz", "c.jsonl.zst"):
        data = (corpus / name).read_bytes()
        (tmp_path / f"cut{name[1:]}").write_bytes(data[: len(data) // 2])
    before = leftovers(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "--tokenizer", "tok", "--out", "out", *arguments])
    with pytest.raises(UserError, match=f"^{re.escape(message)}") as caught:
        module.main()
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == before


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_command_that_is_ended_leaves_no_process_and_continues(
    tmp_path: Path, tokenizer: Path, signum: signal.Signals
) -> None:
    line = json.dumps({"text": "\n".join(training_texts())}).encode() + b"\n"
    (tmp_path / "big.jsonl").write_bytes(line * 150)
    command = [sys.executable, str(SCRIPT), "--input", "big.jsonl", "--tokenizer", str(tokenizer), "--out", "out"]
    process = subprocess.Popen([*command, "--workers", "2"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("out.partial/*.npy")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signum)
    stderr = process.communicate()[1]  # returns once no worker holds the pipe either
    if signum == signal.SIGTERM:
        assert process.returncode == 128 + signum
        assert "run the command again to go on" in stderr
    assert leftovers(tmp_path) == ["big.jsonl", "out.partial"]

    done = run(*command[2:], cwd=tmp_path)
    assert done.returncode == 0 and "continuing an interrupted run" in done.stdout
    assert open_shards(tmp_path / "out", "train").num_documents == 150
