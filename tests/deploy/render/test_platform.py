"""The platform chart: what its pods are, what their services read, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from services.chassis import settings as environment
from services.finetune.__main__ import Environment as FineTuneEnvironment
from services.gateway.__main__ import Environment as GatewayEnvironment
from tests.deploy.templates import BASE, CHARTS, PLATFORM, Object, Refusal, find, of, over, template, variables
from tools.cluster.toolbox import Toolbox

GATEWAY, FINETUNE = ("Deployment", "argosy-gateway"), ("Deployment", "argosy-finetune")
TRAINERS = ("ConfigMap", "argosy-pools")


def platform(toolbox: Toolbox, changes: Object | None = None, *arguments: str, **more: Any) -> list[Object]:
    return template(toolbox.helm, "platform", over(PLATFORM, changes or {}), *arguments, **more)


def refusal(toolbox: Toolbox, changes: Object, chart: str = "platform") -> str:
    with pytest.raises(Refusal) as refused:
        template(toolbox.helm, chart, over(PLATFORM if chart == "platform" else {}, changes))
    return str(refused.value)


def pods(objects: list[Object]) -> dict[str, Object]:
    """Name → pod template of everything that becomes a pod, training pods too."""
    found = {each["metadata"]["name"]: each["spec"]["template"] for each in of(objects, "Deployment")}
    found |= {each["metadata"]["name"]: each for each in of(objects, "Pod")}
    return found | {name: yaml.safe_load(text) for name, text in find(objects, *TRAINERS)["data"].items()}


# --- pods ----------------------------------------------------------------------------------------------------------------------------


def test_every_pod_restricted(toolbox: Toolbox) -> None:
    for name, pod in pods(platform(toolbox)).items():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["enableServiceLinks"] is False, name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys(), name
        assert not [volume for volume in spec["volumes"] if "hostPath" in volume], name
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, name


def test_tokens_off_but_for_the_two_that_ask_the_api_server(toolbox: Toolbox) -> None:
    def token(pod: Object) -> list[Object]:
        sources = [source for volume in pod["spec"]["volumes"] for source in volume.get("projected", {}).get("sources", [])]
        return [source["serviceAccountToken"] for source in sources if "serviceAccountToken" in source]

    with_token = {name for name, pod in pods(platform(toolbox)).items() if token(pod)}
    assert with_token == {"argosy-gateway", "argosy-finetune"}
    for account in of(platform(toolbox), "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False


@pytest.mark.parametrize("stream", [1, 300, 3600])
def test_grace_covers_generation(toolbox: Toolbox, stream: int) -> None:
    spec = find(platform(toolbox, {"gateway": {"maxStreamSeconds": stream}}), *GATEWAY)["spec"]
    pod, container = spec["template"]["spec"], spec["template"]["spec"]["containers"][0]
    sleep, found = container["lifecycle"]["preStop"]["sleep"]["seconds"], variables(container)
    assert found["ARGOSY_MAX_STREAM_SECONDS"] == found["ARGOSY_GRACE_SECONDS"] == str(stream)
    assert pod["terminationGracePeriodSeconds"] >= sleep + float(found["ARGOSY_ANNOUNCE_SECONDS"]) + stream + 10
    assert spec["progressDeadlineSeconds"] > pod["terminationGracePeriodSeconds"]


def test_a_private_key_is_mounted_where_it_signs_and_nowhere_else(toolbox: Toolbox) -> None:
    objects = platform(toolbox)
    held = {}
    for name, pod in pods(objects).items():
        items = [item for volume in pod["spec"]["volumes"] if volume["name"] == "keys" for item in volume["secret"]["items"]]
        held[name] = {item["path"] for item in items if not item["path"].endswith(".pub.pem")}
    assert held == {"argosy-gateway": {"signing-key.pem"}, "argosy-finetune": {"manifest-key.pem"}, "argosy-test": set(), "cpu.yaml": set()}


def test_selectors_stable_and_disjoint(toolbox: Toolbox) -> None:
    objects = platform(toolbox, {"gateway": {"podAnnotations": {"a": "b"}}}, release="one")
    later = platform(toolbox, {"global": {"image": {"tag": "9.9.9"}}, "gateway": {"replicas": 7}}, release="one")
    other = platform(toolbox, release="two")
    seen: list[frozenset[tuple[str, str]]] = []
    for deployment in of(objects, "Deployment"):
        selector, labels = deployment["spec"]["selector"]["matchLabels"], deployment["spec"]["template"]["metadata"]["labels"]
        assert selector.items() <= labels.items()
        assert selector.keys() == {"app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/component"}
        assert find(later, "Deployment", deployment["metadata"]["name"])["spec"]["selector"] == deployment["spec"]["selector"]
        seen.append(frozenset(selector.items()))
    every = [each["spec"]["template"]["metadata"]["labels"].items() for each in of(objects, "Deployment") + of(other, "Deployment")]
    for selector_items in seen:
        assert sum(selector_items <= labels for labels in every) == 1
    for kind in ("Service", "PodDisruptionBudget"):
        for each in of(objects, kind):
            selector = each["spec"]["selector"]
            assert frozenset(selector.get("matchLabels", selector).items()) in seen


def test_no_replicas_with_autoscaling_or_when_given_away(toolbox: Toolbox) -> None:
    assert find(platform(toolbox), *GATEWAY)["spec"]["replicas"] == 2
    objects = platform(toolbox, {"gateway": {"autoscaling": {"min": 2, "max": 9, "callsPerReplica": 40}}})
    assert "replicas" not in find(objects, *GATEWAY)["spec"]
    scaler = find(objects, "HorizontalPodAutoscaler", "argosy-gateway")["spec"]
    assert (scaler["minReplicas"], scaler["maxReplicas"]) == (2, 9)
    given_away = platform(toolbox, {"gateway": {"replicas": None}, "finetune": {"replicas": None}})
    assert "replicas" not in find(given_away, *GATEWAY)["spec"]
    assert "replicas" not in find(given_away, *FINETUNE)["spec"]


# --- what the services read ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "cls"), [("gateway", GatewayEnvironment), ("finetune", FineTuneEnvironment)])
def test_every_variable_is_one_its_service_reads(toolbox: Toolbox, name: str, cls: type) -> None:
    """A renamed setting fails here, not in a pod that says nothing and uses a default."""
    objects = platform(toolbox, {"gateway": {"gpuHealth": True, "settings": {"ARGOSY_QUEUE_SECONDS": 5}}})
    container = find(objects, "Deployment", f"argosy-{name}")["spec"]["template"]["spec"]["containers"][0]
    given = {
        key: value if isinstance(value, str) else "00" * 32 for key, value in variables(container).items() if key.startswith("ARGOSY_")
    }
    assert given.keys() <= set(environment.names(cls))
    given["ARGOSY_DATABASE_URL"] = "postgresql://"
    environment.read(cls, given)
    assert f"argosy-{name}" in container["image"]


def test_no_variable_can_be_said_twice(toolbox: Toolbox) -> None:
    """The list of names that the chart keeps to itself is the list of names it sets."""
    known = (CHARTS / "platform" / "templates" / "_platform.tpl").read_text()
    match = re.search(r'define "platform.ownSettings" -}}(.*?){{', known, re.DOTALL)
    assert match
    kept = {f"ARGOSY_{name}" for name in match[1].split()}
    for kind, name in (GATEWAY, FINETUNE):
        container = find(platform(toolbox), kind, name)["spec"]["template"]["spec"]["containers"][0]
        said = [each["name"] for each in container["env"]]
        assert len(said) == len(set(said))
        assert {each for each in said if each.startswith("ARGOSY_")} <= kept
    assert not kept - {*environment.names(GatewayEnvironment), *environment.names(FineTuneEnvironment)}


def test_callers_may_see_another_certificate_than_the_fleet(toolbox: Toolbox) -> None:
    objects = platform(toolbox, {"gateway": {"certificateSecret": "public"}})
    pod = find(objects, *GATEWAY)["spec"]["template"]["spec"]
    found = variables(pod["containers"][0])
    assert found["ARGOSY_CERTIFICATE"] == "/etc/argosy/public-tls/tls.crt"
    assert found["ARGOSY_TLS_CERTIFICATE"] == "/etc/argosy/tls/tls.crt"
    assert {"name": "public-tls", "secret": {"secretName": "public"}} in pod["volumes"]
    (ca,) = [volume for volume in find(objects, "Pod", "argosy-test")["spec"]["volumes"] if volume["name"] == "tls"]
    assert ca["secret"]["secretName"] == "public"


def test_ports_are_those_the_services_listen_on(toolbox: Toolbox) -> None:
    for kind, name in (GATEWAY, FINETUNE):
        container = find(platform(toolbox), kind, name)["spec"]["template"]["spec"]["containers"][0]
        ports = {each["name"]: each["containerPort"] for each in container["ports"]}
        found = variables(container)
        listens = {"grpc": "ARGOSY_ADDRESS", "health": "ARGOSY_HEALTH_ADDRESS", "metrics": "ARGOSY_METRICS_ADDRESS"}
        listens |= {"training": "ARGOSY_TRAINING_LISTEN_ADDRESS"} if "training" in ports else {"scaler": "ARGOSY_SCALER_ADDRESS"}
        assert ports == {port: int(found[variable].rpartition(":")[2]) for port, variable in listens.items()}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert container[probe]["grpc"]["port"] == ports["health"]


def test_A24_trainer_template_leaves(toolbox: Toolbox) -> None:
    """One template a pool, whole: the worker adds a name, labels, variables and a token, and expands nothing."""
    pools = {
        "h100": {
            "match": {"argosy.dev/pool": ["h100"]},
            "taints": [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}],
            "nodes": 2,
            "gpu": {"perNode": 8},
        }
    }
    changes = {"global": {"nodePools": pools}, "finetune": {"pool": "h100", "gpus": 2}, "priorityClasses": {"create": True}}
    templates = {name: yaml.safe_load(text) for name, text in find(platform(toolbox, changes), *TRAINERS)["data"].items()}
    assert templates.keys() == {"cpu.yaml", "h100.yaml"}
    pod = templates["h100.yaml"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "trainer"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert "nvidia.com/gpu" not in templates["cpu.yaml"]["spec"]["containers"][0]["resources"].get("limits", {})
    assert pod["restartPolicy"] == "Never"
    assert pod["serviceAccountName"] == "argosy-trainer"
    assert pod["priorityClassName"] == "argosy-training"
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Equal", "value": "present", "effect": "NoSchedule"}]
    assert not [volume for volume in pod["volumes"] if "secret" in volume or "hostPath" in volume]
    assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/base/gemma-3-270m", "/store", "/tmp"}
    assert find(platform(toolbox, changes), *FINETUNE)["spec"]["template"]["metadata"]["annotations"]["checksum/pools"]


def test_a_changed_pool_rolls_the_worker(toolbox: Toolbox) -> None:
    def checksum(changes: Object) -> str:
        annotations = find(platform(toolbox, changes), *FINETUNE)["spec"]["template"]["metadata"]["annotations"]
        return str(annotations["checksum/pools"])

    assert checksum({}) == checksum({"gateway": {"replicas": 3}})
    assert checksum({}) != checksum({"finetune": {"bases": {"other": BASE}}})


EVERYTHING: Object = {
    "gateway": {
        "autoscaling": {"min": 2, "max": 9, "callsPerReplica": 40},
        "gpuHealth": True,
        "certificateSecret": "public",
        "route": {"kind": "Ingress", "hostnames": ["llm.example"], "className": "nginx", "annotations": {"a": "b"}},
        "service": {"type": "LoadBalancer", "loadBalancerClass": "x", "annotations": {"a": "b"}},
        "settings": {"ARGOSY_QUEUE_SECONDS": 5},
        "nodeSelector": {"a": "b"},
        "tolerations": [{"key": "a", "operator": "Exists"}],
        "podAnnotations": {"a": "b"},
    },
    "finetune": {
        "trainerImage": f"localhost/argosy-trainer@sha256:{'0' * 64}",
        "nodeSelector": {"a": "b"},
        "trainer": {"accountAnnotations": {"a": "b"}},
    },
    "global": {"image": {"pullSecrets": [{"name": "pull"}]}, "store": {"credentialsSecret": "s3"}},
    "networkPolicy": {"callers": {"cidrs": ["192.0.2.0/24"]}, "egress": [{"ports": [{"port": 4318}]}]},
    "monitoring": {"otlpEndpoint": "http://collector:4318"},
    "admissionPolicy": {"enabled": True},
    "priorityClasses": {"create": True},
}


@pytest.mark.parametrize("version", ["1.34", "1.35", "1.36", "1.37"])
def test_valid_on_1_34_to_1_37(toolbox: Toolbox, version: str) -> None:
    """Every object of both charts with everything on, and each training pod, against that version's own schemas."""
    rendered = platform(toolbox, EVERYTHING, "--kube-version", f"{version}.0", apis=("jobset.x-k8s.io/v1alpha2",))
    trainers = [yaml.safe_load(text) for text in find(rendered, *TRAINERS)["data"].values()]
    made = [{"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pool"}, "template": trainer} for trainer in trainers]
    tenant = template(toolbox.helm, "tenant", {}, "--kube-version", f"{version}.0")
    for each in {(each["kind"], len(json.dumps(each))): each for each in (*rendered, *tenant, *made)}.values():
        kubernetes_validate.validate(each, version, strict=True)


