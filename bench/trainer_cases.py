"""The trainer's own cost: its steps against those of a bare loop."""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench import training_cases as cases
from bench.timing import Samples
from rrt.data.bpe import train_bpe
from rrt.data.shards import ShardWriter
from rrt.data.tokenizer import load_tokenizer
from rrt.model.config import RecursiveConfig
from rrt.model.transformer import RecursiveTransformer
from train.architecture import InitialModel
from train.distributed import processes
from train.recipe import DataConfig, GuardConfig, OptimConfig, RunConfig
from train.trainer import StepResult, Trainer


class _TimedTrainer(Trainer):
    """A trainer that runs a bare step of the same model between its own steps, and times both.

    Attributes:
        bare: the bare step.
        timed: seconds of both, without the first step, which warms up.
    """

    bare: Callable[[int], Tensor]

    def _train_step(self, rate: float) -> StepResult:
        now = time.perf_counter()
        if self.step == 0:
            self.timed: Samples = {"trainer": [], "bare loop": []}
        elif self.step > 1:  # the first is warm-up
            self.timed["trainer"].append(now - self._began)
        began = time.perf_counter()
        self.bare(0)
        if self.step > 0:
            self.timed["bare loop"].append(time.perf_counter() - began)
        self._began = time.perf_counter()
        return super()._train_step(rate)


def measure_trainer(steps: int, micro_batches: int) -> cases.Measured:
    """Measure the trainer's steps, with data, logging and metrics, against a bare loop: one process in fp32."""
    batch_tokens = micro_batches * 4 * 512
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        root = Path(directory)
        for name in ("tokenizer", "data"):
            (root / name).mkdir()
        train_bpe(_read_sources(), 1000, root / "tokenizer")
        tokenizer = load_tokenizer(root / "tokenizer")
        with ShardWriter(root / "data", tokenizer) as writer:
            for text in _read_sources():
                ids = tokenizer.encode_document(text)
                writer.append("train", ids, [len(ids)], [len(text.encode())])
            writer.finish({})
        start_model = RecursiveTransformer(cases.SMALL_LLAMA)
        start_model.init_weights()
        start = InitialModel(
            "bench", cases.SMALL_LLAMA, RecursiveConfig(), tokenizer, lambda: start_model.get_parameter, None
        )
        recipe = _Recipe(
            DataConfig(str(root / "data"), seq_len=512),
            OptimConfig(),
            RunConfig(
                str(root / "run"),
                tokens=steps * batch_tokens,
                batch_tokens=batch_tokens,
                micro_batch=4,
                dtype="fp32",
                log_every=1,
                save_every=0,
                device="cpu",
            ),
            GuardConfig(),
        )
        with processes("cpu") as group:
            trainer = _TimedTrainer(recipe, start, group)
            model, losses = cases.our_losses(cases.SMALL_LLAMA, torch.float32)
            trainer.bare = cases.optimizer_step(model, losses, cases.make_batch(1000, 4, 512), micro_batches)
            trainer.run()
    pairs = min(map(len, trainer.timed.values()))
    return cases.Measured(
        {"micro_batches": micro_batches, "tokens": batch_tokens, "dtype": "float32", "steps": steps},
        {name: values[:pairs] for name, values in trainer.timed.items()},
    )


@dataclass(frozen=True)
class _Recipe:
    data: DataConfig
    optim: OptimConfig
    run: RunConfig
    guard: GuardConfig


def _read_sources() -> Iterator[str]:
    """Yield the texts to train on: this project's own Python files."""
    root = Path(__file__).resolve().parents[1]
    for folder in ("rrt", "train", "eval", "bench"):
        for path in sorted((root / folder).rglob("*.py")):
            yield path.read_text(encoding="utf-8")
