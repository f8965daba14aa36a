"""The only wiring of an inference replica: host, tokenizer, template and servicer behind one server."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from argosy_internal.engine.v1 import engine_pb2, engine_pb2_grpc
from services.chassis.identity import CallerVerifier
from services.chassis.interceptors import Policy, verified
from services.chassis.server import Serving, serve
from services.chassis.telemetry import Telemetry
from services.inference.canary import Canary
from services.inference.engine.host import EngineLost, Host, ProcessHost
from services.inference.gauges import measure
from services.inference.servicers.engine import EngineServicer, Model, Pace, model_name, new_instance
from services.inference.settings import InferenceSettings
from services.pretrained import weights
from services.pretrained.fingerprint import fingerprint
from services.pretrained.templates import ChatTemplate, TemplateRefused, load_template
from services.pretrained.tokenizer import Tokenizer, TokenizerUnsupported

__all__ = ["AUDIENCE", "Replica", "Vocabulary", "inference", "replica", "why_not"]

AUDIENCE = "argosy.inference"  # what the gateway signs callers for
SERVICE = engine_pb2.DESCRIPTOR.services_by_name["EngineService"].full_name
UNARY_SECONDS = 30.0  # deadline cap of the methods that neither generate nor encode
KNOWN = (weights.ModelRefused, weights.ModelUnavailable, TemplateRefused, TokenizerUnsupported, EngineLost)
DEFAULT_MODEL = "gemma-3-270m"  # what "default" is
LONG = ("Generate", "Encode", "WatchLoad")

log = logging.getLogger(__name__)

Vocabulary = tuple[Tokenizer, ChatTemplate]
Read = tuple[Tokenizer, ChatTemplate, str]  # and the fingerprint of both


@dataclass(frozen=True, slots=True)
class Replica:
    """A running replica: its server, and the task that follows its engine, which fails where it cannot serve."""

    serving: Serving
    following: "asyncio.Task[None]"


@asynccontextmanager
async def inference(
    settings: InferenceSettings,
    host: Host | None = None,
    *,
    verifier: CallerVerifier | None = None,
    vocabulary: Vocabulary | None = None,
    fingerprint: str = "",
    progress: weights.Progress | None = None,
    telemetry: Telemetry | None = None,
) -> AsyncIterator[str]:
    """A replica, up to the end of the block; yields its address at once, NOT_SERVING until the engine is warm.

    `host` defaults to an engine process. `vocabulary` takes the place of the tokenizer and template in the model's directory, and
    `fingerprint` of what follows from them. `progress` is called from a thread while weights are prepared. Leaving the block drains.
    """
    async with replica(
        settings, host, verifier=verifier, vocabulary=vocabulary, fingerprint=fingerprint, progress=progress, telemetry=telemetry
    ) as running:
        yield running.serving.address


@asynccontextmanager
async def replica(
    settings: InferenceSettings,
    host: Host | None = None,
    *,
    verifier: CallerVerifier | None = None,
    vocabulary: Vocabulary | None = None,
    fingerprint: str = "",
    progress: weights.Progress | None = None,
    telemetry: Telemetry | None = None,
    signals: bool = False,
) -> AsyncIterator[Replica]:
    """`inference`, yielding its parts: for a process that waits for its signals."""
    engine = host or ProcessHost(settings.engine())
    pace = Pace(settings.heartbeat_seconds, settings.write_stall_seconds)
    draining: list[Serving] = []
    servicer = EngineServicer(
        engine, pace, settings.max_waiting, lambda: bool(draining) and draining[0].inflight.draining, telemetry or Telemetry.off()
    )
    policy = Policy(
        authenticate=verified(verifier or CallerVerifier(_public_keys(settings.caller_public_keys), AUDIENCE)),
        deadline_cap_s=lambda method: settings.max_stream_seconds if method.rsplit("/", 1)[-1] in LONG else UNARY_SECONDS,
        watches=frozenset({"WatchLoad"}),
    )
    async with serve(
        settings.listener,
        lambda server: engine_pb2_grpc.add_EngineServiceServicer_to_server(servicer, server),
        [SERVICE],
        policy=policy,
        telemetry=telemetry,
        signals=signals,
    ) as serving:
        draining.append(serving)
        follower = asyncio.create_task(
            _follow(settings, engine, servicer, serving, vocabulary and (*vocabulary, fingerprint), progress, telemetry),
            name="engine follower",
        )
        follower.add_done_callback(_report)
        measuring = asyncio.create_task(measure(engine, telemetry), name="engine gauges") if telemetry is not None else None
        try:
            yield Replica(serving, follower)
        finally:
            await serving.drain(announce_s=0, grace_s=settings.listener.grace_seconds if signals else 0)
            tasks = [task for task in (follower, measuring) if task is not None]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await engine.close()


async def _follow(
    settings: InferenceSettings,
    engine: Host,
    servicer: EngineServicer,
    serving: Serving,
    vocabulary: Read | None,
    progress: weights.Progress | None,
    telemetry: Telemetry | None,
) -> None:
    """Start the engine, answer once it is warm, and keep the replica's readiness that of the engine."""
    # Both read the model's directory; whichever prepares it first, the other waits for its lock.
    async with asyncio.TaskGroup() as group:
        starting = group.create_task(engine.start())
        reading = group.create_task(asyncio.to_thread(_vocabulary, settings, progress)) if vocabulary is None else None
    hello = starting.result()
    tokenizer, template, prints = vocabulary or (reading.result() if reading else _vocabulary(settings, progress))
    name = model_name(settings.model_name or (DEFAULT_MODEL if settings.model == hello.model == "default" else hello.model))
    canary = Canary(engine, (*tokenizer.prefix, *tokenizer.encode(Canary.PROMPT)), settings.canary_seconds)
    lives = 0
    async with aclosing(engine.watch_ready()) as states:  # type: ignore[type-var]
        async for ready in states:
            if not ready:
                await serving.unready()
                continue
            lives += 1
            if lives > 1 and telemetry is not None:
                telemetry.record("argosy.engine.restarted", 1)
            servicer.warm(Model(name, engine.hello, tokenizer, template, new_instance(), prints))
            await serving.ready()
            log.info("replica ready")
            async with canary.watching(serving.ready, serving.unready):
                await _until_changed(engine)


