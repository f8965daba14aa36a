"""FineTuneService: jobs are asked for, moved and watched here; what happens to them is the reconciler's and the attempts' doing."""

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import timedelta
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection

from argosy.v1 import deletion_pb2
from argosy.v1 import finetune_pb2 as pb
from services.chassis import bounds, lists
from services.chassis.channel import remaining
from services.chassis.errors import (
    EventSequenceAhead,
    FieldInvalid,
    FieldOutOfRange,
    ModelCapability,
    PrivacyBudgetExceeded,
    QuotaExceeded,
    ResourceNotFound,
    WrongState,
)
from services.chassis.objects import Objects
from services.finetune import dataset_store, events, planning, quotes, sql_jobs, sql_privacy
from services.finetune.bases import Bases
from services.finetune.datasets import TrainingVersion
from services.finetune.feed import Feed
from services.finetune.jobs import LIVE, TERMINAL, State
from services.finetune.overlap import shared_rows
from services.finetune.privacy import Budget, Spent
from services.finetune.queries import Record, after_of
from services.finetune.reconciler import wanted
from services.finetune.servicers.dataset_messages import deletion
from services.finetune.servicers.resources import SEGMENT, UUID_SEGMENT, Desk, caller, own, timestamp
from services.finetune.servicers.training import name_of, spent
from services.finetune.settings import JobQuotas

SERVICE = "argosy.v1.FineTuneService"
PROJECT_NAME = re.compile(rf"projects/({SEGMENT})")
JOB_NAME = re.compile(rf"projects/({SEGMENT})/fineTuneJobs/({UUID_SEGMENT})")
MODEL_NAME = re.compile(rf"projects/({SEGMENT})/models/({SEGMENT})")
VERSION_NAME = re.compile(rf"projects/({SEGMENT})/datasets/({SEGMENT})/versions/([1-9][0-9]{{0,17}})")
ORDERS = frozenset({"create_time", "update_time"})
STATES = frozenset(State)
PAGE_EVENTS = 500
AHEAD = timedelta(seconds=55)  # of a deadline: a minute, less what a call takes
ANSWER_SECONDS = 0.5  # of the deadline, kept from a long poll to answer with what there is
BOOKMARK_SECONDS = 15.0
SERVABLE_SECONDS = 60.0  # a watch waits so long for `servable` after SUCCEEDED


