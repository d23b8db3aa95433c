"""Bounds of rounding errors by dtype, number of terms and magnitudes, so that tolerances hold on any CPU.

A sum's order, and with it its error, depends on the instruction set, the library and the number of threads. A bound
may therefore count roundings, but not quote what one machine erred.
"""

from math import sqrt

import torch
from torch import Tensor


def unit_roundoff(dtype: torch.dtype) -> float:
    """Largest relative error of one rounding to nearest."""
    return torch.finfo(dtype).eps / 2


def sum_error(dtype: torch.dtype, terms: int) -> float:
    """Error of a sum of `terms` products in the dtype that `dtype` accumulates in, relative to its terms' magnitudes.

    In any order it is about sqrt(terms) roundings (Higham and Mary, "A new approach to probabilistic rounding error
    analysis", 2019), of which this is twice; the worst case would be `terms` of them.
    """
    return 2 * sqrt(max(terms, 1)) * unit_roundoff(torch.promote_types(dtype, torch.float32))


def weight_error(dtype: torch.dtype, q: Tensor, k: Tensor, scale: float) -> float:
    """Relative error of softmax weights, for q [..., Q, D] and k [..., K, D], by the error of their scores.

    A score's absolute error becomes its exponential's relative one, and again that of the sum that divides it.
    """
    if not q.numel() or not k.numel():
        return 0.0
    largest = float((q.abs() @ k.abs().mT).max()) * abs(scale)
    return 2 * sum_error(dtype, q.shape[-1]) * largest


def attention_error(dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, p: Tensor, scale: float) -> Tensor:
    """Bound of each element of the attention ``p v``, p [..., Q, K] being the softmax of the scores of q and k.

    The result is rounded to `dtype`, and weights may be before they multiply the values: roundings that are
    independent of each other, and therefore add up by their squares.
    """
    wide = weight_error(dtype, q, k, scale) + sum_error(dtype, k.shape[-2])
    independent = (p.square() @ v.square()).sqrt()
    return wide * (p @ v.abs()) + 2 * unit_roundoff(dtype) * ((p @ v).abs() + independent)
