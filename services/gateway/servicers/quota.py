"""QuotaService: what a project may use, and what it has used of it."""

from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from argosy.admin.v1 import quota_pb2 as pb
from argosy.v1 import usage_pb2
from services.chassis import bounds, lists
from services.chassis.errors import FieldInvalid
from services.gateway import records
from services.gateway.ledger import Tariff
from services.gateway.records import Row
from services.gateway.servicers.resources import POLICY_NAME, Desk, Owner, owner, paths, segments, timestamp

SERVICE = "argosy.admin.v1.QuotaService"
COUNTS = (
    "requests_per_minute", "requests_per_day", "tokens_per_minute", "tokens_per_day", "concurrent_streams", "output_token_ceiling",
    "concurrent_jobs", "gpu_seconds_per_day", "stored_bytes",
)  # fmt: skip
MUTABLE = (*COUNTS, "cost_per_day")

# Kind → (limit's column, counter's column, which window's end resets it).
GAUGES = {
    pb.QUOTA_KIND_REQUESTS_PER_MINUTE: ("requests_per_minute", "minute_requests", "minute_end"),
    pb.QUOTA_KIND_REQUESTS_PER_DAY: ("requests_per_day", "day_requests", "day_end"),
    pb.QUOTA_KIND_TOKENS_PER_MINUTE: ("tokens_per_minute", "minute_tokens", "minute_end"),
    pb.QUOTA_KIND_TOKENS_PER_DAY: ("tokens_per_day", "day_tokens", "day_end"),
    pb.QUOTA_KIND_CONCURRENT_STREAMS: ("concurrent_streams", "running", None),
    pb.QUOTA_KIND_GPU_SECONDS_PER_DAY: ("gpu_seconds_per_day", "day_device_seconds", "day_end"),
    pb.QUOTA_KIND_COST_PER_DAY: ("nanos_per_day", "day_nanos", "day_end"),
}


class QuotaServicer:
    """argosy.admin.v1.QuotaService."""

    def __init__(self, desk: Desk, tariff: Tariff) -> None:
        self._desk = desk
        self._currency = tariff.currency_code

    async def GetQuotaPolicy(self, request: pb.GetQuotaPolicyRequest, context: Any) -> pb.QuotaPolicy:
        """The project's limits."""
        bounds.check(request)
        (segment,) = segments(request.name, POLICY_NAME, "name")
        async with self._desk.store.transaction() as connection:
            whose = await owner(connection, segment, "name")
            return self._shown(await records.quota_policy(connection, whose.uid), whose)

    async def UpdateQuotaPolicy(self, request: pb.UpdateQuotaPolicyRequest, context: Any) -> pb.QuotaPolicy:
        """Change the limits; with `validate_only`, say what they would be."""
        bounds.check(request)
        asked = request.quota_policy
        changed = paths(asked, request.update_mask, MUTABLE)
        if "cost_per_day" in changed and asked.HasField("cost_per_day") and asked.cost_per_day.currency_code != self._currency:
            raise FieldInvalid("quota_policy.cost_per_day.currency_code", "currency")
        (segment,) = segments(asked.name, POLICY_NAME, "quota_policy.name")
        given = {field.name for field, _ in asked.ListFields()}
        values: dict[str, Any] = {name: getattr(asked, name) if name in given else None for name in changed if name in COUNTS}
        if "cost_per_day" in changed:
            values["nanos_per_day"] = asked.cost_per_day.nanos if asked.HasField("cost_per_day") else None

        async def work(connection: AsyncConnection) -> tuple[pb.QuotaPolicy, Owner | None, str]:
            whose = await owner(connection, segment, "quota_policy.name")
            row = await records.quota_policy(connection, whose.uid, lock=True)
            lists.check_etag(asked.etag, whose.uid, row["revision"], "quota_policy.etag")
            if request.validate_only:
                return self._shown({**row, **values}, whose), None, asked.name
            row = await records.change_quota_policy(connection, whose.uid, **values)
            return self._shown(row, whose), whose, asked.name

        return await self._desk.change("UpdateQuotaPolicy", request, pb.QuotaPolicy, work)

    async def GetQuotaUsage(self, request: pb.GetQuotaUsageRequest, context: Any) -> pb.QuotaUsage:
        """What is used of each limit now, open reservations included."""
        bounds.check(request)
        (segment,) = segments(request.name, POLICY_NAME, "name")
        async with self._desk.store.transaction() as connection:
            whose = await owner(connection, segment, "name")
            policy = await records.quota_policy(connection, whose.uid)
            used = await records.quota_usage(connection, whose.uid)
        gauges = [
            pb.QuotaGauge(kind=kind, used=used[counter], limit=policy[limit], reset_time=timestamp(used[reset] if reset else None))
            for kind, (limit, counter, reset) in GAUGES.items()
        ]
        return pb.QuotaUsage(name=request.name, gauges=gauges)

    def _shown(self, row: Row, whose: Owner) -> pb.QuotaPolicy:
        policy = pb.QuotaPolicy(
            name=f"projects/{whose.name}/quotaPolicy",
            etag=lists.etag(whose.uid, row["revision"]),
            update_time=timestamp(row["update_time"]),
            **{name: row[name] for name in COUNTS if row[name] is not None},
        )
        if row["nanos_per_day"] is not None:
            policy.cost_per_day.CopyFrom(usage_pb2.Cost(currency_code=self._currency, nanos=row["nanos_per_day"]))
        return policy
