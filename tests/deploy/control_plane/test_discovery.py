"""The gateway's view of the replicas, by a real API server and the endpoint controller's own slices."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

from services.chassis.cluster import connect
from services.gateway.discovery import Discovery
from services.gateway.endpoints import View
from tests.deploy.reach import Reach
from tests.faults.proxy import fault_proxy

MODEL = """
apiVersion: v1
kind: Service
metadata: {name: argosy-chat, labels: {app.kubernetes.io/part-of: argosy, app.kubernetes.io/component: model, argosy.dev/model: chat}}
spec: {clusterIP: None, selector: {argosy.dev/model: chat}, ports: [{name: grpc, port: 8500}]}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: argosy-chat}
spec:
  replicas: 2
  selector: {matchLabels: {argosy.dev/model: chat}}
  template:
    metadata:
      labels: {app.kubernetes.io/part-of: argosy, app.kubernetes.io/component: model, argosy.dev/model: chat}
      annotations: {fake.argosy.dev/stop-seconds: "3"}
    spec:
      nodeSelector: {argosy.dev/pool: h100}
      tolerations: [{key: nvidia.com/gpu, operator: Equal, value: present, effect: NoSchedule}]
      terminationGracePeriodSeconds: 10
      securityContext: {runAsNonRoot: true, runAsUser: 65532, seccompProfile: {type: RuntimeDefault}}
      containers:
      - name: model
        image: any
        resources: {limits: {nvidia.com/gpu: 1}}
        securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
"""


class Watched:
    """What a gateway would follow."""

    def __init__(self, discovery: Discovery, api: Any) -> None:
        self.discovery, self.api, self.views, self._changed = discovery, api, [View({})], asyncio.Event()

    async def follow(self, view: View) -> None:
        self.views.append(view)
        self._changed.set()
        self._changed = asyncio.Event()

    async def until(self, wanted: Callable[[View], bool], timeout_s: float = 60) -> View:
        async with asyncio.timeout(timeout_s):
            while not wanted(self.views[-1]):
                await self._changed.wait()
        return self.views[-1]


@asynccontextmanager
async def watching(reach: Reach, patch: pytest.MonkeyPatch, namespace: str, host: str = "", **settings: bool) -> AsyncIterator[Watched]:
    patch.setenv("KUBECONFIG", str(reach.kubeconfig))
    api = connect()
    api.configuration.host = host or api.configuration.host
    watched = Watched(Discovery((namespace,), api, **settings), api)
    async with watched.discovery.following(watched.follow):
        yield watched


def offered(view: View) -> int:
    return sum(endpoint.offered for endpoint in view.endpoints.values())


async def kubectl(reach: Reach, *arguments: str) -> str:
    return await asyncio.to_thread(reach.kubectl, *arguments)


async def test_terminating_leaves_routing(control_plane: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
    """From nothing to two replicas, a deleted one that takes nothing new while it is still there, its successor, and none."""
    with control_plane.fresh_namespace() as namespace:
        async with watching(control_plane, monkeypatch, namespace) as watched:
            await watched.until(lambda view: view is not watched.views[0])
            assert watched.views[-1] == View({})
            await asyncio.to_thread(control_plane.apply, namespace, MODEL)
            both = await watched.until(lambda view: offered(view) == 2)
            assert both.models == {"models/chat"}
            assert {endpoint.server_name for endpoint in both.endpoints.values()} == {f"argosy-chat.{namespace}.svc"}
            assert all(endpoint.address.endswith(":8500") for endpoint in both.endpoints.values())
            pods = (await kubectl(control_plane, "get", "pods", "-n", namespace, "-o", "jsonpath={.items[*].metadata.name}")).split()
            await kubectl(control_plane, "delete", "pod", pods[0], "-n", namespace, "--wait=false")
            going = await watched.until(lambda view: any(endpoint.terminating for endpoint in view.endpoints.values()))
            (gone,) = (endpoint.uid for endpoint in going.endpoints.values() if endpoint.terminating)
            assert gone in both.endpoints and not going.endpoints[gone].offered
            await watched.until(lambda view: offered(view) == 2 and gone not in view.endpoints)
            await kubectl(control_plane, "scale", "deployment/argosy-chat", "-n", namespace, "--replicas=0")
            assert (await watched.until(lambda view: not view.endpoints)).models == {"models/chat"}, "asleep, not unknown"
            await kubectl(control_plane, "delete", "service/argosy-chat", "-n", namespace)
            await watched.until(lambda view: not view.models)


async def test_F19_api_outage_keeps_the_view(
    control_plane: Reach, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While the API server cannot be reached the replicas stay, and the view says its age; what happened meanwhile is seen after."""
    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
    server = urlsplit(connect().configuration.host)
    with control_plane.fresh_namespace() as namespace:
        await asyncio.to_thread(control_plane.apply, namespace, MODEL)
        async with (
            fault_proxy(f"{server.hostname}:{server.port}") as proxy,
            watching(control_plane, monkeypatch, namespace, f"https://{proxy.address}") as watched,
        ):
            before = await watched.until(lambda view: offered(view) == 2)
            watched.api.configuration.host = "https://127.0.0.1:1"  # nobody listens
            proxy.reset()
            await kubectl(control_plane, "scale", "deployment/argosy-chat", "-n", namespace, "--replicas=1")
            await kubectl(control_plane, "wait", "-n", namespace, "deployment/argosy-chat", "--for=jsonpath={.status.replicas}=1")
            async with asyncio.timeout(30):
                while "NewConnectionError" not in caplog.text:
                    await asyncio.sleep(0.05)
            aged = watched.discovery.age_s
            assert watched.views[-1] == before and aged > 0
            watched.api.configuration.host = f"https://{proxy.address}"
            await watched.until(lambda view: len(view.endpoints) == 1)
            assert watched.discovery.age_s < aged


async def test_unhealthy_gpu_leaves_routing(control_plane: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod whose status names a broken device gets nothing new, though its slice says ready; healed, it does."""
    with control_plane.fresh_namespace() as namespace:
        async with watching(control_plane, monkeypatch, namespace, gpu_health=True) as watched:
            await asyncio.to_thread(control_plane.apply, namespace, MODEL)
            await watched.until(lambda view: offered(view) == 2)
            pod = (await kubectl(control_plane, "get", "pods", "-n", namespace, "-o", "jsonpath={.items[0].metadata.name}")).strip()
            for health, left in (("Unhealthy", 1), ("Healthy", 2)):
                found = json.loads(await kubectl(control_plane, "get", "pod", pod, "-n", namespace, "-o", "json"))["status"]
                devices = [{"name": "nvidia.com/gpu", "resources": [{"resourceID": "gpu-0", "health": health}]}]
                found["containerStatuses"][0]["allocatedResourcesStatus"] = devices
                patch = json.dumps({"status": {"containerStatuses": found["containerStatuses"]}})
                await kubectl(control_plane, "patch", "pod", pod, "-n", namespace, "--subresource=status", "--type=merge", "-p", patch)
                view = await watched.until(lambda view, left=left: offered(view) == left)  # type: ignore[misc]
                assert len(view.endpoints) == 2 and all(endpoint.ready for endpoint in view.endpoints.values())