class FineTuneServicer:
    """argosy.v1.FineTuneService."""

    def __init__(
        self,
        desk: Desk,
        objects: Objects,
        feed: Feed,
        quotas: JobQuotas,
        bases: Bases,
        changed: Callable[[], None] = lambda: None,
        erase: Callable[[], None] = lambda: None,
        device: str = "cpu",
    ) -> None:
        """`changed` wakes the reconciler, `erase` the eraser."""
        self.desk = desk
        self._objects = objects
        self._feed = feed
        self._quotas = quotas
        self._bases = bases
        self._changed = changed
        self._erase = erase
        self._device = device

    # --- create -------------------------------------------------------------------------------------------------------------------------

    async def CreateFineTuneJob(self, request: pb.CreateFineTuneJobRequest, context: Any) -> pb.FineTuneJob:
        """A job in QUEUED, or with `validate_only` what it would be."""
        bounds.check(request)
        own(request.parent, PROJECT_NAME, "parent")
        asked = request.fine_tune_job
        if asked.model:
            own(asked.model, MODEL_NAME, "fine_tune_job.model")
        if request.validate_only:
            async with self.desk.store.transaction() as connection:
                planned = await self._planned(connection, asked)
                planned.pop("private", None)
                return shown(planned)

        async def work(connection: AsyncConnection) -> pb.FineTuneJob:
            values = await self._planned(connection, asked)
            await self._within_quota(connection, values)
            private = values.pop("private", None)
            row = await sql_jobs.add(connection, values)
            if private is not None:
                await self._reserved(connection, row, *private)
            return shown(row)

        made = await self.desk.change("CreateFineTuneJob", request, pb.FineTuneJob, work)
        self._changed()
        return made

    async def _planned(self, connection: AsyncConnection, asked: pb.FineTuneJob) -> dict[str, Any]:
        """Everything of a job's row that the caller and the rows decide.

        Raises:
            ResourceNotFound: base, version or model are not there.
            FieldInvalid, FieldOutOfRange: the spec contradicts itself, or the rows.
            WrongState: a version is not READY.
            ModelCapability: what is asked is not done here.
        """
        spec, who = asked.spec, caller()
        path = "fine_tune_job.spec"
        base = await self._bases.get(spec.base_model, f"{path}.base_model")
        if not asked.model:
            raise FieldInvalid("fine_tune_job.model", "required")
        if spec.method not in planning.METHODS:
            raise FieldInvalid(f"{path}.method", "required")
        # Its reference is the base, which a run that changes every weight no longer has; nor is it a sum over single examples.
        if spec.method == pb.TUNE_METHOD_PREFERENCE and (spec.WhichOneof("adapter") == "full" or spec.HasField("privacy")):
            raise ModelCapability(f"{path}.method", "PREFERENCE")
        train = await self._version(connection, spec.train_version, f"{path}.train_version", spec.method)
        held: TrainingVersion | None = None
        if spec.validation_version:
            held = await self._version(connection, spec.validation_version, f"{path}.validation_version", spec.method)
            if held.uid == train.uid:
                raise FieldInvalid(f"{path}.validation_version", "same_as_train")
            if await shared_rows(self._objects, train, held):
                raise FieldInvalid(f"{path}.validation_version", "V12.shared_rows")
        if spec.method == pb.TUNE_METHOD_CLASSIFY and len(train.labels) < 2:
            raise FieldInvalid(f"{path}.train_version", "one_label")
        now = await sql_jobs.now(connection)
        if asked.HasField("deadline") and asked.deadline.ToDatetime(tzinfo=now.tzinfo) < now + AHEAD:
            raise FieldInvalid("fine_tune_job.deadline", "under_a_minute_ahead")
        resolved, size = planning.resolved(spec, base, train, held)
        measured = await sql_jobs.rate(connection, spec.base_model, planning.METHODS[spec.method])
        speed = quotes.rate(measured["tokens_per_second"] if measured is not None else None, base.weights)
        quote = planning.quote(
            resolved, base, size, speed, self._quotas.training_nanos_per_second, self._quotas.cost_currency, self._device
        )
        private = await self._private(connection, resolved, train, quote) if resolved.HasField("privacy") else {}
        planning.affordable(who, quote.low_cost.nanos, quote.device_seconds.low)
        limit = self._quotas.training_tokens_per_job
        if limit and size.tokens > limit:
            raise FieldOutOfRange(f"{path}.train_version", size.tokens, limit, "tokens")
        max_nanos = None
        if asked.HasField("max_cost"):
            if asked.max_cost.currency_code not in ("", self._quotas.cost_currency):
                raise FieldInvalid("fine_tune_job.max_cost.currency_code", "other_currency")
            max_nanos = asked.max_cost.nanos
            if max_nanos < quote.low_cost.nanos:
                raise FieldOutOfRange("fine_tune_job.max_cost", max_nanos, quote.low_cost.nanos, "nanos")
        digest = hashlib.sha256(f"rules {quotes.RULES} ".encode() + resolved.SerializeToString(deterministic=True)).hexdigest()
        return {
            "project_uid": who.project_uid, "project": who.project, "key_id": who.key_id, "display_name": asked.display_name,
            "labels": dict(asked.labels), "spec": spec.SerializeToString(), "resolved_spec": resolved.SerializeToString(),
            "spec_digest": digest, "quote": quote.SerializeToString(), "model": asked.model, "base_model": spec.base_model,
            "train_uid": train.uid, "validation_uid": held.uid if held is not None else None, "train_tokens": size.tokens,
            "priority": asked.priority or pb.JOB_PRIORITY_NORMAL, "currency": self._quotas.cost_currency,
            "nanos_per_second": self._quotas.training_nanos_per_second, "max_nanos": max_nanos, "target_step": 0,
            "deadline": asked.deadline.ToDatetime(tzinfo=now.tzinfo) if asked.HasField("deadline") else None,
        } | private  # fmt: skip

    async def _private(
        self, connection: AsyncConnection, spec: pb.FineTuneSpec, train: TrainingVersion, quote: pb.Quote
    ) -> dict[str, tuple[TrainingVersion, Spent]]:
        """What the job would take of its dataset's privacy, into its quote. Raises PrivacyBudgetExceeded where that is not left."""
        if spec.privacy.unit == pb.PRIVACY_UNIT_USER:
            raise FieldInvalid("fine_tune_job.spec.privacy.unit", "no_user_column")
        asked = Spent(spec.privacy.epsilon, spec.privacy.delta)
        budget = await self._budget(connection, train)
        said = pb.PrivacyBudget(
            spent_epsilon=budget.spent.epsilon, asked_epsilon=asked.epsilon, epsilon_ceiling=budget.epsilon or None,
            spent_delta=budget.spent.delta, asked_delta=asked.delta, delta_ceiling=budget.delta,
        )  # fmt: skip
        quote.privacy.CopyFrom(said)
        _check(budget, asked)
        return {"private": (train, asked)}

    async def _budget(self, connection: AsyncConnection, train: TrainingVersion) -> Budget:
        used = await sql_privacy.spent(connection, caller().project_uid, train.dataset_uid, train.sha256)
        return Budget(used, self._quotas.privacy_epsilon_per_dataset, train.rows)

    async def _reserved(self, connection: AsyncConnection, row: Record, train: TrainingVersion, asked: Spent) -> None:
        """Looked at again behind the lock that creations of one project share: two at once may not both have the last of it."""
        _check(await self._budget(connection, train), asked)
        await sql_privacy.add(connection, row["project_uid"], row["uid"], train.dataset_uid, train.sha256, asked)

    async def _version(self, connection: AsyncConnection, name: str, field: str, method: int) -> TrainingVersion:
        own(name, VERSION_NAME, field)
        found = await dataset_store.version_for_training(connection, caller().project_uid, name, field)
        if found.layout.format != planning.METHODS[method].lower():  # type: ignore[index]
            raise FieldInvalid(field, "format")
        if not found.rows:
            raise FieldInvalid(field, "no_rows")
        return found

    async def _within_quota(self, connection: AsyncConnection, values: Mapping[str, Any]) -> None:
        """Behind the lock that creations of one project share: two at once may not both have the last of it."""
        tokens = values["train_tokens"]
        alive, recent = await sql_jobs.counts(connection, caller().project_uid)
        quotas = self._quotas
        most = caller().concurrent_jobs
        if most is not None and alive >= most:
            raise QuotaExceeded("concurrent_jobs", alive + 1, most)
        if quotas.jobs_per_project and alive >= quotas.jobs_per_project:
            raise QuotaExceeded("jobs")
        if quotas.training_tokens_per_day and recent + tokens > quotas.training_tokens_per_day:
            raise QuotaExceeded("training_tokens_per_day")
        who, quote = caller(), pb.Quote.FromString(values["quote"])
        if who.job_nanos_left is not None or who.job_seconds_left is not None:
            left = planning.less_begun(who, await sql_jobs.begun(connection, who.project_uid))
            planning.affordable(left, quote.low_cost.nanos, quote.device_seconds.low)

    # --- read ---------------------------------------------------------------------------------------------------------------------------

    async def GetFineTuneJob(self, request: pb.GetFineTuneJobRequest, context: Any) -> pb.FineTuneJob:
        """One job."""
        bounds.check(request)
        async with self.desk.store.transaction() as connection:
            return shown(await _job(connection, request.name))

    async def ListFineTuneJobs(self, request: pb.ListFineTuneJobsRequest, context: Any) -> pb.ListFineTuneJobsResponse:
        """The project's jobs."""
        bounds.check(request)
        own(request.parent, PROJECT_NAME, "parent")
        conditions = lists.conditions(request.filter, STATES)
        order = lists.order(request.order_by, ORDERS, "create_time")
        listing = self.desk.listing(request.page_size, request.page_token, "jobs", request.filter, request.order_by)
        async with self.desk.store.transaction() as connection:
            rows = await sql_jobs.list_jobs(connection, caller().project_uid, conditions, order, listing.after, listing.limit)
        page, token = self.desk.page(listing, rows, shown, lambda row: after_of(row, order[0]))
        return pb.ListFineTuneJobsResponse(fine_tune_jobs=page, next_page_token=token)

    async def ListCheckpoints(self, request: pb.ListCheckpointsRequest, context: Any) -> pb.ListCheckpointsResponse:
        """A job's checkpoints, newest first."""
        bounds.check(request)
        listing = self.desk.listing(request.page_size, request.page_token, "checkpoints", request.parent)
        below = int(listing.after[0]) if listing.after is not None else None
        async with self.desk.store.transaction() as connection:
            row = await _job(connection, request.parent, "parent")
            rows = await sql_jobs.checkpoints_of(connection, row["uid"], below=below, limit=listing.limit)
        page, token = self.desk.page(listing, rows, lambda each: _checkpoint(row, each), lambda each: [str(each["step"])])
        return pb.ListCheckpointsResponse(checkpoints=page, next_page_token=token)

    async def ListFineTuneJobEvents(self, request: pb.ListFineTuneJobEventsRequest, context: Any) -> pb.ListFineTuneJobEventsResponse:
        """A page of the log; with `wait`, once there is something behind the cursor."""
        bounds.check(request)
        (uid,) = own(request.parent, JOB_NAME, "parent")
        listing = self.desk.listing(request.page_size, request.page_token, "events", request.parent)
        after = int(listing.after[0]) if listing.after is not None else request.after_sequence
        loop = asyncio.get_running_loop()
        ends = loop.time() + min(request.wait.ToTimedelta().total_seconds(), remaining(ANSWER_SECONDS))
        while True:
            pulse = self._feed.pulse(uid)
            async with self.desk.store.transaction() as connection:
                row = await _job(connection, request.parent, "parent")
                if after > row["last_sequence"]:
                    raise EventSequenceAhead(row["last_sequence"])
                found = await sql_jobs.events_after(connection, row["uid"], after, listing.limit)
            left = ends - loop.time()
            if found or left <= 0 or State(row["state"]) in TERMINAL:
                break
            await self._feed.wait(pulse, left)
        records: list[Mapping[Any, Any]] = [{"event": event} for event in found]
        page, token = self.desk.page(listing, records, lambda each: each["event"], lambda each: [str(each["event"].sequence)])
        return pb.ListFineTuneJobEventsResponse(events=page, next_page_token=token)

    async def WatchFineTuneJob(self, request: pb.WatchFineTuneJobRequest, context: Any) -> AsyncIterator[pb.WatchFineTuneJobResponse]:
        """The log behind a cursor, stored and then live, until the job rests for good and, if it succeeded, is servable."""
        bounds.check(request)
        (uid,) = own(request.name, JOB_NAME)
        loop = asyncio.get_running_loop()
        at, marked, rested = request.after_sequence, -1, 0.0
        while True:
            pulse = self._feed.pulse(uid)
            async with self.desk.store.transaction() as connection:
                row = await _job(connection, request.name)
                if at > row["last_sequence"]:
                    raise EventSequenceAhead(row["last_sequence"])
                found = await sql_jobs.events_after(connection, row["uid"], at, PAGE_EVENTS)
            for event in found:
                at = event.sequence
                yield pb.WatchFineTuneJobResponse(event=event)
            if len(found) == PAGE_EVENTS:
                continue
            state = State(row["state"])
            if state in TERMINAL:
                rested = rested or loop.time()
                over = loop.time() - rested >= SERVABLE_SECONDS
                if state is not State.SUCCEEDED or row["servable_time"] is not None or over:
                    yield pb.WatchFineTuneJobResponse(bookmark=pb.Bookmark(sequence=at, final=True))
                    return
            if marked < at:
                marked = at
                yield pb.WatchFineTuneJobResponse(bookmark=pb.Bookmark(sequence=at))
            quiet = BOOKMARK_SECONDS if not rested else min(BOOKMARK_SECONDS, max(0.05, rested + SERVABLE_SECONDS - loop.time()))
            if not await self._feed.wait(pulse, quiet):
                marked = -1

    # --- move ---------------------------------------------------------------------------------------------------------------------------

    async def CancelFineTuneJob(self, request: pb.CancelFineTuneJobRequest, context: Any) -> pb.FineTuneJob:
        """End a job for good; one that was cancelled stays so."""
        bounds.check(request)

        async def work(connection: AsyncConnection) -> pb.FineTuneJob:
            row = await _job(connection, request.name, lock=True)
            if row["state"] in (State.CANCELLING, State.CANCELLED):
                return shown(row)
            return shown(await self._moved(connection, row, State.CANCELLING))

        return await self._change("CancelFineTuneJob", request, work)

    async def PauseFineTuneJob(self, request: pb.PauseFineTuneJobRequest, context: Any) -> pb.FineTuneJob:
        """Commit a checkpoint and free the device."""
        bounds.check(request)

        async def work(connection: AsyncConnection) -> pb.FineTuneJob:
            row = await _job(connection, request.name, lock=True)
            if row["state"] in (State.PAUSING, State.PAUSED):
                return shown(row)
            return shown(await self._moved(connection, row, State.PAUSING))

        return await self._change("PauseFineTuneJob", request, work)

    async def ResumeFineTuneJob(self, request: pb.ResumeFineTuneJobRequest, context: Any) -> pb.FineTuneJob:
        """Queue a paused job again, perhaps with a higher `max_cost`."""
        bounds.check(request)

        async def work(connection: AsyncConnection) -> pb.FineTuneJob:
            row = await _job(connection, request.name, lock=True)
            if row["state"] != State.PAUSED:
                if State(row["state"]) in LIVE and not request.HasField("max_cost"):
                    return shown(row)  # it was resumed
                raise WrongState("name", row["state"])
            planning.affordable(caller())
            limit = row["max_nanos"]
            if request.HasField("max_cost"):
                if request.max_cost.currency_code not in ("", row["currency"]):
                    raise FieldInvalid("max_cost.currency_code", "other_currency")
                limit = request.max_cost.nanos
            if limit is not None and limit <= spent(row):
                raise FieldOutOfRange("max_cost", limit, spent(row), "nanos")
            return shown(await sql_jobs.move(connection, row, State.QUEUED, why="CALLER", max_nanos=limit, barren=0))

        return await self._change("ResumeFineTuneJob", request, work)

    async def DeleteFineTuneJob(self, request: pb.DeleteFineTuneJobRequest, context: Any) -> deletion_pb2.Deletion:
        """Erase a job that rests for good, with its checkpoints; what it published stays."""
        bounds.check(request)

        async def work(connection: AsyncConnection) -> deletion_pb2.Deletion:
            row = await _job(connection, request.name, lock=True)
            if State(row["state"]) not in TERMINAL:
                raise WrongState("name", row["state"])
            await sql_jobs.erase(connection, row)
            prefix = f"jobs/{row['project_uid']}/{row['uid']}"
            made = await dataset_store.add_deletion(
                connection, row["project_uid"], request.name, [request.name], [prefix], {request.name: row["spec_digest"]}
            )
            return deletion(made, row["project"])

        made = await self.desk.change("DeleteFineTuneJob", request, deletion_pb2.Deletion, work, resource=lambda said: said.target)
        self._changed()
        self._erase()
        return made

    async def _moved(self, connection: AsyncConnection, row: Record, to: State) -> Record:
        try:
            return await wanted(connection, row, to, "CALLER")
        except sql_jobs.Moved:
            raise WrongState("name", row["state"]) from None

    async def _change(self, method: str, request: Any, work: Any) -> pb.FineTuneJob:
        made: pb.FineTuneJob = await self.desk.change(method, request, pb.FineTuneJob, work)
        self._changed()
        return made


