"""A real replica over a scripted host: what the tests of the wire talk to."""

import time
import uuid
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from argosy.v1 import config_pb2, content_pb2, stream_pb2
from argosy_internal.engine.v1 import engine_pb2, engine_pb2_grpc
from services.chassis.channel import open_channel
from services.chassis.identity import CALLER_KEY, Caller, CallerSigner, CallerVerifier
from services.inference.server import AUDIENCE, inference
from services.inference.settings import InferenceSettings
from services.pretrained.templates import PlainTemplate
from services.pretrained.tokenizer import Tokenizer
from tests.fakes.host import FakeHost
from tests.inference.vocabularies import byte_fallback

KEY = Ed25519PrivateKey.generate()
SIGNER = CallerSigner(KEY, "gateway")
TOKENIZER = Tokenizer(byte_fallback())
PLAIN = PlainTemplate(prefix=tuple(TOKENIZER.prefix))
CALLER = Caller(
    project_uid="p-1", project="acme", key_id="k-1", scopes=frozenset({"generate"}), request_id=str(uuid.uuid4()), kv_scope="ab" * 16
)


def signed(caller=CALLER, audience=AUDIENCE, signer=SIGNER):
    return ((CALLER_KEY, signer.sign(caller, audience, time.time())),)


def text(prompt, **config):
    """A GenerateRequest; `config` are GenerationConfig's fields."""
    return request(text=prompt, config=config_pb2.GenerationConfig(**config))


def request(**fields):
    fields.setdefault("generation_id", str(uuid.uuid4()))
    return engine_pb2.GenerateRequest(request_id=str(uuid.uuid4()), model=content_pb2.ServedModel(version="models/tiny"), **fields)


def stopping(**fields):
    return {"stopping": config_pb2.Stopping(**fields)}


def ids(*words):
    """Tokens that say these words."""
    return [token for word in words for token in TOKENIZER.encode(word)]


def trailers(error):
    return dict(error.trailing_metadata())


@dataclass
class Client:
    """Speaks to one replica as the gateway does."""

    stub: Any
    health: Any
    channel: Any
    address: str

    def call(self, message, timeout=10.0, metadata=None):
        return self.stub.Generate(message, timeout=timeout, metadata=signed() if metadata is None else metadata)

    async def generate(self, message):
        return [event async for event in self.call(message)]

    async def encode(self, **task):
        message = engine_pb2.EncodeRequest(
            generation_id=str(uuid.uuid4()), request_id=str(uuid.uuid4()), model=content_pb2.ServedModel(version="models/tiny"), **task
        )
        return await self.stub.Encode(message, timeout=10, metadata=signed())

    async def until(self, status, service="ready"):
        """Wait until Health says so."""
        watch = self.health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=10)
        async for state in watch:
            if state.status == status:
                break
        watch.cancel()


@asynccontextmanager
async def client(host=None, template=PLAIN, ready=True, tokenizer=TOKENIZER, telemetry=None, fingerprint="", **settings):
    """A running replica and its client. `settings` are InferenceSettings' fields."""
    host = host or FakeHost()
    verifier = CallerVerifier({"gateway": KEY.public_key()}, AUDIENCE)
    settings.setdefault("canary_seconds", 3_600.0)
    known = {"verifier": verifier, "vocabulary": (tokenizer, template), "fingerprint": fingerprint, "telemetry": telemetry}
    async with (
        inference(InferenceSettings(**settings), host, **known) as address,
        open_channel(address) as channel,
    ):
        found = Client(engine_pb2_grpc.EngineServiceStub(channel), health_pb2_grpc.HealthStub(channel), channel, address)
        if ready:
            await found.until(health_pb2.HealthCheckResponse.SERVING)
        yield found


def reason(error):
    """The ErrorInfo of a failed call: reason and metadata."""
    for detail in status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"]).details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info):
            return info.reason, dict(info.metadata)
    raise AssertionError("no ErrorInfo")


def kinds(events):
    return [event.WhichOneof("event") for event in events]


def said(events, index=0):
    return "".join(event.text.text for event in events if event.WhichOneof("event") == "text" and event.text.index == index)


def finished(events):
    return [event.output_finished for event in events if event.WhichOneof("event") == "output_finished"]


Reason = stream_pb2.FinishReason
