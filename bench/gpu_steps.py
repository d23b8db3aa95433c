"""The steps of bench/gpu.sh: what each runs, in which part and order, and for how long at most. Needs no torch."""

import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "bench" / "out"
CARRY, MODEL, DATA = OUT / "carry", OUT / "model", OUT / "carry" / "data"
"""What bench/gpu_pack.py prepares: binaries and commit; the model, once all its pieces are there; files of tasks."""

PARTS = {1: "correct", 2: "how fast, and why", 3: "against others"}
CUDA_TESTS = (
    "tests/ops/test_loop_lora_cuda.py",
    "tests/ops/test_loop_lora_prefill_cuda.py",
    "tests/ops/test_kv_cuda.py",
)
"""First, since all others run these kernels too."""
NCU_SECTIONS = (
    "SpeedOfLight",
    "WarpStateStats",
    "InstructionStats",
    "LaunchStats",
    "Occupancy",
    "MemoryWorkloadAnalysis",
)
BANK_CONFLICTS = "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum"
OUR_KERNELS = "rrt"
"""The namespace of our kernels, a part of their mangled and demangled names and of no other kernel's."""


@dataclass(frozen=True)
class Step:
    """A command with a limit.

    Attributes:
        group: by which it is asked for; its name begins so.
        limit: seconds at most.
        least: seconds below which it is not worth beginning.
        left_out: why it cannot run here; None if it can.
        optional: a flag and its file, for the command if an earlier step has left the file.
    """

    part: int
    group: str
    name: str
    limit: int
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    least: int = 15
    left_out: str | None = None
    optional: tuple[str, Path] | None = None

    def words(self) -> tuple[str, ...]:
        """Return the command as it runs now."""
        if self.optional is None or not self.optional[1].is_file():
            return self.command
        return (*self.command, self.optional[0], str(self.optional[1]))


@dataclass(frozen=True)
class Machine:
    """What the steps depend on: the interpreter, `python -m rrt.info --json`, tools, and what was brought along."""

    python: str
    info: Mapping[str, Any]
    tools: frozenset[str]
    modules: frozenset[str]
    """Importable packages, of those that some steps need."""
    has_model: bool
    has_data: bool
    switches: tuple[str, ...]
    """Environment variables that the CUDA launches read, such as RRT_PDL."""

    @property
    def has_library(self) -> bool:
        native = self.info.get("native", {})
        return bool(native.get("library") and native.get("cuda") and not native.get("stale"))

    @property
    def has_plan(self) -> bool:
        return bool(self.info.get("native", {}).get("plan"))

    @property
    def cuda_archs(self) -> str:
        """CMake's name of the visible GPU's architecture."""
        capability = (self.info.get("gpus") or [{}])[0].get("capability", "9.0")
        return {"9.0": "90a-real", "8.0": "80-real"}.get(capability, capability.replace(".", ""))


def find_tools() -> frozenset[str]:
    return frozenset(name for name in ("ncu", "compute-sanitizer") if shutil.which(name))


def find_switches() -> tuple[str, ...]:
    """List the environment variables that the host side of the CUDA launches reads."""
    files = (ROOT / "csrc" / "cuda").glob("*.h")
    return tuple(sorted({name for path in files for name in re.findall(r'"(RRT_\w+)"', path.read_text())}))


def find_test_files() -> list[str]:
    """List the files with tests marked gpu: those of the CUDA kernels first."""
    marked = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if re.search(r"\bmark\.gpu\b", path.read_text())
    ]
    return [*CUDA_TESTS, *(path for path in marked if path not in CUDA_TESTS)]


