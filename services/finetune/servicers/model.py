"""ModelService: a project's own models and what belongs to them."""

import asyncio
import re
from collections.abc import Callable
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from argosy.v1 import deletion_pb2
from argosy.v1 import model_pb2 as pb
from services.chassis import bounds, lists
from services.chassis.errors import HasDependants, ResourceExists, ResourceNotFound
from services.chassis.objects import Objects
from services.finetune import dataset_store, model_erasure, sql_models
from services.finetune.bases import Bases
from services.finetune.datasets import Erased
from services.finetune.lineage import Signer
from services.finetune.model_erasure import ModelJobs, NoJobs
from services.finetune.queries import Record, after_of
from services.finetune.servicers import model_shown as shown
from services.finetune.servicers.dataset_messages import deletion
from services.finetune.servicers.model_aliases import MODEL_NAME, VERSION_NAME, AliasMethods, found_model
from services.finetune.servicers.model_checkpoints import CheckpointMethods
from services.finetune.servicers.model_evaluations import EvaluationMethods
from services.finetune.servicers.model_transfers import ARRIVALS, CHECKS
from services.finetune.servicers.resources import SEGMENT, Desk, caller, own, paths

SERVICE = "argosy.v1.ModelService"
PROJECT_NAME = re.compile(rf"projects/({SEGMENT})")
MUTABLE = ("display_name", "labels")
MODEL_ORDERS = frozenset({"name", "create_time", "update_time", "display_name"})
VERSION_ORDERS = frozenset({"create_time", "update_time"})
VERSION_STATES = frozenset({"CHECKING", "READY", "REJECTED"})


