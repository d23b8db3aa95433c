"""Reports of a training run: a progress line, `metrics.jsonl`, TensorBoard, and optionally W&B."""

import importlib
import json
import math
import resource
import time
import uuid
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from rrt.common.cli import human_bytes
from rrt.common.files import atomic_write, explain_no_space
from rrt.errors import UserError

METRICS_FILE = "metrics.jsonl"
_WANDB_ID_FILE = "wandb-id"


class Meter:
    """Speed, utilisation and time left of a run.

    Args:
        step, steps: optimizer steps done and to do in all.
        flops_per_token: of training, forward and backward.
        peak_flops: of all devices together; None if unknown, and then there is no MFU.
    """

    def __init__(
        self, step: int, steps: int, tokens_per_step: int, flops_per_token: float, peak_flops: float | None
    ) -> None:
        self._steps, self._tokens_per_step = steps, tokens_per_step
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._first, self._began = step, time.perf_counter()
        self.restart(step)

    def restart(self, step: int) -> None:
        """Measure the next speed from here, so that it leaves out what came before, such as a checkpoint."""
        self._window_first, self._window_began = step, time.perf_counter()

    def read(self, step: int) -> dict[str, float]:
        """Return speed and utilisation since the last reading, and the time left."""
        now = time.perf_counter()
        speed = (step - self._window_first) * self._tokens_per_step / (now - self._window_began)
        self._window_first, self._window_began = step, now
        reading = {"tokens_per_second": speed}
        if self._peak_flops is not None:
            reading["mfu"] = speed * self._flops_per_token / self._peak_flops
        reading["eta_seconds"] = (now - self._began) / (step - self._first) * (self._steps - step)
        return reading


def memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process on its device: allocated on CUDA, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def progress_line(record: dict[str, Any], steps: int) -> str:
    """Format a record that holds a `Meter`'s reading as one line."""
    hours, rest = divmod(round(record["eta_seconds"]), 3600)
    mfu = f"MFU {record['mfu']:.1%}  " if "mfu" in record else ""
    return (
        f"step {record['step']}/{steps}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
        f"grad norm {record['grad_norm']:.2f}  {record['tokens_per_second']:,.0f} tok/s  {mfu}"
        f"mem {human_bytes(record['memory_bytes'])}  ETA {hours}:{rest // 60:02d}:{rest % 60:02d}"
    )


def import_wandb() -> Any:
    """Import the wandb package.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UserError(
            f"field 'run.wandb': the wandb package cannot be imported ({error}); pip install wandb"
        ) from None


class MetricsWriter:
    """Writes every step's record to `metrics.jsonl` and TensorBoard, cut back to `step` when a run resumes, and W&B.

    A number that is not finite is null in the file and left out of the curves; text goes to the file only.

    Args:
        wandb_project: None for no W&B. A resumed run continues its W&B run.
        config: the run's settings, shown by W&B.
    """

    def __init__(self, out: Path, step: int, wandb_project: str | None, config: dict[str, Any]) -> None:
        self._path = path = out / METRICS_FILE
        old = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = [line for line in old if line.endswith("}") and json.loads(line)["step"] <= step]
        atomic_write(path, "".join(f"{line}\n" for line in kept))
        self._stream = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(out / "tb", purge_step=step + 1)
        self._wandb = None if wandb_project is None else _start_wandb(out, wandb_project, config)

    def write(self, record: dict[str, Any]) -> None:
        """Write one record, which holds "step" and any other JSON values."""
        finite = {key: value for key, value in record.items() if not isinstance(value, float) or math.isfinite(value)}
        with explain_no_space(self._path):
            self._stream.write(json.dumps({key: finite.get(key) for key in record}) + "\n")
            self._stream.flush()
        numbers = {key: value for key, value in finite.items() if isinstance(value, int | float) and key != "step"}
        with explain_no_space(self._path.parent / "tb"):
            for key, value in numbers.items():
                self._board.add_scalar(f"train/{key}", value, record["step"])
        if self._wandb is not None:
            self._wandb.log({"step": record["step"], **{f"train/{key}": value for key, value in numbers.items()}})

    def close(self) -> None:
        self._stream.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(out: Path, project: str, config: dict[str, Any]) -> Any:
    wandb = import_wandb()
    id_file = out / _WANDB_ID_FILE
    if not id_file.is_file():
        atomic_write(id_file, uuid.uuid4().hex)
    run_id = id_file.read_text(encoding="utf-8").strip()
    run = wandb.init(project=project, id=run_id, resume="allow", name=out.name, dir=str(out), config=config)
    # The axis of the curves: W&B's own counter cannot go back to the step where a run resumes.
    run.define_metric("train/*", step_metric="step")
    return run
