"""Training losses."""

import torch.nn.functional as F
from torch import Tensor


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token, computed in at least fp32.

    Args:
        logits: [batch, T, V], any floating dtype.
        targets: [batch, T] int64, the token that follows each position.
    """
    flat = logits.flatten(0, 1)
    return F.cross_entropy(flat if flat.dtype.itemsize >= 4 else flat.float(), targets.flatten())
