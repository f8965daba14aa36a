"""Tier 1's stand-in for kubelets: keeps fake nodes ready and says of the pods bound to them what a kubelet would say.

`python -m tools.cluster.fake_nodes KUBECONFIG [--bare]`. Every node with the label argosy.dev/fake-node is its; the pools below are made
at the start unless --bare. Annotations steer it, and may be changed while it runs:

  node  fake.argosy.dev/resources      JSON, added to what every node has: {"nvidia.com/gpu": "8"}
        fake.argosy.dev/lost           any value: no more lease, and no more word about its pods
  pod   fake.argosy.dev/run-seconds    a Job's pod ends after so many (2 unless said; "never" is one too)
        fake.argosy.dev/exit-code      the code with which it ends (0); given later than the start, it ends then
        fake.argosy.dev/message        what it leaves as its termination message
        fake.argosy.dev/ready          "false": running and not ready
        fake.argosy.dev/stop-seconds   how long it takes to end when it is deleted (0)
"""

import argparse
import datetime as dt
import heapq
import itertools
import json
import queue
import sys
import threading
import time
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any

from tools.cluster.api import Api, ApiFailed, Body

FAKE = "argosy.dev/fake-node"
NOTE = "fake.argosy.dev/"
ROOM = {"cpu": "64", "memory": "512Gi", "pods": "110", "ephemeral-storage": "1Ti"}
GPU_TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
SPOT_TAINT = {"key": "argosy.dev/spot", "value": "true", "effect": "NoSchedule"}
H100 = "NVIDIA-H100-80GB-HBM3"
# name: (pool, GPU product, extended resources, taints); the letter is the zone
POOLS: dict[str, tuple[str, str, dict[str, str], list[Body]]] = {
    "h100-a": ("h100", H100, {"nvidia.com/gpu": "8"}, [GPU_TAINT]),
    "h100-b": ("h100", H100, {"nvidia.com/gpu": "8"}, [GPU_TAINT]),
    "spot-a": ("h100-spot", H100, {"nvidia.com/gpu": "8"}, [GPU_TAINT, SPOT_TAINT]),
    "mig-a": ("h100-mig", H100, {"nvidia.com/mig-3g.40gb": "2"}, [GPU_TAINT]),
    "l4-a": ("l4", "NVIDIA-L4", {"nvidia.com/gpu": "1"}, [GPU_TAINT]),
    "cpu-a": ("cpu", "", {}, []),
    "cpu-b": ("cpu", "", {}, []),
}
LEASE_SECONDS = 2.0
RETRY_SECONDS = 1.0
DEFAULT_RUN_SECONDS = 2.0
KILLED = 143  # what a program that does not handle SIGTERM ends with
Failures = (ApiFailed, OSError, HTTPException)


def now() -> str:
    """The time as the API writes it."""
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def node(name: str) -> Body:
    """The Node object of one of the pools."""
    pool, product, resources, taints = POOLS[name]
    labels = {
        FAKE: "true",
        "kubernetes.io/hostname": name,
        "kubernetes.io/os": "linux",
        "kubernetes.io/arch": "amd64",
        "topology.kubernetes.io/zone": f"zone-{name[-1]}",
        "argosy.dev/pool": pool,
    } | ({"nvidia.com/gpu.product": product} if product else {})
    metadata = {"name": name, "labels": labels, "annotations": {f"{NOTE}resources": json.dumps(resources)}}
    return {"apiVersion": "v1", "kind": "Node", "metadata": metadata, "spec": {"taints": taints}}


def notes(thing: Body) -> dict[str, str]:
    """Our annotations, without their prefix."""
    found: dict[str, str] = thing["metadata"].get("annotations") or {}
    return {key.removeprefix(NOTE): value for key, value in found.items() if key.startswith(NOTE)}


