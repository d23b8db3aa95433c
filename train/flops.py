"""FLOPs per token of training a looped model, and the peak FLOP/s of devices: the two sides of MFU.

MFU, model FLOPs utilisation, is tokens per second x FLOPs per token / peak FLOP/s of all devices. The FLOPs are those
that the method needs, with LoRA merged or apart as it is computed; activations that are recomputed to save memory do
not count.
"""

import re
from collections.abc import Collection
from dataclasses import replace

import torch

from rrt.model.config import ModelConfig, RecursiveConfig
from rrt.model.meta import first_loops
from rrt.model.sizes import model_sizes
from train.objective import Objective
from train.recipe import RunConfig

# Dense bf16 FLOP/s with fp32 accumulation, from the vendor's data sheets; keys are whole words of the device's name.
PEAK_FLOPS = {
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """Look up the peak dense bf16 FLOP/s of a GPU by its name; None for one that is not in the table."""
    return next((flops for part, flops in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", device_name)), None)


def training_flops_per_token(
    model: ModelConfig,
    recursion: RecursiveConfig,
    seq_len: int,
    *,
    merged_over: int | None = None,
    exits: Collection[int] | None = None,
    frozen: bool = False,
    teacher: tuple[ModelConfig, RecursiveConfig] | None = None,
) -> float:
    """Count the matrix-product FLOPs (2 per multiply-add) of one token's forward and backward pass.

    Counted are the shared block at every loop up to the last exit, causal attention to (seq_len + 1) / 2 positions, and
    the head with its LoRA and an exit's translator once per exit; the backward pass counts twice the forward. The
    embedding's look-up counts nothing.

    Args:
        merged_over: tokens of the micro-batch for which W + B A is formed once; None for LoRA as products of its own.
        exits: the loops after which the loss needs logits; by default the last.
        frozen: only the LoRA on the head and the translators have a backward pass, which goes through the head.
        teacher: the shape of the teacher, whose forward pass is added.
    """
    context = (seq_len + 1) // 2
    last = recursion.num_loops - 1
    exits = {last} if exits is None else exits
    run = first_loops(model, replace(recursion, exit_translators=False), max(exits) + 1, "the model")
    sizes = model_sizes(*run, torch.float32, context)
    if merged_over is None:
        forward = float(sizes.flops_per_token["plain"])
    else:
        forward = sizes.flops_per_token["merged"] + sizes.merge_flops / merged_over
    forward += (len(exits) - 1) * 2 * model.vocab_size * model.hidden_size
    rank = min(recursion.head_lora_rank, model.vocab_size, model.hidden_size)
    early = sum(loop != last for loop in exits)
    lora = early * 2 * rank * (model.vocab_size + model.hidden_size)
    translators = early * 2 * model.hidden_size**2 if recursion.exit_translators else 0
    forward += lora + translators
    backward = 2 * forward
    if frozen:
        backward = 2 * lora
        if translators:
            # By the head's inputs and the maps; not by the head, nor by the maps' inputs.
            backward += early * 2 * model.vocab_size * model.hidden_size + translators
    trained = forward + backward
    return trained + (model_sizes(*teacher, torch.float32, context).flops_per_token["plain"] if teacher else 0)


def run_flops_per_token(
    model: ModelConfig,
    recursion: RecursiveConfig,
    seq_len: int,
    run: RunConfig,
    objective: Objective,
    teacher: tuple[ModelConfig, RecursiveConfig] | None,
) -> float:
    """Count a run's `training_flops_per_token`; `run.lora = "auto"`, a choice by linear, counts as the cheaper form."""
    tokens, exits = run.micro_batch * seq_len, objective.exit_loops(recursion.num_loops)
    forms: dict[str, list[int | None]] = {"merged": [tokens], "plain": [None], "auto": [tokens, None]}
    return min(
        training_flops_per_token(
            model, recursion, seq_len, merged_over=form, exits=exits, frozen=objective.frozen, teacher=teacher
        )
        for form in forms[run.lora]
    )
