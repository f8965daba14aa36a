"""Models, versions, aliases and the gateways' feed in SQL. Every statement names its project."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

from sqlalchemy import and_, delete, func, insert, literal, or_, select, update
from sqlalchemy.dialects.postgresql import distinct_on
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from services.chassis.lists import Condition
from services.finetune.queries import Record, one, page, where
from services.finetune.schema.models import (
    alias_moves,
    model_aliases,
    model_versions,
    models,
    registry_counter,
    registry_events,
    servable_reports,
)

EVENTS_KEPT = timedelta(days=1)  # of the gateways' feed: longer than one is cut off and goes on behind its cursor
ERASURES_KEPT = timedelta(days=35)  # longer than a replica may have been off with its disk
PROD = "prod"  # the alias that a model's plain name means

_now = func.clock_timestamp()
_live = model_versions.c.delete_time.is_(None)


# --- models -------------------------------------------------------------------------------------------------------------------------


async def model(connection: AsyncConnection, project_uid: str, name: str, *, lock: bool = False) -> Record | None:
    """The project's model of this name segment that is not deleted."""
    m = models.c
    statement = select(models).where(m.project_uid == project_uid, m.name == name, m.delete_time.is_(None))
    return await one(connection, statement.with_for_update() if lock else statement)


async def model_by_uid(connection: AsyncConnection, project_uid: str, uid: str) -> Record | None:
    """The project's model of this uid that is not deleted."""
    m = models.c
    return await one(connection, select(models).where(m.project_uid == project_uid, m.uid == uid, m.delete_time.is_(None)))


async def list_models(
    connection: AsyncConnection, project_uid: str, conditions: Iterable[Condition], order: tuple[str, bool],
    after: Sequence[str] | None, limit: int,
) -> list[Record]:  # fmt: skip
    """The project's models that are not deleted."""
    statement = select(models).where(models.c.project_uid == project_uid, models.c.delete_time.is_(None), *where(models, conditions))
    return await page(connection, statement, models, order, after, limit)


async def add_model(
    connection: AsyncConnection, project_uid: str, project: str, name: str, base_model: str, display_name: str = "",
    labels: Mapping[str, str] | None = None,
) -> Record | None:  # fmt: skip
    """A new model; None: there is one of this name. Its numbers go on from those of a deleted model of the name."""
    m = models.c
    past = select(func.coalesce(func.max(m.next_version), 1)).where(m.project_uid == project_uid, m.name == name)
    added = upsert(models).values(
        project_uid=project_uid, uid=str(uuid4()), project=project, name=name, base_model=base_model, display_name=display_name,
        labels=dict(labels or {}), next_version=past.scalar_subquery(),
    )  # fmt: skip
    statement = added.on_conflict_do_nothing(index_elements=[m.project_uid, m.name], index_where=m.delete_time.is_(None))
    return await one(connection, statement.returning(models))


async def change_model(connection: AsyncConnection, project_uid: str, uid: str, **values: Any) -> Record:
    """The model after the change; its row is locked by the caller."""
    m = models.c
    changed = {**values, "revision": m.revision + 1, "update_time": _now}
    found = await one(connection, update(models).where(m.project_uid == project_uid, m.uid == uid).values(**changed).returning(models))
    assert found is not None  # its row is locked
    return found


# --- versions -----------------------------------------------------------------------------------------------------------------------


async def version(connection: AsyncConnection, project_uid: str, model_uid: str, number: int, *, lock: bool = False) -> Record | None:
    """The model's version of this number that is not deleted."""
    v = model_versions.c
    statement = select(model_versions).where(v.project_uid == project_uid, v.model_uid == model_uid, v.number == number, _live)
    return await one(connection, statement.with_for_update() if lock else statement)


async def version_of_job(connection: AsyncConnection, project_uid: str, job_uid: str) -> Record | None:
    """What a job's end made, or is being made."""
    v = model_versions.c
    return await one(connection, select(model_versions).where(v.project_uid == project_uid, v.job_uid == job_uid, v.source == "JOB", _live))


async def abandoned(connection: AsyncConnection, older: timedelta, limit: int = 100) -> list[Record]:
    """Versions of all projects that have been in CHECKING for longer, locked; those that are being published are passed over."""
    v = model_versions.c
    statement = select(model_versions).where(v.state == "CHECKING", v.delete_time.is_(None), v.update_time < _now - older)
    return list((await connection.execute(statement.limit(limit).with_for_update(skip_locked=True))).mappings())


async def has_versions(connection: AsyncConnection, project_uid: str, model_uid: str) -> bool:
    """Whether the model has a version that is not deleted."""
    v = model_versions.c
    there = select(model_versions).where(v.project_uid == project_uid, v.model_uid == model_uid, _live).exists()
    return bool((await connection.execute(select(there))).scalar())


