"""Causal attention over packed examples: tokens of all examples lie in one row, and no example sees another.

The model's own code runs; only its attention is ours, registered with transformers under `ATTENTION`. Linear layers see one row of
tokens without padding. For attention alone each example becomes a row of a padded block: with plain causal order a real token never
looks at the padding behind it, so no mask is built at all, and no product is spent on pairs of different examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["ATTENTION", "Segments", "attend"]

ATTENTION = "argosy_segments"
_ALIKE = 1.25  # examples whose lengths differ by less share a block


@dataclass(frozen=True, slots=True)
class Block:
    """Examples of like length. `gather` [rows * width]: the token of each place, padding repeats the row's last; `rows`, `width`."""

    gather: torch.Tensor
    places: torch.Tensor  # [tokens of the block]: where in the block each token of `gather`'s examples went, in packed order
    tokens: torch.Tensor  # [tokens of the block]: which token of the packed row that is
    rows: int
    width: int


@dataclass(frozen=True, slots=True)
class Segments:
    """How a packed row of tokens divides into examples, made once for all layers."""

    lengths: tuple[int, ...]
    blocks: tuple[Block, ...]
    scatter: torch.Tensor  # [tokens]: of all blocks' tokens one after the other, the place of each packed token

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device | str = "cpu") -> "Segments":
        """Segments of `lengths`, in packed order."""
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        blocks: list[Block] = []
        order = sorted(range(len(lengths)), key=lambda at: (lengths[at], at))
        while order:
            width = lengths[order[-1]]
            members = [at for at in order if lengths[at] * _ALIKE >= width]
            order = order[: len(order) - len(members)]
            places = torch.arange(width)
            gather = torch.cat([starts[at] + places.clamp(max=lengths[at] - 1) for at in members])
            inside = torch.cat([row * width + places[: lengths[at]] for row, at in enumerate(members)])
            blocks.append(Block(gather.to(device), inside.to(device), gather[inside].to(device), len(members), width))
        tokens = torch.cat([block.tokens for block in blocks])
        return cls(tuple(lengths), tuple(blocks), tokens.argsort())


class _Spread(torch.autograd.Function):
    """x [tokens, …] → a block [rows * width, …]. Each token's gradient comes from its one real place: deterministic on any device."""

    @staticmethod
    def forward(context: Any, x: torch.Tensor, block: Block) -> torch.Tensor:
        context.block, context.count = block, x.shape[0]
        return x.index_select(0, block.gather)

    @staticmethod
    def backward(context: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = grads
        out = grad.new_zeros((context.count, *grad.shape[1:]))
        out[context.block.tokens] = grad.index_select(0, context.block.places)
        return out, None


class _Collect(torch.autograd.Function):
    """Blocks' outputs → packed order; the inverse of `_Spread` for real tokens, and zero gradient for padding."""

    @staticmethod
    def forward(context: Any, segments: Segments, *outputs: torch.Tensor) -> torch.Tensor:
        context.segments = segments
        parts = [output.index_select(0, block.places) for output, block in zip(outputs, segments.blocks, strict=True)]
        return torch.cat(parts).index_select(0, segments.scatter)

    @staticmethod
    def backward(context: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        found: list[torch.Tensor | None] = [None]
        for block in context.segments.blocks:
            out = grad.new_zeros((block.rows * block.width, *grad.shape[1:]))
            out[block.places] = grad.index_select(0, block.tokens)
            found.append(out)
        return tuple(found)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    segments: Segments | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface: query [B, H, T, D], key and value [B, K, T, D] → [B, T, H, D].

    With `segments` B is 1 and T the packed tokens; without, each of the B rows is one example, padded at its end. Raises ValueError
    for a mask of the caller's or attention that is not causal: an all-ones mask would mix the examples.
    """
    if attention_mask is not None or not getattr(module, "is_causal", True) or others.get("s_aux") is not None:
        raise ValueError("packed examples are kept apart by segments; a mask or other attention than causal is not supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if segments is None:
        return _weigh(query, key, value, scale, sliding_window, softcap, dropout).transpose(1, 2).contiguous(), None
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    outputs = []
    for block in segments.blocks:
        rows = [_spread(states, block) for states in (q, k, v)]
        out = _weigh(rows[0], rows[1], rows[2], scale, sliding_window, softcap, dropout)
        outputs.append(out.transpose(1, 2).reshape(block.rows * block.width, q.shape[1], -1))
    collected: torch.Tensor = _Collect.apply(segments, *outputs)  # type: ignore[no-untyped-call]
    return collected[None], None


def _spread(states: torch.Tensor, block: Block) -> torch.Tensor:
    """[tokens, heads, D] → [rows, heads, width, D]."""
    spread: torch.Tensor = _Spread.apply(states, block)  # type: ignore[no-untyped-call]
    return spread.view(block.rows, block.width, *states.shape[1:]).transpose(1, 2)


def _weigh(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None, softcap: float | None, dropout: float
) -> torch.Tensor:
    """Causal attention of rows that each are one example."""
    shared = q.shape[1] // k.shape[1]
    if shared > 1:
        k, v = (states[:, :, None].expand(-1, -1, shared, -1, -1).flatten(1, 2) for states in (k, v))
    length = q.shape[2]
    windowed = window is not None and length > window
    if softcap is None and not windowed:
        return scaled_dot_product_attention(q, k, v, scale=scale, is_causal=True, dropout_p=dropout)
    hidden = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
    if windowed and window is not None:
        hidden |= torch.ones_like(hidden).tril(-window)
    if softcap is None:
        bias = torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, float("-inf"))
        return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, dropout_p=dropout)
    scores = torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap)) * softcap
    weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1, dtype=torch.float32).to(v.dtype)
    return torch.nn.functional.dropout(weights, dropout) @ v
