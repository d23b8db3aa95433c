"""Processes of one evaluation: an error of any of them ends all."""

from processes_util import run_on_two

from rrt.errors import UserError
from rrt.processes import replicas


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
