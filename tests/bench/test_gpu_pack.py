"""bench/gpu_pack.py: binaries that are whole and not stale, a model in pieces, and what it refuses."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench import gpu_pack
from rrt.errors import UserError
from rrt.native import _source_digest
from rrt.ops import build_info

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_pack, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_pack, "OUT", tmp_path / "out")
    monkeypatch.setattr(gpu_pack, "CARRY", tmp_path / "out" / "carry")
    monkeypatch.setattr(gpu_pack, "PIECES", tmp_path / "out" / "pieces")
    monkeypatch.setattr(gpu_pack, "MODEL", tmp_path / "out" / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "rrt").mkdir()
    return tmp_path


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "float32"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.bin").write_bytes(b"not of a model")
    save_file({"w": torch.randn(300, 8), "ids": torch.arange(3)}, folder / "model.safetensors")
    return folder


def run(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["gpu_pack.py", *map(str, flags)])
    gpu_pack.main()


def fake_build(monkeypatch, folder, **changes):
    (folder / "built").mkdir()
    for name in ("_native.so", "_plan.so"):
        (folder / "built" / name).write_bytes(name.encode() * 1000)
    built = dict(library=str(folder / "built" / "_native.so"), plan=str(folder / "built" / "_plan.so"))
    info = replace(build_info(), **{"cuda": True, "stale": False, **built, **changes})
    monkeypatch.setattr("rrt.ops.build_info", lambda: info)
    monkeypatch.setattr(gpu_pack, "tracked_bytes", lambda: 2**20)


def test_what_was_packed_comes_out_as_it_was(folders, model, monkeypatch, capsys):
    fake_build(monkeypatch, folders)
    monkeypatch.setenv("RRT_COMMIT", "not this one")
    (folders / "tasks").mkdir()
    (folders / "tasks" / "piqa.jsonl").write_text("{}")
    run(monkeypatch, "--model", model, "--data", folders / "tasks", "--limit-mib", 2.02)
    printed = capsys.readouterr().out
    pieces = sorted((folders / "out" / "pieces").iterdir())
    assert len(pieces) > 1 and f"model: {len(pieces)} pieces" in printed
    assert (folders / "out" / "carry" / "data" / "piqa.jsonl").is_file()

    assert gpu_pack.unpack() == ["unpacked rrt/_native.so", "unpacked rrt/_plan.so"]
    assert (folders / "rrt" / "_native.so").read_bytes() == b"_native.so" * 1000
    assert gpu_pack.unpack() == []  # they are there
    (folders / "rrt" / "_native.so").write_bytes(b"built again")
    assert gpu_pack.unpack() == [] and (folders / "rrt" / "_native.so").read_bytes() == b"built again"

    late = (pieces[-1] / "piece").rename(folders / "late")
    assert gpu_pack.join_model() == [f"model: {len(pieces) - 1} of {len(pieces)} pieces are here"]
    late.rename(pieces[-1] / "piece")
    assert gpu_pack.join_model() == [f"model: joined from {len(pieces)} pieces"] and gpu_pack.join_model() == []
    joined = folders / "out" / "model"
    assert sorted(path.name for path in joined.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert json.loads((joined / "config.json").read_text()) == {"torch_dtype": "bfloat16"}
    before, after = (load_file(folder / "model.safetensors") for folder in (model, joined))
    assert torch.equal(after["w"], before["w"].bfloat16()) and torch.equal(after["ids"], before["ids"])


def test_a_copy_without_history_and_with_other_times_is_not_stale(tmp_path):
    """What travels are the files alone; the digest in the library is of their bytes."""
    for name in ("csrc", "rrt"):
        ignored = shutil.ignore_patterns("*.so", "tests", "bench", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored, copy_function=shutil.copyfile)
    shutil.copyfile(ROOT / "CMakeLists.txt", tmp_path / "CMakeLists.txt")
    assert _source_digest(tmp_path) == _source_digest(ROOT)
    (tmp_path / "csrc" / "dtype.h").write_text("other")
    assert _source_digest(tmp_path) != _source_digest(ROOT)


def test_pieces_of_two_models_are_not_joined(folders):
    (folders / "archive").write_bytes(b"0123456789")
    pieces = gpu_pack.split_model(folders / "archive", 4)
    assert [(piece / "piece").read_bytes() for piece in pieces] == [b"0123", b"4567", b"89"]
    (pieces[1] / "piece").write_bytes(b"4568")
    assert gpu_pack.join_model() == ["model: the pieces are not of one model: left out"]
    assert not (folders / "out" / "model").exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"library": None}, "rrt/_native.so: found none; expected one of these sources with CUDA: build it first"),
        ({"stale": True}, "rrt/_native.so: found a stale one"),
        ({"cuda": False}, "rrt/_native.so: found one without CUDA"),
        ({"plan": None, "plan_reason": "not built"}, "rrt._plan: found none (not built); expected --python"),
    ],
)
def test_a_build_that_would_be_built_again_there_is_refused(folders, monkeypatch, changes, message):
    fake_build(monkeypatch, folders, **changes)
    with pytest.raises(UserError) as error:
        run(monkeypatch)
    assert message in str(error.value) and not (folders / "out" / "carry").exists()


def test_bad_flags_are_named(folders, model, monkeypatch):
    fake_build(monkeypatch, folders)
    for flags, message in (
        (["--model", folders / "none"], "--model: found .*none; expected a directory"),
        (["--model", folders / "out"], "--model: found .*out; expected an HF directory with config.json"),
        (["--limit-mib", 1], "--limit-mib: found 1; expected 2 or more"),
        (["--python", "no-such-python"], "--python: found no-such-python, which does not run"),
    ):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, *flags)
