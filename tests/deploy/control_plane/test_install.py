"""The platform and tenant charts on a real API server: what Helm does with them, what their accounts may do, and what is left."""

import base64
import json
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from cryptography.x509 import DNSName, SubjectAlternativeName, load_pem_x509_certificate

from tests.deploy.reach import Reach, Refused
from tests.deploy.templates import CHARTS, PLATFORM, Object, over

RIGHTS = Path(__file__).with_name("rights.txt")
# Fake nodes have no volumes: an object store needs none.
VALUES = over(PLATFORM, {"global": {"store": {"url": "s3://argosy", "existingClaim": ""}}})
EVENT_SECONDS = 60
FOREVER = {"fake.argosy.dev/run-seconds": "never"}  # else a pod on a fake node ends by itself after a while
RELEASE = "argosy"
DIGEST = f"localhost/argosy-trainer@sha256:{'ab' * 32}"


@dataclass(frozen=True)
class Installed:
    """A platform release in a namespace of the test's own, and the namespace of its Jobs."""

    reach: Reach
    namespace: str
    folder: Path

    @property
    def jobs(self) -> str:
        return f"{self.namespace}-jobs"

    def values(self, changes: Object) -> str:
        file = self.folder / "values.json"
        file.write_text(json.dumps(over(over(VALUES, {"finetune": {"jobNamespaces": [self.jobs]}}), changes)))
        return str(file)

    def upgrade(self, changes: Object | None = None, *arguments: str) -> None:
        self.reach.helm(
            "upgrade", "--install", RELEASE, str(CHARTS / "platform"), "-n", self.namespace, "-f", self.values(changes or {}), *arguments
        )

    def get(self, kind: str, name: str, namespace: str = "") -> Any:
        return json.loads(self.reach.kubectl("get", kind, name, "-n", namespace or self.namespace, "-o", "json"))

    def data(self, secret: str) -> dict[str, bytes]:
        return {key: base64.b64decode(value) for key, value in self.get("secret", secret)["data"].items()}

    def may(self, account: str, verb: str, resource: str, namespace: str) -> bool:
        asked = ("auth", "can-i", verb, resource, "-n", namespace, f"--as=system:serviceaccount:{account}")
        try:
            return self.reach.kubectl(*asked).strip() == "yes"
        except Refused:
            return False

    def event(self, namespace: str, about: str, reason: str) -> str:
        """The message of the first event of this reason about this object, waited for."""
        chosen = f"involvedObject.name={about},reason={reason}"
        command = (
            self.reach.toolbox.kubectl, f"--kubeconfig={self.reach.kubeconfig}", "get", "events", "-n", namespace, "--watch",
            f"--field-selector={chosen}", f"--request-timeout={EVENT_SECONDS}s", "-o", "jsonpath={.message}{'\\n'}",
        )  # fmt: skip
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None
            line = watching.stdout.readline()
            watching.kill()
        return line

    def as_worker(self, manifest: Object) -> str:
        """Create something as the worker would, without leaving it there."""
        account = f"--as=system:serviceaccount:{self.namespace}:{RELEASE}-finetune"
        return self.reach.kubectl("create", "--dry-run=server", "-n", self.jobs, "-f", "-", account, manifest=json.dumps(manifest))


@contextmanager
def installing(reach: Reach, folder: Path) -> Iterator[Installed]:
    with reach.fresh_namespace() as namespace:
        installed = Installed(reach, namespace, folder)
        try:
            yield installed
        finally:
            with ExitStack() as stack:
                stack.callback(reach.kubectl, "delete", "namespace", installed.jobs, "--wait=false", "--ignore-not-found")
                stack.callback(reach.helm, "uninstall", RELEASE, "-n", namespace, "--ignore-not-found")


@pytest.fixture
def installed(control_plane: Reach, tmp_path: Path) -> Iterator[Installed]:
    with installing(control_plane, tmp_path) as made:
        yield made


