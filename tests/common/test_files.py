"""All-or-nothing output, and JSON that is read or refused in one line."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rrt.common.files import atomic_directory, atomic_write, check_output_directory, read_json, sha256_file, write_json
from rrt.errors import UserError
from tests.util.files import LFS_POINTER, files_of_at_most


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def old(tmp_path):
    """An output directory from an earlier run."""
    directory = tmp_path / "out"
    directory.mkdir()
    (directory / "old.txt").write_text("old")
    return directory


def test_a_directory_appears_when_complete_with_its_parents(tmp_path):
    out = tmp_path / "a" / "b" / "out"
    with atomic_directory(out) as partial:
        (partial / "new.txt").write_text("new")
        assert not out.exists() and partial.parent == out.parent
    assert names(out) == ["new.txt"] and names(out.parent) == ["out"]


def test_an_empty_directory_is_filled_and_a_full_one_refused(tmp_path, old):
    (tmp_path / "empty").mkdir()
    with atomic_directory(tmp_path / "empty") as partial:
        (partial / "new.txt").write_text("new")
    assert names(tmp_path / "empty") == ["new.txt"]
    with (
        pytest.raises(UserError, match=r"out: already exists and is not empty; .* add --overwrite"),
        atomic_directory(old),
    ):
        pytest.fail("work began")
    assert names(old) == ["old.txt"] and names(tmp_path) == ["empty", "out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_the_way_is_refused(tmp_path, overwrite):
    (tmp_path / "out").write_text("file")
    with pytest.raises(UserError, match="out: is a file"), atomic_directory(tmp_path / "out", overwrite):
        pytest.fail("work began")
    assert (tmp_path / "out").read_text() == "file"


def test_overwrite_swaps_the_whole_directory_at_the_end(tmp_path, old):
    with atomic_directory(old, overwrite=True) as partial:
        (partial / "new.txt").write_text("new")
        assert names(old) == ["old.txt"]
    assert names(old) == ["new.txt"] and names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_nothing_behind_and_keeps_the_old(tmp_path, old, error):
    for out, overwrite in ((old, True), (tmp_path / "fresh", False)):
        with pytest.raises(error), atomic_directory(out, overwrite) as partial:
            (partial / "half.txt").write_text("half")
            raise error
    assert names(tmp_path) == ["out"] and names(old) == ["old.txt"]


def test_an_interrupt_between_the_two_renames_puts_the_old_back(tmp_path, old, monkeypatch):
    rename = type(old).rename

    def interrupted(path, target):
        if ".partial-" in path.name:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(type(old), "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), atomic_directory(old, overwrite=True) as partial:
        (partial / "new.txt").write_text("new")
    monkeypatch.undo()
    assert names(tmp_path) == ["out"] and names(old) == ["old.txt"]


def test_output_that_another_process_wrote_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="out: already exists"), atomic_directory(out) as partial:
        (partial / "ours.txt").write_text("ours")
        out.mkdir()
        (out / "theirs.txt").write_text("theirs")
    assert names(tmp_path) == ["out"] and names(out) == ["theirs.txt"]


def test_a_link_to_a_directory_stays_a_link(tmp_path, old):
    (tmp_path / "link").symlink_to(old)
    with atomic_directory(tmp_path / "link", overwrite=True) as partial:
        (partial / "new.txt").write_text("new")
    assert (tmp_path / "link").is_symlink() and names(old) == ["new.txt"]
    assert names(tmp_path) == ["link", "out"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "sub" / "x.txt"
    atomic_write(path, "größe")
    assert path.read_text(encoding="utf-8") == "größe"
    with pytest.raises(UnicodeEncodeError):
        atomic_write(path, "half \ud800")
    assert path.read_text(encoding="utf-8") == "größe" and names(path.parent) == ["x.txt"]


def test_json_goes_round_and_bad_json_is_one_line(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": [1, "ö", None]})
    assert read_json(path) == {"a": [1, "ö", None]}
    for content, message in (
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "found a JSON list; expected an object"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"x.json: {message}") as error:
            read_json(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="absent: no such file"):
        read_json(tmp_path / "absent")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path)


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def run_until_killed(path, at):
    """Overwrite `path` in another process, which is killed before its rename number `at` (from 0)."""
    code = (
        "import os, pathlib, signal, sys\n"
        "from rrt.common.files import atomic_directory\n"
        "rename, left = pathlib.Path.rename, int(sys.argv[2])\n"
        "def killed(self, target):\n"
        "    global left\n"
        "    left -= 1\n"
        "    return rename(self, target) if left >= 0 else os.kill(os.getpid(), signal.SIGKILL)\n"
        "pathlib.Path.rename = killed\n"
        "with atomic_directory(pathlib.Path(sys.argv[1]), overwrite=True) as partial:\n"
        "    (partial / 'new.txt').write_text('new')\n"
    )
    process = subprocess.run([sys.executable, "-c", code, str(path), str(at)])
    assert process.returncode == -signal.SIGKILL


def test_old_output_comes_back_after_a_kill_between_the_two_renames(tmp_path, old):
    run_until_killed(old, 1)
    assert not old.exists() and len(names(tmp_path)) == 2
    with pytest.raises(UserError, match=r"out: already exists and is not empty"), atomic_directory(old):
        pytest.fail("work began")
    assert names(tmp_path) == ["out"] and names(old) == ["old.txt"]


def test_replaced_output_of_a_killed_process_is_removed_by_the_next_run(tmp_path, old):
    run_until_killed(old, 1)
    (replaced,) = tmp_path.glob(".out.replaced-*")
    old.mkdir()
    (old / "newer.txt").write_text("newer")
    with atomic_directory(old, overwrite=True) as partial:
        assert names(old) == ["newer.txt"] and not replaced.exists()
        (partial / "newest.txt").write_text("newest")
    assert names(tmp_path) == ["out"] and names(old) == ["newest.txt"]


def test_half_deleted_output_of_a_killed_process_is_never_put_back(tmp_path, old):
    (old / "other.txt").write_text("other")
    code = (
        "import os, pathlib, shutil, signal, sys\n"
        "from rrt.common.files import atomic_directory\n"
        "def killed(path, ignore_errors=False):\n"
        "    (pathlib.Path(path) / 'other.txt').unlink()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "shutil.rmtree = killed\n"
        "with atomic_directory(pathlib.Path(sys.argv[1]), overwrite=True) as partial:\n"
        "    (partial / 'new.txt').write_text('new')\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(old)]).returncode == -signal.SIGKILL
    (half_deleted,) = tmp_path.glob(".out.*")
    assert names(old) == ["new.txt"] and names(half_deleted) == ["old.txt"]
    old.rename(tmp_path / "elsewhere")
    with atomic_directory(old):
        assert not old.exists() and not half_deleted.exists()
    assert names(tmp_path) == ["elsewhere", "out"] and names(old) == []


@pytest.mark.parametrize("there", [True, False])
def test_a_leftover_that_another_process_takes_away_meanwhile_is_no_error(tmp_path, old, monkeypatch, there):
    gone = tmp_path / f".out.replaced-{socket.gethostname()}-{os.getpid()}"
    monkeypatch.setattr("rrt.common.files._leftovers", lambda path, kind: [gone] if kind == "replaced" else [])
    out = old if there else tmp_path / "fresh"
    with atomic_directory(out, overwrite=True) as partial:
        (partial / "new.txt").write_text("new")
    assert names(out) == ["new.txt"]


def test_the_new_name_is_on_disk(tmp_path, old, monkeypatch):
    synced = []
    monkeypatch.setattr("rrt.common.files.fsync", lambda path: synced.append((path, sorted(names(tmp_path)))))
    with atomic_directory(old, overwrite=True):
        pass
    path, then = synced[-1]
    assert path == tmp_path and "out" in then and not any(".partial-" in name for name in then)


def test_a_place_that_takes_no_directory_is_refused_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("file")
    with pytest.raises(UserError, match=f"out: {tmp_path / 'file'} is a file; expected a directory to create out in"):
        check_output_directory(tmp_path / "file" / "a" / "out", overwrite=False)
    check_output_directory(tmp_path / "new" / "out", overwrite=False)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    with pytest.raises(UserError, match=f"out: {tmp_path} may not be written to; expected a directory to create out"):
        check_output_directory(tmp_path / "new" / "out", overwrite=False)


@pytest.mark.parametrize("nested", [False, True])
def test_output_that_finds_no_space_is_one_line_with_its_own_path_and_leaves_nothing(tmp_path, old, nested):
    with (
        pytest.raises(UserError) as caught,
        files_of_at_most(1000),
        atomic_directory(old, overwrite=True, needed=3 << 20) as partial,
    ):
        if nested:
            write_json(partial / "config.json", ["text"] * 1000)
        else:
            (partial / "weights").write_bytes(bytes(2000))
    message = str(caught.value)
    assert message.startswith(f"{old}: larger than files may be (ulimit -f, or the file system) (3.00 MiB needed, ")
    assert message.endswith(" were free); free some or write to another disk") and "\n" not in message
    assert names(tmp_path) == ["out"] and names(old) == ["old.txt"]


def test_a_file_that_finds_no_space_stays_as_it_was(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    message = r"a\.json: larger than files may be .*\(1\.95 KiB needed, .* were free\)"
    with pytest.raises(UserError, match=message), files_of_at_most(1000):
        atomic_write(tmp_path / "a.json", "x" * 2000)
    assert read_json(tmp_path / "a.json") == {"old": 1} and names(tmp_path) == ["a.json"]


def test_json_that_git_lfs_has_not_fetched_is_named(tmp_path):
    (tmp_path / "config.json").write_text(LFS_POINTER)
    with pytest.raises(UserError, match=r"config\.json: found a git-lfs pointer; .* git lfs pull"):
        read_json(tmp_path / "config.json")


def test_leftovers_of_killed_processes_are_removed_and_those_of_living_ones_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid in (dead.pid, os.getppid()):
        leftover = tmp_path / f".out.partial-{socket.gethostname()}-{pid}"
        leftover.mkdir()
        (leftover / "weights").write_text("half")
    (tmp_path / ".outer.partial-notes").mkdir()
    other_host = f".out.partial-{socket.gethostname()}-two-{dead.pid}"
    (tmp_path / other_host).mkdir()
    with atomic_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("whole")
    left = [f".out.partial-{socket.gethostname()}-{os.getppid()}", other_host, ".outer.partial-notes", "out"]
    assert names(tmp_path) == sorted(left)


def test_a_signal_as_soon_as_the_directory_exists_leaves_nothing(tmp_path, monkeypatch):
    make = Path.mkdir

    def make_and_stop(path, *args, **options):
        make(path, *args, **options)
        if ".partial-" in path.name:
            raise SystemExit(143)

    monkeypatch.setattr(Path, "mkdir", make_and_stop)
    with pytest.raises(SystemExit), atomic_directory(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())
