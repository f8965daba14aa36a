"""Jobs over real gRPC: asked for as a tenant, run by a test that plays the trainer, watched to the end."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest
from google.protobuf import json_format
from google.rpc import error_details_pb2, status_pb2
from sqlalchemy import text

from argosy.v1 import dataset_pb2, dataset_pb2_grpc, finetune_pb2, finetune_pb2_grpc, usage_pb2
from argosy_internal.registry.v1 import registry_pb2, registry_pb2_grpc
from argosy_internal.training.v1 import training_pb2 as tp
from argosy_internal.training.v1 import training_pb2_grpc
from services.chassis.identity import CallerVerifier
from services.chassis.status import error_info
from services.finetune import dataset_store, publishing, sql_charges, sql_jobs
from services.finetune.bases import Bases
from services.finetune.jobs import Attempt, Seen, State, Where
from services.finetune.server import AUDIENCE, Running, finetune
from services.finetune.settings import FineTuneSettings, JobQuotas, JobSettings
from tests.finetune.adapters import file, head, lora
from tests.finetune.served import KEY, SCOPES, Tenant

pb = finetune_pb2
Job = pb.FineTuneJob
ROWS = "label\ttext\n" + "".join(f"{'sport' if n % 2 else 'tech'}\tHeadline number {n} about something else\n" for n in range(40))
QUICK = JobSettings(
    training_slots=2, lease_seconds=30.0, poll_seconds=0.02, retry_seconds=0.0, attempts_without_progress=2, stop_seconds=0.2
)


@dataclass
class Launcher:
    """Attempts that are only written down; the test says what became of them."""

    attempts: dict[str, Attempt] = field(default_factory=dict)
    seen: dict[str, Seen] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)
    deaf: bool = False  # attempts do not end when they are told to

    async def ensure(self, attempt: Attempt) -> None:
        assert self.attempts.setdefault(attempt.name, attempt) == attempt
        self.seen.setdefault(attempt.name, Seen(Where.RUNNING))

    async def observe(self, name: str) -> Seen:
        return self.seen.get(name, Seen(Where.ABSENT))

    async def stop(self, name: str, grace_s: float) -> None:
        self.stopped.append(name)
        if not self.deaf:
            self.seen[name] = Seen(Where.EXITED, 143)

    async def reap(self, name: str) -> None:
        assert self.seen.get(name, Seen(Where.ABSENT)).where is not Where.RUNNING
        self.seen.pop(name, None)

    async def list(self) -> frozenset[str]:
        return frozenset(self.seen)


@dataclass
class Trainer:
    """Speaks for one attempt."""

    house: "House"
    attempt: Attempt
    claim: tp.ClaimRunResponse | None = None
    reports: int = 0

    async def __call__(self, method: str, request: Any, token: str = "") -> Any:
        metadata = (("authorization", f"Bearer {token or self.attempt.token}"),)
        return await getattr(self.house.training, method)(request, metadata=metadata, timeout=20)

    async def claims(self, nonce: str = "") -> tp.ClaimRunResponse:
        asked = tp.ClaimRunRequest(job=self.attempt.job_uid, attempt=self.attempt.attempt, nonce=nonce or str(uuid4()))
        self.claim = await self("ClaimRun", asked)
        return self.claim

    async def says(self, **values: Any) -> tp.ReportProgressResponse:
        assert self.claim is not None
        self.reports += 1
        said = {"job": self.attempt.job_uid, "fence": self.claim.fence, "sequence": self.reports} | values
        return await self("ReportProgress", tp.ReportProgressRequest(**said))

    async def keeps(self, step: int, torn: bool = False, **changed: Any) -> tp.CommitCheckpointResponse:
        """Store a checkpoint and commit it."""
        assert self.claim is not None
        data, prefix = b"weights of step %d" % step, f"{self.claim.prefix}step-{step}/"
        part = tp.Part(name="adapter.safetensors", sha256=hashlib.sha256(data).hexdigest(), total_bytes=len(data))
        said: dict[str, Any] = {
            "job": self.attempt.job_uid, "attempt": self.attempt.attempt, "fence": self.claim.fence, "step": step,
            "spec_digest": self.claim.spec_digest, "parts": [part],
        }  # fmt: skip
        manifest = tp.CheckpointManifest(**(said | changed))
        stored = json.dumps(json_format.MessageToDict(manifest, preserving_proto_field_name=True)).encode()
        await self.house.running.objects.put(f"{prefix}adapter.safetensors", data[:-1] if torn else data)
        await self.house.running.objects.put(f"{prefix}manifest.json", stored)
        digest = hashlib.sha256(stored).hexdigest()
        asked = tp.CommitCheckpointRequest(job=self.attempt.job_uid, fence=self.claim.fence, manifest=manifest, manifest_digest=digest)
        return await self("CommitCheckpoint", asked)

    async def succeeds(self, step: int, **changed: Any) -> tp.CompleteRunResponse:
        """Store a small result that fits the base, and say so."""
        assert self.claim is not None
        bases = self.house.modules
        parts = {
            "adapter.safetensors": file(lora(3, 2, bases)),
            "head.safetensors": file(head_of(self.house.width)),
        }
        for name, data in parts.items():
            await self.house.running.objects.put(f"{self.claim.prefix}result/{name}", data)
        said: dict[str, Any] = {
            "project_uid": self.claim.project_uid, "model": self.claim.model, "base_model": "models/tiny",
            "base_digest": self.claim.base_digest, "method": pb.TUNE_METHOD_CLASSIFY, "rank": 2, "alpha": 4.0,
            "targets": sorted({path.rpartition(".")[2] for path in bases}), "labels": ["sport", "tech"], "temperature": 1.0,
            "parts": [tp.Part(name=n, sha256=hashlib.sha256(d).hexdigest(), total_bytes=len(d)) for n, d in parts.items()],
            "max_tokens": 64, "job": self.attempt.job_uid, "attempt": self.attempt.attempt, "step": step, "code_version": "test",
        }  # fmt: skip
        result = tp.AdapterManifest(**(said | changed))
        return await self("CompleteRun", tp.CompleteRunRequest(job=self.attempt.job_uid, fence=self.claim.fence, result=result))


def head_of(width: int) -> dict[str, Any]:
    found = head(["sport", "tech"])
    found["weight"] = found["weight"].repeat(-(-width // found["weight"].shape[1]), axis=1)[:, :width]
    return found


@dataclass
class House:
    running: Running
    launcher: Launcher
    tenant: Tenant
    jobs: Any
    training: Any
    version: str
    modules: dict[str, tuple[int, int]]
    width: int
    channel: Any

    async def __call__(self, method: str, request: Any, tenant: Tenant | None = None) -> Any:
        return await getattr(self.jobs, method)(request, metadata=(tenant or self.tenant).metadata(), timeout=20)

    def asked(self, **changed: Any) -> pb.CreateFineTuneJobRequest:
        spec = pb.FineTuneSpec(base_model="models/tiny", train_version=self.version, method=pb.TUNE_METHOD_CLASSIFY)
        job = {"spec": spec, "model": f"projects/{self.tenant.project}/models/news"} | changed
        return pb.CreateFineTuneJobRequest(parent=f"projects/{self.tenant.project}", fine_tune_job=Job(**job))

    async def create(self, **changed: Any) -> Any:
        return await self("CreateFineTuneJob", self.asked(**changed))

    async def get(self, job: Any) -> Any:
        return await self("GetFineTuneJob", pb.GetFineTuneJobRequest(name=job.name))

    async def until(self, job: Any, wanted: Callable[[Any], bool]) -> Any:
        async with asyncio.timeout(60):
            while not wanted(found := await self.get(job)):
                await asyncio.sleep(0.02)
        return found

    async def trainer(self, job: Any, attempt: int = 1) -> Trainer:
        """Of the attempt, once it is launched."""
        name = f"ft-{job.uid}-a{attempt}"
        async with asyncio.timeout(60):
            while name not in self.launcher.attempts:
                await asyncio.sleep(0.01)
        return Trainer(self, self.launcher.attempts[name])


@asynccontextmanager
async def house(
    url: str, base: Path, folder: Path, *, jobs: JobSettings = QUICK, launched: bool = False, cluster: Any = None, **quotas: Any
) -> AsyncIterator[House]:
    launcher = Launcher()
    settings = FineTuneSettings(
        database_url=url, store_url=f"file://{folder / 'objects'}", bases=(f"tiny={base}",), cache_dir=str(folder / "cache"), jobs=jobs,
        quotas=JobQuotas(**({"training_nanos_per_second": 1_000_000} | quotas)),
    )  # fmt: skip
    verifier = CallerVerifier({"test": KEY.public_key()}, AUDIENCE)
    own = None if launched or cluster else launcher  # else attempts are processes, or the cluster's
    serving = finetune(settings, launcher=own, verifier=verifier, cluster=cluster)
    async with serving as running, grpc.aio.insecure_channel(running.address) as channel:
        tenant = Tenant(dataset_pb2_grpc.DatasetServiceStub(channel), f"t-{uuid4().hex[:8]}", scopes=SCOPES)
        layout = {"encoding": 2, "text_columns": ["text"], "label_column": "label", "delimiter": "\t", "header": True}
        made = await tenant.dataset("rows", layout=layout)
        version = await tenant.version(made.name, ROWS.encode())
        assert version.state == version.STATE_READY, version
        found = await Bases(settings.bases, settings.cache_dir).get("models/tiny")
        yield House(
            running, launcher, tenant, finetune_pb2_grpc.FineTuneServiceStub(channel),
            training_pb2_grpc.TrainingServiceStub(channel), version.name, dict(found.modules), found.width,
            channel,
        )  # fmt: skip


def info_of(error: grpc.aio.AioRpcError) -> dict[str, str]:
    """The ErrorInfo's metadata."""
    found = error_info(error)
    assert found is not None
    return dict(found.metadata)


