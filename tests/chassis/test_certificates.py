"""Certificates that change under a running server, and those that are refused."""

import asyncio
import contextlib
import datetime as dt
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.chassis.certificates import CertificateRefused, Certificates, ClientTls
from services.chassis.channel import LastingChannel, open_channel, streaming
from services.chassis.server import Listener
from services.chassis.telemetry import Telemetry
from tests.chassis.echo import SERVICE, Client, calling, echo, register, text
from tests.chassis.test_status import failure, rest
from tests.fakes.authority import HOUR, Authority, Secret, secret

TARGET = {"grpc.ssl_target_name_override": "argosy-chat.models.svc"}
SPIFFE = "spiffe://cluster.local/ns/models/sa/argosy-gateway"


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def server(tmp_path: Path, authority: Authority) -> Secret:
    return secret(tmp_path / "server", authority, "argosy-chat.models.svc", spiffe="spiffe://cluster.local/ns/models/sa/chat")


@pytest.fixture
def client(tmp_path: Path, authority: Authority) -> Secret:
    return secret(tmp_path / "client", authority, spiffe=SPIFFE)


def listening(files: Secret, **more: Any) -> Listener:
    return Listener("127.0.0.1:0", files.certificate, files.private_key, files.ca, announce_seconds=0, **more)


def held(files: Secret) -> Certificates:
    found = ClientTls(files.ca, files.certificate, files.private_key).certificates()
    assert found is not None
    return found


def shown(files: Secret) -> dict[str, Any]:
    """What `calling` needs to call the server by its name."""
    return {"credentials": held(files).channel_credentials(), "options": TARGET}


async def drip(request: Any, context: Any) -> AsyncIterator[Any]:
    """A word now, and one for each time that it is asked to go on."""
    for word in request.value.split():
        yield text(word)
        await asyncio.sleep(0.02)


async def test_F30_a_rotation_under_streams_loses_none_and_new_connections_use_the_new_files(
    server: Secret, client: Secret, authority: Authority
) -> None:
    """Server, client and authority are all renewed, as cert-manager would: the bundle first, then who is signed by it."""
    new, name = Authority(), "argosy-chat.models.svc"
    async with echo({"Stream": drip}, listener=listening(server)) as serving:
        kept = held(client)
        channel = LastingChannel(serving.address, credentials=kept.channel_credentials(), options=TARGET)
        caller = Client(channel)  # type: ignore[arg-type]
        streams = [caller.stream(text("word " * 100)) for _ in range(10)]
        assert [(await stream.read()).value for stream in streams] == ["word"] * 10
        for files in (server, client):
            files.put((files.certificate.read_bytes(), files.private_key.read_bytes()), [authority, new])
        server.put(new.issue(name), [authority, new])
        client.put(new.issue(spiffe=SPIFFE), [authority, new])
        assert kept.look() == 2
        channel.renew(kept.channel_credentials(), 30)
        for files in (server, client):
            files.put((files.certificate.read_bytes(), files.private_key.read_bytes()), [new])
        for _ in range(5):
            async with calling(serving.address, **shown(client)) as fresh, streaming(fresh.stream(text("a"))) as events:
                assert (await events.read()).value == "a"
        async with streaming(caller.stream(text("b"))) as events:
            assert (await events.read()).value == "b", "the renewed channel"
        for stream in streams:
            assert await rest(stream) == ["word"] * 99 and await stream.code() is grpc.StatusCode.OK
        await channel.close()


