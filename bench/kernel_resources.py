"""Registers, shared memory and occupancy of every CUDA kernel, without a GPU: python bench/kernel_resources.py

Reads ptxas' report of the library's build (build/native-*, or --build), computes how many thread blocks and warps a
multiprocessor holds, prints a table, and compares it with csrc/cuda/resources.txt. Exit status 1 if a kernel has come
or gone, takes more registers or shared memory, or fits a multiprocessor fewer times; then either mend it or accept it:

    python bench/kernel_resources.py --update

Threads and dynamic shared memory are the launches' own: --launches names the compiled csrc/tests/list_launches.cpp.
"""

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rrt.common.cli import CommandParser, run_command
from rrt.errors import UserError

EXPECTED = ROOT / "csrc" / "cuda" / "resources.txt"
HEADER = "arch registers shared_bytes threads blocks warps kernel".split()

SHARED_BYTES = {"sm_80": 164 << 10, "sm_90a": 228 << 10}
"""Shared memory of a multiprocessor; its other limits are the same for both architectures."""
REGISTERS, WARPS, BLOCKS, SCHEDULERS = 65536, 64, 32, 4
RESERVED_SHARED_BYTES = 1024
"""Reserved for the system in every thread block."""


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture."""

    arch: str
    name: str
    registers: int
    shared_bytes: int
    """Static and dynamic, per thread block."""
    threads: int

    @property
    def blocks(self) -> int:
        """Thread blocks that a multiprocessor holds at once."""
        return self._blocks_in(BLOCKS, WARPS, REGISTERS // SCHEDULERS, SHARED_BYTES[self.arch])

    @property
    def warps(self) -> int:
        return self.blocks * self._block_warps

    def blocks_beside(self, other: "Kernel") -> int:
        """Return how many thread blocks a multiprocessor holds beside as many of the other kernel's as it holds."""
        registers = REGISTERS // SCHEDULERS - -(-other.warps // SCHEDULERS) * other._warp_registers
        shared = SHARED_BYTES[self.arch] - other.blocks * other._block_shared
        return self._blocks_in(BLOCKS - other.blocks, WARPS - other.warps, registers, shared)

    def _blocks_in(self, blocks: int, warps: int, registers: int, shared: int) -> int:
        """Return how many thread blocks there is room for; `registers`: of each scheduler, which has as many warps."""
        by_registers = registers // self._warp_registers * SCHEDULERS // self._block_warps
        return min(blocks, warps // self._block_warps, by_registers, shared // self._block_shared)

    @property
    def _block_warps(self) -> int:
        return -(-self.threads // 32)

    @property
    def _warp_registers(self) -> int:
        return -(-self.registers * 32 // 256) * 256  # given in units of 256

    @property
    def _block_shared(self) -> int:
        return -(-self.shared_bytes // 128) * 128 + RESERVED_SHARED_BYTES

    def row(self) -> list[str]:
        numbers = (self.registers, self.shared_bytes, self.threads, self.blocks, self.warps)
        return [self.arch, *map(str, numbers), self.name]


def parse_ptxas(log: str) -> dict[tuple[str, str], tuple[int, int]]:
    """Map (architecture, mangled name) to (registers, static shared bytes), from the output of ptxas -v."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    entry: tuple[str, str] | None = None
    for line in log.splitlines():
        if match := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            entry = (match[2], match[1])
        elif entry and (match := re.search(r"Used (\d+) registers", line)):
            shared = re.search(r"(\d+) bytes smem", line)
            found[entry] = (int(match[1]), int(shared[1]) if shared else 0)
            entry = None
    return found


def short_name(demangled: str) -> str:
    """Shorten a demangled function to `loop_lora::row_kernel<BFloat16, 8, 8>`."""
    name = re.sub(r"\(anonymous namespace\)::|\brrt::(device::)?", "", demangled)
    return re.sub(r"^void |\([^()]*\)$", "", name)


def parse_launches(text: str) -> dict[str, tuple[int, int]]:
    """Map short names to (threads, dynamic shared bytes), from the output of list_launches."""
    rows = (line.split("\t") for line in text.splitlines())
    return {name: (int(threads), int(shared)) for name, threads, shared in rows}


def read_kernels(logs: list[Path], launches: dict[str, tuple[int, int]]) -> list[Kernel]:
    """Join the compiler's and the launches' figures; raise `UserError` for a kernel that only one of them has."""
    compiled = {key: value for path in logs for key, value in parse_ptxas(path.read_text()).items()}
    mangled = "\n".join(name for _, name in compiled)
    demangled = subprocess.run(["c++filt"], input=mangled, capture_output=True, text=True, check=True).stdout
    names = [short_name(line) for line in demangled.splitlines()]
    for name in sorted(set(names) ^ set(launches)):
        known = "ptxas" if name in names else "list_launches"
        raise UserError(
            f"{name}: found by {known} only; expected it in csrc/tests/list_launches.cpp and in csrc/**/*.cu"
        )
    kernels = []
    for name, ((arch, _), (registers, static)) in zip(names, compiled.items(), strict=True):
        if arch not in SHARED_BYTES:
            raise UserError(f"{name}: found architecture {arch}; expected one of {', '.join(SHARED_BYTES)}")
        threads, dynamic = launches[name]
        kernels.append(Kernel(arch, name, registers, static + dynamic, threads))
    return sorted(kernels, key=lambda kernel: (kernel.arch, kernel.name))


def format_table(kernels: list[Kernel], nvcc: str) -> str:
    rows = [HEADER, *(kernel.row() for kernel in kernels)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER) - 1)]
    lines = [
        "  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows
    ]
    return "\n".join([f"nvcc {nvcc}", *lines, ""])


def parse_table(text: str) -> tuple[str, list[Kernel]]:
    """Read nvcc's version and the kernels from a committed table."""
    first, _, *lines = text.splitlines()
    kernels = []
    for line in lines:
        arch, registers, shared, threads, _, _, name = line.split(maxsplit=len(HEADER) - 1)
        kernels.append(Kernel(arch, name, int(registers), int(shared), int(threads)))
    return first.removeprefix("nvcc "), kernels


def compare(found: list[Kernel], expected: list[Kernel]) -> tuple[list[str], bool]:
    """Describe each kernel that differs in a line; True if any got worse: takes more, fits less often, new or gone."""
    by_key = [{(kernel.arch, kernel.name): kernel for kernel in kernels} for kernels in (found, expected)]
    lines, worse = [], False
    for arch, name in sorted(by_key[0].keys() | by_key[1].keys()):
        new, old = (kernels.get((arch, name)) for kernels in by_key)
        if new is None or old is None:
            lines.append(f"{arch} {name}: {'new' if old is None else 'gone'}")
            worse = True
            continue
        changes = [
            f"{field} {getattr(old, field)} -> {getattr(new, field)}"
            for field in ("registers", "shared_bytes", "threads", "blocks", "warps")
            if getattr(old, field) != getattr(new, field)
        ]
        if changes:
            lines.append(f"{arch} {name}: {', '.join(changes)}")
        worse |= new.registers > old.registers or new.shared_bytes > old.shared_bytes or new.warps < old.warps
    return lines, worse


def find_newest_build() -> Path | None:
    """Find the build directory whose CUDA code was compiled last."""
    logs = ROOT.glob("build/native-*/CMakeFiles/rrt_cuda_kernels.dir/**/*.ptxas")
    newest = max(logs, key=lambda path: path.stat().st_mtime, default=None)
    return None if newest is None else ROOT / "build" / newest.relative_to(ROOT / "build").parts[0]


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, metavar="DIR", help="CMake's build directory (default: the newest)")
    parser.add_argument(
        "--launches",
        type=Path,
        metavar="PROGRAM",
        default=ROOT / "build" / "emulated" / "list_launches",
        help="default build/emulated/list_launches, which `make test-cpp` builds",
    )
    parser.add_argument(
        "--update", action="store_true", help=f"write {EXPECTED.relative_to(ROOT)} instead of comparing"
    )
    arguments = parser.parse_args()
    build = arguments.build or find_newest_build()
    if build is None:
        print("kernel resources: no CUDA code was compiled here (no nvcc): nothing to compare")
        return
    logs = sorted(build.glob("CMakeFiles/rrt_cuda_kernels.dir/**/*.ptxas"))
    compiler = next(build.glob("CMakeFiles/*/CMakeCUDACompiler.cmake"), None)
    if not logs or compiler is None:
        raise UserError(f"--build: found no compiled CUDA code in {build}; expected a build with RRT_WITH_CUDA=1")
    if not arguments.launches.is_file():
        raise UserError(f"--launches: found no {arguments.launches}; expected the program: make test-cpp builds it")
    version = re.search(r'CMAKE_CUDA_COMPILER_VERSION "(\d+\.\d+)', compiler.read_text())
    nvcc = version[1] if version else "unknown"
    launches = subprocess.run([arguments.launches], capture_output=True, text=True, check=True).stdout
    kernels = read_kernels(logs, parse_launches(launches))
    table = format_table(kernels, nvcc)
    print(table, end="")
    if arguments.update:
        EXPECTED.write_text(table)
        return
    expected_nvcc, expected = parse_table(EXPECTED.read_text())
    if nvcc != expected_nvcc:
        print(f"compiled by nvcc {nvcc}: not compared with csrc/cuda/resources.txt, which is of {expected_nvcc}")
        return
    lines, worse = compare(kernels, expected)
    if lines:
        print("\nagainst csrc/cuda/resources.txt:", *lines, sep="\n  ")
    if worse:
        print("for the worse: mend it, or accept it with: python bench/kernel_resources.py --update")
        sys.exit(1)
    print("as committed or better" if lines else "as committed")


if __name__ == "__main__":
    run_command(main)
