"""Abuse of the wire and of what surrounds it, against a whole gateway: floods, half-open streams, ports, descriptors, versions, rows."""

import asyncio
import itertools
import logging
import os
import resource
import socket
import struct
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import grpc
import grpc.aio
import h2.errors
import h2.events
import h2.exceptions
import psutil
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, unknown_fields
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from argosy.admin.v1 import api_key_pb2, api_key_pb2_grpc, project_pb2, project_pb2_grpc, quota_pb2, quota_pb2_grpc
from argosy.v1 import config_pb2, generation_pb2, generation_pb2_grpc
from services.chassis.channel import ENGINE
from services.chassis.status import error_info
from services.gateway import authentication
from services.gateway.access import ACCESS
from services.gateway.keys import mint
from services.gateway.server import gateway
from services.gateway.settings import GatewaySettings
from services.gateway.sql_ledger import LedgerSettings
from services.gateway.store import StoreSettings, bootstrap
from tests.chassis.test_interceptors import RawClient, raw
from tests.fakes.edge import chat, edge, events_of, metadata
from tests.fakes.engine import fake_engine
from tests.faults.test_gateway import gateway_process, reason

log = logging.getLogger(__name__)  # figures that are told, not asserted: `pytest --log-cli-level=INFO`

STREAM_CHAT = "/argosy.v1.GenerationService/StreamChat"
ACME = [("authorization", "Bearer acme")]
PEPPER = b"\x5a" * 32
MIB = 1 << 20


def rss(pid: int) -> int:
    """Resident bytes of a process."""
    return int(psutil.Process(pid).memory_info().rss)


async def failure(call: Any) -> grpc.aio.AioRpcError:
    """The error of a call that must not succeed."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value


# --- A6: floods of frames ------------------------------------------------------------------------------------------------------------

RESETS, FRAMES = 5_000, 100_000  # of each kind


def resets(client: RawClient) -> Iterator[None]:
    """Rapid reset: each stream is opened with a whole call and ended at once (CVE-2023-44487)."""
    message = chat().SerializeToString()
    for number in range(RESETS):
        stream = 2 * number + 1
        base = [(":method", "POST"), (":scheme", "http"), (":path", STREAM_CHAT), (":authority", "test"), ("te", "trailers"),
                ("content-type", "application/grpc")]  # fmt: skip
        client.h2.send_headers(stream, base + ACME)
        client.h2.send_data(stream, b"\0" + len(message).to_bytes(4, "big") + message)
        client.h2.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
        yield


def frames(kind: int, flags: int, stream: int, body: bytes) -> Callable[[RawClient], Iterator[None]]:
    """The same frame over and over, written past h2's own bookkeeping."""
    frame = len(body).to_bytes(3, "big") + bytes((kind, flags)) + struct.pack(">I", stream) + body

    def flood(client: RawClient) -> Iterator[None]:
        for _ in range(FRAMES):
            client.writer.write(frame)
            yield

    return flood


FLOODS: dict[str, Callable[[RawClient], Iterator[None]]] = {
    "RESET": resets,
    "PING": frames(6, 0, 0, b"pingpong"),
    "SETTINGS": frames(4, 0, 0, b""),
    "SETTINGS of a window": frames(4, 0, 0, struct.pack(">HI", 4, 65_535)),
    "WINDOW_UPDATE": frames(8, 0, 0, struct.pack(">I", 1)),
    "WINDOW_UPDATE of a stream": frames(8, 0, 1, struct.pack(">I", 1)),
    "WINDOW_UPDATE to overflow": frames(8, 0, 0, struct.pack(">I", (1 << 31) - 1)),
    "empty DATA": frames(0, 0, 1, b""),
    "PRIORITY": frames(2, 0, 1, struct.pack(">IB", 0, 1)),
}


