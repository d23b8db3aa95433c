"""Long chains of operators with and without programmatic dependent launch, bit by bit: python bench/pdl_stress.py

200 operators in a row, each reading what the one before wrote: decode linears of several shapes and tilings, writes of
keys and values into the paged cache and attention over it, both with rotary embedding, and the same of prefill. A
kernel that reads before the one before it has written finds what an earlier turn left in the cache, or NaN, since
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

# Without this folder: its tabulate.py would take the place of a library that torch imports.
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]

from bench.linear_variants import mixed_loops, normal
from bench.output import add_json_flag, check_device_flag, check_json_flag, save_result
from rrt import ops
from rrt.common.cli import CommandParser, run_command
from rrt.errors import UserError

KIND = "pdl-stress"
ROWS = {1: 8, 8: 16, 64: 32}
"""Decode rows, and query heads for them (head dims 256, 128 and 64).

The rows take the column kernel, the row kernel with several slices, and its largest tile.
"""
PREFILL_ROWS, PREFILL_HEADS = 192, 8
CONTEXTS = (2100, 600, 100, 0)
"""In turn, of the rows of a pass: several pieces, one, and padding."""
SLEEP_CYCLES = 2**24
"""About 8 ms, in which the host launches a chain, so that its operators follow each other without a pause."""
COPIES = 60
"""Of 256 MiB, while a chain runs: about 8 ms."""
_RANK, _LOOPS, _PAGE = 64, 2, 16
WIDTH, WIDE = 2048, 16384

Operator = Callable[[Tensor], Tensor]


def make_linear(
    rows: int, inputs: int, segments: tuple[int, ...], device: torch.device, *, has_lora: bool = True
) -> Operator:
    """Make a decode linear, perhaps with LoRA of two loops mixed, whose outputs are about as large as its inputs."""
    rank = _RANK if has_lora else 0
    loops, outputs, ranks = min(rows, _LOOPS), sum(segments), (rank,) * len(segments)
    # W x and B A x have the same variance, and add up to that of x.
    weight = normal((outputs, inputs), 2 * inputs if rank else inputs, torch.bfloat16, device)
    lora_a = normal((loops, sum(ranks), inputs), inputs, torch.bfloat16, device)
    lora_b = normal((loops, outputs, rank), max(1, 2 * rank), torch.bfloat16, device)
    loop_of_row = mixed_loops(rows, loops).to(device)
    return lambda x: ops.loop_lora_linear(x, weight, None, lora_a, lora_b, loop_of_row, segments, ranks)


def make_prefill_linear(inputs: int, outputs: int, device: torch.device) -> Operator:
    weight = normal((outputs, inputs), 2 * inputs, torch.bfloat16, device)
    lora_a = normal((1, _RANK, inputs), inputs, torch.bfloat16, device)
    lora_b = normal((1, outputs, _RANK), 2 * _RANK, torch.bfloat16, device)
    return lambda x: ops.loop_lora_prefill(x, weight, None, lora_a, lora_b, 0, (outputs,), (_RANK,))


def make_cache(
    contexts: list[int], chunks: list[int], heads: int, device: torch.device
) -> tuple[Operator, dict[str, Any]]:
    """Make a paged cache; return the operator that writes rows' keys and values, and arguments of attention over it.

    The operator takes and returns rows of [q, k, v]. Every turn of a chain writes others into the same slots, so that
    attention that reads too early finds those of the turn before. Sequence s writes the last `chunks[s]` of its
    `contexts[s]` positions; without a context its one row is padding.
    """
    kv_heads, dim = max(1, heads // 8), WIDTH // heads
    pages = -(-max(contexts) // _PAGE)
    shape = (len(contexts) * pages, _PAGE, kv_heads, dim)
    # Large values: their mean over the context is about as large as x.
    k_cache, v_cache = normal(shape, 1, torch.bfloat16, device), 10 * normal(shape, 1, torch.bfloat16, device)
    tables = torch.randperm(len(contexts) * pages).int().view(len(contexts), pages)
    rows = [
        (context - chunk + i if context else -1, table)
        for context, chunk, table in zip(contexts, chunks, tables, strict=True)
        for i in range(chunk)
    ]
    slots = [
        int(table[position // _PAGE]) * _PAGE + position % _PAGE if position >= 0 else -1 for position, table in rows
    ]
    slot_mapping = torch.tensor(slots, device=device)
    angles = torch.rand(max(contexts), dim // 2)
    rope = {
        "positions": torch.tensor([max(position, 0) for position, _ in rows], dtype=torch.int32, device=device),
        "cos_sin": torch.cat([angles.cos(), angles.sin()], dim=1).to(device),
    }
    cache = {"k_cache": k_cache, "v_cache": v_cache}

    def write(qkv: Tensor) -> Tensor:
        k, v = qkv[:, WIDTH:].view(len(slots), 2, kv_heads, dim).unbind(1)
        ops.loop_kv_write(k, v, **cache, slot_mapping=slot_mapping, **rope)
        return qkv

    lens = torch.tensor(contexts, dtype=torch.int32, device=device)
    return write, {**cache, "block_tables": tables.to(device), "context_lens": lens, "scale": dim**-0.5, **rope}


def make_decode_attention(rows: int, heads: int, device: torch.device) -> tuple[Operator, Operator]:
    """Make the operators that write the cache and attend over it: rows of contexts that differ, one of them padding."""
    contexts = [CONTEXTS[i % len(CONTEXTS)] for i in range(rows)]
    write, arguments = make_cache(contexts, [1] * rows, heads, device)

    def attend(qkv: Tensor) -> Tensor:
        return ops.loop_kv_attention(qkv[:, :WIDTH].view(rows, heads, -1), **arguments).view(rows, WIDTH)

    return write, attend


def make_prefill_attention(heads: int, device: torch.device) -> tuple[Operator, Operator]:
    """Make the same for two sequences: a chunk that is all of its context, and one at the end of the longest."""
    first = PREFILL_ROWS // 2
    chunks = [first, PREFILL_ROWS - first]
    write, arguments = make_cache([first, max(CONTEXTS)], chunks, heads, device)
    start = torch.tensor([0, first, PREFILL_ROWS], dtype=torch.int32, device=device)

    def attend(qkv: Tensor) -> Tensor:
        q = qkv[:, :WIDTH].view(PREFILL_ROWS, heads, -1)
        return ops.loop_kv_prefill(q, query_start=start, **arguments).view(PREFILL_ROWS, WIDTH)

    return write, attend


def make_chains(count: int, device: torch.device) -> Iterator[tuple[str, Tensor, list[Operator]]]:
    """Yield chains of `count` operators, each with its name and first input; a layer's in turn."""
    for rows, heads in ROWS.items():
        torch.manual_seed(rows)
        kv_width = WIDTH // heads * max(1, heads // 8)
        turn = [
            make_linear(rows, WIDTH, (WIDTH, kv_width, kv_width), device),
            *make_decode_attention(rows, heads, device),
            make_linear(rows, WIDTH, (WIDTH,), device),
            make_linear(rows, WIDTH, (WIDE // 2, WIDE // 2), device),
            make_linear(rows, WIDE, (WIDTH,), device),
            # One of the library's kernels, as there is between operators in a model; then products without a shrink
            # before them, the second of which may fetch W two products ahead.
            lambda x: x * 1,
            make_linear(rows, WIDTH, (WIDTH,), device, has_lora=False),
            make_linear(rows, WIDTH, (WIDTH,), device, has_lora=False),
        ]
        operators = [turn[i % len(turn)] for i in range(count)]
        yield f"decode, {rows} rows", normal((rows, WIDTH), 1, torch.bfloat16, device), operators
    torch.manual_seed(0)
    heads = PREFILL_HEADS
    turn = [
        make_prefill_linear(WIDTH, WIDTH + 2 * (WIDTH // heads) * max(1, heads // 8), device),
        *make_prefill_attention(heads, device),
        make_prefill_linear(WIDTH, WIDE, device),
        make_prefill_linear(WIDE, WIDTH, device),
    ]
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
    """Yield a function that starts copies on another stream, so that kernels begin and end at other times.

    The copies begin when the work that is queued so far is done, as the chain behind it does.
    """
    if not is_wanted or device.type != "cuda":
        yield lambda: None
        return
    stream, a = torch.cuda.Stream(), torch.empty(2**28, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)

    def start() -> None:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(COPIES):
                b.copy_(a)

    yield start
    torch.cuda.synchronize()


def compare(found: list[Tensor], expected: list[Tensor], way: str, round_: int) -> list[dict[str, Any]]:
    """Describe the first operator whose output has other bits, if there is one; wait for the device once."""
    pairs = zip(found, expected, strict=True)
    differs = torch.stack([(a.view(torch.int16) != b.view(torch.int16)).any() for a, b in pairs])
    indices = differs.nonzero()
    return [{"way": way, "round": round_, "operator": int(indices[0])}] if len(indices) else []


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.cpu().view(torch.int16).numpy().tobytes()).hexdigest()[:16]


@torch.inference_mode()
def run_worker(device: torch.device, count: int, rounds: int, out: Path) -> None:
    """Run every chain in every way in this process.

    Digests of each chain's outputs, and where rounds differ, are in the file as soon as the chain is done.
    """
    records: list[dict[str, Any]] = []
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
                    if device.type == "cuda":
                        torch.cuda._sleep(SLEEP_CYCLES)
                    start()
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
                        torch.cuda._sleep(SLEEP_CYCLES)
                        start()
                        graph.replay()
                        differences += compare(outputs, expected, f"graph{load}", round_)
            del graph
        records.append({"chain": name, "digests": [digest(output) for output in expected], "differences": differences})
        out.write_text(json.dumps(records))


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
    for off, on in zip(*by_switch.values(), strict=False):  # a process may have ended early
        pairs = enumerate(zip(off["digests"], on["digests"], strict=True))
        if (index := next((i for i, (a, b) in pairs if a != b), None)) is not None:
            lines.append(f"{off['chain']}: operator {index} differs between RRT_PDL=0 and RRT_PDL=1")
    return lines


def start_worker(switch: str, arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], int]:
    """Run a process of this program with RRT_PDL set; return the records of the chains that it came through, and its
    exit status.
    """
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "records.json"
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", str(out), "--device", arguments.device]
        command += ["--operators", str(arguments.operators), "--rounds", str(arguments.rounds)]
        status = subprocess.run(command, env={**os.environ, "RRT_PDL": switch}).returncode
        return (json.loads(out.read_text()) if out.is_file() else []), status


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="default cuda")
    parser.add_argument("--operators", type=int, default=200, metavar="N", help="of a chain (default 200)")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="of each chain and way (default 15)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    add_json_flag(parser, "pdl-stress")
    arguments = parser.parse_args()
    for flag in ("operators", "rounds"):
        if getattr(arguments, flag) < 1:
            raise UserError(f"--{flag}: found {getattr(arguments, flag)}; expected 1 or more")
    check_json_flag(arguments.json)
    check_device_flag(arguments.device)
    if arguments.worker is not None:
        run_worker(torch.device(arguments.device), arguments.operators, arguments.rounds, arguments.worker)
        return
    ended = {switch: start_worker(switch, arguments) for switch in ("0", "1")}
    by_switch = {switch: records for switch, (records, _) in ended.items()}
    lines = compare_workers(by_switch)
    lines += [
        f"RRT_PDL={switch}: the process ended with exit status {status} after {len(records)} chains; see above"
        for switch, (records, status) in ended.items()
        if status != 0
    ]
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
