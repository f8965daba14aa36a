"""RegistryService: what a name means now, and what gateways are to load or to forget."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from datetime import datetime
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from argosy.v1 import content_pb2, usage_pb2
from argosy.v1.explanation_pb2 import NearestExample
from argosy_internal.registry.v1 import registry_pb2 as pb
from services.chassis import bounds
from services.chassis.errors import EventSequenceAhead, ModelCapability, ResourceNotFound, ScopeMissing, WrongState
from services.finetune import lineage, nearest, sql_charges, sql_models
from services.finetune.feed import Feed
from services.finetune.neighbours import CAPABILITY, Neighbours
from services.finetune.queries import Record
from services.finetune.servicers.model_shown import capabilities
from services.finetune.servicers.resources import NUMBER, SEGMENT, caller, own
from services.finetune.store import FineTuneStore

SERVICE = "argosy.internal.registry.v1.RegistryService"
PAGE = 200  # events of one look
CONTENT = "datasets.content"
NAME = re.compile(rf"projects/({SEGMENT})/models/({SEGMENT})(?:/versions/({NUMBER})|/aliases/({SEGMENT}))?")
METHODS = {"TRAINING": "/argosy.v1.FineTuneService/CreateFineTuneJob", "EVALUATION": "/argosy.v1.ModelService/CreateEvaluation"}
VERSION = re.compile(rf"projects/({SEGMENT})/models/({SEGMENT})/versions/({NUMBER})")

Pause = Callable[[AsyncConnection, str, str], Awaitable[int]]  # a project's jobs, or those of one key of it; returns how many
Last = Callable[[AsyncConnection], Awaitable[int]]
After = Callable[[AsyncConnection, int, int], Awaitable[list[Record]]]
# A job's event `servable`, in the transaction of the first report: (connection, project uid, job uid, version, replicas, seconds of
# loading; from READY to the report where nobody measured).
OnServable = Callable[[AsyncConnection, str, str, str, int, float], Awaitable[None]]


async def no_job_event(connection: AsyncConnection, project_uid: str, job_uid: str, version: str, replicas: int, seconds: float) -> None:
    """Where no jobs are run: an imported version has none."""


async def no_jobs(connection: AsyncConnection, project_uid: str, key_uid: str) -> int:
    """Where no jobs are run, none pauses."""
    return 0


class RegistryServicer:
    """argosy.internal.registry.v1.RegistryService."""

    def __init__(
        self,
        store: FineTuneStore,
        feed: Feed,
        on_servable: OnServable = no_job_event,
        owed: Feed | None = None,
        pause: Pause = no_jobs,
        neighbours: Neighbours | None = None,
    ) -> None:
        """`owed` wakes who follows charges; None: only a slow look does. `neighbours` None: no version has an index."""
        self._neighbours = neighbours
        self._store = store
        self._feed = feed
        self._on_servable = on_servable
        self._owed = owed or Feed(sql_charges.CHANNEL)
        self._pause = pause

    async def ResolveModel(self, request: pb.ResolveModelRequest, context: Any) -> pb.ResolveModelResponse:
        """The versions that a name means, with their shares."""
        bounds.check(request)
        segment, number, alias = own(request.name, NAME)
        project_uid = caller().project_uid
        async with self._store.transaction() as connection:
            sequence = await sql_models.last_sequence(connection)
            model = await sql_models.model(connection, project_uid, segment)
            if model is None:
                raise ResourceNotFound("name")
            followed = await sql_models.alias(connection, project_uid, model["uid"], alias or sql_models.PROD) if number is None else None
            if followed is not None:
                shares = _shares(followed)
            elif alias is not None:
                raise ResourceNotFound("name")
            elif number is not None:
                shares = {int(number): 100}
            else:
                newest = await sql_models.newest_ready(connection, project_uid, model["uid"])
                if newest is None:
                    raise WrongState("name", "no_version")
                shares = {newest["number"]: 100}
            rows = [await sql_models.version(connection, project_uid, model["uid"], wanted) for wanted in shares]
        name = f"projects/{model['project']}/models/{model['name']}"
        return pb.ResolveModelResponse(
            targets=[_target(row, share) for row, share in zip(rows, shares.values(), strict=True)],
            alias=f"{name}/aliases/{followed['name']}" if followed is not None else "",
            sequence=sequence,
        )

    async def WatchVersions(self, request: pb.WatchVersionsRequest, context: Any) -> AsyncIterator[pb.VersionEvent]:
        """Stored changes after the cursor, then live; a bookmark when all is sent and whenever it is quiet."""
        bounds.check(request)
        async for at, row in self._followed(self._feed, request.after_sequence, sql_models.last_sequence, sql_models.events):
            yield pb.VersionEvent(sequence=at, bookmark=pb.VersionBookmark()) if row is None else _event(row)

    async def WatchCharges(self, request: pb.WatchChargesRequest, context: Any) -> AsyncIterator[pb.ChargeEvent]:
        """Stored charges after the cursor, then live; what is up to the cursor is in the books, since they keep it."""
        bounds.check(request)
        async with self._store.transaction() as connection:
            await sql_charges.settled(connection, request.after_sequence)
        async for at, row in self._followed(self._owed, request.after_sequence, sql_charges.last, sql_charges.after):
            yield pb.ChargeEvent(sequence=at, bookmark=pb.ChargeBookmark()) if row is None else _charge(row)

    async def PauseJobs(self, request: pb.PauseJobsRequest, context: Any) -> pb.PauseJobsResponse:
        """What has no money left today pauses behind a checkpoint, and what waits does not start."""
        bounds.check(request)
        async with self._store.transaction() as connection:
            paused = await self._pause(connection, caller().project_uid, request.key_uid)
        return pb.PauseJobsResponse(jobs=paused)

    async def FindNearest(self, request: pb.FindNearestRequest, context: Any) -> pb.FindNearestResponse:
        """Rows that a version learnt, by how like they are to a vector. Its row says that it is not erased, at each call."""
        bounds.check(request)
        segment, number = own(request.version, VERSION, "version")
        who = caller()
        if CONTENT not in who.scopes:
            raise ScopeMissing(CONTENT)
        async with self._store.transaction() as connection:
            model = await sql_models.model(connection, who.project_uid, segment)
            row = await sql_models.version(connection, who.project_uid, model["uid"], int(number)) if model else None
        if row is None:
            raise ResourceNotFound("version")
        if row["state"] != "READY":
            raise WrongState("version", row["state"])
        manifest = lineage.from_json(row["manifest"])
        train = next((each.dataset_version for each in manifest.datasets if each.use == "train"), "")
        said = manifest.hyperparameters.get(nearest.KEY, "")
        if self._neighbours is None or manifest.HasField("privacy") or not train:
            raise ModelCapability("model", CAPABILITY)
        where = lineage.place(who.project_uid, row["adapter_digest"])
        found = await self._neighbours.find(where, said, request.vector, request.top_k)
        rows = [NearestExample(dataset_version=train, row=number, similarity=likeness) for number, likeness in found]
        return pb.FindNearestResponse(examples=rows)

    async def _followed(self, feed: Feed, at: int, last: Last, after: After) -> AsyncIterator[tuple[int, Record | None]]:
        """Rows behind a cursor, stored and then live, each with its sequence; None where all is sent, and whenever it is quiet."""
        async with self._store.transaction() as connection:
            newest = await last(connection)
        if at > newest:
            raise EventSequenceAhead(newest)
        marked = False
        while True:
            pulse = feed.pulse()
            async with self._store.transaction() as connection:
                rows = await after(connection, at, PAGE)
            for row in rows:
                at = row["sequence"]
                yield at, row
            if len(rows) == PAGE:
                continue
            if not marked or rows:
                marked = True
                yield at, None
            if not await feed.wait(pulse):
                marked = False

    async def ReportServable(self, request: pb.ReportServableRequest, context: Any) -> pb.ReportServableResponse:
        """The first report of a version is its servable time, and an event of its job; any other changes nothing."""
        bounds.check(request)
        segment, number = own(request.version, VERSION, "version")
        who = caller()
        async with self._store.transaction() as connection:
            model = await sql_models.model(connection, who.project_uid, segment)
            row = await sql_models.version(connection, who.project_uid, model["uid"], int(number), lock=True) if model else None
            if row is None:
                raise ResourceNotFound("version")
            if row["state"] != "READY":
                raise WrongState("version", row["state"])
            load_s = request.load.ToTimedelta().total_seconds() if request.HasField("load") else None
            first, row = await sql_models.report_servable(connection, row, who.key_id, request.replicas, load_s)
            if first and row["job_uid"] is not None:
                seconds = row["servable_seconds"] if load_s is None else load_s
                await self._on_servable(connection, who.project_uid, row["job_uid"], request.version, request.replicas, seconds)
        return pb.ReportServableResponse(first=first)


def _shares(alias: Record) -> dict[int, int]:
    """Version number → percent, the stable one first."""
    if alias["split"] is None:
        return {alias["target"]: 100}
    return {alias["target"]: 100 - alias["split_percent"], alias["split"]: alias["split_percent"]}


def _target(row: Record | None, percent: int) -> pb.ResolvedTarget:
    if row is None:
        raise ResourceNotFound("name")
    if row["state"] != "READY":
        raise WrongState("name", row["state"])
    manifest = lineage.from_json(row["manifest"])
    return pb.ResolvedTarget(
        percent=percent,
        model=content_pb2.ServedModel(version=manifest.version, base_digest=row["base_digest"], adapter_digest=row["adapter_digest"]),
        base_model=manifest.base_model,
        capabilities=capabilities(manifest),
        tuned_labels=manifest.labels,
        private=manifest.HasField("privacy"),
    )


def _event(row: Record) -> pb.VersionEvent:
    """A stored event as its message."""
    body: Mapping[str, Any] = row["body"]
    event = pb.VersionEvent(sequence=row["sequence"])
    if row["kind"] == "ready":
        fields = {name: value for name, value in body.items() if name != "ready_time"}
        event.ready.CopyFrom(pb.VersionReady(project_uid=row["project_uid"], **fields))
        event.ready.ready_time.FromDatetime(datetime.fromisoformat(body["ready_time"]))
    elif row["kind"] == "moved":
        event.moved.CopyFrom(pb.AliasMoved(project_uid=row["project_uid"], **body))
    else:
        event.erased.CopyFrom(pb.VersionErased(project_uid=row["project_uid"], **body))
    return event


def _charge(row: Record) -> pb.ChargeEvent:
    """A stored charge as its message."""
    said = pb.Charge(
        project_uid=row["project_uid"],
        project=f"projects/{row['project']}",
        key_uid=row["key_id"],
        work_uid=row["work_uid"],
        number=row["number"],
        method=METHODS[row["kind"]],
        model=row["model"],
        version=row["version"],
        cost=usage_pb2.Cost(currency_code=row["currency"], nanos=row["nanos"]),
        device_seconds=row["device_seconds"],
        outcome=pb.ChargeOutcome.Value(f"CHARGE_OUTCOME_{row['outcome'] or 'UNSPECIFIED'}"),
    )
    said.time.FromDatetime(row["create_time"])
    return pb.ChargeEvent(sequence=row["sequence"], charge=said)
