"""All-or-nothing output: write beside the target, then rename. Errors of full disks, and of files not fetched."""

import errno
import fcntl
import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from rrt.common.cli import human_bytes
from rrt.errors import UserError

_NO_SPACE = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "larger than files may be (ulimit -f, or the file system)",
}
_LFS_HEAD = b"version https://git-lfs.github.com/spec/"


class NoSpaceError(UserError):
    """Output that found no space.

    Attributes:
        code: the system's error number.
        needed: bytes, where known.
    """

    code: int = errno.ENOSPC
    needed: int | None = None


def free_bytes(path: Path) -> int:
    """Return the bytes free on the disk of `path`, which need not exist."""
    return shutil.disk_usage(_existing(path)).free


def on_one_disk(first: Path, second: Path) -> bool:
    """Tell whether two paths, which need not exist, are on the same disk."""
    return _existing(first).stat().st_dev == _existing(second).stat().st_dev


def _existing(path: Path) -> Path:
    return next((parent for parent in (path, *path.absolute().parents) if parent.exists()), Path("/"))


@contextmanager
def locked_directory(path: Path) -> Iterator[None]:
    """Create `path`, and keep other processes that would lock it out of it.

    Raises:
        UserError: another one has locked it.
    """
    path.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _is_locked(path) from None
        if not path.exists() or not os.path.samestat(os.fstat(descriptor), path.stat()):
            raise _is_locked(path)  # until just now, by a process that has deleted it
        yield
    finally:
        os.close(descriptor)


def _is_locked(path: Path) -> UserError:
    return UserError(f"{path}: another process writes here; wait for it, or name another directory")


