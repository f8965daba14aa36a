"""A classifier's head: a matrix of our own over the last token's state, outside the model, for any number of labels."""

import torch

__all__ = ["Head"]


class Head(torch.nn.Module):
    """logits = state W' + b; W [labels, width] and b [labels] in float32, zero at the start: every label is as likely."""

    def __init__(self, labels: int, width: int, device: torch.device) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(labels, width, device=device))
        self.bias = torch.nn.Parameter(torch.zeros(labels, device=device))
        # Norm of a base's states; the gradient of W is taken as if they had norm 1. Adam does not see the difference, but where
        # gradients are clipped together, an adapter's would vanish beside a head's that is a hundred times as large.
        self.scale = 1.0

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[n, width] → [n, labels]."""
        return torch.nn.functional.linear(states, self.weight, self.bias)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The parameters themselves, by the names of head.safetensors."""
        return {"bias": self.bias, "weight": self.weight}
