"""Which examples a step takes, and how they are laid out: best-fit packed rows, or padded ones where each example must stay apart.

The order of an epoch is a pure function of seed and epoch, and a step's place in it of its number: a resumed run needs no iterator state.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from services.finetune.trainer.attention import Segments

__all__ = ["Batch", "Example", "fit", "layout", "order", "pack", "pad", "taken"]


@dataclass(frozen=True, slots=True)
class Example:
    """One example as ids. `spans` are half-open ranges of supervised tokens; `label` is an index, -1 for none."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...] = ()
    label: int = -1
    against: "Example | None" = None  # the answer that is worse than this one

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two, or of the one."""
        return max(len(self.ids), len(self.against.ids) if self.against else 0)

    @property
    def supervised(self) -> int:
        """Tokens that count for the loss; an example with a label, and a pair, counts one."""
        return 1 if self.label >= 0 or self.against else sum(end - start for start, end in self.spans)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one forward pass computes: B = 1 where packed."""

    ids: torch.Tensor  # [B, T]
    positions: torch.Tensor  # [B, T]: from 0 in each example
    segments: Segments | None  # None: each row is one example
    select: torch.Tensor  # [n] of B * T: states that meet the output matrix or the head
    targets: torch.Tensor  # [n]: the next token, or the label
    tokens: int  # real ones

    def to(self, device: torch.device) -> "Batch":
        """The same on another device; the segments are made there already."""
        if device.type == "cpu":
            return self
        moved = (tensor.to(device, non_blocking=True) for tensor in (self.ids, self.positions, self.select, self.targets))
        ids, positions, select, targets = moved
        return Batch(ids, positions, self.segments, select, targets, self.tokens)


def order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The permutation of an epoch's examples."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(count)


def taken(seed: int, step: int, count: int, batch_size: int) -> list[int]:
    """Indices of the examples of 0-based `step`; the last step of an epoch may have fewer than `batch_size`."""
    each = -(-count // batch_size)
    epoch, place = divmod(step, each)
    indices: list[int] = order(seed, epoch, count)[place * batch_size : (place + 1) * batch_size].tolist()
    return indices


def fit(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Best-fit decreasing: bins of at most `room` tokens that together hold every index once. A longer one gets a bin of its own."""
    bins: list[list[int]] = []
    free: list[int] = []
    for at in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        best = min((place for place, left in enumerate(free) if left >= lengths[at]), key=lambda place: free[place], default=None)
        if best is None:
            bins.append([at])
            free.append(room - lengths[at])
        else:
            bins[best].append(at)
            free[best] -= lengths[at]
    return bins


def pack(examples: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
    """All examples in one row, positions from 0 in each."""
    lengths = [len(example.ids) for example in examples]
    ids = torch.tensor([token for example in examples for token in example.ids])
    positions = torch.cat([torch.arange(length) for length in lengths])
    starts = np.cumsum([0, *lengths])[:-1].tolist()
    select, targets = _supervised(examples, starts)
    return Batch(ids[None], positions[None], Segments.of(lengths, device), select, targets, sum(lengths))


def pad(examples: Sequence[Example]) -> Batch:
    """Each example a row, padded at its end with id 0, which no real token sees."""
    width = max(len(example.ids) for example in examples)
    ids = torch.zeros((len(examples), width), dtype=torch.int64)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
    select, targets = _supervised(examples, [row * width for row in range(len(examples))])
    positions = torch.arange(width)[None].expand(len(examples), -1)
    return Batch(ids, positions, None, select, targets, sum(len(example.ids) for example in examples))


def layout(examples: Sequence[Example], room: int, packing: bool, device: torch.device) -> Iterator[Batch]:
    """The forward passes of a step: packed rows of at most `room` tokens, or padded blocks of examples of like length."""
    if packing:
        for members in fit([len(example.ids) for example in examples], room):
            yield pack([examples[at] for at in sorted(members)], device).to(device)
        return
    waiting = sorted(examples, key=lambda example: len(example.ids))
    while waiting:
        width, rows = len(waiting[0].ids), 0
        while rows < len(waiting) and (rows == 0 or max(width, len(waiting[rows].ids)) * (rows + 1) <= room):
            width, rows = len(waiting[rows].ids), rows + 1
        yield pad(waiting[:rows]).to(device)
        waiting = waiting[rows:]


def _supervised(examples: Sequence[Example], starts: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """States to select and what they should say: the one before each supervised token, or the last one of a labelled text."""
    select: list[int] = []
    targets: list[int] = []
    for example, start in zip(examples, starts, strict=True):
        if example.label >= 0:
            select.append(start + len(example.ids) - 1)
            targets.append(example.label)
        for begin, end in example.spans:
            select.extend(range(start + begin - 1, start + end - 1))
            targets.extend(example.ids[begin:end])
    return torch.tensor(select, dtype=torch.int64), torch.tensor(targets, dtype=torch.int64)
