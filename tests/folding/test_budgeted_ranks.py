"""A rank budget in a conversion: what it saves, what the checkpoint keeps of it, and the command's table."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from rrt.checkpoint.source import load_model, open_source
from rrt.convert import main
from rrt.errors import UserError
from rrt.inspect import main as inspect_main
from rrt.model.config import LoraRanks
from tests.util.commands import run_main
from tests.util.folding import LINEARS, fold, linears
from tests.util.models import make_hf_model


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
        "--rank-budget: found 4 beside --lora-rank-kv 0; expected one of the two": ["--lora-rank-kv", 0],
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
