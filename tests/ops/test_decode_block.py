"""decode_block: the native pass and its reference against one in float64, rows in batches, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rrt.ops import BLOCK_PARAMETERS, decode_block, decode_block_reference, pack_linear
from tests.util.native import DTYPES, needs_native, threads
from tests.util.pairwise import pairwise


def reference(**inputs: Any) -> Tensor:
    return decode_block_reference(*inputs.values())


IMPLEMENTATIONS = {"op": decode_block, "reference": reference}
LAYERS, LOOPS, PAGE_SIZE, PAGES_EACH = 3, 3, 4, 9
# Of q, k, v, out, gate, up and down: a layer has its own, and one has a LoRA on a few linears alone.
LORA_RANKS = [[3, 5, 0, 4, 2, 7, 6], [0, 0, 0, 9, 0, 1, 0], [17, 2, 40, 0, 0, 0, 3]]
ROW_LOOPS, POSITIONS = [2, 0, 1, 0, 2, 2, 1], [3, 17, 0, 8, 30, 12, 5]
# Name: heads, key/value heads, head width, inner width, what else there is.
FORMS: dict[str, tuple[int, int, int, int, set[str]]] = {
    "llama": (6, 2, 8, 40, set()),
    "llama, wide enough for several threads": (6, 2, 8, 2048, set()),
    "gemma with LoRA": (4, 1, 16, 33, {"lora", "plus one", "gelu"}),
    "qwen2 with LoRA per loop": (4, 4, 12, 64, {"lora", "bias", "per loop"}),
    "qwen2": (4, 2, 12, 64, {"bias"}),
    "qwen3": (6, 3, 16, 40, {"qk norm"}),
    "qwen3 with LoRA per loop": (2, 2, 16, 24, {"lora", "qk norm", "per loop"}),
}
# Relative to the norm of the states, after the roundings of three layers.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def make_inputs(form: str, dtype: torch.dtype, kv_only: int = 2, widen: bool = False) -> dict[str, Any]:
    """Arguments by name, of rows whose contexts differ in length; `widen` takes the same numbers to float64."""
    num_heads, num_kv_heads, head_dim, inner, traits = FORMS[form]
    hidden, rows, generator = 48, len(POSITIONS), torch.Generator().manual_seed(1)
    width, kv_width = num_heads * head_dim, num_kv_heads * head_dim
    per_loop = (LOOPS,) if "per loop" in traits else ()

    def normal(*size: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        numbers = (torch.randn(size, generator=generator, dtype=torch.float64) * scale + mean).to(dtype)
        return numbers.double() if widen else numbers

    ranks = LORA_RANKS if "lora" in traits else [[0] * 7] * LAYERS
    parameters: list[Tensor | None] = []
    for layer_ranks in ranks:
        linears = {
            "qkv": (hidden, width + 2 * kv_width, layer_ranks[:3]),
            "out": (width, hidden, layer_ranks[3:4]),
            "gate_up": (hidden, 2 * inner, layer_ranks[4:6]),
            "down": (inner, hidden, layer_ranks[6:]),
        }
        layer: dict[str, Tensor | None] = dict.fromkeys(BLOCK_PARAMETERS)
        for norm, size in (("attn_norm", hidden), ("mlp_norm", hidden), ("q_norm", head_dim), ("k_norm", head_dim)):
            if size == hidden or "qk norm" in traits:
                layer[norm] = normal(*per_loop, size, scale=0.3, mean=float("plus one" not in traits))
        for name, (k, n, linear_ranks) in linears.items():
            layer[f"{name}.weight"] = pack_linear(normal(n, k, scale=k**-0.5))
            if "bias" in traits:
                layer[f"{name}.bias"] = normal(*per_loop, n)
            if any(linear_ranks):
                layer[f"{name}.lora_a"] = pack_linear(normal(LOOPS, sum(linear_ranks), k, scale=k**-0.5))
                layer[f"{name}.lora_b"] = pack_linear(normal(LOOPS, n, max(linear_ranks), scale=0.3))
        parameters += layer.values()
    pages = torch.randperm(rows * PAGES_EACH, generator=generator).view(rows, PAGES_EACH)
    positions = torch.tensor(POSITIONS, dtype=torch.int32)
    angles = torch.rand(32, 4, generator=generator, dtype=torch.float64) * 6
    cache = (LAYERS, rows * PAGES_EACH, PAGE_SIZE, num_kv_heads, head_dim)
    wide = torch.float64 if widen else torch.promote_types(dtype, torch.float32)
    return dict(
        x=normal(rows, hidden),
        loops=torch.tensor(ROW_LOOPS, dtype=torch.int32),
        positions=positions,
        slot_mapping=pages[torch.arange(rows), positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE,
        num_kv_only=kv_only,
        block_tables=pages[kv_only:].int(),
        context_lens=positions[kv_only:] + 1,
        k_cache=normal(*cache),
        v_cache=normal(*cache),
        cos_sin=torch.cat((angles.cos(), angles.sin()), 1).float().to(wide),
        parameters=parameters,
        ranks=[rank for layer_ranks in ranks for rank in layer_ranks],
        num_loops=LOOPS,
        num_heads=num_heads,
        inner_size=inner,
        norm_eps=1e-5,
        norm_plus_one="plus one" in traits,
        activation="gelu_tanh" if "gelu" in traits else "silu",
        scale=head_dim**-0.5,
    )


def chosen(inputs: dict[str, Any], rows: list[int]) -> dict[str, Any]:
    """The same pass of some of the rows, kv-only ones first, with caches of its own to write."""
    kv_only = inputs["num_kv_only"]
    decoding = [row - kv_only for row in rows if row >= kv_only]
    some = {name: inputs[name][rows] for name in ("x", "loops", "positions", "slot_mapping")}
    some |= {name: inputs[name][decoding] for name in ("block_tables", "context_lens")}
    some |= {name: inputs[name].clone() for name in ("k_cache", "v_cache")}
    return {**inputs, **some, "num_kv_only": len(rows) - len(decoding)}


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.isa
@pairwise(form=list(FORMS), dtype=DTYPES, name=list(IMPLEMENTATIONS), exhaustive=("op",))
def test_a_pass_equals_one_in_float64(form: str, dtype: torch.dtype, name: str) -> None:
    inputs, exact = make_inputs(form, dtype), make_inputs(form, dtype, widen=True)
    before = inputs["x"].clone()
    found, expected = IMPLEMENTATIONS[name](**inputs), reference(**exact)
    assert found.dtype == dtype and torch.equal(found[:2], before[:2]) and torch.equal(inputs["x"], before)
    for value, wanted in ((found, expected), *((inputs[c], exact[c]) for c in ("k_cache", "v_cache"))):
        assert distance(value, wanted) <= TOLERANCES[dtype]
    # What the pass had no slot for is as it was.
    written = torch.zeros(exact["k_cache"].shape[1] * PAGE_SIZE, dtype=torch.bool)
    written[inputs["slot_mapping"]] = True
    for cache in ("k_cache", "v_cache"):
        original = make_inputs(form, dtype)[cache]
        changed = (inputs[cache] != original).flatten(1, 2).flatten(2).any(2)
        assert torch.equal(changed, written.expand(LAYERS, -1))


@needs_native
@pytest.mark.isa
@pairwise(form=list(FORMS), dtype=DTYPES)
def test_a_row_is_bitwise_the_same_in_any_batch_and_on_any_threads(form: str, dtype: torch.dtype) -> None:
    inputs = make_inputs(form, dtype)
    whole = chosen(inputs, list(range(7)))
    with threads(3):
        together = decode_block(**whole)
    for rows in ([4], [0], [0, 1], [1, 3, 6], [6, 5, 4, 3, 2]):
        some = chosen(inputs, rows)
        assert torch.equal(decode_block(**some), together[rows])
        slots = inputs["slot_mapping"][rows]
        for cache in ("k_cache", "v_cache"):
            assert torch.equal(some[cache].flatten(1, 2)[:, slots], whole[cache].flatten(1, 2)[:, slots])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_no_rows_are_a_pass_too(name: str) -> None:
    inputs = chosen(make_inputs("qwen3 with LoRA per loop", torch.float32), [])
    assert IMPLEMENTATIONS[name](**inputs).shape == (0, 48)


BAD: list[tuple[str, Any, str]] = [
    ("x", lambda x: x.int(), "x: found dtype int32; expected float32, float64, bfloat16 or float16"),
    ("k_cache", lambda x: x.double(), "k_cache: found dtype float64; expected float32"),
    ("cos_sin", lambda x: x.double(), "cos_sin: found dtype float64; expected float32"),
    ("cos_sin", lambda x: x[:, :7].contiguous(), "cos_sin: found rotary_dim 7; expected an even number of at most 16"),
    ("num_kv_only", lambda x: 8, "num_kv_only: found 8; expected 0 to 7, the rows"),
    ("num_loops", lambda x: 0, "num_loops: found 0; expected at least 1"),
    ("num_loops", lambda x: 2, "parameters: layer 0: attn_norm: found shape [3, 48]; expected [2, 48]"),
    ("inner_size", lambda x: 0, "inner_size: found 0; expected at least 1"),
    ("loops", lambda x: x.long(), "loops: found dtype int64; expected int32"),
    ("loops", lambda x: x[:3], "loops: found shape [3]; expected [7]"),
    ("loops", lambda x: x + 1, "loops[0]: found 3; expected a loop in [0, 3)"),
    ("block_tables", lambda x: x[:, ::2], "block_tables: found strides"),
    ("block_tables", lambda x: x[:2], "block_tables: found shape [2, 9]; expected [5, max_pages]"),
    ("block_tables", lambda x: x + 60, "block_tables[0, 0]: found"),
    (
        "context_lens",
        lambda x: x + 36,
        "context_lens[0]: found 37; expected a length in [0, 36], what block_tables hold",
    ),
    ("slot_mapping", lambda x: x + 300, "]: found"),
    ("positions", lambda x: x + 2, "positions[4]: found 32; expected a position in [0, 32)"),
    ("v_cache", lambda x: x[:2], "v_cache: found shape [2, 63, 4, 2, 16]; expected [3, 63, 4, 2, 16]"),
    ("num_heads", lambda x: 3, "num_heads: found 3; expected a multiple of k_cache's 2"),
    ("activation", lambda x: "relu", "activation: found relu; expected silu or gelu_tanh"),
    ("ranks", lambda x: x[:7], "ranks: found 7 entries; expected 21, 7 for each of k_cache's layers"),
    ("ranks", lambda x: [*x[:8], -1, *x[9:]], "ranks[8]: found -1; expected 0 or more"),
    (
        "ranks",
        lambda x: [*x[:17], 4, *x[18:]],
        "parameters: layer 2: out.lora_a: found None; expected a tensor",
    ),
    ("parameters", lambda x: x[1:], "parameters: found 59 entries; expected 60, 20 for each of k_cache's layers"),
    ("parameters", lambda x: [*x[:20], None, *x[21:]], "parameters: layer 1: attn_norm: found None; expected a tensor"),
    (
        "parameters",
        lambda x: [*x[:4], x[8], *x[5:]],
        "parameters: layer 0: qkv.weight: found shape [2, 32, 32]; expected",
    ),
    ("parameters", lambda x: [*x[:6], None, *x[7:]], "parameters: layer 0: qkv.lora_a: found None; expected a tensor"),
]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("argument", "change", "message"), BAD)
def test_bad_arguments_are_named(argument: str, change: Any, message: str, name: str) -> None:
    inputs = make_inputs("qwen3 with LoRA per loop", torch.float32)
    before = inputs["k_cache"].clone()
    with pytest.raises(RuntimeError) as error:
        IMPLEMENTATIONS[name](**{**inputs, argument: change(inputs[argument])})
    assert str(error.value).splitlines()[0].startswith("rrt::decode_block: ") and message in str(error.value)
    assert torch.equal(inputs["k_cache"], before)


def test_registration_passes_opcheck() -> None:
    inputs = make_inputs("qwen2 with LoRA per loop", torch.float32)
    torch.library.opcheck(torch.ops.rrt.decode_block.default, tuple(inputs.values()))
