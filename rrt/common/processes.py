"""Processes that torchrun started: joining them, sharing an evaluation, and reporting an error once."""

import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from rrt.errors import UserError

LONGEST_WAIT = timedelta(days=7)
"""Timeout for the work of other processes. A dead one needs none: torchrun ends all when one has ended."""

FIRST_TELLS_SECONDS = 5.0
"""Time that the other processes give the first to report an error that all have met."""


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
        """Sum `values` over all processes, in their dtype; each gets the sum. A collective."""
        if self.count > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values.cpu()

    def wait(self, error: UserError | None = None) -> None:
        """Wait for every process; if any passes an error, raise it in all. A collective."""
        found: list[UserError | None] = [error] * self.count
        if self.count > 1:
            dist.all_gather_object(found, error)
        for error in found:
            if error is not None:
                raise error


def join_processes(kind: str, asked_by: str, timeout: timedelta | None = None) -> torch.device:
    """Join the processes that torchrun started, or make a group of this one alone without it.

    Args:
        kind: "cpu", or "cuda" for one GPU for each process.
        asked_by: the flag or field that chose the device, for the message.
        timeout: of collectives; default torch's.

    Returns:
        This process's device.

    Raises:
        UserError: more processes than GPUs were started.
    """
    own = torch.device(kind)
    if kind == "cuda":
        # Checked for all local processes rather than this one's rank, so that all of them end here together.
        count, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if count > gpus:
            raise UserError(f"{asked_by}: found {gpus} GPU(s); expected one for each of {count} process(es)")
        own = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(own)
    backend = "nccl" if kind == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout, device_id=own if kind == "cuda" else None)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    return own


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
    own = join_processes(pick_device(device).type, "--device", LONGEST_WAIT)
    yield Replica(dist.get_rank(), dist.get_world_size(), own)
    # Not after an error: the others may wait for this process, and leaving the group in order would hang.
    dist.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """Parse a device and check that it exists; "auto" is CUDA where available."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device: found {name!r}; expected one that is there ({error})".splitlines()[0]) from None


def report_error_once(main: Callable[[], None]) -> Callable[[], None]:
    """Wrap a command so that an error which every process meets is reported by the first process alone.

    An error that one process meets by itself is still reported.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except UserError:
            if int(os.environ.get("RANK", "0")) != 0:
                # torchrun ends all as soon as one has ended. If the first process ends now, it has reported the same
                # error and this one should end silently; ending earlier would silence the first.
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                time.sleep(FIRST_TELLS_SECONDS)
            raise

    return wrapped
