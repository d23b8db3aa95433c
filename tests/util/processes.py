"""Processes that run what a test hands them, in the environment that torchrun gives its own."""

import functools
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from typing import Any

import torch
import torch.distributed as dist

from rrt.errors import UserError

TIMEOUT_SECONDS = 120.0


def run_on_two(function: Callable[..., Any], *args: Any) -> tuple[Any, ...]:
    """`function(*args)` in rank 0 and rank 1 at once; both results."""
    return run_on(2, function, *args)


def run_on(count: int, function: Callable[..., Any], *args: Any) -> tuple[Any, ...]:
    """`function(*args)` in ranks 0 to `count` - 1 at once; their results, which a `UserError` can be."""
    return _group(count).run(function, args)


@functools.cache
def forkserver() -> ForkServerContext:
    """A context whose processes are forked from one that has imported torch and the trainer."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.util.training"])
    return context


@functools.cache
def _group(count: int) -> "_Group":
    return _Group(count)


class _Group:
    def __init__(self, count: int) -> None:
        context = forkserver()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, count, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for pipe in self.pipes:
            pipe.send((port, function, args))
        results = []
        for rank, pipe in enumerate(self.pipes):
            state, value = pipe.recv() if pipe.poll(TIMEOUT_SECONDS) else ("failed", "no answer")
            if state == "failed":
                for process in self.processes:  # the others may wait for this one for ever
                    process.kill()
                _group.cache_clear()
                raise AssertionError(f"rank {rank}: {value}")
            results.append(value)
        return tuple(results)


def _serve(rank: int, count: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    while True:
        try:
            port, function, args = pipe.recv()
        except EOFError:
            return
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            answer = ("done", function(*args))
        except UserError as error:
            answer = ("done", error)
        except BaseException:
            answer = ("failed", traceback.format_exc())
        if dist.is_initialized():  # commands that end in an error leave that to the end of their process
            dist.destroy_process_group()
        pipe.send(answer)
