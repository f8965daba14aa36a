"""Faults of the gateway and its callers: killed, terminated, read slowly, left. The engines' own counts are the truth (I4)."""

import asyncio
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from argosy.v1 import generation_pb2_grpc
from services.chassis.channel import ENGINE
from services.chassis.errors import StoreUnavailable
from services.chassis.server import Listener
from services.chassis.status import error_info
from services.gateway.ledger import Outcome, Settlement
from tests.fakes.edge import Edge, chat, edge, events_of, metadata
from tests.fakes.engine import fake_engine


async def settled(at: Edge, count: int) -> list[Settlement]:
    """The settlements, once there are `count` and nothing is open."""
    async with asyncio.timeout(30):
        while len(at.ledger.settled) < count or at.ledger.open:
            at.ledger.changed.clear()
            await at.ledger.changed.wait()
    return [settlement for _, settlement in at.ledger.settled.values()]


def reason(error: BaseException) -> str:
    assert isinstance(error, grpc.aio.AioRpcError), error
    info = error_info(error)
    return info.reason if info is not None else error.code().name


@asynccontextmanager
async def gateway_process(*arguments: str) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.fakes.edge", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert child.stdout is not None
    try:
        yield (await child.stdout.readline()).decode().strip(), child
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def test_F1_a_killed_gateway_ends_its_calls_and_stops_the_engines() -> None:
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(fake_engine(["x"] * 10_000, token_s=0.005))
        address, child = await stack.enter_async_context(gateway_process(engine.address))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        calls = [stub.StreamChat(chat(), metadata=metadata(), timeout=30) for _ in range(10)]
        running = [asyncio.ensure_future(events_of(call)) for call in calls]
        await engine.until(lambda e: len(e.running) == 10)
        child.send_signal(signal.SIGKILL)
        errors = await asyncio.gather(*running, return_exceptions=True)
        assert {reason(error) for error in errors if isinstance(error, BaseException)} == {"UNAVAILABLE"}
        assert all(isinstance(error, grpc.aio.AioRpcError) for error in errors)
        await engine.until(lambda e: not e.running)
        assert engine.totals["CANCELLED"] == 10
        # Another gateway serves them again at once.
        engine.says = ["y"]
        again, _ = await stack.enter_async_context(gateway_process(engine.address))
        other = await stack.enter_async_context(grpc.aio.insecure_channel(again))
        assert (
            len(await events_of(generation_pb2_grpc.GenerationServiceStub(other).StreamChat(chat(), metadata=metadata(), timeout=10))) == 4
        )


