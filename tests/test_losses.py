import pytest
import torch

from train.losses import next_token_loss


def test_the_loss_is_the_mean_negative_log_probability_of_the_next_tokens() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 4, 2], [1, 1, 3]])
    chosen = [logits[b, t].softmax(-1)[targets[b, t]].log() for b in range(2) for t in range(3)]
    assert next_token_loss(logits, targets).item() == pytest.approx(-sum(chosen).item() / 6, abs=1e-14)


def test_the_loss_of_bf16_logits_is_computed_in_fp32() -> None:
    logits = torch.randn(4, 8, 1000, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    targets = torch.arange(32).reshape(4, 8)
    loss = next_token_loss(logits, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(next_token_loss(logits.double(), targets).item(), abs=1e-5)
    loss.backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


def test_double_precision_is_kept() -> None:
    assert next_token_loss(torch.zeros(1, 1, 3, dtype=torch.float64), torch.zeros(1, 1).long()).dtype == torch.float64
