"""Attempts as Jobs where the API server misbehaves: each fault is bounded, readable, and starts nothing twice."""

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.finetune.jobs import LauncherUnavailable, NameTaken, Seen, Waits, Where
from services.finetune.launchers.cluster import ClusterLauncher
from services.finetune.launchers.job_manifest import audience
from tests.fakes.kubernetes import Fault, Kubernetes, running
from tests.protocols.clusters import Cluster, template
from tests.protocols.launcher_contract import attempt, until


@pytest.fixture
def cluster() -> Iterator[Kubernetes]:
    with running() as cluster:
        yield cluster


@pytest.fixture
def ground(cluster: Kubernetes, tmp_path: Path) -> Iterator[Cluster]:
    ground = Cluster(cluster.client, tmp_path, lambda name: len(cluster.pods(name)))
    yield ground
    ground.close()


async def fresh(there: ClusterLauncher) -> None:
    """Wait until there is a view."""
    async with asyncio.timeout(30):
        while there.age_s is None:
            await asyncio.sleep(0.02)


def on(method: str, part: str, fault: Fault, times: int = 1) -> Callable[[str, str], Fault | None]:
    """A fault of the first `times` requests of this kind."""
    left = [times]

    def asked(sent: str, path: str) -> Fault | None:
        if sent != method or part not in path or left[0] == 0:
            return None
        left[0] -= 1
        return fault

    return asked


def trainer(job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = job["spec"]["template"]["spec"]["containers"][0]
    return found


# --- what is applied ---------------------------------------------------------------------------------------------------------------------


async def test_a_job_says_how_it_may_end_and_who_owns_it(cluster: Kubernetes, ground: Cluster) -> None:
    there, one = ground.launcher(None, ca="PEM", queue=""), attempt()
    await there.ensure(one)
    job = cluster.get("jobs", one.name)
    spec = job["spec"]
    assert (spec["backoffLimit"], spec["podReplacementPolicy"], "suspend" in spec) == (0, "Failed", False)
    rules = spec["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["Ignore", "FailJob"]
    assert rules[0]["onPodConditions"][0]["type"] == "DisruptionTarget"
    assert rules[1]["onExitCodes"] == {"containerName": "trainer", "operator": "In", "values": [65]}
    owner = cluster.get("configmaps", f"ft-{one.job_uid}")
    assert owner["immutable"] is True
    assert job["metadata"]["ownerReferences"][0]["uid"] == owner["metadata"]["uid"]
    assert owner["data"]["address"] == "finetune.argosy.svc:8601"
    assert owner["data"]["ca.crt"] == "PEM"


async def test_A24_the_template_stays_the_operators_and_a_pod_gets_its_own_token_and_one_base(cluster: Kubernetes, ground: Cluster) -> None:
    there, one = ground.launcher(None, ca="PEM"), attempt()
    await there.ensure(one)
    pod = cluster.get("jobs", one.name)["spec"]["template"]["spec"]
    given = template()["spec"]
    assert pod["serviceAccountName"] == given["serviceAccountName"]
    assert pod["containers"][0]["image"] == given["containers"][0]["image"]
    assert pod["containers"][0]["securityContext"] == given["containers"][0]["securityContext"]
    assert pod["containers"][0]["resources"] == given["containers"][0]["resources"]
    assert (pod["automountServiceAccountToken"], pod["enableServiceLinks"], pod["restartPolicy"]) == (False, False, "Never")
    volumes = {each["name"]: each for each in pod["volumes"]}
    assert volumes.keys() == {"base-tiny", "attempt-token", "attempt-job"}
    token = volumes["attempt-token"]["projected"]["sources"][0]["serviceAccountToken"]
    assert token["audience"] == audience(one.job_uid, 1) == f"argosy-attempt/{one.job_uid}/1"
    environ = {each["name"]: each["value"] for each in pod["containers"][0]["env"]}
    assert environ["ARGOSY_BASE_DIRECTORY"] == "/base/tiny"
    assert environ["ARGOSY_TLS_CA"] == "/etc/argosy/job/ca.crt"
    assert environ["ARGOSY_TOKEN_FILE"] == "/var/run/secrets/argosy/token"
    assert one.token not in json.dumps(cluster.get("jobs", one.name)), "a derived token has no business here"


@pytest.mark.parametrize(
    ("name", "kept", "where"),
    [("tiny", "base-tiny", "/base/tiny"), ("odd.name", "base-odd-name-1a2b3c4d", "/base/odd.name"), ("none", "", "/base")],
)
async def test_the_base_is_found_by_where_it_is_mounted(
    cluster: Kubernetes, ground: Cluster, tmp_path: Path, name: str, kept: str, where: str
) -> None:
    there, one = ground.launcher(None), replace(attempt(), base_model=f"models/{name}")
    given = template()  # a name that no volume may have is written otherwise by the chart
    given["spec"]["volumes"].append({"name": "base-odd-name-1a2b3c4d", "emptyDir": {}})
    given["spec"]["containers"][0]["volumeMounts"].append({"name": "base-odd-name-1a2b3c4d", "mountPath": "/base/odd.name"})
    (tmp_path / "pool-None.yaml").write_text(json.dumps(given))
    await there.ensure(one)
    job = cluster.get("jobs", one.name)
    bases = {each["name"] for each in job["spec"]["template"]["spec"]["volumes"] if each["name"].startswith("base-")}
    assert bases == ({kept} if kept else set())
    assert {each["name"]: each["value"] for each in trainer(job)["env"]}["ARGOSY_BASE_DIRECTORY"] == where


async def test_kueues_queue_is_named_and_refused_where_kueue_is_not(cluster: Kubernetes, ground: Cluster) -> None:
    there, one = ground.launcher(None, queue="gpus", queue_priority="low"), attempt()
    with pytest.raises(LauncherUnavailable, match="Kueue is not installed") as refused:
        await there.ensure(one)
    assert refused.value.waits is Waits.LAUNCHER_REFUSED
    assert cluster.names("configmaps") == cluster.names("jobs") == set()
    cluster.groups.add("kueue.x-k8s.io")
    await there.ensure(one)
    marks = cluster.get("jobs", one.name)["metadata"]["labels"]
    assert (marks["kueue.x-k8s.io/queue-name"], marks["kueue.x-k8s.io/priority-class"]) == ("gpus", "low")


async def test_several_nodes_need_jobset_and_say_so(cluster: Kubernetes, ground: Cluster) -> None:
    there, one = ground.launcher(None, nodes=2), attempt()
    with pytest.raises(LauncherUnavailable, match="JobSet is not installed"):
        await there.ensure(one)
    assert cluster.names("configmaps") == set()
    cluster.groups.add("jobset.x-k8s.io")
    await there.ensure(one)
    made = cluster.get("jobsets", one.name)["spec"]
    assert made["failurePolicy"] == {"maxRestarts": 0}
    assert made["replicatedJobs"][0]["template"]["spec"]["parallelism"] == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "no pod template that can be read"), ("a: [", "no pod template that can be read"), ("- a", "no object"), ("{}", "no spec"),
     ("spec: {containers: [{name: other}]}", "no container 'trainer'")],
)  # fmt: skip
async def test_a_template_that_does_not_fit_is_the_operators_to_mend(
    cluster: Kubernetes, ground: Cluster, tmp_path: Path, text: str | None, said: str
) -> None:
    there, one = ground.launcher(None), attempt()
    file = tmp_path / "pool-None.yaml"
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(LauncherUnavailable, match=said) as refused:
        await there.ensure(one)
    assert refused.value.waits is Waits.LAUNCHER_REFUSED
    assert cluster.names("jobs") == set()


