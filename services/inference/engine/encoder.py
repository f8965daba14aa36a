"""Embeddings: the mean of the last hidden states of an input, added up over its chunks (tensors)."""

import torch


class Pools:
    """Running sums by sequence key. A chunk counts once, however often its step is repeated."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[int, torch.Tensor]] = {}  # tokens added, their float32 sum [width]

    def add(self, key: int, start: int, hidden: torch.Tensor) -> bool:
        """Add the states [n, width] of the tokens from position `start`. False: tokens before it are missing, nothing was added."""
        count, total = self._sums.get(key, (0, None)) if start else (0, None)
        if start + hidden.shape[0] <= count:
            return True  # repeated after a failed step
        if start != count:
            return False
        own = hidden.float().sum(0)
        self._sums[key] = count + hidden.shape[0], own if total is None else total + own
        return True

    def take(self, key: int) -> torch.Tensor:
        """The mean, float32 [width]; the sum stays until `forget`, so a repeated step answers the same."""
        count, total = self._sums[key]
        return total / count

    def forget(self, key: int) -> None:
        """Drop the key's sum. Unknown keys are ignored."""
        self._sums.pop(key, None)
