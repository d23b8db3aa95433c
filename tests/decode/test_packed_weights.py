"""Packed linears against the model's own."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rrt.checkpoint.presets import preset
from rrt.decode.packed_weights import PackedLinears
from rrt.model.config import LoraRanks, RecursiveConfig
from rrt.model.loop_linear import LoopLinear
from rrt.model.transformer import RecursiveTransformer
from tests.util.native import needs_native

pytestmark = needs_native
IDS = torch.arange(30).view(2, 15)
EVERYTHING = 2**40
KINDS = {
    "recursive": RecursiveConfig(num_loops=2),
    "relaxed": RecursiveConfig(num_loops=2, lora_rank=LoraRanks(3, 2, 4, 5), untie_norms=True),
    "low rank only": RecursiveConfig(lora_rank=LoraRanks(q=3, kv=0, out=2, ffn=5), low_rank_only=True),
    "prefix": RecursiveConfig(num_loops=2, prefix_length=3, lora_rank=LoraRanks.uniform(2)),
}


def make_model(name: str, recursion: RecursiveConfig, dtype: torch.dtype = torch.float64) -> RecursiveTransformer:
    config = replace(
        preset(name),
        vocab_size=99,
        hidden_size=40,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=10,
        intermediate_size=70,
    )
    model = RecursiveTransformer(config, recursion)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of outputs of each packed product from now on."""
    from rrt import ops

    calls: list[int] = []
    native: Callable[..., Tensor] = ops.packed_linear
    gated: Callable[..., Tensor] = ops.packed_gated_linear
    monkeypatch.setattr("rrt.ops.packed_linear", lambda *args: calls.append(args[3]) or native(*args))
    monkeypatch.setattr("rrt.ops.packed_gated_linear", lambda *args: calls.extend([args[5]] * 2) or gated(*args))
    return calls


@torch.no_grad()
@pytest.mark.parametrize("recursion", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", ["gemma-2b", "tinyllama-1.1b", "pythia-160m"])
def test_logits_are_the_models_own(name: str, recursion: RecursiveConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(name, recursion)
    expected = model(IDS)
    packed, calls = PackedLinears(model.stack, EVERYTHING), counted(monkeypatch)
    with packed.in_use():
        found = model(IDS)
    linears = [m for m in model.stack.modules() if isinstance(m, LoopLinear) and m.weight is not None]
    prefix_products = 2 * model.config.num_layers if recursion.prefix_length else 0
    assert len(calls) == recursion.num_loops * len(linears) + prefix_products
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    assert torch.equal(model(IDS), expected)
    assert len(calls) == recursion.num_loops * len(linears) + prefix_products


def test_an_error_ends_the_use() -> None:
    model = make_model("tinyllama-1.1b", KINDS["relaxed"])
    with pytest.raises(ZeroDivisionError), PackedLinears(model.stack, EVERYTHING).in_use():
        _ = 1 / 0
    logits = model(IDS)
    logits.sum().backward()
    assert model.stack.layers[0].mlp.up.weight.grad is not None


@torch.no_grad()
@pytest.mark.parametrize("kind", ["recursive", "relaxed"])
def test_no_more_is_packed_than_fits(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("tinyllama-1.1b", KINDS[kind])
    whole = PackedLinears(model.stack, EVERYTHING).num_bytes
    copies = 2 if kind == "relaxed" else 1
    weights = [module.weight.nbytes for module in model.stack.modules() if isinstance(module, LoopLinear)]
    assert copies * sum(weights) <= whole <= 1.7 * copies * sum(weights)  # N up to a multiple of 32
    assert PackedLinears(model.stack, 0).num_bytes == 0
    calls = counted(monkeypatch)
    half = PackedLinears(model.stack, whole // 2)
    assert 0 < half.num_bytes <= whole // 2
    with half.in_use():
        found = model(IDS)
    assert 0 < len(calls) < 2 * len(weights)
    torch.testing.assert_close(found, model(IDS), rtol=1e-11, atol=1e-12)


@torch.no_grad()
def test_a_merged_weight_is_not_rounded_to_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rrt.ops.precision._HAS_BF16_INSTRUCTIONS", False)
    relaxed, recursion = (
        make_model("tinyllama-1.1b", KINDS[kind], torch.bfloat16) for kind in ("relaxed", "recursive")
    )
    assert PackedLinears(relaxed.stack, EVERYTHING).num_bytes == 0
    packed = PackedLinears(recursion.stack, EVERYTHING)
    assert packed.num_bytes > 0
    with packed.in_use():
        found = recursion(IDS)
    torch.testing.assert_close(found, recursion(IDS), rtol=0.05, atol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("has_fast_mkl", [False, True])
def test_linears_that_pytorch_multiplies_faster_stay_as_they_are(
    has_fast_mkl: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rrt.decode.packed_weights._HAS_FAST_MKL", has_fast_mkl)
    packed = {
        (kind, dtype): PackedLinears(make_model("tinyllama-1.1b", KINDS[kind], dtype).stack, EVERYTHING).num_bytes > 0
        for kind in ("recursive", "relaxed")
        for dtype in (torch.float32, torch.float64)
    }
    assert packed.pop(("recursive", torch.float32)) is not has_fast_mkl
    assert all(packed.values())
