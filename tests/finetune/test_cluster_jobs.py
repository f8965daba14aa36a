"""Jobs whose attempts are a cluster's: who proves what with which token, what an outage and a lost right do to them, and what is told."""

import asyncio
import base64
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest

from argosy.v1 import finetune_pb2 as pb
from argosy_internal.training.v1 import training_pb2 as tp
from argosy_internal.training.v1 import training_pb2_grpc
from services.chassis.cluster import Api
from services.chassis.errors import StoreUnavailable
from services.finetune.jobs import Attempt, attempt_name
from services.finetune.launchers.job_manifest import audience
from services.finetune.settings import JobSettings
from services.finetune.token_reviews import NOBODY, TokenReviews
from tests.fakes.kubernetes import Fault, Kubernetes, running
from tests.finetune.test_control_plane import QUICK, House, Trainer, charged, house, refused
from tests.protocols.clusters import template

Job = pb.FineTuneJob


@pytest.fixture
def cluster() -> Iterator[Kubernetes]:
    with running() as cluster:
        yield cluster


def token(cluster: Kubernetes, uid: str, attempt: int, *, pod: str = "", namespace: str = "jobs", seconds: float = 3_600) -> str:
    """A token as a kubelet projects it, which the cluster vouches for."""
    said = {"aud": [audience(uid, attempt)], "exp": time.time() + seconds, "jti": str(uuid4())}
    made = ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in ({"alg": "none"}, said, {}))
    user = {
        "username": f"system:serviceaccount:{namespace}:argosy-trainer",
        "extra": {"authentication.kubernetes.io/pod-name": [pod or f"{attempt_name(uid, attempt)}-x7k2p"]},
    }
    cluster.tokens[made] = {"authenticated": True, "audiences": said["aud"], "user": user}
    return made


@asynccontextmanager
async def tuning(cluster: Kubernetes, url: str, base: Path, folder: Path, **changed: Any) -> AsyncIterator[House]:
    (folder / "pools").mkdir()
    (folder / "pools" / "gpu.yaml").write_text(json.dumps(template(run_seconds="never")))
    given: dict[str, Any] = {
        "launcher": "cluster", "job_namespaces": ("jobs",), "pod_templates": folder / "pools", "training_pool": "gpu",
        "training_address": "finetune.argosy.svc:8601",
    }  # fmt: skip
    async with house(url, base, folder, jobs=replace(QUICK, **given, **changed), cluster=cluster.client()) as there:
        yield there


async def launched(cluster: Kubernetes, there: House, job: Any, attempt: int = 1) -> Trainer:
    """Who speaks for the attempt, once it is a Job."""
    name = attempt_name(job.uid, attempt)
    async with asyncio.timeout(60):
        while name not in cluster.names("jobs"):
            await asyncio.sleep(0.02)
    return Trainer(there, Attempt(name, job.uid, attempt, "", "models/tiny", token(cluster, job.uid, attempt), ""))


async def warned(there: House, job: Any, rule: str) -> list[str]:
    """The rules of all warnings, once there is this one."""
    async with asyncio.timeout(60):
        while True:
            page = await there("ListFineTuneJobEvents", pb.ListFineTuneJobEventsRequest(parent=job.name, page_size=500))
            rules = [event.warning.rule for event in page.events if event.HasField("warning")]
            if rule in rules:
                return rules
            await asyncio.sleep(0.02)


