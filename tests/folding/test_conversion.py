"""Folding a base into a recursive or relaxed checkpoint: the rules of every init, the SVD, the command."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from rrt import inspect
from rrt.checkpoint.source import load_model, open_source
from rrt.convert import main, recursive_flags
from rrt.data.tokenizer import load_tokenizer
from rrt.errors import UserError
from rrt.folding.conversion import convert
from rrt.folding.fold import kept_depths
from rrt.folding.svd import truncated_svd
from rrt.folding.unroll import export
from rrt.inspect import main as inspect_main
from rrt.model.config import LORA_GROUP_OF_LINEAR, LoraRanks, RecursiveConfig
from rrt.model.meta import parameter_shapes
from tests.util.commands import run_main
from tests.util.files import files_of_at_most
from tests.util.models import ALL_FAMILIES, make_hf_model
from tests.util.tokenizers import make_sentencepiece_tokenizer

LINEARS = ("attn.q", "attn.k", "attn.v", "attn.out", "mlp.gate", "mlp.up", "mlp.down")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A six-layer fp32 base of each family."""
    root = tmp_path_factory.mktemp("bases")
    return {family: make_hf_model(root / family, family) for family in ALL_FAMILIES}


def fold(base, out, *, num_loops=2, rank=0, **options):
    """Convert, and return ({our name: tensor} of the base, the same of the new checkpoint, the report)."""
    arguments = {name: options.pop(name) for name in ("dtype", "seed", "overwrite") if name in options}
    ranks = rank if isinstance(rank, LoraRanks) else LoraRanks.uniform(rank)
    recursion = RecursiveConfig(num_loops=num_loops, lora_rank=ranks, **options)
    report = convert(base, out, recursion, **arguments)
    return tensors(base), tensors(out), report


def tensors(directory):
    source = open_source(directory)
    return {name: source.get(name) for name in parameter_shapes(source.model, source.recursion)}


def block_names(new):
    """(layer, name inside the layer) of every tied parameter of the block."""
    names = [name.removeprefix("stack.layers.").split(".", 1) for name in new if name.startswith("stack.")]
    return [(int(layer), name) for layer, name in names if "lora" not in name]


def linears(new):
    return [name.removesuffix(".weight") for name in new if name.endswith(".weight") and name.count(".") == 5]


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


def spectra():
    generator = torch.Generator().manual_seed(0)

    def matrix(outputs, inputs, singular_values):
        left = torch.linalg.qr(torch.randn(outputs, len(singular_values), generator=generator).double()).Q
        right = torch.linalg.qr(torch.randn(inputs, len(singular_values), generator=generator).double()).Q
        return left @ torch.diag(singular_values.double()) @ right.T

    return {
        "wide": torch.randn(24, 90, generator=generator).double(),
        "tall": torch.randn(90, 24, generator=generator).double(),
        "square": torch.randn(40, 40, generator=generator).double(),
        "wide-decaying": matrix(30, 80, torch.logspace(0, -5, 30)),
        "tall-decaying": matrix(80, 30, torch.logspace(0, -5, 30)),
        "equal": matrix(30, 60, torch.ones(30)),
        "tiny": 1e-9 * torch.randn(20, 30, generator=generator).double(),
    }