@pytest.mark.parametrize("version", ["1.33.9", "1.30.0"])
def test_older_clusters_are_refused(toolbox: Toolbox, version: str) -> None:
    with pytest.raises(Refusal, match=r"requires kubeVersion: >=1\.34"):
        platform(toolbox, {}, "--kube-version", version)


# --- what appears only where its API is ---------------------------------------------------------------------------------------------


def test_absent_apis_are_fine_and_present_ones_are_used(toolbox: Toolbox) -> None:
    optional = {"PodMonitor", "PrometheusRule", "Certificate", "HTTPRoute", "GRPCRoute", "BackendTLSPolicy"}
    assert not optional & {each["kind"] for each in platform(toolbox)}
    changes = {
        "global": {"tls": {"mode": "certManager", "issuerRef": {"name": "ca", "kind": "ClusterIssuer"}}},
        "gateway": {"route": {"kind": "GRPCRoute", "hostnames": ["llm.example"], "parentRefs": [{"name": "edge"}], "caConfigMap": "ca"}},
    }
    apis = (
        "cert-manager.io/v1",
        "monitoring.coreos.com/v1",
        "gateway.networking.k8s.io/v1",
        "gateway.networking.k8s.io/v1/BackendTLSPolicy",
    )
    objects = platform(toolbox, changes, apis=apis)
    assert {each["kind"] for each in objects} >= optional - {"HTTPRoute"}
    certificate = find(objects, "Certificate", "argosy-gateway")["spec"]
    assert {"argosy-gateway.argosy.svc", "localhost", "llm.example"} <= set(certificate["dnsNames"])
    assert certificate["uris"] == ["spiffe://argosy.dev/ns/argosy/sa/argosy-gateway"]
    assert not [each for each in of(objects, "Secret") if each["metadata"]["name"] in ("argosy-tls", "argosy-ca")]
    volumes = find(objects, *GATEWAY)["spec"]["template"]["spec"]["volumes"]
    assert {"name": "tls", "secret": {"secretName": certificate["secretName"]}} in volumes


