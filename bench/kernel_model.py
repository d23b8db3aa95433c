"""Predicted times of the CUDA kernels, without a GPU: python bench/kernel_model.py --device h200 --preset gemma-2b

Prints of every linear of a layer, of decode attention and of prefill the predicted time, the floor (as bench/kernels.py
counts it: bytes at a copy's bandwidth, or operations at the best matmul rate), the terms of the time, and what limits
the stream. Reads csrc/cuda/resources.txt, instructions.txt and tilings.txt. After a change of the kernels the last two
are written anew from the machine code of a build; measurements, once there are some, stand beside the prediction:

    python bench/kernel_model.py --write build/native-0123abcd
    python bench/kernel_model.py --device h200 --preset gemma-2b --measured gemma-2b.json

A launch begins (entry instructions, while the first bytes are on their way), streams and ends. It streams for as long
as the slowest of these takes:

    issue    the turns of a warp: each its stall counts and waits or, where warps share a scheduler, what they issue,
             multiply and load from shared memory together; times the waves of thread blocks
    latency  the bytes of the busiest multiprocessor, which has no more than its rings under way (Little's law)
    memory   bytes that come from memory, at its bandwidth
    cache    bytes that cross the second-level cache, which brings x to every thread block
    matmul   operations of prefill's products, at the best rate of any (clocks fall with the load)

Shrink runs beside the product, which waits for it where the code does; between launches there are gaps. Constants have
their source beside them. None has been measured with these kernels.
"""

import argparse
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from bench import kernel_instructions, kernel_resources
from bench.attention_cases import AttentionSpec
from bench.kernel_instructions import KernelCode
from bench.linear_variants import Projection, projections
from bench.output import add_json_flag, check_json_flag, save_result
from eval.tables import Table, expect_whole_result, print_tables
from rrt.checkpoint.presets import preset
from rrt.common.cli import CommandParser, run_command
from rrt.common.files import atomic_write, read_json
from rrt.errors import UserError

TILINGS = ROOT / "csrc" / "cuda" / "tilings.txt"
PRESETS = ("gemma-2b", "tinyllama-1.1b", "pythia-1b")
ROWS = (1, 8, 16, 32, 64)
BYTES_PER_ELEMENT = 2
PARTS = 8
"""Of the columns of W (csrc/loop_lora/cuda_decode.h)."""
COLUMN_OUTPUTS = 16
"""Of a tile of the column kernel; the row kernel's have more."""
STEP_COLUMNS = 32
"""Columns of W, or ranks of B_l, of which a part has whole numbers."""
CHUNK = 256
"""New tokens of a prefill, as in bench/kernels.py."""

MEMORY_SHARE = 0.92
"""Of a copy's bandwidth, for reading by many blocks. Assumed."""
LATENCY = 0.7e-6
"""Seconds from a request to its bytes while memory is busy. Assumed: 500 idle cycles, and queues."""
WARP_CYCLES_OF_SHARED = 4
"""Of shared memory for 16 bytes per lane: 512 bytes at 128 a cycle (datasheet)."""
HMMA_FLOPS = 2 * 16 * 8 * 16
NOTABLY_FASTER = 0.95
"""Of the time with the tiling that the library chooses: others that take less are shown."""


@dataclass(frozen=True)
class Device:
    """A GPU; rates are per second, times in seconds.

    Attributes:
        hertz: boost clock for which the datasheet counts the tensor cores' FLOP/s.
        copy: bandwidth of a copy. H200: measured; others: 85% and 90% of the datasheet's.
        cache: bandwidth of the second-level cache. Assumed.
        matmul: best rate of a product in 16 bits. H200: measured; H100: the same chip; A100: 80% of the datasheet's.
        hmma_cycles: of a scheduler for one m16n8k16. A100: 1024 multiply-adds a cycle and multiprocessor (datasheet);
            H100: twice that, of which mma.sync reaches 63% (arXiv 2402.13499).
        gap: from the end of a kernel until the next one works. Assumed.
        trigger: the same, for one that was launched early and only waits. Assumed.
    """

    name: str
    arch: str
    multiprocessors: int
    hertz: float
    copy: float
    cache: float
    matmul: float
    hmma_cycles: float
    gap: float
    trigger: float

    @property
    def has_dependent_launch(self) -> bool:
        return self.arch != "sm_80"


