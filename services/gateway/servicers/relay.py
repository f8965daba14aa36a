"""One call on its way through: reserve, admit, place, relay, settle. Every inference servicer calls it, and nothing else does these.

Order of a call: admission refuses what has no chance, before the books are opened; the ledger reserves; admission finds a place, at once or
after a wait; the replica accepts, which is when our initial metadata goes out and retries end; events pass unopened, all but Started and
Completed; and whatever the end, `_Account.close` runs once: it stops the engine, learns what was used, gives the place back and settles.
"""

import asyncio
import contextlib
import enum
import logging
import math
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from opentelemetry import trace

from argosy.v1 import explanation_pb2, stream_pb2, usage_pb2
from argosy_internal.engine.v1 import engine_pb2
from services.chassis import status
from services.chassis.channel import remaining
from services.chassis.errors import (
    ApiKeyInvalid,
    DeadlineExceeded,
    KeyRevoked,
    NotStarted,
    ResourceNotFound,
    ServiceError,
    Shed,
    SlowConsumer,
    StreamLost,
)
from services.chassis.identity import CALLER, Caller
from services.chassis.interceptors import progress
from services.chassis.telemetry import Telemetry
from services.gateway.admission import Ask, Rank
from services.gateway.catalog import Served
from services.gateway.ledger import Ledger, Outcome, Reservation, Settlement
from services.gateway.routing import affinity
from services.gateway.settings import Placing

log = logging.getLogger(__name__)

EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs forgot it

ENGINE_SERVICE = "/argosy.internal.engine.v1.EngineService/"
USAGE_KEY = "argosy-usage-bin"  # argosy.v1.Usage, in the trailers of every end of a replica's call without Completed
ACCEPTED_KEY = "argosy-accepted"  # in a replica's initial metadata; a refusal has none, though gRPC may show us its empty place first
MARGIN_S = 0.2  # of the caller's deadline, kept to answer in; the replica keeps 0.05 of the rest for its own soft limit
SOFT_MARGIN_S = 0.25
AHEAD_EVENTS = 64  # R6: events held for a caller that reads slower than the engine writes
SMOOTHING = 0.05  # weight of the newest answer in the expected length
EXPECTED_TOKENS = 256.0  # of an answer, until some have been seen

Events = AsyncGenerator[bytes, None]


# --- what the relay needs of its neighbours -----------------------------------------------------------------------------------------


class Replica(Protocol):
    """A replica's methods; calls are grpc.aio's."""

    generate: Any  # unary_stream, events as bytes
    stub: Any  # EngineServiceStub


class Place(Protocol):
    """A place on a replica; see replicas.Place."""

    @property
    def link(self) -> Replica:
        """The replica's methods."""
        ...

    @property
    def served_by(self) -> str:
        """Its opaque label."""
        ...

    def metadata(self, caller: Caller) -> Any:
        """The signed caller."""
        ...

    def started(self) -> None:
        """The replica's load reports count the call from here."""
        ...

    async def abort(self, generation_id: str, caller: Caller) -> None:
        """Ask the replica to end the caller's generation."""
        ...

    def move(self) -> bool:
        """Go to another replica; False: there is none to go to."""
        ...

    def leave(self, *, failed: bool | None, cost: float | None = None) -> None:
        """Give the place up."""
        ...


class Fleet(Protocol):
    """The replicas; see replicas.Replicas."""

    def resolve(self, name: str, allowed: tuple[str, ...]) -> Served:
        """The model that answers to `name`."""
        ...

    def check(self, served: Served, ask: Ask, *, stream: bool) -> None:
        """Raise what `enter` would raise at once."""
        ...

    async def enter(self, served: Served, ask: Ask, *, stream: bool) -> Place:
        """A place on one of its replicas."""
        ...


class Names(Protocol):
    """A project's own models; see registry.OwnModels."""

    async def resolve(self, name: str, who: Caller, sticky: str) -> Served:
        """The version that answers to `name`."""
        ...


