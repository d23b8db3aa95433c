"""Model of the CUDA kernels' times, from what the compiler made of them; bench/kernel_model.py prints its predictions.

A launch begins (entry instructions, while the first bytes are on their way), streams and ends. It streams for as long
as the slowest of these takes:

    issue    the turns of a warp: each its stall counts and waits or, where warps share a scheduler, what they issue,
             multiply and load from shared memory together; times the waves of thread blocks
    latency  the bytes of the busiest multiprocessor, which has no more than its rings under way (Little's law)
    memory   bytes that come from memory or go there, at a copy's bandwidth
    cache    bytes that cross the second-level cache, which brings x to every thread block
    matmul   operations of prefill's products, at the best rate of any (clocks fall with the load)

Where a multiprocessor holds one block of a kernel, nothing streams between the end of one and the first bytes of the
next. Shrink runs beside the product, which waits for it where the code does, in the better of its two orders
(csrc/loop_lora/cuda_decode.h); product blocks that find no room beside shrink's start when these end. Between launches
there are gaps. Constants have their source beside them: a datasheet,
public measurements (gpu-benches: https://github.com/te42kyfo/gpu-benches, with the folder's name), or that they are
assumed. None has been measured with these kernels.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from bench import kernel_instructions, kernel_resources
from bench.attention_cases import AttentionSpec
from bench.kernel_instructions import KernelCode
from bench.linear_variants import Projection
from rrt.errors import UserError

TILINGS = kernel_resources.ROOT / "csrc" / "cuda" / "tilings.txt"
BYTES_PER_ELEMENT = 2
PARTS = 8
"""Of the columns of W (csrc/loop_lora/cuda_decode.h)."""
COLUMN_OUTPUTS = 16
"""Of a tile of the column kernel; the row kernel's have more."""
SHORT_PIECE, LONG_PIECE, MAX_SHORT_CONTEXT = 128, 256, 2048
"""Slots of decode attention's pieces (csrc/kv_cache/cuda_decode_attention.h)."""
PARTIAL_ENDS = 4
"""Floats of a piece's results beside a head's sums (csrc/kv_cache/cuda_attention.h)."""
STEP_COLUMNS, TURN_COLUMNS = 32, 64
"""Columns of W, or ranks of B_l, of which a part has whole numbers, and a turn at most."""
MAX_BYTES_IN_VAIN = 2 << 20
"""Of A_l, by shrink (csrc/loop_lora/cuda_tiles.h)."""
WARP_HINTS, HINT_BYTES, SMALL_WEIGHT = 16, 128 << 10, 16 << 20
"""Of W: hints of a warp of shrink, bytes that a multiprocessor asks for by them, and bytes of a W that stays in the
second-level cache (likewise). Assumed: that it asks for a line of 128 bytes in 2.7 cycles at least; copies ask for one
in two or less."""
HINT_CYCLES, FILLING_CYCLES = 42, 56
"""That a warp takes to give a hint, and to ask for a turn of A_l that its ring has room for; as compiled."""

LATENCY = 0.7e-6
"""Seconds from a request to its bytes while memory is busy. Assumed: 650 idle cycles (gpu-benches), and queues."""
WARP_CYCLES_OF_SHARED = 4
"""Of shared memory for 16 bytes per lane: 512 bytes at 128 a cycle (datasheet)."""
HMMA_FLOPS = 2 * 16 * 8 * 16
TURN_SLOTS = 16
"""Slots of a turn of a warp of decode attention (likewise)."""
FEW_PIECES, MANY_PIECES = 8, 32
"""Pieces that combining loads in a trip, the first always few; many where there may be more than that (likewise)."""


