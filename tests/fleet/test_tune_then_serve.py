"""The whole path as a tenant walks it: rows up, a job to its end, a version on every replica, an answer from it, an alias, an erasure."""

import asyncio
import json
import math
import os
import sys
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from argosy import AsyncClient, Client, aio_tuning, errors
from argosy.admin.v1 import quota_pb2, usage_pb2
from argosy.v1 import finetune_pb2, model_pb2
from tests.fleet.running import ROOT, SETTLED, TUNER_SCOPES, Fleet, Tenant, environment

DATA = ROOT / "examples" / "data"
CLASSES = {"technology", "sports", "finance", "health", "travel", "food"}
Job = finetune_pb2.FineTuneJob


def tuner(fleet: Fleet) -> AsyncClient:
    """A project of the test's own that may tune."""
    return AsyncClient(fleet.address, fleet.tenant(TUNER_SCOPES).key, timeout_s=30)


@dataclass(frozen=True)
class Tuned:
    """A project of this file's own, with one tuned classifier."""

    key: str
    job: finetune_pb2.FineTuneJob
    data: str
    events: list[finetune_pb2.JobEvent]
    version: model_pb2.ModelVersion


def tune(client: Client, **more: int) -> Tuned:
    """A short job on the sentences, its whole log, and its version."""
    choices = {"max_steps": 6, "batch_size": 16, "rank": 4, "seed": 5} | more
    tuning = client.tune(DATA / "sentences.tsv", base="tiny", method="classify", held_out=DATA / "heldout.tsv", **choices)
    events: list[finetune_pb2.JobEvent] = []
    version = tuning.wait(seen=events.append)
    return Tuned("", tuning.job, tuning.data.name, events, version)


@pytest.fixture(scope="module")
def tuned(tiny: Fleet) -> Tuned:
    key = tiny.tenant(TUNER_SCOPES).key
    with Client(tiny.address, key) as client:
        return replace(tune(client), key=key)


@pytest.mark.timeout(240)
async def test_a_tuned_classifier_answers_from_every_replica(tiny: Fleet, tuned: Tuned) -> None:
    job, events, version = tuned.job, tuned.events, tuned.version
    assert job.step == job.target_step == 6 and job.model_version == version.name
    assert [each.sequence for each in events] == sorted({each.sequence for each in events})
    states = [Job.State.Name(each.state.state).removeprefix("STATE_") for each in events if each.HasField("state")]
    assert (states[0], states[-1]) == ("QUEUED", "SUCCEEDED") and "RUNNING" in states
    servable = [each.servable for each in events if each.HasField("servable")]
    assert servable[0].replicas >= 1 and servable[0].model_version == version.name
    assert {each.metric.name for each in events if each.HasField("metric")} >= {"loss"}
    assert set(version.tuned_labels) == CLASSES
    assert version.HasField("calibration") and version.lineage.fine_tune_job == job.name and version.signed_manifest

    async with AsyncClient(tiny.address, tuned.key) as client:
        replies = await asyncio.gather(*(client.classify("银行下调存款利率", model=version.name) for _ in range(12)))
        for reply in replies:
            labels = reply.results[0].labels
            assert {each.label for each in labels} == CLASSES and sum(each.probability for each in labels) == pytest.approx(1, abs=1e-4)
            assert reply.model.version == version.name and reply.model.adapter_digest == version.adapter_digest
        first = {each.label: each.probability for each in replies[0].results[0].labels}
        for reply in replies:
            assert {each.label: each.probability for each in reply.results[0].labels} == pytest.approx(first, abs=1e-5)
        told = await client.explain("银行下调存款利率", model=version.name)
        assert told.attributions and told.model.version == version.name
        cheap = await client.explain("银行下调存款利率", model=version.name, cheap=True)
        assert [one.span for one in cheap.attributions] == [one.span for one in told.attributions]
        assert cheap.target_score == pytest.approx(told.target_score, abs=1e-3), "both explain what classify answers"
        assert cheap.target_score == pytest.approx(math.log(max(first.values())), abs=1e-3)


@pytest.mark.timeout(240)
async def test_a_training_row_is_its_own_nearest_example_for_whoever_may_read_rows(tiny: Fleet, tuned: Tuned) -> None:
    lines = (DATA / "sentences.tsv").read_text(encoding="utf-8").splitlines()[1:]
    async with AsyncClient(tiny.address, tuned.key) as client:
        first, *rest = await client.nearest(lines[5].split("\t")[1], model=tuned.version.name, top_k=4)
        assert (first.dataset_version, first.row) == (tuned.data, 5) and first.similarity > 0.999
        assert len(rest) == 3 and first.similarity >= rest[0].similarity >= rest[-1].similarity
        with pytest.raises(errors.FailedPrecondition):  # a base has learnt no rows
            await client.nearest("x", model="models/tiny")


