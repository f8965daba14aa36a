"""The real control plane as ground for attempts."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kubernetes import client, config

from tests.deploy.reach import Reach
from tests.protocols.clusters import Cluster

ACCOUNT = "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: argosy-trainer}\nautomountServiceAccountToken: false\n"


def api_client(kubeconfig: Path) -> Any:
    settings = client.Configuration()
    config.load_kube_config(str(kubeconfig), client_configuration=settings)
    settings.retries = 0
    return client.ApiClient(settings)


def items(reach: Reach, namespace: str, kind: str, selector: str = "") -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(reach.kubectl("get", kind, "-n", namespace, "-l", selector, "-o", "json"))["items"]
    return found


@contextmanager
def ground(reach: Reach, folder: Path) -> Iterator[tuple[Cluster, str]]:
    """A restricted namespace with the trainer's account in it."""
    with reach.fresh_namespace() as namespace:
        reach.apply(namespace, ACCOUNT)

        def started(name: str) -> int:
            return len(items(reach, namespace, "pods", f"batch.kubernetes.io/job-name={name}"))

        made = Cluster(lambda: api_client(reach.kubeconfig), folder, started, namespace)
        yield made, namespace
        made.close()
