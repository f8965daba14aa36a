"""What an attempt is in the cluster, as the objects that are applied: an owner ConfigMap, and a Job from the pool's pod template (pure).

The template is the operator's: pool, image, limits and security come from it untouched. Here go in only who the attempt is, whom it
reports to, and how it may end.
"""

import copy
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from services.finetune.jobs import Attempt

__all__ = ["NAME", "TemplateUnfit", "Terms", "audience", "config_map", "digests", "job", "job_set", "mine", "owner_name", "whose"]

Body = dict[str, Any]

NAME: Final = re.compile(r"ft-([0-9a-f-]{36})-a([1-9][0-9]{0,8})")
AUDIENCE: Final = re.compile(r"argosy-attempt/([0-9a-f-]{36})/([1-9][0-9]{0,8})")
MANAGER: Final = "argosy-finetune"  # of our fields
CONTAINER: Final = "trainer"
OWNER, JOB_ID, ATTEMPT, TENANT = "argosy.dev/owner", "argosy.dev/job-id", "argosy.dev/attempt", "argosy.dev/tenant"
SPEC_HASH: Final = "argosy.dev/spec-hash"
QUEUE, QUEUE_PRIORITY = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
TOLD, TOKEN = "/etc/argosy/job", "/var/run/secrets/argosy"  # where the owner ConfigMap and the token are mounted
BASES: Final = "/base"
TOKEN_SECONDS: Final = 3_600  # the kubelet renews it at 80 % of this
USER_ERROR: Final = 65


class TemplateUnfit(ValueError):
    """The pool's pod template cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What is the same for every attempt of this installation."""

    owner: str  # marks what is ours: another installation in the namespace has another
    address: str  # of TrainingService, as a pod dials it
    store_url: str
    ca: str = ""  # PEM of who signed the service's certificate; empty: the image's own trust
    queue: str = ""  # Kueue's LocalQueue; empty: our own queue decided before
    queue_priority: str = ""  # Kueue's WorkloadPriorityClass
    ttl_s: int = 86_400  # an ended Job that nobody cleared away is gone by then
    grace_s: int = 30  # from SIGTERM to SIGKILL, if the template does not give longer
    environment: Mapping[str, str] = field(default_factory=dict)  # what else an attempt is told


def owner_name(job_uid: str) -> str:
    """Of the ConfigMap that owns what all attempts of a job leave in the cluster."""
    return f"ft-{job_uid}"


def audience(job_uid: str, attempt: int) -> str:
    """Of the token that an attempt's pods show: it is good for nothing else."""
    return f"argosy-attempt/{job_uid}/{attempt}"


def whose(aud: str) -> tuple[str, int] | None:
    """Job and attempt that an audience names."""
    found = AUDIENCE.fullmatch(aud)
    return None if found is None else (found[1], int(found[2]))


def digests(attempt: Attempt) -> tuple[str, str]:
    """What makes two asks one: of the job for its owner object, and of the attempt for the Job."""
    job_digest = hashlib.sha256(f"{attempt.job_uid} {attempt.spec_digest}".encode()).hexdigest()
    return job_digest, hashlib.sha256(f"{attempt.job_uid} {attempt.attempt} {attempt.spec_digest}".encode()).hexdigest()


def mine(found: Body, terms: Terms, digest: str) -> bool:
    """Whether an object of the name we want is the one we want: by label and digest, never by its template, which others rewrite."""
    metadata = found["metadata"]
    labels, notes = metadata.get("labels") or {}, metadata.get("annotations") or {}
    return labels.get(OWNER) == terms.owner and notes.get(SPEC_HASH) == digest


def labels(attempt: Attempt, terms: Terms) -> dict[str, str]:
    """Of everything that belongs to an attempt."""
    return {
        "app.kubernetes.io/name": "argosy",
        "app.kubernetes.io/part-of": "argosy",
        "app.kubernetes.io/component": "trainer",
        "app.kubernetes.io/managed-by": MANAGER,
        OWNER: terms.owner,
        JOB_ID: attempt.job_uid,
        TENANT: attempt.project_uid,
        ATTEMPT: str(attempt.attempt),
    }


def config_map(attempt: Attempt, terms: Terms, namespace: str) -> Body:
    """The owner: immutable, and read by the attempts as files. One delete of it collects all that is left of a job."""
    digest, _ = digests(attempt)
    told = {"address": terms.address, "job": attempt.job_uid, "spec-hash": digest} | ({"ca.crt": terms.ca} if terms.ca else {})
    marks = {name: value for name, value in labels(attempt, terms).items() if name != ATTEMPT}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": owner_name(attempt.job_uid), "namespace": namespace, "labels": marks, "annotations": {SPEC_HASH: digest},
        },
        "immutable": True,
        "data": told,
    }  # fmt: skip


def job(attempt: Attempt, terms: Terms, namespace: str, template: Body, owner_uid: str) -> Body:
    """The batch/v1 Job. Disruptions are replaced inside it; every other ending is the reconciler's next attempt.

    Raises:
        TemplateUnfit: the template has no container to fill in.
    """
    spec: Body = {
        "backoffLimit": 0,
        "completions": 1,
        "parallelism": 1,
        "podReplacementPolicy": "Failed",  # never two trainers at once
        "podFailurePolicy": {
            "rules": [  # the first that matches decides
                {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailJob", "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": [USER_ERROR]}},
            ]
        },
        "ttlSecondsAfterFinished": terms.ttl_s,
        "template": _pod(attempt, terms, template),
    }
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(attempt, terms, namespace, owner_uid), "spec": spec}


