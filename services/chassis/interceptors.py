"""What every door does before a handler runs: error to status, metadata cap, in-flight count, caller, deadline, scope.

One `Door` wraps every method, whatever its arity, in `async with around(details, context)`. `door()` composes the steps, outermost first:
telemetry, errors, metadata sum, in-flight, caller, deadline, scope. The request is parsed inside all of them, so that a malformed one is
answered like any other failure. Methods under `/grpc.` (health, reflection) are counted and measured by none but the first three.
"""

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from services.chassis import status
from services.chassis.channel import DEADLINE
from services.chassis.errors import (
    ApiKeyInvalid,
    DeadlineExceeded,
    Draining,
    FieldInvalid,
    Internal,
    MetadataInvalid,
    MetadataTooLarge,
    PromptTooLong,
    ServiceError,
    StreamLost,
)
from services.chassis.identity import CALLER, CALLER_KEY, Caller, CallerRefused, CallerVerifier
from services.chassis.status import Answer, Metadatum

log = logging.getLogger(__name__)

METADATA_BYTES = 16 << 10  # core's own limits bind only once the client has acknowledged our SETTINGS
EXEMPT = "/grpc."  # health and reflection: they answer under overload, during a drain and without a key

HANDLERS: dict[tuple[bool, bool], Callable[..., Any]] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


# --- what a call is, and how far it has come ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Incoming:
    """A call as the door lets it in."""

    method: str  # "/package.Service/Method"
    invocation_metadata: tuple[Metadatum, ...]

    @property
    def exempt(self) -> bool:
        """Health and reflection."""
        return self.method.startswith(EXEMPT)

    def value(self, key: str) -> str | bytes | None:
        """The one value of `key`, None if absent; a repeated key is refused, since which one counts would be chance."""
        values = [value for name, value in self.invocation_metadata if name == key]
        if len(values) > 1:
            raise MetadataInvalid(key)
        return values[0] if values else None


@dataclass(slots=True)
class Progress:
    """How far the call has come. The error step reads it; a handler that numbers its events sets `last_sequence`."""

    admitted: bool = False  # initial metadata or a message has gone out: no channel repeats the call now
    last_sequence: int | None = None  # of the last event sent


PROGRESS: ContextVar[Progress | None] = ContextVar("progress", default=None)


def progress() -> Progress:
    """This call's progress; outside a door, one that nobody reads."""
    return PROGRESS.get() or Progress()


class Context:
    """The handler's context: grpc's own, but it notes admission and shows only the metadata that came through the door."""

    __slots__ = ("_grpc", "_metadata", "_progress")

    def __init__(self, context: Any, metadata: tuple[Metadatum, ...], progress: Progress) -> None:
        self._grpc = context
        self._metadata = metadata
        self._progress = progress

    def __getattr__(self, name: str) -> Any:
        return getattr(self._grpc, name)

    def invocation_metadata(self) -> tuple[Metadatum, ...]:
        """What the door let in."""
        return self._metadata

    async def send_initial_metadata(self, metadata: Iterable[Metadatum]) -> None:
        """From here on no channel repeats the call."""
        self._progress.admitted = True
        await self._grpc.send_initial_metadata(tuple(metadata))

    async def write(self, message: Any) -> None:
        """Send one message; for handlers that are no generators."""
        self._progress.admitted = True
        await self._grpc.write(message)


Around = Callable[[Incoming, Any], AbstractAsyncContextManager[None]]
Authenticate = Callable[[Incoming, Any], Awaitable[Caller]]
Permit = Callable[[str, Caller], None]


# --- the door -----------------------------------------------------------------------------------------------------------------------


class Cutoff:
    """Ends a handler at the server's own deadline, by cancelling it while it waits for its source and never while it sends.

    Hit in a send, a cancelled handler leaves its client without a status. `passed` is to be asked after each send.
    """

    __slots__ = ("_fired", "_task", "_timer", "passed", "waiting")

    def __init__(self) -> None:
        self.waiting = True
        self.passed = False
        self._fired = False
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[Any] | None = None

    def arm(self, at: float) -> None:
        """`at` is a time of the loop's clock."""
        self._task = asyncio.current_task()
        self._timer = asyncio.get_running_loop().call_at(at, self._pass)

    def _pass(self) -> None:
        self.passed = True
        if self.waiting and self._task is not None:
            self._fired = True
            self._task.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._fired and kind is asyncio.CancelledError and self._task is not None and self._task.uncancel() == 0:
            raise DeadlineExceeded(progress().last_sequence) from None


