"""Evaluations in SQL: asked for, claimed under a lease, ended once. Every statement names its project, but for the claim."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any
from uuid import uuid4

from sqlalchemy import func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from services.chassis.lists import Condition
from services.finetune.queries import Record, one, page, where
from services.finetune.schema.models import model_evaluations

LEASE = timedelta(seconds=30)
ATTEMPTS = 3  # processes that died under one evaluation before it is FAILED

_now = func.clock_timestamp()
_e = model_evaluations.c


async def evaluation(connection: AsyncConnection, project_uid: str, model_uid: str, uid: str) -> Record | None:
    """The model's evaluation of this uid."""
    return await one(connection, select(model_evaluations).where(_e.project_uid == project_uid, _e.model_uid == model_uid, _e.uid == uid))


async def waiting(connection: AsyncConnection, project_uid: str) -> int:
    """How many of a project have not ended."""
    open_ = select(func.count()).where(_e.project_uid == project_uid, _e.state.in_(("QUEUED", "RUNNING")))
    return int((await connection.execute(open_)).scalar_one())


async def list_evaluations(
    connection: AsyncConnection, project_uid: str, model_uid: str, conditions: Iterable[Condition], order: tuple[str, bool],
    after: Sequence[str] | None, limit: int,
) -> list[Record]:  # fmt: skip
    """The model's evaluations."""
    mine = (_e.project_uid == project_uid, _e.model_uid == model_uid)
    statement = select(model_evaluations).where(*mine, *where(model_evaluations, conditions))
    return await page(connection, statement, model_evaluations, order, after, limit)


async def add_evaluation(connection: AsyncConnection, project_uid: str, model_uid: str, **values: Any) -> Record:
    """A new one in QUEUED."""
    row = {"project_uid": project_uid, "model_uid": model_uid, "uid": str(uuid4()), **values}
    added = await one(connection, insert(model_evaluations).values(**row).returning(model_evaluations))
    assert added is not None  # inserted
    return added


async def claim(connection: AsyncConnection) -> Record | None:
    """The oldest evaluation that waits or whose process died, RUNNING under a new lease; None: nothing is due."""
    due = or_(_e.state == "QUEUED", (_e.state == "RUNNING") & (_e.lease_time <= _now))
    oldest = select(_e.uid).where(due).order_by(_e.create_time).limit(1).with_for_update(skip_locked=True)
    claimed = update(model_evaluations).where(_e.uid == oldest.scalar_subquery())
    values = {
        "state": "RUNNING", "attempts": _e.attempts + 1, "lease_time": _now + LEASE, "start_time": func.coalesce(_e.start_time, _now),
        "revision": _e.revision + 1, "update_time": _now,
    }  # fmt: skip
    return await one(connection, claimed.values(**values).returning(model_evaluations))


async def renew(connection: AsyncConnection, row: Record, measured_rows: int) -> bool:
    """Hold the lease on; False: it was lost, or the evaluation has ended."""
    held = await connection.execute(_held(row).values(lease_time=_now + LEASE, measured_rows=measured_rows))
    return bool(held.rowcount)


async def release(connection: AsyncConnection, row: Record, *, spent: bool = False) -> None:
    """Give the work back; `spent`: this attempt counts, since its process died."""
    await connection.execute(_held(row).values(state="QUEUED", attempts=_e.attempts - (0 if spent else 1), lease_time=None))


async def end(
    connection: AsyncConnection, row: Record, state: str, *, verdict: Mapping[str, Any] | None = None, envelope: bytes | None = None,
    failure: Mapping[str, Any] | None = None, measured_rows: int = 0,
) -> bool:  # fmt: skip
    """End it, once; False: the lease was lost meanwhile, and whoever holds it now ends it."""
    ended = _held(row).values(
        state=state, verdict=dict(verdict) if verdict else None, envelope=envelope, failure=dict(failure) if failure else None,
        measured_rows=measured_rows, lease_time=None, end_time=_now, update_time=_now, revision=_e.revision + 1,
    )  # fmt: skip
    return bool((await connection.execute(ended)).rowcount)


def _held(row: Record) -> Any:
    """The evaluation, if the claim that gave `row` still holds: each claim counts one attempt."""
    mine = (_e.project_uid == row["project_uid"], _e.uid == row["uid"], _e.attempts == row["attempts"])
    return update(model_evaluations).where(*mine, _e.state == "RUNNING")
