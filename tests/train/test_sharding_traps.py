"""Traps of FSDP2 that are silent or have an obscure message, which our wrapping avoids.

For a silent trap the test first triggers it, to show that it would be noticed.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

import rrt.model.transformer
from tests.util.processes import run_on
from tests.util.sharding import backward, batch, build, build_sharded, next_token_loss, whole
from train.distributed import Wrap, processes

NAME = "relaxed, three loops"
WRAPS = pytest.mark.parametrize("wrap", ["stack", "layer"])


def losses_while_training(wrap: Wrap, keep_gathered: bool) -> list[float]:
    """This process's losses over four steps of two micro-batches."""
    with processes("cpu") as group:
        model = build_sharded(NAME, group.mesh, None, wrap)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        losses = []
        for _ in range(4):
            with pytest.MonkeyPatch.context() as patch:
                if keep_gathered:
                    patch.setattr(FSDPModule, "set_reshard_after_backward", lambda *_: None)
                    for unit in (model.stack, *model.stack.layers, model):
                        if isinstance(unit, FSDPModule):
                            for param_group in unit._get_fsdp_state()._fsdp_param_groups:
                                param_group.reshard_after_backward = False
                losses.append(backward(model, group, accumulation=2))
            optimizer.step()
            optimizer.zero_grad()
        return losses


def losses_of_one_process() -> list[float]:
    model = build(NAME)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    inputs, targets = batch()
    losses = []
    for _ in range(4):
        loss = next_token_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@WRAPS
def test_every_step_computes_with_the_weights_of_the_step_before(wrap: Wrap) -> None:
    expected = losses_of_one_process()
    stale, found = (
        [sum(pair) / 2 for pair in zip(*run_on(2, losses_while_training, wrap, keep_gathered), strict=True)]
        for keep_gathered in (True, False)
    )
    assert stale[0] == pytest.approx(expected[0], abs=1e-12)
    assert stale[1:] == pytest.approx([stale[0]] * 3, abs=1e-12)  # trains on, on the weights of the first step
    assert abs(expected[1] - expected[0]) > 1e-3
    assert found == pytest.approx(expected, abs=1e-10)


def gradients_with(checkpoint_options: dict[str, Any]) -> dict[str, Tensor]:
    """The gradients that an optimizer would find."""
    with processes("cpu") as group, pytest.MonkeyPatch.context() as patch:
        original = rrt.model.transformer.checkpoint
        patch.setattr(
            rrt.model.transformer,
            "checkpoint",
            lambda *args, **options: original(*args, **{**options, **checkpoint_options}),
        )
        model = build_sharded(NAME, group.mesh, None, "layer", "layer")
        parameters = dict(model.named_parameters())
        backward(model, group, accumulation=1)
        return {name: whole(parameter.grad) for name, parameter in parameters.items() if parameter.grad is not None}


def test_checkpointing_loses_no_gradient() -> None:
    names = dict(build(NAME).named_parameters()).keys()
    lost = names - run_on(2, gradients_with, {"use_reentrant": True})[0].keys()
    assert lost == {name for name in names if name.startswith("stack.")}
    assert run_on(2, gradients_with, {})[0].keys() == names


def call_head_alone() -> str:
    with processes("cpu") as group:
        model = build_sharded("recursive", group.mesh, None)
        hidden = torch.zeros(1, 16, dtype=torch.float64)
        with pytest.raises(RuntimeError) as caught:
            model.logits(hidden)
        return str(caught.value)


def test_the_head_outside_forward_is_an_error() -> None:
    message, _ = run_on(2, call_head_alone)
    assert "mixed torch.Tensor and DTensor" in message


class Tied(nn.Module):
    """Embedding and head as modules of their own that share a weight, which our model does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.head(self.embed(tokens))
        return output


def tied_units() -> tuple[str, list[str]]:
    """Torch's error for tied weights in two units, and those of our parameters that only the root unit has."""
    with processes("cpu") as group:
        tied = Tied()
        for module in (tied.embed, tied.head, tied):
            fully_shard(module, mesh=group.mesh)
        with pytest.raises(ValueError) as caught:
            tied(torch.zeros(1, 2, dtype=torch.long))
        model = build_sharded("recursive", group.mesh, None, "layer")
        in_units = {
            id(parameter)
            for module in model.modules()
            if isinstance(module, FSDPModule) and module is not model
            for parameter in module.parameters()
        }
        return str(caught.value), [name for name, value in model.named_parameters() if id(value) not in in_units]


def test_a_tied_head_is_in_the_unit_of_its_embedding() -> None:
    (message, in_root), _ = run_on(2, tied_units)
    assert "shared with a parameter already managed by another FSDP group" in message
    assert in_root == ["embed", "norm.weight"]


def gradients_with_own_loops(wrap: Wrap) -> dict[str, Tensor]:
    """Of rank 0 exiting after the first loop and rank 1 after the third."""
    with processes("cpu") as group:
        model = build_sharded(NAME, group.mesh, None, wrap)
        inputs, targets = (part.chunk(2)[group.rank] for part in batch())
        next_token_loss(model(inputs, exit_loop=2 * group.rank), targets).backward()
        return {name: whole(parameter.grad) for name, parameter in model.named_parameters()}


@WRAPS
def test_processes_that_run_different_numbers_of_loops_neither_hang_nor_err(wrap: Wrap) -> None:
    model = build(NAME)
    for rank in range(2):
        inputs, targets = (part.chunk(2)[rank] for part in batch())
        (next_token_loss(model(inputs, exit_loop=2 * rank), targets) / 2).backward()
    gradients, _ = run_on(2, gradients_with_own_loops, wrap)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=1e-12)
