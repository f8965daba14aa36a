"""Argosy on a cluster as an operator installs it: images, the umbrella chart, and its main job through the gateway."""

import base64
import contextlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from argosy import Client
from tools import demo
from tools.cluster.cluster import CLAIM, ROOT, Cluster, Facts
from tools.cluster.commands import CommandFailed, run, say
from tools.cluster.images import built, load
from tools.cluster.processes import ClusterFailed, Processes
from tools.cluster.toolbox import Toolbox

RELEASE, NAMESPACE, JOBS = "argosy", "argosy", "argosy-jobs"
CHART = ROOT / "deploy" / "helm" / "argosy"
IMAGES = ["gateway", "finetune", "inference", "trainer", "weights"]
MODEL = "gemma-3-270m"
POOL = "cpu"
INSTALL_MINUTES = 10  # weights load once, on as few as two cores
FORWARD_SECONDS = 30.0
FORWARDED = re.compile(r"Forwarding from 127\.0\.0\.1:(\d+)")
out = Console(highlight=False)


def values(facts: Facts, version: str) -> dict[str, Any]:
    """What a first try on the harness's node needs: no registry, no GPU, everything on a few cores."""

    def room(cpu: str, memory: str, limit: str) -> dict[str, Any]:
        return {"requests": {"cpu": cpu, "memory": memory}, "limits": {"memory": limit}}

    weights = {"source": "image", "ref": f"localhost/argosy-weights-{MODEL}:{version}", "pullPolicy": "Never"}
    return {
        "global": {
            "image": {"registry": "localhost", "tag": version, "pullPolicy": "Never"},
            "database": {"url": facts.database_url},
            "store": {"url": "file:///store", "existingClaim": CLAIM},
            "nodePools": {POOL: {"gpu": {"mode": "none"}}},
        },
        "platform": {
            "gateway": {"resources": room("100m", "256Mi", "1Gi")},
            "finetune": {
                "replicas": 1,
                "pool": POOL,
                "gpus": 0,
                "jobNamespaces": [JOBS],
                "createNamespaces": False,  # made with the claim
                "bases": {MODEL: {"weights": weights}},
                "resources": room("100m", "256Mi", "4Gi"),
                "trainer": {"resources": room("500m", "512Mi", "8Gi")},
            },
        },
        "models": {"models": {MODEL: {"pool": POOL, "allowDowntime": True, "weights": weights, "resources": room("500m", "1Gi", "6Gi")}}},
    }


@dataclass(frozen=True)
class Door:
    """How a client comes in: the arguments of argosy.Client."""

    address: str
    key: str
    ca: Path