def make_steps(machine: Machine, results: Path, test_files: Sequence[str]) -> list[Step]:
    """Make all steps in their order. Each writes into the folder of its name under `results`."""
    python = machine.python
    no_model = None if machine.has_model else "no model was brought along (bench/gpu.sh pack --model DIR)"
    steps: list[Step] = []

    def add(part: int, group: str, name: str, limit: int, *command: str | Path | int, **options: Any) -> None:
        steps.append(Step(part, group, name, limit, tuple(map(str, command)), **options))

    def without(*modules: str) -> str | None:
        missing = [name for name in modules if name not in machine.modules]
        return f"{', '.join(missing)} cannot be imported" if missing else None

    def kernels(part: int, name: str, limit: int, preset: str, *flags: str | int, **options: Any) -> None:
        out = results / name / "kernels.json"
        command = (python, "bench/kernels.py", "--device", "cuda", "--preset", preset, "--dtype", "bf16")
        spent = ("--seconds-per-case", "0.15", "--json", out)
        add(part, options.pop("group", "kernels"), name, limit, *command, *flags, *spent, **options)

    # Part 1
    if not machine.has_library:
        demanded = {"RRT_WITH_CUDA": "1", "RRT_WITH_NATIVE": "1", "CUDAARCHS": machine.cuda_archs}
        add(1, "build", "build", 240, python, "setup.py", "build_ext", "--inplace", environment=demanded, least=60)
    elif not machine.has_plan:
        add(1, "build", "build-plan", 60, python, "bench/gpu_pack.py", "--plan-only")
    for family in ("linear", "prefill-linear", "attention", "write"):
        command = (python, "bench/gpu_cases.py", "--only", family)
        add(1, "smoke", f"smoke-{family}", 40, *command, environment={"CUDA_LAUNCH_BLOCKING": "1"})

    def test_file(file: str, limit: int) -> None:
        name = "tests-" + re.sub(r"^tests/|test_|\.py$", "", file).replace("/", "-")
        add(1, "tests", name, limit, python, "bench/gpu_test_file.py", file, "--log", results / name / "log.jsonl")

    for file in test_files:
        if file in CUDA_TESTS:
            test_file(file, 100)
    add(
        1,
        "stress",
        "stress",
        90,
        python,
        "bench/pdl_stress.py",
        "--rounds",
        30,
        "--json",
        results / "stress" / "stress.json",
    )
    for file in test_files:
        if file not in CUDA_TESTS:
            test_file(file, 50)
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", 9, "--kernel-name", f"kns={OUR_KERNELS}")
        missing = None if "compute-sanitizer" in machine.tools else "there is no compute-sanitizer"
        add(1, "sanitize", f"sanitize-{tool}", 80, *command, python, "bench/gpu_cases.py", left_out=missing)

    # Part 2
    out = results / "ncu"
    command = ("ncu", "--clock-control", "none", "--profile-from-start", "off", "--kernel-name-base", "mangled")
    command += (
        "--kernel-name",
        f"regex:.*{OUR_KERNELS}.*",
        "--page",
        "raw",
        "--csv",
        "--log-file",
        str(out / "ncu.csv"),
    )
    sections = tuple(word for section in NCU_SECTIONS for word in ("--section", section))
    missing = None if "ncu" in machine.tools else "there is no ncu"
    program = (python, "bench/profiled_launches.py")
    add(2, "ncu", "ncu", 110, *command, *sections, "--metrics", BANK_CONFLICTS, *program, left_out=missing)
    tiles = results / "tiles" / "tiles.json"
    # Into a copy: the table that the library was compiled with stays, and so does the library.
    table = results / "tiles" / "cuda_tiles_measured.h"
    command = (python, "bench/tile_sweep.py", "--preset", "gemma-2b", "--seconds-per-case", "0.15")
    add(2, "tiles", "tiles", 90, *command, "--table", table, "--json", tiles)
    gemma = ("--rows", 1, 8, 16, 32, 64, "--ranks", 64, 512, "--loops", 1, 2)
    kernels(2, "kernels-gemma-2b", 220, "gemma-2b", "--only", "linear", *gemma, least=40, optional=("--tiles", tiles))
    contexts = ("--contexts", 1024, 16384, "--attention-rows", 8, 32, "--sequences", 1, 4)
    kernels(2, "kernels-attention", 60, "gemma-2b", "--only", "attention", *contexts)
    kernels(2, "kernels-gaps", 60, "gemma-2b", "--only", "overhead")

    # Part 3
    for switch in machine.switches:
        for value in ("0", "1"):
            few = ("--only", "linear", "--rows", 1, 8, 64, "--ranks", 64, "--loops", 1, 2)
            name = f"switch-{switch.removeprefix('RRT_').lower()}-{value}"
            kernels(3, name, 40, "gemma-2b", *few, group="switch", environment={switch: value})
    prefill = ("--only", "linear", "--rows", 256, 1024, 8192, "--ranks", 64, "--loops", 1)
    kernels(3, "kernels-prefill", 60, "gemma-2b", *prefill)
    for preset in ("tinyllama-1.1b", "pythia-1b"):
        few = ("--only", "linear", "--rows", 1, 8, 32, 64, "--ranks", 64, "--loops", 1, 2)
        kernels(3, f"kernels-{preset}", 50, preset, *few)
    command = (python, "bench/training.py", "--device", "cuda", "--preset", "smollm2-135m", "--only", "step")
    command += ("--dtype", "bf16", "--tokens", "8", "1024", "--json", str(results / "training" / "training.json"))
    add(3, "training", "training", 140, *command, left_out=without("transformers"))
    command = ("bash", "bench/gpu_uptrain.sh", str(MODEL), str(results / "uptrain"))
    add(3, "uptrain", "uptrain", 100, *command, left_out=no_model)
    speed = ("--device", "cuda", "--dtype", "bfloat16")
    command = (python, "bench/generate.py", "--checkpoint", str(MODEL), *speed, "--prompts", "1", "16", "--rounds", "3")
    command += ("--json", str(results / "generate" / "generate.json"))
    add(3, "generate", "generate", 80, *command, left_out=no_model or without("transformers"))
    command = (
        python,
        "bench/serving.py",
        *speed,
        "--in-flight",
        "1",
        "16",
        "64",
        "--rounds",
        "3",
        "--agreement",
        "0.8",
    )
    model = ("--checkpoint", str(MODEL)) if machine.has_model else ("--preset", "smollm2-135m", "--num-loops", "1", "2")
    if machine.has_model and "transformers" in machine.modules:
        model += ("--transformers",)
    add(3, "serving", "serving", 90, *command, *model, "--json", results / "serving" / "serving.json")
    command = (python, "eval/fewshot.py", "--checkpoint", str(MODEL), "--data-dir", str(DATA), "--device", "cuda")
    command += ("--dtype", "bf16", "--limit", "300", "--json", str(results / "fewshot" / "fewshot.json"))
    no_data = None if machine.has_data else "no tasks were brought along (bench/gpu.sh pack --data DIR)"
    reason = no_model or no_data or without("lm_eval", "datasets")
    add(3, "fewshot", "fewshot", 80, *command, left_out=reason)
    return steps


def read_json(path: Path) -> Any:
    """Read a file that another step may have left half-written or not at all: then None."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def python_of(environment: Mapping[str, str]) -> str:
    return environment.get("PYTHON") or sys.executable
