"""Training losses of any number of exits without their logits in memory (arXiv 2410.20672, sections 2.3 and 2.4).

The forward computes logits, loss and gradient for one chunk of tokens after another and keeps only the gradients of
the hidden states and of the head, so that neither the student's logits nor a teacher's ever exist whole. Each chunk of
a teacher's logits serves all exits.

Dimensions: N tokens, D model width, V vocabulary, R rank of the head's LoRA, C tokens of one chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from rrt.ops.precision import device_type, matmul_dtype

IGNORED = -100
"""Target of a position without a loss."""

Divergence = Literal["forward_kl", "reverse_kl", "jsd", "tvd"]

CHUNK_BYTES = {"cuda": 2**30, "cpu": 2**26}
"""Memory for the matrices [C, V] of one chunk; a chunk of the fewest rows may take more."""
MIN_CHUNK = 512
"""Fewest rows of a chunk, whatever V is (0.5 GB in fp32 at 256,000): each chunk reads the head and adds to a gradient
of its size, which smaller chunks would do too often."""
MIN_CHUNK_COMPARED = 128
"""Fewest rows where distributions are compared, which takes several matrices [C, V] at a time."""


@dataclass(frozen=True)
class ExitWeights:
    """Weights of one exit's losses in the total."""

    cross_entropy: float = 0.0
    teacher: float = 0.0
    """Divergence from the teacher."""
    last_exit: float = 0.0
    """Divergence from the last exit, through which no gradient flows."""


@dataclass(frozen=True)
class Head:
    """The matrix from normalised hidden states to logits, with a LoRA for each exit that has one."""

    weight: Tensor
    """[V, D]"""
    lora_a: Tensor | None = None
    """[exits with a LoRA, R, D], for the first exits."""
    lora_b: Tensor | None = None
    """[exits with a LoRA, V, R]"""


@dataclass(frozen=True)
class Teacher:
    """A teacher's hidden states and head, into which no gradient flows."""

    hidden: Tensor
    """[N, D of the teacher], normalised."""
    weight: Tensor
    """[V, D of the teacher]"""


