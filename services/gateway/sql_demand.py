"""The demand of all gateways in PostgreSQL: each writes its own and reads the others' in one round trip."""

from collections.abc import Mapping
from uuid import uuid4

from services.gateway.demand import FRESH_S, Demand
from services.gateway.store import Store

# A gateway's rows that it no longer names go, and those that a dead one left. All times are the database's.
_EXCHANGE = f"""
    WITH gone AS (
        DELETE FROM model_demands
        WHERE (gateway_uid = $1::uuid AND model <> ALL ($2::text[])) OR beat_time < clock_timestamp() - interval '1 hour'
    ), put AS (
        INSERT INTO model_demands (gateway_uid, model, queued, running, kv_percent)
        SELECT $1::uuid, * FROM unnest($2::text[], $3::bigint[], $4::bigint[], $5::bigint[])
        ON CONFLICT (gateway_uid, model) DO UPDATE SET queued = excluded.queued, running = excluded.running,
            kv_percent = excluded.kv_percent, beat_time = clock_timestamp()
    )
    SELECT model, queued, running, kv_percent, -1 AS load_millis FROM model_demands
    WHERE gateway_uid <> $1::uuid AND beat_time > clock_timestamp() - interval '{FRESH_S} seconds'
    UNION ALL SELECT model, 0, 0, 0, load_millis FROM model_loads
"""
_READ = f"""
    SELECT model, queued, running, kv_percent, -1 AS load_millis FROM model_demands
    WHERE gateway_uid <> $1::uuid AND beat_time > clock_timestamp() - interval '{FRESH_S} seconds'
    UNION ALL SELECT model, 0, 0, 0, load_millis FROM model_loads
"""
_LOADED = """
    INSERT INTO model_loads (model, load_millis) VALUES ($1, $2)
    ON CONFLICT (model) DO UPDATE SET load_millis = excluded.load_millis, update_time = clock_timestamp()
"""


class SqlDemand:
    """A `scaling.SharedDemand`."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._uid = str(uuid4())
        self._written = False  # rows of ours may be there

    async def exchange(self, own: Mapping[str, Demand]) -> tuple[list[tuple[str, Demand]], dict[str, float]]:
        """See SharedDemand."""
        parts = {model: part for model, part in own.items() if part.active}
        if parts or self._written:
            columns = [list(each) for each in zip(*((p.queued, p.running, p.kv_percent) for p in parts.values()), strict=True)]
            found = await self._store.hot.rows(_EXCHANGE, self._uid, list(parts), *(columns or [[], [], []]))
            self._written = bool(parts)
        else:
            found = await self._store.hot.rows(_READ, self._uid)
        others = [(row["model"], Demand(row["queued"], row["running"], row["kv_percent"])) for row in found if row["load_millis"] < 0]
        return others, {row["model"]: row["load_millis"] / 1_000 for row in found if row["load_millis"] >= 0}

    async def loaded(self, model: str, seconds: float) -> None:
        """See SharedDemand."""
        await self._store.hot.rows(_LOADED, model, round(seconds * 1_000))
