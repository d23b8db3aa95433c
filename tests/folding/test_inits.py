"""Which weights the shared layers get: the rules of every init."""

import pytest
import torch

from rrt.checkpoint.source import load_model, open_source
from rrt.folding.fold import kept_depths
from tests.util.folding import block_names, fold, tensors
from tests.util.models import ALL_FAMILIES


def test_stepwise_keeps_the_first_and_the_last_layer():
    assert kept_depths("stepwise", 6, 3) == (0, 2, 5)
    assert kept_depths("stepwise", 18, 9) == (0, 2, 4, 6, 8, 11, 13, 15, 17)
    assert kept_depths("stepwise", 18, 6) == (0, 3, 7, 10, 14, 17)
    assert kept_depths("stepwise", 22, 11) == (0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21)
    assert kept_depths("stepwise", 16, 8) == (0, 2, 4, 6, 9, 11, 13, 15)
    assert kept_depths("stepwise", 4, 1) == (0,)
    assert kept_depths("stepwise", 5, 5) == (0, 1, 2, 3, 4)


def test_fixed_start_keeps_every_bth_layer_and_lower_the_first_ones():
    assert kept_depths("stepwise-fixed-start", 6, 3) == (0, 2, 4)
    assert kept_depths("stepwise-fixed-start", 18, 6) == (0, 3, 6, 9, 12, 15)
    assert kept_depths("lower", 6, 3) == (0, 1, 2)


