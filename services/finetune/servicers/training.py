"""TrainingService: what an attempt asks and tells. Its token says which job and attempt it is; the fence says whether it still counts.

Every write is one transaction on the job's row, locked: fence compared, values and events written, reply made from what was written.
"""

import asyncio
import hashlib
import json
import math
from collections.abc import Awaitable, Callable
from contextlib import suppress
from contextvars import ContextVar
from datetime import timedelta
from functools import partial
from typing import Any

from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from sqlalchemy.ext.asyncio import AsyncConnection

from argosy.v1 import dataset_pb2, finetune_pb2
from argosy_internal.training.v1 import training_pb2 as pb
from services.chassis import bounds
from services.chassis.errors import (
    ApiKeyInvalid,
    ArtifactRejected,
    PrivacyBudgetExceeded,
    ResourceNotFound,
    ServiceError,
    StoreUnavailable,
    WorkerFenced,
    WrongState,
)
from services.chassis.identity import Caller
from services.chassis.interceptors import Incoming
from services.chassis.objects import ObjectMissing, Objects
from services.finetune import crash, dataset_store, events, planning, publishing, quotes, sql_charges, sql_jobs
from services.finetune.bases import Bases
from services.finetune.jobs import State
from services.finetune.lineage import Signer
from services.finetune.publishing import Origin
from services.finetune.queries import Record
from services.finetune.servicers.dataset_messages import row_layout
from services.finetune.settings import JobSettings
from services.finetune.store import FineTuneStore
from services.finetune.tokens import Shown, Tokens

SERVICE = "argosy.internal.training.v1.TrainingService"
STEP_RATE = "tokens_per_second"  # a metric: of one step
PROGRESS_SECONDS = 1.0  # progress events closer together are one
KEPT_CHECKPOINTS = 3  # the newest, that a run may go on from; the best stays beside them
RUNNING = frozenset({State.RUNNING, State.PAUSING, State.CANCELLING})

_shown: ContextVar[Shown] = ContextVar("what an attempt showed")


def bearer(tokens: Tokens) -> Callable[[Incoming, Any], Awaitable[Caller]]:
    """The door of this service: a token of an attempt, judged with the job that the request names."""

    async def authenticate(incoming: Incoming, context: Any) -> Caller:
        value = incoming.value("authorization")
        if not isinstance(value, str) or not value.startswith("Bearer "):
            raise ApiKeyInvalid
        anew = incoming.method.endswith("/ClaimRun")
        _shown.set(await tokens.shown(value.removeprefix("Bearer ").strip(), anew=anew))
        return Caller(project_uid="", project="", key_id="", scopes=frozenset(), request_id="", kv_scope="")

    return authenticate


