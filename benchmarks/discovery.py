"""How soon a gateway knows of a new or lost replica: `python -m benchmarks.discovery`; with KUBECONFIG, on that cluster's API too."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from benchmarks.record import header, percentile, spread, table
from services.chassis.cluster import connect
from services.gateway.discovery import Discovery
from services.gateway.endpoints import LABELS, View
from tests.fakes.edge import edge
from tests.fakes.engine import fake_engine
from tests.fakes.kubernetes import running

ROUNDS = 100
NAMESPACE, NAME = "default", "argosy-benchmark"
STATES: dict[str, dict[str, bool] | None] = {
    "new": {"ready": True, "serving": True, "terminating": False},
    "terminating": {"ready": False, "serving": True, "terminating": True},
    "gone": None,
}


def slice_of(conditions: dict[str, bool] | None, host: str, port: int) -> dict[str, Any]:
    """An EndpointSlice with one pod, or none."""
    labels = dict(label.split("=") for label in LABELS.split(",")) | {"argosy.dev/model": "fake", "kubernetes.io/service-name": "fake"}
    pod = {"addresses": [host], "conditions": conditions, "targetRef": {"kind": "Pod", "name": "p", "namespace": NAMESPACE, "uid": "u"}}
    endpoints = [pod] if conditions else []
    ports = [{"name": "grpc", "port": port}]
    return {"metadata": {"name": NAME, "labels": labels}, "addressType": "IPv4", "ports": ports, "endpoints": endpoints}


def replaced(body: dict[str, Any], slice_: dict[str, Any]) -> None:
    """Have `slice_` say what `body` says."""
    slice_.update(endpoints=body["endpoints"])


async def routed() -> dict[str, list[float]]:
    """From the change at an API to the replica that takes calls, or no more: HTTP, a channel, its description and its first load report."""
    found: dict[str, list[float]] = {name: [] for name in STATES}
    with running() as api:
        async with fake_engine() as engine, edge(cluster=api.client(), reachable=0) as at:
            host, _, port = engine.address.rpartition(":")
            for _ in range(ROUNDS):
                for name, conditions in STATES.items():
                    body, before = slice_of(conditions, host, int(port)), time.perf_counter()
                    if name == "new":
                        api.put("endpointslices", body, "models")
                    else:
                        api.change("endpointslices", NAME, partial(replaced, body), "models")
                    if name != "gone":
                        await at.replicas.until(1 if name == "new" else 0)
                    while name == "gone" and at.replicas.links:
                        await at.replicas.judged()
                    found[name].append(time.perf_counter() - before)
    return found


@asynccontextmanager
async def watching() -> AsyncIterator[Callable[[], Any]]:
    """A view of the cluster that KUBECONFIG names, and a wait for its next change."""
    changed = asyncio.Event()

    async def follow(view: View) -> None:
        changed.set()

    async def wait() -> None:
        await asyncio.wait_for(changed.wait(), 30)
        changed.clear()

    async with Discovery((NAMESPACE,), connect()).following(follow):
        await wait()
        yield wait


async def viewed() -> dict[str, list[float]]:
    """From the write, on a real API server, to the gateway's view."""
    from kubernetes import client

    found: dict[str, list[float]] = {name: [] for name in STATES}
    slices = client.DiscoveryV1Api(connect())
    async with watching() as wait:
        slices.create_namespaced_endpoint_slice(NAMESPACE, slice_of(None, "10.1.2.3", 8500))
        try:
            await wait()  # an empty slice is a model that sleeps
            for _ in range(ROUNDS):
                for name, conditions in STATES.items():
                    body, before = slice_of(conditions, "10.1.2.3", 8500), time.perf_counter()
                    writing = asyncio.create_task(asyncio.to_thread(slices.replace_namespaced_endpoint_slice, NAME, NAMESPACE, body))
                    await wait()
                    found[name].append(time.perf_counter() - before)
                    await writing
        finally:
            slices.delete_namespaced_endpoint_slice(NAME, NAMESPACE)
    return found


def show(title: str, found: dict[str, list[float]]) -> None:
    """A table of milliseconds."""
    print(f"\n{title}\n")
    rows: list[tuple[object, ...]] = [("replica", "changes", "ms", "99 %")]
    for name, seconds in found.items():
        rows.append((name, len(seconds), spread([1e3 * each for each in seconds], ".1f"), f"{1e3 * percentile(seconds, 0.99):.1f}"))
    table(*rows)


async def main() -> None:
    """Print the tables."""
    header()
    show("Until calls are routed so, with an API server in this process:", await routed())
    if "KUBECONFIG" in os.environ:
        show("Until a gateway's view says so, on a real API server:", await viewed())


if __name__ == "__main__":
    asyncio.run(main())
