"""bench/kernels.py: floors by hand, variants that agree, cold copies, goals, and the command end to end."""

import contextlib
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from bench import attention_cases, kernels, linear_variants, overhead_cases, plot_kernels
from bench.attention_cases import AttentionSpec
from bench.attention_cases import make_variants as make_attention_variants
from bench.kernel_report import cpu_goals, cuda_goals, overhead_table, summary_tables
from bench.kernels import parse_arguments
from bench.linear_cases import LinearSpec, _over_reading, add_floors, layer_records, run_layers
from bench.linear_variants import (
    Adapters,
    DisagreementError,
    Projection,
    Tiles,
    Weights,
    check_agreement,
    make_variants,
    merged,
    mixed_loops,
    projections,
)
from bench.overhead_cases import measure_call, measure_planning
from bench.timing import Rates, Timer, Variant, copies_beyond_cache, last_level_cache_bytes, median_interval, speedup
from rrt import ops
from rrt.checkpoint.hf_config import model_config_from_hf
from rrt.checkpoint.presets import PRESETS, preset
from rrt.errors import UserError
from rrt.model.config import LoraRanks, RecursiveConfig
from rrt.model.loop_linear import LoopLinear
from rrt.model.transformer import RecursiveTransformer

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
SMALL = dict(vocab_size=64, hidden_size=48, intermediate_size=80, num_hidden_layers=4, max_position_embeddings=64)
CONFIGS = {
    "gemma": {**PRESETS["gemma-2b"], **SMALL, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16},
    "llama": {**PRESETS["tinyllama-1.1b"], **SMALL, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gpt_neox": {**PRESETS["pythia-1b"], **SMALL, "num_attention_heads": 4, "rotary_pct": 0.5},
}


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


def test_bytes_and_flops_by_hand():
    projection = Projection("q,k,v", inputs=8, segments=(8, 4, 4), bias=True)
    assert projection.ranks(6) == (6, 4, 4)
    # W 16 x 8, bias 16; per loop A 14 x 8, B 8 x 6 and twice 4 x 4; x 3 x 8, y 3 x 16.
    adapters = 14 * 8 + 8 * 6 + 2 * 4 * 4
    assert projection.min_bytes(rows=3, rank=6, loops=2, itemsize=2) == 2 * (128 + 16 + 2 * adapters + 24 + 48)
    assert projection.flops(rows=3, rank=6) == 2 * 3 * (128 + adapters)
    assert projection.min_bytes(rows=3, rank=0, loops=2, itemsize=4) == 4 * (128 + 16 + 24 + 48)

    rates = Rates(Timer(CPU, 0), torch.float32, 0, read={"a": 50.0, "b": 100.0}, matmul={"c": 1000.0})
    assert rates.floor(num_bytes=1000, flops=5000) == (10.0, "bytes")
    assert rates.floor(num_bytes=1000, flops=20000) == (20.0, "flops")


@pytest.mark.parametrize("family", CONFIGS)
def test_projections_are_the_models_linears(family):
    config = model_config_from_hf(CONFIGS[family], family)
    with torch.device("meta"):
        recursion = RecursiveConfig(num_loops=2, lora_rank=LoraRanks.uniform(20))
        model = RecursiveTransformer(config, recursion)
    layer = [m for m in model.stack.layers[0].modules() if isinstance(m, LoopLinear)]
    expected = sorted((m.in_features, m.out_features, m.rank, m.bias is not None) for m in layer)
    found = [
        (p.inputs, out, rank, p.bias)
        for p in projections(config)
        for out, rank in zip(p.segments, p.ranks(20), strict=True)
    ]
    assert sorted(found) == expected


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("loops", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_variants_compute_the_definition(pack, loops, bias):
    torch.manual_seed(0)
    projection = Projection("q,k,v", inputs=24, segments=(20, 6, 6), bias=bias)
    weights = Weights.make(projection, 2, torch.float64, CPU, pack)
    adapters = Adapters.make(weights, 9, loops, pack)
    assert adapters.ranks == (9, 6, 6)
    x, rows_loops = torch.randn(7, 24, dtype=torch.float64), mixed_loops(7, loops)
    assert sorted(set(rows_loops.tolist())) == list(range(loops))

    def dense(loop: int) -> Tensor:
        """W + B A, segment by segment."""
        a = adapters.a[1][loop].split(adapters.ranks)
        parts = [b_part @ a_part for b_part, a_part in zip(adapters.b[1][loop], a, strict=True)]
        return weights.plain[1] + torch.cat(parts)

    shift = 0 if weights.bias is None else weights.bias
    expected = torch.stack([dense(loop) @ row + shift for row, loop in zip(x, rows_loops.tolist(), strict=True)])
    variants = make_variants(weights, adapters, x, rows_loops)
    for name in ("ours", "unfused", "concatenated"):
        for copy in range(2):
            torch.testing.assert_close(variants[name].call(copy), expected, rtol=1e-10, atol=1e-12)
    groups = [(rows_loops == loop).nonzero().squeeze(1) for loop in range(loops)]
    by_merged = merged(x, [dense(loop) for loop in range(loops)], weights.bias, groups)
    torch.testing.assert_close(by_merged, expected, rtol=1e-10, atol=1e-12)
    assert variants["merged"].copies_read == loops
    base = x @ weights.plain[0].T + shift
    torch.testing.assert_close(variants["base"].call(0), base, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(variants["merged"].call(0), base, rtol=1e-10, atol=1e-12)  # copies of W stand in


def test_rank_zero_leaves_ours_and_base():
    projection = Projection("out", inputs=16, segments=(12,))
    weights = Weights.make(projection, 1, torch.float64, CPU, should_pack=True)
    adapters = Adapters.make(weights, 0, 2, should_pack=True)
    variants = make_variants(weights, adapters, torch.randn(4, 16, dtype=torch.float64), mixed_loops(4, 2))
    assert list(variants) == ["ours", "base"]
    torch.testing.assert_close(variants["ours"].call(0), variants["base"].call(0))


def attention_spec(**changes: Any) -> AttentionSpec:
    values = dict(num_heads=6, num_kv_heads=2, head_dim=16, contexts=[5], rows=[3], sequences=[2], chunk=4, page_size=4)
    common = dict(dtype=torch.float64, device=CPU, cache_bytes=0, budget_bytes=2**30)
    return AttentionSpec(**{**values, **common, **changes})


@pytest.mark.parametrize(
    "kind, count, context, queries", [("decode", 3, 9, 1), ("prefill", 2, 9, 4), ("prefill", 2, 4, 4)]
)
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention_variants_compute_the_same(kind, count, context, queries, kv_heads):
    spec = attention_spec(num_kv_heads=kv_heads)
    variants, backends = make_attention_variants(spec, kind, count, context, queries, copies=2)
    assert set(backends) == set(variants) - {"ours"} and set(backends.values()) == {"default"}
    assert ("sdpa grouped" in variants) == (kind == "decode" and kv_heads < 6)
    for copy in range(2):
        expected = variants["sdpa"].call(copy)
        assert expected.shape == (count * queries, 6, 16)
        for variant in variants.values():
            torch.testing.assert_close(variant.call(copy), expected, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(variants["ours"].call(0), variants["ours"].call(1))  # other keys and values


def test_sdpa_runs_by_each_backend_that_takes_the_case_math_only_alone(monkeypatch):
    enabled, refused = [], []

    @contextlib.contextmanager
    def sdpa_kernel(backend):
        enabled.append(backend)
        try:
            yield
        finally:
            enabled.pop()

    def call(_: int) -> Tensor:
        if enabled[-1] in refused:
            raise RuntimeError("No available kernel")
        return torch.ones(1)

    monkeypatch.setattr(attention_cases, "sdpa_kernel", sdpa_kernel)
    for not_taken, expected in (
        ([SDPBackend.FLASH_ATTENTION], ["cudnn", "efficient"]),
        (list(attention_cases.SDPA_BACKENDS[:3]), ["math"]),
    ):
        refused[:] = not_taken
        found = dict(attention_cases.by_backends(call, torch.device("cuda")))
        assert list(found) == expected and not enabled
        assert all(variant.call(0) == 1 for variant in found.values())


def test_attention_bytes_and_flops_by_hand():
    spec = attention_spec()
    # K and V of 2 sequences of 9 positions, 2 heads of 16; q and y of 2 x 4 queries, 6 heads of 16; float64.
    assert spec.min_bytes(count=2, context=9, queries=4) == 8 * (2 * 2 * 9 * 2 * 16 + 2 * 2 * 4 * 6 * 16)
    # The chunk's queries attend 6, 7, 8 and 9 positions; a dot product and a sum of 16 each.
    assert spec.flops(count=2, context=9, queries=4) == 2 * 6 * (6 + 7 + 8 + 9) * 4 * 16


def test_attention_leaves_out_what_does_not_fit():
    # Four times 2 x 3 x 100 positions x 2 heads x 16 x 8 bytes for decode.
    spec = attention_spec(contexts=[5, 100], sequences=[1], budget_bytes=4 * 2 * 3 * 100 * 256 - 1)
    kept, left_out = spec.cases()
    assert left_out == [("decode", 3, 100)] and len(kept) == 3


def test_a_variant_that_differs_is_not_timed():
    right = torch.ones(4)
    check_agreement({"a": right, "b": right * 1.00001}, "a", "case")
    for wrong in (right * 1.01, right * float("nan")):
        with pytest.raises(DisagreementError, match="case: b differs from a by"):
            check_agreement({"a": right, "b": wrong}, "a", "case")


def test_copies_of_large_weights_two_of_small_many_of_a_tight_budget_fewer():
    mib = 2**20
    assert copies_beyond_cache(256 * mib, 600 * mib, cache_bytes=32 * mib, budget_bytes=2**40) == 2
    assert copies_beyond_cache(16 * mib, 40 * mib, cache_bytes=32 * mib, budget_bytes=2**40) == 9
    assert copies_beyond_cache(16 * mib, 40 * mib, cache_bytes=32 * mib, budget_bytes=200 * mib) == 5
    assert copies_beyond_cache(16 * mib, 40 * mib, cache_bytes=32 * mib, budget_bytes=0) == 2


def test_rounds_alternate_and_no_copy_is_read_again_before_all_others():
    calls: list[tuple[str, int]] = []
    sizes = {"one": 1, "three": 3, "two": 2}

    def variant(name: str) -> Variant:
        def call(copy: int) -> Tensor:
            calls.append((name, copy))
            return torch.empty(0)

        return Variant(call, sizes[name])

    copies = 5
    samples = Timer(CPU, seconds=0, min_rounds=4).measure({name: variant(name) for name in sizes}, copies)
    forward, backward = ["one", "three", "two"], ["two", "three", "one"]
    assert [name for name, _ in calls] == forward + backward + forward + backward
    reads = [(copy + i) % copies for name, copy in calls for i in range(sizes[name])]
    assert reads == [i % copies for i in range(len(reads))]
    assert all(len(values) == 4 and min(values) > 0 for values in samples.values())


class FakeGpu:
    """CUDA's calls as bench/timing.py makes them, on a clock of its own: launches take `host` seconds."""

    def __init__(self, monkeypatch, host: float) -> None:
        self.host, self.now, self.slept_until, self.busy_until = host, 0.0, 0.0, 0.0
        self.sleeps: list[int] = []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = max(gpu.now, gpu.busy_until)

            def query(self) -> bool:
                return gpu.now >= self.at

            def synchronize(self) -> None:
                gpu.now = max(gpu.now, self.at)

            def elapsed_time(self, end: "Event") -> float:
                return (end.at - self.at) * 1e3

        def sleep(cycles: int) -> None:
            self.sleeps.append(cycles)
            self.busy_until = self.now + cycles / 1e9

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", sleep, raising=False)

    def launch(self) -> None:
        """Launch work of 3 ms."""
        self.now += self.host
        self.busy_until = max(self.now, self.busy_until) + 3e-3


def test_a_sample_on_a_gpu_has_no_time_of_the_host_in_it(monkeypatch):
    gpu, timer = FakeGpu(monkeypatch, host=1e-3), Timer(torch.device("cuda"), 0.0)
    assert [timer._time_launch(gpu.launch, 30) for _ in range(2)] == pytest.approx([1e-4, 1e-4])
    # It slept longer until the launch fitted in, and then as long at once.
    assert gpu.sleeps == [2**18, 2**19, 2**20, 2**20] and timer.hidden

    slow = FakeGpu(monkeypatch, host=10.0)
    timer = Timer(torch.device("cuda"), 0.0)
    timer._time_launch(slow.launch, 30)
    assert not timer.hidden  # and the result says so


def test_graphs_have_at_least_30_calls_and_whole_rounds_of_the_copies(monkeypatch):
    calls: list[int] = []

    def call(copy: int) -> Tensor:
        calls.append(copy)
        return torch.empty(0)

    class Graph:
        def replay(self) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda _: contextlib.nullcontext())
    divided: list[int] = []
    monkeypatch.setattr(Timer, "_time_launch", lambda _, __, number: divided.append(number) or 1.0)
    for copies, expected in ((1, 30), (4, 32), (31, 31), (64, 64)):
        calls.clear()
        Timer(torch.device("cuda"), 0.0, 1).measure({"one": Variant(call)}, copies)
        assert calls == [i % copies for i in range(expected)] and divided.pop() == expected


def test_the_gap_of_two_calls_in_a_graph_is_beyond_twice_one(monkeypatch):
    replayed: list[int] = []

    class Graph:
        calls = 0

        def replay(self) -> None:
            replayed.append(self.calls)

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...
        def record(self) -> None: ...
        def synchronize(self) -> None: ...
        def elapsed_time(self, end: "Event") -> float:
            return {1: 0.010, 2: 0.017}[replayed[-1]]

    captured: list[Graph] = []

    @contextlib.contextmanager
    def capture(graph: Graph) -> Iterator[None]:
        captured.append(graph)
        with monkeypatch.context() as patch:
            patch.setattr(Tensor, "nonzero", None)  # it waits for the GPU, which a capture forbids
            yield
        captured.pop()

    def counted(*arguments: Any, **options: Any) -> Tensor:
        for graph in captured:
            graph.calls += 1
        return linear(*arguments, **options)

    linear = ops.loop_lora_linear
    monkeypatch.setattr(ops, "loop_lora_linear", counted)
    for name, fake in (("Event", Event), ("CUDAGraph", Graph), ("graph", capture), ("_sleep", lambda _: None)):
        monkeypatch.setattr(torch.cuda, name, fake, raising=False)
    monkeypatch.setattr(overhead_cases, "_FLUSH_BYTES", 8)
    shapes = [Projection("out", 16, (16,)), Projection("down", 32, (16,))]
    found = overhead_cases.measure_gaps(CPU, torch.float32, shapes, samples=3)
    assert [(record["projection"], record["rows"], record["chained"]) for record in found] == [
        (name, rows, name == "out") for name in ("out", "down") for rows in (1, 8, 64)
    ]
    for record in found:
        assert record["one"]["median"] == pytest.approx(1e-5) and record["gap"] == pytest.approx(-3e-6)
    overhead = {"call": measure_call(CPU, False, 1), "plan": measure_planning(1), "gaps": found}
    assert "out of 8 rows -3.0 us" in overhead_table(overhead).text()
    assert "down of 8 rows (not chained) -3.0 us" in overhead_table(overhead).text()


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


def test_tiles_of_a_sweep_are_forced_for_their_shape_and_rows_only(tmp_path, monkeypatch):
    forced: list[tuple[int, int]] = []
    monkeypatch.setattr(linear_variants, "force_tiling", lambda tile_rows, slices: forced.append((tile_rows, slices)))
    seconds = [{"kColumns 1": 1.0, "kRows 4": 2.0}, {"kColumns 1": 3.0, "kRows 4": 2.0}]
    tilings = [
        {"outputs": 12, "inputs": 16, "rows": rows, "seconds": s} for rows, s in zip((8, 64), seconds, strict=True)
    ]
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"tilings": tilings}))
    tiles = Tiles.read(path)
    weights = Weights.make(Projection("out", inputs=16, segments=(12,)), 1, torch.float64, CPU, should_pack=False)
    adapters = Adapters.make(weights, 4, 2, should_pack=False)
    for rows, expected in ((8, (0, 1)), (9, (128, 4)), (65, None)):
        forced.clear()
        x = torch.randn(rows, 16, dtype=torch.float64)
        variants = make_variants(weights, adapters, x, mixed_loops(rows, 2), tiles)
        torch.testing.assert_close(variants["tuned"].call(0), variants["ours"].call(0))
        assert forced == ([] if expected is None else [expected, (0, 0)])
    path.write_text("{}")
    with pytest.raises(UserError, match=r"--tiles: found .*tiles\.json; expected a result of bench/tile_sweep"):
        Tiles.read(path)


