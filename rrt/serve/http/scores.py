"""Log-probabilities of a prompt's own tokens, all loops, without the engine and its cache.

Shapes: T tokens, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rrt.decode.sampling import TopTokens, top_tokens
from rrt.errors import UserError
from rrt.model.transformer import RecursiveTransformer

_ROWS = 64
"""Rows of logits held at once: each call reads the whole head, and 64 rows of a large vocabulary are 64 MiB."""


@dataclass(frozen=True)
class PromptScores:
    """Log-probabilities of a prompt's tokens after the first, which nothing predicts: T - 1 of each.

    Attributes:
        logprobs: of the tokens.
        top: the most probable tokens in the place of each.
        next_logits, next_top: [V], and the most probable tokens, of the token after the prompt.
    """

    logprobs: list[float]
    top: list[TopTokens]
    next_logits: Tensor
    next_top: TopTokens


@torch.inference_mode()
def score_prompt(model: RecursiveTransformer, tokens: Sequence[int], num_top: int) -> PromptScores:
    """Compute the log-probability (nats, fp32 or wider) of each token after those before it.

    Args:
        tokens: [T >= 1]
        num_top: how many of the most probable tokens to report in each place.

    Raises:
        UserError: a log-probability is NaN, or infinity.
    """
    device = model.embed.device
    hidden = model.hidden_states(torch.tensor([tokens], device=device))[-1][0]
    targets = torch.tensor([*tokens[1:], 0], device=device)
    logprobs: list[float] = []
    top: list[TopTokens] = []
    logits = hidden[:0]
    for states, wanted in zip(hidden.split(_ROWS), targets.split(_ROWS), strict=True):
        logits = model.logits(states)
        logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        found = logs.gather(1, wanted[:, None])[:, 0]
        if not found.isfinite().all():
            raise UserError(
                "logits: found NaN or infinity after a prompt's token; expected finite numbers: try --dtype float32 or "
                "bfloat16"
            )
        logprobs += found.tolist()
        top += top_tokens(logs, num_top)
    # A copy: a view would keep all rows of its chunk.
    return PromptScores(logprobs[:-1], top[:-1], logits[-1].clone(), top[-1])
