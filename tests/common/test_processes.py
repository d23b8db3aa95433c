"""Processes of one evaluation: an error of any of them ends all, and is reported once."""

import signal
import subprocess
import sys

import pytest

from rrt.common import processes
from rrt.common.processes import replicas, report_error_once
from rrt.errors import UserError
from tests.util.processes import run_on_two


def test_an_error_of_one_process_is_raised_in_all():
    assert run_on_two(meet, 1) == ("rank 1 found a bad file",) * 2
    assert run_on_two(meet, None) == (None, None)


def meet(rank_with_error):
    with replicas("cpu") as replica:
        error = UserError(f"rank {replica.rank} found a bad file") if replica.rank == rank_with_error else None
        try:
            replica.wait(error)
        except UserError as raised:
            return str(raised)
        return None


def test_other_processes_give_the_first_time_to_report_and_then_report_themselves(monkeypatch):
    waits = []
    monkeypatch.setattr(processes.time, "sleep", lambda s: waits.append((s, signal.getsignal(signal.SIGTERM))))
    before = signal.signal(signal.SIGTERM, lambda *_: None)

    @report_error_once
    def main():
        raise UserError("a bad file")

    try:
        for rank, expected in ((None, []), ("0", []), ("1", [(processes.FIRST_TELLS_SECONDS, signal.SIG_DFL)])):
            waits.clear()
            monkeypatch.delenv("RANK", raising=False) if rank is None else monkeypatch.setenv("RANK", rank)
            with pytest.raises(UserError, match="a bad file"):
                main()
            assert waits == expected
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
@pytest.mark.parametrize(("late", "met_by"), [(0, (0, 1)), (1, (0, 1)), (1, (1,))])
def test_under_torchrun_an_error_reaches_the_terminal_once(tmp_path, late, met_by):
    script = tmp_path / "command.py"
    script.write_text(
        "import os, time\n"
        "from rrt.common.cli import run_command\n"
        "from rrt.errors import UserError\n"
        "from rrt.common.processes import report_error_once\n"
        "rank = int(os.environ['RANK'])\n"
        "@report_error_once\n"
        "def main():\n"
        f"    time.sleep(1.0 * (rank == {late}))\n"
        f"    if rank not in {met_by}:\n"
        "        time.sleep(60)\n"
        "    raise UserError('a bad file')\n"
        "run_command(main)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.count("error: a bad file\n") == 1
    # A first process that has told ends the run; whether the late one is then still at work is a matter of timing.
    if (late, met_by) != (1, (0, 1)):
        assert ("interrupted" in done.stderr) == (met_by == (1,))
