"""Faults between gateway and replicas: killed, frozen, slow, erring. Over real sockets, with the engines' own counts as the truth (I4)."""

import asyncio
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

import grpc
import pytest

from argosy.v1 import config_pb2
from services.chassis.errors import Internal
from services.chassis.status import error_info
from services.gateway.ledger import Outcome, Settlement
from services.gateway.routing import Standing
from tests.fakes.edge import Edge, chat, edge, events_of, metadata, text_of
from tests.fakes.engine import fake_engine
from tests.faults.proxy import Proxy, fault_proxy


async def settled(at: Edge, count: int, timeout_s: float = 20.0) -> list[Settlement]:
    """The settlements, once there are `count` and nothing is open."""
    async with asyncio.timeout(timeout_s):
        while len(at.ledger.settled) < count or at.ledger.open:
            at.ledger.changed.clear()
            await at.ledger.changed.wait()
    return [settlement for _, settlement in at.ledger.settled.values()]


async def failure(call: object) -> grpc.aio.AioRpcError:
    """The error of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call  # type: ignore[misc]
    return error.value


def reason(error: grpc.aio.AioRpcError) -> str:
    info = error_info(error)
    return info.reason if info is not None else ""


@asynccontextmanager
async def engine_process(*arguments: str) -> AsyncIterator[tuple[str, asyncio.subprocess.Process]]:
    """A fake engine in a process of its own, so that it can be killed and frozen."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.fakes.engine", *arguments, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert child.stdout is not None
    try:
        yield (await child.stdout.readline()).decode().strip(), child
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


async def test_F4_a_pod_killed_mid_stream_is_a_lost_stream_and_is_settled() -> None:
    async with engine_process("--tokens", "1000", "--token-s", "0.005") as (address, child), edge(addresses=(address,), reachable=1) as at:
        call = at.generation.StreamChat(chat("one two three"), metadata=metadata(), timeout=30)
        seen = 0

        async def read() -> None:
            nonlocal seen
            async for event in call:
                assert event.sequence == seen + 1
                seen += 1
                if seen == 10:
                    child.send_signal(signal.SIGKILL)

        error = await failure(read())
        assert (error.code(), reason(error)) == (grpc.StatusCode.UNAVAILABLE, "STREAM_LOST")
        trailers = dict(error.trailing_metadata() or ())
        assert trailers["last_seq"] == str(seen) and trailers["grpc-retry-pushback-ms"] == "-1"
        (lost,) = await settled(at, 1)
        assert lost.outcome is Outcome.LOST and lost.input_tokens == 3
        assert lost.output_tokens == seen - 1, "a token an event, all but Started"
        await at.replicas.until(0)
        assert reason(await failure(at.generation.Chat(chat(), metadata=metadata(), timeout=5))) == "NOT_STARTED"


async def test_F4_the_rest_of_the_fleet_goes_on() -> None:
    async with AsyncExitStack() as stack:
        address, child = await stack.enter_async_context(engine_process("--tokens", "200", "--token-s", "0.005"))
        engines = [await stack.enter_async_context(fake_engine(["x"] * 200, token_s=0.005)) for _ in range(2)]
        at = await stack.enter_async_context(edge(*engines, addresses=(address,), reachable=3))
        calls = [at.generation.StreamChat(chat(f"call {n}"), metadata=metadata(), timeout=30) for n in range(12)]
        running = [asyncio.ensure_future(events_of(call)) for call in calls]
        await asyncio.gather(*(call.initial_metadata() for call in calls))
        child.kill()
        outcomes = await asyncio.gather(*running, return_exceptions=True)
        lost = [error for error in outcomes if isinstance(error, grpc.aio.AioRpcError)]
        assert 0 < len(lost) < len(calls) and {reason(error) for error in lost} == {"STREAM_LOST"}
        assert all(events[-1].WhichOneof("event") == "completed" for events in outcomes if isinstance(events, list))
        assert Counter(s.outcome for s in await settled(at, 12)) == {Outcome.LOST: len(lost), Outcome.DONE: 12 - len(lost)}
        await at.replicas.until(2)
        assert len(await events_of(at.generation.StreamChat(chat(), metadata=metadata(), timeout=10))) == 203


async def test_F4_a_pod_that_returns_is_used_again() -> None:
    async with fake_engine(["a"]) as first, edge(first) as at:
        await first.kill()
        await at.replicas.until(0)
        async with fake_engine(["b"], address=first.address):
            await at.replicas.until(1)
            assert text_of(await events_of(at.generation.StreamChat(chat(), metadata=metadata(), timeout=10))) == "b"


@pytest.mark.timeout(60)
async def test_F5_a_frozen_pod_ends_its_streams_and_fails_over_what_had_not_begun() -> None:
    async with AsyncExitStack() as stack:
        address, child = await stack.enter_async_context(engine_process("--tokens", "100000", "--token-s", "0.002"))
        at = await stack.enter_async_context(edge(addresses=(address,), reachable=1, attempt_seconds=0.5))
        call = at.generation.StreamChat(chat("one"), metadata=metadata(), timeout=50)
        reading = asyncio.ensure_future(events_of(call))
        await call.initial_metadata()
        child.send_signal(signal.SIGSTOP)
        try:
            # Alone, a call that had not begun fails fast; with a neighbour it goes there.
            began = asyncio.get_running_loop().time()
            error = await failure(events_of(at.generation.StreamChat(chat(), metadata=metadata(), timeout=20)))
            assert reason(error) == "NOT_STARTED"
            assert asyncio.get_running_loop().time() - began < 10
            lost = await failure(reading)
            assert reason(lost) == "STREAM_LOST"
            await at.replicas.until(0, timeout_s=20)
        finally:
            child.send_signal(signal.SIGCONT)
        first, second = sorted(await settled(at, 2), key=lambda s: s.output_tokens)
        assert (first.outcome, second.outcome) == (Outcome.SHED, Outcome.LOST)
        await at.replicas.until(1)


