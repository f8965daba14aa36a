"""Network policies as a cluster would judge them: who reaches whom, and who does not (A26).

The evaluator knows what our policies use: pod and namespace selectors by labels, address blocks, ports. A pod that no policy selects is
open in that direction, as in Kubernetes.
"""

from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network

import pytest

from tests.deploy.templates import BASE, PLATFORM, Object, of, over, template
from tools.cluster.toolbox import Toolbox


@dataclass(frozen=True)
class Party:
    """A pod, or without labels an address outside the cluster."""

    name: str
    namespace: str = ""
    labels: dict[str, str] = field(default_factory=dict)
    address: str = "203.0.113.9"


def pod(component: str, namespace: str, release: str = "argosy") -> Party:
    labels = {"app.kubernetes.io/name": "argosy", "app.kubernetes.io/instance": release, "app.kubernetes.io/component": component}
    return Party(component, namespace, labels | {"app.kubernetes.io/part-of": "argosy"}, "10.244.0.9")


GATEWAY, FINETUNE, MODEL = pod("gateway", "argosy"), pod("finetune", "argosy"), pod("model", "argosy")
TRAINER, STRAY = pod("trainer", "argosy-jobs"), Party("stray", "argosy-jobs", {"app": "miner"}, "10.244.0.10")
CALLER, PROMETHEUS = Party("caller", "default", {"app": "x"}, "10.244.0.11"), Party("prometheus", "monitoring", {"app": "p"}, "10.244.0.12")
KEDA = Party("keda", "keda", {"app": "keda-operator"}, "10.244.0.14")
DNS = Party("dns", "kube-system", {"k8s-app": "kube-dns"}, "10.244.0.13")
API, DATABASE, STORE = Party("api", address="10.0.0.1"), Party("database", address="10.0.1.1"), Party("store", address="10.0.2.1")
INTERNET, METADATA = Party("internet"), Party("metadata", address="169.254.169.254")


def matches(selector: Object, labels: dict[str, str]) -> bool:
    assert selector.keys() <= {"matchLabels"}, selector
    return selector.get("matchLabels", {}).items() <= labels.items()


def concerns(peer: Object, party: Party, own: str) -> bool:
    if "ipBlock" in peer:
        assert peer["ipBlock"].keys() == {"cidr"}
        return ip_address(party.address) in ip_network(peer["ipBlock"]["cidr"])
    if not party.namespace:
        return False
    if "namespaceSelector" in peer:
        inside = matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": party.namespace})
    else:
        inside = party.namespace == own
    return inside and matches(peer.get("podSelector", {}), party.labels)


def allowed(policies: list[Object], direction: str, subject: Party, other: Party, port: int, protocol: str) -> bool:
    """Whether the policies that select `subject` let it talk with `other`."""
    kind, side = ("Ingress", "from") if direction == "ingress" else ("Egress", "to")
    selecting = [
        each
        for each in policies
        if each["metadata"]["namespace"] == subject.namespace
        and kind in each["spec"]["policyTypes"]
        and matches(each["spec"]["podSelector"], subject.labels)
    ]
    if not subject.namespace or not selecting:
        return True
    for policy in selecting:
        for rule in policy["spec"].get(direction, []):
            ports = [(each.get("protocol", "TCP"), each["port"]) for each in rule.get("ports", [])]
            peers = rule.get(side, [])
            at_port = not ports or (protocol, port) in ports
            if at_port and (not peers or any(concerns(peer, other, subject.namespace) for peer in peers)):
                return True
    return False


def reaches(policies: list[Object], source: Party, target: Party, port: int, protocol: str = "TCP") -> bool:
    out = allowed(policies, "egress", source, target, port, protocol)
    return out and allowed(policies, "ingress", target, source, port, protocol)


@pytest.fixture(scope="module")
def policies() -> list[Object]:
    toolbox = Toolbox()
    edges = {"apiServer": {"cidrs": ["10.0.0.1/32"]}, "database": {"cidrs": ["10.0.1.0/24"]}, "store": {"cidrs": ["10.0.2.0/24"]}}
    shared = over(PLATFORM["global"], {"store": {"url": "s3://argosy", "existingClaim": ""}})
    platform = template(toolbox.helm, "platform", over(PLATFORM, {"global": shared, "networkPolicy": edges}))
    named = {"tls": {"mode": "existingSecret", "existingSecret": "t"}, "keys": {"existingSecret": "k"}}
    models = {"global": shared | named, "models": {"m": BASE | {"pool": "cpu", "replicas": 2}}, "networkPolicy": {"store": edges["store"]}}
    tenant = template(
        toolbox.helm, "tenant", {"networkPolicy": {"store": edges["store"]}, "global": shared}, namespace="acme-jobs", release="acme"
    )
    return of([*platform, *template(toolbox.helm, "models", models), *tenant], "NetworkPolicy")


