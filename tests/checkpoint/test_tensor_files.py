"""Tensor files of every layout, well formed and damaged, and sharded writing."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from rrt.checkpoint.tensor_files import SafetensorsWriter, TensorFiles
from rrt.common.dtypes import dtype_name, parse_dtype
from rrt.errors import UserError
from tests.util.files import LFS_POINTER

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c.d": torch.tensor(3.0, dtype=torch.float16),
    "mask": torch.ones(2, 2, dtype=torch.bool),
    "byte": torch.arange(3, dtype=torch.uint8),
}


def write_index(directory, name, weight_map):
    (directory / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_layout(directory, layout, tensors=TENSORS):
    """Write `tensors` into `directory` the way `layout` says."""
    shards = [dict(list(tensors.items())[:2]), dict(list(tensors.items())[2:])]
    if layout == "safetensors":
        save_file(tensors, directory / "model.safetensors")
    elif layout in ("bin", "legacy-bin"):
        torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=layout == "bin")
    elif layout == "safetensors-shards":
        names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for name, shard in zip(names, shards, strict=True):
            save_file(shard, directory / name)
        index = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        write_index(directory, "model.safetensors", index)
    else:
        names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
        for name, shard in zip(names, shards, strict=True):
            torch.save(shard, directory / name)
        index = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        write_index(directory, "pytorch_model.bin", index)


def refusal(directory):
    with pytest.raises(UserError) as error:
        TensorFiles(directory)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("layout", ["safetensors", "safetensors-shards", "bin", "legacy-bin", "bin-shards"])
def test_every_layout_gives_the_tensors_their_shapes_and_dtypes(tmp_path, layout):
    write_layout(tmp_path, layout)
    files = TensorFiles(tmp_path)
    assert sorted(files) == sorted(TENSORS)
    for key, tensor in TENSORS.items():
        assert (files.shape(key), files.dtype(key)) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(files.get(key), tensor)
        assert files.file(key).is_file()
    assert "a" in files and "z" not in files


def test_safetensors_are_preferred_to_pickles(tmp_path):
    write_layout(tmp_path, "bin", {"old": torch.zeros(1)})
    write_layout(tmp_path, "safetensors", {"new": torch.zeros(1)})
    assert list(TensorFiles(tmp_path)) == ["new"]


def test_a_directory_without_weights_is_refused(tmp_path):
    assert refusal(tmp_path).startswith(f"{tmp_path}: no weights; expected model.safetensors, ")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_its_code_not_run(tmp_path, zipped):
    path, proof = tmp_path / "pytorch_model.bin", tmp_path / "proof"
    torch.save({"a": torch.zeros(1), "b": Malicious(proof)}, path, _use_new_zipfile_serialization=zipped)
    assert refusal(tmp_path).startswith(f"{path}: refused: expected a pickle of tensors only")
    assert not proof.exists()
    torch.load(path, weights_only=False)  # the file does what it is refused for
    assert proof.exists()


def test_a_plain_pickle_and_other_contents_are_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(pickle.dumps(Malicious(tmp_path / "proof")))
    refusal(tmp_path)
    assert not (tmp_path / "proof").exists()
    torch.save([torch.zeros(1)], path)
    assert refusal(tmp_path) == f"{path}: found a pickled list; expected a dict of tensors"
    torch.save({"a": torch.zeros(1), "epoch": 3}, path)
    assert refusal(tmp_path) == f"{path}: 'epoch': found int; expected a tensor"


@pytest.mark.parametrize("layout", ["safetensors", "bin", "legacy-bin"])
def test_truncated_files_are_refused(tmp_path, layout):
    write_layout(tmp_path, layout, {"a": torch.randn(64, 64), "b": torch.randn(64)})
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    for size in (0, 3, 9, 200, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        assert refusal(tmp_path).startswith(f"{path}: ")


@pytest.mark.parametrize("layout", ["safetensors", "bin", "legacy-bin"])
def test_damaged_headers_are_refused_in_one_line_or_harmless(tmp_path, layout):
    write_layout(tmp_path, layout, {"a": torch.zeros(2, 2), "b": torch.zeros(4)})
    (path,) = tmp_path.iterdir()
    content, refused = path.read_bytes(), 0
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        damaged = bytearray(content)
        for position in torch.randint(0, min(len(content), 600), (3,), generator=generator).tolist():
            damaged[position] = (damaged[position] + 77) % 256
        path.write_bytes(damaged)
        try:
            TensorFiles(tmp_path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error)
    assert refused > 10


def test_a_dtype_that_torch_lacks_is_named(tmp_path):
    header = json.dumps({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    assert "tensor 'a': found dtype F4; expected one of F64, F32, F16, BF16" in refusal(tmp_path)


@pytest.mark.parametrize("layout", ["safetensors-shards", "bin-shards"])
def test_shards_must_hold_what_the_index_says(tmp_path, layout):
    write_layout(tmp_path, layout)
    (index_path,) = tmp_path.glob("*.index.json")
    index = json.loads(index_path.read_text())["weight_map"]
    name = index_path.name.removesuffix(".index.json")
    first, second = sorted(set(index.values()))

    write_index(tmp_path, name, index | {"ghost": second})
    assert refusal(tmp_path) == f"{tmp_path / second}: tensor 'ghost' is missing; {index_path.name} places it there"
    write_index(tmp_path, name, index | {"a": second})
    assert refusal(tmp_path) == f"{tmp_path / second}: tensor 'a' is missing; {index_path.name} places it there"
    write_index(tmp_path, name, index | {"a": f"../{tmp_path.name}/{first}"})
    assert "field 'weight_map': found '../" in refusal(tmp_path)
    write_index(tmp_path, name, ["a"])
    assert refusal(tmp_path) == f"{index_path}: field 'weight_map': expected an object of file names"
    index_path.write_text("{}")
    assert refusal(tmp_path) == f"{index_path}: field 'weight_map': expected an object of file names"
    write_index(tmp_path, name, index)
    (tmp_path / second).unlink()
    assert refusal(tmp_path) == f"{tmp_path / second}: no such file; {index_path.name} names it"


@pytest.mark.parametrize("right", [0, 1])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_index_decides_between_copies_of_a_tensor(tmp_path, kind, right):
    single = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    names = [f"x.{kind}", f"y.{kind}"]
    for number, name in enumerate(names):
        # The stale copy has another shape and dtype.
        copy = torch.full((2,), 7.0) if number == right else torch.ones(3, 3, dtype=torch.bfloat16)
        tensors = {"a": copy, f"own {number}": torch.zeros(1)}
        save_file(tensors, tmp_path / name) if kind == "safetensors" else torch.save(tensors, tmp_path / name)
    write_index(tmp_path, single, {"a": names[right], "own 0": names[0], "own 1": names[1]})
    files = TensorFiles(tmp_path)
    assert sorted(files) == ["a", "own 0", "own 1"] and files.file("a").name == names[right]
    assert (files.shape("a"), files.dtype("a")) == ((2,), torch.float32)
    assert torch.equal(files.get("a"), torch.full((2,), 7.0))


def test_a_tensor_in_two_shards_that_the_index_leaves_out_is_refused(tmp_path):
    for name in ("x.safetensors", "y.safetensors"):
        save_file({"a": torch.zeros(1), name: torch.zeros(1)}, tmp_path / name)
    write_index(tmp_path, "model.safetensors", {name: name for name in ("x.safetensors", "y.safetensors")})
    assert refusal(tmp_path) == f"{tmp_path / 'y.safetensors'}: tensor 'a' is also in x.safetensors"


@pytest.mark.parametrize("layout", ["safetensors", "safetensors-shards", "bin", "bin-shards"])
def test_a_git_lfs_pointer_in_place_of_weights_is_named(tmp_path, layout):
    write_layout(tmp_path, layout)
    path = max(path for path in tmp_path.iterdir() if path.suffix != ".json")
    path.write_text(LFS_POINTER)
    assert refusal(tmp_path).startswith(f"{path}: found a git-lfs pointer; expected the file itself: run git lfs pull")


def test_a_git_lfs_pointer_in_place_of_the_index_is_named(tmp_path):
    write_layout(tmp_path, "safetensors-shards")
    (path,) = tmp_path.glob("*.index.json")
    path.write_text(LFS_POINTER)
    assert refusal(tmp_path).startswith(f"{path}: found a git-lfs pointer;")


def write(directory, tensors, max_shard_bytes):
    directory.mkdir()
    writer = SafetensorsWriter(directory, max_shard_bytes)
    for key, tensor in tensors.items():
        writer.add(key, tensor)
    writer.finish()


def test_up_to_the_limit_one_file_is_written(tmp_path):
    tensors = {str(i): torch.full((10,), float(i)) for i in range(5)}
    write(tmp_path / "out", tensors, max_shard_bytes=200)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()


def test_beyond_the_limit_shards_with_a_correct_index_are_written(tmp_path):
    tensors = {str(i): torch.full((10,), float(i)) for i in range(5)} | {
        "large": torch.arange(100.0),
        "last": torch.ones(1),
    }
    write(tmp_path / "out", tensors, max_shard_bytes=100)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-00005.safetensors" for i in range(1, 6)]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert set(index["weight_map"].values()) == set(shards) and set(index["weight_map"]) == set(tensors)
    for name in shards:
        stored = load_file(tmp_path / "out" / name)
        assert {key for key, place in index["weight_map"].items() if place == name} == set(stored)
        assert len(stored) == 1 or sum(tensor.nbytes for tensor in stored.values()) <= 100
    files = TensorFiles(tmp_path / "out")
    assert all(torch.equal(files.get(key), tensor) for key, tensor in tensors.items())


def test_views_and_strided_tensors_are_written_as_they_read(tmp_path):
    whole = torch.randn(6, 4)
    tensors = {"rows": whole[1:3], "columns": whole[:, 1], "transposed": whole.t()}
    write(tmp_path / "out", tensors, max_shard_bytes=10**6)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[key], tensor) for key, tensor in tensors.items())


def test_dtype_names():
    assert parse_dtype("bf16") is parse_dtype("bfloat16") is torch.bfloat16
    assert dtype_name(torch.float32) == "float32" and parse_dtype("float32") is torch.float32
    with pytest.raises(UserError, match=r"dtype: found 'int8'; expected one of float32, bfloat16"):
        parse_dtype("int8")


def test_more_tensors_than_the_header_holds_go_to_another_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(SafetensorsWriter, "HEADER_BYTES", 2**10)
    tensors = {f"layer.{number}": torch.randn(3, number % 5).to(torch.bfloat16) for number in range(40)}
    tensors["scalar"] = torch.tensor(1.5)
    writer = SafetensorsWriter(tmp_path)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    files = TensorFiles(tmp_path)
    assert len({files.file(name) for name in files}) > 3
    assert set(files) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(files.get(name), tensor) and files.dtype(name) == tensor.dtype
