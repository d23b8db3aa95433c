"""Prefill's linears: merged weights kept within a budget until a parameter changes, and the ways beyond it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rrt.decode.merged_weights import MergedWeights, PrefillLinears, is_faster_apart, multiply_apart
from rrt.errors import UserError
from rrt.model.loop_linear import LoopLinear
from tests.util.decoding import FAMILIES, LOOPED, assert_close, make_decoder, make_model, prefill, random_tokens

EVERYTHING = 1 << 30


def make_linear(rank=4, dtype=torch.float32, **options):
    linear = LoopLinear(24, 40, num_loops=3, rank=rank, bias=True, untie_bias=True, **options).to(dtype)
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return linear


def states_of(model, merged_bytes, tokens):
    decoder = make_decoder(model, num_pages=100, merged_bytes=merged_bytes)
    decoder._prefills_packed = False
    return prefill(decoder, decoder.cache.allocate(), tokens), decoder._linears.merged


@pytest.mark.parametrize("looped", [name for name in LOOPED if "relaxed" in name or name == "recursive-2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_has_the_same_states_for_any_budget(family, looped):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        model, tokens = make_model(family, looped, dtype), random_tokens(13)
        plain, none = states_of(model, 0, tokens)
        everything, all_of_them = states_of(model, EVERYTHING, tokens)
        part, some = states_of(model, all_of_them.num_bytes // 2, tokens)
        for states in (everything, part):
            assert_close(states, plain, tolerance)
        relaxed = [m for m in model.modules() if isinstance(m, LoopLinear) and m.rank > 0]
        assert all_of_them.num_bytes == sum(m.weight.nbytes * m.num_loops for m in relaxed)
        assert none.num_bytes == 0 and some.num_bytes <= some.max_bytes
        assert bool(relaxed) == (0 < some.num_bytes < all_of_them.num_bytes)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bfloat16_merged_weights_are_as_close_to_fp32_as_separate_products(family):
    model, tokens = make_model(family, "relaxed-3-untied", torch.float32), random_tokens(24)
    exact, _ = states_of(model, 0, tokens)
    model.to(torch.bfloat16)
    plain, merged = ((states_of(model, budget, tokens)[0].float() - exact).norm() for budget in (0, EVERYTHING))
    assert 0 < merged <= 1.25 * plain


def test_a_merged_weight_is_summed_in_fp32_and_rounded_once():
    linear = make_linear(24, torch.bfloat16)
    wide = linear.weight.float() + linear.lora_b[2].float() @ linear.lora_a[2].float()
    merged = MergedWeights(EVERYTHING).get(linear, 2)
    assert merged.dtype == torch.bfloat16
    # Sums in another order may fall on the other side of a rounding.
    assert (merged == wide.bfloat16()).float().mean() > 0.99
    assert (merged.float() - wide).abs().max() <= 2**-8 * wide.abs().max()


def test_weights_are_kept_until_the_budget_is_used_up_and_then_stay():
    first, second = make_linear(4), make_linear(5)
    merged = MergedWeights(2 * first.weight.nbytes + 5)
    kept = [merged.get(first, 0), merged.get(second, 1)]
    assert merged.get(first, 2) is None and merged.get(second, 0) is None
    assert merged.num_bytes == 2 * first.weight.nbytes
    assert merged.get(first, 0) is kept[0] and merged.get(second, 1) is kept[1]
    with torch.no_grad():
        first.weight.zero_()
    # What was merged again takes the place of what it was.
    assert merged.get(first, 0) is not kept[0] and merged.num_bytes == 2 * first.weight.nbytes
    assert merged.get(first, 2) is None


def optimizer_step(linear, name):
    parameter = getattr(linear, name)
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], lr=0.1).step()


def fused_optimizer_step(linear, name):
    parameter = getattr(linear, name)
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], lr=0.1, fused=True).step()


def copy_into(linear, name):
    with torch.no_grad():
        getattr(linear, name).copy_(torch.randn(getattr(linear, name).shape))


def write_a_column_in_inference_mode(linear, name):
    with torch.inference_mode():
        getattr(linear, name)[..., 0] += 100


def load_state(linear, name):
    state = copy.deepcopy(linear.state_dict())
    state[name].normal_()
    linear.load_state_dict(state)


def assign_state(linear, name):
    state = copy.deepcopy(linear.state_dict())
    state[name].normal_()
    linear.load_state_dict(state, assign=True)


def other_memory(linear, name):
    getattr(linear, name).data = torch.randn(getattr(linear, name).shape)


def other_memory_twice(linear, name):
    """Memory that was freed in between may be handed out again."""
    for _ in range(2):
        other_memory(linear, name)


def other_parameter(linear, name):
    setattr(linear, name, nn.Parameter(torch.randn(getattr(linear, name).shape)))


def other_parameter_in_the_same_memory(linear, name):
    parameter = getattr(linear, name)
    parameter.data.add_(1)  # not counted
    setattr(linear, name, nn.Parameter(parameter.data))


@pytest.mark.parametrize("name", ["weight", "lora_a", "lora_b"])
@pytest.mark.parametrize(
    "change",
    [
        optimizer_step,
        fused_optimizer_step,
        copy_into,
        write_a_column_in_inference_mode,
        load_state,
        assign_state,
        other_memory,
        other_memory_twice,
        other_parameter,
        other_parameter_in_the_same_memory,
    ],
)
def test_a_change_of_any_parameter_is_noticed(change, name):
    linear, merged = make_linear(), MergedWeights(EVERYTHING)
    for loop in range(3):
        before = merged.get(linear, loop)
        assert merged.get(linear, loop) is before
    change(linear, name)
    for loop in range(3):
        after = merged.get(linear, loop)
        assert torch.equal(after, linear.merged_weight(loop))
        assert merged.get(linear, loop) is after
    assert not torch.equal(after, before)
    assert merged.num_bytes == 3 * linear.weight.nbytes


def test_a_change_of_dtype_is_noticed_and_counted():
    linear, merged = make_linear(), MergedWeights(EVERYTHING)
    merged.get(linear, 0)
    linear.to(torch.float64)
    assert torch.equal(merged.get(linear, 0), linear.merged_weight(0))
    assert merged.num_bytes == linear.weight.nbytes == 24 * 40 * 8


def test_parameters_that_count_no_changes_are_merged_but_not_kept():
    with torch.inference_mode():
        linear = make_linear()
        linears, x = PrefillLinears(EVERYTHING), torch.randn(5, 24)
        assert_close(linears(linear, x, 1), linear(x, 1), 1e-5)
        linear.lora_a.mul_(2)
        assert_close(linears(linear, x, 1), linear(x, 1), 1e-5)
    assert linears.merged.num_bytes == 0


@torch.inference_mode()
def test_a_decoder_prefills_with_the_models_present_weights():
    model, tokens = make_model("gpt_neox", "relaxed-3-untied"), random_tokens(9)
    decoder = make_decoder(model, num_pages=100, merged_bytes=EVERYTHING)
    before = prefill(decoder, decoder.cache.allocate(), tokens)
    for parameter in model.parameters():
        parameter.mul_(1.1)
    after = prefill(decoder, decoder.cache.allocate(), tokens)
    assert_close(after, states_of(model, 0, tokens)[0])
    assert (after - before).abs().max() > 0.1


@torch.no_grad()
def test_beyond_the_budget_few_rows_are_multiplied_apart_and_many_by_a_weight_merged_for_them(monkeypatch):
    linear, linears, merges = make_linear(), PrefillLinears(0), []
    merged_weight = LoopLinear.merged_weight
    monkeypatch.setattr(
        LoopLinear, "merged_weight", lambda self, loop: merges.append(loop) or merged_weight(self, loop)
    )
    break_even = 24 * 40 // (24 + 40)
    for rows, expected in ((break_even, []), (break_even + 1, [1]), (break_even + 1, [1, 1])):
        x = torch.randn(rows, 24)
        assert_close(linears(linear, x, 1), linear(x, 1), 1e-5)
        assert merges == expected
    kept = PrefillLinears(EVERYTHING)
    for rows in (break_even, break_even + 1, 1):
        x = torch.randn(rows, 24)
        assert_close(kept(linear, x, 2), linear(x, 2), 1e-5)
        assert merges == [1, 1, 2]


@torch.inference_mode()
def test_many_rows_of_a_wide_weight_are_faster_apart_on_a_gpu():
    """Few rows take as long as reading W, and of few columns [M, N] is read and written once more for too little."""
    fewest = {
        (n, k): next((m for m in range(8, 4096, 8) if is_faster_apart(m, n, k, 64)), None)
        for n, k in ((2048, 2048), (16384, 2048), (2048, 16384), (2048, 256))
    }
    assert fewest == {(2048, 2048): 480, (16384, 2048): 144, (2048, 16384): 128, (2048, 256): None}


def test_products_apart_are_the_linear():
    linear, x = make_linear(4, torch.float64), torch.randn(9, 24, dtype=torch.float64)
    for loop in range(3):
        torch.testing.assert_close(multiply_apart(linear, x, loop), linear(x, loop))


def test_a_linear_without_lora_needs_no_memory():
    linear, linears = make_linear(0), PrefillLinears(EVERYTHING)
    x = torch.randn(50, 24)
    assert torch.equal(linears(linear, x, 2), F.linear(x, linear.weight, linear.bias[2]))
    assert linears.merged.num_bytes == 0


def test_a_negative_budget_is_refused():
    with pytest.raises(UserError, match="merged_bytes: found -1; expected at least 0"):
        make_decoder(make_model(), merged_bytes=-1)


@pytest.mark.gpu
@pytest.mark.timeout(60)
@pytest.mark.parametrize("rank", [8, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("apart", [False, True])
def test_rows_on_a_gpu_are_right_for_any_budget(dtype, rank, apart, monkeypatch):
    monkeypatch.setattr("rrt.decode.merged_weights.is_faster_apart", lambda *_: apart)
    linear, x = make_linear(rank).cuda().to(dtype), torch.randn(9, 24, device="cuda", dtype=dtype)
    exact = copy.deepcopy(linear).double()(x.double(), 1)
    for budget in (0, EVERYTHING):
        with torch.inference_mode():
            found = PrefillLinears(budget)(linear, x, 1)
        assert (found.double() - exact).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * exact.norm()
