"""An engine without tensors: the `Host` protocol, scripted, with ground truth about what it really did.

Without a script every call says the prompt's own tokens back, so a canary in a prompt is a canary in the answer (I5). A script is a
list a call works through for each output: an id is a token, a FinishReason ends the output, an Event is waited for (set it with
`release`), `LIMIT` waits for the time limit or the deadline, an exception is raised as if the engine had failed.
"""

import asyncio
import hashlib
import math
import struct
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from services.inference.engine.calls import (
    AdapterReady,
    Asked,
    Continuation,
    Done,
    Embed,
    Embedded,
    Ended,
    Evict,
    FinishReason,
    FromEngine,
    Generate,
    Hello,
    Label,
    Labelled,
    Load,
    Prefetch,
    PromptScored,
    Sampling,
    Score,
    Scored,
    Timings,
    Token,
    Usage,
    Weigh,
    Weighed,
    WorkClass,
)
from services.inference.engine.host import EngineLost, EngineNotReady

LIMIT = object()  # in a script: nothing more until the call's time limit or deadline
LOST = EngineLost("scripted")
Step = Any  # int | FinishReason | asyncio.Event | Exception | LIMIT
IDLE = Load(0, 0, 0, 0, 1_000.0, 100.0, 1_000, 1_000, 0, 0, 0.0, 0)


def hello(**changes: Any) -> Hello:
    """What the fake says of itself; `changes` are Hello's fields."""
    said: dict[str, Any] = {
        "model": "tiny",
        "digest": "ab" * 32,
        "architecture": "fake",
        "device": "cpu",
        "dtype": "float32",
        "vocabulary": 1_000,
        "context": 512,
        "width": 8,
        "block_size": 16,
        "blocks": 1_000,
        "default_sampling": Sampling(seed=0, temperature=1.0, top_k=64, top_p=0.95),
        "end_token_ids": (2,),
        "backend": "eager",
        "adapter_slots": 4,
    }
    return Hello(**(said | changes))


def likely(prefix: Sequence[int], token: int) -> float:
    """A log-probability that depends on all of its inputs and on nothing else, -8..-0.1."""
    digest = hashlib.blake2b(struct.pack(f"<{len(prefix) + 1}I", *prefix, token), digest_size=4).digest()
    return -0.1 - 7.9 * int.from_bytes(digest) / 2**32


