"""What makes a write safe to repeat: its reply, kept for 24 h in the transaction of its change; and the audit of applied changes."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from uuid import uuid4

from sqlalchemy import delete, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from services.finetune.schema.datasets import audit_events, request_replays

Record = Mapping[Any, Any]  # column → value

REPLAY_KEPT = timedelta(hours=24)
_now = func.clock_timestamp()


async def claim_request(connection: AsyncConnection, project_uid: str, method: str, request_id: str) -> bool:
    """Hold the request id until the transaction ends; False: another call holds it."""
    name = f"finetune/{project_uid}/{method}/{request_id}"
    held = await connection.execute(select(func.pg_try_advisory_xact_lock(func.hashtextextended(name, 0))))
    return bool(held.scalar())


async def replay(connection: AsyncConnection, project_uid: str, method: str, request_id: str) -> Record | None:
    """The reply kept for this request id, if it is younger than 24 h."""
    r = request_replays.c
    asked = select(r.body_digest, r.reply).where(
        r.project_uid == project_uid, r.method == method, r.request_id == request_id, r.create_time > _now - REPLAY_KEPT
    )
    return (await connection.execute(asked)).mappings().first()


async def keep_reply(connection: AsyncConnection, project_uid: str, method: str, request_id: str, digest: bytes, reply: bytes) -> None:
    """Keep a reply in the transaction of the change that it tells of."""
    r = request_replays.c
    await connection.execute(delete(request_replays).where(r.project_uid == project_uid, r.method == method, r.request_id == request_id))
    await connection.execute(
        insert(request_replays).values(project_uid=project_uid, method=method, request_id=request_id, body_digest=digest, reply=reply)
    )


async def sweep(connection: AsyncConnection) -> None:
    """Forget replies older than 24 h."""
    await connection.execute(delete(request_replays).where(request_replays.c.create_time <= _now - REPLAY_KEPT))


async def audit(connection: AsyncConnection, project_uid: str, actor_key: str, method: str, resource: str, request_id: str) -> None:
    """Note an applied change."""
    await connection.execute(
        insert(audit_events).values(
            project_uid=project_uid, uid=str(uuid4()), actor_key=actor_key, method=method, resource=resource, request_id=request_id
        )
    )