async def test_F30_files_that_do_not_fit_together_or_are_no_certificate_change_nothing(
    server: Secret, client: Secret, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    ended = authority.issue("argosy-chat.models.svc", begins=-2 * HOUR, ends=-HOUR)
    pair = authority.issue("argosy-chat.models.svc")
    bad = {
        "is not the key of": (pair[0], server.private_key.read_bytes()),
        "holds no certificate in PEM": (b"garbage", pair[1]),
        "holds no private key in PEM": (pair[0], b"garbage"),
        "has ended: it was valid until": ended,
    }
    async with echo(listener=listening(server)) as serving:
        for says, files in bad.items():
            server.put(files, [authority])
            async with calling(serving.address, **shown(client)) as caller:
                assert (await caller.unary(text("a"))).value == "unary a"
            assert f"the new server certificate is not used: {server.certificate.parent}" in caplog.text and says in caplog.text
        server.private_key.unlink()
        async with calling(serving.address, **shown(client)) as caller:
            assert (await caller.unary(text("a"))).value == "unary a"
        assert f"{server.private_key} cannot be read" in caplog.text
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == len(bad) + 1, "each is said once"


async def test_F30_a_server_does_not_start_with_an_expired_certificate(tmp_path: Path, authority: Authority) -> None:
    files = Secret(tmp_path / "old").put(authority.issue("x", begins=-2 * HOUR, ends=-HOUR), [authority])
    with pytest.raises(CertificateRefused, match=r"tls\.crt has ended: it was valid until 20"):
        async with echo(listener=listening(files)):
            pass


@asynccontextmanager
async def careless(pair: tuple[bytes, bytes]) -> AsyncIterator[str]:
    """A server that shows what it should not."""
    running = grpc.aio.server()
    register()(running)
    port = running.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(pair[1], pair[0])]))
    await running.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await running.stop(0)


@pytest.mark.parametrize("wrong", ["expired", "another name", "another authority"])
async def test_F30_a_client_refuses_a_server(client: Secret, authority: Authority, wrong: str) -> None:
    name = "argosy-chat.models.svc"
    pair = {
        "expired": authority.issue(name, begins=-2 * HOUR, ends=-HOUR),
        "another name": authority.issue("argosy-other.models.svc"),
        "another authority": Authority().issue(name),
    }[wrong]
    async with careless(pair) as address, calling(address, **shown(client)) as caller:
        error = await failure(caller.unary(text("a"), timeout=20))
        assert error.code() is grpc.StatusCode.UNAVAILABLE


async def test_F30_a_server_refuses_a_client(server: Secret, client: Secret, authority: Authority, tmp_path: Path) -> None:
    async with echo(listener=listening(server)) as serving:
        async with calling(serving.address, **shown(client)) as caller:
            assert (await caller.unary(text("a"))).value == "unary a", "a SPIFFE id is all that it needs to be called"
        stranger = Authority().issue(spiffe=SPIFFE)
        ended = authority.issue(spiffe=SPIFFE, begins=-2 * HOUR, ends=-HOUR)
        for pair in (stranger, ended, None):
            credentials = grpc.ssl_channel_credentials(authority.pem, *((pair[1], pair[0]) if pair else (None, None)))
            async with calling(serving.address, credentials=credentials, options=TARGET) as caller:
                assert (await failure(caller.unary(text("a"), timeout=20))).code() is grpc.StatusCode.UNAVAILABLE
        async with calling(serving.address) as caller:  # plaintext
            assert (await failure(caller.unary(text("a"), timeout=20))).code() is grpc.StatusCode.UNAVAILABLE


async def test_probe_port_health_only(server: Secret) -> None:
    """With client certificates demanded, the kubelet's port answers in plaintext, and answers nothing but Health."""
    async with echo(listener=listening(server, health_address="127.0.0.1:0")) as serving, open_channel(serving.health_address) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="ready"), timeout=10)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        error = await failure(Client(channel).unary(text("a"), timeout=10))
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED and SERVICE in f"/{SERVICE}/Unary"


