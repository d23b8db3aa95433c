"""bench/kernels.py: the command end to end, its flags, and what a run that is cut off leaves."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import kernels, linear_variants, plot_kernels
from bench.kernels import parse_arguments
from bench.timing import Rates, Variant
from rrt import ops
from rrt.errors import UserError
from tests.util.configs import CONFIGS

ROOT = Path(__file__).resolve().parents[2]


def flags_of(tmp_path: Path, *flags: object, **shapes: int) -> list[str]:
    """Flags of a quick run on a small model's shapes; the result goes to result.json."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**CONFIGS["gemma"], **shapes}))
    small = ["--config", config, "--quick", "--seconds-per-case", 0, "--cache-mib", 0.1]
    return [*map(str, small), "--json", str(tmp_path / "result.json"), *map(str, flags)]


@pytest.fixture
def run_kernels(tmp_path, monkeypatch):
    """A quick run in this process; returns its result."""

    def run(*flags: object, **shapes: int) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["kernels.py", *flags_of(tmp_path, *flags, **shapes)])
        kernels.main()
        return json.loads((tmp_path / "result.json").read_text())

    return run


def test_command_measures_every_section_and_writes_json_and_plot(tmp_path, monkeypatch):
    plot = tmp_path / "plot.png"
    flags = ["--plot", plot, "--rows", 1, 4, "--loops", 1, 2, "--ranks", 0, 8, "--contexts", 40, "--dtype", "bf16"]
    command = [sys.executable, str(ROOT / "bench" / "kernels.py"), *flags_of(tmp_path, *flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    result, printed = json.loads((tmp_path / "result.json").read_text()), done.stdout
    assert result["dtype"] == "bfloat16" and result["packed"] and result["timing"] == "clock"
    assert {"code_version", "torch", "device", "command"} <= set(result)
    assert not {"library", "rebuild"} & set(result["native"])

    # M=1 cannot mix two loops: 3 cases per rank and projection.
    names = [record["projection"] for record in result["linear"]]
    assert {name: names.count(name) for name in names} == {"q,k,v": 6, "out": 6, "gate,up": 6, "down": 6}
    read = result["rates"]["read_bandwidth"]
    matmul = result["rates"]["matmul"]
    assert read["bytes_per_second"] == max(read["all"].values()) == read["all"][read["way"]]
    assert [(r["projection"], r["segments"], r["rows"]) for r in result["head"]] == [
        ("head", [64], 1),
        ("head", [64], 4),
    ]
    for record in [*result["linear"], *result["head"], *result["attention"]]:
        by_bytes = record["bytes"] / read["bytes_per_second"]
        by_flops = record["flops"] / matmul["flops_per_second"]
        assert record["floor_seconds"] == pytest.approx(max(by_bytes, by_flops))
        assert record["bound"] == ("bytes" if by_bytes >= by_flops else "flops")
        ours = record["seconds"]["ours"]
        assert 0 < ours["lower_quartile"] <= ours["median"] <= ours["upper_quartile"]
        assert record["over_floor"]["ours"] == pytest.approx(ours["median"] / record["floor_seconds"])
        assert record["rounds"] == 2
    for record in result["linear"]:
        assert {"reading", "over_reading"} <= set(record)
        expected = {"base", "unfused", "concatenated", "merged"} if record["rank"] else {"base"}
        assert set(record["speedup"]) == expected

    assert len(result["layer"]) == 6
    layer = result["layer"][-1]
    parts = [r for r in result["linear"] if all(r[key] == layer[key] for key in ("rank", "loops", "rows"))]
    assert layer["seconds"]["unfused"]["median"] == pytest.approx(
        sum(part["seconds"]["unfused"]["median"] for part in parts)
    )
    assert layer["floor_seconds"] == pytest.approx(sum(part["floor_seconds"] for part in parts))

    assert [(r["kind"], r["queries"]) for r in result["attention"]] == [("decode", 1), ("prefill", 40)]
    assert set(result["attention"][0]["speedup"]) == {"sdpa", "sdpa grouped"}
    assert set(result["overhead"]["plan"]["seconds"]) == {"append_many", "slots", "block_tables", "all"}
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert all(
        word in printed
        for word in ("gate,up", "layer", "Head", "decode", "Best read bandwidth", "time/reading", "Goals", "F.linear")
    )
    again = tmp_path / "again.png"
    monkeypatch.setattr(sys, "argv", ["plot_kernels.py", str(tmp_path / "result.json"), str(again)])
    plot_kernels.main()
    assert again.read_bytes().startswith(b"\x89PNG")


@pytest.mark.gpu
def test_command_runs_on_cuda(run_kernels):
    result = run_kernels("--device", "cuda", "--rows", 1, 8, "--contexts", 40)
    assert result["timing"] in ("CUDA graphs", "CUDA events") and result["device"].startswith("cuda")
    assert result["linear"] and result["attention"] and result["goals"] == []
    assert all(record["seconds"]["ours"]["median"] > 0 for record in [*result["linear"], *result["attention"]])


def test_unpacked_and_one_section(run_kernels, monkeypatch):
    product = Variant(lambda _: torch.ones(64, 64) @ torch.ones(64, 64))
    monkeypatch.setattr(
        Rates, "_matmuls", lambda _: {"a small one": (product, 2 * 64**3)}
    )  # the real ones take seconds
    result = run_kernels("--unpacked", "--only", "linear", "--rows", 2)
    assert not result["packed"] and "attention" not in result and "overhead" not in result


def test_a_wrong_result_costs_no_other_case(run_kernels, monkeypatch, tmp_path, capsys):
    """Not even if all of a section are wrong; the command fails at the end."""
    right = ops.loop_kv_attention
    monkeypatch.setattr(ops, "loop_kv_attention", lambda *arguments: 1.01 * right(*arguments))
    with pytest.raises(SystemExit, match="1"):
        run_kernels("--only", "attention", "overhead", "--contexts", 8, 16)
    result = json.loads((tmp_path / "result.json").read_text())
    assert [record["kind"] for record in result["attention"]] == ["prefill", "prefill"] and "overhead" in result
    assert len(result["wrong"]) == 2 and "WRONG: decode of 8 at 16: ours differs from sdpa" in capsys.readouterr().out

    monkeypatch.setattr(Rates, "_matmuls", lambda _: {"one": (Variant(lambda _: torch.ones(1)), 1)})
    monkeypatch.setattr(linear_variants, "AGREEMENT", dict.fromkeys(linear_variants.AGREEMENT, -1.0))
    with pytest.raises(SystemExit, match="1"):
        run_kernels("--only", "linear", "--rows", 2, "--loops", 2, "--ranks", 8)
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["wrong"]) == 4 and result["linear"] == [] and "rates" not in result


def test_a_record_is_on_the_disk_before_the_next_is_measured(tmp_path, monkeypatch):
    """A run that is cut off leaves the records it has, with floors and goals."""
    seen = []

    def interrupted(spec, timer, rates):
        yield from itertools.islice(run_attention(spec, timer, rates), 1)
        seen.append(json.loads((tmp_path / "result.json").read_text()))
        raise KeyboardInterrupt

    run_attention = kernels.run_attention
    monkeypatch.setattr(kernels, "run_attention", interrupted)
    flags = flags_of(tmp_path, "--only", "attention", "--contexts", 8, 16)
    monkeypatch.setattr(sys, "argv", ["kernels.py", *flags])
    with pytest.raises(KeyboardInterrupt):
        kernels.main()
    (found,) = seen
    assert found["complete"] is False and len(found["attention"]) == 1
    assert found["attention"][0]["over_floor"]["ours"] > 0 and "rates" in found and "goals" in found


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--rows", "0"], "--rows: found 0; expected a number in"),
        (["--ranks", "-1"], "--ranks: found -1"),
        (["--loops", "9"], "--loops: found 9; expected a number in [1, 8]"),
        (["--rows", "2", "--loops", "3"], "--loops: found [3] with --rows [2]"),
        (["--page-size", "0"], "--page-size: found 0"),
        (["--seconds-per-case", "-1"], "--seconds-per-case: found -1.0"),
        (["--cache-mib", "nan"], "--cache-mib: found nan"),
        (["--json", "/no/such/place.json"], "--json: found /no/such/place.json; expected a file in a directory"),
        (["--plot", "/tmp"], "--plot: found /tmp"),
        (["--plot", "x.png", "--only", "attention"], "--plot: found with --only attention"),
        (["--only", "layer"], "--only: found layer with --device cpu"),
    ],
)
def test_bad_flags_are_named(monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["kernels.py", *flags])
    with pytest.raises(UserError) as error:
        parse_arguments()
    assert message in str(error.value)


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--plot", "x.png"])
    with pytest.raises(UserError, match=r"matplotlib is not installed.*\[plot\]"):
        parse_arguments()


def test_the_reference_on_a_gpu_is_not_taken_for_our_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    info = replace(ops.build_info(), library=None, reason="gone", cuda=False)
    monkeypatch.setattr("bench.output.build_info", lambda: info)
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--device", "cuda"])
    with pytest.raises(UserError, match=r"--device: found cuda without our kernels in the native library \(gone\)"):
        parse_arguments()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible")
def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--device", "cuda"])
    with pytest.raises(UserError, match="--device: found cuda"):
        parse_arguments()


def test_too_little_memory_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--quick", "--memory-gib", "0.01"])
    with pytest.raises(UserError, match=r"--memory-gib: found 0\.01; the weights take"):
        kernels.main()


def test_a_head_that_does_not_fit_is_left_out_unless_it_is_asked_for(run_kernels, capsys):
    # The layer's weights are below a MiB, the head's take two.
    flags = ["--rows", 1, "--ranks", 0, "--loops", 1, "--memory-gib", 0.002, "--contexts", 16]
    assert "head" not in run_kernels(*flags, vocab_size=2**15)
    assert "the head is left out for want of memory" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"--memory-gib: found 0\.00; the weights take"):
        run_kernels(*flags, "--only", "head", vocab_size=2**15)