async def flooded(address: str, flood: Callable[[RawClient], Iterator[None]]) -> str:
    """Send a flood and read what it earns: "closed" or "alive" (a last PING was answered)."""
    async with raw(address) as client:
        if flood is not resets:
            await client.send_headers(1, STREAM_CHAT, ACME)
        await client.flush()

        async def read() -> str:
            tail = b""
            while data := await client.reader.read(65_536):
                tail = tail[-8:] + data
                if b"lastping" in tail:
                    return "alive"
                if flood is resets:
                    client.h2.receive_data(data)
            return "closed"

        reading = asyncio.create_task(read())
        try:
            async with asyncio.timeout(30):
                for number, _ in enumerate(flood(client)):
                    if number % 100 == 0:
                        await client.flush()
                        await asyncio.sleep(0)
                        while client.h2.outbound_flow_control_window < 16_384 and not reading.done():
                            await asyncio.sleep(0.001)  # the server's credit, read by the other task
                await client.flush()
                client.h2.ping(b"lastping")
                await client.flush()
                return await reading
        except (ConnectionError, h2.exceptions.ProtocolError):
            return "closed"
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


async def test_A6_a_flood_of_frames_ends_its_own_connection_at_most() -> None:
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(fake_engine(["x"] * 3, keep=False))
        address, child = await stack.enter_async_context(gateway_process(engine.address))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options=[*ENGINE.items()]))
        stub = generation_pb2_grpc.GenerationServiceStub(channel)

        async def honest() -> None:
            assert len(await events_of(stub.StreamChat(chat(), metadata=metadata(), timeout=20))) == 6

        for _ in range(20):  # what a process takes once is not counted
            await honest()
        before, answered = rss(child.pid), 0
        for name, flood in FLOODS.items():
            cpu = psutil.Process(child.pid).cpu_times()
            attack = asyncio.create_task(flooded(address, flood))
            while not attack.done():
                await honest()
                answered += 1
            end = await attack
            spent = psutil.Process(child.pid).cpu_times()
            seconds = spent.user + spent.system - cpu.user - cpu.system
            log.info("%s: %s, %.2f s CPU, %d honest answers so far", name, end, seconds, answered)
        await honest()
        await engine.until(lambda e: not e.running)
        log.info("RSS +%d", rss(child.pid) - before)
        assert answered >= len(FLOODS)
        assert engine.totals["calls"] < 21 + answered + RESETS / 10, "what is reset at once costs the engine nothing"
        assert rss(child.pid) - before < 48 * MIB
        assert child.returncode is None


# --- A3: half-open streams -----------------------------------------------------------------------------------------------------------


NOT_STARTED = (h2.errors.ErrorCodes.REFUSED_STREAM, h2.errors.ErrorCodes.ENHANCE_YOUR_CALM)  # which one is core's own choice


async def test_A3_half_open_streams_cost_their_connection_and_nobody_else() -> None:
    """A thousand streams of headers alone: a hundred stay, the rest are refused; those who stay silent or drip are let go in 10 s."""
    async with fake_engine(["x"]) as engine, edge(engine) as at, raw(at.gate.address) as many, raw(at.gate.address) as slow:
        for number in range(1_000):
            await many.send_headers(2 * number + 1, STREAM_CHAT, ACME)
        refused = 0
        async with aclosing(many.events()) as events:  # type: ignore[type-var]
            async for event in events:
                refused += isinstance(event, h2.events.StreamReset) and event.error_code in NOT_STARTED
                if refused == 900:
                    break
        assert at.gate.serving.inflight.count <= 100
        await slow.send_headers(1, STREAM_CHAT, ACME)

        async def drip() -> None:
            for byte in itertools.cycle(b"\0\0\0\x40\0"):
                slow.h2.send_data(1, bytes((byte,)))
                await slow.flush()
                await asyncio.sleep(0.2)

        dripping = asyncio.create_task(drip())
        try:
            for _ in range(10):
                assert len(await events_of(at.generation.StreamChat(chat(), metadata=metadata(), timeout=5))) == 4
            deadline = str(grpc.StatusCode.DEADLINE_EXCEEDED.value[0])
            ends = 0
            assert (await slow.trailers())["grpc-status"] == deadline
            dripping.cancel()
            async with aclosing(many.events()) as events:  # type: ignore[type-var]
                async for event in events:
                    if isinstance(event, h2.events.TrailersReceived | h2.events.ResponseReceived):
                        ends += dict(event.headers).get("grpc-status") == deadline  # type: ignore[call-overload]
                        if ends == 100:
                            break
        finally:
            dripping.cancel()
            await asyncio.gather(dripping, return_exceptions=True)
        assert await at.gate.serving.inflight.idle(5)
        assert engine.totals["calls"] == 10, "the engine heard of the honest calls alone"


# --- A1: prompts too long ------------------------------------------------------------------------------------------------------------