class Revocations(Protocol):
    """Tells live calls that their key was revoked (A9)."""

    def watch(self, key_id: str, cut: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
        """Call `cut` once if the key is revoked while inside."""
        ...


# --- one call -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Plan:
    """What the gateway reads of a request, once: its price and how long it may wait."""

    method: str  # exact RPC path
    model: str  # as asked
    served: Served
    caller: Caller
    request_id: str
    rank: Rank
    input_tokens: int  # estimate; the replica counts
    output_tokens: int  # the most, all outputs together
    body_digest: bytes
    prefix: bytes = b""  # of the prompt, for affinity
    time_limit_s: float | None = None
    stream: bool = False
    passes: int = 0  # the most, each over `input_tokens`; 0: one, and not billed as such

    @property
    def read_tokens(self) -> int:
        """The most that is read, over all passes."""
        return self.input_tokens * max(1, self.passes)


class End(enum.Enum):
    """Which event an encoded GenerationEvent holds, by its field number."""

    STARTED = 2
    COMPLETED = 8


def peek(event: bytes) -> tuple[int, int]:
    """Sequence and the oneof's field number of an encoded GenerationEvent, without opening it.

    Raises:
        ValueError: not written in field order as upb does; the caller then parses it.
    """
    if not event or event[0] != 0x08:  # field 1, varint
        raise ValueError("no sequence first")
    sequence = shift = 0
    for at in range(1, min(len(event), 11)):
        byte = event[at]
        sequence |= (byte & 0x7F) << shift
        if byte < 0x80:
            if at + 1 == len(event):
                return sequence, 0
            if event[at + 1] >= 0x80:
                raise ValueError("a field above 15")
            return sequence, event[at + 1] >> 3
        shift += 7
    raise ValueError("not a varint")


@dataclass(eq=False)
class _Account:
    """What one attempt has cost so far, and its one ending."""

    plan: Plan
    relay: "Relay"
    generation_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    place: Place | None = None
    call: Any = None  # the replica's call, while it may still have to be ended
    outcome: Outcome = Outcome.FAILED
    failed: bool | None = None  # the replica's fault? see routing.Replica.ended
    usage: usage_pb2.Usage | None = None  # the engine's own count, once known
    prompt_tokens: int = 0  # Started's
    deltas: int = 0  # each holds a token at least: the least that can be billed when a lost replica tells nothing
    finished: "asyncio.Event | None" = None  # set when the pump has read the call's end
    span: trace.Span = field(default_factory=trace.get_current_span)  # the door's
    began: float = field(default_factory=time.monotonic)
    placed_at: float | None = None  # when admission had found a place
    admitted_at: float | None = None  # when a replica had accepted
    first_at: float | None = None  # when the first delta had come
    _closing: "asyncio.Task[None] | None" = None

    def close(self, outcome: Outcome | None = None) -> "asyncio.Task[None]":
        """End the attempt: stop the engine, count, leave, settle. The first call decides the outcome; it runs to its end by itself."""
        if self._closing is None:
            if outcome is not None:
                self.outcome = outcome
            self._closing = self.relay.background(self._close())
        return self._closing

    async def _close(self) -> None:
        try:
            if self.call is not None and not self.call.done() and self.place is not None:
                await self._stop_engine(self.place)
            if self.usage is None and self.call is not None and self.call.done():
                self.usage = _usage_in(await self.call.trailing_metadata())
        finally:
            used = self.used()
            self.measure(self.relay.telemetry)
            if self.place is not None:
                self.place.leave(failed=self.failed, cost=used.input_tokens + used.output_tokens)
            settlement = Settlement(
                generation_id=self.generation_id,
                outcome=self.outcome,
                input_tokens=used.input_tokens,
                cached_input_tokens=used.cached_input_tokens,
                output_tokens=used.output_tokens,
                passes=used.passes,
                served_by=self.place.served_by if self.place is not None else "",
            )
            with self.relay.timed("settle"):
                await self.relay.ledger.settle(settlement)

    async def _stop_engine(self, place: Place) -> None:
        """Abort, then read on to the trailers with the exact usage. A hang-up alone would stop it too, but tell us nothing."""
        try:
            async with asyncio.timeout(self.relay.placing.abort_seconds):
                await place.abort(self.generation_id, self.plan.caller)
                if self.finished is not None:
                    await self.finished.wait()
        except (TimeoutError, grpc.aio.AioRpcError):
            log.warning("replica %s did not end an aborted call", place.served_by)
        finally:
            self.call.cancel()

    def measure(self, telemetry: Telemetry) -> None:
        """One generation as the conventions for generative models name it. Labels are our own words and served models' names."""
        used, ended = self.used(), time.monotonic()
        names = {"gen_ai.operation.name": _operation(self.plan.method), "gen_ai.request.model": self.plan.served.shared}
        self.show(names, used)
        kind = names | {"argosy.service": "gateway"}
        error = {} if self.outcome is Outcome.DONE else {"error.type": self.outcome.value}
        telemetry.record("argosy.ledger.settled", 1, {"argosy.outcome": self.outcome.value})
        telemetry.record("gen_ai.server.request.duration", ended - self.began, kind | error)
        if self.placed_at is not None:
            telemetry.record("argosy.queue.wait", self.placed_at - self.began, {"argosy.work_class": self.plan.rank.name})
        if self.admitted_at is None:
            return
        telemetry.record("gen_ai.client.token.usage", used.input_tokens, kind | {"gen_ai.token.type": "input"})
        telemetry.record("gen_ai.client.token.usage", used.output_tokens, kind | {"gen_ai.token.type": "output"})
        if self.first_at is not None:
            telemetry.record("gen_ai.server.time_to_first_token", self.first_at - self.admitted_at, kind)
            if used.output_tokens > 1:
                gap_s = (ended - self.first_at) / (used.output_tokens - 1)
                telemetry.record("gen_ai.server.time_per_output_token", gap_s, kind)

    def show(self, names: dict[str, str], used: usage_pb2.Usage) -> None:
        """The same on the call's span."""
        self.span.set_attributes(
            {
                **names,
                "gen_ai.usage.input_tokens": used.input_tokens,
                "gen_ai.usage.output_tokens": used.output_tokens,
                "argosy.outcome": self.outcome.value,
                "argosy.replica": self.place.served_by if self.place is not None else "",
                "argosy.queue.wait": (self.placed_at or time.monotonic()) - self.began,  # seconds
            }
        )

    def used(self) -> usage_pb2.Usage:
        """The engine's count; without one, what was seen of its work."""
        return self.usage or usage_pb2.Usage(input_tokens=self.prompt_tokens, output_tokens=self.deltas)


def _usage_in(trailers: Any) -> usage_pb2.Usage | None:
    """The usage a replica put into its trailers, if it did."""
    blob = dict(trailers or ()).get(USAGE_KEY)
    try:
        return usage_pb2.Usage.FromString(blob) if isinstance(blob, bytes) else None
    except DecodeError:
        return None


@dataclass(eq=False)
class _Pump:
    """Reads a replica's events ahead of the caller, at most `AHEAD_EVENTS`, in a task of its own.

    In its own task because a cancelled read would cancel the replica's call, whose trailers hold the bill; and because a caller that has
    stopped reading is noticed here, where the engine can still be told (A4).
    """

    account: _Account
    stall_s: float
    events: deque[bytes] = field(default_factory=deque)
    error: Exception | None = None
    ended: bool = False
    abandoned: bool = False  # nobody reads any more: go on to the trailers, keep nothing
    sequence: int = 0
    completed: bool = False
    _ready: asyncio.Event = field(default_factory=asyncio.Event)
    _room: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        account = self.account
        call = account.call
        try:
            while (event := await call.read()) is not EOF:
                self._note(event)
                if self.abandoned:
                    continue
                if len(self.events) >= AHEAD_EVENTS:
                    await self._wait_for_room()
                self.events.append(event)
                self._ready.set()
            code = await call.code()
            if code is not grpc.StatusCode.OK:
                raise _error_of(call, code, await call.trailing_metadata(), await call.details())
            if not self.completed:
                raise StreamLost(self.sequence)  # never a short stream that ends OK
            account.failed = False
        except SlowConsumer as stalled:
            self.error = stalled
            self.abandoned = True
            account.close(Outcome.CANCELLED)  # billed as one who leaves; before the error, which may not be read for long
            await self._drain(call)
        except (grpc.aio.AioRpcError, StreamLost) as error:
            self.error = error
            account.failed = _is_replicas_fault(error)
        except asyncio.CancelledError:
            self.error = self.error or StreamLost(self.sequence)
            raise
        finally:
            self.ended = True
            self._ready.set()
            assert account.finished is not None
            account.finished.set()

    async def _drain(self, call: Any) -> None:
        with contextlib.suppress(grpc.aio.AioRpcError):
            while (event := await call.read()) is not EOF:
                self._note(event)
            await call.code()

    async def _wait_for_room(self) -> None:
        self._room.clear()
        try:
            await asyncio.wait_for(self._room.wait(), self.stall_s)
        except TimeoutError:
            raise SlowConsumer(self.sequence) from None

    def _note(self, event: bytes) -> None:
        """Keep the books of what passes; raise StreamLost at a gap (I6)."""
        account = self.account
        try:
            sequence, kind = peek(event)
        except ValueError:
            opened = stream_pb2.GenerationEvent.FromString(event)
            sequence, kind = opened.sequence, _kind_of(opened)
        if sequence != self.sequence + 1:
            raise StreamLost(self.sequence)
        self.sequence = sequence
        if kind == End.STARTED.value:
            account.prompt_tokens = stream_pb2.GenerationEvent.FromString(event).started.prompt_tokens
            if account.place is not None:
                account.place.started()
        elif kind == End.COMPLETED.value:
            account.usage = stream_pb2.GenerationEvent.FromString(event).completed.usage
            self.completed = True
        elif kind <= _LAST_DELTA:
            if account.first_at is None:
                account.first_at = time.monotonic()
            account.deltas += 1

    async def read(self) -> AsyncIterator[bytes]:
        """The events, in order; then the error, if that is how it ended."""
        while True:
            while self.events:
                event = self.events.popleft()
                if len(self.events) < AHEAD_EVENTS // 2:
                    self._room.set()
                yield event
            if self.ended:
                break
            self._ready.clear()
            await self._ready.wait()
        if self.error is not None:
            raise self.error

    def abandon(self) -> None:
        """Nobody reads any more."""
        self.events.clear()
        self.abandoned = True
        self._room.set()

    def fail(self, error: Exception) -> None:
        """End the reader's side now with `error`."""
        self.abandon()
        self.error = error
        self.ended = True
        self._ready.set()


_OPERATIONS = {"Chat": "chat", "GenerateText": "text_completion", "EmbedTexts": "embeddings"}


def _operation(method: str) -> str:
    """The conventions' word for an RPC where they have one, else the method's own name, streamed or not."""
    name = method.rsplit("/", 1)[-1].removeprefix("Stream")
    return _OPERATIONS.get(name, name)


_LAST_DELTA = 5  # text, reasoning, tool_call


def _kind_of(event: stream_pb2.GenerationEvent) -> int:
    name = event.WhichOneof("event")
    return event.DESCRIPTOR.fields_by_name[name].number if name else 0


def _error_of(call: Any, code: grpc.StatusCode, trailers: Any, details: str) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailers or grpc.aio.Metadata(), details, None)