async def test_F5_unstarted_work_fails_over_to_a_neighbour() -> None:
    async with fake_engine(["bad"]) as hung, fake_engine(["good"]) as well, edge(hung, well, attempt_seconds=0.3) as at:
        hung.faults.hang_before = True
        # Prompts that differ: each is drawn to a replica of its own.
        calls = [at.generation.StreamChat(chat(f"{n} ships"), metadata=metadata(), timeout=20) for n in range(12)]
        assert [text_of(await events_of(call)) for call in calls] == ["good"] * 12
        assert hung.totals["hung"] > 0
        await settled(at, 12)


async def test_F6_a_slow_pod_is_starved() -> None:
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(fake_engine(["x"] * 8, token_s=0.002)) for _ in range(3)]
        engines[2].faults.slow = 10.0
        engines[2].changed()
        at = await stack.enter_async_context(edge(*engines))
        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(_ask(at, 15))
        calls = [engine.totals["calls"] for engine in engines]
        assert sum(calls) == 120
        assert calls[2] <= 0.2 * 120 / 3, calls
        assert min(calls[:2]) > 0.3 * 120, calls


async def _ask(at: Edge, times: int) -> None:
    config = config_pb2.GenerationConfig(stopping=config_pb2.Stopping(max_output_tokens=8))
    for _ in range(times):
        await events_of(at.generation.StreamChat(chat(config=config), metadata=metadata(), timeout=30))


async def test_F7_an_erring_pod_is_ejected_and_comes_back() -> None:
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(fake_engine(["x"])) for _ in range(3)]
        at = await stack.enter_async_context(edge(*engines))
        bad = engines[0]
        bad.faults.refuse = Internal()
        link = next(link for link in at.replicas.links if link.address == bad.address)
        failed = 0
        for _ in range(60):
            with_error = await asyncio.gather(
                events_of(at.generation.StreamChat(chat(), metadata=metadata(), timeout=10)), return_exceptions=True
            )
            failed += isinstance(with_error[0], BaseException)
            if link.replica.standing is Standing.EJECTED:
                break
        assert link.replica.standing is Standing.EJECTED and failed == 5
        refused = bad.totals["refused"]
        for _ in range(20):
            await events_of(at.generation.StreamChat(chat(), metadata=metadata(), timeout=10))
        assert bad.totals["refused"] == refused, "no traffic while ejected"
        bad.faults.refuse = None
        link.replica._until = 0.0  # its five seconds are over
        await events_of(at.generation.StreamChat(chat(), metadata=metadata(), timeout=10))
        assert bad.totals["calls"] == 1 and link.replica.standing is Standing.RAMPING


def edge_of(proxy: Proxy) -> AbstractAsyncContextManager[Edge]:
    """A gateway that sees its one replica through `proxy`."""
    return edge(addresses=(proxy.address,), reachable=1)


async def test_F12_a_partition_between_gateway_and_pod_is_noticed_and_heals() -> None:
    async with fake_engine(["x"] * 3) as engine, fault_proxy(engine.address) as proxy, edge_of(proxy) as at:
        proxy.refusing = True
        proxy.reset()
        await at.replicas.until(0)
        began = asyncio.get_running_loop().time()
        assert reason(await failure(at.generation.Chat(chat(), metadata=metadata(), timeout=10))) == "NOT_STARTED"
        assert asyncio.get_running_loop().time() - began < 5
        proxy.heal()
        await at.replicas.until(1)
        assert text_of(await events_of(at.generation.StreamChat(chat(), metadata=metadata(), timeout=10))) == "xxx"


async def test_F14_a_reset_at_any_byte_has_a_clean_code() -> None:
    async with fake_engine(["x"] * 5) as engine, fault_proxy(engine.address) as proxy, edge_of(proxy) as at:
        codes: Counter[str] = Counter()
        for offset in range(0, 2_000, 100):
            await at.replicas.until(1)
            proxy.down.reset_at = offset
            try:
                await events_of(at.generation.StreamChat(chat(), metadata=metadata(), timeout=10))
                codes["OK"] += 1
            except grpc.aio.AioRpcError as error:
                codes[reason(error)] += 1
            proxy.down.reset_at = None
        assert set(codes) <= {"OK", "NOT_STARTED", "STREAM_LOST"}, codes


async def test_I4_the_ledger_is_the_engines_count_over_mixed_endings() -> None:
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(fake_engine(["x"] * 20, token_s=0.001)) for _ in range(3)]
        at = await stack.enter_async_context(edge(*engines))

        places = asyncio.Semaphore(60)  # a connection carries a hundred calls

        async def one(number: int) -> None:
            async with places:
                call = at.generation.StreamChat(chat(f"request {number}"), metadata=metadata(), timeout=20)
                await (_first(call, number % 7) if number % 3 == 0 else events_of(call))

        await asyncio.gather(*(one(number) for number in range(150)))
        ends = await settled(at, 150)
        assert sum(s.output_tokens for s in ends) == sum(engine.output_tokens for engine in engines)
        assert sum(s.input_tokens for s in ends) == sum(engine.totals["input_tokens"] for engine in engines)
        assert not any(engine.running for engine in engines)
        assert all(not link.replica.in_flight and not link.streams for link in at.replicas.links)


async def _first(call: object, events: int) -> None:
    """Read so many events, then hang up."""
    async for event in call:  # type: ignore[attr-defined]
        if event.sequence > events:
            break
    call.cancel()  # type: ignore[attr-defined]