def job(**pod: Any) -> Object:
    """A Job as the worker makes them, with `pod` changed."""
    container = {
        "name": "trainer", "image": DIGEST,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }  # fmt: skip
    spec = {
        "restartPolicy": "Never", "serviceAccountName": "argosy-trainer", "automountServiceAccountToken": False, "containers": [container],
        "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
    }  # fmt: skip
    container |= pod.pop("container", {})
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": pod.pop("name", "ft-0-a1"), "labels": {"app.kubernetes.io/part-of": pod.pop("part_of", "argosy")}},
        "spec": {"backoffLimit": 0, "template": {"metadata": {"annotations": FOREVER}, "spec": spec | pod}},
    }


# --- Helm's own moves ---------------------------------------------------------------------------------------------------------------


def test_install_upgrade_rollback(installed: Installed) -> None:
    """In a namespace that enforces `restricted`; the pods are admitted, and keys and certificates outlive every move."""
    installed.upgrade({}, "--wait", "--timeout", "90s")
    keys, tls = installed.data("argosy-keys"), installed.data("argosy-tls")
    for pair in ("signing-key", "manifest-key"):
        private = load_pem_private_key(keys[f"{pair}.pem"], password=None)
        assert load_pem_public_key(keys[f"{pair}.pub.pem"]) == private.public_key()
    assert keys["signing-key.pem"] != keys["manifest-key.pem"]
    for secret in ("pepper", "page-token-key"):
        assert len(bytes.fromhex(keys[secret].decode())) == 32
    certificate, authority = load_pem_x509_certificate(tls["tls.crt"]), load_pem_x509_certificate(tls["ca.crt"])
    certificate.verify_directly_issued_by(authority)

    installed.upgrade({"gateway": {"replicas": 3, "modelNamespaces": [installed.namespace, installed.jobs]}}, "--wait", "--timeout", "90s")
    assert installed.data("argosy-keys") == keys
    assert installed.get("deployment", "argosy-gateway")["status"]["readyReplicas"] == 3
    wider = load_pem_x509_certificate(installed.data("argosy-tls")["tls.crt"])
    wider.verify_directly_issued_by(authority)  # whoever trusts the old one trusts the new one
    names = wider.extensions.get_extension_for_class(SubjectAlternativeName).value.get_values_for_type(DNSName)
    assert {"localhost", f"*.{installed.namespace}.svc", f"*.{installed.jobs}.svc"} == set(names)

    installed.reach.helm("rollback", RELEASE, "1", "-n", installed.namespace, "--wait", "--timeout", "90s")
    assert installed.data("argosy-keys") == keys
    assert installed.get("deployment", "argosy-gateway")["spec"]["replicas"] == 2


def test_a_deleted_certificate_is_made_again_by_the_same_authority(installed: Installed) -> None:
    """As the runbook of CertificateExpiring says."""
    installed.upgrade()
    old = installed.data("argosy-tls")
    installed.reach.kubectl("delete", "secret", "argosy-tls", "-n", installed.namespace)
    installed.upgrade()
    new = installed.data("argosy-tls")
    assert new["ca.crt"] == old["ca.crt"]
    assert new["tls.crt"] != old["tls.crt"]
    load_pem_x509_certificate(new["tls.crt"]).verify_directly_issued_by(load_pem_x509_certificate(old["ca.crt"]))


def test_scale_then_upgrade(installed: Installed) -> None:
    """A number that was given away is not fought over: Helm 4 applies on the server, and would say so."""
    installed.upgrade({"gateway": {"replicas": None}})
    installed.reach.kubectl("scale", "deployment/argosy-gateway", "-n", installed.namespace, "--replicas=5")
    installed.upgrade({"gateway": {"replicas": None, "maxStreamSeconds": 60}})
    assert installed.get("deployment", "argosy-gateway")["spec"]["replicas"] == 5


def test_uninstall_keeps_training(installed: Installed) -> None:
    """And keys: a release of the same name takes both up again."""
    installed.upgrade()
    keys = installed.data("argosy-keys")
    installed.reach.apply(installed.jobs, json.dumps(job(nodeSelector={"argosy.dev/pool": "cpu"})))
    installed.reach.wait(installed.jobs, "job/ft-0-a1", "jsonpath={.status.active}=1")
    installed.reach.helm("uninstall", RELEASE, "-n", installed.namespace)
    assert installed.get("job", "ft-0-a1", installed.jobs)["status"]["active"] == 1
    listed = installed.reach.kubectl("get", "networkpolicies", "-n", installed.jobs, "--no-headers")
    kept = {line.split()[0] for line in listed.splitlines()}
    assert kept == {"argosy-deny", "argosy-trainer"}
    installed.upgrade()
    assert installed.data("argosy-keys") == keys
    assert installed.get("job", "ft-0-a1", installed.jobs)["status"]["active"] == 1


