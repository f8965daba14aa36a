"""How a test uses a cluster: with kubectl and helm as an operator does, and with plain API calls where it must look closely."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from tools.cluster.cluster import CLAIM, Cluster, Facts
from tools.cluster.images import built, load
from tools.cluster.toolbox import Toolbox

COMMAND_SECONDS = 120


class Refused(AssertionError):
    """kubectl or helm ended badly; the text is what it said."""


@dataclass(frozen=True)
class Reach:
    """A cluster as its operator sees it."""

    kubeconfig: Path
    toolbox: Toolbox
    existing: bool  # lent by somebody: tests that end its components must not run

    @property
    def cluster(self) -> Cluster | None:
        """The harness's own view of it; None for a cluster that is not the harness's."""
        return Cluster(self.kubeconfig.parent) if (self.kubeconfig.parent / "cluster.json").exists() else None

    @property
    def facts(self) -> Facts:
        """Its addresses, its database and its shared folder, where the harness made it."""
        facts = self.cluster.facts if self.cluster else None
        assert facts, "only a cluster of the harness's has facts"
        return facts

    @property
    def tier(self) -> int | None:
        """What it is; None for a cluster that is not the harness's."""
        return self.facts.tier if self.cluster else None

    def load(self, *names: str) -> list[str]:
        """Give the real node our images by their names (gateway, finetune, inference, trainer, weights): their references."""
        assert self.cluster
        return load(self.cluster.node(self.toolbox), built(list(names)))

    def claim(self, namespace: str) -> str:
        """A claim in the namespace on the folder `facts.store`, which all pods share: its name."""
        assert self.cluster
        self.cluster.claim(namespace)
        return CLAIM

    def kubectl(self, *arguments: str, manifest: str | None = None, seconds: float = COMMAND_SECONDS) -> str:
        """Run kubectl; `manifest` is its standard input."""
        return self._run(self.toolbox.kubectl, arguments, manifest, seconds)

    def helm(self, *arguments: str, seconds: float = COMMAND_SECONDS) -> str:
        """Run helm."""
        return self._run(self.toolbox.helm, arguments, None, seconds)

    def apply(self, namespace: str, manifest: str) -> str:
        """Apply YAML or JSON in a namespace."""
        return self.kubectl("apply", "-n", namespace, "-f", "-", manifest=manifest)

    def wait(self, namespace: str, thing: str, condition: str, seconds: int = 60) -> str:
        """Wait for a condition: `wait(ns, "deployment/x", "condition=Available")`, or `jsonpath={...}=value`, or `delete`."""
        return self.kubectl("wait", "-n", namespace, f"--for={condition}", f"--timeout={seconds}s", thing, seconds=seconds + 10)

    @contextmanager
    def fresh_namespace(self, prefix: str = "argosy-test", labels: str = "pod-security.kubernetes.io/enforce=restricted") -> Iterator[str]:
        """A namespace of the test's own, with the strictest pod security unless told otherwise; gone afterwards, without waiting."""
        name = f"{prefix}-{uuid4().hex[:8]}"
        self.kubectl("create", "namespace", name)
        try:
            if labels:
                self.kubectl("label", "namespace", name, labels)
            yield name
        finally:
            self.kubectl("delete", "namespace", name, "--wait=false")

    def _run(self, program: Path, arguments: tuple[str, ...], manifest: str | None, seconds: float) -> str:
        done = subprocess.run(
            [program, *arguments],
            input=manifest,
            capture_output=True,
            text=True,
            timeout=seconds,
            env={**os.environ, "KUBECONFIG": str(self.kubeconfig)},
            check=False,
        )
        if done.returncode:
            raise Refused(f"{program.name} {' '.join(arguments)}: {done.stderr}{done.stdout}")
        return done.stdout
