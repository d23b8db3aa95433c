"""The chunked losses against logits written out whole and differentiated by autograd."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from train import losses
from train.losses import IGNORED, Divergence, ExitWeights, Head, Teacher, divergence_and_slope, exit_losses

TOKENS, VOCAB, WIDTH, TEACHER_WIDTH, RANK = 23, 61, 12, 20, 3
KINDS: tuple[Divergence, ...] = ("forward_kl", "reverse_kl", "jsd", "tvd")
CASES = {
    "cross-entropy": (ExitWeights(1.0),),
    "teacher": (ExitWeights(0.25, teacher=0.75),),
    "teacher alone": (ExitWeights(teacher=1.0),),
    "two exits": (ExitWeights(0.3), ExitWeights(1.0)),
    "exits from the last": (ExitWeights(last_exit=0.1), ExitWeights(0.05, last_exit=0.2), ExitWeights(1.0)),
    "all at once": (ExitWeights(0.1, 0.2, 0.3), ExitWeights(0.4, 0.0, 0.5), ExitWeights(0.6, 0.7)),
    "last exit as reference only": (ExitWeights(0.4, last_exit=0.6), ExitWeights()),
}


def make_inputs(exits: int, dtype: torch.dtype, lora: bool, scale: float = 0.6) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(exits)

    def draw(*shape: int) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)

    targets = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    targets[[0, 7, TOKENS - 1]] = IGNORED
    return {
        "exits": [draw(TOKENS, WIDTH).requires_grad_() for _ in range(exits)],
        "targets": targets,
        "head": Head(
            draw(VOCAB, WIDTH).requires_grad_(),
            draw(exits - 1, RANK, WIDTH).requires_grad_() if lora else None,
            draw(exits - 1, VOCAB, RANK).requires_grad_() if lora else None,
        ),
        "teacher": Teacher(draw(TOKENS, TEACHER_WIDTH), draw(VOCAB, TEACHER_WIDTH)),
    }


def leaves(inputs: dict[str, Any]) -> list[Tensor]:
    head = inputs["head"]
    return [t for t in (*inputs["exits"], head.weight, head.lora_a, head.lora_b) if t is not None]


def naive_divergence(kind: Divergence, teacher_logits: Tensor, logits: Tensor) -> Tensor:
    p, q = teacher_logits.softmax(-1), logits.softmax(-1)
    if kind == "forward_kl":
        return F.kl_div(q.log(), p, reduction="none").sum(-1)
    if kind == "reverse_kl":
        return F.kl_div(p.log(), q, reduction="none").sum(-1)
    if kind == "jsd":
        middle = (p + q) / 2
        return (p * (p / middle).log() + q * (q / middle).log()).sum(-1) / 2
    return (p - q).abs().sum(-1) / 2


def naive_losses(
    exits: list[Tensor],
    targets: Tensor,
    head: Head,
    weights: tuple[ExitWeights, ...],
    teacher: Teacher,
    divergence: Divergence,
    temperature: float,
) -> Tensor:
    keep = targets != IGNORED
    logits = [exit @ head.weight.t() for exit in exits]
    if head.lora_a is not None and head.lora_b is not None:
        for place in range(len(head.lora_a)):
            logits[place] = exits[place] @ (head.weight + head.lora_b[place] @ head.lora_a[place]).t()
    references = (teacher.hidden @ teacher.weight.t(), logits[-1].detach())
    total = torch.zeros((), dtype=torch.float64)
    for z, w in zip(logits, weights, strict=True):
        total = total + w.cross_entropy * F.cross_entropy(z, targets, ignore_index=IGNORED)
        for weight, reference in zip((w.teacher, w.last_exit), references, strict=True):
            values = naive_divergence(divergence, reference[keep] / temperature, z[keep] / temperature)
            total = total + weight * temperature**2 * values.mean()
    return total


def chunked(inputs: dict[str, Any], weights: tuple[ExitWeights, ...], **options: Any) -> tuple[Tensor, Tensor]:
    teacher = inputs["teacher"] if any(w.teacher for w in weights) else None
    return exit_losses(inputs["exits"], inputs["targets"], inputs["head"], weights, teacher=teacher, **options)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_values_and_all_gradients_are_those_of_whole_logits(case: str, kind: Divergence, temperature: float) -> None:
    weights = CASES[case]
    for lora, chunk in itertools.product((False, True) if len(weights) > 1 else (False,), (1, 5, TOKENS, None)):
        inputs = make_inputs(len(weights), torch.float64, lora)
        expected = naive_losses(**inputs, weights=weights, divergence=kind, temperature=temperature)
        wanted = torch.autograd.grad(expected, leaves(inputs), allow_unused=True)
        loss, _ = chunked(inputs, weights, divergence=kind, temperature=temperature, chunk=chunk)
        found = torch.autograd.grad(loss, leaves(inputs))
        assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
        for gradient, reference in zip(found, wanted, strict=True):
            reference = torch.zeros_like(gradient) if reference is None else reference
            torch.testing.assert_close(gradient, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_fp32_is_as_exact_as_fp32_can_be(kind: Divergence) -> None:
    weights = CASES["all at once"]
    inputs, doubles = make_inputs(3, torch.float32, True), make_inputs(3, torch.float64, True)
    with torch.no_grad():
        for wide, narrow in zip(leaves(doubles), leaves(inputs), strict=True):
            wide.copy_(narrow)
    doubles["teacher"] = Teacher(inputs["teacher"].hidden.double(), inputs["teacher"].weight.double())
    expected = naive_losses(**doubles, weights=weights, divergence=kind, temperature=2.0)
    loss, _ = chunked(inputs, weights, divergence=kind, temperature=2.0, chunk=4)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    wanted = torch.autograd.grad(expected, leaves(doubles))
    for gradient, reference in zip(torch.autograd.grad(loss, leaves(inputs)), wanted, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=0, atol=1e-6 * max(1, reference.abs().max()))


def test_the_loss_is_the_mean_negative_log_probability_of_the_next_tokens() -> None:
    hidden, weight = torch.randn(6, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    targets = torch.tensor([0, 4, 2, 1, 1, 3])
    chosen = [(weight @ row).softmax(0)[target].log().item() for row, target in zip(hidden, targets, strict=True)]
    loss, parts = exit_losses([hidden], targets, Head(weight), [ExitWeights(1.0)])
    assert loss.item() == pytest.approx(-sum(chosen) / 6, abs=1e-14)
    assert parts[0, 0].item() == pytest.approx(-sum(chosen) / 6, abs=1e-14)


def test_16_bit_inputs_are_computed_with_in_fp32_from_the_logits_on() -> None:
    weights = CASES["all at once"]
    for dtype, tolerance in ((torch.bfloat16, 0.02), (torch.float16, 0.004)):
        inputs = make_inputs(3, dtype, True)
        doubles = {
            **inputs,
            "exits": [exit.detach().double().requires_grad_() for exit in inputs["exits"]],
            "head": Head(*(t.detach().double().requires_grad_() for t in leaves(inputs)[3:])),
            "teacher": Teacher(inputs["teacher"].hidden.double(), inputs["teacher"].weight.double()),
        }
        expected = naive_losses(**doubles, weights=weights, divergence="forward_kl", temperature=1.0)
        loss, _ = chunked(inputs, weights, chunk=6)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=tolerance / 4)
        wanted = torch.autograd.grad(expected, leaves(doubles))
        for gradient, reference in zip(torch.autograd.grad(loss, leaves(inputs)), wanted, strict=True):
            assert gradient.dtype == dtype
            error = (gradient.double() - reference).norm() / reference.norm()
            assert error < tolerance


def test_large_logits_neither_overflow_nor_vanish() -> None:
    inputs = make_inputs(2, torch.float32, False, scale=40.0)
    for kind in KINDS:
        loss, _ = chunked(inputs, (ExitWeights(0.5, 0.5, 0.5), ExitWeights(1.0)), divergence=kind)
        assert math.isfinite(loss.item())
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, leaves(inputs)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_is_positive_between_different_and_zero_between_equal_distributions(kind: Divergence) -> None:
    log_p, log_q = torch.randn(2, 8, 30, dtype=torch.float64).log_softmax(-1)
    values, _ = divergence_and_slope(kind, log_p, log_q)
    assert (values > 1e-3).all()
    values, slope = divergence_and_slope(kind, log_p, log_p.clone())
    assert values.abs().max() < 1e-14 and slope.abs().max() < 1e-14


def test_parts_are_the_unweighted_means_of_each_exit() -> None:
    inputs = make_inputs(3, torch.float64, False)
    _, parts = chunked(inputs, (ExitWeights(0.1, 0.2), ExitWeights(0.5, last_exit=0.7), ExitWeights(2.0)), chunk=4)
    assert not parts.requires_grad
    for place in range(3):
        alone = tuple(ExitWeights(float(place == other)) for other in range(3))
        assert parts[place, 0].item() == pytest.approx(chunked(inputs, alone)[0].item(), abs=1e-12)
    from_teacher, from_last = chunked(inputs, (ExitWeights(0, 1.0), ExitWeights(), ExitWeights()))[0], parts[1, 2]
    assert parts[0, 1].item() == pytest.approx(from_teacher.item(), abs=1e-12)
    assert from_last.item() == pytest.approx(
        chunked(inputs, (ExitWeights(), ExitWeights(last_exit=1.0), ExitWeights()))[0].item(), abs=1e-12
    )
    assert parts[0, 2] == parts[1, 1] == parts[2, 1] == parts[2, 2] == 0


def test_exits_that_are_distilled_from_the_last_give_it_no_gradient() -> None:
    inputs = make_inputs(2, torch.float64, False)
    loss, _ = chunked(inputs, CASES["last exit as reference only"])
    loss.backward()
    assert inputs["exits"][1].grad.abs().max() == 0
    assert inputs["exits"][0].grad.abs().max() > 0


def test_positions_that_are_ignored_change_nothing() -> None:
    inputs = make_inputs(1, torch.float64, False)
    keep = inputs["targets"] != IGNORED
    hidden, head = inputs["exits"][0], inputs["head"]
    loss, _ = chunked(inputs, CASES["teacher"], chunk=4)
    teacher = Teacher(inputs["teacher"].hidden[keep], inputs["teacher"].weight)
    shorter, _ = exit_losses([hidden[keep]], inputs["targets"][keep], head, CASES["teacher"], teacher=teacher)
    assert loss.item() == pytest.approx(shorter.item(), abs=1e-12)
    loss.backward()
    assert hidden.grad is not None and hidden.grad[~keep].abs().max() == 0
    nothing, _ = exit_losses([hidden], torch.full_like(inputs["targets"], IGNORED), head, CASES["cross-entropy"])
    assert nothing.item() == 0


def test_inputs_that_need_no_gradient_get_none() -> None:
    inputs = make_inputs(2, torch.float64, True)
    head = inputs["head"]
    head.weight.requires_grad_(False)
    for exit in inputs["exits"]:
        exit.requires_grad_(False)
    loss, _ = chunked(inputs, CASES["last exit as reference only"])
    loss.backward()
    assert head.weight.grad is None and inputs["exits"][0].grad is None
    assert head.lora_a.grad.abs().max() > 0 and head.lora_b.grad.abs().max() > 0
    with torch.no_grad():
        assert chunked(inputs, CASES["two exits"])[0].item() > 0


def test_the_gradient_of_the_loss_is_passed_on() -> None:
    inputs = make_inputs(1, torch.float64, False)
    (once,) = torch.autograd.grad(chunked(inputs, CASES["teacher"])[0], inputs["head"].weight)
    (thrice,) = torch.autograd.grad(chunked(inputs, CASES["teacher"])[0] * 3, inputs["head"].weight)
    torch.testing.assert_close(thrice, 3 * once, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("case", "rows"), [("two exits", 4), ("all at once", 3)])
def test_logits_never_exist_whole(case: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if (
                    isinstance(tensor, Tensor)
                    and VOCAB in tensor.shape
                    and not {WIDTH, TEACHER_WIDTH} & {*tensor.shape}
                ):
                    largest = max(largest, tensor.numel())
            return result

    monkeypatch.setattr(losses, "MIN_CHUNK", 4)
    monkeypatch.setattr(losses, "MIN_CHUNK_COMPARED", 3)
    monkeypatch.setitem(losses.CHUNK_BYTES, "cpu", 0)
    inputs = make_inputs(len(CASES[case]), torch.float64, False)
    with Watch():
        loss, _ = chunked(inputs, CASES[case], temperature=2.0)
        loss.backward()
    assert (rows - 1) * VOCAB < largest <= rows * VOCAB


def test_weights_that_make_no_sense_are_refused() -> None:
    inputs = make_inputs(2, torch.float64, False)
    with pytest.raises(ValueError, match="the last exit not compared with itself"):
        chunked(inputs, (ExitWeights(1.0), ExitWeights(last_exit=1.0)))
    with pytest.raises(ValueError, match="expected 2"):
        chunked(inputs, (ExitWeights(1.0),))
    with pytest.raises(ValueError, match="expected one if, and only if"):
        exit_losses(inputs["exits"], inputs["targets"], inputs["head"], [ExitWeights(1.0, teacher=1.0)] * 2)
