"""One gRPC server as a lifetime: `async with serve(...) as serving`. Health before load, loud ports, and a drain that loses nothing.

Make it inside the process's one event loop, like every channel: the completion queue belongs to the process.
"""

import asyncio
import contextlib
import logging
import signal
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google.protobuf
import grpc
import grpc.aio
from google.protobuf.internal import api_implementation
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.chassis.certificates import Certificates
from services.chassis.channel import PlaintextRefused, is_local
from services.chassis.interceptors import InFlight, Policy, door
from services.chassis.telemetry import Telemetry

log = logging.getLogger(__name__)

SERVER: Mapping[str, int] = {
    "grpc.so_reuseport": 0,  # else a second server binds the port in silence
    "grpc.max_concurrent_streams": 1_024,  # over slots + queue, since core refuses honest calls beyond it
    "grpc.max_receive_message_length": 32 << 20,
    "grpc.max_metadata_size": 8_192,
    "grpc.absolute_max_metadata_size": 16_384,
    "grpc.http2.min_ping_interval_without_data_ms": 5_000,  # half the client's interval; `min_recv_ping_…` is ignored
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.keepalive_time_ms": 10_000,
    "grpc.keepalive_timeout_ms": 3_000,
    "grpc.http2.ping_timeout_ms": 3_000,
}

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
GRPCIO = ((1, 85, 1), (1, 86, 0))  # from, below: keepalive and cancellation were measured on it; the tests run again on every bump
PROTOBUF_FLOOR = (6, 33, 5)  # below it nested messages and recursion are exploitable
LAG_UNREADY_S = 1.0  # a loop this late answers nobody in time


def public(max_stream_seconds: float) -> Mapping[str, int]:
    """Options of a server that strangers reach."""
    return {
        **SERVER,
        "grpc.max_concurrent_streams": 100,
        "grpc.max_receive_message_length": 4 << 20,
        "grpc.max_connection_age_ms": 90_000,
        "grpc.max_connection_age_grace_ms": round((max_stream_seconds + 30) * 1_000),  # past it a stream dies UNAVAILABLE
    }


class FloorError(RuntimeError):
    """A library below the version this server may run on."""


def check_floors() -> None:
    """Raise `FloorError` for a protobuf or grpcio we have not measured or that is known to be exploitable."""
    if _numbers(google.protobuf.__version__) < PROTOBUF_FLOOR:
        raise FloorError(f"protobuf {google.protobuf.__version__} is below {'.'.join(map(str, PROTOBUF_FLOOR))}")
    if api_implementation.Type() != "upb":
        raise FloorError(f"protobuf runs on its {api_implementation.Type()} implementation; install the wheel with upb")
    floor, ceiling = GRPCIO
    if not floor <= _numbers(grpc.__version__) < ceiling:
        raise FloorError(f"grpcio is {grpc.__version__}, and this server was measured on {'.'.join(map(str, floor))} alone")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:3])


@dataclass(frozen=True)
class Listener:
    """Where a server listens and how it stops. May be a field of a service's settings."""

    address: str = "127.0.0.1:0"  # host:port, port 0 for any free one; or unix:/path
    certificate: Path | None = None  # PEM chain, read again when it changes; without it plaintext, on loopback or a unix socket alone
    private_key: Path | None = None
    client_ca: Path | None = None  # set: a client must show a certificate signed by it
    health_address: str = ""  # a second, plaintext listener with health alone, for the kubelet; empty: none
    reflection: bool = False
    announce_seconds: float = 5.0  # NOT_SERVING is seen this long before the listener closes
    grace_seconds: float = 30.0  # streams may finish within it

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.private_key is None):
            raise ValueError("a certificate and its private key are set together or not at all")
        if self.client_ca is not None and self.certificate is None:
            raise ValueError("client certificates are only asked for over TLS: set a certificate")

    def metrics_tls(self) -> Callable[[], ssl.SSLContext] | None:
        """For Telemetry.prometheus: our certificate, and the same demands on whoever asks. Raises CertificateRefused."""
        certificates = self.certificates()
        return certificates.ssl_context if certificates is not None else None

    def certificates(self, role: str = "server") -> Certificates | None:
        """The files, read; None: plaintext. Raises CertificateRefused."""
        if self.certificate is None:
            return None
        return Certificates(role, ca=self.client_ca, certificate=self.certificate, private_key=self.private_key)


