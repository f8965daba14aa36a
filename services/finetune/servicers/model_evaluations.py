"""Evaluations as resources: asked for, read, listed. They run elsewhere."""

import secrets
from collections.abc import Callable
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from argosy.v1 import model_pb2 as pb
from argosy.v1.finetune_pb2 import TuneMethod
from argosy_internal.training.v1.training_pb2 import AdapterManifest
from services.chassis import bounds, lists
from services.chassis.errors import FieldInvalid, QuotaExceeded, ResourceNotFound, WrongState
from services.chassis.objects import ObjectMissing, Objects
from services.finetune import dataset_store, lineage, planning, sql_evaluations, sql_models
from services.finetune.datasets import TrainingVersion
from services.finetune.overlap import shared_rows
from services.finetune.queries import after_of
from services.finetune.servicers import model_shown as shown
from services.finetune.servicers.dataset import VERSION_NAME as DATASET_VERSION_NAME
from services.finetune.servicers.model_aliases import EVALUATION_NAME, MODEL_NAME, VERSION_NAME, found_model
from services.finetune.servicers.resources import Desk, caller, own

ORDERS = frozenset({"create_time", "update_time"})
STATES = frozenset({"QUEUED", "RUNNING", "PASSED", "NOT_PASSED", "FAILED"})
MEASURES = {
    TuneMethod.TUNE_METHOD_CLASSIFY: ("classify", "ACCURACY"),
    TuneMethod.TUNE_METHOD_CHAT: ("chat", "LOSS"),
    TuneMethod.TUNE_METHOD_PREFERENCE: ("preference", "ACCURACY"),
}
AT = "evaluation."
SEED_BITS = 48
MOST_WAITING = 16  # of one project: they are measured one after the other, and other projects wait behind them


class EvaluationMethods:
    """The part of ModelService that is about evaluations."""

    desk: Desk
    objects: Objects
    evaluate: Callable[[], None]  # there is one to do

    async def CreateEvaluation(self, request: pb.CreateEvaluationRequest, context: Any) -> pb.Evaluation:
        """Ask for a version to be measured against the alias's target and the base, on rows that none of them was trained on."""
        bounds.check(request)
        asked = request.evaluation
        (segment,) = own(request.parent, MODEL_NAME, "parent")
        of, number = own(asked.candidate, VERSION_NAME, AT + "candidate")
        own(asked.dataset_version, DATASET_VERSION_NAME, AT + "dataset_version")
        if of != segment:
            raise FieldInvalid(AT + "candidate", "other_model")
        planning.affordable(caller())

        async def work(connection: AsyncConnection) -> pb.Evaluation:
            model = await found_model(connection, segment, "parent")
            key = (model["project_uid"], model["uid"])
            candidate = await sql_models.version(connection, *key, int(number))
            if candidate is None:
                raise ResourceNotFound(AT + "candidate")
            if candidate["state"] != "READY":
                raise WrongState(AT + "candidate", candidate["state"])
            manifest = lineage.from_json(candidate["manifest"])
            if manifest.method not in MEASURES:
                raise FieldInvalid(AT + "candidate", "method")
            form, metric = MEASURES[manifest.method]
            held_out = await dataset_store.version_for_training(connection, key[0], asked.dataset_version, AT + "dataset_version")
            if held_out.layout.format != form:
                raise FieldInvalid(AT + "dataset_version", "format")
            name = asked.alias or sql_models.PROD
            alias = await sql_models.alias(connection, *key, name)
            current = alias["target"] if alias is not None and alias["target"] != candidate["number"] else None
            rivals = [manifest]
            if current is not None and (rival := await sql_models.version(connection, *key, current)) is not None:
                rivals.append(lineage.from_json(rival["manifest"]))
                if rivals[-1].method != manifest.method:
                    raise FieldInvalid(AT + "candidate", "method")
            await self._check_disjoint(connection, key[0], rivals, held_out)
            if await sql_evaluations.waiting(connection, key[0]) >= MOST_WAITING:
                raise QuotaExceeded("evaluations")
            row = await sql_evaluations.add_evaluation(
                connection, *key, candidate=candidate["number"], current=current, alias=name, dataset_version=held_out.name,
                dataset_version_uid=held_out.uid, dataset_digest=held_out.sha256, metric=metric, margin=asked.margin,
                max_rows=asked.max_rows if asked.HasField("max_rows") else None, seed=secrets.randbits(SEED_BITS),
                key_id=caller().key_id,
            )  # fmt: skip
            return shown.evaluation(row, model)

        made = await self.desk.change("CreateEvaluation", request, pb.Evaluation, work)
        self.evaluate()
        return made

    async def GetEvaluation(self, request: pb.GetEvaluationRequest, context: Any) -> pb.Evaluation:
        """One evaluation."""
        bounds.check(request)
        segment, uid = own(request.name, EVALUATION_NAME)
        async with self.desk.store.transaction() as connection:
            model = await found_model(connection, segment, "name")
            row = await sql_evaluations.evaluation(connection, model["project_uid"], model["uid"], uid)
        if row is None:
            raise ResourceNotFound("name")
        return shown.evaluation(row, model)

    async def ListEvaluations(self, request: pb.ListEvaluationsRequest, context: Any) -> pb.ListEvaluationsResponse:
        """The model's evaluations."""
        bounds.check(request)
        (segment,) = own(request.parent, MODEL_NAME, "parent")
        conditions = lists.conditions(request.filter, STATES)
        order = lists.order(request.order_by, ORDERS, "create_time")
        listing = self.desk.listing(request.page_size, request.page_token, "evaluations", request.parent, request.filter, request.order_by)
        async with self.desk.store.transaction() as connection:
            model = await found_model(connection, segment, "parent")
            key = (model["project_uid"], model["uid"])
            rows = await sql_evaluations.list_evaluations(connection, *key, conditions, order, listing.after, listing.limit)
        page, token = self.desk.page(listing, rows, lambda row: shown.evaluation(row, model), lambda row: after_of(row, order[0]))
        return pb.ListEvaluationsResponse(evaluations=page, next_page_token=token)

    async def _check_disjoint(
        self, connection: AsyncConnection, project_uid: str, manifests: list[AdapterManifest], held_out: TrainingVersion
    ) -> None:
        """Refuse rows that a compared version was trained on, by their digests."""
        trained = {each.dataset_version for manifest in manifests for each in manifest.datasets if each.use == "train"}
        for name in sorted(trained):
            try:
                train = await dataset_store.version_for_training(connection, project_uid, name, AT + "dataset_version")
                shared = await shared_rows(self.objects, train, held_out)
            except ObjectMissing:
                raise WrongState(AT + "dataset_version", "digests_missing") from None
            if shared:
                raise FieldInvalid(AT + "dataset_version", "trained_on")
