"""Every recipe that is shipped: it reads, is the paper's, fits eight processes, and one command runs it."""

import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rrt
from rrt.checkpoint.presets import preset
from rrt.convert import recursive_flags
from rrt.data.shards import ShardWriter
from rrt.data.tokenizer import load_tokenizer
from rrt.errors import UserError
from rrt.model.sizes import model_sizes
from tests.util.models import make_hf_model
from tests.util.tokenizers import make_bpe_tokenizer, training_texts
from train import early_exit, pretrain, uptrain
from train.architecture import check_start, start_architecture
from train.recipe import ABSENT, StartConfig, read_command, read_tables
from train.trainer import accumulation

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "train" / "recipes").glob("*.toml"))
_spec = importlib.util.spec_from_file_location("paper", ROOT / "runs" / "paper.py")
assert _spec is not None and _spec.loader is not None
paper = importlib.util.module_from_spec(_spec)
sys.modules["paper"] = paper
_spec.loader.exec_module(paper)
ROWS = paper.rows()
STEPS = {15: 7152, 60: 28610, 75: 35762}


def read(path: Path, tables: dict[str, Any]) -> tuple[Any, Any]:
    """The recipe as its command reads it for a dry run, and the command."""
    module = pretrain if "model" in tables else early_exit if "exits" in tables else uptrain
    return read_command(module.COMMAND.recipe, "", ["--recipe", str(path), "--dry-run"])[0], module.COMMAND


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_the_papers_setting_and_fits_eight_processes(row: str) -> None:
    path = ROOT / "train" / "recipes" / f"{row}.toml"
    tables = read_tables(path)
    recipe, command = read(path, tables)
    if "exits" in tables or re.search(r"_\d+b$", row) is None:
        billions = 15
    else:
        billions = int(row.rpartition("_")[2].removesuffix("b"))
    assert recipe.run.steps == STEPS[billions]
    assert (recipe.data.seq_len, recipe.run.batch_tokens, recipe.optim.lr) == (2048, 2**21, 2e-4)
    assert recipe.optim.warmup_steps == (200 if billions == 15 else 800)
    assert accumulation(recipe, 8) * recipe.run.micro_batch * 8 * 2048 == 2**21
    training = command.training(recipe)
    recursion = training.recursion
    assert (training.teacher is not None) == ("teacher" in tables.get("start", {}))
    assert bool(recursion.exit_loops) == ("exits" in tables)
    for found in re.findall(r"_r(\d+)_", row):
        assert recursion.lora_rank == type(recursion.lora_rank).uniform(int(found))
    for found in re.findall(r"(?:^|/)b(\d)_", row):
        assert recursion.num_loops == (1 if "reduced" in row or "not_looped" in row else int(found))


