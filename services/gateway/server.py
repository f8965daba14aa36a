"""The gateway's only wiring: settings and protocols in, a served address out."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from google.protobuf.descriptor import ServiceDescriptor

from argosy.admin.v1 import api_key_pb2, project_pb2, quota_pb2, usage_pb2
from argosy.v1 import embedding_pb2, explanation_pb2, generation_pb2, language_pb2
from argosy_internal.scaler.v1 import scaler_pb2
from services.chassis.certificates import Certificates
from services.chassis.cluster import connect
from services.chassis.errors import ServiceError
from services.chassis.identity import Caller, CallerSigner
from services.chassis.interceptors import Authenticate, Incoming, Policy
from services.chassis.lists import PageTokens
from services.chassis.server import Serving, public, serve
from services.chassis.telemetry import Telemetry
from services.gateway.authentication import authenticating, deadline_cap_s, permit
from services.gateway.charges import Billing
from services.gateway.discovery import Discovery
from services.gateway.finetune import FineTune
from services.gateway.gauges import Spooling, measure
from services.gateway.keys import PEPPER_BYTES
from services.gateway.ledger import JobBooks, Ledger, Tariff
from services.gateway.meanings import Meanings
from services.gateway.registry import OwnModels, Pusher
from services.gateway.replicas import Replicas
from services.gateway.scaling import Scaling, SharedDemand
from services.gateway.servicers import scaler
from services.gateway.servicers.api_key import ApiKeyServicer
from services.gateway.servicers.embedding import EmbeddingServicer
from services.gateway.servicers.explanation import ExplanationServicer
from services.gateway.servicers.forwarded import SERVICES, Forwarding
from services.gateway.servicers.generation import GenerationServicer
from services.gateway.servicers.language import LanguageServicer
from services.gateway.servicers.model import ModelServicer
from services.gateway.servicers.neighbours import Neighbours
from services.gateway.servicers.project import ProjectServicer
from services.gateway.servicers.quota import QuotaServicer
from services.gateway.servicers.register import handlers
from services.gateway.servicers.relay import Relay, Revocations
from services.gateway.servicers.resources import Desk
from services.gateway.servicers.scaler import ScalerServicer
from services.gateway.servicers.usage import UsageServicer
from services.gateway.settings import GatewaySettings
from services.gateway.sql_charges import SqlCharges
from services.gateway.sql_demand import SqlDemand
from services.gateway.sql_ledger import LedgerSettings, open_ledger
from services.gateway.store import Store, StoreSettings, open_store

log = logging.getLogger(__name__)

SCALER_STREAM_S = 3_600.0  # KEDA opens its stream anew
RENEWAL_MARGIN_S = 60.0  # over the longest stream: by then no call is left on a connection with the old certificate

Service = tuple[ServiceDescriptor, object]  # a public service and the object with its methods


@dataclass(frozen=True)
class Running:
    """A gateway that serves."""

    address: str
    serving: Serving
    replicas: Replicas
    relay: Relay
    names: OwnModels
    store: Store | None = None  # None: what it needs of one was passed in
    scaler_address: str = ""  # of KEDA's scaler, with the port that was bound


def signing_key(path: Path | None) -> Ed25519PrivateKey:
    """The private key behind the signed caller; a new one if there is no file, as the fleet in one process uses."""
    if path is None:
        return Ed25519PrivateKey.generate()
    key = load_pem_private_key(path.read_bytes(), password=None)
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{path.name} holds no Ed25519 private key")
    return key


@asynccontextmanager
async def running(
    settings: GatewaySettings,
    *,
    ledger: Ledger,
    authenticate: Authenticate,
    signer: CallerSigner,
    spooling: Spooling | None = None,
    revocations: Revocations | None = None,
    jobs: JobBooks | None = None,
    administration: Sequence[Service] = (),
    pages: PageTokens | None = None,
    cluster: Any = None,
    demand: SharedDemand | None = None,
    telemetry: Telemetry | None = None,
    signals: bool = False,
) -> AsyncIterator[Running]:
    """Serve until left; leaving drains, settles every call and closes the replicas' channels.

    `administration` are argosy.admin.v1's services; without `jobs` nothing that finetune runs is settled or bounded. `cluster` is the API
    that lists the replicas (cluster.connect), for settings that name namespaces; `demand` is where gateways then tell each other what is
    asked of models. Health says SERVING while a replica can be reached, or
    the cluster says that there is none to be reached.
    """
    telemetry = telemetry or Telemetry.off()
    serving: Serving | None = None

    async def changed(usable: bool) -> None:
        if serving is not None:
            await (serving.ready() if usable else serving.unready())

    certificates = settings.tls.certificates()
    credentials = certificates.channel_credentials() if certificates is not None else None
    replicas = Replicas(
        settings.inference_addresses,
        placing=settings.placing,
        signer=signer,
        credentials=credentials,
        telemetry=telemetry,
        changed=changed,
    )
    finetune = FineTune(settings.finetune_address, signer=signer, credentials=credentials, telemetry=telemetry)
    forwarding = Forwarding(finetune, revocations, jobs.allowed if jobs is not None else None)
    own: dict[str, object] = {"ModelService": ModelServicer(replicas, pages or page_tokens(settings), forwarding)}
    meanings = Meanings()
    names = OwnModels(finetune, replicas.catalog, meanings)
    relay = Relay(replicas, ledger, settings.placing, own=names, revocations=revocations, telemetry=telemetry)
    services: list[Service] = [
        (generation_pb2.DESCRIPTOR.services_by_name["GenerationService"], GenerationServicer(relay)),
        (language_pb2.DESCRIPTOR.services_by_name["LanguageService"], LanguageServicer(relay)),
        (embedding_pb2.DESCRIPTOR.services_by_name["EmbeddingService"], EmbeddingServicer(relay)),
        (explanation_pb2.DESCRIPTOR.services_by_name["ExplanationService"], ExplanationServicer(relay, Neighbours(finetune))),
        *administration,
    ]

    def register(server: Any) -> None:
        server.add_generic_rpc_handlers(tuple(handlers(descriptor, servicer) for descriptor, servicer in services))
        server.add_generic_rpc_handlers(tuple(forwarding.handlers(service, own.get(service.name)) for service in SERVICES))

    async def known(incoming: Incoming, context: Any) -> Caller:
        try:
            return await authenticate(incoming, context)
        except ServiceError as refused:
            telemetry.record("argosy.auth.refused", 1, {"argosy.reason": refused.reason})
            raise

    cap_s = partial(deadline_cap_s, max_stream_s=settings.max_stream_seconds)
    policy = Policy(authenticate=known, permit=permit, deadline_cap_s=cap_s, strip="x-")
    pusher, billing = Pusher(finetune, replicas, meanings, telemetry), Billing(finetune, jobs)
    renewing = _renewing(settings, certificates, replicas, finetune, telemetry)
    scaling = Scaling(replicas, demand, telemetry)
    async with replicas.watching(), renewing, pusher.following(), billing.following():
        async with serve(
            settings.listener,
            register,
            [descriptor.full_name for descriptor in (*(descriptor for descriptor, _ in services), *SERVICES)],
            policy=policy,
            options=public(settings.max_stream_seconds),
            telemetry=telemetry,
            signals=signals,
        ) as serving:
            if replicas.usable or not (settings.inference_addresses or settings.model_namespaces):
                await serving.ready()
            measuring = asyncio.create_task(measure(replicas, spooling, telemetry), name="gateway gauges")
            try:
                async with _following(settings, cluster, replicas, telemetry), _scaled(settings, scaling, telemetry) as scaler:
                    yield Running(serving.address, serving, replicas, relay, names, scaler_address=scaler)
            finally:
                measuring.cancel()
                await asyncio.wait((measuring,))
        await relay.settled()
    await names.close()
    await finetune.close()


@asynccontextmanager
async def _renewing(
    settings: GatewaySettings, certificates: Certificates | None, replicas: Replicas, finetune: FineTune, telemetry: Telemetry
) -> AsyncIterator[None]:
    """Show our neighbours the certificate that the files hold, also once they hold another."""
    if certificates is None:
        yield
        return

    async def changed() -> None:
        await replicas.renew(certificates.channel_credentials(), settings.max_stream_seconds + RENEWAL_MARGIN_S)
        finetune.renew(certificates.channel_credentials())

    async with certificates.watched(telemetry, changed):
        yield


@asynccontextmanager
async def _scaled(settings: GatewaySettings, scaling: Scaling, telemetry: Telemetry) -> AsyncIterator[str]:
    """Tell an autoscaler what is asked of each model, where replicas come and go; yields the scaler's address, or nothing."""
    if not settings.model_namespaces:
        yield ""
        return
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(scaling.following())
        if not settings.scaler_address:
            yield ""
            return
        # Whoever asks has a certificate of ours, and no API key: so it is a listener of its own, and the public one knows nothing of it.
        listener = settings.inside(settings.scaler_address)
        methods = handlers(scaler_pb2.DESCRIPTOR.services_by_name["ExternalScaler"], ScalerServicer(scaling))
        policy = Policy(deadline_cap_s=SCALER_STREAM_S)
        serving = await stack.enter_async_context(
            serve(
                listener,
                lambda server: server.add_generic_rpc_handlers((methods,)),
                [scaler.SERVICE],
                policy=policy,
                telemetry=telemetry,
                role="scaler",
            )
        )
        await serving.ready()
        yield serving.address


