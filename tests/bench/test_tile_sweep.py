"""bench/tile_sweep.py: the table it writes, and that it needs a GPU."""

import shutil
import subprocess
from dataclasses import replace

import pytest
import torch

from bench import tile_sweep
from bench.linear_variants import Projection
from bench.tile_sweep import TABLE, Line, main, read_lines, replace_lines, shapes
from bench.timing import Timer, Variant
from rrt.errors import UserError

A = Line(132, 2048, 2048, 8, "kColumns", 1)
B = Line(132, 2048, 16384, 64, "kRows", 8)
C = Line(132, 2560, 2048, 8, "kRows64", 2)
OTHER_GPU = Line(108, 2048, 2048, 8, "kRows", 2)
COMMITTED = TABLE.read_text()


def test_lines_come_back_sorted_as_they_were_written():
    table = replace_lines(COMMITTED, [B, OTHER_GPU, A])
    assert [line for line in read_lines(table) if line in (A, B, OTHER_GPU)] == sorted([A, B, OTHER_GPU])
    assert replace_lines(table, []) == table


def test_new_lines_replace_those_of_the_same_shape_and_gpu_only():
    faster = replace(A, kernel="kRows64", slices=4)
    lines = read_lines(replace_lines(replace_lines(COMMITTED, [A, B, OTHER_GPU]), [faster]))
    assert faster in lines and A not in lines and B in lines and OTHER_GPU in lines


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_a_tiling_with_other_bits_is_not_timed_and_told(monkeypatch):
    def with_tiling(call, kernel, slices):
        return Variant(lambda _: torch.tensor([0.0 if (kernel, slices) == ("kRows", 4) else 1.0]))

    monkeypatch.setattr(tile_sweep, "with_tiling", with_tiling)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**20, 2**20))
    timer = Timer(torch.device("cpu"), 0.0, min_rounds=1)
    seconds, wrong = tile_sweep.measure(Projection("out", 8, (8,)), 2, 4, torch.float32, timer)
    assert wrong == ["kRows 4"] and "kRows 4" not in seconds and len(seconds) == len(tile_sweep.TILINGS) - 1


def test_the_library_compiles_with_the_table(tmp_path):
    source = tmp_path / "table.cpp"
    check = "static_assert(rrt::loop_lora::kMeasuredTilings[0].multiprocessors > 0);\n"
    source.write_text(replace_lines(COMMITTED, [A, B, C]) + check)
    command = ["c++", "-std=c++17", "-fsyntax-only", f"-I{TABLE.parents[1]}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_shapes_are_those_that_the_row_kernel_takes():
    found = {(projection.outputs, projection.inputs) for projection in shapes()}
    assert {(2560, 2048), (2048, 2048), (32768, 2048), (2048, 16384)} <= found


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible")
def test_without_a_gpu_there_is_one_error_and_the_table_stays(tmp_path, monkeypatch):
    table = tmp_path / "table.h"
    table.write_text(COMMITTED)
    monkeypatch.setattr("sys.argv", ["tile_sweep.py", "--table", str(table)])
    with pytest.raises(UserError, match="no GPU is visible"):
        main()
    assert table.read_text() == COMMITTED
