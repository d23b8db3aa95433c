"""The cases of bench/kernels.py: bytes and FLOPs by hand, variants that compute the definition."""

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from bench import attention_cases, linear_variants, overhead_cases
from bench.attention_cases import AttentionSpec
from bench.attention_cases import make_variants as make_attention_variants
from bench.kernel_report import overhead_table
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
from bench.timing import Rates, Timer
from rrt import ops
from rrt.checkpoint.hf_config import model_config_from_hf
from rrt.checkpoint.presets import preset
from rrt.errors import UserError
from rrt.model.config import LoraRanks, RecursiveConfig
from rrt.model.loop_linear import LoopLinear
from rrt.model.transformer import RecursiveTransformer
from tests.util.configs import CONFIGS

CPU = torch.device("cpu")


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


def test_a_variant_that_differs_is_not_timed():
    right = torch.ones(4)
    check_agreement({"a": right, "b": right * 1.00001}, "a", "case")
    for wrong in (right * 1.01, right * float("nan")):
        with pytest.raises(DisagreementError, match="case: b differs from a by"):
            check_agreement({"a": right, "b": wrong}, "a", "case")


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


def test_the_small_real_model_has_a_preset():
    config = preset("smollm2-135m")
    layer = [(p.inputs, p.segments) for p in projections(config)]
    assert layer == [(576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,))]
    assert (config.head_dim, config.vocab_size) == (64, 49152)
