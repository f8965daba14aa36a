"""The only wiring of the fine-tuning service: settings and protocols in, a served address out."""

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from services.chassis import signing
from services.chassis.errors import ScopeMissing
from services.chassis.identity import Caller, CallerVerifier
from services.chassis.interceptors import Policy, verified
from services.chassis.objects import Objects, open_objects
from services.chassis.server import Serving, serve
from services.chassis.telemetry import Telemetry
from services.finetune.settings import FineTuneSettings
from services.finetune.store import FineTuneStore, open_store

AUDIENCE = "argosy.finetune"  # what the gateway signs callers for
UNARY_SECONDS = 60.0  # deadline cap of what is no stream
STREAM_SECONDS = 3_600.0  # of uploads, reads and watches: a watch that ends resumes at its cursor
STREAMS = ("WriteUpload", "ReadDatasetVersion", "WatchFineTuneJob", "WatchVersions", "ExportModelVersion", "ImportModelVersion")
TRAINING = "/argosy.internal.training.v1.TrainingService/"
REGISTRY = "/argosy.internal.registry.v1.RegistryService/"
FLEET = ("WatchVersions", "ReportServable")  # of the gateway itself, not for a tenant's call

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Running:
    """A fine-tuning service that serves."""

    address: str
    serving: Serving
    store: FineTuneStore
    objects: Objects


def permit(method: str, caller: Caller) -> None:
    """Fleet-wide methods are the gateway's own; everything else was scoped at the edge.

    Raises:
        ScopeMissing: it is not the gateway's own call.
    """
    if method.startswith(REGISTRY) and method.rsplit("/", 1)[-1] in FLEET and "fleet" not in caller.scopes:
        raise ScopeMissing("fleet")


@asynccontextmanager
async def finetune(
    settings: FineTuneSettings,
    *,
    store: FineTuneStore | None = None,
    objects: Objects | None = None,
    verifier: CallerVerifier | None = None,
    telemetry: Telemetry | None = None,
    signals: bool = False,
    wait: bool = True,
) -> AsyncIterator[Running]:
    """Serve until left; leaving drains, and leaves running attempts alone: the next start adopts them.

    What is not passed is opened from the settings. `wait`: only return once the schema is there.
    """
    telemetry = telemetry or Telemetry.off()
    async with AsyncExitStack() as stack:
        if store is None:
            store = await stack.enter_async_context(open_store(settings.database_url, settings.database_connections, wait=wait))
        if objects is None:
            objects = open_objects(settings.store_url)
            stack.callback(objects.close)
        behind = verified(verifier or CallerVerifier(signing.public_keys(settings.caller_public_keys), AUDIENCE))
        services: list[tuple[str, Callable[[Any], object]]] = []  # full name, and how it is added to the server
        policy = Policy(
            authenticate=behind,
            permit=permit,
            deadline_cap_s=lambda method: STREAM_SECONDS if method.rsplit("/", 1)[-1] in STREAMS else UNARY_SECONDS,
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
        await serving.ready()
        yield Running(serving.address, serving, store, objects)
        await serving.drain(announce_s=0, grace_s=settings.listener.grace_seconds if signals else 0)