async def _until_changed(engine: Host) -> None:
    """Until the engine is not ready any more."""
    async with aclosing(engine.watch_ready()) as states:  # type: ignore[type-var]
        async for ready in states:
            if not ready:
                return


def _vocabulary(settings: InferenceSettings, progress: weights.Progress | None) -> Read:
    """Tokenizer, template and fingerprint of the model. Blocks: about a second for a large vocabulary, more while weights are prepared."""
    began = time.monotonic()
    directory = weights.prepare(settings.model, weights.cache_directory(settings.cache_dir), progress)
    prepared = time.monotonic()
    tokenizer = Tokenizer.from_directory(directory)
    template = load_template(directory, tokenizer, tokenizer.prefix, settings.chat_template)
    tokenizer.newline_ids  # noqa: B018  # found once, here, rather than under the first request
    try:
        prints = fingerprint(directory, tokenizer, template)
    except TemplateRefused as refused:
        log.warning("the template takes no ordinary chat, so no adapter trained on chats will be taken", extra={"why": str(refused)})
        prints = ""
    log.info("vocabulary read", extra={"prepare_s": round(prepared - began, 3), "read_s": round(time.monotonic() - prepared, 3)})
    return tokenizer, template, prints


def _public_keys(pairs: tuple[str, ...]) -> Mapping[str, Ed25519PublicKey]:
    """`kid=path` pairs as keys. Raises ValueError for what is not an Ed25519 public key in PEM."""
    keys = {}
    for pair in pairs:
        kid, _, path = pair.partition("=")
        key = load_pem_public_key(Path(path).read_bytes())
        if not isinstance(key, Ed25519PublicKey):
            raise ValueError(f"the key of {kid} is not Ed25519")
        keys[kid] = key
    return keys


def why_not(error: BaseException | None) -> str:
    """Why a replica cannot serve, in one sentence for its operator."""
    found = [error]
    for each in found:
        if isinstance(each, BaseExceptionGroup):
            found.extend(each.exceptions)
    known = [each for each in found if isinstance(each, KNOWN)]
    return str(min(known, key=lambda each: isinstance(each, EngineLost))) if known else f"The replica failed: {type(found[-1]).__name__}."


def _report(task: "asyncio.Task[None]") -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.critical("the replica cannot serve", exc_info=error)