_FAULTS = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DATA_LOSS,
        grpc.StatusCode.UNIMPLEMENTED,
    }
)
_CALLERS_FAULTS = frozenset(  # a replica that refuses the request itself, or a reader it waited for in vain
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
_POLITE = frozenset({"SHED", "DRAINING"})  # a replica that says so works as it should


def _is_replicas_fault(error: Exception) -> bool | None:
    """For routing: True counts against the replica, None says nothing about it."""
    if not isinstance(error, grpc.aio.AioRpcError):
        return True
    info = status.error_info(error)
    return True if error.code() in _FAULTS and (info is None or info.reason not in _POLITE) else None


class Relay:
    """Carries calls to replicas; see the module."""

    def __init__(
        self,
        fleet: Fleet,
        ledger: Ledger,
        placing: Placing,
        *,
        own: Names | None = None,
        revocations: Revocations | None = None,
        telemetry: Telemetry | None = None,
    ) -> None:
        self.fleet = fleet
        self.ledger = ledger
        self.placing = placing
        self._own = own
        self._revocations = revocations
        self.telemetry = telemetry or Telemetry.off()
        self._background: set[asyncio.Task[None]] = set()
        self._expected = EXPECTED_TOKENS

    def background(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        """Run to its end whatever becomes of the call; `settled` waits for it."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._over)
        return task

    def _over(self, task: "asyncio.Task[None]") -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("an attempt could not be closed", exc_info=error)

    async def settled(self) -> None:
        """Wait until every ended call is settled; at shutdown, after the drain."""
        while self._background:
            await asyncio.wait(tuple(self._background))

    @contextlib.contextmanager
    def timed(self, operation: str) -> Iterator[None]:
        """Measure an entry in the books."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.telemetry.record("argosy.ledger.duration", time.monotonic() - began, {"argosy.operation": operation})

    async def resolve(self, name: str, who: Caller, sticky: str) -> Served:
        """What answers `who` under `name`. `sticky` decides on which side of a split alias. Raises what Fleet and Names do."""
        if not name.startswith("projects/"):
            return self.fleet.resolve(name, who.models)
        if self._own is None:
            raise ResourceNotFound("model")
        return await self._own.resolve(name, who, sticky)

    # --- the three kinds of call ------------------------------------------------------------------------------------------------

    async def stream(self, plan: Plan, request: engine_pb2.GenerateRequest, context: Any) -> Events:
        """The replica's events, as bytes."""
        async with self._attempt(plan) as account:
            request.generation_id = account.generation_id
            pump = await self._generate(account, request, context)
            how_far = progress()
            with self._cut_if_revoked(account, pump):
                try:
                    async for event in pump.read():
                        how_far.last_sequence = (how_far.last_sequence or 0) + 1
                        yield event
                finally:
                    pump.abandon()

    async def encode(self, plan: Plan, request: engine_pb2.EncodeRequest, context: Any) -> engine_pb2.EncodeResponse:
        """The replica's reply to a classification, an embedding or an extraction."""
        async with self._attempt(plan) as account:
            request.generation_id = account.generation_id
            await self._enter(account)
            reply: engine_pb2.EncodeResponse = await self._unary(account, request, context, "Encode")
            account.usage = getattr(reply, reply.WhichOneof("result") or "classify").usage
            account.failed = False
            return reply

    async def attribute(self, plan: Plan, request: engine_pb2.AttributeRequest, context: Any) -> explanation_pb2.ExplainResponse:
        """The replica's explanation."""
        async with self._attempt(plan) as account:
            request.generation_id = account.generation_id
            await self._enter(account)
            reply: explanation_pb2.ExplainResponse = await self._unary(account, request, context, "Attribute")
            account.usage, account.failed = reply.usage, False
            return reply

    async def ask(self, plan: Plan, method: str, request: Any, context: Any) -> Any:
        """A reply that costs no tokens: CountTokens, Tokenize."""
        async with self._attempt(plan) as account:
            await self._enter(account)
            reply = await self._unary(account, request, context, method)
            account.usage, account.failed = usage_pb2.Usage(), False
            return reply

    # --- their parts --------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _attempt(self, plan: Plan) -> AsyncIterator[_Account]:
        """Reserve before, settle after: the one place where an attempt begins and ends.

        What admission refuses now costs no entry in the books: under overload that is most calls, and a flood must stay cheap (R7).
        """
        account = _Account(plan, self)
        try:
            self.fleet.check(plan.served, self._ask(plan), stream=plan.stream)
            with self.timed("reserve"):
                await self._reserve(account)
        except ServiceError as refused:
            self.telemetry.record("argosy.queue.refused", 1, {"argosy.reason": refused.reason})
            raise
        try:
            yield account
            account.outcome = Outcome.DONE
            self._learn(account)
        except BaseException as error:
            account.outcome = _outcome_of(error)
            if isinstance(error, Shed | NotStarted):
                self.telemetry.record("argosy.queue.refused", 1, {"argosy.reason": error.reason})
            if account.failed is None:
                account.failed = _is_replicas_fault(error) if isinstance(error, grpc.aio.AioRpcError) else None
            raise
        finally:
            # Before the reply's end: a caller that asks for its usage next finds it. Shielded: it must outlive a second cancel.
            await asyncio.shield(account.close())

    async def _reserve(self, account: _Account) -> None:
        plan = account.plan
        reservation = Reservation(
            generation_id=account.generation_id,
            request_id=plan.request_id,
            project_uid=plan.caller.project_uid,
            key_id=plan.caller.key_id,
            method=plan.method,
            model=plan.model,
            version=plan.served.name,
            input_tokens=plan.read_tokens,
            output_tokens=plan.output_tokens,
            body_digest=plan.body_digest,
            passes=plan.passes,
        )
        task = asyncio.ensure_future(self.ledger.reserve(reservation))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            # The caller left while the books were being written: wait for what they say, then close the attempt.
            await asyncio.wait({task})
            if not task.cancelled() and task.exception() is None:
                await asyncio.shield(account.close(Outcome.CANCELLED))
            raise

    def _ask(self, plan: Plan) -> Ask:
        now, left = asyncio.get_running_loop().time(), remaining(SOFT_MARGIN_S)
        soft = math.inf if plan.time_limit_s is None else plan.time_limit_s
        return Ask(
            project_uid=plan.caller.project_uid,
            rank=plan.rank,
            # Passes differ in one place each: about half of what they read is in the replica's cache.
            cost=plan.read_tokens / (2 if plan.passes else 1) + min(plan.output_tokens, self._expected),
            latest_start=now + min(left, self.placing.queue_seconds, soft),
            latest_end=now + left if left < soft else math.inf,  # what is cut by a soft limit ends well however slow it was
            key=affinity(plan.caller.project_uid, plan.prefix),
            prompt_tokens=plan.input_tokens,
            adapter=plan.served.adapter,
        )

    async def _enter(self, account: _Account, *, stream: bool = False) -> Place:
        account.place = place = await self.fleet.enter(account.plan.served, self._ask(account.plan), stream=stream)
        account.placed_at = time.monotonic()
        return place

    def _learn(self, account: _Account) -> None:
        if account.plan.output_tokens and account.usage is not None:
            self._expected += SMOOTHING * (account.usage.output_tokens - self._expected)

    async def _generate(self, account: _Account, request: engine_pb2.GenerateRequest, context: Any) -> _Pump:
        """Find a replica that accepts the generation; from then on a pump reads it."""
        plan = account.plan
        place = await self._enter(account, stream=plan.stream)
        while True:
            left = remaining(MARGIN_S)
            if left <= 0:
                raise DeadlineExceeded()
            call = place.link.generate(request, timeout=left, metadata=place.metadata(plan.caller))
            self.telemetry.watch_call(ENGINE_SERVICE + "Generate", call)
            account.call = call
            try:
                error = await asyncio.wait_for(_refusal(call), min(self.placing.attempt_seconds, left / 2))
            except TimeoutError:
                call.cancel()
                error = NotStarted()
            if error is None:
                break
            if not self._may_move(error) or not place.move():
                account.failed = None if isinstance(error, NotStarted) else _is_replicas_fault(error)
                raise error
            self._count_retry()
        self._show(account, context, place)
        account.finished = asyncio.Event()
        pump = _Pump(account, self.placing.write_stall_seconds)
        self.background(pump.run())  # reads while the metadata is on its way
        await context.send_initial_metadata(())  # from here on no channel repeats it
        return pump

    async def _unary(self, account: _Account, request: Any, context: Any, method: str) -> Any:
        """The same for a reply in one message. The replica accepts it with its initial metadata, as it does a stream."""
        plan, place = account.plan, account.place
        assert place is not None
        while True:
            left = remaining(MARGIN_S)
            if left <= 0:
                raise DeadlineExceeded()
            call = getattr(place.link.stub, method)(request, timeout=left, metadata=place.metadata(plan.caller))
            self.telemetry.watch_call(ENGINE_SERVICE + method, call)
            account.call, account.finished = call, asyncio.Event()
            # A task of its own, for the pump's reason: a cancelled wait would cancel the call, and lose the bill in its trailers.
            reply = asyncio.ensure_future(_reply(call, account.finished))
            try:
                if await asyncio.shield(_refusal(call)) is None:
                    self._show(account, context, place)
                    await context.send_initial_metadata(())
                return await asyncio.shield(reply)
            except grpc.aio.AioRpcError as error:
                if progress().admitted or not self._may_move(error) or not place.move():
                    raise
                self._count_retry()
            finally:
                if not reply.done():
                    self.background(_ignore(reply))

    @staticmethod
    def _may_move(error: Exception) -> bool:
        """Only what certainly did not begin may begin elsewhere."""
        return isinstance(error, NotStarted) or (isinstance(error, grpc.aio.AioRpcError) and error.code() is grpc.StatusCode.UNAVAILABLE)

    def _count_retry(self) -> None:
        self.telemetry.record("argosy.replica.retried", 1, {"argosy.reason": "NOT_STARTED"})

    @staticmethod
    def _show(account: _Account, context: Any, place: Place) -> None:
        """A replica has accepted: say which in the trailers."""
        account.admitted_at = time.monotonic()
        context.set_trailing_metadata((*(context.trailing_metadata() or ()), (status.SERVED_BY_KEY, place.served_by)))

    @contextlib.contextmanager
    def _cut_if_revoked(self, account: _Account, pump: _Pump) -> Iterator[None]:
        if self._revocations is None:
            yield
            return
        how_far = progress()

        def cut() -> None:
            self.telemetry.record("argosy.auth.revoked", 1)
            account.close(Outcome.CANCELLED)
            pump.fail(KeyRevoked(how_far.last_sequence or 0))

        with self._revocations.watch(account.plan.caller.key_id, cut):
            yield


async def _reply(call: Any, finished: asyncio.Event) -> Any:
    try:
        return await call
    finally:
        finished.set()


async def _ignore(reply: "asyncio.Future[Any]") -> None:
    """Wait for a reply nobody asks for any more; `_stop_engine` ends it."""
    await asyncio.wait({reply})
    if not reply.cancelled():
        reply.exception()


async def _refusal(call: Any) -> Exception | None:
    """Wait until a call is accepted or refused: None, or the error."""
    if ACCEPTED_KEY in await call.initial_metadata() or (code := await call.code()) is grpc.StatusCode.OK:
        return None
    return _error_of(call, code, await call.trailing_metadata(), await call.details())


def _outcome_of(error: BaseException) -> Outcome:
    """What the ledger calls an attempt that ended with `error`."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return Outcome.DEADLINE if remaining(0.0) <= 0 else Outcome.CANCELLED
    if isinstance(error, DeadlineExceeded):
        return Outcome.DEADLINE
    if isinstance(error, Shed | NotStarted):
        return Outcome.SHED
    if isinstance(error, StreamLost):
        return Outcome.LOST
    if isinstance(error, KeyRevoked | SlowConsumer):
        return Outcome.CANCELLED
    if isinstance(error, grpc.aio.AioRpcError):
        match error.code():
            case grpc.StatusCode.DEADLINE_EXCEEDED:
                return Outcome.DEADLINE
            case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
                return Outcome.LOST if progress().admitted else Outcome.SHED
            case code if code in _CALLERS_FAULTS:
                return Outcome.CANCELLED if progress().admitted else Outcome.SHED
    return Outcome.FAILED


def caller() -> Caller:
    """Who calls. The door sets it on every path that has a servicer here."""
    found = CALLER.get()
    if found is None:
        raise ApiKeyInvalid()
    return found