@asynccontextmanager
async def _following(settings: GatewaySettings, cluster: Any, replicas: Replicas, telemetry: Telemetry) -> AsyncIterator[None]:
    """Have the replicas that the cluster lists, where one is to be asked. Raises cluster.NoCluster."""
    if not settings.model_namespaces:
        yield
        return
    api = cluster or await asyncio.to_thread(connect, "model namespaces are set")
    discovery = Discovery(settings.model_namespaces, api, gpu_health=settings.gpu_health, telemetry=telemetry)
    async with discovery.following(replicas.follow):
        yield


@asynccontextmanager
async def gateway(
    settings: GatewaySettings,
    *,
    store: StoreSettings,
    books: LedgerSettings,
    telemetry: Telemetry | None = None,
    signals: bool = False,
    wait: bool = False,
) -> AsyncIterator[Running]:
    """`running`, with keys, books and administration in the database.

    `wait`: only return once the schema is there. Raises ValueError for a pepper or a signing key that is none.
    """
    signer = CallerSigner(signing_key(settings.caller_signing_key), settings.caller_signing_kid)
    pages = page_tokens(settings)
    async with (
        open_store(store, secret("key pepper", settings.key_pepper), wait=wait) as state,
        open_ledger(state, books) as ledger,
        authenticating(state) as authentication,
        running(
            settings,
            ledger=ledger,
            authenticate=authentication,
            signer=signer,
            spooling=ledger,
            revocations=authentication,
            jobs=SqlCharges(state, books.price_currency),
            administration=administration(settings, state, pages, books.tariff()),
            pages=pages,
            demand=SqlDemand(state),
            telemetry=telemetry,
            signals=signals,
        ) as gate,
    ):
        yield replace(gate, store=state)


