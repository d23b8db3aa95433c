"""A vanilla model of some of the base's layers (--keep-layers)."""

import torch

from rrt.checkpoint.source import load_model, open_source
from rrt.convert import main
from rrt.model.config import RecursiveConfig
from tests.util.commands import run_main
from tests.util.folding import block_names, tensors


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
        "--keep-layers: found beside --calibration": ["--keep-layers", 3, "--calibration", bases["llama"]],
        "field 'init': found 'average'; expected 'stepwise'": ["--keep-layers", 3, "--init", "average"],
        "field 'lora_rank': found 4; expected 0 with keep_layers": ["--keep-layers", 3, "--lora-rank", 4],
        "field 'untie_norms': found True; expected False with keep_layers": ["--keep-layers", 3, "--untie-norms"],
    }
    for message, flags in cases.items():
        argv = ["--base", bases["llama"], "--out", tmp_path / "out", *flags]
        code, _, stderr = run_main(main, argv, capsys, monkeypatch)
        assert code == 2 and message in stderr and stderr.count("\n") == 1, stderr
    assert not (tmp_path / "out").exists()
