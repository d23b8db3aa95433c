"""Thresholds of confidence for early exits, and their agreement with full depth; functions of recordings.

A token exits after the first loop whose confidence is at least that loop's threshold, else after the last.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from eval.trajectories import Trajectories
from rrt.checkpoint.exit_thresholds import Calibration

BINS = 20


def reliability(found: Trajectories, loop: int) -> list[dict[str, float]]:
    """Measure how `loop` agrees with the last loop by its confidence, in bins of equal width, without empty ones."""
    confidence = found.confidence[loop]
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    sums = [np.bincount(bins, weights=values, minlength=BINS) for values in (confidence, found.top_tokens_agree[loop])]
    return [
        {"tokens": int(count), "confidence": mean_confidence / count, "agreement": agreement / count}
        for count, mean_confidence, agreement in zip(counts, *sums, strict=True)
        if count
    ]


def choose_exits(found: Trajectories, thresholds: Sequence[float | None]) -> npt.NDArray[np.int64]:
    """Return the loop [N] after which each token exits at these thresholds; a threshold of None lets none exit."""
    exits = np.full(found.num_tokens, found.num_loops - 1)
    for loop in reversed(range(found.num_loops - 1)):
        threshold = thresholds[loop]
        if threshold is not None:
            # Compared in fp32, in which confidence is recorded.
            exits[found.confidence[loop] >= np.float32(threshold)] = loop
    return exits


def evaluate_thresholds(found: Trajectories, thresholds: Sequence[float | None]) -> dict[str, Any]:
    """Evaluate exits at these thresholds: shares of tokens, loops per token, loss in nats per token.

    `agreement` is over all tokens, `early_agreement` over those that exit early (None if there are none).
    """
    exits = choose_exits(found, thresholds)
    tokens = np.arange(found.num_tokens)
    agree = found.top_tokens_agree[exits, tokens]
    early = exits < found.num_loops - 1
    return {
        "early": float(early.mean()),
        "agreement": float(agree.mean()),
        "early_agreement": float(agree[early].mean()) if early.any() else None,
        "mean_loops": float(exits.mean()) + 1,
        "loss": float(found.loss[exits, tokens].mean(dtype=np.float64)),
    }


def threshold_curve(found: Trajectories, thresholds: Sequence[float]) -> list[dict[str, Any]]:
    """Evaluate each of `thresholds` as the one threshold of all loops."""
    curve = []
    for threshold in thresholds:
        row = evaluate_thresholds(found, [threshold] * (found.num_loops - 1))
        curve.append({"threshold": threshold, **row, "perplexity": float(np.exp(row["loss"]))})
    return curve


def fit_thresholds(found: Trajectories, agreement: float) -> tuple[float | None, ...]:
    """Find, for each loop before the last, the lowest threshold whose exits reach this agreement with the last loop.

    A later loop counts only the tokens that have not exited before. None where no threshold reaches `agreement`.
    """
    thresholds: list[float | None] = []
    left = np.ones(found.num_tokens, dtype=bool)
    for loop in range(found.num_loops - 1):
        confidence, agree = found.confidence[loop][left], found.top_tokens_agree[loop][left]
        order = np.argsort(-confidence, kind="stable")
        ranked = confidence[order]
        shares = np.cumsum(agree[order]) / np.arange(1, len(order) + 1)
        # Tokens of equal confidence exit together, so a threshold lies at the last of them.
        is_border = np.append(ranked[1:] != ranked[:-1], True)[: len(ranked)]
        reached = np.flatnonzero((shares >= agreement) & is_border)
        threshold = float(ranked[reached[-1]]) if len(reached) else None
        thresholds.append(threshold)
        if threshold is not None:
            left &= found.confidence[loop] < np.float32(threshold)
    return tuple(thresholds)


def calibrate(fit: Trajectories, held_back: Trajectories, agreement: float) -> Calibration:
    """Fit thresholds on some samples and measure them on others."""
    thresholds = fit_thresholds(fit, agreement)
    measured = evaluate_thresholds(held_back, thresholds)
    return Calibration(agreement, thresholds, measured["early_agreement"], measured["mean_loops"])
