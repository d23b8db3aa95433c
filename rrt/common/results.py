"""JSON results of evaluations and benchmarks, with the command, machine and code version."""

import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from rrt.common.files import write_json
from rrt.common.machine import cpu_info
from rrt.common.provenance import code_version


def result_header(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Describe this run: command line, code version, torch version, device with its instruction sets, and time."""
    device = torch.device(device)
    cpu = cpu_info()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu["model"]
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "code_version": code_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": f"{device.type}: {name}",
        "cpu_flags": cpu["flags"],
        "cores": cpu["usable_cores"],
        "threads": cpu["torch_threads"],
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def write_result(path: Path, values: dict[str, Any], device: torch.device | str = "cpu") -> None:
    """Write `values` after the header, atomically."""
    write_json(path, {**result_header(device), **values})