async def test_a_project_with_a_namespace_of_its_own_runs_there(cluster: Kubernetes, ground: Cluster) -> None:
    there, one = ground.launcher(None), attempt()
    there.close()
    own = ClusterLauncher(there.api, there.place.of(there.place.templates, "pool-None", ("jobs", f"{one.project_uid}=theirs")), there.terms)
    own.start()
    await own.ensure(one)
    assert (cluster.names("jobs", "jobs"), cluster.names("jobs", "theirs")) == (set(), {one.name})
    await until(own, one.name, lambda seen: seen.where is Where.RUNNING)
    await own.reap(one.name)
    assert cluster.names("configmaps", "theirs") == set()
    own.close()


# --- somebody else's ---------------------------------------------------------------------------------------------------------------------


async def test_F20_a_foreign_job_of_that_name_is_refused_and_never_deleted(cluster: Kubernetes, ground: Cluster) -> None:
    there, one = ground.launcher(None), attempt()
    cluster.put("jobs", {"metadata": {"name": one.name, "labels": {}}, "spec": {}})
    with pytest.raises(NameTaken):
        await there.ensure(one)
    assert (await there.observe(one.name)).where is Where.ABSENT
    await there.stop(one.name, 1)
    await there.reap(one.name)
    assert cluster.names("jobs") == {one.name}
    assert await there.list() == frozenset()


