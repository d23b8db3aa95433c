"""bench/training.py's section of the trainer, on a model small enough for a test."""

import json
import subprocess
import sys
from pathlib import Path

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