def _check(budget: Budget, asked: Spent) -> None:
    if not budget.allows(asked):
        epsilons = budget.epsilon and budget.spent.epsilon + asked.epsilon > budget.epsilon
        wanted, limit = (
            (asked.epsilon, budget.epsilon - budget.spent.epsilon) if epsilons else (asked.delta, budget.delta - budget.spent.delta)
        )
        raise PrivacyBudgetExceeded("fine_tune_job.spec.privacy", wanted, max(0.0, limit))


async def _job(connection: AsyncConnection, name: str, field: str = "name", *, lock: bool = False) -> Record:
    (uid,) = own(name, JOB_NAME, field)
    row = await sql_jobs.job(connection, caller().project_uid, uid, lock=lock)
    if row is None:
        raise ResourceNotFound(field)
    return row


def shown(row: Mapping[Any, Any]) -> pb.FineTuneJob:
    """A job's row, or the values of one that is not written, as the message."""
    written = "uid" in row
    job = pb.FineTuneJob(
        spec=pb.FineTuneSpec.FromString(row["spec"]),
        resolved_spec=pb.FineTuneSpec.FromString(row["resolved_spec"]),
        quote=pb.Quote.FromString(row["quote"]),
        model=row["model"],
        display_name=row["display_name"],
        labels=row["labels"],
        priority=row["priority"],
    )
    if row["max_nanos"] is not None:
        job.max_cost.CopyFrom(events.money(row["currency"], row["max_nanos"]))
    if row["deadline"] is not None:
        job.deadline.FromDatetime(row["deadline"])
    if not written:
        return job
    job.name, job.uid, job.etag = name_of(row), row["uid"], lists.etag(row["uid"], row["revision"])
    job.state = events.state_value(row["state"])
    job.state_reason = events.reason(row["reason"])
    if row["failure"] is not None:
        found = events.failure(row["failure"])
        assert found is not None
        job.error.CopyFrom(found)
    for field in ("create_time", "update_time", "start_time", "end_time", "expire_time", "estimated_end_time", "servable_time"):
        stamp = timestamp(row[field])
        if stamp is not None:
            getattr(job, field).CopyFrom(stamp)
    job.phase = pb.JobPhase.Value(f"JOB_PHASE_{row['phase'] or 'UNSPECIFIED'}")
    job.model_version = row["model_version"]
    job.spent.CopyFrom(events.money(row["currency"], spent(row)))
    job.attempt, job.step, job.target_step = row["attempt"], row["step"], row["target_step"]
    job.device_seconds, job.last_sequence = row["device_seconds"], row["last_sequence"]
    return job