async def test_A1_a_prompt_too_long_ends_at_the_gateway() -> None:
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(fake_engine(["x"]))
        address, child = await stack.enter_async_context(gateway_process(engine.address))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options=[*ENGINE.items()]))
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        await events_of(stub.StreamChat(chat(), metadata=metadata(), timeout=20))
        process = psutil.Process(child.pid)
        for size, said in ((10 * MIB, "RESOURCE_EXHAUSTED"), (2 * MIB, "PROMPT_TOO_LONG"), (300 << 10, "PROMPT_TOO_LONG")):
            request = chat("x" * size)
            before, cpu = rss(child.pid), process.cpu_times()
            for call in (events_of(stub.StreamChat(request, metadata=metadata(), timeout=20)),
                         stub.Chat(request, metadata=metadata(), timeout=20)):  # fmt: skip
                error = await failure(call)
                assert reason(error) == said, size
                info = error_info(error)
                code = grpc.StatusCode.RESOURCE_EXHAUSTED if info is None else grpc.StatusCode.INVALID_ARGUMENT
                assert error.code() is code
            spent = process.cpu_times()
            seconds, grown = spent.user + spent.system - cpu.user - cpu.system, rss(child.pid) - before
            log.info("%d bytes, twice: %.3f s CPU, RSS +%d", size, seconds, grown)
            assert grown < 32 * MIB
        assert engine.totals["calls"] == 1
        assert len(await events_of(stub.StreamChat(chat("x" * 262_144), metadata=metadata(), timeout=20))) == 4, "the limit itself passes"


# --- A12: what listens ---------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def real_gateway(engine: str, database: str, home: Path, **variables: str) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """`python -m services.gateway` with only these settings."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("ARGOSY_", "OTEL_"))}
    environ |= {
        "ARGOSY_INFERENCE_ADDRESSES": engine,
        "ARGOSY_DATABASE_URL": database,
        "ARGOSY_KEY_PEPPER": PEPPER.hex(),
        "ARGOSY_JOURNAL_DIR": str(home / "journal"),
        **variables,
    }
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.gateway", env=environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        assert child.stdout is not None
        yield (await child.stdout.readline()).decode().strip(), child
    finally:
        with suppress(ProcessLookupError):
            child.kill()
        await child.wait()


def listening(pid: int) -> set[str]:
    """Every address on which a process takes connections: TCP, UDP and unix sockets."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    found = set()
    for connection in (each for process in family for each in process.net_connections("all")):
        if connection.status == psutil.CONN_LISTEN or (connection.status == psutil.CONN_NONE and connection.laddr and not connection.raddr):
            found.add(connection.laddr if isinstance(connection.laddr, str) else f"{connection.laddr[0]}:{connection.laddr[1]}")
    return {address.removeprefix("::ffff:") for address in found}  # core listens by IPv6 on the mapped address


def free_addresses(count: int) -> list[str]:
    """Loopback addresses that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    for each in sockets:
        each.close()
    return found


async def http(address: str, line: str) -> bytes:
    """The first line of the answer to one HTTP/1 request."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(f"{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    reply = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    return reply


async def test_A12_every_listening_port_is_known_and_asks_for_a_key(postgres_url: str, tmp_path: Path) -> None:
    """The public port lets a stranger see health alone; metrics and the kubelet's health stay on loopback; nothing else listens."""
    metrics, health = free_addresses(2)
    variables = {"ARGOSY_METRICS_ADDRESS": metrics, "ARGOSY_HEALTH_ADDRESS": health}
    async with fake_engine(["x"]) as engine, real_gateway(engine.address, postgres_url, tmp_path, **variables) as (address, child):
        assert listening(child.pid) == {address, metrics, health}
        asked = 0
        for port in (address, health):
            async with grpc.aio.insecure_channel(port) as channel:
                for path in ACCESS:
                    for token in ((), (("authorization", "Basic YTpi"),)):  # a wrong key would soon be shut out by its failures
                        error = await failure(channel.unary_unary(path, None, None)(b"", metadata=token, timeout=10))
                        allowed = {grpc.StatusCode.UNAUTHENTICATED} if port == address else {grpc.StatusCode.UNIMPLEMENTED}
                        # What has a row but no servicer yet is not there.
                        assert error.code() in allowed | {grpc.StatusCode.UNIMPLEMENTED}, (port, path, error.code())
                        asked += error.code() is grpc.StatusCode.UNAUTHENTICATED
                for path in ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "/grpc.channelz.v1.Channelz/GetServers"):
                    assert (await failure(channel.unary_unary(path, None, None)(b"", timeout=10))).code() is grpc.StatusCode.UNIMPLEMENTED
                await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="live"), timeout=10)
        assert asked > 30
        assert (await http(metrics, "GET /metrics")).startswith(b"HTTP/1.1 200")
        for line in ("GET /", "GET /debug", "GET /../etc/passwd", "POST /metrics", "DELETE /metrics"):
            assert not (await http(metrics, line)).startswith(b"HTTP/1.1 200"), line


