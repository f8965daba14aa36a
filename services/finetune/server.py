"""The only wiring of the fine-tuning service: settings and protocols in, a served address out."""

import asyncio
import hashlib
import logging
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from argosy.v1 import dataset_pb2_grpc, finetune_pb2_grpc, model_pb2_grpc
from argosy_internal.registry.v1 import registry_pb2_grpc
from argosy_internal.training.v1 import training_pb2_grpc
from services.chassis import signing
from services.chassis.cluster import Api, connect
from services.chassis.errors import ScopeMissing
from services.chassis.identity import Caller, CallerVerifier
from services.chassis.interceptors import Policy, verified
from services.chassis.lists import PageTokens
from services.chassis.objects import Objects, open_objects
from services.chassis.server import Serving, serve
from services.chassis.telemetry import Telemetry
from services.finetune import callback, publishing, sql_charges, sql_jobs
from services.finetune.bases import Bases
from services.finetune.erasing import Eraser
from services.finetune.evaluations import Evaluators
from services.finetune.feed import following
from services.finetune.hosts import credentials
from services.finetune.job_erasure import JobDependants
from services.finetune.jobs import Launcher
from services.finetune.launchers.cluster import ClusterLauncher, Place
from services.finetune.launchers.job_manifest import Terms
from services.finetune.launchers.local import LocalLauncher
from services.finetune.lineage import Signer
from services.finetune.model_erasure import ModelDependants
from services.finetune.neighbours import Neighbours
from services.finetune.queries import Record
from services.finetune.reconciler import Reconciler
from services.finetune.servicers import dataset, model, registry, training
from services.finetune.servicers import finetune as finetuning
from services.finetune.servicers.dataset import DatasetServicer
from services.finetune.servicers.finetune import FineTuneServicer, pause
from services.finetune.servicers.finetune import servable as on_servable
from services.finetune.servicers.model import ModelServicer
from services.finetune.servicers.registry import RegistryServicer
from services.finetune.servicers.resources import Desk
from services.finetune.servicers.training import TrainingServicer
from services.finetune.settings import FineTuneSettings, JobSettings
from services.finetune.store import CHANNEL, FineTuneStore, open_store
from services.finetune.token_reviews import TokenReviews
from services.finetune.tokens import TokenMint, Tokens
from services.finetune.validating import Validators
from services.pretrained import weights

AUDIENCE = "argosy.finetune"  # what the gateway signs callers for
UNARY_SECONDS = 60.0  # deadline cap of what is no stream
STREAM_SECONDS = 3_600.0  # of uploads, reads and watches: a watch that ends resumes at its cursor
LONG = ("FinalizeUpload", "CommitCheckpoint", "CompleteRun")  # verify stored bytes, however many there are
STREAMS = (
    "WriteUpload",
    "ReadDatasetVersion",
    "WatchFineTuneJob",
    "WatchVersions",
    "WatchCharges",
    "ExportModelVersion",
    "ImportModelVersion",
)
TRAINING = "/argosy.internal.training.v1.TrainingService/"
TRAINER = "services.finetune.trainer"
REGISTRY = "/argosy.internal.registry.v1.RegistryService/"
FLEET = ("WatchVersions", "ReportServable", "WatchCharges", "PauseJobs")  # of the gateway itself, not for a tenant's call

AGE_SECONDS = 5.0  # between measurements of the cluster view's age

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Running:
    """A fine-tuning service that serves."""

    address: str
    serving: Serving
    store: FineTuneStore
    objects: Objects
    callback_url: str = ""  # where trainers of the operator's own post progress; empty: nowhere
    training_address: str = ""  # where attempts reach TrainingService


def permit(method: str, caller: Caller) -> None:
    """Fleet-wide methods are the gateway's own; everything else was scoped at the edge.

    Raises:
        ScopeMissing: it is not the gateway's own call.
    """
    if method.startswith(REGISTRY) and method.rsplit("/", 1)[-1] in FLEET and "fleet" not in caller.scopes:
        raise ScopeMissing("fleet")


def _adding(add: Any, servicer: object) -> Callable[[Any], object]:
    """How a servicer is added to a server."""
    return partial(add, servicer)


def _secret(hexadecimal: str) -> bytes:
    """32 bytes behind 64 hex digits; drawn where there are none. Raises ValueError, which never shows them."""
    made = bytes.fromhex(hexadecimal) if hexadecimal else os.urandom(32)
    if len(made) != 32:
        raise ValueError("the page token key must be 64 hex digits")
    return made


def _uncommitted(store: FineTuneStore, objects: Objects) -> Callable[[Record], Awaitable[None]]:
    """Clears away what an ended job's attempts stored and never committed: torn checkpoints, and results, which were copied."""

    async def clean(row: Record) -> None:
        async with store.transaction() as connection:
            kept = tuple(each["prefix"] for each in await sql_jobs.checkpoints_of(connection, row["uid"]))
        found = [path async for path, _ in objects.list(f"jobs/{row['project_uid']}/{row['uid']}")]
        for path in found:
            if not path.startswith(kept):
                await objects.delete(path)

    return clean