def test_one_can_leave_fine_tuning_out(toolbox: Toolbox) -> None:
    objects = platform(toolbox, {"finetune": {"enabled": False}})
    assert [each["metadata"]["name"] for each in of(objects, "Deployment")] == ["argosy-gateway"]
    assert not of(objects, "Namespace") + of(objects, "ClusterRole")
    assert "ARGOSY_FINETUNE_ADDRESS" not in variables(find(objects, *GATEWAY)["spec"]["template"]["spec"]["containers"][0])


def test_A25_a_set_of_jobs_is_held_to_the_rules_of_a_job(toolbox: Toolbox) -> None:
    """JobSet's controller makes the Jobs by an account of its own, which the policy on Jobs does not concern."""
    changes = {"admissionPolicy": {"enabled": True, "tags": True}}
    assert len(of(platform(toolbox, changes), "ValidatingAdmissionPolicy")) == 1
    one, sets = of(platform(toolbox, changes, apis=("jobset.x-k8s.io/v1alpha2",)), "ValidatingAdmissionPolicy")
    assert sets["spec"]["matchConstraints"]["resourceRules"][0]["resources"] == ["jobsets"]
    assert one["spec"]["validations"] == sets["spec"]["validations"]
    assert one["spec"]["variables"][0] != sets["spec"]["variables"][0]


