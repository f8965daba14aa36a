"""The step loop: take messages, schedule, run, append. Names a `Runner`, holds no tensor. Pure.

    for message in inbox: engine.take(message)
    events = engine.step()

Whatever goes wrong goes wrong for one call: a step that raises is repeated by halves until the culprit is alone, memory that runs out
shrinks the step before it fails anybody, and every call ends through `_finish`, which frees all that it held.
"""

import heapq
import logging
import time
import traceback
from collections.abc import Callable
from itertools import count
from typing import Protocol

import msgspec

from services.inference.engine.adapters import Adapters, Entry, Fetched, key_of
from services.inference.engine.adapters import State as Having
from services.inference.engine.blocks import Blocks, root_key
from services.inference.engine.calls import (
    Abort,
    Call,
    Done,
    Drain,
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
    Score,
    Stop,
    Timings,
    Token,
    Usage,
    Weigh,
    Weighed,
)
from services.inference.engine.inbox import Inbox, Message
from services.inference.engine.live import MOST_OUTPUTS, Live, refusal
from services.inference.engine.meter import Meter
from services.inference.engine.prefetches import NOTHING, Prefetches
from services.inference.engine.scheduler import Plan, Scheduler
from services.inference.engine.sequence import Sequence, State
from services.inference.engine.settings import EngineSettings
from services.inference.engine.step import BLOCK_SIZE, DeviceLost, Row, RowResult, Runner

ERRORS = {
    "no_gradients": "refused: this engine cannot weigh tokens",
    "unsupported": "refused: this engine has no such work",
    "no_adapters": "refused: this engine cannot load any",
    "adapter_unknown": "no adapter of this digest belongs to this owner",
    "adapter_refused": "the adapter's files failed a check",
    "adapter_unavailable": "the store did not answer",
    "adapter_failed": "a step raised with this adapter alone in it",
    "adapter_headless": "labels were asked of an adapter without a head",
    "draining": "refused: the engine takes no more calls",
    "queue_full": "refused: too many sequences wait",
    "empty_input": "refused: an input has no token",
    "token_out_of_range": "refused: a token id is not in the vocabulary",
    "out_of_bounds": "refused: a count or a sampling parameter is out of its bounds",
    "over_context": "refused: longer than the model's context",
    "over_pool": "refused: longer than the KV pool",
    "cancelled": "a Score or Embed ended by Abort",
    "deadline": "a Score or Embed ended by its deadline",
    "step_failed": "the forward raised with this call alone in it",
    "out_of_memory": "a step of one token was too large for the device",
    "nan": "the model answered what is not a number for this call",
    "barred": "bias and barred end tokens left no token to choose",
    "gap": "pooling missed earlier tokens of an input",
}
LOAD_EVERY_S = 0.1
MOST_WEIGHING = 32  # calls beside the batch, one at a time
PATIENCE_S = 5.0  # between signs of life while calls wait for what only others can bring
GROW_AFTER_STEPS = 64  # without running out of memory, before a shrunk budget doubles

log = logging.getLogger(__name__)


class Weighing(Protocol):
    """Computes `Weigh` calls elsewhere, and tells the inbox."""

    def ask(self, call: Weigh) -> None:
        """Answered by one `Weighed`."""
        ...

    def forget(self, id: str) -> None:
        """Nobody waits for it any more."""
        ...


