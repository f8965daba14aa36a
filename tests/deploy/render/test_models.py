"""The models chart: what a replica's pod is and reads, how it starts, drains and rolls, and what its neighbours select."""

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest

from services.chassis import settings as environment
from services.inference.__main__ import Environment
from services.inference.engine import vllm
from tests.deploy.render.conftest import CPU, DIGEST, GROUPS, H100, OWN, Models, model
from tests.deploy.templates import CHARTS, Object, find, of, over, variables

NAME = ("Deployment", "argosy-model-m")
VLLM: Object = {"kind": "vllm", "image": "registry/argosy-inference-vllm:1"}
HUB: Object = {"source": "hf", "ref": "org/name", "digest": DIGEST, "size": "40Gi"}


def pods(objects: list[Object]) -> dict[str, Object]:
    """Kind and name → pod template of everything that becomes a pod."""
    found = {
        f"{each['kind']}/{each['metadata']['name']}": each["spec"]["template"]
        for kind in ("Deployment", "Job")
        for each in of(objects, kind)
    }
    for each in of(objects, "LeaderWorkerSet"):
        group = each["spec"]["leaderWorkerTemplate"]
        found |= {
            f"leader/{each['metadata']['name']}": group["leaderTemplate"],
            f"worker/{each['metadata']['name']}": group["workerTemplate"],
        }
    return found


def every(models: Models) -> list[Object]:
    """One release with each kind of model."""
    pools = {
        "h100": over(H100, {"nodes": 8, "spareGpus": 8}),
        "cache": over(H100, {"cacheClass": "local-nvme"}),
        "cpu": CPU,
    }
    entries: Object = {
        "m": model(),
        "cpu": model(pool="cpu"),
        "claim": model(weights={"source": "pvc", "claim": "weights", "path": "chat/8b", "ref": "", "digest": ""}),
        "hub": model(weights=HUB),
        "cached": model(pool="cache", weights=HUB),
        "big": model(gpus=8, nodesPerReplica=2, engine=VLLM),
    }
    return models(entries, pools, {"global": {"store": {"url": "file:///store", "existingClaim": "shared"}}}, apis=[GROUPS])


def test_every_pod_restricted(models: Models) -> None:
    found = pods(every(models))
    assert len(found) == 8  # five Deployments, a Job, a group's two
    for name, pod in found.items():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["enableServiceLinks"] is False, name
        security = spec["securityContext"]
        assert (security["runAsNonRoot"], security["runAsUser"], security["seccompProfile"]) == (True, 65532, {"type": "RuntimeDefault"}), (
            name
        )
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
        assert not [volume for volume in spec["volumes"] if "hostPath" in volume or "projected" in volume], name
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name
            mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
            writable = [path for path, mount in mounts.items() if not mount.get("readOnly")]
            assert set(writable) <= {"/tmp", "/dev/shm"} | ({"/weights"} if container["name"] == "weights" else set()), name
            assert variables(container)["HOME"].startswith("/tmp/"), name
            assert {mount["name"] for mount in mounts.values()} <= {volume["name"] for volume in spec["volumes"]}, name


def test_every_variable_is_one_the_replica_reads(models: Models) -> None:
    """A renamed setting fails here, not in a pod that says nothing and uses a default."""
    objects = models(
        {"m": model(engine={"args": {"max_sequences": 64, "int8": True}})}, None, {"global": {"store": {"url": "s3://adapters"}}}
    )
    container = find(objects, *NAME)["spec"]["template"]["spec"]["containers"][0]
    given = {key: value for key, value in variables(container).items() if key.startswith("ARGOSY_")}
    assert given.keys() <= set(environment.names(Environment))
    read = environment.read(Environment, given).inference
    assert (read.model, read.model_name, read.device, read.store_url) == ("/weights", "m", "cuda", "s3://adapters")
    assert (read.max_sequences, read.int8) == (64, True)
    assert {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}["/weights"] == "weights"
    keys = [*read.caller_public_keys, *read.manifest_public_keys]
    assert keys == ["gateway=/etc/argosy/keys/signing-key.pub.pem", "finetune=/etc/argosy/keys/manifest-key.pub.pem"]
    assert container["image"] == "localhost/argosy-inference:0.1.0"


