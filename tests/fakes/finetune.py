"""A scripted fine-tuning service on a real socket: it replies what it is told, refuses as it is told, and keeps what it was asked.

`async with fake_finetune() as fake:`. Without a script a method replies an empty message, and a name is not found.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor

from argosy_internal.registry.v1 import registry_pb2
from services.chassis.errors import EventSequenceAhead, ResourceNotFound, ScopeMissing, ServiceError
from services.chassis.identity import CALLER_KEY, Caller, CallerRefused, CallerVerifier
from services.chassis.status import rich
from services.gateway.servicers.forwarded import SERVICES
from tests.fakes.engine import SERVER

REGISTRY = registry_pb2.DESCRIPTOR.services_by_name["RegistryService"]


@dataclass
class Asked:
    """One call as it came."""

    method: str
    request: Any  # a list of messages where the client streams
    caller: Caller | None
    time_left_s: float | None
    metadata: dict[str, str | bytes]
    cancelled: bool = False


@dataclass
class FakeFineTune:
    """The servicers, their script and what they were asked."""

    replies: dict[str, Any] = field(default_factory=dict)  # by method: a message, a list of them, a ServiceError, or request → one of these
    names: dict[tuple[str, str], registry_pb2.ResolveModelResponse] = field(default_factory=dict)  # by project uid and name
    feed: list[registry_pb2.VersionEvent] = field(default_factory=list)
    verifier: CallerVerifier | None = None
    hang: set[str] = field(default_factory=set)  # methods that never answer
    end: dict[str, grpc.StatusCode] = field(default_factory=dict)  # methods that end so after their messages, without a reason
    asked: list[Asked] = field(default_factory=list)
    address: str = ""
    server: Any = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def of(self, method: str) -> list[Asked]:
        """The calls of one method, in order."""
        return [each for each in self.asked if each.method == method]

    def changed(self) -> None:
        """Wake all that wait."""
        self._changed.set()
        self._changed = asyncio.Event()

    def tell(self, **event: Any) -> None:
        """One more event of the feed."""
        self.feed.append(registry_pb2.VersionEvent(sequence=len(self.feed) + 1, **event))
        self.changed()

    async def until(self, condition: Callable[["FakeFineTune"], bool], timeout_s: float = 10.0) -> None:
        """Wait until the record satisfies `condition`; asked again at each change."""
        async with asyncio.timeout(timeout_s):
            while not condition(self):
                await self._changed.wait()

    async def kill(self) -> None:
        """Die as a process does."""
        await self.server.stop(None)

    def note(self, method: str, request: Any, context: Any) -> Asked:
        """Keep one call; raises CallerRefused for a caller that is not signed for us."""
        metadata = dict(context.invocation_metadata())
        blob = metadata.get(CALLER_KEY)
        caller = None if self.verifier is None else self.verifier.verify(blob if isinstance(blob, bytes) else b"", time.time())
        asked = Asked(method, request, caller, context.time_remaining(), metadata)
        self.asked.append(asked)
        self.changed()
        return asked

    async def reply(self, method: MethodDescriptor, request: Any, asked: Asked) -> Any:
        """What the script says; raises a ServiceError it holds."""
        if method.name in self.hang:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                asked.cancelled = True
                self.changed()
                raise
        said = self.replies.get(method.name, message_factory.GetMessageClass(method.output_type)())
        said = said(request) if callable(said) else said
        if isinstance(said, ServiceError):
            raise said
        return said

    # --- RegistryService ----------------------------------------------------------------------------------------------------------

    def resolve(self, request: registry_pb2.ResolveModelRequest, caller: Caller | None) -> registry_pb2.ResolveModelResponse:
        """What the name means for the caller's project."""
        found = self.names.get((caller.project_uid if caller else "", request.name))
        if found is None:
            raise ResourceNotFound("name")
        return found

    async def watch(self, request: registry_pb2.WatchVersionsRequest, caller: Caller | None) -> AsyncIterator[registry_pb2.VersionEvent]:
        """The feed from the cursor on, then live."""
        if caller is not None and "fleet" not in caller.scopes:
            raise ScopeMissing("fleet")
        at = request.after_sequence
        if at > len(self.feed):
            raise EventSequenceAhead(len(self.feed))
        told = False
        while True:
            while at < len(self.feed):
                yield self.feed[at]
                at += 1
            if not told:
                yield registry_pb2.VersionEvent(sequence=at, bookmark=registry_pb2.VersionBookmark())
                told = True
            await self._changed.wait()


async def _answer(context: Any, error: ServiceError) -> None:
    reply = rich(error)
    await context.abort(reply.code, reply.sentence, reply.trailers)


def _handler(fake: FakeFineTune, method: MethodDescriptor) -> Any:
    kind = message_factory.GetMessageClass(method.input_type)

    async def unary(request: Any, context: Any) -> Any:
        try:
            asked = fake.note(method.name, request, context)
            if method.name == "ResolveModel" and method.name not in fake.replies and method.name not in fake.hang:
                return fake.resolve(request, asked.caller)
            return await fake.reply(method, request, asked)
        except (ServiceError, CallerRefused) as error:
            await _answer(context, error)

    async def reads(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            asked = fake.note(method.name, request, context)
            await context.send_initial_metadata(())
            if method.name == "WatchVersions":
                async for event in fake.watch(request, asked.caller):
                    yield event
            said = await fake.reply(method, request, asked)
            for message in said if isinstance(said, list) else [said]:
                if message is ...:  # here the script waits for ever
                    await asyncio.Event().wait()
                yield message
            if code := fake.end.get(method.name):
                await context.abort(code, "what nobody outside may read")
        except asyncio.CancelledError:
            fake.asked[-1].cancelled = True
            fake.changed()
            raise
        except (ServiceError, CallerRefused) as error:
            await _answer(context, error)

    async def writes(messages: AsyncIterator[Any], context: Any) -> Any:
        try:
            received: list[Any] = []
            asked = fake.note(method.name, received, context)
            refusal = fake.replies.get(method.name)
            if isinstance(refusal, ServiceError):
                raise refusal
            async for message in messages:
                received.append(message)
                fake.changed()
            return await fake.reply(method, received, asked)
        except (ServiceError, CallerRefused) as error:
            await _answer(context, error)

    write = message_factory.GetMessageClass(method.output_type).SerializeToString
    if method.client_streaming:
        return grpc.stream_unary_rpc_method_handler(writes, kind.FromString, write)
    if method.server_streaming:
        return grpc.unary_stream_rpc_method_handler(reads, kind.FromString, write)
    return grpc.unary_unary_rpc_method_handler(unary, kind.FromString, write)


@asynccontextmanager
async def fake_finetune(
    *, address: str = "127.0.0.1:0", tls: grpc.ServerCredentials | None = None, **script: Any
) -> AsyncIterator[FakeFineTune]:
    """A running fake. `script` are FakeFineTune's fields."""
    fake = FakeFineTune(**script)
    server = grpc.aio.server(options=list(SERVER.items()))
    for service in (*SERVICES, REGISTRY):
        table = {method.name: _handler(fake, method) for method in service.methods}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service.full_name, table),))
    port = server.add_insecure_port(address) if tls is None else server.add_secure_port(address, tls)
    fake.address = f"{address.rsplit(':', 1)[0]}:{port}"
    fake.server = server
    await server.start()
    try:
        yield fake
    finally:
        await server.stop(0)
