"""Resumable checkpoints of a training run: `step-N/`, sharded, whole or not there."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from rrt.files import atomic_write
from train.distributed import AgreedError, from_main

STATE_FILE = "trainer.json"


def step_directories(out: Path) -> list[tuple[int, Path]]:
    """Complete resumable checkpoints of a run, oldest first. They get their name when they are complete."""
    found = [(path.name.removeprefix("step-"), path) for path in out.glob("step-*") if path.is_dir()]
    return sorted((int(number), path) for number, path in found if number.isdigit())


def load_step(directory: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Set parameters and optimizer state from `step-N/`, written by any number of processes; returns N.

    The optimizer's settings stay as they are: they are the recipe's, which may have changed.
    """
    settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    model_state, optimizer_state = get_state_dict(model, optimizer)
    load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=directory)
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    for group, setting in zip(optimizer.param_groups, settings, strict=True):
        group.update(setting)
    return int(directory.name.removeprefix("step-"))


def save_step(
    target: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> None:
    """Write `step-N/` under a hidden name, rename it when every process is done, and delete all but the last `keep`.

    A collective. `state` is the first process's, and becomes the checkpoint's `trainer.json`.

    Raises:
        AgreedError: a process could not write; earlier checkpoints are as they were.
    """
    partial = target.with_name(f".{target.name}")
    model_state, optimizer_state = get_state_dict(model, optimizer)
    try:
        save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=partial)
    except CheckpointException as error:  # raised in all processes, with what each of them met
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        causes = "; ".join(sorted({str(failure[0]) for failure in error.failures.values()}))
        raise AgreedError(f"{target}: cannot be written ({causes}); earlier checkpoints are intact") from None

    def complete() -> None:
        atomic_write(partial / STATE_FILE, json.dumps(state, indent=2))
        partial.rename(target)
        for _, old in step_directories(target.parent)[:-keep]:
            # Under a hidden name first: a half-deleted one must not look complete.
            shutil.rmtree(old.rename(old.with_name(f".{old.name}")))

    from_main(complete)
