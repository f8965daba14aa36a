"""The door and its steps, over real servers and channels."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import Any

import grpc
import grpc.aio
import h2.config
import h2.connection
import h2.events
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.chassis import errors
from services.chassis.channel import DEADLINE, open_channel, remaining, streaming
from services.chassis.identity import CALLER, CALLER_KEY, Caller, CallerSigner, CallerVerifier
from services.chassis.interceptors import (
    METADATA_BYTES,
    Door,
    Incoming,
    InFlight,
    Policy,
    check_metadata,
    client_interceptors,
    progress,
    verified,
)
from services.chassis.server import SERVER, Listener, serve
from tests.chassis.echo import PLAIN, SERVICE, Client, calling, echo, register, text
from tests.chassis.test_status import drained, failure, unpacked

WHO = Caller("uid", "news", "k1", frozenset({"generate"}), "r-1", "ab")


async def words(*each: str) -> AsyncIterator[Any]:
    for word in each:
        yield text(word)


async def reason_of(call: Any) -> str:
    return str(unpacked(await failure(call))["ErrorInfo"].reason)


# --- the door -----------------------------------------------------------------------------------------------------------------------


async def test_door_keeps_arity() -> None:
    """All four arities, the same four written with read and write, and grpc's own Watch, each inside one `around`."""
    seen: list[str] = []

    @asynccontextmanager
    async def around(incoming: Incoming, context: Any) -> AsyncIterator[None]:
        seen.append(f"in {incoming.method}")
        yield
        seen.append(f"out {incoming.method}")

    async def stream(request: Any, context: Any) -> None:
        for word in request.value.split():
            await context.write(text(word))

    async def collect(_: Any, context: Any) -> Any:
        got = []
        while (request := await context.read()) is not grpc.aio.EOF:
            got.append(request.value)
        return text(" ".join(got))

    async def converse(_: Any, context: Any) -> None:
        while (request := await context.read()) is not grpc.aio.EOF:
            await context.write(text(request.value.upper()))

    for bodies in (PLAIN, {"Unary": PLAIN["Unary"], "Stream": stream, "Collect": collect, "Converse": converse}):
        seen.clear()
        async with echo(bodies) as serving, calling(serving.address) as caller:
            assert (await caller.unary(text("a"))).value == "unary a"
            assert await drained(caller.stream(text("a b"))) == ["a", "b"]
            assert (await caller.collect(words("x", "y"))).value == "x y"
            assert await drained(caller.converse(words("x", "y"))) == ["X", "Y"]
            watch = health_pb2_grpc.HealthStub(caller.channel).Watch(health_pb2.HealthCheckRequest(service="ready"))
            async with streaming(watch) as states:
                assert (await states.read()).status == health_pb2.HealthCheckResponse.SERVING

    server = grpc.aio.server(interceptors=[Door(around)])
    register()(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with calling(f"127.0.0.1:{port}") as caller:
        await caller.unary(text("a"))
        await drained(caller.stream(text("a")))
        await caller.collect(words("x"))
        await drained(caller.converse(words("x")))
    await server.stop(0)
    assert seen == [f"{side} /{SERVICE}/{name}" for name in ("Unary", "Stream", "Collect", "Converse") for side in ("in", "out")]


async def test_an_unknown_method_is_core_s_to_answer() -> None:
    async with echo() as serving, calling(serving.address) as caller:
        for path in ("/test.Echo/Nothing", "/test.Echo//Unary", "//test.Echo/Unary", "/test.echo/Unary", "/TEST.Echo/Unary"):
            error = await failure(caller.channel.unary_unary(path, None, None)(b""))
            assert error.code() is grpc.StatusCode.UNIMPLEMENTED, path


async def test_message_caps() -> None:
    """Exact to the byte: core's limit for the server, ours for the method before the parser runs."""
    parsed = 0

    def parse(raw: bytes) -> Any:
        nonlocal parsed
        parsed += 1
        return raw

    async def body(request: bytes, context: Any) -> bytes:
        return b"%d" % len(request)

    def add(server: Any) -> None:
        handler = grpc.unary_unary_rpc_method_handler(body, parse, None)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Unary": handler}),))

    limits = {**SERVER, "grpc.max_receive_message_length": 4_000}
    serving_at = serve(Listener(announce_seconds=0), add, [SERVICE], policy=Policy(request_bytes=1_000), options=limits)
    async with serving_at as serving, calling(serving.address) as caller:
        call = caller.channel.unary_unary(f"/{SERVICE}/Unary", None, None)
        assert await call(b"x" * 1_000) == b"1000" and parsed == 1
        error = await failure(call(b"x" * 1_001))
        info = unpacked(error)["ErrorInfo"]
        assert (info.reason, dict(info.metadata)) == (
            "PROMPT_TOO_LONG", {"field": "", "asked": "1001", "limit": "1000", "unit": "bytes"},
        )  # fmt: skip
        assert await reason_of(call(b"x" * 4_000)) == "PROMPT_TOO_LONG"
        assert (await failure(call(b"x" * 4_001))).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert parsed == 1


async def test_cleanup_in_await_and_yield() -> None:
    """A handler whose caller leaves gets CancelledError at an await, GeneratorExit in a yield; `finally` runs, and may await."""
    left: asyncio.Queue[str] = asyncio.Queue()
    entered = asyncio.Event()

    async def unary(request: Any, context: Any) -> Any:
        try:
            entered.set()
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            left.put_nowait("await")

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            while True:
                yield text("x" * 60_000)  # fills the window of a caller that has stopped reading: the handler sits in its yield
        finally:
            await asyncio.sleep(0)
            left.put_nowait("yield")

    async with echo({"Unary": unary, "Stream": stream}) as serving, calling(serving.address) as caller:
        call = caller.unary(text(""))
        await entered.wait()
        call.cancel()
        assert await asyncio.wait_for(left.get(), 10) == "await"
        async with streaming(caller.stream(text(""))) as events:
            await events.read()
        assert await asyncio.wait_for(left.get(), 10) == "yield"
        assert await serving.inflight.idle(10)


async def test_contextvars_of_one_call_do_not_reach_another() -> None:
    async def body(request: Any, context: Any) -> Any:
        return text(f"{progress().last_sequence} {CALLER.get()}")

    async def number(incoming: Incoming, context: Any) -> Caller:
        progress().last_sequence = 5
        return WHO

    async with (
        echo({"Unary": body}) as plain,
        echo({"Unary": body}, policy=Policy(authenticate=number)) as other,
        calling(plain.address) as caller,
        calling(other.address) as second,
    ):
        assert (await second.unary(text(""))).value.startswith("5 Caller")
        assert (await caller.unary(text(""))).value == "None None"


# --- metadata -----------------------------------------------------------------------------------------------------------------------


class RawClient:
    """An HTTP/2 client that can misbehave: grpcio's cannot enough."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8", validate_outbound_headers=False))
        self.h2.encoder.encode = partial(self.h2.encoder.encode, huffman=False)  # its Huffman code is quadratic in a header's length
        self.h2.initiate_connection()

    async def send_headers(self, stream: int, path: str, extra: list[tuple[str, str]], end: bool = False) -> None:
        base = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "test"), ("te", "trailers"),
                ("content-type", "application/grpc")]  # fmt: skip
        self.h2.send_headers(stream, base + extra, end_stream=end)
        await self.flush()

    async def send_message(self, stream: int, message: bytes) -> None:
        self.h2.send_data(stream, b"\0" + len(message).to_bytes(4, "big") + message, end_stream=True)
        await self.flush()

    async def flush(self) -> None:
        self.writer.write(self.h2.data_to_send())
        await self.writer.drain()

    async def events(self) -> AsyncIterator[Any]:
        while data := await asyncio.wait_for(self.reader.read(65_536), 10):
            for event in self.h2.receive_data(data):
                yield event
            await self.flush()

    async def trailers(self) -> dict[str, str]:
        """Headers of the frame that ends the stream."""
        async with aclosing(self.events()) as events:
            async for event in events:
                if isinstance(event, h2.events.TrailersReceived | h2.events.ResponseReceived):
                    found = dict(event.headers)
                    if "grpc-status" in found:
                        return found
        raise AssertionError("the connection ended without a status")


@asynccontextmanager
async def raw(address: str) -> AsyncIterator[RawClient]:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield RawClient(reader, writer)
    finally:
        writer.close()


async def test_A3_headers_then_silence() -> None:
    """A caller who is let in and sends no message is let go, whatever the arity of the answer; one who ends without any is told."""
    async with echo(policy=Policy(first_message_s=0.1)) as serving:
        for path in ("Unary", "Stream"):
            async with raw(serving.address) as client:
                await client.send_headers(1, f"/{SERVICE}/{path}", [])
                assert (await client.trailers())["grpc-status"] == str(grpc.StatusCode.DEADLINE_EXCEEDED.value[0])
            async with raw(serving.address) as client:
                await client.send_headers(1, f"/{SERVICE}/{path}", [], end=True)
                assert (await client.trailers())["grpc-status"] == str(grpc.StatusCode.INVALID_ARGUMENT.value[0])
        assert await serving.inflight.idle(10)
        async with calling(serving.address) as caller:
            assert (await caller.unary(text("a"))).value == "unary a"


async def test_A3_who_may_not_enter_is_refused_before_the_message() -> None:
    async with echo(policy=VERIFIED) as serving, raw(serving.address) as client:
        await client.send_headers(1, f"/{SERVICE}/Unary", [])
        assert (await client.trailers())["grpc-status"] == str(grpc.StatusCode.UNAUTHENTICATED.value[0])


@pytest.mark.parametrize("size, entered", [(4_000, True), (40_000, False), (1_000_000, False)])
async def test_A7_metadata_before_settings(size: int, entered: bool) -> None:
    """HEADERS go out before the server's SETTINGS are read, so core's limit does not bind yet; ours does."""
    calls: list[int] = []

    async def body(request: Any, context: Any) -> Any:
        calls.append(sum(len(v) for _, v in context.invocation_metadata()))
        return text("in")

    async with echo({"Unary": body}) as serving, raw(serving.address) as client:
        await client.send_headers(1, f"/{SERVICE}/Unary", [("padding", "x" * size)])
        await client.send_message(1, b"")
        trailers = await client.trailers()
    assert (trailers["grpc-status"] == "0") == entered and bool(calls) == entered
    if not entered:
        assert trailers["grpc-status"] == str(grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])
        ours = errors.MetadataTooLarge.sentence, "-1"
        said = trailers["grpc-message"], trailers.get("grpc-retry-pushback-ms")
        assert said == ours or "received metadata size exceeds" in said[0]  # core, if the acknowledgement was quicker after all


def test_A7_the_limit_is_exact() -> None:
    check_metadata(Incoming("/a/B", (("k", "x" * (METADATA_BYTES - 33)),)))
    with pytest.raises(errors.MetadataTooLarge):
        check_metadata(Incoming("/a/B", (("k", "x" * (METADATA_BYTES - 32)),)))


async def test_A7_many_small_entries_count_too() -> None:
    assert METADATA_BYTES == 16_384
    async with echo() as serving, raw(serving.address) as client:
        await client.send_headers(1, f"/{SERVICE}/Unary", [(f"k{n}", "") for n in range(500)])
        await client.send_message(1, b"")
        assert (await client.trailers())["grpc-status"] == "8"


async def test_A11_metadata_with_the_stripped_prefix_ends_at_the_door() -> None:
    seen: list[Any] = []

    async def authenticate(incoming: Incoming, context: Any) -> Caller:
        seen.append(incoming.invocation_metadata)
        return WHO

    async def body(request: Any, context: Any) -> Any:
        return text(repr(context.invocation_metadata()))

    policy = Policy(authenticate=authenticate, strip="x-")
    async with echo({"Unary": body}, policy=policy) as serving, calling(serving.address) as caller:
        metadata = (("x-tenant", "a"), ("x-argosy-caller-bin", b"\0"), ("traceparent", "00-1"), ("x_tenant", "b"))
        shown = (await caller.unary(text(""), metadata=metadata)).value
    assert "x-" not in shown and "x-" not in repr(seen) and "traceparent" in shown


async def test_A11_a_repeated_key_is_refused() -> None:
    incoming = Incoming("/a/B", (("authorization", "one"), ("other", "x"), ("authorization", "two")))
    assert incoming.value("other") == "x" and incoming.value("absent") is None
    with pytest.raises(errors.MetadataInvalid):
        incoming.value("authorization")


# --- caller and scope ---------------------------------------------------------------------------------------------------------------

KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
VERIFIED = Policy(authenticate=verified(CallerVerifier({"k": KEY.public_key()}, "inference")))


async def who(request: Any, context: Any) -> Any:
    caller = CALLER.get()
    return text(caller.project if caller else "nobody")


def signed(audience: str = "inference", late_s: float = 0.0) -> bytes:
    return CallerSigner(KEY, "k").sign(WHO, audience, time.time() + late_s)


async def test_a_pod_believes_the_gateway_s_signature_and_nothing_else() -> None:
    async with echo({"Unary": who}, policy=VERIFIED) as serving, calling(serving.address) as caller:
        call = caller.unary(text(""), metadata=((CALLER_KEY, signed()),))
        assert (await call).value == "news"
        assert dict(await call.trailing_metadata())["request_id"] == "r-1"
        for metadata in (
            (),
            ((CALLER_KEY, b""),),
            ((CALLER_KEY, b"x" * 5_000),),
            ((CALLER_KEY, signed("finetune")),),
            ((CALLER_KEY, signed(late_s=-120)),),
            ((CALLER_KEY, signed(late_s=120)),),
            (("x-argosy-caller", "news"),),
        ):
            error = await failure(caller.unary(text(""), metadata=metadata))
            assert (error.code(), error.details()) == (grpc.StatusCode.UNAUTHENTICATED, errors.ApiKeyInvalid.sentence)
        twice = ((CALLER_KEY, signed()), (CALLER_KEY, signed()))
        assert await reason_of(caller.unary(text(""), metadata=twice)) == "METADATA_INVALID"


async def test_scope_comes_last_and_health_needs_no_caller() -> None:
    def permit(path: str, caller: Caller) -> None:
        if path.endswith("/Stream"):
            raise errors.ScopeMissing("explain")

    async def authenticate(incoming: Incoming, context: Any) -> Caller:
        return WHO

    policy = Policy(authenticate=authenticate, permit=permit)
    async with echo(policy=policy) as serving, calling(serving.address) as caller:
        assert (await caller.unary(text("a"))).value == "unary a"
        assert await reason_of(drained(caller.stream(text("a")))) == "SCOPE_MISSING"
        await health_pb2_grpc.HealthStub(caller.channel).Check(health_pb2.HealthCheckRequest())


def test_a_policy_that_permits_must_authenticate() -> None:
    with pytest.raises(ValueError, match="authenticate"):
        Policy(permit=lambda path, caller: None)


# --- deadlines ----------------------------------------------------------------------------------------------------------------------


async def test_pod_sees_deadline() -> None:
    """Cancellation propagates by itself, a deadline does not: the relay passes on what is left."""
    seen: list[float] = []

    async def pod_body(request: Any, context: Any) -> Any:
        seen.append(context.time_remaining())
        return text("")

    async with echo({"Unary": pod_body}) as pod, calling(pod.address) as inner:

        async def relay(request: Any, context: Any) -> Any:
            return await inner.unary(request, timeout=remaining())

        async with echo({"Unary": relay}, policy=Policy(deadline_cap_s=60)) as gateway, calling(gateway.address) as caller:
            await caller.unary(text(""), timeout=20)
            await caller.unary(text(""))
            await caller.unary(text(""), timeout=4_000)
    assert 15 < seen[0] < 20  # the wire rounds a timeout up to three digits
    assert all(50 < left < 60.5 for left in seen[1:])


async def test_remaining_outside_a_door_is_the_cap() -> None:
    assert remaining(cap_s=7) == 7
    DEADLINE.set(asyncio.get_running_loop().time() - 1)
    assert remaining() == 0.0


async def test_a_caller_s_own_deadline_reaches_the_handler_as_a_cancellation() -> None:
    ended: asyncio.Queue[str] = asyncio.Queue()

    async def body(request: Any, context: Any) -> Any:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.put_nowait("cancelled")
            raise

    async with echo({"Unary": body}) as serving, calling(serving.address) as caller:
        assert (await failure(caller.unary(text(""), timeout=0.1))).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert await asyncio.wait_for(ended.get(), 10) == "cancelled"
        assert await serving.inflight.idle(10)


# --- in flight ----------------------------------------------------------------------------------------------------------------------


async def test_in_flight_counts_what_is_inside_and_nothing_else() -> None:
    gate, inside = asyncio.Event(), asyncio.Semaphore(0)

    async def body(request: Any, context: Any) -> Any:
        inside.release()
        await gate.wait()
        return text("")

    async with echo({"Unary": body}) as serving, calling(serving.address) as caller:
        watch = health_pb2_grpc.HealthStub(caller.channel).Watch(health_pb2.HealthCheckRequest())
        await watch.read()
        assert serving.inflight.count == 0
        calls = [caller.unary(text("")) for _ in range(3)]
        for _ in calls:
            await inside.acquire()
        assert serving.inflight.count == 3 and not await serving.inflight.idle(0)
        gate.set()
        await asyncio.gather(*calls)
        assert await serving.inflight.idle(10)
        watch.cancel()


async def test_idle_of_an_empty_server_waits_for_nothing() -> None:
    assert await InFlight().idle(0)


# --- client interceptors ------------------------------------------------------------------------------------------------------------


async def test_client_interceptor_arity() -> None:
    """One object for all four arities is asked for the first only: a stream would lose its credential."""
    seen: list[str] = []

    async def authenticate(incoming: Incoming, context: Any) -> Caller:
        seen.append(f"{incoming.method.rsplit('/', 1)[-1]} {incoming.value('authorization')}")
        return WHO

    def adjust(details: Any) -> Any:
        return details._replace(metadata=(*(details.metadata or ()), ("authorization", "key")))

    watched: list[Any] = []
    async with echo(policy=Policy(authenticate=authenticate)) as serving:
        interceptors = client_interceptors(adjust, lambda details, call: watched.append(details.method))
        assert len({type(each) for each in interceptors}) == 4
        async with open_channel(serving.address, interceptors=interceptors) as channel:
            caller = Client(channel)
            await caller.unary(text("a"))
            await drained(caller.stream(text("a")))
            await caller.collect(words("x"))
            await drained(caller.converse(words("x")))
    assert seen == ["Unary key", "Stream key", "Collect key", "Converse key"] and len(watched) == 4


async def test_gzip_bomb() -> None:
    """64 MB of zeros in 64 KB: refused by its size once inflated, without being held in memory whole."""
    size = 64 << 20
    me = psutil.Process()
    async with echo() as serving, calling(serving.address, options={"grpc.max_send_message_length": -1}) as caller:
        await caller.unary(text("warm"))
        bomb = b"\0" * size
        before = me.memory_info().rss
        call = caller.channel.unary_unary(f"/{SERVICE}/Unary", None, None)
        error = await failure(call(bomb, compression=grpc.Compression.Gzip, timeout=30))
        grown = me.memory_info().rss - before
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert grown < size, f"{grown >> 20} MB"