def test_speedup_is_the_median_of_the_rounds():
    assert speedup({"ours": [1.0, 2.0, 1.0], "base": [3.0, 2.0, 9.0]}, "ours", "base") == 3.0


def test_interval_of_a_median_by_ranks():
    # Of six values the median lies outside all of them with 2 * (1/2)^6 = 3.1 %; of five with 6.2 %.
    assert median_interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) == (1.0, 6.0)
    assert median_interval([1.0, 2.0, 3.0, 4.0, 5.0]) is None
    # Of nine the next to outermost two do: 2 * (1 + 9) / 2^9 = 3.9 %, the next 2 * 46 / 2^9 = 18 %.
    assert median_interval([float(n) for n in range(9)]) == (1.0, 7.0)


def test_rates_are_the_best_of_several_ways():
    rates = Rates(Timer(CPU, 0, min_rounds=1), torch.float32, buffer_bytes=2**20)
    rates.probe()
    first = dict(rates.read)
    rates.probe()
    assert {"sum, float32", "dot, float32", "copy"} < set(first) and len(first) == 5
    assert all(rates.read[way] >= first[way] > 0 for way in first)
    assert rates.best_read()[1] == max(rates.read.values())


def test_size_of_the_last_level_cache_is_that_of_the_system_or_assumed(monkeypatch):
    size, _ = last_level_cache_bytes(CPU)
    assert size >= 2**16
    monkeypatch.setattr("bench.timing.Path.glob", lambda *_: iter(()))
    assert last_level_cache_bytes(CPU) == (64 * 2**20, False)


