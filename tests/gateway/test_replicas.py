"""Replicas over real channels to fake engines."""

import asyncio
import time
from contextlib import AsyncExitStack

import grpc
import pytest
from grpc_health.v1 import health_pb2

from argosy_internal.engine.v1 import engine_pb2
from services.chassis.errors import NotStarted, Shed
from services.chassis.identity import CALLER_KEY
from services.gateway.admission import Ask, Rank
from services.gateway.replicas import GATEWAY, label, served_from
from tests.fakes.edge import VERIFIER, Edge, chat, edge, events_of, metadata, text_of
from tests.fakes.engine import FakeEngine, fake_engine


def ask(project: str = "p", seconds: float = 5.0, **fields: object) -> Ask:
    made = {"cost": 20.0, "prompt_tokens": 10} | fields
    return Ask(project, Rank.INTERACTIVE, latest_start=asyncio.get_running_loop().time() + seconds, **made)  # type: ignore[arg-type]


def served(at: Edge) -> object:
    return at.replicas.resolve("models/fake", ())


async def test_a_replica_describes_itself() -> None:
    async with fake_engine(verifier=VERIFIER) as engine, edge(engine) as at:
        model = at.replicas.resolve("models/fake", ())
        assert (model.digest, model.context_tokens) == (engine.digest, 4_096)
        assert "GENERATE" in model.capabilities and at.replicas.ready(model) == 1


async def test_the_caller_is_signed_for_the_replicas() -> None:
    async with fake_engine() as engine, edge(engine) as at:
        ((key, blob),) = at.replicas.metadata(GATEWAY)
        assert key == CALLER_KEY and isinstance(blob, bytes)
        assert VERIFIER.verify(blob, time.time()).key_id == "gateway"


async def test_labels_tell_replicas_apart_and_nothing_else() -> None:
    assert label("10.0.0.1:50051") != label("10.0.0.2:50051")
    assert "10.0" not in label("10.0.0.1:50051")


async def test_before_any_replica_was_seen_a_name_is_not_unknown() -> None:
    async with edge(addresses=("127.0.0.1:1",), reachable=0) as at:
        with pytest.raises(NotStarted):
            at.replicas.resolve("models/fake", ())


async def test_an_unhealthy_replica_is_left_at_once_and_returns() -> None:
    async with fake_engine(["one"]) as one, fake_engine(["two"]) as two, edge(one, two) as at:
        await one.health.set("ready", health_pb2.HealthCheckResponse.NOT_SERVING)
        await at.replicas.until(1)
        texts = {text_of(await events_of(at.generation.StreamChat(chat(), metadata=metadata(), timeout=5))) for _ in range(6)}
        assert texts == {"two"}
        await one.health.set("ready", health_pb2.HealthCheckResponse.SERVING)
        await at.replicas.until(2)


async def test_a_draining_replica_gets_nothing_new() -> None:
    async with fake_engine(["one"]) as one, fake_engine(["two"]) as two, edge(one, two) as at:
        one.load.draining = True
        one.changed()
        await loads(at, one, lambda load: load.draining)
        texts = {text_of(await events_of(at.generation.StreamChat(chat(), metadata=metadata(), timeout=5))) for _ in range(6)}
        assert texts == {"two"}


async def loads(at: Edge, engine: FakeEngine, wanted: object) -> None:
    link = next(link for link in at.replicas.links if link.address == engine.address)
    async with asyncio.timeout(10):
        while not wanted(link.replica.load):  # type: ignore[operator]
            await at.replicas.judged()


async def test_three_replicas_share_the_work() -> None:
    async with AsyncExitStack() as stack:
        engines = [await stack.enter_async_context(fake_engine(["x"] * 4, token_s=0.002)) for _ in range(3)]
        at = await stack.enter_async_context(edge(*engines))
        await asyncio.gather(*(events_of(at.generation.StreamChat(chat(), metadata=metadata(), timeout=20)) for _ in range(60)))
        assert all(engine.totals["calls"] >= 12 for engine in engines), [engine.totals["calls"] for engine in engines]


async def test_a_conversation_stays_where_its_prefix_is() -> None:
    async with fake_engine() as one, fake_engine() as two, edge(one, two) as at:
        prompt = "You are a patient teacher of old languages. " * 10
        for _ in range(8):
            await events_of(at.generation.StreamChat(chat(prompt), metadata=metadata(), timeout=5))
        assert sorted((one.totals["calls"], two.totals["calls"])) == [0, 8]


