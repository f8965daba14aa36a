"""Datasets, versions, uploads and erasures in SQL. Every statement names its project."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any
from uuid import uuid4

import msgspec
from sqlalchemy import and_, delete, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from services.chassis.errors import ResourceNotFound, WrongState
from services.chassis.lists import Condition
from services.finetune.datasets import TrainingVersion
from services.finetune.jobs import LIVE, State
from services.finetune.queries import Record, one, page, where
from services.finetune.rows import Layout, RowError
from services.finetune.schema.datasets import dataset_versions, datasets, deletions, row_errors
from services.finetune.schema.jobs import jobs
from services.finetune.schema.models import model_evaluations

READING = tuple(state.value for state in LIVE - {State.PAUSED})  # of jobs whose rows must stay
LEASE = timedelta(seconds=30)  # a validation not heard from for longer is taken over

NOW = func.clock_timestamp()  # the database's, in every transition
_live_version = dataset_versions.c.state != "DELETED"


def layout_of(row: Record) -> Layout:
    """How the rows of a dataset or version are written."""
    return msgspec.convert(row["layout"], Layout)


# --- datasets ---------------------------------------------------------------------------------------------------------------------------


async def dataset(connection: AsyncConnection, project_uid: str, name: str, *, lock: bool = False) -> Record | None:
    """The project's dataset of this name segment that is not deleted."""
    d = datasets.c
    statement = select(datasets).where(d.project_uid == project_uid, d.name == name, d.state != "DELETED")
    return await one(connection, statement.with_for_update() if lock else statement)


async def dataset_of_uid(connection: AsyncConnection, project_uid: str, uid: str, *, lock: bool = False) -> Record | None:
    """A dataset by its uid that is not deleted."""
    d = datasets.c
    statement = select(datasets).where(d.project_uid == project_uid, d.uid == uid, d.state != "DELETED")
    return await one(connection, statement.with_for_update() if lock else statement)


async def list_datasets(
    connection: AsyncConnection, project_uid: str, conditions: Iterable[Condition], order: tuple[str, bool],
    after: Sequence[str] | None, limit: int,
) -> list[Record]:  # fmt: skip
    """The project's datasets that are not deleted."""
    statement = select(datasets).where(datasets.c.project_uid == project_uid, datasets.c.state != "DELETED", *where(datasets, conditions))
    return await page(connection, statement, datasets, order, after, limit)


async def add_dataset(connection: AsyncConnection, project_uid: str, project: str, name: str, layout: Layout, **values: Any) -> Record:
    """A new dataset. Its versions count on from those of a deleted one of this name."""
    d = datasets.c
    past = select(func.coalesce(func.max(d.next_version), 1)).where(d.project_uid == project_uid, d.name == name)
    added = await one(
        connection,
        insert(datasets)
        .values(
            project_uid=project_uid, uid=str(uuid4()), project=project, name=name, layout=msgspec.to_builtins(layout),
            next_version=(await connection.execute(past)).scalar_one(), **values,
        )
        .returning(datasets),
    )  # fmt: skip
    assert added is not None  # inserted
    return added


async def change_dataset(connection: AsyncConnection, project_uid: str, uid: str, **values: Any) -> Record:
    """The dataset after the change; its row is locked by the caller."""
    d = datasets.c
    changed = {**values, "revision": d.revision + 1, "update_time": NOW}
    found = await one(connection, update(datasets).where(d.project_uid == project_uid, d.uid == uid).values(**changed).returning(datasets))
    assert found is not None  # its row is locked
    return found


async def latest_ready(connection: AsyncConnection, project_uid: str, dataset_uids: Sequence[str]) -> dict[str, int]:
    """The number of the newest READY version of each dataset that has one."""
    v = dataset_versions.c
    found = await connection.execute(
        select(v.dataset_uid, func.max(v.number).label("number"))
        .where(v.project_uid == project_uid, v.dataset_uid.in_(dataset_uids), v.state == "READY")
        .group_by(v.dataset_uid)
    )
    return {row.dataset_uid: row.number for row in found}


# --- versions ---------------------------------------------------------------------------------------------------------------------------


async def version(connection: AsyncConnection, project_uid: str, dataset_uid: str, number: int, *, lock: bool = False) -> Record | None:
    """A version that is not deleted."""
    v = dataset_versions.c
    statement = select(dataset_versions).where(
        v.project_uid == project_uid, v.dataset_uid == dataset_uid, v.number == number, _live_version
    )
    return await one(connection, statement.with_for_update() if lock else statement)