def record(rows: int, rank: int, loops: int, speed: dict[str, float], seconds: float = 1.0) -> dict[str, Any]:
    return {
        "projection": "out",
        "inputs": 64,
        "segments": [64],
        "rows": rows,
        "rank": rank,
        "loops": loops,
        "bytes": 100,
        "flops": 50,
        "seconds": {"ours": {"median": seconds}},
        "speedup": speed,
        "over_reading": seconds,
    }


@pytest.mark.parametrize(
    "cases, rows, title",
    [
        ([(1, 1), (4, 1), (4, 2), (4, 3)], [(1, 1)], "Whole layer, 1 loop"),
        ([(1, 1), (2, 2), (4, 2), (4, 3)], [(1, 1), (4, 2)], "Whole layer, 1 loop or 2 loops mixed"),
        ([(4, 2), (4, 3)], [(4, 2)], "Whole layer, 2 loops mixed"),
        ([(4, 1), (4, 3)], [(4, 1), (4, 3)], "Whole layer, 1 loop or 3 loops mixed"),
        ([(8, 3)], [(8, 3)], "Whole layer, 3 loops mixed"),
    ],
)
def test_the_summary_of_the_layer_is_named_after_its_loops(cases, rows, title):
    floor = {"bound": "bytes", "over_floor": {"ours": 1.0}}
    made = [{**record(count, 0, loops, {"base": 1.0}), **floor} for count, loops in cases]
    _, _, layer = summary_tables({"goals": [], "linear": made, "layer": made})
    assert layer.title.startswith(f"{title}: time of ours")
    assert [(int(row[3]), int(row[2])) for row in layer.rows] == rows


