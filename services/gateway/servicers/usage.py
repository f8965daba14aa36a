"""UsageService: the books, summed or row by row."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

from argosy.admin.v1 import usage_pb2 as pb
from argosy.v1 import usage_pb2
from services.chassis import bounds
from services.chassis.errors import FieldInvalid, FieldOutOfRange, ResourceNotFound
from services.gateway import records
from services.gateway.ledger import Tariff
from services.gateway.records import Row
from services.gateway.servicers.resources import PROJECT_NAME, Desk, Owner, moment, owner, segments, timestamp

SERVICE = "argosy.admin.v1.UsageService"
EXPORT_ROWS = 500  # read at once
REQUEST_ROWS = 1_000  # attempts of one request that are shown
RANGE_DAYS = 30
MAX_DAYS, MAX_HOURLY_DAYS = 366, 31

UNITS = {pb.USAGE_INTERVAL_UNSPECIFIED: None, pb.USAGE_INTERVAL_TOTAL: None, pb.USAGE_INTERVAL_DAY: "day", pb.USAGE_INTERVAL_HOUR: "hour"}
LENGTHS = {"day": timedelta(days=1), "hour": timedelta(hours=1)}
GROUPS = {pb.USAGE_GROUP_MODEL: "model", pb.USAGE_GROUP_API_KEY: "key_uid", pb.USAGE_GROUP_METHOD: "method"}
OUTCOMES = {
    "DONE": pb.USAGE_OUTCOME_COMPLETED,
    "CANCELLED": pb.USAGE_OUTCOME_CANCELLED,
    "DEADLINE": pb.USAGE_OUTCOME_DEADLINE,
    "LOST": pb.USAGE_OUTCOME_LOST,
    "SHED": pb.USAGE_OUTCOME_REFUSED,
    "FAILED": pb.USAGE_OUTCOME_FAILED,
    "PART": pb.USAGE_OUTCOME_PART,
}


class UsageServicer:
    """argosy.admin.v1.UsageService."""

    def __init__(self, desk: Desk, tariff: Tariff) -> None:
        self._desk = desk
        self._currency = tariff.currency_code

    async def QueryUsage(self, request: pb.QueryUsageRequest, context: Any) -> pb.QueryUsageResponse:
        """Sums over a range, by interval and group."""
        bounds.check(request)
        (segment,) = segments(request.parent, PROJECT_NAME, "parent")
        if request.interval not in UNITS:
            raise FieldInvalid("interval")
        if not set(request.group_by) <= set(GROUPS):
            raise FieldInvalid("group_by")
        unit, groups = UNITS[request.interval], frozenset(GROUPS[group] for group in request.group_by)
        async with self._desk.store.transaction() as connection:
            whose = await owner(connection, segment, "parent")
            scope = ("usage", whose.uid, *self._question(request))
            listing = self._desk.listing(request.page_size, request.page_token, *scope)
            if listing.after is None:
                start, end = self._range(request, unit)
                after = None
            else:  # the range of the first page, which `now` would have moved
                start, end = (datetime.fromisoformat(value) for value in listing.after[:2])
                after = listing.after[2:]
            rows = await records.usage_sums(connection, whose.uid, start, end, unit, groups, after, listing.limit)

        def shown(row: Row) -> pb.UsageSum:
            length = LENGTHS.get(unit or "")
            return pb.UsageSum(
                start_time=timestamp(max(row["bucket"], start)),
                end_time=timestamp(end if length is None else min(row["bucket"] + length, end)),
                model=row["model"],
                api_key=f"projects/{whose.name}/apiKeys/{row['key_uid']}" if row["key_uid"] else "",
                method=row["method"].removeprefix("/"),
                requests=row["requests"],
                usage=self._usage(row),
            )

        def after_of(row: Row) -> list[str]:
            edges = [start.isoformat(), end.isoformat(), row["bucket"].isoformat()]
            return [*edges, row["model"], row["key_uid"], row["method"]]

        sums, token = self._desk.page(listing, rows, shown, after_of)
        return pb.QueryUsageResponse(sums=sums, next_page_token=token)

    async def ExportUsage(self, request: pb.ExportUsageRequest, context: Any) -> AsyncIterator[pb.UsageRecord]:
        """Ledger rows after a cursor, in order, until there are no more. No transaction is held while the caller reads."""
        bounds.check(request)
        (segment,) = segments(request.parent, PROJECT_NAME, "parent")
        cursor = request.after_cursor
        while True:
            async with self._desk.store.transaction() as connection:
                whose = await owner(connection, segment, "parent")
                rows = await records.usage_after(connection, whose.uid, cursor, EXPORT_ROWS)
            for row in rows:
                yield self._record(row, whose)
            if len(rows) < EXPORT_ROWS:
                return
            cursor = rows[-1]["entry"]

    async def GetRequestUsage(self, request: pb.GetRequestUsageRequest, context: Any) -> pb.GetRequestUsageResponse:
        """The rows of one request: one for each attempt."""
        bounds.check(request)
        (segment,) = segments(request.parent, PROJECT_NAME, "parent")
        async with self._desk.store.transaction() as connection:
            whose = await owner(connection, segment, "parent")
            rows = await records.usage_of_request(connection, whose.uid, request.request_id, REQUEST_ROWS)
        if not rows:
            raise ResourceNotFound("request_id")
        return pb.GetRequestUsageResponse(records=[self._record(row, whose) for row in rows])

    def _question(self, request: pb.QueryUsageRequest) -> tuple[str, ...]:
        groups = ",".join(str(group) for group in sorted(request.group_by))
        return (request.start_time.ToJsonString(), request.end_time.ToJsonString(), str(request.interval), groups)

    def _range(self, request: pb.QueryUsageRequest, unit: str | None) -> tuple[datetime, datetime]:
        end = moment(request.end_time) if request.HasField("end_time") else datetime.now(UTC)
        if request.HasField("start_time"):
            start = moment(request.start_time)
        else:
            start = (end - timedelta(days=RANGE_DAYS)).replace(hour=0, minute=0, second=0, microsecond=0)
        if start >= end:
            raise FieldInvalid("end_time", "range")
        days = MAX_HOURLY_DAYS if unit == "hour" else MAX_DAYS
        if end - start > timedelta(days=days):
            raise FieldOutOfRange("end_time", (end - start).days, days, "days")
        return start, end

    def _usage(self, row: Row) -> usage_pb2.Usage:
        return usage_pb2.Usage(
            input_tokens=int(row["input_tokens"]),
            cached_input_tokens=int(row["cached_input_tokens"]),
            output_tokens=int(row["output_tokens"]),
            passes=int(row["passes"]),
            device_seconds=int(row["device_millis"]) / 1000,
            cost=usage_pb2.Cost(currency_code=self._currency, nanos=int(row["nanos"])),
        )

    def _record(self, row: Row, whose: Owner) -> pb.UsageRecord:
        return pb.UsageRecord(
            cursor=row["entry"],
            request_id=row["request_id"] or row["generation_id"],
            generation_id=row["generation_id"],
            api_key=f"projects/{whose.name}/apiKeys/{row['key_uid']}",
            method=row["method"].removeprefix("/"),
            model=row["model"],
            outcome=OUTCOMES[row["outcome"]],
            usage=self._usage(row),
            create_time=timestamp(row["reserve_time"]),
            settle_time=timestamp(row["create_time"]),
        )
