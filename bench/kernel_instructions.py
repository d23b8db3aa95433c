"""Hot loops of the compiled CUDA kernels, read from their machine code without a GPU.

ptxas writes into every instruction how many cycles it holds back the warp's next one (stall count), and which of six
scoreboards it sets or waits for. Along the way that a loop takes most of the time, the stall counts add up to what an
iteration takes at least; with the latencies below behind the scoreboards, to what a lone warp takes.
"""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import astuple, dataclass, fields
from functools import partial
from operator import eq
from pathlib import Path

from bench.kernel_resources import ROOT, short_name
from rrt.errors import UserError

EXPECTED = ROOT / "csrc" / "cuda" / "instructions.txt"

LATENCIES = {"LDS": 30, "LDSM": 33, "SHFL": 24, "S2R": 25, "S2UR": 25, "LDC": 30, "BAR": 30}
"""Cycles until a result is there; as microbenchmarks find them on A100 and H100 (arXiv 2402.13499), rounded."""
FIRST_LEVEL = 40
"""That of LDG, where its data are in the first-level cache: from the same source."""


@dataclass(frozen=True)
class LoadLatency:
    """Cycles of an LDG whose data are not in the first-level cache.

    Attributes:
        memory: idle memory.
        far: the half of the second-level cache that is not the multiprocessor's own. What another one has just written
            is there for half of all addresses, and a warp waits for the slowest of its loads.
        near: its own half, where what has been read before is found again.
    """

    memory: int
    far: int
    near: int


LOAD_LATENCIES = {"sm_80": LoadLatency(570, 425, 210), "sm_90a": LoadLatency(650, 475, 265)}
"""By architecture, at 100, 35 and 10 MB (gpu-benches: cuda-latency and gpu-latency, of an A100 and an H100)."""
UNWANTED_LOAD = 265
"""Cycles that a way costs more for each load that it is not looked for."""
OTHER_LATENCY, READ_LATENCY = 20, 12
"""Of any other instruction that sets a scoreboard, and until an operand has been read; assumed."""

MISSING = (
    "--nvdisasm: found no cuobjdump and nvdisasm on PATH or in an installed triton; expected both in one folder, "
    "as in the CUDA toolkit or, after pip install triton, in triton/backends/nvidia/bin"
)


_SIZES = {"128": 8, "64": 4, "U16": 1}


def _opcode(text: str) -> list[str]:
    words = text.split()
    return words[1 if words[0].startswith("@") else 0].split(".")


@dataclass(frozen=True)
class Instruction:
    address: int
    name: str
    """Without modifiers: HMMA. STG32 stores a float32, STG what is narrower or a vector."""
    text: str
    """With predicate, modifiers and operands."""
    control: int
    """The upper half of its 128 bits."""

    @property
    def stall(self) -> int:
        return self.control >> 41 & 15

    @property
    def weight(self) -> int:
        """Bytes that it moves per lane, in units of two, if its modifiers say so; else 1."""
        return max(size if mark in self.modifiers else 1 for mark, size in _SIZES.items())

    @property
    def modifiers(self) -> list[str]:
        return _opcode(self.text)[1:]

    @property
    def is_predicated(self) -> bool:
        return self.text.startswith("@")

    @property
    def is_bias(self) -> bool:
        return self.name == "LDG" and self.is_predicated and "128" in self.modifiers


@dataclass(frozen=True)
class KernelCode:
    """What the machine code says of one kernel; counts and cycles are those of an iteration of its hot loop.

    Attributes:
        entry_cycles: from the first instruction to the loop, or to the end if no loop has an mma. In a kernel that
            waits for the one before at its begin, from there: by then it has been launched.
        copy_cycles: likewise, to the first copy.
        wait_cycles: in a kernel that copies before it waits, from there to the loop, with all loads.
        exit_cycles: from the loop to the end, with all stores of a full tile.
        sums_cycles: the same, if it stores sums in float32 for a kernel that adds them.
        stalls: sum of stall counts; `cycles` waits for scoreboards, too.
        last_cycles: of `cycles`, those after the iteration's last wait for copies; 0 if it has none.
        lds: loads from shared memory, LDS and LDSM.
        triggers_early: the dependent kernel may start before this one has waited for the one before.
        hint_cycles: from the first instruction to the first that asks the second-level cache for bytes, with one turn
            of the copies that come before; 0 if none does.
    """

    arch: str
    entry_cycles: int
    copy_cycles: int
    wait_cycles: int
    exit_cycles: int
    sums_cycles: int
    instructions: int
    stalls: int
    cycles: int
    last_cycles: int
    hmma: int
    lds: int
    ldgsts: int
    ldg: int
    bar: int
    triggers_early: int
    hint_cycles: int
    name: str


