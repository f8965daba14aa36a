"""Replicas as an API server lists them, from its HTTP to a call's answer."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from services.chassis.cluster import NoCluster, connect
from services.chassis.errors import NotStarted
from services.gateway.discovery import Discovery
from services.gateway.endpoints import LABELS, View
from tests.fakes.edge import Edge, chat, edge, events_of, metadata, text_of
from tests.fakes.engine import FakeEngine, fake_engine
from tests.fakes.kubernetes import Fault, Kubernetes, running


@pytest.fixture
def cluster() -> Iterator[Kubernetes]:
    with running() as api:
        yield api


def port_of(engine: FakeEngine) -> str:
    return engine.address.rpartition(":")[2]


def marks() -> dict[str, str]:
    return dict(label.split("=") for label in LABELS.split(","))


def listed(api: Kubernetes, engine: FakeEngine, **conditions: bool) -> None:
    """An EndpointSlice with one pod; each engine has a port of its own, so each has a slice of its own."""
    name, port = f"s{port_of(engine)}", int(port_of(engine))
    labels = marks() | {"argosy.dev/model": "fake", "kubernetes.io/service-name": "chat"}
    endpoint = {"addresses": ["127.0.0.1"], "conditions": {"ready": True} | conditions, "targetRef": {"kind": "Pod", "uid": f"pod-{port}"}}
    if name in api.names("endpointslices", "models"):
        api.change("endpointslices", name, lambda found: found.update(endpoints=[endpoint]), "models")
    else:
        body = {"metadata": {"name": name, "labels": labels}, "addressType": "IPv4", "ports": [{"name": "grpc", "port": port}]}
        api.put("endpointslices", body | {"endpoints": [endpoint]}, "models")


def unlisted(api: Kubernetes, engine: FakeEngine) -> None:
    api.delete("endpointslices", f"s{port_of(engine)}", "models")


async def said(at: Edge) -> str:
    return text_of(await events_of(at.generation.StreamChat(chat(), metadata=metadata(), timeout=10)))


async def until(condition: Callable[[], bool], timeout_s: float = 20) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


async def test_replicas_come_and_go_as_the_cluster_lists_them(cluster: Kubernetes) -> None:
    async with fake_engine(["one"]) as one, fake_engine(["two"]) as two:
        listed(cluster, one)
        async with edge(cluster=cluster.client(), reachable=1) as at:
            assert await said(at) == "one"
            listed(cluster, two)
            await at.replicas.until(2)
            listed(cluster, one, ready=False, terminating=True)
            await at.replicas.until(1)
            assert {await said(at) for _ in range(4)} == {"two"}
            unlisted(cluster, one)
            await until(lambda: [link.address for link in at.replicas.links] == [two.address])


async def test_F19_without_the_api_server_the_gateway_goes_on_with_what_it_saw(
    cluster: Kubernetes, caplog: pytest.LogCaptureFixture
) -> None:
    async with fake_engine(["one"]) as one, fake_engine(["two"]) as two:
        listed(cluster, one)
        async with edge(cluster=cluster.client(), reachable=1) as at:
            cluster.fault = lambda method, path: Fault(503)
            cluster.cut()
            listed(cluster, two)
            await until(lambda: "endpointslices in models cannot be read: HTTP 503" in caplog.text)
            assert await said(at) == "one" and len(at.replicas.links) == 1 and at.gate.serving.is_ready
            cluster.fault = lambda method, path: None
            await at.replicas.until(2)


async def test_F21_what_a_watch_did_not_tell_is_seen_with_the_next_list(cluster: Kubernetes) -> None:
    async with fake_engine(["one"]) as one, fake_engine(["two"]) as two:
        listed(cluster, one)
        async with edge(cluster=cluster.client(), reachable=1) as at:
            cluster.hears = False
            listed(cluster, two)
            unlisted(cluster, one)
            cluster.expire()  # 410
            await until(lambda: [link.address for link in at.replicas.links] == [two.address])


async def test_a_gateway_waits_for_its_first_view_and_not_for_a_replica(cluster: Kubernetes) -> None:
    cluster.fault = lambda method, path: Fault(403)
    async with edge(cluster=cluster.client(), reachable=0) as at:
        await until(lambda: len(cluster.requests) >= 2)
        assert not at.gate.serving.is_ready
        cluster.fault = lambda method, path: None
        await until(lambda: at.gate.serving.is_ready)
        with pytest.raises(NotStarted):
            at.replicas.resolve("models/fake", ())


def pod(engine: FakeEngine, health: str) -> dict[str, Any]:
    name = f"pod-{port_of(engine)}"
    resources = [{"name": "nvidia.com/gpu", "resources": [{"resourceID": "gpu-0", "health": health}]}]
    status = {"phase": "Running", "containerStatuses": [{"name": "model", "allocatedResourcesStatus": resources}]}
    return {"metadata": {"name": name, "uid": name, "labels": marks()}, "status": status}


async def test_a_pod_on_a_broken_gpu_gets_no_new_work(cluster: Kubernetes) -> None:
    async with fake_engine(["one"]) as one, fake_engine(["two"]) as two:
        for engine in (one, two):
            listed(cluster, engine)
            cluster.put("pods", pod(engine, "Healthy"), "models")
        async with edge(cluster=cluster.client(), gpu_health=True, reachable=2) as at:
            name = pod(one, "")["metadata"]["name"]
            cluster.change("pods", name, lambda body: body.update(status=pod(one, "Unhealthy")["status"]), "models")
            await at.replicas.until(1)
            assert {await said(at) for _ in range(4)} == {"two"}
            cluster.change("pods", name, lambda body: body.update(status=pod(one, "Healthy")["status"]), "models")
            await at.replicas.until(2)


async def test_pods_are_read_by_nobody_who_did_not_ask(cluster: Kubernetes) -> None:
    async with fake_engine() as one:
        listed(cluster, one)
        async with edge(cluster=cluster.client(), reachable=1):
            assert cluster.requests and all("/endpointslices?" in path for _, _, path in cluster.requests)


async def test_a_view_waits_for_every_namespace(cluster: Kubernetes) -> None:
    views: list[View] = []

    async def follow(view: View) -> None:
        views.append(view)

    cluster.fault = lambda method, path: Fault(403) if "/other/" in path else None
    discovery = Discovery(("models", "other"), cluster.client())
    async with fake_engine() as one, discovery.following(follow):
        listed(cluster, one)
        await until(lambda: sum("/other/" in path for _, _, path in cluster.requests) >= 2)
        assert not views and discovery.view() is None
        cluster.fault = lambda method, path: None
        await until(lambda: bool(views and views[-1].endpoints))
        assert views[-1].models == {"models/fake"}


async def test_F21_a_silent_api_server_is_asked_again(cluster: Kubernetes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch whose other end is gone says nothing at all; a list that is not answered neither."""
    monkeypatch.setattr("services.chassis.cluster.SILENCE_S", 0.4)  # the fake's bookmarks come once a second
    monkeypatch.setattr("services.chassis.cluster.ANSWER_S", 0.4)
    async with fake_engine(["one"]) as one, edge(cluster=cluster.client(), reachable=0) as at:
        cluster.hears = False
        listed(cluster, one)
        await at.replicas.until(1, timeout_s=20)
        cluster.fault = lambda method, path: Fault(silent_s=2.0)
        unlisted(cluster, one)
        asked = len(cluster.requests)
        await until(lambda: len(cluster.requests) >= asked + 2)
        assert await said(at) == "one"
        cluster.fault = lambda method, path: None
        await until(lambda: not at.replicas.links)


def test_no_cluster_is_said_in_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(NoCluster, match="model namespaces are set, but there is no cluster to ask"):
        connect("model namespaces are set")
