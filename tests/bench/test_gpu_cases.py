"""bench/gpu_cases.py on the CPU's kernels."""

import pytest
import torch

from bench import gpu_cases
from bench.gpu_cases import run


def test_the_cases_agree_with_their_references():
    # 10 aligned linears, 8 unaligned, 6 of prefill, 12 shapes of attention twice, 4 dtypes of both caches.
    assert run(torch.device("cpu")) == (10 + 8 + 6 + 24 + 4, 0)


def test_a_wrong_result_costs_no_other_case(monkeypatch, capsys):
    cases = [
        (name, lambda value=value: torch.tensor([value]), torch.ones(1)) for name, value in (("a", 2.0), ("b", 1.0))
    ]
    monkeypatch.setitem(gpu_cases.FAMILIES, "write", lambda _: iter(cases))
    assert run(torch.device("cpu"), ["write"]) == (2, 1)
    assert "WRONG: a: differs by 1 of the norm" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["gpu_cases.py", "--device", "cpu", "--only", "write"])
    with pytest.raises(SystemExit, match="1"):
        gpu_cases.main()
    assert "1 of 2 cases agree with their references on cpu" in capsys.readouterr().out


def test_a_case_is_named_before_it_runs(monkeypatch, capsys):
    def fail() -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setitem(gpu_cases.FAMILIES, "write", lambda _: iter([("write to nowhere", fail, torch.ones(1))]))
    with pytest.raises(RuntimeError):
        run(torch.device("cpu"), ["write"])
    assert capsys.readouterr().out == "running: write to nowhere\n"
