"""One step as tensors: rows in, choices out (tensors). Implements `step.Runner` over any `backend.Backend`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Protocol

import numpy as np
import torch

from services.inference.engine.backend import Backend, Batch, Head, Weights
from services.inference.engine.calls import Sampling, Weigh, Weighed
from services.inference.engine.encoder import Pools
from services.inference.engine.sampler import choose, choose_among, largest, needs
from services.inference.engine.step import BLOCK_SIZE, Adapter, AdapterProblem, Draw, Probe, Row, RowResult

SLICE = 64  # rows of logits held at once when probing: 64 MiB of float32 at 262,144 ids


class Source(Protocol):
    """Where adapters come from."""

    def read(self, owner: str, digest: str, backend: Backend) -> tuple[Adapter, Weights]:
        """One that passed every check; its `Adapter` has no weights yet. Raises AdapterProblem."""
        ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """What `fetch` makes and `install` takes."""

    prepared: object  # the backend's own
    head: Head | None


class TorchRunner:
    """Packs rows without padding, asks logits only for the rows that need them, and keeps one bad row from the others."""

    def __init__(self, backend: Backend, source: Source | None = None, weigher: Callable[[Weigh], Weighed] | None = None) -> None:
        self.backend = backend
        self.weigher = weigher
        self.source = source
        self.slots = backend.slots if source is not None else 0
        self.heads: dict[int, Head] = {}  # by slot
        self.vocabulary = backend.vocabulary
        self.context = min(backend.context, backend.blocks * BLOCK_SIZE)
        self.blocks = backend.blocks
        self.pools = Pools()

    def step(self, rows: Sequence[Row]) -> list[RowResult]:
        """See `step.Runner`. A row error is `nan`, `barred` (no id may be chosen) or `gap` (pooling missed earlier tokens)."""
        results = [RowResult() for _ in rows]
        if not rows:
            return results
        with torch.inference_mode():
            batch, spans = pack(rows, self.backend.device)
            hidden = self.backend.forward(batch)
            # One reduction and one wait for the device, whatever the number of rows.
            sound = torch.isfinite(hidden).all(-1).tolist()
            for result, (first, end) in zip(results, spans, strict=True):
                if not all(sound[first:end]):
                    result.error = "nan"
            self._probe(hidden, rows, results, spans)
            self._draw(hidden, rows, results, spans)
            self._pool(hidden, rows, results, spans)
        return results

    def forget(self, key: int) -> None:
        """See `step.Runner`."""
        self.pools.forget(key)

    def fetch(self, owner: str, digest: str) -> Adapter:
        """See `step.Runner`."""
        if self.source is None:
            raise AdapterProblem("no_adapters", "there is no store")
        adapter, weights = self.source.read(owner, digest, self.backend)
        return replace(adapter, weights=Loaded(self.backend.prepare(weights), weights.head))

    def weigh(self, call: Weigh) -> Weighed:
        """See `step.Runner`."""
        return Weighed(call.id, error="no_gradients") if self.weigher is None else self.weigher(call)

    def install(self, slot: int, adapter: Adapter | None) -> None:
        """See `step.Runner`."""
        self.heads.pop(slot, None)
        loaded = None if adapter is None else adapter.weights
        assert loaded is None or isinstance(loaded, Loaded)  # what `fetch` made
        self.backend.install(slot, None if loaded is None else loaded.prepared)
        if loaded is not None and loaded.head is not None:
            self.heads[slot] = loaded.head

    def warm_up(self, step_tokens: int) -> None:
        """Compute the shapes that will be used: a whole chunk, then one token. Leaves nothing behind that a table points to."""
        count = max(1, min(step_tokens, self.context, self.blocks * BLOCK_SIZE))
        table = list(range(-(-count // BLOCK_SIZE)))
        draw = Draw(Sampling(seed=0, temperature=0.0), 0, 0, [0], 1)
        for tokens, start in (([0] * count, 0), ([0], count - 1)):
            self.step([Row(key=-1, tokens=tokens, start=start, blocks=table, draw=draw)])

    def _draw(self, hidden: torch.Tensor, rows: Sequence[Row], results: list[RowResult], spans: list[tuple[int, int]]) -> None:
        wanted = [b for b, row in enumerate(rows) if row.draw is not None and results[b].error is None]
        for least, members in _by_need(rows, wanted).items():
            draws = [draw for b in members if (draw := rows[b].draw) is not None]
            states = hidden[[spans[b][1] - 1 for b in members]]
            best = self.backend.candidates(states, least) if least else None
            choices = choose_among(*best, draws) if best is not None else choose(self.backend.logits(states), draws)
            for b, choice in zip(members, choices, strict=True):
                result = results[b]
                result.token, result.logprob, result.top, result.error = choice.token, choice.logprob, choice.top, choice.error

    def _probe(self, hidden: torch.Tensor, rows: Sequence[Row], results: list[RowResult], spans: list[tuple[int, int]]) -> None:
        """Log-softmax at the probes' offsets: SLICE positions at a time, of many rows together, for each slice reads the output matrix."""
        asked = []  # (row, which of its targets, place of its state)
        for b, row in enumerate(rows):
            if row.probe is not None and results[b].error is None:
                offsets = range(len(row.tokens)) if row.pool else sorted({offset for offset, _ in row.probe.targets})
                place = {offset: spans[b][0] + n for n, offset in enumerate(offsets)}
                asked += [(b, n, place[offset]) for n, (offset, _) in enumerate(row.probe.targets)]
        for begin in range(0, len(asked), SLICE):
            part = asked[begin : begin + SLICE]
            logits = self.backend.logits(hidden[[state for _, _, state in part]])
            norms = torch.logsumexp(logits, -1)
            end = 0
            for b, group in groupby(part, key=itemgetter(0)):
                members = [n for _, n, _ in group]
                first, end = end, end + len(members)
                probe = rows[b].probe
                if probe is not None and results[b].error is None:
                    _tell(probe, members, logits[first:end], norms[first:end], results[b])

    def _pool(self, hidden: torch.Tensor, rows: Sequence[Row], results: list[RowResult], spans: list[tuple[int, int]]) -> None:
        """Last, when nothing of the step can fail any more: a repeated step must not add its states twice."""
        for row, result, (first, end) in zip(rows, results, spans, strict=True):
            if result.error is not None:
                continue
            if not row.pool:
                if row.head:
                    result.vector = self._label(row, hidden[end - 1])
                continue
            if not self.pools.add(row.key, row.start, hidden[first : first + len(row.tokens)]):
                result.error = "gap"
            elif row.pool_ends:
                mean = self.pools.take(row.key)
                result.vector = self._label(row, mean) if row.head else mean.cpu().numpy().astype("<f4").tobytes()

    def _label(self, row: Row, state: torch.Tensor) -> bytes:
        """The logits of a row's head for one pooled state. One row at a time: company changes no bit."""
        head = self.heads[row.adapter]
        return torch.addmv(head.bias, head.weight, state.float().cpu()).numpy().astype("<f4").tobytes()


