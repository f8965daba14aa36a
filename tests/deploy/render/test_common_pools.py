"""From a pool to a pod's scheduling: each way of asking for a GPU × each provider, fallbacks, spread, claims."""

import pytest

from tests.deploy.render.conftest import H100, Models, model
from tests.deploy.templates import Object, find, of, over

NAME = ("Deployment", "argosy-model-m")
KINDS: dict[str, tuple[Object, Object]] = {  # name: gpu of the pool, resources that come of it
    "device-plugin": ({"perNode": 8}, {"limits": {"nvidia.com/gpu": 1}}),
    "other": ({"resource": "amd.com/gpu", "perNode": 8}, {"limits": {"amd.com/gpu": 1}}),
    "mig": ({"mode": "mig", "profile": "3g.40gb", "perNode": 2}, {"limits": {"nvidia.com/mig-3g.40gb": 1}}),
    "dra": ({"mode": "dra", "deviceClass": "gpu.argosy.dev", "perNode": 8}, {"claims": [{"name": "gpus"}]}),
    "none": ({"mode": "none"}, {}),
}
PROVIDERS: dict[str, tuple[str, str, dict[str, str], list[Object]]] = {  # pool label, product label, spot label, spot toleration
    "generic": ("argosy.dev/pool", "nvidia.com/gpu.product", {}, []),
    "gke": (
        "cloud.google.com/gke-nodepool",
        "cloud.google.com/gke-accelerator",
        {"cloud.google.com/gke-spot": "true"},
        [{"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}],
    ),
    "eks": ("eks.amazonaws.com/nodegroup", "nvidia.com/gpu.product", {"eks.amazonaws.com/capacityType": "SPOT"}, []),
    "karpenter": ("karpenter.sh/nodepool", "karpenter.k8s.aws/instance-gpu-name", {"karpenter.sh/capacity-type": "spot"}, []),
    "aks": (
        "kubernetes.azure.com/agentpool",
        "nvidia.com/gpu.product",
        {"kubernetes.azure.com/scalesetpriority": "spot"},
        [{"key": "kubernetes.azure.com/scalesetpriority", "operator": "Equal", "value": "spot", "effect": "NoSchedule"}],
    ),
}


def pod_of(objects: list[Object], name: str = "m") -> Object:
    return dict(find(objects, "Deployment", f"argosy-model-{name}")["spec"]["template"]["spec"])


def required(pod: Object) -> list[dict[str, list[str]]]:
    """Terms, any of which a node must meet: label → values."""
    terms = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert all(each["operator"] == "In" for term in terms for each in term["matchExpressions"])
    return [{each["key"]: each["values"] for each in term["matchExpressions"]} for term in terms]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_pool_table(models: Models, provider: str) -> None:
    taints = [{"key": "team", "effect": "NoExecute"}]
    pools = {kind: {"providerPool": f"p-{kind}", "nodes": 4, "gpu": gpu, "taints": taints} for kind, (gpu, _) in KINDS.items()}
    objects = models({kind: model(pool=kind) for kind in KINDS}, pools, {"global": {"provider": provider}})
    for kind, (_, resources) in KINDS.items():
        pod = pod_of(objects, kind)
        assert required(pod) == [{PROVIDERS[provider][0]: [f"p-{kind}"]}], kind
        assert pod["tolerations"] == [{"key": "team", "operator": "Exists", "effect": "NoExecute"}], kind
        plain: Object = {"requests": {"cpu": "1", "memory": "4Gi"}, "limits": {"memory": "8Gi"}}
        assert pod["containers"][0]["resources"] == over(plain, resources), kind
        assert ("resourceClaims" in pod) == (kind == "dra")
    (claim,) = of(objects, "ResourceClaimTemplate")
    assert pod_of(objects, "dra")["resourceClaims"] == [{"name": "gpus", "resourceClaimTemplateName": claim["metadata"]["name"]}]
    exactly = {"deviceClassName": "gpu.argosy.dev", "count": 1}
    assert claim["spec"]["spec"]["devices"]["requests"] == [{"name": "gpus", "exactly": exactly}]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_spot_and_product(models: Models, provider: str) -> None:
    pool, product, spot, tolerations = PROVIDERS[provider]
    values = over(H100, {"spot": True, "noticeSeconds": 1000, "gpu": {"product": ["h100", "h200"]}, "match": {"own": ["a", "b"]}})
    pod = pod_of(models({"m": model()}, {"h100": values}, {"global": {"provider": provider}}))
    assert required(pod) == [{pool: ["gpu-h100"], product: ["h100", "h200"], "own": ["a", "b"]} | {k: [v] for k, v in spot.items()}]
    gpu = {"key": "nvidia.com/gpu", "operator": "Equal", "value": "present", "effect": "NoSchedule"}
    assert pod["tolerations"] == [gpu, *tolerations]


def test_a_pool_that_names_no_nodes_is_any_node(models: Models) -> None:
    pod = pod_of(models({"m": model(pool="cpu")}))
    assert not {"affinity", "tolerations", "nodeSelector", "topologySpreadConstraints", "runtimeClassName"} & pod.keys()


def test_pools_fallback(models: Models) -> None:
    """Any of the pools will do, the first one rather; what each of them taints is tolerated."""
    other = over(H100, {"providerPool": "b", "taints": [{"key": "b"}], "runtimeClassName": "nvidia"})
    pods = {"h100": H100, "b": other, "c": over(H100, {"providerPool": "c", "taints": []})}
    pod = pod_of(models({"m": {**model(), "pool": "", "pools": ["c", "h100", "b"]}}, pods))
    assert required(pod) == [{"argosy.dev/pool": ["c"]}, {"argosy.dev/pool": ["gpu-h100"]}, {"argosy.dev/pool": ["b"]}]
    preferred = pod["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    assert [each["preference"]["matchExpressions"][0]["values"] for each in preferred] == [["c"], ["gpu-h100"]]
    assert preferred[0]["weight"] > preferred[1]["weight"]
    assert [each["key"] for each in pod["tolerations"]] == ["nvidia.com/gpu", "b"]
    assert pod["runtimeClassName"] == "nvidia"


def test_pools_fallback_by_claim(models: Models) -> None:
    """The scheduler takes the first kind of device that is free."""
    dra = {"providerPool": "a", "nodes": 2, "gpu": {"mode": "dra", "deviceClass": "h100.argosy.dev", "perNode": 8}}
    other = over(dra, {"providerPool": "b", "gpu": {"deviceClass": "l4.argosy.dev", "selectors": ["device.driver == 'x'"]}})
    objects = models({"m": {**model(), "pool": "", "pools": ["a", "b"]}}, {"a": dra, "b": other})
    (claim,) = of(objects, "ResourceClaimTemplate")
    (request,) = claim["spec"]["spec"]["devices"]["requests"]
    assert [(each["name"], each["deviceClassName"]) for each in request["firstAvailable"]] == [
        ("a", "h100.argosy.dev"),
        ("b", "l4.argosy.dev"),
    ]
    assert request["firstAvailable"][1]["selectors"] == [{"cel": {"expression": "device.driver == 'x'"}}]


def test_a_changed_claim_has_another_name(models: Models) -> None:
    """A ResourceClaimTemplate can never be changed, so an upgrade must not try."""

    def name(selectors: list[str]) -> str:
        gpu = {"mode": "dra", "deviceClass": "gpu.argosy.dev", "perNode": 8, "selectors": selectors}
        (claim,) = of(models({"m": model(pool="p")}, {"p": {"providerPool": "p", "nodes": 1, "gpu": gpu}}), "ResourceClaimTemplate")
        return str(claim["metadata"]["name"])

    assert name(["a"]) == name(["a"]) != name(["b"])


def test_zone_spread(models: Models) -> None:
    objects = models({"m": model()}, {"h100": over(H100, {"zoneSpread": True})})
    constraints = pod_of(objects)["topologySpreadConstraints"]
    assert {each["topologyKey"] for each in constraints} == {"topology.kubernetes.io/zone", "kubernetes.io/hostname"}
    for each in constraints:
        assert each["matchLabelKeys"] == ["pod-template-hash"]
        assert each["labelSelector"] == find(objects, *NAME)["spec"]["selector"]


def test_karpenter_leaves_what_loads(models: Models) -> None:
    objects = models({"m": model(load={"maxSeconds": 900})}, None, {"global": {"provider": "karpenter"}})
    assert find(objects, *NAME)["spec"]["template"]["metadata"]["annotations"] == {"karpenter.sh/do-not-disrupt": "900s"}


def test_null_takes_a_pool_away(models: Models) -> None:
    said = models.refusal({"m": model()}, {"h100": None, "cpu": {"gpu": {"mode": "none"}}})
    assert 'models.m.pool is "h100", which global.nodePools does not have; it has cpu' in said
