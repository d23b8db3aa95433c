"""Finished steps beside an output: whole or absent, kept for the same conversion only."""

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from rrt.common.files import NoSpaceError
from rrt.errors import UserError
from rrt.folding.workspace import Workspace


def test_steps_are_kept_for_the_same_fingerprint_only(tmp_path):
    workspace = Workspace(tmp_path / "work", "a")
    workspace.save("step", {"x": torch.arange(6).view(2, 3).T, "y": torch.tensor([1.5], dtype=torch.bfloat16)})
    again = Workspace(tmp_path / "work", "a")
    assert again.has("step") and not again.has("other")
    assert again.load("step")["x"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert again.load("step")["y"].dtype == torch.bfloat16
    assert not Workspace(tmp_path / "work", "b").has("step")


def test_drop_and_remove_delete(tmp_path):
    workspace = Workspace(tmp_path / "work", "a")
    workspace.save("step", {"x": torch.zeros(1)})
    workspace.drop("step")
    workspace.drop("step")
    assert not workspace.has("step")
    workspace.remove()
    assert not (tmp_path / "work").exists()


def test_an_interrupted_save_leaves_no_step(tmp_path, monkeypatch):
    workspace = Workspace(tmp_path / "work", "a")

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("rrt.folding.workspace.fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        workspace.save("step", {"x": torch.zeros(1)})
    assert not Workspace(tmp_path / "work", "a").has("step")


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ("No space left on device (os error 28)", NoSpaceError, "step.safetensors: no space left on the disk"),
        ("Permission denied (os error 13)", PermissionError, "Permission denied"),
        ("of no known number", OSError, "of no known number"),
    ],
)
def test_a_failed_save_says_what_failed(words, error, message, tmp_path, monkeypatch):
    workspace = Workspace(tmp_path / "work", "a")

    def failing(*_):
        raise SafetensorError(f"Error while serializing: IoError: {words}")

    monkeypatch.setattr("rrt.folding.workspace.save_file", failing)
    with pytest.raises(error, match=message):
        workspace.save("step", {"x": torch.zeros(1)})
    assert not workspace.has("step")


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="is not of a conversion"):
        Workspace(tmp_path / "work", "a")
    assert (tmp_path / "work" / "mine.txt").read_text() == "mine"


def test_what_a_kill_leaves_is_taken_up_again(tmp_path):
    (tmp_path / "work").mkdir()  # before its fingerprint was written
    workspace = Workspace(tmp_path / "work", "a")
    workspace.save("step", {"x": torch.zeros(1)})
    (tmp_path / "work" / "other.partial").write_bytes(b"part")
    workspace = Workspace(tmp_path / "work", "b")
    assert not workspace.has("step") and not list((tmp_path / "work").glob("*.partial"))


def test_the_fingerprint_goes_last(tmp_path, monkeypatch):
    workspace = Workspace(tmp_path / "work", "a")
    workspace.save("step", {"x": torch.zeros(1)})

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("rrt.folding.workspace.shutil.rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        workspace.remove()
    assert not Workspace(tmp_path / "work", "a").has("step")


@pytest.mark.parametrize("end", ["removed", "other conversion"])
def test_steps_that_were_half_deleted_are_not_taken_up_again(end, tmp_path, monkeypatch):
    workspace = Workspace(tmp_path / "work", "a")
    for name in ("orders", "fit", "refit"):
        workspace.save(name, {"x": torch.zeros(1)})
    unlink, deleted = Path.unlink, []

    def interrupted(path, **_):
        if deleted:
            raise KeyboardInterrupt
        deleted.append(path)
        unlink(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", interrupted)
        with pytest.raises(KeyboardInterrupt):
            workspace.remove() if end == "removed" else Workspace(tmp_path / "work", "b")
    again = Workspace(tmp_path / "work", "a")
    assert not any(again.has(name) for name in ("orders", "fit", "refit"))