def _tell(probe: Probe, members: Sequence[int], logits: torch.Tensor, norms: torch.Tensor, result: RowResult) -> None:
    """Add what is asked at the probe's targets `members`, whose logits these are."""
    if not bool(torch.isfinite(norms).all()):
        result.error = "nan"
        return
    wanted = [probe.targets[n][1] for n in members]
    ids = torch.tensor([[target or 0] for target in wanted], device=logits.device)
    found = (logits.gather(1, ids)[:, 0] - norms).tolist()
    result.target_logprobs += [None if target is None else value for target, value in zip(wanted, found, strict=True)]
    if probe.probes:
        result.probe_logprobs += map(tuple, (logits[:, list(probe.probes)] - norms[:, None]).tolist())
    if probe.first_probes and members[0] == 0:
        result.first_probe_logprobs = tuple((logits[0, list(probe.first_probes)] - norms[0]).tolist())
    if probe.top:
        values, best = largest(logits, probe.top)
        pairs = zip(best.tolist(), (values - norms[:, None]).tolist(), strict=True)
        result.probe_top += [tuple(zip(i, v, strict=True)) for i, v in pairs]


def pack(rows: Sequence[Row], device: torch.device) -> tuple[Batch, list[tuple[int, int]]]:
    """The step's tensors, and for each row the span of its wanted hidden states.

    A row's states are: all of its tokens when it pools; else those its probe asks, ascending; and the last one if it draws.
    """
    counts = np.array([len(row.tokens) for row in rows], dtype=np.int64)
    starts = np.array([row.start for row in rows], dtype=np.int64)
    edges = np.concatenate([[0], counts.cumsum()])
    tokens = np.concatenate([np.asarray(row.tokens, dtype=np.int64) for row in rows])
    positions = np.arange(edges[-1]) - np.repeat(edges[:-1] - starts, counts)
    widths = -(-(starts + counts) // BLOCK_SIZE)
    tables = np.zeros((len(rows), int(widths.max())), dtype=np.int64)
    for b, row in enumerate(rows):
        if len(row.blocks) < widths[b]:
            raise ValueError(f"a row of {starts[b] + counts[b]} tokens needs {widths[b]} blocks and has {len(row.blocks)}")
        tables[b, : widths[b]] = row.blocks[: widths[b]]
    owner = np.repeat(np.arange(len(rows)), counts)
    slots = tables[owner, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    select: list[int] = []
    spans = []
    for b, row in enumerate(rows):
        first, begin, last = len(select), int(edges[b]), int(edges[b + 1]) - 1
        if row.pool:
            select += range(begin, last + 1)
        else:
            if row.probe is not None:
                select += sorted({begin + offset for offset, _ in row.probe.targets})
            if row.draw is not None and (len(select) == first or select[-1] != last):
                select.append(last)
            if len(select) == first:
                select.append(last)  # so that a NaN in a prefill chunk is seen where it happens
        spans.append((first, len(select)))
    batch = Batch(
        tokens=_send(tokens, device),
        positions=_send(positions, device),
        rows=_send(edges.astype(np.int32), device),
        lengths=_send((starts + counts).astype(np.int32), device),
        tables=_send(tables.astype(np.int32), device),
        slots=_send(slots, device),
        select=_send(np.array(select, dtype=np.int64), device),
    )
    if any(row.adapter for row in rows):
        adapters = np.array([row.adapter for row in rows], dtype=np.int32)
        batch.adapters = _send(np.repeat(adapters, counts), device)
    return batch, spans


def _by_need(rows: Sequence[Row], wanted: list[int]) -> dict[int, list[int]]:
    """Rows by what decides them: 0 the whole vocabulary, 1 the best id, else that many candidates."""
    greedy: list[int] = []
    ranked: list[int] = []
    whole: list[int] = []
    most = 0
    for b in wanted:
        draw = rows[b].draw
        least = needs(draw) if isinstance(draw, Draw) else None
        if least is None:
            whole.append(b)
        elif least == 1:
            greedy.append(b)
        else:
            ranked.append(b)
            most = max(most, least)
    return {count: members for count, members in ((1, greedy), (most, ranked), (0, whole)) if members}


def _send(values: np.ndarray[tuple[int, ...], np.dtype[np.generic]], device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