@pytest.mark.timeout(240)
def test_the_same_rows_are_the_same_version_and_the_next_job_the_next(tiny: Fleet, tuned: Tuned) -> None:
    with Client(tiny.address, tuned.key) as client:
        again = tune(client, max_steps=1)
        assert again.data == tuned.data
        assert (tuned.version.name[-2:], again.version.name[-2:]) == ("/1", "/2")
        by_model = client.classify("银行下调存款利率", model=again.version.name.partition("/versions/")[0])
        assert by_model.model.version == tuned.version.name  # nobody promoted the second
        newer = client.classify("银行下调存款利率", model=again.version.name)
        assert newer.model.adapter_digest == again.version.adapter_digest != tuned.version.adapter_digest


@pytest.mark.timeout(240)
async def test_A28_what_a_job_cost_is_in_the_books_and_a_spent_day_starts_no_other(tiny: Fleet, tuned: Tuned) -> None:
    method = "argosy.v1.FineTuneService/CreateFineTuneJob"
    async with AsyncClient(tiny.address, tuned.key) as client, AsyncClient(tiny.address, tiny.api_key) as platform:
        project = await client.project()
        job = await client.call(client.finetune_service.GetFineTuneJob, finetune_pb2.GetFineTuneJobRequest(name=tuned.job.name))
        assert job.spent.nanos > 0
        tenant = Tenant(tiny, project, tuned.key, "")
        rows = [
            row
            for row in await tenant.records_until(
                lambda rows: any(row.request_id == job.uid and row.outcome == SETTLED.USAGE_OUTCOME_COMPLETED for row in rows)
            )
            if row.request_id == job.uid
        ]
        assert sum(row.usage.cost.nanos for row in rows) == job.spent.nanos
        assert sum(row.usage.device_seconds for row in rows) == pytest.approx(job.device_seconds, abs=0.01)
        assert {(row.method, row.model) for row in rows} == {(method, job.model)}
        assert [each.outcome for each in (await client.request_usage(project, job.uid)).records] == [row.outcome for row in rows]
        sums = {each.method: each async for each in client.usage(project, group_by=[usage_pb2.USAGE_GROUP_METHOD])}
        assert sums[method].requests >= 1 and sums[method].usage.cost.nanos >= job.spent.nanos
        kind = quota_pb2.QUOTA_KIND_GPU_SECONDS_PER_DAY
        (used,) = [gauge.used for gauge in (await client.quota(project)).gauges if gauge.kind == kind]
        assert used >= int(job.device_seconds) > 0
        policy = quota_pb2.QuotaPolicy(name=f"{project}/quotaPolicy", gpu_seconds_per_day=used)
        await platform.call(platform.quota_service.UpdateQuotaPolicy, quota_pb2.UpdateQuotaPolicyRequest(quota_policy=policy))
        with pytest.raises(errors.QuotaExceeded) as over:
            await client.tune(DATA / "sentences.tsv", base="tiny", method="classify", max_steps=1)
        assert over.value.metadata["subject"] == "gpu_seconds_per_day" and "gpu_seconds_per_day" in str(over.value)
        open_again = quota_pb2.UpdateQuotaPolicyRequest(quota_policy=quota_pb2.QuotaPolicy(name=policy.name))
        open_again.update_mask.paths.append("gpu_seconds_per_day")
        await platform.call(platform.quota_service.UpdateQuotaPolicy, open_again)


@pytest.mark.timeout(240)
async def test_a_tuned_chat_speaks(tiny: Fleet) -> None:
    async with tuner(tiny) as client:
        tuning = await client.tune(DATA / "chat.jsonl", base="tiny", method="chat", model="clerk", max_steps=4, rank=4, seed=5)
        version = await tuning.wait()
        async with client.stream_chat("Do you ship bicycles?", model=version.name) as stream:
            async for _ in stream:
                break
        result = await client.chat("Do you ship bicycles?", model="/".join((await client.project(), "models/clerk")))
        assert result.started.model.version == version.name
        with pytest.raises(errors.FailedPrecondition):
            await client.classify("no head", model=version.name)