def _own_name(settings: FineTuneSettings) -> str:
    """Of this control plane's attempts on this machine: what another database does not know is not an orphan of ours."""
    return hashlib.sha256(f"{settings.database_url} {settings.store_url}".encode()).hexdigest()[:16]


def _hosted(jobs: JobSettings, posted: str) -> dict[str, str]:
    """What an attempt must know to run a trainer of the operator's own."""
    if not jobs.trainer_command:
        return {}
    return {"ARGOSY_TRAINER_COMMAND": ",".join(jobs.trainer_command), "ARGOSY_CALLBACK_URL": jobs.callback_url or posted}


def _place(jobs: JobSettings) -> Place:
    assert jobs.pod_templates is not None  # the settings have seen to it
    return Place.of(jobs.pod_templates, jobs.training_pool, jobs.job_namespaces, jobs.training_nodes)


def _terms(settings: FineTuneSettings) -> Terms:
    """What a cluster's attempts have in common. Whoever may dial us with a certificate has its CA beside it, and so have we."""
    jobs, certificate = settings.jobs, settings.listener.certificate
    ca = settings.listener.client_ca or (certificate and certificate.with_name("ca.crt"))
    where = urlsplit(settings.database_url)
    return Terms(
        # No password in it: a new one must not make strangers of what runs.
        owner=hashlib.sha256(f"{where.hostname} {where.port} {where.path} {settings.store_url}".encode()).hexdigest()[:16],
        address=jobs.training_address,
        environment=_hosted(jobs, ""),
        store_url=settings.store_url,
        ca=ca.read_text() if ca and ca.exists() else "",
        queue=jobs.queue_name,
        queue_priority=jobs.queue_priority_class,
        ttl_s=jobs.ended_job_seconds,
        grace_s=round(jobs.stop_seconds),
    )


async def _second(
    stack: AsyncExitStack, settings: FineTuneSettings, address: str, attempts: TrainingServicer, policy: Policy, telemetry: Telemetry
) -> str:
    """A listener for attempts alone, who have a token and no certificate; where they reach us."""
    if not settings.jobs.training_listen_address:
        return address
    listener = replace(settings.listener, address=settings.jobs.training_listen_address, client_ca=None, health_address="")
    add = _adding(training_pb2_grpc.add_TrainingServiceServicer_to_server, attempts)
    serving = await stack.enter_async_context(serve(listener, add, [training.SERVICE], policy=policy, telemetry=telemetry))
    await serving.ready()
    return serving.address


async def _aging(launcher: ClusterLauncher, telemetry: Telemetry) -> None:
    """Measure how old our view of the cluster is; before the first it ages from the start."""
    clock = asyncio.get_running_loop().time
    began = clock()
    while True:
        age = launcher.age_s
        telemetry.record("argosy.cluster.view_age", clock() - began if age is None else age)
        await asyncio.sleep(AGE_SECONDS)


def _directory(bases: Bases) -> Callable[[str], Coroutine[Any, Any, Path]]:
    async def find(name: str) -> Path:
        return (await bases.get(name)).directory

    return find


