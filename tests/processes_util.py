"""Two processes that run what a test hands them, in the environment that torchrun gives its own."""

import functools
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from rrt.errors import UserError

TIMEOUT_SECONDS = 120.0


def run_on_two(function: Callable[..., Any], *args: Any) -> tuple[Any, Any]:
    """`function(*args)` in rank 0 and rank 1 at once; both results, which a `UserError` can be.

    The processes stay for the next call, so `function` has to leave the process group that it joins.
    """
    return _pair().run(function, args)


@functools.cache
def _pair() -> "_Pair":
    return _Pair()


class _Pair:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for pipe in self.pipes:
            pipe.send((port, function, args))
        results = []
        for rank, pipe in enumerate(self.pipes):
            state, value = pipe.recv() if pipe.poll(TIMEOUT_SECONDS) else ("failed", "no answer")
            if state == "failed":
                for process in self.processes:  # the other one may wait for this one for ever
                    process.kill()
                _pair.cache_clear()
                raise AssertionError(f"rank {rank}: {value}")
            results.append(value)
        return results[0], results[1]


def _serve(rank: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            port, function, args = pipe.recv()
        except EOFError:
            return
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            pipe.send(("done", function(*args)))
        except UserError as error:
            pipe.send(("done", error))
        except BaseException:
            pipe.send(("failed", traceback.format_exc()))
