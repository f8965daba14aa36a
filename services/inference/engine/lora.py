"""Many adapters over one loaded model: each linear layer adds two grouped products to its output (tensors).

The layers stay as transformers made them; each gets a forward hook when the first adapter that touches it is installed, so a model
without adapters runs as if this module were not here. Adapters lie in stacked tensors, a slot each; the tokens of a step are sorted by
slot and multiplied in groups, never one adapter after another.

THE CUDA PATH HAS NOT RUN ON A GPU YET: it is the same code, and tests/inference/engine/test_lora.py runs it with ARGOSY_TEST_DEVICE=cuda.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch

from services.inference.engine.backend import Factors, Weights

LONG = 16  # tokens of one adapter in a step from which on it is multiplied alone: padding others to its length would cost more
RANKS = 8  # stacks grow to a multiple of this


@dataclass(frozen=True, slots=True)
class _Group:
    """Adapters multiplied together: their slots, and for each its tokens, padded with its last one."""

    slots: torch.Tensor | slice  # a slice where they lie side by side: a view needs no copy of the weights
    tokens: torch.Tensor  # int64 [adapters, longest]
    flat: torch.Tensor  # int64 [n]: places in tokens.flatten() that are no padding
    rows: torch.Tensor  # int64 [n]: their tokens


class _Stack:
    """One linear layer's adapters."""

    def __init__(self, outputs: int, inputs: int, slots: int, rank: int, like: torch.Tensor) -> None:
        self.down = like.new_zeros((slots + 1, rank, inputs))
        self.up = like.new_zeros((slots + 1, outputs, rank))
        self.gain: torch.Tensor | None = None  # [slots + 1, outputs], once a DoRA is here

    def put(self, slot: int, factors: Factors | None) -> None:
        """Replace what a slot holds."""
        self.down[slot].zero_()
        self.up[slot].zero_()
        if self.gain is not None:
            self.gain[slot].fill_(1.0)
        if factors is None:
            return
        rank = factors.down.shape[0]
        if rank > self.down.shape[1]:
            more = -(-rank // RANKS) * RANKS - self.down.shape[1]
            self.down = torch.nn.functional.pad(self.down, (0, 0, 0, more))
            self.up = torch.nn.functional.pad(self.up, (0, more))
        self.down[slot, :rank].copy_(factors.down, non_blocking=True)
        self.up[slot, :, :rank].copy_(factors.up, non_blocking=True)
        if factors.gain is not None:
            if self.gain is None:
                self.gain = self.up.new_ones((self.up.shape[0], self.up.shape[1]))
            self.gain[slot].copy_(factors.gain, non_blocking=True)


class Lora:
    """The adapters of one model; one caller at a time but for `base` and `prepare`."""

    def __init__(self, linears: Mapping[str, torch.nn.Linear], slots: int) -> None:
        self.slots = slots
        self.targets = {path: (each.out_features, each.in_features) for path, each in linears.items()}
        self._linears = linears
        self._stacks: dict[str, _Stack] = {}
        self._used: dict[int, frozenset[str]] = {}  # slot → paths it changes
        self._groups: list[_Group] = []  # of the step in flight; empty: the base alone

    def base(self, path: str) -> torch.Tensor:
        """See `backend.Backend`."""
        return self._linears[path].weight.detach().float()

    def prepare(self, weights: Weights, pin: bool) -> Weights:
        """In the model's own type, in pinned memory where a GPU will copy it."""

        def ready(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
            if tensor is None:
                return None
            narrow = tensor.to(like.dtype)
            return narrow.pin_memory() if pin else narrow

        factors = {}
        for path, each in weights.factors.items():
            like = self._linears[path].weight
            down, up = ready(each.down, like), ready(each.up, like)
            assert down is not None and up is not None  # given
            factors[path] = Factors(down, up, ready(each.gain, like))
        return Weights(weights.rank, factors, weights.head)

    def install(self, slot: int, prepared: object | None) -> None:
        """See `backend.Backend`: copies into the stacks, which hooks read from the next step on."""
        assert prepared is None or isinstance(prepared, Weights)  # what `prepare` made
        factors = prepared.factors if prepared is not None else {}
        for path in self._used.get(slot, frozenset()) | factors.keys():
            stack = self._stacks.get(path)
            if stack is None:
                outputs, inputs = self.targets[path]
                linear = self._linears[path]
                rank = -(-factors[path].down.shape[0] // RANKS) * RANKS
                stack = self._stacks[path] = _Stack(outputs, inputs, self.slots, rank, linear.weight.detach())
                linear.register_forward_hook(_Hook(self, stack))
            stack.put(slot, factors.get(path))
        self._used[slot] = frozenset(factors)

    @contextmanager
    def adapting(self, adapters: torch.Tensor | None) -> Iterator[None]:
        """Apply each token's adapter in the forward inside: `adapters` is int32 [T], 0 for the base alone."""
        if adapters is None:
            yield
            return
        self._groups = list(_grouped(adapters))
        try:
            yield
        finally:
            self._groups = []

    def add(self, stack: _Stack, linear: torch.nn.Linear, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """The layer's output [1, T, outputs] with what the step's adapters add to it."""
        if not self._groups:
            return output
        out = output[0].clone()
        for group in self._groups:
            down, up = stack.down[group.slots], stack.up[group.slots]
            x = inputs[0][group.tokens]  # [adapters, longest, inputs]
            added = torch.bmm(torch.bmm(x, down.transpose(1, 2)), up.transpose(1, 2)).flatten(0, 1)[group.flat]
            if stack.gain is None:
                out[group.rows] += added
                continue
            bias = 0.0 if linear.bias is None else linear.bias
            gain = stack.gain[group.slots][:, None].expand(-1, group.tokens.shape[1], -1).flatten(0, 1)[group.flat]
            out[group.rows] = gain * (out[group.rows] - bias + added) + bias
        return out[None]


class _Hook:
    """What a linear layer calls after its own product."""

    def __init__(self, lora: Lora, stack: _Stack) -> None:
        self._lora = lora
        self._stack = stack

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        return self._lora.add(self._stack, cast("torch.nn.Linear", module), args[0], output)


def _grouped(adapters: torch.Tensor) -> Iterator[_Group]:
    """The step's tokens by adapter: those with few tokens together, each with many alone."""
    device = adapters.device
    mine: dict[int, list[int]] = {}
    for token, slot in enumerate(adapters.tolist()):
        if slot:
            mine.setdefault(slot, []).append(token)
    short = sorted(slot for slot, tokens in mine.items() if len(tokens) < LONG)
    for slots in ([short] if short else []) + [[slot] for slot in mine if len(mine[slot]) >= LONG]:
        longest = max(len(mine[slot]) for slot in slots)
        tokens = [mine[slot] + mine[slot][-1:] * (longest - len(mine[slot])) for slot in slots]
        flat = [n * longest + k for n, slot in enumerate(slots) for k in range(len(mine[slot]))]
        beside = slots[-1] - slots[0] + 1 == len(slots)
        yield _Group(
            slots=slice(slots[0], slots[-1] + 1) if beside else torch.tensor(slots, device=device),
            tokens=torch.tensor(tokens, device=device),
            flat=torch.tensor(flat, device=device),
            rows=torch.tensor([token for slot in slots for token in mine[slot]], device=device),
        )