class Engine:
    """Calls in, events out, one step at a time; used by one thread.

    `clock` counts seconds. `fetch` is asked for adapters that are not here, by key, and answers with `Fetched`; `weighing` is given what
    is computed beside the batch.
    """

    def __init__(
        self,
        runner: Runner,
        hello: Hello,
        settings: EngineSettings,
        clock: Callable[[], float] = time.monotonic,
        fetch: Callable[[str], None] | None = None,
        weighing: Weighing | None = None,
    ) -> None:
        self.blocks = Blocks(runner.blocks, int(runner.blocks * settings.prefix_quota))
        self.draining = False
        self._runner = runner
        self._digest = hello.digest
        self._context = min(runner.context, runner.blocks * BLOCK_SIZE)
        self._most_waiting = settings.max_waiting
        self._most_tokens = settings.step_tokens(hello.device)
        self._slots = runner.slots if fetch is not None else 0
        self._scheduler = Scheduler(self.blocks, self._most_tokens, settings.max_sequences, self._slots)
        self._adapters = Adapters(fetch or (lambda key: None), clock)
        self._expecting: dict[str, dict[int, Live]] = {}  # calls whose adapter is being fetched, by its key
        self._prefetches = Prefetches(self._adapters, clock, self._say)
        self._weighing = weighing
        self._weighed: dict[str, Weigh] = {}  # asked for, by id
        self._clock = clock
        self._lives: dict[str, Live] = {}
        self._numbers = count()
        self._keys = count()
        self._by_number: dict[int, Live] = {}
        self._alarms: list[tuple[float, int, FinishReason]] = []  # heap of (when, call's number, how it ends)
        self._events: list[FromEngine] = []
        self._meter = Meter()
        self._calm_steps = 0  # since memory last ran out
        self._cached_tokens = 0
        self._present = 0  # sequences not ended
        self._prefilled = self._decoded = 0  # tokens of this step
        self._load_at = float("-inf")
        self._was_busy = False
        self._changes = 0  # of what adapters are here, as last reported

    @property
    def idle(self) -> bool:
        """Nothing to compute, to wait for or to say."""
        return not self._lives and not self._prefetches and not self._weighed and not self._events

    @property
    def wait_s(self) -> float | None:
        """How long there is nothing to do until a message comes; None: however long."""
        if self.idle:
            return None
        waiting = sum(map(len, self._expecting.values()))
        if self._events or waiting < len(self._lives):
            return 0.0
        now = self._clock()
        due = [now + PATIENCE_S, *(when for when in (self._prefetches.due,) if when is not None), *(alarm[0] for alarm in self._alarms[:1])]
        return max(0.0, min(due) - now)

    def take(self, message: Message) -> None:
        """Act on one message. Its effect on running calls shows before their next step."""
        match message:
            case Generate() | Score() | Embed() | Label():
                self._begin(message)
            case Weigh():
                self._weigh(message)
            case Weighed():
                self._answer_weighed(message)
            case Prefetch():
                self._prefetch(message)
            case Evict():
                for key in self._adapters.keys(message.digest, message.owner):
                    self._lose(key, FinishReason.CANCELLED, "adapter_unknown")
                    self._adapters.drop(key)
                    self.blocks.erase(key)
                self._say_done(message.id)
            case Fetched():
                self._arrived(message)
            case Stop(id=id, index=index):
                live = self._lives.get(id)
                if live is not None and isinstance(live.call, Generate) and index < len(live.sequences):
                    self._end_output(live, live.sequences[index], FinishReason.STOPPED)
            case Abort(ids=ids):
                for id in ids:
                    live = self._lives.get(id)
                    if live is not None:
                        self._finish(live, FinishReason.CANCELLED)
                    elif not self._prefetches.cancel(id) and id in self._weighed and self._weighing is not None:
                        self._weighing.forget(id)
                        self._answer_weighed(Weighed(id, error="cancelled"))
            case Drain():
                self.draining = True

    def step(self) -> list[FromEngine]:
        """End what is due, compute one step, and return all that has happened since the last."""
        began = self._clock()
        self._expire(began)
        for turn in self._scheduler.rotate(began):
            self._install(turn.adapter, turn.slot)
        plan = self._scheduler.plan()
        if plan:
            for sequence, _ in plan:
                if sequence.state is State.PREFILLING:
                    self._starts(sequence, began)
            self._prefilled = self._decoded = 0
            self._run(plan, [sequence.row(tokens) for sequence, tokens in plan])
            now = self._clock()
            self._meter.add(self._prefilled, self._decoded, len(plan), now - began)
            self._recover()
        elif len(self._lives) > sum(map(len, self._expecting.values())):
            raise RuntimeError("calls are here, but none can run")
        else:
            now = began
        busy = bool(self._lives)
        if busy is not self._was_busy or self._adapters.changes != self._changes or now - self._load_at >= LOAD_EVERY_S:
            self._was_busy, self._changes = busy, self._adapters.changes
            self._load_at = now
            self._events.append(self.load())
        events, self._events = self._events, []
        return events

    def load(self) -> Load:
        """Where the engine stands."""
        waiting = queued = allowed = 0
        for live in self._lives.values():
            for sequence in live.sequences:
                match sequence.state:
                    case State.WAITING:
                        waiting += 1
                        queued += sequence.pending
                    case State.PREFILLING:
                        queued += sequence.pending
                if sequence.limits is not None and sequence.blocks:
                    allowed += sequence.limits.max_output_tokens - sequence.produced
        return Load(
            waiting_sequences=waiting,
            running_sequences=self._scheduler.running,
            queued_tokens=queued,
            running_tokens=allowed,
            prefill_tokens_per_s=self._meter.prefill.per_s,
            decode_tokens_per_s=self._meter.decode.per_s,
            free_blocks=self.blocks.available,
            total_blocks=self.blocks.count,
            cached_tokens=self._cached_tokens,
            steps=self._meter.steps,
            step_s=self._meter.step_s,
            batch=self._meter.batch,
            adapters=self._adapters.ready,
        )

    # How a call begins and ends.

    def _begin(self, call: Call) -> None:
        if call.id in self._lives:
            log.error("a call came twice", extra={"call": call.id})
            return
        word = self._refusal(call)
        if word is not None:
            if isinstance(call, Generate):
                self._events.extend(Ended(call.id, index, FinishReason.ERROR) for index in range(min(call.outputs, MOST_OUTPUTS)))
            self._say_done(call.id, word)
            return
        now = self._clock()
        root = root_key(call.cache_salt, call.tenant, self._digest, call.adapter)
        live = Live(call, next(self._numbers), now, root, self._keys)
        self._lives[call.id] = self._by_number[live.number] = live
        self._present += live.open
        self._alarm(now + call.deadline_s, live, FinishReason.DEADLINE)
        if isinstance(call, Generate) and call.time_limit_s is not None:
            self._alarm(now + call.time_limit_s, live, FinishReason.TIME_LIMIT)
        if not call.adapter:
            self._admit(live)
            return
        live.entry = self._adapters.use(key_of(call.owner, call.adapter))
        if live.entry.state is Having.FETCHING:
            self._expecting.setdefault(live.entry.key, {})[live.number] = live
        else:
            self._tune(live, live.entry)

    def _admit(self, live: Live) -> None:
        live.admitted = True
        for sequence in live.sequences[: 1 if live.held else None]:
            self._scheduler.add(sequence)
        if not live.sequences:  # nothing was asked: a Score without continuations, an Embed without inputs
            self._answer(live)

    def _refusal(self, call: Call) -> str | None:
        if self.draining:
            return "draining"
        if call.adapter and not self._slots:
            return "no_adapters"
        if self._present - self._scheduler.running >= self._most_waiting:
            return "queue_full"
        return refusal(call, self._runner.vocabulary, self._context, self.blocks.count)

    def _end_output(self, live: Live, sequence: Sequence, reason: FinishReason) -> None:
        if sequence.state is State.ENDED:
            return
        self._drop(live, sequence)
        self._events.append(Ended(live.call.id, sequence.index, reason))
        if not live.open:
            self._finish(live, reason)

    def _answer(self, live: Live) -> None:
        """All of a Score or Embed is computed."""
        call = live.call
        if isinstance(call, Score):
            self._events.append(live.scored(call))
        elif isinstance(call, Embed):
            self._events.append(Embedded(call.id, tuple(live.vectors[i] for i in range(len(call.inputs)))))
        elif isinstance(call, Label):
            self._events.append(Labelled(call.id, tuple(live.vectors[i] for i in range(len(call.inputs)))))
        self._finish(live, None)

    def _finish(self, live: Live, reason: FinishReason | None, error: str | None = None) -> None:
        """The one exit of a call: end what is still open for `reason`, free all it held, and say what it cost."""
        call = live.call
        for sequence in live.sequences:
            if sequence.state is not State.ENDED:
                # What a failing call wrote may be the cause: nobody shall find it in the cache.
                self._drop(live, sequence, suspect=error is not None, succession=False)
                if isinstance(call, Generate) and reason is not None:
                    self._events.append(Ended(call.id, sequence.index, reason))
        del self._lives[call.id], self._by_number[live.number]
        if live.entry is not None:
            self._adapters.release(live.entry)
            self._unexpect(live.entry.key, live.number)
        if error is None and reason is not None and not isinstance(call, Generate):
            error = reason.name.lower()
        self._events.append(Done(call.id, live.usage(finished=reason is None), live.timings(self._clock()), error))

    def _drop(self, live: Live, sequence: Sequence, suspect: bool = False, succession: bool = True) -> None:
        if not live.admitted or sequence in live.held:
            if sequence in live.held:
                live.held.remove(sequence)
            sequence.withdraw(State.ENDED)
        else:
            self._scheduler.remove(sequence, suspect)
        self._runner.forget(sequence.key)
        self._present -= 1
        live.open -= 1
        if succession and live.admitted and (heir := live.successor(sequence)) is not None:
            self._scheduler.add(heir, front=True)

    def _alarm(self, when: float, live: Live, reason: FinishReason) -> None:
        heapq.heappush(self._alarms, (when, live.number, reason))
        if len(self._alarms) > 64 + 4 * len(self._lives):  # most are of calls long done
            self._alarms = [alarm for alarm in self._alarms if alarm[1] in self._by_number]
            heapq.heapify(self._alarms)

    def _expire(self, now: float) -> None:
        while self._alarms and self._alarms[0][0] <= now:
            _, number, reason = heapq.heappop(self._alarms)
            live = self._by_number.get(number)
            if live is not None:
                self._finish(live, reason)
        self._prefetches.expire(now)

    def _say(self, event: FromEngine) -> None:
        """With the next step."""
        self._events.append(event)

    def _say_done(self, id: str, error: str | None = None) -> None:
        """About a call that cost nothing."""
        self._events.append(Done(id, *NOTHING, error))

    # What is weighed beside the batch.

    def _weigh(self, call: Weigh) -> None:
        word = "no_gradients" if self._weighing is None else "draining" if self.draining else None
        word = word or ("queue_full" if len(self._weighed) >= MOST_WEIGHING else None)
        word = word or refusal(call, self._runner.vocabulary, self._context, self.blocks.count)
        if word is not None or self._weighing is None:
            self._say_done(call.id, word)
            return
        self._weighed[call.id] = call
        self._weighing.ask(call)

    def _answer_weighed(self, answer: Weighed) -> None:
        call = self._weighed.pop(answer.id, None)
        if call is None:  # it was cancelled
            return
        if answer.error is not None:
            self._say_done(answer.id, answer.error)
            return
        self._events.append(answer)
        read = len(call.prefix) * max(1, len(call.continuations)) + sum(map(len, call.continuations))
        self._events.append(Done(answer.id, Usage(read, 0, 0), Timings(0.0, 0.0, 0.0)))

    # Adapters.

    def _prefetch(self, asked: Prefetch) -> None:
        word = "draining" if self.draining else None if self._slots else "no_adapters"
        word = word or ("queue_full" if len(self._prefetches) >= self._most_waiting else None)
        if word is not None:
            self._prefetches.refuse(asked, word)
        else:
            self._prefetches.add(asked)

    def _arrived(self, fetched: Fetched) -> None:
        entry = self._adapters.arrived(fetched)
        if entry is None:
            return
        self._prefetches.arrived(entry)
        for live in list(self._expecting.pop(entry.key, {}).values()):
            self._tune(live, entry)
        for key in self._adapters.surplus():
            self._vacate(key)

    def _tune(self, live: Live, entry: Entry) -> None:
        """Its adapter is here, or will not come."""
        error = entry.error or ("" if live.tune(entry) else "adapter_headless")
        if error:
            self._finish(live, FinishReason.ERROR, error)
        else:
            self._admit(live)

    def _install(self, key: str, slot: int) -> None:
        entry = next(live.entry for live in self._lives.values() if live.entry is not None and live.entry.key == key)
        try:
            self._runner.install(slot, entry.adapter)
        except DeviceLost:
            raise
        except Exception as failure:  # a device without room, say: the adapter's calls end, the others go on
            log.error("an adapter could not be installed", extra={"failure": type(failure).__name__})
            self._adapter_failed(entry)

    def _adapter_failed(self, entry: Entry) -> None:
        """It is the adapter's fault: its other calls would fail alike."""
        log.error("an adapter fails", extra={"adapter": entry.key.rpartition("/")[2]})
        self._lose(entry.key, FinishReason.ERROR, "adapter_failed")
        self._adapters.fail(entry, "adapter_failed")

    def _lose(self, key: str, reason: FinishReason, error: str) -> None:
        """End every call with an adapter, and take back its slot."""
        for live in [live for live in self._lives.values() if live.entry is not None and live.entry.key == key]:
            self._finish(live, reason, error)
        self._prefetches.lose(key, error)
        self._vacate(key)

    def _vacate(self, key: str) -> None:
        slot = self._scheduler.slots.forget(key)
        if slot is not None:
            self._runner.install(slot, None)

    def _unexpect(self, key: str, number: int) -> None:
        waiting = self._expecting.get(key)
        if waiting is not None and waiting.pop(number, None) is not None and not waiting:
            del self._expecting[key]

    # One step.

    def _starts(self, sequence: Sequence, now: float) -> None:
        live = _live(sequence)
        if live.started is None:
            live.started = now
            self._cached_tokens += sequence.computed
        if sequence.pool and not sequence.computed:
            self._runner.forget(sequence.key)  # a mean from before a preemption

    def _run(self, plan: Plan, rows: list[Row]) -> None:
        try:
            results = self._runner.step(rows)
            if len(results) != len(rows):
                raise RuntimeError(f"{len(results)} results for {len(rows)} rows")
        except DeviceLost:
            raise
        except MemoryError:
            self._shrink(plan, sum(len(row.tokens) for row in rows))
        except Exception as failure:  # whatever a model's forward may raise is fenced here
            self._bisect(plan, rows, failure)
        else:
            self._apply(plan, rows, results)

    def _bisect(self, plan: Plan, rows: list[Row], failure: Exception) -> None:
        if len(plan) == 1:
            # Where, not what: an exception's text may quote the input.
            where = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(failure.__traceback__)[-3:]]
            log.error("a step failed", extra={"failure": type(failure).__name__, "where": where})
            live = _live(plan[0][0])
            self._finish(live, FinishReason.ERROR, "step_failed")
            if live.entry is not None and live.entry.state is Having.READY:
                self._adapter_failed(live.entry)
            return
        middle = len(plan) // 2
        for half in (slice(0, middle), slice(middle, None)):
            # One call may have several rows: it ends with the first that fails.
            kept = [(entry, row) for entry, row in zip(plan[half], rows[half], strict=True) if entry[0].state is not State.ENDED]
            if kept:
                self._run([entry for entry, _ in kept], [row for _, row in kept])

    def _shrink(self, plan: Plan, tokens: int) -> None:
        log.warning("a step was too large for the device", extra={"tokens": tokens})
        if tokens == 1:
            self._finish(_live(plan[0][0]), FinishReason.ERROR, "out_of_memory")
            return
        self._scheduler.give_back(plan)
        self._scheduler.budget = max(1, min(self._scheduler.budget, tokens) // 2)
        self._calm_steps = 0

    def _recover(self) -> None:
        self._calm_steps += 1
        if self._scheduler.budget < self._most_tokens and self._calm_steps >= GROW_AFTER_STEPS:
            self._calm_steps = 0
            self._scheduler.budget = min(self._most_tokens, self._scheduler.budget * 2)

    def _apply(self, plan: Plan, rows: list[Row], results: list[RowResult]) -> None:
        now = self._clock()
        for (sequence, tokens), row, result in zip(plan, rows, results, strict=True):
            state = sequence.state
            if state is State.ENDED:  # with another row of its call
                continue
            live = _live(sequence)
            if result.error is not None:
                self._finish(live, FinishReason.ERROR, result.error)
                continue
            self._scheduler.advance(sequence, tokens)
            if state is State.DECODING:
                self._decoded += 1
            else:
                self._prefilled += tokens
                self._read(live, sequence, row, result, now)
            if row.draw is not None:
                self._append(live, sequence, result)

    def _read(self, live: Live, sequence: Sequence, row: Row, result: RowResult, now: float) -> None:
        """A prefill chunk was computed."""
        live.collect(sequence, row, result)
        if live.held and sequence.computed >= live.shared:
            while live.held:  # the last goes in front first
                self._scheduler.add(live.held.pop(), front=True)
        if sequence.pending:
            return
        if live.prompted is None:
            live.prompted = now
        if live.prompt_scores_due and sequence.report is not None:
            self._events.append(live.prompt_scored())
        if sequence.draw is None:
            if result.vector is not None:
                live.vectors[sequence.index] = result.vector
            self._drop(live, sequence)
            if not live.open:
                self._answer(live)

    def _append(self, live: Live, sequence: Sequence, result: RowResult) -> None:
        token = result.token
        if token is None:
            self._finish(live, FinishReason.ERROR, "step_failed")
            return
        reason = sequence.append(token)
        if reason is not FinishReason.END_TOKEN:
            self._events.append(Token(live.call.id, sequence.index, token, result.logprob, result.top))
        if reason is not None:
            self._end_output(live, sequence, reason)


def _live(sequence: Sequence) -> Live:
    assert isinstance(sequence.live, Live)  # set by Live itself; opaque to the scheduler's side
    return sequence.live


def offered(hello: Hello, runner: Runner) -> Hello:
    """What the engine can promise: a context longer than the pool would be a promise nobody keeps."""
    context = min(hello.context, runner.blocks * BLOCK_SIZE)
    return msgspec.structs.replace(hello, context=context, block_size=BLOCK_SIZE, blocks=runner.blocks)


def run(engine: Engine, inbox: Inbox, send: Callable[[list[FromEngine]], None]) -> None:
    """Step until the inbox is closed, or drained and idle. Sleeps while there is nothing to do."""
    while (messages := inbox.take(engine.wait_s)) is not None:
        for message in messages:
            engine.take(message)
        events = engine.step()
        if events:
            send(events)
        if engine.draining and engine.idle:
            return
