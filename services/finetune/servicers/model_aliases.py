"""Aliases: the only names that move. A move goes through the gate, or is forced and audited."""

import re
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from argosy.v1 import model_pb2 as pb
from services.chassis import bounds, lists
from services.chassis.errors import EtagMismatch, FieldInvalid, ResourceNotFound, ScopeMissing, WrongState
from services.finetune import registry, replays, sql_evaluations, sql_models
from services.finetune.queries import Record, after_of
from services.finetune.registry import Aim
from services.finetune.servicers import model_shown as shown
from services.finetune.servicers.resources import NUMBER, SEGMENT, UUID_SEGMENT, Desk, caller, own

ALIAS_NAME = re.compile(rf"projects/({SEGMENT})/models/({SEGMENT})/aliases/({SEGMENT})")
VERSION_NAME = re.compile(rf"projects/({SEGMENT})/models/({SEGMENT})/versions/({NUMBER})")
EVALUATION_NAME = re.compile(rf"projects/({SEGMENT})/models/({SEGMENT})/evaluations/({UUID_SEGMENT})")
MODEL_NAME = re.compile(rf"projects/({SEGMENT})/models/({SEGMENT})")
ORDERS = frozenset({"name", "create_time", "update_time"})
FORCE = "models.force"


async def found_model(connection: AsyncConnection, segment: str, field: str, *, lock: bool = False) -> Record:
    """The caller's model of this name segment.

    Raises:
        ResourceNotFound: there is none.
    """
    row = await sql_models.model(connection, caller().project_uid, segment, lock=lock)
    if row is None:
        raise ResourceNotFound(field)
    return row


def aim_of(row: Record | None) -> Aim | None:
    """What an alias, or a move of one, points to."""
    return None if row is None else Aim(row["target"], row["split"], row["split_percent"])


