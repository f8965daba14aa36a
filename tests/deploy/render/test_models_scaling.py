"""Autoscaling on the gateway's signals: an HPA's External metric, or KEDA's push."""

import pytest

from tests.deploy.render.conftest import GROUPS, H100, KEDA, Models, model
from tests.deploy.templates import Object, find, of, over

GATEWAY: Object = {"scaling": {"gatewayAddress": "argosy-gateway.argosy.svc:8444"}}


def scaled(**autoscaling: object) -> Object:
    entry = model(autoscaling=autoscaling, load={"maxSeconds": 240})
    del entry["replicas"]
    return entry


@pytest.mark.parametrize(("signal", "target"), [("queue", 8), ("inflight", 64), ("kv", 80)])
def test_hpa_asks_for_the_gateways_signal(models: Models, signal: str, target: int) -> None:
    objects = models({"m": scaled(min=2, max=8, signal=signal, target=target)})
    spec = find(objects, "HorizontalPodAutoscaler", "argosy-model-m")["spec"]
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "argosy-model-m"}
    assert (spec["minReplicas"], spec["maxReplicas"]) == (2, 8)
    (metric,) = spec["metrics"]
    external = metric["external"]
    assert external["metric"] == {"name": f"argosy_demand_{signal}", "selector": {"matchLabels": {"model": "m"}}}
    assert external["target"] == {"type": "AverageValue", "averageValue": str(target)}


def test_up_at_once_and_down_one_a_load_time(models: Models) -> None:
    behavior = find(models({"m": scaled(min=2, max=8)}), "HorizontalPodAutoscaler", "argosy-model-m")["spec"]["behavior"]
    assert behavior["scaleUp"]["stabilizationWindowSeconds"] == 0
    assert behavior["scaleDown"] == {"stabilizationWindowSeconds": 240, "policies": [{"type": "Pods", "value": 1, "periodSeconds": 240}]}


def test_a_service_says_how_long_a_load_takes(models: Models) -> None:
    """The gateway reads it from the slices of a model that sleeps."""
    labels = find(models({"m": model(load={"expectedSeconds": 45})}), "Service", "argosy-model-m")["metadata"]["labels"]
    assert labels["argosy.dev/load-seconds"] == "45"


def test_hpa_zero_needs_1_37(models: Models) -> None:
    assert "which an HPA has from Kubernetes 1.37" in models.refusal({"m": scaled(min=0, max=8)}, kube="1.36.9")
    objects = models({"m": scaled(min=0, max=8)}, kube="1.37.0-gke.100")
    assert find(objects, "HorizontalPodAutoscaler", "argosy-model-m")["spec"]["minReplicas"] == 0


def test_keda_is_pushed_by_the_gateway(models: Models) -> None:
    objects = models({"m": scaled(min=0, max=8, engine="keda"), "n": scaled(min=2, max=2, engine="keda")}, None, GATEWAY, apis=[KEDA])
    spec = find(objects, "ScaledObject", "argosy-model-m")["spec"]
    assert (spec["minReplicaCount"], spec["maxReplicaCount"]) == (0, 8)
    (trigger,) = spec["triggers"]
    assert trigger["type"] == "external-push"
    assert trigger["metadata"] == {
        "scalerAddress": "argosy-gateway.argosy.svc:8444",
        "model": "m",
        "signal": "queue",
        "target": "8",
    }
    (authentication,) = of(objects, "TriggerAuthentication")
    assert trigger["authenticationRef"] == {"name": authentication["metadata"]["name"]}
    assert {each["parameter"]: each["key"] for each in authentication["spec"]["secretTargetRef"]} == {
        "caCert": "ca.crt",
        "tlsClientCert": "tls.crt",
        "tlsClientKey": "tls.key",
    }
    assert not of(objects, "HorizontalPodAutoscaler")
    own = over(GATEWAY, {"scaling": {"authentication": "mine"}})
    objects = models({"m": scaled(min=2, max=8, engine="keda")}, None, own, apis=[KEDA])
    assert not of(objects, "TriggerAuthentication")
    assert find(objects, "ScaledObject", "argosy-model-m")["spec"]["triggers"][0]["authenticationRef"] == {"name": "mine"}


def test_a_group_is_scaled_whole(models: Models) -> None:
    entry = over(scaled(max=2), {"gpus": 8, "nodesPerReplica": 2, "allowDowntime": True, "engine": {"kind": "vllm", "image": "x"}})
    objects = models({"m": entry}, {"h100": H100}, apis=[GROUPS])
    target = find(objects, "HorizontalPodAutoscaler", "argosy-model-m")["spec"]["scaleTargetRef"]
    assert target == {"apiVersion": GROUPS, "kind": "LeaderWorkerSet", "name": "argosy-model-m"}
    assert "replicas" not in find(objects, "LeaderWorkerSet", "argosy-model-m")["spec"]
