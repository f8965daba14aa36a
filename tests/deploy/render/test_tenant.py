"""The tenant chart: what a namespace of a tenant's own gets."""

import pytest

from tests.deploy.templates import Object, Refusal, find, of, template
from tools.cluster.toolbox import Toolbox

UID = "7b9f6c1e-2f1a-4c55-9a53-3a0c1c5c2b11"


def tenant(toolbox: Toolbox, values: Object | None = None, *apis: str) -> list[Object]:
    return template(toolbox.helm, "tenant", values or {}, release="acme", namespace="acme-jobs", apis=apis)


def test_a_quota_holds_what_is_said_and_null_is_no_limit(toolbox: Toolbox) -> None:
    objects = tenant(toolbox, {"quota": {"gpus": {"nvidia.com/gpu": 4, "nvidia.com/mig-3g.40gb": 2}, "cpu": None, "jobs": 5}})
    hard = find(objects, "ResourceQuota", "acme")["spec"]["hard"]
    assert hard["requests.nvidia.com/gpu"] == "4"
    assert hard["requests.nvidia.com/mig-3g.40gb"] == "2"
    assert hard["count/jobs.batch"] == "5"
    assert "requests.cpu" not in hard
    assert find(objects, "LimitRange", "acme")["spec"]["limits"][0]["default"] == {"cpu": "4", "memory": "16Gi"}


def test_everything_is_in_the_tenants_namespace_and_tells_whose_it_is(toolbox: Toolbox) -> None:
    for each in tenant(toolbox, {"tenant": UID}):
        assert each["metadata"]["namespace"] == "acme-jobs"
        assert each["metadata"]["labels"]["argosy.dev/tenant"] == UID


@pytest.mark.parametrize(("found", "used"), [((), None), (("v1beta1",), "v1beta1"), (("v1beta1", "v1beta2"), "v1beta2")])
def test_a_local_queue_where_kueue_is(toolbox: Toolbox, found: tuple[str, ...], used: str | None) -> None:
    values = {"queue": {"name": "training", "clusterQueue": "gpus"}}
    queues = of(tenant(toolbox, values, *(f"kueue.x-k8s.io/{version}" for version in found)), "LocalQueue")
    assert [each["apiVersion"] for each in queues] == ([] if used is None else [f"kueue.x-k8s.io/{used}"])
    assert all(each["spec"]["clusterQueue"] == "gpus" for each in queues)


def test_the_worker_of_another_namespace_gets_its_rights_here(toolbox: Toolbox) -> None:
    objects = tenant(toolbox, {"worker": {"name": "prod-finetune", "namespace": "prod"}})
    (binding,) = of(objects, "RoleBinding")
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "prod-finetune", "namespace": "prod"}]
    assert find(objects, "ServiceAccount", "argosy-trainer")["automountServiceAccountToken"] is False


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"tenant": "acme"}, "/tenant"),
        ({"quota": {"gpus": {"nvidia.com/gpu": "many"}}}, "/quota/gpus/nvidia.com~1gpu"),
        ({"quota": {"jobs": -1}}, "/quota/jobs"),
        ({"queue": {"name": "training"}}, "/queue/clusterQueue"),
        ({"worker": {"namespace": "Not A Namespace"}}, "/worker/namespace"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(toolbox: Toolbox, values: Object, key: str) -> None:
    with pytest.raises(Refusal, match=key.replace(".", r"\.")):
        tenant(toolbox, values)