@dataclass(frozen=True)
class Device:
    """A GPU; rates are per second, times in seconds.

    Attributes:
        hertz: boost clock for which the datasheet counts the tensor cores' FLOP/s.
        copy: bandwidth of a copy. H200: measured; others: 85% and 90% of the datasheet's. What only reads is as fast or
            faster: 1.0 times on an A100, 1.14 times on an H100 and an H200 (gpu-benches: gpu-l2-cache and cuda-stream
            against gpu-small-kernels); 1 is taken. The only public rate of reading on an H200 (gpu-l2-cache) is 3.9
            TB/s, where a copy takes 3.4: that card is slower than ours.
        cache: bandwidth of the second-level cache, of 20 to 30 MB: 5.4 TB/s on an A100, 9.7 on an H200 (gpu-benches:
            gpu-l2-cache). H100: 6.9 on the PCIe card there, by multiprocessors (132 for 114) and clocks (1.83 for 1.755
            GHz).
        matmul: best rate of a product in 16 bits. H200: measured; H100: the same chip; A100: 80% of the datasheet's.
        hmma_cycles: of a scheduler for one m16n8k16. A100: 1024 multiply-adds a cycle and multiprocessor (datasheet);
            H100: twice that, of which mma.sync reaches 63% (arXiv 2402.13499).
        gap: from the end of a kernel until the next one works. In a graph of kernels that only scale 32 KB, one takes
            1.34 us on an A100 and 2.25 on an H200 (gpu-benches: gpu-small-kernels); a load and a store are taken off.
        launch: from the begin of a kernel that lets the next one start until that one works. Assumed: half of a gap.
        trigger: from the end of a kernel to the next one, which was launched early and only waits. Assumed.
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
    launch: float
    trigger: float

    @property
    def has_dependent_launch(self) -> bool:
        return self.arch != "sm_80"


H200 = Device("h200", "sm_90a", 132, 1.83e9, 4.3e12, 9.7e12, 790e12, 6.4, gap=2e-6, launch=1e-6, trigger=0.5e-6)
DEVICES = {
    "a100": Device("a100", "sm_80", 108, 1.41e9, 1.7e12, 5.4e12, 250e12, 8.0, 1.1e-6, 1.1e-6, 1.1e-6),
    "h100": replace(H200, name="h100", copy=3.0e12, cache=8.3e12),
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
    "loop_lora::row_kernel": "tokens warp_tiles stages shrink",
    "loop_lora::column_kernel": "tokens parts stages shrink",
    "loop_lora::prefill_kernel": "token_warps out_warps token_tiles out_groups stages",
    "kv_cache::decode_kernel": "head_dim stages",
    "kv_cache::prefill_kernel": "head_dim warps row_tiles slots stages",
    "kv_cache::combine_kernel": "head_dim at_once",
}
"""Names of the template arguments after the dtype."""


@dataclass(frozen=True)
class Compiled:
    """An instance of a kernel."""

    code: KernelCode
    resources: kernel_resources.Kernel

    @cached_property
    def arguments(self) -> dict[str, int]:
        kernel, _, *values = re.split(r"[<>,] *", self.code.name.removesuffix(">"))
        numbers = [{"false": 0, "true": 1}.get(value, value) for value in values]
        names = ARGUMENTS.get(kernel, "").split()
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
    """What a launch has to do in equal thread blocks."""

    blocks: int
    turns: float
    """That the last warp takes to be done."""
    block_bytes: float
    """That a block brings into its multiprocessor."""
    memory_bytes: float
    """That the launch reads from memory and writes, each byte once."""
    flops: float = 0.0
    mean_turns: float = 0.0
    """Of all warps, if some have fewer."""
    x_share: float = 0.0
    """Of what is copied to shared memory."""


@dataclass(frozen=True)
class Times:
    """Seconds of a launch: before and after its stream, of the stream by each limit, and of the last turn.

    Attributes:
        between: from one wave of blocks to the next, an end and a begin, where a multiprocessor holds one block.
        more_waves: of the busiest multiprocessor, after its first.
        copied: limit by issue, if all of W had been copied before.
    """

    begin: float
    end: float
    limits: dict[str, float]
    last_turn: float
    between: float
    more_waves: int
    copied: float

    @property
    def stream(self) -> float:
        """The slowest limit; the last bytes take a turn more."""
        return self.stream_with(0.0)

    def stream_with(self, filled: float) -> float:
        """Return the stream's time if this share of its bytes had been fetched before."""
        streams = []
        for name, seconds in self.limits.items():
            if name == "issue":
                streams.append(seconds + filled * (self.copied - seconds) + self.more_waves * self.between)
            else:
                # Of what all multiprocessors share, others make use meanwhile, once they are not in step any more:
                # after their second begin, it is assumed.
                waves = self.more_waves if name == "latency" else min(1, self.more_waves)
                streams.append(seconds * (1 - filled) + self.last_turn + waves * self.between)
        return max(streams)

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
    own = code.cycles / device.hertz

    def beside_others(accesses: float) -> float:
        """Return what the units that warps share take for a turn of each."""
        issue = warps_per_scheduler * max(code.instructions, code.hmma * device.hmma_cycles)
        return max(issue, resident * kernel.warps * accesses * WARP_CYCLES_OF_SHARED) / device.hertz

    def issue(copies: float) -> float:
        return waves * max(work.turns * own, (work.mean_turns or work.turns) * beside_others(code.lds + copies))

    waves = math.ceil(busiest / resident)
    under_way = resident * kernel.bytes_under_way
    limits = {
        "issue": issue(code.ldgsts),
        "latency": busiest * work.block_bytes / under_way * LATENCY if under_way else 0.0,
        "memory": work.memory_bytes / device.copy,
        "cache": work.blocks * work.block_bytes / device.cache,
        "matmul": work.flops / device.matmul,
    }
    end = (code.sums_cycles if stores_sums else code.exit_cycles) / device.hertz
    begin = code.entry_cycles / device.hertz
    if code.ldgsts:
        begin = max(begin, code.copy_cycles / device.hertz + LATENCY)
    # Nothing is fetched in the last turn.
    last_turn = max(own, beside_others(code.lds)) if work.turns else 0.0
    between = begin + end if resident == 1 else 0.0
    return Times(begin, end, limits, last_turn, between, waves - 1, issue(code.ldgsts * work.x_share))


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
    warp_outputs = 16 * (kernel.arguments["warp_tiles"] if by_rows else 1)
    outputs = warp_outputs * (kernel.warps if by_rows else 1)
    parts = PARTS // slices if by_rows else 1  # of a warp
    # An mma takes 16 outputs x 16 columns for 8 tokens.
    turn_steps = kernel.code.hmma * 256 / (tokens / 8) / warp_outputs / STEP_COLUMNS
    turns = []
    for part in range(PARTS):
        # Every eighth step of B_l is of the part.
        steps = max(0, math.ceil((math.ceil(rank / STEP_COLUMNS) - part) / PARTS))
        turns.append(math.ceil(k / STEP_COLUMNS / PARTS / turn_steps) + loops * math.ceil(steps / turn_steps))
    rows, ranks = min(m, tokens), loops * rank
    block_bytes = BYTES_PER_ELEMENT * (outputs + rows) * (k + ranks) / slices
    if slices > 1:
        block_bytes += 4 * parts * outputs * rows
    memory_bytes = BYTES_PER_ELEMENT * (n * (k + ranks) + m * (k + n))
    blocks = math.ceil(n / outputs) * math.ceil(m / tokens) * slices
    mean_turns = sum(turns) / PARTS * parts
    x_share = rows / (outputs + rows)
    work = Work(blocks, sum(turns[:parts]), block_bytes, memory_bytes, mean_turns=mean_turns, x_share=x_share)
    return work, launch_times(device, kernel, work, slices > 1)