# --- F36: descriptors ----------------------------------------------------------------------------------------------------------------


async def test_F36_out_of_descriptors_old_streams_go_on_and_new_ones_come_back() -> None:
    async with AsyncExitStack() as stack:
        gate = asyncio.Semaphore(1)
        engine = await stack.enter_async_context(fake_engine(["x"] * 50, gate=gate))
        address, child = await stack.enter_async_context(gateway_process(engine.address))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options=[*ENGINE.items()]))
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        call = stub.StreamChat(chat(), metadata=metadata(), timeout=60)
        seen = [await call.read(), await call.read()]
        process = psutil.Process(child.pid)
        process.rlimit(psutil.RLIMIT_NOFILE, (128, 128))
        host, _, port = address.rpartition(":")
        crowd = [await asyncio.open_connection(host, int(port)) for _ in range(200)]  # the kernel's own queue takes what core does not
        try:
            async with asyncio.timeout(20):
                while process.num_fds() < 128:  # another process: nothing tells us
                    await asyncio.sleep(0.02)
            for _ in range(20):
                gate.release()
                seen.append(await call.read())  # the old stream goes on
            async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as late:
                error = await failure(generation_pb2_grpc.GenerationServiceStub(late).Chat(chat(), metadata=metadata(), timeout=1.5))
                assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
            for _ in range(10):
                gate.release()
                seen.append(await call.read())
            assert child.returncode is None
        finally:
            for _, writer in crowd:
                writer.transport.abort()
        for _ in range(200):
            gate.release()
        async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as late:
            again = generation_pb2_grpc.GenerationServiceStub(late)
            # Core looks again once a second; the figure is 5 s, and this machine is shared.
            assert (await again.Chat(chat(), metadata=metadata(), timeout=10, wait_for_ready=True)).outputs
        while (event := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            seen.append(event)
        assert len(seen) == 53 and child.returncode is None
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 128, "the limit was the gateway's alone"


# --- versions: an older client, a newer one -------------------------------------------------------------------------------------------


def edited(change: Callable[[dict[str, descriptor_pb2.DescriptorProto]], None]) -> Callable[[str], Any]:
    """Message classes of another release: our own descriptors, with `change` made to the messages of argosy.v1."""
    pool, done = descriptor_pool.DescriptorPool(), set()

    def add(file: Any) -> None:
        if file.name in done:
            return
        done.add(file.name)
        for dependency in file.dependencies:
            add(dependency)
        proto = descriptor_pb2.FileDescriptorProto()
        file.CopyToProto(proto)
        if file.package == "argosy.v1":
            change({message.name: message for message in proto.message_type})
        pool.Add(proto)

    add(generation_pb2.DESCRIPTOR)
    return lambda name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"argosy.v1.{name}"))


def newer(messages: dict[str, descriptor_pb2.DescriptorProto]) -> None:
    """The next release: a field more in the request, in its config and in a message."""
    kinds = descriptor_pb2.FieldDescriptorProto
    for name in ("ChatRequest", "GenerationConfig", "Sampling", "ChatMessage"):
        if name in messages:
            messages[name].field.add(name="from_the_future", number=900, type=kinds.TYPE_STRING, label=kinds.LABEL_OPTIONAL)


def older(messages: dict[str, descriptor_pb2.DescriptorProto]) -> None:
    """A release before: no config, no request id, and events of which it knows three kinds."""
    for name, kept in (
        ("ChatRequest", {"model", "messages"}),
        ("GenerationEvent", {"sequence", "started", "text", "completed"}),
        ("Completed", {"usage"}),
        ("Started", {"generation_id"}),
    ):
        if name in messages:
            for field in [field for field in messages[name].field if field.name not in kept]:
                messages[name].field.remove(field)
            used = {field.oneof_index for field in messages[name].field if field.HasField("oneof_index")}
            assert used <= {0}  # so that no index moves
            del messages[name].oneof_decl[len(used) :]