@pytest.mark.parametrize("name", spectra())
def test_svd_is_optimal_at_every_rank_with_orthonormal_rows(name):
    residual = spectra()[name]
    singular_values = torch.linalg.svdvals(residual)
    energy = residual.square().sum()
    for rank in (1, 3, min(residual.shape) // 2, min(residual.shape) - 1, min(residual.shape)):
        lora_a, lora_b = truncated_svd(residual, rank, torch.Generator())
        assert lora_a.shape == (rank, residual.shape[1]) and lora_b.shape == (residual.shape[0], rank)
        optimum = singular_values[rank:].square().sum()
        assert (residual - lora_b @ lora_a).square().sum() <= (1 + 1e-4) * optimum + 1e-14 * energy
        # B = U S and A = V^T: the singular values are B's column norms, and A's rows are orthonormal.
        torch.testing.assert_close(lora_b.norm(dim=0), singular_values[:rank], rtol=1e-4, atol=1e-13)
        torch.testing.assert_close(lora_a @ lora_a.T, torch.eye(rank).double(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
def test_svd_beyond_the_residuals_rank_gives_zero_columns_and_random_unit_rows(shape):
    generator = torch.Generator().manual_seed(1)
    residual = torch.zeros(shape, dtype=torch.float64)
    residual[:4] = torch.randn(4, shape[1], generator=generator).double()
    factors = [truncated_svd(residual, 9, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)]
    for lora_a, lora_b in factors:
        torch.testing.assert_close(lora_b @ lora_a, residual)
        assert lora_b[:, 4:].count_nonzero() == 0
        torch.testing.assert_close(lora_a.norm(dim=1), torch.ones(9).double())
    assert torch.equal(factors[0][0], factors[1][0])
    assert not torch.isclose(factors[0][0][4:], factors[2][0][4:]).any()
    all_zero_a, all_zero_b = truncated_svd(torch.zeros(shape).double(), 3, torch.Generator())
    assert all_zero_b.count_nonzero() == 0
    torch.testing.assert_close(all_zero_a.norm(dim=1), torch.ones(3).double())


@pytest.mark.parametrize("init", ["average", "stepwise", "random"])
@pytest.mark.parametrize(("family", "dtype"), [("gemma", torch.bfloat16), ("gpt_neox", torch.float32)])
def test_lora_is_the_best_correction_of_the_weight_as_stored(family, dtype, init, tmp_path):
    base_dir = make_hf_model(tmp_path / "base", family, dtype=dtype)
    ranks = LoraRanks(q=5, kv=3, out=4, ffn=7)
    base, new, _ = fold(base_dir, tmp_path / "out", rank=ranks, init=init, norm_init="average")
    kept = kept_depths(init, 6, 3) if init == "stepwise" else (-1, -1, -1)
    # Rounding the factors to the stored dtype is the one loss beyond the SVD's.
    rounding = 2 * torch.finfo(dtype).eps ** 2
    for name in linears(new):
        layer, linear = name.removeprefix("stack.layers.").split(".", 1)
        for loop in range(2):
            depth = 3 * loop + int(layer)
            weight, lora_a, lora_b = (new[f"{name}.{leaf}"].double() for leaf in ("weight", "lora_a", "lora_b"))
            residual = base[f"stack.layers.{depth}.{linear}.weight"].double() - weight
            if depth == kept[int(layer)]:
                assert residual.count_nonzero() == 0
                continue
            tail = torch.linalg.svdvals(residual)[lora_a.shape[1] :].square().sum()
            found = (residual - lora_b[loop] @ lora_a[loop]).square().sum()
            assert found <= (1 + 1e-4) * tail + rounding * residual.square().sum(), name


# ---- the shared weight and LoRAs together


@torch.no_grad()
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_joint_at_rank_r_unrolls_to_what_average_and_svd_do_at_2r(bases, family, tmp_path):
    _, joint, _ = fold(bases[family], tmp_path / "joint", rank=4, init="average", lora_init="joint")
    _, svd, _ = fold(bases[family], tmp_path / "svd", rank=8, init="average", lora_init="svd")
    for name in (name.removesuffix(".lora_a") for name in joint if name.endswith("lora_a")):
        for loop in range(2):
            found, expected = (
                new[f"{name}.weight"] + new[f"{name}.lora_b"][loop] @ new[f"{name}.lora_a"][loop]
                for new in (joint, svd)
            )
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            assert joint[f"{name}.lora_a"].shape[1] == 4
    for name in (name for name in joint if not name.startswith("stack.") or "norm" in name or "bias" in name):
        assert torch.equal(joint[name], svd[name])
    input_ids = torch.arange(40)[None]
    expected = load_model(tmp_path / "svd")(input_ids)
    assert (load_model(tmp_path / "joint")(input_ids) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_joint_loses_less_than_average_and_svd_also_over_three_loops_but_no_less_than_the_bound(bases, tmp_path):
    loss = {}
    for init in ("svd", "joint"):
        _, _, report = fold(bases["llama"], tmp_path / init, num_loops=3, rank=4, init="average", lora_init=init)
        loss[init] = [
            sum(share * norm for share, norm in zip(matrix.final_loss, matrix.norms, strict=True)) / sum(matrix.norms)
            for matrix in report.matrices
        ]
    assert all(joint < svd for joint, svd in zip(loss["joint"], loss["svd"], strict=True))
    assert all(0 < matrix.least_loss <= joint for matrix, joint in zip(report.matrices, loss["joint"], strict=True))


@torch.no_grad()
@pytest.mark.parametrize("num_loops", [2, 3])
def test_joint_at_full_rank_reproduces_the_base(bases, num_loops, tmp_path):
    fold(bases["llama"], tmp_path / "full", num_loops=num_loops, rank=999, init="average", lora_init="joint")
    base, full = load_model(bases["llama"]), load_model(tmp_path / "full")
    input_ids = torch.arange(40)[None]
    expected = base(input_ids)
    assert (full(input_ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_joint_leaves_groups_without_rank_their_mean(bases, tmp_path):
    _, joint, _ = fold(bases["llama"], tmp_path / "joint", rank=LoraRanks(q=4), init="average", lora_init="joint")
    _, plain, _ = fold(bases["llama"], tmp_path / "plain", init="average")
    for name in linears(plain):
        assert torch.equal(joint[f"{name}.weight"], plain[f"{name}.weight"]) == (not name.endswith("attn.q"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--num-loops", 2, "--lora-rank", 2], "joint"),
        (["--num-loops", 2, "--lora-rank", 2, "--init", "average"], "joint"),
        (["--num-loops", 2, "--lora-rank", 2, "--init", "stepwise"], "svd"),
        (["--num-loops", 2, "--lora-rank", 2, "--lora-init", "svd"], "svd"),
        (["--num-loops", 3, "--lora-rank", 2], "svd"),
        (["--num-loops", 3, "--lora-rank", 2, "--lora-init", "joint"], "joint"),
        (["--num-loops", 2, "--prefix-length", 2], "svd"),
        (["--num-loops", 1, "--lora-rank", 2], "svd"),
    ],
)
def test_default_lora_init_is_joint_where_it_has_a_closed_form(flags, expected):
    assert recursive_flags([str(flag) for flag in flags]).lora_init == expected


# ---- low rank alone, a baseline that shares nothing


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma", "llama", "gpt_neox"])
def test_low_rank_only_factorises_every_depths_folded_weight(family, tmp_path):
    base_dir = make_hf_model(tmp_path / "base", family, intermediate_size=160)
    options = dict(rank=2, lora_init="low-rank-only")
    base, new, report = fold(base_dir, tmp_path / "out", **options)
    source = open_source(tmp_path / "out")
    ranks = source.recursion.lora_rank
    assert (source.recursion.num_loops, source.recursion.low_rank_only, source.model.num_layers) == (1, True, 6)
    if family != "gpt_neox":  # folds a shift too, into biases
        for depth in range(6):
            gain = gains(base, depth, "mlp_norm", family)
            weight = base[f"stack.layers.{depth}.mlp.up.weight"].double() * gain
            name = f"stack.layers.{depth}.mlp.up"
            assert f"{name}.weight" not in new and new[f"{name}.lora_a"].shape[:2] == (1, ranks.ffn)
            error = weight - new[f"{name}.lora_b"][0].double() @ new[f"{name}.lora_a"][0].double()
            tail = torch.linalg.svdvals(weight)[ranks.ffn :].square().sum()
            assert error.square().sum().item() == pytest.approx(tail.item(), rel=1e-4)
            losses = [matrix.final_loss[0] for matrix in report.matrices if matrix.name == name]
            assert losses == pytest.approx([(tail / weight.square().sum()).item()], rel=1e-4)
    # The embedding and the final norm are the base's, the model runs, and its export computes the same.
    assert torch.equal(new["embed"], base["embed"]) and torch.equal(new["norm.weight"], base["norm.weight"])
    export(tmp_path / "out", tmp_path / "hf")
    input_ids = torch.arange(40)[None]
    expected = load_model(tmp_path / "out")(input_ids)
    assert (load_model(tmp_path / "hf")(input_ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("num_loops", [2, 3])
@pytest.mark.parametrize("rank", [0, 1, 3])
def test_low_rank_only_has_the_parameters_of_the_folding(bases, num_loops, rank, tmp_path):
    _, _, folded = fold(bases["llama"], tmp_path / "folded", num_loops=num_loops, rank=rank, init="average")
    _, new, report = fold(
        bases["llama"], tmp_path / "low", num_loops=num_loops, rank=rank, init="average", lora_init="low-rank-only"
    )
    found, wanted = report.after.total_params, folded.after.total_params
    assert found == sum(tensor.numel() for tensor in new.values())
    # No group takes one more unit of rank: q and out cost 64 a layer, k and v 96, the feed-forward 336.
    assert wanted - 6 * 64 < found <= wanted
    assert any(f"has {found:,} parameters; {num_loops} loops" in notice for notice in report.notices)


def test_linears_that_a_product_would_not_make_smaller_keep_their_weights(bases, tmp_path):
    base, new, report = fold(bases["llama"], tmp_path / "out", rank=8, init="average", lora_init="low-rank-only")
    ranks = report.after.recursion.lora_rank
    assert ranks.kv == 0 < ranks.ffn  # 11 (32 + 16) > 32 x 16
    gain = base["stack.layers.4.attn_norm.weight"].double()
    expected = (base["stack.layers.4.attn.k.weight"].double() * gain).float()
    assert torch.equal(new["stack.layers.4.attn.k.weight"], expected)


def test_low_rank_only_that_makes_no_sense_is_refused(bases, tmp_path):
    for options, message in (
        (dict(num_loops=1, rank=2), "field 'num_loops': found 1; expected at least 2 with lora_init 'low-rank-only'"),
        (dict(prefix_length=2), "field 'prefix_length': found 2; expected 0 with lora_init"),
        (dict(rank=999), "field 'lora_init': found 'low-rank-only' in place of 2 loops .* which save no parameters"),
    ):
        with pytest.raises(UserError, match=message):
            fold(bases["llama"], tmp_path / "out", lora_init="low-rank-only", **options)
    with pytest.raises(UserError, match="field 'low_rank_only': found true"):
        fold(bases["llama"], tmp_path / "out", num_loops=1, low_rank_only=True, rank=3)
    with pytest.raises(UserError, match="field 'num_loops': found 2; expected 1 with low_rank_only"):
        RecursiveConfig(num_loops=2, low_rank_only=True)


def test_command_reports_what_low_rank_loses(bases, tmp_path, capsys, monkeypatch):
    argv = ["--base", bases["llama"], "--out", tmp_path / "out", "--num-loops", 2, "--lora-init", "low-rank-only"]
    code, stdout, _ = run_main(main, argv, capsys, monkeypatch)
    assert code == 0 and "nothing shared; norms folded" in stdout and "6 layers" in stdout
    assert "lost by low rank" in stdout and "of all ||W||^2 low rank loses " in stdout and "->" not in stdout


def test_a_conversion_that_saves_nothing_says_so(bases, tmp_path):
    _, _, report = fold(bases["llama"], tmp_path / "out", rank=16, init="average")
    assert any("saves no parameters" in notice for notice in report.notices)
    _, _, report = fold(bases["llama"], tmp_path / "small", rank=2, init="average")
    assert not any("saves no parameters" in notice for notice in report.notices)


def test_rank_per_group_goes_to_the_linears_of_the_group(bases, tmp_path):
    _, new, _ = fold(bases["llama"], tmp_path / "out", rank=LoraRanks(q=5, kv=3, out=0, ffn=7), init="average")
    expected = {"attn.q": 5, "attn.k": 3, "attn.v": 3, "mlp.gate": 7, "mlp.up": 7, "mlp.down": 7}
    for linear in LINEARS:
        found = new.get(f"stack.layers.1.{linear}.lora_a")
        assert (None if found is None else found.shape[1]) == expected.get(linear)


def test_where_a_layer_was_kept_a_is_gaussian_and_b_zero_matrix_by_matrix(bases, tmp_path):
    _, new, report = fold(bases["llama"], tmp_path / "out", rank=6, init="stepwise")
    kept = kept_depths("stepwise", 6, 3)
    drawn = []
    for name in linears(new):
        layer = int(name.split(".")[2])
        for loop in range(2):
            lora_a, lora_b = new[f"{name}.lora_a"][loop], new[f"{name}.lora_b"][loop]
            if 3 * loop + layer == kept[layer]:
                assert lora_b.count_nonzero() == 0
                drawn.append(lora_a * lora_a.shape[1] ** 0.5)
            else:
                assert lora_b.count_nonzero() == lora_b.numel()
                torch.testing.assert_close(lora_a @ lora_a.T, torch.eye(6), rtol=0, atol=1e-5)
    # Layers 0, 2 and 5 are kept as shared layers 0, 1 and 2, which depths 0 and 3, 1 and 4, 2 and 5 use.
    assert len(drawn) == 2 * 7
    assert torch.cat([a.flatten() for a in drawn]).std().item() == pytest.approx(1.0, rel=0.05)
    first = report.matrices[0]
    assert first.tying_loss[0] == first.final_loss[0] == 0
    assert first.tying_loss[1] > first.final_loss[1] > 0


def test_one_equal_matrix_among_different_ones_is_recognised(bases, tmp_path):
    """Equality is decided per matrix, not per layer."""
    base_dir = tmp_path / "base"
    base_dir.mkdir()
    weights = load_file(bases["llama"] / "model.safetensors")
    weights["model.layers.3.mlp.up_proj.weight"] = weights["model.layers.0.mlp.up_proj.weight"].clone()
    save_file(weights, base_dir / "model.safetensors")
    (base_dir / "config.json").write_text((bases["llama"] / "config.json").read_text())
    _, new, _ = fold(base_dir, tmp_path / "out", rank=4, init="average", norm_init="average")
    assert new["stack.layers.0.mlp.up.lora_b"].count_nonzero() == 0
    assert new["stack.layers.0.mlp.gate.lora_b"].count_nonzero() > 0


@torch.no_grad()
def test_zero_init_starts_as_the_plain_recursive_model(bases, tmp_path):
    _, new, report = fold(bases["llama"], tmp_path / "zero", rank=6, init="average", lora_init="zero")
    fold(bases["llama"], tmp_path / "plain", init="average")
    for name in linears(new):
        assert new[f"{name}.lora_b"].count_nonzero() == 0
        assert new[f"{name}.lora_a"].count_nonzero() == new[f"{name}.lora_a"].numel()
    assert all(matrix.final_loss == matrix.tying_loss for matrix in report.matrices)
    input_ids = torch.arange(20)[None]
    assert torch.equal(load_model(tmp_path / "zero")(input_ids), load_model(tmp_path / "plain")(input_ids))


def test_same_seed_same_bytes_another_seed_other_draws(bases, tmp_path):
    options = dict(rank=4, init="stepwise")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fold(bases["llama"], tmp_path / name, seed=seed, **options)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_a_matrix_draws_the_same_whatever_the_others_draw(bases, tmp_path):
    _, some, _ = fold(bases["llama"], tmp_path / "some", rank=LoraRanks(ffn=4), init="average", lora_init="zero")
    _, all_groups, _ = fold(bases["llama"], tmp_path / "all", rank=4, init="average", lora_init="zero")
    assert torch.equal(some["stack.layers.2.mlp.up.lora_a"], all_groups["stack.layers.2.mlp.up.lora_a"])
    _, two, _ = fold(bases["llama"], tmp_path / "two", num_loops=2, init="random")
    _, three, _ = fold(bases["llama"], tmp_path / "three", num_loops=3, init="random")
    assert torch.equal(two["stack.layers.1.attn.k.weight"], three["stack.layers.1.attn.k.weight"])


def test_ranks_beyond_the_smaller_side_are_capped_with_a_notice_per_group(bases, tmp_path):
    _, new, report = fold(bases["llama"], tmp_path / "out", rank=20, init="average")
    caps = [notice for notice in report.notices if "capped" in notice]
    assert caps == ["LoRA rank of group kv: 20 is capped at 16, the smaller side of attn.k, attn.v"]
    assert new["stack.layers.0.attn.k.lora_a"].shape == (2, 16, 32)
    assert new["stack.layers.0.attn.q.lora_a"].shape == (2, 20, 32)


@pytest.mark.parametrize("lora_init", ["svd", "joint"])
def test_report_in_provenance_is_what_the_tensors_say(bases, lora_init, tmp_path):
    options = dict(rank=5, init="average", norm_init="average", lora_init=lora_init)
    base, new, report = fold(bases["gemma"], tmp_path / "out", **options)
    provenance = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert provenance["stage"] == "convert" and provenance["parent"]["path"] == str(bases["gemma"])
    assert [matrix["name"] for matrix in provenance["matrices"]] == linears(new)
    for matrix in provenance["matrices"]:
        linear = matrix["name"].removeprefix("stack.layers.")
        layer, linear = linear.split(".", 1)
        for loop in range(2):
            weight = base[f"stack.layers.{3 * loop + int(layer)}.{linear}.weight"]
            residual = weight - new[f"{matrix['name']}.weight"]
            lora = new[f"{matrix['name']}.lora_b"][loop] @ new[f"{matrix['name']}.lora_a"][loop]
            energy = weight.square().sum()
            assert matrix["norms"][loop] == pytest.approx(energy.item(), rel=1e-5)
            lost, left = residual.square().sum() / energy, (residual - lora).square().sum() / energy
            assert matrix["tying_loss"][loop] == pytest.approx(lost.item(), rel=1e-4)
            assert matrix["final_loss"][loop] == pytest.approx(left.item(), rel=1e-3)
        loss = [sum(x * n for x, n in zip(matrix["final_loss"], matrix["norms"], strict=True)) / sum(matrix["norms"])]
        assert [matrix["least_loss"]] == ([None] if lora_init == "svd" else pytest.approx(loss, rel=1e-6))
    assert report.before.total_params == sum(tensor.numel() for tensor in base.values())
    assert report.after.total_params == sum(tensor.numel() for tensor in new.values())
    assert report.after.bytes == sum(tensor.nbytes for tensor in new.values())


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_one_loop_is_the_vanilla_base(bases, family, tmp_path):
    for init in ("stepwise", "average", "lower", "stepwise-fixed-start"):
        base, new, _ = fold(bases[family], tmp_path / init, num_loops=1, init=init)
        assert base.keys() == new.keys()
        assert all(torch.equal(new[name], base[name]) for name in base)
    again, vanilla, _ = fold(tmp_path / "average", tmp_path / "again", num_loops=2, init="average")
    assert again.keys() == base.keys() and len(vanilla) < len(base)


def test_dtype_is_the_bases_unless_asked_and_values_that_do_not_fit_are_refused(tmp_path):
    base_dir = make_hf_model(tmp_path / "base", "llama", dtype=torch.bfloat16)
    _, new, _ = fold(base_dir, tmp_path / "auto", rank=3, init="average")
    assert {tensor.dtype for tensor in new.values()} == {torch.bfloat16}
    base, new, _ = fold(base_dir, tmp_path / "fp32", init="average", dtype=torch.float32)
    assert {tensor.dtype for tensor in new.values()} == {torch.float32}
    assert torch.equal(new["embed"], base["embed"].float())

    weights = load_file(base_dir / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(weights, base_dir / "model.safetensors")
    with pytest.raises(UserError, match=r"layers.1.mlp.up.weight.*5e\+05; expected at most 6.55e\+04 for float16"):
        fold(base_dir, tmp_path / "fp16", init="average", norm_init="average", dtype=torch.float16)
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(weights, base_dir / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor 'model.layers.1.mlp.up_proj.weight': found NaN or infinity"):
        fold(base_dir, tmp_path / "nan", init="average")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["auto", "base", "fp32"]


def test_a_full_disk_is_one_line_with_what_is_needed_and_leaves_nothing(tmp_path):
    base = make_hf_model(tmp_path / "base", "llama", num_layers=2)
    for write in (lambda: convert(base, tmp_path / "out", RecursiveConfig()), lambda: export(base, tmp_path / "out")):
        with pytest.raises(UserError) as caught, files_of_at_most(10_000):
            write()
        assert str(caught.value).startswith(f"{tmp_path / 'out'}: larger than files may be ")
        assert "KiB needed, " in str(caught.value) and "\n" not in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_narrowing_to_bf16_leaves_no_residual_where_a_layer_was_kept(bases, tmp_path):
    _, new, _ = fold(bases["llama"], tmp_path / "out", rank=4, init="lower", dtype=torch.bfloat16)
    assert new["stack.layers.1.attn.q.lora_b"][0].count_nonzero() == 0
    assert new["stack.layers.1.attn.q.lora_b"][1].count_nonzero() > 0


@pytest.mark.parametrize("layout", ["sharded", "pickled"])
def test_base_layout_does_not_matter(bases, layout, tmp_path):
    if layout == "sharded":
        other = make_hf_model(tmp_path / "base", "gpt_neox", max_shard_size="100KB")
        assert len(list(other.glob("*.safetensors"))) > 1
    else:
        other = tmp_path / "base"
        other.mkdir()
        torch.save(load_file(bases["gpt_neox"] / "model.safetensors"), other / "pytorch_model.bin")
        (other / "config.json").write_text((bases["gpt_neox"] / "config.json").read_text())
    fold(bases["gpt_neox"], tmp_path / "single-out", rank=4, init="average")
    fold(other, tmp_path / "other-out", rank=4, init="average")
    single, found = (tmp_path / f"{name}-out" / "model.safetensors" for name in ("single", "other"))
    assert single.read_bytes() == found.read_bytes()


def test_tokenizer_comes_along_and_its_absence_is_noticed(bases, tmp_path):
    _, _, report = fold(bases["llama"], tmp_path / "without")
    assert any("has no tokenizer" in notice for notice in report.notices)
    base = make_hf_model(tmp_path / "base", "llama", vocab_size=448)
    make_sentencepiece_tokenizer(base)
    _, _, report = fold(base, tmp_path / "with")
    assert not report.notices
    found, expected = load_tokenizer(tmp_path / "with"), load_tokenizer(base)
    assert found.sha256 == expected.sha256
    assert found.encode("x = 1\n") == expected.encode("x = 1\n")


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


def test_api_refuses_what_conversion_does_not_make(bases, tmp_path):
    for field, options in {
        "head_lora_rank": dict(head_lora_rank=4),
        "exit_translators": dict(exit_translators=True, num_loops=2),
        "exit_loops": dict(exit_loops=(0,)),
        "lora_init": dict(lora_init="joint", init="average"),
        "init": dict(lora_init="joint", init="stepwise", rank=4),
    }.items():
        with pytest.raises(UserError, match=f"field '{field}'"):
            fold(bases["llama"], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_command_says_what_it_does_and_what_it_did(bases, tmp_path, capsys, monkeypatch):
    out = tmp_path / "deep" / "out"
    argv = ["--base", bases["llama"], "--out", out, "--num-loops", 2, "--lora-rank", 20, "--lora-rank-ffn", 8]
    code, stdout, stderr = run_main(main, argv, capsys, monkeypatch)
    assert (code, stderr) == (0, "")
    assert "6 layers, 74.59 K parameters (64.93 K non-embedding), 291.38 KiB float32" in stdout
    assert (
        "2 loops x 3 layers" in stdout and "LoRA rank q 20, kv 16, out 20, ffn 8 (joint); norms folded into" in stdout
    )
    assert "notice: LoRA rank of group kv: 20 is capped at 16" in stdout
    assert "layer" in stdout and "all" in stdout and f"wrote {out}" in stdout
    assert open_source(out).recursion == RecursiveConfig(
        num_loops=2, init="average", lora_rank=LoraRanks(q=20, kv=16, out=20, ffn=8), lora_init="joint"
    )


def test_command_takes_the_sharing(bases, tmp_path, capsys, monkeypatch):
    argv = ["--base", bases["llama"], "--out", tmp_path / "out", "--num-loops", 2, "--sharing", "sequence"]
    code, stdout, _ = run_main(main, argv, capsys, monkeypatch)
    assert code == 0 and "2 loops x 3 layers (sequence), " in stdout
    assert open_source(tmp_path / "out").recursion.sharing == "sequence"
    code, stdout, _ = run_main(inspect.main, ["--checkpoint", tmp_path / "out"], capsys, monkeypatch)
    assert code == 0 and "6 = 2 loops x 3 layers (sequence)" in stdout
    with pytest.raises(UserError, match=r"num_loops: found 1; .*out has 2 with sharing 'sequence', which has no state"):
        load_model(tmp_path / "out", num_loops=1)


def test_default_init_is_stepwise_without_lora_and_average_with(bases, tmp_path, capsys, monkeypatch):
    for rank, init in ((0, "stepwise"), (2, "average")):
        argv = ["--base", bases["llama"], "--out", tmp_path / init, "--num-loops", 3, "--lora-rank", rank]
        assert run_main(main, argv, capsys, monkeypatch)[0] == 0
        assert open_source(tmp_path / init).recursion.init == init


def test_bad_input_ends_with_one_line_and_leaves_nothing(bases, tmp_path, capsys, monkeypatch):
    fold(bases["llama"], tmp_path / "recursive", rank=2, init="average")
    (tmp_path / "file").write_text("")
    base = make_hf_model(tmp_path / "base", "llama")
    (tmp_path / "broken").mkdir()
    before = sorted(tmp_path.rglob("*"))
    cases = {
        "'num_loops': found 4, which does not divide the base's 6 layers; expected one of 1, 2": [
            "--num-loops",
            4,
        ],
        "'num_loops': found 0; expected a positive number": ["--num-loops", 0],
        "'lora_rank.q': found -1; expected 0 (no LoRA) or more": ["--lora-rank", -1],
        "'lora_rank.ffn': found -7": ["--lora-rank-ffn", -7],
        "'init': found 'stepwise'; expected 'average'": ["--init=stepwise", "--lora-rank=2", "--lora-init=joint"],
        "'lora_init': found 'joint' without LoRA": ["--lora-init=joint"],
        "found a recursive or relaxed model (num_loops 2, LoRA rank 2); expected a vanilla base": [
            "--base",
            tmp_path / "recursive",
        ],
        "no such directory": ["--base", tmp_path / "absent"],
        "config.json: no such file": ["--base", tmp_path / "broken"],
        "already exists and is not empty": ["--out", tmp_path / "recursive"],
        "file: is a file": ["--out", tmp_path / "file"],
        "holds the checkpoint that is read": ["--out", base, "--overwrite"],
        "--no-refit: found without --calibration": ["--lora-rank", 2, "--no-refit"],
        "--calibration-tokens: found without --calibration": ["--lora-rank", 2, "--calibration-tokens", 64],
        "--calibration-memory: found nan; expected 0 or more, in GiB": [
            *("--lora-rank", 2, "--calibration", base, "--calibration-memory", "nan")
        ],
        "--calibration-memory: found -1.0": ["--calibration", base, "--calibration-memory", -1],
        "--calibration-memory: found inf": ["--calibration", base, "--calibration-memory", "inf"],
    }
    for message, flags in cases.items():
        argv = ["--base", base, "--out", tmp_path / "out", "--num-loops", 2, *flags]
        code, _, stderr = run_main(main, argv, capsys, monkeypatch)
        assert code == 2 and message in stderr and stderr.count("\n") == 1, stderr
    code, _, stderr = run_main(main, ["--base", base, "--out", tmp_path, "--num-loops", 2], capsys, monkeypatch)
    assert code == 2 and "holds the checkpoint that is read" in stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_overwrite_replaces_the_whole_directory(bases, tmp_path):
    fold(bases["llama"], tmp_path / "out", rank=2, init="average")
    (tmp_path / "out" / "stale").write_text("")
    fold(bases["gemma"], tmp_path / "out", overwrite=True)
    assert open_source(tmp_path / "out").model.family == "gemma"
    assert not (tmp_path / "out" / "stale").exists()


def test_an_interrupted_command_leaves_nothing_behind(tmp_path):
    base = make_hf_model(tmp_path / "base", "llama", num_layers=8, hidden_size=512, intermediate_size=1024)
    command = [sys.executable, "-m", "rrt.convert", "--base", base, "--out", tmp_path / "out", "--num-loops", "2"]
    process = subprocess.Popen(
        [*map(str, command), "--lora-rank", "256"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # tests in the background inherit none
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


# ---- norms folded into the linears that read them


def gains(base, depth, norm, family):
    weight = base[f"stack.layers.{depth}.{norm}.weight"].double()
    return weight + 1 if family == "gemma" else weight


NORM_OF = {
    "attn.q": "attn_norm",
    "attn.k": "attn_norm",
    "attn.v": "attn_norm",
    "mlp.gate": "mlp_norm",
    "mlp.up": "mlp_norm",
}


@torch.no_grad()
@pytest.mark.parametrize("init", ["stepwise", "average", "lower"])
@pytest.mark.parametrize("family", ["gemma", "llama", "mistral"])
def test_full_rank_with_folded_norms_reproduces_the_base_though_norms_are_tied(bases, family, init, tmp_path):
    fold(bases[family], tmp_path / "full", rank=999, init=init)
    base, full = load_model(bases[family]), load_model(tmp_path / "full")
    input_ids = torch.randint(0, 151, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = base(input_ids)
    assert (full(input_ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_copied_layers_compute_the_same_with_norms_folded_and_kept(bases, family, tmp_path):
    fold(bases[family], tmp_path / "folded", init="stepwise")
    fold(bases[family], tmp_path / "kept", init="stepwise", norm_init="average")
    folded, kept = load_model(tmp_path / "folded"), load_model(tmp_path / "kept")
    input_ids = torch.randint(0, 151, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = kept(input_ids)
    assert (folded(input_ids) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not torch.equal(folded.stack.layers[1].attn.q.weight, kept.stack.layers[1].attn.q.weight)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_folding_leaves_neutral_norms_and_averages_the_folded_weights_and_biases(family, tmp_path):
    dtype = torch.bfloat16 if family == "gemma" else torch.float32
    base, new, report = fold(make_hf_model(tmp_path / "base", family, dtype=dtype), tmp_path / "out", init="average")
    for layer, name in block_names(new):
        found = new[f"stack.layers.{layer}.{name}"]
        part, _, leaf = name.rpartition(".")
        if part in NORM_OF.values():
            neutral = 0.0 if leaf == "bias" or family == "gemma" else 1.0
            assert torch.equal(found, torch.full_like(found, neutral)), name
            continue
        total = 0
        for depth in (layer, layer + 3):
            value, norm = base[f"stack.layers.{depth}.{name}"].double(), NORM_OF.get(part)
            if norm and leaf == "weight":
                value = value * gains(base, depth, norm, family)
            elif norm and family == "gpt_neox":
                value = (
                    value
                    + base[f"stack.layers.{depth}.{part}.weight"].double()
                    @ base[f"stack.layers.{depth}.{norm}.bias"].double()
                )
            total += value
        assert torch.equal(found, (total / 2).to(dtype)), name  # rounded once
    lost = {vector.name.split(".", 3)[3]: vector.mean_tying_loss for vector in report.vectors}
    # Tied biases, and norms of queries and keys, are means of what differs.
    assert all((loss > 0) == (name.rpartition(".")[0] not in NORM_OF.values()) for name, loss in lost.items())
    assert bool(sum(lost.values())) == (family in ("gpt_neox", "qwen2", "qwen3"))


@torch.no_grad()
def test_a_norm_with_a_shift_that_its_readers_have_no_bias_for_stays(tmp_path):
    base = make_hf_model(tmp_path / "base", "gpt_neox", attention_bias=False)
    _, new, _ = fold(base, tmp_path / "folded", init="stepwise")
    original, _, _ = fold(base, tmp_path / "kept", init="stepwise", norm_init="average")
    assert torch.equal(new["stack.layers.2.attn_norm.bias"], original["stack.layers.5.attn_norm.bias"])
    assert torch.equal(new["stack.layers.2.attn.q.weight"], original["stack.layers.5.attn.q.weight"])
    assert torch.equal(new["stack.layers.2.mlp_norm.weight"], torch.ones(new["norm.weight"].shape))
    input_ids = torch.arange(40)[None]
    expected = load_model(tmp_path / "kept")(input_ids)
    assert (load_model(tmp_path / "folded")(input_ids) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_norms_are_not_folded_where_they_are_not_tied_or_all_is_random(bases, tmp_path):
    for number, options in enumerate((dict(untie_norms=True), dict(num_loops=1), dict(init="random"))):
        _, folded, _ = fold(bases["gpt_neox"], tmp_path / f"folded{number}", rank=2, **options)
        _, kept, _ = fold(bases["gpt_neox"], tmp_path / f"kept{number}", rank=2, norm_init="average", **options)
        assert all(torch.equal(folded[name], kept[name]) for name in kept)


def test_a_gain_that_is_not_finite_is_named(bases, tmp_path):
    (tmp_path / "base").mkdir()
    weights = load_file(bases["llama"] / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"][3] = float("inf")
    save_file(weights, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text((bases["llama"] / "config.json").read_text())
    with pytest.raises(UserError, match=r"tensor 'model.layers.1.input_layernorm.weight': found NaN or infinity"):
        fold(tmp_path / "base", tmp_path / "out", init="average")


def test_the_report_shows_what_tying_vectors_lost_and_that_no_lora_keeps_it(bases, tmp_path, capsys, monkeypatch):
    base, new, report = fold(bases["gemma"], tmp_path / "api", init="average", norm_init="average")
    first = report.vectors[0]
    assert first.name == "stack.layers.0.attn_norm.weight"
    tied = new[first.name].double() + 1
    for loop, depth in enumerate((0, 3)):
        own = gains(base, depth, "attn_norm", "gemma")
        assert first.tying_loss[loop] == pytest.approx(((own - tied).square().sum() / own.square().sum()).item())
    provenance = json.loads((tmp_path / "api" / "provenance.json").read_text())
    assert provenance["vectors"][0]["tying_loss"] == list(first.tying_loss)

    argv = ["--base", bases["llama"], "--num-loops", 2, "--init", "average"]
    for name, flags in {
        "paper": ["--norm-init", "average", "--lora-rank", 4],
        "folded": [],
        "untied": ["--untie-norms"],
    }.items():
        code, stdout, _ = run_main(main, [*argv, *flags, "--out", tmp_path / name], capsys, monkeypatch)
        assert code == 0
        head, *rows = stdout.splitlines()[-7:-2]
        cells = rows[-1].split("->")
        assert ("norms, biases" in head) == (name != "untied")
        if name == "paper":
            assert "%" in cells[1] and cells[-1].strip() == "-" and "100.0%" not in rows[-1]
            assert float(cells[-2].split()[-1].rstrip("%")) > 1
        else:
            assert [cell.split()[0] for cell in cells[1:]] == ["-"] * (4 + (name != "untied"))


@torch.no_grad()
def test_kept_layers_are_a_vanilla_model_of_the_layers_that_the_init_chooses(bases, tmp_path, capsys, monkeypatch):
    for flags, kept in (([], (0, 2, 5)), (["--init", "lower"], (0, 1, 2)), (["--keep-layers", 4], (0, 2, 3, 5))):
        out = tmp_path / "out"
        argv = ["--base", bases["gpt_neox"], "--out", out, "--keep-layers", 3, *flags, "--overwrite"]
        code, stdout, _ = run_main(main, argv, capsys, monkeypatch)
        assert (
            code == 0
            and f"layers {', '.join(map(str, kept))} of the base's 6" in stdout
            and f"base  {bases['gpt_neox']}: gpt_neox, 6 layers" in stdout
            and "lost by tying" not in stdout
        )
        source = open_source(out)
        assert source.model.num_layers == len(kept)
        assert source.recursion == RecursiveConfig(init="lower" if "lower" in flags else "stepwise")
        base, new = tensors(bases["gpt_neox"]), tensors(out)
        for layer, name in block_names(new):
            assert torch.equal(new[f"stack.layers.{layer}.{name}"], base[f"stack.layers.{kept[layer]}.{name}"])
        assert torch.equal(new["embed"], base["embed"]) and torch.equal(new["head"], base["head"])
        assert load_model(out)(torch.arange(9)[None]).isfinite().all()


def test_keeping_layers_refuses_what_it_does_not_make(bases, tmp_path, capsys, monkeypatch):
    cases = {
        "--num-loops: missing": [],
        "--keep-layers: found beside --num-loops 2": ["--keep-layers", 3, "--num-loops", 2],
        "keep_layers: found 7; expected 1 to 6": ["--keep-layers", 7],
        "keep_layers: found 0; expected 1 to 6": ["--keep-layers", 0],
        "field 'init': found 'average'; expected 'stepwise'": ["--keep-layers", 3, "--init", "average"],
        "field 'lora_rank': found 4; expected 0 with keep_layers": ["--keep-layers", 3, "--lora-rank", 4],
        "field 'untie_norms': found True; expected False with keep_layers": ["--keep-layers", 3, "--untie-norms"],
    }
    for message, flags in cases.items():
        argv = ["--base", bases["llama"], "--out", tmp_path / "out", *flags]
        code, _, stderr = run_main(main, argv, capsys, monkeypatch)
        assert code == 2 and message in stderr and stderr.count("\n") == 1, stderr
    assert not (tmp_path / "out").exists()


@torch.no_grad()
def test_capped_ranks_are_what_the_checkpoint_keeps(bases, tmp_path):
    """A group's rank is what its largest linear can have, so that capping changes no shape."""
    base = make_hf_model(tmp_path / "base", "gemma", hidden_size=32, intermediate_size=24)
    _, new, _ = fold(base, tmp_path / "out", rank=100_000, init="average")
    found = open_source(tmp_path / "out").recursion.lora_rank
    assert found == LoraRanks(q=32, kv=12, out=32, ffn=24)
    for name, tensor in new.items():
        if name.endswith("lora_a"):
            assert tensor.shape[1] == getattr(
                found, LORA_GROUP_OF_LINEAR[name.split(".", 3)[3].removesuffix(".lora_a")]
            )


def lost_shares(base, new, num_loops=2):
    """Share of each matrix's energy that tying lost and LoRA does not restore, by name."""
    lost = {}
    for name in linears(new):
        layer, linear = name.removeprefix("stack.layers.").split(".", 1)
        error = energy = 0.0
        for loop in range(num_loops):
            weight = base[f"stack.layers.{loop * 6 // num_loops + int(layer)}.{linear}.weight"].double()
            made = new[f"{name}.weight"].double()
            if f"{name}.lora_a" in new:
                made += new[f"{name}.lora_b"][loop].double() @ new[f"{name}.lora_a"][loop].double()
            error += (weight - made).square().sum().item()
            energy += weight.square().sum().item()
        lost[name] = error / energy
    return lost


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "num_loops", "init", "lora_init"),
    [
        ("gemma", 2, "average", "svd"),
        ("llama", 3, "stepwise", "svd"),
        ("llama", 2, "average", "joint"),
        ("gpt_neox", 3, "average", "joint"),
    ],
)
def test_a_rank_budget_loses_less_at_the_same_size(bases, family, num_loops, init, lora_init, tmp_path):
    options = dict(num_loops=num_loops, init=init, lora_init=lora_init, norm_init="average")
    base, uniform, before = fold(bases[family], tmp_path / "uniform", rank=5, **options)
    _, new, report = fold(bases[family], tmp_path / "out", rank=LoraRanks.uniform(5, is_budget=True), **options)
    found, expected = (sum(lost_shares(base, tensors, num_loops).values()) for tensors in (new, uniform))
    assert found < expected
    assert report.after.lora_params == before.after.lora_params
    ranks = open_source(tmp_path / "out").recursion.lora_rank
    assert ranks == report.after.recursion.lora_rank and (ranks.q, ranks.is_budget) == (5, True)
    assert {f"stack.{name}": rank for name, rank in ranks.matrices.items()} == {m.name: m.rank for m in report.matrices}
    assert len(set(ranks.matrices.values())) > 2
    assert load_model(tmp_path / "out")(torch.arange(9)[None]).isfinite().all()


def test_a_matrix_that_tying_does_not_change_gets_no_rank(tmp_path):
    base = make_hf_model(tmp_path / "base", "llama", num_layers=4)
    weights = load_file(base / "model.safetensors")
    for leaf in ("self_attn.q_proj", "mlp.down_proj"):
        weights[f"model.layers.2.{leaf}.weight"] = weights[f"model.layers.0.{leaf}.weight"]
    save_file({name: tensor.clone() for name, tensor in weights.items()}, base / "model.safetensors")
    options = dict(init="average", norm_init="average")
    _, new, report = fold(base, tmp_path / "out", rank=LoraRanks.uniform(3, is_budget=True), **options)
    ranks = report.after.recursion.lora_rank.matrices
    assert ranks["layers.0.attn.q"] == ranks["layers.0.mlp.down"] == 0 and ranks["layers.1.attn.q"] > 0
    assert "stack.layers.0.attn.q.lora_a" not in new and "stack.layers.1.attn.q.lora_a" in new


def test_the_command_takes_a_rank_budget_and_prints_every_rank(bases, tmp_path, capsys, monkeypatch):
    argv = ["--base", bases["llama"], "--out", tmp_path / "out", "--num-loops", 2]
    done = run_main(main, [*argv, "--rank-budget", 4], capsys, monkeypatch)
    assert done.code == 0 and "average; LoRA rank budget 4 (joint)" in done.out
    matrices = open_source(tmp_path / "out").recursion.lora_rank.matrices
    table = done.out[done.out.index("LoRA ranks") :].splitlines()
    assert table[0].split()[2:] == list(LINEARS)
    assert [row.split()[0] for row in table[1:7]] == ["0", "1", "2", "least", "median", "largest"]
    for column, linear in enumerate(LINEARS, start=1):
        ranks = [matrices[f"layers.{layer}.{linear}"] for layer in range(3)]
        assert [int(row.split()[column]) for row in table[1:7]] == [*ranks, *sorted(ranks)]
    code, inspected, _ = run_main(inspect_main, ["--checkpoint", tmp_path / "out"], capsys, monkeypatch)
    assert code == 0 and inspected.splitlines()[-7:] == table[:7] and "budget 4, 21 matrices" in inspected


def test_budgets_that_make_no_sense_are_refused(bases, tmp_path, capsys, monkeypatch):
    argv = ["--base", bases["llama"], "--out", tmp_path / "out", "--num-loops", 2]
    cases = {
        "--rank-budget: found 4 beside --lora-rank 3; expected one of the two": ["--lora-rank", 3],
        "--rank-budget: found 4 beside --lora-rank-ffn 3; expected one of the two": ["--lora-rank-ffn", 3],
        "--rank-budget: found 0; expected at least 1, rank 1 for each matrix": ["--rank-budget", 0],
        "LoRA rank budget q 20, kv 16, out 20, ffn 20: this saves no parameters: ": ["--rank-budget", 20],
        "LoRA rank budget 4: this saves no parameters: ": ["--num-loops", 1],
        "rank budget: found 384 parameters; expected at least ": None,
    }
    for message, flags in cases.items():
        if flags is None:
            with pytest.raises(UserError, match=message):
                fold(bases["llama"], tmp_path / "out", rank=LoraRanks(q=1, is_budget=True), init="average")
            continue
        code, _, stderr = run_main(main, [*argv, "--rank-budget", 4, *flags], capsys, monkeypatch)
        assert code == 2 and message in stderr and stderr.count("\n") == 1, stderr
    assert not (tmp_path / "out").exists()
