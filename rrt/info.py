"""Print versions, native library and devices of this installation.

    python -m rrt.info
    python -m rrt.info --json

For bug reports; benchmarks keep the same facts beside their numbers.
"""

import json
import platform
import sys
from dataclasses import asdict
from importlib import metadata
from typing import Any

import torch

from rrt.common.cli import CommandParser, human_bytes, run_command
from rrt.common.machine import cpu_info
from rrt.native import build_info, cuda_image, cuda_versions
from rrt.version import __version__

_PACKAGES = ("numpy", "safetensors", "tokenizers", "sentencepiece")


def collect_info() -> dict[str, Any]:
    """Collect all that the command prints, ready for JSON: keys versions, native, cpu, gpus and cuda.

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


def _cuda() -> dict[str, Any]:
    """Collect CUDA's versions by torch and by the native library; None where one was built without CUDA."""
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
    parser = CommandParser(prog="python -m rrt.info", description="Versions, native library and devices.")
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
