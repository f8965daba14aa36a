"""How attempts end, wait, are replaced and cleared away by the real Job controller, scheduler and garbage collector."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from kubernetes import client

from services.chassis import cluster as cluster_api
from services.chassis.cluster import Api
from services.finetune.jobs import Attempt, Launcher, LauncherUnavailable, NameTaken, Seen, Waits, Where
from services.finetune.launchers import sight
from services.finetune.launchers.job_manifest import audience
from services.finetune.token_reviews import NOBODY, TokenReviews
from tests.deploy.control_plane.grounds import api_client, items
from tests.deploy.control_plane.grounds import ground as ground_of
from tests.deploy.reach import Reach
from tests.faults.proxy import fault_proxy
from tests.protocols.clusters import Cluster
from tests.protocols.launcher_contract import attempt, until

ROOT = Path(__file__).parents[3]
# kubernetes.md 8: what the worker's account may do in a job namespace, and nothing more.
ROLE = """
apiVersion: v1
kind: ServiceAccount
metadata: {name: worker}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: worker}
rules:
- {apiGroups: [batch], resources: [jobs], verbs: [get, list, watch, create, patch, delete]}
- {apiGroups: [""], resources: [configmaps], verbs: [get, create, patch, delete]}
- {apiGroups: [""], resources: [pods], verbs: [get, list, watch]}
"""
BINDING = """
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: worker}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: worker}
subjects: [{kind: ServiceAccount, name: worker}]
"""


@pytest.fixture
def place(control_plane: Reach, tmp_path: Path) -> Iterator[tuple[Cluster, str]]:
    with ground_of(control_plane, tmp_path) as found:
        yield found


def pod_of(reach: Reach, namespace: str, name: str) -> dict[str, Any]:
    (pod,) = items(reach, namespace, "pods", f"batch.kubernetes.io/job-name={name}")
    return pod


async def started(there: Launcher, code: int | None = None) -> Attempt:
    one = attempt()
    await there.ensure(one)
    await until(there, one.name, lambda seen: seen.where is (Where.RUNNING if code is None else Where.EXITED))
    return one


async def eventually(met: Callable[[], bool]) -> None:
    async with asyncio.timeout(90):
        while not await asyncio.to_thread(met):
            await asyncio.sleep(0.2)


@pytest.mark.parametrize(("code", "why"), [(0, ""), (65, "PodFailurePolicy"), (1, "BackoffLimitExceeded"), (143, "BackoffLimitExceeded")])
async def test_job_failure_table(control_plane: Reach, place: tuple[Cluster, str], code: int, why: str) -> None:
    ground, namespace = place
    there = ground.launcher(code)
    one = await started(there, code)
    seen = await there.observe(one.name)
    assert (seen.code, seen.disrupted) == (code, False)
    (job,) = items(control_plane, namespace, "jobs")
    ended = [each for each in job["status"]["conditions"] if each["type"] in ("Complete", "Failed")]
    assert [each.get("reason") for each in ended] == [why or "CompletionsReached"]
    assert len(items(control_plane, namespace, "pods")) == 1, "the next attempt is ours to start"


async def test_the_trainers_last_line_is_its_reason(control_plane: Reach, place: tuple[Cluster, str]) -> None:
    ground, namespace = place
    there = ground.launcher(None)
    one = await started(there)
    said = json.dumps({"reason": "DATA_INVALID"})
    name = pod_of(control_plane, namespace, one.name)["metadata"]["name"]
    control_plane.kubectl("annotate", "pod", name, "-n", namespace, f"fake.argosy.dev/message={said}", "fake.argosy.dev/exit-code=65")
    seen = await until(there, one.name, lambda seen: seen.where is Where.EXITED)
    assert seen == Seen(Where.EXITED, 65, "DATA_INVALID")


async def test_an_evicted_pod_is_replaced_inside_its_attempt(control_plane: Reach, place: tuple[Cluster, str]) -> None:
    ground, namespace = place
    there = ground.launcher(None)
    one = await started(there)
    first = pod_of(control_plane, namespace, one.name)
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": first["metadata"]["name"], "namespace": namespace}}
    core = client.CoreV1Api(api_client(control_plane.kubeconfig))
    core.create_namespaced_pod_eviction(first["metadata"]["name"], namespace, eviction, _request_timeout=(3, 10))

    def replaced() -> bool:
        pods = items(control_plane, namespace, "pods")
        return any(pod["metadata"]["uid"] != first["metadata"]["uid"] and pod["status"]["phase"] == "Running" for pod in pods)

    await eventually(replaced)
    await until(there, one.name, lambda seen: seen.where is Where.RUNNING)
    (job,) = items(control_plane, namespace, "jobs")
    assert not job["status"].get("failed"), "a disruption costs nothing"


async def test_suspend_resume(control_plane: Reach, place: tuple[Cluster, str]) -> None:
    ground, namespace = place
    there = ground.launcher(None)
    one = await started(there)
    for suspended, seen in (("true", Waits.SUSPENDED), ("false", None)):
        patch = f'{{"spec": {{"suspend": {suspended}}}}}'
        control_plane.kubectl("patch", "job", one.name, "-n", namespace, "--type=merge", "-p", patch)
        where = Where.PENDING if suspended == "true" else Where.RUNNING
        await until(there, one.name, lambda found, where=where, seen=seen: (found.where, found.waits) == (where, seen))  # type: ignore[misc]


async def test_what_finds_no_place_says_what_is_lacking(control_plane: Reach, place: tuple[Cluster, str]) -> None:
    ground, _ = place
    there, one = ground.launcher(None, spec={"nodeSelector": {"argosy.dev/pool": "nowhere"}}), attempt()
    await there.ensure(one)
    seen = await until(there, one.name, lambda seen: seen.waits is Waits.UNSCHEDULABLE)
    assert seen.where is Where.PENDING
    assert "node" in seen.reason


async def test_what_a_policy_refuses_has_no_pod_and_says_so(control_plane: Reach, place: tuple[Cluster, str]) -> None:
    ground, _ = place
    there, one = ground.launcher(None, spec={"hostNetwork": True}), attempt()
    await there.ensure(one)
    seen = await until(there, one.name, lambda seen: seen.where is Where.PENDING)
    assert seen.waits is Waits.NO_POD


async def test_ttl_and_owner_gc(control_plane: Reach, place: tuple[Cluster, str]) -> None:
    ground, namespace = place
    short = ground.launcher(0, ttl_s=1)
    one = attempt()
    await short.ensure(one)
    await eventually(lambda: items(control_plane, namespace, "jobs") == [])
    assert len(items(control_plane, namespace, "configmaps", "argosy.dev/owner=ours")) == 1
    await short.reap(one.name)
    assert items(control_plane, namespace, "configmaps", "argosy.dev/owner=ours") == []
    two = await started(ground.launcher(None))
    control_plane.kubectl("delete", "configmap", f"ft-{two.job_uid}", "-n", namespace)
    await eventually(lambda: items(control_plane, namespace, "jobs") == items(control_plane, namespace, "pods") == [])


async def test_the_owner_cannot_be_changed(control_plane: Reach, place: tuple[Cluster, str]) -> None:
    ground, namespace = place
    one = await started(ground.launcher(None))
    with pytest.raises(AssertionError, match="immutable"):
        patch = '{"data": {"address": "evil:1"}}'
        control_plane.kubectl("patch", "configmap", f"ft-{one.job_uid}", "-n", namespace, "--type=merge", "-p", patch)


async def test_foreign_job_refused(control_plane: Reach, place: tuple[Cluster, str]) -> None:
    ground, namespace = place
    there, one = ground.launcher(None), attempt()
    control_plane.kubectl("create", "job", one.name, "-n", namespace, "--image=localhost/theirs:1")
    with pytest.raises(NameTaken):
        await there.ensure(one)
    assert (await there.observe(one.name)).where is Where.ABSENT
    await there.stop(one.name, 1)
    await there.reap(one.name)
    (job,) = items(control_plane, namespace, "jobs")
    assert job["metadata"].get("labels", {}).get("argosy.dev/owner") is None


async def test_lost_node_waits(control_plane: Reach, place: tuple[Cluster, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sight, "OVERDUE", timedelta(seconds=2))
    ground, namespace = place
    node = f"lonely-{uuid4().hex[:6]}"
    made = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": node, "labels": {"argosy.dev/fake-node": "true", "argosy.dev/pool": node}},
    }
    control_plane.kubectl("create", "-f", "-", manifest=json.dumps(made))
    try:
        there = ground.launcher(None, spec={"nodeSelector": {"argosy.dev/pool": node}})
        one = await started(there)
        control_plane.kubectl("annotate", "node", node, "fake.argosy.dev/lost=true")
        await there.stop(one.name, 1)
        seen = await until(there, one.name, lambda seen: seen.waits is Waits.NODE_LOST)
        assert seen.where is Where.RUNNING, "nobody may start the next"
        assert pod_of(control_plane, namespace, one.name)["metadata"]["deletionTimestamp"], "and nobody forces it"
    finally:
        control_plane.kubectl("delete", "node", node, "--wait=false")


async def test_tokenreview_audience(control_plane: Reach, place: tuple[Cluster, str]) -> None:
    ground, namespace = place
    one = await started(ground.launcher(None))
    pod = pod_of(control_plane, namespace, one.name)["metadata"]
    reviews = TokenReviews(Api(api_client(control_plane.kubeconfig)), (namespace,))

    def token(aud: str, *bound: str) -> str:
        return control_plane.kubectl("create", "token", "argosy-trainer", "-n", namespace, f"--audience={aud}", *bound).strip()

    mine = ("--bound-object-kind=Pod", f"--bound-object-name={pod['name']}", f"--bound-object-uid={pod['uid']}")
    good = token(audience(one.job_uid, 1), *mine)
    assert (await reviews.shown(good, anew=True)).of(one.job_uid, 1, b"")
    assert not (await reviews.shown(good, anew=True)).of(one.job_uid, 2, b"")
    assert await reviews.shown(token(audience(one.job_uid, 1)), anew=True) is NOBODY, "of no pod of the attempt"
    assert await reviews.shown(token("https://kubernetes.default.svc", *mine), anew=True) is NOBODY
    assert await reviews.shown(good[:-4] + "AAAA", anew=True) is NOBODY
    elsewhere = TokenReviews(Api(api_client(control_plane.kubeconfig)), ("argosy-jobs-of-another",))
    assert await elsewhere.shown(good, anew=True) is NOBODY
    control_plane.kubectl("delete", "pod", pod["name"], "-n", namespace, "--grace-period=0", "--force")
    await eventually(lambda: asyncio.run(reviews.shown(good, anew=True)) is NOBODY)


async def test_A25_the_role_is_enough_and_its_loss_is_readable(control_plane: Reach, place: tuple[Cluster, str]) -> None:
    ground, namespace = place
    control_plane.apply(namespace, ROLE)
    control_plane.apply(namespace, BINDING)
    worker = api_client(control_plane.kubeconfig)
    worker.configuration.cert_file = worker.configuration.key_file = None
    token = control_plane.kubectl("create", "token", "worker", "-n", namespace).strip()
    worker = client.ApiClient(worker.configuration)
    worker.configuration.api_key = {"authorization": f"Bearer {token}", "BearerToken": f"Bearer {token}"}
    there = ground.launcher(None, client=worker)
    one = await started(there)
    control_plane.kubectl("delete", "rolebinding", "worker", "-n", namespace)
    two = attempt()

    async def refused() -> LauncherUnavailable | None:
        try:
            await there.ensure(two)
        except LauncherUnavailable as error:
            return error
        return None

    async with asyncio.timeout(30):
        while (error := await refused()) is None or error.waits is not Waits.LAUNCHER_REFUSED:
            two = attempt()
            await asyncio.sleep(0.1)
    assert "forbidden" in str(error)
    assert (await there.observe(one.name)).where is Where.RUNNING, "what was seen last"
    control_plane.apply(namespace, BINDING)
    async with asyncio.timeout(30):
        while await refused() is not None:
            await asyncio.sleep(0.1)
    await until(there, two.name, lambda seen: seen.where is Where.RUNNING)
    await there.stop(one.name, 1)
    await there.reap(one.name)


@pytest.mark.parametrize("trouble", ["killed", "silent"])
async def test_F21_F19_watch_survives_an_api_that_is(
    control_plane: Reach, place: tuple[Cluster, str], monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    for bound in ("ANSWER_S", "SILENCE_S"):
        monkeypatch.setattr(cluster_api, bound, 2.0)
    ground, namespace = place
    settings = api_client(control_plane.kubeconfig).configuration
    real = urlsplit(settings.host)
    async with fault_proxy(real.netloc) as proxy:
        settings.host, settings.tls_server_name = f"https://{proxy.address}", real.hostname
        there = ground.launcher(None, client=client.ApiClient(settings))
        one = await started(there)
        if trouble == "killed":
            proxy.refusing = True
            proxy.reset()
        else:
            proxy.blackhole()
        async with asyncio.timeout(60):
            while not there.trouble:
                await asyncio.sleep(0.05)
        name = pod_of(control_plane, namespace, one.name)["metadata"]["name"]
        control_plane.kubectl("annotate", "pod", name, "-n", namespace, "fake.argosy.dev/exit-code=65")
        control_plane.wait(namespace, f"job/{one.name}", "condition=Failed")
        assert (await there.observe(one.name)).where is Where.RUNNING, "what was seen last"
        with pytest.raises(LauncherUnavailable):
            await there.observe(attempt().name)
        proxy.heal()
        assert (await until(there, one.name, lambda seen: seen.where is Where.EXITED)).code == 65
        assert there.trouble == ""


def test_F22_F23_F24_one_job_per_crash_point(control_plane: Reach) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.crash_points", "--runs", "1", "--launcher", "cluster"],
        cwd=ROOT, capture_output=True, text=True, timeout=200, check=False, env={**os.environ, "KUBECONFIG": str(control_plane.kubeconfig)},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("| 1 | 1 | 0 | 0 | 0 | 0 |") == 4
