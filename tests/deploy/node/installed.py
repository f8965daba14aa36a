"""Argosy as an operator installs it on the real node: the platform's chart, the models' chart, a tiny model in an image of its own."""

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import asyncpg

from argosy import AsyncClient, Client
from tests.deploy.reach import Reach
from tests.fleet import model
from tests.fleet.running import TUNER_SCOPES
from tools.cluster.cluster import ROOT
from tools.images.build import weights

CHARTS = ROOT / "deploy" / "helm"
MODEL = "tiny"
RELEASE, MODELS = "argosy", "models"
POOL = {"providerPool": "h100", "gpu": {"mode": "none"}, "nodes": 1}  # the node's label; its fake GPUs compute nothing
LITTLE = {"requests": {"cpu": "50m", "memory": "128Mi"}, "limits": {"memory": "2Gi"}}
ENGINE = {"dtype": "float32", "backend": "eager", "kv_tokens": 65_536, "canary_seconds": 600}
INSTALL_SECONDS = 420  # of a busy machine of two cores
SHELL_SECONDS = 120
LONGEST_SECONDS = 120  # of a stream, and so of a drain


def values(namespace: str, jobs: str, database: str, claim: str, image: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the platform's release and of the models'."""
    shared = {
        "image": {"registry": "localhost", "pullPolicy": "Never"},
        "store": {"url": "file:///store", "existingClaim": claim},
        "nodePools": {"node": POOL},
    }
    platform = {
        "global": {**shared, "database": {"url": database}},
        "gateway": {"replicas": 1, "maxStreamSeconds": LONGEST_SECONDS, "resources": LITTLE},
        "finetune": {
            "replicas": 1,
            "jobNamespaces": [jobs],
            "pool": "node",
            "gpus": 0,
            "bases": {MODEL: {"weights": {"source": "image", "ref": image}}},
            "resources": LITTLE,
            "trainer": {"resources": LITTLE},
        },
        "tests": {"model": MODEL},
    }
    keys = {"existingSecret": f"{RELEASE}-keys"}
    models = {
        "global": {**shared, "keys": keys, "tls": {"mode": "existingSecret", "existingSecret": f"{RELEASE}-tls"}},
        "models": {
            MODEL: {
                "pool": "node",
                "replicas": 2,
                "weights": {"source": "image", "ref": image},
                "load": {"maxSeconds": 300},
                "drain": {"sleepSeconds": 5, "maxGenerationSeconds": LONGEST_SECONDS},
                "engine": {"args": ENGINE},
                "resources": LITTLE,
            }
        },
    }
    return platform, models


@dataclass(frozen=True)
class Installed:
    """A running platform and what a caller needs."""

    node: Reach
    namespace: str
    jobs: str  # namespace of training pods
    ca: Path
    address: str  # of a way from this machine to the gateway's Service
    key: str  # the platform's
    notes: str  # what helm said at the end
    values: dict[str, Any]  # of the models' release

    def tenant(self) -> AsyncClient:
        """A client with a key of a new project of its own."""
        return AsyncClient(self.address, self._project(), ca=self.ca, model=f"models/{MODEL}", timeout_s=60)

    def blocking(self) -> Client:
        """The same, without an event loop."""
        return Client(self.address, self._project(), ca=self.ca, model=f"models/{MODEL}", timeout_s=60)

    def _project(self, scopes: Sequence[str] = TUNER_SCOPES) -> str:
        with Client(self.address, self.key, ca=self.ca) as platform:
            project = platform.create_project(f"t-{uuid.uuid4().hex[:12]}").name
            return platform.create_key(project, scopes).secret

    def get(self, kind: str, *words: str) -> Any:
        """What kubectl says of objects of the namespace."""
        return json.loads(self.node.kubectl("get", kind, "-n", self.namespace, "-o", "json", *words))

    def release(self, verb: str, release: str, chart: str, values: dict[str, Any]) -> str:
        """Install or upgrade one release, and wait for it: what helm said."""
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(values, file)
            file.flush()
            words = (verb, release, str(CHARTS / chart), "--values", file.name, "--wait", f"--timeout={INSTALL_SECONDS}s")
            return self.node.helm(*words, "-n", self.namespace, seconds=INSTALL_SECONDS + 30)

    def upgrade(self, **changes: Any) -> str:
        """Upgrade the models' release with other values of the model."""
        entry = {**self.values["models"][MODEL], **changes}
        return self.release("upgrade", MODELS, "models", {**self.values, "models": {MODEL: entry}})

    def pods(self) -> dict[str, dict[str, Any]]:
        """The model's pods by name."""
        found = self.get("pods", "-l", f"argosy.dev/model={MODEL}")["items"]
        return {pod["metadata"]["name"]: pod for pod in found}

    def ready(self) -> None:
        """Wait until every replica of the model is ready, and none is on its way out."""
        self.node.kubectl("rollout", "status", f"deployment/{MODELS}-model-{MODEL}", "-n", self.namespace, "--timeout=300s", seconds=310)
        for name, pod in self.pods().items():
            if "deletionTimestamp" in pod["metadata"]:
                self.node.wait(self.namespace, f"pod/{name}", "delete", 300)


def install(node: Reach, folder: Path, namespace: str, stack: contextlib.ExitStack) -> Installed:
    """Both releases, waited for until every pod is ready, and the first key by the command that helm printed."""
    cluster = node.cluster
    assert cluster
    node.load("gateway", "finetune", "inference", "trainer")
    built = weights(str(model.save(folder / MODEL)), folder, folder, "1")
    cluster.node(node.toolbox).import_images([built.archive])
    jobs = f"{namespace}-jobs"
    stack.callback(node.kubectl, "delete", "namespace", namespace, jobs, "--wait=false", "--ignore-not-found")
    for one in (namespace, jobs):
        claim = node.claim(one)
        node.kubectl("label", "namespace", one, "pod-security.kubernetes.io/enforce=restricted")
    database = asyncio.run(_database(node.facts.database_url.replace("+asyncpg", ""), namespace))
    platform, models = values(namespace, jobs, database, claim, built.reference)
    it = Installed(node, namespace, jobs, folder / "ca.crt", "", "", "", models)
    notes = it.release("install", RELEASE, "platform", platform)
    it.release("install", MODELS, "models", models)
    command = next(line.strip().removeprefix("export ") for line in notes.splitlines() if "bootstrap" in line)
    key = shell(it, f"{command}\necho; echo $ARGOSY_API_KEY").splitlines()[-1]  # behind what it logged
    authority = it.get("secret", f"{RELEASE}-tls")["data"]["ca.crt"]
    it.ca.write_bytes(base64.b64decode(authority))
    service = it.get("service", f"{RELEASE}-gateway")["spec"]
    address = stack.enter_context(forwarded(service["clusterIP"], service["ports"][0]["port"]))
    return replace(it, address=address, key=key, notes=notes)


def shell(it: Installed, script: str, **environment: str) -> str:
    """Run lines as an operator types them, with kubectl, helm and argosy on the path; what they left running ends with them."""
    path = f"{it.node.toolbox.clients}:{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "KUBECONFIG": str(it.node.kubeconfig), **environment}
    words = ["bash", "-euo", "pipefail", "-c", script]
    with tempfile.TemporaryFile("w+") as said:  # a pipe would stay open as long as what runs behind
        running = subprocess.Popen(words, cwd=it.ca.parent, env=variables, stdout=said, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = running.wait(SHELL_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)
            running.wait()
        said.seek(0)
        text = said.read()
    assert code == 0, f"{script}\n{text}"
    return text


async def _database(url: str, name: str) -> str:
    """A new database of the server at `url`: an installation's keys are of no use to another."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(f'CREATE DATABASE "{name}"')
    finally:
        await connection.close()
    return url.rpartition("/")[0] + f"/{name}"


@contextlib.contextmanager
def forwarded(host: str, port: int) -> Iterator[str]:
    """A way from 127.0.0.1, which the certificate names, to an address of the cluster, which it does not."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_accept, args=(listener, host, port), daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def _accept(listener: socket.socket, host: str, port: int) -> None:
    with contextlib.suppress(OSError):  # the listener is closed: no more ways
        while True:
            near, _ = listener.accept()
            far = socket.create_connection((host, port), 10)
            for source, target in ((near, far), (far, near)):
                threading.Thread(target=_carry, args=(source, target), daemon=True).start()


def _carry(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError), source:
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