H200 = Device("h200", "sm_90a", 132, 1.83e9, 4.3e12, 5.5e12, 790e12, 6.4, gap=1e-6, trigger=0.5e-6)
DEVICES = {
    "a100": Device("a100", "sm_80", 108, 1.41e9, 1.7e12, 3.9e12, 250e12, 8.0, gap=2e-6, trigger=2e-6),
    "h100": replace(H200, name="h100", copy=3.0e12),
    "h200": H200,
}


@dataclass(frozen=True)
class Tables:
    """What the compiler's tables say, by architecture and kernel."""

    code: dict[tuple[str, str], KernelCode]
    resources: dict[tuple[str, str], kernel_resources.Kernel]
    tilings: dict[tuple[int, ...], tuple[int, int]]
    """(multiprocessors, n, k, m) to a tile's outputs and its slices."""

    @classmethod
    def read(cls) -> "Tables":
        code = kernel_instructions.parse_table(kernel_instructions.EXPECTED.read_text())
        resources = kernel_resources.parse_table(kernel_resources.EXPECTED.read_text())[1]
        lines = [line.split() for line in TILINGS.read_text().splitlines()[1:]]
        tilings = {tuple(map(int, line[:4])): (int(line[4]), int(line[5])) for line in lines}
        by_name = {(kernel.arch, kernel.name): kernel for kernel in code}
        return cls(by_name, {(kernel.arch, kernel.name): kernel for kernel in resources}, tilings)

    def instances(self, device: Device, kernel: str) -> list["Compiled"]:
        """List the kernel's instances for bfloat16."""
        names = [name for arch, name in self.code if arch == device.arch and name.startswith(f"{kernel}<BFloat16")]
        if not names:
            raise UserError(f"{kernel_instructions.EXPECTED.name}: found no {kernel}; expected it: see --write")
        return [Compiled(self.code[device.arch, name], self.resources[device.arch, name]) for name in names]

    def find(self, device: Device, kernel: str, **arguments: int) -> "Compiled":
        """Return the instance with these template arguments; the first one, if it has others too."""
        for instance in self.instances(device, kernel):
            if arguments.items() <= instance.arguments.items():
                return instance
        raise UserError(
            f"{kernel_instructions.EXPECTED.name}: found no {kernel} of {arguments}; expected it: see --write"
        )


ARGUMENTS = {
    "loop_lora::row_kernel": ["tokens stages", "tokens warp_tiles stages"],
    "loop_lora::column_kernel": ["tokens stages shrink", "tokens parts stages shrink"],
    "loop_lora::prefill_kernel": [
        "token_tiles out_groups stages",
        "token_warps out_warps token_tiles out_groups stages",
    ],
    "kv_cache::decode_kernel": ["head_dim stages"],
    "kv_cache::prefill_kernel": ["head_dim stages", "head_dim warps row_tiles slots stages"],
    "kv_cache::combine_kernel": ["head_dim"],
}
"""Names of the template arguments after the dtype, by their number."""


@dataclass(frozen=True)
class Compiled:
    """An instance of a kernel."""

    code: KernelCode
    resources: kernel_resources.Kernel

    @cached_property
    def arguments(self) -> dict[str, int]:
        kernel, _, *values = re.split(r"[<>,] *", self.code.name.removesuffix(">"))
        numbers = [{"false": 0, "true": 1}.get(value, value) for value in values]
        names = next((each.split() for each in ARGUMENTS.get(kernel, []) if len(each.split()) == len(numbers)), [])
        return {name: int(number) for name, number in zip(names, numbers, strict=True)}

    @property
    def warps(self) -> int:
        return self.resources.threads // 32

    @property
    def bytes_under_way(self) -> float:
        """How many bytes a thread block may have asked for: all stages of its ring but the one that it works on."""
        stages = self.arguments.get("stages", 1)
        return self.resources.shared_bytes * (stages - 1) / stages


@dataclass(frozen=True)
class Work:
    """What a launch has to do: equal thread blocks, each of whose warps takes so many turns."""

    blocks: int
    turns: float
    block_bytes: float
    """That a block brings into its multiprocessor."""
    memory_bytes: float
    """That the launch reads from memory and writes, each byte once."""
    flops: float = 0.0


