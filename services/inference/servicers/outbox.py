"""Events on their way to one reader: text is sent together, quiet is filled, and a reader that stalls is given up on."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable

from argosy.v1.stream_pb2 import GenerationEvent, Heartbeat, Phase, TextDelta, TokenLogprob

__all__ = ["Outbox"]

WAITING_EVENTS = 64  # beyond them text waits in one piece an output, which the output's own limit bounds
FLUSH_S, FLUSH_TOKENS = 0.020, 8  # what "unset" means: whichever comes first


class Outbox:
    """Producers put without waiting, one reader takes. The first text of each output goes at once; later text waits for time or tokens."""

    def __init__(self, *, flush_s: float | None = None, stall_s: float = 30.0, heartbeat_s: float = 15.0) -> None:
        """`flush_s` None: 20 ms or 8 tokens. `self.stalled` is called when a full outbox was not read for `stall_s`."""
        self._events: deque[GenerationEvent] = deque()
        self._wake = asyncio.Event()
        self._flush_s = FLUSH_S if flush_s is None else flush_s
        self._flush_tokens = FLUSH_TOKENS if flush_s is None else None
        self._stall_s = stall_s
        self._heartbeat_s = heartbeat_s
        self.stalled: Callable[[], None] = lambda: None
        self._pending: dict[int, tuple[TextDelta, int]] = {}  # by output: the text, and the tokens in it
        self._begun: set[int] = set()
        self._flush_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._taken = 0
        self._closed = False
        self._error: BaseException | None = None
        self.phase: Phase.ValueType = Phase.PHASE_WAITING
        self.queue_position = 0

    def text(self, index: int, text: str, tokens: Iterable[TokenLogprob] = (), count: int = 1) -> None:
        """Text of one output, and the tokens behind it; `count` tokens went by."""
        if not text:
            return
        delta, held = self._pending.get(index) or (TextDelta(index=index), 0)
        delta.text += text
        delta.tokens.extend(tokens)
        held += count
        self._pending[index] = (delta, held)
        if index not in self._begun or self._flush_s == 0 or (self._flush_tokens is not None and held >= self._flush_tokens):
            self._begun.add(index)
            self._flush(index)
        elif self._flush_timer is None:
            self._flush_timer = asyncio.get_running_loop().call_later(self._flush_s, self._due)

    def put(self, event: GenerationEvent, after: int | None = None) -> None:
        """A rare event, behind the text of output `after`, or of every output. Never waits: a call has few of them."""
        for index in list(self._pending) if after is None else [after]:
            if index in self._pending:
                self._append(self._take(index))
        self._append(event)

    def close(self, error: BaseException | None = None, *, drop: bool = False) -> None:
        """Nothing more comes. The reader gets what waits (`drop`: nothing), then `error`."""
        self._closed, self._error = True, error
        if drop:
            self._events.clear()
            self._pending.clear()
        for timer in (self._flush_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        self._wake.set()

    async def events(self) -> AsyncGenerator[GenerationEvent, None]:
        """Every event, numbered from 1 without a gap, with a Heartbeat wherever `heartbeat_s` would pass in silence."""
        sequence = 0
        while True:
            event = await self._next(begun=sequence > 0)
            if event is None:
                break
            sequence += 1
            event.sequence = sequence
            yield event
        if self._error is not None:
            raise self._error

    async def _next(self, *, begun: bool) -> GenerationEvent | None:
        while not self._events:
            if self._closed:
                return self._take(next(iter(self._pending))) if self._pending else None
            self._wake.clear()
            try:
                async with asyncio.timeout(self._heartbeat_s):
                    await self._wake.wait()
            except TimeoutError:
                if begun:  # Started is first, whatever it waits for
                    place = self.queue_position if self.phase == Phase.PHASE_WAITING else 0
                    return GenerationEvent(heartbeat=Heartbeat(phase=self.phase, queue_position=place))
        self._taken += 1
        event = self._events.popleft()
        if self._pending and self._flush_timer is None and len(self._events) < WAITING_EVENTS:
            self._due()  # what found no room
        return event

    def _take(self, index: int) -> GenerationEvent:
        return GenerationEvent(text=self._pending.pop(index)[0])

    def _flush(self, index: int) -> None:
        if len(self._events) < WAITING_EVENTS:
            self._append(self._take(index))
        else:
            self._watch_reader()

    def _append(self, event: GenerationEvent) -> None:
        self._events.append(event)
        self._wake.set()

    def _due(self) -> None:
        self._flush_timer = None
        for index in list(self._pending):
            self._flush(index)

    def _watch_reader(self) -> None:
        if self._stall_timer is None and not self._closed:
            self._stall_timer = asyncio.get_running_loop().call_later(self._stall_s, self._judge_reader, self._taken)

    def _judge_reader(self, taken: int) -> None:
        self._stall_timer = None
        if self._taken != taken:
            if self._pending and len(self._events) >= WAITING_EVENTS:
                self._watch_reader()
        else:
            self.stalled()