STUBS = {  # group: (version, kinds). Their controllers are not here; Helm and the API server ask for no more than the names.
    "cert-manager.io": ("v1", ("Certificate",)),
    "monitoring.coreos.com": ("v1", ("PodMonitor", "PrometheusRule")),
    "gateway.networking.k8s.io": ("v1", ("GRPCRoute", "BackendTLSPolicy")),
    "jobset.x-k8s.io": ("v1alpha2", ("JobSet",)),
    "kueue.x-k8s.io": ("v1beta1", ("LocalQueue",)),
}


def _plural(kind: str) -> str:
    return f"{kind.lower().removesuffix('y')}ies" if kind.endswith("y") else f"{kind.lower()}s"


def _stub(group: str, version: str, kind: str) -> Object:
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{_plural(kind)}.{group}",
            "annotations": {"api-approved.kubernetes.io": "unapproved, a stand-in of a test"},
        },
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": kind, "plural": _plural(kind), "singular": kind.lower()},
            "versions": [{"name": version, "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}],
        },
    }


@pytest.fixture
def with_everything(control_plane: Reach) -> Iterator[None]:
    """A cluster that knows the objects of cert-manager, Prometheus' operator, Gateway API, JobSet and Kueue."""
    if control_plane.existing and control_plane.cluster is None:
        pytest.skip("a lent cluster keeps the APIs it has")
    stubs = [_stub(group, version, kind) for group, (version, kinds) in STUBS.items() for kind in kinds]
    listed = json.dumps({"apiVersion": "v1", "kind": "List", "items": stubs})
    control_plane.kubectl("apply", "-f", "-", manifest=listed)
    for stub in stubs:
        control_plane.wait("default", f"crd/{stub['metadata']['name']}", "condition=Established")
    yield
    control_plane.kubectl("delete", "-f", "-", manifest=listed)


def test_where_the_apis_are_their_objects_are(with_everything: None, installed: Installed) -> None:
    """Installed, upgraded to what is there without them, and back."""
    everything: Object = {
        "global": {"tls": {"mode": "certManager", "issuerRef": {"name": "ca", "kind": "ClusterIssuer"}}},
        "gateway": {"route": {"kind": "GRPCRoute", "parentRefs": [{"name": "edge"}], "hostnames": ["llm.example"], "caConfigMap": "ca"}},
        "admissionPolicy": {"enabled": True},
        "finetune": {"trainerImage": DIGEST},
    }

    def names(kind: str) -> list[str]:
        items = json.loads(installed.reach.kubectl("get", kind, "-n", installed.namespace, "-o", "json"))["items"]
        return [each["metadata"]["name"] for each in items]

    installed.upgrade(everything)
    both = ["argosy-finetune", "argosy-gateway"]
    assert (names("certificates"), names("podmonitors"), names("prometheusrules")) == (both, both, ["argosy"])
    assert (names("grpcroutes"), names("backendtlspolicies")) == (["argosy-gateway"], ["argosy-gateway"])
    assert installed.may(f"{installed.namespace}:argosy-finetune", "create", "jobsets.jobset.x-k8s.io", installed.jobs)
    plain = {"monitoring": {"monitors": False, "rules": False}}
    installed.upgrade(plain)
    assert names("certificates") + names("podmonitors") + names("prometheusrules") + names("grpcroutes") == []
    installed.upgrade(everything)
    assert names("certificates") == both


# --- who may do what ----------------------------------------------------------------------------------------------------------------

