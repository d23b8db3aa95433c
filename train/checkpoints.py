"""Resumable checkpoints of a training run, `step-N/`: sharded, written in the background, complete or not there.

A checkpoint is written as `.step-N`. When every process's files are on disk the first process writes `trainer.json`,
which lists them with their sizes, and then gives the directory its name. So a run killed at any moment leaves complete
checkpoints only, and the list shows if one was damaged later (a file lost or cut short).
"""

import copy
import json
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from rrt.common.cli import human_bytes
from rrt.common.files import atomic_write, free_bytes, fsync, read_json
from rrt.errors import UserError
from train.distributed import AgreedError, raise_everywhere

STATE_FILE = "trainer.json"


def step_directories(out: Path) -> list[tuple[int, Path]]:
    """Return the resumable checkpoints of a run, oldest first."""
    found = [(path.name.removeprefix("step-"), path) for path in out.glob("step-*") if path.is_dir()]
    return sorted((int(number), path) for number, path in found if number.isdigit())


def complete_steps(out: Path) -> list[int]:
    """Return the steps that can be resumed from, oldest first."""
    return [step for step, path in step_directories(out) if find_damage(path) is None]


def find_damage(directory: Path) -> str | None:
    """Describe why `step-N/` cannot be resumed from; None if it is complete."""
    try:
        files = read_json(directory / STATE_FILE).get("files")
    except UserError as error:
        return str(error).removeprefix(f"{directory}/")
    if not isinstance(files, dict):
        return f"{STATE_FILE}: field 'files': found {files!r}; expected the sizes of the checkpoint's files"
    for name, expected in files.items():
        path = directory / name
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            return f"{name}: no such file"
        if found != expected:
            return f"{name}: found {found} bytes; expected {expected}"
    return None


def latest_complete(out: Path, *, warn: bool) -> Path | None:
    """Return the checkpoint to resume from, or None if the run has saved none.

    Args:
        warn: name each damaged checkpoint that is skipped on stderr.

    Raises:
        UserError: there are checkpoints, all of them damaged.
    """
    directories = [path for _, path in reversed(step_directories(out))]
    found = []
    for path in directories:
        missing = find_damage(path)
        if missing is None:
            return path
        found.append(f"{path.name}: {missing}")
        if warn:
            print(f"warning: {path}: damaged ({missing}); trying an older one", file=sys.stderr, flush=True)
    if not found:
        return None
    raise UserError(
        f"{out}: every checkpoint is damaged ({'; '.join(found)}); restore one, name another run.out, or start anew "
        "with --run.overwrite true"
    )


def check_identity(directory: Path, identity: dict[str, Any]) -> None:
    """Check that a checkpoint is of the run with this identity (JSON).

    Raises:
        UserError: it is of another; names the first field in which they differ, with both values.
    """
    path = directory / STATE_FILE
    stored = read_json(path).get("identity", {})
    for name, value in identity.items():
        if stored.get(name) != value:
            field, found, expected = _first_difference(name, stored.get(name), value)
            raise UserError(
                f"{path}: field '{field}': found {found!r}, this run has {expected!r}; "
                "resume with the same, name another run.out or add --run.overwrite true"
            )


def _first_difference(name: str, found: Any, expected: Any) -> tuple[str, Any, Any]:
    """Return the first field, as deep inside as possible, in which two JSON values differ, and its values."""
    if isinstance(found, dict) and isinstance(expected, dict):
        inside = [(f"{name}.{key}", found.get(key), expected.get(key)) for key in found | expected]
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        inside = [(f"{name}[{index}]", *pair) for index, pair in enumerate(zip(found, expected, strict=True))]
    else:
        return name, found, expected
    differing = (_first_difference(*field) for field in inside if field[1] != field[2])
    return next(differing, (name, found, expected))


