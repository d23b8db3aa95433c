"""bench/gpu_cases.py on the CPU's kernels."""

import pytest
import torch

from bench import gpu_cases
from bench.gpu_cases import run


def test_the_cases_agree_with_their_references():
    # 10 aligned linears, 8 unaligned, 6 of prefill, 12 shapes of attention twice, 4 dtypes of both caches.
    assert run(torch.device("cpu")) == 10 + 8 + 6 + 24 + 4


def test_a_case_is_named_before_it_runs(monkeypatch, capsys):
    def fail() -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(gpu_cases.FAMILIES, "write", lambda _: iter([("write to nowhere", fail, torch.ones(1))]))
    with pytest.raises(RuntimeError):
        run(torch.device("cpu"), ["write"])
    assert capsys.readouterr().out == "running: write to nowhere\n"