@pytest.mark.timeout(240)
async def test_a_job_is_paused_goes_on_and_is_ended(tiny: Fleet) -> None:
    async with tuner(tiny) as client:
        tuning = await client.tune(
            DATA / "sentences.tsv", base="tiny", method="classify", epochs=100, checkpoint_interval_steps=2, batch_size=16, rank=4
        )
        states: list[int] = []

        async def until(state: int) -> None:
            async with asyncio.timeout(90):
                async for event in tuning.events():
                    if event.HasField("state"):
                        states.append(event.state.state)
                    if event.HasField("metric") and state == Job.STATE_RUNNING:
                        return
                    if states and states[-1] == state != Job.STATE_RUNNING:
                        return

        await until(Job.STATE_RUNNING)
        await tuning.pause()
        await until(Job.STATE_PAUSED)
        kept = [each.step async for each in client.jobs.checkpoints(tuning.name)]
        assert kept and kept[0] >= 1
        await tuning.resume()
        await tuning.cancel()
        with pytest.raises(errors.JobFailed) as ended:
            await client.jobs.wait(tuning.name)
        assert ended.value.job.state == Job.STATE_CANCELLED


@pytest.mark.timeout(240)
async def test_a_version_is_promoted_on_evidence_only(tiny: Fleet, tuned: Tuned) -> None:
    name = tuned.version.name
    async with AsyncClient(tiny.address, tuned.key) as client:
        held_out = await aio_tuning.prepared(client, DATA / "heldout.tsv", "classify")
        try:
            done = await client.registry.promote(name, held_out.name, alias="judged", max_rows=24)
        except errors.EvaluationNotPassed as refused:
            evaluation = refused.evaluation
            assert not all(each.passed for each in evaluation.comparisons)
        else:
            assert done.evaluation is not None and done.alias.targets[0].version == name
            evaluation = done.evaluation
        assert {each.model for each in evaluation.scores} >= {name, "models/tiny"} and evaluation.signed_verdict
        with pytest.raises(errors.PermissionDenied):
            await client.registry.promote(name, force=True)


async def test_nobody_else_sees_rows_job_or_model(tiny: Fleet, tuned: Tuned) -> None:
    async with tuner(tiny) as other:
        for call in (
            other.jobs.get(tuned.job.name),
            other.registry.version(tuned.version.name),
            other.datasets.version(tuned.data),
            other.classify("x", model=tuned.version.name),
        ):
            with pytest.raises(errors.NotFound):
                await call
        assert [each.name async for each in other.jobs.list()] == []


@pytest.mark.timeout(240)
async def test_the_command_line_does_it_all(tiny: Fleet, tmp_path: Path) -> None:
    variables = {"ARGOSY_ADDRESS": tiny.address, "ARGOSY_API_KEY": tiny.tenant(TUNER_SCOPES).key, "XDG_CACHE_HOME": str(tmp_path)}

    async def argosy(*arguments: str) -> list[dict[str, object]]:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "argosy", "--json", *arguments),
            cwd=ROOT,
            env=environment(tmp_path) | variables | {"PATH": os.environ.get("PATH", "")},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        said, failed = await child.communicate()
        assert child.returncode == 0, failed.decode()
        return [json.loads(line) for line in said.splitlines()]

    columns = ("--text-column", "review", "--label-column", "sentiment")
    lines = await argosy(
        *("tune", str(DATA / "reviews.tsv"), "--base", "tiny", "--method", "classify", "--max-steps", "3", "--rank", "4", *columns)
    )
    assert list(lines[0]) == ["dataset_version"] and list(lines[1]) == ["job"] and list(lines[-1]) == ["model_version"]
    assert {"state", "servable"} <= {kind for line in lines[2:-1] for kind in line["event"]}
    (answered,) = await argosy("-m", "reviews", "classify", "Best purchase of the year")
    assert {each["label"] for each in answered["results"][0]["labels"]} == {"positive", "neutral", "negative"}
    (job,) = await argosy("jobs")
    assert job["state"] == "STATE_SUCCEEDED"
    await argosy("plot", str(job["name"]), "--png", str(tmp_path / "curve.png"))
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    await argosy("models", "export", "reviews/1", "--to", str(tmp_path / "adapter.tar"))
    with tarfile.open(tmp_path / "adapter.tar") as archive:
        archive.extractall(tmp_path / "adapter", filter="data")
    labels = [word for label in lines[-1]["model_version"]["tuned_labels"] for word in ("-l", label)]
    await argosy("models", "import", "copy", str(tmp_path / "adapter"), "--method", "classify", "--base", "tiny", *labels)
    (copied,) = await argosy("-m", "copy/1", "classify", "Best purchase of the year")
    ours, theirs = ({each["label"]: each["probability"] for each in told["results"][0]["labels"]} for told in (answered, copied))
    assert max(theirs, key=theirs.get) == max(ours, key=ours.get)
