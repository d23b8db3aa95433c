"""Low rank alone, a baseline that shares nothing."""

import pytest
import torch

from rrt.checkpoint.source import load_model, open_source
from rrt.convert import main
from rrt.errors import UserError
from rrt.folding.unroll import export
from rrt.model.config import RecursiveConfig
from tests.util.commands import run_main
from tests.util.folding import fold, gains
from tests.util.models import make_hf_model


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
    for flag in (["--init", "lower"], ["--sharing", "sequence"]):
        code, _, stderr = run_main(main, [*argv, "--overwrite", *flag], capsys, monkeypatch)
        assert code == 2 and f"{flag[0]}: found {flag[1]} beside --lora-init low-rank-only" in stderr
    assert "lost by low rank" in stdout and "of all ||W||^2 low rank loses " in stdout and "->" not in stdout
