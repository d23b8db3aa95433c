"""The estimate of a run's memory against what processes take."""

import ctypes
import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rrt.data.shards import ShardWriter
from rrt.data.tokenizer import load_tokenizer
from rrt.errors import UserError
from rrt.model.config import LoraRanks, RecursiveConfig
from tests.util.processes import run_on
from tests.util.tokenizers import make_sentencepiece_tokenizer, training_texts
from tests.util.training import make_checkpoint, make_flags, to_flags, train
from train import early_exit, pretrain
from train.architecture import read_architecture
from train.command import Command
from train.estimate import LiveMemory, describe_hours, estimate_memory
from train.flops import training_flops_per_token
from train.recipe import DryRun, RunConfig, read_recipe
from train.trainer import Trainer

VOCAB, LENGTH = 8192, 256


def status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(field)


def memory_of_a_run(argv: list[str], command: Command[Any]) -> int:
    """Peak resident memory of a run's steps beyond what the process had before the model was made."""
    mmap_threshold = -3
    ctypes.CDLL("libc.so.6").mallopt(mmap_threshold, 65536)  # freed memory goes back at once
    build, loop = Trainer._build, Trainer._loop
    before = peak = 0

    def measured_build(self: Trainer) -> None:
        nonlocal before
        gc.collect()
        before = status_bytes("VmRSS")
        build(self)

    def measured_loop(self: Trainer) -> None:
        nonlocal peak
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        loop(self)
        peak = status_bytes("VmHWM")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_build", measured_build)
        patch.setattr(Trainer, "_loop", measured_loop)
        train(argv, command)
    return peak - before


def make_argv(tmp_path: Path, num_layers: int = 8, **overrides: Any) -> list[str]:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "hidden_act": "silu",
        "max_position_embeddings": LENGTH,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    values = {
        "model.config": tmp_path / "config.json",
        "model.tokenizer": tmp_path / "tokenizer",
        "model.num_loops": 2,
        "data.path": tmp_path / "data",
        "data.seq_len": LENGTH,
        "run.out": tmp_path / "run",
        "run.tokens": 4 * LENGTH * 2 * 2 * 2,
        "run.batch_tokens": 4 * LENGTH * 2 * 2,
        "run.micro_batch": 4,
        "run.dtype": "fp32",
        "run.device": "cpu",
    }
    return to_flags(values, **overrides)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    for name in ("data", "tokenizer"):
        (directory / name).mkdir()
    tokenizer = load_tokenizer(make_sentencepiece_tokenizer(directory / "tokenizer", "llama", 420))
    with ShardWriter(directory / "data", tokenizer) as writer:
        for text in training_texts() * 4:
            ids = tokenizer.encode_document(text)
            writer.append("train", ids, [len(ids)], [len(text.encode())])
        writer.finish({})
    return directory


def test_live_memory_follows_tensors_views_and_shrunken_storages() -> None:
    with LiveMemory() as memory:
        a = torch.zeros(1000)
        view = a[10:].view(-1)
        assert (memory.live, memory.peak) == (4000, 4000)
        b = a + view.sum()
        assert memory.live >= 8000
        del a
        assert memory.live >= 8000  # the view holds it
        del view
        assert memory.live == 4000
        b.untyped_storage().resize_(0)
        assert memory.live == 0
        b.untyped_storage().resize_(4000)
        assert memory.live == 4000
    assert memory.peak >= 8000
    size = memory.live
    torch.zeros(10)
    assert memory.live == size