async def version_of_uid(connection: AsyncConnection, project_uid: str, uid: str) -> Record | None:
    """A version by its uid, whatever its state."""
    v = dataset_versions.c
    return await one(connection, select(dataset_versions).where(v.project_uid == project_uid, v.uid == uid))


async def versions_of(connection: AsyncConnection, project_uid: str, dataset_uid: str) -> list[Record]:
    """All versions of a dataset that are not deleted, locked."""
    v = dataset_versions.c
    statement = select(dataset_versions).where(v.project_uid == project_uid, v.dataset_uid == dataset_uid, _live_version)
    return list((await connection.execute(statement.order_by(v.number).with_for_update())).mappings())


async def list_versions(
    connection: AsyncConnection, project_uid: str, dataset_uid: str, conditions: Iterable[Condition], order: tuple[str, bool],
    after: Sequence[str] | None, limit: int,
) -> list[Record]:  # fmt: skip
    """A dataset's versions that are not deleted."""
    v = dataset_versions.c
    statement = select(dataset_versions).where(
        v.project_uid == project_uid, v.dataset_uid == dataset_uid, _live_version, *where(dataset_versions, conditions)
    )
    return await page(connection, statement, dataset_versions, order, after, limit)


async def same_bytes(connection: AsyncConnection, project_uid: str, dataset_uid: str, sha256: str, layout: Layout) -> Record | None:
    """The dataset's live version of these bytes, read this way."""
    v = dataset_versions.c
    return await one(
        connection,
        select(dataset_versions).where(
            v.project_uid == project_uid, v.dataset_uid == dataset_uid, v.sha256 == sha256, v.state.in_(("VALIDATING", "READY")),
            v.layout == msgspec.to_builtins(layout),
        ),
    )  # fmt: skip


async def add_version(connection: AsyncConnection, dataset_row: Record, layout: Layout, **values: Any) -> Record:
    """The dataset's next version; the caller holds the dataset's lock."""
    counted = await change_dataset(connection, dataset_row["project_uid"], dataset_row["uid"], next_version=datasets.c.next_version + 1)
    kept = dataset_row["retention_seconds"]
    added = await one(
        connection,
        insert(dataset_versions)
        .values(
            **{"uid": str(uuid4()), **values},
            project_uid=dataset_row["project_uid"], dataset_uid=dataset_row["uid"], number=counted["next_version"] - 1,
            layout=msgspec.to_builtins(layout), expire_time=None if kept is None else NOW + timedelta(seconds=kept),
        )
        .returning(dataset_versions),
    )  # fmt: skip
    assert added is not None  # inserted
    return added


async def change_version(connection: AsyncConnection, project_uid: str, uid: str, *conditions: Any, **values: Any) -> Record | None:
    """The version after the change; None: `conditions` do not hold."""
    v = dataset_versions.c
    changed = {**values, "revision": v.revision + 1, "update_time": NOW}
    return await one(
        connection,
        update(dataset_versions)
        .where(v.project_uid == project_uid, v.uid == uid, *conditions)
        .values(**changed)
        .returning(dataset_versions),
    )


async def bury_version(connection: AsyncConnection, project_uid: str, uid: str) -> None:
    """Leave of a version its tombstone: no name reaches it, nothing that rows said is kept. A claim stays: its validator cleans up."""
    e = row_errors.c
    await connection.execute(delete(row_errors).where(e.project_uid == project_uid, e.version_uid == uid))
    await change_version(
        connection,
        project_uid,
        uid,
        state="DELETED",
        delete_time=NOW,
        report={},
        failure=None,
        skipped_lines=[],
        upload_uid=None,
        sha256="",
    )


async def list_row_errors(
    connection: AsyncConnection, project_uid: str, version_uid: str, severity: str, after: int, limit: int
) -> list[Record]:
    """Kept findings behind ordinal `after`, in the order of their lines."""
    e = row_errors.c
    statement = select(row_errors).where(e.project_uid == project_uid, e.version_uid == version_uid, e.ordinal > after)
    if severity:
        statement = statement.where(e.severity == severity)
    return list((await connection.execute(statement.order_by(e.ordinal).limit(limit))).mappings())


