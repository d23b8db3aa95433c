"""The paper's rows: they read, have its settings, fit eight processes, and one command makes each."""

import dataclasses
import importlib.util
import re
import subprocess
import sys
from collections import Counter
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
from rrt.model.config import LoraRanks
from rrt.model.sizes import model_sizes
from tests.util.commands import run_program
from tests.util.models import make_hf_model
from tests.util.tokenizers import make_bpe_tokenizer, training_texts
from train import early_exit, pretrain, uptrain
from train.architecture import check_conversion, checkpoint_architecture
from train.recipe import ABSENT, StartConfig, accumulation, read_command
from train.recipe_table import read_settings, script_of

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("paper", ROOT / "runs" / "paper.py")
assert _spec is not None and _spec.loader is not None
paper = importlib.util.module_from_spec(_spec)
sys.modules["paper"] = paper
_spec.loader.exec_module(paper)
ROWS = paper.paper_rows()
COUNTS = {"gemma": 114, "pythia-160m": 8, "pythia-1b": 21, "pythia-410m": 8, "tinyllama": 22}
ANY_CHECKPOINT = [*(f"{family}.toml#15b" for family in COUNTS), "gemma.toml#60b"]
STEPS = {15: 7152, 60: 28610, 75: 35762}
COMMANDS: dict[str, Any] = {
    "train/pretrain.py": pretrain.COMMAND,
    "train/early_exit.py": early_exit.COMMAND,
    "train/uptrain.py": uptrain.COMMAND,
}


def read(recipe: str) -> tuple[Any, Any]:
    """The recipe FILE#ROW as its command reads it for a dry run, and the command."""
    recipe = str(ROOT / "train" / "recipes" / recipe)
    settings = read_settings(recipe)
    command = COMMANDS[script_of(settings)]
    return read_command(command.recipe, "", ["--recipe", recipe, "--dry-run"])[0], command


def read_row(row: str) -> tuple[Any, Any]:
    return read(row.replace("/", ".toml#"))


def test_every_family_has_all_its_rows() -> None:
    assert Counter(row.partition("/")[0] for row in ROWS) == COUNTS
    assert {row.replace("/", ".toml#") for row in paper.rows()} - {row.replace("/", ".toml#") for row in ROWS} == {
        *ANY_CHECKPOINT
    }


@pytest.mark.parametrize("family", COUNTS)
def test_rows_are_the_papers_settings_and_fit_eight_processes(family: str) -> None:
    for row, settings in ROWS.items():
        if not row.startswith(f"{family}/"):
            continue
        recipe, command = read_row(row)
        if "exits" in settings or re.search(r"_\d+b$", row) is None:
            billions = 15
        else:
            billions = int(row.rpartition("_")[2].removesuffix("b"))
        assert recipe.run.steps == STEPS[billions], row
        assert (recipe.data.seq_len, recipe.run.batch_tokens, recipe.optim.lr) == (2048, 2**21, 2e-4), row
        assert recipe.optim.warmup_steps == (200 if billions == 15 else 800), row
        assert accumulation(recipe, 8) * recipe.run.micro_batch * 8 * 2048 == 2**21, row
        spec = command.make_training_spec(recipe)
        assert (spec.teacher is not None) == ("teacher" in settings.get("start", {})), row
        assert bool(spec.recursion.exit_loops) == ("exits" in settings), row
        for found in re.findall(r"_r(\d+)_", row):
            assert spec.recursion.lora_rank == LoraRanks.uniform(int(found)), row
        for found in re.findall(r"/b(\d)_", row):
            looped = "reduced" not in row and "not_looped" not in row
            assert spec.recursion.num_loops == (int(found) if looped else 1), row
        for init in re.findall(r"/b\d_(average|lower|random|stepwise_fixed_start|stepwise)", row):
            assert spec.recursion.init == init.replace("_", "-"), row


def settings_of(row: str) -> dict[str, Any]:
    """Everything in which a row's recipe differs from the defaults, by `table.field`."""
    recipe, _ = read_row(row)
    return {
        f"{table.name}.{field.name}": value
        for table in dataclasses.fields(recipe)
        for field in dataclasses.fields(table.type)
        if (value := getattr(getattr(recipe, table.name), field.name)) not in (field.default, ABSENT)
    }


def test_rows_with_lora_name_its_init() -> None:
    convert = [settings_of(row).get("start.convert", "") for row in ROWS]
    relaxed = [flags for flags in convert if "--lora-rank" in flags]
    assert len(relaxed) > 50 and all("--lora-init" in flags for flags in relaxed)


