"""One server's life: ports, caps, health, drain."""

import asyncio
import datetime
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import h2.events
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from services.chassis import server as chassis_server
from services.chassis.channel import PlaintextRefused, open_channel, streaming
from services.chassis.errors import Shed
from services.chassis.interceptors import Policy, progress
from services.chassis.server import FloorError, Listener, check_floors, public, serve
from tests.chassis.echo import PLAIN, SERVICE, Client, calling, echo, register, text
from tests.chassis.peer import peer
from tests.chassis.test_interceptors import raw
from tests.chassis.test_status import drained, failure, rest, unpacked

UP, DOWN = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


async def health(channel: grpc.aio.Channel, *names: str) -> list[int]:
    stub = health_pb2_grpc.HealthStub(channel)
    return [(await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=20)).status for name in names]


async def forever(request: Any, context: Any) -> AsyncIterator[Any]:
    """One event, then silence."""
    yield text("one")
    progress().last_sequence = 1
    await asyncio.Event().wait()


# --- ports and caps -----------------------------------------------------------------------------------------------------------------


async def test_stream_cap() -> None:
    """300 half-open streams on one connection: 100 stay, 200 are refused."""
    async with echo(options=public(300)) as serving, raw(serving.address) as client:
        for number in range(300):
            await client.send_headers(2 * number + 1, f"/{SERVICE}/Unary", [])
        refused = 0
        async for event in client.events():
            refused += isinstance(event, h2.events.StreamReset)
            if refused == 200:
                break
        async with calling(serving.address) as caller:
            assert (await caller.unary(text("still here"))).value == "unary still here"
        client.h2.ping(b"12345678")
        await client.flush()
        async for event in client.events():
            refused += isinstance(event, h2.events.StreamReset)
            if isinstance(event, h2.events.PingAckReceived):
                break
    assert refused == 200


async def test_connection_age_keeps_streams() -> None:
    """An aged connection is left without an error: a stream on it ends whole, unary calls move on; past the grace a stream dies."""
    moved = asyncio.Event()

    async def peers(request: Any, context: Any) -> Any:
        return text(context.peer())

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        yield text("a")
        await moved.wait()
        yield text("b")

    async def kept() -> None:
        options = {**public(300), "grpc.max_connection_age_ms": 1_000}
        async with echo({"Unary": peers, "Stream": stream}, options=options) as serving, calling(serving.address) as caller:
            events = caller.stream(text(""))
            await events.read()
            connections: set[str] = set()
            async with asyncio.timeout(30):
                while len(connections) < 4:
                    try:
                        connections.add((await caller.unary(text(""), timeout=10)).value)
                    except grpc.aio.AioRpcError as left:  # it met the GOAWAY; a channel that retries would repeat it
                        assert left.code() is grpc.StatusCode.UNAVAILABLE
            moved.set()
            assert (await events.read()).value == "b"
            assert await events.read() is grpc.aio.EOF  # type: ignore[attr-defined]
            assert await events.code() is grpc.StatusCode.OK

    async def cut() -> None:
        options = {**public(300), "grpc.max_connection_age_ms": 500, "grpc.max_connection_age_grace_ms": 500}
        async with echo({"Stream": forever}, options=options) as serving, calling(serving.address) as caller:
            assert (await failure(drained(caller.stream(text(""), timeout=30)))).code() is grpc.StatusCode.UNAVAILABLE

    await asyncio.gather(kept(), cut())


async def test_port_clash_is_loud() -> None:
    async with echo() as serving:
        with pytest.raises(RuntimeError, match="bind"):
            async with echo(listener=Listener(serving.address)):
                pass


