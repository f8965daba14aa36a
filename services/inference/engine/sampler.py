"""The choice of a token from logits, vectorised over the rows of a step (tensors).

Order, as in transformers: repetition, frequency and presence penalties, bias, barred ids, temperature, top-k, top-p, min-p, draw. The
draw inverts the distribution at one uniform number, which Philox4x32-10 makes from (seed, output index, position): no state, so
a batch, a preemption or another replica draws the same. Among equal logits the lower id comes first, everywhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from services.inference.engine.step import Draw

NUCLEUS = 1024  # ids looked at first for top-p; a flatter distribution is sorted whole
CANDIDATES = 256  # most ids asked of a backend instead of the whole vocabulary
TIES = 32  # equal logits resolved by id at the edge of top-k; more at once are resolved by a scan of the row


@dataclass(slots=True)
class Choice:
    """`error` set: nothing could be chosen (`nan`: the logits are not numbers; `barred`: no id is left)."""

    token: int | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    error: str | None = None


def needs(draw: Draw) -> int | None:
    """How many best candidates decide this draw; None: it takes the whole row of logits."""
    s = draw.sampling
    if _penalised(draw) or draw.top_logprobs is not None:
        return None
    if s.temperature == 0.0:
        return 1
    return s.top_k if 0 < s.top_k <= CANDIDATES else None


def choose_among(values: torch.Tensor, ids: torch.Tensor, draws: Sequence[Draw]) -> list[Choice]:
    """Choose from candidates [R, C] (best first) of rows for each of which `needs` asked at most C."""
    picks, errors = _pick(values, ids, draws)
    return [Choice(error=error) if error else Choice(token) for token, error in zip(picks, errors, strict=True)]


def choose(logits: torch.Tensor, draws: Sequence[Draw]) -> list[Choice]:
    """Choose from logits [R, vocabulary], float32, which are overwritten."""
    reported = _report(logits, draws)
    _penalise(logits, draws)
    tokens: list[int] = [0] * len(draws)
    errors: list[str | None] = [None] * len(draws)
    greedy = [r for r, draw in enumerate(draws) if draw.sampling.temperature == 0.0]
    ranked = [r for r, draw in enumerate(draws) if draw.sampling.temperature != 0.0 and 0 < draw.sampling.top_k <= NUCLEUS]
    open_ended = [r for r in range(len(draws)) if r not in set(greedy) and r not in set(ranked)]
    if greedy:
        rows = logits if len(greedy) == len(draws) else logits[greedy]
        best, ids = rows.max(-1)
        for r, value, token in zip(greedy, best.tolist(), ids.tolist(), strict=True):
            tokens[r], errors[r] = token, _fault(value)
    if ranked:
        rows = logits if len(ranked) == len(draws) else logits[ranked]
        chosen = [draws[r] for r in ranked]
        values, ids = largest(rows, min(max(d.sampling.top_k for d in chosen), logits.shape[1]))
        for r, token, error in zip(ranked, *_pick(values, ids, chosen), strict=True):
            tokens[r], errors[r] = token, error
    for r in open_ended:  # one by one: each may take a row-sized intermediate, 1 MiB at 262,144 ids
        tokens[r], errors[r] = _pick_open(logits[r], draws[r])
    return [Choice(error=errors[r]) if errors[r] else Choice(tokens[r], *_reported(reported, r, tokens[r])) for r in range(len(draws))]


def largest(logits: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest of each row and their ids ([R, count]), best first, ties to the lower id."""
    size = logits.shape[-1]
    if count >= size:
        return _sorted(logits)
    wide = min(count + TIES, size)
    values, ids = torch.topk(logits, wide, dim=-1)
    if wide < size:
        for r in (values[:, count - 1] == values[:, -1]).nonzero()[:, 0].tolist():
            at_least = (logits[r] >= values[r, -1]).nonzero()[:, 0]  # ascending ids
            order = torch.sort(logits[r, at_least], descending=True, stable=True).indices[:wide]
            ids[r] = at_least[order]
            values[r] = logits[r, ids[r]]
    ids, order = torch.sort(ids, dim=-1)
    values, order = torch.sort(values.gather(-1, order), dim=-1, descending=True, stable=True)
    return values[:, :count], ids.gather(-1, order)[:, :count]


