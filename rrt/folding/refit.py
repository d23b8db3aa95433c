"""Depth-by-depth refit of LoRAs: base and converted model side by side over the calibration text.

The shared weights are fixed. At each depth, in the order of the forward pass, a linear's LoRA becomes the reduced-rank
regression of what the base outputs there on what the converted model, its earlier depths refitted, feeds in: weighted
per token, and in the metric of the outputs' gradients, as the statistics of :mod:`rrt.folding.calibration` have it.
For the linears that write to the residual stream the target is the base's stream after them minus the converted one
before them, so that what the stream has drifted is paid back at every depth.

Of one linear the objective is ``sum of w_t ||y_t - (W' + B A) x_t||_G^2 + ridge ||B A - B_0 A_0||_G^2`` with the
LoRA B_0 A_0 from before, than which the new one is never worse; a ridge towards it rather than towards zero keeps what
the calibration text says nothing about. It counts as `PRIOR_TOKENS` tokens: a few with large gradients own the sums,
and without it the LoRAs learn the noise of those (SmolLM2-135M, two loops, rank 64, 16,384 tokens, held-out perplexity:
154 before the refit, 176 after one with a ridge of 0.001 of the inputs' mean square, 131 with 0.05).

Shapes: n rows of T tokens, D model width, N out and K in of a linear, R its rank.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from rrt.errors import UserError
from rrt.folding.calibration import (
    LinearStatistics,
    Record,
    TextPass,
    add_gram,
    fast_products,
    load_layer,
    recorded,
)
from rrt.folding.tying import RIDGE, Metric, fit_lora
from rrt.model.loop_linear import LoopLinear, merge_lora

PRIOR_TOKENS = 5000
"""Weight of the LoRA from before in the refit, as that of so many tokens whose inputs are of all directions alike."""

_PROJECTIONS = ("attn.q", "attn.k", "attn.v")
_EXPANSIONS = ("mlp.gate", "mlp.up")


@dataclass(frozen=True)
class AdaptedLinear:
    """A shared weight W' [N, K] with the LoRA A [R, K], B [N, R] of one depth, as they are stored; R may be 0."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor

    def merged(self) -> Tensor:
        """Return W' + B A, fp32."""
        return merge_lora(self.weight, self.lora_a, self.lora_b, torch.float32)

    def with_lora(self, lora_a: Tensor, lora_b: Tensor) -> "AdaptedLinear":
        """Return the same weight with another LoRA, rounded to the weight's dtype."""
        return AdaptedLinear(self.weight, lora_a.to(self.weight.dtype), lora_b.to(self.weight.dtype))