async def test_a_unix_socket_serves(tmp_path: Path) -> None:
    async with echo(listener=Listener(f"unix:{tmp_path}/s")) as serving, calling(serving.address) as caller:
        assert serving.address == f"unix:{tmp_path}/s"
        assert (await caller.unary(text("a"))).value == "unary a"


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "10.0.0.1:50051", "example.org:1"])
async def test_plaintext_stays_on_this_machine(address: str) -> None:
    with pytest.raises(PlaintextRefused, match=r"Refusing to listen on .* in plaintext: set a certificate"):
        async with echo(listener=Listener(address)):
            pass
    with pytest.raises(PlaintextRefused, match="Refusing to connect"):
        open_channel(address)


def certificate(name: str, folder: Path, issuer: tuple[x509.Certificate, Any] | None = None) -> tuple[x509.Certificate, Any, Path, Path]:
    """A certificate and key, self-signed or by `issuer`, and their files."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0].subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .sign(issuer[1] if issuer else key, hashes.SHA256())
    )
    crt, pem = folder / f"{name}.crt", folder / f"{name}.key"
    crt.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    pem.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return made, key, crt, pem


async def test_F30_tls_and_client_certificates(tmp_path: Path) -> None:
    root, root_key, ca, _ = certificate("ca", tmp_path)
    _, _, crt, key = certificate("server", tmp_path, (root, root_key))
    _, _, client_crt, client_key = certificate("client", tmp_path, (root, root_key))
    _, _, bad_crt, bad_key = certificate("stranger", tmp_path)
    listener = Listener("localhost:0", crt, key, ca, announce_seconds=0)

    def credentials(crt: Path | None = None, key: Path | None = None) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(ca.read_bytes(), key and key.read_bytes(), crt and crt.read_bytes())

    async with echo(listener=listener) as serving:
        async with calling(serving.address, credentials=credentials(client_crt, client_key)) as caller:
            assert (await caller.unary(text("a"))).value == "unary a"
        for wrong in (credentials(), credentials(bad_crt, bad_key), None):
            async with calling(serving.address, credentials=wrong) as caller:
                error = await failure(caller.unary(text("a"), timeout=20))
                assert error.code() is grpc.StatusCode.UNAVAILABLE


def test_a_listener_s_files_go_together(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="together"):
        Listener(certificate=tmp_path)
    with pytest.raises(ValueError, match="over TLS"):
        Listener(client_ca=tmp_path)


def test_version_floors(monkeypatch: pytest.MonkeyPatch) -> None:
    check_floors()
    monkeypatch.setattr(grpc, "__version__", "1.84.0")
    with pytest.raises(FloorError, match=r"grpcio is 1\.84\.0"):
        check_floors()
    monkeypatch.setattr(chassis_server.google.protobuf, "__version__", "6.33.4")
    with pytest.raises(FloorError, match=r"protobuf 6\.33\.4 is below 6\.33\.5"):
        check_floors()


# --- health -------------------------------------------------------------------------------------------------------------------------


async def test_health_before_load() -> None:
    """Every name is registered before the first probe, and only "live" is up; Watch stays open and is told."""
    async with serve(Listener(announce_seconds=0), register(), [SERVICE]) as serving, open_channel(serving.address) as channel:
        names = ("startup", "ready", "live", "", SERVICE)
        assert await health(channel, *names) == [DOWN, DOWN, UP, DOWN, DOWN]
        unknown = await failure(health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="other")))
        assert unknown.code() is grpc.StatusCode.NOT_FOUND
        async with streaming(health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))) as watch:
            assert (await watch.read()).status == DOWN
            await serving.ready()
            assert (await watch.read()).status == UP
            assert await health(channel, *names) == [UP] * 5
            await serving.unready()
            assert (await watch.read()).status == DOWN
            assert await health(channel, *names) == [UP, DOWN, UP, DOWN, DOWN]


async def test_health_under_saturation() -> None:
    """Every call is shed, and a thousand wait: health still answers."""
    gate = asyncio.Event()

    async def busy(request: Any, context: Any) -> Any:
        if len(waiting) > 500:
            raise Shed(0.4)
        waiting.append(1)
        await gate.wait()
        return text("")

    waiting: list[int] = []
    async with echo({"Unary": busy}) as serving, calling(serving.address) as caller:
        calls = [caller.unary(text("")) for _ in range(800)]
        shed = 0
        for call in asyncio.as_completed(calls):
            shed += (await failure(call)).code() is grpc.StatusCode.UNAVAILABLE
            if shed == 299:
                break
        async with calling(serving.address) as other:
            assert await health(other.channel, "", "live", SERVICE) == [UP, UP, UP]
        gate.set()
        await asyncio.gather(*calls, return_exceptions=True)


async def test_health_port_serves_nothing_else(tmp_path: Path) -> None:
    """The kubelet's listener: plaintext beside TLS, health alone."""
    _, _, crt, key = certificate("server", tmp_path)
    listener = Listener("localhost:0", crt, key, health_address="127.0.0.1:0", announce_seconds=0, reflection=True)
    async with echo(listener=listener) as serving, calling(serving.health_address) as caller:
        assert await health(caller.channel, "", "live") == [UP, UP]
        assert (await failure(caller.unary(text("")))).code() is grpc.StatusCode.UNIMPLEMENTED
        info = reflection_pb2_grpc.ServerReflectionStub(caller.channel).ServerReflectionInfo(iter([]))
        assert (await failure(drained(info))).code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("on", [False, True])