def test_goals_are_computed_with_their_worst_case():
    slow = {"base": 1.0, "unfused": 1.6, "concatenated": 1.4}
    records = [
        record(1, 64, 1, {"base": 0.9, "unfused": 0.94, "concatenated": 1.0}),
        record(8, 0, 2, {"base": 1.5}),
        record(16, 64, 3, slow, seconds=1.31),
        record(32, 64, 3, {"base": 1.0, "unfused": 1.0, "concatenated": 1.0}, seconds=9.0),
    ]
    rates = {"matmul": {"flops_per_second": 45.0}}
    result = {"dtype": "float32", "linear": records, "rates": rates}
    rank_zero, every_rank, everywhere, reading, floor = cpu_goals(result)
    assert (rank_zero["holds"], rank_zero["cases"], rank_zero["worst"]) == (True, 1, 1.5)
    assert (every_rank["holds"], every_rank["cases"], every_rank["worst"]) == (False, 2, 1.4)
    assert every_rank["cases_that_hold"] == 1 and every_rank["worst_case"] == "out, M=16, rank 64, 3 loops"
    assert (everywhere["holds"], everywhere["cases"], everywhere["worst"]) == (False, 4, 0.94)
    assert (reading["holds"], reading["cases"], reading["worst"]) == (False, 2, 1.31)
    assert (floor["holds"], floor["cases"], floor["worst"]) == (True, 2, pytest.approx(1.31 * 45 / 50))

    wide, square, everywhere, reading, floor = cpu_goals({**result, "dtype": "bfloat16", "linear": records[:2]})
    assert wide["holds"] is None and square["holds"] is None
    assert everywhere["holds"] and reading["holds"] and floor["holds"]

    many = [record(64, rank, 2, {"base": 1.0, "unfused": speed}) for rank, speed in ((64, 0.96), (128, 1.0))]
    layer = [{**record(64, 64, 2, {"base": 1.0}), "projection": "layer", "over_floor": {"ours": 1.4}}]
    on_tiles = {"dtype": "bfloat16", "native": {"cpu_isa": "amx_bf16"}, "linear": many, "layer": layer, "rates": rates}
    anywhere, high_ranks, whole = cpu_goals(on_tiles)[3:6]
    assert (anywhere["holds"], anywhere["worst"]) == (True, 0.96)
    assert (high_ranks["holds"], high_ranks["cases"], high_ranks["worst"]) == (False, 1, 1.0)
    assert (whole["holds"], whole["worst"]) == (False, 1.4)
    assert len(cpu_goals({**on_tiles, "native": {"cpu_isa": "avx512_bf16"}})) == len(cpu_goals(on_tiles)) - 3

    plan = {"rows": 256, "native": False, "seconds": {"all": {"median": 1.0}}}
    call, planning = cpu_goals({"dtype": "float16", "overhead": {"call": {"added": 11e-6}, "plan": plan}})
    assert call["holds"] is False and planning["holds"] is None
    plan["native"] = True
    assert cpu_goals({"dtype": "float16", "overhead": {"call": {"added": 9e-6}, "plan": plan}})[1]["holds"] is False