def adding_time(device: Device, tables: Tables, kernel: str, elements: int) -> float:
    """Predict a launch that adds parts' sums, which are still in the cache."""
    add = tables.find(device, kernel)
    threads = add.resources.threads
    return launch_times(
        device, add, Work(math.ceil(elements / threads), 0, threads * (4 * PARTS + BYTES_PER_ELEMENT), 0)
    ).total


@dataclass(frozen=True)
class Shrink:
    """Prediction of T = A_l x: all of it, and of its first launch, which alone takes shared memory."""

    seconds: float = 0.0
    kernel: Compiled | None = None
    blocks: int = 0
    first_seconds: float = 0.0

    def room_beside(self, device: Device, product: Compiled) -> int:
        """Return for how many blocks of the product there is shared memory while the blocks of shrink run."""
        everywhere = device.multiprocessors * product.resources.blocks
        if self.kernel is None:
            return everywhere
        own, other = (
            kernel.resources.shared_bytes + kernel_resources.RESERVED_SHARED_BYTES for kernel in (product, self.kernel)
        )
        occupied = min(self.blocks, device.multiprocessors)
        deep = math.ceil(self.blocks / device.multiprocessors)
        left = kernel_resources.SHARED_BYTES[device.arch] - min(deep, self.kernel.resources.blocks) * other
        return everywhere - occupied * (product.resources.blocks - min(product.resources.blocks, max(0, left // own)))


def predict_shrink(device: Device, tables: Tables, ranks: int, k: int, m: int, loops: int, gap: float) -> Shrink:
    """Predict T = A_l x, in the fastest way: by columns, with the parts in thread blocks of their own, or by rows."""
    by_warps: dict[int, list[Compiled]] = {}
    for name in ("loop_lora::column_kernel", "loop_lora::row_kernel"):
        for instance in tables.instances(device, name):
            if instance.arguments["shrink"]:
                by_warps.setdefault(instance.warps, []).append(instance)
    ways = []
    for warps, instances in by_warps.items():
        kernel = choose_tokens(instances, m)
        slices = 1 if warps == PARTS else PARTS
        work, times = decode_launch(device, kernel, slices, loops * ranks, k, m, 0, 0)
        in_rings = min(work.blocks, device.multiprocessors * kernel.resources.blocks) * min(
            kernel.bytes_under_way, work.block_bytes
        )
        # The loops' trip, from when it has waited; code for an A100 has no instruction for that.
        begin = max(kernel.code.wait_cycles, kernel_instructions.LOAD_LATENCIES[device.arch].far) / device.hertz
        if prefetches_shrink(kernel, ranks, k, loops):
            # Of A_l the rings have been filled, of which memory has brought what it could since the last kernel's end.
            # With the loops comes x.
            x_seconds = fresh_seconds(device, work.x_share * in_rings)
            first_bytes = times.begin + (1 - work.x_share) * in_rings / device.copy
            if device.has_dependent_launch:
                first_bytes -= device.trigger
            begin = max(begin, x_seconds, first_bytes)
            stream = times.stream_with(in_rings / (work.blocks * work.block_bytes))
        else:
            begin, stream = begin + LATENCY, times.stream
        adding = 0.0
        if slices > 1:
            adding = gap + adding_time(device, tables, "loop_lora::add_shrunk_kernel", m * ranks)
        first = begin + stream + times.end
        ways.append(Shrink(first + adding, kernel, work.blocks, first))
    return min(ways, key=lambda way: way.seconds)


def fresh_seconds(device: Device, num_bytes: float) -> float:
    """Predict how long bytes take to come, of which the last kernel has written some."""
    return kernel_instructions.LOAD_LATENCIES[device.arch].far / device.hertz + num_bytes / device.cache


def prefetches_shrink(kernel: Compiled, ranks: int, k: int, loops: int) -> bool:
    """Return whether shrink fetches A_l before it knows the loops, as csrc/loop_lora/cuda_tiles.h has it."""
    ring_columns = PARTS * (kernel.arguments["stages"] - 1) * TURN_COLUMNS  # of all parts
    return (loops - 1) * ranks * BYTES_PER_ELEMENT * min(k, ring_columns) <= MAX_BYTES_IN_VAIN


def share_before_rank(outputs: int, slices: int, rank: int) -> float:
    """Return the share of a product's stream before the first turn of B_l, as csrc/loop_lora/cuda_tiles.h has it."""
    if outputs == COLUMN_OUTPUTS:
        return 1.0
    parts_with_rank = min(PARTS, max(1, math.ceil(rank / STEP_COLUMNS)))
    return slices / PARTS if slices > 1 else (PARTS + 1 - parts_with_rank) / PARTS


@dataclass(frozen=True)
class Hints:
    """What shrink asks the second-level cache for in the late order, while the product is being launched.

    Attributes:
        num_bytes: of W.
        first_seconds: from the end of the kernel before until they are asked for.
        wait_seconds: likewise, until shrink has waited; or it gave hints after that, for `after_wait` seconds.
    """

    num_bytes: int
    first_seconds: float
    wait_seconds: float
    after_wait: float


def predict_hints(
    device: Device, product: Compiled, slices: int, n: int, k: int, m: int, loops: int, ranks: int, shrink: Shrink
) -> Hints:
    """Predict shrink's hints, as csrc/loop_lora/cuda_tiles.h chooses them."""
    kernel = shrink.kernel
    if kernel is None or not kernel.code.hint_cycles:
        return Hints(0, device.trigger, device.trigger, 0.0)
    tokens, by_rows = product.arguments["tokens"], "::row_kernel" in product.code.name
    outputs = 16 * (product.arguments["warp_tiles"] * product.warps if by_rows else 1)
    has_whole_rows = BYTES_PER_ELEMENT * n * k <= SMALL_WEIGHT
    runs = 1 if has_whole_rows else slices if by_rows else PARTS
    longest = k if has_whole_rows else (k // runs - STEP_COLUMNS) // TURN_COLUMNS * TURN_COLUMNS
    tiles = device.multiprocessors * product.resources.blocks // (math.ceil(m / tokens) * slices)
    rows, warps = min(n, tiles * outputs), shrink.blocks * kernel.warps
    most = min((device.trigger + device.launch) * device.copy, min(shrink.blocks, device.multiprocessors) * HINT_BYTES)
    hinted_rows = min(rows, warps * WARP_HINTS // runs)
    if has_whole_rows:
        hinted_rows = min(hinted_rows, int(most / (BYTES_PER_ELEMENT * k)))
    hints = math.ceil(rows / math.ceil(rows / hinted_rows)) * runs
    columns = longest
    if not has_whole_rows:
        columns = min(longest, int(most / (BYTES_PER_ELEMENT * hints)) // TURN_COLUMNS * TURN_COLUMNS)
    seconds = math.ceil(hints / warps) * HINT_CYCLES / device.hertz
    turns = math.ceil(k / PARTS / TURN_COLUMNS)
    first = (kernel.code.hint_cycles + FILLING_CYCLES * (min(turns, kernel.arguments["stages"] - 1) - 1)) / device.hertz
    if prefetches_shrink(kernel, ranks, k, loops):
        wait = max(device.trigger, first + seconds)
        return Hints(BYTES_PER_ELEMENT * hints * columns, first, wait, 0.0)
    first += device.trigger + kernel_instructions.LOAD_LATENCIES[device.arch].far / device.hertz
    return Hints(BYTES_PER_ELEMENT * hints * columns, first, device.trigger, seconds)


def product_instances(device: Device, tables: Tables) -> dict[int, list[Compiled]]:
    """Map a tile's outputs to the instances of the decode product that have it."""
    found: dict[int, list[Compiled]] = {}
    for each in tables.instances(device, "loop_lora::row_kernel"):
        if not each.arguments["shrink"]:
            found.setdefault(16 * each.arguments["warp_tiles"] * each.warps, []).append(each)
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
    next_gap = device.trigger if device.has_dependent_launch else device.gap
    ranks = sum(projection.ranks(rank))
    shrink = predict_shrink(device, tables, ranks, k, m, loops, next_gap) if rank > 0 else Shrink()
    if device.has_dependent_launch and product.code.triggers_early:
        # Both read from memory at once.
        a_bytes = BYTES_PER_ELEMENT * loops * ranks * k
        memory = times.limits["memory"] + a_bytes / device.copy
        stream = replace(times, limits={**times.limits, "memory": memory}).stream
        # Early: the ring fills with W while the kernel before ends and shrink runs; then x comes, and the rest streams.
        waited = shrink.seconds + device.trigger if rank > 0 else 0.0
        room = shrink.room_beside(device, product)
        first_wave = min(work.blocks, device.multiprocessors * product.resources.blocks)
        in_rings = min(first_wave, room) * product.bytes_under_way
        filled = min(1.0, in_rings / (work.blocks * work.block_bytes))
        # What x the rings have room for comes first; the kernel before has just written it.
        rows = min(m, product.arguments["tokens"])
        x_seconds = fresh_seconds(device, in_rings * rows / (outputs + product.arguments["tokens"]))
        # Memory works from the first request on, until the rings are full.
        rest = max(times.stream_with(filled), times.begin + stream - device.trigger - waited - x_seconds)
        early = {"gap": device.trigger, "begin": x_seconds, "stream": rest, "shrink": waited}
        # Late: they run side by side, until a block needs T, or where it finds no room before shrink's blocks end.
        hints = predict_hints(device, product, slices, n, k, m, loops, ranks, shrink)

        def late_order(hints: Hints) -> dict[str, float]:
            # Memory works from the hints on.
            gap = hints.wait_seconds + device.launch
            until_product = gap + product.code.copy_cycles / device.hertz - hints.first_seconds
            ahead = min(hints.num_bytes / device.copy, max(0.0, until_product))
            stream = replace(times, limits={**times.limits, "memory": max(0.0, memory - ahead)}).stream
            needed = times.begin + stream * share_before_rank(outputs, slices, max(projection.ranks(rank)))
            waited = max(0.0, shrink.seconds + hints.after_wait - needed)
            return {"gap": gap, "begin": times.begin, "stream": stream, "shrink": waited}

        without = Hints(0, 0.0, device.trigger, 0.0)
        late = min((late_order(without), late_order(hints)), key=lambda order: sum(order.values()))
        if first_wave > room:
            alone = max(
                work.turns * product.code.cycles / device.hertz,
                work.block_bytes / product.bytes_under_way * LATENCY + times.last_turn,
            )
            late["shrink"] = max(late["shrink"], shrink.first_seconds - device.launch + alone - late["stream"])
        terms |= min((early, late) if rank > 0 else (early,), key=lambda order: sum(order.values()))
    elif rank > 0:
        terms["shrink"] = shrink.seconds + device.gap
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
            tile_m = 16 * kernel.arguments["token_warps"] * kernel.arguments["token_tiles"]
            tile_n = 32 * kernel.arguments["out_warps"] * kernel.arguments["out_groups"]
            return tile_m, tile_n, math.ceil(m / tile_m) * sum(math.ceil(outputs / tile_n) for outputs in segments)

        def cost(kernel: Compiled) -> tuple[int, int]:
            tile_m, tile_n, blocks = tiling(kernel)
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
    head_tiles = math.ceil(group / 16)  # of decode
    kernel = tables.find(device, f"kv_cache::{kind}_kernel", head_dim=dim)
    row_tiles = kernel.arguments.get("row_tiles", 1)
    # For 16 slots and 16 rows it takes dim / 8 mmas of q k, and as many of p v.
    slots = 16 * kernel.code.hmma / (dim / 4) / row_tiles
    slot_bytes = 2 * dim * BYTES_PER_ELEMENT
    memory_bytes = spec.min_bytes(count, context, queries)
    piece_slots = SHORT_PIECE if context <= MAX_SHORT_CONTEXT else LONG_PIECE
    pieces = math.ceil(context / piece_slots) if kind == "decode" else 1
    if kind == "decode":
        blocks = count * spec.num_kv_heads * head_tiles * pieces
        seen = min(context, piece_slots)
        work = Work(blocks, math.ceil(seen / kernel.warps / slots), seen * slot_bytes, memory_bytes)
    else:
        blocks = count * spec.num_kv_heads * math.ceil(queries * group / 16 / row_tiles / kernel.warps)
        seen = context - queries // 2
        work = Work(blocks, math.ceil(seen / slots), seen * slot_bytes, memory_bytes)
    # In a row of decodes, each lets the next one start once it has waited, or its combining does.
    gap, combine_seconds = device.trigger if kind == "decode" else device.gap, 0.0
    early = gap  # from the end of the decode before to the end of this one's wait, while its blocks are there
    if pieces > 1:
        at_once = MANY_PIECES if pieces > MANY_PIECES else FEW_PIECES
        combine = tables.find(device, "kv_cache::combine_kernel", head_dim=dim, at_once=at_once)
        later_trips = math.ceil(pieces / at_once) - (at_once == FEW_PIECES)  # a trip of many begins with the first
        combined = Work(count * spec.num_heads, later_trips, pieces * 4 * (dim + PARTIAL_ENDS), 0)
        combine_seconds = device.trigger + launch_times(device, combine, combined).total
        if combine.code.triggers_early:
            early = combine_seconds + gap
            # If all its blocks wait beside the decode's, the next decode is launched by then, and its blocks find room
            # as soon as those before end. Else combining begins then, and the next decode is launched a while later.
            room = combine.resources.blocks_beside(kernel.resources) * device.multiprocessors
            if combined.blocks > room:
                early -= device.launch
        else:
            gap, early = device.gap, 0.0
    times = launch_times(device, kernel, work)
    if kind == "decode":
        # The last bytes are values: the turn's scores have been weighed while they came.
        times = replace(times, last_turn=times.last_turn * kernel.code.last_cycles / kernel.code.cycles)
    if kernel.code.hint_cycles and device.has_dependent_launch:
        # Memory works from the hints of the first wave's blocks on; copies would come so much later, after the wait.
        blocks = min(work.blocks, device.multiprocessors * kernel.resources.blocks)
        first_turns = blocks / head_tiles * min(seen, kernel.warps * TURN_SLOTS) * slot_bytes
        hint = kernel.code.hint_cycles / device.hertz
        ahead = min(first_turns / device.copy, max(0.0, early - hint + kernel.code.copy_cycles / device.hertz))
        limits = {**times.limits, "memory": max(0.0, times.limits["memory"] - ahead)}
        times = replace(times, limits=limits, begin=times.begin + max(0.0, hint - early))
    terms = {"gap": gap, "begin": times.begin, "stream": times.stream, "end": times.end, "combine": combine_seconds}
    return Prediction(terms, floor_of(device, memory_bytes, spec.flops(count, context, queries)), times.bound)