class TrainingServicer:
    """argosy.internal.training.v1.TrainingService."""

    def __init__(
        self,
        store: FineTuneStore,
        objects: Objects,
        settings: JobSettings,
        signer: Signer,
        bases: Bases,
        changed: Callable[[], None] = lambda: None,
        device: str = "cpu",
    ) -> None:
        """`changed` wakes the reconciler."""
        self._store = store
        self._objects = objects
        self._settings = settings
        self._signer = signer
        self._bases = bases
        self._changed = changed
        self._device = device
        self._endings: dict[tuple[str, bytes], asyncio.Task[pb.CompleteRunResponse]] = {}

    async def ClaimRun(self, request: pb.ClaimRunRequest, context: Any) -> pb.ClaimRunResponse:
        """Raise the fence for this process; the same nonce gets the same reply."""
        bounds.check(request)
        async with self._store.transaction() as connection:
            row = await self._job(connection, request.job)
            if row["attempt"] != request.attempt or State(row["state"]) not in {State.PREPARING, *RUNNING}:
                raise WorkerFenced
            if row["nonce"] != request.nonce:
                values: dict[str, Any] = {"fence": row["fence"] + 1, "nonce": request.nonce, "report": 0, "lease_time": self._lease()}
                if row["nonce"] and row["report"]:
                    if not _shown.get().replaces:
                        raise WorkerFenced  # a second process of one attempt, while the first is at work
                    # The pod before it was taken away: its seconds and steps are counted, and count for the attempt.
                    values |= {"attempt_seconds": 0.0, "attempt_step": row["step"]}
                    values |= {"barren": 0} if row["step"] > row["attempt_step"] else {}
                if State(row["state"]) is State.PREPARING:
                    first: dict[str, Any] = {} if row["start_time"] else {"start_time": sql_jobs.NOW}
                    row = await sql_jobs.move(connection, row, State.RUNNING, **values, **first)
                else:
                    row = await sql_jobs.change(connection, row, **values)
            reply = await self._claimed(connection, row)
            crash.point("run-claiming")
        crash.point("run-claimed")
        return reply

    async def _claimed(self, connection: AsyncConnection, row: Record) -> pb.ClaimRunResponse:
        spec = finetune_pb2.FineTuneSpec.FromString(row["resolved_spec"])
        project, job = row["project_uid"], row["uid"]
        reply = pb.ClaimRunResponse(
            fence=row["fence"],
            project_uid=project,
            spec=spec,
            spec_digest=row["spec_digest"],
            base_digest=(await self._bases.get(row["base_model"])).digest,
            model=row["model"],
            train=await self._grant(connection, project, spec.train_version),
            prefix=f"jobs/{project}/{job}/f{row['fence']}/",
            lease=_duration(self._settings.lease_seconds),
            target_step=row["target_step"],
        )
        if spec.validation_version:
            reply.validation.CopyFrom(await self._grant(connection, project, spec.validation_version))
        for found in await sql_jobs.checkpoints_of(connection, job, limit=KEPT_CHECKPOINTS):
            reply.resume.add(step=found["step"], prefix=found["prefix"], manifest_digest=found["manifest_digest"])
        if spec.HasField("privacy"):
            reply.epsilon_left = max(0.0, spec.privacy.epsilon - row["epsilon"])
        return reply

    async def _grant(self, connection: AsyncConnection, project_uid: str, name: str) -> pb.DataGrant:
        found = await dataset_store.version_for_training(connection, project_uid, name)
        return pb.DataGrant(
            dataset_version=found.name,
            object=found.path,
            sha256=found.sha256,
            total_bytes=found.total_bytes,
            rows=found.rows,
            format=dataset_pb2.DatasetFormat.Value(f"DATASET_FORMAT_{found.layout.format.upper()}"),
            layout=row_layout(found.layout),
        )

    async def ReportProgress(self, request: pb.ReportProgressRequest, context: Any) -> pb.ReportProgressResponse:
        """Renew the lease, write down how far it is, say what to do. A repeated report only renews."""
        bounds.check(request)
        async with self._store.transaction() as connection:
            row = await self._fenced(connection, request.job, request.fence)
            if request.sequence > row["report"]:
                row = await self._progress(connection, row, request)
            else:
                row = await sql_jobs.change(connection, row, lease_time=self._lease())
            return pb.ReportProgressResponse(lease=_duration(self._settings.lease_seconds), action=_action(row))

    async def _progress(self, connection: AsyncConnection, row: Record, request: pb.ReportProgressRequest) -> Record:
        now = await sql_jobs.now(connection)
        said: list[finetune_pb2.JobEvent] = []
        values: dict[str, Any] = {"report": request.sequence, "lease_time": self._lease()}
        used = max(0.0, request.device_seconds - row["attempt_seconds"])
        total = row["device_seconds"] + used
        values |= {"attempt_seconds": max(row["attempt_seconds"], request.device_seconds), "device_seconds": total}
        if request.phase:
            values["phase"] = finetune_pb2.JobPhase.Name(request.phase).removeprefix("JOB_PHASE_")
        target = row["target_step"]
        if request.HasField("target_step") and (not target or request.target_step < target):
            target = values["target_step"] = request.target_step
            if request.target_reason == pb.TARGET_REASON_EARLY_STOPPED:
                said.append(events.warning("early.stopped", 0, 1))
        step = values["step"] = max(row["step"], request.step) if request.step else row["step"]
        speed = request.tokens / request.device_seconds if request.device_seconds > 0 else 0.0
        ends = None
        done = step - row["attempt_step"]
        if target and done > 0 and request.device_seconds > 0:
            ends = now + timedelta(seconds=min(3e8, (target - step) * request.device_seconds / done))
        if request.step or request.tokens:  # else the callback endpoint may know more
            values |= {"epoch": request.epoch, "tokens": request.tokens, "tokens_per_second": speed, "estimated_end_time": ends}
        changed = step != row["step"] or values.get("phase", row["phase"]) != row["phase"]
        quiet = row["progress_time"] is not None and now - row["progress_time"] < timedelta(seconds=PROGRESS_SECONDS)
        if changed and (not quiet or step == target):
            values["progress_time"] = now
            said.append(events.progress(request.phase, step, target, request.epoch, request.tokens, speed, ends))
        said += [events.metric(each.name, each.value, each.step) for each in request.metrics if math.isfinite(each.value)]
        if request.evaluation:
            loss = request.evaluation.get("validation_loss", math.inf)
            best = row["best"] is None or loss < row["best"]
            values["best"] = min(loss, row["best"] if row["best"] is not None else math.inf) if math.isfinite(loss) else row["best"]
            said.append(events.evaluation(step, dict(request.evaluation), best))
        said += [events.warning(each.rule, each.line, each.count) for each in request.warnings]
        if row["step"] - row["attempt_step"] < quotes.PROBE_STEPS <= done:
            said += await self._requoted(connection, row, step, [each.value for each in request.metrics if each.name == STEP_RATE])
        if request.HasField("epsilon_charged"):
            values["epsilon"] = self._charge(row, request.epsilon_charged)
        row = await sql_jobs.change(connection, row, *said, **values)
        return await self._cost_limit(connection, row)

    async def _requoted(self, connection: AsyncConnection, row: Record, step: int, rates: list[float]) -> list[finetune_pb2.JobEvent]:
        """The job's quote again, by the rate of its own first steps; what it was made with stays its quote."""
        if not any(rate > 0 for rate in rates):
            return []
        spec = finetune_pb2.FineTuneSpec.FromString(row["resolved_spec"])
        names = [name for name in (spec.train_version, spec.validation_version) if name]
        try:
            versions = [await dataset_store.version_for_training(connection, row["project_uid"], name) for name in names]
            base = await self._bases.get(row["base_model"])
        except ServiceError:
            return []  # the rows are being erased, or the base fetched: a narrower quote is a service, not a duty
        _, size = planning.resolved(spec, base, versions[0], versions[1] if len(versions) > 1 else None)
        speed = quotes.own_rate(rates)
        made = planning.quote(spec, base, size, speed, row["nanos_per_second"], row["currency"], self._device)
        return [events.quoted(made, step, speed.tokens_per_second)]

    def _charge(self, row: Record, asked: float) -> float:
        """Epsilon spent with the steps that are about to run; never less than before."""
        promised = finetune_pb2.FineTuneSpec.FromString(row["resolved_spec"]).privacy.epsilon
        if asked > promised * (1 + 1e-9):
            raise PrivacyBudgetExceeded
        return max(float(row["epsilon"]), asked)

    async def _cost_limit(self, connection: AsyncConnection, row: Record) -> Record:
        """At its limit a job pauses behind a checkpoint: what was paid for is kept."""
        if row["max_nanos"] is None or State(row["state"]) is not State.RUNNING or spent(row) < row["max_nanos"]:
            return row
        said = events.cost(row["currency"], spent(row), row["device_seconds"])
        return await sql_jobs.move(connection, row, State.PAUSING, said, why="COST_LIMIT")

    async def CommitCheckpoint(self, request: pb.CommitCheckpointRequest, context: Any) -> pb.CommitCheckpointResponse:
        """Verify what was stored, then write the row that makes it a checkpoint."""
        bounds.check(request)
        manifest = request.manifest
        async with self._store.transaction() as connection:
            row = await self._fenced(connection, request.job, request.fence)
            known = await sql_jobs.checkpoint(connection, row["project_uid"], row["uid"], manifest.step)
            if known is not None and (known["fence"], known["manifest_digest"]) == (row["fence"], request.manifest_digest):
                row = await sql_jobs.change(connection, row, lease_time=self._lease())  # its reply was lost: it counts, and is told once
                return pb.CommitCheckpointResponse(lease=_duration(self._settings.lease_seconds), action=_action(row))
        if (manifest.job, manifest.fence, manifest.attempt, manifest.spec_digest) != (
            row["uid"], row["fence"], row["attempt"], row["spec_digest"],
        ):  # fmt: skip
            raise WorkerFenced
        prefix = f"jobs/{row['project_uid']}/{row['uid']}/f{row['fence']}/step-{manifest.step}/"
        await self._verify(prefix, request)
        crash.point("checkpoint-verified")
        async with self._store.transaction() as connection:
            row = await self._fenced(connection, request.job, request.fence)
            name = f"{name_of(row)}/checkpoints/{manifest.step}"
            size = sum(part.total_bytes for part in manifest.parts)
            await sql_jobs.add_checkpoint(
                connection, row,
                {"step": manifest.step, "fence": row["fence"], "prefix": prefix, "manifest_digest": request.manifest_digest,
                 "total_bytes": size, "metrics": dict(manifest.metrics)},
            )  # fmt: skip
            row = await sql_jobs.change(
                connection, row, events.checkpoint(name, manifest.step), lease_time=self._lease(), step=max(row["step"], manifest.step)
            )
            stale = sql_jobs.stale(await sql_jobs.checkpoints_of(connection, row["uid"]), KEPT_CHECKPOINTS)
            await sql_jobs.drop_checkpoints(connection, row["uid"], [each["step"] for each in stale])
            reply = pb.CommitCheckpointResponse(lease=_duration(self._settings.lease_seconds), action=_action(row))
            crash.point("checkpoint-committing")
        crash.point("checkpoint-committed")
        for each in stale:  # their rows are gone: nobody resumes from them any more
            await self._objects.delete_prefix(each["prefix"].rstrip("/"))
        return reply

    async def _verify(self, prefix: str, request: pb.CommitCheckpointRequest) -> None:
        try:
            stored = await self._objects.get(f"{prefix}manifest.json")
        except ObjectMissing:
            raise ArtifactRejected("manifest_missing") from None
        if hashlib.sha256(stored).hexdigest() != request.manifest_digest:
            raise ArtifactRejected("manifest_digest")
        try:
            written = json_format.ParseDict(json.loads(stored), pb.CheckpointManifest())
        except (ValueError, json_format.ParseError):
            raise ArtifactRejected("manifest_json") from None
        if written != request.manifest:
            raise ArtifactRejected("manifest_differs")
        for part in request.manifest.parts:
            if await self._objects.size(f"{prefix}{part.name}") != part.total_bytes:
                raise ArtifactRejected("part_size")
            digest = hashlib.sha256()
            async for piece in self._objects.stream(f"{prefix}{part.name}"):
                digest.update(piece)
            if digest.hexdigest() != part.sha256:
                raise ArtifactRejected("part_digest")

    async def CompleteRun(self, request: pb.CompleteRunRequest, context: Any) -> pb.CompleteRunResponse:
        """The end of a run. A result is verified, published and SUCCEEDED in one transaction, or nothing has happened."""
        bounds.check(request)
        outcome = request.WhichOneof("outcome")
        async with self._store.transaction() as connection:
            row = await self._job(connection, request.job)
            if State(row["state"]) is State.SUCCEEDED and row["fence"] == request.fence:
                return pb.CompleteRunResponse(model_version=row["model_version"])  # its reply was lost
            row = await self._fenced(connection, request.job, request.fence)
            if outcome == "failure":
                await self._failed(connection, row, request.failure)
                self._changed()
                return pb.CompleteRunResponse()
            if outcome == "stopped":
                await self._stopped(connection, row)
                self._changed()
                return pb.CompleteRunResponse()
        return await self._ended(row, request)

    async def close(self) -> None:
        """End what is being verified; whoever asked for it asks again, and the next process of ours begins anew."""
        for ending in (*self._endings.values(),):
            ending.cancel()
        await asyncio.gather(*self._endings.values(), return_exceptions=True)

    async def _ended(self, row: Record, request: pb.CompleteRunRequest) -> pb.CompleteRunResponse:
        """A result's end goes on when its caller's time is up, and whoever asks again waits for the same one."""
        key = (row["uid"], hashlib.sha256(request.SerializeToString(deterministic=True)).digest())
        ending = self._endings.get(key)
        if ending is None:
            ending = self._endings[key] = asyncio.create_task(self._holding(row, request), name="result")
            ending.add_done_callback(partial(self._over, key))
        return await asyncio.shield(ending)

    def _over(self, key: tuple[str, bytes], ending: "asyncio.Task[pb.CompleteRunResponse]") -> None:
        self._endings.pop(key, None)
        if not ending.cancelled():
            ending.exception()  # whoever waited may be gone

    async def _holding(self, row: Record, request: pb.CompleteRunRequest) -> pb.CompleteRunResponse:
        """Hold the run while its result is verified and copied, for as long as that takes."""
        async with self._store.transaction() as connection:
            await sql_jobs.hold(connection, row["uid"], row["fence"], self._settings.lease_seconds)
        renewing = asyncio.create_task(self._renew(row), name="result's lease")
        try:
            return await self._succeed(row, request)
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)
            with suppress(StoreUnavailable):  # it runs out by itself
                async with self._store.transaction() as connection:
                    await sql_jobs.let_go(connection, row["uid"])

    async def _renew(self, row: Record) -> None:
        while True:
            await asyncio.sleep(self._settings.lease_seconds / 3)
            with suppress(StoreUnavailable):  # whether the run is still ours, its end says
                async with self._store.transaction() as connection:
                    await sql_jobs.hold(connection, row["uid"], row["fence"], self._settings.lease_seconds)

    async def _failed(self, connection: AsyncConnection, row: Record, failure: pb.RunFailure) -> None:
        why = finetune_pb2.JobReason.Name(failure.reason).removeprefix("JOB_REASON_") if failure.reason else "INTERNAL"
        said = {name: str(value) for name, value in (("rule", failure.rule), ("line", failure.line), ("field", failure.field)) if value}
        error = {"reason": "FIELD_INVALID", "message": FAILURES.get(why, "The job failed."), "metadata": said}
        if State(row["state"]) is State.CANCELLING:
            return  # the cancel was first; the reconciler ends it
        await sql_jobs.move(connection, row, State.FAILED, why=why, error=error, lease_time=None)

    async def _stopped(self, connection: AsyncConnection, row: Record) -> None:
        """It has stopped because it was told to; the reconciler sees it gone, and moves the job on. Its lease does not matter now."""
        if State(row["state"]) not in (State.PAUSING, State.CANCELLING):
            raise WrongState("outcome", "not_told_to_stop")
        await sql_jobs.change(connection, row, lease_time=None, due_time=sql_jobs.NOW)

    async def _succeed(self, row: Record, request: pb.CompleteRunRequest) -> pb.CompleteRunResponse:
        manifest = request.result
        if not row["target_step"] or manifest.step != row["target_step"]:
            raise WrongState("result.step", "not_target_step")
        claimed = (manifest.project_uid, manifest.model, manifest.job, manifest.attempt, manifest.base_model)
        if claimed != (row["project_uid"], row["model"], row["uid"], row["attempt"], row["base_model"]):
            raise ArtifactRejected("manifest_owner")
        prefix = f"jobs/{row['project_uid']}/{row['uid']}/f{row['fence']}/result"
        base = await self._bases.get(row["base_model"])
        if manifest.base_digest != base.digest:
            raise ArtifactRejected("base_digest")
        await publishing.verify(self._objects, manifest, prefix, base.modules if manifest.rank else None)
        try:
            prepared = await publishing.prepare(self._store, self._objects, self._signer, manifest, prefix, Origin("JOB", row["uid"]))
        except ObjectMissing:
            async with self._store.transaction() as connection:
                await self._fenced(connection, request.job, request.fence)  # erased meanwhile, most likely, and its parts with it
            raise ArtifactRejected("part_missing") from None
        crash.point("result-prepared")
        try:
            async with self._store.transaction() as connection:
                row = await self._fenced(connection, request.job, request.fence)
                if State(row["state"]) is State.CANCELLING:
                    raise WorkerFenced  # the cancel was first (F28)
                speed = row["tokens_per_second"]
                method = finetune_pb2.TuneMethod.Name(manifest.method).removeprefix("TUNE_METHOD_")
                if speed > 0:
                    await sql_jobs.measured(connection, row["base_model"], method, self._device, speed, row["device_seconds"])
                cost = events.cost(row["currency"], spent(row), row["device_seconds"])
                # The charge's counter before the registry's, as an erasure takes them.
                await sql_jobs.move(connection, row, State.SUCCEEDED, cost, model_version=prepared.name, lease_time=None)
                await publishing.publish(connection, prepared, row["key_id"])
                crash.point("result-publishing")
        except (WorkerFenced, ResourceNotFound, ApiKeyInvalid):  # another's by now, cancelled, or erased with or without its model
            await publishing.discard(self._store, self._objects, prepared)
            raise
        crash.point("result-published")
        self._changed()
        return pb.CompleteRunResponse(model_version=prepared.name)

    async def _job(self, connection: AsyncConnection, uid: str) -> Record:
        """The job that a token is of, locked.

        Raises:
            ApiKeyInvalid: the token is not of its current attempt; an unknown job says the same.
        """
        row = await sql_jobs.any_job(connection, uid, lock=True)
        salt = bytes(row["salt"]) if row is not None else b""
        if not _shown.get().of(uid, row["attempt"] if row is not None else 0, salt) or row is None:
            raise ApiKeyInvalid
        return row

    async def _fenced(self, connection: AsyncConnection, uid: str, fence: int) -> Record:
        """The job, locked, if the process that asks still has it. Raises WorkerFenced otherwise."""
        row = await self._job(connection, uid)
        if row["fence"] != fence or State(row["state"]) not in RUNNING:
            raise WorkerFenced
        return row

    def _lease(self) -> Any:
        return sql_jobs.NOW + timedelta(seconds=self._settings.lease_seconds)