class Door(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Runs every method inside `async with around(details, context)` and keeps its arity."""

    def __init__(
        self,
        around: Around,
        *,
        request_bytes: int | None = None,
        first_message_s: float = 10.0,
        strip: str | None = None,
        unknown: Callable[[], None] | None = None,
    ) -> None:
        """`request_bytes` caps a unary request before it is parsed, `first_message_s` the wait for it; `strip` is a prefix of metadata
        keys that end here, such as "x-"; `unknown` is told of a call to a method that does not exist."""
        self._around = around
        self._request_bytes = request_bytes
        self._first_message_s = first_message_s
        self._strip = strip
        self._unknown = unknown

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """Wrap the method's handler."""
        h = await continuation(details)
        if h is None:  # core answers UNIMPLEMENTED
            if self._unknown is not None:
                self._unknown()
            return None
        method = h.unary_unary or h.unary_stream or h.stream_unary or h.stream_stream
        incoming = Incoming(details.method, self._let_in(details.invocation_metadata))

        async def parsed(request: Any, context: Any) -> Any:
            """Inside `around`, so that the error step sees what goes wrong here."""
            return request if h.request_streaming else await self._read(h.request_deserializer, context)

        if inspect.isasyncgenfunction(method):

            async def events(request: Any, grpc_context: Any) -> AsyncGenerator[Any, None]:
                how_far = Progress()
                PROGRESS.set(how_far)
                context = Context(grpc_context, incoming.invocation_metadata, how_far)
                async with self._around(incoming, context):
                    with Cutoff() as cutoff:
                        _arm(cutoff, grpc_context)
                        async with aclosing(method(await parsed(request, context), context)) as source:
                            async for event in source:
                                how_far.admitted, cutoff.waiting = True, False
                                yield event
                                if cutoff.passed:
                                    raise DeadlineExceeded(how_far.last_sequence)
                                cutoff.waiting = True

            inside: Any = events
        else:  # unary, or a writer such as grpc's own Health.Watch

            async def reply(request: Any, grpc_context: Any) -> Any:
                how_far = Progress()
                PROGRESS.set(how_far)
                context = Context(grpc_context, incoming.invocation_metadata, how_far)
                async with self._around(incoming, context):
                    with Cutoff() as cutoff:
                        _arm(cutoff, grpc_context)
                        return await method(await parsed(request, context), context)

            inside = reply
        # To core every request is a stream, on the wire there is no difference: else it would run no code of ours before the message is
        # there, and a caller who sends headers and falls silent would hold the stream for ever.
        deserializer = h.request_deserializer if h.request_streaming else None
        return HANDLERS[True, h.response_streaming](inside, deserializer, h.response_serializer)

    def _let_in(self, metadata: Iterable[Any]) -> tuple[Metadatum, ...]:
        pairs = ((key, value) for key, value in metadata or ())
        return tuple(pair for pair in pairs if self._strip is None or not pair[0].startswith(self._strip))

    async def _read(self, deserialize: Callable[[bytes], Any] | None, context: Any) -> Any:
        """The one message of a unary request, parsed. A caller that is let in but does not send it is not waited for."""
        try:
            async with asyncio.timeout(self._first_message_s):
                request = await context.read()
        except TimeoutError:
            raise DeadlineExceeded() from None
        if request is grpc.aio.EOF:  # type: ignore[attr-defined]  # missing in the stubs
            raise FieldInvalid(rule="no_message")
        if self._request_bytes is not None and len(request) > self._request_bytes:
            raise PromptTooLong("", len(request), self._request_bytes)  # A1: only a text can be this large
        return deserialize(request) if deserialize else request


def _arm(cutoff: Cutoff, grpc_context: Any) -> None:
    """Arm only where the server's cap ends the call before the client's own deadline: core sees to that one."""
    end = DEADLINE.get()
    if end is None:
        return
    left = grpc_context.time_remaining()
    if left is None or asyncio.get_running_loop().time() + left > end + 0.001:
        cutoff.arm(end)


# --- the steps, outermost first -----------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class InFlight:
    """The calls that are inside, so that a drain waits for them and for nothing else."""

    draining: bool = False  # new calls are answered DRAINING
    cutting: bool = False  # what is left is being ended
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def count(self) -> int:
        """Calls inside."""
        return len(self._tasks)

    @asynccontextmanager
    async def counted(self) -> AsyncIterator[None]:
        """Count this call while the block runs."""
        task = asyncio.current_task()
        assert task is not None  # a coroutine always runs in one
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)  # not current_task(): an abandoned generator is closed by another
            self._changed.set()

    async def idle(self, timeout_s: float) -> bool:
        """Wait until no call is inside; False if the time passed first."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._tasks:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return not self._tasks
        return True

    def cut(self) -> None:
        """End every call that is left; the error step turns the cancellation into DRAINING."""
        self.cutting = True
        for task in tuple(self._tasks):
            task.cancel()


@asynccontextmanager
async def errors(inflight: InFlight, incoming: Incoming, context: Any) -> AsyncIterator[None]:
    """The one place where an exception becomes a status."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if inflight.cutting and not incoming.exempt and task is not None:
            task.uncancel()
            how_far = progress()
            started = how_far.admitted
            await answer(context, Draining(last_sequence=(how_far.last_sequence or 0) if started else None))
        if task is not None and task.cancelling():
            raise  # the caller left, or the deadline passed
        await answer(context, StreamLost(progress().last_sequence))  # nobody asked for it: without this the client gets no status
    except (grpc.aio.AbortError, GeneratorExit):
        raise
    except (ServiceError, DecodeError, grpc.aio.AioRpcError) as error:
        how_far = progress()
        await answer(context, status.named(error, admitted=how_far.admitted, last_sequence=how_far.last_sequence))
    except Exception:
        log.exception("unhandled in %s", incoming.method)
        await answer(context, Internal())


