"""Jobs in SQL: every move is one compare-and-set with its event, and every event gets its number from the job's row.

Commit order is sequence order, since the number comes from the row that the change locks. A worker's write compares the fence, a
reconciler's the epoch of its ownership; who loses the comparison has changed nothing.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

from sqlalchemy import ColumnElement, and_, case, delete, func, insert, or_, select, text, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from argosy.v1.finetune_pb2 import JobEvent
from services.chassis.lists import Condition
from services.finetune import events, sql_charges
from services.finetune.jobs import LIVE, TERMINAL, State, allowed
from services.finetune.queries import Record, one, page, where
from services.finetune.schema.jobs import checkpoints, job_events, jobs, training_rates
from services.finetune.store import CHANNEL

NOW = func.clock_timestamp()
KEPT_EVENTS = 20_000  # of a job; beyond that progress and metrics are thinned
THIN_EVERY = 2_000  # events between two thinnings
_j = jobs.c
_live = [state.value for state in LIVE]


class Moved(Exception):
    """Somebody else has moved the job meanwhile; look again."""


async def _row(connection: AsyncConnection, statement: Any) -> Record:
    found: Record = (await connection.execute(statement)).mappings().one()
    return found


async def now(connection: AsyncConnection) -> datetime:
    """The database's clock, which judges leases and deadlines."""
    found: datetime = (await connection.execute(select(NOW))).scalar_one()
    return found


async def add(connection: AsyncConnection, values: Mapping[str, Any]) -> Record:
    """A new job in QUEUED, with its first event."""
    row = (await connection.execute(insert(jobs).values(uid=str(uuid4()), **values).returning(jobs))).mappings().one()
    return await say(connection, row, events.state(State.QUEUED))


async def job(connection: AsyncConnection, project_uid: str, uid: str, *, lock: bool = False) -> Record | None:
    """One job of a project."""
    statement = select(jobs).where(_j.project_uid == project_uid, _j.uid == uid, _j.delete_time.is_(None))
    return await one(connection, statement.with_for_update() if lock else statement)


async def any_job(connection: AsyncConnection, uid: str, *, lock: bool = False) -> Record | None:
    """One job of any project: for its own worker, whose token was checked."""
    statement = select(jobs).where(_j.uid == uid, _j.delete_time.is_(None))
    return await one(connection, statement.with_for_update() if lock else statement)


async def list_jobs(
    connection: AsyncConnection, project_uid: str, conditions: Sequence[Condition], order: tuple[str, bool], after: Any, limit: int
) -> list[Record]:
    """A page of a project's jobs."""
    statement = select(jobs).where(_j.project_uid == project_uid, _j.delete_time.is_(None), *where(jobs, conditions))
    return await page(connection, statement, jobs, order, after, limit)


async def change(connection: AsyncConnection, row: Record, *said: JobEvent, **values: Any) -> Record:
    """Write a locked job's values and events."""
    if "state" in values:
        before, after = State(row["state"]), State(values["state"])
        if before is not after and not allowed(before, after):
            raise Moved
        values["due_time"] = values.get("due_time", NOW)
    statement = update(jobs).where(_j.uid == row["uid"]).values(revision=_j.revision + 1, update_time=NOW, **values).returning(jobs)
    changed = await say(connection, await _row(connection, statement), *said)
    owed = sql_charges.due(row, changed)
    return changed if owed is None else await _charged(connection, changed, owed)


async def _charged(connection: AsyncConnection, row: Record, owed: sql_charges.Charge) -> Record:
    """Tell the books what a locked job owes."""
    values = {
        "charges": owed.number,
        "charged_seconds": _j.charged_seconds + owed.device_seconds,
        "charged_nanos": _j.charged_nanos + owed.nanos,
    }
    row = await _row(connection, update(jobs).where(_j.uid == row["uid"]).values(**values).returning(jobs))
    await sql_charges.add(connection, owed)
    return row


async def move(
    connection: AsyncConnection,
    row: Record,
    to: State,
    *said: JobEvent,
    why: str = "",
    error: Mapping[str, object] | None = None,
    **values: Any,
) -> Record:
    """Move a locked job, with its event. A terminal state ends it.

    Raises:
        Moved: there is no such move from where it is.
    """
    if State(row["state"]) is to:
        raise Moved
    if to in TERMINAL:
        values |= {"end_time": NOW, "phase": "", "estimated_end_time": None}
    if to is not State.PAUSED:
        values.setdefault("expire_time", None)
    moved = events.state(to, why, int(values.get("attempt") or row["attempt"]), error, values.get("model_version", ""))
    return await change(connection, row, *said, moved, state=to.value, reason=why, failure=error, **values)