def test_what_is_left_is_measured_and_said_once_when_it_is_low(
    tmp_path: Path, authority: Authority, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    telemetry, files = Telemetry.start("test", {}), secret(tmp_path / "s", authority, "x")
    kept = held(files)

    def at(now: dt.timedelta) -> str:
        class Clock(dt.datetime):
            @classmethod
            def now(cls, tz: Any = None) -> dt.datetime:
                return real.now(tz) + now

        real = dt.datetime
        monkeypatch.setattr("services.chassis.certificates.datetime.datetime", Clock)
        kept.measure(telemetry)
        monkeypatch.undo()
        return telemetry.exposition().decode()

    def value(exposed: str, name: str) -> float:
        return float(next(line for line in exposed.splitlines() if line.startswith(name)).rpartition(" ")[2])

    exposed = at(dt.timedelta(0))
    assert 3_590 < value(exposed, "argosy_certificate_remaining_seconds{") <= 3_600 and 'argosy_certificate="client"' in exposed
    assert 0.49 < value(exposed, "argosy_certificate_life") <= 0.5 and not caplog.records
    for _ in range(2):
        exposed = at(0.8 * HOUR)
    assert value(exposed, "argosy_certificate_life") < 0.25 and [record.getMessage()[:33] for record in caplog.records] == [
        "the client certificate ends soon:"
    ]
    for _ in range(2):
        exposed = at(2 * HOUR)
    assert value(exposed, "argosy_certificate_remaining_seconds{") < 0 and "the client certificate has ended" in caplog.text
    assert len(caplog.records) == 2
    files.put(authority.issue("x"), [authority])
    assert kept.look() == 2
    at(0.8 * HOUR)
    assert len(caplog.records) == 3, "a new certificate, a new word"


async def test_a_change_is_told_of(tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.chassis.certificates.LOOK_S", 0.01)
    files, told = secret(tmp_path / "s", authority, "x"), asyncio.Event()
    kept = held(files)

    async def changed() -> None:
        kept.channel_credentials()
        told.set()

    kept.channel_credentials()
    async with kept.watched(Telemetry.off(), changed):
        files.put(authority.issue("x"), [authority])
        await asyncio.wait_for(told.wait(), 10)


@pytest.mark.parametrize("names", [("tls_certificate",), ("tls_private_key",), ("tls_certificate", "tls_private_key")])
def test_a_client_s_files_go_together(names: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set together or not at all|set the CA"):
        ClientTls(**dict.fromkeys(names, tmp_path))
    assert ClientTls().certificates() is None


async def scraped(address: str, files: Secret | None, authority: Authority) -> bytes:
    """What the metrics' listener answers to whoever shows these files."""
    context = ssl.create_default_context(cadata=authority.pem.decode())
    if files is not None:
        context.load_cert_chain(files.certificate, files.private_key)
    port = int(address.rpartition(":")[2])
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname="argosy-chat.models.svc")
    try:
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        return await reader.read()
    finally:
        writer.close()


def test_metrics_are_read_under_uvloop_each_time(server: Secret, client: Secret, authority: Authority) -> None:
    """The services run on it, and its streams read before a handler runs: a handshake in the handler lost the client's hello."""

    async def ask() -> list[bytes]:
        telemetry = Telemetry.start("test", {})
        telemetry.record("argosy.inflight", 3)
        async with telemetry.prometheus("0.0.0.0:0", listening(server).metrics_tls()) as address:
            return [await scraped(address, client, authority) for _ in range(20)]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert all(b"argosy_inflight" in answer for answer in runner.run(ask()))


async def test_metrics_leave_the_machine_over_tls_alone(server: Secret, client: Secret, authority: Authority) -> None:
    telemetry = Telemetry.start("test", {})
    telemetry.record("argosy.inflight", 3)
    async with telemetry.prometheus("0.0.0.0:0", listening(server).metrics_tls()) as address:
        assert b"argosy_inflight" in await scraped(address, client, authority)
        with contextlib.suppress(ssl.SSLError, ConnectionError):  # whether the refusal or the end is seen first
            assert not await scraped(address, None, authority)
        server.put(authority.issue("argosy-chat.models.svc"), [authority])
        assert b"argosy_inflight" in await scraped(address, client, authority)
