"""Long chains of operators with and without programmatic dependent launch, bit by bit: python bench/pdl_stress.py

200 operators in a row, each reading what the one before wrote: decode linears of several shapes and tilings, attention
over the paged cache, and the prefill linear. A kernel that reads before the one before it has written finds NaN, since
outputs and scratch memory are filled with it before each round. Every chain runs eagerly and as a CUDA graph, alone and
while another stream keeps the memory busy, in a process with RRT_PDL=0 and in one with RRT_PDL=1; all must have the
same bits. The race checkers serialise launches and so never see these hazards.

    python bench/pdl_stress.py --json stress.json
    python bench/pdl_stress.py --device cpu --operators 6 --rounds 2   # the same chains, without anything to race

Exit status 1 if any output differs.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.linear_variants import mixed_loops, normal
from bench.output import add_json_flag, check_device_flag, check_json_flag, save_result
from rrt import ops
from rrt.common.cli import CommandParser, run_command
from rrt.errors import UserError

KIND = "pdl-stress"
ROWS = (1, 8, 64)
"""Decode rows: the column kernel, the row kernel with several slices, and its largest tile."""
PREFILL_ROWS = 192
SLEEP_CYCLES = 2**24
"""About 8 ms, in which the host launches a chain, so that its operators follow each other without a pause."""
_RANK, _LOOPS, _CONTEXT, _PAGE = 64, 2, 600, 16
_HEADS, _KV_HEADS, _HEAD_DIM = 8, 1, 256
WIDTH, WIDE = _HEADS * _HEAD_DIM, 8 * _HEADS * _HEAD_DIM

Operator = Callable[[Tensor], Tensor]


def make_linear(rows: int, inputs: int, segments: tuple[int, ...], device: torch.device) -> Operator:
    """Make a decode linear with LoRA, of two loops mixed, whose outputs are about as large as its inputs."""
    loops, outputs, ranks = min(rows, _LOOPS), sum(segments), (_RANK,) * len(segments)
    # W x and B A x have the same variance, and add up to that of x.
    weight = normal((outputs, inputs), 2 * inputs, torch.bfloat16, device)
    lora_a = normal((loops, sum(ranks), inputs), inputs, torch.bfloat16, device)
    lora_b = normal((loops, outputs, _RANK), 2 * _RANK, torch.bfloat16, device)
    loop_of_row = mixed_loops(rows, loops).to(device)
    return lambda x: ops.loop_lora_linear(x, weight, None, lora_a, lora_b, loop_of_row, segments, ranks)


def make_prefill_linear(inputs: int, outputs: int, device: torch.device) -> Operator:
    weight = normal((outputs, inputs), 2 * inputs, torch.bfloat16, device)
    lora_a = normal((1, _RANK, inputs), inputs, torch.bfloat16, device)
    lora_b = normal((1, outputs, _RANK), 2 * _RANK, torch.bfloat16, device)
    return lambda x: ops.loop_lora_prefill(x, weight, None, lora_a, lora_b, 0, (outputs,), (_RANK,))


def make_attention(rows: int, device: torch.device) -> Operator:
    """Make decode attention whose queries are x, over pages that several pieces share."""
    pages = -(-_CONTEXT // _PAGE)
    shape = (rows * pages, _PAGE, _KV_HEADS, _HEAD_DIM)
    # Large values: their mean over the context is about as large as x.
    k_cache, v_cache = normal(shape, 1, torch.bfloat16, device), 10 * normal(shape, 1, torch.bfloat16, device)
    tables = torch.randperm(rows * pages).to(device, torch.int32).view(rows, pages)
    lens = torch.full((rows,), _CONTEXT, dtype=torch.int32, device=device)

    def run(x: Tensor) -> Tensor:
        q = x.view(rows, _HEADS, _HEAD_DIM)
        return ops.loop_kv_attention(q, k_cache, v_cache, tables, lens, _HEAD_DIM**-0.5).view(rows, WIDTH)

    return run


def make_chains(count: int, device: torch.device) -> Iterator[tuple[str, Tensor, list[Operator]]]:
    """Yield chains of `count` operators, each with its name and first input; a layer's shapes in turn."""
    for rows in ROWS:
        torch.manual_seed(rows)
        turn = [
            make_linear(rows, WIDTH, (WIDTH,), device),
            make_attention(rows, device),
            make_linear(rows, WIDTH, (WIDE // 2, WIDE // 2), device),
            make_linear(rows, WIDE, (WIDTH,), device),
        ]
        operators = [turn[i % len(turn)] for i in range(count)]
        yield f"decode, {rows} rows", normal((rows, WIDTH), 1, torch.bfloat16, device), operators
    torch.manual_seed(0)
    turn = [make_prefill_linear(WIDTH, WIDTH, device), make_prefill_linear(WIDTH, WIDE, device)]
    turn.append(make_prefill_linear(WIDE, WIDTH, device))
    operators = [turn[i % len(turn)] for i in range(count)]
    yield f"prefill, {PREFILL_ROWS} rows", normal((PREFILL_ROWS, WIDTH), 1, torch.bfloat16, device), operators


def run_chain(x: Tensor, operators: list[Operator], scratch_bytes: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Run a chain; return all outputs, and blocks of memory that each operator is likely to have had as scratch.

    Each block is taken right after its operator, of the size that it freed, so that the next one gets another.
    """
    outputs, blocks = [], []
    for operator, size in zip(operators, scratch_bytes, strict=True):
        x = operator(x)
        outputs.append(x)
        if size:
            blocks.append(torch.empty(size, dtype=torch.uint8, device=x.device))
    return outputs, blocks


def measure_scratch(x: Tensor, operators: list[Operator]) -> list[int]:
    """Return the bytes that each operator allocates and frees again; on a CPU zeros."""
    if not x.is_cuda:
        return [0] * len(operators)
    sizes: dict[Operator, int] = {}
    for operator in operators:
        if operator not in sizes:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            y = operator(x)
            sizes[operator] = max(0, torch.cuda.max_memory_allocated() - before - y.nbytes)
            x = y
        else:
            x = operator(x)
    return [sizes[operator] for operator in operators]


def poison(outputs: list[Tensor], blocks: list[Tensor]) -> None:
    """Fill memory with NaN of 16 and 32 bits."""
    for tensor in (*outputs, *blocks):
        tensor.view(torch.uint8).fill_(0xFF)


@contextmanager
def busy_memory(device: torch.device, is_wanted: bool) -> Iterator[Callable[[], None]]:
    """Yield a function that starts copies on another stream, so that kernels begin and end at other times."""
    if not is_wanted or device.type != "cuda":
        yield lambda: None
        return
    stream, a = torch.cuda.Stream(), torch.empty(2**28, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)

    def start() -> None:
        with torch.cuda.stream(stream):
            for _ in range(20):
                b.copy_(a)

    yield start
    torch.cuda.synchronize()


def compare(found: list[Tensor], expected: list[Tensor], way: str, round_: int) -> list[dict[str, Any]]:
    """Describe the first operator whose output has other bits, if there is one."""
    bits = ((a.view(torch.int16), b.view(torch.int16)) for a, b in zip(found, expected, strict=True))
    index = next((i for i, (a, b) in enumerate(bits) if not torch.equal(a, b)), None)
    return [] if index is None else [{"way": way, "round": round_, "operator": index}]


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.cpu().view(torch.int16).numpy().tobytes()).hexdigest()[:16]


@torch.inference_mode()
def run_worker(device: torch.device, count: int, rounds: int) -> list[dict[str, Any]]:
    """Run every chain in every way in this process; return digests of each chain's outputs, and where rounds differ."""
    records = []
    for name, x, operators in make_chains(count, device):
        sizes = measure_scratch(x, operators)
        outputs, blocks = run_chain(x, operators, sizes)
        expected = [output.clone() for output in outputs]
        if not all(bool(output.isfinite().all()) for output in expected):
            raise RuntimeError(f"{name}: the chain's numbers are not finite, so that NaN would not show")
        differences: list[dict[str, Any]] = []
        for busy in (False, True):
            load = " while memory is busy" if busy else ""
            with busy_memory(device, busy) as start:
                for round_ in range(rounds):
                    poison(outputs, blocks)
                    del outputs, blocks  # the allocator hands the poisoned memory out again
                    start()
                    if device.type == "cuda":
                        torch.cuda._sleep(SLEEP_CYCLES)
                    outputs, blocks = run_chain(x, operators, sizes)
                    differences += compare(outputs, expected, f"eager{load}", round_)
        if device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs, blocks = run_chain(x, operators, sizes)
            for busy in (False, True):
                load = " while memory is busy" if busy else ""
                with busy_memory(device, busy) as start:
                    for round_ in range(rounds):
                        poison(outputs, blocks)
                        start()
                        graph.replay()
                        differences += compare(outputs, expected, f"graph{load}", round_)
            del graph
        records.append({"chain": name, "digests": [digest(output) for output in expected], "differences": differences})
    return records


def compare_workers(by_switch: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Describe, a line each, where rounds of a process differ, and where the two processes do."""
    lines = []
    for switch, records in by_switch.items():
        for record in records:
            lines += [
                f"RRT_PDL={switch}, {record['chain']}, {found['way']}, round {found['round']}: "
                f"operator {found['operator']} differs from the first run"
                for found in record["differences"]
            ]
    for off, on in zip(*by_switch.values(), strict=True):
        pairs = enumerate(zip(off["digests"], on["digests"], strict=True))
        if (index := next((i for i, (a, b) in pairs if a != b), None)) is not None:
            lines.append(f"{off['chain']}: operator {index} differs between RRT_PDL=0 and RRT_PDL=1")
    return lines


def start_worker(switch: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Run a process of this program with RRT_PDL set; return its records."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "records.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(out), "--device", arguments.device]
        command += ["--operators", str(arguments.operators), "--rounds", str(arguments.rounds)]
        status = subprocess.run(command, env={**os.environ, "RRT_PDL": switch}).returncode
        if status != 0:
            raise UserError(f"RRT_PDL={switch}: the process of the chains ended with exit status {status}; see above")
        records: list[dict[str, Any]] = json.loads(out.read_text())
        return records


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default cuda")
    parser.add_argument("--operators", type=int, default=200, metavar="N", help="of a chain (default 200)")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="of each chain and way (default 10)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    add_json_flag(parser, "pdl-stress")
    arguments = parser.parse_args()
    for flag in ("operators", "rounds"):
        if getattr(arguments, flag) < 1:
            raise UserError(f"--{flag}: found {getattr(arguments, flag)}; expected 1 or more")
    check_json_flag(arguments.json)
    check_device_flag(arguments.device)
    if arguments.worker is not None:
        records = run_worker(torch.device(arguments.device), arguments.operators, arguments.rounds)
        arguments.worker.write_text(json.dumps(records))
        return
    by_switch = {switch: start_worker(switch, arguments) for switch in ("0", "1")}
    lines = compare_workers(by_switch)
    names = [record["chain"] for record in by_switch["0"]]
    save_result(
        arguments.json,
        KIND,
        {"operators": arguments.operators, "rounds": arguments.rounds, "chains": names, "differences": lines},
        arguments.device,
    )
    print(*lines, sep="\n", end="\n" if lines else "")
    print(
        f"{len(names)} chains of {arguments.operators} operators, {arguments.rounds} rounds in each way: "
        + (f"{len(lines)} differences" if lines else "the same bits with RRT_PDL=0 and RRT_PDL=1")
    )
    sys.exit(int(bool(lines)))


if __name__ == "__main__":
    run_command(main)