async def test_A12_reflection_is_an_option(on: bool) -> None:
    ask = reflection_pb2.ServerReflectionRequest(list_services="")
    async with echo(listener=Listener(reflection=on, announce_seconds=0)) as serving, open_channel(serving.address) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([ask]))
        if on:
            reply = await call.read()
            assert SERVICE in [service.name for service in reply.list_services_response.service]
            call.cancel()
        else:
            assert (await failure(call.read())).code() is grpc.StatusCode.UNIMPLEMENTED


# --- drain --------------------------------------------------------------------------------------------------------------------------


async def opened(caller: Client, count: int) -> list[Any]:
    """Streams that have all shown their first event."""
    calls = [caller.stream(text("")) for _ in range(count)]
    for call in calls:
        await call.read()
    return calls


async def watching(caller: Client) -> Any:
    """A watch that has said SERVING; its next word is the start of the drain."""
    watch = health_pb2_grpc.HealthStub(caller.channel).Watch(health_pb2.HealthCheckRequest(service="ready"))
    assert (await watch.read()).status == UP
    return watch


async def test_F2_drain() -> None:
    """A hundred streams: those that end within the grace are whole, the rest learn DRAINING, and nobody may repeat them."""
    finish = asyncio.Event()

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        yield text("one")
        progress().last_sequence = 1
        await (asyncio.Event() if request.value == "long" else finish).wait()
        yield text("two")

    listener = Listener(announce_seconds=0, grace_seconds=1)
    async with echo({**PLAIN, "Stream": stream}, listener=listener) as serving, calling(serving.address) as caller:
        calls = {kind: [caller.stream(text(kind)) for _ in range(50)] for kind in ("short", "long")}
        for call in calls["short"] + calls["long"]:
            await call.read()
        watch = await watching(caller)
        draining = asyncio.create_task(serving.drain())
        assert (await watch.read()).status == DOWN
        finish.set()
        for call in calls["short"]:
            assert await rest(call) == ["two"] and await call.code() is grpc.StatusCode.OK
        for call in calls["long"]:
            error = await failure(rest(call))
            assert (error.code(), unpacked(error)["ErrorInfo"].reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
            trailers = dict(error.trailing_metadata())
            assert (trailers["last_seq"], trailers["grpc-retry-pushback-ms"]) == ("1", "-1")
        await draining
        assert serving.inflight.count == 0
        assert (await failure(caller.unary(text("")))).code() is grpc.StatusCode.UNAVAILABLE


async def test_F2_while_announced_new_calls_are_told_and_old_ones_run() -> None:
    async with echo({**PLAIN, "Stream": forever}, listener=Listener(announce_seconds=60)) as serving, calling(serving.address) as caller:
        (stream,) = await opened(caller, 1)
        watch = await watching(caller)
        draining = asyncio.create_task(serving.drain())
        assert (await watch.read()).status == DOWN
        error = await failure(caller.unary(text("")))
        assert unpacked(error)["ErrorInfo"].reason == "DRAINING"
        assert dict(error.trailing_metadata())["grpc-retry-pushback-ms"] == "100"
        assert await health(caller.channel, "", "ready", SERVICE, "live") == [DOWN, DOWN, DOWN, UP]
        assert not stream.done()
        serving.hurry()
        assert unpacked(await failure(rest(stream)))["ErrorInfo"].reason == "DRAINING"
        await draining


async def test_F2_a_stalled_reader_does_not_hold_the_drain() -> None:
    sent: list[int] = []

    async def flood(request: Any, context: Any) -> AsyncIterator[Any]:
        while True:
            sent.append(1)
            yield text("x" * 60_000)

    listener = Listener(announce_seconds=0, grace_seconds=0.1)
    async with echo({"Stream": flood}, listener=listener) as serving, calling(serving.address) as caller:
        await opened(caller, 3)
        await asyncio.wait_for(serving.drain(), 20)
        assert serving.inflight.count == 0


async def test_F2_a_watch_does_not_hold_the_drain_and_is_not_a_cut_call() -> None:
    """It lasts as long as its caller, so a rollout would take the whole grace for each replica."""
    policy = Policy(watches=frozenset({"Stream"}))
    listener = Listener(announce_seconds=0, grace_seconds=600)
    async with echo({**PLAIN, "Stream": forever}, listener=listener, policy=policy) as serving, calling(serving.address) as caller:
        (watch,) = await opened(caller, 1)
        assert serving.inflight.count == 0
        await asyncio.wait_for(serving.drain(), 20)
        assert (await failure(rest(watch))).code() is grpc.StatusCode.UNAVAILABLE


async def test_F3_double_sigterm() -> None:
    """A minute of announcement and a minute of grace, with a stream open: the second signal ends both, with a status and rc 0."""
    async with peer("serve") as process:
        async with calling(await process.line()) as caller:
            (stream,) = await opened(caller, 1)
            process.send(signal.SIGTERM)
            while True:
                error = await caller_error(caller)
                if error is not None and unpacked(error)["ErrorInfo"].reason == "DRAINING":
                    break
            process.send(signal.SIGTERM)
            assert unpacked(await failure(rest(stream)))["ErrorInfo"].reason == "DRAINING"
        assert await process.line() == "stopped"
        assert await asyncio.wait_for(process.process.wait(), 20) == 0


async def caller_error(caller: Client) -> grpc.aio.AioRpcError | None:
    try:
        await caller.unary(text(""))
    except grpc.aio.AioRpcError as error:
        return error
    return None


async def test_F3_sigterm_while_loading() -> None:
    """Nobody was told it is ready, so there is nothing to announce."""
    async with peer("load") as process:
        await process.line()
        process.send(signal.SIGTERM)
        assert await process.line() == "stopped"
        assert await asyncio.wait_for(process.process.wait(), 20) == 0


async def test_watch_does_not_hold_drain() -> None:
    async with echo(listener=Listener(announce_seconds=0, grace_seconds=300)) as serving, open_channel(serving.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="ready"))
        assert (await watch.read()).status == UP
        await asyncio.wait_for(serving.drain(), 20)
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            while True:
                assert (await watch.read()).status == DOWN
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_leaving_the_block_ends_what_is_inside() -> None:
    async with echo({"Stream": forever}, policy=Policy()) as serving:
        channel = open_channel(serving.address)
        (stream,) = await opened(Client(channel), 1)
    assert unpacked(await failure(rest(stream)))["ErrorInfo"].reason == "DRAINING"
    await channel.close()


async def test_a_drain_may_be_asked_for_twice() -> None:
    async with echo() as serving:
        await asyncio.gather(serving.drain(), serving.drain(), serving.stopped())