def test_rows_resolve_to_the_settings_of_their_file() -> None:
    common = {"run.micro_batch": 4, "run.tokens": 15_000_000_000}
    longer = {"run.micro_batch": 4, "run.tokens": 60_000_000_000, "optim.warmup_steps": 800}
    b2 = {"start.base": "gemma-2b", "start.convert": "--num-loops 2 --init stepwise --norm-init average"}
    assert settings_of("tinyllama/b2_reduced_15b") == {
        "model.config": "tinyllama-1.1b",
        "model.num_layers": 11,
        "run.tokens": 15_000_000_000,
    }
    assert settings_of("gemma/b3_reduced_kd_60b") == longer | {
        "model.config": "gemma-2b",
        "model.num_layers": 6,
        "start.base": "gemma-2b",
        "start.teacher": "full_15b",
    }
    assert settings_of("gemma/b2_average_svd_q128_kv128_out128_ffn64_15b") == common | {
        "start.base": "gemma-2b",
        "start.convert": "--num-loops 2 --init average --norm-init average --lora-rank-q 128 --lora-rank-kv 128 "
        "--lora-rank-out 128 --lora-rank-ffn 64 --lora-init svd",
    }
    assert settings_of("gemma/b2_average_svd_r512_kd_60b") == longer | {
        "start.base": "gemma-2b",
        "start.convert": "--num-loops 2 --init average --norm-init average --lora-rank 512 --lora-init svd",
        "start.teacher": "full_15b",
    }
    assert settings_of("gemma/b2_stepwise_jsd_15b") == common | b2 | {
        "start.teacher": "full_15b",
        "distill.loss": "jsd",
    }
    assert settings_of("gemma/b2_exits_aggressive_0.1_new_tokens") == common | b2 | {
        "start.after": "b2_stepwise_kd_60b",
        "data.offset": 60_000_000_000,
    }
    assert settings_of("gemma/b3_exits_frozen_head_lora_distill") == common | {
        "start.base": "gemma-2b",
        "start.convert": "--num-loops 3 --init stepwise --norm-init average",
        "start.after": "b3_stepwise_kd_60b",
        "exits.distill": "last",
        "exits.head_lora_rank": 128,
        "exits.freeze": True,
    }
    assert settings_of("pythia-160m/b2_stepwise_not_looped_15b") == {
        "checkpoint.num_loops": 1,
        "start.base": "pythia-160m",
        "start.convert": "--num-loops 2 --init stepwise --norm-init average",
        "run.micro_batch": 16,
        "run.tokens": 15_000_000_000,
    }


def test_models_that_a_row_needs_are_made_before_it() -> None:
    for row in ROWS:
        made: list[Path] = []
        for step in paper.steps(row, paper.Inputs(Path("base"), Path("data"), Path("out"), 8)):
            for flag in ("--checkpoint.path", "--distill.teacher", "--checkpoint"):
                if flag in step.command:
                    needed = Path(step.command[step.command.index(flag) + 1])
                    assert needed == Path("base") or needed in made, row
            made.append(step.makes)
        assert made[-2:] == [Path("out") / row / "final", Path("out") / row / "perplexity.json"]


@pytest.mark.parametrize("recipe", ANY_CHECKPOINT)
def test_a_row_for_any_checkpoint_of_a_family_says_nothing_of_its_start(recipe: str) -> None:
    found, command = read(recipe)
    assert found.start == StartConfig()
    assert found.run.steps == STEPS[int(recipe.partition("#")[2].removesuffix("b"))]
    assert recipe.replace(".toml#", "/") not in ROWS
    with pytest.raises(UserError, match=r"missing 'checkpoint.path', or 'start.base' in its place"):
        command.make_training_spec(found)


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
    recipe, command = read_row(row)
    spec = command.make_training_spec(recipe)
    sizes = model_sizes(spec.model, spec.recursion, torch.float32)
    assert sizes.non_embedding_params / 1e9 == pytest.approx(billions, abs=0.01)


