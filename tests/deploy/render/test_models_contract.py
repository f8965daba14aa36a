"""What outlives a version of the chart: its values as documented, objects that each Kubernetes takes, and fields that can never change."""

import json
import os
import re
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.deploy.render.conftest import CPU, DIGEST, GROUPS, H100, KEDA, Models, model
from tests.deploy.templates import CHARTS, Object, find, of, over

GOLDENS = Path(__file__).parent / "goldens"
MODELS = CHARTS / "models"
FOREIGN = {"ScaledObject", "TriggerAuthentication", "LeaderWorkerSet", "PodMonitor", "Certificate"}  # of other projects: no schema here
OPEN = {"requests", "limits", "args", "podAnnotations", "annotations", "labels", "namespaceSelector", "models", "autoscaling", "rollout"}
VLLM: Object = {"kind": "vllm", "image": "registry/argosy-inference-vllm:1"}
CLAIM: Object = {"source": "pvc", "claim": "weights", "ref": "", "path": "chat"}
HUB: Object = {"source": "hf", "ref": "org/name", "digest": DIGEST, "size": "40Gi"}
DRA: Object = {"providerPool": "d", "nodes": 2, "gpu": {"mode": "dra", "deviceClass": "gpu.argosy.dev", "perNode": 8, "selectors": ["a"]}}
POOLS = {
    "h100": over(H100, {"nodes": 9, "spareGpus": 8, "zoneSpread": True, "runtimeClassName": "nvidia"}),
    "spot": over(H100, {"spot": True, "noticeSeconds": 120}),
    "mig": {"providerPool": "m", "nodes": 2, "gpu": {"mode": "mig", "profile": "3g.40gb", "perNode": 2}},
    "dra": DRA,
    "dra-2": over(DRA, {"providerPool": "e"}),
    "cache": over(H100, {"cacheClass": "local-nvme"}),
    "cpu": CPU,
}
SCALED: Object = {key: value for key, value in model(autoscaling={"min": 2, "max": 4}).items() if key != "replicas"}
ENTRIES: Object = {
    "gpu": model(priority="argosy-inference", podAnnotations={"team": "a"}),
    "fallback": {**model(), "pool": "", "pools": ["h100", "spot"], "allowStreamLoss": True},
    "mig": model(pool="mig"),
    "dra": {**model(), "pool": "", "pools": ["dra", "dra-2"]},
    "cpu": model(pool="cpu", replicas=1),
    "claim": model(weights=CLAIM),
    "hub": model(weights=HUB),
    "cached": model(pool="cache", weights=HUB),
    "scaled": SCALED,
    "big": model(gpus=8, nodesPerReplica=2, engine=VLLM),
}
STORE: Object = {"global": {"provider": "gke", "store": {"url": "file:///store", "existingClaim": "shared"}}}
APIS = [GROUPS, KEDA, "monitoring.coreos.com/v1"]


@pytest.mark.parametrize("minor", [34, 35, 36, 37])
def test_valid_on_1_34_to_1_37(models: Models, minor: int) -> None:
    """Every object, strictly: a field that the version does not know is an error."""
    entries = ENTRIES
    if minor < 35:  # no image volumes
        entries = {name: over(entry, {"weights": {**CLAIM, "digest": ""}}) for name, entry in ENTRIES.items() if entry["weights"] != HUB}
    objects = models(entries, POOLS, STORE, apis=APIS, kube=f"1.{minor}.0")
    seen = set()
    for each in objects:
        if each["kind"] in FOREIGN:
            continue
        kubernetes_validate.validate(each, f"1.{minor}", strict=True)
        seen.add(each["kind"])
    assert seen >= {"Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler", "NetworkPolicy", "ResourceClaimTemplate"}
    for group in of(objects, "LeaderWorkerSet"):
        for template in ("leaderTemplate", "workerTemplate"):
            pod = {"apiVersion": "v1", "kind": "Pod", **group["spec"]["leaderWorkerTemplate"][template]}
            kubernetes_validate.validate(pod, f"1.{minor}", strict=True)


def test_a_wrong_field_would_be_seen(models: Models) -> None:
    """The test above can fail."""
    deployment = find(models({"m": model()}), "Deployment", "argosy-model-m")
    deployment = over(deployment, {"spec": {"replicaz": 1}})
    with pytest.raises(kubernetes_validate.ValidationError, match="replicaz"):
        kubernetes_validate.validate(deployment, "1.37", strict=True)