async def test_old_client_new_server() -> None:
    async with fake_engine(["to", "day"]) as engine, edge(engine) as at:

        async def asked(classes: Callable[[str], Any], request: Any) -> list[Any]:
            event = classes("GenerationEvent")
            call = at.channel.unary_stream(STREAM_CHAT, type(request).SerializeToString, event.FromString)
            return [each async for each in call(request, metadata=metadata(), timeout=10)]

        # What a newer client says and we do not know is no error, and reaches the engine, which may be newer than we are.
        classes = edited(newer)
        request = classes("ChatRequest").FromString(chat().SerializeToString())
        request.from_the_future = "a"
        request.config.from_the_future = "b"
        request.config.sampling.from_the_future = "c"
        request.messages[0].from_the_future = "d"
        assert "".join(event.text.text for event in await asked(classes, request)) == "today"
        arrived = engine.calls[-1].request.chat
        assert [field.field_number for field in unknown_fields.UnknownFieldSet(arrived)] == [900]  # type: ignore[attr-defined]
        assert classes("ChatRequest").FromString(arrived.SerializeToString()).from_the_future == "a"
        # An enum value we do not know would be a wish we cannot keep: refused by name, never taken for another.
        for bad, field in (
            (chat(work_class=77), "work_class"),
            (_role(77), "messages[0].role"),
        ):  # fmt: skip
            error = await failure(events_of(at.generation.StreamChat(bad, metadata=metadata(), timeout=10)))
            info = error_info(error)
            assert info is not None and (info.reason, info.metadata["field"]) == ("FIELD_INVALID", field)
        # An older client leaves out what it does not know, and skips events it cannot read.
        classes = edited(older)
        request = classes("ChatRequest").FromString(chat().SerializeToString())
        events = await asked(classes, request)
        assert "".join(event.text.text for event in events) == "today"
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert events[-1].completed.usage.output_tokens == 2
        assert any(event.WhichOneof("event") is None for event in events), "OutputFinished is news to it"
        assert engine.totals["calls"] == 2


def _role(value: int) -> generation_pb2.ChatRequest:
    request = chat()
    request.messages[0].role = value  # type: ignore[assignment]
    return request


# --- F35: bad rows -------------------------------------------------------------------------------------------------------------------

HUGE = (1 << 63) - 1
LIMITS = st.none() | st.sampled_from([-HUGE - 1, -1, 0, 1, 2, 1_000, 1 << 31, 1 << 32, 1 << 53, HUGE - 1, HUGE])
POLICY = (
    "requests_per_minute", "requests_per_day", "tokens_per_minute", "tokens_per_day", "concurrent_streams", "output_token_ceiling",
    "concurrent_jobs", "gpu_seconds_per_day", "stored_bytes", "nanos_per_day",
)  # fmt: skip
OF_KEY = ("requests_per_minute", "tokens_per_minute", "concurrent_requests", "output_token_ceiling", "nanos_per_day")
CHARGED = frozenset(POLICY) - {"concurrent_jobs", "gpu_seconds_per_day", "stored_bytes"}  # by a generation
STRANGE = st.sampled_from(["", " ", "\n", "'; DROP TABLE projects; --", "\u202e", "x" * 5_000, "generate ", "GENERATE"])
TIMES = st.sampled_from(["infinity", "-infinity", "1970-01-01", "0001-01-01 BC", "9999-12-31", "20000-01-01", "294276-12-31"])
TIMED = ("expire_time", "previous_expire_time")
ENOUGH = 1_000_000  # a generation of the test costs less of anything, nanos among it

