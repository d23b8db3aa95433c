"""Which kernels run: every instruction set is tested, and references say once that they stand in."""

import re
from pathlib import Path

import pytest
import torch

from rrt import native, ops
from tests.util.native import needs_native

MAKEFILE = Path(__file__).parents[2] / "Makefile"


@needs_native
def test_make_runs_every_narrower_instruction_set_of_the_build() -> None:
    listed = re.search(r"for isa in ([a-z0-9_ ]+);", MAKEFILE.read_text(encoding="utf-8"))
    assert listed is not None and tuple(listed[1].split()) == ops.build_info().cpu_isas[:-1]


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
