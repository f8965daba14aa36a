"""The books of jobs in PostgreSQL. The database's function `charge` decides (`migrations/`); this file carries."""

from dataclasses import replace
from uuid import NAMESPACE_OID, UUID, uuid5

from services.chassis.identity import Caller
from services.gateway.ledger import Charge
from services.gateway.store import Store

FEED = "charges"
NOBODY = "00000000-0000-0000-0000-000000000000"  # as a key: the project itself

_CHARGE = "SELECT exhausted_key::text FROM charge($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)"
_CURSOR = "SELECT sequence FROM feed_cursors WHERE feed = $1"
_RESET = "DELETE FROM feed_cursors WHERE feed = $1"
_LEFT = f"""
    WITH today AS (SELECT date_trunc('day', clock_timestamp(), 'UTC') AS day)
    SELECT p.concurrent_jobs,
        least(p.nanos_per_day - coalesce(c.day_nanos, 0), k.nanos_per_day - coalesce(kc.day_nanos, 0)) AS nanos,
        p.gpu_seconds_per_day - ceil(coalesce(j.device_millis, 0) / 1000.0)::bigint AS seconds
    FROM today CROSS JOIN quota_policies p
        LEFT JOIN api_keys k ON k.project_uid = p.project_uid AND k.uid = $2
        LEFT JOIN quota_counters c ON c.project_uid = p.project_uid AND c.key_uid = '{NOBODY}' AND c.day = today.day
        LEFT JOIN quota_counters kc ON kc.project_uid = p.project_uid AND kc.key_uid = k.uid AND kc.day = today.day
        LEFT JOIN job_counters j ON j.project_uid = p.project_uid AND j.day = today.day
    WHERE p.project_uid = $1
"""


class SqlCharges:
    """A `ledger.JobBooks`."""

    def __init__(self, store: Store, currency: str) -> None:
        self._store = store
        self.currency = currency

    async def cursor(self) -> int:
        """See JobBooks."""
        await self._store.ready.wait()
        found = await self._store.hot.rows(_CURSOR, FEED)
        return int(found[0]["sequence"]) if found else 0

    async def settle(self, charge: Charge) -> tuple[str, ...]:
        """See JobBooks."""
        found = await self._store.hot.rows(
            _CHARGE, charge.sequence, charge.project_uid, str(uuid5(UUID(charge.work_uid), str(charge.number))), charge.work_uid,
            _uid(charge.key_uid), charge.method, charge.model, charge.version, charge.outcome.value if charge.outcome else "PART",
            charge.nanos, round(charge.device_seconds * 1000), charge.time,
        )  # fmt: skip
        return tuple("" if row["exhausted_key"] == NOBODY else row["exhausted_key"] for row in found)

    async def reset(self) -> None:
        """See JobBooks."""
        await self._store.hot.rows(_RESET, FEED)

    async def allowed(self, who: Caller) -> Caller:
        """See JobBooks."""
        found = await self._store.hot.rows(_LEFT, who.project_uid, _uid(who.key_id))
        if not found:
            return who
        nanos, seconds = found[0]["nanos"], found[0]["seconds"]
        return replace(
            who,
            concurrent_jobs=found[0]["concurrent_jobs"],
            job_nanos_left=None if nanos is None else max(0, nanos),
            job_seconds_left=None if seconds is None else max(0, seconds),
        )


def _uid(text: str) -> str:
    """A key's uid; one of another form, as our own name is, has no counters but the project's."""
    try:
        return str(UUID(text))
    except ValueError:
        return str(uuid5(NAMESPACE_OID, text))
