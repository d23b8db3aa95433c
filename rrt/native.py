"""The native modules: load them, report their builds, and register operators with or without them."""

import ctypes
import hashlib
import importlib
import json
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

REBUILD = "RRT_WITH_NATIVE=1 pip install --no-build-isolation --no-deps -e ."

_PACKAGE = Path(__file__).resolve().parent
_LIBRARY = _PACKAGE / "_native.so"
_PLAN_MODULE = _PACKAGE / f"_plan{EXTENSION_SUFFIXES[0]}"
# Written by setup.py when a module could not be built; they hold the reason.
_FAILED_NOTE = _PACKAGE / "_native_failed.txt"
_PLAN_FAILED_NOTE = _PACKAGE / "_plan_failed.txt"


@dataclass(frozen=True)
class BuildInfo:
    """The native code that this process runs. Fields of the library are None or empty if none is loaded."""

    library: str | None
    """Path of the loaded native library; None if the PyTorch reference runs."""
    reason: str | None
    """Why no library is loaded, in one line."""
    rebuild: str
    """The command, from a checkout of the repository, that builds the library for this environment."""
    stale: bool
    """The checkout's native sources have changed since the library, or the loaded `rrt._plan`, was built."""
    torch: str
    """Version of torch in this process."""
    torch_at_build: str | None
    rrt_at_build: str | None
    compiler: str | None
    cpu_isas: tuple[str, ...]
    """Instruction sets compiled in, of "baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"."""
    cpu_isa: str | None
    """The one in use: the widest that the CPU has, unless RRT_CPU_ISA names a narrower one."""
    cuda: bool
    """CUDA sources were compiled in."""
    cuda_archs: tuple[str, ...]
    """For example ("sm_80", "sm_90a")."""
    nvcc: str | None
    plan: str | None
    """Path of the loaded module rrt._plan (host planning); None if the Python equivalents run."""
    plan_reason: str | None
    """Why it is not loaded, in one line."""


@dataclass(frozen=True)
class _Native:
    handle: ctypes.CDLL | None
    reason: str | None


@dataclass(frozen=True)
class _Plan:
    module: ModuleType | None
    reason: str | None


_SWITCHED_OFF = "switched off by RRT_NATIVE=0"


def _reason_not_built(path: Path, note: Path) -> str:
    if note.is_file():
        return f"not built when rrt was installed: {note.read_text(encoding='utf-8').strip()}"
    return f"{path} does not exist: rrt was not installed, only found"


def _warn_stale(name: str) -> None:
    warnings.warn(f"rrt: {name} was built from other sources than csrc/ has now; rebuild: {REBUILD}", stacklevel=3)


@cache
def load_native() -> _Native:
    """Load the library once. A failure is kept as a reason, since importing rrt must not fail."""
    if os.environ.get("RRT_NATIVE") == "0":
        return _Native(None, _SWITCHED_OFF)
    if not _LIBRARY.is_file():
        return _Native(None, _reason_not_built(_LIBRARY, _FAILED_NOTE))
    try:
        torch.ops.load_library(_LIBRARY)
        handle = ctypes.CDLL(str(_LIBRARY))
        handle.rrt_build_info.restype = ctypes.c_char_p
        handle.rrt_cpu_isa.restype = ctypes.c_char_p
    except (OSError, AttributeError, RuntimeError) as error:
        # torch only says that loading failed; the loader's own error, its cause, says why.
        cause = str(error.__cause__ or error).strip().splitlines()[0]
        return _Native(None, f"{_LIBRARY}{_built_for()} does not load with torch {torch.__version__}: {cause}")
    if _is_stale(_library_facts(handle)["source_digest"]):
        _warn_stale(_LIBRARY.name)
    return _Native(handle, None)


def _built_for() -> str:
    """Read the versions that a library was built for from its bytes, which hold csrc/build_info.cpp.in's JSON."""
    content = _LIBRARY.read_bytes()
    found = [re.search(rb'\n  "' + key + rb'": "([^"]*)"', content) for key in (b"torch", b"nvcc")]
    torch_version, nvcc = (match[1].decode(errors="replace") if match else "" for match in found)
    if not torch_version:
        return ""
    return f", built for torch {torch_version}{f' and CUDA {nvcc}' if nvcc else ''},"


@cache
def load_plan() -> _Plan:
    """Import `rrt._plan` once. As with the library, a failure is kept as a reason."""
    if os.environ.get("RRT_NATIVE") == "0":
        return _Plan(None, _SWITCHED_OFF)
    if not _PLAN_MODULE.is_file():
        return _Plan(None, _reason_not_built(_PLAN_MODULE, _PLAN_FAILED_NOTE))
    try:
        module = importlib.import_module("rrt._plan")
    except ImportError as error:
        return _Plan(None, f"{_PLAN_MODULE} does not load: {str(error).strip().splitlines()[0]}")
    if _is_stale(module.source_digest):
        _warn_stale("rrt._plan")
    return _Plan(module, None)


@cache
def warn_without_plan() -> None:
    """Warn once if host planning runs in Python, for want of `rrt._plan`."""
    reason = load_plan().reason
    if reason is not None:
        warnings.warn(f"rrt: host planning runs in Python: {reason}. To build it: {REBUILD}", stacklevel=3)


def _library_facts(handle: ctypes.CDLL) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(handle.rrt_build_info())
    return facts


_DIGEST_SUFFIXES = (".h", ".cuh", ".cpp", ".cu", ".in")