def job_set(attempt: Attempt, terms: Terms, namespace: str, template: Body, owner_uid: str, nodes: int) -> Body:
    """Several nodes of one attempt: a lost rank fails the set, and the next attempt goes on from the last checkpoint."""
    spec: Body = {
        "parallelism": nodes,
        "completions": nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": _pod(attempt, terms, template),
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": _metadata(attempt, terms, namespace, owner_uid),
        "spec": {
            "failurePolicy": {"maxRestarts": 0},
            "ttlSecondsAfterFinished": terms.ttl_s,
            "replicatedJobs": [{"name": CONTAINER, "replicas": 1, "template": {"spec": spec}}],
        },
    }


def _metadata(attempt: Attempt, terms: Terms, namespace: str, owner_uid: str) -> Body:
    _, digest = digests(attempt)
    queue = {QUEUE: terms.queue} | ({QUEUE_PRIORITY: terms.queue_priority} if terms.queue_priority else {}) if terms.queue else {}
    return {
        "name": attempt.name,
        "namespace": namespace,
        "labels": labels(attempt, terms) | queue,
        "annotations": {SPEC_HASH: digest},
        "ownerReferences": [{"apiVersion": "v1", "kind": "ConfigMap", "name": owner_name(attempt.job_uid), "uid": owner_uid}],
    }


def _pod(attempt: Attempt, terms: Terms, template: Body) -> Body:
    """The pool's template with this attempt in it."""
    made = copy.deepcopy(template)
    spec, metadata = made.get("spec"), made.setdefault("metadata", {})
    if not isinstance(spec, dict):
        raise TemplateUnfit("the pod template has no spec")
    trainer = next((each for each in spec.get("containers") or () if each.get("name") == CONTAINER), None)
    if trainer is None:
        raise TemplateUnfit(f"the pod template has no container {CONTAINER!r}")
    metadata["labels"] = (metadata.get("labels") or {}) | labels(attempt, terms)
    for unwanted in ("name", "namespace", "creationTimestamp"):
        metadata.pop(unwanted, None)
    base = attempt.base_model.removeprefix("models/")
    _one_base(spec, trainer, base)
    spec["restartPolicy"] = "Never"
    spec["automountServiceAccountToken"] = False
    spec["enableServiceLinks"] = False
    spec["shareProcessNamespace"] = False
    spec["terminationGracePeriodSeconds"] = max(terms.grace_s, spec.get("terminationGracePeriodSeconds") or 0)
    token = {
        "serviceAccountToken": {
            "audience": audience(attempt.job_uid, attempt.attempt), "expirationSeconds": TOKEN_SECONDS, "path": "token",
        }
    }  # fmt: skip
    _put(spec, "volumes", {"name": "attempt-token", "projected": {"defaultMode": 0o440, "sources": [token]}})
    _put(spec, "volumes", {"name": "attempt-job", "configMap": {"name": owner_name(attempt.job_uid)}})
    _put(trainer, "volumeMounts", {"name": "attempt-token", "mountPath": TOKEN, "readOnly": True})
    _put(trainer, "volumeMounts", {"name": "attempt-job", "mountPath": TOLD, "readOnly": True})
    told = {
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "ARGOSY_TRAINING_ADDRESS": terms.address,
        "ARGOSY_JOB": attempt.job_uid,
        "ARGOSY_ATTEMPT": str(attempt.attempt),
        "ARGOSY_TOKEN_FILE": f"{TOKEN}/token",
        "ARGOSY_STORE_URL": terms.store_url,
        "ARGOSY_BASE_DIRECTORY": _base_directory(trainer, base),
    } | ({"ARGOSY_TLS_CA": f"{TOLD}/ca.crt"} if terms.ca else {})
    for name, value in {**told, **terms.environment}.items():
        _put(trainer, "env", {"name": name, "value": value})
    trainer["terminationMessagePath"] = "/dev/termination-log"
    trainer["terminationMessagePolicy"] = "File"
    # A pod that fsGroup does not reach could not read its own token.
    spec.setdefault("securityContext", {}).setdefault("fsGroup", 65_532)
    return made


def _put(holder: Body, key: str, value: Body) -> None:
    """Add to a list of named things; ours stands in the place of one of its name."""
    holder[key] = [each for each in holder.get(key) or () if each.get("name") != value["name"]] + [value]


def _one_base(spec: Body, trainer: Body, base: str) -> None:
    """Keep only this job's base among those that the template mounts at /base/{name}, from volumes whose names begin with `base-`."""
    ours = {each["name"] for each in trainer.get("volumeMounts") or () if each["mountPath"] == f"{BASES}/{base}"}
    others = {each["name"] for each in spec.get("volumes") or () if each["name"].startswith("base-")} - ours
    spec["volumes"] = [each for each in spec.get("volumes") or () if each["name"] not in others]
    for container in [*spec["containers"], *(spec.get("initContainers") or ())]:
        container["volumeMounts"] = [each for each in container.get("volumeMounts") or () if each["name"] not in others]


def _base_directory(trainer: Body, base: str) -> str:
    """Where the template mounts the base; /base itself where it has no place of its own, as in an image that holds the weights."""
    own = f"{BASES}/{base}"
    return own if any(each["mountPath"] == own for each in trainer.get("volumeMounts") or ()) else BASES
