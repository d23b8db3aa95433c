"""bench/kernel_resources.py: what ptxas says, occupancy, and the comparison with what is committed."""

import subprocess
import sys
from dataclasses import replace

import pytest

from bench import kernel_resources
from bench.kernel_resources import EXPECTED, Kernel, compare, format_table, parse_table, read_kernels
from rrt.errors import UserError

MANGLED = "_ZN3rrt9loop_lora12_GLOBAL__N_110row_kernelINS_6device8BFloat16ELi8ELi8EEEvNS0_10DecodeArgsE"
LOG = f"""
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{MANGLED}' for 'sm_80'
ptxas info    : Function properties for {MANGLED}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 114 registers, used 1 barriers, 64 bytes smem, 624 bytes cmem[0]
ptxas info    : Compiling entry function '_Z5plainv' for 'sm_90a'
ptxas info    : Used 8 registers, used 0 barriers
"""
ROW = Kernel("sm_80", "loop_lora::row_kernel<BFloat16, 8, 8>", 114, 69696, 128)


@pytest.fixture
def logs(tmp_path):
    path = tmp_path / "kernels.ptxas"
    path.write_text(LOG)
    return [path]


def test_a_log_of_ptxas_and_the_launches_make_kernels(logs):
    launches = {ROW.name: (128, 69632), "plain": (1, 0)}
    assert read_kernels(logs, launches) == [ROW, Kernel("sm_90a", "plain", 8, 0, 1)]


@pytest.mark.parametrize("launches", [{"plain": (1, 0)}, {ROW.name: (128, 0), "plain": (1, 0), "other": (1, 0)}])
def test_a_kernel_that_only_one_side_knows_is_named(logs, launches):
    with pytest.raises(UserError, match=r"found by (ptxas|list_launches) only"):
        read_kernels(logs, launches)


@pytest.mark.parametrize(
    "arch, registers, shared, threads, blocks",
    [
        ("sm_80", 32, 0, 256, 8),  # 64 warps
        ("sm_80", 32, 0, 32, 32),  # the most blocks
        ("sm_80", 64, 0, 256, 4),
        ("sm_80", 65, 0, 256, 3),  # registers come in eights
        ("sm_80", 255, 0, 128, 2),
        ("sm_80", 32, 81 * 1024, 128, 2),
        ("sm_80", 32, 81 * 1024 + 1, 128, 1),
        ("sm_90a", 32, 81 * 1024 + 1, 128, 2),
        ("sm_90a", 32, 227 * 1024, 128, 1),
    ],
)
def test_a_multiprocessor_holds_what_its_limits_allow(arch, registers, shared, threads, blocks):
    assert Kernel(arch, "k", registers, shared, threads).blocks == blocks


@pytest.mark.parametrize(
    "registers, shared, threads, blocks",
    [
        (56, 0, 128, 2),  # of 16384 - 2 * 200 * 32 registers of a scheduler
        (64, 0, 128, 1),
        (58, 0, 32, 4),  # a warp on each scheduler
        (32, 8 << 10, 128, 1),  # of 228 - 2 * 109 KiB of shared memory
    ],
)
def test_beside_the_blocks_of_a_kernel_others_find_what_these_leave(registers, shared, threads, blocks):
    decode = Kernel("sm_90a", "decode", 200, 108 << 10, 128)
    assert decode.blocks == 2
    assert Kernel("sm_90a", "other", registers, shared, threads).blocks_beside(decode) == blocks


def test_a_table_comes_back_as_it_was_written():
    kernels = [ROW, replace(ROW, arch="sm_90a")]
    assert parse_table(format_table(kernels, "13.0")) == ("13.0", kernels)


@pytest.mark.parametrize(
    "change, worse",
    [
        ({"registers": 122}, True),
        ({"registers": 100}, False),
        ({"shared_bytes": 90000}, True),
        ({"shared_bytes": 100}, False),
        ({"registers": 60, "shared_bytes": 70000}, True),
        ({"name": "another"}, True),
    ],
)
def test_what_takes_more_or_fits_less_often_is_worse(change, worse):
    lines, found_worse = compare([replace(ROW, **change)], [ROW])
    assert lines and found_worse == worse
    assert compare([ROW], [ROW]) == ([], False)


def test_the_committed_table_is_of_both_architectures_and_as_this_program_prints_it():
    nvcc, kernels = parse_table(EXPECTED.read_text())
    assert {kernel.arch for kernel in kernels} == set(kernel_resources.SHARED_BYTES)
    assert format_table(kernels, nvcc) == EXPECTED.read_text()
    assert all(kernel.blocks >= 1 for kernel in kernels)


def test_a_build_without_cuda_code_is_named(tmp_path):
    command = [sys.executable, kernel_resources.__file__, "--build", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "error: --build: found no compiled CUDA code in" in done.stderr