def test_vllms_arguments_are_those_the_replica_takes(models: Models) -> None:
    args = {"max_model_len": 8192, "gpu_memory_utilization": 0.9, "enforce_eager": True}
    entry = model(gpus=4, engine={**VLLM, "python": "/opt/vllm/bin/python", "args": args})
    objects = models({"m": entry}, None, {"global": {"store": {"url": "s3://adapters"}}})
    given = {
        k: v for k, v in variables(find(objects, *NAME)["spec"]["template"]["spec"]["containers"][0]).items() if k.startswith("ARGOSY_")
    }
    read = environment.read(Environment, given).inference
    assert (read.engine_kind, read.engine_python, read.store_url) == ("vllm", "/opt/vllm/bin/python", None)
    assert ({**args, "tensor_parallel_size": 4}).items() <= vllm.arguments(read.engine(), Path("/weights")).items()
    said = models.refusal({"m": model(engine={**VLLM, "args": {"tokenizer_mode": True}})})
    assert f"models.m.engine.args.tokenizer_mode is not one of vLLM's arguments that may be set: {', '.join(sorted(vllm.ALLOWED))}" in said


def test_ports_are_those_the_replica_listens_on(models: Models) -> None:
    objects = models({"m": model()})
    container = find(objects, *NAME)["spec"]["template"]["spec"]["containers"][0]
    ports, found = {each["name"]: each["containerPort"] for each in container["ports"]}, variables(container)
    listens = {"grpc": "ARGOSY_ADDRESS", "health": "ARGOSY_HEALTH_ADDRESS", "metrics": "ARGOSY_METRICS_ADDRESS"}
    assert ports == {name: int(found[variable].rpartition(":")[2]) for name, variable in listens.items()}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["grpc"]["port"] == ports["health"]
    service = find(objects, "Service", "argosy-model-m")["spec"]
    assert (service["clusterIP"], [each["name"] for each in service["ports"]]) == ("None", ["grpc"])


@pytest.mark.parametrize(("sleep", "longest", "load"), [(0, 1, 10), (5, 300, 600), (30, 3600, 1801)])
def test_grace_covers_generation(models: Models, sleep: int, longest: int, load: int) -> None:
    entry = model(drain={"sleepSeconds": sleep, "maxGenerationSeconds": longest}, load={"maxSeconds": load})
    spec = find(models({"m": entry}), *NAME)["spec"]
    pod, container = spec["template"]["spec"], spec["template"]["spec"]["containers"][0]
    found, startup = variables(container), container["startupProbe"]
    assert container["lifecycle"]["preStop"]["sleep"]["seconds"] == sleep
    assert found["ARGOSY_MAX_STREAM_SECONDS"] == found["ARGOSY_GRACE_SECONDS"] == str(longest)
    assert pod["terminationGracePeriodSeconds"] == sleep + float(found["ARGOSY_ANNOUNCE_SECONDS"]) + longest + 10
    assert startup["failureThreshold"] == math.ceil(load / startup["periodSeconds"])
    assert spec["progressDeadlineSeconds"] > pod["terminationGracePeriodSeconds"] + load


@pytest.mark.parametrize(
    ("spare", "entry", "surge"),
    [(0, {}, 0), (1, {}, 1), (1, {"gpus": 2, "engine": VLLM}, 0), (2, {"gpus": 2, "engine": VLLM}, 1), (8, {"rollout": {"surge": 0}}, 0)],
)
def test_a_rollout_starts_first_only_where_a_gpu_is_spare(models: Models, spare: int, entry: Object, surge: int) -> None:
    strategy = find(models({"m": model(**entry)}, {"h100": over(H100, {"spareGpus": spare})}), *NAME)["spec"]["strategy"]
    assert strategy == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": 1 - surge}}


def test_a_cpu_model_says_so(models: Models) -> None:
    """And computes with as many threads as it may use; a GPU model never falls back to its CPU."""
    for limits, resource in (({}, "requests.cpu"), ({"cpu": "3"}, "limits.cpu")):
        container = find(models({"m": model(pool="cpu", resources={"limits": limits})}), *NAME)["spec"]["template"]["spec"]["containers"][0]
        found = variables(container)
        assert found["ARGOSY_DEVICE"] == "cpu"
        assert found["ARGOSY_THREADS"]["resourceFieldRef"]["resource"] == resource
        assert set(container["resources"]["limits"]) <= {"memory", "cpu"}
    gpu = variables(find(models({"m": model()}), *NAME)["spec"]["template"]["spec"]["containers"][0])
    assert gpu["ARGOSY_DEVICE"] == "cuda"
    assert "ARGOSY_THREADS" not in gpu


def test_a_model_sees_no_private_key(models: Models) -> None:
    for name, pod in pods(every(models)).items():
        secrets = [volume["secret"] for volume in pod["spec"]["volumes"] if "secret" in volume]
        if name.startswith("Job/"):
            assert not secrets
            continue
        assert {each["secretName"] for each in secrets} == {"argosy-keys", "argosy-tls"}, name
        (keys,) = (each for each in secrets if each["secretName"] == "argosy-keys")
        assert [item["key"] for item in keys["items"]] == ["signing-key.pub.pem", "manifest-key.pub.pem"], name


