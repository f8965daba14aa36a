"""The gateway's view of the replicas, by a real API server and the endpoint controller's own slices."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest

from services.gateway.discovery import Discovery, connect
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
      nodeSelector: {argosy.dev/pool: cpu}
      terminationGracePeriodSeconds: 10
      securityContext: {runAsNonRoot: true, runAsUser: 65532, seccompProfile: {type: RuntimeDefault}}
      containers:
      - name: model
        image: any
        securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
"""


class Watched:
    """What a gateway would follow."""

    def __init__(self, discovery: Discovery) -> None:
        self.discovery, self.views, self._changed = discovery, [View({})], asyncio.Event()

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
    watched = Watched(Discovery((namespace,), api, **settings))
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


# The client's TLS library forgets the sockets of handshakes that were reset, until they are collected.
@pytest.mark.filterwarnings("ignore:unclosed <ssl.SSLSocket:ResourceWarning")
async def test_F19_api_outage_keeps_the_view(control_plane: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
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
            proxy.refusing = True
            proxy.reset()
            aged = watched.discovery.age_s
            await kubectl(control_plane, "scale", "deployment/argosy-chat", "-n", namespace, "--replicas=1")
            await kubectl(control_plane, "wait", "-n", namespace, "deployment/argosy-chat", "--for=jsonpath={.status.replicas}=1")
            accepted = proxy.accepted
            async with asyncio.timeout(30):
                while proxy.accepted < accepted + 2:  # it knocks, and is refused
                    await asyncio.sleep(0.05)
            assert watched.views[-1] == before and watched.discovery.age_s > aged
            proxy.heal()
            await watched.until(lambda view: len(view.endpoints) == 1)
            assert watched.discovery.age_s < aged + 5
        gc.collect()  # while they are still forgiven