LABELS = st.sampled_from(["null", "[]", '"x"', "0", '{"a": null}', '{"a": {"b": []}}', '{"": ""}'])
REVISIONS = st.sampled_from([0, -1, HUGE])
CELLS: dict[tuple[str, str], st.SearchStrategy[Any]] = {
    ("project", "name"): st.sampled_from(["", " ", "UPPER", "a" * 64, "news\n", None]),
    ("project", "display_name"): STRANGE,
    ("project", "labels"): LABELS,
    ("project", "state"): st.sampled_from(["", "active", "SUSPENDED", "DELETED", None]),
    ("project", "revision"): REVISIONS,
    ("policy", "revision"): REVISIONS,
    ("key", "display_name"): STRANGE,
    ("key", "labels"): LABELS,
    ("key", "state"): st.sampled_from(["", "active", "DISABLED", "DELETED", None]),
    ("key", "revision"): REVISIONS,
    ("key", "scopes"): st.sampled_from([None, (), (None,), ("",), ("generate", None), ("generate", "generate", "no such"), ("*",)]),
    ("key", "models"): st.sampled_from([None, (), (None,), ("",), ("*",), ("models/fake", None), ("models/fake", ""), ("models/other",)]),
    ("key", "expire_time"): TIMES,
    ("key", "previous_expire_time"): TIMES,
    **{("policy", name): LIMITS for name in POLICY},
    **{("key", name): LIMITS for name in OF_KEY},
}


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    """A project, its policy (or none) and a key, of which at most three cells are strange."""
    made: dict[str, Any] = {"project": {}, "policy": {}, "key": {}}
    for part, name in draw(st.lists(st.sampled_from(list(CELLS)), min_size=1, max_size=3, unique=True)):
        made[part][name] = draw(CELLS[part, name])
    if not made["policy"] and draw(st.booleans()):
        made["policy"] = None
    return made


def verdict(row: dict[str, Any]) -> set[str]:
    """What may be answered to a generation, given rows that the schema took."""
    project, policy, key = row["project"], row["policy"] or {}, row["key"]
    if project.get("state", "ACTIVE") != "ACTIVE" or key.get("state", "ACTIVE") != "ACTIVE":
        return {"API_KEY_INVALID"}
    if key.get("expire_time") == "1970-01-01":
        return {"API_KEY_INVALID"}
    if "generate" not in (key.get("scopes", ("generate",)) or ()):
        return {"SCOPE_MISSING"}
    if key.get("models", ()) and "models/fake" not in key["models"]:
        return {"RESOURCE_NOT_FOUND"}
    limits = [each.get(name) for each in (policy, key) for name in CHARGED | set(OF_KEY) if name != "output_token_ceiling"]
    if any(limit is not None and limit == 0 for limit in limits):
        return {"QUOTA_EXCEEDED", "RATE_LIMITED"}
    if all(limit is None or limit >= ENOUGH for limit in limits):
        return {"OK"}
    return {"OK", "QUOTA_EXCEEDED", "RATE_LIMITED", "FIELD_OUT_OF_RANGE"}


def refused_by_schema(row: dict[str, Any]) -> bool:
    """What the schema must not take, whoever writes it."""
    cells = [(name, value) for part in row.values() for name, value in (part or {}).items() if value is not None]
    counts = [(name, value) for name, value in cells if name in (*POLICY, *OF_KEY)]
    below = any(not 1 <= value <= 262_144 if name == "output_token_ceiling" else value < 0 for name, value in counts)
    states = any(row[part].get("state", "ACTIVE") not in ("ACTIVE", "SUSPENDED", "DISABLED", "DELETED") for part in ("project", "key"))
    times = any(name in TIMED and value not in ("1970-01-01", "9999-12-31") for name, value in cells)
    labels = any(name == "labels" and value != '{"": ""}' for name, value in cells)
    nulls = any(isinstance(value, tuple) and None in value for _, value in cells)
    return below or states or times or labels or nulls or "name" in row["project"]