def test_selectors_stable_and_disjoint(models: Models) -> None:
    entries = {"m": model(), "m-2": model(), "big": model(gpus=8, nodesPerReplica=2, engine=VLLM)}
    pools = {"h100": over(H100, {"nodes": 9})}
    one = models(entries, pools, apis=[GROUPS], release="one")
    later = models(
        over(entries, {"m": {"replicas": 5, "podAnnotations": {"a": "b"}}}),
        pools,
        {"global": {"image": {"tag": "9"}}},
        apis=[GROUPS],
        release="one",
    )
    two = models(entries, pools, apis=[GROUPS], release="two")
    labels = [pod["metadata"]["labels"] for objects in (one, two) for pod in pods(objects).values()]
    for deployment in of(one, "Deployment"):
        selector = deployment["spec"]["selector"]["matchLabels"]
        assert selector.keys() == {f"app.kubernetes.io/{part}" for part in ("name", "instance", "component")} | {"argosy.dev/model"}
        assert find(later, "Deployment", deployment["metadata"]["name"])["spec"]["selector"] == deployment["spec"]["selector"]
        assert sum(selector.items() <= each.items() for each in labels) == 1
    for kind in ("Service", "PodDisruptionBudget"):
        for each in of(one, kind):
            selector = dict(each["spec"]["selector"].get("matchLabels", each["spec"]["selector"]))
            leader = selector.pop("leaderworkerset.sigs.k8s.io/worker-index", None)
            assert (leader == "0") == (each["metadata"]["name"] == "one-model-big")
            assert sum(selector.items() <= found.items() for found in labels) == (2 if leader else 1)
    # What the gateway finds replicas by is copied from the Service to its slices.
    wanted = {"app.kubernetes.io/part-of": "argosy", "app.kubernetes.io/component": "model", "argosy.dev/model": "m"}
    assert wanted.items() <= find(one, "Service", "one-model-m")["metadata"]["labels"].items()


def test_names_fit(models: Models) -> None:
    """52 characters, one DNS label, and different where the model or the release is."""
    entries: Object = {"qwen2.5-7b": model(), "qwen2-5-7b": model(), f"a{'b' * 60}c": model(), f"a{'b' * 60}d": model(weights=HUB)}
    objects = models(entries, release="a-release-of-a-rather-long-name-for-all-that-it-is-53")
    by_kind: dict[str, list[str]] = {}
    for each in objects:
        by_kind.setdefault(each["kind"], []).append(each["metadata"]["name"])
        limit = 63 if each["kind"] in ("Job", "PersistentVolumeClaim", "ResourceClaimTemplate") else 52
        assert len(each["metadata"]["name"]) <= limit
        assert each["metadata"]["name"].replace("-", "").isalnum()
    for kind, names in by_kind.items():
        assert len(names) == len(set(names)), kind
    assert len(by_kind["Deployment"]) == 4


def test_no_replicas_with_autoscaling_and_null_replicas(models: Models) -> None:
    def spec(entry: Object) -> Object:
        entry = {key: value for key, value in entry.items() if key != "replicas" or "autoscaling" not in entry}
        return dict(find(models({"m": entry}), *NAME)["spec"])

    assert spec(model(replicas=3))["replicas"] == 3
    assert spec(model(replicas=0))["replicas"] == 0
    assert "replicas" not in spec(model(replicas=None))
    assert "replicas" not in spec(model(autoscaling={"min": 2, "max": 4}))


def test_a_rollout_of_the_gateway_touches_no_model(models: Models) -> None:
    """Nothing but the models' own values and the chart's version reaches a pod."""
    before = models({"m": model()})
    after = models({"m": model(), "n": model()}, None, {"monitoring": {"interval": "10s"}, "networkPolicy": {"store": {"port": 9000}}})
    assert find(before, *NAME) == find(after, *NAME)