async def test_F20_a_conflict_means_that_somebody_was_first_perhaps_we(cluster: Kubernetes, ground: Cluster) -> None:
    there, one = ground.launcher(None), attempt()
    cluster.fault = on("PATCH", "/jobs/", Fault(409, done=True))
    await there.ensure(one)
    two = attempt()

    def first(method: str, path: str) -> Fault | None:
        if method == "PATCH" and "/jobs/" in path and two.name not in cluster.names("jobs"):
            cluster.put("jobs", {"metadata": {"name": two.name, "labels": {"argosy.dev/owner": "another"}}, "spec": {}})
        return None

    cluster.fault = first
    with pytest.raises(NameTaken):
        await there.ensure(two)


async def test_two_installations_in_one_namespace_leave_each_other_alone(cluster: Kubernetes, ground: Cluster) -> None:
    ours, theirs, one = ground.launcher(None), ground.launcher(None, owner="theirs"), attempt()
    await ours.ensure(one)
    await fresh(theirs)
    await until(ours, one.name, lambda seen: seen.where is Where.RUNNING)
    assert await theirs.list() == frozenset()
    assert (await theirs.observe(one.name)).where is Where.ABSENT
    await theirs.stop(one.name, 1)
    await theirs.reap(one.name)
    assert cluster.names("jobs") == {one.name}
    with pytest.raises(NameTaken):
        await theirs.ensure(one)


# --- an API that fails -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["/configmaps/", "/jobs/"])
async def test_F23_a_reply_that_is_lost_leaves_one_job(cluster: Kubernetes, ground: Cluster, part: str) -> None:
    there, one = ground.launcher(None), attempt()
    cluster.fault = on("PATCH", part, Fault(done=True))
    with pytest.raises(LauncherUnavailable):
        await there.ensure(one)
    async with asyncio.timeout(30):
        while True:
            try:
                await there.ensure(one)
                break
            except LauncherUnavailable:
                await asyncio.sleep(0.05)  # an outage's pace: one command a second
    assert await ground.starts(one.name) == 1
    assert len(cluster.names("configmaps")) == 1


@pytest.mark.parametrize(("status", "waits"), [(500, Waits.LAUNCHER_AWAY), (503, Waits.LAUNCHER_AWAY), (429, Waits.LAUNCHER_AWAY),
                                               (504, Waits.LAUNCHER_AWAY), (403, Waits.LAUNCHER_REFUSED)])  # fmt: skip
async def test_F20_every_refusal_is_readable_and_nothing_is_lost(cluster: Kubernetes, ground: Cluster, status: int, waits: Waits) -> None:
    there, one = ground.launcher(None), attempt()
    await fresh(there)
    cluster.fault = on("PATCH", "/jobs/", Fault(status))
    with pytest.raises(LauncherUnavailable, match=f"HTTP {status}: asked for by the test") as refused:
        await there.ensure(one)
    assert refused.value.waits is waits
    assert cluster.names("jobs") == set()


async def test_F20_after_a_429_nobody_asks_before_the_time_it_named(cluster: Kubernetes, ground: Cluster) -> None:
    there, one = ground.launcher(None), attempt()
    await fresh(there)
    cluster.fault = on("PATCH", "/configmaps/", Fault(429, retry_after="30"))
    with pytest.raises(LauncherUnavailable):
        await there.ensure(one)
    asked = len(cluster.requests)
    for _ in range(20):
        with pytest.raises(LauncherUnavailable, match="does not answer"):
            await there.ensure(one)
    assert len(cluster.requests) == asked