EDGES = [
    (CALLER, GATEWAY, 8443), (INTERNET, GATEWAY, 8443),
    (GATEWAY, MODEL, 8500), (GATEWAY, FINETUNE, 8600), (GATEWAY, DATABASE, 5432), (GATEWAY, API, 6443), (GATEWAY, API, 443),
    (FINETUNE, DATABASE, 5432), (FINETUNE, STORE, 443), (FINETUNE, API, 6443),
    (TRAINER, FINETUNE, 8601), (TRAINER, STORE, 443), (MODEL, STORE, 443),
    (KEDA, GATEWAY, 8444), (PROMETHEUS, GATEWAY, 9090), (PROMETHEUS, FINETUNE, 9090), (PROMETHEUS, MODEL, 9090),
]  # fmt: skip
NO_EDGES = [
    (CALLER, GATEWAY, 8444), (KEDA, GATEWAY, 9090), (KEDA, MODEL, 8500),
    (CALLER, GATEWAY, 9090), (CALLER, GATEWAY, 8081), (CALLER, FINETUNE, 8600), (CALLER, FINETUNE, 8601), (CALLER, MODEL, 8500),
    (TRAINER, FINETUNE, 8600), (TRAINER, GATEWAY, 8443), (TRAINER, MODEL, 8500), (TRAINER, DATABASE, 5432), (TRAINER, API, 6443),
    (TRAINER, API, 443), (TRAINER, INTERNET, 443), (TRAINER, METADATA, 80), (TRAINER, METADATA, 443), (TRAINER, TRAINER, 29500),
    (STRAY, FINETUNE, 8601), (STRAY, STORE, 443), (STRAY, INTERNET, 443), (CALLER, TRAINER, 22),
    (MODEL, INTERNET, 443), (MODEL, DATABASE, 5432), (MODEL, FINETUNE, 8600), (MODEL, GATEWAY, 8443),
    (GATEWAY, STORE, 443), (GATEWAY, INTERNET, 443), (GATEWAY, METADATA, 80), (FINETUNE, MODEL, 8500), (FINETUNE, METADATA, 80),
    (pod("gateway", "elsewhere"), FINETUNE, 8600), (pod("trainer", "elsewhere"), FINETUNE, 8601),
    (pod("gateway", "argosy", "other"), FINETUNE, 8600),
    (GATEWAY, GATEWAY, 9090), (FINETUNE, GATEWAY, 9090),
]  # fmt: skip


def named(edge: object) -> str:
    return f"{edge.namespace}/{edge.name}".strip("/") if isinstance(edge, Party) else str(edge)


@pytest.mark.parametrize(("source", "target", "port"), EDGES, ids=named)
def test_network_policy_edges(policies: list[Object], source: Party, target: Party, port: int) -> None:
    assert reaches(policies, source, target, port)


@pytest.mark.parametrize(("source", "target", "port"), NO_EDGES, ids=named)
def test_A26_there_is_no_other_edge(policies: list[Object], source: Party, target: Party, port: int) -> None:
    assert not reaches(policies, source, target, port)


@pytest.mark.parametrize("source", [GATEWAY, FINETUNE, MODEL, TRAINER], ids=named)
def test_names_can_be_resolved(policies: list[Object], source: Party) -> None:
    assert reaches(policies, source, DNS, 53, "UDP") and reaches(policies, source, DNS, 53)


def test_A26_a_tenants_pods_reach_the_worker_and_the_store(policies: list[Object]) -> None:
    """The worker lets them in once the platform's release names their namespace."""
    theirs = pod("trainer", "acme-jobs", "acme")
    assert allowed(policies, "egress", theirs, FINETUNE, 8601, "TCP") and reaches(policies, theirs, STORE, 443)
    assert not reaches(policies, theirs, FINETUNE, 8601)  # not named yet
    assert not reaches(policies, theirs, INTERNET, 443) and not reaches(policies, theirs, TRAINER, 8000)


def test_callers_can_be_told_apart(toolbox: Toolbox) -> None:
    only = {"callers": {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "default"}}, "cidrs": ["192.0.2.0/24"]}}
    policies = of(template(toolbox.helm, "platform", over(PLATFORM, {"networkPolicy": only})), "NetworkPolicy")
    assert reaches(policies, CALLER, GATEWAY, 8443)
    assert reaches(policies, Party("office", address="192.0.2.7"), GATEWAY, 8443)
    assert reaches(policies, pod("test", "argosy"), GATEWAY, 8443)  # helm test
    assert not reaches(policies, INTERNET, GATEWAY, 8443)
    assert not reaches(policies, Party("x", "elsewhere", {"a": "b"}), GATEWAY, 8443)


def test_a_store_of_files_needs_no_edge(toolbox: Toolbox) -> None:
    policies = of(template(toolbox.helm, "platform", PLATFORM), "NetworkPolicy")
    assert not reaches(policies, TRAINER, STORE, 443)
    assert reaches(policies, TRAINER, FINETUNE, 8601)


def test_one_can_leave_them_out(toolbox: Toolbox) -> None:
    assert not of(template(toolbox.helm, "platform", over(PLATFORM, {"networkPolicy": {"enabled": False}})), "NetworkPolicy")