def reason(error: grpc.aio.AioRpcError) -> str:
    """The ErrorInfo's reason."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.ErrorInfo()
                if detail.Unpack(info):
                    return str(info.reason)
    return ""


async def refused(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call
    return reason(error.value)


async def test_a_job_runs_from_rows_to_a_version_and_is_watched_to_the_end(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path) as there:
        job = await there.create()
        assert (job.state, job.resolved_spec.lora.rank, job.resolved_spec.validation_fraction) == (Job.STATE_QUEUED, 16, 0.1)
        assert 0 < job.quote.device_seconds.low < job.quote.device_seconds.high
        trainer = await there.trainer(job)
        claim = await trainer.claims("11111111-1111-4111-8111-111111111111")
        again = await trainer.claims("11111111-1111-4111-8111-111111111111")
        assert (again.fence, again.prefix) == (claim.fence, claim.prefix)
        assert (claim.train.rows, claim.spec.train_version, claim.train.layout.delimiter) == (40, there.version, "\t")
        metric = tp.RunMetric(name="loss", value=1.5, step=2)
        reply = await trainer.says(phase=pb.JOB_PHASE_TRAINING, step=2, target_step=4, device_seconds=2.0, tokens=100, metrics=[metric])
        assert reply.action == tp.RUN_ACTION_CONTINUE
        await trainer.keeps(2)
        assert await refused(trainer.succeeds(2)) == "WRONG_STATE"  # success is the target step, nothing before
        await trainer.says(step=4, device_seconds=3.0)
        done = await trainer.succeeds(4)
        assert done.model_version == f"projects/{there.tenant.project}/models/news/versions/1"
        assert (await trainer.succeeds(4)).model_version == done.model_version  # its reply was lost
        found = await there.until(job, lambda found: found.state == Job.STATE_SUCCEEDED)
        assert (found.model_version, found.step, found.device_seconds) == (done.model_version, 4, 3.0)
        assert found.spent.nanos == 3_000_000
        kinds: list[str] = []
        watch = there.jobs.WatchFineTuneJob(pb.WatchFineTuneJobRequest(name=job.name), metadata=there.tenant.metadata(), timeout=20)
        async for said in watch:
            if said.WhichOneof("message") == "event":
                kinds.append(said.event.WhichOneof("event"))
                assert said.event.sequence == len(kinds)
            elif said.bookmark.sequence == len(kinds) and kinds[-1] == "state":
                watch.cancel()
                break
        assert [kind for kind in kinds if kind == "state"] == ["state"] * 4  # QUEUED, PREPARING, RUNNING, SUCCEEDED
        assert {"progress", "metric", "checkpoint", "cost"} <= set(kinds)
        page = await there("ListFineTuneJobEvents", pb.ListFineTuneJobEventsRequest(parent=job.name, after_sequence=2, page_size=2))
        assert [event.sequence for event in page.events] == [3, 4]
        ahead = pb.ListFineTuneJobEventsRequest(parent=job.name, after_sequence=10_000)
        assert await refused(there("ListFineTuneJobEvents", ahead)) == "EVENT_SEQUENCE_AHEAD"
        points = await there("ListCheckpoints", pb.ListCheckpointsRequest(parent=job.name))
        assert [point.step for point in points.checkpoints] == [2]
        there.launcher.seen[trainer.attempt.name] = Seen(Where.EXITED, 0)
        above = f"jobs/{claim.project_uid}/{job.uid}"
        async with asyncio.timeout(30):  # what was copied goes; what was committed stays
            while any("/result/" in path for path in [path async for path, _ in there.running.objects.list(above)]):
                await asyncio.sleep(0.02)
        left = {path.rpartition("/")[0].rpartition("/")[2] async for path, _ in there.running.objects.list(above)}
        assert left == {"step-2"}


async def test_the_first_steps_narrow_the_quote_once_an_attempt(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path) as there:
        job = await there.create()
        trainer = await there.trainer(job)
        await trainer.claims()
        speeds = [tp.RunMetric(name="tokens_per_second", value=value, step=n) for n, value in enumerate((10.0, 400.0, 400.0, 400.0), 1)]
        await trainer.says(step=1, target_step=9, device_seconds=1.0, metrics=speeds[:1])
        await trainer.says(step=4, device_seconds=2.0, metrics=speeds)
        await trainer.says(step=6, device_seconds=3.0, metrics=speeds)
        events = (await there("ListFineTuneJobEvents", pb.ListFineTuneJobEventsRequest(parent=job.name))).events
        (told,) = [each.quoted for each in events if each.WhichOneof("event") == "quoted"]
        assert (told.step, told.tokens_per_second) == (4, pytest.approx(400))
        before, now = job.quote.device_seconds, told.quote.device_seconds
        assert now.high / now.low < before.high / before.low / 2
        assert (await there.get(job)).quote == job.quote, "what it was made with stands"


async def test_what_nobody_chose_is_chosen_and_shown(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path) as there:
        spec = (await there.create()).resolved_spec
        own = spec.hyperparameters
        for message, names in (
            (spec, ("seed", "packing", "seq_len", "validation_fraction", "checkpoint_interval_steps")),
            (own, ("learning_rate", "epochs", "batch_size", "weight_decay", "warmup_ratio", "max_grad_norm")),
            (spec.lora, ("rank", "alpha", "dropout", "rslora", "dora")),
            (spec.early_stopping, ("patience", "min_delta", "interval_steps")),
        ):
            assert all(message.HasField(name) for name in names), message
        assert (own.epochs, own.batch_size, spec.early_stopping.patience) == (3.0, 16, 3)


async def test_F24_a_stale_worker_writes_nothing(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path) as there:
        job = await there.create()
        old = await there.trainer(job)
        await old.claims()
        await old.says(step=1, target_step=4, device_seconds=1.0)
        there.launcher.seen[old.attempt.name] = Seen(Where.EXITED, 1)
        new = await there.trainer(job, attempt=2)
        claim = await new.claims()
        assert claim.fence > (old.claim.fence if old.claim else 0)
        assert old.attempt.token != new.attempt.token
        assert await refused(old.says(step=3)) == "API_KEY_INVALID"  # its token died with its attempt
        fenced = tp.ReportProgressRequest(job=job.uid, fence=claim.fence - 1, sequence=9, step=3)
        assert await refused(new("ReportProgress", fenced)) == "WORKER_FENCED"
        assert await refused(new("ReportProgress", fenced, token="0" * 64)) == "API_KEY_INVALID"
        second = Trainer(there, new.attempt)
        await new.says(step=1)
        assert await refused(second.claims()) == "WORKER_FENCED"  # two pods of one attempt
        assert (await there.get(job)).step == 1


async def test_T6_what_is_torn_is_no_checkpoint(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path) as there:
        job = await there.create()
        trainer = await there.trainer(job)
        await trainer.claims()
        await trainer.says(step=1, target_step=4)
        assert await refused(trainer.keeps(1, torn=True)) == "ARTIFACT_REJECTED"
        assert await refused(trainer.keeps(1, spec_digest="0" * 64)) == "WORKER_FENCED"
        await trainer.keeps(1)
        there.launcher.seen[trainer.attempt.name] = Seen(Where.EXITED, 137)
        again = await (await there.trainer(job, attempt=2)).claims()
        assert [(point.step, point.prefix) for point in again.resume] == [(1, f"{trainer.claim.prefix}step-1/")]  # type: ignore[union-attr]


async def test_F23_a_checkpoint_whose_reply_was_lost_is_told_once(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path) as there:
        job = await there.create()
        trainer = await there.trainer(job)
        await trainer.claims()
        await trainer.says(step=1, target_step=4)
        replies = [await trainer.keeps(1) for _ in range(3)]
        assert {reply.action for reply in replies} == {tp.RUN_ACTION_CONTINUE}
        events = (await there("ListFineTuneJobEvents", pb.ListFineTuneJobEventsRequest(parent=job.name))).events
        assert [each.WhichOneof("event") for each in events].count("checkpoint") == 1


async def test_T7_exit_0_without_a_result_is_an_attempt_lost_and_the_budget_ends(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path) as there:
        job = await there.create()
        for attempt in (1, 2):
            trainer = await there.trainer(job, attempt)
            await trainer.claims()
            there.launcher.seen[trainer.attempt.name] = Seen(Where.EXITED, 0)
        found = await there.until(job, lambda found: found.state == Job.STATE_FAILED)
        assert (found.state_reason, found.attempt) == (pb.JOB_REASON_ATTEMPTS_SPENT, 2)
        assert "exit 0" in found.error.message


async def test_F25_one_request_id_is_one_job(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path) as there:
        asked = there.asked()
        asked.request_id = str(uuid4())

        async def create() -> str:
            while True:
                try:
                    return (await there("CreateFineTuneJob", asked)).name
                except grpc.aio.AioRpcError as error:
                    assert reason(error) == "REQUEST_IN_FLIGHT"
                    await asyncio.sleep(0.02)

        names = set(await asyncio.gather(*(create() for _ in range(20))))
        listed = await there("ListFineTuneJobs", pb.ListFineTuneJobsRequest(parent=f"projects/{there.tenant.project}"))
        assert {each.name for each in listed.fine_tune_jobs} == names and len(names) == 1
        asked.fine_tune_job.spec.seed = 9
        assert await refused(there("CreateFineTuneJob", asked)) == "IDEMPOTENCY_KEY_REUSED"


async def test_pause_keeps_the_work_and_resume_goes_on(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path) as there:
        job = await there.create()
        trainer = await there.trainer(job)
        await trainer.claims()
        await trainer.says(step=2, target_step=8, device_seconds=1.0)
        await there("PauseFineTuneJob", pb.PauseFineTuneJobRequest(name=job.name))
        assert (await trainer.says(step=3)).action == tp.RUN_ACTION_PAUSE
        await trainer.keeps(3)
        await trainer("CompleteRun", tp.CompleteRunRequest(job=job.uid, fence=trainer.claim.fence, stopped=tp.RunStopped(step=3)))  # type: ignore[union-attr]
        there.launcher.seen[trainer.attempt.name] = Seen(Where.EXITED, 0)
        await there.until(job, lambda found: found.state == Job.STATE_PAUSED)
        await there("ResumeFineTuneJob", pb.ResumeFineTuneJobRequest(name=job.name))
        claim = await (await there.trainer(job, 2)).claims()
        assert [point.step for point in claim.resume] == [3]


async def test_a_job_at_its_cost_limit_pauses_and_a_raised_one_goes_on(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path) as there:
        low = (await there("CreateFineTuneJob", pb.CreateFineTuneJobRequest.FromString(_quoted(there.asked())))).quote.low_cost.nanos
        limit = low + 1_000_000
        job = await there.create(max_cost=usage_pb2.Cost(currency_code="USD", nanos=limit))
        trainer = await there.trainer(job)
        await trainer.claims()
        reply = await trainer.says(step=2, target_step=8, device_seconds=limit / 1e6 + 1)
        assert reply.action == tp.RUN_ACTION_PAUSE
        there.launcher.seen[trainer.attempt.name] = Seen(Where.EXITED, 0)
        found = await there.until(job, lambda found: found.state == Job.STATE_PAUSED)
        assert found.state_reason == pb.JOB_REASON_COST_LIMIT
        assert await refused(there("ResumeFineTuneJob", pb.ResumeFineTuneJobRequest(name=job.name))) == "FIELD_OUT_OF_RANGE"
        more = usage_pb2.Cost(currency_code="USD", nanos=10 * limit)
        assert (await there("ResumeFineTuneJob", pb.ResumeFineTuneJobRequest(name=job.name, max_cost=more))).max_cost == more


def _quoted(asked: pb.CreateFineTuneJobRequest) -> bytes:
    asked.validate_only = True
    return asked.SerializeToString()


async def test_F28_a_cancel_and_a_result_leave_one_terminal_state(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path) as there:
        for _ in range(3):
            job = await there.create()
            trainer = await there.trainer(job)
            await trainer.claims()
            await trainer.says(step=4, target_step=4, device_seconds=1.0)
            cancel = there("CancelFineTuneJob", pb.CancelFineTuneJobRequest(name=job.name))
            results = await asyncio.gather(trainer.succeeds(4), cancel, return_exceptions=True)
            found = await there.until(job, lambda found: found.state in (Job.STATE_SUCCEEDED, Job.STATE_CANCELLED))
            assert bool(found.model_version) == (found.state == Job.STATE_SUCCEEDED)
            assert isinstance(results[0], Exception) == (found.state == Job.STATE_CANCELLED)


async def test_A10_another_projects_job_is_no_job(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path) as there:
        job = await there.create()
        stranger = Tenant(there.tenant.stub, "stranger")
        random = f"projects/stranger/fineTuneJobs/{uuid4()}"
        for name in (job.name, random, job.name.replace(there.tenant.project, "stranger")):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await there("GetFineTuneJob", pb.GetFineTuneJobRequest(name=name), stranger)
            assert (reason(error.value), error.value.code()) == ("RESOURCE_NOT_FOUND", grpc.StatusCode.NOT_FOUND)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"base_model": "models/other"}, "RESOURCE_NOT_FOUND"),
        ({"train_version": "projects/{p}/datasets/rows/versions/7"}, "RESOURCE_NOT_FOUND"),
        ({"method": pb.TUNE_METHOD_CHAT}, "FIELD_INVALID"),
        ({"seq_len": 100_000}, "FIELD_OUT_OF_RANGE"),
    ],
)
async def test_what_cannot_work_is_refused_before_it_is_queued(
    finetune_url: str, base: Path, tmp_path: Path, changed: dict[str, Any], expected: str
) -> None:
    async with house(finetune_url, base, tmp_path) as there:
        asked = there.asked()
        for name, value in changed.items():
            setattr(asked.fine_tune_job.spec, name, value.format(p=there.tenant.project) if isinstance(value, str) else value)
        assert await refused(there("CreateFineTuneJob", asked)) == expected


async def test_A14_a_project_has_so_many_jobs_at_once(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path, jobs_per_project=1) as there:
        job = await there.create()
        assert await refused(there.create()) == "QUOTA_EXCEEDED"
        await there("CancelFineTuneJob", pb.CancelFineTuneJobRequest(name=job.name))
        await there.until(job, lambda found: found.state == Job.STATE_CANCELLED)
        again = await there.create()
        await there("CancelFineTuneJob", pb.CancelFineTuneJobRequest(name=again.name))
        await there.until(again, lambda found: found.state == Job.STATE_CANCELLED)
        for name in (job.name, again.name):
            async with asyncio.timeout(30):
                while True:
                    try:
                        await there("DeleteFineTuneJob", pb.DeleteFineTuneJobRequest(name=name))
                        break
                    except grpc.aio.AioRpcError as error:
                        assert reason(error) == "WRONG_STATE"  # its attempt is still to clear away
                        await asyncio.sleep(0.05)
        assert await refused(there.get(job)) == "RESOURCE_NOT_FOUND"


async def charged(there: House, work: str) -> list[tuple[int, str, int, float]]:
    """(number, outcome, nanos, seconds) of what a job has told the books."""
    async with there.running.store.transaction() as connection:
        rows = [row for row in await sql_charges.after(connection, 0, 1_000) if row["work_uid"] == work]
    assert all(row["key_id"] and row["project_uid"] == there.tenant.uid and row["kind"] == "TRAINING" for row in rows)
    return [(row["number"], row["outcome"], row["nanos"], row["device_seconds"]) for row in rows]


async def test_I4_a_job_owes_in_steps_and_once_at_its_end(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path) as there:
        job = await there.create()
        trainer = await there.trainer(job)
        await trainer.claims()
        await trainer.says(step=1, target_step=4, device_seconds=10.0)
        assert await charged(there, job.uid) == []
        await trainer.says(step=2, device_seconds=61.5)
        await trainer.says(step=3, device_seconds=62.0)
        there.launcher.seen[trainer.attempt.name] = Seen(Where.EXITED, 143)  # taken away
        trainer = await there.trainer(job, 2)
        assert await charged(there, job.uid) == [(1, "", 61_500_000, 61.5), (2, "", 500_000, 0.5)]
        await trainer.claims()
        await trainer.says(step=4, device_seconds=0.25)
        await trainer.succeeds(4)
        found = await there.until(job, lambda found: found.state == Job.STATE_SUCCEEDED)
        owed = await charged(there, job.uid)
        assert owed[2:] == [(3, "DONE", 250_000, 0.25)]
        assert sum(nanos for _, _, nanos, _ in owed) == found.spent.nanos


async def test_every_end_of_a_job_is_told_to_the_books_once(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path) as there:
        waiting = await there.create()
        await there("CancelFineTuneJob", pb.CancelFineTuneJobRequest(name=waiting.name))
        await there.until(waiting, lambda found: found.state == Job.STATE_CANCELLED)
        failing = await there.create()
        trainer = await there.trainer(failing)
        await trainer.claims()
        await trainer.says(step=1, target_step=4, device_seconds=3.0)
        failure = tp.RunFailure(reason=pb.JOB_REASON_DIVERGED)
        await trainer("CompleteRun", tp.CompleteRunRequest(job=failing.uid, fence=trainer.claim.fence, failure=failure))  # type: ignore[union-attr]
        (cancelled,), (failed,) = await charged(there, waiting.uid), await charged(there, failing.uid)
        assert cancelled[1:3] in {("CANCELLED", 0)}
        assert failed == (1, "FAILED", 3_000_000, 3.0)


async def test_A28_a_job_over_what_is_left_is_refused_with_the_limit(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path) as there:
        low = (await there("CreateFineTuneJob", pb.CreateFineTuneJobRequest.FromString(_quoted(there.asked())))).quote
        for subject, limits in (
            ("cost_per_day", {"job_nanos_left": low.low_cost.nanos - 1}),
            ("cost_per_day", {"job_nanos_left": 0}),
            ("gpu_seconds_per_day", {"job_seconds_left": 0}),
            ("concurrent_jobs", {"concurrent_jobs": 0}),
        ):
            there.tenant.limits = limits
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await there.create()
            assert (error.value.code(), info_of(error.value)["subject"]) == (grpc.StatusCode.RESOURCE_EXHAUSTED, subject)
            assert info_of(error.value)["limit"] == str(next(iter(limits.values())))
        there.tenant.limits = {"job_nanos_left": 10 * low.low_cost.nanos, "job_seconds_left": 1_000, "concurrent_jobs": 1}
        job = await there.create()
        assert await refused(there.create()) == "QUOTA_EXCEEDED"
        await there("PauseFineTuneJob", pb.PauseFineTuneJobRequest(name=job.name))
        there.launcher.seen.clear()
        await there.until(job, lambda found: found.state == Job.STATE_PAUSED)
        there.tenant.limits = {"job_nanos_left": 0}
        assert await refused(there("ResumeFineTuneJob", pb.ResumeFineTuneJobRequest(name=job.name))) == "QUOTA_EXCEEDED"


async def test_A28_jobs_that_begin_at_once_are_held_against_one_day(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path) as there:
        quote = (await there("CreateFineTuneJob", pb.CreateFineTuneJobRequest.FromString(_quoted(there.asked())))).quote
        most = usage_pb2.Cost(currency_code="USD", nanos=2 * quote.low_cost.nanos)
        assert most.nanos < quote.high_cost.nanos
        there.tenant = replace(there.tenant, key_id=str(uuid4()), limits={"job_nanos_left": 2 * most.nanos + quote.low_cost.nanos - 1})
        ended = await asyncio.gather(*(there.create(max_cost=most) for _ in range(5)), return_exceptions=True)
        made = [each for each in ended if not isinstance(each, BaseException)]
        refusals = [each for each in ended if isinstance(each, grpc.aio.AioRpcError)]
        assert (len(made), len(refusals)) == (2, 3), ended
        for error in refusals:
            assert (info_of(error)["subject"], info_of(error)["limit"]) == ("cost_per_day", str(quote.low_cost.nanos - 1))
        await there("CancelFineTuneJob", pb.CancelFineTuneJobRequest(name=made[0].name))
        there.launcher.seen.clear()
        await there.until(made[0], lambda found: found.state == Job.STATE_CANCELLED)
        await there.create(max_cost=most)  # what rests holds nothing
        there.tenant = replace(there.tenant, key_id=str(uuid4()))
        await there.create(max_cost=most)  # another key's money is not judged by this one's


async def test_A28_device_time_is_held_for_the_whole_project(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path) as there:
        quote = (await there("CreateFineTuneJob", pb.CreateFineTuneJobRequest.FromString(_quoted(there.asked())))).quote
        there.tenant.limits = {"job_seconds_left": int(quote.device_seconds.high)}
        await there.create()  # each call of another key
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await there.create()
        assert (info_of(error.value)["subject"], info_of(error.value)["limit"]) == ("gpu_seconds_per_day", "0")


async def test_A29_a_project_over_its_day_has_its_jobs_paused(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path, running_jobs_per_project=1) as there:
        job = await there.create()
        trainer = await there.trainer(job)
        await trainer.claims()
        waiting = await there.create()
        stub = registry_pb2_grpc.RegistryServiceStub(there.channel)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.PauseJobs(registry_pb2.PauseJobsRequest(), metadata=there.tenant.metadata(), timeout=20)
        assert reason(error.value) == "SCOPE_MISSING"  # no tenant's call
        gateway = replace(there.tenant, scopes=frozenset({"fleet"}), limits={})
        other = replace(gateway, uid=str(uuid4()))
        for whose, asked, paused in ((other, "", 0), (gateway, str(uuid4()), 0), (gateway, "", 2), (gateway, "", 0)):
            said = await stub.PauseJobs(registry_pb2.PauseJobsRequest(key_uid=asked), metadata=whose.metadata(), timeout=20)
            assert said.jobs == paused
        assert (await trainer.says(step=1, target_step=4)).action == tp.RUN_ACTION_PAUSE
        found = await there.get(waiting)
        assert (found.state, found.state_reason) == (Job.STATE_PAUSED, pb.JOB_REASON_COST_LIMIT)


async def test_charges_are_read_behind_a_cursor_and_only_by_gateways(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path) as there:
        stub = registry_pb2_grpc.RegistryServiceStub(there.channel)
        gateway = replace(there.tenant, scopes=frozenset({"fleet"}))
        async with there.running.store.transaction() as connection:
            before = await sql_charges.last(connection)
        watch = stub.WatchCharges(registry_pb2.WatchChargesRequest(after_sequence=before), metadata=gateway.metadata(), timeout=20)
        assert (await watch.read()).WhichOneof("event") == "bookmark"
        job = await there.create()
        await there("CancelFineTuneJob", pb.CancelFineTuneJobRequest(name=job.name))
        while (said := await watch.read()).WhichOneof("event") == "bookmark" or said.charge.work_uid != job.uid:
            continue
        charge = said.charge
        assert (charge.project, charge.method, charge.model) == (
            f"projects/{there.tenant.project}", "/argosy.v1.FineTuneService/CreateFineTuneJob", job.model,
        )  # fmt: skip
        assert (charge.outcome, charge.cost.currency_code) == (registry_pb2.CHARGE_OUTCOME_CANCELLED, "USD")
        watch.cancel()
        ahead = stub.WatchCharges(registry_pb2.WatchChargesRequest(after_sequence=1 << 40), metadata=gateway.metadata(), timeout=20)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await ahead.read()
        assert reason(error.value) == "EVENT_SEQUENCE_AHEAD"
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await stub.WatchCharges(registry_pb2.WatchChargesRequest(), metadata=there.tenant.metadata(), timeout=20).read()
        assert reason(error.value) == "SCOPE_MISSING"


async def test_F28_nothing_is_certified_while_an_erased_jobs_attempt_still_writes(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path) as there:
        job = await there.create()
        trainer = await there.trainer(job)
        claim = await trainer.claims()
        await trainer.says(step=1, target_step=4, device_seconds=7.0)
        await trainer.keeps(1)
        there.launcher.deaf = True
        objects, prefix = there.running.objects, f"jobs/{there.tenant.uid}/{job.uid}"
        deletion = await there.tenant(
            "DeleteDataset", dataset_pb2.DeleteDatasetRequest(name=there.version.rpartition("/versions")[0], cascade=True)
        )
        assert job.name in deletion.erased
        # Fenced at once: nothing of it is taken any more, and no other process may claim.
        for call in (trainer.says(step=2), trainer.keeps(2), trainer.succeeds(4), trainer.claims()):
            assert await refused(call) == "API_KEY_INVALID"
        while trainer.attempt.name not in there.launcher.stopped:
            await asyncio.sleep(0.01)
        for number in range(5):  # it lives on, and writes past the service
            await objects.put(f"{claim.prefix}step-{number}/adapter.safetensors", b"what was learnt")
            found = await there.tenant("GetDeletion", dataset_pb2.GetDeletionRequest(name=deletion.name))
            assert found.state == found.STATE_RUNNING and not found.certificate
            await asyncio.sleep(0.05)
        there.launcher.seen[trainer.attempt.name] = Seen(Where.EXITED, 137)  # at last
        done = await there.tenant.deleted(deletion)
        assert done.certificate
        assert [path async for path, _ in objects.list(prefix)] == []
        assert trainer.attempt.name not in there.launcher.seen  # and cleared away
        assert await charged(there, job.uid) == [(1, "CANCELLED", 7_000_000, 7.0)]
        assert await refused(there.get(job)) == "RESOURCE_NOT_FOUND"


async def test_F28_an_erasure_waits_for_a_result_that_is_being_copied(
    finetune_url: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with house(finetune_url, base, tmp_path) as there:
        job = await there.create()
        trainer = await there.trainer(job)
        await trainer.claims()
        await trainer.says(step=4, target_step=4, device_seconds=1.0)
        objects, copying, go = there.running.objects, asyncio.Event(), asyncio.Event()
        copy = objects.copy

        async def slowly(source: str, target: str) -> None:
            copying.set()
            await go.wait()
            await copy(source, target)

        monkeypatch.setattr(objects, "copy", slowly)
        ending = asyncio.create_task(trainer.succeeds(4))
        await copying.wait()
        deletion = await there.tenant(
            "DeleteDataset", dataset_pb2.DeleteDatasetRequest(name=there.version.rpartition("/versions")[0], cascade=True)
        )
        while there.launcher.seen:  # its attempt is gone, and only we still write
            await asyncio.sleep(0.01)
        for _ in range(3):
            found = await there.tenant("GetDeletion", dataset_pb2.GetDeletionRequest(name=deletion.name))
            assert found.state == found.STATE_RUNNING
            await asyncio.sleep(0.05)
        go.set()
        assert await refused(ending) == "API_KEY_INVALID"
        await there.tenant.deleted(deletion)
        for prefix in (f"jobs/{there.tenant.uid}", f"models/{there.tenant.uid}", f"adapters/{there.tenant.uid}"):
            assert [path async for path, _ in objects.list(prefix)] == []


async def test_a_result_is_verified_to_its_end_whatever_its_caller_does(
    finetune_url: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.QUICK", replace(QUICK, lease_seconds=0.6))
    async with house(finetune_url, base, tmp_path) as there:
        job = await there.create()
        trainer = await there.trainer(job)
        await trainer.claims()
        await trainer.says(step=4, target_step=4, device_seconds=1.0)
        verify, verified, go = publishing.verify, 0, asyncio.Event()

        async def slowly(*arguments: Any) -> None:
            nonlocal verified
            verified += 1
            await go.wait()
            await verify(*arguments)

        monkeypatch.setattr(publishing, "verify", slowly)
        first = asyncio.create_task(trainer.succeeds(4))
        while not verified:
            await asyncio.sleep(0.01)
        first.cancel()  # its deadline, or a lost connection
        again = asyncio.create_task(trainer.succeeds(4))
        await asyncio.sleep(1.5)  # more than two leases without a report
        assert (await there.get(job)).state == Job.STATE_RUNNING and not there.launcher.stopped
        go.set()
        assert (await again).model_version.endswith("/versions/1")
        assert verified == 1
        async with there.running.store.transaction() as connection:
            ended = await sql_jobs.any_job(connection, job.uid)
        assert ended is not None and ended["ending_time"] is None


async def test_retention_leaves_the_rows_to_a_job_that_reads_them(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path) as there:
        job = await there.create()
        trainer = await there.trainer(job)
        await trainer.claims()
        store, name = there.running.store, there.version
        async with store.transaction() as connection:
            row = await dataset_store.version_for_training(connection, there.tenant.uid, name)
            assert await dataset_store.held(connection, there.tenant.uid, row.uid)
            statement = text("UPDATE dataset_versions SET expire_time = clock_timestamp() WHERE uid = :uid")
            await connection.execute(statement, {"uid": row.uid})
            assert [each["uid"] for each in await dataset_store.expired_versions(connection, 100) if each["uid"] == row.uid] == []
        assert (await trainer.says(step=1, target_step=4)).action == tp.RUN_ACTION_CONTINUE
        assert (
            await there.tenant("GetDatasetVersion", dataset_pb2.GetDatasetVersionRequest(name=name))
        ).state == dataset_pb2.DatasetVersion.STATE_READY
        await there("PauseFineTuneJob", pb.PauseFineTuneJobRequest(name=job.name))
        there.launcher.seen[trainer.attempt.name] = Seen(Where.EXITED, 0)
        found = await there.until(job, lambda found: found.state == Job.STATE_CANCELLED)  # paused, it goes with its rows
        assert found.state_reason == pb.JOB_REASON_ERASED
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await there.tenant("GetDatasetVersion", dataset_pb2.GetDatasetVersionRequest(name=name))
        assert reason(error.value) == "RESOURCE_NOT_FOUND"


async def test_the_best_checkpoint_stays_beside_the_newest_three(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path) as there:
        job = await there.create()
        trainer = await there.trainer(job)
        claim = await trainer.claims()
        await trainer.says(step=1, target_step=8, device_seconds=1.0)
        for step, loss in enumerate((0.9, 0.4, 0.4, 0.6, 0.5, 0.7, 0.8), 1):
            await trainer.keeps(step, metrics={"validation_loss": loss, "loss": 0.1 / step})
        listed = await there("ListCheckpoints", pb.ListCheckpointsRequest(parent=job.name))
        assert [each.step for each in listed.checkpoints] == [7, 6, 5, 2]
        stored = {path.split("/")[4] async for path, _ in there.running.objects.list(claim.prefix.rstrip("/"))}
        assert stored == {"step-7", "step-6", "step-5", "step-2"}
        await trainer.keeps(8, metrics={"validation_loss": 0.3})
        listed = await there("ListCheckpoints", pb.ListCheckpointsRequest(parent=job.name))
        assert [each.step for each in listed.checkpoints] == [8, 7, 6]  # which is the best now
        there.launcher.seen[trainer.attempt.name] = Seen(Where.EXITED, 143)
        again = await (await there.trainer(job, 2)).claims()
        assert [point.step for point in again.resume] == [8, 7, 6]


async def test_I3_a_job_that_rests_for_good_moves_no_more_and_hears_no_worker(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with house(finetune_url, base, tmp_path) as there:
        job = await there.create()
        trainer = await there.trainer(job)
        claim = await trainer.claims()
        failure = tp.RunFailure(reason=pb.JOB_REASON_DIVERGED)
        await trainer("CompleteRun", tp.CompleteRunRequest(job=job.uid, fence=claim.fence, failure=failure))
        for call in (trainer.says(step=2, target_step=4), trainer.keeps(2), trainer.succeeds(4)):  # its fence is the newest, and over
            assert await refused(call) == "WORKER_FENCED"
        async with there.running.store.transaction() as connection:
            row = await sql_jobs.any_job(connection, job.uid, lock=True)
            assert row is not None
            for to in (State.QUEUED, State.RUNNING, State.SUCCEEDED, State.FAILED):
                with pytest.raises(sql_jobs.Moved):
                    await sql_jobs.move(connection, row, to)
        assert (await there.get(job)).state == Job.STATE_FAILED
