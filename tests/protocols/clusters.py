"""A cluster as ground for attempts, for whatever API server there is."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from services.chassis.cluster import Api
from services.finetune.launchers.cluster import ClusterLauncher, Place
from services.finetune.launchers.job_manifest import Terms

NOTE = "fake.argosy.dev/"


def template(**notes: str) -> dict[str, Any]:
    """A pod template as the chart renders one, that fits a restricted namespace; `notes` steer fake pods (`exit_code="3"`)."""
    closed = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    spec = {
        "serviceAccountName": "argosy-trainer",
        "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {
                "name": "trainer",
                "image": "localhost/argosy-trainer:0.1.0",
                "securityContext": closed,
                "resources": {"limits": {"cpu": "1", "memory": "1Gi", "ephemeral-storage": "1Gi"}},
                "volumeMounts": [{"name": "base-tiny", "mountPath": "/base/tiny"}, {"name": "base-other", "mountPath": "/base/other"}],
            }
        ],
        "volumes": [{"name": "base-tiny", "emptyDir": {}}, {"name": "base-other", "emptyDir": {}}],
    }
    annotations = {NOTE + name.replace("_", "-"): value for name, value in notes.items()}
    return {"metadata": {"annotations": annotations}, "spec": spec}


class Cluster:
    """Ground: see launcher_contract.Ground."""

    def __init__(self, client: Callable[[], Any], folder: Path, started: Callable[[str], int], namespace: str = "jobs") -> None:
        self._client, self._folder, self._started, self._namespace = client, folder, started, namespace
        self._open: list[ClusterLauncher] = []

    def launcher(
        self, code: int | None, owner: str = "ours", *, spec: Mapping[str, Any] | None = None, client: Any = None, **changed: Any
    ) -> ClusterLauncher:
        """`spec` replaces parts of the template's; `client` asks in place of the ground's own; the rest are terms, and `nodes`."""
        notes = {"run_seconds": "never"} if code is None else {"run_seconds": "0.2", "exit_code": str(code)}
        made_of = template(**notes)
        made_of["spec"] |= spec or {}
        (self._folder / f"pool-{code}.yaml").write_text(json.dumps(made_of))
        terms = {"address": "finetune.argosy.svc:8601", "store_url": "s3://bucket", "grace_s": 1}
        place = Place(self._folder, f"pool-{code}", (self._namespace,), nodes=changed.pop("nodes", 1))
        made = ClusterLauncher(Api(client or self._client()), place, Terms(owner, **(terms | changed)))
        made.start()
        self._open.append(made)
        return made

    async def starts(self, name: str) -> int:
        return self._started(name)

    def close(self) -> None:
        for each in self._open:
            each.close()