async def say(connection: AsyncConnection, row: Record, *said: JobEvent) -> Record:
    """Append events to a locked job's log, numbered on from its row, and wake whoever watches at commit."""
    if not said:
        return row
    last = row["last_sequence"] + len(said)
    stamp = datetime.now(UTC)
    rows = []
    for number, event in enumerate(said, row["last_sequence"] + 1):
        event.sequence = number
        event.time.FromDatetime(stamp)
        rows.append(
            {
                "project_uid": row["project_uid"], "job_uid": row["uid"], "sequence": number, "kind": event.WhichOneof("event"),
                "body": event.SerializeToString(),
            }
        )  # fmt: skip
    await connection.execute(insert(job_events), rows)
    statement = update(jobs).where(_j.uid == row["uid"]).values(last_sequence=last, kept_events=_j.kept_events + len(said)).returning(jobs)
    row = (await connection.execute(statement)).mappings().one()
    if row["kept_events"] >= KEPT_EVENTS and row["kept_events"] % THIN_EVERY < len(said):
        row = await _thin(connection, row)
    await connection.execute(text("SELECT pg_notify(:channel, :uid)"), {"channel": CHANNEL, "uid": row["uid"]})
    return row


async def _thin(connection: AsyncConnection, row: Record) -> Record:
    """Drop every other progress and metric of the older half; states, checkpoints, evaluations, warnings and costs stay."""
    e = job_events.c
    gone = await connection.execute(
        delete(job_events).where(
            e.job_uid == row["uid"], e.kind.in_(events.THINNED), e.sequence < row["last_sequence"] - KEPT_EVENTS // 2, e.sequence % 2 == 1
        )
    )
    statement = update(jobs).where(_j.uid == row["uid"]).values(kept_events=_j.kept_events - gone.rowcount).returning(jobs)
    return await _row(connection, statement)


async def events_after(connection: AsyncConnection, uid: str, after: int, limit: int) -> list[JobEvent]:
    """Stored events behind a cursor, in order."""
    e = job_events.c
    statement = select(e.body).where(e.job_uid == uid, e.sequence > after).order_by(e.sequence).limit(limit)
    return [JobEvent.FromString(body) for body in (await connection.execute(statement)).scalars()]


# --- the reconciler ---------------------------------------------------------------------------------------------------------------------


async def claim(connection: AsyncConnection, owner: str, lease_s: float, limit: int) -> list[Record]:
    """Due jobs that are ours or nobody's, now ours; a takeover raises the epoch. Others' are left to them while their lease lives.

    Erased ones are among them until nothing of their attempt is left.
    """
    lease = timedelta(seconds=lease_s)
    due = (
        select(_j.uid)
        .where(
            _j.due_time <= NOW,
            or_(and_(_j.delete_time.is_(None), _j.state.in_(_live)), _j.reaped.is_(False)),
            or_(_j.owner == owner, _j.owner_time.is_(None), _j.owner_time < NOW - lease),
        )
        .order_by(_j.due_time)  # in turn: what waits at the front hides nothing; who goes first is decided among those found
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    taken = (
        update(jobs)
        .where(_j.uid.in_(due.scalar_subquery()))
        .values(owner_epoch=_j.owner_epoch + func.cast(_j.owner != owner, _j.attempt.type), owner=owner, owner_time=NOW)
        .returning(jobs)
    )
    return list((await connection.execute(taken)).mappings())


async def owned(connection: AsyncConnection, row: Record) -> Record:
    """The row again, locked, if it is still ours and as it was. Raises Moved otherwise."""
    found = await one(connection, select(jobs).where(_j.uid == row["uid"]).with_for_update())
    if found is None or found["owner_epoch"] != row["owner_epoch"] or found["state"] != row["state"] or found["attempt"] != row["attempt"]:
        raise Moved
    return found


async def later(connection: AsyncConnection, row: Record, seconds: float) -> None:
    """Look at it again then, unless something wakes it before."""
    statement = update(jobs).where(_j.uid == row["uid"], _j.owner_epoch == row["owner_epoch"], _j.last_sequence == row["last_sequence"])
    await connection.execute(statement.values(due_time=NOW + timedelta(seconds=seconds)))


async def working(connection: AsyncConnection) -> tuple[int, dict[str, int]]:
    """Attempts under way or still to clear away: in all, and by project."""
    busy = or_(_j.state.in_(["PREPARING", "RUNNING", "PAUSING", "CANCELLING"]), _j.reaped.is_(False))
    statement = select(_j.project_uid, func.count()).where(busy).group_by(_j.project_uid)
    counts = {project: count for project, count in (await connection.execute(statement)).all()}
    return sum(counts.values()), counts


async def live_names(connection: AsyncConnection) -> dict[str, int]:
    """Job uid → its attempt, of all jobs whose attempt may be there: everything else that a launcher holds is an orphan."""
    statement = select(_j.uid, _j.attempt).where(or_(and_(_j.delete_time.is_(None), _j.state.in_(_live)), _j.reaped.is_(False)))
    return {uid: attempt for uid, attempt in (await connection.execute(statement)).all()}


# --- quotas, quotes ---------------------------------------------------------------------------------------------------------------------


async def counts(connection: AsyncConnection, project_uid: str) -> tuple[int, int]:
    """Jobs of a project that are not at rest, and training tokens asked for in the last day. Serialises creations of one project."""
    await connection.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"finetune/jobs/{project_uid}", 0))))
    alive = select(func.count()).where(_j.project_uid == project_uid, _j.delete_time.is_(None), _j.state.in_(_live))
    recent = select(func.coalesce(func.sum(_j.train_tokens), 0)).where(
        _j.project_uid == project_uid, _j.create_time > NOW - timedelta(days=1)
    )
    return (await connection.execute(alive)).scalar_one(), int((await connection.execute(recent)).scalar_one())


