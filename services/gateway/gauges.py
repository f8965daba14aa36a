"""What stands and waits in the gateway, as gauges: looked at once a second, so that no call pays for it."""

import asyncio
import math
from typing import Protocol

from services.chassis.telemetry import Telemetry
from services.gateway.access import MAX_STREAM_SECONDS
from services.gateway.admission import Rank
from services.gateway.replicas import Replicas
from services.gateway.routing import Standing

SAMPLE_S = 1.0


class Spooling(Protocol):
    """Books that go on while their store is away; see sql_ledger.SqlLedger."""

    away: bool

    @property
    def spooled_bytes(self) -> int:
        """Entries that wait for the store."""
        ...


async def measure(replicas: Replicas, books: Spooling | None, telemetry: Telemetry) -> None:
    """Sample until cancelled."""
    while True:
        sample(replicas, books, telemetry)
        await asyncio.sleep(SAMPLE_S)


def sample(replicas: Replicas, books: Spooling | None, telemetry: Telemetry) -> None:
    """One look. A queue's gauges are sums over the models, its predicted wait that of the worst.

    Without a replica it would be infinite, which the meter refuses: it is then the longest that any call may wait.
    """
    record = telemetry.record
    reachable = [link.replica for link in replicas.links if link.replica.reachable]
    record("argosy.replica.barred", sum(replica.standing is Standing.EJECTED for replica in reachable))
    for link in replicas.links:
        record("argosy.replica.inflight", link.streams + link.unary, {"argosy.replica": link.replica.name})
    queues = [pool.admission(stream) for pool in replicas.pools for stream in (True, False)]
    for rank in Rank:
        kind = {"argosy.work_class": rank.name}
        waiting = [queue.waiting(rank) for queue in queues]
        record("argosy.queue.length", sum(calls for calls, _ in waiting), kind)
        record("argosy.queue.tokens", sum(tokens for _, tokens in waiting), kind)
        predicted_s = max((queue.would_wait_s(rank) for queue in queues), default=math.inf)
        record("argosy.queue.predicted", min(predicted_s, MAX_STREAM_SECONDS), kind)
    if books is not None:
        record("argosy.ledger.away", books.away)
        record("argosy.ledger.spooled", books.spooled_bytes)
