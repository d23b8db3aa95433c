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
CARRY, MODEL = OUT / "carry", OUT / "model"
"""What bench/gpu_pack.py gathers, and the model whose weights it makes there."""

PARTS = {1: "correct", 2: "how fast, and why", 3: "all else"}
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
NCU_COLUMNS = {
    "us": "gpu__time_duration.sum",
    "DRAM %": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2 %": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "instructions": "smsp__inst_executed.sum",
    "conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "shared kB": "launch__shared_mem_config_size",
    "blocks/SM": "launch__occupancy_limit_shared_mem",
    "registers": "launch__registers_per_thread",
}
"""Metrics of the profile's table, by its columns."""
FEW_LAYERS = ("--only", "layer", "overhead", "--rows", 1, 8, 64, "--ranks", 64, "--loops", 1, 2)
FEW_DECODES = ("--only", "attention", "--contexts", 1024, 4096, "--attention-rows", 8, 32, "--sequences", 1)
SWITCHES = {"RRT_PDL": FEW_LAYERS, "RRT_CARVEOUT": FEW_LAYERS, "RRT_PREFETCH": FEW_DECODES}
"""Environment variables that the launches read (csrc/cuda/, csrc/kv_cache/): 0 and 1, and what shows their effect."""
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
        expected_text: what the output of a step that passes has in it.
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
    expected_text: str = ""

    def words(self) -> tuple[str, ...]:
        """Return the command as it runs now."""
        if self.optional is None or not self.optional[1].is_file():
            return self.command
        return (*self.command, self.optional[0], str(self.optional[1]))