async def keep_row_errors(connection: AsyncConnection, project_uid: str, version_uid: str, found: Sequence[RowError]) -> None:
    """Keep a version's findings, in place of any of an earlier attempt."""
    e = row_errors.c
    await connection.execute(delete(row_errors).where(e.project_uid == project_uid, e.version_uid == version_uid))
    if found:
        rows = [
            {"project_uid": project_uid, "version_uid": version_uid, "ordinal": ordinal, **msgspec.structs.asdict(each)}
            for ordinal, each in enumerate(found, 1)
        ]
        await connection.execute(insert(row_errors), rows)


async def version_for_training(connection: AsyncConnection, project_uid: str, name: str, field: str = "train_version") -> TrainingVersion:
    """A version that a job may read, by its resource name, whose project the caller has checked; the row is locked against deletion.

    Raises:
        ResourceNotFound: there is none of this name.
        WrongState: it is not READY.
    """
    *_, segment, _, number = name.split("/")
    parent = await dataset(connection, project_uid, segment) if number.isdecimal() and len(number) < 18 else None
    row = None if parent is None else await version(connection, project_uid, parent["uid"], int(number))
    if row is None:
        raise ResourceNotFound(field)
    v = dataset_versions.c
    held = select(v.state).where(v.project_uid == project_uid, v.uid == row["uid"]).with_for_update(read=True)
    state = (await connection.execute(held)).scalar_one()
    if state != "READY":
        raise ResourceNotFound(field) if state == "DELETED" else WrongState(field, state)
    above = f"datasets/{project_uid}/{row['dataset_uid']}/{row['uid']}"
    summary = row["report"]["summary"]
    return TrainingVersion(
        name=name,
        uid=row["uid"],
        dataset_uid=row["dataset_uid"],
        path=f"{above}/data",
        digests_path=f"{above}/digests",
        sha256=row["sha256"],
        total_bytes=row["total_bytes"],
        layout=layout_of(row),
        rows=row["rows"],
        labels=summary["labels"],
        tokens={each["base_model"]: each["tokens"] for each in summary["tokens"]},
        longest={each["base_model"]: each["longest"] for each in summary["tokens"]},
    )


# --- work: validation -------------------------------------------------------------------------------------------------------------------


async def claim_validation(connection: AsyncConnection, owner: str) -> Record | None:
    """The oldest version to validate that nobody works on, now held by `owner` (an id of this claim alone) for a lease."""
    v = dataset_versions.c
    free = (
        select(v.project_uid, v.uid)
        .where(v.state == "VALIDATING", or_(v.claim_time.is_(None), v.claim_time < NOW - LEASE))
        .order_by(v.create_time)
        .limit(1)
        .with_for_update(skip_locked=True)
        .cte()
    )
    claimed = (
        update(dataset_versions)
        .where(v.project_uid == free.c.project_uid, v.uid == free.c.uid)
        .values(claim_uid=owner, claim_time=NOW, attempts=v.attempts + 1)
        .returning(dataset_versions)
    )
    return await one(connection, claimed)


async def renew_validation(connection: AsyncConnection, project_uid: str, uid: str, owner: str, validated_bytes: int | None) -> bool:
    """Keep a claim, and report progress if there is any; False: the version is not ours to validate any more."""
    v = dataset_versions.c
    ours = and_(v.state == "VALIDATING", v.claim_uid == owner)
    told = {} if validated_bytes is None else {"validated_bytes": func.greatest(v.validated_bytes, validated_bytes)}
    return await change_version(connection, project_uid, uid, ours, **told, claim_time=NOW) is not None


async def free_validation(connection: AsyncConnection, project_uid: str, uid: str, owner: str) -> str:
    """Let another take a validation over at once, as at our own end; the attempt does not count. Returns the version's state."""
    v = dataset_versions.c
    await connection.execute(
        update(dataset_versions)
        .where(v.project_uid == project_uid, v.uid == uid, v.claim_uid == owner)
        .values(claim_uid=None, claim_time=None, attempts=v.attempts - 1)
    )
    found = await connection.execute(select(v.state).where(v.project_uid == project_uid, v.uid == uid))
    return str(found.scalar_one())


# --- erasures ---------------------------------------------------------------------------------------------------------------------------


async def deletion(connection: AsyncConnection, project_uid: str, uid: str) -> Record | None:
    """One erasure."""
    d = deletions.c
    return await one(connection, select(deletions).where(d.project_uid == project_uid, d.uid == uid))


