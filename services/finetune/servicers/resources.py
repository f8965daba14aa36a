"""What the public services share at the door: names, masks, pages, and changes that can be repeated.

A name's project must be the caller's: any other, foreign or unknown, is the same RESOURCE_NOT_FOUND, without a look.
"""

import hashlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import sqlalchemy.exc
from sqlalchemy.ext.asyncio import AsyncConnection

from services.chassis.errors import (
    FieldInvalid,
    IdempotencyKeyReused,
    RequestInFlight,
    ResourceExists,
    ResourceNotFound,
)
from services.chassis.identity import Caller
from services.chassis.lists import PageTokens
from services.chassis.resources import Listing, M, Paging, caller, paths, timestamp
from services.finetune import replays
from services.finetune.store import FineTuneStore

__all__ = ["NUMBER", "SEGMENT", "UUID_SEGMENT", "Desk", "Listing", "caller", "own", "paths", "timestamp"]

SEGMENT = r"[a-z0-9-]{1,63}"
UUID_SEGMENT = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
NUMBER = r"[1-9][0-9]{0,17}"


def own(name: str, shape: re.Pattern[str], field: str = "name") -> tuple[str, ...]:
    """The segments of a resource name behind its project, which is the caller's own.

    Args:
        name: as it came.
        shape: `projects/(…)/…` with a group for each segment; the project's first.
        field: where in the request it stands.

    Raises:
        FieldInvalid: it has another form.
        ResourceNotFound: it is of another project, or of a model that is not on the key's list.
    """
    match = shape.fullmatch(name)
    if match is None:
        # A segment of another form (`versions/007`, an id that is no UUID) names nothing we ever made.
        loose = re.compile(rf"projects/{SEGMENT}(/[A-Za-z]+/{SEGMENT})*")
        raise ResourceNotFound(field) if loose.fullmatch(name) else FieldInvalid(field, "resource_name")
    project, *rest = match.groups()
    who = caller()
    if project != who.project or not _listed(who, name):
        raise ResourceNotFound(field)
    return tuple(rest)


def _listed(who: Caller, name: str) -> bool:
    """Whether the key's list of models, if it has one, has this model; what belongs to a model goes with it."""
    if not who.models or name.split("/")[2:3] != ["models"]:
        return True
    return name in who.models or "/".join(name.split("/")[:4]) in who.models


@dataclass(frozen=True)
class Desk(Paging):
    """What every servicer works with."""

    store: FineTuneStore
    tokens: PageTokens

    async def change(
        self,
        method: str,
        request: Any,
        reply: type[M],
        work: Callable[[AsyncConnection], Awaitable[M]],
        *,
        resource: Callable[[M], str] = lambda message: str(getattr(message, "name", "")),
    ) -> M:
        """Run `work` in one transaction with its replay row and its audit row.

        Args:
            method: the RPC's name, part of the replay's key.
            request: has a `request_id`; the same id and body within 24 h get the kept reply.
            reply: the reply's class.
            work: makes the change and returns the reply.
            resource: what the audit says was changed.

        Raises:
            IdempotencyKeyReused, RequestInFlight: the id came with another body, or is at work.
            ResourceExists: a unique key of the schema says so.
        """
        who = caller()
        digest = hashlib.sha256(request.SerializeToString(deterministic=True)).digest()
        request_id = request.request_id.lower()
        try:
            async with self.store.transaction() as connection:
                if request_id:
                    if not await replays.claim_request(connection, who.project_uid, method, request_id):
                        raise RequestInFlight
                    kept = await replays.replay(connection, who.project_uid, method, request_id)
                    if kept is not None:
                        if kept["body_digest"] != digest:
                            raise IdempotencyKeyReused
                        return reply.FromString(kept["reply"])
                message = await work(connection)
                if request_id:
                    await replays.keep_reply(connection, who.project_uid, method, request_id, digest, message.SerializeToString())
                await replays.audit(connection, who.project_uid, who.key_id, method, resource(message), request_id)
                return message
        except sqlalchemy.exc.IntegrityError as error:
            raise ResourceExists from error
