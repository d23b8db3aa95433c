"""Facts about the CPU, and free memory."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

_CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


def free_memory_bytes(device: torch.device) -> int:
    """Return the bytes that a process may still take; 4 GiB where the system does not tell."""
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
    """Return what is left of a cgroup's (v2) limit. Page cache counts as free: the kernel gives it up."""
    statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    used = int((group / "memory.current").read_text()) - int(statistics.get("inactive_file", 0))
    return int((group / "memory.max").read_text()) - used


def _first_cpu() -> dict[str, str]:
    """Read what the system tells of the first CPU, names in lower case; nothing where it tells nothing."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return {}
    lines = cpuinfo.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    return {key.strip().lower(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def cpu_info() -> dict[str, Any]:
    """Return the CPU's model, cores, threads and the instruction sets that matter here."""
    fields = _first_cpu()
    flags = set(fields.get("flags", fields.get("features", "")).split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "torch_threads": torch.get_num_threads(),
        "flags": [flag for flag in _CPU_FLAGS if flag in flags],
    }


def multiplies_bfloat16() -> bool:
    """Return whether the CPU has instructions that multiply bfloat16; others emulate them."""
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(cpu_info()["flags"])


def is_intel_cpu() -> bool:
    """Return whether Intel made the CPU, for which its library MKL has its best products."""
    return _first_cpu().get("vendor_id") == "GenuineIntel"
