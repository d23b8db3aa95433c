"""AdamW and its learning-rate schedule."""

import math

import torch

from train.recipe import OptimConfig


def learning_rate(optim: OptimConfig, step: int, steps: int) -> float:
    """Return the learning rate of optimizer step `step` (from 0) of `steps`: linear warm-up, then a cosine."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    floor = optim.min_lr_ratio
    return optim.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: torch.nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """Make AdamW over the trained parameters; norms, biases and exit translators are not decayed.

    A translator that decays to 0 would ignore the state.
    """
    plain: list[torch.nn.Parameter] = []
    decayed: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_plain = "norm" in name or name.endswith("bias") or name.startswith("exit_translator_")
            (plain if is_plain else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