@asynccontextmanager
async def _working(work: Callable[[], Coroutine[Any, Any, None]]) -> AsyncIterator[None]:
    """Run `work` beside the server until left."""
    task = asyncio.create_task(work())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def finetune(
    settings: FineTuneSettings,
    *,
    store: FineTuneStore | None = None,
    objects: Objects | None = None,
    launcher: Launcher | None = None,
    cluster: Any = None,
    verifier: CallerVerifier | None = None,
    telemetry: Telemetry | None = None,
    signals: bool = False,
    wait: bool = True,
) -> AsyncIterator[Running]:
    """Serve until left; leaving drains, and leaves running attempts alone: the next start adopts them.

    What is not passed is opened from the settings; `cluster`: a kubernetes.client.ApiClient. `wait`: only return once the schema is there.
    """
    telemetry = telemetry or Telemetry.off()
    async with AsyncExitStack() as stack:
        if store is None:
            store = await stack.enter_async_context(open_store(settings.database_url, settings.database_connections, wait=wait))
        if objects is None:
            objects = open_objects(settings.store_url)
            stack.callback(objects.close)
        behind = verified(verifier or CallerVerifier(signing.public_keys(settings.caller_public_keys), AUDIENCE))
        key = signing.private_key(settings.manifest_key) if settings.manifest_key else Ed25519PrivateKey.generate()
        secret = _secret(settings.page_token_key)
        desk = Desk(store, PageTokens(secret))
        bases = Bases(settings.bases, settings.cache_dir)
        signer = Signer(key, settings.manifest_kid)
        mint = TokenMint(hashlib.sha256(b"attempt tokens " + secret).digest())
        wake: list[Callable[[], None]] = []  # the reconciler, which needs the address that the server gets
        device = "cuda" if Path("/dev/nvidia0").exists() else "cpu"

        def changed() -> None:
            for each in wake:
                each()

        validators = Validators(store, objects, settings.datasets, bases)
        eraser = Eraser(store, objects, settings.datasets, key, settings.manifest_kid)
        datasets = DatasetServicer(
            desk, objects, settings.datasets, dependants=(JobDependants(), ModelDependants()), changed=(validators.wake, eraser.wake)
        )
        price = settings.quotas
        evaluators = Evaluators(
            store,
            settings.store_url,
            bases,
            signer,
            objects=objects,
            nanos_per_second=price.training_nanos_per_second,
            currency=price.cost_currency,
        )
        models = ModelServicer(desk, objects, bases, signer, JobDependants(), eraser.wake, evaluators.wake)
        feed = await stack.enter_async_context(following(store))
        job_feed = await stack.enter_async_context(following(store, CHANNEL))
        tuning = FineTuneServicer(desk, objects, job_feed, settings.quotas, bases, changed, eraser.wake, device)
        attempts = TrainingServicer(store, objects, settings.jobs, signer, bases, changed, device)
        owed = await stack.enter_async_context(following(store, sql_charges.CHANNEL))
        stack.push_async_callback(attempts.close)
        registered = RegistryServicer(store, feed, on_servable, owed, pause, Neighbours(objects))
        services: list[tuple[str, Callable[[Any], object]]] = [  # full name, and how it is added to the server
            (dataset.SERVICE, _adding(dataset_pb2_grpc.add_DatasetServiceServicer_to_server, datasets)),
            (model.SERVICE, _adding(model_pb2_grpc.add_ModelServiceServicer_to_server, models)),
            (registry.SERVICE, _adding(registry_pb2_grpc.add_RegistryServiceServicer_to_server, registered)),
            (finetuning.SERVICE, _adding(finetune_pb2_grpc.add_FineTuneServiceServicer_to_server, tuning)),
            (training.SERVICE, _adding(training_pb2_grpc.add_TrainingServiceServicer_to_server, attempts)),
        ]
        for work in (validators.run, eraser.run, evaluators.run, partial(publishing.sweeping, store, objects)):
            await stack.enter_async_context(_working(work))
        api = (
            Api(cluster or connect("attempts are to run in a cluster"))
            if settings.jobs.launcher == "cluster" and launcher is None
            else None
        )
        tokens: Tokens = mint if api is None else TokenReviews(api, _place(settings.jobs).namespaces)
        worker = training.bearer(tokens)
        policy = Policy(
            authenticate=lambda incoming, context: (worker if incoming.method.startswith(TRAINING) else behind)(incoming, context),
            permit=permit,
            deadline_cap_s=lambda method: STREAM_SECONDS if method.rsplit("/", 1)[-1] in (*STREAMS, *LONG) else UNARY_SECONDS,
            watches=frozenset({"WatchVersions", "WatchCharges"}),
        )
        serving = await stack.enter_async_context(
            serve(
                settings.listener,
                lambda server: [add(server) for _, add in services],
                [name for name, _ in services],
                policy=policy,
                telemetry=telemetry,
                signals=signals,
            )
        )
        posted = ""  # where a trainer of the operator's own tells its progress
        if settings.jobs.callback_address:
            listener, where = settings.listener, settings.jobs.callback_address
            taking = callback.listening(callback.Callback(store, tokens), where, listener.certificate, listener.private_key)
            posted = await stack.enter_async_context(taking)
        attempts_at = await _second(stack, settings, serving.address, attempts, policy, telemetry)
        if api is not None:
            launcher = clustered = ClusterLauncher(api, _place(settings.jobs), _terms(settings))
            clustered.start()
            stack.callback(clustered.close)
            await stack.enter_async_context(_working(partial(_aging, clustered, telemetry)))
        if launcher is None:
            jobs = settings.jobs
            launcher = local = LocalLauncher(
                jobs.runs_dir or weights.cache_directory(settings.cache_dir) / "runs" / _own_name(settings),
                jobs.training_address or attempts_at,
                settings.store_url,
                _directory(bases),
                command=(str(jobs.training_python or sys.executable), "-m", TRAINER),
                memory_bytes=jobs.training_memory_bytes,
                environment=credentials(os.environ) | _hosted(jobs, posted),
            )
            stack.callback(local.close)
        reconciler = Reconciler(store, launcher, mint, settings.jobs, settings.quotas, _uncommitted(store, objects), telemetry=telemetry)
        wake.append(reconciler.wake)
        await stack.enter_async_context(_working(reconciler.run))
        await serving.ready()
        yield Running(serving.address, serving, store, objects, posted, attempts_at)
        await serving.drain(announce_s=0, grace_s=settings.listener.grace_seconds if signals else 0)
