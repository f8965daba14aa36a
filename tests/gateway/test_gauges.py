"""What the gateway shows of its queues, replicas, books and refusals."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass

import grpc
import pytest
from grpc_health.v1 import health_pb2
from prometheus_client.parser import text_string_to_metric_families

from services.chassis.errors import QuotaExceeded
from services.chassis.telemetry import Telemetry
from services.gateway.gauges import sample
from services.gateway.routing import CONSECUTIVE_FAILURES
from tests.fakes.edge import chat, edge, events_of, metadata
from tests.fakes.engine import fake_engine
from tests.fakes.ledger import MemoryLedger
from tests.gateway.test_replicas import ask


@dataclass
class Spool:
    """Books of which nobody settled anything."""

    away: bool = True
    spooled_bytes: int = 700


def shown(telemetry: Telemetry) -> dict[str, float]:
    """`name{label values}` → value."""
    return {
        f"{each.name}{{{','.join(each.labels.values())}}}": each.value
        for family in text_string_to_metric_families(telemetry.exposition().decode())
        for each in family.samples
    }


@pytest.fixture
async def telemetry() -> AsyncIterator[Telemetry]:
    found = Telemetry.start("gateway", {})
    yield found
    await found.close()


async def test_a_call_that_waits_is_seen_with_its_class_and_its_wait(telemetry: Telemetry) -> None:
    gate = asyncio.Semaphore(0)
    async with fake_engine(["a"], gate=gate) as engine, edge(engine, telemetry=telemetry, streams_per_replica=1) as at:
        calls = [at.generation.StreamChat(chat(), metadata=metadata(), timeout=20) for _ in range(2)]
        running = [asyncio.ensure_future(events_of(call)) for call in calls]
        (link,) = at.replicas.links
        async with asyncio.timeout(10):
            while not any(pool.admission(True).queued for pool in at.replicas.pools):
                await asyncio.sleep(0)
        sample(at.replicas, None, telemetry)
        seen = shown(telemetry)
        for _ in range(2):
            gate.release()
        await asyncio.gather(*running)
        sample(at.replicas, Spool(), telemetry)
        after = shown(telemetry)
    assert (seen["argosy_queue_length{INTERACTIVE}"], seen["argosy_queue_length{BATCH}"]) == (1, 0)
    assert seen["argosy_queue_tokens{INTERACTIVE}"] > 0 and seen["argosy_queue_predicted_seconds{INTERACTIVE}"] >= 0
    assert seen[f"argosy_replica_inflight{{{link.replica.name}}}"] == 1 and seen["argosy_replica_barred{}"] == 0
    assert after["argosy_queue_length{INTERACTIVE}"] == after[f"argosy_replica_inflight{{{link.replica.name}}}"] == 0
    assert "argosy_ledger_away{}" not in seen
    assert (after["argosy_ledger_away{}"], after["argosy_ledger_spooled_bytes{}"]) == (1, 700)


async def test_a_replica_that_falls_ill_is_counted(telemetry: Telemetry) -> None:
    async with fake_engine() as engine, edge(engine, telemetry=telemetry) as at:
        await engine.health.set("ready", health_pb2.HealthCheckResponse.NOT_SERVING)
        await at.replicas.until(0)
        seen = shown(telemetry)
    assert seen["argosy_replica_ejected_total{UNHEALTHY}"] == 1 and seen["argosy_replica_ready{}"] == 0


async def test_a_replica_that_fails_is_counted_once_it_is_ejected(telemetry: Telemetry) -> None:
    async with fake_engine() as engine, edge(engine, telemetry=telemetry) as at:
        served = at.replicas.resolve("models/fake", ())
        for _ in range(CONSECUTIVE_FAILURES):
            place = await at.replicas.enter(served, ask(), stream=True)
            place.leave(failed=True)
        sample(at.replicas, None, telemetry)
        seen = shown(telemetry)
    assert seen["argosy_replica_ejected_total{FAILURES}"] == 1 and seen["argosy_replica_barred{}"] == 1


async def test_refusals_are_counted_by_reason(telemetry: Telemetry) -> None:
    async with fake_engine() as engine, edge(engine, telemetry=telemetry, ledger=MemoryLedger(failing=QuotaExceeded("day"))) as at:
        for who in ("acme", "acme", "nobody"):
            with pytest.raises(grpc.aio.AioRpcError):
                await at.generation.Chat(chat(), metadata=metadata(who), timeout=5)
        seen = shown(telemetry)
    assert seen["argosy_queue_refused_total{QUOTA_EXCEEDED}"] == 2 and seen["argosy_auth_refused_total{API_KEY_INVALID}"] == 1


async def test_a_call_cut_for_its_key_is_counted(telemetry: Telemetry) -> None:
    class Revoker:
        cut: Callable[[], None]

        @contextlib.contextmanager
        def watch(self, key_id: str, cut: Callable[[], None]) -> Iterator[None]:
            self.cut = cut
            yield

    gate, revocations = asyncio.Semaphore(1), Revoker()
    async with fake_engine(["a"] * 10, gate=gate) as engine, edge(engine, revocations=revocations, telemetry=telemetry) as at:
        with pytest.raises(grpc.aio.AioRpcError):
            async for event in at.generation.StreamChat(chat(), metadata=metadata(), timeout=20):
                if event.sequence == 2:
                    revocations.cut()
        seen = shown(telemetry)
    assert seen["argosy_auth_revoked_total{}"] == 1
