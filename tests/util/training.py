"""Shared parts of the training tests: a tiny relaxed model with its data, and ways to run the commands on it."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from rrt.checkpoint.format import CheckpointConfig, write_checkpoint
from rrt.checkpoint.presets import preset
from rrt.common.provenance import make_provenance
from rrt.data.shards import ShardWriter, open_shards
from rrt.data.tokenizer import load_tokenizer
from rrt.errors import UserError
from rrt.model.config import LoraRanks, ModelConfig, RecursiveConfig
from rrt.model.transformer import RecursiveTransformer
from tests.util.tokenizers import make_sentencepiece_tokenizer, training_texts
from train import uptrain
from train.checkpoints import step_directories
from train.command import Command
from train.data import Mixture, Windows
from train.distributed import AgreedError, processes, raise_everywhere
from train.recipe import read_recipe
from train.trainer import StepResult, Trainer

ROOT = Path(__file__).resolve().parents[2]
VOCAB, LENGTH, BATCH = 420, 32, 8
LLAMA = replace(
    preset("tinyllama-1.1b"),
    vocab_size=VOCAB,
    hidden_size=32,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=64,
    max_position_embeddings=64,
    tie_embeddings=True,
)
RELAXED = RecursiveConfig(num_loops=2, lora_rank=LoraRanks.uniform(3), untie_norms=True)


Flags = Callable[..., list[str]]


def make_data(directory: Path, tokenizer: Path) -> Path:
    """Shards of a little text in the existing `directory`."""
    loaded = load_tokenizer(tokenizer)
    with ShardWriter(directory, loaded) as writer:
        for text in training_texts():
            ids = loaded.encode_document(text)
            writer.append("train", ids, [len(ids)], [len(text.encode())])
        writer.finish({})
    return directory


def samples_of(data: Path) -> Mixture:
    """The samples that the runs train on."""
    return Mixture([Windows(open_shards(data, "train"), LENGTH, 0, 0)])


def make_checkpoint(
    directory: Path,
    tokenizer: Path,
    config: ModelConfig = LLAMA,
    recursion: RecursiveConfig = RELAXED,
    noise: float = 0.0,
) -> Path:
    """A random model; with noise every parameter is random, so that exits differ and all have a gradient."""
    model = RecursiveTransformer(config, recursion)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(5)
    with write_checkpoint(
        directory, CheckpointConfig(config, recursion, torch.float32), make_provenance("convert", None)
    ) as writer:
        for name, parameter in model.named_parameters():
            writer.add(name, parameter.detach() + noise * torch.randn(parameter.shape, generator=generator))
        load_tokenizer(tokenizer).save(writer.directory)
    return directory


def to_flags(values: dict[str, Any], **overrides: Any) -> list[str]:
    """The values as a command line; keywords with `__` for the dot override them."""
    values = values | {name.replace("__", "."): value for name, value in overrides.items()}
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def make_flags(checkpoint: Path, data: Path) -> Flags:
    """Make the function that gives the flags of a training of `steps` steps; overrides as in `to_flags`."""

    def make(out: Path, steps: int = 8, **overrides: Any) -> list[str]:
        values = {
            "checkpoint.path": checkpoint,
            "data.path": data,
            "data.seq_len": LENGTH,
            "optim.lr": 5e-3,
            "optim.warmup_steps": 2,
            "run.out": out,
            "run.tokens": steps * BATCH * LENGTH,
            "run.batch_tokens": BATCH * LENGTH,
            "run.micro_batch": 2,
            "run.dtype": "fp32",
            "run.device": "cpu",
        }
        return to_flags(values, **overrides)

    return make


def make_inputs(directory: Path, recursion: RecursiveConfig = RELAXED) -> Flags:
    """`make_flags` with a new relaxed model and data, `relaxed/` and `data/` in the existing `directory`."""
    tokenizer = make_sentencepiece_tokenizer(directory, "llama", VOCAB)
    (directory / "data").mkdir()
    checkpoint = make_checkpoint(directory / "relaxed", tokenizer, recursion=recursion)
    return make_flags(checkpoint, make_data(directory / "data", tokenizer))


def train(argv: list[str], command: Command[Any] = uptrain.COMMAND) -> Trainer:
    """Run the command in this process, or together with another one."""
    recipe = read_recipe(command.recipe, "", argv)
    with processes(recipe.run.device, recipe.run.shard_size) as group:
        trainer: Trainer = raise_everywhere(lambda: command.make_trainer(recipe, group))
        trainer.run()
        return trainer


def train_here(argv: list[str], command: Command[Any] = uptrain.COMMAND) -> None:
    """`train` for another process, to which the trainer cannot be returned."""
    train(argv, command)


def train_until(step: int, argv: list[str], command: Command[Any] = uptrain.COMMAND) -> None:
    """Train until `step` steps are taken, then end with an error."""
    with pytest.MonkeyPatch.context() as patch:
        whole = Trainer._train_step

        def take(self: Trainer, rate: float) -> StepResult:
            if self.step == step:
                raise AgreedError("interrupted here")
            return whole(self, rate)

        patch.setattr(Trainer, "_train_step", take)
        with pytest.raises(UserError, match="interrupted here"):
            train(argv, command)


def run_script(
    argv: list[str], processes: int = 0, script: str = "uptrain.py", **variables: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command_line(argv, processes, script), capture_output=True, text=True, timeout=200, env=script_env(**variables)
    )


def command_line(argv: list[str], processes: int, script: str = "uptrain.py") -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    return [sys.executable, *torchrun, str(ROOT / "train" / script), *argv]


def script_env(**variables: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **variables}


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    records = metrics(out)
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return [record["loss"] for record in records]


def steps_kept(out: Path) -> list[int]:
    return [step for step, _ in step_directories(out)]


def refuse_to_write(patch: pytest.MonkeyPatch, step: int) -> None:
    """Simulate a disk that is full when `step` is written."""
    write = FileSystemWriter.write_data

    def full_disk(self: FileSystemWriter, *arguments: Any) -> Any:
        if f"step-{step}" in str(self.path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, *arguments)

    patch.setattr(FileSystemWriter, "write_data", full_disk)
