"""ApiKeyService: keys that open the fleet. No key makes, changes, revives or reveals one that may do more than itself."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

from sqlalchemy.ext.asyncio import AsyncConnection

from argosy.admin.v1 import api_key_pb2 as pb
from argosy.v1 import usage_pb2
from services.chassis import bounds, lists
from services.chassis.errors import ApiKeyInvalid, FieldInvalid, ResourceNotFound, ScopeMissing, WrongState
from services.gateway import keys, records
from services.gateway.access import SCOPES
from services.gateway.keys import Grant
from services.gateway.ledger import Tariff
from services.gateway.records import Row
from services.gateway.servicers.resources import (
    KEY_NAME,
    PROJECT_NAME,
    Desk,
    Owner,
    caller,
    moment,
    owner,
    paths,
    segments,
    timestamp,
)

SERVICE = "argosy.admin.v1.ApiKeyService"
STATES = frozenset({"ACTIVE", "DISABLED", "EXPIRED", "DELETED"})
ORDERS = frozenset({"create_time", "update_time", "display_name"})
MUTABLE = ("display_name", "labels", "expire_time", "scopes", "models", "limits")
LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrent_requests", "output_token_ceiling")


def limits_of(grant: Grant, currency: str) -> pb.KeyLimits:
    """A grant's limits as their message; what is unlimited stays unset."""
    limits = pb.KeyLimits(**{name: getattr(grant, name) for name in LIMITS if getattr(grant, name) is not None})
    if grant.nanos_per_day is not None:
        limits.cost_per_day.CopyFrom(usage_pb2.Cost(currency_code=currency, nanos=grant.nanos_per_day))
    return limits


def issued_without_secret(issued: pb.IssuedApiKey) -> pb.IssuedApiKey:
    """What may be kept of it."""
    return pb.IssuedApiKey(api_key=issued.api_key)