def test_golden(models: Models) -> None:
    """One release, whole. ARGOSY_WRITE_GOLDENS=1 writes it anew, for the review to see."""
    chosen = {name: ENTRIES[name] for name in ("gpu", "cpu", "hub", "scaled")}
    objects = models(chosen, {name: POOLS[name] for name in ("h100", "cpu")}, STORE, apis=APIS)
    ordered = sorted(objects, key=lambda each: (each["kind"], each["metadata"]["name"]))
    text = yaml.safe_dump_all(ordered, sort_keys=True, width=140)
    path = GOLDENS / "models.yaml"
    if os.environ.get("ARGOSY_WRITE_GOLDENS"):
        path.write_text(text)
    assert text == path.read_text()


def test_immutable_fields_since_last_release(models: Models) -> None:
    """An upgrade that changes one of these is refused by the API server, so this file is never written anew."""

    def fixed(kind: str, spec: Object) -> Object:
        if kind == "Deployment":
            return dict(spec["selector"])
        return {"clusterIP": spec["clusterIP"]} if kind == "Service" else {key: spec[key] for key in spec if key != "resources"}

    objects = models(ENTRIES, POOLS, STORE, apis=APIS)
    chosen = [each for kind in ("Deployment", "Service", "PersistentVolumeClaim") for each in of(objects, kind)]
    found = {f"{each['kind']}/{each['metadata']['name']}": fixed(each["kind"], each["spec"]) for each in chosen}
    assert found == json.loads((GOLDENS / "models_immutable.json").read_text())


def leaves(values: Object, at: str = "") -> dict[str, object]:
    """Dotted path → default of what can be set."""
    found: dict[str, object] = {}
    for key, value in values.items():
        path = f"{at}.{key}" if at else key
        found |= leaves(value, path) if isinstance(value, dict) and value and key not in OPEN else {path: value}
    return found


def listed(schema: Object, root: Object, at: str = "") -> set[str]:
    """Dotted paths that a schema names."""
    found: set[str] = set()
    for key, each in schema.get("properties", {}).items():
        there = root["$defs"][each["$ref"].rpartition("/")[2]] if "$ref" in each else each
        path = f"{at}.{key}" if at else key
        found |= listed(there, root, path) if "properties" in there and key not in OPEN else {path}
    return found


def rows(text: str) -> dict[str, str]:
    """A table's first two columns."""
    return dict(re.findall(r"^\| `([a-zA-Z.]+)` \| (.*?) \|", text, re.MULTILINE))


def test_values_schema_readme_parity() -> None:
    values, schema = yaml.safe_load((MODELS / "values.yaml").read_text()), json.loads((MODELS / "values.schema.json").read_text())
    readme = (MODELS / "README.md").read_text()
    del values["global"]
    expected = leaves(values)
    own = rows(readme.partition("`global` is the same")[0])
    assert own.keys() == expected.keys() | {"defaults.gpus"}  # unset: the pool says
    for path, default in expected.items():
        shown = "–" if default in ("", {}, []) else f"`{default if isinstance(default, str) else json.dumps(default)}`"
        assert own[path] == shown, path
    names = {path for path in listed(schema, schema) if path not in ("global", "common", "enabled")}
    assert names == own.keys()
    assert schema["properties"]["models"]["patternProperties"].popitem()[1] == schema["properties"]["defaults"]


def test_global_and_pools_are_documented() -> None:
    schema = json.loads((CHARTS / "common" / "values.schema.json").read_text())
    readme = (MODELS / "README.md").read_text()
    shared, _, pools = readme.partition("`global` is the same")[2].partition("## Pools")
    keys = {name.partition(".")[0] for name in rows(shared)}
    assert keys == schema["properties"]["global"]["properties"].keys()
    assert rows(pools.partition("| Provider |")[0]).keys() == listed(schema["$defs"]["pool"], schema)
    values = yaml.safe_load((MODELS / "values.yaml").read_text())
    assert values["global"].keys() == keys
    for name, each in values["global"].items():
        if isinstance(each, dict) and name != "nodePools":
            assert each.keys() == schema["properties"]["global"]["properties"][name]["properties"].keys()