def _spends(project_uid: str) -> tuple[ColumnElement[bool], ...]:
    """A project's jobs that run or would start."""
    return _j.project_uid == project_uid, _j.delete_time.is_(None), _j.state.in_(["QUEUED", "PREPARING", "RUNNING"])


async def begun(connection: AsyncConnection, project_uid: str) -> list[Record]:
    """What jobs of a project that run or would start may take, and what of it they were charged."""
    columns = (_j.key_id, _j.quote, _j.max_nanos, _j.nanos_per_second, _j.charged_nanos, _j.charged_seconds)
    return list((await connection.execute(select(*columns).where(*_spends(project_uid)))).mappings())


async def spending(connection: AsyncConnection, project_uid: str, key_id: str = "") -> list[Record]:
    """Jobs of a project, or of one key of it, that run or would start, locked."""
    statement = select(jobs).where(*_spends(project_uid), *([_j.key_id == key_id] if key_id else []))
    return list((await connection.execute(statement.order_by(_j.uid).with_for_update())).mappings())


async def rate(connection: AsyncConnection, base_model: str, method: str) -> Record | None:
    """What training of this kind was last measured to do."""
    r = training_rates.c
    statement = select(training_rates).where(r.base_model == base_model, r.method == method).order_by(r.update_time.desc()).limit(1)
    return await one(connection, statement)


async def measured(
    connection: AsyncConnection, base_model: str, method: str, device: str, tokens_per_second: float, seconds: float
) -> None:
    """Keep what an attempt did, weighted half against what was known."""
    values = upsert(training_rates).values(
        base_model=base_model, method=method, device=device, tokens_per_second=tokens_per_second, seconds=seconds, update_time=NOW
    )
    halved = (training_rates.c.tokens_per_second + values.excluded.tokens_per_second) / 2
    await connection.execute(
        values.on_conflict_do_update(
            index_elements=["base_model", "method", "device"],
            set_={"tokens_per_second": halved, "seconds": values.excluded.seconds, "update_time": NOW},
        )
    )


# --- checkpoints ------------------------------------------------------------------------------------------------------------------------


async def add_checkpoint(connection: AsyncConnection, row: Record, values: Mapping[str, Any]) -> Record:
    """A committed checkpoint; of two of one step the newer fence's stands."""
    made = upsert(checkpoints).values(project_uid=row["project_uid"], job_uid=row["uid"], uid=str(uuid4()), **values)
    names = ("fence", "uid", "prefix", "manifest_digest", "total_bytes", "metrics")
    statement = made.on_conflict_do_update(
        index_elements=["job_uid", "step"], set_={name: getattr(made.excluded, name) for name in names}
    ).returning(checkpoints)
    return await _row(connection, statement)