def _checkpoint(job: Record, row: Mapping[Any, Any]) -> pb.Checkpoint:
    found = pb.Checkpoint(
        name=f"{name_of(job)}/checkpoints/{row['step']}",
        uid=row["uid"],
        step=row["step"],
        manifest_digest=row["manifest_digest"],
        total_bytes=row["total_bytes"],
        metrics=row["metrics"],
    )
    for field in ("create_time", "expire_time"):
        stamp = timestamp(row[field])
        if stamp is not None:
            getattr(found, field).CopyFrom(stamp)
    return found


async def servable(connection: AsyncConnection, project_uid: str, job_uid: str, version: str, replicas: int, seconds: float) -> None:
    """A version's first report from a gateway, as its job's event."""
    row = await sql_jobs.job(connection, project_uid, job_uid, lock=True)
    if row is None or row["servable_time"] is not None:
        return
    now = await sql_jobs.now(connection)
    elapsed = (now - row["end_time"]).total_seconds() if row["end_time"] is not None else seconds
    await sql_jobs.change(connection, row, events.servable(version, replicas, elapsed, seconds), servable_time=now)


async def pause(connection: AsyncConnection, project_uid: str, key_uid: str) -> int:
    """Pause every job of a project, or of one key of it, that could spend more; how many."""
    rows = await sql_jobs.spending(connection, project_uid, key_uid)
    for row in rows:
        await wanted(connection, row, State.PAUSING, "COST_LIMIT")
    return len(rows)
