"""FineTune-, Dataset- and ModelService: every method passed on unopened to finetune, read from the service's descriptor.

Authenticated and scoped at our door like any call; finetune checks bounds, names and state. One message is held at a time in each
direction, so a slow reader slows the writer and not us. Nothing is repeated here: a request id makes it safe for the caller to do so.
"""

from __future__ import annotations  # the generic handlers exist in grpc's stubs only

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Protocol

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor

from argosy.v1 import dataset_pb2, finetune_pb2, model_pb2
from services.chassis import status
from services.chassis.channel import remaining, streaming
from services.chassis.errors import (
    DeadlineExceeded,
    FieldOutOfRange,
    Internal,
    KeyRevoked,
    ModelCapability,
    ServiceError,
    StoreUnavailable,
    StreamLost,
)
from services.chassis.identity import Caller
from services.chassis.interceptors import progress
from services.gateway.access import ACCESS, Cost
from services.gateway.servicers.register import handler_of
from services.gateway.servicers.relay import Revocations, caller

log = logging.getLogger(__name__)

EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs forgot it
SERVICES: tuple[ServiceDescriptor, ...] = (
    dataset_pb2.DESCRIPTOR.services_by_name["DatasetService"],
    finetune_pb2.DESCRIPTOR.services_by_name["FineTuneService"],
    model_pb2.DESCRIPTOR.services_by_name["ModelService"],
)
MARGIN_S = 0.2  # of the caller's deadline, kept to answer in
CHUNK_BYTES = 1 << 20  # one message of a client's stream; finetune allows half of it for the data in it
RESUMED = frozenset({"WatchFineTuneJob"})  # ends OK near our cap: its reader goes on at its cursor
Allowed = Callable[[Caller], Awaitable[Caller]]  # see ledger.JobBooks.allowed
_AWAY = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})


class Upstream(Protocol):
    """The way to finetune; see finetune.FineTune."""

    off: bool

    @property
    def channel(self) -> Any:
        """Where its methods are: a grpc.aio.Channel."""
        ...

    def metadata(self, caller: Caller) -> Any:
        """The signed caller."""
        ...

    def watch_call(self, method: str, call: Any) -> None:
        """Measure a call."""
        ...


def refuse() -> NoReturn:
    """This fleet has no fine-tuning."""
    raise ModelCapability("service", "FINE_TUNING")


def away(error: grpc.aio.AioRpcError) -> ServiceError | grpc.aio.AioRpcError:
    """What a failed call to finetune means to the caller: its own answer if it gave one, else one word that tells nothing of us."""
    if status.error_info(error) is not None:
        return error  # the door passes it on as it is
    code, how_far = error.code(), progress()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(how_far.last_sequence)
    if code in _AWAY:
        return StreamLost(how_far.last_sequence) if how_far.admitted else StoreUnavailable()
    log.error("finetune answered %s without a reason", code.name)
    return Internal()