@dataclass
class FakeHost:
    """See the module. `says` may be a list for every call or a function of the call."""

    says: Sequence[Step] | Callable[[Generate, int], Iterable[Step]] | None = None
    scores: Callable[[Sequence[int], int], float] = likely
    hello: Hello = field(default_factory=hello)
    load: Load = IDLE
    warm: asyncio.Event | None = None  # `start` waits for it
    calls: list[Asked] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    totals: Counter[str] = field(default_factory=Counter)  # tokens, done, aborted, lost
    closed: bool = False
    drained_s: float | None = None
    golden: Sequence[int] = tuple(range(10, 18))  # what the replica's own golden prompt (class EXPLAIN) is answered; not counted
    golden_error: str | None = None  # or this, as its `Done.error`
    error: str | None = None  # `Done.error` of each call, in place of an answer
    gradients: bool = True
    adapters: dict[tuple[str, str], AdapterReady] = field(default_factory=dict)  # by owner and digest; see `tuned`
    _stopped: set[tuple[str, int]] = field(default_factory=set)
    _aborted: set[str] = field(default_factory=set)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)
    _lost: asyncio.Event = field(default_factory=asyncio.Event)

    async def start(self) -> Hello:
        if self.warm is not None:
            await self.warm.wait()
        return self.hello

    def lose(self) -> None:
        """The child dies: every call raises EngineLost, at once."""
        self._lost.set()
        self.changed()

    def release(self, event: asyncio.Event) -> None:
        """Let the scripts that wait for `event` go on."""
        event.set()
        self.changed()

    def changed(self) -> None:
        self._changed.set()

    async def until(self, condition: Callable[["FakeHost"], bool], timeout_s: float = 10.0) -> None:
        """Wait until the ground truth satisfies `condition`."""
        async with asyncio.timeout(timeout_s):
            while not condition(self):
                self._changed.clear()
                await self._changed.wait()

    async def watch_load(self) -> AsyncIterator[Load]:
        seen = None
        while not self.closed:
            if seen is not self.load:
                seen = self.load
                yield seen
            else:
                self._changed.clear()
                await self._changed.wait()

    @property
    def ready(self) -> bool:
        return not self.closed and not self._lost.is_set() and (self.warm is None or self.warm.is_set())

    async def watch_ready(self) -> AsyncIterator[bool]:
        seen = None
        while True:
            if seen is not self.ready:
                seen = self.ready
                yield seen
            else:
                self._changed.clear()
                await self._changed.wait()

    def set_load(self, load: Load) -> None:
        self.load = load
        self.changed()

    def stop(self, id: str, index: int) -> None:
        self._stopped.add((id, index))
        self.changed()

    def abort(self, *ids: str) -> None:
        self._aborted.update(ids)
        self.changed()

    async def drain(self, grace_s: float) -> None:
        self.drained_s = grace_s

    async def close(self) -> None:
        self.closed = True
        self.changed()

    def tuned(self, owner: str, digest: str, **fields: Any) -> str:
        """Let an adapter exist; `fields` are AdapterReady's. Returns its digest."""
        self.adapters[owner, digest] = AdapterReady("", digest, **fields)
        return digest

    async def submit(self, call: Asked) -> AsyncIterator[FromEngine]:
        if not self.ready:
            raise EngineNotReady("scripted")
        if isinstance(call, Generate) and call.work_class is WorkClass.EXPLAIN:
            for token in self.golden:
                yield Token(call.id, 0, token)
            yield Ended(call.id, 0, FinishReason.LENGTH)
            yield Done(call.id, Usage(len(call.prompt), 0, len(self.golden)), Timings(0.0, 0.0, 0.0), self.golden_error)
            return
        self.calls.append(call)
        self.running.add(call.id)
        self.changed()
        ended = "aborted"
        try:
            async for message in self._messages(call):
                yield message
                await asyncio.sleep(0)  # a step's border: others run, as they do between real steps
            ended = "done"
        except EngineLost:
            ended = "lost"
            raise
        finally:
            self.running.discard(call.id)
            self.totals[ended] += 1
            self.changed()

    async def _messages(self, call: Asked) -> AsyncIterator[FromEngine]:
        nothing = Usage(0, 0, 0), Timings(0.0, 0.0, 0.0)
        if self.error is not None:
            yield Done(call.id, *nothing, self.error)
            return
        if isinstance(call, Evict):
            gone = {key for key in self.adapters if key[1] == call.digest and call.owner in ("", key[0])}
            self.adapters = {key: ready for key, ready in self.adapters.items() if key not in gone}
            if gone:
                self.set_load(msgspec.structs.replace(self.load, adapters=tuple(d for d in self.load.adapters if d != call.digest)))
            yield Done(call.id, *nothing)
            return
        digest = call.digest if isinstance(call, Prefetch) else call.adapter
        ready = self.adapters.get((call.owner, digest)) if digest else None
        if digest and ready is None:
            if isinstance(call, Prefetch):
                yield AdapterReady(call.id, digest, error="adapter_unknown")
            yield Done(call.id, *nothing, "adapter_unknown")
            return
        if ready is not None and ready.error is not None:
            if isinstance(call, Prefetch):
                yield AdapterReady(call.id, digest, error=ready.error)
            yield Done(call.id, *nothing, ready.error)
            return
        if digest and digest not in self.load.adapters:
            self.set_load(msgspec.structs.replace(self.load, adapters=(*self.load.adapters, digest)))
        match call:
            case Generate():
                async for message in self._generate(call):
                    yield message
            case Score():
                yield self._score(call)
                read = len(call.prefix) + sum(map(len, call.continuations))
                yield Done(call.id, Usage(read, 0, 0), Timings(0.001, 0.002, 0.0))
            case Prefetch():
                assert ready is not None
                yield msgspec.structs.replace(ready, id=call.id)
                yield Done(call.id, *nothing)
            case Label():
                assert ready is not None
                count = len(ready.labels)
                logits = [[likely(ids, place) for place in range(count)] for ids in call.inputs]
                yield Labelled(call.id, tuple(struct.pack(f"<{count}f", *row) for row in logits))
                yield Done(call.id, Usage(sum(map(len, call.inputs)), 0, 0), Timings(0.001, 0.002, 0.0))
            case Weigh():
                if not self.gradients:
                    yield Done(call.id, *nothing, "no_gradients")
                    return
                yield self._weigh(call, ready)
                read = len(call.prefix) * max(1, len(call.continuations)) + sum(map(len, call.continuations))
                yield Done(call.id, Usage(read, 0, 0), Timings(0.0, 0.0, 0.0))
            case Embed():
                vectors = tuple(struct.pack(f"<{self.hello.width}f", *self._vector(ids)) for ids in call.inputs)
                yield Embedded(call.id, vectors)
                yield Done(call.id, Usage(sum(map(len, call.inputs)), 0, 0), Timings(0.001, 0.002, 0.0))

    async def _generate(self, call: Generate) -> AsyncIterator[FromEngine]:
        if call.prompt_logprobs:
            pairs = [(call.prompt[:at], token) for at, token in enumerate(call.prompt)][1:]
            yield PromptScored(call.id, tuple(self.scores(before, token) for before, token in pairs))
        used = 0
        scripts = {index: iter(self._script(call, index)) for index in range(call.outputs)}
        spoken: Counter[int] = Counter()
        while scripts:
            for index in list(scripts):
                reason: FinishReason | None = None
                step = next(scripts[index], FinishReason.END_TOKEN)
                while isinstance(step, asyncio.Event):
                    await self._until(lambda held=step: held.is_set() or call.id in self._aborted)
                    step = next(scripts[index], FinishReason.END_TOKEN)
                if self._lost.is_set():
                    raise EngineLost("scripted")
                if isinstance(step, Exception):
                    raise step
                if call.id in self._aborted:
                    reason = FinishReason.CANCELLED
                elif (call.id, index) in self._stopped:
                    reason = FinishReason.STOPPED
                elif step is LIMIT:
                    soft = call.time_limit_s is not None and call.time_limit_s < call.deadline_s
                    await self._quiet(call.time_limit_s if soft and call.time_limit_s is not None else call.deadline_s)
                    reason = FinishReason.TIME_LIMIT if soft else FinishReason.DEADLINE
                elif isinstance(step, FinishReason):
                    reason = step
                    used += reason is FinishReason.END_TOKEN  # counted, not sent
                elif step in call.limits.end_token_ids and not call.limits.ignore_end_token:
                    if spoken[index] < call.limits.min_output_tokens:
                        continue  # barred: the script's next token in its place
                    reason = FinishReason.END_TOKEN
                    used += 1
                else:
                    spoken[index] += 1
                    used += 1
                    self.totals["tokens"] += 1
                    yield self._token(call, index, step, spoken[index])
                    if spoken[index] >= call.limits.max_output_tokens:
                        reason = FinishReason.LENGTH
                if reason is not None:
                    del scripts[index]
                    yield Ended(call.id, index, reason)
        yield Done(call.id, Usage(len(call.prompt), 0, used), Timings(0.001, 0.002, 0.003))

    def _script(self, call: Generate, index: int) -> Iterable[Step]:
        if self.says is None:
            return call.prompt[1:]
        return self.says(call, index) if callable(self.says) else self.says

    def _token(self, call: Generate, index: int, token: int, position: int) -> Token:
        if call.top_logprobs is None:
            return Token(call.id, index, token)
        top = tuple((token + rank, -0.5 - rank) for rank in range(call.top_logprobs))
        return Token(call.id, index, token, -0.5 - position / 100, top)

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Until the condition holds or the engine is lost; asked again at each change."""
        while not condition() and not self._lost.is_set():
            self._changed.clear()
            await self._changed.wait()

    async def _quiet(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._lost.wait(), seconds)
        except TimeoutError:
            return

    def _score(self, call: Score) -> Scored:
        def one(continuation: Sequence[int]) -> Continuation:
            whole = (*call.prefix, *continuation)
            places = range(len(call.prefix), len(whole) + 1)
            return Continuation(
                tuple(self.scores(whole[:at], whole[at]) for at in places[:-1]),
                tuple(tuple(self.scores(whole[:at], probe) for probe in call.probes) for at in places) if call.probes else (),
            )

        first = tuple(self.scores(call.prefix, probe) for probe in call.first_probes)
        return Scored(call.id, tuple(map(one, call.continuations)), first)

    def _weigh(self, call: Weigh, ready: AdapterReady | None) -> Weighed:
        """A token is worth its id; scores are those of `Score` or `Label`."""
        if call.continuations:
            scored = self._score(Score(call.id, call.prefix, call.continuations, 0.0, "", b"")).continuations
            found = [sum(one.logprobs) / (len(one.logprobs) if call.contrast else 1) for one in scored]
            scores = _log_softmax([one - base for one, base in zip(found, call.contrast, strict=True)]) if call.contrast else found
        else:
            assert ready is not None
            scores = _log_softmax([likely(call.prefix, place) / ready.temperature for place in range(len(ready.labels))])
        target = max(range(len(scores)), key=scores.__getitem__) if call.target is None else call.target
        return Weighed(call.id, tuple(map(float, call.prefix)), tuple(scores), target)

    def _vector(self, ids: Sequence[int]) -> list[float]:
        return [likely(ids, place) for place in range(self.hello.width)]


def _log_softmax(scores: Sequence[float]) -> list[float]:
    total = math.log(sum(map(math.exp, scores)))
    return [score - total for score in scores]