@pytest.mark.parametrize("row", ROWS)
def test_what_a_row_needs_is_made_by_rows_before_it(row: str) -> None:
    made: list[Path] = []
    for step in paper.steps(row, paper.Inputs(Path("base"), Path("data"), Path("out"), 8)):
        for flag in ("--checkpoint.path", "--distill.teacher", "--checkpoint"):
            if flag in step.command:
                needed = Path(step.command[step.command.index(flag) + 1])
                assert needed == Path("base") or needed in made
        made.append(step.makes)
    assert made[-2:] == [Path("out") / row / "final", Path("out") / row / "perplexity.json"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_for_any_checkpoint_of_a_family_says_nothing_of_its_start(path: Path) -> None:
    tables = read_tables(path)
    recipe, _ = read(path, tables)
    assert "start" not in tables
    assert recipe.run.steps == STEPS[int(path.stem.rpartition("_")[2].removesuffix("b"))]


def test_a_dry_run_says_which_model_it_lacks() -> None:
    recipe, command = read(RECIPES[0], read_tables(RECIPES[0]))
    with pytest.raises(UserError, match=r"missing 'checkpoint.path', or 'start.base' in its place"):
        command.training(recipe)


def test_every_family_has_recipes() -> None:
    assert {path.stem for path in RECIPES} == {"gemma_15b", "gemma_60b", "tinyllama_15b", "pythia_15b"}
    assert {row.partition("/")[0] for row in ROWS} == {"gemma", "tinyllama", "pythia-1b", "pythia-410m", "pythia-160m"}


@pytest.mark.parametrize(
    ("row", "billions"),
    [
        ("gemma/full_15b", 1.98),
        ("gemma/b2_stepwise_15b", 0.99),
        ("gemma/b2_average_svd_r512_15b", 1.60),
        ("gemma/b3_average_svd_r64_kd_60b", 0.74),
        ("gemma/b2_average_svd_q128_kv256_out128_ffn256_15b", 1.28),
        ("gemma/b2_reduced_60b", 0.99),
        ("pythia-410m/b2_reduced_15b", 0.15),
        ("pythia-410m/b2_stepwise_not_looped_15b", 0.15),
        ("tinyllama/b2_average_svd_r256_15b", 0.68),
        ("pythia-1b/b2_average_svd_r128_15b", 0.48),
    ],
)
def test_rows_have_the_papers_parameter_counts(row: str, billions: float) -> None:
    path = ROOT / "train" / "recipes" / f"{row}.toml"
    recipe, command = read(path, read_tables(path))
    training = command.training(recipe)
    sizes = model_sizes(training.model, training.recursion, torch.float32)
    assert sizes.non_embedding_params / 1e9 == pytest.approx(billions, abs=0.01)


def test_the_command_prints_its_steps_and_lists_its_rows() -> None:
    def run(*argv: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([sys.executable, str(ROOT / "runs" / "paper.py"), *argv], capture_output=True, text=True)

    assert run().stdout.split() == ROWS
    lines = run("gemma/b2_stepwise_forward_kl_15b", "--print", "--", "--run.wandb", "w").stdout
    commands = [line.split() for line in lines.splitlines()]
    scripts = [Path(part).stem for command in commands for part in command if part.endswith(".py")]
    assert scripts == ["uptrain", "perplexity", "uptrain", "perplexity"]
    assert [command[-2:] == ["--run.wandb", "w"] for command in commands] == [False, False, False, True, False]
    wrong = run("gemma/none")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    error = wrong.stderr.splitlines()[-1]
    assert error.startswith("error: row: found 'gemma/none'; expected one of those that runs/paper.py lists")


def test_relative_paths_are_those_of_the_directory_that_the_command_is_run_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = subprocess.run
    (tmp_path / "base").mkdir()

    def stand_in(command: list[str], **options: Any) -> "subprocess.CompletedProcess[bytes]":
        """What a command finds at the paths that it is given; it makes its output, and an `rrt` is there for it."""
        look = "import pathlib, sys; import rrt.convert; assert pathlib.Path('base').is_dir(); "
        make = "pathlib.Path(sys.argv[1]).mkdir(parents=True)"
        if "--json" in command:
            make = "pathlib.Path(sys.argv[1]).write_text('{\"perplexity\": 7.5}')"
        flag = next(flag for flag in ("--json", "--out", "--run.out") if flag in command)
        made = Path(command[command.index(flag) + 1])
        made = made / "final" if flag == "--run.out" else made
        return run([sys.executable, "-P", "-c", look + make, str(made)], **options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(subprocess, "run", stand_in)
    row = "pythia-160m/b2_average_15b"
    monkeypatch.setattr(sys, "argv", ["paper.py", row, "--base", "base", "--data", "data", "--out", "out"])
    paper.main()
    assert capsys.readouterr().out.splitlines()[-1] == f"{row}: perplexity 7.50 (out/{row}/perplexity.json)"


def test_a_checkpoint_of_another_row_is_refused() -> None:
    start = StartConfig(base="pythia-160m", convert="--num-loops 2 --init average --lora-rank 4")
    model, recursion = start_architecture(ABSENT, start)
    assert (model.num_layers, recursion.num_loops, recursion.lora_rank.q) == (12, 2, 4)
    with pytest.raises(UserError, match=r"has num_loops 1; expected 2, as the recipe's start\.convert = '--num-loops"):
        start_architecture("pythia-160m", start)
    assert start_architecture("pythia-160m", dataclasses.replace(start, convert=""))[1].num_loops == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("--norm-init zero", "norm_init average; expected zero"),
        ("--untie-norms", "untie_norms False; expected True"),
        ("--prefix-length 4", "prefix_length 0; expected 4"),
        ("--lora-init zero", "lora_init svd; expected zero"),
    ],
)
def test_whatever_a_conversion_decides_is_compared(other: str, message: str) -> None:
    flags = "--num-loops 2 --init average --lora-rank 4"
    found = dataclasses.replace(recursive_flags(flags.split()), exit_loops=(0,), head_lora_rank=4)  # by training
    check_start("x", preset("pythia-160m"), found, StartConfig(base="pythia-160m", convert=flags))
    with pytest.raises(UserError, match=f"field 'checkpoint.path': x has {message}"):
        check_start("x", preset("pythia-160m"), found, StartConfig(base="pythia-160m", convert=f"{flags} {other}"))


@pytest.mark.parametrize(
    ("flags", "other"),
    [
        ("--init average", "--lora-init zero"),
        ("--init stepwise --lora-rank 4", "--norm-init zero"),
        ("--init average --untie-norms", "--norm-init zero"),
    ],
)
def test_what_has_no_effect_on_a_conversion_is_not_compared(flags: str, other: str) -> None:
    both = [f"--num-loops 2 {flags}", f"--num-loops 2 {flags} {other}"]
    for made, described in (both, reversed(both)):
        start = StartConfig(base="pythia-160m", convert=described)
        check_start("x", preset("pythia-160m"), recursive_flags(made.split()), start)


@pytest.mark.slow
def test_a_row_is_made_from_any_folder_by_one_command(tmp_path: Path) -> None:
    make_hf_model(tmp_path / "base", "gpt_neox", vocab_size=420)
    tokenizer = load_tokenizer(make_bpe_tokenizer(tmp_path / "base", vocab_size=420))
    (tmp_path / "data").mkdir()
    with ShardWriter(tmp_path / "data", tokenizer) as writer:
        for split in ("train", "heldout"):
            for text in training_texts():
                ids = tokenizer.encode_document(text)
                writer.append(split, ids, [len(ids)], [len(text.encode())])
        writer.finish({})

    def run() -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, str(ROOT / "runs" / "paper.py"), "pythia-160m/b2_stepwise_not_looped_15b"]
        small = ["--run.batch_tokens", "1024", "--run.micro_batch", "4", "--data.seq_len", "64", "--run.device", "cpu"]
        return subprocess.run(
            [*command, "--base", "base", "--data", "data", "--out", "out", "--gpus", "1", "--", *small,
             "--run.tokens", "4096"],
            capture_output=True, text=True, cwd=tmp_path,
        )  # fmt: skip

    made = run()
    assert made.returncode == 0, made.stderr
    modules = [line.split()[3] for line in made.stdout.splitlines() if line.startswith("$ ")]
    assert modules[:2] == ["rrt.convert", "torch.distributed.run"]
    out = tmp_path / "out" / "pythia-160m" / "b2_stepwise_not_looped_15b"
    model = rrt.load_model(out / "final")
    assert (model.config.num_layers, model.recursion.num_loops) == (3, 1)
    again = run()
    assert again.stdout.splitlines() == [made.stdout.splitlines()[-1]]
    assert "perplexity" in again.stdout