def _sorted(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole rows, best first. On a CPU value and id are sorted as one integer: numpy's vector sort takes a tenth of torch's time."""
    if logits.device.type != "cpu":
        values, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
        return values, ids
    bits = logits.numpy().view(np.uint32).astype(np.uint64)
    # Float bits ascend with the value once negative ones are inverted; inverting all of them makes it descend.
    bits = np.where(bits >> np.uint64(31), bits, bits ^ np.uint64(0x7FFFFFFF))
    order = np.sort(bits << _WORD | np.arange(logits.shape[-1], dtype=np.uint64), axis=-1)
    ids = torch.from_numpy((order & _LOW).astype(np.int64))
    return logits.gather(-1, ids), ids


Numbers = np.ndarray[tuple[int], np.dtype[np.float64]]


def uniform(seeds: Sequence[int], indexes: Sequence[int], positions: Sequence[int]) -> Numbers:
    """One number in [0, 1) per entry, with 53 random bits."""
    key = np.array([seed & (2**64 - 1) for seed in seeds], dtype=np.uint64)
    counter = np.zeros((4, len(seeds)), dtype=np.uint64)
    counter[0] = np.asarray(positions, dtype=np.uint64)
    counter[1] = np.asarray(indexes, dtype=np.uint64)
    words = philox(counter, np.stack([key & _LOW, key >> _WORD]))
    bits: Numbers = ((words[0] << _WORD | words[1]) >> np.uint64(11)).astype(np.float64)
    return bits * 2.0**-53


_LOW, _WORD = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLY = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_WEYL = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)

Words = np.ndarray[tuple[int, int], np.dtype[np.uint64]]


def philox(counter: Words, key: Words) -> Words:
    """Philox4x32-10 (Salmon et al., SC 2011). Counter [4, N] and key [2, N] hold 32-bit words in uint64; so does the result [4, N]."""
    c, k = counter.copy(), key.copy()
    for _ in range(10):
        product = c[0::2] * _MULTIPLY
        high, low = product >> _WORD, product & _LOW
        c = np.stack([high[1] ^ c[1] ^ k[0], low[1], high[0] ^ c[3] ^ k[1], low[0]])
        k = (k + _WEYL) & _LOW
    return c


def _penalised(draw: Draw) -> bool:
    s = draw.sampling
    return bool(s.repetition != 1.0 or s.frequency or s.presence or s.logit_bias or draw.barred)


def _fault(best: float) -> str | None:
    if math.isnan(best) or best == math.inf:
        return "nan"
    return "barred" if best == -math.inf else None


def _penalise(logits: torch.Tensor, draws: Sequence[Draw]) -> None:
    """In place. Ids out of the vocabulary are the door's to refuse; here they would be an IndexError."""
    rows, ids, repetition, minus = [], [], [], []
    for r, draw in enumerate(draws):
        s = draw.sampling
        if s.repetition == 1.0 and not s.frequency and not s.presence:
            continue
        seen, inverse = np.unique(np.asarray(draw.history, dtype=np.int64), return_inverse=True)
        counts = np.bincount(inverse[draw.prompt_length :], minlength=len(seen))
        rows.append(np.full(len(seen), r))
        ids.append(seen)
        repetition.append(np.full(len(seen), s.repetition, dtype=np.float32))
        minus.append((counts * s.frequency + (counts > 0) * s.presence).astype(np.float32))
    if rows:
        at = _on(logits, np.concatenate(rows)), _on(logits, np.concatenate(ids))
        factor, less = _on(logits, np.concatenate(repetition)), _on(logits, np.concatenate(minus))
        values = logits[at]
        logits[at] = torch.where(values > 0, values / factor, values * factor) - less
    biases = [(r, token, bias) for r, draw in enumerate(draws) for token, bias in draw.sampling.logit_bias]
    if biases:
        r_, t_, b_ = zip(*biases, strict=True)
        at = _on(logits, np.asarray(r_)), _on(logits, np.asarray(t_))
        logits.index_put_(at, _on(logits, np.asarray(b_, dtype=np.float32)), accumulate=True)
    barred = [(r, token) for r, draw in enumerate(draws) for token in draw.barred]
    if barred:
        r_, t_ = zip(*barred, strict=True)
        logits[_on(logits, np.asarray(r_)), _on(logits, np.asarray(t_))] = -math.inf


def _on(like: torch.Tensor, values: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> torch.Tensor:
    return torch.from_numpy(values).to(like.device)


def _pick(values: torch.Tensor, ids: torch.Tensor, draws: Sequence[Draw]) -> tuple[list[int], list[str | None]]:
    """Rows [R, C], best first, each row's own first top_k counting (0: all C); a greedy row takes its first."""
    errors = [_fault(best) for best in values[:, 0].tolist()]
    if all(draw.sampling.temperature == 0.0 for draw in draws):
        return ids[:, 0].tolist(), errors
    columns = torch.arange(values.shape[1], device=values.device)
    size = values.shape[1]
    limits = [(d.sampling.top_k or size, d.sampling.top_p, d.sampling.min_p, d.sampling.temperature or 1.0) for d in draws]
    top_k, top_p, min_p, heat = torch.tensor(limits, dtype=torch.float64, device=values.device).T[:, :, None]
    weights = _weights(values, heat).masked_fill(columns >= top_k, 0.0)
    weights = _nucleus(weights, weights.sum(-1, keepdim=True, dtype=torch.float64), top_p, min_p)
    at = _invert(weights, draws)
    chosen = ids.gather(1, at[:, None])[:, 0].tolist()
    first = ids[:, 0].tolist()
    return [first[r] if d.sampling.temperature == 0.0 else chosen[r] for r, d in enumerate(draws)], errors


def _pick_open(row: torch.Tensor, draw: Draw) -> tuple[int, str | None]:
    """A row [vocabulary] without a small top-k: whole, or its nucleus when top-p, min-p or a large top-k cut it."""
    s = draw.sampling
    best = float(row.max())
    if error := _fault(best):
        return 0, error
    size = row.shape[0]
    keep = s.top_k if 0 < s.top_k < size else size
    if s.top_p >= 1.0 and s.min_p <= 0.0 and keep == size:
        return int(_invert(_weights(row[None], s.temperature), [draw])), None
    values, ids = largest(row[None], NUCLEUS if keep == size > NUCLEUS else keep)
    weights = _weights(values, s.temperature)
    total = (weights if keep < size else _weights(row[None], s.temperature)).sum(dtype=torch.float64)
    if ids.shape[1] < keep == size and weights.sum(dtype=torch.float64) < s.top_p * total and weights[0, -1] >= s.min_p:
        values, ids = largest(row[None], size)  # the nucleus goes on below what was looked at
        weights = _weights(values, s.temperature)
    top_p, min_p = torch.tensor([[s.top_p], [s.min_p]], dtype=torch.float64, device=row.device)[:, :, None]
    return int(ids[0, _invert(_nucleus(weights, total, top_p, min_p), [draw])]), None


def _weights(values: torch.Tensor, heat: torch.Tensor | float) -> torch.Tensor:
    """exp((value - best) / temperature), so that the best weighs 1. Sums of them are float64: the last of 262,144 must still count."""
    return torch.exp((values - values.amax(-1, keepdim=True)) / heat)


def _nucleus(weights: torch.Tensor, total: torch.Tensor, top_p: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Zero what top-p and min-p cut from rows sorted best first. The best always stays."""
    cut = (weights.cumsum(-1, dtype=torch.float64) - weights >= top_p * total) | (
        weights < min_p
    )  # the best weighs 1: a weight is its share of the best
    cut[:, 0] = False
    return weights.masked_fill(cut, 0.0)


def _invert(weights: torch.Tensor, draws: Sequence[Draw]) -> torch.Tensor:
    """Where each row's cumulative weight [R, C] passes its uniform number; int64 [R]."""
    points = uniform([d.sampling.seed for d in draws], [d.index for d in draws], [d.position for d in draws])
    sums = weights.cumsum(-1, dtype=torch.float64)
    at = torch.searchsorted(sums, _on(weights, points)[:, None] * sums[:, -1:], right=True)[:, 0]
    if bool((at == weights.shape[1]).any()):
        # Rounding put the point at the very end: take the last id with a weight, not one that was cut.
        last = weights.shape[1] - 1 - (weights > 0).flip(-1).to(torch.int8).argmax(-1)
        at = torch.minimum(at, last)
    return at


def _report(logits: torch.Tensor, draws: Sequence[Draw]) -> dict[int, tuple[torch.Tensor, float, list[tuple[int, float]]]]:
    """Raw rows that must report, with their log-sum-exp and their top ids, before anything is changed in place."""
    wanted = [r for r, draw in enumerate(draws) if draw.top_logprobs is not None]
    if not wanted:
        return {}
    rows = logits[wanted]
    norms = torch.logsumexp(rows, -1).tolist()
    most = max(draws[r].top_logprobs or 0 for r in wanted)
    values, ids = largest(rows, most) if most else (rows[:, :0], rows[:, :0].long())
    tops = [list(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    return {r: (rows[n], norms[n], tops[n][: draws[r].top_logprobs or 0]) for n, r in enumerate(wanted)}


def _reported(
    reported: dict[int, tuple[torch.Tensor, float, list[tuple[int, float]]]], r: int, token: int
) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    if r not in reported:
        return None, ()
    row, norm, top = reported[r]
    return float(row[token]) - norm, tuple((i, value - norm) for i, value in top)
