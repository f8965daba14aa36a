"""Channels between our own processes: keepalive that notices a frozen peer, deadlines that travel on, streams that end when left."""

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio

# A stopped peer is seen after 13 s: 10 s of silence, 3 s without an answer. A misspelt key here raises nothing: the tests freeze a peer.
ENGINE: Mapping[str, int] = {
    "grpc.keepalive_time_ms": 10_000,
    "grpc.keepalive_timeout_ms": 3_000,
    "grpc.http2.ping_timeout_ms": 3_000,  # without it a frozen peer is seen after 70 s
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.http2.max_pings_without_data": 0,  # a silent prefill must not thin the pings out
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.min_reconnect_backoff_ms": 500,
    "grpc.max_reconnect_backoff_ms": 2_000,  # a pod that returns is found within this
    "grpc.enable_retries": 0,  # retries between our services are our own code, before admission
    "grpc.enable_http_proxy": 0,
    "grpc.use_local_subchannel_pool": 1,  # else equal targets share one connection
    "grpc.http2.bdp_probe": 0,  # bounds how far a server runs ahead of a reader
    "grpc.max_receive_message_length": 32 << 20,
}

DEADLINE: ContextVar[float | None] = ContextVar("deadline", default=None)  # loop.time(); the door sets it


def remaining(margin_s: float = 0.2, cap_s: float = 900.0) -> float:
    """Seconds an outgoing call may take; the margin leaves time to answer our caller."""
    end = DEADLINE.get()
    return cap_s if end is None else max(0.0, min(cap_s, end - asyncio.get_running_loop().time() - margin_s))


class Cancellable(Protocol):
    """Any grpc.aio call."""

    def cancel(self) -> bool:
        """End it; False if it had ended already."""
        ...


C = TypeVar("C", bound=Cancellable)


@asynccontextmanager
async def streaming(call: C) -> AsyncIterator[C]:
    """Leaving the block ends the RPC: by break, return or error alike. Nothing else does: a dropped call runs on."""
    try:
        yield call
    finally:
        call.cancel()  # after a normal end this does nothing


def is_local(address: str) -> bool:
    """Whether bytes to `address` stay on this machine: a unix socket or a loopback address."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rsplit("://", maxsplit=1)[-1].rsplit("/", 1)[-1].rsplit(":", 1)[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name: whoever resolves it decides where it leads
        return False


class PlaintextRefused(ValueError):
    """An address off this machine without TLS."""

    def __init__(self, verb: str, address: str) -> None:
        super().__init__(f"Refusing to {verb} {address} in plaintext: set a certificate, or use a loopback address or a unix socket.")


class LastingChannel:
    """A channel to one peer that can be given new credentials: calls end where they began, the next ones go over a new connection."""

    def __init__(
        self, target: str, *, credentials: grpc.ChannelCredentials | None = None, options: Mapping[str, int | str] = ENGINE
    ) -> None:
        """Raises PlaintextRefused, as open_channel."""
        self._target, self._options = target, options
        self._channel = open_channel(target, credentials=credentials, options=options)
        self._left: dict[asyncio.Task[None], grpc.aio.Channel] = {}

    def renew(self, credentials: grpc.ChannelCredentials, grace_s: float) -> None:
        """Use `credentials` from the next call on. A call that is still running after `grace_s` is cancelled."""
        left, self._channel = self._channel, open_channel(self._target, credentials=credentials, options=self._options)
        closing = asyncio.create_task(left.close(grace_s))
        self._left[closing] = left
        closing.add_done_callback(lambda task: self._left.pop(task, None))

    async def close(self, grace_s: float | None = None) -> None:
        """End every call, after `grace_s` at the latest."""
        left = dict(self._left)
        for closing in left:
            closing.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await asyncio.gather(*(channel.close(grace_s) for channel in (self._channel, *left.values())))

    def _later(self, arity: str, *arguments: Any, **named: Any) -> Callable[..., Any]:
        """A method that looks for its channel when it is called: stubs are made once."""

        def call(*given: Any, **how: Any) -> Any:
            return getattr(self._channel, arity)(*arguments, **named)(*given, **how)

        return call

    def unary_unary(self, method: str, *arguments: Any, **named: Any) -> Callable[..., Any]:
        """As grpc.aio.Channel's."""
        return self._later("unary_unary", method, *arguments, **named)

    def unary_stream(self, method: str, *arguments: Any, **named: Any) -> Callable[..., Any]:
        """As grpc.aio.Channel's."""
        return self._later("unary_stream", method, *arguments, **named)

    def stream_unary(self, method: str, *arguments: Any, **named: Any) -> Callable[..., Any]:
        """As grpc.aio.Channel's."""
        return self._later("stream_unary", method, *arguments, **named)

    def stream_stream(self, method: str, *arguments: Any, **named: Any) -> Callable[..., Any]:
        """As grpc.aio.Channel's."""
        return self._later("stream_stream", method, *arguments, **named)


def open_channel(
    target: str,
    *,
    credentials: grpc.ChannelCredentials | None = None,
    interceptors: Sequence[grpc.aio.ClientInterceptor] = (),
    options: Mapping[str, int | str] = ENGINE,
) -> grpc.aio.Channel:
    """A channel to one peer, its own connection; close it, or use it as `async with`. Plaintext only on this machine."""
    if credentials is None and not is_local(target):
        raise PlaintextRefused("connect to", target)
    pairs, chain = list(options.items()), list(interceptors)
    if credentials is None:
        return grpc.aio.insecure_channel(target, options=pairs, interceptors=chain)
    return grpc.aio.secure_channel(target, credentials, options=pairs, interceptors=chain)
