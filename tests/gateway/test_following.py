"""Replicas that come and go by the cluster's word, over real channels to fake engines."""

import asyncio
from dataclasses import replace

import grpc
import pytest

from services.chassis.errors import NotStarted, ResourceNotFound
from services.gateway.endpoints import Endpoint, View
from tests.fakes.edge import Edge, chat, edge, events_of, metadata, text_of
from tests.fakes.engine import FakeEngine, fake_engine
from tests.faults.test_replicas import reason, settled


def seen(*engines: FakeEngine, models: frozenset[str] = frozenset({"models/fake"}), **changed: object) -> View:
    """The view of a cluster with these replicas, all of them `changed`."""
    each = (replace(Endpoint(f"uid-{engine.address}", engine.address, model=engine.model), **changed) for engine in engines)  # type: ignore[arg-type]
    return View({endpoint.uid: endpoint for endpoint in each}, models)


async def said(at: Edge) -> str:
    return text_of(await events_of(at.generation.StreamChat(chat(), metadata=metadata(), timeout=10)))


async def refused(at: Edge, model: str = "models/fake") -> str:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await at.generation.Chat(chat(model=model), metadata=metadata(), timeout=10)
    return reason(error.value) or error.value.code().name


async def test_a_replica_that_appears_is_used_and_one_that_disappears_is_closed() -> None:
    async with fake_engine(["one"]) as one, fake_engine(["two"]) as two, edge(reachable=0) as at:
        await at.replicas.follow(seen(one))
        await at.replicas.until(1)
        assert await said(at) == "one"
        await at.replicas.follow(seen(one, two))
        await at.replicas.until(2)
        await at.replicas.follow(seen(two))
        assert [link.address for link in at.replicas.links] == [two.address]
        assert {await said(at) for _ in range(4)} == {"two"}
        await one.until(lambda e: e.watching == 0)


async def test_terminating_takes_nothing_new_and_its_stream_ends_whole() -> None:
    async with fake_engine(["a"] * 40, token_s=0.01) as one, fake_engine(["b"]) as two, edge(reachable=0) as at:
        await at.replicas.follow(seen(one))
        await at.replicas.until(1)
        call = at.generation.StreamChat(chat(), metadata=metadata(), timeout=20)
        await call.initial_metadata()
        both = {**seen(one, ready=False, terminating=True).endpoints, **seen(two).endpoints}
        await at.replicas.follow(View(both, frozenset({"models/fake"})))
        await at.replicas.until(1)
        assert {await said(at) for _ in range(3)} == {"b"}
        await at.replicas.follow(seen(two))  # its pod is listed no more, and still writes
        assert text_of(await events_of(call)) == "a" * 40
        await one.until(lambda e: e.watching == 0)
        await settled(at, 4)


@pytest.mark.parametrize("word", [{"ready": False}, {"healthy": False}])
async def test_a_replica_that_may_have_no_new_work_stays_connected(word: dict[str, bool]) -> None:
    async with fake_engine(["one"]) as one, edge(reachable=0) as at:
        await at.replicas.follow(seen(one))
        await at.replicas.until(1)
        (link,) = at.replicas.links
        await at.replicas.follow(seen(one, **word))
        assert not link.replica.reachable and await refused(at) == "NOT_STARTED"
        await at.replicas.follow(seen(one))
        assert at.replicas.links == [link] and await said(at) == "one"


async def test_an_address_with_another_pod_behind_it_is_another_replica() -> None:
    async with fake_engine() as one, edge(reachable=0) as at:
        await at.replicas.follow(seen(one))
        await at.replicas.until(1)
        (link,) = at.replicas.links
        await at.replicas.follow(View({"new": Endpoint("new", one.address)}, frozenset({"models/fake"})))
        (other,) = at.replicas.links
        assert other is not link and other.replica.name != link.replica.name
        await at.replicas.until(1)


async def test_a_model_without_replicas_is_not_unknown_until_it_is_uninstalled() -> None:
    async with fake_engine() as one, fake_engine(model="models/other", digest="0b" * 32) as two, edge(reachable=0) as at:
        both, other = frozenset({"models/fake", "models/other"}), frozenset({"models/other"})
        assert await refused(at) == "NOT_STARTED", "nobody has told yet"
        await at.replicas.follow(seen(two, models=both))
        await at.replicas.until(1)
        assert await refused(at) == "NOT_STARTED", "installed, and never seen"
        assert await refused(at, "models/nobodys") == "RESOURCE_NOT_FOUND"
        with pytest.raises(ResourceNotFound):
            at.replicas.resolve("models/fake", ("models/other",))
        await at.replicas.follow(seen(one, two, models=both))
        await at.replicas.until(2)
        await at.replicas.follow(seen(two, models=both))
        assert at.replicas.resolve("models/fake", ()).digest == one.digest
        assert await refused(at) == "NOT_STARTED"
        await at.replicas.follow(seen(two, models=other))
        assert await refused(at) == "RESOURCE_NOT_FOUND"


async def test_what_waits_is_refused_when_the_last_replica_is_listed_no_more() -> None:
    async with fake_engine(["x"] * 1_000, token_s=0.01) as one, edge(reachable=0, streams_per_replica=1) as at:
        await at.replicas.follow(seen(one))
        await at.replicas.until(1)
        call = at.generation.StreamChat(chat(), metadata=metadata(), timeout=20)
        await call.initial_metadata()
        waiting = asyncio.ensure_future(events_of(at.generation.StreamChat(chat(), metadata=metadata(), timeout=20)))
        async with asyncio.timeout(5):
            while not at.replicas.pool(one.digest).admission(True).queued:
                await asyncio.sleep(0.005)
        await at.replicas.follow(seen())
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await waiting
        assert reason(error.value) == "NOT_STARTED"
        call.cancel()


async def test_a_gateway_is_ready_once_it_knows_that_nobody_is_to_be_reached() -> None:
    async with fake_engine() as one, edge(addresses=("127.0.0.1:1",), reachable=0) as at:
        assert not at.gate.serving.is_ready
        await at.replicas.follow(seen(one, ready=False))
        assert at.gate.serving.is_ready
        await one.kill()
        await at.replicas.follow(seen(one))
        assert not at.gate.serving.is_ready, "there is one, and this gateway cannot reach it"


async def test_a_replica_elsewhere_is_passed_over_without_tls_and_the_others_are_used(caplog: pytest.LogCaptureFixture) -> None:
    async with fake_engine(["one"]) as one, edge(reachable=0) as at:
        away = View({**seen(one).endpoints, "x": Endpoint("x", "10.0.0.1:8500", "chat.models.svc")}, frozenset({"models/fake"}))
        await at.replicas.follow(away)
        await at.replicas.until(1)
        assert await said(at) == "one" and "Refusing to connect to 10.0.0.1:8500 in plaintext" in caplog.text


async def test_before_any_view_a_name_is_not_unknown() -> None:
    async with edge(reachable=0) as at:
        with pytest.raises(NotStarted):
            at.replicas.resolve("models/fake", ())