@dataclass(frozen=True)
class Times:
    """Seconds of a launch: before and after its stream, of the stream by each limit, and of a turn."""

    begin: float
    end: float
    limits: dict[str, float]
    turn: float

    @property
    def stream(self) -> float:
        """The slowest limit; the last bytes take a turn more."""
        return max(seconds + (0 if name == "issue" else self.turn) for name, seconds in self.limits.items())

    @property
    def bound(self) -> str:
        return max(self.limits, key=lambda name: self.limits[name])

    @property
    def total(self) -> float:
        return self.begin + self.stream + self.end


def launch_times(device: Device, kernel: Compiled, work: Work, stores_sums: bool = False) -> Times:
    """Predict a launch; `stores_sums`: it leaves sums for a kernel that adds them."""
    code = kernel.code
    busiest = math.ceil(work.blocks / device.multiprocessors)
    resident = min(kernel.resources.blocks, busiest)
    warps_per_scheduler = max(1.0, resident * kernel.warps / 4)
    turn = max(
        code.cycles,
        warps_per_scheduler * code.instructions,
        warps_per_scheduler * code.hmma * device.hmma_cycles,
        resident * kernel.warps * (code.lds + code.ldgsts) * WARP_CYCLES_OF_SHARED,
    )
    waves = math.ceil(busiest / resident)
    under_way = resident * kernel.bytes_under_way
    limits = {
        "issue": waves * work.turns * turn / device.hertz,
        "latency": busiest * work.block_bytes / under_way * LATENCY if under_way else 0.0,
        "memory": work.memory_bytes / (MEMORY_SHARE * device.copy),
        "cache": work.blocks * work.block_bytes / device.cache,
        "matmul": work.flops / device.matmul,
    }
    end = code.sums_cycles if stores_sums else code.exit_cycles
    begin = max(LATENCY, code.entry_cycles / device.hertz)
    return Times(begin, end / device.hertz, limits, turn / device.hertz if work.turns else 0.0)


@dataclass(frozen=True)
class Prediction:
    """Of an operator, from the end of the one before it to its own, in seconds.

    Attributes:
        terms: what its time is made of: gap, begin, stream, shrink (waiting for it), end, and a kernel that follows.
        bound: what limits the stream.
    """

    terms: dict[str, float]
    floor: float
    bound: str

    @property
    def seconds(self) -> float:
        return sum(self.terms.values())

    @property
    def over_floor(self) -> float:
        return self.seconds / self.floor


def floor_of(device: Device, num_bytes: float, flops: float) -> float:
    return max(num_bytes / device.copy, flops / device.matmul)


def choose_tokens(instances: Iterable[Compiled], m: int) -> Compiled:
    """Return the instance with the smallest tile that holds m tokens, or with the largest."""
    return min(instances, key=lambda each: (each.arguments["tokens"] < m, abs(each.arguments["tokens"] - m)))


def decode_launch(
    device: Device, kernel: Compiled, slices: int, n: int, k: int, m: int, loops: int, rank: int
) -> tuple[Work, Times]:
    """Predict a launch of a decode kernel on [n, k], which goes on over the B_l of so many loops."""
    tokens, by_rows = kernel.arguments["tokens"], "::row_kernel" in kernel.code.name
    warp_outputs = 16 * (kernel.arguments.get("warp_tiles", 2) if by_rows else 1)
    outputs = warp_outputs * (kernel.warps if by_rows else 1)
    parts = PARTS // slices if by_rows else 1  # of a warp
    # An mma takes 16 outputs x 16 columns for 8 tokens.
    turn_steps = kernel.code.hmma * 256 / (tokens / 8) / warp_outputs / STEP_COLUMNS
    turns = parts * math.ceil(k / STEP_COLUMNS / PARTS / turn_steps)
    for part in range(parts):
        # Every eighth step of B_l is of the part.
        steps = max(0, math.ceil((math.ceil(rank / STEP_COLUMNS) - part) / PARTS))
        turns += loops * math.ceil(steps / turn_steps)
    rows, ranks = min(m, tokens), loops * rank
    block_bytes = BYTES_PER_ELEMENT * (outputs + rows) * (k + ranks) / slices
    if slices > 1:
        block_bytes += 4 * parts * outputs * rows
    memory_bytes = BYTES_PER_ELEMENT * (n * (k + ranks) + m * k)
    work = Work(math.ceil(n / outputs) * math.ceil(m / tokens) * slices, turns, block_bytes, memory_bytes)
    return work, launch_times(device, kernel, work, slices > 1)