@contextmanager
def explain_no_space(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn an error of a write that found no space, which need not name a file, into one that names `path`.

    Args:
        needed: bytes that are written in the block.

    Raises:
        NoSpaceError: there was no space.
    """
    free = free_bytes(path)  # now: what the block leaves open keeps its space until the process ends
    try:
        yield
    except (OSError, NoSpaceError) as error:
        # A file of this output may have explained itself already, by a name that was to change.
        code = error.code if isinstance(error, NoSpaceError) else error.errno
        if code not in _NO_SPACE:
            raise
        needed = needed or getattr(error, "needed", None)
        sizes = f"{human_bytes(free)} were free"
        if needed is not None:
            sizes = f"{human_bytes(needed)} needed, {sizes}"
        explained = NoSpaceError(f"{path}: {_NO_SPACE[code]} ({sizes}); free some or write to another disk")
        explained.code, explained.needed = code, needed
        raise explained from None


def check_no_lfs_pointer(path: Path) -> None:
    """Refuse a file that `git lfs` has left as a pointer to its content.

    Raises:
        UserError: it is one.
    """
    with path.open("rb") as stream:
        head = stream.read(len(_LFS_HEAD))
    if head == _LFS_HEAD:
        raise UserError(
            f"{path}: found a git-lfs pointer; expected the file itself: run git lfs pull in its repository, or "
            "download it anew"
        )


def fsync(path: Path) -> None:
    """Put a file's content, or a directory's names, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output_directory(path: Path, overwrite: bool) -> None:
    """Refuse `path` as a new output directory unless it is absent, empty or `overwrite` is given.

    Call it before long work, so that the refusal comes at the start.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; expected a directory to create")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(f"{path}: already exists and is not empty; name another or add --overwrite")
    if path.resolve().parent == path.resolve():
        raise UserError(f"{path}: is the root of the file system; expected a directory in it")
    existing = next(parent for parent in path.resolve().parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        found = "may not be written to" if existing.is_dir() else "is a file"
        raise UserError(f"{path}: {existing} {found}; expected a directory to create {path.name} in")


def _clean_up_after_killed(path: Path) -> None:
    """Remove what killed processes of this host left beside `path`, and put back what one had moved away."""
    for leftover in (*_leftovers(path, "partial"), *_leftovers(path, "removed")):
        shutil.rmtree(leftover, ignore_errors=True)
    replaced = sorted(_leftovers(path, "replaced"), key=_changed)
    if replaced and not path.exists():
        with suppress(FileNotFoundError):  # another process that cleans up has put it back
            replaced.pop().rename(path)
    for leftover in replaced:
        _discard(path, leftover)


def _changed(leftover: Path) -> int:
    try:
        return leftover.stat().st_ctime_ns
    except FileNotFoundError:  # another process cleans up
        return 0


def _discard(path: Path, replaced: Path) -> None:
    """Delete what was moved away from `path`, under a name that is never put back: a kill may leave half of it."""
    removed = path.with_name(_beside(path, "removed", replaced.name.removeprefix(_beside(path, "replaced", ""))))
    with suppress(OSError):
        shutil.rmtree(replaced.rename(removed), ignore_errors=True)


def _beside(path: Path, kind: str, pid: object) -> str:
    return f".{path.name}.{kind}-{socket.gethostname()}-{pid}"


def _leftovers(path: Path, kind: str) -> Iterator[Path]:
    for leftover in path.parent.glob(glob.escape(_beside(path, kind, "")) + "*"):
        pid = leftover.name.removeprefix(_beside(path, kind, ""))  # no number on a host whose name goes on
        if pid.isdigit() and (int(pid) == os.getpid() or not _is_alive(int(pid))):
            yield leftover


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def atomic_directory(path: Path, overwrite: bool = False, needed: int | None = None) -> Iterator[Path]:
    """Yield a fresh directory beside `path`; it becomes `path` when the block ends without error.

    On any exception, Ctrl-C included, nothing is left behind and an existing `path` is untouched. A process that is
    killed leaves hidden directories beside `path`; the next use removes them, and puts back a `path` that was away.

    Args:
        needed: about the bytes that the block writes, for the message of a full disk.

    Raises:
        UserError: `path` is a file, or a non-empty directory and `overwrite` is false, now or at the end; or there is
            no space for what the block writes.
    """
    with explain_no_space(path, needed), _replaced_at_the_end(path, overwrite) as partial:
        yield partial


@contextmanager
def _replaced_at_the_end(path: Path, overwrite: bool) -> Iterator[Path]:
    # A link to a directory stays one: what it points to is replaced.
    given, path = path, path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, replaced = (path.with_name(_beside(path, kind, os.getpid())) for kind in ("partial", "replaced"))
    _clean_up_after_killed(path)
    check_output_directory(given, overwrite)
    try:
        partial.mkdir()
        yield partial
        for written in [partial, *partial.rglob("*")]:
            fsync(written)
        check_output_directory(path, overwrite)
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
        fsync(path.parent)
    except BaseException:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        elif not partial.exists():  # in place already, or never made
            _discard(path, replaced)
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _discard(path, replaced)


@contextmanager
def atomic_file(path: Path, needed: int | None = None) -> Iterator[BinaryIO]:
    """Yield a file beside `path`; it becomes `path`, on disk, when the block ends without error.

    Use the file's own `write`: numpy's `tofile` hides that the disk is full.

    Args:
        needed: bytes that the block writes, for the message of a full disk.

    Raises:
        UserError: there is no space for what the block writes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with explain_no_space(path, needed):
        try:
            with partial.open("wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            partial.rename(path)
            fsync(path.parent)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def atomic_write(path: Path, text: str) -> None:
    """Write `text` to `path` (UTF-8) so that a reader sees the old file or the new one, on disk when this returns."""
    data = text.encode()
    with atomic_file(path, len(data)) as stream:
        stream.write(data)


def read_json(path: Path) -> dict[str, Any]:
    """Read the JSON object in `path`. Raises `UserError` for an unreadable file, bad JSON or another type."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        check_no_lfs_pointer(path)
        raise UserError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: found a JSON {type(value).__name__}; expected an object")
    return value


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, atomically."""
    atomic_write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_file(path: Path) -> str:
    """Compute the hex SHA-256 of a file's bytes, read in chunks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_output(out: Path, source: Path, overwrite: bool) -> None:
    """Refuse to write over the directory that is read, or an `out` that `check_output_directory` refuses."""
    if source.resolve().is_relative_to(out.resolve()):
        raise UserError(f"{out}: holds the checkpoint that is read, {source}; expected another directory")
    check_output_directory(out, overwrite)
