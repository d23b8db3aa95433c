"""A conversion as a whole: its report, its dtype, the layouts of its base, and the directory that it writes."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from rrt.checkpoint.source import open_source
from rrt.data.tokenizer import load_tokenizer
from rrt.errors import UserError
from rrt.folding.conversion import convert
from rrt.folding.unroll import export
from rrt.model.config import RecursiveConfig
from tests.util.files import files_of_at_most
from tests.util.folding import fold, linears
from tests.util.models import make_hf_model
from tests.util.tokenizers import make_sentencepiece_tokenizer


def test_a_conversion_that_saves_nothing_says_so(bases, tmp_path):
    _, _, report = fold(bases["llama"], tmp_path / "out", rank=16, init="average")
    assert any("saves no parameters" in notice for notice in report.notices)
    _, _, report = fold(bases["llama"], tmp_path / "small", rank=2, init="average")
    assert not any("saves no parameters" in notice for notice in report.notices)


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


def test_overwrite_replaces_the_whole_directory(bases, tmp_path):
    fold(bases["llama"], tmp_path / "out", rank=2, init="average")
    (tmp_path / "out" / "stale").write_text("")
    fold(bases["gemma"], tmp_path / "out", overwrite=True)
    assert open_source(tmp_path / "out").model.family == "gemma"
    assert not (tmp_path / "out" / "stale").exists()


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
