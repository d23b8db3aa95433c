"""What the server costs: the part of bench/serving.py behind --http.

`python -m rrt.serve` runs as a process of its own, and gets all requests at once; `rrt.LLM` gets the same ones here, in
alternating order, and none finds prompts computed by another. Client and server share the machine with the engine, as
the loss shows too.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import torch

from bench.generate import Tokens, make_prompts
from bench.output import save_result
from bench.timing import RATIOS_NOTE, Samples, speedup, spread
from eval.tables import Table, format_spread, print_tables
from rrt.common.cli import keep_freed_memory
from rrt.common.dtypes import parse_dtype
from rrt.errors import UserError
from rrt.serve.llm import LLM
from rrt.serve.requests import SamplingParams

KIND = "serving-http"
PYTHON = "rrt.LLM"


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--http", action="store_true", help="what the server costs over rrt.LLM, instead")


def check_flags(arguments: argparse.Namespace) -> None:
    if not arguments.http:
        return
    if arguments.checkpoint is None or arguments.online:
        raise UserError("--http: expected with --checkpoint, and not with --online")
    for name in ("aiohttp", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise UserError(
                f"--http: {name} is not installed; expected it: pip install 'relaxed-recursive-transformers[test]'"
            )


async def complete_all(url: str, prompts: Tokens, new_tokens: int, *, streams: bool) -> Tokens:
    """Ask a server to continue all prompts at once; returns the new tokens of each."""
    import aiohttp

    async def complete(session: aiohttp.ClientSession, prompt: list[int]) -> list[int]:
        body = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True, "stream": streams}
        tokens: list[int] = []
        async with session.post(f"{url}/v1/completions", json=body) as response:
            response.raise_for_status()
            if not streams:
                return list((await response.json())["choices"][0]["rrt"]["tokens"])
            async for line in response.content:
                if line.startswith(b"data: {"):
                    tokens += json.loads(line[6:])["choices"][0]["rrt"]["tokens"]
        return tokens

    connector = aiohttp.TCPConnector(limit=len(prompts))
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as session:
        return list(await asyncio.gather(*(complete(session, prompt) for prompt in prompts)))


async def forget_prefixes(url: str) -> None:
    """Have a server forget the prompts that it has computed, as it does at another policy."""
    import aiohttp

    async with aiohttp.ClientSession(raise_for_status=True) as session:
        await session.post(f"{url}/rrt/policy", json={"policy": "never"})


def measure_case(llm: LLM, url: str, prompts: Tokens, in_flight: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time all ways on the same requests, round by round.

    Args:
        prompts: `in_flight` of them for a warm-up and for each round.
    """
    new_tokens = arguments.new_tokens[1]
    # As `ignore_eos` does.
    params = SamplingParams(max_new_tokens=new_tokens)

    def by_python(batch: Tokens) -> Tokens:
        ids = [llm.engine.add(prompt, params) for prompt in batch]
        found: dict[int, list[int]] = {request_id: [] for request_id in ids}
        while llm.engine.has_work:
            for new in llm.engine.step():
                found[new.request_id].append(new.token)
        return list(found.values())

    def by_http(streams: bool) -> Callable[[Tokens], Tokens]:
        def run(batch: Tokens) -> Tokens:
            work: Coroutine[Any, Any, Tokens] = complete_all(url, batch, new_tokens, streams=streams)
            return asyncio.run(work)

        return run

    ways = {PYTHON: by_python, "HTTP": by_http(False), "HTTP, streamed": by_http(True)}
    samples: Samples = {name: [] for name in ways}
    for number in range(1 + arguments.rounds):
        batch = prompts[number * in_flight : (number + 1) * in_flight]
        found = {}
        for name in ways if number % 2 else reversed(ways):
            # Prompts that the way before has left computed would be given to this one.
            llm.engine.forget_prefixes()
            asyncio.run(forget_prefixes(url))
            began = time.perf_counter()
            found[name] = ways[name](batch)
            if number:
                samples[name].append(time.perf_counter() - began)
        if any(tokens != found[PYTHON] for tokens in found.values()):
            raise RuntimeError("the server's tokens are not those of rrt.LLM")
    return {
        "in_flight": in_flight,
        "rounds": arguments.rounds,
        "variants": {
            name: {
                "tokens_per_second": in_flight * new_tokens / statistics.median(seconds),
                "seconds": spread(seconds),
                "over_python": speedup(samples, name, PYTHON),
            }
            for name, seconds in samples.items()
        },
    }


def run(arguments: argparse.Namespace) -> None:
    """Measure every dtype and number of requests, write the result and print it."""
    from rrt.serve.http.server import running_server

    torch.set_num_threads(arguments.threads)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # of the server
    count = (1 + arguments.rounds) * max(arguments.in_flight)
    prompts = make_prompts(arguments.checkpoint, count, arguments.prompt_tokens[1], arguments.prompts)
    cases: list[dict[str, Any]] = []
    for name in arguments.dtype:
        llm = LLM(arguments.checkpoint, dtype=parse_dtype(name), device="cpu")
        keep_freed_memory()
        flags = ["--checkpoint", str(arguments.checkpoint), "--dtype", name, "--device", "cpu"]
        with running_server(flags) as (url, _):
            for in_flight in arguments.in_flight:
                case = measure_case(llm, url, prompts, in_flight, arguments)
                cases.append({"dtype": name, **case})
    result = {
        "checkpoint": arguments.checkpoint.name,
        "prompt_tokens": arguments.prompt_tokens[1],
        "new_tokens": arguments.new_tokens[1],
        "torch_threads": arguments.threads,
        "cases": cases,
    }
    save_result(arguments.json, KIND, result)
    print_tables(tables(result))


def tables(result: dict[str, Any]) -> Sequence[Table]:
    rows = [
        [
            case["dtype"],
            str(case["in_flight"]),
            name,
            f"{found['tokens_per_second']:.1f}",
            format_spread(found["seconds"]),
            f"{found['over_python']:.3f}x",
        ]
        for case in result["cases"]
        for name, found in case["variants"].items()
    ]
    header = ["dtype", "in flight", "way", "tokens/s", "+-", f"over {PYTHON}"]
    note = (
        f"{result['checkpoint']}: {result['prompt_tokens']} tokens of prompt, {result['new_tokens']} new ones. "
        f"{RATIOS_NOTE}"
    )
    return [Table("New tokens per second by HTTP", header, rows, (0, 2), gap_after=2, notes=[note])]