def _source_digest(root: Path) -> str | None:
    """Hash the native sources as CMakeLists.txt does; None outside a checkout."""
    if not (root / "csrc").is_dir() or not (root / "CMakeLists.txt").is_file():
        return None
    names = ["CMakeLists.txt"]
    for path in (root / "csrc").rglob("*"):
        name = path.relative_to(root).as_posix()
        if path.suffix in _DIGEST_SUFFIXES and not name.startswith(("csrc/tests/", "csrc/bench/")):
            names.append(name)
    digest = ""
    for name in sorted(names):
        file_digest = hashlib.sha256((root / name).read_bytes()).hexdigest()
        digest = hashlib.sha256(f"{digest}{name}{file_digest}".encode()).hexdigest()
    return digest


def _is_stale(digest_at_build: str) -> bool:
    now = _source_digest(_PACKAGE.parent)
    return now is not None and now != digest_at_build


def build_info() -> BuildInfo:
    """Report the native modules that were built and those in use; touches no GPU."""
    native, plan = load_native(), load_plan()
    facts = _library_facts(native.handle) if native.handle is not None else {}
    return BuildInfo(
        library=str(_LIBRARY) if native.handle is not None else None,
        reason=native.reason,
        rebuild=REBUILD,
        stale=any(
            _is_stale(digest)
            for digest in (facts.get("source_digest"), getattr(plan.module, "source_digest", None))
            if digest is not None
        ),
        torch=str(torch.__version__),
        torch_at_build=facts.get("torch"),
        rrt_at_build=facts.get("version"),
        compiler=facts.get("compiler"),
        cpu_isas=tuple(facts.get("cpu_isas", ())),
        cpu_isa=native.handle.rrt_cpu_isa().decode() if native.handle is not None else None,
        cuda=facts.get("cuda", False),
        cuda_archs=tuple(facts.get("cuda_archs", ())),
        nvcc=facts.get("nvcc") or None,
        plan=plan.module.__file__ if plan.module is not None else None,
        plan_reason=plan.reason,
    )


class _CudaVersions(ctypes.Structure):
    _fields_ = [("runtime", ctypes.c_int), ("driver", ctypes.c_int)]


def cuda_versions() -> tuple[int, int] | None:
    """Return CUDA's versions: of the linked runtime, and the newest that the driver supports (0 without a driver).

    13.0 is 13000. None if the library was built without CUDA.
    """
    handle = load_native().handle
    if handle is None or not build_info().cuda:
        return None
    versions = _CudaVersions()
    handle.rrt_cuda_info(ctypes.byref(versions))
    return versions.runtime, versions.driver


def cuda_image(device: int) -> int | None:
    """Return the architecture (80, 90) of the code that GPU `device` runs, or minus the CUDA error if none fits.

    None if the library was built without CUDA. Opens a CUDA context on the device.
    """
    handle = load_native().handle
    if handle is None or not build_info().cuda:
        return None
    return int(handle.rrt_cuda_image(device))


def force_tiling(tile_rows: int, slices: int) -> None:
    """Make loop_lora_linear on CUDA run its row kernel, with tiles of 64 or 128 outputs in 1, 2, 4 or 8 slices.

    0 for `tile_rows` means the column kernel, which has one slice. 0 slices restore the operator's own choice. For
    measurements: changes no result. Not safe while another thread runs the operator; a library without CUDA ignores it.
    """
    handle = load_native().handle
    if handle is not None and build_info().cuda:
        handle.rrt_loop_lora_force_tiling(tile_rows, slices)


def force_order(order: int) -> None:
    """Make every product of loop_lora_linear on CUDA start early (1) or late (0); -1 restores its own choice.

    csrc/loop_lora/cuda_decode.h explains the orders. Otherwise as `force_tiling`.
    """
    handle = load_native().handle
    if handle is not None and build_info().cuda:
        handle.rrt_loop_lora_force_order(order)


def _warn_reference_runs(op: str, device: str) -> None:
    _warn_once(load_native().reason or f"{_LIBRARY.name} has no {device} kernel of {op}")


@cache
def _warn_once(why: str) -> None:
    warnings.warn(
        f"rrt: the PyTorch reference of the native operators runs: {why}. To build them: {REBUILD}", stacklevel=2
    )


_fragment = torch.library.Library("rrt", "FRAGMENT")


def register_op(
    schema: str, reference: Callable[..., Any], fake: Callable[..., Any], cpu: Callable[..., Any] | None = None
) -> None:
    """Register a fake kernel for the operator `rrt::<schema>`, and `reference` wherever the library has no kernel.

    The operator is defined here if the library did not define it. A reference that runs in a kernel's place warns:
    once if there is no library, else once per operator and device type.

    Args:
        schema: the operator's name and signature.
        reference: the operator in plain PyTorch.
        fake: checks the arguments and returns empty results of the right shapes, for tracing and the meta device.
        cpu: the CPU kernel, which never warns, of an operator that has no native one by design.
    """
    name = schema.partition("(")[0]
    load_native()
    if not hasattr(torch.ops.rrt, name):
        _fragment.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def reference_kernel(*args: Any) -> Any:
        device = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        _warn_reference_runs(name, device)
        return reference(*args)

    # Native kernels are registered per backend, which takes precedence over this key.
    _fragment.impl(name, reference_kernel, "CompositeExplicitAutograd")
    if cpu is not None:
        _fragment.impl(name, cpu, "CPU")
    torch.library.register_fake(f"rrt::{name}", fake, lib=_fragment)
