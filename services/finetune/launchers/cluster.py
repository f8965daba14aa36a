"""Attempts as Jobs of a cluster, applied once by name, watched from one cache, and adopted by whoever comes after a crash.

The name is the lock: `ft-<job uuid>-a<attempt>` is applied without force, and what is there already is ours if its owner label and digest
say so. What is seen comes from two watches, whose last view outlives the API server (F19); that something is absent is only said after
asking anew, since a start follows from it.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import yaml

from services.chassis.cluster import Api, Body, Feed, Refused
from services.chassis.listwatch import Expired, Unreachable
from services.finetune.jobs import Attempt, LauncherUnavailable, NameTaken, Seen, Waits, Where
from services.finetune.launchers import job_manifest
from services.finetune.launchers.job_manifest import NAME, OWNER, TemplateUnfit, Terms, owner_name
from services.finetune.launchers.sight import finished, seen_in

__all__ = ["ClusterLauncher", "Place"]

log = logging.getLogger(__name__)

R = TypeVar("R")

JOBS, JOB_SETS = "/apis/batch/v1/namespaces/{0}/jobs", "/apis/jobset.x-k8s.io/v1alpha2/namespaces/{0}/jobsets"
PODS, CONFIG_MAPS = "/api/v1/namespaces/{0}/pods", "/api/v1/namespaces/{0}/configmaps"
KUEUE, JOB_SET = "/apis/kueue.x-k8s.io", "/apis/jobset.x-k8s.io/v1alpha2"
JOB_NAMES = ("batch.kubernetes.io/job-name", "jobset.sigs.k8s.io/jobset-name")  # labels of a pod


@dataclass(frozen=True)
class Place:
    """Where attempts go, and from which template."""

    templates: Path  # a folder with one PodTemplateSpec a pool, `<pool>.yaml`; read anew for each attempt
    pool: str
    namespaces: Sequence[str]  # the first is everybody's but theirs who have one
    of_project: Mapping[str, str] = field(default_factory=dict)  # project uid → its own, which is among `namespaces`
    nodes: int = 1  # of one attempt

    @classmethod
    def of(cls, templates: Path, pool: str, listed: Sequence[str], nodes: int = 1) -> "Place":
        """`listed`: everybody's namespace, then `project uid=namespace` for each project that has its own."""
        own = {uid: name for uid, equals, name in (each.partition("=") for each in listed) if equals}
        return cls(templates, pool, tuple(dict.fromkeys(each.rpartition("=")[2] for each in listed)), own, nodes)

    def namespace(self, project_uid: str) -> str:
        """A project's."""
        return self.of_project.get(project_uid, self.namespaces[0])