class Regression:
    """Least squares of targets y_t [N] on inputs x_t [K], each token weighted; sums over tokens, fp32."""

    def __init__(self) -> None:
        self.inputs: Tensor | None = None
        """Sum of w x x^T [K, K]."""
        self.products: Tensor | None = None
        """Sum of w y x^T [N, K]."""
        self.num_tokens = 0

    def add(self, inputs: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Add tokens: inputs [tokens, K], targets [tokens, N] and weights [tokens], fp32."""
        self.inputs = add_gram(self.inputs, inputs, weights)
        self.num_tokens += len(inputs)
        products = (targets * weights[:, None]).T @ inputs
        self.products = products if self.products is None else self.products.add_(products)

    def refit(self, linear: AdaptedLinear, outputs: Tensor | None) -> AdaptedLinear:
        """Refit the LoRA of `linear`; return it unchanged where the text has no better one.

        Args:
            outputs: G [N, N], None for the identity.
        """
        assert self.inputs is not None and self.products is not None
        rank = len(linear.lora_a)
        size = self.inputs.diagonal().mean().item()
        if rank == 0 or size == 0.0:
            return linear
        if not math.isfinite(size) or not self.products.isfinite().all():
            raise UserError(
                "refit: found NaN or infinity in what the converted model computes on the calibration text; expected "
                "finite values: choose another --dtype or --no-refit"
            )
        inputs, before = self.inputs.double() / size, _product(linear)
        products = self.products.double() / size - linear.weight.double() @ inputs
        identity = torch.eye(len(inputs), dtype=inputs.dtype, device=inputs.device)
        prior = PRIOR_TOKENS / self.num_tokens
        ridge = prior + RIDGE * (1.0 + prior)  # with that of the metric below
        factor = torch.linalg.cholesky(inputs + ridge * identity)
        best = torch.cholesky_solve((products + ridge * before).T, factor).T
        found = linear.with_lora(*fit_lora(best, rank, Metric(inputs + prior * identity, outputs)))

        def objective(candidate: AdaptedLinear) -> float:
            """Measure the weighted squared errors of the outputs, less those without a LoRA."""
            lora_a, lora_b = candidate.lora_a.double(), candidate.lora_b.double()
            weighted_b = lora_b if outputs is None else outputs.double() @ lora_b
            explained = 2.0 * weighted_b.T @ products @ lora_a.T
            return float(((weighted_b.T @ lora_b) * (lora_a @ inputs @ lora_a.T)).sum() - explained.trace())

        return found if objective(found) < objective(linear) else linear


def _product(linear: AdaptedLinear) -> Tensor:
    return linear.lora_b.double() @ linear.lora_a.double()


@dataclass
class ErrorSums:
    """Squared errors and squares of what the base computes, summed over tokens: all, and rows' first ones."""

    error: float = 0.0
    square: float = 0.0
    first_error: float = 0.0
    first_square: float = 0.0

    def add(self, found: Tensor, expected: Tensor) -> None:
        """Add a batch [rows, T, width]."""
        errors, squares = (found - expected).float().square().sum(2), expected.float().square().sum(2)
        self.error += errors.sum(dtype=torch.float64).item()
        self.square += squares.sum(dtype=torch.float64).item()
        self.first_error += errors[:, 0].sum(dtype=torch.float64).item()
        self.first_square += squares[:, 0].sum(dtype=torch.float64).item()

    @property
    def share(self) -> float:
        return self.error / self.square if self.square else 0.0

    @property
    def first_share(self) -> float:
        return self.first_error / self.first_square if self.first_square else 0.0


@dataclass(frozen=True)
class DepthErrors:
    """What the converted model loses at one depth: of each linear's outputs, and of the residual stream after it."""

    linears: dict[str, ErrorSums]
    stream: ErrorSums


class SideBySide:
    """Base and converted model on the same text, advanced depth by depth.

    Args:
        base, converted: residual streams [n, T, D] before the first depth to advance past, fp32.
    """

    def __init__(self, text: TextPass, base: Tensor, converted: Tensor) -> None:
        self.base, self.converted = base, converted
        self._text = text

    @torch.no_grad()
    def advance(
        self, depth: int, linears: dict[str, AdaptedLinear], statistics: dict[str, LinearStatistics] | None
    ) -> tuple[dict[str, AdaptedLinear], DepthErrors]:
        """Move both streams past `depth`; with `statistics` of it, refit its LoRAs on the way.

        Args:
            linears: all linears of the converted layer.

        Returns:
            the linears, refitted or as they were, and what they lose.
        """
        walk = _DepthWalk(self._text, depth, linears, (self.base, self.converted), statistics)
        walk.run()
        self.base, self.converted = walk.base.after, walk.converted.after
        stream = ErrorSums()
        for batch in self._text.batches():
            stream.add(self.converted[batch], self.base[batch])
        return walk.linears, DepthErrors(walk.errors, stream)


class _Side:
    """A layer of the base or the converted model, and its residual stream [n, T, D] within it.

    Attributes:
        middle, after: the stream after attention and after the feed-forward part.
    """

    def __init__(self, text: TextPass, depth: int, before: Tensor) -> None:
        self.layer, self.before = load_layer(text.source, depth, text.device), before
        self.middle, self.after = torch.empty_like(before), torch.empty_like(before)

    def attention_input(self, batch: slice) -> Tensor:
        return self.layer.attn_norm(self.before[batch])

    def feed_forward_input(self, batch: slice) -> Tensor:
        return self.layer.mlp_norm((self.before if self.layer.parallel_residual else self.middle)[batch])

    def linear(self, name: str) -> LoopLinear:
        return cast(LoopLinear, self.layer.get_submodule(name))


_Examples = dict[str, tuple[Tensor, Tensor]]
"""Inputs [rows, T, K] of linears of the converted layer, and the outputs [rows, T, N] that they should have."""


class _DepthWalk:
    """One depth of both models, walked from linear to linear."""

    def __init__(
        self,
        text: TextPass,
        depth: int,
        linears: dict[str, AdaptedLinear],
        streams: tuple[Tensor, Tensor],
        statistics: dict[str, LinearStatistics] | None,
    ) -> None:
        self.linears, self.errors = dict(linears), {name: ErrorSums() for name in linears}
        self.base, self.converted = (_Side(text, depth, stream) for stream in streams)
        self._text, self._statistics = text, statistics
        for name, linear in linears.items():
            self._set(name, linear)

    def run(self) -> None:
        """Fill the streams, LoRAs of the converted layer refitted on the way where there are statistics."""
        if self._statistics is not None:
            self._refit(self._projected)
        mixed = torch.empty(
            *self.base.before.shape[:2], self.base.linear("attn.out").in_features, device=self._text.device
        )
        self._refit(functools.partial(self._attended, mixed))
        self._each_batch(functools.partial(self._add_attention, mixed))
        del mixed
        if self._statistics is not None:
            self._refit(self._expanded)
        self._refit(self._contracted)
        self._each_batch(self._add_feed_forward)

    def _projected(self, batch: slice) -> _Examples:
        """Queries, keys and values."""
        inputs, expected = self.converted.attention_input(batch), self.base.attention_input(batch)
        return {name: (inputs, self.base.linear(name)(expected, 0)) for name in _PROJECTIONS}

    def _attended(self, mixed: Tensor, batch: slice) -> _Examples:
        """Attention's output, after its heads' results: those of the converted layer go to `mixed`."""
        base, converted = self.base, self.converted
        with recorded(base.layer) as expected, recorded(converted.layer) as found:
            attended = base.layer.attn(base.attention_input(batch), 0, self._text.context)
            mixed[batch] = converted.layer.attn.mix(converted.attention_input(batch), 0, self._text.context)
        self._add_errors(_PROJECTIONS, found, expected)
        base.middle[batch] = base.before[batch] + attended
        return {"attn.out": (mixed[batch], base.middle[batch] - converted.before[batch])}

    def _add_attention(self, mixed: Tensor, batch: slice) -> None:
        base, converted = self.base, self.converted
        attended = converted.linear("attn.out")(mixed[batch], 0)
        converted.middle[batch] = converted.before[batch] + attended
        self.errors["attn.out"].add(attended, base.middle[batch] - base.before[batch])

    def _expanded(self, batch: slice) -> _Examples:
        """The feed-forward part's wide linears."""
        inputs, expected = self.converted.feed_forward_input(batch), self.base.feed_forward_input(batch)
        return {name: (inputs, self.base.linear(name)(expected, 0)) for name in _EXPANSIONS if name in self.linears}

    def _contracted(self, batch: slice) -> _Examples:
        """The feed-forward part's output."""
        base, converted = self.base, self.converted
        with recorded(base.layer) as expected, recorded(converted.layer) as found:
            inner = converted.layer.mlp.inner(converted.feed_forward_input(batch), 0)
            base.after[batch] = base.middle[batch] + base.layer.mlp(base.feed_forward_input(batch), 0)
        self._add_errors(_EXPANSIONS, found, expected)
        return {"mlp.down": (inner, base.after[batch] - converted.middle[batch])}

    def _add_feed_forward(self, batch: slice) -> None:
        base, converted = self.base, self.converted
        output = converted.layer.mlp(converted.feed_forward_input(batch), 0)
        converted.after[batch] = converted.middle[batch] + output
        self.errors["mlp.down"].add(output, base.after[batch] - base.middle[batch])

    def _refit(self, examples: Callable[[slice], _Examples]) -> None:
        """Go through the text once, then refit the linears of `examples` if there are statistics."""
        regressions: dict[str, Regression] = {}
        for batch in self._text.batches():
            with fast_products(self._text.device):
                found = examples(batch)
            if self._statistics is None:
                continue
            for name, (inputs, targets) in found.items():
                bias = self.converted.linear(name).bias
                weights = self._statistics[name].token_weights.unflatten(0, (-1, self._text.length))[batch]
                regressions.setdefault(name, Regression()).add(
                    inputs.flatten(0, 1).float(),
                    (targets if bias is None else targets - bias).flatten(0, 1).float(),
                    weights.flatten(),
                )
        if self._statistics is not None:
            for name, regression in regressions.items():
                self._set(name, regression.refit(self.linears[name], self._statistics[name].metric.outputs))

    def _each_batch(self, action: Callable[[slice], None]) -> None:
        for batch in self._text.batches():
            with fast_products(self._text.device):
                action(batch)

    def _set(self, name: str, linear: AdaptedLinear) -> None:
        self.linears[name] = linear
        self.converted.linear(name).weight = nn.Parameter(linear.merged(), requires_grad=False)

    def _add_errors(self, names: Sequence[str], found: Record, expected: Record) -> None:
        for name in names:
            if name in found:
                self.errors[name].add(found[name][1], expected[name][1])
