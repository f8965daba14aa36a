"""A service of four arities over `StringValue`, whose bodies a test supplies: real server, real channel, no stub."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from google.protobuf.wrappers_pb2 import StringValue

from services.chassis.channel import open_channel
from services.chassis.interceptors import HANDLERS, Policy
from services.chassis.server import SERVER, Listener, Serving, serve
from services.chassis.telemetry import Telemetry

SERVICE = "test.Echo"
ARITY = {"Unary": (False, False), "Stream": (False, True), "Collect": (True, False), "Converse": (True, True)}


async def unary(request: StringValue, context: Any) -> StringValue:
    return StringValue(value=f"unary {request.value}")


async def stream(request: StringValue, context: Any) -> AsyncIterator[StringValue]:
    for word in request.value.split():
        yield StringValue(value=word)


async def collect(requests: AsyncIterator[StringValue], context: Any) -> StringValue:
    return StringValue(value=" ".join([request.value async for request in requests]))


async def converse(requests: AsyncIterator[StringValue], context: Any) -> AsyncIterator[StringValue]:
    async for request in requests:
        yield StringValue(value=request.value.upper())


PLAIN: dict[str, Callable[..., Any]] = {"Unary": unary, "Stream": stream, "Collect": collect, "Converse": converse}


def register(bodies: Mapping[str, Callable[..., Any]] = PLAIN) -> Callable[[Any], None]:
    def add(server: Any) -> None:
        handlers = {
            name: HANDLERS[ARITY[name]](body, StringValue.FromString, StringValue.SerializeToString) for name, body in bodies.items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    return add


@asynccontextmanager
async def echo(
    bodies: Mapping[str, Callable[..., Any]] = PLAIN,
    *,
    listener: Listener | None = None,
    policy: Policy | None = None,
    options: Mapping[str, int] = SERVER,
    telemetry: Telemetry | None = None,
) -> AsyncIterator[Serving]:
    """A server of these bodies on a free port, ready."""
    listener = listener or Listener(announce_seconds=0)
    async with serve(listener, register(bodies), [SERVICE], policy=policy, options=options, telemetry=telemetry) as serving:
        await serving.ready()
        yield serving


class Client:
    """The client's side of one channel."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        ends = (StringValue.SerializeToString, StringValue.FromString)
        self.unary = channel.unary_unary(f"/{SERVICE}/Unary", *ends)
        self.stream = channel.unary_stream(f"/{SERVICE}/Stream", *ends)
        self.collect = channel.stream_unary(f"/{SERVICE}/Collect", *ends)
        self.converse = channel.stream_stream(f"/{SERVICE}/Converse", *ends)


@asynccontextmanager
async def calling(address: str, **kwargs: Any) -> AsyncIterator[Client]:
    async with open_channel(address, **kwargs) as channel:
        yield Client(channel)


def text(value: str) -> StringValue:
    return StringValue(value=value)
