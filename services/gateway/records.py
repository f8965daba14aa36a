"""Projects, keys, policies and the books' rows as the admin services read and change them. Every statement names its project."""

import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

from sqlalchemy import ColumnElement, Text, and_, case, cast, delete, func, insert, literal, or_, select, text, tuple_, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from services.chassis.lists import Condition
from services.gateway.keys import Grant
from services.gateway.schema import api_keys, audit_events, job_counters, ledger, projects, quota_counters, quota_policies, request_replays

Row = Mapping[Any, Any]  # column → value

REPLAY_KEPT = timedelta(hours=24)
NOBODY = "00000000-0000-0000-0000-000000000000"  # quota_counters: the project's own row
GRANT_COLUMNS = (
    "scopes", "models", "expire_time", "requests_per_minute", "tokens_per_minute", "concurrent_requests", "output_token_ceiling",
    "nanos_per_day",
)  # fmt: skip

_now = func.clock_timestamp()
_OPERATORS = {"=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_key_state = case((and_(api_keys.c.state == "ACTIVE", api_keys.c.expire_time <= _now), literal("EXPIRED")), else_=api_keys.c.state)
_keys = select(*(column for column in api_keys.c if column.name != "state"), _key_state.label("state"))


async def _one(connection: AsyncConnection, statement: Any) -> Row | None:
    return (await connection.execute(statement)).mappings().first()


def _where(table: Any, state: ColumnElement[Any], conditions: Iterable[Condition]) -> list[ColumnElement[bool]]:
    found = []
    for condition in conditions:
        if condition.field == "state":
            column: Any = state
        elif condition.field.startswith("labels."):
            column = func.coalesce(table.c.labels[condition.field.removeprefix("labels.")].astext, "")
        else:
            column = table.c[condition.field]
        found.append(_OPERATORS[condition.op](column, condition.value))
    return found


async def _page(
    connection: AsyncConnection, statement: Any, table: Any, order: tuple[str, bool], after: Sequence[str] | None, limit: int
) -> list[Row]:
    field, descending = order
    column = table.c[field]
    if after is not None:
        last: Any = datetime.fromisoformat(after[0]) if field.endswith("_time") else after[0]
        here, there = tuple_(column, table.c.uid), tuple_(literal(last, column.type), literal(after[1], table.c.uid.type))
        statement = statement.where(here < there if descending else here > there)
    columns = (column.desc(), table.c.uid.desc()) if descending else (column, table.c.uid)
    return list((await connection.execute(statement.order_by(*columns).limit(limit))).mappings())


def after_of(row: Row, field: str) -> list[str]:
    """Where the next page starts, if `row` ends this one."""
    value = row[field]
    return [value.isoformat() if isinstance(value, datetime) else value, row["uid"]]


# --- projects -----------------------------------------------------------------------------------------------------------------------


async def project(connection: AsyncConnection, name: str, *, lock: bool = False) -> Row | None:
    """The project of this name segment that is not deleted."""
    statement = select(projects).where(projects.c.name == name, projects.c.state != "DELETED")
    return await _one(connection, statement.with_for_update() if lock else statement)


async def list_projects(
    connection: AsyncConnection, conditions: Iterable[Condition], order: tuple[str, bool], after: Sequence[str] | None, limit: int
) -> list[Row]:
    """Projects that are not deleted."""
    statement = select(projects).where(projects.c.state != "DELETED", *_where(projects, projects.c.state, conditions))
    return await _page(connection, statement, projects, order, after, limit)


async def add_project(connection: AsyncConnection, name: str, display_name: str, labels: Mapping[str, str]) -> Row:
    """A new project with an unlimited policy."""
    values = {"uid": str(uuid4()), "name": name, "display_name": display_name, "labels": dict(labels), "kv_secret": os.urandom(32)}
    await connection.execute(insert(projects).values(**values))
    await connection.execute(insert(quota_policies).values(project_uid=values["uid"]))
    found = await project(connection, name)
    assert found is not None  # inserted above
    return found


async def change_project(connection: AsyncConnection, uid: str, **values: Any) -> Row:
    """The project after the change."""
    changed = {**values, "revision": projects.c.revision + 1, "update_time": _now}
    found = await _one(connection, update(projects).where(projects.c.uid == uid).values(**changed).returning(projects))
    assert found is not None  # its row is locked
    return found


async def delete_project(connection: AsyncConnection, uid: str) -> None:
    """Out of reach at once: the project, its keys, and the secret of its prefix cache."""
    await change_project(connection, uid, state="DELETED", delete_time=_now, display_name="", labels={}, kv_secret=os.urandom(32))
    await connection.execute(
        update(api_keys).where(api_keys.c.project_uid == uid, api_keys.c.state != "DELETED").values(state="DELETED", delete_time=_now)
    )


# --- keys ---------------------------------------------------------------------------------------------------------------------------


def grant_of(row: Row) -> Grant:
    """What a key's row allows."""
    values = {name: row[name] for name in GRANT_COLUMNS}
    return Grant(**{**values, "scopes": frozenset(row["scopes"]), "models": tuple(row["models"])})


def columns_of(grant: Grant) -> dict[str, Any]:
    """The inverse of `grant_of`."""
    values = {name: getattr(grant, name) for name in GRANT_COLUMNS}
    return {**values, "scopes": sorted(grant.scopes), "models": list(grant.models)}


async def api_key(connection: AsyncConnection, project_uid: str, uid: str, *, lock: bool = False) -> Row | None:
    """The project's key of this uid, whatever its state."""
    statement = _keys.where(api_keys.c.project_uid == project_uid, api_keys.c.uid == uid)
    return await _one(connection, statement.with_for_update() if lock else statement)


async def list_api_keys(
    connection: AsyncConnection, project_uid: str, conditions: Iterable[Condition], order: tuple[str, bool],
    after: Sequence[str] | None, limit: int,
) -> list[Row]:  # fmt: skip
    """The project's keys."""
    statement = _keys.where(api_keys.c.project_uid == project_uid, *_where(api_keys, _key_state, conditions))
    return await _page(connection, statement, api_keys, order, after, limit)


async def add_api_key(
    connection: AsyncConnection, project_uid: str, uid: str, mac: bytes, minter_uid: str, grant: Grant, display_name: str,
    labels: Mapping[str, str],
) -> Row:  # fmt: skip
    """A new key."""
    await connection.execute(
        insert(api_keys).values(
            project_uid=project_uid, uid=uid, mac=mac, minter_uid=minter_uid, display_name=display_name, labels=dict(labels),
            **columns_of(grant),
        )
    )  # fmt: skip
    found = await api_key(connection, project_uid, uid)
    assert found is not None  # inserted above
    return found


async def change_api_key(connection: AsyncConnection, project_uid: str, uid: str, **values: Any) -> Row:
    """The key after the change."""
    changed = {**values, "revision": api_keys.c.revision + 1, "update_time": _now}
    await connection.execute(update(api_keys).where(api_keys.c.project_uid == project_uid, api_keys.c.uid == uid).values(**changed))
    found = await api_key(connection, project_uid, uid)
    assert found is not None  # its row is locked
    return found


async def rotate_api_key(connection: AsyncConnection, project_uid: str, uid: str, mac: bytes, overlap_s: float) -> Row:
    """Give the key a new secret; the old one works on for `overlap_s`."""
    previous = {"previous_mac": api_keys.c.mac, "previous_expire_time": _now + timedelta(seconds=overlap_s)}
    kept = previous if overlap_s > 0 else {"previous_mac": None, "previous_expire_time": None}
    return await change_api_key(connection, project_uid, uid, mac=mac, **kept)


async def delete_api_key(connection: AsyncConnection, project_uid: str, uid: str) -> Row:
    """Refuse the key; it is forgotten 30 days later."""
    return await change_api_key(connection, project_uid, uid, state="DELETED", delete_time=_now)


# --- quotas -------------------------------------------------------------------------------------------------------------------------


async def quota_policy(connection: AsyncConnection, project_uid: str, *, lock: bool = False) -> Row:
    """The project's policy; every project has one."""
    statement = select(quota_policies).where(quota_policies.c.project_uid == project_uid)
    found = await _one(connection, statement.with_for_update() if lock else statement)
    if found is None:
        await connection.execute(upsert(quota_policies).values(project_uid=project_uid).on_conflict_do_nothing())
        found = await _one(connection, statement)
    assert found is not None  # inserted above
    return found


async def change_quota_policy(connection: AsyncConnection, project_uid: str, **values: Any) -> Row:
    """The policy after the change."""
    changed = {**values, "revision": quota_policies.c.revision + 1, "update_time": _now}
    statement = update(quota_policies).where(quota_policies.c.project_uid == project_uid).values(**changed).returning(quota_policies)
    found = await _one(connection, statement)
    assert found is not None  # its row is locked
    return found


async def quota_usage(connection: AsyncConnection, project_uid: str) -> Row:
    """What the project has used in the windows that run now, by the database's clock, and when they end."""
    c, j = quota_counters.c, job_counters.c
    minute, day = func.date_trunc("minute", _now, "UTC"), func.date_trunc("day", _now, "UTC")
    in_minute, in_day = c.minute == minute, c.day == day
    found = await _one(
        connection,
        select(
            (minute + timedelta(minutes=1)).label("minute_end"),
            (day + timedelta(days=1)).label("day_end"),
            func.coalesce(case((in_minute, c.minute_requests)), 0).label("minute_requests"),
            func.coalesce(case((in_minute, c.minute_tokens)), 0).label("minute_tokens"),
            func.coalesce(case((in_day, c.day_requests)), 0).label("day_requests"),
            func.coalesce(case((in_day, c.day_tokens)), 0).label("day_tokens"),
            func.coalesce(case((in_day, c.day_nanos)), 0).label("day_nanos"),
            func.coalesce(c.running, 0).label("running"),
            func.coalesce(case((j.day == day, j.device_millis // 1000)), 0).label("day_device_seconds"),
        ).select_from(
            projects.outerjoin(quota_counters, and_(c.project_uid == projects.c.uid, c.key_uid == NOBODY))
            .outerjoin(job_counters, j.project_uid == projects.c.uid)
        ).where(projects.c.uid == project_uid),
    )  # fmt: skip
    assert found is not None  # the project was just looked up
    return found


# --- the books ----------------------------------------------------------------------------------------------------------------------

SUMMED = ("input_tokens", "cached_input_tokens", "output_tokens", "passes", "nanos", "device_millis")
_SETTLED = ledger.c.kind.in_(("SETTLE", "AMEND"))


async def usage_sums(
    connection: AsyncConnection, project_uid: str, start: datetime, end: datetime, unit: str | None, groups: frozenset[str],
    after: Sequence[str] | None, limit: int,
) -> list[Row]:  # fmt: skip
    """Sums over [start, end) by `unit` ("hour", "day" or None) and by any of `model`, `key_uid`, `method`."""
    bucket = literal(start) if unit is None else func.date_trunc(unit, ledger.c.create_time, "UTC")

    def group(name: str, column: Any) -> Any:
        return (column if name in groups else literal("")).label(name)

    sums = (
        select(
            bucket.label("bucket"),
            group("model", ledger.c.model),
            group("key_uid", cast(ledger.c.key_uid, Text)),
            group("method", ledger.c.method),
            func.count().filter(ledger.c.kind == "SETTLE", ledger.c.outcome != "PART").label("requests"),
            *(func.sum(ledger.c[name]).label(name) for name in SUMMED),
        )
        .where(ledger.c.project_uid == project_uid, _SETTLED, ledger.c.create_time >= start, ledger.c.create_time < end)
        .group_by(*(text(str(position)) for position in range(1, 5)))
        .subquery()
    )
    keys = (sums.c.bucket, sums.c.model, sums.c.key_uid, sums.c.method)
    statement = select(sums).where(or_(sums.c.requests > 0, *(sums.c[name] > 0 for name in SUMMED)))
    if after is not None:
        last = tuple_(literal(datetime.fromisoformat(after[0])), *(literal(value) for value in after[1:]))
        statement = statement.where(tuple_(*keys) > last)
    return list((await connection.execute(statement.order_by(*keys).limit(limit))).mappings())


def _records(project_uid: str) -> Any:
    reserved = ledger.alias("reserved")
    same = and_(
        reserved.c.project_uid == ledger.c.project_uid, reserved.c.generation_id == ledger.c.generation_id,
        reserved.c.kind == "RESERVE",
    )  # fmt: skip
    return (
        select(ledger, func.coalesce(reserved.c.create_time, ledger.c.create_time).label("reserve_time"))
        .select_from(ledger.outerjoin(reserved, same))
        .where(ledger.c.project_uid == project_uid, _SETTLED)
        .order_by(ledger.c.entry)
    )


async def usage_after(connection: AsyncConnection, project_uid: str, entry: int, limit: int) -> list[Row]:
    """Settled rows behind a cursor, in order."""
    return list((await connection.execute(_records(project_uid).where(ledger.c.entry > entry).limit(limit))).mappings())


async def usage_of_request(connection: AsyncConnection, project_uid: str, request_id: str, limit: int) -> list[Row]:
    """Settled rows of one request, oldest first. A request without an id of its own goes by its generation's."""
    by_id = or_(ledger.c.request_id == request_id, and_(ledger.c.request_id.is_(None), ledger.c.generation_id == request_id))
    return list((await connection.execute(_records(project_uid).where(by_id).limit(limit))).mappings())


# --- replays and audit --------------------------------------------------------------------------------------------------------------


async def claim_request(connection: AsyncConnection, project_uid: str, method: str, request_id: str) -> bool:
    """Hold the request id until the transaction ends; False: another call holds it."""
    name = f"{project_uid}/{method}/{request_id}"
    held = await connection.execute(select(func.pg_try_advisory_xact_lock(func.hashtextextended(name, 0))))
    return bool(held.scalar())


async def replay(connection: AsyncConnection, project_uid: str, method: str, request_id: str) -> Row | None:
    """The reply kept for this request id, if it is younger than 24 h."""
    r = request_replays.c
    return await _one(
        connection,
        select(r.body_digest, r.reply).where(
            r.project_uid == project_uid, r.method == method, r.request_id == request_id, r.create_time > _now - REPLAY_KEPT
        ),
    )


async def keep_reply(connection: AsyncConnection, project_uid: str, method: str, request_id: str, digest: bytes, reply: bytes) -> None:
    """Keep a reply in the transaction of the change that it tells of."""
    r = request_replays.c
    await connection.execute(delete(request_replays).where(r.project_uid == project_uid, r.method == method, r.request_id == request_id))
    await connection.execute(
        insert(request_replays).values(project_uid=project_uid, method=method, request_id=request_id, body_digest=digest, reply=reply)
    )


async def audit(
    connection: AsyncConnection, project_uid: str, actor_project_uid: str, actor_key_uid: str, method: str, resource: str, request_id: str
) -> None:
    """Note an applied change."""
    await connection.execute(
        insert(audit_events).values(
            project_uid=project_uid, uid=str(uuid4()), actor_project_uid=actor_project_uid, actor_key_uid=actor_key_uid, method=method,
            resource=resource, request_id=request_id or None,
        )
    )  # fmt: skip