async def newest_ready(connection: AsyncConnection, project_uid: str, model_uid: str) -> Record | None:
    """The READY version of the highest number."""
    v = model_versions.c
    ready = select(model_versions).where(v.project_uid == project_uid, v.model_uid == model_uid, v.state == "READY", _live)
    return await one(connection, ready.order_by(v.number.desc()).limit(1))


async def default_versions(connection: AsyncConnection, project_uid: str, model_uids: Sequence[str]) -> dict[str, Record]:
    """By model: the version that its plain name means, if there is one. Of a split `prod` the stable one."""
    v, a = model_versions.c, model_aliases.c
    prod = and_(a.project_uid == v.project_uid, a.model_uid == v.model_uid, a.name == PROD)
    statement = (
        select(model_versions)
        .ext(distinct_on(v.model_uid))
        .join(model_aliases, prod, isouter=True)
        .where(v.project_uid == project_uid, v.model_uid.in_(list(model_uids)), v.state == "READY", _live)
        .order_by(v.model_uid, func.coalesce(a.target == v.number, literal(False)).desc(), v.number.desc())
    )
    return {row["model_uid"]: row for row in (await connection.execute(statement)).mappings()}


async def list_versions(
    connection: AsyncConnection, project_uid: str, model_uid: str, conditions: Iterable[Condition], order: tuple[str, bool],
    after: Sequence[str] | None, limit: int,
) -> list[Record]:  # fmt: skip
    """The model's versions that are not deleted."""
    v = model_versions.c
    statement = select(model_versions).where(
        v.project_uid == project_uid, v.model_uid == model_uid, _live, *where(model_versions, conditions)
    )
    return await page(connection, statement, model_versions, order, after, limit)


async def add_version(connection: AsyncConnection, project_uid: str, model_uid: str, source: str, **values: Any) -> Record:
    """A new version in CHECKING, with the model's next number."""
    m = models.c
    taken = update(models).where(m.project_uid == project_uid, m.uid == model_uid, m.delete_time.is_(None))
    number = (await connection.execute(taken.values(next_version=m.next_version + 1).returning(m.next_version - 1))).scalar_one()
    row = {"project_uid": project_uid, "model_uid": model_uid, "number": number, "uid": str(uuid4()), "state": "CHECKING"}
    added = await one(connection, insert(model_versions).values(**row, source=source, **values).returning(model_versions))
    assert added is not None  # inserted
    return added


async def change_version(connection: AsyncConnection, row: Record, **values: Any) -> Record:
    """The version after the change."""
    v = model_versions.c
    changed = {**values, "revision": v.revision + 1, "update_time": _now}
    statement = update(model_versions).where(
        v.project_uid == row["project_uid"], v.model_uid == row["model_uid"], v.number == row["number"]
    )
    found = await one(connection, statement.values(**changed).returning(model_versions))
    assert found is not None  # versions are emptied, never removed
    return found


# --- aliases ------------------------------------------------------------------------------------------------------------------------


async def alias(connection: AsyncConnection, project_uid: str, model_uid: str, name: str, *, lock: bool = False) -> Record | None:
    """The model's alias of this name."""
    a = model_aliases.c
    statement = select(model_aliases).where(a.project_uid == project_uid, a.model_uid == model_uid, a.name == name)
    return await one(connection, statement.with_for_update() if lock else statement)


async def aliases_of(connection: AsyncConnection, project_uid: str, model_uid: str, number: int | None = None) -> list[Record]:
    """The model's aliases; with `number`, those that point to this version."""
    a = model_aliases.c
    statement = select(model_aliases).where(a.project_uid == project_uid, a.model_uid == model_uid)
    if number is not None:
        statement = statement.where((a.target == number) | (a.split == number))
    return list((await connection.execute(statement.order_by(a.name))).mappings())


async def list_aliases(
    connection: AsyncConnection, project_uid: str, model_uid: str, conditions: Iterable[Condition], order: tuple[str, bool],
    after: Sequence[str] | None, limit: int,
) -> list[Record]:  # fmt: skip
    """The model's aliases."""
    a = model_aliases.c
    statement = select(model_aliases).where(a.project_uid == project_uid, a.model_uid == model_uid, *where(model_aliases, conditions))
    return await page(connection, statement, model_aliases, order, after, limit)


async def point(
    connection: AsyncConnection, project_uid: str, model_uid: str, name: str, kind: str, target: int, split: int | None = None,
    split_percent: int | None = None, *, actor: str, request_id: str = "", evaluation_uid: str | None = None,
) -> Record:  # fmt: skip
    """Point an alias, made if absent, and note the move."""
    a = model_aliases.c
    key = {"project_uid": project_uid, "model_uid": model_uid}
    aim = {"target": target, "split": split, "split_percent": split_percent}
    statement = upsert(model_aliases).values(**key, name=name, uid=str(uuid4()), **aim, moves=1)
    moved = statement.on_conflict_do_update(
        index_elements=[a.project_uid, a.model_uid, a.name],
        set_={**aim, "moves": a.moves + 1, "revision": a.revision + 1, "update_time": _now},
    ).returning(model_aliases)
    row = await one(connection, moved)
    assert row is not None  # inserted or updated
    await _note(connection, key, name, kind, aim, actor=actor, request_id=request_id, evaluation_uid=evaluation_uid)
    return row