@dataclass(eq=False)
class Serving:
    """A running server."""

    address: str  # with the port that was bound
    health_address: str  # of the second listener, or empty
    inflight: InFlight
    _server: Any
    _health: Any  # grpc_health.v1.health.aio.HealthServicer
    _services: Sequence[str]
    _listener: Listener
    _telemetry: Telemetry = field(default_factory=Telemetry.off)
    _hurry: asyncio.Event = field(default_factory=asyncio.Event)
    _drain: "asyncio.Task[None] | None" = None
    _ready: bool = False
    _lagging: bool = False
    _loaded: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_ready(self) -> bool:
        """Whether health says SERVING."""
        return self._ready and not self._lagging and not self.inflight.draining

    async def ready(self) -> None:
        """Loaded: "startup", "ready", "" and every service go SERVING."""
        self._ready = True
        await self._set("startup", SERVING)
        await self._show()
        self._loaded.set()

    async def until_ready(self) -> None:
        """Wait for the first `ready()`."""
        await self._loaded.wait()

    async def unready(self) -> None:
        """Alive but not to be asked, as without a usable replica; `ready()` ends it."""
        self._ready = False
        await self._show()

    async def lagging(self, late: bool) -> None:
        """The event loop is (or is no longer) too late to answer in time."""
        if late != self._lagging:
            self._lagging = late
            await self._show()

    async def _show(self) -> None:
        for name in ("ready", "", *self._services):
            await self._set(name, SERVING if self.is_ready else NOT_SERVING)

    async def _set(self, name: str, state: Any) -> None:
        async with asyncio.timeout(1):  # not wait_for(): on 3.11 it can swallow a cancellation
            await self._health.set(name, state)

    async def drain(self, announce_s: float | None = None, grace_s: float | None = None) -> None:
        """Say so, refuse new calls, let the others finish, cut what is left. Repeatable: all callers wait for the one drain."""
        if self._drain is None:
            listener = self._listener
            announce = listener.announce_seconds if announce_s is None else announce_s
            grace = listener.grace_seconds if grace_s is None else grace_s
            self._drain = asyncio.create_task(self._run_drain(announce if self._ready else 0.0, grace))
        await asyncio.shield(self._drain)

    def hurry(self) -> None:
        """Zero what is left of announcement and grace; a second SIGTERM does this."""
        self._hurry.set()

    async def _run_drain(self, announce_s: float, grace_s: float) -> None:
        log.info("draining: %d calls in flight", self.inflight.count)
        self.inflight.draining = True  # the door answers new calls DRAINING
        await self._show()  # "live" stays: a draining server must not be restarted
        await self._unless_hurried(announce_s)  # still listening
        grace_s = 0.0 if self._hurry.is_set() else grace_s
        # Never `stop(0)` first: core would end every call before the door could answer it.
        stopping = asyncio.create_task(self._server.stop(max(grace_s, 2.0)))  # GOAWAY; the listener closes at once
        idle = asyncio.create_task(self.inflight.idle(grace_s - min(2.0, grace_s / 5)))
        hurried = asyncio.create_task(self._hurry.wait())
        await asyncio.wait((idle, hurried), return_when=asyncio.FIRST_COMPLETED)
        for waiting in (idle, hurried):
            waiting.cancel()
        if self.inflight.count:
            log.warning("cutting %d calls", self.inflight.count)
            self._telemetry.record("argosy.drain.cut", self.inflight.count)
            self.inflight.cut()
            await self.inflight.idle(3)  # the engines are told to stop first, and their counts waited for
        await self._server.stop(0)  # ends Watch, and handlers stuck in a send
        await stopping
        log.info("drained")

    async def _unless_hurried(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hurry.wait()

    async def stopped(self) -> None:
        """Wait until a drain has ended, whoever asks for it."""
        while self._drain is None:
            await self._server.wait_for_termination()
        await asyncio.shield(self._drain)


@asynccontextmanager
async def serve(
    listener: Listener,
    register: Callable[[Any], object],
    services: Sequence[str],
    *,
    policy: Policy | None = None,
    options: Mapping[str, int] = SERVER,
    telemetry: Telemetry | None = None,
    signals: bool = False,
    role: str = "server",
) -> AsyncIterator[Serving]:
    """Serve until the block is left; leaving it drains without announcement or grace unless a drain has already run.

    `register` adds the servicers to the grpc.aio server it is given; `services` are their full names, for health and reflection.
    `signals` makes SIGTERM and SIGINT drain, and a second one hurry: for the one server of a process; several share `until_signalled`.
    `role` is what metrics call its certificate.
    The block is entered listening and NOT_SERVING; `ready()` opens it. Raises `PlaintextRefused`, RuntimeError if a port is taken.
    """
    check_floors()
    telemetry = telemetry or Telemetry.off()
    inflight = InFlight()
    server = grpc.aio.server(
        options=list(options.items()),
        interceptors=[door(inflight, policy or Policy(), telemetry.around, telemetry.unknown_method)],
    )
    register(server)
    checks = health.aio.HealthServicer()  # type: ignore[attr-defined]  # born SERVING
    for name in ("startup", "ready", "", *services):
        await checks.set(name, NOT_SERVING)
    await checks.set("live", SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    if listener.reflection:
        names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
    certificates = listener.certificates(role)
    address = _bind(server, listener.address, certificates.server_credentials() if certificates is not None else None)
    probes, health_address = None, ""
    if listener.health_address:
        probes = grpc.aio.server(options=list(SERVER.items()), interceptors=[door(InFlight(), Policy())])
        health_pb2_grpc.add_HealthServicer_to_server(checks, probes)
        # The one listener without a credential off this machine: gRPC probes of a kubelet speak no TLS, and it serves nothing else.
        health_address = _bind(probes, listener.health_address, None, anywhere=True)
    serving = Serving(address, health_address, inflight, server, checks, services, listener, telemetry)
    await server.start()
    if probes is not None:
        await probes.start()
    log.info("listening on %s", address)
    telemetry.record("argosy.drain.cut", 0)  # a counter that is first seen at its end has not grown
    try:
        looking = certificates.watched(telemetry) if certificates is not None else contextlib.nullcontext()
        async with telemetry.watching_lag(LAG_UNREADY_S, serving.lagging), looking:
            with _signals(serving) if signals else contextlib.nullcontext():
                yield serving
    finally:
        await serving.drain(announce_s=0, grace_s=0)
        if probes is not None:
            await probes.stop(0)


def _bind(server: Any, address: str, credentials: grpc.ServerCredentials | None, *, anywhere: bool = False) -> str:
    """Bind and return the address with its real port."""
    if credentials is None and not anywhere and not is_local(address):
        raise PlaintextRefused("listen on", address)
    port = server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
    return address if address.startswith("unix") else f"{address.rpartition(':')[0]}:{port}"


@contextlib.contextmanager
def _signals(serving: Serving) -> Any:
    """The first SIGTERM or SIGINT drains, the second hurries."""
    loop = asyncio.get_running_loop()
    tasks: list[asyncio.Task[None]] = []

    def received() -> None:
        if tasks:
            serving.hurry()
        else:
            tasks.append(asyncio.create_task(serving.drain()))

    with _handling(loop, received):
        yield


async def until_signalled(first: Callable[[], Awaitable[None]], second: Callable[[], None]) -> None:
    """Wait for SIGTERM or SIGINT, then run `first` (the drains of a process's servers, in order) to its end; `second` on a second."""
    told = asyncio.Event()

    def received() -> None:
        if told.is_set():
            second()
        told.set()

    with _handling(asyncio.get_running_loop(), received):
        await told.wait()
        await first()


@contextlib.contextmanager
def _handling(loop: asyncio.AbstractEventLoop, received: Callable[[], None]) -> Any:
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, received)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
