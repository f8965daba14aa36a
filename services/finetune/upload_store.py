"""Uploads and their parts in SQL. Every statement names its project, but for the sweeps of all."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from uuid import uuid4

from sqlalchemy import delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from services.finetune.queries import Record, one
from services.finetune.schema.datasets import dataset_versions, upload_parts, uploads

NOW = func.clock_timestamp()  # the database's
UPLOAD_KEPT = timedelta(hours=24)


async def upload(connection: AsyncConnection, project_uid: str, dataset_uid: str, uid: str, *, lock: bool = False) -> Record | None:
    """An upload that is not deleted."""
    u = uploads.c
    statement = select(uploads, (u.expire_time <= NOW).label("late")).where(
        u.project_uid == project_uid, u.dataset_uid == dataset_uid, u.uid == uid, u.state != "DELETED"
    )
    return await one(connection, statement.with_for_update() if lock else statement)


async def add_upload(connection: AsyncConnection, project_uid: str, dataset_uid: str, total_bytes: int | None, sha256: str) -> Record:
    """A new upload."""
    added = await one(
        connection,
        insert(uploads)
        .values(
            project_uid=project_uid, uid=str(uuid4()), dataset_uid=dataset_uid, total_bytes=total_bytes, sha256=sha256,
            expire_time=NOW + UPLOAD_KEPT,
        )
        .returning(uploads),
    )  # fmt: skip
    assert added is not None  # inserted
    return added


async def change_upload(connection: AsyncConnection, project_uid: str, uid: str, *conditions: Any, **values: Any) -> Record | None:
    """The upload after the change; None: `conditions` do not hold."""
    u = uploads.c
    return await one(
        connection,
        update(uploads).where(u.project_uid == project_uid, u.uid == uid, *conditions).values(**values, update_time=NOW).returning(uploads),
    )


async def add_part(
    connection: AsyncConnection, project_uid: str, uid: str, epoch: int, start: int, size: int, path: str, scan: Mapping[str, Any]
) -> Record | None:
    """A stored part becomes one of the upload's; None: another writer has come, or it is not open."""
    u = uploads.c
    changed = await change_upload(
        connection, project_uid, uid, u.state == "OPEN", u.writer_epoch == epoch, u.persisted_bytes == start, u.expire_time > NOW,
        persisted_bytes=start + size, scan=scan,
    )  # fmt: skip
    if changed is not None:
        await connection.execute(insert(upload_parts).values(project_uid=project_uid, upload_uid=uid, start=start, size=size, path=path))
    return changed


async def parts(connection: AsyncConnection, project_uid: str, uid: str) -> list[str]:
    """Object paths of what an upload has stored, in order."""
    p = upload_parts.c
    found = await connection.execute(select(p.path).where(p.project_uid == project_uid, p.upload_uid == uid).order_by(p.start))
    return list(found.scalars())


async def uploads_of(connection: AsyncConnection, project_uid: str, dataset_uid: str) -> list[Record]:
    """All uploads of a dataset that are not deleted, locked."""
    u = uploads.c
    statement = select(uploads).where(u.project_uid == project_uid, u.dataset_uid == dataset_uid, u.state != "DELETED")
    return list((await connection.execute(statement.with_for_update())).mappings())


async def stored_bytes(connection: AsyncConnection, project_uid: str) -> int:
    """Bytes of a project's live versions and open uploads, announced ones included."""
    v, u = dataset_versions.c, uploads.c
    kept = select(func.coalesce(func.sum(v.total_bytes), 0)).where(v.project_uid == project_uid, v.state != "DELETED")
    coming = select(func.coalesce(func.sum(func.greatest(u.persisted_bytes, func.coalesce(u.total_bytes, 0))), 0)).where(
        u.project_uid == project_uid, u.state == "OPEN"
    )
    found = await connection.execute(select(kept.scalar_subquery() + coming.scalar_subquery()))
    return int(found.scalar_one())


async def open_uploads(connection: AsyncConnection, project_uid: str) -> int:
    """How many uploads of a project take bytes."""
    u = uploads.c
    found = await connection.execute(select(func.count()).where(u.project_uid == project_uid, u.state == "OPEN", u.expire_time > NOW))
    return int(found.scalar_one())


async def expire_uploads(connection: AsyncConnection) -> int:
    """Close uploads whose time is over. Returns how many."""
    u = uploads.c
    late = select(u.uid).where(u.state == "OPEN", u.expire_time <= NOW).limit(100).with_for_update(skip_locked=True)
    found = await connection.execute(update(uploads).where(u.uid.in_(late.scalar_subquery())).values(state="EXPIRED", update_time=NOW))
    return int(found.rowcount)


async def full_uploads(connection: AsyncConnection, limit: int) -> list[Record]:
    """Uploads whose objects nobody needs any more: given up, or put together as a version."""
    u, v = uploads.c, dataset_versions.c
    needed = select(v.uid).where(v.project_uid == u.project_uid, v.upload_uid == u.uid, v.state == "VALIDATING").exists()
    statement = select(u.project_uid, u.uid).where(u.cleared.is_(False), u.state != "OPEN", ~needed).order_by(u.update_time).limit(limit)
    return list((await connection.execute(statement)).mappings())


async def clear_upload(connection: AsyncConnection, project_uid: str, uid: str) -> None:
    """Its objects are gone."""
    p, u = upload_parts.c, uploads.c
    await connection.execute(delete(upload_parts).where(p.project_uid == project_uid, p.upload_uid == uid))
    await connection.execute(update(uploads).where(u.project_uid == project_uid, u.uid == uid).values(cleared=True))
