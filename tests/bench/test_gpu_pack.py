"""bench/gpu_pack.py: binaries that are whole and not stale, a model without its weights, and what it refuses."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bench import gpu_pack
from rrt.checkpoint.source import load_model
from rrt.errors import UserError
from rrt.native import _source_digest
from rrt.ops import build_info

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_pack, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_pack, "CARRY", tmp_path / "out" / "carry")
    monkeypatch.setattr(gpu_pack, "MODEL", tmp_path / "out" / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "rrt").mkdir()
    return tmp_path


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "hf"
    folder.mkdir()
    sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 1, **sizes}
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"large")
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
    run(monkeypatch, "--model", model)
    carry = folders / "out" / "carry"
    assert sorted(path.name for path in (carry / "model").iterdir()) == ["config.json", "tokenizer.json"]

    assert gpu_pack.unpack() == ["unpacked rrt/_native.so", "unpacked rrt/_plan.so"]
    assert (folders / "rrt" / "_native.so").read_bytes() == b"_native.so" * 1000
    assert gpu_pack.unpack() == []  # they are there
    (folders / "rrt" / "_native.so").write_bytes(b"built again")
    assert gpu_pack.unpack() == [] and (folders / "rrt" / "_native.so").read_bytes() == b"built again"

    run(monkeypatch, "--write-model")
    made = folders / "out" / "model"
    names = sorted(path.name for path in made.iterdir() if path.name != "generation_config.json")
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    weights = load_file(made / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert weights["model.layers.1.mlp.up_proj.weight"].std() > 0
    loaded = load_model(made, torch.bfloat16)
    assert sum(parameter.numel() for parameter in loaded.parameters()) > 0


def test_a_copy_without_history_and_with_other_times_is_not_stale(tmp_path):
    """What travels are the files alone; the digest in the library is of their bytes."""
    for name in ("csrc", "rrt"):
        ignored = shutil.ignore_patterns("*.so", "tests", "bench", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored, copy_function=shutil.copyfile)
    shutil.copyfile(ROOT / "CMakeLists.txt", tmp_path / "CMakeLists.txt")
    assert _source_digest(tmp_path) == _source_digest(ROOT)
    (tmp_path / "csrc" / "dtype.h").write_text("other")
    assert _source_digest(tmp_path) != _source_digest(ROOT)


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
        (["--limit-mib", 1], "--limit-mib: found 1; expected 1.0 or more"),
        (["--python", "no-such-python"], "--python: found no-such-python, which does not run"),
    ):
        with pytest.raises(UserError, match=message):
            run(monkeypatch, *flags)
