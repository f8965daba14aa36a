"""A real gateway server over fake engines: real sockets on both sides, a ledger in memory, and the bearer token as the caller's name."""

import argparse
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from argosy.v1 import (
    content_pb2,
    embedding_pb2_grpc,
    explanation_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    language_pb2_grpc,
    model_pb2_grpc,
    stream_pb2,
)
from services.chassis.certificates import ClientTls
from services.chassis.channel import open_channel
from services.chassis.errors import ApiKeyInvalid
from services.chassis.identity import Caller, CallerSigner, CallerVerifier
from services.chassis.server import Listener
from services.gateway.access import SCOPES
from services.gateway.replicas import AUDIENCE, Replicas
from services.gateway.server import Running, running
from services.gateway.settings import GatewaySettings, Placing
from tests.fakes.engine import FakeEngine
from tests.fakes.ledger import MemoryLedger

KEY = Ed25519PrivateKey.generate()
VERIFIER = CallerVerifier({"k": KEY.public_key()}, AUDIENCE)


@dataclass
class Edge:
    """A gateway, its neighbours, and a client's channel to it."""

    gate: Running
    ledger: MemoryLedger
    channel: grpc.aio.Channel
    callers: dict[str, Caller]

    def __post_init__(self) -> None:
        self.generation: Any = generation_pb2_grpc.GenerationServiceStub(self.channel)
        self.language: Any = language_pb2_grpc.LanguageServiceStub(self.channel)
        self.embedding: Any = embedding_pb2_grpc.EmbeddingServiceStub(self.channel)
        self.explanation: Any = explanation_pb2_grpc.ExplanationServiceStub(self.channel)
        self.models: Any = model_pb2_grpc.ModelServiceStub(self.channel)

    @property
    def replicas(self) -> Replicas:
        return self.gate.replicas


def caller(project: str = "acme", **fields: Any) -> Caller:
    """A caller with every scope."""
    made: dict[str, Any] = {"project_uid": f"uid-{project}", "key_id": f"key-{project}", "request_id": "", "kv_scope": "00" * 32} | fields
    return Caller(project=project, scopes=made.pop("scopes", SCOPES), **made)


def metadata(project: str = "acme") -> tuple[tuple[str, str], ...]:
    """What a client of `project` sends."""
    return (("authorization", f"Bearer {project}"),)


@asynccontextmanager
async def edge(
    *engines: FakeEngine,
    addresses: tuple[str, ...] = (),
    callers: dict[str, Caller] | None = None,
    ledger: Any = None,
    reachable: int | None = None,
    listener: Listener | None = None,
    revocations: Any = None,
    signals: bool = False,
    telemetry: Any = None,
    finetune: str = "",
    jobs: Any = None,
    max_stream_seconds: float = 300.0,
    cluster: Any = None,
    tls: ClientTls | None = None,
    credentials: grpc.ChannelCredentials | None = None,
    gpu_health: bool = False,
    scaler_address: str = "",
    demand: Any = None,
    **placing: Any,
) -> AsyncIterator[Edge]:
    """A running gateway; entered once `reachable` replicas (default: one for each engine) have reported.

    `cluster` is an API (a kubernetes ApiClient) whose namespace `models` lists more of them. `tls` is the gateway's towards its
    neighbours, `credentials` the client's for a `listener` with a certificate.
    """
    known = {"acme": caller()} if callers is None else callers
    books = MemoryLedger() if ledger is None else ledger

    async def authenticate(incoming: Any, context: Any) -> Caller:
        token = str(incoming.value("authorization") or "").removeprefix("Bearer ")
        if token not in known:
            raise ApiKeyInvalid()
        return known[token]

    settings = GatewaySettings(
        listener=listener or Listener(),
        inference_addresses=(*(engine.address for engine in engines), *addresses),
        placing=Placing(**placing),
        finetune_address=finetune,
        max_stream_seconds=max_stream_seconds,
        model_namespaces=("models",) if cluster is not None else (),
        gpu_health=gpu_health,
        scaler_address=scaler_address,
        tls=tls or ClientTls(),
    )
    async with running(
        settings,
        ledger=books,
        authenticate=authenticate,
        signer=CallerSigner(KEY, "k"),
        revocations=revocations,
        jobs=jobs,
        signals=signals,
        telemetry=telemetry,
        cluster=cluster,
        demand=demand,
    ) as gate:
        await gate.replicas.until(len(engines) if reachable is None else reachable)
        async with open_channel(gate.address, credentials=credentials) as channel:
            yield Edge(gate, books, channel, known)


def chat(text: str = "hello there", **fields: Any) -> generation_pb2.ChatRequest:
    """One question."""
    fields = {"model": "models/fake"} | fields
    message = content_pb2.ChatMessage(role=content_pb2.ROLE_USER, parts=[content_pb2.ContentPart(text=text)])
    return generation_pb2.ChatRequest(messages=[message], **fields)


async def events_of(call: Any) -> list[stream_pb2.GenerationEvent]:
    """Every event of a stream."""
    return [event async for event in call]


def text_of(events: list[stream_pb2.GenerationEvent]) -> str:
    """The text of output 0."""
    return "".join(event.text.text for event in events if event.WhichOneof("event") == "text" and event.text.index == 0)


async def _main() -> None:
    """A gateway process before the engines named on the command line; prints its address and drains on SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engines", nargs="+")
    parser.add_argument("--grace", type=float, default=4.0)
    asked = parser.parse_args()
    listener = Listener(announce_seconds=0.1, grace_seconds=asked.grace)
    async with edge(addresses=tuple(asked.engines), reachable=len(asked.engines), listener=listener, signals=True) as at:
        print(at.gate.address, flush=True)
        await at.gate.serving.stopped()


if __name__ == "__main__":
    asyncio.run(_main())