# --- refusals -----------------------------------------------------------------------------------------------------------------------


def test_validation_lists_all_errors(toolbox: Toolbox) -> None:
    said = refusal(
        toolbox,
        {
            "global": {"database": {"url": ""}, "store": {"existingClaim": ""}, "tls": {"mode": "certManager"}},
            "gateway": {"autoscaling": {"min": 5, "max": 2, "callsPerReplica": 1}, "settings": {"ARGOSY_GRACE_SECONDS": 1}},
            "finetune": {"pool": "h100", "jobNamespaces": ["argosy"], "bases": {"gemma-3-270m": {"weights": {"digest": ""}}}},
            "admissionPolicy": {"enabled": True},
        },
    )
    for sentence in (
        "global.database.urlSecret.name is missing",
        "global.store.existingClaim is missing",
        "global.tls.mode is certManager, and this cluster has no cert-manager.io/v1",
        "global.tls.issuerRef.name is missing",
        "gateway.settings has ARGOSY_GRACE_SECONDS, which the chart sets itself",
        "gateway.autoscaling.min 5 is over gateway.autoscaling.max 2",
        'finetune.pool is "h100", which global.nodePools does not have; it has cpu',
        'finetune.jobNamespaces has "argosy", the release\'s own',
        "finetune.bases.gemma-3-270m.weights.digest is missing",
        "admissionPolicy.enabled pins an image by its digest",
    ):
        assert sentence in said, sentence
    with pytest.raises(Refusal, match=r"finetune.bases is empty[^$]*global.nodePools is empty"):
        template(toolbox.helm, "platform", {"global": {"database": PLATFORM["global"]["database"]}})


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"gateway": {"replicas": "two"}}, "/gateway/replicas"),
        ({"gateway": {"replicas": -1}}, "/gateway/replicas"),
        ({"gateway": {"maxStreamSeconds": 0}}, "/gateway/maxStreamSeconds"),
        ({"gateway": {"autoscaling": {"min": 1}}}, "/gateway/autoscaling"),
        ({"gateway": {"route": {"kind": "GRPCRoute"}}}, "/gateway/route/parentRefs"),
        ({"gateway": {"route": {"kind": "VirtualService"}}}, "/gateway/route/kind"),
        ({"gateway": {"settings": {"QUEUE_SECONDS": 1}}}, "/gateway/settings"),
        ({"gateway": {"resources": {"limits": {"memory": "lots"}}}}, "/gateway/resources/limits/memory"),
        ({"finetune": {"jobNamespaces": []}}, "/finetune/jobNamespaces"),
        ({"finetune": {"tenantNamespaces": {"acme": "acme-jobs"}}}, "/finetune/tenantNamespaces"),
        ({"networkPolicy": {"database": {"cidrs": ["postgres"]}}}, "/networkPolicy/database/cidrs"),
        ({"global": {"tls": {"mode": "off"}}}, "/global/tls/mode"),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(toolbox: Toolbox, changes: Object, key: str) -> None:
    assert key in refusal(toolbox, changes)