async def answer(context: Any, error: ServiceError | Answer) -> None:
    """End the call with `error`. Trailers set before are kept: `abort` would drop them."""
    caller = CALLER.get()
    request_id = caller.request_id if caller is not None else ""
    reply = error if isinstance(error, Answer) else status.rich(error, request_id or _request_id(context))
    await context.abort(reply.code, reply.sentence, status.trailers_of(reply, context.trailing_metadata() or (), request_id))


def _request_id(context: Any) -> str:
    found = dict(context.trailing_metadata() or ()).get(status.REQUEST_ID_KEY, "")
    return found if isinstance(found, str) else ""


def check_metadata(incoming: Incoming) -> None:
    """A raw client's headers, sent before it acknowledges SETTINGS, reach the handler whatever their size."""
    if sum(len(key) + len(value) + 32 for key, value in incoming.invocation_metadata) > METADATA_BYTES:
        raise MetadataTooLarge(METADATA_BYTES)


@dataclass(frozen=True, slots=True)
class Policy:
    """What a service asks of each call, once the chassis has let it in."""

    authenticate: Authenticate | None = None  # metadata in, Caller out
    permit: Permit | None = None  # RPC path and caller; raises ScopeMissing
    deadline_cap_s: float | Callable[[str], float] = 300.0  # of a call without a shorter deadline; a number, or by RPC path
    request_bytes: int | None = 1 << 20  # a unary request, before it is parsed; None: the wire limit alone
    first_message_s: float = 10.0  # a unary request is waited for this long
    strip: str | None = None  # metadata keys with this prefix are not let in; "x-" at the public edge
    watches: frozenset[str] = frozenset()  # RPC names that last as long as their caller: a drain does not wait for them

    def __post_init__(self) -> None:
        if self.permit is not None and self.authenticate is None:
            raise ValueError("a policy that permits must authenticate: else there is no caller to permit")