class FakeNodes:
    """One loop over events and timers; only the watches have threads of their own."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._events: queue.Queue[tuple[str, str, Body]] = queue.Queue(maxsize=10_000)
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._addresses = itertools.count(1)
        self._nodes: dict[str, Body] = {}
        self._ends: dict[str, float] = {}  # pod uid → when a Job's pod ends, by the monotonic clock

    def run(self) -> None:
        """For ever."""
        for kind, path in (("node", "/api/v1/nodes"), ("pod", "/api/v1/pods")):
            threading.Thread(target=self._watch, args=(kind, path), daemon=True).start()
        self._renew()
        while True:
            wait = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
            try:
                kind, change, thing = self._events.get(timeout=wait)
            except queue.Empty:
                self._guarded(heapq.heappop(self._timers)[2])
                continue
            handle = self._node_seen if kind == "node" else self._pod_seen
            self._guarded(lambda handle=handle, change=change, thing=thing: handle(change, thing))  # type: ignore[misc]

    def _watch(self, kind: str, path: str) -> None:
        while True:
            try:
                for change, thing in self._api.follow(path):
                    self._events.put((kind, change, thing))
            except Failures as error:
                print("watching again after", error, flush=True)
                time.sleep(RETRY_SECONDS)

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except ApiFailed as error:
            if error.status not in (404, 409):  # gone, or changed meanwhile: the next event tells
                print("refused:", error, flush=True)
        except (OSError, HTTPException) as error:
            print("no answer:", error, flush=True)

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._order), act))

    def _node_seen(self, change: str, seen: Body) -> None:
        name = seen["metadata"]["name"]
        if FAKE not in seen["metadata"].get("labels", {}):
            return
        if change == "DELETED":
            self._nodes.pop(name, None)
            return
        known = self._nodes.get(name)
        self._nodes[name] = seen
        if known is None or notes(known) != notes(seen):
            room = {**ROOM, **json.loads(notes(seen).get("resources", "{}"))}
            status = {"capacity": room, "allocatable": room, "addresses": [{"type": "Hostname", "address": name}]}
            if "lost" not in notes(seen):
                status["conditions"] = [self._condition("Ready", "True") | {"lastHeartbeatTime": now()}]
            self._api.merge(f"/api/v1/nodes/{name}/status", {"status": status})

    def _renew(self) -> None:
        self._later(LEASE_SECONDS, self._renew)
        for name, seen in self._nodes.items():
            if "lost" in notes(seen):
                continue
            path = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
            spec = {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": now()}
            try:
                self._api.merge(f"{path}/{name}", {"spec": spec})
            except ApiFailed as error:
                if error.status != 404:
                    raise
                body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": name}, "spec": spec}
                self._api.create(path, body)

    def _pod_seen(self, change: str, pod: Body) -> None:
        uid = pod["metadata"]["uid"]
        if change == "DELETED":
            self._ends.pop(uid, None)
            return
        seen = self._nodes.get(pod["spec"].get("nodeName", ""))
        if seen is None or "lost" in notes(seen):
            return
        phase = pod["status"].get("phase")
        if pod["metadata"].get("deletionTimestamp"):
            self._later(float(notes(pod).get("stop-seconds", 0)), lambda: self._remove(pod))
        elif phase == "Pending":
            self._start(pod)
        elif phase == "Running":
            self._keep(pod)

    def _start(self, pod: Body) -> None:
        third, fourth = divmod(next(self._addresses), 250)
        address = f"10.250.{third % 250}.{fourth + 1}"
        status = {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "startTime": now()}
        self._report(pod, status | self._running(pod))
        self._plan(pod)

    def _keep(self, pod: Body) -> None:
        """A running pod was seen, maybe again: its annotations may say something new."""
        ready = next((c["status"] for c in pod["status"].get("conditions", []) if c["type"] == "Ready"), "")
        if (ready == "True") != (notes(pod).get("ready") != "false"):
            self._report(pod, self._running(pod))
        self._plan(pod)

    def _plan(self, pod: Body) -> None:
        """Decide when a Job's pod ends: a code given while it runs ends it now."""
        uid, asked = pod["metadata"]["uid"], notes(pod)
        if not any(owner["kind"] == "Job" for owner in pod["metadata"].get("ownerReferences", [])):
            return
        seconds = asked.get("run-seconds", DEFAULT_RUN_SECONDS)
        if uid not in self._ends:
            self._ends[uid] = float("inf") if seconds == "never" else time.monotonic() + float(seconds)
        elif seconds == "never" and "exit-code" in asked:
            self._ends[uid] = time.monotonic()
        else:
            return
        if self._ends[uid] != float("inf"):
            self._later(self._ends[uid] - time.monotonic(), lambda: self._end(pod, int(asked.get("exit-code", 0))))

    def _end(self, pod: Body, code: int) -> None:
        ended = {"exitCode": code, "reason": "Error" if code else "Completed", "startedAt": now(), "finishedAt": now()}
        if message := notes(pod).get("message"):
            ended["message"] = message
        status = {"phase": "Failed" if code else "Succeeded", "conditions": self._conditions(pod, "False")}
        self._report(pod, status | {"containerStatuses": self._containers(pod, {"terminated": ended}, ready=False)})

    def _remove(self, pod: Body) -> None:
        """As a kubelet ends a deleted pod: its containers first, so that a Job sees a terminal phase, then the object."""
        path = self._path(pod)
        if self._api.get(path)["status"].get("phase") in ("Pending", "Running"):
            self._end(pod, int(notes(pod).get("exit-code", KILLED)))
        self._api.delete(path, {"gracePeriodSeconds": 0, "preconditions": {"uid": pod["metadata"]["uid"]}})

    def _running(self, pod: Body) -> Body:
        ready = notes(pod).get("ready") != "false"
        state = {"running": {"startedAt": now()}}
        return {"conditions": self._conditions(pod, str(ready)), "containerStatuses": self._containers(pod, state, ready)}

    def _containers(self, pod: Body, state: Body, ready: bool) -> list[Body]:
        common = {"imageID": "", "ready": ready, "started": ready, "restartCount": 0, "state": state}
        return [{"name": container["name"], "image": container.get("image", "")} | common for container in pod["spec"]["containers"]]

    def _conditions(self, pod: Body, ready: str) -> list[Body]:
        """A merge patch replaces the list, so what others wrote, such as DisruptionTarget, goes back in."""
        ours = {"Initialized": "True", "ContainersReady": ready, "Ready": ready}
        theirs = [one for one in pod["status"].get("conditions", []) if one["type"] not in ours]
        return [*theirs, *(self._condition(kind, status) for kind, status in ours.items())]

    def _condition(self, kind: str, status: str) -> dict[str, Any]:
        return {"type": kind, "status": status, "reason": "FakeKubelet", "lastTransitionTime": now()}

    def _report(self, pod: Body, status: Body) -> None:
        self._api.merge(f"{self._path(pod)}/status", {"metadata": {"uid": pod["metadata"]["uid"]}, "status": status})

    def _path(self, pod: Body) -> str:
        return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"


def main() -> None:
    """Make the pools' nodes, then keep every fake node and its pods until killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kubeconfig", type=Path)
    parser.add_argument("--bare", action="store_true", help="make no nodes")
    arguments = parser.parse_args()
    api = Api(arguments.kubeconfig, keep=True)
    for name in () if arguments.bare else POOLS:
        try:
            api.create("/api/v1/nodes", node(name))
        except ApiFailed as error:
            if error.status != 409:  # already there is success
                sys.exit(f"node {name}: {error}")
    FakeNodes(api).run()


if __name__ == "__main__":
    main()
