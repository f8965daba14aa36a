"""Jobs that are disturbed on purpose, and the bytes that each leaves in the store."""

import hashlib
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from argosy.v1 import finetune_pb2
from tests.deploy.node.installed import MODEL, Installed
from tools.cluster.cluster import ROOT
from tools.cluster.processes import wait_until

DATA = ROOT / "examples" / "data" / "sentences.tsv"
STEPS = 400
EVERY = 20  # steps from one checkpoint to the next
TENSORS = ("adapter.safetensors", "head.safetensors")
WAIT_SECONDS = 240
CHOICES: dict[str, Any] = {
    "epochs": 20,
    "max_steps": STEPS,
    "checkpoint_interval_steps": EVERY,
    "batch_size": 16,
    "rank": 4,
    "dropout": 0.1,
    "seed": 5,
    "validation_fraction": 0.0,
}
Disturb = Callable[[str], None]


@dataclass
class Run:
    """A job to its end."""

    job: finetune_pb2.FineTuneJob
    trained: dict[str, str]  # file of tensors → SHA-256
    events: list[finetune_pb2.JobEvent] = field(default_factory=list)

    @property
    def checkpoints(self) -> list[int]:
        """Steps that were committed, in order."""
        return [event.checkpoint.step for event in self.events if event.HasField("checkpoint")]


def tune(installed: Installed, *disturbances: Disturb) -> Run:
    """One job of the same rows, spec and seed each time; the n-th disturbance gets its uid once so many checkpoints are committed."""
    left, events = list(disturbances), list[finetune_pb2.JobEvent]()
    with installed.blocking() as client:

        def watch(event: finetune_pb2.JobEvent) -> None:
            events.append(event)
            if event.HasField("checkpoint") and left:
                left.pop(0)(tuning.job.uid)

        tuning = client.tune(DATA, base=MODEL, method="classify", **CHOICES)
        version = tuning.wait(seen=watch)
    assert not left, "the job ended before it was disturbed"
    (folder,) = Path(installed.node.facts.store).glob(f"adapters/*/{version.adapter_digest}")
    return Run(tuning.job, {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in TENSORS}, events)


def found(installed: Installed, kind: str, job: str) -> dict[str, dict[str, Any]]:
    """A job's Jobs or pods by name."""
    said = installed.node.kubectl("get", kind, "-n", installed.jobs, "-l", f"argosy.dev/job-id={job}", "-o", "json")
    return {item["metadata"]["name"]: item for item in json.loads(said)["items"]}


def trainer(installed: Installed, job: str) -> str:
    """The pod that trains, once it runs."""
    names: list[str] = []

    def runs() -> bool:
        pods = found(installed, "pods", job)
        names[:] = [
            name for name, pod in pods.items() if pod["status"].get("phase") == "Running" and "deletionTimestamp" not in pod["metadata"]
        ]
        return bool(names)

    assert wait_until(runs, WAIT_SECONDS), "no pod trains"
    return names[0]


def evict(installed: Installed, pod: str) -> None:
    """What a drain does to one pod."""
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": installed.jobs}}
    path = f"/api/v1/namespaces/{installed.jobs}/pods/{pod}/eviction"
    installed.node.kubectl("create", "--raw", path, "-f", "-", manifest=json.dumps(body))


def kill(job: str) -> None:
    """SIGKILL to the training process of a job, as this machine sees it."""
    mark, killed = f"ARGOSY_JOB={job}".encode(), 0
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)
                killed += 1
        except OSError:
            continue  # it ended meanwhile
    assert killed, "nobody trains"
