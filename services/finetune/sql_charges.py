"""What jobs and evaluations owe, in SQL: written in the transaction of the change that it is for, read by the gateways behind a cursor.

A charge is named by its work and number, and never changed: whoever is told twice settles once. The books are the gateway's.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncConnection

from services.finetune.queries import Record
from services.finetune.schema.charges import charge_counter, charges

CHANNEL = "argosy_charges"
STEP_SECONDS = 60.0  # of the device: what a running job owes is told so often
KEPT = timedelta(days=35)  # of what is in the books: longer than any backup of them is old

_c = charge_counter.c


@dataclass(frozen=True)
class Charge:
    """What a work owes since its last charge."""

    project_uid: str
    project: str
    key_id: str
    work_uid: str
    number: int
    kind: str  # TRAINING or EVALUATION
    model: str  # resource name
    version: str  # resource name; empty: none
    currency: str
    nanos: int
    device_seconds: float
    outcome: str  # empty: it goes on


def nanos_of(seconds: float, nanos_per_second: int) -> int:
    """The price of seconds of the device, rounded up to 1e-9 of the currency's unit."""
    return math.ceil(float(seconds) * int(nanos_per_second))


def outcome_of(state: str, reason: str) -> str:
    """How a job that rests for good ended, in the words of the books; empty for one that does not."""
    if state == "FAILED":
        return "DEADLINE" if reason == "DEADLINE" else "FAILED"
    return {"SUCCEEDED": "DONE", "CANCELLED": "CANCELLED"}.get(state, "")


def due(before: Mapping[Any, Any], after: Mapping[Any, Any]) -> Charge | None:
    """What a job's change makes it owe: at its end, when its attempt is over, and every so often while it runs.

    Args:
        before: its row before the change.
        after: its row.
    """
    moved = before["state"] != after["state"]
    outcome = outcome_of(after["state"], after["reason"]) if moved else ""
    seconds = float(after["device_seconds"]) - float(after["charged_seconds"])
    rests = moved and after["state"] in ("QUEUED", "PAUSED") and seconds > 0
    if not outcome and not rests and seconds < STEP_SECONDS:
        return None
    return Charge(
        after["project_uid"], after["project"], after["key_id"], after["uid"], after["charges"] + 1, "TRAINING", after["model"],
        after["model_version"], after["currency"], nanos_of(after["device_seconds"], after["nanos_per_second"]) - after["charged_nanos"],
        max(0.0, seconds), outcome,
    )  # fmt: skip


async def add(connection: AsyncConnection, owed: Charge) -> None:
    """Tell the books, at commit. The last statement of a transaction: others wait for its end."""
    raised = upsert(charge_counter).values(one=True, last=1, settled=0)
    raised = raised.on_conflict_do_update(index_elements=[_c.one], set_={"last": _c.last + 1})
    sequence = (await connection.execute(raised.returning(_c.last))).scalar_one()
    values = {name: getattr(owed, name) for name in Charge.__dataclass_fields__}
    await connection.execute(insert(charges).values(sequence=sequence, **values))


async def last(connection: AsyncConnection) -> int:
    """The newest charge's sequence; 0: there is none."""
    return int((await connection.execute(select(func.coalesce(func.max(_c.last), 0)))).scalar_one())


async def after(connection: AsyncConnection, sequence: int, limit: int) -> list[Record]:
    """Charges behind a cursor, in order."""
    c = charges.c
    return list((await connection.execute(select(charges).where(c.sequence > sequence).order_by(c.sequence).limit(limit))).mappings())


async def settled(connection: AsyncConnection, sequence: int) -> None:
    """The books hold all up to this one."""
    await connection.execute(update(charge_counter).where(_c.settled < sequence, _c.last >= sequence).values(settled=sequence))


async def fold(connection: AsyncConnection) -> None:
    """Forget what has long been in the books."""
    c = charges.c
    known = select(func.coalesce(func.max(_c.settled), 0)).scalar_subquery()
    await connection.execute(delete(charges).where(c.sequence <= known, c.create_time < func.clock_timestamp() - KEPT))