@dataclass(eq=False)
class ClusterLauncher:
    """See jobs.Launcher. `start` begins to watch; `close` ends that, and leaves the attempts alone."""

    api: Api
    place: Place
    terms: Terms
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    _jobs: list[Feed] = field(default_factory=list)
    _pods: list[Feed] = field(default_factory=list)
    _groups: dict[str, bool] = field(default_factory=dict)  # API groups that were found
    _looking: threading.Lock = field(default_factory=threading.Lock)

    def start(self) -> None:
        """Watch the Jobs and the Pods of every namespace."""
        jobs = JOBS if self.place.nodes == 1 else JOB_SETS
        for paths, feeds in ((jobs, self._jobs), (PODS, self._pods)):
            for namespace in dict.fromkeys(self.place.namespaces):
                feeds.append(Feed(self.api, paths.format(namespace), f"{OWNER}={self.terms.owner}"))
                feeds[-1].start()

    def close(self) -> None:
        """Watch no more."""
        for feed in (*self._jobs, *self._pods):
            feed.stop()

    @property
    def age_s(self) -> float | None:
        """Seconds since the view that was heard of least lately; None: one was never heard of."""
        ages = [feed.fresh.age_s for feed in (*self._jobs, *self._pods)]
        return None if None in ages or not ages else max(age for age in ages if age is not None)

    async def ensure(self, attempt: Attempt) -> None:
        """See jobs.Launcher."""
        await self._do(self._ensure, attempt)

    def _ensure(self, attempt: Attempt) -> None:
        namespace = self.place.namespace(attempt.project_uid)
        _, digest = job_manifest.digests(attempt)
        path = f"{self._collection(namespace)}/{_named(attempt.name)}"
        found = self._cached(attempt.name) or self.api.find(path)
        if found is None:
            template = self._template()  # what cannot work leaves nothing behind
            self._check_groups()
            owner = self._owner(attempt, namespace)
            if self.place.nodes == 1:
                body = job_manifest.job(attempt, self.terms, namespace, template, owner)
            else:
                body = job_manifest.job_set(attempt, self.terms, namespace, template, owner, self.place.nodes)
            found = self._apply(path, body)
        if not job_manifest.mine(found, self.terms, digest):
            raise NameTaken(attempt.name)

    def _owner(self, attempt: Attempt, namespace: str) -> str:
        """The uid of the job's ConfigMap, made if it is not there."""
        path = f"{CONFIG_MAPS.format(namespace)}/{owner_name(attempt.job_uid)}"
        digest, _ = job_manifest.digests(attempt)
        found = self.api.find(path)
        if found is not None and found["metadata"].get("deletionTimestamp"):
            raise LauncherUnavailable(f"{owner_name(attempt.job_uid)} is being deleted", Waits.STARTING)
        if found is None:
            found = self._apply(path, job_manifest.config_map(attempt, self.terms, namespace))
        if not job_manifest.mine(found, self.terms, digest):
            raise NameTaken(owner_name(attempt.job_uid))
        return str(found["metadata"]["uid"])

    def _apply(self, path: str, body: Body) -> Body:
        """What is there afterwards: ours, or what was in its place."""
        try:
            return self.api.apply(path, body, job_manifest.MANAGER)
        except Refused as error:
            # A field of another's, or one that cannot change: somebody has the name, perhaps we ourselves.
            if error.status not in (409, 422) or (found := self.api.find(path)) is None:
                raise
            return found

    def _template(self) -> Body:
        file = self.place.templates / f"{self.place.pool}.yaml"
        try:
            found = yaml.safe_load(file.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise TemplateUnfit(f"the pool {self.place.pool!r} has no pod template that can be read: {error}") from error
        if not isinstance(found, dict):
            raise TemplateUnfit(f"the pod template of the pool {self.place.pool!r} is no object")
        found = found.get("template", found)  # a PodTemplate holds a PodTemplateSpec
        return {"metadata": found.get("metadata") or {}, "spec": found.get("spec")}

    def _check_groups(self) -> None:
        """What was asked for must be installed: a label that nobody reads would start the job at once, past its queue."""
        if self.terms.queue and not self._has(KUEUE):
            raise LauncherUnavailable("a Kueue queue is set, and Kueue is not installed in the cluster", Waits.LAUNCHER_REFUSED)
        if self.place.nodes > 1 and not self._has(JOB_SET):
            raise LauncherUnavailable("several nodes are asked for, and JobSet is not installed in the cluster", Waits.LAUNCHER_REFUSED)

    def _has(self, group: str) -> bool:
        """Whether an API group is there; once it was, it is."""
        if not self._groups.get(group):
            self._groups[group] = self.api.find(group) is not None
        return self._groups[group]

    async def observe(self, name: str) -> Seen:
        """See jobs.Launcher."""
        return await self._do(self._observe, _named(name))

    def _observe(self, name: str) -> Seen:
        job = self._cached(name)
        if job is not None:
            pods = self._pods_of(name)
            # The two views are not of one moment: how it ended is only known with its pods.
            if not all(feed.listed for feed in self._pods) or (not pods and finished(job)):
                pods = self._asked_pods(name)
            return seen_in(job, pods, self.now())
        # What was only just applied is not in the view yet.
        for namespace in dict.fromkeys(self.place.namespaces):
            if (job := self.api.find(f"{self._collection(namespace)}/{name}")) is not None:
                break
        if job is not None and (job["metadata"].get("labels") or {}).get(OWNER) != self.terms.owner:
            return Seen(Where.ABSENT)
        return seen_in(job, self._asked_pods(name), self.now())

    def _asked_pods(self, name: str) -> list[Body]:
        query = (("labelSelector", f"{OWNER}={self.terms.owner}"),)
        found = [self.api.ask("GET", PODS.format(each), None, query) for each in dict.fromkeys(self.place.namespaces)]
        return [pod for pods in found for pod in pods.get("items") or () if _is_of(pod, name)]

    def _pods_of(self, name: str) -> list[Body]:
        return [pod for feed in self._pods for pod in feed.view.values() if _is_of(pod, name)]

    def _cached(self, name: str) -> Body | None:
        return next((job for feed in self._jobs for job in feed.view.values() if job["metadata"]["name"] == name), None)

    async def stop(self, name: str, grace_s: float) -> None:
        """See jobs.Launcher. The grace is the pod's own, fixed at its start: this service may not delete pods."""
        await self._do(self._stop, _named(name))

    def _stop(self, name: str) -> None:
        """Delete in the foreground: the Job is there until its pods have ended."""
        cached = self._cached(name)
        if cached is not None and cached["metadata"].get("deletionTimestamp"):
            return  # it is ending: asked again every second
        self._delete(self._collection, name, "Foreground")

    async def reap(self, name: str) -> None:
        """See jobs.Launcher."""
        await self._do(self._reap, _named(name))

    def _reap(self, name: str) -> None:
        """The Job, and the owner: of the job's attempts only this one is left, since the next starts after it was reaped."""
        self._delete(self._collection, name, "Background")
        found = NAME.fullmatch(name)
        assert found is not None
        self._delete(CONFIG_MAPS.format, owner_name(found[1]), "Background")

    def _delete(self, collection: Callable[[str], str], name: str, propagation: str) -> None:
        for namespace in dict.fromkeys(self.place.namespaces):
            path = f"{collection(namespace)}/{name}"
            found = self.api.find(path)
            if found is not None and (found["metadata"].get("labels") or {}).get(OWNER) == self.terms.owner:
                self.api.delete(path, found["metadata"]["uid"], propagation)

    async def list(self) -> frozenset[str]:
        """See jobs.Launcher."""
        if not all(feed.listed for feed in self._jobs):
            raise LauncherUnavailable(self.trouble or "the cluster was not heard of yet")
        names = {job["metadata"]["name"] for feed in self._jobs for job in feed.view.values()}
        return frozenset(name for name in names if NAME.fullmatch(name))

    def _collection(self, namespace: str) -> str:
        return (JOBS if self.place.nodes == 1 else JOB_SETS).format(namespace)

    @property
    def trouble(self) -> str:
        """Why a view is not as of now; empty: it is."""
        return next((feed.fresh.trouble for feed in (*self._jobs, *self._pods) if feed.fresh.trouble), "")

    async def _do(self, act: Callable[..., R], *arguments: object) -> R:
        """On a thread; the cluster's refusals become ours."""
        try:
            return await asyncio.to_thread(act, *arguments)
        except (Unreachable, Expired) as error:
            raise LauncherUnavailable(str(error)) from error
        except (Refused, TemplateUnfit) as error:
            raise LauncherUnavailable(str(error), Waits.LAUNCHER_REFUSED) from error


def _named(name: str) -> str:
    if NAME.fullmatch(name) is None:
        raise ValueError(f"{name!r} is no attempt's name")
    return name


def _is_of(pod: Body, name: str) -> bool:
    marks = pod["metadata"].get("labels") or {}
    return any(marks.get(label) == name for label in JOB_NAMES)