async def add_deletion(
    connection: AsyncConnection, project_uid: str, target: str, erased: Sequence[str], prefixes: Sequence[str], digests: Mapping[str, str]
) -> Record:
    """An erasure to be done: the rows are unreachable already, the objects below `prefixes` go next.

    Args:
        connection: in the transaction that made the rows unreachable.
        project_uid: whose it is.
        target: resource name of what was asked to go.
        erased: names of all that goes, `target` included; the first 1,000 are told.
        prefixes: object paths to be emptied.
        digests: resource name → SHA-256 of what is gone, for the certificate.
    """
    added = await one(
        connection,
        insert(deletions)
        .values(
            project_uid=project_uid, uid=str(uuid4()), target=target, erased=list(erased), prefixes=list(prefixes), digests=dict(digests)
        )
        .returning(deletions),
    )
    assert added is not None  # inserted
    return added


async def running_deletions(connection: AsyncConnection, limit: int) -> list[Record]:
    """Erasures that are not done, oldest first; not those of what may still be written: by a validator, an attempt, or a job's end."""
    d, v = deletions.c, dataset_versions.c
    below = func.unnest(d.prefixes).column_valued("prefix")
    path = func.concat("datasets/", v.project_uid, "/", v.dataset_uid, "/", v.uid)
    written = (
        select(v.uid)
        .where(v.project_uid == d.project_uid, v.state == "DELETED", v.claim_uid.is_not(None), v.claim_time > NOW - LEASE)
        .where(select(below).where(func.starts_with(path, below)).exists())
        .exists()
    )
    j = jobs.c
    alive = j.delete_time.is_not(None) & j.reaped.is_(False)  # erased, and its attempt not yet seen gone
    ending = j.ending_time > NOW
    below_job = select(below).where(func.starts_with(func.concat("jobs/", j.project_uid, "/", j.uid), below)).exists()
    trained = select(j.uid).where(
        j.project_uid == d.project_uid, or_(and_(or_(alive, ending), below_job), and_(ending, j.model == d.target))
    )
    statement = select(deletions).where(d.state == "RUNNING", ~written, ~trained.exists()).order_by(d.create_time).limit(limit)
    return list((await connection.execute(statement)).mappings())


async def late_deletions(connection: AsyncConnection, older: timedelta) -> int:
    """Erasures that were asked for longer ago and are not done."""
    d = deletions.c
    return int((await connection.execute(select(func.count()).where(d.state == "RUNNING", d.create_time < NOW - older))).scalar_one())


async def expired_versions(connection: AsyncConnection, limit: int) -> list[Record]:
    """Versions whose retention is over and whose rows nobody reads, locked, with the names above them.

    What begins to read them while they are being found is seen by whoever looks again under the lock (`held`).
    """
    v, d = dataset_versions.c, datasets.c
    statement = (
        select(dataset_versions, d.project, d.name.label("dataset_name"))
        .join(datasets, and_(d.project_uid == v.project_uid, d.uid == v.dataset_uid))
        .where(v.expire_time <= NOW, v.state != "DELETED", ~_read(v.project_uid, v.uid))
        .limit(limit)
        .with_for_update(skip_locked=True, of=dataset_versions)
    )
    return list((await connection.execute(statement)).mappings())


async def held(connection: AsyncConnection, project_uid: str, uid: str) -> bool:
    """Whether a job or an evaluation that is not at rest reads the rows of a version."""
    return bool((await connection.execute(select(_read(project_uid, uid)))).scalar_one())


def _read(project_uid: Any, uid: Any) -> Any:
    """Paused jobs do not hold rows: they go with them."""
    j, e = jobs.c, model_evaluations.c
    runs = or_(and_(j.delete_time.is_(None), j.state.in_(READING)), j.reaped.is_(False))
    trained = select(j.uid).where(j.project_uid == project_uid, or_(j.train_uid == uid, j.validation_uid == uid), runs)
    measured = select(e.uid).where(e.project_uid == project_uid, e.dataset_version_uid == uid, e.state.in_(("QUEUED", "RUNNING")))
    return or_(trained.exists(), measured.exists())


async def end_deletion(connection: AsyncConnection, project_uid: str, uid: str, certificate: str) -> None:
    """Nothing is left of it."""
    d = deletions.c
    await connection.execute(
        update(deletions)
        .where(d.project_uid == project_uid, d.uid == uid, d.state == "RUNNING")
        .values(state="DONE", end_time=NOW, certificate=certificate, prefixes=[])
    )
