"""The models chart on a real API server and scheduler: where replicas land, and what upgrades do to what others have changed."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.reach import Reach, Refused
from tests.deploy.templates import CHARTS, Object, over

RELEASE = "models"
TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
DIGEST = f"sha256:{'0' * 64}"
IMAGE = {"ref": "localhost/argosy-weights-gemma-3-270m:0.1.0"}
HUB = {"source": "hf", "ref": "org/name", "size": "1Gi", "digest": DIGEST}
VALUES: Object = {
    "global": {
        "image": {"pullPolicy": "Never"},
        "tls": {"mode": "existingSecret", "existingSecret": "argosy-tls"},
        "keys": {"existingSecret": "argosy-keys"},
        "nodePools": {
            "h100": {
                "providerPool": "h100",
                "taints": [TAINT],
                "gpu": {"perNode": 8, "product": ["NVIDIA-H100-80GB-HBM3"]},
                "nodes": 2,
                "spareGpus": 1,
                "zoneSpread": True,
            },
            "mig": {"providerPool": "h100-mig", "taints": [TAINT], "gpu": {"mode": "mig", "profile": "3g.40gb", "perNode": 2}, "nodes": 1},
            "cpu": {"providerPool": "cpu", "gpu": {"mode": "none"}},
        },
    },
    "models": {
        "chat": {"pool": "h100", "replicas": 4, "weights": IMAGE},
        "scaled": {"pool": "h100", "autoscaling": {"min": 1, "max": 3}, "weights": IMAGE},
        "sliced": {"pool": "mig", "replicas": 2, "weights": IMAGE},
        "claimed": {"pool": "dra", "replicas": 2, "weights": IMAGE},
    },
}


@dataclass(frozen=True)
class Installed:
    """A models release in a namespace of the tests' own, with a class of devices that three of node h100-a's are of."""

    reach: Reach
    namespace: str
    folder: Path

    @property
    def pool(self) -> Object:
        """The DRA pool."""
        gpu = {"mode": "dra", "deviceClass": f"{self.namespace}.argosy.dev", "perNode": 3}
        return {"providerPool": "h100", "taints": [TAINT], "gpu": gpu, "nodes": 1}

    def upgrade(self, changes: Object | None = None, *arguments: str) -> None:
        file = self.folder / "values.json"
        file.write_text(json.dumps(over(over(VALUES, {"global": {"nodePools": {"dra": self.pool}}}), changes or {})))
        self.reach.helm("upgrade", "--install", RELEASE, str(CHARTS / "models"), "-n", self.namespace, "-f", str(file), *arguments)

    def get(self, kind: str, *arguments: str) -> Any:
        return json.loads(self.reach.kubectl("get", kind, "-n", self.namespace, "-o", "json", *arguments))

    def deployment(self, model: str) -> Any:
        return self.get("deployment", f"{RELEASE}-model-{model}")

    def evict(self, pod: str) -> None:
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": self.namespace}}
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}/eviction"
        self.reach.kubectl("create", f"--raw={path}", "-f", "-", manifest=json.dumps(eviction))

    def ready(self, *models: str) -> None:
        for model in models:
            self.reach.kubectl("rollout", "status", f"deployment/{RELEASE}-model-{model}", "-n", self.namespace, "--timeout=60s")

    def nodes(self, model: str) -> list[str]:
        pods = self.get("pods", "-l", f"argosy.dev/model={model},app.kubernetes.io/component=model")["items"]
        return sorted(pod["spec"]["nodeName"] for pod in pods if "deletionTimestamp" not in pod["metadata"])


@pytest.fixture(scope="module")
def installed(control_plane: Reach, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installed]:
    if "node/h100-a\n" not in control_plane.kubectl("get", "nodes", "-o", "name"):
        pytest.skip("the cluster that was lent has not the fake nodes")
    with control_plane.fresh_namespace() as namespace:
        it = Installed(control_plane, namespace, tmp_path_factory.mktemp("models"))
        driver = f"{namespace}.argosy.dev"
        claim = f"{RELEASE}-model-hub-weights"
        objects: list[Object] = [
            {
                "apiVersion": "resource.k8s.io/v1",
                "kind": "DeviceClass",
                "metadata": {"name": driver},
                "spec": {"selectors": [{"cel": {"expression": f"device.driver == '{driver}'"}}]},
            },
            {
                "apiVersion": "resource.k8s.io/v1",
                "kind": "ResourceSlice",
                "metadata": {"name": namespace},
                "spec": {
                    "driver": driver,
                    "nodeName": "h100-a",
                    "pool": {"name": "h100-a", "generation": 1, "resourceSliceCount": 1},
                    "devices": [{"name": f"gpu-{number}", "attributes": {"size": {"int": number}}} for number in range(3)],
                },
            },
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": namespace},
                "spec": {
                    "capacity": {"storage": "1Gi"},
                    "accessModes": ["ReadWriteMany"],
                    "hostPath": {"path": "/nowhere"},
                    "claimRef": {"namespace": namespace, "name": claim},
                },
            },
        ]
        control_plane.kubectl("apply", "-f", "-", manifest=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))
        try:
            it.upgrade()
            it.ready(*VALUES["models"])
            yield it
        finally:
            control_plane.kubectl("delete", "deviceclass", driver, "--wait=false")
            control_plane.kubectl("delete", "resourceslice", namespace, "--wait=false")
            control_plane.kubectl("delete", "persistentvolume", namespace, "--wait=false")


@pytest.fixture(autouse=True)
def as_installed(installed: Installed) -> Iterator[None]:
    """Whatever the test before has changed: models come and go, and those of VALUES stay."""
    yield
    installed.upgrade()


def test_lands_on_pool_or_says_why(installed: Installed) -> None:
    """Four pods of one GPU, spread over both zones; a pool that names nodes nobody has is a sentence in an event."""
    assert installed.nodes("chat") == ["h100-a", "h100-a", "h100-b", "h100-b"]
    pool = {"providerPool": "h200", "taints": [TAINT], "gpu": {"perNode": 8}, "nodes": 1}
    installed.upgrade({"global": {"nodePools": {"h200": pool}}, "models": {"lost": {"pool": "h200", "replicas": 2, "weights": IMAGE}}})
    installed.reach.wait(installed.namespace, f"deployment/{RELEASE}-model-lost", "jsonpath={.status.unavailableReplicas}=2")
    pods = ["pod", "-l", "argosy.dev/model=lost"]
    condition = 'jsonpath={.status.conditions[?(@.type=="PodScheduled")].reason}=Unschedulable'
    installed.reach.kubectl("wait", "-n", installed.namespace, f"--for={condition}", "--timeout=30s", *pods)
    (message, *_) = [
        each["message"] for pod in installed.get(*pods)["items"] for each in pod["status"]["conditions"] if each["type"] == "PodScheduled"
    ]
    assert "didn't match Pod's node affinity/selector" in message


def test_mig_pool(installed: Installed) -> None:
    assert installed.nodes("sliced") == ["mig-a", "mig-a"]


def test_dra_pool(installed: Installed) -> None:
    """A device for each pod, and the third of the class stays free; another selector is another claim template, with no error."""
    assert installed.nodes("claimed") == ["h100-a", "h100-a"]

    before = installed.get("resourceclaims")["items"]
    assert len({device(claim) for claim in before}) == 2
    large = f"device.attributes['{installed.pool['gpu']['deviceClass']}'].size > 0"
    changed = {"global": {"nodePools": {"dra": {"gpu": {"selectors": [large]}}}}}
    installed.upgrade(over(changed, {"models": {"claimed": {"rollout": {"surge": 0}}}}))
    for claim in before:
        installed.reach.wait(installed.namespace, f"resourceclaim/{claim['metadata']['name']}", "delete")
    installed.ready("claimed")
    assert {device(claim) for claim in installed.get("resourceclaims")["items"]} == {"gpu-1", "gpu-2"}


def device(claim: Object) -> str:
    """What the scheduler gave it."""
    (result,) = claim["status"]["allocation"]["devices"]["results"]
    return str(result["device"])


def test_scale_then_upgrade(installed: Installed) -> None:
    """Helm 4 applies on the server: a field that it and somebody else write would be a conflict."""
    name = f"deployment/{RELEASE}-model-scaled"
    installed.reach.kubectl("scale", name, "--replicas=3", "-n", installed.namespace)
    installed.upgrade({"models": {"scaled": {"load": {"maxSeconds": 700}}}})
    spec = installed.deployment("scaled")["spec"]
    assert spec["replicas"] == 3
    assert spec["template"]["spec"]["containers"][0]["startupProbe"]["failureThreshold"] == 350
    installed.reach.kubectl("scale", f"deployment/{RELEASE}-model-chat", "--replicas=5", "-n", installed.namespace)
    with pytest.raises(Refused, match="conflict"):
        installed.upgrade()
    installed.reach.kubectl("scale", f"deployment/{RELEASE}-model-chat", "--replicas=4", "-n", installed.namespace)


def test_install_upgrade_rollback(installed: Installed) -> None:
    """In a namespace that admits only restricted pods."""
    before = installed.deployment("chat")["spec"]["template"]
    revision = json.loads(installed.reach.helm("history", RELEASE, "-n", installed.namespace, "-o", "json"))[-1]["revision"]
    installed.upgrade({"models": {"chat": {"shmGiB": 2, "podAnnotations": {"a": "b"}}}})
    assert installed.deployment("chat")["spec"]["template"] != before
    installed.ready("chat")
    installed.reach.helm("rollback", RELEASE, str(revision), "-n", installed.namespace)
    assert installed.deployment("chat")["spec"]["template"] == before


def test_drain_respects_budget_and_broken_pod_evictable(installed: Installed) -> None:
    """With one replica broken nobody drains a second one; the broken one may go, or no node with it would ever be drained."""
    (broken, healthy, *_) = (pod["metadata"]["name"] for pod in installed.get("pods", "-l", "argosy.dev/model=chat")["items"])
    installed.reach.kubectl("annotate", "pod", broken, "fake.argosy.dev/ready=false", "-n", installed.namespace)
    budget = f"poddisruptionbudget/{RELEASE}-model-chat"
    installed.reach.wait(installed.namespace, budget, "jsonpath={.status.disruptionsAllowed}=0")
    with pytest.raises(Refused, match="disruption budget"):
        installed.evict(healthy)
    installed.evict(broken)
    installed.reach.wait(installed.namespace, f"pod/{broken}", "delete")
    installed.reach.wait(installed.namespace, budget, "jsonpath={.status.disruptionsAllowed}=1")


def test_notes_verbatim(installed: Installed) -> None:
    notes = installed.reach.helm("get", "notes", RELEASE, "-n", installed.namespace)
    for model in VALUES["models"]:
        assert f"  {model}: " in notes
    commands = [shlex.split(line) for line in notes.splitlines() if line.startswith("  kubectl ")]
    assert len(commands) == 2
    assert "models-model-chat" in installed.reach.kubectl(*commands[0][1:])
    installed.reach.kubectl(*commands[1][1:])


def test_a_fetch_runs_beside_the_first_pods_and_before_later_ones(installed: Installed) -> None:
    """And what it fetched stays when the model goes."""
    claim = f"{RELEASE}-model-hub-weights"
    hub = {"models": {"hub": {"pool": "cpu", "replicas": 1, "weights": HUB}}}
    installed.upgrade(hub)
    (job,) = installed.get("jobs")["items"]
    assert "helm.sh/hook" not in job["metadata"].get("annotations", {})
    installed.reach.wait(installed.namespace, f"job/{job['metadata']['name']}", "condition=Complete")
    installed.ready("hub")
    installed.upgrade(over(hub, {"models": {"hub": {"weights": {"revision": "next"}}}}))  # ends when the hook has
    assert installed.get("jobs")["items"] == []
    installed.upgrade()
    assert installed.get("pvc", claim)["status"]["phase"] == "Bound"
