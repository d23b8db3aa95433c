"""bench/training.py: the trainer and a step on models small enough for a test, and its flags."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import training, training_cases
from bench.timing import Timer
from rrt.errors import UserError

TINY_RUN = """
import dataclasses, itertools, json
from bench import trainer_cases, training_cases as cases
sizes = dict(vocab_size=1000, num_layers=1, hidden_size=64, num_heads=2, num_kv_heads=1, head_dim=32)
cases.SMALL_LLAMA = dataclasses.replace(cases.SMALL_LLAMA, intermediate_size=128, **sizes)
calls, make = [], cases.our_losses
def counting(*arguments):
    model, losses = make(*arguments)
    return model, lambda *batch: calls.append(1) or losses(*batch)
cases.our_losses = counting
sources = trainer_cases._read_sources
trainer_cases._read_sources = lambda: itertools.islice(sources(), 12)
record = trainer_cases.measure_trainer(steps=4, micro_batches=2).record()
print(json.dumps(record | {"bare_losses": len(calls)}))
"""


def test_the_trainer_is_timed_against_a_bare_loop_of_as_many_micro_batches():
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", TINY_RUN], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["micro_batches"], record["tokens"]) == (2, 2 * 4 * 512)
    assert record["bare_losses"] == 4 * 2
    assert record["rounds"] == 2  # the first step warms up, and the last one's time is never taken
    assert record["speedup"].keys() == {"bare loop"}


def test_a_step_is_timed_on_the_model_and_the_tokens_that_were_asked_for(monkeypatch):
    monkeypatch.setattr(training_cases, "compile_layers", lambda *_: None)  # takes seconds
    sizes = dict(vocab_size=50, num_layers=1, hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=16)
    config = replace(training_cases.SMALL_LLAMA, intermediate_size=48, **sizes)
    shapes = []
    make_batch = training_cases.make_batch
    monkeypatch.setattr(training_cases, "make_batch", lambda *shape: shapes.append(shape) or make_batch(*shape))
    timer = Timer(torch.device("cpu"), 0.0, 2)
    record = training_cases.measure_step(timer, config, torch.float32, (3, 8)).record()
    assert shapes == [(50, 3, 8)]
    assert record["tokens"] == 24 and set(record["seconds"]) == {"ours", "transformers", "ours, compiled"}
    assert record["rounds"] == 2 and "mfu" not in record


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--device cuda --only step trainer", "--device: found cuda, and other sections than step; expected a GPU"),
        ("--preset gemma-2b", "--preset: found gemma-2b, of family gemma; expected one of family llama"),
        ("--tokens 0 8", r"--tokens: found \[0, 8\]; expected positive numbers"),
    ],
)
def test_bad_flags_are_named(monkeypatch, flags, message):
    monkeypatch.setattr(sys, "argv", ["training.py", *flags.split()])
    with pytest.raises(UserError, match=message):
        training.parse_arguments()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible")
def test_without_a_gpu_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["training.py", "--device", "cuda", "--only", "step"])
    with pytest.raises(UserError, match="--device: found cuda, and no GPU is visible to torch"):
        training.parse_arguments()