def find_disassembler(given: Path | None) -> Path:
    """Return the path of cuobjdump, which needs nvdisasm beside it; raise `UserError` if there is none."""
    if given is not None:
        folders = [given if given.is_dir() else given.parent]
    else:
        spec = importlib.util.find_spec("triton")
        found = shutil.which("nvdisasm")
        folders = [Path(found).parent] if found else []
        folders += [Path(place) / "backends/nvidia/bin" for place in (spec and spec.submodule_search_locations) or ()]
    for folder in folders:
        if (folder / "cuobjdump").is_file() and (folder / "nvdisasm").is_file():
            return folder / "cuobjdump"
    raise UserError(MISSING if given is None else f"{MISSING}; {given} has not")


_CODE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/")
_CONTROL = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")


def parse_sass(text: str) -> dict[tuple[str, str], list[Instruction]]:
    """Map (architecture, mangled name) to instructions, from the output of cuobjdump -sass."""
    found: dict[tuple[str, str], list[Instruction]] = {}
    arch, code = "", []
    pending: re.Match[str] | None = None
    for line in text.splitlines():
        if match := re.search(r"code for (sm_\w+)", line):
            arch = match[1]
        elif match := re.search(r"Function : (\w+)", line):
            code = found.setdefault((arch, match[1]), [])
        elif match := _CODE.match(line):
            pending = match
        elif pending and (match := _CONTROL.match(line)):
            name, *modifiers = _opcode(pending[2])
            if name == "STG" and not _SIZES.keys() & modifiers:
                name = "STG32"
            code.append(Instruction(int(pending[1], 16), name, pending[2], int(match[1], 16)))
            pending = None
    return found


def cycles_of(path: list[Instruction], loads_from: int, passes: int = 1) -> int:
    """Return the cycles that a lone warp takes for the last of so many passes; `loads_from`: the latency of LDG."""
    latencies = {**LATENCIES, "LDG": loads_from}
    time = begin = 0
    ready = [0] * 6
    for _ in range(passes):
        begin = time
        for instruction in path:
            time = max([time, *(ready[i] for i in range(6) if instruction.control >> 52 >> i & 1)])
            for shift, latency in ((46, latencies.get(instruction.name, OTHER_LATENCY)), (49, READ_LATENCY)):
                if (scoreboard := instruction.control >> shift & 7) < 6:
                    ready[scoreboard] = max(ready[scoreboard], time + latency)
            time += max(1, instruction.stall) + (LATENCIES["BAR"] if instruction.name == "BAR" else 0)
    return time - begin