async def checkpoints_of(connection: AsyncConnection, uid: str, *, below: int | None = None, limit: int = 1_000) -> list[Record]:
    """Committed checkpoints, newest first."""
    c = checkpoints.c
    statement = select(checkpoints).where(c.job_uid == uid, *([] if below is None else [c.step < below]))
    return list((await connection.execute(statement.order_by(c.step.desc()).limit(limit))).mappings())


def stale(rows: Sequence[Record], newest: int) -> list[Record]:
    """Of a job's checkpoints, newest first, those that nobody needs: neither of the newest, nor the best by the validation rows.

    A checkpoint's numbers are those of the evaluation before it, so of equals the first is the one that was measured.
    """
    measured = [row for row in rows if "validation_loss" in row["metrics"]]
    best = min(measured, key=lambda row: (row["metrics"]["validation_loss"], row["step"]), default=None)
    return [row for row in rows[newest:] if row is not best]


async def checkpoint(connection: AsyncConnection, project_uid: str, uid: str, step: int) -> Record | None:
    """One checkpoint."""
    c = checkpoints.c
    return await one(connection, select(checkpoints).where(c.project_uid == project_uid, c.job_uid == uid, c.step == step))


async def drop_checkpoints(connection: AsyncConnection, uid: str, steps: Sequence[int] | None = None) -> None:
    """Forget these, or all."""
    c = checkpoints.c
    await connection.execute(delete(checkpoints).where(c.job_uid == uid, *([] if steps is None else [c.step.in_(steps)])))


async def hold(connection: AsyncConnection, uid: str, fence: int, lease_s: float) -> None:
    """A process of ours works on a job's end: the attempt's lease lives on with it, and an erasure waits for it, of the job too."""
    until = NOW + timedelta(seconds=lease_s)
    ours = and_(_j.fence == fence, _j.lease_time.is_not(None))
    await connection.execute(
        update(jobs).where(_j.uid == uid).values(ending_time=until, lease_time=case((ours, until), else_=_j.lease_time))
    )


async def let_go(connection: AsyncConnection, uid: str) -> None:
    """It works on it no more."""
    await connection.execute(update(jobs).where(_j.uid == uid).values(ending_time=None))


# --- dependants -------------------------------------------------------------------------------------------------------------------------


async def reading(connection: AsyncConnection, project_uid: str, version_uids: Sequence[str]) -> list[Record]:
    """Jobs made from any of these dataset versions, locked."""
    from_these = or_(_j.train_uid.in_(version_uids), _j.validation_uid.in_(version_uids))
    statement = select(jobs).where(_j.project_uid == project_uid, _j.delete_time.is_(None), from_these).with_for_update()
    return list((await connection.execute(statement)).mappings())


async def publishing(connection: AsyncConnection, project_uid: str, model: str) -> list[Record]:
    """Jobs that are not at rest and would publish into this model, locked."""
    statement = select(jobs).where(and_(_j.project_uid == project_uid, _j.model == model, _j.state.in_(_live), _j.delete_time.is_(None)))
    return list((await connection.execute(statement.with_for_update())).mappings())


async def erase(connection: AsyncConnection, row: Record) -> None:
    """Fence a locked job off and empty its rows; its own stays as a tombstone, which the reconciler owns until its attempt is gone.

    Whatever its state, it ends here: nothing of a living attempt is taken from now on, and what it owes is told.
    """
    await drop_checkpoints(connection, row["uid"])
    await connection.execute(delete(job_events).where(job_events.c.job_uid == row["uid"]))
    values: dict[str, Any] = {
        "display_name": "", "labels": {}, "spec": b"", "resolved_spec": b"", "quote": b"", "salt": b"", "nonce": "",
        "fence": _j.fence + 1, "lease_time": None, "expire_time": None, "due_time": NOW, "delete_time": NOW,
    }  # fmt: skip
    if State(row["state"]) not in TERMINAL:
        values |= {"state": State.CANCELLED.value, "reason": "ERASED", "end_time": NOW}
    erased = await _row(connection, update(jobs).where(_j.uid == row["uid"]).values(**values).returning(jobs))
    owed = sql_charges.due(row, erased)
    if owed is not None:
        await _charged(connection, erased, owed)
    await connection.execute(text("SELECT pg_notify(:channel, :uid)"), {"channel": CHANNEL, "uid": row["uid"]})