class Forwarding:
    """Makes the handlers of forwarded methods."""

    def __init__(self, upstream: Upstream, revocations: Revocations | None = None, allowed: Allowed | None = None) -> None:
        """`allowed`: what finetune is told that a call may take which starts a job; None: nothing bounds it."""
        self._upstream = upstream
        self._revocations = revocations
        self._allowed = allowed

    def handlers(self, service: ServiceDescriptor, own: object | None = None) -> grpc.GenericRpcHandler[Any, Any]:
        """One handler a method: `own`'s where it has one, else forwarded."""
        table = {}
        for method in service.methods:
            handler = getattr(own, method.name, None)
            table[method.name] = self._handler(service, method) if handler is None else handler_of(method, handler)
        return grpc.method_handlers_generic_handler(service.full_name, table)

    @property
    def off(self) -> bool:
        """Whether this fleet has no fine-tuning."""
        return self._upstream.off

    async def ask(self, service: str, method: str, request: Any, reply: Callable[[bytes], Any], who: Caller) -> Any:
        """A unary call of ours on behalf of `who`. Raises what `away` returns."""
        path = f"/{service}/{method}"
        return reply(await self._unary(path, request.SerializeToString(), who))

    async def _unary(self, path: str, request: bytes, who: Caller) -> bytes:
        upstream = self._upstream
        if upstream.off:
            refuse()
        if self._allowed is not None and ACCESS[path].cost is Cost.JOB:
            who = await self._allowed(who)
        call = upstream.channel.unary_unary(path)(request, timeout=_left(), metadata=upstream.metadata(who))
        upstream.watch_call(path, call)
        try:
            return bytes(await call)
        except grpc.aio.AioRpcError as error:
            raise away(error) from None

    def _handler(self, service: ServiceDescriptor, method: MethodDescriptor) -> grpc.RpcMethodHandler[Any, Any]:
        path = f"/{service.full_name}/{method.name}"
        upstream, resumed = self._upstream, method.name in RESUMED

        async def unary(request: bytes, context: Any) -> bytes:
            return await self._unary(path, request, caller())

        async def reads(request: bytes, context: Any) -> AsyncIterator[bytes]:
            if upstream.off:
                refuse()
            who = caller()
            call = upstream.channel.unary_stream(path)(request, timeout=_left(), metadata=upstream.metadata(who))
            upstream.watch_call(path, call)
            async with streaming(call):
                with self._uncut(call, who) as said:
                    await _accepted(call)
                    await context.send_initial_metadata(())
                    try:
                        while (message := await said(call.read())) is not EOF:
                            yield message
                        if (code := await call.code()) is not grpc.StatusCode.OK:
                            raise away(await _error_of(call, code))
                    except DeadlineExceeded:
                        left = context.time_remaining()
                        if not resumed or (left is not None and left < 1):  # the caller's own
                            raise

        async def writes(messages: AsyncIterator[bytes], context: Any) -> bytes:
            if upstream.off:
                refuse()
            who = caller()
            call = upstream.channel.stream_unary(path)(timeout=_left(), metadata=upstream.metadata(who))
            upstream.watch_call(path, call)
            async with streaming(call):
                with self._uncut(call, who) as said:
                    return bytes(await said(_pass_on(messages, call)))

        if method.client_streaming:
            return grpc.stream_unary_rpc_method_handler(writes, None, None)
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(reads, None, None)
        return grpc.unary_unary_rpc_method_handler(unary, None, None)

    @contextmanager
    def _uncut(self, call: Any, who: Caller) -> Iterator[Callable[[Any], Any]]:
        """Errors of `call` as the caller may see them; a revoked key ends it (A9). What is yielded wraps each wait for finetune."""
        revoked = False

        def cut() -> None:
            nonlocal revoked
            revoked = True
            call.cancel()  # its reader then wakes with a CancelledError that nobody asked for

        async def said(wait: Any) -> Any:
            try:
                return await wait
            except grpc.aio.AioRpcError as error:
                raise away(error) from None
            except BaseException:
                if revoked:
                    raise KeyRevoked(progress().last_sequence or 0) from None
                raise

        with contextlib.nullcontext() if self._revocations is None else self._revocations.watch(who.key_id, cut):
            yield said


def _left() -> float:
    left = remaining(MARGIN_S)
    if left <= 0:
        raise DeadlineExceeded
    return left


async def _accepted(call: Any) -> None:
    """Wait for finetune's initial metadata; a refusal comes without messages, and is raised as such."""
    await call.initial_metadata()
    if call.done() and (code := await call.code()) is not grpc.StatusCode.OK:
        raise away(await _error_of(call, code))


async def _pass_on(messages: AsyncIterator[bytes], call: Any) -> bytes:
    """Every message, one at a time, and the reply. A reply that comes first, as a refusal does, ends the reading."""
    reply, writing = asyncio.ensure_future(_reply(call)), asyncio.ensure_future(_write(messages, call))
    try:
        await asyncio.wait({reply, writing}, return_when=asyncio.FIRST_COMPLETED)
        if writing.done():
            writing.result()
        return await reply
    finally:
        for task in (writing, reply):
            task.cancel()
        await asyncio.gather(writing, reply, return_exceptions=True)


async def _reply(call: Any) -> bytes:
    return bytes(await call)


async def _write(messages: AsyncIterator[bytes], call: Any) -> None:
    with contextlib.suppress(grpc.aio.InternalError, grpc.aio.AioRpcError):  # it has ended; how, the reply says
        await call.wait_for_connection()
        async for message in messages:
            if len(message) > CHUNK_BYTES:
                raise FieldOutOfRange("chunk.data", len(message), CHUNK_BYTES, "bytes")
            # `call.write` would put an INTERNAL of its own in the place of the status that comes behind a failed write.
            await call._cython_call.send_serialized_message(message)
        await call.done_writing()


async def _error_of(call: Any, code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    trailers = await call.trailing_metadata()
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailers or grpc.aio.Metadata(), await call.details(), None)