class ModelServicer(AliasMethods, CheckpointMethods, EvaluationMethods):
    """argosy.v1.ModelService, less the shared bases, which the gateway lists."""

    def __init__(
        self,
        desk: Desk,
        objects: Objects,
        bases: Bases,
        signer: Signer,
        jobs: ModelJobs | None = None,
        erase: Callable[[], None] = lambda: None,
        evaluate: Callable[[], None] = lambda: None,
    ) -> None:
        """`erase` is called when there is something to erase, `evaluate` when there is something to measure."""
        self.desk = desk
        self.objects = objects
        self.bases = bases
        self.signer = signer
        self.evaluate = evaluate
        self.arrivals, self.checks = asyncio.Semaphore(ARRIVALS), asyncio.Semaphore(CHECKS)
        self._jobs = jobs or NoJobs()
        self._erase = erase

    async def CreateModel(self, request: pb.CreateModelRequest, context: Any) -> pb.Model:
        """Make a model without a version."""
        bounds.check(request)
        own(request.parent, PROJECT_NAME, "parent")
        asked = request.model
        if asked.base_model not in self.bases.names:
            raise ResourceNotFound("model.base_model")
        who = caller()

        async def work(connection: AsyncConnection) -> pb.Model:
            row = await sql_models.add_model(
                connection, who.project_uid, who.project, request.model_id, asked.base_model, asked.display_name, asked.labels
            )
            if row is None:
                raise ResourceExists("model_id")
            return shown.model(row, None, self.bases.known(row["base_model"]))

        return await self.desk.change("CreateModel", request, pb.Model, work)

    async def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.Model:
        """One own model."""
        bounds.check(request)
        (segment,) = own(request.name, MODEL_NAME)
        async with self.desk.store.transaction() as connection:
            return await self._model(connection, await found_model(connection, segment, "name"))

    async def ListModels(self, request: pb.ListModelsRequest, context: Any) -> pb.ListModelsResponse:
        """The project's own models."""
        bounds.check(request)
        who = caller()
        own(request.parent or f"projects/{who.project}", PROJECT_NAME, "parent")
        conditions = lists.conditions(request.filter, frozenset())
        order = lists.order(request.order_by, MODEL_ORDERS, "name")
        listing = self.desk.listing(request.page_size, request.page_token, "models", request.filter, request.order_by)
        async with self.desk.store.transaction() as connection:
            rows = await sql_models.list_models(connection, who.project_uid, conditions, order, listing.after, listing.limit)
            defaults = await sql_models.default_versions(connection, who.project_uid, [row["uid"] for row in rows])
        page, token = self.desk.page(
            listing,
            rows,
            lambda row: shown.model(row, defaults.get(row["uid"]), self.bases.known(row["base_model"])),
            lambda row: after_of(row, order[0]),
        )
        return pb.ListModelsResponse(models=page, next_page_token=token)

    async def UpdateModel(self, request: pb.UpdateModelRequest, context: Any) -> pb.Model:
        """Change display name and labels."""
        bounds.check(request)
        asked = request.model
        fields = paths(asked, request.update_mask, MUTABLE)
        (segment,) = own(asked.name, MODEL_NAME, "model.name")

        async def work(connection: AsyncConnection) -> pb.Model:
            row = await found_model(connection, segment, "model.name", lock=True)
            lists.check_etag(asked.etag, row["uid"], row["revision"], "model.etag")
            values: dict[str, Any] = {"display_name": asked.display_name, "labels": dict(asked.labels)}
            row = await sql_models.change_model(connection, row["project_uid"], row["uid"], **{field: values[field] for field in fields})
            return await self._model(connection, row)

        return await self.desk.change("UpdateModel", request, pb.Model, work)

    async def DeleteModel(self, request: pb.DeleteModelRequest, context: Any) -> deletion_pb2.Deletion:
        """Put a model out of reach with all below it; the bytes go next."""
        bounds.check(request)
        (segment,) = own(request.name, MODEL_NAME)

        async def work(connection: AsyncConnection) -> deletion_pb2.Deletion:
            row = await found_model(connection, segment, "name", lock=True)
            lists.check_etag(request.etag, row["uid"], row["revision"])
            if request.cascade:
                await self._jobs.cancel_of_model(connection, row["project_uid"], request.name)
            elif await sql_models.has_versions(connection, row["project_uid"], row["uid"]) or await self._jobs.of_model(
                connection, row["project_uid"], request.name
            ):
                raise HasDependants
            gone = await model_erasure.erase_model(connection, row, caller().key_id)
            return await _deletion(connection, request.name, gone)

        made = await self.desk.change("DeleteModel", request, deletion_pb2.Deletion, work, resource=lambda made: made.target)
        self._erase()
        return made

    async def _model(self, connection: AsyncConnection, row: Record) -> pb.Model:
        defaults = await sql_models.default_versions(connection, row["project_uid"], [row["uid"]])
        return shown.model(row, defaults.get(row["uid"]), self.bases.known(row["base_model"]))

    async def GetModelVersion(self, request: pb.GetModelVersionRequest, context: Any) -> pb.ModelVersion:
        """One version, with its model card and signed manifest."""
        bounds.check(request)
        segment, number = own(request.name, VERSION_NAME)
        async with self.desk.store.transaction() as connection:
            model = await found_model(connection, segment, "name")
            row = await _version(connection, model, int(number))
        return shown.version(row, model, whole=True)

    async def ListModelVersions(self, request: pb.ListModelVersionsRequest, context: Any) -> pb.ListModelVersionsResponse:
        """The model's versions."""
        bounds.check(request)
        (segment,) = own(request.parent, MODEL_NAME, "parent")
        conditions = lists.conditions(request.filter, VERSION_STATES)
        order = lists.order(request.order_by, VERSION_ORDERS, "create_time")
        listing = self.desk.listing(request.page_size, request.page_token, "versions", request.parent, request.filter, request.order_by)
        async with self.desk.store.transaction() as connection:
            model = await found_model(connection, segment, "parent")
            key = (model["project_uid"], model["uid"])
            rows = await sql_models.list_versions(connection, *key, conditions, order, listing.after, listing.limit)
        page, token = self.desk.page(listing, rows, lambda row: shown.version(row, model), lambda row: after_of(row, order[0]))
        return pb.ListModelVersionsResponse(model_versions=page, next_page_token=token)

    async def DeleteModelVersion(self, request: pb.DeleteModelVersionRequest, context: Any) -> deletion_pb2.Deletion:
        """Put a version out of reach, here and in every replica; the bytes go next."""
        bounds.check(request)
        segment, number = own(request.name, VERSION_NAME)

        async def work(connection: AsyncConnection) -> deletion_pb2.Deletion:
            model = await found_model(connection, segment, "name", lock=True)
            row = await _version(connection, model, int(number), lock=True)
            lists.check_etag(request.etag, row["uid"], row["revision"])
            if not request.cascade and await sql_models.aliases_of(connection, row["project_uid"], row["model_uid"], row["number"]):
                raise HasDependants
            gone = await model_erasure.erase_version(connection, model, row, caller().key_id)
            return await _deletion(connection, request.name, gone)

        made = await self.desk.change("DeleteModelVersion", request, deletion_pb2.Deletion, work, resource=lambda made: made.target)
        self._erase()
        return made


async def _version(connection: AsyncConnection, model: Record, number: int, *, lock: bool = False) -> Record:
    row = await sql_models.version(connection, model["project_uid"], model["uid"], number, lock=lock)
    if row is None:
        raise ResourceNotFound("name")
    return row


async def _deletion(connection: AsyncConnection, target: str, gone: Erased) -> deletion_pb2.Deletion:
    who = caller()
    row = await dataset_store.add_deletion(connection, who.project_uid, target, gone.names, gone.prefixes, gone.digests)
    return deletion(row, who.project)