class FlowGraph:
    """The ways through a kernel: which instructions may follow which, with the edges that close loops apart."""

    def __init__(self, code: list[Instruction]) -> None:
        self.code = code
        at = {instruction.address: i for i, instruction in enumerate(code)}
        self.next: list[list[int]] = []
        joins: dict[str, int] = {}
        for i, one in enumerate(code):
            target = re.search(r"\b0x([0-9a-f]+)$", one.text)
            to = at.get(int(target[1], 16)) if target else None
            following = [i + 1] if i + 1 < len(code) else []
            if one.name == "BSSY" and to is not None:
                joins[one.text.split()[1].rstrip(",")] = to
            elif one.name == "BSYNC":
                join = joins.get(one.text.split()[-1])
                following = (following if one.is_predicated or join is None else []) + ([] if join is None else [join])
            elif one.name == "BRA" and to is not None:
                goes_on = one.is_predicated or re.search(r"BRA\.(DIV|CONV)|BRA(\.\w+)* !?U?P", one.text)
                following = [*(following if goes_on else []), to]
            elif one.name == "CALL" and one.is_predicated and to is not None:  # sm_80's conditional jump out of a loop
                following = [*following, to]
            elif one.name in ("EXIT", "RET") and not one.is_predicated:
                following = []
            self.next.append(following)
        self.order: list[int] = []
        """Reachable instructions, each after all that follow it."""
        self.back_edges: list[tuple[int, int]] = []
        self._search()

    def _search(self) -> None:
        state = [0] * len(self.code)  # 1: on the way, 2: done
        stack = [(0, iter(self.next[0]))]
        state[0] = 1
        while stack:
            node, following = stack[-1]
            child = next(following, None)
            if child is None:
                state[node] = 2
                self.order.append(node)
                stack.pop()
            elif state[child] == 1:
                self.back_edges.append((node, child))
            elif state[child] == 0:
                state[child] = 1
                stack.append((child, iter(self.next[child])))
        closing = set(self.back_edges)
        self.forward = [[to for to in tos if (i, to) not in closing] for i, tos in enumerate(self.next)]
        self.before: list[list[int]] = [[] for _ in self.code]
        for i in self.order:
            for to in self.next[i]:
                self.before[to].append(i)

    def loop(self, end: int, head: int) -> set[int]:
        """Return the instructions of the loop that the edge from `end` to `head` closes."""
        nodes, left = {head}, [end]
        while left:
            node = left.pop()
            if node not in nodes:
                nodes.add(node)
                left.extend(self.before[node])
        return nodes

    def best_path(
        self,
        begins: list[int],
        is_end: Callable[[int], bool],
        wanted: Mapping[str, int],
        inside: Set[int] | None = None,
        rare: Set[int] = frozenset(),
    ) -> list[Instruction]:
        """Return the way with most of the wanted instructions that aren't rare, and of these with the least stalls.

        `wanted` has how much each counts. [] if there is none.
        """
        best: dict[int, tuple[int, int, int]] = {}  # wanted, -stalls, next
        for node in self.order:
            if inside is not None and node not in inside:
                continue
            ways = [(*best[to][:2], to) for to in self.forward[node] if to in best]
            if is_end(node):
                ways.append((0, 0, -1))
            if ways:
                count, stalls, to = max(ways)
                one = self.code[node]
                gain = 0 if node in rare else wanted.get(one.name, 0) * one.weight
                cost = max(1, one.stall) + (UNWANTED_LOAD if one.name == "LDG" and not gain else 0)
                best[node] = (count + gain, stalls - cost, to)
        path = []
        node = max((begin for begin in begins if begin in best), key=lambda begin: best[begin][:2], default=-1)
        while node >= 0:
            path.append(self.code[node])
            node = best[node][2]
        return path


def _hot_path(graph: FlowGraph, latency: LoadLatency) -> tuple[set[int], int, list[Instruction]]:
    """Find the innermost loop that both fetches and multiplies, else the one with most loads: nodes, head and way."""
    loops = [(graph.loop(end, head), end, head) for end, head in graph.back_edges]
    for wanted, loads_from in (({"HMMA", "LDGSTS"}, FIRST_LEVEL), ({"LDG"}, latency.far)):
        found = [loop for loop in loops if wanted <= {graph.code[i].name for i in loop[0]}]
        ways = []
        for nodes, end, head in found:
            if any(other < nodes for other, _, _ in found):
                continue
            # What is in loops of its own happens between turns.
            rare = set().union(*(other for other, _, _ in loops if other < nodes))
            # Without mmas, a way that loads may leave out what it does with that: combining, which shuffles then.
            used = {"HMMA": 1, "LDGSTS": 1, "LDG": 1} | ({} if "HMMA" in wanted else {"SHFL": 1})
            path = graph.best_path([head], partial(eq, end), used, nodes, rare)
            if useful := sum(one.name in wanted for one in path):
                ways.append((cycles_of(path, loads_from, 2) / useful, head, nodes, path))
        if ways:
            _, head, nodes, path = min(ways, key=lambda way: way[:2])
            return nodes, head, path
    return set(), -1, []