VERBS = ("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection")
RESOURCES = (
    "jobs.batch", "configmaps", "pods", "pods/log", "pods/exec", "pods/eviction", "pods/ephemeralcontainers", "secrets", "serviceaccounts",
    "serviceaccounts/token", "events", "services", "persistentvolumeclaims", "endpointslices.discovery.k8s.io", "deployments.apps",
    "roles.rbac.authorization.k8s.io", "rolebindings.rbac.authorization.k8s.io", "networkpolicies.networking.k8s.io",
    "leases.coordination.k8s.io",
)  # fmt: skip
CLUSTER = ("nodes", "namespaces", "clusterroles.rbac.authorization.k8s.io", "tokenreviews.authentication.k8s.io",
    "subjectaccessreviews.authorization.k8s.io", "certificatesigningrequests.certificates.k8s.io", "persistentvolumes",
    "validatingadmissionpolicies.admissionregistration.k8s.io")  # fmt: skip


def allowed(installed: Installed, account: str, namespace: str, resources: tuple[str, ...]) -> dict[str, list[str]]:
    """Resource → verbs, as the API server's own authorizer answers, many questions in one call each."""
    reviews = [
        {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "metadata": {},
            "spec": {
                "user": f"system:serviceaccount:{account}",
                "groups": ["system:serviceaccounts", f"system:serviceaccounts:{account.partition(':')[0]}", "system:authenticated"],
                "resourceAttributes": _attributes(verb, resource, namespace),
            },
        }
        for resource in resources
        for verb in VERBS
    ]
    text = "\n---\n".join(json.dumps(review) for review in reviews)
    answers = installed.reach.kubectl("create", "-f", "-", "-o", "jsonpath={.status.allowed}{'\\n'}", manifest=text).split()
    assert len(answers) == len(reviews)
    found: dict[str, list[str]] = {}
    for review, answer in zip(reviews, answers, strict=True):
        if answer == "true":
            attributes: Any = review["spec"]
            asked = attributes["resourceAttributes"]
            name = "/".join(filter(None, (asked["resource"], asked["subresource"])))
            found.setdefault(name, []).append(asked["verb"])
    return found


def _attributes(verb: str, resource: str, namespace: str) -> dict[str, str]:
    whole, _, group = resource.partition(".")
    name, _, sub = whole.partition("/")
    return {"verb": verb, "group": group, "resource": name, "subresource": sub, "namespace": namespace}


def test_A25_can_i_matrix(installed: Installed) -> None:
    """Every account, in every namespace it might look into; a new right is a line of the golden and of a review."""
    installed.upgrade({"gateway": {"gpuHealth": True}})
    own, jobs = installed.namespace, installed.jobs
    lines = []
    for who, account in (
        ("gateway", f"{own}:argosy-gateway"), ("finetune", f"{own}:argosy-finetune"), ("trainer", f"{jobs}:argosy-trainer"),
        ("default", f"{own}:default"),
    ):  # fmt: skip
        for where, namespace, resources in (
            ("release", own, RESOURCES), ("jobs", jobs, RESOURCES), ("elsewhere", "kube-system", RESOURCES), ("cluster", "", CLUSTER),
        ):  # fmt: skip
            may = allowed(installed, account, namespace, resources)
            lines += [f"{who} {where}: {resource} {' '.join(verbs)}" for resource, verbs in may.items()]
    assert lines == RIGHTS.read_text().splitlines()


@pytest.fixture
def guarded(installed: Installed) -> Installed:
    """With the admission policy, once it is in force."""
    installed.upgrade({"admissionPolicy": {"enabled": True}, "finetune": {"trainerImage": DIGEST}})
    policy = f"validatingadmissionpolicy/{installed.namespace}-argosy-finetune"
    installed.reach.wait(installed.namespace, policy, "jsonpath={.status.observedGeneration}=1")
    return installed


