"""The harness itself: a control plane that is one, and fake nodes that behave as told."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.reach import Reach, Refused
from tools.cluster.api import Api
from tools.cluster.cluster import ROOT, Cluster
from tools.cluster.processes import wait_until

TRAINER = """
apiVersion: batch/v1
kind: Job
metadata: {name: %(name)s}
spec:
  backoffLimit: 0
  podReplacementPolicy: Failed
  podFailurePolicy:
    rules:
    - {action: Ignore, onPodConditions: [{type: DisruptionTarget}]}
    - {action: FailJob, onExitCodes: {containerName: trainer, operator: In, values: [65]}}
  template:
    metadata: {annotations: {%(notes)s}}
    spec:
      restartPolicy: Never
      nodeSelector: {argosy.dev/pool: h100}
      tolerations: [{key: nvidia.com/gpu, operator: Equal, value: present, effect: NoSchedule}]
      securityContext: {runAsNonRoot: true, runAsUser: 65532, seccompProfile: {type: RuntimeDefault}}
      containers:
      - name: trainer
        image: any
        resources: {limits: {nvidia.com/gpu: %(gpus)s}}
        securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
"""


def trainer(name: str, gpus: int = 1, **notes: str) -> str:
    written = ", ".join(f'fake.argosy.dev/{key.replace("_", "-")}: "{value}"' for key, value in notes.items())
    return TRAINER % {"name": name, "gpus": gpus, "notes": written}


def test_pools_have_the_gpus_they_say(control_plane: Reach) -> None:
    nodes = json.loads(control_plane.kubectl("get", "nodes", "-o", "json"))["items"]
    found = {(n["metadata"]["labels"].get("argosy.dev/pool"), n["status"]["allocatable"].get("nvidia.com/gpu")) for n in nodes}
    assert {("h100", "8"), ("l4", "1"), ("cpu", None)} <= found
    mig = [
        n["status"]["allocatable"].get("nvidia.com/mig-3g.40gb")
        for n in nodes
        if n["metadata"]["labels"].get("argosy.dev/pool") == "h100-mig"
    ]
    assert mig == ["2"]


def test_restricted_namespace_refuses_an_open_pod(control_plane: Reach) -> None:
    with control_plane.fresh_namespace() as namespace, pytest.raises(Refused, match="violates PodSecurity"):
        control_plane.kubectl("run", "open", "-n", namespace, "--image=any", "--restart=Never")


def test_full_pool_says_why(control_plane: Reach) -> None:
    with control_plane.fresh_namespace() as namespace:
        control_plane.apply(namespace, trainer("too-large", gpus=9))
        control_plane.wait(namespace, "job/too-large", "jsonpath={.status.active}=1")
        pod = "-l", "batch.kubernetes.io/job-name=too-large"
        control_plane.kubectl("wait", "-n", namespace, "--for=condition=PodScheduled=false", "pod", *pod, "--timeout=60s")
        said = control_plane.kubectl("get", "pod", "-n", namespace, *pod, "-o", "jsonpath={.items[0].status.conditions[0].message}")
        assert "Insufficient nvidia.com/gpu" in said


@pytest.mark.parametrize(
    ("notes", "condition", "reason"),
    [
        ({"run_seconds": "0"}, "Complete", "CompletionsReached"),
        ({"run_seconds": "0", "exit_code": "1"}, "Failed", "BackoffLimitExceeded"),
        ({"run_seconds": "0", "exit_code": "65"}, "Failed", "PodFailurePolicy"),
    ],
)
def test_jobs_end_as_their_pods_do(control_plane: Reach, notes: dict[str, str], condition: str, reason: str) -> None:
    with control_plane.fresh_namespace() as namespace:
        control_plane.apply(namespace, trainer("ends", **notes))
        control_plane.wait(namespace, "job/ends", f"condition={condition}")
        conditions = json.loads(control_plane.kubectl("get", "job", "ends", "-n", namespace, "-o", "json"))["status"]["conditions"]
        assert reason in {one.get("reason") for one in conditions if one["type"] == condition}


def test_evicted_pod_is_replaced_within_the_attempt(control_plane: Reach) -> None:
    with control_plane.fresh_namespace() as namespace:
        control_plane.apply(namespace, trainer("evicted", run_seconds="never"))
        control_plane.wait(namespace, "job/evicted", "jsonpath={.status.ready}=1")
        selector = "batch.kubernetes.io/job-name=evicted"
        pod = control_plane.kubectl("get", "pod", "-n", namespace, "-l", selector, "-o", "jsonpath={.items[0].metadata.name}")
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": namespace}}
        control_plane.kubectl(
            "create", "--raw", f"/api/v1/namespaces/{namespace}/pods/{pod}/eviction", "-f", "-", manifest=json.dumps(eviction)
        )
        control_plane.wait(namespace, f"pod/{pod}", "delete")
        control_plane.wait(namespace, "job/evicted", "jsonpath={.status.ready}=1")
        second = control_plane.kubectl("get", "pod", "-n", namespace, "-l", selector, "-o", "jsonpath={.items[0].metadata.name}")
        assert second != pod
        control_plane.kubectl("annotate", "pod", second, "-n", namespace, "fake.argosy.dev/exit-code=0")
        control_plane.wait(namespace, "job/evicted", "condition=Complete")
        status = json.loads(control_plane.kubectl("get", "job", "evicted", "-n", namespace, "-o", "json"))["status"]
        assert status.get("failed", 0) == 0, "a disruption is not a failure"


def test_lost_node_becomes_not_ready(control_plane: Reach) -> None:
    name = "lost-1"
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"argosy.dev/fake-node": "true"}}}
    control_plane.kubectl("create", "-f", "-", manifest=json.dumps(node))
    try:
        control_plane.kubectl("wait", "--for=condition=Ready", f"node/{name}", "--timeout=30s")
        control_plane.kubectl("annotate", "node", name, "fake.argosy.dev/lost=yes")
        control_plane.kubectl("wait", "--for=condition=Ready=Unknown", f"node/{name}", "--timeout=60s")
    finally:
        control_plane.kubectl("delete", "node", name, "--wait=false")


def test_what_was_stored_outlives_the_store_and_the_server(control_plane: Reach) -> None:
    if control_plane.existing or not control_plane.cluster:
        pytest.skip("a lent cluster's components are not ours to kill")
    processes = control_plane.cluster.processes
    with control_plane.fresh_namespace() as namespace:
        control_plane.apply(namespace, trainer("before", run_seconds="never"))
        control_plane.wait(namespace, "job/before", "jsonpath={.status.ready}=1")
        for name in ("etcd", "kube-apiserver"):
            processes.named(name).stop()
        with pytest.raises(Refused, match=r"refused|EOF|reset"):
            control_plane.kubectl("get", "nodes")
        for name in ("etcd", "kube-apiserver"):
            processes.restart(name)
        api = Api(control_plane.kubeconfig)
        assert wait_until(api.ready, 60)
        assert control_plane.kubectl("get", "job", "before", "-n", namespace, "-o", "jsonpath={.status.ready}") == "1"
        control_plane.apply(namespace, trainer("after", run_seconds="0"))
        control_plane.wait(namespace, "job/after", "condition=Complete")


def test_a_killed_session_leaves_no_process(control_plane: Reach, tmp_path: Path) -> None:
    folder = tmp_path / "cluster"
    cluster = Cluster(folder)
    reaper = [sys.executable, "-m", "tools.cluster", "down", "--folder", folder, "--when-stdin-closes"]
    with subprocess.Popen(reaper, stdin=subprocess.PIPE, cwd=ROOT) as waiting:
        process = cluster.processes.start("sleeper", ["sleep", "1000"])
        assert process.alive and waiting.stdin
        waiting.stdin.close()  # what the kernel does to a killed session's pipes
        assert waiting.wait(30) == 0
    assert not process.alive
    assert not folder.exists()
