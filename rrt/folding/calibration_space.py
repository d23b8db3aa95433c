"""Disk space that a calibrated conversion takes, checked before it starts: a large base needs tens of gigabytes."""

from collections.abc import Collection
from pathlib import Path

import torch

from rrt.common.cli import human_bytes
from rrt.common.files import free_bytes, on_one_disk
from rrt.errors import UserError
from rrt.folding.calibrated import Calibration, keeps_statistics, statistics_bytes
from rrt.folding.calibration import products_dtype
from rrt.model.config import ModelConfig
from rrt.model.loop_linear import loop_linears
from rrt.model.meta import meta_model
from rrt.model.sizes import Sizes


def check_space(model: ModelConfig, after: Sizes, calibration: Calibration, out: Path, workspace: Path) -> None:
    """Refuse a calibrated conversion to `out` for whose files a disk has too little space.

    Args:
        model: of the base.
        after: sizes of the new model.
        workspace: of the conversion's steps. What it holds counts as free: it is used again, or deleted.

    Raises:
        UserError: it would end at a full disk.
    """
    kept_in = calibration.statistics or workspace
    statistics = statistics_bytes(model, calibration) if keeps_statistics(model, calibration) else 0
    streams, steps = _streams_bytes(model, calibration), _steps_bytes(model, after, calibration)
    # Once the statistics of all depths are there, what they were computed from is gone, unless it is needed again.
    is_dropped = statistics > 0 and calibration.metric != "activations"
    if is_dropped and len(list(kept_in.glob("statistics-*.safetensors"))) == model.num_layers:
        streams = 0
    together = statistics + (max(streams, steps) if is_dropped else streams + steps)
    if calibration.statistics is None:
        _check(out, together, {workspace}, "--out on another disk, or a smaller --calibration-tokens")
        return
    remedy = "another --calibration-statistics, or a smaller --calibration-tokens"
    _check(kept_in, streams + statistics, {kept_in}, remedy)
    _check(out, steps, {workspace}, "--out on another disk")
    if on_one_disk(kept_in, out):
        _check(out, together, {kept_in, workspace}, "--out on another disk than --calibration-statistics")


def _check(place: Path, needed: int, used_again: Collection[Path], remedy: str) -> None:
    files = (file for directory in used_again for file in directory.glob("*.safetensors"))
    free = free_bytes(place) + sum(file.stat().st_size for file in files)
    if free < needed:
        raise UserError(
            f"{place}: found {human_bytes(free)} free on its disk; expected {human_bytes(needed)}, which the "
            f"calibration takes there: free some, or name {remedy}"
        )


def _streams_bytes(model: ModelConfig, calibration: Calibration) -> int:
    """Count the bytes of the base's residual streams before and after all depths, and of their gradients."""
    kinds = 1 if calibration.metric == "activations" else 2
    itemsize = products_dtype(calibration.device).itemsize
    return kinds * (model.num_layers + 1) * _num_tokens(calibration) * model.hidden_size * itemsize


def _steps_bytes(model: ModelConfig, after: Sizes, calibration: Calibration) -> int:
    """Count the bytes of the fitted and the refitted linears, of both streams of a refit twice, and of the result."""
    linears = [linear for _, linear in loop_linears(meta_model(model, after.recursion).stack)]
    fitted = sum(linear.in_features * linear.out_features for linear in linears) + 2 * after.lora_params
    streams = 4 * _num_tokens(calibration) * model.hidden_size * torch.float32.itemsize
    return fitted * after.dtype.itemsize + streams + after.bytes


def _num_tokens(calibration: Calibration) -> int:
    return calibration.rows[:, 1:].numel()
