"""The models chart as the tests of this folder render it."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import kubernetes_validate.utils
import pytest

from tests.deploy.templates import Object, Refusal, over, template
from tools.cluster.toolbox import Toolbox

DIGEST = "sha256:" + "0123456789abcdef" * 4
H100: Object = {
    "providerPool": "gpu-h100",
    "taints": [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}],
    "gpu": {"perNode": 8},
    "nodes": 4,
}
CPU: Object = {"gpu": {"mode": "none"}}
IMAGE: Object = {"ref": "registry/weights", "digest": DIGEST}
# What every models release of its own says: whose certificate and keys it uses.
OWN: Object = {"global": {"tls": {"mode": "existingSecret", "existingSecret": "argosy-tls"}, "keys": {"existingSecret": "argosy-keys"}}}
KEDA, GROUPS = "keda.sh/v1alpha1", "leaderworkerset.x-k8s.io/v1"


class Models:
    """Renders the chart from pools and models alone."""

    def __init__(self, toolbox: Toolbox) -> None:
        self.toolbox = toolbox

    def __call__(
        self,
        models: Mapping[str, Any],
        pools: Mapping[str, Any] | None = None,
        more: Mapping[str, Any] | None = None,
        *,
        apis: Sequence[str] = (),
        kube: str = "1.36.0",
        release: str = "argosy",
    ) -> list[Object]:
        """The objects; raises Refusal."""
        shared = {"global": {"nodePools": {"h100": H100, "cpu": CPU} if pools is None else pools}}
        values = over(over(over(OWN, shared), more or {}), {"models": models})
        return template(self.toolbox.helm, "models", values, "--kube-version", kube, apis=apis, release=release)

    def refusal(self, *arguments: Any, **more: Any) -> str:
        """What Helm says where it must refuse."""
        with pytest.raises(Refusal) as refused:
            self(*arguments, **more)
        return str(refused.value)


@pytest.fixture(autouse=True, scope="session")
def schemas_read_once() -> Iterator[None]:
    """The validator reads megabytes of definitions again for each object."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kubernetes_validate.utils, "schema_contents", functools.cache(kubernetes_validate.utils.schema_contents))
        yield


@pytest.fixture
def models(toolbox: Toolbox) -> Models:
    return Models(toolbox)


def model(**values: Any) -> Object:
    """One model of two replicas on the GPU pool, with these values over it."""
    return over({"pool": "h100", "replicas": 2, "weights": IMAGE}, values)