async def test_each_replica_has_its_own_channel() -> None:
    async with fake_engine() as engine, edge(engine, addresses=(engine.address,), reachable=2) as at:
        one, two = at.replicas.links
        assert one.channel is not two.channel


async def test_two_models_are_two_pools() -> None:
    async with fake_engine(["one"]) as one, fake_engine(["two"], model="models/other", digest="0b" * 32) as two, edge(one, two) as at:
        for model, text in (("models/fake", "one"), ("models/other", "two")):
            events = await events_of(at.generation.StreamChat(chat(model=model), metadata=metadata(), timeout=5))
            assert text_of(events) == text and events[0].started.model.version == model


async def test_streams_and_unary_calls_have_budgets_of_their_own() -> None:
    async with fake_engine() as engine, edge(engine, streams_per_replica=1, unary_per_replica=1) as at:
        model = served(at)
        stream = await at.replicas.enter(model, ask(), stream=True)  # type: ignore[arg-type]
        unary = await at.replicas.enter(model, ask(), stream=False)  # type: ignore[arg-type]
        waiting = asyncio.ensure_future(at.replicas.enter(model, ask(), stream=True))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        unary.leave(failed=False)
        await asyncio.sleep(0)
        assert not waiting.done()
        stream.leave(failed=False)
        stream.leave(failed=False)
        (await waiting).leave(failed=None)
        link = at.replicas.links[0]
        assert (link.streams, link.unary, len(link.replica.in_flight)) == (0, 0, 0)


async def test_a_wait_ends_at_its_latest_start() -> None:
    async with fake_engine() as engine, edge(engine, streams_per_replica=1) as at:
        model = served(at)
        first = await at.replicas.enter(model, ask(), stream=True)  # type: ignore[arg-type]
        with pytest.raises(Shed):
            await at.replicas.enter(model, ask(seconds=0.05), stream=True)  # type: ignore[arg-type]
        assert at.replicas.pool(engine.digest).admission(True).queued == 0
        first.leave(failed=None)


async def test_F31_what_would_be_answered_too_late_is_shed_unless_the_replica_is_idle() -> None:
    load = engine_pb2.EngineLoad(prefill_tokens_per_second=10_000, decode_tokens_per_second=160, batch=8)
    load.step_time.FromMilliseconds(50)
    async with fake_engine(load=load) as engine, edge(engine) as at:
        await loads(at, engine, lambda load: load.step_s > 0)  # type: ignore[attr-defined]
        model, now = served(at), asyncio.get_running_loop().time()
        hurried = ask(cost=50.0, latest_end=now + 1.0)  # 40 tokens of 50 ms
        alone = await at.replicas.enter(model, hurried, stream=True)  # type: ignore[arg-type]
        with pytest.raises(Shed):
            await at.replicas.enter(model, hurried, stream=True)  # type: ignore[arg-type]
        patient = await at.replicas.enter(model, ask(cost=50.0, latest_end=now + 60.0), stream=True)  # type: ignore[arg-type]
        for place in (alone, patient):
            place.leave(failed=False)
        (await at.replicas.enter(model, hurried, stream=True)).leave(failed=None)  # type: ignore[arg-type]


async def test_what_waits_is_refused_when_the_last_replica_goes() -> None:
    async with fake_engine() as engine, edge(engine, streams_per_replica=1) as at:
        model = served(at)
        await at.replicas.enter(model, ask(), stream=True)  # type: ignore[arg-type]
        waiting = asyncio.ensure_future(at.replicas.enter(model, ask(seconds=60), stream=True))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        await engine.kill()
        with pytest.raises(NotStarted):
            await asyncio.wait_for(waiting, 10)


async def test_a_watch_that_reaches_its_longest_life_is_renewed_unnoticed() -> None:
    async with fake_engine() as engine, edge(engine) as at:
        engine.faults.end_watch = grpc.StatusCode.DEADLINE_EXCEEDED
        engine.changed()
        await engine.until(lambda e: e.totals["watches"] >= 3)
        engine.faults.end_watch = None
        assert at.replicas.links[0].replica.reachable


async def test_a_newer_replicas_unknown_capability_is_skipped() -> None:
    async with fake_engine() as engine:
        info = await engine.GetEngineInfo(None, None)  # type: ignore[arg-type]
        info.capabilities.append(4_242)  # type: ignore[arg-type]
        assert served_from(info).capabilities == served_from(await engine.GetEngineInfo(None, None)).capabilities  # type: ignore[arg-type]
