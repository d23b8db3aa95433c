"""Skip the tests where the CPU lacks the instruction set that RRT_CPU_ISA names."""

import os

import pytest

from rrt.ops import build_info


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanted, used = os.environ.get("RRT_CPU_ISA"), build_info().cpu_isa
    if wanted is not None and wanted != used:
        for item in items:
            item.add_marker(pytest.mark.skip(reason=f"RRT_CPU_ISA={wanted}: {used or 'no native library'} is in use"))