async def written(database: asyncpg.Connection, row: dict[str, Any]) -> str | None:
    """Write the rows as an operator with SQL would; the key's text, or None where the schema refuses them."""
    project, minted = str(uuid4()), mint(str(uuid4()), "test", PEPPER)

    async def insert(table: str, values: dict[str, Any]) -> None:
        # As text, which the server reads: the driver has no word for half of these.
        types = {"labels": "jsonb", "scopes": "text[]", "models": "text[]", "kv_secret": "bytea", "mac": "bytea"}
        types |= dict.fromkeys(TIMED, "timestamptz") | dict.fromkeys(("uid", "project_uid"), "uuid")
        types |= dict.fromkeys((*POLICY, *OF_KEY, "revision"), "bigint")
        marks = (f"${n}::{'' if types.get(name) == 'text[]' else 'text::'}{types.get(name, 'text')}" for n, name in enumerate(values, 1))
        given = (list(value) if isinstance(value, tuple) else value if value is None else str(value) for value in values.values())
        await database.execute(f"INSERT INTO {table} ({', '.join(values)}) VALUES ({', '.join(marks)})", *given)

    try:
        async with database.transaction():
            name = f"p-{project[:8]}"
            await insert("projects", {"uid": project, "name": name, "kv_secret": "\\x" + "6b" * 32, **row["project"]})
            if row["policy"] is not None:
                await insert("quota_policies", {"project_uid": project, **row["policy"]})
            key = {"scopes": ("generate",), **row["key"]}
            await insert("api_keys", {"project_uid": project, "uid": minted.uid, "mac": "\\x" + minted.mac.hex(), **key})
    except (asyncpg.IntegrityConstraintViolationError, asyncpg.DataError):
        return None
    return minted.token


async def test_F35_no_row_crashes_the_gateway_or_opens_it(postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows written past every check of ours: the schema refuses the impossible, the gateway serves or refuses the strange by name."""
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(authentication, "FAILURES_A_MINUTE", 1 << 30)  # all callers of the test share an address
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(fake_engine(["x"], keep=False))
        own = GatewaySettings(inference_addresses=(engine.address,), key_pepper=PEPPER.hex())
        where, books = StoreSettings(database_url=postgres_url), LedgerSettings(journal_dir=tmp_path / "journal")
        gate = await stack.enter_async_context(gateway(own, store=where, books=books, wait=True))
        await gate.replicas.until(1)
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(gate.address))
        database = await asyncpg.connect(postgres_url.replace("+asyncpg", ""))
        stack.push_async_callback(database.close)
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        projects: Any = project_pb2_grpc.ProjectServiceStub(channel)
        keys: Any = api_key_pb2_grpc.ApiKeyServiceStub(channel)
        quotas: Any = quota_pb2_grpc.QuotaServiceStub(channel)
        assert gate.store is not None
        platform = (("authorization", f"Bearer {await bootstrap(gate.store)}"),)
        config = config_pb2.GenerationConfig(stopping=config_pb2.Stopping(max_output_tokens=1))
        seen: Counter[str] = Counter()

        async def answer(token: str) -> str:
            try:
                await events_of(stub.StreamChat(chat(config=config), metadata=(("authorization", f"Bearer {token}"),), timeout=10))
            except grpc.aio.AioRpcError as error:
                return reason(error)
            return "OK"

        async def tried(row: dict[str, Any]) -> None:
            token = await written(database, row)
            if refused_by_schema(row):
                assert token is None, "the schema took what it must not"
            if token is None:
                seen["refused by the schema"] += 1
                return
            said = await answer(token)
            seen[said] += 1
            assert said in verdict(row), said
            if row["project"].get("state") == "DELETED":
                return
            # The platform can look at it all, to mend it.
            name = f"projects/{await database.fetchval('SELECT name FROM projects ORDER BY create_time DESC LIMIT 1')}"
            await projects.GetProject(project_pb2.GetProjectRequest(name=name), metadata=platform, timeout=10)
            await keys.ListApiKeys(api_key_pb2.ListApiKeysRequest(parent=name), metadata=platform, timeout=10)
            await quotas.GetQuotaPolicy(quota_pb2.GetQuotaPolicyRequest(name=f"{name}/quotaPolicy"), metadata=platform, timeout=10)
            await quotas.GetQuotaUsage(quota_pb2.GetQuotaUsageRequest(name=f"{name}/quotaPolicy"), metadata=platform, timeout=10)

        plain = await written(database, {"project": {}, "policy": {}, "key": {}})
        assert plain is not None

        @settings(max_examples=250, deadline=None, derandomize=True, database=None)
        @given(rows())
        def property_of_rows(row: dict[str, Any]) -> None:
            asyncio.run_coroutine_threadsafe(tried(row), loop).result(30)

        await asyncio.to_thread(property_of_rows)
        assert await answer(plain) == "OK"
        every = {"OK", "QUOTA_EXCEEDED", "API_KEY_INVALID", "SCOPE_MISSING", "RESOURCE_NOT_FOUND", "refused by the schema"}
        assert every <= set(seen), seen
        log.info("verdicts: %s", dict(seen))
