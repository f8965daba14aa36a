import pytest
import torch

from services.finetune.trainer.loss import supervised_loss


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("count", [1, 128, 300])  # less than a piece, one, several
def test_loss_and_gradients_are_those_of_cross_entropy_over_all_logits(count, softcap):
    torch.manual_seed(0)
    hidden, weight = torch.randn(count, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(50, (count,))
    logits = hidden @ weight.T
    capped = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    expected = torch.nn.functional.cross_entropy(capped, targets, reduction="sum")
    wanted = torch.autograd.grad(expected / count, (hidden, weight))
    found = supervised_loss(hidden, weight, targets, softcap)
    assert torch.allclose(found, expected, rtol=1e-5)
    gradients = torch.autograd.grad(found / count, (hidden, weight))
    for gradient, other in zip(gradients, wanted, strict=True):
        assert torch.allclose(gradient, other, rtol=1e-4, atol=1e-6)


def test_a_frozen_output_matrix_gets_no_gradient():
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(9, 8)
    supervised_loss(hidden, weight, torch.tensor([0, 1, 2, 3])).backward()
    assert weight.grad is None and hidden.grad.abs().sum() > 0
