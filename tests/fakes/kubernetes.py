"""An API server in this process: Jobs, Pods, ConfigMaps, TokenReview and API groups over real HTTP, with a Job controller of one pod a Job.

Pods do what the annotations of tools/cluster/fake_nodes.py say: `run-seconds: never` runs until told otherwise, else it ends at once with
`exit-code`. `fault` is asked about every request; `requests` remembers them. Watches are cut, made to expire, or kept from hearing.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

from kubernetes import client

Body = dict[str, Any]
NOTE = "fake.argosy.dev/"
PATH = re.compile(r"/(?:api/v1|apis/[^/]+/[^/]+)/namespaces/([^/]+)/([a-z]+)(?:/([^/]+))?")
REVIEWS = "/apis/authentication.k8s.io/v1/tokenreviews"


@dataclass(frozen=True)
class Fault:
    """What happens to a request. `done`: it is carried out all the same."""

    status: int = 0  # answered instead; 0: the connection is dropped
    retry_after: str = ""
    silent_s: float = 0.0  # nothing is said for so long, and then the connection is dropped
    done: bool = False


@dataclass
class Kubernetes:
    """The cluster. Safe from several threads."""

    fault: Callable[[str, str], Fault | None] = lambda method, path: None
    groups: set[str] = field(default_factory=set)  # API groups beside the built-in ones, such as kueue.x-k8s.io
    tokens: dict[str, Body] = field(default_factory=dict)  # token → the status a TokenReview gets
    requests: list[tuple[float, str, str]] = field(default_factory=list)  # when, method, path with query
    hears: bool = True  # False: watches tell nothing of what happens
    stuck: bool = False  # pods that are deleted do not end, as on a lost node
    url: str = ""
    _things: dict[tuple[str, str], dict[str, Body]] = field(default_factory=dict)  # (kind, namespace) → name → object
    _told: list[tuple[int, str, str, str, Body]] = field(default_factory=list)  # version, change, kind, namespace, object
    _version: int = 1
    _floor: int = 0  # watches from before it have expired
    _cuts: int = 0
    _changed: threading.Condition = field(default_factory=lambda: threading.Condition(threading.RLock()))
    _closing: bool = False

    def client(self) -> Any:
        settings = client.Configuration(host=self.url)
        settings.retries = 0
        return client.ApiClient(settings)

    # --- what tests do and ask ------------------------------------------------------------------------------------------------------

    def names(self, kind: str, namespace: str = "jobs") -> set[str]:
        with self._changed:
            return set(self._things.get((kind, namespace), {}))

    def get(self, kind: str, name: str, namespace: str = "jobs") -> Body:
        with self._changed:
            return deepcopy(self._things[kind, namespace][name])

    def put(self, kind: str, body: Body, namespace: str = "jobs") -> None:
        """An object as somebody else made it."""
        with self._changed:
            self._store(kind, namespace, body, "ADDED")

    def pods(self, job: str, namespace: str = "jobs") -> list[Body]:
        with self._changed:
            found = self._things.get(("pods", namespace), {}).values()
            return [deepcopy(pod) for pod in found if pod["metadata"]["labels"].get("batch.kubernetes.io/job-name") == job]

    def change(self, kind: str, name: str, change: Callable[[Body], None], namespace: str = "jobs") -> None:
        with self._changed:
            body = self._things[kind, namespace][name]
            change(body)
            self._store(kind, namespace, body, "MODIFIED")

    def end(self, job: str, code: int, message: str = "", reason: str = "", namespace: str = "jobs") -> None:
        """Its pods end with a code, and the controller draws its conclusion."""
        with self._changed:
            for pod in self.pods(job, namespace):
                self._end(pod, code, message, reason, namespace)
            kind = (
                {"type": "Complete"}
                if code == 0
                else {"type": "Failed", "reason": "PodFailurePolicy" if code == 65 else "BackoffLimitExceeded"}
            )
            self.change("jobs", job, lambda body: body["status"].update(conditions=[kind | {"status": "True"}]), namespace)

    def evict(self, job: str, namespace: str = "jobs") -> None:
        """Its pod is taken away, and another takes its place inside the Job."""
        with self._changed:
            for pod in self.pods(job, namespace):
                pod["status"]["conditions"] = [{"type": "DisruptionTarget", "status": "True"}]
                self._end(pod, 143, "", "", namespace)
                self._drop("pods", namespace, pod["metadata"]["name"])
            self._spawn(self._things["jobs", namespace][job], namespace, phase="Pending")

    def delete(self, kind: str, name: str, namespace: str = "jobs") -> None:
        with self._changed:
            self._drop(kind, namespace, name)

    def cut(self) -> None:
        """Every watch that is open breaks off."""
        with self._changed:
            self._cuts += 1
            self._changed.notify_all()

    def expire(self) -> None:
        """Every version that anybody has is too old."""
        with self._changed:
            self._version += 1
            self._floor = self._version
            self._changed.notify_all()

    # --- the API --------------------------------------------------------------------------------------------------------------------

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Body | None) -> tuple[int, Body]:
        if path == REVIEWS and method == "POST":
            assert body is not None
            return 201, {"status": self._review(body["spec"])}
        found = PATH.fullmatch(path)
        if found is None:
            known = path.split("/")[2] in self.groups if path.startswith("/apis/") else False
            return (200, {"kind": "APIGroup"}) if known else (404, {"message": f"{path} is not there"})
        namespace, kind, name = found.groups()
        with self._changed:
            things = self._things.setdefault((kind, namespace), {})
            if name is None:
                return 200, {"items": [deepcopy(each) for each in things.values() if marked(each, query)], "metadata": self._at()}
            if method == "PATCH":
                assert body is not None
                return self._apply(kind, namespace, name, body, query)
            if name not in things:
                return 404, {"message": f"{kind} {name!r} not found"}
            if method == "DELETE":
                return self._delete(kind, namespace, things[name], body or {})
            return 200, deepcopy(things[name])

    def _review(self, spec: Body) -> Body:
        status = self.tokens.get(spec["token"], {})
        fits = bool(status) and not set(status["audiences"]).isdisjoint(spec["audiences"])
        return deepcopy(status) | {"audiences": spec["audiences"]} if fits else {"authenticated": False}

    def _apply(self, kind: str, namespace: str, name: str, body: Body, query: dict[str, list[str]]) -> tuple[int, Body]:
        things = self._things[kind, namespace]
        if name in things:
            if things[name].get("managed") != query["fieldManager"]:
                return 409, {"message": "Apply failed with 1 conflict"}
            same = all(things[name].get(part) == body.get(part) for part in ("spec", "data"))
            return (200, deepcopy(things[name])) if same else (422, {"message": "field is immutable"})
        body = deepcopy(body) | {"managed": query["fieldManager"]}
        self._store(kind, namespace, body, "ADDED")
        if kind == "jobs" and not body["spec"].get("suspend"):
            self._spawn(body, namespace)
        return 201, deepcopy(self._things[kind, namespace][name])

    def _spawn(self, job: Body, namespace: str, phase: str = "Running") -> None:
        name, template = job["metadata"]["name"], job["spec"]["template"]
        marks = template["metadata"].get("labels", {}) | {"batch.kubernetes.io/job-name": name}
        notes = template["metadata"].get("annotations") or {}
        pod = {
            "metadata": {"name": f"{name}-{uuid4().hex[:5]}", "labels": marks, "annotations": notes, "creationTimestamp": now()},
            "spec": template["spec"],
            "status": {"phase": phase, "containerStatuses": [{"name": "trainer", "state": {"running": {}}}]},
        }
        self._store("pods", namespace, pod, "ADDED")
        if phase == "Running" and notes.get(f"{NOTE}run-seconds") != "never":
            self.end(name, int(notes.get(f"{NOTE}exit-code", 0)), notes.get(f"{NOTE}message", ""), "", namespace)

    def _end(self, pod: Body, code: int, message: str, reason: str, namespace: str) -> None:
        ended = {"exitCode": code, "message": message, "reason": reason or ("Error" if code else "Completed")}
        pod["status"]["phase"] = "Failed" if code else "Succeeded"
        pod["status"]["containerStatuses"] = [{"name": "trainer", "state": {"terminated": ended}}]
        self._store("pods", namespace, pod, "MODIFIED")

    def _delete(self, kind: str, namespace: str, thing: Body, options: Body) -> tuple[int, Body]:
        uid = (options.get("preconditions") or {}).get("uid")
        name = thing["metadata"]["name"]
        if uid not in (None, thing["metadata"]["uid"]):
            return 409, {"message": "the UID in the precondition does not match"}
        if kind == "jobs":
            running = [pod for pod in self.pods(name, namespace) if pod["status"]["phase"] in ("Pending", "Running")]
            if running and self.stuck and options.get("propagationPolicy") == "Foreground":
                stamp = {"deletionTimestamp": "2020-01-01T00:00:00Z"}
                for pod in running:
                    pod["metadata"] |= stamp
                    self._store("pods", namespace, pod, "MODIFIED")
                thing["metadata"] |= stamp
                self._store(kind, namespace, thing, "MODIFIED")
                return 200, {}
            for pod in self.pods(name, namespace):
                self._drop("pods", namespace, pod["metadata"]["name"])
        self._drop(kind, namespace, name)
        if kind == "configmaps":
            for job in list(self._things.get(("jobs", namespace), {}).values()):
                if any(owner["uid"] == thing["metadata"]["uid"] for owner in job["metadata"].get("ownerReferences", [])):
                    self._delete("jobs", namespace, job, {})
        return 200, {}

    def _store(self, kind: str, namespace: str, body: Body, change: str) -> None:
        self._version += 1
        metadata = body["metadata"]
        metadata.setdefault("uid", str(uuid4()))
        metadata["namespace"], metadata["resourceVersion"] = namespace, str(self._version)
        body.setdefault("status", {})
        self._things.setdefault((kind, namespace), {})[metadata["name"]] = body
        self._tell(change, kind, namespace, body)

    def _drop(self, kind: str, namespace: str, name: str) -> None:
        body = self._things[kind, namespace].pop(name, None)
        if body is not None:
            self._version += 1
            self._tell("DELETED", kind, namespace, body)

    def _tell(self, change: str, kind: str, namespace: str, body: Body) -> None:
        if self.hears:
            self._told.append((self._version, change, kind, namespace, deepcopy(body)))
        self._changed.notify_all()

    def _at(self) -> Body:
        return {"resourceVersion": str(self._version)}

    def watch(self, kind: str, namespace: str, query: dict[str, list[str]]) -> Iterator[Body]:
        """Events until the time is over; a bookmark a second."""
        ends = time.monotonic() + float(query["timeoutSeconds"][0])
        seen, cuts, mark = int(query["resourceVersion"][0]), self._cuts, time.monotonic()
        with self._changed:
            while time.monotonic() < ends and not self._closing and self._cuts == cuts:
                if seen < self._floor:
                    yield {"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old resource version"}}
                    return
                for version, change, of, where, body in [each for each in self._told if each[0] > seen]:
                    if (of, where) == (kind, namespace) and marked(body, query):
                        yield {"type": change, "object": body}
                    seen = version
                if time.monotonic() - mark > 1:
                    mark = time.monotonic()
                    yield {"type": "BOOKMARK", "object": {"metadata": self._at()}}
                self._changed.wait(0.2)


def marked(thing: Body, query: dict[str, list[str]]) -> bool:
    """Whether it has the labels that are asked for."""
    wanted = dict(each.split("=") for each in query.get("labelSelector", [""])[0].split(",") if each)
    return wanted.items() <= (thing["metadata"].get("labels") or {}).items()


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    cluster: Kubernetes

    def _serve(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        split = urlsplit(self.path)
        query = parse_qs(split.query)
        with self.cluster._changed:
            self.cluster.requests.append((time.monotonic(), self.command, self.path))
        fault = self.cluster.fault(self.command, self.path)
        if fault is not None and fault.done:
            self.cluster.answer(self.command, split.path, query, body)
        if fault is not None:
            time.sleep(fault.silent_s)
            if fault.status:
                self._say(
                    fault.status, {"message": "asked for by the test"}, {"Retry-After": fault.retry_after} if fault.retry_after else {}
                )
            self.close_connection = True
            return
        if "watch" in query:
            found = PATH.fullmatch(split.path)
            assert found is not None
            self._stream(self.cluster.watch(found[2], found[1], query))
            return
        self._say(*self.cluster.answer(self.command, split.path, query, body), {})

    def _say(self, status: int, body: Body, headers: dict[str, str]) -> None:
        text = json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(text)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)

    def _stream(self, events: Iterator[Body]) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in events:
            line = json.dumps(event).encode() + b"\n"
            self.wfile.write(b"%x\r\n%b\r\n" % (len(line), line))
        self.wfile.write(b"0\r\n\r\n")
        self.close_connection = True

    do_GET = do_PATCH = do_POST = do_DELETE = _serve

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the requests are kept."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up."""


@contextmanager
def running() -> Iterator[Kubernetes]:
    """A cluster that answers until the block is left."""
    cluster = Kubernetes()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"cluster": cluster}))
    cluster.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield cluster
    finally:
        cluster._closing = True
        cluster.cut()
        server.shutdown()
        server.server_close()
        thread.join()
