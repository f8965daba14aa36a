"""A call on its way: its sequences, which of them wait for another's blocks, and what it has cost. Pure."""

from collections import deque
from collections.abc import Iterator
from math import isfinite

from services.inference.engine.adapters import Entry, key_of
from services.inference.engine.blocks import blocks_for
from services.inference.engine.calls import (
    Call,
    Continuation,
    Embed,
    Generate,
    Label,
    PromptScored,
    Sampling,
    Score,
    Scored,
    Timings,
    Usage,
    Weigh,
)
from services.inference.engine.sequence import Report, Sequence, State
from services.inference.engine.step import BLOCK_SIZE, Draw, Row, RowResult

MOST_OUTPUTS = 4
MOST_TOP = 5


class Live:
    """One call from its arrival to its `Done`. `keys` numbers the sequences of an engine."""

    def __init__(self, call: Call, number: int, arrived: float, root: bytes, keys: Iterator[int]) -> None:
        self.call = call
        self.number = number
        self.arrived = arrived  # engine's clock, seconds
        self.started: float | None = None  # when its first step began
        self.prompted: float | None = None  # when the first of its sequences had its prompt computed
        self.shared = 0  # positions that the first of its sequences computes before the others start
        self.logprobs: dict[int, list[float]] = {}  # by sequence index
        self.probes: dict[int, list[tuple[float, ...]]] = {}
        self.top: list[tuple[tuple[int, float], ...]] = []
        self.first_probes: tuple[float, ...] = ()
        self.vectors: dict[int, bytes] = {}
        self.prompt_scores_due = isinstance(call, Generate) and call.prompt_logprobs
        self.entry: Entry | None = None  # of its adapter, held to the end
        self.admitted = False  # the scheduler knows of it
        self._root = root
        self._keys = keys
        self.sequences = self._sequences()
        self.open = len(self.sequences)  # not ended
        # The others wait for the first to compute what they share.
        self.held = deque(self.sequences[1:]) if self.shared else deque[Sequence]()

    def _sequences(self) -> list[Sequence]:
        call = self.call
        match call:
            case Generate(prompt=prompt):
                # With scores to give, the others wait to the end: one of them takes over if the first is stopped.
                self.shared = len(prompt) if call.prompt_logprobs else (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE
                return [self._output(call, index) for index in range(call.outputs)]
            case Score():
                self.shared = (len(call.prefix) - 1) // BLOCK_SIZE * BLOCK_SIZE
                return self._continuations(call)
            case Embed():
                return [self._sequence(i, tokens, pool=True) for i, tokens in enumerate(call.inputs)]
            case Label():
                return [self._sequence(i, tokens) for i, tokens in enumerate(call.inputs)]

    def tune(self, entry: Entry) -> bool:
        """Its adapter is here: False if it lacks what the call asks for."""
        if not isinstance(self.call, Label) or entry.adapter is None:
            return True
        for sequence in self.sequences:
            sequence.head = True
            sequence.pool = entry.adapter.pooling == "MEAN"
        return bool(entry.adapter.labels)

    def _output(self, call: Generate, index: int) -> Sequence:
        report = Report(0, call.prompt[1:], top=call.top_logprobs or 0) if call.prompt_logprobs and index == 0 else None
        draw = Draw(call.sampling, index, 0, (), len(call.prompt), top_logprobs=call.top_logprobs)
        return self._sequence(index, call.prompt, report, draw)

    def _continuations(self, call: Score) -> list[Sequence]:
        """The prefix alone first: its last position tells of every continuation's first token, and a one-token label needs no more."""
        last = len(call.prefix) - 1
        starts = tuple(continuation[0] for continuation in call.continuations if continuation)
        sequences = [self._sequence(len(call.continuations), call.prefix, Report(last, [None], call.probes, call.first_probes + starts))]
        for index, continuation in enumerate(call.continuations):
            targets: list[int | None] = list(continuation[1:])
            computed = continuation[:-1]
            if call.probes and continuation:
                # Something is asked after the last token too: compute it.
                targets.append(None)
                computed = continuation
            if targets:
                sequences.append(self._sequence(index, call.prefix + computed, Report(last + 1, targets, call.probes)))
        return sequences

    def _sequence(
        self, index: int, tokens: tuple[int, ...], report: Report | None = None, draw: Draw | None = None, pool: bool = False
    ) -> Sequence:
        return Sequence(
            next(self._keys),
            tokens,
            tenant=self.call.tenant,
            work_class=self.call.work_class,
            root=None if pool else self._root,
            index=index,
            draw=draw,
            limits=self.call.limits if isinstance(self.call, Generate) else None,
            report=report,
            pool=pool,
            adapter=key_of(self.call.owner, self.call.adapter) if self.call.adapter else "",
            live=self,
        )

    def successor(self, ended: Sequence) -> Sequence | None:
        """The one that takes over when `ended` can no longer compute what the held ones wait for."""
        if not self.held or any(s is not ended and s.state is not State.ENDED and s not in self.held for s in self.sequences):
            return None
        heir = self.held.popleft()
        if self.prompt_scores_due and isinstance(self.call, Generate):
            self.logprobs.clear()
            self.top.clear()
            heir.report = Report(0, self.call.prompt[1:], top=self.call.top_logprobs or 0)
        return heir

    def collect(self, sequence: Sequence, row: Row, result: RowResult) -> None:
        """Keep what a row's probe answered."""
        probe, report = row.probe, sequence.report
        if probe is None or report is None:
            return
        if probe.first_probes:
            self.first_probes = result.first_probe_logprobs
        logprobs = self.logprobs.setdefault(sequence.index, [])
        logprobs.extend(value for value in result.target_logprobs if value is not None)
        if probe.probes:
            self.probes.setdefault(sequence.index, []).extend(result.probe_logprobs)
        if probe.top:
            self.top.extend(result.probe_top)
        report.given += len(probe.targets)

    def prompt_scored(self) -> PromptScored:
        """What was asked with `prompt_logprobs`."""
        self.prompt_scores_due = False
        return PromptScored(self.call.id, tuple(next(iter(self.logprobs.values()), ())), tuple(self.top))

    def scored(self, call: Score) -> Scored:
        """The answer, in the order asked."""
        asked = len(call.first_probes)
        starts = iter(self.first_probes[asked:])
        shared = tuple(self.probes.get(len(call.continuations), ()))  # one row, of the prefix's last position
        items = tuple(
            Continuation(
                (next(starts), *self.logprobs.get(index, ())) if continuation else (),
                (*shared, *self.probes.get(index, ())),
            )
            for index, continuation in enumerate(call.continuations)
        )
        return Scored(call.id, items, self.first_probes[:asked])

    def usage(self, finished: bool) -> Usage:
        """What was computed, or found in the cache: all of the input if `finished`, else as far as it came."""
        cached = next((s.cached for s in self.sequences if s.cached is not None), 0)
        match self.call:
            case Generate(prompt=prompt):
                read = max((min(s.reached, len(prompt)) for s in self.sequences), default=0)
                whole = len(prompt)
            case Score(prefix=prefix, continuations=continuations):
                read = max((min(s.reached, len(prefix)) for s in self.sequences), default=0)
                read += sum(max(0, s.reached - len(prefix)) for s in self.sequences)
                whole = len(prefix) + sum(map(len, continuations))
            case Embed(inputs=inputs) | Label(inputs=inputs):
                read = sum(s.reached for s in self.sequences)
                whole = sum(map(len, inputs))
        if finished:
            read = whole
        return Usage(read, min(cached, read), sum(s.produced for s in self.sequences))

    def timings(self, now: float) -> Timings:
        """How long it waited, read and wrote until `now`."""
        started = now if self.started is None else self.started
        prompted = now if self.prompted is None else self.prompted
        return Timings(started - self.arrived, prompted - started, now - prompted)


def refusal(call: Call | Weigh, vocabulary: int, context: int, blocks: int) -> str | None:
    """Why this call cannot be run, as a word of `engine.ERRORS`; None when it can. The door has checked most of it with a better answer."""
    match call:
        case Generate(prompt=prompt, limits=limits):
            inputs = [prompt]
            longest = len(prompt) + limits.max_output_tokens
            ids = (*(i for i, _ in call.sampling.logit_bias), *limits.end_token_ids)
            within = 1 <= call.outputs <= MOST_OUTPUTS and limits.max_output_tokens >= 1 and 0 <= (call.top_logprobs or 0) <= MOST_TOP
            if not within or not _sane(call.sampling):
                return "out_of_bounds"
        case Score(prefix=prefix, continuations=continuations):
            inputs = [prefix]
            longest = len(prefix) + max(map(len, continuations), default=0)
            ids = (*(i for continuation in continuations for i in continuation), *call.probes, *call.first_probes)
        case Embed() | Label():
            inputs = list(call.inputs)
            longest = max(map(len, inputs), default=0)
            ids = ()
        case Weigh(prefix=prefix, continuations=continuations):
            inputs = [prefix, *continuations]
            longest = len(prefix) + max(map(len, continuations), default=0)
            ids = ()
            # Which labels a head has is known where it is computed.
            named = not continuations or 0 <= (call.target or 0) < len(continuations)
            if len(call.contrast) not in (0, len(continuations)) or not named:
                return "out_of_bounds"
    if not all(inputs):
        return "empty_input"
    if any(min(tokens) < 0 or max(tokens) >= vocabulary for tokens in (*inputs, ids) if tokens):
        return "token_out_of_range"
    if longest > context:
        return "over_context"
    # The last token drawn is never computed.
    if blocks_for(longest - 1 if isinstance(call, Generate) else longest) > blocks:
        return "over_pool"
    return None


def _sane(sampling: Sampling) -> bool:
    numbers = (sampling.repetition, sampling.frequency, sampling.presence, *(bias for _, bias in sampling.logit_bias))
    return (
        all(map(isfinite, numbers))
        and 0 <= sampling.temperature < float("inf")
        and 0 < sampling.top_p <= 1
        and 0 <= sampling.min_p <= 1
        and sampling.top_k >= 0
        and sampling.repetition > 0
    )