class AliasMethods:
    """The part of ModelService that is about aliases."""

    desk: Desk

    async def GetModelAlias(self, request: pb.GetModelAliasRequest, context: Any) -> pb.ModelAlias:
        """One alias, with its history."""
        bounds.check(request)
        segment, name = own(request.name, ALIAS_NAME)
        async with self.desk.store.transaction() as connection:
            model = await found_model(connection, segment, "name")
            return await self._shown(connection, model, await _alias(connection, model, name))

    async def ListModelAliases(self, request: pb.ListModelAliasesRequest, context: Any) -> pb.ListModelAliasesResponse:
        """The model's aliases."""
        bounds.check(request)
        (segment,) = own(request.parent, MODEL_NAME, "parent")
        conditions = lists.conditions(request.filter, frozenset())
        order = lists.order(request.order_by, ORDERS, "name")
        listing = self.desk.listing(request.page_size, request.page_token, "aliases", request.parent, request.filter, request.order_by)
        async with self.desk.store.transaction() as connection:
            model = await found_model(connection, segment, "parent")
            rows = await sql_models.list_aliases(
                connection, model["project_uid"], model["uid"], conditions, order, listing.after, listing.limit
            )
            messages = {row["uid"]: await self._shown(connection, model, row) for row in rows}
        page, token = self.desk.page(listing, rows, lambda row: messages[row["uid"]], lambda row: after_of(row, order[0]))
        return pb.ListModelAliasesResponse(model_aliases=page, next_page_token=token)

    async def MoveModelAlias(self, request: pb.MoveModelAliasRequest, context: Any) -> pb.ModelAlias:
        """Point an alias to a version that has passed the gate against what it points to now."""
        bounds.check(request)
        segment, name = own(request.name, ALIAS_NAME)
        of, number = own(request.version, VERSION_NAME, "version")
        if of != segment:
            raise FieldInvalid("version", "other_model")
        if request.force and FORCE not in caller().scopes:
            raise ScopeMissing(FORCE)
        percent = request.percent if request.HasField("percent") else 100

        async def check(connection: AsyncConnection) -> tuple[Record, Record | None, Aim, str | None]:
            model = await found_model(connection, segment, "name", lock=True)
            version = await sql_models.version(connection, model["project_uid"], model["uid"], int(number))
            if version is None:
                raise ResourceNotFound("version")
            if version["state"] != "READY":
                raise WrongState("version", version["state"])
            row = await sql_models.alias(connection, model["project_uid"], model["uid"], name, lock=True)
            _check_etag(request.etag, row)
            before = aim_of(row)
            aim = registry.aimed(before, int(number), percent)
            evidence = None
            if not request.force and registry.needs_gate(before, aim):
                evidence = await self._evidence(connection, request, model, name)
                registry.check_gate(evidence, before, int(number), name)
            return model, row, aim, evidence.uid if evidence else None

        async def work(connection: AsyncConnection) -> pb.ModelAlias:
            model, row, aim, evaluation_uid = await check(connection)
            if row is not None and aim_of(row) == aim:
                return await self._shown(connection, model, row)
            who = caller()
            kind = shown.FORCED if request.force else "MOVED"
            key = (model["project_uid"], model["uid"], name)
            row = await sql_models.point(
                connection, *key, kind, aim.target, aim.split, aim.percent, actor=who.key_id, request_id=request.request_id,
                evaluation_uid=evaluation_uid,
            )  # fmt: skip
            if request.force:
                await replays.audit(connection, who.project_uid, who.key_id, "MoveModelAlias.force", request.name, request.request_id)
            await _tell(connection, model, name)
            return await self._shown(connection, model, row)

        if request.validate_only:
            async with self.desk.store.transaction() as connection:
                model, row, aim, _ = await check(connection)
                return shown.alias(registry.imagined(row, name, aim), model, [])
        return await self.desk.change("MoveModelAlias", request, pb.ModelAlias, work)

    async def RollbackModelAlias(self, request: pb.RollbackModelAliasRequest, context: Any) -> pb.ModelAlias:
        """Point an alias to what it pointed to before its last move."""
        bounds.check(request)
        segment, name = own(request.name, ALIAS_NAME)

        async def work(connection: AsyncConnection) -> pb.ModelAlias:
            model = await found_model(connection, segment, "name", lock=True)
            row = await _alias(connection, model, name, lock=True)
            _check_etag(request.etag, row)
            key = (model["project_uid"], model["uid"])
            past = await sql_models.moves(connection, *key, name, limit=2)
            if len(past) < 2:
                raise WrongState("name", "never_moved")
            aim = aim_of(past[1])
            assert aim is not None  # of a row
            for number in aim.versions():
                version = await sql_models.version(connection, *key, number)
                if version is None or version["state"] != "READY":
                    raise WrongState("name", "version_erased")
            row = await sql_models.point(
                connection, *key, name, shown.ROLLED_BACK, aim.target, aim.split, aim.percent, actor=caller().key_id,
                request_id=request.request_id,
            )  # fmt: skip
            await _tell(connection, model, name)
            return await self._shown(connection, model, row)

        return await self.desk.change("RollbackModelAlias", request, pb.ModelAlias, work)

    async def DeleteModelAlias(self, request: pb.DeleteModelAliasRequest, context: Any) -> pb.ModelAlias:
        """Remove an alias, and return it as it was."""
        bounds.check(request)
        segment, name = own(request.name, ALIAS_NAME)

        async def work(connection: AsyncConnection) -> pb.ModelAlias:
            model = await found_model(connection, segment, "name", lock=True)
            row = await _alias(connection, model, name, lock=True)
            _check_etag(request.etag, row)
            before = await self._shown(connection, model, row)
            await sql_models.drop_alias(connection, row, actor=caller().key_id, request_id=request.request_id)
            await _tell(connection, model, name)
            return before

        return await self.desk.change("DeleteModelAlias", request, pb.ModelAlias, work)

    async def _shown(self, connection: AsyncConnection, model: Record, row: Record) -> pb.ModelAlias:
        moves = await sql_models.moves(connection, model["project_uid"], model["uid"], row["name"])
        return shown.alias(row, model, moves)

    async def _evidence(
        self, connection: AsyncConnection, request: pb.MoveModelAliasRequest, model: Record, alias: str
    ) -> registry.Evidence | None:
        if not request.evaluation:
            return None
        segment, uid = own(request.evaluation, EVALUATION_NAME, "evaluation")
        if segment != model["name"]:
            raise FieldInvalid("evaluation", "other_model")
        row = await sql_evaluations.evaluation(connection, model["project_uid"], model["uid"], uid)
        if row is None:
            raise ResourceNotFound("evaluation")
        return registry.Evidence(row["uid"], row["state"], row["candidate"], row["current"], row["alias"])


async def _alias(connection: AsyncConnection, model: Record, name: str, *, lock: bool = False) -> Record:
    row = await sql_models.alias(connection, model["project_uid"], model["uid"], name, lock=lock)
    if row is None:
        raise ResourceNotFound("name")
    return row


async def _tell(connection: AsyncConnection, model: Record, name: str) -> None:
    whole = shown.model_name(model)
    await sql_models.emit(connection, model["project_uid"], "moved", {"model": whole, "alias": f"{whole}/aliases/{name}"})


def _check_etag(asked: str, row: Record | None) -> None:
    if row is not None:
        lists.check_etag(asked, row["uid"], row["revision"])
    elif asked:
        raise EtagMismatch
