"""The chunked losses against whole logits, and early exits with and without distillation: python bench/losses.py

- head: loss and gradients of 2,048 tokens at a vocabulary of 256,000, chunked against F.cross_entropy of whole logits
- exits: two optimizer steps of a Llama of three loops with a loss at every exit; with distillation of every exit from
  a teacher against without. The teacher's weights are not counted.

Every measurement is a process of its own, variants in turn. Peaks are of resident memory, less that before the call
(head: with the inputs; exits: without a model). About 4 minutes on 2 cores.
"""

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

# Without this folder: its tabulate.py would take the place of a library that torch imports.
HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if path != str(HERE))]

from bench.output import add_json_flag, check_json_flag, save_result
from eval.tables import Table, format_seconds, print_tables
from rrt.checkpoint.presets import preset
from rrt.common.cli import CommandParser, human_bytes, run_command
from rrt.model.config import RecursiveConfig
from rrt.model.transformer import RecursiveTransformer
from train.distributed import processes, shard_model
from train.losses import ExitWeights, Head, exit_losses
from train.objective import early_exit_objective
from train.optimizer import make_optimizer
from train.recipe import DistillConfig, ExitsConfig, OptimConfig
from train.teacher import ShardedTeacher

TOKENS, SEQUENCE = 2048, 512
VARIANTS = {"head": ("chunked", "whole"), "exits": ("distilled", "plain")}


def read_memory_bytes(field: str) -> int:
    """Read VmRSS, the resident memory of this process, or VmHWM, its peak."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{field}:"))


def measure_head(variant: str, vocab: int, width: int) -> dict[str, float]:
    """Measure the peak memory of a first call, in bytes beyond the inputs, and the seconds of a second."""
    torch.manual_seed(0)
    hidden = torch.randn(TOKENS, width).requires_grad_()
    weight = (0.05 * torch.randn(vocab, width)).requires_grad_()
    targets = torch.randint(0, vocab, (TOKENS,))

    def call() -> float:
        hidden.grad = weight.grad = None
        began = time.perf_counter()
        if variant == "chunked":
            loss, _ = exit_losses([hidden], targets, Head(weight), [ExitWeights(1.0)])
        else:
            loss = F.cross_entropy(hidden @ weight.t(), targets)
        loss.backward()
        return time.perf_counter() - began

    before = read_memory_bytes("VmRSS")
    call()
    peak = read_memory_bytes("VmHWM") - before
    return {"peak_bytes": peak, "seconds": call()}


def measure_exits(variant: str, vocab: int, width: int) -> dict[str, float]:
    """Measure the peak bytes of two training steps, less the teacher's weights, and the seconds of the second."""
    sizes: dict[str, Any] = dict(vocab_size=vocab, hidden_size=width, intermediate_size=3 * width, num_layers=6)
    config = replace(preset("tinyllama-1.1b"), num_heads=8, num_kv_heads=2, head_dim=width // 8, **sizes)
    distill = DistillConfig(teacher="the model's base" if variant == "distilled" else None)
    objective = early_exit_objective(ExitsConfig(distill="teacher" if distill.teacher else "none"), distill, 3)
    with processes("cpu") as group:
        before = read_memory_bytes("VmRSS")
        model = RecursiveTransformer(config, RecursiveConfig(num_loops=3))
        model.init_weights(0)
        shard_model(model, group.mesh, None)
        teacher, teacher_bytes = None, 0
        if distill.teacher:
            base = RecursiveTransformer(config)
            base.init_weights(1)
            teacher, teacher_bytes = ShardedTeacher(base, group.mesh), sum(p.nbytes for p in base.parameters())
        losses, optimizer = objective.bind(model, teacher), make_optimizer(model, OptimConfig())
        tokens = torch.randint(0, vocab, (TOKENS // SEQUENCE, SEQUENCE + 1))
        seconds = 0.0
        for _ in range(2):
            began = time.perf_counter()
            losses(tokens[:, :-1], tokens[:, 1:])[0].backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - began
        return {"peak_bytes": read_memory_bytes("VmHWM") - before - teacher_bytes, "seconds": seconds}


def compare(
    measure: Callable[..., dict[str, float]], variants: tuple[str, str], sizes: list[int], rounds: int
) -> dict[str, Any]:
    """Measure both variants in turn; return the medians of each, and the ratios of the first's to the second's."""
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    context = multiprocessing.get_context("spawn")
    for index in range(rounds):
        for variant in variants if index % 2 else variants[::-1]:
            with context.Pool(1) as pool:
                found[variant].append(pool.apply(measure, (variant, *sizes)))
    medians: dict[str, Any] = {
        variant: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for variant, runs in found.items()
    }
    first, second = (medians[variant] for variant in variants)
    ratios = {key: first[key] / second[key] for key in first}
    return {"vocab": sizes[0], "width": sizes[1], "tokens": TOKENS, "rounds": rounds, **medians, "ratio": ratios}


def tables(result: dict[str, Any]) -> list[Table]:
    """Make a table for each case with the peak memory and time of both variants."""
    made = []
    for name, variants in VARIANTS.items():
        case = result[name]
        rows = [[v, human_bytes(case[v]["peak_bytes"]), format_seconds(case[v]["seconds"])] for v in variants]
        rows.append(["ratio", f"{case['ratio']['peak_bytes']:.3f}", f"{case['ratio']['seconds']:.2f}"])
        sizes = f"{case['tokens']} tokens, vocabulary {case['vocab']}, width {case['width']}, {case['rounds']} rounds"
        made.append(Table(f"{name}: {sizes}", ["variant", "peak memory", "time"], rows))
    return made


def main() -> None:
    parser = CommandParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", type=int, nargs=2, default=[256000, 128], metavar=("VOCAB", "WIDTH"))
    parser.add_argument("--exits", type=int, nargs=2, default=[32000, 512], metavar=("VOCAB", "WIDTH"))
    parser.add_argument("--rounds", type=int, default=3, help="of each variant (default 3)")
    add_json_flag(parser, "losses")
    arguments = parser.parse_args()
    check_json_flag(arguments.json)
    result = {
        "head": compare(measure_head, VARIANTS["head"], arguments.head, arguments.rounds),
        "exits": compare(measure_exits, VARIANTS["exits"], arguments.exits, arguments.rounds),
    }
    save_result(arguments.json, "losses", result)
    print_tables(tables(result))


if __name__ == "__main__":
    run_command(main)
