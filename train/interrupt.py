"""SIGTERM and SIGUSR1 ask a run to save and end; all processes agree on the micro-batch after which they do."""

import signal
from types import FrameType

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Interrupted(Exception):
    """The run was asked to end; raised in all processes at the same place. `signal` names what asked."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signal = signal.Signals(signum).name


class Interrupt:
    """Notes the signals while it is entered, for as often as they come: launchers and Slurm both send them."""

    def __init__(self) -> None:
        self._received = 0
        # On the CPU, so that asking does not wait for the device.
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
        """Whether `failed` in any process. A collective of two integers over the CPU.

        Raises:
            Interrupted: any process was asked to end.
        """
        flags = torch.tensor([self._received, int(failed)])
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._group)
        signum, any_failed = flags.tolist()
        if signum:
            raise Interrupted(signum)
        return bool(any_failed)