def test_ours_is_compared_with_reading_as_many_bytes_in_the_same_round():
    compared = _over_reading(ours=[3.0, 8.0, 5.0], reading=[1.0, 2.0, 2.0], size=2.0)
    assert compared["over_reading"] == 1.5  # of 1.5, 2 and 1.25
    assert compared["reading"]["median"] == 4.0


def test_a_layer_lacks_cases_that_a_projection_lacks():
    full = {**record(1, 0, 1, {"base": 2.0}), "flops": 10, "floor_seconds": 0.5, "bound": "bytes"}
    full["seconds"]["base"] = {"median": 2.0}
    (layer,) = layer_records([full, full, {**full, "rows": 2}], num_projections=2)
    assert layer["rows"] == 1 and layer["bytes"] == 200 and layer["floor_seconds"] == 1.0
    assert layer["speedup"] == {"base": 2.0} and layer["over_floor"] == {"ours": 2.0, "base": 4.0}


def test_a_layer_measured_as_one_call_has_the_floors_of_its_projections():
    config = model_config_from_hf(CONFIGS["gemma"], "gemma")
    spec = LinearSpec(projections(config), [4], [0, 3], [2], torch.float32, CPU, False, 2**14, 2**30)
    timer = Timer(CPU, 0.0)
    rates = Rates(timer, torch.float32, 2**16)
    rates.probe()
    base, lora = records = list(run_layers(spec, timer))
    add_floors(records, rates)
    assert (base["rank"], set(base["seconds"])) == (0, {"ours", "base"})
    assert (lora["rank"], set(lora["seconds"])) == (3, {"ours", "base", "unfused", "concatenated", "merged"})
    assert lora["bytes"] == sum(p.min_bytes(4, 3, 2, 4) for p in spec.projections)
    floors = [rates.floor(part["bytes"], part["flops"])[0] for part in lora["parts"]]
    assert len(floors) == 4 and lora["floor_seconds"] == pytest.approx(sum(floors))
    assert lora["over_floor"]["ours"] == pytest.approx(lora["seconds"]["ours"]["median"] / lora["floor_seconds"])


