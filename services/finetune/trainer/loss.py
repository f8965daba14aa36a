"""Cross-entropy at supervised positions alone: the output matrix meets no other position, and its logits are never kept."""

from typing import Any

import torch

from services.finetune.trainer.products import linear

__all__ = ["supervised_loss", "token_losses"]

_ROWS = 128  # logits held at once: 128 rows of 262,144 in float32 are 134 MB


class _Loss(torch.autograd.Function):
    """Gradients are made in the forward pass, while the logits of a piece are at hand; backward only scales them."""

    @staticmethod
    def forward(
        context: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None, weights: torch.Tensor | None
    ) -> torch.Tensor:
        grad_hidden = torch.empty_like(hidden) if context.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if context.needs_input_grad[1] else None
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for at in range(0, hidden.shape[0], _ROWS):
            rows, wanted = hidden[at : at + _ROWS], targets[at : at + _ROWS, None]
            logits = linear(rows.to(weight.dtype), weight).float()
            if softcap is not None:
                logits = torch.tanh(logits.div_(softcap)).mul_(softcap)
            capped = logits.div(softcap).square_() if softcap is not None else None
            chosen = logits.gather(1, wanted)
            top = logits.amax(1, keepdim=True)
            logits.sub_(top).exp_()
            mass = logits.sum(1, keepdim=True)
            losses = mass.log() + top - chosen
            weighed = None if weights is None else weights[at : at + _ROWS, None].to(losses.dtype)
            total += (losses if weighed is None else losses * weighed).sum(dtype=torch.float64)
            if grad_hidden is None and grad_weight is None:
                continue
            logits.div_(mass)
            logits.scatter_add_(1, wanted, torch.full_like(chosen, -1.0))
            if capped is not None:
                logits.mul_(1.0 - capped)
            if weighed is not None:
                logits.mul_(weighed)
            narrow = logits.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[at : at + _ROWS] = linear(narrow, weight.T)
            if grad_weight is not None:
                grad_weight += (narrow.T @ rows.to(weight.dtype)).float()
        context.grads = grad_hidden, grad_weight
        return total.to(torch.float32)

    @staticmethod
    def backward(context: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        hidden, weight = context.grads
        context.grads = None, None
        return None if hidden is None else hidden.mul_(grad), None if weight is None else weight.mul_(grad), None, None, None


def supervised_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sum over rows of the negative log-likelihood, in nats, each times its weight.

    hidden [n, width], output matrix [vocabulary, width], targets [n], weights [n] or None for 1 each.

    A bfloat16 matrix rounds the logits, too, which training averages out; what is reported as quality is measured in float32.
    """
    loss: torch.Tensor = _Loss.apply(hidden, weight, targets, softcap, weights)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def token_losses(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, softcap: float | None = None) -> torch.Tensor:
    """The negative log-likelihood of each row, in nats, without a gradient: [n]."""
    found = hidden.new_empty(hidden.shape[0])
    for at in range(0, hidden.shape[0], _ROWS):
        logits = linear(hidden[at : at + _ROWS].to(weight.dtype), weight).float()
        if softcap is not None:
            logits = torch.tanh(logits.div_(softcap)).mul_(softcap)
        found[at : at + _ROWS] = torch.nn.functional.cross_entropy(logits, targets[at : at + _ROWS], reduction="none")
    return found
