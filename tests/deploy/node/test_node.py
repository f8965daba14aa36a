"""The real node: its GPUs, its network, its names, its volumes, and that nothing of it stays."""

import json
import os
import signal
import socket
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.deploy.reach import Reach
from tools.cluster.cgroups import MOUNT
from tools.cluster.cluster import Cluster
from tools.cluster.processes import wait_until

PAUSE = "localhost/pause:1"
SECURITY = {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}}
TIGHT = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
WEB = """
import http.server, json, os, socket, sys
service, address, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
said = {"gpu": os.environ.get("NVIDIA_VISIBLE_DEVICES"), "volume": os.listdir("/base")}
for name in (service, "kubernetes.default.svc"):
    said[name] = socket.getaddrinfo(name, 443, socket.AF_INET)[0][4][0]
try:
    socket.getaddrinfo("no-such-service.default.svc", 443)
except socket.gaierror:
    said["unknown"] = "refused"
socket.create_connection((said["kubernetes.default.svc"], 443), 5).close()
socket.create_connection((address, port), 5).close()
try:
    open("/base/new", "w")
except OSError as error:
    said["write"] = error.strerror
open("/store/note", "w").write("from a pod")
class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(said).encode())
http.server.HTTPServer(("0.0.0.0", 8080), Answer).serve_forever()
"""


def pod(name: str, image: str = PAUSE, gpus: int = 0, **more: Any) -> dict[str, Any]:
    limits = {"limits": {"nvidia.com/gpu": gpus}} if gpus else {}
    container = {"name": "main", "image": image, "imagePullPolicy": "Never", "resources": limits, "securityContext": TIGHT}
    volumes = more.pop("volumes", [])
    spec = {"securityContext": SECURITY, "terminationGracePeriodSeconds": 1, "containers": [container | more], "volumes": volumes}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}}, "spec": spec}


def status(reach: Reach, kind: str, name: str, namespace: str = "default") -> dict[str, Any]:
    found: dict[str, Any] = json.loads(reach.kubectl("get", kind, name, "-n", namespace, "-o", "json"))["status"]
    return found


@pytest.fixture
def namespace(node: Reach) -> Iterator[str]:
    with node.fresh_namespace() as name:
        yield name
        node.kubectl("delete", "pods", "--all", "-n", name)  # the next test needs its GPUs


def test_full_pool_pending_and_unhealthy_gpu_is_told(node: Reach, namespace: str) -> None:
    for name in ("first", "second"):
        node.apply(namespace, json.dumps(pod(name, gpus=1)))
        node.wait(namespace, f"pod/{name}", "condition=Ready")
    node.apply(namespace, json.dumps(pod("third", gpus=1)))
    node.wait(namespace, "pod/third", "condition=PodScheduled=false")
    assert "Insufficient nvidia.com/gpu" in status(node, "pod", "third", namespace)["conditions"][0]["message"]

    assert node.cluster
    plugin = node.cluster.processes.named("fake-gpus")
    plugin.signal(signal.SIGUSR1)
    try:
        node.kubectl("wait", "--for=jsonpath={.status.allocatable.nvidia\\.com/gpu}=1", "node/node1", "--timeout=60s")

        def healths() -> list[str]:
            told = [status(node, "pod", name, namespace)["containerStatuses"][0] for name in ("first", "second")]
            return sorted(r["health"] for one in told for s in one.get("allocatedResourcesStatus", []) for r in s["resources"])

        assert wait_until(lambda: healths() == ["Healthy", "Unhealthy"], 60), healths()
        assert status(node, "pod", "first", namespace)["phase"] == "Running", "the pod itself goes on"
    finally:
        plugin.signal(signal.SIGUSR2)
    node.kubectl("wait", "--for=jsonpath={.status.allocatable.nvidia\\.com/gpu}=2", "node/node1", "--timeout=60s")


def test_pods_outlive_a_kubelet_and_gpus_come_back(node: Reach, namespace: str) -> None:
    if node.existing or not node.cluster:
        pytest.skip("a lent cluster's components are not ours to kill")
    node.apply(namespace, json.dumps(pod("lasting", gpus=1)))
    node.wait(namespace, "pod/lasting", "condition=Ready")
    before = status(node, "pod", "lasting", namespace)["containerStatuses"][0]["containerID"]
    registered = node.cluster.processes.tail("fake-gpus").count("registered")
    kubelet = node.cluster.processes.restart("kubelet")
    # A kubelet starts with no plugin, and until it registers again a pod that asks for a GPU is not admitted.
    assert wait_until(lambda: node.cluster is not None and node.cluster.processes.tail("fake-gpus").count("registered") > registered, 60)
    node.apply(namespace, json.dumps(pod("next", gpus=1)))
    node.wait(namespace, "pod/next", "condition=Ready", seconds=90)
    after = status(node, "pod", "lasting", namespace)["containerStatuses"][0]
    assert kubelet.alive and after["containerID"] == before and after["restartCount"] == 0


