"""A forward pass over paged KV: the seam between `runner.py` and the ways to compute a model (tensors)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(slots=True)
class Batch:
    """All tokens of a step in one packed row. T tokens of B sequences, M = longest block table, S selected rows.

    `rows[b]:rows[b+1]` are sequence b's tokens; `lengths[b]` counts its tokens with this step's, so its queries start at
    `lengths[b] - (rows[b+1] - rows[b])`. A token's KV goes to slot `block * BLOCK_SIZE + offset`.
    """

    tokens: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    rows: torch.Tensor  # int32 [B + 1]
    lengths: torch.Tensor  # int32 [B]
    tables: torch.Tensor  # int32 [B, M]
    slots: torch.Tensor  # int64 [T]
    select: torch.Tensor  # int64 [S]: rows whose hidden state is wanted, in order
    adapters: torch.Tensor | None = None  # int32 [T]: slot of each token's adapter, 0: the base alone; None: all of them


@dataclass(frozen=True, slots=True)
class Factors:
    """What an adapter adds to one linear layer: gain * (W x + up (down x)). Float32; the scaling is in `up`."""

    down: torch.Tensor  # [rank, inputs]
    up: torch.Tensor  # [outputs, rank]
    gain: torch.Tensor | None = None  # [outputs], of a DoRA


@dataclass(frozen=True, slots=True)
class Head:
    """Labels from a pooled state."""

    weight: torch.Tensor  # float32 [labels, width]
    bias: torch.Tensor  # float32 [labels]


@dataclass(frozen=True, slots=True)
class Weights:
    """An adapter's tensors, checked."""

    rank: int  # the largest of its layers
    factors: Mapping[str, Factors]  # by the linear layer's path in the causal model
    head: Head | None = None


class Backend(Protocol):
    """One model on one device, with its KV pool."""

    name: str  # "eager" or "fused"
    vocabulary: int
    context: int  # tokens
    width: int  # of a hidden state
    blocks: int
    device: torch.device
    slots: int  # adapters in one step
    targets: Mapping[str, tuple[int, int]]  # (outputs, inputs) of each linear layer that an adapter may change, by its path

    def forward(self, batch: Batch) -> torch.Tensor:
        """Write the KV of every token and return the final, normalised hidden states [S, width] of the selected rows."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Exact logits [S, vocabulary], float32, after any soft-capping."""
        ...

    def candidates(self, hidden: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The `count` largest logits of each row and their ids ([S, count] float32, int64; best first, ties to the lower id), exact.

        None where the backend has no faster way than `logits`.
        """
        ...

    def base(self, path: str) -> torch.Tensor:
        """The weight [outputs, inputs] of one of `targets`, float32. May read a file; called off the loop's thread."""
        ...

    def prepare(self, weights: Weights) -> object:
        """Everything about an adapter that can be made ready beside the steps; called off the loop's thread."""
        ...

    def install(self, slot: int, prepared: object | None) -> None:
        """Use what `prepare` made for the tokens of a slot, from the next step on; None: let go of it."""
        ...