def dry_run(argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("sys.argv", ["pretrain.py", *argv])
    pretrain.main()
    return capsys.readouterr().out


def test_a_dry_run_needs_neither_weights_nor_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_argv(tmp_path, num_layers=1)[:2]
    argv = [*model, "--data.seq_len", "64", "--run.tokens", "15000000000"]
    text = dry_run([*argv, "--dry-run", "4", "--mfu", "0.5", "--gpu", "A100"], capsys, monkeypatch)
    assert text.startswith("llama, 1 layers as 1 loop(s) of 1, LoRA rank 0, 8.06 M parameters (1.77 M in the block)")
    assert "train: 7,152 steps of 2.10 M tokens = 15.00 B; 4 process(es) x 1024 micro-batch(es) x 8 x 64" in text
    flops = training_flops_per_token(*read_architecture(model[1], "model.config"), 64)
    hours = 7152 * 2**21 * flops / (4 * 312e12 * 0.5) / 3600
    assert f"{hours:,.1f} hours on 4 x 312 TFLOP/s at 50% MFU" in text
    traced = "traced, without the libraries' own"
    assert f"{traced}:\n" in text
    compiled = dry_run([*argv, "--dry-run", "4", "--run.compile", "true"], capsys, monkeypatch)
    assert f"{traced} and as it is without run.compile:\n" in compiled
    with pytest.raises(UserError, match="--gpu: found 'K80', whose peak is not known"):
        dry_run([*argv, "--dry-run", "--gpu", "K80"], capsys, monkeypatch)
    with pytest.raises(UserError, match="--dry-run: found 0; expected a positive number of processes"):
        dry_run([*argv, "--dry-run", "0"], capsys, monkeypatch)
    with pytest.raises(UserError, match=r"field 'run.shard_size': found 3; expected a divisor of 8 process\(es\)"):
        dry_run([*argv, "--dry-run", "8", "--run.shard_size", "3"], capsys, monkeypatch)
    with pytest.raises(UserError, match=r"field 'model.config': missing; expected a config.json"):
        dry_run([*argv[2:], "--dry-run"], capsys, monkeypatch)
    assert not torch.distributed.is_initialized()


def test_hours_on_cpus_need_their_peak() -> None:
    run, dry_run = RunConfig(out="x", tokens=2**21, device="cpu"), DryRun(processes=2, mfu=0.5, gpu="H100")
    assert describe_hours(7.2e15, run, dry_run) == "for hours on CPUs give --run.peak_flops"
    known = replace(run, peak_flops=1e12)
    assert describe_hours(7.2e15, known, dry_run) == "2.0 hours on 2 x 1 TFLOP/s at 50% MFU"


def test_one_process_gathers_and_reduces_only_to_compute_in_another_dtype(tmp_path: Path) -> None:
    for settings in ({}, {"run__shard_size": 1}):
        plain, mixed = (
            estimate_memory(pretrain.COMMAND.make_training_spec(recipe), recipe, 1, "cpu")
            for recipe in (
                read_recipe(pretrain.COMMAND.recipe, "", make_argv(tmp_path, 2, run__dtype=dtype, **settings))
                for dtype in ("fp32", "bf16")
            )
        )
        assert plain.gathered == plain.accumulated == plain.reduced == 0
        assert mixed.gathered == mixed.parameters / 2 and mixed.accumulated > 0 and mixed.reduced > 0


def check_estimate(command: Command[Any], argv: list[str], small: list[str], count: int = 2) -> None:
    """Against processes that have pretrained by `small` before, so that the libraries have what they keep."""
    recipe = read_recipe(command.recipe, "", argv)
    estimate = estimate_memory(command.make_training_spec(recipe), recipe, count, "cpu")
    run_on(count, memory_of_a_run, small, pretrain.COMMAND)
    measured = max(run_on(count, memory_of_a_run, argv, command))
    print(f"estimated {estimate.peak / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB")
    assert measured == pytest.approx(estimate.peak, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"run__checkpointing": "layer"},
        {"run__wrap": "layer"},
        {"run__dtype": "bf16"},
        {"run__batch_tokens": 4 * LENGTH * 2, "model__num_loops": 1},
    ],
    ids=lambda settings: " ".join(f"{name}={value}" for name, value in settings.items()) or "default",
)
def test_the_estimate_is_within_15_percent_of_two_processes(
    settings: dict[str, Any], inputs: Path, tmp_path: Path
) -> None:
    small = make_argv(inputs, **{**settings, "model__num_layers": 2, "run__out": tmp_path / "small"})
    check_estimate(pretrain.COMMAND, make_argv(inputs, **settings, run__out=tmp_path / "run"), small)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_estimate_is_within_15_percent_of_one_process(dtype: str, inputs: Path, tmp_path: Path) -> None:
    settings = {"run__dtype": dtype}
    small = make_argv(inputs, **settings, model__num_layers=2, run__out=tmp_path / "small")
    check_estimate(pretrain.COMMAND, make_argv(inputs, **settings, run__out=tmp_path / "run"), small, count=1)


@pytest.mark.slow
@pytest.mark.parametrize("freeze", [False, True])
def test_the_estimate_holds_for_exits_of_a_relaxed_model_with_a_teacher(
    freeze: bool, inputs: Path, tmp_path: Path
) -> None:
    small = make_argv(inputs, model__num_layers=2, run__out=tmp_path / "small")
    shape = read_architecture(str(inputs / "config.json"), "model.config")[0]
    relaxed = RecursiveConfig(num_loops=2, lora_rank=LoraRanks.uniform(64))
    start = make_checkpoint(tmp_path / "relaxed", inputs / "tokenizer", shape, relaxed)
    argv = make_flags(start, inputs / "data")(
        tmp_path / "run",
        data__seq_len=LENGTH,
        run__tokens=4 * LENGTH * 2 * 2 * 2,
        run__batch_tokens=4 * LENGTH * 2 * 2,
        run__micro_batch=4,
        exits__distill="teacher",
        distill__teacher=make_checkpoint(tmp_path / "teacher", inputs / "tokenizer", shape, RecursiveConfig()),
        exits__head_lora_rank=64 if freeze else 0,
        exits__freeze=str(freeze).lower(),
    )
    check_estimate(early_exit.COMMAND, argv, small)