def test_pod_has_names_services_database_volumes_and_is_reached(node: Reach, namespace: str) -> None:
    image = node.load("gateway")[0]
    claim = node.claim(namespace)
    base = {"name": "base", "image": {"reference": PAUSE, "pullPolicy": "Never"}}
    store = {"name": "store", "persistentVolumeClaim": {"claimName": claim}}
    mounts = [{"name": "base", "mountPath": "/base"}, {"name": "store", "mountPath": "/store"}]
    service = {"spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]}}
    node.apply(namespace, json.dumps({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}} | service))
    command = ["python", "-c", WEB, f"web.{namespace}.svc", node.facts.address, "5432"]
    probe = {"tcpSocket": {"port": 8080}, "periodSeconds": 1}
    body = pod("web", image, gpus=1, command=command, volumeMounts=mounts, readinessProbe=probe, volumes=[base, store])
    node.apply(namespace, json.dumps(body))
    node.wait(namespace, "pod/web", "condition=Ready")

    own = json.loads(node.kubectl("get", "service", "web", "-n", namespace, "-o", "json"))["spec"]["clusterIP"]
    assert wait_until(lambda: _reached(own, 80), 20), "kube-proxy does not carry the service"
    said = json.loads(_get(own, 80))
    assert _get(status(node, "pod", "web", namespace)["podIP"], 8080), "a pod is reached by its own address too"
    assert said["gpu"] in ("GPU-0", "GPU-1")
    assert said["volume"] == ["pause"] and said["write"] == "Read-only file system"
    assert said[f"web.{namespace}.svc"] == own
    assert said["kubernetes.default.svc"] and said["unknown"] == "refused"
    assert (Path(node.facts.store) / "note").read_text() == "from a pod"
    assert "web" in node.kubectl("exec", "-n", namespace, "web", "--", "python", "-c", "import socket; print(socket.gethostname())")


async def test_database_is_reached_from_here_and_asks_for_its_password(node: Reach) -> None:
    url = node.facts.database_url
    connection = await asyncpg.connect(url)
    assert await connection.fetchval("SELECT 1") == 1
    await connection.close()
    name, _, rest = url.removeprefix("postgresql://").partition(":")
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(f"postgresql://{name}:wrong@{rest.partition('@')[2]}")


def test_down_leaves_nothing_and_clusters_live_side_by_side(node: Reach, tmp_path: Path) -> None:
    tmp_path.chmod(0o711)
    second = Cluster(tmp_path / "second")
    facts = second.up(2, node.toolbox)
    assert facts.address != node.facts.address
    reach = Reach(Path(facts.kubeconfig), node.toolbox, existing=False)
    reach.apply("default", json.dumps(pod("stays", gpus=1)))
    reach.wait("default", "pod/stays", "condition=Ready")
    cable = (second.folder / "cgroup").read_text()
    room = second.processes.named("room")
    inside = os.readlink(f"/proc/{room.pid}/ns/pid")
    assert len(_members(inside)) > 8, "etcd, API server, controllers, scheduler, containerd, kubelet, kube-proxy, a shim, the pod"
    assert list(MOUNT.glob(f"*/{cable}") if not (MOUNT / cable).exists() else [MOUNT / cable])

    second.down()

    assert _members(inside) == []
    assert not list(MOUNT.glob(f"*/{cable}")) and not (MOUNT / cable).exists()
    assert not Path(f"/sys/class/net/{cable}").exists()
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
    assert not second.folder.exists()
    assert node.kubectl("get", "--raw", "/readyz") == "ok", "the other one is untouched"


def _members(namespace: str) -> list[int]:
    """The processes of a pid namespace."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(entry / "ns" / "pid") == namespace:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def _reached(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 1).close()
    except OSError:
        return False
    return True


def _get(host: str, port: int) -> str:
    with urllib.request.urlopen(f"http://{host}:{port}/", timeout=5) as answer:
        return str(answer.read().decode())