OPEN = {  # maps whose keys are the operator's
    "labels", "annotations", "podAnnotations", "nodeSelector", "settings", "requests", "limits", "matchLabels", "gpus", "default", "max",
    "nodePools", "tenantNamespaces", "accountAnnotations", "namespaceSelector",
}  # fmt: skip


def objects_of(values: Object, at: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all objects we own, the root included."""
    found = [at]
    for key, value in values.items():
        if isinstance(value, dict) and key not in OPEN and key != "bases":
            found += objects_of(value, (*at, key))
    return found


@pytest.mark.parametrize("chart", ["platform", "tenant"])
def test_schema_refuses_typos(toolbox: Toolbox, chart: str) -> None:
    """At every depth, all at once."""
    values = yaml.safe_load((CHARTS / chart / "values.yaml").read_text())
    typos: Object = {}
    paths = objects_of(values)
    for path in paths:
        level = typos
        for key in path:
            level = level.setdefault(key, {})
        level["typpo"] = 1
    said = refusal(toolbox, typos, chart)
    missing = [
        path for path in paths if not re.search(rf"at '{re.escape(''.join(f'/{key}' for key in path))}': additional prop.*'typpo'", said)
    ]
    assert not missing, said
    assert len(paths) > 5


def leaves(values: Object, at: str = "") -> list[str]:
    """Dotted paths of what can be set."""
    found = []
    for key, value in values.items():
        path = f"{at}.{key}" if at else key
        found += leaves(value, path) if isinstance(value, dict) and value and (key not in OPEN or path == "limits") else [path]
    return found


def names_in(schema: Object, root: Object, at: str = "") -> list[str]:
    """Dotted paths that a schema lists."""
    found = []
    for key, each in schema.get("properties", {}).items():
        there = root["$defs"][each["$ref"].rpartition("/")[2]] if "$ref" in each else each
        path = f"{at}.{key}" if at else key
        found += names_in(there, root, path) if "properties" in there and key not in OPEN else [path]
    return found


@pytest.mark.parametrize("chart", ["platform", "tenant"])
def test_values_schema_readme_parity(chart: str) -> None:
    folder = CHARTS / chart
    values, schema = yaml.safe_load((folder / "values.yaml").read_text()), yaml.safe_load((folder / "values.schema.json").read_text())
    del values["global"]
    expected = set(leaves(values))
    listed = {path for path in names_in(schema, schema) if path.split(".")[0] not in {"common", "global", "enabled"}}

    def within(path: str, others: set[str]) -> bool:
        return any(path == each or path.startswith(f"{each}.") or each.startswith(f"{path}.") for each in others)

    assert not [path for path in listed if not within(path, expected)]
    assert not [path for path in expected if not within(path, listed)]
    own = (folder / "README.md").read_text().partition("`global` is the same")[0]
    assert sorted(re.findall(r"^\| `([a-zA-Z.]+)` \|", own, re.MULTILINE)) == sorted(expected)


def test_globals_are_the_same_in_every_chart() -> None:
    blocks = {
        chart: yaml.safe_load(Path(CHARTS / chart / "values.yaml").read_text())["global"] for chart in ("platform", "tenant", "models")
    }
    assert blocks["platform"] == blocks["tenant"] == blocks["models"]
