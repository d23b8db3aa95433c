"""The choice of a token from logits: the most probable one, or a draw from a tempered and cut distribution.

Shapes: M rows, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch
from torch import Tensor

from rrt.common.dtypes import dtype_name
from rrt.errors import UserError

_FIRST_CANDIDATES = 256
TopTokens = tuple[tuple[int, float], ...]
"""The most probable tokens with their log-probabilities, the most probable first."""


def _is_temperature(value: float) -> bool:
    """Return True for 0 and for what logits can be divided by."""
    return value == 0 or 1e-6 <= value < math.inf


def is_whole(value: object) -> bool:
    return isinstance(value, Integral)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen for one sequence.

    Raises:
        UserError: a value out of its range.
    """

    temperature: float = 0.0
    """Divisor of the logits; 0 takes the most probable token."""
    top_k: int = 0
    """Draw from this many most probable tokens alone; 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest most probable tokens that have this probability together, after `top_k`."""
    seed: int = 0
    """A draw depends on the seed, the token's place and its logits alone."""

    def __post_init__(self) -> None:
        for name, value, fits, expected in (
            ("temperature", self.temperature, _is_temperature(self.temperature), "0, or 1e-6 or more"),
            ("top_k", self.top_k, is_whole(self.top_k) and self.top_k >= 0, "a whole number, 0 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "more than 0 and at most 1"),
            (
                "seed",
                self.seed,
                is_whole(self.seed) and 0 <= self.seed < 2**64,
                "a whole number below 2^64",
            ),
        ):
            if not fits:
                raise UserError(f"{name}: found {value}; expected {expected}")


GREEDY = Sampling()


def choose_tokens(logits: Tensor, samplings: Sequence[Sampling], steps: Sequence[int]) -> list[int]:
    """Choose a token for each row.

    Args:
        logits: [M, V].
        samplings: [M]
        steps: [M], the place of each token in its sequence. It numbers the draws of a seed, so that a row's token does
            not depend on the other rows, and the same step draws alike when it is computed again.

    Returns:
        [M] tokens. Of equal logits the first is the most probable.

    Raises:
        UserError: a logit is not finite, as where the model overflows in float16.
    """
    tokens = [0] * len(samplings)
    greedy = [i for i, sampling in enumerate(samplings) if sampling.temperature == 0]
    if greedy:
        rows = logits if len(greedy) == len(samplings) else logits[greedy]
        best, largest = most_probable(rows)
        check_finite(largest.tolist(), logits.dtype)
        for i, token in zip(greedy, best.tolist(), strict=True):
            tokens[i] = token
    for i, (sampling, step) in enumerate(zip(samplings, steps, strict=True)):
        if sampling.temperature > 0:
            tokens[i] = draw(logits[i], sampling, step)
    return tokens


def most_probable(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Find the largest logit of each row, the first of equals: logits [M, V] -> its index int64 [M], and itself [M].

    NaN counts as the largest.
    """
    if logits.device.type != "cpu":
        best = logits.argmax(-1)
        return best, logits.gather(1, best[:, None]).flatten()
    # In NumPy: PyTorch does not vectorise argmax on CPUs, and what calls cost counts where rows are few.
    values = (logits if logits.dtype == torch.float64 else logits.float()).detach().numpy()
    indices = values.argmax(1)
    return torch.from_numpy(indices), torch.from_numpy(values[np.arange(len(values)), indices])


def top_tokens(logprobs: Tensor, count: int) -> list[TopTokens]:
    """Return the most probable tokens of each row: log-probabilities [M, V] -> [M] of `count` pairs."""
    if count == 0:
        return [()] * len(logprobs)
    values, indices = logprobs.topk(min(count, logprobs.shape[1]))
    rows = zip(indices.tolist(), values.tolist(), strict=True)
    return [tuple(zip(tokens, row, strict=True)) for tokens, row in rows]


def check_finite(largest: Sequence[float], dtype: torch.dtype) -> None:
    """Check the largest logits of rows, which NaN spreads to.

    Raises:
        UserError: one is not finite, as where the model overflows in float16.
    """
    if not all(map(math.isfinite, largest)):
        raise UserError(not_finite(dtype))


def not_finite(dtype: torch.dtype) -> str:
    """Return the message about logits that are not finite."""
    found = f"logits: found NaN or infinity in {dtype_name(dtype)}"
    return f"{found}; expected finite numbers: try --dtype float32 or bfloat16"


def draw(logits: Tensor, sampling: Sampling, step: int) -> int:
    """Draw token number `step` of a sequence from logits [V], at a temperature above 0; see `choose_tokens`."""
    largest = logits.max()
    check_finite([float(largest)], logits.dtype)
    uniform = _uniform(sampling.seed, step)
    scaled = (logits.double() - largest.double()) / sampling.temperature
    # By the inverse of the distribution function.
    if sampling.top_k == 0 and sampling.top_p == 1:
        return _inverse(scaled.softmax(0).double().cumsum(0), uniform)
    total = scaled.exp().sum(dtype=torch.float64)
    # Cut at top_p, most rows end within few candidates: sorting all tokens would take longer than the model.
    count = sampling.top_k or _FIRST_CANDIDATES
    while True:
        count = min(count, len(scaled))
        values, indices = scaled.topk(count)
        cumulative = values.exp().double().cumsum(0)
        # After top_k, top_p is a share of the probability of what is left.
        target = sampling.top_p * (cumulative[-1] if sampling.top_k else total)
        if sampling.top_k or cumulative[-1] >= target or count == len(scaled):
            break
        count *= 8
    kept = min(int((cumulative < target).sum()) + 1, count)
    cumulative = cumulative[:kept]
    return int(indices[_inverse(cumulative / cumulative[-1], uniform)])


def _inverse(cumulative: Tensor, uniform: float) -> int:
    """Return the first index whose cumulative probability exceeds `uniform`."""
    # The last one is 1 but for rounding, and what lies beyond it has no probability.
    point = min(uniform * float(cumulative[-1]), math.nextafter(float(cumulative[-1]), 0))
    return int(torch.searchsorted(cumulative, point, right=True))


def _uniform(seed: int, step: int) -> float:
    """Return draw number `step` of a seed, in [0, 1)."""
    return float(np.random.Generator(np.random.Philox(key=seed, counter=[step, 0, 0, 0])).random())