def test_groups(models: Models) -> None:
    """A replica on several nodes: its leader answers, its followers compute."""
    entry = model(gpus=8, nodesPerReplica=2, engine=over(VLLM, {"args": {"max_model_len": 8192, "tensor_parallel_size": 4}}))
    objects = models({"m": entry}, {"h100": over(H100, {"nodes": 9, "spareGpus": 16})}, apis=[GROUPS])
    spec = find(objects, "LeaderWorkerSet", "argosy-model-m")["spec"]
    assert spec["replicas"] == 2
    assert spec["rolloutStrategy"]["rollingUpdateConfiguration"] == {"maxSurge": 1, "maxUnavailable": 0}
    group = spec["leaderWorkerTemplate"]
    assert (group["size"], group["restartPolicy"]) == (2, "RecreateGroupOnPodRestart")
    leader, worker = (group[each]["spec"]["containers"][0] for each in ("leaderTemplate", "workerTemplate"))
    arguments = dict(pair.split("=") for pair in variables(leader)["ARGOSY_ENGINE_ARGS"].split(","))
    assert variables(leader)["ARGOSY_ENGINE_KIND"] == "vllm"
    assert arguments == {
        "tensor_parallel_size": "4", "pipeline_parallel_size": "2", "nnodes": "2", "max_model_len": "8192",
        "node_rank": "$(LWS_WORKER_INDEX)", "master_addr": "$(LWS_LEADER_ADDRESS)",
    }  # fmt: skip
    assert set(worker["command"]) >= {"--headless", "--pipeline-parallel-size=2", "--node-rank=$(LWS_WORKER_INDEX)"}
    assert "startupProbe" in leader
    assert not {"startupProbe", "readinessProbe", "livenessProbe", "ports"} & worker.keys()
    assert not of(objects, "Deployment")
    policy = find(objects, "NetworkPolicy", "argosy-model")["spec"]
    assert any(rule["from"][0].get("podSelector") == policy["podSelector"] for rule in policy["ingress"])


def test_network_policy_edges(models: Models) -> None:
    """In: the gateway and Prometheus. Out: names and the store, and only if adapters are read from one over the network."""

    def policy(more: Object) -> Object:
        return dict(find(models({"m": model()}, None, more), "NetworkPolicy", "argosy-model")["spec"])

    plain = policy({"networkPolicy": {"gatewayNamespace": "edge"}})
    (calls, scrapes) = plain["ingress"]
    assert calls["from"] == [
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "edge"}},
            "podSelector": {"matchLabels": {"app.kubernetes.io/part-of": "argosy", "app.kubernetes.io/component": "gateway"}},
        }
    ]
    assert [rule["ports"] for rule in (calls, scrapes)] == [[{"protocol": "TCP", "port": port}] for port in (8500, 9090)]
    ports = {"": {53}, "file:///store": {53}, "s3://adapters": {53, 443}}
    for url, expected in ports.items():
        store: Any = {"url": url} | ({"existingClaim": "shared"} if url.startswith("file") else {})
        egress = policy({"global": {"store": store}})["egress"]
        assert {port["port"] for rule in egress for port in rule["ports"]} == expected, url
    assert not of(models({"m": model()}, None, {"networkPolicy": {"enabled": False}}), "NetworkPolicy")


def test_absent_apis_are_fine_and_present_ones_are_used(models: Models) -> None:
    assert not {"PodMonitor", "Certificate"} & {each["kind"] for each in models({"m": model()})}
    tls = {"global": {"tls": {"mode": "certManager", "issuerRef": {"name": "ca"}}}}
    assert "this cluster has no cert-manager.io/v1" in models.refusal({"m": model()}, None, tls)
    objects = models({"m": model()}, None, tls, apis=["cert-manager.io/v1", "monitoring.coreos.com/v1"])
    certificate = find(objects, "Certificate", "argosy-model-m")["spec"]
    assert "argosy-model-m.argosy.svc" in certificate["dnsNames"]
    assert certificate["uris"] == ["spiffe://argosy.dev/ns/argosy/sa/argosy-model"]
    volumes = find(objects, *NAME)["spec"]["template"]["spec"]["volumes"]
    assert {"name": "tls", "secret": {"secretName": certificate["secretName"]}} in volumes
    (endpoint,) = find(objects, "PodMonitor", "argosy-model-m")["spec"]["podMetricsEndpoints"]
    assert endpoint["scheme"] == "https"
    assert endpoint["tlsConfig"]["serverName"] == "argosy-model-m.argosy.svc"


def test_budget(models: Models) -> None:
    spec = find(models({"m": model()}), "PodDisruptionBudget", "argosy-model-m")["spec"]
    assert (spec["maxUnavailable"], spec["unhealthyPodEvictionPolicy"]) == (1, "AlwaysAllow")
    assert not of(models({"m": model(pdb={"enabled": False})}), "PodDisruptionBudget")


def test_a_release_without_models_is_empty(models: Models) -> None:
    assert models({}) == []
    assert models({"m": None}) == []


def test_lint(models: Models, tmp_path: Any) -> None:
    values = tmp_path / "values.json"
    values.write_text(json.dumps(over(OWN, {"global": {"nodePools": {"h100": H100}}, "models": {"m": model()}})))
    done = subprocess.run(
        [models.toolbox.helm, "lint", "--strict", CHARTS / "models", "-f", values], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "WARNING" not in done.stdout