def test_goals_on_cuda_are_of_the_layer_and_of_decode_attention():
    def layer(rows: int, rank: int, over_floor: float, unfused: float) -> dict[str, Any]:
        speed = {"base": 1.0, "unfused": unfused, "concatenated": 1.5}
        return {**record(rows, rank, 2, speed), "projection": "layer", "over_floor": {"ours": over_floor}}

    def decode(context: int, seconds: float) -> dict[str, Any]:
        return {
            "kind": "decode",
            "count": 32,
            "context": context,
            "bytes": 30,
            "seconds": {"ours": {"median": seconds}},
        }

    result = {
        "dtype": "bfloat16",
        "layer": [layer(8, 64, 1.2, 2.5), layer(64, 512, 1.3, 1.9), layer(128, 64, 9.0, 0.1), layer(8, 0, 9.0, 0.1)],
        "attention": [decode(512, 9.0), decode(1024, 1.0), decode(4096, 0.5)],
        "rates": {"read_bandwidth": {"all": {"copy": 50.0}}},
    }
    floor, unfused, concatenated, attention = cuda_goals(result)
    assert (floor["cases"], floor["holds"], floor["worst"]) == (2, False, 1.3)
    assert (unfused["cases_that_hold"], unfused["worst_case"]) == (1, "layer, M=64, rank 512, 2 loops")
    assert concatenated["holds"] is True
    assert (attention["cases"], attention["cases_that_hold"], attention["worst"]) == (2, 1, pytest.approx(0.6))
    assert cuda_goals({"dtype": "float32"}) == []


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


def test_the_small_real_model_has_a_preset():
    config = preset("smollm2-135m")
    layer = [(p.inputs, p.segments) for p in projections(config)]
    assert layer == [(576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,))]
    assert (config.head_dim, config.vocab_size) == (64, 49152)