def secret(name: str, hexadecimal: str) -> bytes:
    """The 32 bytes behind 64 hex digits. Raises ValueError, which never shows them."""
    try:
        made = bytes.fromhex(hexadecimal)
    except ValueError:
        made = b""
    if len(made) != PEPPER_BYTES:
        raise ValueError(f"the {name} must be {2 * PEPPER_BYTES} hex digits")
    return made


def page_tokens(settings: GatewaySettings) -> PageTokens:
    """The seal of page tokens; without a key in the settings they end with the process."""
    return PageTokens(secret("page token key", settings.page_token_key) if settings.page_token_key else os.urandom(PEPPER_BYTES))


def administration(settings: GatewaySettings, store: Store, pages: PageTokens, tariff: Tariff) -> Sequence[Service]:
    """argosy.admin.v1's services over the store."""
    desk = Desk(store, pages)
    return (
        (project_pb2.DESCRIPTOR.services_by_name["ProjectService"], ProjectServicer(desk)),
        (api_key_pb2.DESCRIPTOR.services_by_name["ApiKeyService"], ApiKeyServicer(desk, tariff, settings.key_environment)),
        (quota_pb2.DESCRIPTOR.services_by_name["QuotaService"], QuotaServicer(desk, tariff)),
        (usage_pb2.DESCRIPTOR.services_by_name["UsageService"], UsageServicer(desk, tariff)),
    )
