"""RRT_CPU_ISA: a name that no build knows is an error, and one that this CPU lacks skips the operators' tests."""

import os
import platform
from pathlib import Path

import pytest

from rrt.ops import build_info

# Those of a build for x86. Makefile names them on every machine, also where there is another build or none.
CPU_ISAS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Items of the whole session come, not of this folder alone.
    ours = [item for item in items if Path(__file__).parent in item.path.parents]
    wanted, info = os.environ.get("RRT_CPU_ISA"), build_info()
    if not wanted or not ours:
        return
    known = info.cpu_isas if info.library is not None and platform.machine() == "x86_64" else CPU_ISAS
    if wanted not in known:
        raise pytest.UsageError(f"RRT_CPU_ISA: found {wanted!r}; expected one of {', '.join(known)}")
    if wanted != info.cpu_isa:
        reason = f"RRT_CPU_ISA={wanted}: {info.cpu_isa or 'no native library'} is in use"
        for item in ours:
            item.add_marker(pytest.mark.skip(reason=reason))