async def drop_alias(connection: AsyncConnection, row: Record, *, actor: str, request_id: str = "") -> None:
    """Remove an alias; its history stays."""
    a = model_aliases.c
    key = {"project_uid": row["project_uid"], "model_uid": row["model_uid"]}
    aim = {name: row[name] for name in ("target", "split", "split_percent")}
    await _note(connection, key, row["name"], "DROPPED", aim, actor=actor, request_id=request_id)
    await connection.execute(
        model_aliases.delete().where(a.project_uid == key["project_uid"], a.model_uid == key["model_uid"], a.name == row["name"])
    )


async def _note(
    connection: AsyncConnection, key: Mapping[str, str], name: str, kind: str, aim: Mapping[str, Any], *, actor: str, request_id: str,
    evaluation_uid: str | None = None,
) -> None:  # fmt: skip
    m = alias_moves.c
    last = select(func.coalesce(func.max(m.sequence), 0)).where(
        m.project_uid == key["project_uid"], m.model_uid == key["model_uid"], m.alias == name
    )
    await connection.execute(
        insert(alias_moves).values(
            **key, alias=name, kind=kind, **aim, evaluation_uid=evaluation_uid, actor_key_id=actor, request_id=request_id,
            sequence=(await connection.execute(last)).scalar_one() + 1,
        )
    )  # fmt: skip


async def moves(connection: AsyncConnection, project_uid: str, model_uid: str, name: str, limit: int = 100) -> list[Record]:
    """An alias's moves, newest first, since it was last made."""
    m = alias_moves.c
    mine = (m.project_uid == project_uid, m.model_uid == model_uid, m.alias == name)
    dropped = select(func.coalesce(func.max(m.sequence), 0)).where(*mine, m.kind == "DROPPED").scalar_subquery()
    statement = select(alias_moves).where(*mine, m.sequence > dropped).order_by(m.sequence.desc()).limit(limit)
    return list((await connection.execute(statement)).mappings())


# --- what gateways are told -----------------------------------------------------------------------------------------------------------


async def emit(connection: AsyncConnection, project_uid: str, kind: str, body: Mapping[str, Any]) -> int:
    """Tell every gateway, at commit. Returns the sequence. The last statements of a transaction: others wait for its end."""
    raised = upsert(registry_counter).values(one=True, last=1)
    raised = raised.on_conflict_do_update(index_elements=[registry_counter.c.one], set_={"last": registry_counter.c.last + 1})
    sequence = int((await connection.execute(raised.returning(registry_counter.c.last))).scalar_one())
    await connection.execute(insert(registry_events).values(sequence=sequence, project_uid=project_uid, kind=kind, body=dict(body)))
    return sequence


async def last_sequence(connection: AsyncConnection) -> int:
    """The newest event's; 0: there is none."""
    return int((await connection.execute(select(func.coalesce(func.max(registry_counter.c.last), 0)))).scalar_one())


async def events(connection: AsyncConnection, after: int, limit: int = 200) -> list[Record]:
    """What every gateway is told after a cursor, for all projects."""
    e = registry_events.c
    return list((await connection.execute(select(registry_events).where(e.sequence > after).order_by(e.sequence).limit(limit))).mappings())


async def fold_events(connection: AsyncConnection) -> None:
    """Forget what no gateway needs: one that starts knows no names, loads old versions when asked for, and must hear of erasures."""
    e = registry_events.c
    old = or_(and_(e.kind != "erased", e.create_time < _now - EVENTS_KEPT), and_(e.kind == "erased", e.create_time < _now - ERASURES_KEPT))
    await connection.execute(delete(registry_events).where(old))


async def report_servable(
    connection: AsyncConnection, row: Record, gateway: str, replicas: int, load_seconds: float | None
) -> tuple[bool, Record]:
    """Note that replicas hold a version. Returns whether it is the first such report, and the version after it; its row is locked.

    A version's `servable_seconds` run from READY to the first report.
    """
    key = {name: row[name] for name in ("project_uid", "model_uid", "number")}
    noted = upsert(servable_reports).values(**key, gateway=gateway, replicas=replicas, seconds=load_seconds or 0.0)
    s = servable_reports.c
    await connection.execute(
        noted.on_conflict_do_update(
            index_elements=[s.project_uid, s.model_uid, s.number, s.gateway],
            set_={"replicas": func.greatest(s.replicas, noted.excluded.replicas)},
        )
    )
    if row["servable_time"] is not None:
        return False, row
    now: datetime = (await connection.execute(select(_now))).scalar_one()
    seconds = max(0.0, (now - row["ready_time"]).total_seconds())
    return True, await change_version(connection, row, servable_time=now, servable_seconds=seconds)