@dataclass(frozen=True)
class Machine:
    """What the steps depend on.

    Attributes:
        info: of `python -m rrt.info --json`; empty if it failed.
        num_gpus: that torch sees.
        modules: importable packages, of those that some steps need.
        has_model: a model's configuration and tokenizer were brought along.
        has_weights: its weights have been made here.
    """

    python: str
    info: Mapping[str, Any] = field(default_factory=dict)
    num_gpus: int = 0
    tools: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()
    has_model: bool = False
    has_weights: bool = False

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
    steps: list[Step] = []

    def add(part: int, group: str, name: str, limit: int, *command: str | Path | int, **options: Any) -> None:
        steps.append(Step(part, group, name, limit, tuple(map(str, command)), **options))

    no_transformers = None if "transformers" in machine.modules else "transformers cannot be imported"
    no_model = None if machine.has_model else "no model was brought along (bench/gpu.sh pack --model DIR)"

    def kernels(part: int, name: str, limit: int, preset: str, *flags: str | int, **options: Any) -> None:
        out = results / name / "kernels.json"
        command = (python, "bench/kernels.py", "--device", "cuda", "--preset", preset, "--dtype", "bf16")
        spent = ("--seconds-per-case", "0.15", "--json", out)
        add(part, options.pop("group", "kernels"), name, limit, *command, *flags, *spent, **options)

    def tests(part: int, name: str, *files: str) -> None:
        command = (python, "bench/gpu_test_file.py", *files, "--log", results / name / "log.jsonl")
        add(part, "tests", name, 200, *command)

    # Part 1
    if not machine.has_library:
        demanded = {"RRT_WITH_CUDA": "1", "RRT_WITH_NATIVE": "1", "CUDAARCHS": machine.cuda_archs}
        add(1, "build", "build", 240, python, "setup.py", "build_ext", "--inplace", environment=demanded, least=60)
    elif not machine.has_plan:
        add(1, "build", "build-plan", 60, python, "bench/gpu_pack.py", "--plan-only")
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that an access out of bounds is out of an allocation
    add(1, "smoke", "smoke", 60, python, "bench/gpu_cases.py", environment={"CUDA_LAUNCH_BLOCKING": "1", **uncached})
    for file in CUDA_TESTS:
        tests(1, "tests-" + re.sub(r"^tests/|test_|\.py$", "", file).replace("/", "-"), file)
    stress = results / "stress" / "stress.json"
    add(1, "stress", "stress", 90, python, "bench/pdl_stress.py", "--rounds", 15, "--json", stress)

    # Part 2
    gemma = ("--only", "linear", "layer", "attention", "--rows", 1, 8, 16, 32, 64, "--ranks", 64, 512, "--loops", 1, 2)
    contexts = ("--contexts", 1024, 16384, "--attention-rows", 8, 32, "--sequences", 1, 4)
    kernels(2, "kernels-gemma-2b", 240, "gemma-2b", *gemma, *contexts, least=40)
    out = results / "ncu" / "ncu.csv"
    command = ("ncu", "--clock-control", "none", "--profile-from-start", "off", "--kernel-name-base", "mangled")
    command += ("--kernel-name", f"regex:.*{OUR_KERNELS}.*", "--page", "raw", "--csv", "--log-file", str(out))
    sections = tuple(word for section in NCU_SECTIONS for word in ("--section", section))
    metrics = ("--metrics", ",".join(NCU_COLUMNS.values()))
    missing = None if "ncu" in machine.tools else "there is no ncu"
    add(2, "ncu", "ncu", 110, *command, *sections, *metrics, python, "bench/profiled_launches.py", left_out=missing)
    tiles = results / "tiles" / "tiles.json"
    # Into a copy: the table that the library was compiled with stays, and so does the library.
    table = results / "tiles" / "cuda_tiles_measured.h"
    command = (python, "bench/tile_sweep.py", "--preset", "gemma-2b", "--seconds-per-case", "0.15")
    add(2, "tiles", "tiles", 90, *command, "--table", table, "--json", tiles)
    layer = ("--only", "layer", "--rows", 1, 8, 16, 32, 64, "--ranks", 64, "--loops", 1, 2)
    kernels(2, "kernels-tuned", 60, "gemma-2b", *layer, optional=("--tiles", tiles))

    # Part 3
    tests(3, "tests-others", *(file for file in test_files if file not in CUDA_TESTS))
    for switch, flags in SWITCHES.items():
        for turn in (1, 2):  # alternating, since the machine's speed changes
            for value in ("0", "1"):
                name = f"switch-{switch.removeprefix('RRT_').lower()}-{value}-{turn}"
                kernels(3, name, 40, "gemma-2b", *flags, group="switch", environment={switch: value})
    prefill = ("--only", "linear", "layer", "--rows", 256, 1024, 8192, "--ranks", 64, "--loops", 1)
    kernels(3, "kernels-prefill", 60, "gemma-2b", *prefill)
    for preset in ("tinyllama-1.1b", "pythia-1b"):
        few = ("--only", "linear", "layer", "--rows", 1, 8, 32, 64, "--ranks", 64, "--loops", 1, 2)
        kernels(3, f"kernels-{preset}", 50, preset, *few)
    command = (python, "bench/training.py", "--device", "cuda", "--preset", "smollm2-135m", "--only", "step")
    command += ("--dtype", "bf16", "--tokens", "8", "1024", "--json", str(results / "training" / "training.json"))
    add(3, "training", "training", 140, *command, left_out=no_transformers)
    if not machine.has_weights:
        command = (python, "bench/gpu_pack.py", "--write-model")
        add(3, "model", "model", 60, *command, left_out=no_model or no_transformers)
    no_weights = None if machine.has_weights else no_model or no_transformers
    command = ("bash", "bench/gpu_uptrain.sh", str(MODEL), str(results / "uptrain"))
    add(3, "uptrain", "uptrain", 100, *command, left_out=no_weights)
    speed = ("--device", "cuda", "--dtype", "bfloat16")
    command = (python, "bench/generate.py", "--checkpoint", str(MODEL), *speed, "--prompts", "1", "16", "--rounds", "3")
    command += ("--json", str(results / "generate" / "generate.json"))
    add(3, "generate", "generate", 80, *command, left_out=no_weights or no_transformers)
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
    model = ("--preset", "smollm2-135m", "--num-loops", "1", "2")
    if no_weights is None and no_transformers is None:
        model = ("--checkpoint", str(MODEL), "--transformers")
    add(3, "serving", "serving", 90, *command, *model, "--json", results / "serving" / "serving.json")
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--launch-timeout", "0")
        command += ("--report-api-errors", "no") if tool == "memcheck" else ()
        command += ("--kernel-name", f"kns={OUR_KERNELS}", python, "bench/gpu_cases.py")
        missing = None if "compute-sanitizer" in machine.tools else "there is no compute-sanitizer"
        name = f"sanitize-{tool}"
        add(3, "sanitize", name, 80, *command, environment=uncached, left_out=missing, expected_text="SUMMARY")
    return steps


def read_json(path: Path) -> Any:
    """Read a file that another step may have left half-written or not at all: then None."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def python_of(environment: Mapping[str, str]) -> str:
    return environment.get("PYTHON") or sys.executable