async def test_R10_a_silent_server_is_given_up_in_bounded_time(
    cluster: Kubernetes, ground: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.chassis.cluster.ANSWER_S", 0.2)
    there, one = ground.launcher(None), attempt()
    await fresh(there)
    cluster.fault = on("PATCH", "/jobs/", Fault(silent_s=30), times=1)
    with pytest.raises(LauncherUnavailable, match="timed out"):
        await there.ensure(one)
    assert sum(method == "PATCH" and "/jobs/" in path for _, method, path in cluster.requests) == 1, "and to try again unseen"


async def test_F19_what_was_seen_last_is_still_seen_while_the_api_is_away(cluster: Kubernetes, ground: Cluster) -> None:
    there, one = ground.launcher(None), attempt()
    await there.ensure(one)
    async with asyncio.timeout(30):
        while await there.list() != {one.name} or (await there.observe(one.name)).where is not Where.RUNNING:
            await asyncio.sleep(0.02)
    cluster.fault = lambda method, path: Fault(503)
    cluster.cut()
    asked = len(cluster.requests)
    for _ in range(50):
        assert (await there.observe(one.name)).where is Where.RUNNING
    await there.ensure(one)  # it is there, so nothing need be asked
    with pytest.raises(LauncherUnavailable):
        await there.observe(attempt().name)  # that something is absent is never said from memory
    with pytest.raises(LauncherUnavailable):
        await there.stop(one.name, 1)
    assert len(cluster.requests) - asked < 10
    assert there.age_s is not None


async def test_before_the_first_view_nothing_is_an_orphan(cluster: Kubernetes, ground: Cluster) -> None:
    cluster.fault = lambda method, path: Fault(403)
    there = ground.launcher(None)
    async with asyncio.timeout(30):
        while not cluster.requests:
            await asyncio.sleep(0.02)
    with pytest.raises(LauncherUnavailable):
        await there.list()
    assert there.age_s is None


@pytest.mark.parametrize("trouble", ["cut", "expire"])
async def test_F21_a_watch_that_breaks_or_expires_is_begun_anew(cluster: Kubernetes, ground: Cluster, trouble: str) -> None:
    there, one = ground.launcher(None), attempt()
    await there.ensure(one)
    await until(there, one.name, lambda seen: seen.where is Where.RUNNING)
    await fresh(there)
    cluster.hears = False
    cluster.end(one.name, 65)
    cluster.hears = True
    getattr(cluster, trouble)()
    assert (await until(there, one.name, lambda seen: seen.where is Where.EXITED)).code == 65


async def test_R10_an_idle_launcher_keeps_two_watches_and_asks_nothing_else(cluster: Kubernetes, ground: Cluster) -> None:
    there, one = ground.launcher(None), attempt()
    await there.ensure(one)
    async with asyncio.timeout(30):
        while await there.list() != {one.name} or sum("watch=true" in path for _, _, path in cluster.requests) < 2:
            await asyncio.sleep(0.02)
    asked = len(cluster.requests)
    for _ in range(200):
        assert (await there.observe(one.name)).where is Where.RUNNING
        await there.ensure(one)
        await there.list()
    assert len(cluster.requests) == asked
    assert sum("watch=true" in path for _, _, path in cluster.requests) == 2


# --- how it ends -------------------------------------------------------------------------------------------------------------------------


async def test_a_pod_that_is_evicted_is_replaced_inside_its_attempt(cluster: Kubernetes, ground: Cluster) -> None:
    there, one = ground.launcher(None), attempt()
    await there.ensure(one)
    await until(there, one.name, lambda seen: seen.where is Where.RUNNING)
    cluster.evict(one.name)
    assert (await until(there, one.name, lambda seen: seen.waits is Waits.STARTING)).where is Where.PENDING


async def test_the_reason_is_the_trainers_one_line(cluster: Kubernetes, ground: Cluster) -> None:
    there, one, two = ground.launcher(None), attempt(), attempt()
    for each in (one, two):
        await there.ensure(each)
    cluster.end(one.name, 65, json.dumps({"reason": "DATA_INVALID"}))
    cluster.end(two.name, 137, "Traceback: a row of somebody's", "OOMKilled")
    seen = await until(there, one.name, lambda seen: seen.where is Where.EXITED)
    assert (seen.code, seen.reason) == (65, "DATA_INVALID")
    seen = await until(there, two.name, lambda seen: seen.where is Where.EXITED)
    assert (seen.code, seen.reason) == (137, "OOMKilled")


async def test_a_pod_on_a_lost_node_keeps_its_attempt_there_and_is_not_asked_to_end_again(cluster: Kubernetes, ground: Cluster) -> None:
    there, one = ground.launcher(None), attempt()
    cluster.stuck = True
    await there.ensure(one)
    await until(there, one.name, lambda seen: seen.where is Where.RUNNING)
    await there.stop(one.name, 1)
    seen = await until(there, one.name, lambda seen: seen.waits is Waits.NODE_LOST)
    assert seen.where is Where.RUNNING, "nobody may start another"
    asked = sum(method == "DELETE" for _, method, _ in cluster.requests)
    for _ in range(5):
        await there.stop(one.name, 1)
    assert sum(method == "DELETE" for _, method, _ in cluster.requests) == asked


async def test_reap_takes_the_owner_and_all_that_it_owns(cluster: Kubernetes, ground: Cluster) -> None:
    there, one = ground.launcher(0), attempt()
    await there.ensure(one)
    await until(there, one.name, lambda seen: seen.where is Where.EXITED)
    await there.reap(one.name)
    assert cluster.names("jobs") == cluster.names("configmaps") == cluster.names("pods") == set()


async def test_an_attempt_that_somebody_deleted_is_gone(cluster: Kubernetes, ground: Cluster) -> None:
    there, one = ground.launcher(None), attempt()
    await there.ensure(one)
    await until(there, one.name, lambda seen: seen.where is Where.RUNNING)
    for pod in cluster.pods(one.name):
        cluster.delete("pods", pod["metadata"]["name"])
    cluster.delete("jobs", one.name)
    assert await until(there, one.name, lambda seen: seen.where is Where.ABSENT) == Seen(Where.ABSENT)