async def test_F2_sigterm_with_a_hundred_streams_lets_them_finish_and_exits_0() -> None:
    async with AsyncExitStack() as stack:
        gate = asyncio.Semaphore(0)
        engine = await stack.enter_async_context(fake_engine(["x"] * 3, gate=gate))
        address, child = await stack.enter_async_context(gateway_process(engine.address, "--grace", "20"))
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]))
            for _ in range(2)
        ]
        stubs = [generation_pb2_grpc.GenerationServiceStub(channel) for channel in channels]
        running = [asyncio.ensure_future(events_of(stubs[n % 2].StreamChat(chat(), metadata=metadata(), timeout=60))) for n in range(100)]
        await engine.until(lambda e: len(e.running) == 100)
        health = health_pb2_grpc.HealthStub(channels[0]).Watch(health_pb2.HealthCheckRequest(service="ready"))
        assert (await health.read()).status == health_pb2.HealthCheckResponse.SERVING
        child.send_signal(signal.SIGTERM)
        assert (await health.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        for _ in range(300):
            gate.release()
        outcomes = await asyncio.gather(*running)
        assert {len(events) for events in outcomes} == {6}
        health.cancel()
        assert await asyncio.wait_for(child.wait(), 20) == 0


async def test_F2_streams_past_the_grace_end_draining_and_are_settled() -> None:
    gate = asyncio.Semaphore(200)
    listener = Listener(announce_seconds=0.0, grace_seconds=0.0)
    async with fake_engine(["x"] * 10_000, gate=gate) as engine, edge(engine, listener=listener) as at:
        calls = [at.generation.StreamChat(chat(), metadata=metadata(), timeout=60) for _ in range(20)]
        seen, all_seen = 0, asyncio.Event()

        async def read(call: Any) -> None:
            nonlocal seen
            async for _ in call:
                seen += 1
                if seen == 20 + 200:
                    all_seen.set()

        running = [asyncio.ensure_future(read(call)) for call in calls]
        # All that is on its way has come: a stream cut in a send could only see the core's own UNAVAILABLE.
        await asyncio.wait_for(all_seen.wait(), 20)
        await at.gate.serving.drain()
        errors = await asyncio.gather(*running, return_exceptions=True)
        assert {reason(error) for error in errors if isinstance(error, BaseException)} == {"DRAINING"}
        trailers = [dict(error.trailing_metadata() or ()) for error in errors if isinstance(error, grpc.aio.AioRpcError)]
        assert all(each["grpc-retry-pushback-ms"] == "-1" and int(each["last_seq"]) >= 1 for each in trailers)
        ends = await settled(at, 20)
        assert {s.outcome for s in ends} <= {Outcome.DONE, Outcome.CANCELLED}, "billed up to the cut"
        assert sum(s.output_tokens for s in ends) == engine.output_tokens
        assert not engine.running


async def test_A4_a_caller_that_does_not_read_is_ended_and_the_engine_freed() -> None:
    # A few MiB of text, so that no buffer on the way holds it all; the engine is told before the caller is.
    async with fake_engine(["x" * 8_192] * 4_096) as engine, edge(engine, write_stall_seconds=0.3) as at:
        call = at.generation.StreamChat(chat(), metadata=metadata(), timeout=60)
        await call.read()
        await engine.until(lambda e: not e.running, timeout_s=20)
        assert engine.totals["aborts"] == 1
        (slow,) = await settled(at, 1)
        assert slow.outcome is Outcome.CANCELLED and slow.output_tokens == engine.output_tokens < 4_096
        with pytest.raises(grpc.aio.AioRpcError) as error:
            while True:
                await call.read()
        assert reason(error.value) == "SLOW_CONSUMER"
        assert int(dict(error.value.trailing_metadata() or ())["last_seq"]) > 1


async def test_A4_a_stalled_reader_does_not_slow_its_neighbours() -> None:
    async with fake_engine(["x" * 4_096] * 1_024) as engine, edge(engine) as at:
        stalled = [at.generation.StreamChat(chat(), metadata=metadata(), timeout=60) for _ in range(10)]
        await asyncio.gather(*(call.read() for call in stalled))
        async with grpc.aio.insecure_channel(at.gate.address, options=[*ENGINE.items()]) as other:
            stub = generation_pb2_grpc.GenerationServiceStub(other)
            assert len(await events_of(stub.StreamChat(chat(), metadata=metadata(), timeout=20))) == 1_027
        for call in stalled:
            call.cancel()
        await settled(at, 11)
        assert not engine.running


async def test_A5_hundreds_hang_up_and_the_ledger_is_the_engines_count() -> None:
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(fake_engine(["x"] * 500, token_s=0.002)) for _ in range(3)]
        at = await stack.enter_async_context(edge(*engines))
        tasks = len(asyncio.all_tasks())
        places = asyncio.Semaphore(50)

        async def leave(number: int) -> None:
            async with places:
                call = at.generation.StreamChat(chat(f"request {number}"), metadata=metadata(), timeout=30)
                if number % 10:  # one in ten leaves before anything has come
                    async for event in call:
                        if event.sequence > number % 5:
                            break
                call.cancel()

        await asyncio.gather(*(leave(number) for number in range(300)))
        for engine in engines:
            await engine.until(lambda e: not e.running)
        await at.gate.relay.settled()
        async with asyncio.timeout(10):
            while at.gate.serving.inflight.count:  # the door has no event for it
                await asyncio.sleep(0.01)
        ends = [settlement for _, settlement in at.ledger.settled.values()]
        assert not at.ledger.open and len(ends) >= 270
        assert Counter(s.outcome for s in ends) == {Outcome.CANCELLED: len(ends)}
        assert sum(s.output_tokens for s in ends) == sum(engine.output_tokens for engine in engines)
        assert sum(s.input_tokens for s in ends) == sum(engine.totals["input_tokens"] for engine in engines)
        assert not any(link.replica.in_flight or link.streams for link in at.replicas.links)
        assert len(asyncio.all_tasks()) <= tasks + 5, "a call left a task behind"


async def test_F15_the_books_failing_mid_stream_do_not_disturb_it() -> None:
    gate = asyncio.Semaphore(1)
    async with fake_engine(["x"] * 3, gate=gate) as engine, edge(engine) as at:
        call = at.generation.StreamChat(chat(), metadata=metadata(), timeout=20)
        await call.initial_metadata()
        at.ledger.failing = StoreUnavailable()
        for _ in range(3):
            gate.release()
        assert len(await events_of(call)) == 6
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await events_of(at.generation.StreamChat(chat(), metadata=metadata(), timeout=20))
        assert reason(error.value) == "STORE_UNAVAILABLE"


async def test_health_under_saturation() -> None:
    gate = asyncio.Semaphore(0)
    async with fake_engine(["x"], gate=gate) as engine, edge(engine, streams_per_replica=1) as at:
        calls = [asyncio.ensure_future(events_of(at.generation.StreamChat(chat(), metadata=metadata(), timeout=30))) for _ in range(80)]
        queue = at.replicas.pool(engine.digest).admission(True)
        async with asyncio.timeout(10):
            while queue.queued < 79:  # the queue has no event
                await asyncio.sleep(0.01)
        stub = health_pb2_grpc.HealthStub(at.channel)
        reply = await stub.Check(health_pb2.HealthCheckRequest(service="argosy.v1.GenerationService"), timeout=5)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        for _ in calls:
            gate.release()
        assert {len(events) for events in await asyncio.gather(*calls)} == {4}