def test_the_command_prints_its_steps_and_lists_its_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*argv: str) -> str:
        monkeypatch.setattr(sys, "argv", ["paper.py", *argv])
        paper.main()
        return capsys.readouterr().out

    assert run().split() == list(ROWS)
    lines = run("gemma/b2_stepwise_forward_kl_15b", "--print", "--", "--run.wandb", "w")
    commands = [line.split() for line in lines.splitlines()]
    scripts = [Path(part).stem for command in commands for part in command if part.endswith(".py")]
    assert scripts == ["uptrain", "perplexity", "uptrain", "perplexity"]
    assert [command[-2:] == ["--run.wandb", "w"] for command in commands] == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("gemma/b2_stepwise_51b", "expected one that runs/paper.py lists without a row, such as gemma/b2_stepwise_15b"),
        ("nope", "row: found 'nope'; expected one that runs/paper.py lists without a row\n"),
        (
            "pythia-160m/15b",
            "row: pythia-160m/15b has neither [start] nor [model]: it trains a checkpoint of your own, with "
            "train/uptrain.py --recipe train/recipes/pythia-160m.toml#15b --checkpoint.path DIR\n",
        ),
        ("gemma/full_15b", "--base: found BASE, which does not exist; expected a directory, or --print"),
    ],
)
def test_a_row_that_the_command_cannot_make_is_one_error(
    row: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run_program(paper.main, [row], capsys, monkeypatch)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert message in done.err


def test_relative_paths_are_those_of_the_directory_that_the_command_is_run_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = subprocess.run
    for name in ("base", "data"):
        (tmp_path / name).mkdir()

    def stand_in(command: list[str], **options: Any) -> "subprocess.CompletedProcess[bytes]":
        """Look for the base and an `rrt` as the command would, and make its output."""
        look = "import importlib.util, pathlib, sys; "
        look += "assert pathlib.Path('base').is_dir() and importlib.util.find_spec('rrt'); "
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
    model, recursion = checkpoint_architecture(ABSENT, start)
    assert (model.num_layers, recursion.num_loops, recursion.lora_rank.q) == (12, 2, 4)
    with pytest.raises(UserError, match=r"has num_loops 1; expected 2, as the recipe's start\.convert = '--num-loops"):
        checkpoint_architecture("pythia-160m", start)
    assert checkpoint_architecture("pythia-160m", dataclasses.replace(start, convert=""))[1].num_loops == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("--norm-init zero", "norm_init folded; expected zero"),
        ("--untie-norms", "untie_norms False; expected True"),
        ("--prefix-length 4", "prefix_length 0; expected 4"),
        ("--lora-init zero", "lora_init joint; expected zero"),
    ],
)
def test_a_checkpoint_that_was_converted_otherwise_is_refused(other: str, message: str) -> None:
    flags = "--num-loops 2 --init average --lora-rank 4"
    found = dataclasses.replace(recursive_flags(flags.split()), exit_loops=(0,), head_lora_rank=4)  # by training
    check_conversion("x", preset("pythia-160m"), found, StartConfig(base="pythia-160m", convert=flags))
    with pytest.raises(UserError, match=f"field 'checkpoint.path': x has {message}"):
        check_conversion("x", preset("pythia-160m"), found, StartConfig(base="pythia-160m", convert=f"{flags} {other}"))


def test_a_low_rank_checkpoint_is_compared_with_the_ranks_that_its_folding_gives() -> None:
    start = StartConfig(base="pythia-160m", convert="--num-loops 2 --lora-rank 16 --lora-init low-rank-only")
    model, recursion = checkpoint_architecture(ABSENT, start)
    assert (recursion.num_loops, recursion.low_rank_only) == (1, True) and recursion.lora_rank.ffn > 16
    check_conversion("x", model, recursion, start)
    other = dataclasses.replace(recursion, lora_rank=LoraRanks.uniform(16))
    with pytest.raises(UserError, match="x has lora_rank 16; expected "):
        check_conversion("x", model, other, start)


@pytest.mark.parametrize(
    ("flags", "other"),
    [
        ("--init average", "--lora-init zero"),
        ("--init stepwise --norm-init average --lora-rank 4", "--norm-init zero"),
        ("--init random", "--norm-init average"),
        ("--init average --lora-rank 768", "--lora-rank 100000"),
        ("--init average --untie-norms", "--norm-init zero"),
        ("--init average --rank-budget 64", "--norm-init folded"),
    ],
)
def test_conversion_flags_without_effect_are_not_compared(flags: str, other: str) -> None:
    both = [f"--num-loops 2 {flags}", f"--num-loops 2 {flags} {other}"]
    for made, described in (both, reversed(both)):
        start = StartConfig(base="pythia-160m", convert=described)
        check_conversion("x", preset("pythia-160m"), recursive_flags(made.split()), start)


def test_a_checkpoint_of_distributed_ranks_has_the_budget_that_its_recipe_says() -> None:
    flags, model = "--num-loops 2 --init average --rank-budget 64", preset("pythia-160m")
    made = recursive_flags(flags.split())
    made = dataclasses.replace(made, lora_rank=dataclasses.replace(made.lora_rank, matrices={"layers.3.attn.q": 77}))
    check_conversion("x", model, made, StartConfig(base="pythia-160m", convert=flags))
    for other, expected in (
        (flags.replace("64", "32"), "budget 32"),
        (flags.replace("rank-budget", "lora-rank"), "64"),
    ):
        with pytest.raises(UserError, match=f"x has lora_rank budget 64; expected {expected},"):
            check_conversion("x", model, made, StartConfig(base="pythia-160m", convert=other))


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