class Installation:
    """The release `argosy` on one cluster.

    Args:
        folder: what a client needs is kept here.
        cluster: the harness's own, or None for a cluster that somebody lends; then `extra` says where its images and pools are.
        extra: a values file of the operator's own, on top of ours.
    """

    def __init__(self, kubeconfig: Path, toolbox: Toolbox, folder: Path, cluster: Cluster | None, extra: Path | None = None) -> None:
        self._environment = {"KUBECONFIG": str(kubeconfig)}
        self._toolbox, self._folder, self._cluster, self._extra = toolbox, folder, cluster, extra

    def install(self) -> None:
        """Load the images where there is no registry, then install or upgrade, and wait until everything is ready."""
        self._folder.mkdir(parents=True, exist_ok=True)
        files = [] if self._extra is None else [self._extra]
        if not self._cluster and not files:
            raise ClusterFailed("a lent cluster needs VALUES=my-values.yaml: where its images, pools, database and store are")
        if self._cluster:
            facts = self._cluster.facts
            if facts is None or facts.tier != 2:
                raise ClusterFailed("Argosy's pods need a real node: python -m tools.cluster up --tier 2")
            references = load(self._cluster.node(self._toolbox), built(IMAGES))
            for namespace in (NAMESPACE, JOBS):
                self._cluster.claim(namespace)
            ours = self._folder / "values.json"
            ours.write_text(json.dumps(values(facts, references[0].rpartition(":")[2]), indent=1))
            files.insert(0, ours)
        command = ["upgrade", RELEASE, str(CHART), "--install", "--namespace", NAMESPACE, "--create-namespace"]
        command += [word for file in files for word in ("--values", str(file))]
        try:
            self._helm("helm install: gateway, fine-tune service and one model", *command, "--wait", f"--timeout={INSTALL_MINUTES}m")
        except CommandFailed as error:
            seen = self._kubectl("what the pods say", "get", "pods,events", "-n", NAMESPACE)
            raise ClusterFailed(f"{error}\n{seen}") from error

    def open(self) -> Door:
        """The platform's key, the authority to trust, and a port of this machine that leads to the gateway and stays open."""
        key = self._folder / "platform-key"
        if not key.exists():
            said = self._kubectl(
                "making the platform's first API key",
                *("exec", "-n", NAMESPACE, f"deploy/{RELEASE}-gateway", "--", "python", "-m", "services.gateway", "bootstrap"),
            )
            with os.fdopen(os.open(key, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
                file.write(said.strip().splitlines()[-1])
        secret = json.loads(self._kubectl("reading whom to trust", "get", "secret", "-n", NAMESPACE, f"{RELEASE}-tls", "-o", "json"))
        ca = self._folder / "ca.crt"
        ca.write_bytes(base64.b64decode(secret["data"]["ca.crt"]))
        return Door(f"localhost:{self._forward()}", key.read_text(), ca)

    def show(self, door: Door) -> None:
        """The main job: a chat, labels, and a model tuned and asked, each a real call through the gateway."""
        with Client(door.address, door.key, ca=door.ca) as platform:
            _, key = demo.project_key(platform)
        with Client(door.address, key, ca=door.ca) as client:
            client.model = f"models/{MODEL}"
            shown = demo.Show(client)
            for part in (demo.chat, demo.labels, demo.tuning):
                part(shown)
            out.print(demo.table(shown.rows))

    def next_commands(self, door: Door) -> str:
        """What to type now."""
        return f"""
It stays up until `make cluster-down`. Next, in this folder:

  export KUBECONFIG={self._environment["KUBECONFIG"]} PATH={self._toolbox.clients}:$PATH
  kubectl get pods,jobs -A -l app.kubernetes.io/part-of=argosy
  helm test -n {NAMESPACE} {RELEASE}
  export ARGOSY_ADDRESS={door.address} ARGOSY_CA={door.ca} ARGOSY_API_KEY=$(cat {self._folder / "platform-key"})
  .venv/bin/argosy models list
"""

    def remove(self) -> None:
        """Uninstall the release and close the port; claims, secrets and namespaces of a lent cluster stay, since charts keep them too."""
        self._helm("helm uninstall", "uninstall", RELEASE, "--namespace", NAMESPACE, "--ignore-not-found")
        for process in Processes(self._folder).all():
            process.stop()

    def _forward(self) -> int:
        """A port of this machine that leads to the gateway's Service; one that is open already is used again."""
        processes = Processes(self._folder)
        with contextlib.suppress(ClusterFailed):
            known = processes.named("port-forward")
            port = FORWARDED.search(processes.tail("port-forward"))
            if known.alive and port:
                return int(port[1])
        processes.log("port-forward").unlink(missing_ok=True)
        say("opening a port to the gateway")
        argv = [str(self._toolbox.kubectl), "port-forward", "-n", NAMESPACE, f"service/{RELEASE}-gateway", ":8443"]
        process = processes.start("port-forward", argv, self._environment)
        processes.await_ready(process, lambda: bool(FORWARDED.search(processes.tail("port-forward"))), FORWARD_SECONDS)
        port = FORWARDED.search(processes.tail("port-forward"))
        return int(port[1]) if port else 0

    def _helm(self, what: str, *arguments: str) -> str:
        return run([str(self._toolbox.helm), *arguments], what, self._environment)

    def _kubectl(self, what: str, *arguments: str) -> str:
        return run([str(self._toolbox.kubectl), *arguments], what, self._environment)
