"""Processes that torchrun started: those that work on parts of one evaluation, and who of them reports errors."""

import functools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from rrt.cli import EXIT_USER_ERROR
from rrt.errors import UserError

LONGEST_WAIT = timedelta(days=7)
"""For the others' work. One that died needs no timeout: torchrun ends all as soon as one has ended."""


class LoneError(UserError):
    """Bad input that one process met by itself."""


@dataclass(frozen=True)
class Replica:
    """This process among those that torchrun started (or the only one), and the device it computes on."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, in each of them. A collective, with the exactness of the dtype."""
        if self.count > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()

    def wait(self, error: UserError | None = None) -> None:
        """Return when every process has come here; if any brings an error, that is raised in all. A collective."""
        found: list[UserError | None] = [error] * self.count
        if self.count > 1:
            dist.all_gather_object(found, error)
        for error in found:
            if error is not None:
                raise error


@contextmanager
def replicas(device: str = "auto") -> Iterator[Replica]:
    """Join the processes that torchrun started, one GPU each, or be the only one without it.

    Args:
        device: "cpu", "cuda", "cuda:1", ...; "auto" is CUDA where available.

    Raises:
        UserError: the device is not there, or more processes than GPUs were started.
    """
    if "RANK" not in os.environ:
        yield Replica(0, 1, pick_device(device))
        return
    kind = pick_device(device).type
    local_count, gpus = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if kind == "cuda" and local_count > gpus:
        raise UserError(f"--device: found {gpus} GPU(s); expected one for each of {local_count} process(es)")
    own = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo", timeout=LONGEST_WAIT, device_id=own if kind == "cuda" else None
    )
    yield Replica(dist.get_rank(), dist.get_world_size(), own)
    # Not after an error: the others may wait for this process, and leaving the group in order would hang.
    dist.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """`name` as a device that is there; "auto" is CUDA where available."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: found {name!r}; expected one that is there ({error})".splitlines()[0]) from None


def first_reports_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Of bad input that every process meets alike only the first tells; all end with the same exit code."""

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except UserError as error:
            if int(os.environ.get("RANK", "0")) == 0 or isinstance(error, LoneError):
                raise
            sys.exit(EXIT_USER_ERROR)

    return wrapped
