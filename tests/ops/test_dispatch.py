"""Which kernels run: every instruction set is tested, and references say once that they stand in."""

import platform
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from rrt import native, ops
from tests.ops import conftest
from tests.util.native import needs_native

MAKEFILE = Path(__file__).parents[2] / "Makefile"


@dataclass
class FakeItem:
    """The part of a collected test that tests/ops/conftest.py uses."""

    path: Path
    marks: list[pytest.Mark] = field(default_factory=list)

    def add_marker(self, decorator: pytest.MarkDecorator) -> None:
        self.marks.append(decorator.mark)


@needs_native
def test_make_runs_every_narrower_instruction_set_of_the_build() -> None:
    listed = re.search(r"for isa in ([a-z0-9_ ]+);", MAKEFILE.read_text(encoding="utf-8"))
    assert listed is not None
    names, narrower = set(listed[1].split()), set(ops.build_info().cpu_isas[:-1])
    assert narrower == names if platform.machine() == "x86_64" else narrower <= names


@pytest.mark.parametrize(
    ("wanted", "library", "in_use", "reason"),
    [
        ("avx2", "_native.so", "avx2", None),
        ("", "_native.so", "avx2", None),
        ("avx512", "_native.so", "avx2", "RRT_CPU_ISA=avx512: avx2 is in use"),
        ("avx512", None, None, "RRT_CPU_ISA=avx512: no native library is in use"),
    ],
)
def test_where_a_cpu_lacks_an_instruction_set_only_the_operators_tests_are_skipped(
    wanted: str, library: str | None, in_use: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    isas = ("baseline", "avx2", "avx512") if library else ()
    info = replace(ops.build_info(), library=library, cpu_isas=isas, cpu_isa=in_use)
    monkeypatch.setattr(conftest, "build_info", lambda: info)
    monkeypatch.setenv("RRT_CPU_ISA", wanted)
    here, elsewhere = FakeItem(Path(__file__)), FakeItem(MAKEFILE)
    conftest.pytest_collection_modifyitems([here, elsewhere])
    assert [mark.kwargs["reason"] for mark in here.marks] == ([] if reason is None else [reason])
    assert not elsewhere.marks


def test_an_unknown_instruction_set_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RRT_CPU_ISA", "avx3")
    conftest.pytest_collection_modifyitems([FakeItem(MAKEFILE)])
    with pytest.raises(pytest.UsageError, match="RRT_CPU_ISA: found 'avx3'; expected one of baseline"):
        conftest.pytest_collection_modifyitems([FakeItem(Path(__file__))])


@pytest.mark.fallback
@pytest.mark.skipif(ops.build_info().library is not None, reason="the native library is loaded")
def test_without_a_library_one_warning_says_so_for_all_operators() -> None:
    native._warn_once.cache_clear()
    x = torch.zeros(2, 8)
    with pytest.warns(UserWarning, match="the PyTorch reference of the native operators runs") as warned:
        for _ in range(2):
            ops.gated_activation(x, x, "silu")
            ops.pack_linear(x)
    assert len(warned) == 1 and str(ops.build_info().reason) in str(warned[0].message)