def adding_time(device: Device, tables: Tables, kernel: str, elements: int) -> float:
    """Predict a launch that adds parts' sums, which are still in the cache."""
    add = tables.find(device, kernel)
    threads = add.resources.threads
    return launch_times(
        device, add, Work(math.ceil(elements / threads), 0, threads * (4 * PARTS + BYTES_PER_ELEMENT), 0)
    ).total


def predict_shrink(
    device: Device, tables: Tables, ranks: int, k: int, m: int, loops: int, gap: float
) -> tuple[float, bool]:
    """Predict T = A_l x, with its parts in thread blocks of their own where that is faster; and say whether it lets
    the product start before it waits itself."""
    by_warps: dict[int, list[Compiled]] = {}
    for instance in tables.instances(device, "loop_lora::column_kernel"):
        if instance.arguments["shrink"]:
            by_warps.setdefault(instance.warps, []).append(instance)
    ways = []
    for warps, instances in by_warps.items():
        kernel = choose_tokens(instances, m)
        seconds = decode_launch(device, kernel, PARTS // warps, loops * ranks, k, m, 0, 0)[1].total
        if warps < PARTS:
            seconds += gap + adding_time(device, tables, "loop_lora::add_shrunk_kernel", m * ranks)
        ways.append((seconds, bool(kernel.code.triggers_early)))
    return min(ways)


def product_instances(device: Device, tables: Tables) -> dict[int, list[Compiled]]:
    """Map a tile's outputs to the instances of the decode product that have it."""
    found: dict[int, list[Compiled]] = {}
    for each in tables.instances(device, "loop_lora::row_kernel"):
        found.setdefault(16 * each.arguments.get("warp_tiles", 2) * each.warps, []).append(each)
    columns = tables.instances(device, "loop_lora::column_kernel")
    return {COLUMN_OUTPUTS: [each for each in columns if not each.arguments["shrink"]], **found}


def find_faster_tiling(
    device: Device, tables: Tables, projection: Projection, m: int, rank: int, loops: int
) -> tuple[Prediction, str]:
    """Return the best prediction, over all tilings, and its tile's outputs / slices."""
    ways = []
    for outputs in product_instances(device, tables):
        if all(part.start % outputs == 0 for part in projection.slices()):
            for slices in (1,) if outputs == COLUMN_OUTPUTS else (1, 2, 4, 8):
                found = predict_linear(device, tables, projection, m, rank, loops, (outputs, slices))
                ways.append((found, f"{outputs}/{slices}"))
    return min(ways, key=lambda way: way[0].seconds)


def predict_linear(
    device: Device,
    tables: Tables,
    projection: Projection,
    m: int,
    rank: int,
    loops: int,
    tiling: tuple[int, int] | None = None,
) -> Prediction:
    """Predict loop_lora_linear on m rows of so many loops, with the tiling (outputs, slices) that is chosen for it."""
    n, k = projection.outputs, projection.inputs
    outputs, slices = tiling or tables.tilings[device.multiprocessors, n, k, m]
    product = choose_tokens(product_instances(device, tables)[outputs], m)
    work, times = decode_launch(device, product, slices, n, k, m, loops, max(projection.ranks(rank)))
    terms = {"gap": device.gap, "begin": times.begin, "stream": times.stream, "shrink": 0.0, "end": times.end}
    next_gap = device.gap
    ranks = sum(projection.ranks(rank))
    shrink, starts_early = predict_shrink(device, tables, max(1, ranks), k, m, loops, device.trigger)
    if device.has_dependent_launch and starts_early:
        # The ring fills with W while the kernel before ends and shrink runs; then x is there, and the rest streams.
        next_gap = device.trigger
        waited = shrink + device.trigger if rank > 0 else 0.0
        resident = min(work.blocks, device.multiprocessors * product.resources.blocks)
        filled = min(1.0, resident * product.bytes_under_way / (work.blocks * work.block_bytes))
        others = max(seconds for name, seconds in times.limits.items() if name != "issue")
        idle = device.trigger + waited
        rest = max(times.limits["issue"], others * (1 - filled) + times.turn, times.begin + times.stream - idle)
        x_seconds = kernel_instructions.SECOND_LEVEL / device.hertz
        terms |= {"gap": device.trigger, "begin": x_seconds, "stream": rest, "shrink": waited}
    elif device.has_dependent_launch and rank > 0:
        # Both read from memory at once; and a block needs T after the first of its parts of W.
        a_bytes = BYTES_PER_ELEMENT * loops * ranks * k
        memory = times.limits["memory"] + a_bytes / (MEMORY_SHARE * device.copy)
        stream = replace(times, limits={**times.limits, "memory": memory}).stream
        needed = times.begin + stream / (PARTS // slices if outputs != COLUMN_OUTPUTS else 1)
        terms |= {"gap": device.gap + device.trigger, "stream": stream, "shrink": max(0.0, shrink - needed)}
    elif rank > 0:
        terms["shrink"] = shrink + device.gap
    terms["add"] = 0.0
    if slices > 1:
        terms["add"] = next_gap + adding_time(device, tables, "loop_lora::add_parts_kernel", m * n)
    floor = floor_of(device, projection.min_bytes(m, rank, loops, BYTES_PER_ELEMENT), projection.flops(m, rank))
    return Prediction(terms, floor, times.bound)


def predict_prefill(device: Device, tables: Tables, projection: Projection, m: int, rank: int) -> Prediction:
    """Predict loop_lora_prefill: two launches of one kernel, each with the tile that the library would choose."""
    k, n, segment_rank = projection.inputs, projection.outputs, max(projection.ranks(rank))

    def launch(segments: Sequence[int], columns: int) -> Times:
        def tiling(kernel: Compiled) -> tuple[int, int, int]:
            tile_m = 16 * kernel.arguments.get("token_warps", 2) * kernel.arguments["token_tiles"]
            tile_n = 32 * kernel.arguments.get("out_warps", 2) * kernel.arguments["out_groups"]
            return tile_m, tile_n, math.ceil(m / tile_m) * sum(math.ceil(outputs / tile_n) for outputs in segments)

        def cost(kernel: Compiled) -> tuple[int, int]:
            tile_m, tile_n, blocks = tiling(kernel)
            if "token_warps" not in kernel.arguments:  # the largest that fills the GPU, else the smallest
                return (0 if blocks >= device.multiprocessors else 1), -tile_m * tile_n * (
                    blocks >= device.multiprocessors
                ) + tile_m
            return math.ceil(blocks / device.multiprocessors) * (tile_m + tile_n), tile_m * tile_n

        kernel = min(tables.instances(device, "loop_lora::prefill_kernel"), key=cost)
        tile_m, tile_n, blocks = tiling(kernel)
        turns = 2 * tile_m * tile_n * columns / kernel.warps / (kernel.code.hmma * HMMA_FLOPS)
        block_bytes = BYTES_PER_ELEMENT * (tile_m + tile_n) * columns
        memory_bytes = BYTES_PER_ELEMENT * (sum(segments) * columns + m * (columns + sum(segments)))
        flops = 2 * m * sum(segments) * columns
        return launch_times(device, kernel, Work(blocks, turns, block_bytes, memory_bytes, flops))

    product = launch(projection.segments, k + segment_rank)
    floor = floor_of(device, projection.min_bytes(m, rank, 1, BYTES_PER_ELEMENT), projection.flops(m, rank))
    terms = {"gap": device.gap, "begin": product.begin, "stream": product.stream, "shrink": 0.0, "end": product.end}
    if rank > 0:
        ranks = sum(projection.ranks(rank))
        shrink = launch([ranks], k)
        if device.has_dependent_launch:
            # It takes its share of the GPU meanwhile; T is needed after W.
            terms["stream"] *= 1 + ranks / n
            terms["shrink"] = max(0.0, shrink.total - product.begin - terms["stream"] * k / (k + segment_rank))
        else:
            terms["shrink"] = shrink.total + device.gap
    return Prediction(terms, floor, product.bound)


def predict_attention(
    device: Device, tables: Tables, spec: AttentionSpec, kind: str, count: int, context: int, queries: int
) -> Prediction:
    """Predict loop_kv_attention of `count` rows, or loop_kv_prefill of as many sequences with a chunk each."""
    dim, group = spec.head_dim, spec.num_heads // spec.num_kv_heads
    kernel = tables.find(device, f"kv_cache::{kind}_kernel", head_dim=dim)
    row_tiles = kernel.arguments.get("row_tiles", 1)
    # For 16 slots and 16 rows it takes dim / 8 mmas of q k, and as many of p v.
    slots = 16 * kernel.code.hmma / (dim / 4) / row_tiles
    slot_bytes = 2 * dim * BYTES_PER_ELEMENT
    memory_bytes = spec.min_bytes(count, context, queries)
    combine = tables.instances(device, "kv_cache::combine_kernel")[0]
    by_four_warps = "head_dim" in combine.arguments
    piece_slots = 128 if by_four_warps and context <= 2048 else 256
    pieces = math.ceil(context / piece_slots) if kind == "decode" else 1
    if kind == "decode":
        blocks = count * spec.num_kv_heads * math.ceil(group / 16) * pieces
        seen = min(context, piece_slots)
        work = Work(blocks, math.ceil(seen / kernel.warps / slots), seen * slot_bytes, memory_bytes)
    else:
        blocks = count * spec.num_kv_heads * math.ceil(queries * group / 16 / row_tiles / kernel.warps)
        seen = context - queries // 2
        readers = 1 if "warps" in kernel.arguments else kernel.warps  # of all keys and values, in a block
        work = Work(blocks, math.ceil(seen / slots), readers * seen * slot_bytes, memory_bytes)
    times = launch_times(device, kernel, work, pieces > 1)
    terms = {"gap": device.gap, "begin": times.begin, "stream": times.stream, "end": times.end, "combine": 0.0}
    if pieces > 1:
        # Three loads a piece, which wait for those of the turn before; or the largest first, then four pieces a warp.
        turns = 1 + math.ceil(pieces / 16) if by_four_warps else 3 * pieces / max(1, combine.code.ldg)
        combined = Work(count * spec.num_heads, turns, pieces * 4 * (dim + 2), 0)
        terms["combine"] = device.trigger + launch_times(device, combine, combined).total
    return Prediction(terms, floor_of(device, memory_bytes, spec.flops(count, context, queries)), times.bound)


def attention_spec(config: Any) -> AttentionSpec:
    return AttentionSpec(
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        [],
        [],
        [],
        CHUNK,
        32,
        torch.bfloat16,
        torch.device("cpu"),
        0,
        0,
    )


def predict_all(device: Device, tables: Tables, name: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Predict every case that the flags choose, and the whole layer, as records like those of bench/kernels.py."""
    config = preset(name)
    records: list[dict[str, Any]] = []

    def add(case: dict[str, Any], prediction: Prediction) -> Prediction:
        values = {"seconds": prediction.seconds, "floor_seconds": prediction.floor, "over_floor": prediction.over_floor}
        records.append(
            {
                "device": device.name,
                "preset": name,
                **case,
                **values,
                "bound": prediction.bound,
                "terms": prediction.terms,
            }
        )
        return prediction

    for rank in arguments.ranks:
        parts: dict[int, list[Prediction]] = {m: [] for m in arguments.rows}
        for projection in projections(config):
            for m in arguments.rows:
                loops = min(m, arguments.loops)
                case = {"kind": "linear", "projection": projection.name, "rank": rank, "loops": loops, "rows": m}
                parts[m].append(add(case, predict_linear(device, tables, projection, m, rank, loops)))
                best, tiling = find_faster_tiling(device, tables, projection, m, rank, loops)
                records[-1] |= {"best_seconds": best.seconds, "best_tiling": tiling}
        for m, own in parts.items():
            total = {term: sum(part.terms[term] for part in own) for term in own[0].terms}
            slowest = max(own, key=lambda part: part.seconds - part.floor)
            case = {"kind": "layer", "projection": "layer", "rank": rank, "loops": min(m, arguments.loops), "rows": m}
            add(case, Prediction(total, sum(part.floor for part in own), slowest.bound))
        for projection in projections(config):
            for m in arguments.prefill_rows:
                case = {"kind": "linear prefill", "projection": projection.name, "rank": rank, "loops": 1, "rows": m}
                add(case, predict_prefill(device, tables, projection, m, rank))
    spec = attention_spec(config)
    for kind, count in [*(("decode", count) for count in arguments.attention_rows), ("prefill", 1)]:
        for context in arguments.contexts:
            queries = 1 if kind == "decode" else min(CHUNK, context)
            case = {"kind": kind, "count": count, "context": context}
            add(case, predict_attention(device, tables, spec, kind, count, context, queries))
    return records


def read_measured(path: Path, device: Device, name: str) -> dict[tuple[Any, ...], float]:
    """Map cases to the seconds of ours, from a result of bench/kernels.py; raise `UserError` for other shapes."""
    result = read_json(path)
    with expect_whole_result(path, "kernels"):
        if result["shapes"] != name:
            raise UserError(f"{path}: found shapes of {result['shapes']}; expected {name}: see --preset")
        if device.name not in result["device"].lower():
            raise UserError(f"{path}: found device {result['device']}; expected one like {device.name}: see --device")
        found: dict[tuple[Any, ...], float] = {}
        for record in [*result.get("linear", []), *result.get("layer", [])]:
            key = (record["projection"], record["rank"], record["loops"], record["rows"])
            kind = "layer" if record["projection"] == "layer" else "linear"
            found[kind, *key] = record["seconds"]["ours"]["median"]
            if "prefill" in record["seconds"]:
                found["linear prefill", *key] = record["seconds"]["prefill"]["median"]
        for record in result.get("attention", []):
            found[record["kind"], record["count"], record["context"]] = record["seconds"]["ours"]["median"]
    return found


def add_measured(records: list[dict[str, Any]], measured: dict[tuple[Any, ...], float]) -> int:
    """Add `measured_seconds` to the records of which there is a measurement; return to how many."""
    count = 0
    for record in records:
        names = ("projection", "rank", "loops", "rows") if "rows" in record else ("count", "context")
        key = (record["kind"], *(record[name] for name in names))
        if key in measured:
            record["measured_seconds"] = measured[key]
            count += 1
    return count


def case_cells(record: dict[str, Any]) -> list[str]:
    if "rows" in record:
        name = record["projection"] + (", prefill" if record["kind"] == "linear prefill" else "")
        return [name, *(str(record[column]) for column in ("rank", "loops", "rows"))]
    return [f"attention, {record['kind']} of {record['count']}", "", "", str(record["context"])]


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}" if seconds else ""


def make_table(records: list[dict[str, Any]]) -> Table:
    """Make a device's and preset's table of predictions, with the terms, and the measurements if there are any."""
    has_measured = any("measured_seconds" in record for record in records)
    header = [
        "case",
        "rank",
        "loops",
        "rows",
        "time",
        "floor",
        "time/floor",
        "gap",
        "begin",
        "stream",
        "shrink",
        "end",
        "then",
        "bound",
        "faster tile/slices",
    ]
    rows = []
    for record in records:
        terms = record["terms"]
        then = terms.get("add", 0.0) + terms.get("combine", 0.0)
        times = [record["seconds"], record["floor_seconds"]]
        own = [terms.get(name, 0.0) for name in ("gap", "begin", "stream", "shrink", "end")]
        cells = [*case_cells(record), *map(microseconds, times), f"{record['over_floor']:.2f}"]
        best = record.get("best_seconds", math.inf)
        faster = f"{record['best_tiling']}: {microseconds(best)}" if best < NOTABLY_FASTER * record["seconds"] else ""
        cells += [*map(microseconds, [*own, then]), record["bound"], faster]
        if has_measured:
            seconds = record.get("measured_seconds")
            cells += [microseconds(seconds or 0.0), f"{seconds / record['seconds']:.2f}" if seconds else ""]
        rows.append(cells)
    title = f"{records[0]['preset']} on {records[0]['device']}: predicted microseconds (rows: of attention the context)"
    return Table(title, [*header, *(["measured", "measured/time"] if has_measured else [])], rows, (0, 13, 14), 1)


def list_tilings() -> str:
    """Compile csrc/tests/list_tilings.cpp and return the tilings of all presets' decode products, one a line."""
    cases = []
    for multiprocessors in sorted({device.multiprocessors for device in DEVICES.values()}):
        for projection in {p for name in PRESETS for p in projections(preset(name))}:
            fits = all(part.start % 128 == 0 for part in projection.slices())
            cases += [(multiprocessors, projection.outputs, projection.inputs, m, int(fits)) for m in ROWS]
    text = "\n".join(" ".join(map(str, case)) for case in sorted(set(cases)))
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "list_tilings"
        source = ROOT / "csrc" / "tests" / "list_tilings.cpp"
        subprocess.run(["c++", "-std=c++17", "-I", ROOT / "csrc", "-o", program, source], check=True)
        return subprocess.run([program], input=text, capture_output=True, text=True, check=True).stdout


def find_objects(build: Path) -> list[Path]:
    """List the objects with CUDA code below a build, or the file itself."""
    objects = [build] if build.is_file() else sorted(build.rglob("*.cu.o"))
    if not objects:
        raise UserError(f"--write: found no *.cu.o below {build}; expected a build with RRT_WITH_CUDA=1, or a library")
    return objects


def write_tables(build: Path, disassembler: Path | None) -> None:
    kernels = kernel_instructions.read_objects(find_objects(build), kernel_instructions.find_disassembler(disassembler))
    atomic_write(kernel_instructions.EXPECTED, kernel_instructions.format_table(kernels))
    atomic_write(TILINGS, "multiprocessors outputs inputs rows tile slices\n" + list_tilings())
    print(f"wrote {kernel_instructions.EXPECTED} and {TILINGS}")


def parse_arguments() -> argparse.Namespace:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEVICES, nargs="+", default=list(DEVICES), help="default: all")
    parser.add_argument("--preset", choices=PRESETS, nargs="+", default=list(PRESETS), help="default: all")
    for flag, default, purpose in (
        ("--rows", list(ROWS), f"decode rows M of the linears, of {' '.join(map(str, ROWS))}"),
        ("--ranks", [64, 512], "LoRA ranks"),
        ("--prefill-rows", [1024, 8192], "rows of loop_lora_prefill"),
        ("--attention-rows", [32], "decode rows of attention"),
        ("--contexts", [1024, 4096, 16384], "context lengths of attention"),
    ):
        text = f"{purpose} (default {' '.join(map(str, default))})"
        parser.add_argument(flag, type=int, nargs="+", metavar="N", default=default, help=text)
    parser.add_argument(
        "--loops", type=int, metavar="N", default=2, help="loops that the rows are mixed of (default 2)"
    )
    parser.add_argument(
        "--measured", type=Path, metavar="FILE", help="confront with bench/kernels.py's --json of a GPU"
    )
    parser.add_argument(
        "--write", type=Path, metavar="BUILD", help="read a build's or a library's machine code instead"
    )
    parser.add_argument(
        "--nvdisasm", type=Path, metavar="PATH", help="where cuobjdump and nvdisasm are (default: PATH, triton)"
    )
    add_json_flag(parser, "kernel-model")
    arguments = parser.parse_args()
    check_json_flag(arguments.json)
    if unknown := set(arguments.rows) - set(ROWS):
        raise UserError(f"--rows: found {min(unknown)}; expected some of {' '.join(map(str, ROWS))}")
    for name in ("ranks", "prefill_rows", "attention_rows", "contexts"):
        least = 0 if name == "ranks" else 1
        if min(getattr(arguments, name)) < least:
            raise UserError(
                f"--{name.replace('_', '-')}: found {min(getattr(arguments, name))}; expected {least} or more"
            )
    if arguments.measured and (len(arguments.device) > 1 or len(arguments.preset) > 1):
        raise UserError("--measured: found with several devices or presets; expected one --device and one --preset")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    if arguments.write is not None:
        write_tables(arguments.write, arguments.nvdisasm)
        return
    tables = Tables.read()
    groups = [
        predict_all(DEVICES[device], tables, name, arguments)
        for device in arguments.device
        for name in arguments.preset
    ]
    if arguments.measured is not None:
        measured = read_measured(arguments.measured, DEVICES[arguments.device[0]], arguments.preset[0])
        if not add_measured(groups[0], measured):
            raise UserError(f"{arguments.measured}: found none of the cases; see --rows, --ranks, --loops, --contexts")
    save_result(arguments.json, "kernel-model", {"predictions": [record for group in groups for record in group]})
    print_tables(make_table(group) for group in groups)


if __name__ == "__main__":
    run_command(main)