@pytest.mark.parametrize("init", ["stepwise", "stepwise-fixed-start", "lower"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_copying_inits_take_whole_layers_norms_and_biases_included(bases, family, init, tmp_path):
    base, new, _ = fold(bases[family], tmp_path / "out", init=init, norm_init="average")
    kept = kept_depths(init, 6, 3)
    assert len(block_names(new)) == sum(name.startswith("stack.") for name in base) / 2
    for layer, name in block_names(new):
        assert torch.equal(new[f"stack.layers.{layer}.{name}"], base[f"stack.layers.{kept[layer]}.{name}"]), name


@pytest.mark.parametrize("num_loops", [2, 3])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_average_is_the_mean_over_the_loops_of_the_cycle(bases, family, num_loops, tmp_path):
    base, new, _ = fold(bases[family], tmp_path / "out", num_loops=num_loops, init="average", norm_init="average")
    layers = 6 // num_loops
    for layer, name in block_names(new):
        looped = [base[f"stack.layers.{loop * layers + layer}.{name}"].double() for loop in range(num_loops)]
        expected = torch.stack(looped).mean(0).float()
        torch.testing.assert_close(new[f"stack.layers.{layer}.{name}"], expected, rtol=1e-6, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("lora_init", ["svd", "joint"])
@pytest.mark.parametrize(
    ("sharing", "depths"), [("sequence", ((0, 1), (2, 3), (4, 5))), ("cycle-rev", ((0, 5), (1, 4), (2, 3)))]
)
def test_layers_that_share_are_averaged_and_full_rank_restores_each(bases, sharing, depths, lora_init, tmp_path):
    base, new, _ = fold(bases["llama"], tmp_path / "tied", sharing=sharing, init="average", norm_init="average")
    for layer, name in block_names(new):
        shared = [base[f"stack.layers.{depth}.{name}"].double() for depth in depths[layer]]
        expected = torch.stack(shared).mean(0).float()
        torch.testing.assert_close(new[f"stack.layers.{layer}.{name}"], expected, rtol=1e-6, atol=1e-7)
    fold(bases["llama"], tmp_path / "full", rank=999, sharing=sharing, init="average", lora_init=lora_init)
    original, full = load_model(bases["llama"]), load_model(tmp_path / "full")
    input_ids = torch.arange(40)[None]
    expected = original(input_ids)
    assert (full(input_ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_average_takes_norms_from_the_first_loop_or_zero_if_asked(bases, tmp_path):
    base, choice, _ = fold(bases["gpt_neox"], tmp_path / "choice", init="average", norm_init="choice")
    _, zero, _ = fold(bases["gpt_neox"], tmp_path / "zero", init="average", norm_init="zero")
    _, mean, _ = fold(bases["gpt_neox"], tmp_path / "mean", init="average", norm_init="average")
    for name in mean:
        if name.startswith("stack.") and "norm" in name:
            assert torch.equal(choice[name], base[name])
            assert not torch.equal(mean[name], base[name])
            assert zero[name].count_nonzero() == 0
        else:
            assert torch.equal(choice[name], mean[name]) and torch.equal(zero[name], mean[name])


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_random_draws_weights_and_resets_norms_and_biases(bases, family, tmp_path):
    _, new, _ = fold(bases[family], tmp_path / "out", init="random")
    identity = 0.0 if family == "gemma" else 1.0
    drawn = []
    for layer, name in block_names(new):
        tensor = new[f"stack.layers.{layer}.{name}"]
        if "bias" in name:
            assert tensor.count_nonzero() == 0
        elif "norm" in name:
            assert torch.equal(tensor, torch.full_like(tensor, identity))
        else:
            drawn.append(tensor.flatten())
    assert len({tensor[0].item() for tensor in drawn}) == len(drawn)
    assert torch.cat(drawn).std().item() == pytest.approx(0.02, rel=0.02)
    assert abs(torch.cat(drawn).mean().item()) < 0.001


@pytest.mark.parametrize("init", ["stepwise", "average", "random"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_embedding_final_norm_and_head_come_unchanged(bases, family, init, tmp_path):
    base, new, _ = fold(bases[family], tmp_path / "out", init=init)
    outside = [name for name in new if not name.startswith("stack.")]
    assert (
        "embed" in outside
        and "norm.weight" in outside
        and ("head" in outside) == (family not in ("gemma", "qwen2", "qwen3"))
    )
    for name in outside:
        assert torch.equal(new[name], base[name])


@torch.no_grad()
@pytest.mark.parametrize("init", ["stepwise", "average", "lower"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_full_rank_with_untied_norms_reproduces_the_base(bases, family, init, tmp_path):
    fold(bases[family], tmp_path / "full", rank=999, init=init, untie_norms=True)
    fold(bases[family], tmp_path / "tied", rank=999, init=init, norm_init="average")
    base, full, tied = (load_model(d) for d in (bases[family], tmp_path / "full", tmp_path / "tied"))
    input_ids = torch.randint(0, 151, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = base(input_ids)
    assert (full(input_ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (tied(input_ids) - expected).abs().max() > 1e-3 * expected.abs().max()


def test_untied_norms_and_biases_are_the_bases_own_at_each_depth(bases, tmp_path):
    base, new, _ = fold(bases["gpt_neox"], tmp_path / "out", num_loops=3, init="average", untie_norms=True)
    names = [(layer, name) for layer, name in block_names(new) if "norm" in name or "bias" in name]
    assert len(names) == 2 * 10
    for layer, name in names:
        for loop in range(3):
            assert torch.equal(
                new[f"stack.layers.{layer}.{name}"][loop], base[f"stack.layers.{2 * loop + layer}.{name}"]
            )


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_one_loop_is_the_vanilla_base(bases, family, tmp_path):
    for init in ("stepwise", "average", "lower", "stepwise-fixed-start"):
        base, new, _ = fold(bases[family], tmp_path / init, num_loops=1, init=init)
        assert base.keys() == new.keys()
        assert all(torch.equal(new[name], base[name]) for name in base)
    again, vanilla, _ = fold(tmp_path / "average", tmp_path / "again", num_loops=2, init="average")
    assert again.keys() == base.keys() and len(vanilla) < len(base)


def test_prefix_vectors_are_drawn_for_every_depth_and_by_the_seed(bases, tmp_path):
    _, new, _ = fold(bases["llama"], tmp_path / "a", init="average", prefix_length=4)
    plain = tensors(tmp_path / "plain") if fold(bases["llama"], tmp_path / "plain", init="average") else {}
    prefix = new.pop("stack.prefix")
    assert prefix.shape[:2] == (open_source(bases["llama"]).model.num_layers, 4)
    assert prefix.std() == pytest.approx(0.02, rel=0.2)
    assert new.keys() == plain.keys() and all(torch.equal(new[name], plain[name]) for name in plain)
    _, other, _ = fold(bases["llama"], tmp_path / "b", init="average", prefix_length=4, seed=1)
    assert not torch.equal(other["stack.prefix"], prefix)
    model = load_model(tmp_path / "a")
    assert model(torch.arange(5)[None]).isfinite().all()
