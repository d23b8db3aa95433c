"""bench/gpu_cases.py on the CPU's kernels, and bench/gpu.sh where there is no GPU."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from bench import gpu_cases
from bench.gpu_cases import run

ROOT = Path(__file__).resolve().parents[2]


def test_the_cases_agree_with_their_references():
    # 10 aligned linears, 8 unaligned, 4 of prefill, 12 shapes of attention twice, 4 dtypes of both caches.
    assert run(torch.device("cpu")) == 10 + 8 + 4 + 24 + 4


def test_a_case_is_named_before_it_runs(monkeypatch, capsys):
    def fail() -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(gpu_cases.FAMILIES, "write", lambda _: iter([("write to nowhere", fail, torch.ones(1))]))
    with pytest.raises(RuntimeError):
        run(torch.device("cpu"), ["write"])
    assert capsys.readouterr().out == "running: write to nowhere\n"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible")
@pytest.mark.parametrize("part", ["test", "kernels"])
def test_without_a_gpu_a_part_says_so_and_leaves_one_file(tmp_path, part):
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), part]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 3 and "no GPU is visible" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [f"{part}.tar.gz"]
    with tarfile.open(tmp_path / f"{part}.tar.gz") as archive:
        report = archive.extractfile(f"{part}/report.json")
        assert report is not None and json.load(report)["outcome"] == "no GPU"


@pytest.mark.parametrize("arguments", [[], ["run"], ["build", "quickly"]])
def test_other_arguments_get_the_usage(arguments):
    done = subprocess.run(
        ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2 and done.stderr.startswith("usage: bench/gpu.sh build|test")