def analyse(arch: str, name: str, code: list[Instruction]) -> KernelCode:
    graph, latency = FlowGraph(code), LOAD_LATENCIES[arch]
    nodes, head, loop = _hot_path(graph, latency)
    exits = {i for i, one in enumerate(code) if one.name == "EXIT"}
    counts = Counter(one.name for one in loop if not one.text.startswith("@!PT"))
    if counts["HMMA"]:
        entry = graph.best_path([0], partial(eq, head), {"LDGSTS": 1, "STS": 1})
        leaving = sorted({to for i in nodes for to in graph.next[i]} - nodes)
        # Results pass through shared memory, sums of a row kernel do not. There are no biases.
        wanted = ({"STS": 1, "STG": 1}, {"STG32": 1})
        ways = [graph.best_path(leaving, exits.__contains__, stores) for stores in wanted]
        ends = [[one for one in way if not one.is_bias] for way in ways]
    else:
        entry, ends = graph.best_path([0], exits.__contains__, {"STG": 1, "STG32": 1}), [[], []]
    copy = next((i for i, one in enumerate(entry) if one.name == "LDGSTS"), None)
    waited = max((i for i, one in enumerate(entry[:copy]) if one.name == "ACQBULK"), default=0)
    # Of a kernel that copies before it waits; the loads are those of the loops.
    waits = {one.address for one in entry[copy:] if one.name == "ACQBULK"} if copy else set()
    behind = graph.best_path([i for i, one in enumerate(code) if one.address in waits], partial(eq, head), {"LDG": 1})
    wait = next((i for i, one in enumerate(code) if one.name == "ACQBULK"), len(code))
    hints = {i for i, one in enumerate(code) if one.name == "UBLKPF"}
    arrived = max((i for i, one in enumerate(loop) if one.name == "DEPBAR"), default=len(loop))
    return KernelCode(
        arch=arch,
        # What adds finds what the kernel before has just written; the ends find what others have read.
        entry_cycles=cycles_of(entry[waited:], latency.memory if counts["HMMA"] else latency.far),
        copy_cycles=cycles_of(entry[waited:copy], latency.memory) if copy else 0,
        wait_cycles=cycles_of(behind, latency.far),
        exit_cycles=cycles_of(ends[0], latency.near),
        sums_cycles=cycles_of(ends[1], latency.near),
        instructions=len(loop),
        stalls=sum(one.stall for one in loop),
        cycles=cycles_of(loop, FIRST_LEVEL if counts["HMMA"] else latency.far, 2),
        last_cycles=cycles_of(loop[arrived:], FIRST_LEVEL),
        hmma=counts["HMMA"],
        lds=counts["LDS"] + counts["LDSM"],
        ldgsts=counts["LDGSTS"],
        ldg=counts["LDG"],
        bar=counts["BAR"],
        triggers_early=int(any(one.name == "PREEXIT" for one in code[:wait])),
        # The table's entries that it looks for are loads, and what it asks for before are copies; it does not wait.
        hint_cycles=cycles_of(
            graph.best_path([0], hints.__contains__, {"LDG": 1, "LDGSTS": 1, "ACQBULK": -1000}), latency.memory
        ),
        name=name,
    )


def read_objects(objects: list[Path], cuobjdump: Path) -> list[KernelCode]:
    """Disassemble object files or libraries; raise `UserError` for one without CUDA code."""
    found: dict[tuple[str, str], KernelCode] = {}
    for path in objects:
        done = subprocess.run([cuobjdump, "-sass", path], capture_output=True, text=True, check=False)
        kernels = parse_sass(done.stdout)
        if done.returncode != 0 or not kernels:
            said = (done.stderr.strip().splitlines() or ["no kernels"])[-1]
            raise UserError(f"{path}: found by {cuobjdump.name}: {said}; expected an object or library with CUDA code")
        mangled = "\n".join(name for _, name in kernels)
        names = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout
        for (arch, _), line, code in zip(kernels, names.splitlines(), kernels.values(), strict=True):
            found[arch, short_name(line)] = analyse(arch, short_name(line), code)
    return sorted(found.values(), key=lambda kernel: (kernel.arch, kernel.name))


def format_table(kernels: list[KernelCode]) -> str:
    rows = [[field.name for field in fields(KernelCode)], *([str(cell) for cell in astuple(k)] for k in kernels)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([*map(str.rjust, row[:-1], widths), row[-1]]) for row in rows]
    return "\n".join([*lines, ""])


def parse_table(text: str) -> list[KernelCode]:
    """Read a committed table, without the lines of tilings."""
    kernels = []
    for line in text.splitlines()[1:]:
        arch, *numbers, name = line.split(maxsplit=len(fields(KernelCode)) - 1)
        kernels.append(KernelCode(arch, *map(int, numbers), name))
    return kernels