def load_step(directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Set parameters and optimizer state from `step-N/`, written by any number of processes; returns N.

    The optimizer keeps its settings, which are the recipe's and may have changed since.
    """
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    model_state, optimizer_state = get_state_dict(model, optimizer)
    try:
        load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=directory)
    except CheckpointException as error:
        raise AgreedError(f"{directory}: cannot be read ({_causes(error)})") from None
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)
    return int(directory.name.removeprefix("step-"))


class TrainingStateWriter:
    """Writes the resumable checkpoints of one run and deletes all but its last `keep` complete ones.

    In the background they are written from a copy in host memory, kept until then: 12 bytes per parameter (weight and
    two moments in fp32), divided by the processes that share the model. One is written at a time: the next waits for
    it, and so must the end of the run.

    Args:
        out: the run's directory.
        background: write while training goes on; otherwise `save` returns when the checkpoint is complete.
    """

    def __init__(self, out: Path, *, keep: int, background: bool) -> None:
        self._out, self._keep, self._background = out, keep, background
        # A group of its own, as the main thread's collectives go on meanwhile; on the CPU, where the copy is.
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def save(
        self,
        step: int,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        delete_old: bool = True,
    ) -> None:
        """Write `step-<step>/`, once the checkpoint before it is complete. A collective.

        Args:
            state: further content of `trainer.json`, JSON values; the first process's counts.
            delete_old: delete older checkpoints than the last `keep` afterwards.

        Raises:
            AgreedError: a process could not write this checkpoint, or the one before; earlier ones are intact.
        """
        self.wait()
        model_state, optimizer_state = get_state_dict(model, optimizer)
        tensors = {"model": model_state, "optimizer": optimizer_state}
        if self._background:
            tensors = _host_copy(tensors)
        self._writing = self._thread.submit(self._write, step, tensors, copy.deepcopy(state), delete_old)
        if not self._background:
            self.wait()

    @property
    def has_failed(self) -> bool:
        """True if this process could not write the current checkpoint; `wait` raises the reason."""
        return self._writing is not None and self._writing.done() and self._writing.exception() is not None

    def wait(self) -> None:
        """Return when the last checkpoint is complete. A collective.

        Raises:
            AgreedError: a process could not write it; earlier checkpoints are intact.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            raise_everywhere(writing.result)

    def close(self) -> None:
        """Wait for the checkpoint that is being written and ignore its errors."""
        self._thread.shutdown()

    def _write(self, step: int, tensors: dict[str, Any], state: dict[str, Any], delete_old: bool) -> None:
        target, partial = self._out / f"step-{step}", self._out / f".step-{step}"
        is_main = dist.get_rank() == 0
        try:
            try:
                save(tensors, checkpoint_id=partial, process_group=self._group)
            except CheckpointException as error:  # raised in all processes, with the errors of each
                raise OSError(_causes(error)) from None
            if is_main:
                self._complete(partial, target, {"step": step, **state})
                if delete_old:
                    self._delete_old()
        except (OSError, UserError) as error:
            if is_main:
                shutil.rmtree(partial, ignore_errors=True)
            cause, free, needed = str(error), free_bytes(self._out), _num_bytes(tensors)
            if free < needed:
                # How torch's archives may report a write that fell short; its number says nothing to a user.
                cause = "No space left on device" if "inline_container" in cause else cause
                cause += f": {human_bytes(needed)} needed, {human_bytes(free)} free"
            raise UserError(f"{target}: cannot be written ({cause}); earlier checkpoints are intact") from None

    def _complete(self, partial: Path, target: Path, state: dict[str, Any]) -> None:
        files = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        atomic_write(partial / STATE_FILE, json.dumps({**state, "files": files}, indent=2))
        if target.exists():  # damaged, otherwise the run would have resumed from it
            _remove(target)
        partial.rename(target)
        fsync(self._out)

    def _delete_old(self) -> None:
        complete = complete_steps(self._out)
        for number, path in step_directories(self._out):
            if number < complete[-self._keep :][0]:
                try:
                    _remove(path)
                except OSError as error:  # the new checkpoint is complete all the same
                    print(f"warning: {path}: cannot be deleted ({error})", file=sys.stderr, flush=True)


def _remove(directory: Path) -> None:
    """Delete a checkpoint under a hidden name, so that a half-deleted one does not look like a checkpoint."""
    shutil.rmtree(directory.rename(directory.with_name(f".{directory.name}.removed")))


def _host_copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _host_copy(item) for key, item in value.items()}
    return value


def _num_bytes(value: Any) -> int:
    """Count the bytes of all tensors in nested dicts, of sharded ones over all processes."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_num_bytes, value.values())) if isinstance(value, dict) else 0


def _causes(error: CheckpointException) -> str:
    return "; ".join(sorted({str(failure[0]) for failure in error.failures.values()}))
