"""Norms folded into the linears that read them."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from rrt.checkpoint.source import load_model
from rrt.convert import main
from rrt.errors import UserError
from tests.util.commands import run_main
from tests.util.folding import block_names, fold, gains
from tests.util.models import ALL_FAMILIES, make_hf_model

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
