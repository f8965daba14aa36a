"""The gateway's wiring: health, reflection, the database behind it, and what a stranger may reach."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from grpc_health.v1 import health_pb2, health_pb2_grpc

from argosy.v1 import generation_pb2_grpc
from services.chassis.server import Listener
from services.chassis.status import error_info
from services.gateway.server import gateway, secret, signing_key
from services.gateway.settings import GatewaySettings
from services.gateway.sql_ledger import LedgerSettings
from services.gateway.store import StoreSettings, bootstrap
from tests.fakes.edge import chat, edge, events_of, metadata, text_of
from tests.fakes.engine import fake_engine

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
PEPPER = "5a" * 32


async def until(channel: grpc.aio.Channel, state: int, service: str = "argosy.v1.GenerationService") -> None:
    """Wait until Health says so."""
    watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=service), timeout=10)
    async for seen in watch:
        if seen.status == state:
            break
    watch.cancel()


async def test_health_follows_the_fleet_and_live_does_not() -> None:
    async with fake_engine() as engine, edge(engine) as at:
        await until(at.channel, SERVING)
        await engine.kill()
        await until(at.channel, NOT_SERVING)
        await until(at.channel, NOT_SERVING, "ready")
        await until(at.channel, SERVING, "live")


async def test_A12_what_has_no_row_does_not_exist() -> None:
    async with fake_engine() as engine, edge(engine) as at:
        for path in (
            "/argosy.v1.GenerationService/Nothing",
            "/argosy.v1.GenerationService/streamchat",
            "//argosy.v1.GenerationService/StreamChat",
            "/argosy.internal.engine.v1.EngineService/Generate",
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            "/grpc.channelz.v1.Channelz/GetTopChannels",
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await at.channel.unary_unary(path)(b"", metadata=metadata(), timeout=5)
            assert error.value.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAUTHENTICATED), path


async def test_reflection_is_a_setting() -> None:
    async with fake_engine() as engine, edge(engine, listener=Listener(reflection=True)) as at:
        call = at.channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        ask = call(iter([b"\x3a\x00"]), timeout=5)  # list_services
        assert b"argosy.v1.GenerationService" in await ask.read()
        ask.cancel()


async def test_A11_a_callers_own_context_does_not_come_in() -> None:
    async with fake_engine() as engine, edge(engine) as at:
        forged = (*metadata(), ("x-argosy-caller-bin", b"forged"), ("x-tenant", "other"))
        await events_of(at.generation.StreamChat(chat(), metadata=forged, timeout=5))
        assert at.ledger.reserved[0].project_uid == "uid-acme"


def test_a_pepper_and_a_signing_key_are_what_they_say(tmp_path: Path) -> None:
    assert len(secret("pepper", PEPPER)) == 32
    for wrong in ("", "5a", "x" * 64):
        with pytest.raises(ValueError, match="64 hex digits"):
            secret("pepper", wrong)
    key = Ed25519PrivateKey.generate()
    path = tmp_path / "caller.pem"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    assert signing_key(path).public_key() == key.public_key()


async def test_a_key_opens_a_stream_and_the_books_keep_it(postgres_url: str, tmp_path: Path) -> None:
    async with fake_engine(["to", "day"]) as engine:
        settings = GatewaySettings(inference_addresses=(engine.address,), key_pepper=PEPPER)
        books = LedgerSettings(journal_dir=tmp_path / "journal")
        async with gateway(settings, store=StoreSettings(database_url=postgres_url), books=books, wait=True) as gate:
            assert gate.store is not None
            key = await bootstrap(gate.store)
            await gate.replicas.until(1)
            async with grpc.aio.insecure_channel(gate.address) as channel:
                stub = generation_pb2_grpc.GenerationServiceStub(channel)
                bearer = (("authorization", f"Bearer {key}"),)
                assert text_of(await events_of(stub.StreamChat(chat(), metadata=bearer, timeout=10))) == "today"
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await stub.Chat(chat(), metadata=(("authorization", f"Bearer {key[:-1]}"),), timeout=10)
                info = error_info(error.value)
                assert info is not None and info.reason == "API_KEY_INVALID"
            rows = await gate.store.hot.rows("SELECT outcome, input_tokens, output_tokens FROM ledger WHERE outcome IS NOT NULL")
            assert [tuple(row) for row in rows] == [("DONE", 2, 2)]


def test_an_unusable_environment_is_told_at_once() -> None:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("ARGOSY_")}
    done = subprocess.run(
        [sys.executable, "-m", "services.gateway"],
        env=environ | {"ARGOSY_STREAMS_PER_REPLICA": "0", "ARGOSY_QUEUE_SECONDS": "soon"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "ARGOSY_STREAMS_PER_REPLICA" in done.stderr and "ARGOSY_QUEUE_SECONDS" in done.stderr


async def test_F3_the_process_drains_on_sigterm_and_exits_0(postgres_url: str, tmp_path: Path) -> None:
    async with fake_engine(["x"]) as engine:
        environ = {key: value for key, value in os.environ.items() if not key.startswith("ARGOSY_")}
        environ |= {
            "ARGOSY_INFERENCE_ADDRESSES": engine.address,
            "ARGOSY_DATABASE_URL": postgres_url,
            "ARGOSY_KEY_PEPPER": PEPPER,
            "ARGOSY_JOURNAL_DIR": str(tmp_path / "journal"),
            "ARGOSY_ANNOUNCE_SECONDS": "0.1",
        }
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.gateway", env=environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        assert child.stdout is not None
        address = (await child.stdout.readline()).decode().strip()
        async with grpc.aio.insecure_channel(address) as channel:
            await until(channel, SERVING)
            child.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(child.wait(), 20) == 0


def test_the_gateway_has_no_torch() -> None:
    """The process that answers the wire never imports it."""
    script = "import sys, services.gateway.__main__; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "False"]
