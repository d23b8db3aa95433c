"""Interruption by SIGTERM or SIGUSR1: all processes agree on the micro-batch after which they save and end."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interrupted(Exception):
    """The run is to save and end, because of `signal`; raised in all processes at the same place."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signal = signal.Signals(signum).name


class Interrupt:
    """Notes the signals inside its context, even if sent repeatedly, as by a launcher and by Slurm."""

    def __init__(self) -> None:
        self._received = 0
        # On the CPU, so that `check` does not wait for the device.
        self._group = dist.new_group(backend="gloo")

    def __enter__(self) -> "Interrupt":
        self._before = {name: signal.signal(name, self._note) for name in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for name, handler in self._before.items():
            signal.signal(name, handler)

    def _note(self, signum: int, _frame: FrameType | None) -> None:
        self._received = signum

    def check(self, failed: bool) -> bool:
        """Tell if `failed` in any process. A collective of two integers over the CPU.

        Raises:
            Interrupted: any process received a signal.
        """
        flags = torch.tensor([self._received, int(failed)])
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
        signum, any_failed = flags.tolist()
        if signum:
            raise Interrupted(signum)
        return bool(any_failed)