async def test_a_clusters_job_runs_from_rows_to_a_version(cluster: Kubernetes, finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with tuning(cluster, finetune_url, base, tmp_path) as there:
        job = await there.create()
        trainer = await launched(cluster, there, job)
        await trainer.claims()
        await trainer.says(step=4, target_step=4, device_seconds=1.0)
        await trainer.succeeds(4)
        with contextlib.suppress(KeyError):  # what is left of an attempt is cleared away whether it has ended or not
            cluster.end(trainer.attempt.name, 0)
        await there.until(job, lambda found: found.state == Job.STATE_SUCCEEDED)
        async with asyncio.timeout(60):
            while cluster.names("jobs") or cluster.names("configmaps"):
                await asyncio.sleep(0.02)


async def test_T7_exit_0_without_success_is_an_attempt_lost(cluster: Kubernetes, finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with tuning(cluster, finetune_url, base, tmp_path) as there:
        job = await there.create()
        trainer = await launched(cluster, there, job)
        await trainer.claims()
        cluster.end(trainer.attempt.name, 0)
        await launched(cluster, there, job, 2)
        assert cluster.names("jobs") == {attempt_name(job.uid, 2)}


async def test_a_pod_replaced_inside_its_attempt_goes_on_with_a_higher_fence(
    cluster: Kubernetes, finetune_url: str, base: Path, tmp_path: Path
) -> None:
    async with tuning(cluster, finetune_url, base, tmp_path) as there:
        job = await there.create()
        old = await launched(cluster, there, job)
        await old.claims()
        await old.says(step=2, target_step=4, device_seconds=2.0)
        await old.keeps(2)
        cluster.evict(old.attempt.name)
        new = Trainer(there, replace(old.attempt, token=token(cluster, job.uid, 1, pod=f"{old.attempt.name}-other")))
        claim = await new.claims()
        assert old.claim is not None
        assert (claim.fence, [point.step for point in claim.resume]) == (old.claim.fence + 1, [2])
        assert await refused(old.says(step=3)) == "WORKER_FENCED"
        await new.says(step=4, device_seconds=1.5)
        await new.succeeds(4)
        found = await there.until(job, lambda found: found.state == Job.STATE_SUCCEEDED)
        assert found.attempt == 1
        assert sum(seconds for *_, seconds in await charged(there, job.uid)) == 3.5, "both pods are paid for"


async def test_a_token_is_its_own_attempts_alone(cluster: Kubernetes, finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with tuning(cluster, finetune_url, base, tmp_path) as there:
        job = await there.create()
        trainer = await launched(cluster, there, job)
        uid = job.uid
        theirs = [
            "0" * 64,
            "not.a.token",
            token(cluster, uid, 2),  # another attempt's
            token(cluster, str(uuid4()), 1),  # another job's
            token(cluster, uid, 1, namespace="kube-system"),  # whoever may ask for this audience elsewhere
            token(cluster, uid, 1, pod="somebody"),  # and a pod beside ours
        ]
        forged = token(cluster, uid, 1)
        del cluster.tokens[forged]
        for each in (*theirs, forged):
            asked = tp.ClaimRunRequest(job=uid, attempt=1, nonce=str(uuid4()))
            assert await refused(trainer("ClaimRun", asked, token=each)) == "API_KEY_INVALID"
        await trainer.claims()


async def test_F19_an_attempt_reports_on_while_the_api_is_away_and_a_claim_waits(
    cluster: Kubernetes, finetune_url: str, base: Path, tmp_path: Path
) -> None:
    async with tuning(cluster, finetune_url, base, tmp_path, training_slots=1) as there:
        job, waits = await there.create(), await there.create()
        trainer = await launched(cluster, there, job)
        await trainer.claims()
        cluster.fault = lambda method, path: Fault(503)
        cluster.cut()
        await trainer.says(step=1, target_step=4, device_seconds=1.0)
        assert await refused(Trainer(there, trainer.attempt).claims()) == "STORE_UNAVAILABLE"
        late = await there.create()  # accepted, and launched when the cluster is back
        assert late.state == Job.STATE_QUEUED
        await trainer.says(step=4, device_seconds=2.0)
        await trainer.succeeds(4)
        assert (await there.get(job)).state == Job.STATE_SUCCEEDED
        cluster.fault = lambda method, path: None
        cluster.end(trainer.attempt.name, 0)
        await launched(cluster, there, waits)


async def test_a_right_that_was_taken_away_is_told_in_the_job_and_nothing_is_lost(
    cluster: Kubernetes, finetune_url: str, base: Path, tmp_path: Path
) -> None:
    async with tuning(cluster, finetune_url, base, tmp_path) as there:
        cluster.fault = lambda method, path: Fault(403) if method == "PATCH" else None
        job = await there.create()
        rules = await warned(there, job, "attempt.launcher_refused")
        async with asyncio.timeout(60):
            while sum(method == "PATCH" for _, method, _ in cluster.requests) < 4:
                await asyncio.sleep(0.02)
        assert (await warned(there, job, "attempt.launcher_refused")) == rules == ["attempt.launcher_refused"], "told once"
        assert (await there.get(job)).state == Job.STATE_PREPARING
        cluster.fault = lambda method, path: None
        trainer = await launched(cluster, there, job)
        await trainer.claims()
        assert (await there.get(job)).attempt == 1


async def test_an_attempt_that_waits_for_a_place_is_told_and_not_lost(
    cluster: Kubernetes, finetune_url: str, base: Path, tmp_path: Path
) -> None:
    async with tuning(cluster, finetune_url, base, tmp_path, lease_seconds=0.2) as there:
        job = await there.create()
        trainer = await launched(cluster, there, job)
        (pod,) = cluster.pods(trainer.attempt.name)
        no_place = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/7 nodes are available"}

        def waits(body: dict[str, Any]) -> None:
            body["status"] = {"phase": "Pending", "conditions": [no_place]}

        cluster.change("pods", pod["metadata"]["name"], waits)
        await warned(there, job, "attempt.unschedulable")
        assert (await there.get(job)).state == Job.STATE_PREPARING


async def test_attempts_have_a_listener_of_their_own_that_serves_nothing_else(
    cluster: Kubernetes, finetune_url: str, base: Path, tmp_path: Path
) -> None:
    async with tuning(cluster, finetune_url, base, tmp_path, training_listen_address="127.0.0.1:0") as there:
        assert there.running.training_address != there.running.address
        job = await there.create()
        trainer = await launched(cluster, there, job)
        async with grpc.aio.insecure_channel(there.running.training_address) as channel:
            metadata = (("authorization", f"Bearer {trainer.attempt.token}"),)
            asked = tp.ClaimRunRequest(job=job.uid, attempt=1, nonce=str(uuid4()))
            claim = await training_pb2_grpc.TrainingServiceStub(channel).ClaimRun(asked, metadata=metadata, timeout=20)
            assert claim.fence == 1
            other = channel.unary_unary("/argosy.v1.FineTuneService/GetFineTuneJob")
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await other(b"", metadata=there.tenant.metadata(), timeout=20)
            assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


# --- reviews ---------------------------------------------------------------------------------------------------------------------------


async def test_a_review_is_remembered_until_the_token_ends_but_not_for_a_claim(cluster: Kubernetes) -> None:
    now = [time.time()]
    reviews = TokenReviews(Api(cluster.client()), ("jobs",), clock=lambda: now[0])
    uid = str(uuid4())
    shown = token(cluster, uid, 1, seconds=600)
    for _ in range(5):
        assert (await reviews.shown(shown, anew=False)).of(uid, 1, b"")
    assert len(cluster.requests) == 1
    await reviews.shown(shown, anew=True)
    assert len(cluster.requests) == 2
    now[0] += 601
    await reviews.shown(shown, anew=False)
    assert len(cluster.requests) == 3


async def test_what_is_no_attempts_token_asks_nobody(cluster: Kubernetes) -> None:
    reviews = TokenReviews(Api(cluster.client()), ("jobs",))
    for shown in ("", "a.b.c", "a." + "e30" + ".c", "x" * 100_000):
        assert await reviews.shown(shown, anew=True) is NOBODY
    assert cluster.requests == []


async def test_a_review_that_cannot_be_had_is_no_verdict(cluster: Kubernetes) -> None:
    reviews = TokenReviews(Api(cluster.client()), ("jobs",))
    for fault in (Fault(403), Fault(500)):
        cluster.fault = lambda method, path, fault=fault: fault  # type: ignore[misc]
        with pytest.raises(StoreUnavailable):
            await reviews.shown(token(cluster, str(uuid4()), 1), anew=True)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "ARGOSY_JOB_NAMESPACES, ARGOSY_POD_TEMPLATES, ARGOSY_TRAINING_ADDRESS"),
        ({"job_namespaces": ("a", "b"), "pod_templates": Path("x"), "training_address": "x:1"}, "everybody's namespace"),
        ({"job_namespaces": ("p=a",), "pod_templates": Path("x"), "training_address": "x:1"}, "everybody's namespace"),
        (
            {"job_namespaces": ("a",), "pod_templates": Path("x"), "training_address": "x:1"}
            | {"trainer_command": ("python",), "callback_address": "0.0.0.0:8602"},
            "ARGOSY_CALLBACK_URL must say",
        ),
    ],
)
def test_a_cluster_needs_its_settings(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        JobSettings(launcher="cluster", **changed)