def steps(inflight: InFlight, policy: Policy, telemetry: Around | None = None) -> Around:
    """Compose the steps around every handler."""

    @asynccontextmanager
    async def around(incoming: Incoming, context: Any) -> AsyncIterator[None]:
        async with _optional(telemetry, incoming, context):
            if incoming.exempt:
                async with errors(inflight, incoming, context):
                    check_metadata(incoming)
                    yield
                return
            watch = incoming.method.rpartition("/")[2] in policy.watches
            async with _nothing() if watch else inflight.counted(), errors(inflight, incoming, context):
                check_metadata(incoming)
                if inflight.draining:
                    raise Draining()
                caller = await _enter(policy, incoming, context)
                _set_deadline(policy, incoming.method, context)
                if policy.permit is not None and caller is not None:
                    policy.permit(incoming.method, caller)
                yield

    return around


@asynccontextmanager
async def _nothing() -> AsyncIterator[None]:
    yield


def _optional(around: Around | None, incoming: Incoming, context: Any) -> AbstractAsyncContextManager[None]:
    return _nothing() if around is None else around(incoming, context)


async def _enter(policy: Policy, incoming: Incoming, context: Any) -> Caller | None:
    if policy.authenticate is None:
        return None
    caller = await policy.authenticate(incoming, context)
    CALLER.set(caller)  # no reset: each RPC has its own task
    if caller.request_id:
        kept = [pair for pair in context.trailing_metadata() or () if pair[0] != status.REQUEST_ID_KEY]
        context.set_trailing_metadata((*kept, (status.REQUEST_ID_KEY, caller.request_id)))
    return caller


def _set_deadline(policy: Policy, method: str, context: Any) -> None:
    cap = policy.deadline_cap_s
    cap_s = cap(method) if callable(cap) else cap
    left = context.time_remaining()
    DEADLINE.set(asyncio.get_running_loop().time() + (cap_s if left is None else min(left, cap_s)))


def door(inflight: InFlight, policy: Policy, telemetry: Around | None = None, unknown: Callable[[], None] | None = None) -> Door:
    """The door of a server."""
    return Door(
        steps(inflight, policy, telemetry),
        request_bytes=policy.request_bytes,
        first_message_s=policy.first_message_s,
        strip=policy.strip,
        unknown=unknown,
    )


def verified(verifier: CallerVerifier, clock: Callable[[], float] = time.time) -> Authenticate:
    """Behind the edge: the caller is whom the gateway signed for, and nothing else in the metadata counts."""

    async def authenticate(incoming: Incoming, context: Any) -> Caller:
        blob = incoming.value(CALLER_KEY)
        if not isinstance(blob, bytes):
            raise ApiKeyInvalid()
        try:
            return verifier.verify(blob, clock())
        except CallerRefused as refused:
            log.warning("caller refused: %s", refused.why)
            raise

    return authenticate


# --- the other side of a call -------------------------------------------------------------------------------------------------------

Adjust = Callable[[Any], Any]  # grpc.aio.ClientCallDetails → the same, replaced
Watch = Callable[[Any, Any], None]  # (adjusted details, call), once the call exists


def client_interceptors(adjust: Adjust, watch: Watch | None = None) -> Sequence[grpc.aio.ClientInterceptor]:
    """One interceptor an arity: a class that serves two is asked for the first only, and a stream would lose its metadata."""

    async def intercept(_: Any, continuation: Any, details: Any, request: Any) -> Any:
        details = adjust(details)
        call = await continuation(details, request)
        if watch is not None:
            watch(details, call)
        return call

    def of(kind: type[Any], method: str) -> Any:
        return type(kind.__name__.replace("Interceptor", "Adjuster"), (kind,), {method: intercept})()

    return (
        of(grpc.aio.UnaryUnaryClientInterceptor, "intercept_unary_unary"),
        of(grpc.aio.UnaryStreamClientInterceptor, "intercept_unary_stream"),
        of(grpc.aio.StreamUnaryClientInterceptor, "intercept_stream_unary"),
        of(grpc.aio.StreamStreamClientInterceptor, "intercept_stream_stream"),
    )
