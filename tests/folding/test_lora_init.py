"""LoRAs of a folded base: the truncated SVD of what tying lost, and where they are drawn instead."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from rrt.checkpoint.source import load_model, open_source
from rrt.folding.fold import kept_depths
from rrt.folding.svd import truncated_svd
from rrt.model.config import LORA_GROUP_OF_LINEAR, LoraRanks
from tests.util.folding import LINEARS, fold, linears
from tests.util.models import make_hf_model


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


def test_narrowing_to_bf16_leaves_no_residual_where_a_layer_was_kept(bases, tmp_path):
    _, new, _ = fold(bases["llama"], tmp_path / "out", rank=4, init="lower", dtype=torch.bfloat16)
    assert new["stack.layers.1.attn.q.lora_b"][0].count_nonzero() == 0
    assert new["stack.layers.1.attn.q.lora_b"][1].count_nonzero() > 0


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
