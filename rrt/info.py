"""What this installation is and runs on: versions, native library, devices.

    python -m rrt.info
    python -m rrt.info --json

For bug reports, and for the records that benchmarks keep beside their numbers.
"""

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rrt.common.cli import human_bytes, run_command
from rrt.native import build_info, cuda_image, cuda_versions
from rrt.version import __version__

_PACKAGES = ("numpy", "safetensors", "tokenizers", "sentencepiece")
_CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


def collect_info() -> dict[str, Any]:
    """Everything the command prints, ready for JSON: keys versions, native, cpu, gpus and cuda.

    Asks each visible GPU which compiled image it runs, which opens a CUDA context on it.
    """
    return {
        "versions": _versions(),
        "native": asdict(build_info()),
        "cpu": cpu_info(),
        "cuda": _cuda(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
    }


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {
        "rrt": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def free_memory_bytes(device: torch.device) -> int:
    """Memory that a process may still take; 4 GiB where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
        limits.append(_cgroup_free_bytes(Path("/sys/fs/cgroup")))
    except (OSError, ValueError):  # no such system, or no limit ("max")
        pass
    return min(limits, default=4 * 2**30)


def _cgroup_free_bytes(group: Path) -> int:
    """What is left of a cgroup's (v2) limit. Its use counts page cache, which the kernel gives up for it."""
    statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    used = int((group / "memory.current").read_text()) - int(statistics.get("inactive_file", 0))
    return int((group / "memory.max").read_text()) - used


def cpu_info() -> dict[str, Any]:
    """Model, cores, threads and the instruction sets that matter here."""
    fields: dict[str, str] = {}
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").split("\n\n")[0].splitlines():
            key, _, value = line.partition(":")
            fields[key.strip().lower()] = value.strip()
    flags = set(fields.get("flags", fields.get("features", "")).split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "torch_threads": torch.get_num_threads(),
        "flags": [flag for flag in _CPU_FLAGS if flag in flags],
    }


def _cuda() -> dict[str, Any]:
    """CUDA's versions as torch and as our library see them; None where either was built without CUDA."""
    versions = cuda_versions()
    return {
        "torch": torch.version.cuda,
        "library_runtime": _cuda_version_text(versions[0]) if versions else None,
        "driver_supports": _cuda_version_text(versions[1]) if versions else None,
    }


def _cuda_version_text(version: int) -> str | None:
    return f"{version // 1000}.{version % 1000 // 10}" if version else None


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    image = cuda_image(index)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "runs_image": f"sm_{image}" if image is not None and image > 0 else None,
    }


def _print_text(info: dict[str, Any]) -> None:
    versions, native, cpu, cuda = info["versions"], info["native"], info["cpu"], info["cuda"]
    print("  ".join(f"{name} {version or 'not installed'}" for name, version in versions.items()))
    if native["library"] is None:
        print(f"native operators: none, the PyTorch reference runs ({native['reason']})")
        print(f"  to build them: {native['rebuild']}")
    else:
        print(f"native operators: {native['library']}")
        print(f"  built by {native['compiler']} for torch {native['torch_at_build']}")
        print(f"  CPU: {native['cpu_isa']} in use, of {', '.join(native['cpu_isas'])}")
        archs = ", ".join(native["cuda_archs"])
        print(f"  CUDA: {f'{archs} by nvcc ' + native['nvcc'] if native['cuda'] else 'not compiled in'}")
        print(f"  host planning: {native['plan'] or 'in Python: ' + native['plan_reason']}")
        if native["stale"]:
            print(f"  STALE: csrc/ has changed since; rebuild: {native['rebuild']}")
    print(f"cpu: {cpu['model']}, {cpu['usable_cores']} of {cpu['cores']} cores, {cpu['torch_threads']} torch threads")
    print(f"  {' '.join(cpu['flags'])}")
    print("cuda: " + ", ".join(f"{name.replace('_', ' ')} {version or 'none'}" for name, version in cuda.items()))
    for index, gpu in enumerate(info["gpus"]):
        image = gpu["runs_image"] or "no image of this build"
        memory = human_bytes(gpu["memory_bytes"])
        print(f"gpu {index}: {gpu['name']}, {memory}, {gpu['multiprocessors']} multiprocessors, runs {image}")
    if not info["gpus"]:
        print("gpu: none visible")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m rrt.info", description="Versions, native library and devices.")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    arguments = parser.parse_args()
    info = collect_info()
    if arguments.json:
        json.dump(info, sys.stdout, indent=2)
        print()
    else:
        _print_text(info)


if __name__ == "__main__":
    run_command(main)
