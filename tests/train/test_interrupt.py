"""Signals that ask a run to end, agreed on by all processes."""

import os
import signal

import pytest

from tests.util.processes import run_on_two
from train.distributed import processes
from train.interrupt import Interrupt, Interrupted


def checks(failing_rank: int, signalled_rank: int, name: signal.Signals) -> list[str]:
    """Results of three checks, when one process fails before the second and one is signalled before the third."""
    found = []
    with processes("cpu") as group, Interrupt() as interrupt:
        for turn in range(3):
            if turn == 2 and group.rank == signalled_rank:
                os.kill(os.getpid(), name)
                os.kill(os.getpid(), name)  # as from a launcher and from Slurm
            try:
                found.append(str(interrupt.check(turn == 1 and group.rank == failing_rank)))
            except Interrupted as caught:
                found.append(caught.signal)
    return found


@pytest.mark.parametrize(("rank", "name"), [(0, signal.SIGTERM), (1, signal.SIGUSR1)])
def test_an_interrupt_or_failure_of_one_process_reaches_all_at_the_same_check(rank: int, name: signal.Signals) -> None:
    results = run_on_two(checks, 1 - rank, rank, name)
    assert results[0] == results[1] == ["False", "True", name.name]


def test_signal_handlers_are_restored_afterwards() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    with processes("cpu"), Interrupt():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == before
