"""What is refused: typos at every depth, values that cannot work together, and what does not fit its pool; all of it at once."""

import re
from typing import Any

import pytest
import yaml

from tests.deploy.render.conftest import CPU, DIGEST, GROUPS, H100, KEDA, Models, model
from tests.deploy.templates import CHARTS, Object, over

OPEN = {"args", "podAnnotations", "annotations", "labels", "namespaceSelector", "models", "nodePools", "digests"}
SPOT = over(H100, {"spot": True, "noticeSeconds": 15, "match": {"kind": ["spot"]}})


def objects_of(values: Object, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all objects we own, the root included."""
    found = [at]
    for key, value in values.items():
        if isinstance(value, dict) and key not in OPEN:
            found += objects_of(value, (*at, key))
    return found


def test_schema_refuses_typos(models: Models) -> None:
    """At every depth, all at once; a model's entry and a pool's are as strict as the rest."""
    values = yaml.safe_load((CHARTS / "models" / "values.yaml").read_text())
    values["models"] = {"m": values["defaults"]}
    pool: Object = {"gpu": {}, "taints": [{"key": "a", "typpo": 1}], "typpo": 1}
    paths = [*objects_of(values), *(("models", *path) for path in objects_of({"m": values["defaults"]}) if path)]
    paths += [("global", "nodePools", "p"), ("global", "nodePools", "p", "gpu"), ("global", "image", "digests")]
    typos: Object = {}
    for path in paths:
        level = typos
        for key in path:
            level = level.setdefault(key, {})
        level["typpo"] = 1
    typos["global"]["nodePools"] = over(typos["global"]["nodePools"], {"p": pool})
    said = models.refusal(typos.pop("models"), {}, typos)
    spots = [f"/{'/'.join(path)}" if path else "" for path in paths] + ["/global/nodePools/p/taints/0"]
    assert not [spot for spot in spots if not re.search(rf"at '{re.escape(spot)}': additional prop.*'typpo'", said)], said


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ({"gpus": -1}, "gpus"),
        ({"gpus": "1"}, "gpus"),
        ({"replicas": 1.5}, "replicas"),
        ({"replicas": "two"}, "replicas"),
        ({"load": {"maxSeconds": 0}}, "load/maxSeconds"),
        ({"drain": {"maxGenerationSeconds": -300}}, "drain/maxGenerationSeconds"),
        ({"weights": {"source": "hostPath"}}, "weights/source"),
        ({"weights": {"digest": "latest"}}, "weights/digest"),
        ({"weights": {"path": "../other"}}, "weights/path"),
        ({"resources": {"limits": {"memory": "lots"}}}, "resources/limits/memory"),
        ({"resources": {"limits": {"nvidia.com/gpu": 1}}}, "resources/limits"),
        ({"engine": {"kind": "tgi"}}, "engine/kind"),
        ({"rollout": {"surge": 2}}, "rollout/surge"),
        ({"autoscaling": {"max": 0}}, "autoscaling/max"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(models: Models, entry: Object, key: str) -> None:
    assert f"at '/models/m/{key}" in models.refusal({"m": {**model(), **entry}})


def test_a_pool_asks_in_one_way(models: Models) -> None:
    pools: Object = {
        "a": over(H100, {"gpu": {"profile": "3g.40gb"}}),
        "b": over(H100, {"gpu": {"deviceClass": "x", "selectors": []}}),
        "c": {"gpu": {"mode": "none", "perNode": 8, "resource": "nvidia.com/gpu", "product": ["x"]}},
    }
    said = models.refusal({}, pools)
    for pool, key in (("a", "profile"), ("b", "deviceClass"), ("b", "selectors"), ("c", "perNode"), ("c", "resource"), ("c", "product")):
        assert f"global.nodePools.{pool}.gpu.{key} says nothing in mode" in said, key
    assert "at '/global/nodePools': additional properties 'UPPER' not allowed" in models.refusal({}, {"UPPER": CPU})


def test_validation_lists_all_errors(models: Models) -> None:
    pools: Object = {
        "h100": over(H100, {"spareGpus": 40}),
        "spot": {**SPOT, "noticeSeconds": 15},
        "silent": {"spot": True},
        "mig": {"providerPool": "m", "gpu": {"mode": "mig", "perNode": 2}, "nodes": 1},
        "dra": {"providerPool": "d", "gpu": {"mode": "dra", "perNode": 2}, "nodes": 1},
        "cpu": CPU,
    }
    entries: Object = {
        "no-pool": {"replicas": 2, "weights": {"ref": "r", "digest": DIGEST}},
        "other-pool": model(pool="a100"),
        "both-pools": model(pools=["h100", "cpu"]),
        "mixed": {**model(), "pool": "", "pools": ["h100", "mig"]},
        "any-node": {**model(), "pool": "", "pools": ["h100", "cpu"]},
        "no-gpus": model(gpus=0),
        "gpus-on-cpu": model(pool="cpu", gpus=1),
        "wide": model(gpus=9, engine={"kind": "vllm", "image": "x"}),
        "two-gpus": model(gpus=2),
        "vllm": model(engine={"kind": "vllm"}),
        "groups": model(nodesPerReplica=2, engine={"kind": "vllm", "image": "x"}),
        "own-groups": model(nodesPerReplica=2),
        "two-writers": model(autoscaling={"max": 3}),
        "one": model(pool="dra", replicas=1),
        "surge": model(pool="dra", rollout={"surge": 1}),
        "spot": model(pool="spot"),
        "no-ref": {"pool": "h100", "replicas": 2},
        "no-digest": {"pool": "h100", "replicas": 2, "weights": {"ref": "r"}},
        "hub": {"pool": "h100", "replicas": 2, "weights": {"source": "hf"}},
        "once": {"pool": "h100", "replicas": 2, "weights": {"source": "pvc", "claim": "c", "path": "p", "accessMode": "ReadWriteOnce"}},
        "shm": model(shmGiB=8),
        "scale": {**model(), "autoscaling": {"min": 4, "max": 2}},
        "sleepy": {**model(), "autoscaling": {"min": 0, "max": 2}},
        "keda": {**model(), "autoscaling": {"max": 2, "engine": "keda"}},
    }
    for name in ("scale", "sleepy", "keda"):
        del entries[name]["replicas"]
    said = models.refusal(entries, pools, {"global": {"store": {"url": "file:///store"}, "keys": {"existingSecret": ""}}})
    for sentence in (
        "global.keys.existingSecret is missing",
        "global.store.existingClaim is missing: file:///store is a folder",
        "global.nodePools.silent selects no nodes: set providerPool or match",
        "global.nodePools.silent needs nodes and gpu.perNode",
        "global.nodePools.silent.noticeSeconds is missing",
        "global.nodePools.silent.match is missing: provider generic has no label for spot nodes",
        "global.nodePools.mig.gpu.profile is missing",
        "global.nodePools.dra.gpu.deviceClass is missing",
        "global.nodePools.h100 has 4 × 8 = 32 GPUs; spareGpus 40 and reservedGpus 0 are more",
        "models.no-pool.pool is missing: it names one of global.nodePools",
        'models.other-pool.pool is "a100", which global.nodePools does not have; it has cpu, dra, h100, mig, silent, spot',
        "models.both-pools names both pool and pools",
        "models.mixed.pool names pools whose GPUs are asked for differently (nvidia.com/gpu, nvidia.com/mig-)",
        'models.any-node.pool has "cpu", which selects no nodes of its own and so cannot be one of several',
        'models.no-gpus.pool is "h100", whose nodes have GPUs, and none is asked for',
        'models.gpus-on-cpu.pool is "cpu", which has no GPUs, and 1 are asked for',
        'models.wide.pool is "h100", whose nodes have 8 GPUs each, and one pod asks for 9',
        "models.two-gpus.gpus is 2, and engine argosy runs a model on one GPU",
        "models.vllm.engine.image is missing",
        f"models.groups.nodesPerReplica is 2, which needs LeaderWorkerSet, and this cluster has no {GROUPS}",
        "models.own-groups.nodesPerReplica is 2, and engine argosy runs a model on one node",
        "models.two-writers has both replicas and autoscaling",
        "models.one has one replica and no room for a second one during a rollout",
        "models.surge.rollout.surge is 1, and its pool declares no spareGpus",
        "models.spot drains for up to 320 s, and pool spot gives 15 s notice",
        "models.no-ref.weights.ref is missing: source image",
        "models.no-digest.weights.digest is missing: an image that is pulled is pinned",
        "models.hub.weights.ref is missing: source hf",
        "models.hub.weights.digest is missing: what is fetched is checked",
        "models.hub.weights needs claim, the name of one that exists, or size",
        "models.once.weights.accessMode is ReadWriteOnce, and 3 pods would mount the claim",
        "models.shm.shmGiB is 8, a part of the memory limit, which is 8Gi",
        "models.scale.autoscaling.min is 4, above max 2",
        "models.sleepy.autoscaling.min is 0, which an HPA has from Kubernetes 1.37 and this is v1.36.0",
        f"models.keda.autoscaling.engine is keda, and this cluster has no {KEDA}",
        "scaling.gatewayAddress is missing",
    ):
        assert sentence in said, sentence


@pytest.mark.parametrize(
    ("entry", "pools", "more"),
    [
        (model(replicas=1, allowDowntime=True), {"h100": H100}, {}),
        (model(replicas=1), {"h100": over(H100, {"spareGpus": 1})}, {}),
        (model(replicas=0), {"h100": H100}, {}),
        (model(pool="spot", allowStreamLoss=True), {"spot": SPOT}, {}),
        (model(pool="spot"), {"spot": over(SPOT, {"noticeSeconds": 320})}, {}),
        (model(pool="cpu", replicas=1, weights={"digest": "", "pullPolicy": "Never"}), {"cpu": CPU}, {}),
        (model(shmGiB=7), {"h100": H100}, {}),
    ],
)
def test_what_was_asked_for_outright_is_not_refused(models: Models, entry: Object, pools: Object, more: Object) -> None:
    """Each beside a refusal above: the rule ends where its sentence says."""
    assert models({"m": entry}, pools, more)


@pytest.mark.parametrize(
    ("entries", "changes", "said"),
    [
        (
            {"chat-70b": model(gpus=8, replicas=4, engine={"kind": "vllm", "image": "x"})},
            {"spareGpus": 8},
            "pool h100 has 4 × 8 = 32 GPUs, chat-70b needs (4+1) × 8 = 40",
        ),
        (
            {"a": model(replicas=20), "b": model(replicas=9)},
            {"reservedGpus": 4},
            "pool h100 has 4 × 8 = 32 GPUs, 4 reserved, b needs 9 × 1 = 9, a needs 20 × 1 = 20",
        ),
        ({"a": {**model(replicas=None), "autoscaling": {"max": 33}}}, {}, "pool h100 has 4 × 8 = 32 GPUs, a needs 33 × 1 = 33"),
        (
            {"a": model(replicas=30), "b": {**model(replicas=5), "pool": "", "pools": ["h100", "l4"]}},
            {},
            "pools h100 and l4 have too few GPUs left (h100 2, l4 2): b needs 5 × 1 = 5",
        ),
    ],
)
def test_capacity_proof(models: Models, entries: Object, changes: Object, said: str) -> None:
    pools = {"h100": over(H100, changes), "l4": {"providerPool": "l4", "gpu": {"perNode": 1}, "nodes": 2}}
    entries = {name: {key: each for key, each in entry.items() if each is not None} for name, entry in entries.items()}
    assert said in models.refusal(entries, pools)


def test_what_just_fits_is_not_refused(models: Models) -> None:
    pools: dict[str, Any] = {
        "h100": over(H100, {"reservedGpus": 3, "spareGpus": 1}),
        "l4": {"providerPool": "l4", "gpu": {"perNode": 1}, "nodes": 2},
    }
    entries = {"a": model(replicas=25), "b": {**model(replicas=4), "pool": "", "pools": ["h100", "l4"]}}
    assert models(entries, pools)  # 3 + 25 + 1 = 29 of 32; then 4 + 1 over 3 and 2
    assert "too few GPUs left (h100 3, l4 2)" in models.refusal(over(entries, {"b": {"replicas": 5}}), pools)
