"""The shared weight and its LoRAs fitted together."""

import pytest
import torch

from rrt.checkpoint.source import load_model
from rrt.convert import recursive_flags
from rrt.model.config import LoraRanks
from tests.util.folding import fold, linears
from tests.util.models import ALL_FAMILIES


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
