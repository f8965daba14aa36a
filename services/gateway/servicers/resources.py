"""What the admin services share at the door: names and who may use them, masks, pages, and changes that can be repeated."""

import hashlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy.exc
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy.ext.asyncio import AsyncConnection

from services.chassis.errors import (
    FieldInvalid,
    IdempotencyKeyReused,
    RequestInFlight,
    ResourceExists,
    ResourceNotFound,
)
from services.chassis.lists import PageTokens
from services.chassis.resources import Listing, M, Paging, caller, paths, timestamp
from services.gateway import records
from services.gateway.store import Store

__all__ = [
    "KEY_NAME", "PLATFORM", "POLICY_NAME", "PROJECT_NAME", "Desk", "Listing", "Owner", "caller", "moment", "owner", "paths", "segments",
    "timestamp",
]  # fmt: skip

_SEGMENT = r"[a-z0-9-]{1,63}"
PROJECT_NAME = re.compile(rf"projects/({_SEGMENT})")
KEY_NAME = re.compile(rf"projects/({_SEGMENT})/apiKeys/([0-9a-f]{{8}}-[0-9a-f]{{4}}-[0-9a-f]{{4}}-[0-9a-f]{{4}}-[0-9a-f]{{12}})")
POLICY_NAME = re.compile(rf"projects/({_SEGMENT})/quotaPolicy")
PLATFORM = "platform"


@dataclass(frozen=True)
class Owner:
    """A project that the caller may act on."""

    uid: str
    name: str  # the segment


def segments(name: str, shape: re.Pattern[str], field: str) -> tuple[str, ...]:
    """The segments of a resource name.

    Raises:
        FieldInvalid: it has another form.
    """
    match = shape.fullmatch(name)
    if match is None:
        raise FieldInvalid(field, "resource_name")
    return match.groups()


async def owner(connection: AsyncConnection, name: str, field: str) -> Owner:
    """The project of this name segment, if the caller may act on it: its own, or any with scope `platform`.

    Raises:
        ResourceNotFound: foreign and unknown alike, and for a foreign one without a look.
    """
    who = caller()
    if name == who.project:
        return Owner(who.project_uid, name)
    if PLATFORM in who.scopes and (row := await records.project(connection, name)) is not None:
        return Owner(row["uid"], name)
    raise ResourceNotFound(field)


def moment(stamp: Timestamp) -> datetime:
    """As Python has it, exact to a microsecond."""
    return stamp.ToDatetime(UTC)


@dataclass(frozen=True)
class Desk(Paging):
    """What every admin servicer works with."""

    store: Store
    tokens: PageTokens

    async def change(
        self,
        method: str,
        request: Any,
        reply: type[M],
        work: Callable[[AsyncConnection], Awaitable[tuple[M, Owner | None, str]]],
        *,
        keep: Callable[[M], M] | None = None,
    ) -> M:
        """Run `work` in one transaction with its replay row and its audit row.

        Args:
            method: the RPC's name, part of the replay's key.
            request: has a `request_id`; the same id and body within 24 h get the kept reply.
            reply: the reply's class.
            work: makes the change; returns the reply, whose project it concerned, and the resource's name. No project: no change.
            keep: what of the reply may be kept; all of it by default.

        Raises:
            IdempotencyKeyReused, RequestInFlight: the id came with another body, or is at work.
        """
        who = caller()
        digest = hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
        request_id = request.request_id.lower()
        try:
            async with self.store.transaction() as connection:
                if request_id:
                    if not await records.claim_request(connection, who.project_uid, method, request_id):
                        raise RequestInFlight
                    kept = await records.replay(connection, who.project_uid, method, request_id)
                    if kept is not None:
                        if kept["body_digest"] != digest:
                            raise IdempotencyKeyReused
                        return reply.FromString(kept["reply"])
                message, about, resource = await work(connection)
                if about is None:
                    return message
                if request_id:
                    stored = (keep(message) if keep else message).SerializeToString()
                    await records.keep_reply(connection, who.project_uid, method, request_id, digest, stored)
                await records.audit(connection, about.uid, who.project_uid, who.key_id, method, resource, request_id)
                return message
        except sqlalchemy.exc.IntegrityError as error:
            raise ResourceExists from error
