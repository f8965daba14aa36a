"""Models without replicas: who is held, who is told when to come again, and what an autoscaler sees of it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from services.chassis.errors import NotStarted
from services.gateway.demand import Demand
from services.gateway.endpoints import View
from tests.fakes.edge import Edge, chat, edge, events_of, metadata, text_of
from tests.fakes.engine import fake_engine
from tests.faults.test_replicas import reason, settled
from tests.gateway.test_following import seen

MODEL = "models/fake"
ASLEEP = View({}, frozenset({MODEL}), {MODEL: 5.0})


def ask(at: Edge, timeout_s: float = 30.0) -> "asyncio.Task[str]":
    async def said() -> str:
        return text_of(await events_of(at.generation.StreamChat(chat(), metadata=metadata(), timeout=timeout_s)))

    return asyncio.ensure_future(said())


async def until(condition: Any, timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


@asynccontextmanager
async def asleep(says: str = "awake", **placing: Any) -> AsyncIterator[tuple[Edge, Any]]:
    """A gateway whose one model has been seen, and has no replica now; and the engine that it would have."""
    async with fake_engine([says]) as engine, edge(reachable=0, **placing) as at:
        await at.replicas.follow(seen(engine))
        await at.replicas.until(1)
        await at.replicas.follow(ASLEEP)
        yield at, engine


async def refusal(call: "asyncio.Task[str]") -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return error.value


def pushback_s(error: grpc.aio.AioRpcError) -> float:
    return float(dict(error.trailing_metadata() or ())["grpc-retry-pushback-ms"]) / 1_000


async def test_R7_calls_are_held_while_their_model_wakes_and_are_answered() -> None:
    async with asleep() as (at, engine):
        calls = [ask(at) for _ in range(5)]
        pool = at.replicas.pool(engine.digest)
        await until(lambda: pool.held == 5)
        assert at.replicas.demand() == {MODEL: Demand(queued=5)}
        await at.replicas.follow(seen(engine, ready=False))
        assert pool.held == 5, "its pod is there, and loads"
        await at.replicas.follow(seen(engine))
        assert await asyncio.gather(*calls) == ["awake"] * 5
        assert pool.held == 0 and at.replicas.demand()[MODEL].queued == 0
        assert at.replicas.waking(MODEL).seen and at.replicas.waking(MODEL).load_s < 5.0
        await settled(at, 5)


async def test_R7_a_call_whose_model_wakes_too_late_is_told_when_to_come_again_and_wakes_it_all_the_same() -> None:
    async with asleep() as (at, _):
        error = await refusal(ask(at, timeout_s=3.0))
        assert (error.code(), reason(error)) == (grpc.StatusCode.UNAVAILABLE, "NOT_STARTED")
        assert 4.0 < pushback_s(error) <= 5.0
        assert at.replicas.demand() == {MODEL: Demand(queued=1)}
        await settled(at, 0)


async def test_R7_no_more_calls_are_held_than_may_queue() -> None:
    async with asleep(queue_calls=2) as (at, engine):
        held = [ask(at) for _ in range(2)]
        await until(lambda: at.replicas.pool(engine.digest).held == 2)
        assert reason(await refusal(ask(at))) == "NOT_STARTED"
        await at.replicas.follow(seen(engine))
        assert await asyncio.gather(*held) == ["awake"] * 2


async def test_a_held_caller_who_hangs_up_is_held_no_more() -> None:
    async with asleep() as (at, engine):
        call = at.generation.StreamChat(chat(), metadata=metadata(), timeout=30)
        reading = asyncio.ensure_future(events_of(call))
        pool = at.replicas.pool(engine.digest)
        await until(lambda: pool.held == 1)
        call.cancel()
        await asyncio.wait((reading,))
        await until(lambda: pool.held == 0)
        await settled(at, 1)


async def test_a_model_that_never_wakes_ends_its_calls_with_their_deadline() -> None:
    async with asleep() as (at, engine):
        at.replicas.waking(MODEL).load_s = 0.1
        error = await refusal(ask(at, timeout_s=1.0))
        assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
        await until(lambda: at.replicas.pool(engine.digest).held == 0)


async def test_a_model_that_wakes_with_other_weights_lets_its_calls_begin_anew() -> None:
    async with asleep() as (at, engine), fake_engine(["new"], digest="0b" * 32) as other:
        call = ask(at)
        await until(lambda: at.replicas.pool(engine.digest).held == 1)
        await at.replicas.follow(seen(other))
        assert reason(await refusal(call)) == "NOT_STARTED"
        assert await ask(at) == "new"


async def test_a_model_never_seen_by_this_gateway_is_woken_by_whoever_asks() -> None:
    async with fake_engine() as engine, edge(reachable=0) as at:
        await at.replicas.follow(ASLEEP)
        other = View(dict(seen(engine).endpoints), frozenset({"models/other", "models/fake"}), {"models/other": 7.0})
        await at.replicas.follow(other)
        await at.replicas.until(1)
        with pytest.raises(NotStarted) as refused:
            at.replicas.resolve("models/other", ())
        assert 6.0 < (refused.value.retry_after_s or 0) <= 7.0
        assert at.replicas.demand()["models/other"] == Demand(queued=1)


async def test_F12_a_fleet_that_cannot_be_reached_is_not_asleep() -> None:
    async with fake_engine() as engine, edge(reachable=0) as at:
        await at.replicas.follow(seen(engine))
        await at.replicas.until(1)
        await engine.kill()
        await at.replicas.until(0)
        assert reason(await refusal(ask(at))) == "NOT_STARTED" and not at.replicas.pool(engine.digest).held


async def test_the_only_replica_is_replaced_and_what_waited_goes_to_its_successor() -> None:
    """A rollout without surge: the old one ends its stream, the new one gets the queue."""
    async with fake_engine(["old"] * 100, token_s=0.01) as old, fake_engine(["new"]) as new, edge(reachable=0, streams_per_replica=1) as at:
        await at.replicas.follow(seen(old))
        await at.replicas.until(1)
        at.replicas.waking(MODEL).load_s = 2.0
        running = ask(at)
        await old.until(lambda e: len(e.running) == 1)
        waiting = ask(at)
        await until(lambda: at.replicas.pool(old.digest).admission(True).queued == 1)
        await at.replicas.follow(seen(old, ready=False, terminating=True))
        await until(lambda: at.replicas.pool(old.digest).held == 1)
        await at.replicas.follow(View({**seen(old, ready=False, terminating=True).endpoints, **seen(new).endpoints}, frozenset({MODEL})))
        assert await waiting == "new" and await running == "old" * 100