def test_A25_policy_blocks_image_and_secret(guarded: Installed) -> None:
    warnings = guarded.get("validatingadmissionpolicy", f"{guarded.namespace}-argosy-finetune")["status"].get("typeChecking", {})
    assert not warnings.get("expressionWarnings"), warnings
    secret = {"name": "s", "secret": {"secretName": "argosy-keys"}}
    projected = {"name": "s", "projected": {"sources": [{"secret": {"name": "argosy-keys"}}]}}
    reference = {"name": "K", "valueFrom": {"secretKeyRef": {"name": "argosy-keys", "key": "pepper"}}}
    _until_in_force(guarded)
    for told, refused in (
        ("not the release's trainer", job(container={"image": "registry.example/busybox"})),
        ("not the release's trainer", job(initContainers=[{"name": "i", "image": "other"} | _restricted()])),
        ("runs as argosy-trainer", job(serviceAccountName="default")),
        ("mounts no Secret", job(volumes=[secret])),
        ("mounts no Secret", job(volumes=[projected])),
        ("reads no Secret", job(container={"env": [reference]})),
        ("reads no Secret", job(container={"envFrom": [{"secretRef": {"name": "argosy-keys"}}]})),
        ("is named ft-", job(name="mine")),
        ("is named ft-", job(part_of="other")),
    ):
        with pytest.raises(Refused, match=told):
            guarded.as_worker(refused)
    token = {"name": "t", "projected": {"sources": [{"serviceAccountToken": {"path": "token", "audience": "argosy"}}]}}
    assert "ft-0-a1" in guarded.as_worker(job(volumes=[token, {"name": "tmp", "emptyDir": {}}]))
    # The policy is the worker's; everybody else goes on as before.
    guarded.reach.kubectl("create", "--dry-run=server", "-n", guarded.jobs, "-f", "-", manifest=json.dumps(job(name="an-operators-own")))


def test_A25_a_job_cannot_be_privileged_in_a_job_namespace(installed: Installed) -> None:
    """Jobs are accepted, and their pods are refused by the namespace's own pod security: the Job says so."""
    installed.upgrade()
    labels = installed.get("namespace", installed.jobs)["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    installed.reach.apply(installed.jobs, json.dumps(job(container={"securityContext": {"privileged": True}})))
    assert "violates PodSecurity" in installed.event(installed.jobs, "ft-0-a1", "FailedCreate")


def _restricted() -> Object:
    return {"securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}}


def _until_in_force(installed: Installed, tries: int = 100) -> None:
    """The API server compiles a policy in its own time, within seconds."""
    for _ in range(tries):
        try:
            installed.as_worker(job(name="mine"))
        except Refused:
            return
    raise AssertionError("the policy never came into force")


# --- tenants ------------------------------------------------------------------------------------------------------------------------


def test_tenant_quota(installed: Installed) -> None:
    """A tenant's namespace holds what it may and no more, and the worker's rights and limits are there."""
    reach = installed.reach
    installed.upgrade()
    with reach.fresh_namespace("tenant") as tenant:
        file = installed.folder / "tenant.yaml"
        file.write_text(
            yaml.safe_dump(
                {
                    "worker": {"namespace": installed.namespace},
                    "quota": {"gpus": {"nvidia.com/gpu": 2}, "jobs": 2, "cpu": None},
                    "limits": {"default": {"cpu": "1", "memory": "1Gi"}},
                }
            )
        )
        reach.helm("install", "acme", str(CHARTS / "tenant"), "-n", tenant, "-f", str(file))
        worker = f"{installed.namespace}:argosy-finetune"
        assert installed.may(worker, "create", "jobs.batch", tenant)
        assert not installed.may(worker, "get", "secrets", tenant)
        gpu = {"container": {"image": "any", "resources": {"limits": {"nvidia.com/gpu": 2}}}}
        reach.apply(tenant, json.dumps(job(**gpu)))
        reach.wait(tenant, "resourcequota/acme", "jsonpath={.status.used.requests\\.nvidia\\.com/gpu}=2")
        reach.apply(tenant, json.dumps(job(name="ft-1-a1", **gpu)))  # the Job is counted, its pod is refused
        assert "exceeded quota: acme" in installed.event(tenant, "ft-1-a1", "FailedCreate")
        with pytest.raises(Refused, match="exceeded quota: acme"):
            reach.apply(tenant, json.dumps(job(name="ft-2-a1", **gpu)))
        (pod,) = json.loads(reach.kubectl("get", "pods", "-n", tenant, "-o", "json"))["items"]
        assert pod["spec"]["containers"][0]["resources"]["requests"]["memory"] == "1Gi"