FAILURES = {
    "DATA_INVALID": "The rows cannot be learnt from; rule, line and field say which.",
    "OUT_OF_MEMORY": "The device's memory is not enough for this seq_len and batch_size.",
    "DIVERGED": "The loss became infinite; a lower learning_rate may help.",
    "PRIVACY_GUARD": "A guard of private training was broken; nothing was published.",
    "BASE_CHANGED": "The base's weights are not those that the job was made for.",
    "INTERNAL": "The trainer failed.",
}


def name_of(row: Record) -> str:
    """A job's resource name."""
    return f"projects/{row['project']}/fineTuneJobs/{row['uid']}"


def spent(row: Record) -> int:
    """What a job has cost so far, in 1e-9 of its currency's unit."""
    return sql_charges.nanos_of(row["device_seconds"], row["nanos_per_second"])


def _duration(seconds: float) -> Duration:
    found = Duration()
    found.FromTimedelta(timedelta(seconds=seconds))
    return found


def _action(row: Record) -> pb.RunAction.ValueType:
    """What a job's state asks of its attempt."""
    return {State.PAUSING: pb.RUN_ACTION_PAUSE, State.CANCELLING: pb.RUN_ACTION_CANCEL}.get(State(row["state"]), pb.RUN_ACTION_CONTINUE)