def exit_losses(
    exits: Sequence[Tensor],
    targets: Tensor,
    head: Head,
    weights: Sequence[ExitWeights],
    *,
    teacher: Teacher | None = None,
    divergence: Divergence = "forward_kl",
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum cross-entropy and divergences over the exits by their weights; each is a mean over the tokens that count.

    A divergence compares softmax(logits / temperature) and is multiplied by temperature squared, which keeps the size
    of its gradient. From each chunk's logits on, 16-bit inputs are computed in fp32, and fp64 in fp64.

    Args:
        exits: hidden states [N, D] of the exits after the final norm, the model's last exit last.
        targets: [N] int64, the token that follows each position, or `IGNORED`.
        weights: one for each exit.
        chunk: tokens per chunk; by default chosen for the device.

    Returns:
        The loss, a scalar of fp32 (fp64 for fp64 inputs), for one backward; and without gradient the unweighted
        means [exits, 3] fp64 in nats per token, by exit: cross-entropy, divergence from the teacher, from the last
        exit; 0 where the weights ask for none.
    """
    if len(weights) != len(exits) or weights[-1].last_exit:
        raise ValueError(f"weights: found {weights}; expected {len(exits)}, and the last exit not compared with itself")
    spec = _LossSpec(targets, tuple(weights), teacher, divergence, temperature, chunk)
    if (teacher is None) == spec.needs_teacher:
        raise ValueError("teacher: expected one if, and only if, some weight asks for it")
    if teacher is not None:
        dtype = matmul_dtype(teacher.weight)
        teacher = Teacher(teacher.hidden.detach().to(dtype), teacher.weight.detach().to(dtype))
    spec = replace(spec, teacher=teacher)
    apply: Any = _ExitLosses.apply
    loss, parts = apply(spec, head.weight, head.lora_a, head.lora_b, *exits)
    return loss, parts


def divergence_and_slope(kind: Divergence, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the divergence of the student's q from the teacher's p, both as log-probabilities [C, V].

    Returns:
        The values [C], and their gradient [C, V] by the logits (over the temperature) of which q is the softmax.
    """
    q, p = log_q.exp(), log_p.exp()
    if kind == "forward_kl":  # sum p log(p / q)
        return (log_p - log_q).mul_(p).sum(-1), q.sub_(p)
    # The others' derivatives by q, up to a constant, go through the softmax: q (slope - mean of the slope under q).
    if kind == "reverse_kl":  # sum q log(q / p)
        slope = log_q - log_p
        value = (q * slope).sum(-1)
    elif kind == "jsd":  # half the sum of the forward divergences of p and of q from their mean m
        log_m = torch.logaddexp(log_p, log_q).sub_(torch.log(torch.tensor(2.0, dtype=q.dtype)))
        slope = (log_q - log_m).mul_(0.5)
        value = (q * slope).sum(-1) + (log_p - log_m).mul_(p).sum(-1) / 2
    else:  # total variation: half the sum of |q - p|
        difference = q - p
        slope = difference.sign().mul_(0.5)
        value = difference.abs_().sum(-1) / 2
    mean = (q * slope).sum(-1, keepdim=True)
    return value, slope.sub_(mean).mul_(q)


@dataclass(frozen=True)
class _LossSpec:
    """The arguments of `exit_losses` that need no gradient."""

    targets: Tensor
    weights: tuple[ExitWeights, ...]
    teacher: Teacher | None
    divergence: Divergence
    temperature: float
    chunk: int | None

    @property
    def needs_teacher(self) -> bool:
        return any(weights.teacher for weights in self.weights)

    @property
    def needs_last_exit(self) -> bool:
        return any(weights.last_exit for weights in self.weights)

    def chunks(self, vocab: int, itemsize: int) -> list[slice]:
        """Cut the tokens into pieces of nearly equal size; `itemsize` in bytes, of the logits."""
        # Matrices [C, V] at one time, for any number of exits; one more where they are rounded to 16 bits.
        matrices, least = (8, MIN_CHUNK_COMPARED) if self.needs_teacher or self.needs_last_exit else (1, MIN_CHUNK)
        suitable = max(least, CHUNK_BYTES[device_type(self.targets)] // (vocab * itemsize * matrices))
        tokens = len(self.targets)
        pieces = max(1, -(-tokens // (self.chunk or suitable)))
        # The first is the largest: its buffer serves all.
        bounds = [-(-tokens * piece // pieces) for piece in range(pieces + 1)]
        return [slice(first, end) for first, end in pairwise(bounds)]

    def tempered_log_probs(self, logits: Tensor) -> Tensor:
        """Compute log-probabilities at the divergence's temperature."""
        return torch.log_softmax(logits / self.temperature, dim=-1)

    def teacher_log_probs(self, rows: slice, acc_dtype: torch.dtype) -> Tensor | None:
        """Compute the teacher's log-probabilities [C, V] of one chunk; None if no exit needs them."""
        if self.teacher is None or not self.needs_teacher:
            return None
        return self.tempered_log_probs(_product(self.teacher.hidden[rows], self.teacher.weight.t(), acc_dtype))

    def exit_loss(
        self, weights: ExitWeights, rows: slice, log_q: Tensor, tempered: Tensor, log_p: Sequence[Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """Compute one exit's losses of a chunk, [C, 3] as in `exit_losses`, and the slope [C, V] of their weighted sum.

        Args:
            log_q: the exit's log-probabilities [C, V]; overwritten.
            tempered: log-probabilities at the divergence's temperature; `log_q` itself where that is 1.
            log_p: those of the teacher and of the last exit, or None.
        """
        targets = self.targets[rows].clamp(min=0)[:, None]
        values = log_q.new_zeros(len(log_q), 3)
        values[:, 0] = -log_q.gather(1, targets)[:, 0]
        divergences = None
        for column, (weight, other) in enumerate(zip((weights.teacher, weights.last_exit), log_p, strict=True), 1):
            if weight and other is not None:
                value, slope = divergence_and_slope(self.divergence, other, tempered)
                values[:, column] = value * self.temperature**2
                slope.mul_(weight * self.temperature)
                divergences = slope if divergences is None else divergences.add_(slope)
        if weights.cross_entropy == 0 and divergences is not None:
            return values, divergences
        slope = log_q.exp_()
        slope.scatter_add_(1, targets, slope.new_full((), -1.0).expand_as(targets))
        if weights.cross_entropy != 1:
            slope.mul_(weights.cross_entropy)
        return values, slope if divergences is None else slope.add_(divergences)


class _HeadProducts:
    """Products of the head with chunks of hidden states, and the head's accumulated gradients."""

    def __init__(self, head: Head, acc_dtype: torch.dtype, needs_weight: bool, needs_lora: bool) -> None:
        self.acc_dtype = acc_dtype
        self.dtype = dtype = matmul_dtype(head.weight)
        self.weight = head.weight.to(dtype)
        self.lora = (
            None
            if head.lora_a is None or head.lora_b is None
            else [(a.to(dtype), b.to(dtype)) for a, b in zip(head.lora_a, head.lora_b, strict=True)]
        )

        def zeros(like: Tensor | None, needed: bool) -> Tensor | None:
            return None if like is None or not needed else torch.zeros_like(like, dtype=acc_dtype)

        self.weight_grad = zeros(head.weight, needs_weight)
        self.lora_a_grad = zeros(head.lora_a, needs_lora)
        self.lora_b_grad = zeros(head.lora_b, needs_lora)
        self._buffers: dict[torch.dtype, Tensor] = {}

    def logits(self, hidden: Tensor, index: int) -> Tensor:
        """Compute logits [C, V] in `acc_dtype` of exit `index` from its hidden [C, D]; valid until the next call."""
        if self.lora is None or index >= len(self.lora):
            return self._base_logits(hidden)
        lora_a, lora_b = self.lora[index]
        return self._base_logits(hidden).add_((hidden @ lora_a.t()) @ lora_b.t())

    def _base_logits(self, hidden: Tensor) -> Tensor:
        if hidden.dtype != self.acc_dtype and device_type(hidden) == "cuda":
            return _product(hidden, self.weight.t(), self.acc_dtype)
        logits = torch.mm(hidden, self.weight.t(), out=self._buffer(len(hidden), hidden.dtype))
        return self._in_buffer(logits, self.acc_dtype)

    def _in_buffer(self, matrix: Tensor, dtype: torch.dtype) -> Tensor:
        """Convert `matrix` [C, V] to `dtype`; valid until the next call for that dtype."""
        if matrix.dtype == dtype or device_type(matrix) == "cuda":
            return matrix.to(dtype)
        return self._buffer(len(matrix), dtype).copy_(matrix)

    def _buffer(self, rows: int, dtype: torch.dtype) -> Tensor:
        # Reused by all chunks: the system takes as long to give fresh memory of this size as the softmax does.
        if dtype not in self._buffers or len(self._buffers[dtype]) < rows:
            self._buffers[dtype] = self.weight.new_empty(rows, len(self.weight), dtype=dtype)
        return self._buffers[dtype][:rows]

    def backward(
        self, hidden: Tensor, slope: Tensor, row_weight: Tensor, index: int, needs_hidden: bool
    ) -> Tensor | None:
        """Add to the head's gradients and return the gradient [C, D] of `hidden`, if it is needed.

        Args:
            slope: gradient [C, V] by the logits, before it is multiplied by `row_weight`.
            row_weight: [C, 1] in `acc_dtype`, the weight of each token.
        """
        slope = self._in_buffer(slope, hidden.dtype)
        weighted = (hidden * row_weight).to(hidden.dtype)
        if self.weight_grad is not None:
            _add_product(self.weight_grad, slope.t(), weighted)
        hidden_grad = (slope @ self.weight).to(self.acc_dtype) if needs_hidden else None
        if self.lora is not None and index < len(self.lora):
            lora_a, lora_b = self.lora[index]
            inner_grad = slope @ lora_b
            if self.lora_a_grad is not None and self.lora_b_grad is not None:
                _add_product(self.lora_b_grad[index], slope.t(), weighted @ lora_a.t())
                _add_product(self.lora_a_grad[index], inner_grad.t(), weighted)
            if hidden_grad is not None:
                hidden_grad += inner_grad @ lora_a
        return None if hidden_grad is None else hidden_grad.mul_(row_weight)


def _product(a: Tensor, b: Tensor, acc_dtype: torch.dtype) -> Tensor:
    """Compute a b in `acc_dtype`; on CUDA the sums of 16-bit products are not rounded to 16 bits first."""
    if device_type(a) == "cuda" and a.dtype != acc_dtype:
        return torch.mm(a, b, out_dtype=acc_dtype)
    return (a @ b).to(acc_dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to `total`, in place."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif device_type(a) == "cuda":
        total.add_(_product(a, b, total.dtype))
    else:
        total.add_(a @ b)


class _ExitLosses(torch.autograd.Function):
    """Compute the gradients in the forward; the backward multiplies them by the gradient of the loss."""

    @staticmethod
    def forward(
        ctx: Any, spec: _LossSpec, weight: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, *exits: Tensor
    ) -> tuple[Tensor, Tensor]:
        acc_dtype = torch.promote_types(weight.dtype, torch.float32)
        _, needs_weight, needs_lora, _, *needs_exits = ctx.needs_input_grad
        head = _HeadProducts(Head(weight, lora_a, lora_b), acc_dtype, needs_weight, needs_lora)
        distills = spec.needs_teacher or spec.needs_last_exit
        needs_gradient = needs_weight or needs_lora or any(needs_exits)
        gradients = [
            torch.zeros_like(exit) if needed else None for exit, needed in zip(exits, needs_exits, strict=True)
        ]
        counts = (spec.targets != IGNORED).to(acc_dtype)
        row_weights = (counts / counts.sum().clamp(min=1))[:, None]
        parts = torch.zeros(len(exits), 3, dtype=torch.float64, device=weight.device)
        for rows in spec.chunks(len(weight), acc_dtype.itemsize):
            from_teacher, from_last = spec.teacher_log_probs(rows, acc_dtype), None
            # The last exit comes first: the others may be compared with it.
            for index in reversed(range(len(exits))):
                weights, is_reference = spec.weights[index], spec.needs_last_exit and index == len(exits) - 1
                if weights == ExitWeights() and not is_reference:
                    continue
                hidden = exits[index][rows].to(head.dtype)
                logits = head.logits(hidden, index)
                tempered = spec.tempered_log_probs(logits) if distills and spec.temperature != 1 else None
                log_q = torch.log_softmax(logits, dim=-1, out=logits)
                if is_reference:
                    from_last = log_q.clone() if tempered is None else tempered
                values, slope = spec.exit_loss(
                    weights, rows, log_q, log_q if tempered is None else tempered, (from_teacher, from_last)
                )
                parts[index] += (values * row_weights[rows]).sum(0, dtype=torch.float64)
                if needs_gradient and weights != ExitWeights():
                    gradient = gradients[index]
                    hidden_grad = head.backward(hidden, slope, row_weights[rows], index, gradient is not None)
                    if gradient is not None and hidden_grad is not None:
                        gradient[rows] = hidden_grad
        factors = torch.tensor([(w.cross_entropy, w.teacher, w.last_exit) for w in spec.weights], dtype=torch.float64)
        ctx.gradients = (head.weight_grad, head.lora_a_grad, head.lora_b_grad, *gradients)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (weight, lora_a, lora_b, *exits)]
        ctx.mark_non_differentiable(parts)
        return (factors.to(parts.device) * parts).sum().to(acc_dtype), parts

    @staticmethod
    def backward(ctx: Any, loss_grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # In place, so only once: this module exists to avoid a second matrix of the head's size.
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "the loss has one backward"
        scaled = (
            None if gradient is None else gradient.mul_(loss_grad).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return (None, *scaled)