class ApiKeyServicer:
    """argosy.admin.v1.ApiKeyService."""

    def __init__(self, desk: Desk, tariff: Tariff, environment: str = "live") -> None:
        """`environment`, [a-z]{1,16}, is part of each key's text. Raises ValueError for another."""
        if not re.fullmatch(r"[a-z]{1,16}", environment):
            raise ValueError("the key environment must be 1 to 16 small letters")  # no key made with it could be parsed
        self._desk = desk
        self._currency = tariff.currency_code
        self._environment = environment

    async def CreateApiKey(self, request: pb.CreateApiKeyRequest, context: Any) -> pb.IssuedApiKey:
        """Make a key and show its secret, once."""
        bounds.check(request)
        grant = self._grant(request.api_key, MUTABLE, Grant(), "api_key")
        (segment,) = segments(request.parent, PROJECT_NAME, "parent")

        async def work(connection: AsyncConnection) -> tuple[pb.IssuedApiKey, Owner, str]:
            whose = await owner(connection, segment, "parent")
            await self._check_within(connection, grant, "api_key")
            minted = keys.mint(str(uuid4()), self._environment, self._desk.store.pepper)
            row = await records.add_api_key(
                connection, whose.uid, minted.uid, minted.mac, caller().key_id, grant, request.api_key.display_name,
                request.api_key.labels,
            )  # fmt: skip
            key = self._shown(row, whose)
            return pb.IssuedApiKey(api_key=key, secret=minted.token), whose, key.name

        return await self._desk.change("CreateApiKey", request, pb.IssuedApiKey, work, keep=issued_without_secret)

    async def GetApiKey(self, request: pb.GetApiKeyRequest, context: Any) -> pb.ApiKey:
        """One key, without its secret."""
        bounds.check(request)
        async with self._desk.store.transaction() as connection:
            row, whose = await self._found(connection, request.name, "name", lock=False)
        return self._shown(row, whose)

    async def ListApiKeys(self, request: pb.ListApiKeysRequest, context: Any) -> pb.ListApiKeysResponse:
        """The project's keys."""
        bounds.check(request)
        (segment,) = segments(request.parent, PROJECT_NAME, "parent")
        conditions = lists.conditions(request.filter, STATES)
        order = lists.order(request.order_by, ORDERS, "create_time")
        async with self._desk.store.transaction() as connection:
            whose = await owner(connection, segment, "parent")
            listing = self._desk.listing(request.page_size, request.page_token, "keys", whose.uid, request.filter, request.order_by)
            rows = await records.list_api_keys(connection, whose.uid, conditions, order, listing.after, listing.limit)
        shown, token = self._desk.page(listing, rows, lambda row: self._shown(row, whose), lambda row: records.after_of(row, order[0]))
        return pb.ListApiKeysResponse(api_keys=shown, next_page_token=token)

    async def UpdateApiKey(self, request: pb.UpdateApiKeyRequest, context: Any) -> pb.ApiKey:
        """Change what a key is called and may do."""
        bounds.check(request)
        asked = request.api_key
        changed = paths(asked, request.update_mask, MUTABLE)
        if "scopes" in changed and not asked.scopes:
            raise FieldInvalid("api_key.scopes", "required")

        async def work(connection: AsyncConnection) -> tuple[pb.ApiKey, Owner, str]:
            row, whose = await self._found(connection, asked.name, "api_key.name")
            lists.check_etag(asked.etag, row["uid"], row["revision"], "api_key.etag")
            if row["state"] == "DELETED":
                raise WrongState("api_key.name", row["state"])
            before = records.grant_of(row)
            grant = self._grant(asked, changed, before, "api_key")
            if grant != before:
                await self._check_within(connection, grant, "api_key")
            values: dict[str, Any] = {"display_name": asked.display_name, "labels": dict(asked.labels)}
            values = {name: value for name, value in values.items() if name in changed}
            row = await records.change_api_key(connection, whose.uid, row["uid"], **values, **records.columns_of(grant))
            return self._shown(row, whose), whose, asked.name

        return await self._desk.change("UpdateApiKey", request, pb.ApiKey, work)

    async def RotateApiKey(self, request: pb.RotateApiKeyRequest, context: Any) -> pb.IssuedApiKey:
        """Make a new secret and show it, once; the old one works on for `overlap`."""
        bounds.check(request)
        overlap_s = request.overlap.ToTimedelta().total_seconds()

        async def work(connection: AsyncConnection) -> tuple[pb.IssuedApiKey, Owner, str]:
            row, whose = await self._found(connection, request.name, "name")
            lists.check_etag(request.etag, row["uid"], row["revision"])
            if row["state"] == "DELETED":
                raise WrongState("name", row["state"])
            await self._check_not_above(connection, row)
            minted = keys.mint(row["uid"], self._environment, self._desk.store.pepper)
            row = await records.rotate_api_key(connection, whose.uid, row["uid"], minted.mac, overlap_s)
            return pb.IssuedApiKey(api_key=self._shown(row, whose), secret=minted.token), whose, request.name

        return await self._desk.change("RotateApiKey", request, pb.IssuedApiKey, work, keep=issued_without_secret)

    async def DisableApiKey(self, request: pb.DisableApiKeyRequest, context: Any) -> pb.ApiKey:
        """Refuse the key until it is enabled; safe to repeat."""
        return await self._move("DisableApiKey", request, "DISABLED", frozenset({"ACTIVE", "EXPIRED", "DISABLED"}))

    async def EnableApiKey(self, request: pb.EnableApiKeyRequest, context: Any) -> pb.ApiKey:
        """End a DisableApiKey; safe to repeat."""
        return await self._move("EnableApiKey", request, "ACTIVE", frozenset({"ACTIVE", "EXPIRED", "DISABLED"}), revives=True)

    async def DeleteApiKey(self, request: pb.DeleteApiKeyRequest, context: Any) -> pb.ApiKey:
        """Refuse the key and forget it 30 days later; safe to repeat."""
        return await self._move("DeleteApiKey", request, "DELETED", STATES)

    async def UndeleteApiKey(self, request: pb.UndeleteApiKeyRequest, context: Any) -> pb.ApiKey:
        """Bring a deleted key back, DISABLED."""
        return await self._move("UndeleteApiKey", request, "DISABLED", frozenset({"DELETED"}), revives=True)

    async def GetCaller(self, request: pb.GetCallerRequest, context: Any) -> pb.GetCallerResponse:
        """Who is asking."""
        bounds.check(request)
        who = caller()
        async with self._desk.store.transaction() as connection:
            row = await records.api_key(connection, who.project_uid, who.key_id)
            policy = await records.quota_policy(connection, who.project_uid)
        if row is None:
            raise ApiKeyInvalid
        own = records.grant_of(row)
        project = Grant(
            requests_per_minute=policy["requests_per_minute"],
            tokens_per_minute=policy["tokens_per_minute"],
            concurrent_requests=policy["concurrent_streams"],
            output_token_ceiling=policy["output_token_ceiling"],
            nanos_per_day=policy["nanos_per_day"],
        )
        smaller = {
            name: min((v for v in (getattr(own, name), getattr(project, name)) if v is not None), default=None)
            for name in (*LIMITS, "nanos_per_day")
        }
        return pb.GetCallerResponse(
            project=f"projects/{who.project}",
            api_key=f"projects/{who.project}/apiKeys/{who.key_id}",
            scopes=sorted(who.scopes),
            models=who.models,
            limits=limits_of(Grant(**smaller), self._currency),  # type: ignore[arg-type]
            expire_time=timestamp(own.expire_time),
        )

    # --- shared -----------------------------------------------------------------------------------------------------------------

    async def _move(self, method: str, request: Any, state: str, states: frozenset[str], *, revives: bool = False) -> pb.ApiKey:
        bounds.check(request)

        async def work(connection: AsyncConnection) -> tuple[pb.ApiKey, Owner, str]:
            row, whose = await self._found(connection, request.name, "name")
            lists.check_etag(request.etag, row["uid"], row["revision"])
            if row["state"] not in states:
                raise WrongState("name", row["state"])
            if revives:
                await self._check_not_above(connection, row)
            if row["state"] != state and not (state == "ACTIVE" and row["state"] == "EXPIRED"):
                if state == "DELETED":
                    row = await records.delete_api_key(connection, whose.uid, row["uid"])
                else:
                    row = await records.change_api_key(connection, whose.uid, row["uid"], state=state, delete_time=None)
            return self._shown(row, whose), whose, request.name

        return await self._desk.change(method, request, pb.ApiKey, work)

    async def _found(self, connection: AsyncConnection, name: str, field: str, *, lock: bool = True) -> tuple[Row, Owner]:
        project, uid = segments(name, KEY_NAME, field)
        whose = await owner(connection, project, field)
        row = await records.api_key(connection, whose.uid, uid, lock=lock)
        if row is None:
            raise ResourceNotFound(field)
        return row, whose

    async def _own_grant(self, connection: AsyncConnection) -> Grant:
        who = caller()
        row = await records.api_key(connection, who.project_uid, who.key_id)
        if row is None:
            raise ApiKeyInvalid
        return records.grant_of(row)

    async def _check_within(self, connection: AsyncConnection, grant: Grant, field: str) -> None:
        beyond = keys.beyond(grant, await self._own_grant(connection))
        if beyond is not None:
            raise FieldInvalid(f"{field}.{beyond}", "beyond_caller")

    async def _check_not_above(self, connection: AsyncConnection, row: Row) -> None:
        """Whoever could reveal or revive a stronger key would be as strong."""
        other, own = records.grant_of(row), await self._own_grant(connection)
        if missing := sorted(other.scopes - own.scopes):
            raise ScopeMissing(missing[0])
        if row["uid"] != caller().key_id and keys.beyond(other, own) is not None:
            raise FieldInvalid("name", "beyond_caller")

    def _grant(self, asked: pb.ApiKey, changed: Any, before: Grant, field: str) -> Grant:
        """`before` with the changed fields as asked."""
        values = {name: getattr(before, name) for name in records.GRANT_COLUMNS}
        if "scopes" in changed:
            values["scopes"] = frozenset(asked.scopes)
            if not values["scopes"] <= SCOPES:
                raise FieldInvalid(f"{field}.scopes", "unknown_scope")
        if "models" in changed:
            values["models"] = tuple(asked.models)
        if "expire_time" in changed:
            values["expire_time"] = moment(asked.expire_time) if asked.HasField("expire_time") else None
            if values["expire_time"] is not None and values["expire_time"] < datetime.now(UTC) + timedelta(seconds=1):
                raise FieldInvalid(f"{field}.expire_time", "in_the_past")
        if "limits" in changed:
            limits = asked.limits
            given = {descriptor.name for descriptor, _ in limits.ListFields()}
            values |= {name: getattr(limits, name) if name in given else None for name in LIMITS}
            values["nanos_per_day"] = limits.cost_per_day.nanos if limits.HasField("cost_per_day") else None
            if limits.HasField("cost_per_day") and limits.cost_per_day.currency_code != self._currency:
                raise FieldInvalid(f"{field}.limits.cost_per_day.currency_code", "currency")
        return Grant(**values)

    def _shown(self, row: Row, whose: Owner) -> pb.ApiKey:
        grant = records.grant_of(row)
        last_use = row["last_use_time"]
        key = pb.ApiKey(
            name=f"projects/{whose.name}/apiKeys/{row['uid']}",
            uid=row["uid"],
            display_name=row["display_name"],
            labels=row["labels"],
            etag=lists.etag(row["uid"], row["revision"]),
            state=pb.ApiKey.State.Value(f"STATE_{row['state']}"),
            create_time=timestamp(row["create_time"]),
            update_time=timestamp(row["update_time"]),
            expire_time=timestamp(grant.expire_time),
            scopes=sorted(grant.scopes),
            models=grant.models,
            key_id=keys.key_id(row["uid"]),
            last_use_time=timestamp(last_use and last_use.replace(second=0, microsecond=0)),
        )
        limits = limits_of(grant, self._currency)
        if limits.ByteSize():
            key.limits.CopyFrom(limits)
        return key
