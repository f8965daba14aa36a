"""A scripted EngineService on a real socket: it says what it is told, fails as it is told, and counts what it really did.

`async with fake_engine(says=["to", "day"]) as fake:` in a test; `python -m tests.fakes.engine` as a process of its own, which prints its
address and obeys signals. Without a script it echoes the prompt, so a canary in a prompt is a canary in the answer (I5).
"""

import argparse
import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from argosy.v1 import (
    config_pb2,
    content_pb2,
    embedding_pb2,
    explanation_pb2,
    generation_pb2,
    language_pb2,
    model_pb2,
    stream_pb2,
    usage_pb2,
)
from argosy_internal.engine.v1 import engine_pb2, engine_pb2_grpc
from services.chassis.errors import FieldInvalid, FieldOutOfRange, ResourceNotFound, ServiceError
from services.chassis.identity import CALLER_KEY, Caller, CallerRefused, CallerVerifier
from services.chassis.status import rich

USAGE_KEY = "argosy-usage-bin"  # argosy.v1.Usage in the trailers of every end that has no Completed
ACCEPTED = (("argosy-accepted", "1"),)
SERVER = {"grpc.so_reuseport": 0, "grpc.http2.min_ping_interval_without_data_ms": 5_000, "grpc.keepalive_permit_without_calls": 1}
COMPUTES = ("Generate", "Encode", "Attribute")
CAPABILITIES = ("GENERATE", "CHAT_PLAIN", "CLASSIFY_ZERO_SHOT", "EMBED", "ANSWER_EXTRACTIVE", "LOGPROBS", "LOGIT_BIAS", "SEED")


@dataclass
class Faults:
    """What goes wrong, from the next call or token on. All may be changed while calls run."""

    refuse: ServiceError | None = None  # each call, before its initial metadata
    refusals: int | None = None  # how many more calls are refused; None: all
    unloadable: set[str] = field(default_factory=set)  # adapter digests that no project's store has
    crash_after: int | None = None  # tokens of a call, then a bare status without usage, as a lost process gives
    crash_code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE
    hang_before: bool = False  # no initial metadata, ever
    hang_after: int | None = None  # tokens, then silence
    short_after: int | None = None  # tokens, then OK without Completed: a broken engine
    skip_sequence: bool = False  # a gap in the events' numbers
    ignore_abort: bool = False
    end_watch: grpc.StatusCode | None = None  # each WatchLoad, after its next report
    slow: float = 1.0  # each delay, times this


@dataclass
class Record:
    """What really happened to one call."""

    method: str
    request: Any
    caller: Caller | None
    time_left_s: float | None
    input_tokens: int
    output_tokens: int = 0
    ended: str = ""  # DONE, ABORTED, CANCELLED, CRASHED, FAILED
    abort: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def usage(self) -> usage_pb2.Usage:
        return usage_pb2.Usage(input_tokens=self.input_tokens, cached_input_tokens=0, output_tokens=self.output_tokens)


@dataclass
class FakeEngine(engine_pb2_grpc.EngineServiceServicer):
    """The servicer, its script and its ground truth."""

    says: Sequence[str] | None = None  # tokens of every answer; None: the prompt's words
    model: str = "models/fake"
    digest: str = "fa" * 32
    context_tokens: int = 4_096
    capabilities: Sequence[str] = CAPABILITIES
    token_s: float = 0.0  # seconds before each token
    coalesce: int = 1  # tokens of one event, after the first
    keep: bool = True  # keep each Record; off for long benchmarks
    gate: asyncio.Semaphore | None = None  # each token takes one permit: a test decides when
    verifier: CallerVerifier | None = None
    faults: Faults = field(default_factory=Faults)
    adapter_slots: int = 4
    adapters: dict[tuple[str, str], list[str]] = field(default_factory=dict)  # loaded: project uid and digest → labels, oldest use first
    stored: set[tuple[str, str]] = field(default_factory=set)  # what exists, by project uid and digest; empty: whatever is asked for
    labels: dict[str, list[str]] = field(default_factory=dict)  # of the heads in the store, by digest
    load: engine_pb2.EngineLoad = field(
        default_factory=lambda: engine_pb2.EngineLoad(
            prefill_tokens_per_second=10_000, decode_tokens_per_second=1_000, free_blocks=1_000, total_blocks=1_000
        )
    )
    address: str = ""
    calls: list[Record] = field(default_factory=list)
    totals: Counter[str] = field(default_factory=Counter)
    running: dict[str, Record] = field(default_factory=dict)
    server: Any = None
    health: Any = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    # --- what the tests ask -----------------------------------------------------------------------------------------------------

    @property
    def output_tokens(self) -> int:
        """Tokens really generated, whatever became of them."""
        return self.totals["output_tokens"]

    @property
    def watching(self) -> int:
        """Gateways that watch the load now."""
        return self.totals["watches"] - self.totals["watches_ended"]

    async def until(self, condition: Callable[["FakeEngine"], bool], timeout_s: float = 10.0) -> None:
        """Wait until the ground truth satisfies `condition`; asked again at each change."""
        async with asyncio.timeout(timeout_s):
            while not condition(self):
                await self._changed.wait()

    def changed(self) -> None:
        """Wake `until` and the load watchers, all that wait now."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def kill(self) -> None:
        """Die as a process does: connections close, nothing more is said."""
        await self.server.stop(None)

    # --- EngineService ----------------------------------------------------------------------------------------------------------

    async def GetEngineInfo(self, request: engine_pb2.GetEngineInfoRequest, context: Any) -> engine_pb2.EngineInfo:
        return engine_pb2.EngineInfo(
            model=self.model,
            base_digest=self.digest,
            architecture="fake",
            device="cpu",
            dtype="float32",
            vocabulary_size=256,
            context_tokens=self.context_tokens,
            embedding_dimensions=8,
            block_tokens=16,
            total_blocks=1_000,
            default_config=config_pb2.GenerationConfig(sampling=config_pb2.Sampling(temperature=1.0)),
            end_token_ids=[0],
            backend="eager",
            capabilities=[model_pb2.ModelCapability.Value(f"MODEL_CAPABILITY_{name}") for name in self.capabilities],
            version="fake",
            instance_id="00000000-0000-4000-8000-000000000000",
            adapter_slots=self.adapter_slots,
        )

    async def WatchLoad(self, request: engine_pb2.WatchLoadRequest, context: Any) -> AsyncIterator[engine_pb2.EngineLoad]:
        await context.send_initial_metadata(())
        self.totals["watches"] += 1
        self.changed()
        try:
            while True:
                load = engine_pb2.EngineLoad()
                load.CopyFrom(self.load)
                load.running_sequences += len(self.running)
                load.resident_adapters.extend(digest for _, digest in self.adapters)
                load.prefill_tokens_per_second /= self.faults.slow
                load.decode_tokens_per_second /= self.faults.slow
                yield load
                if self.faults.end_watch is not None:
                    await context.abort(self.faults.end_watch, "")
                await asyncio.sleep(0.02)  # a real engine reports no more often than it steps
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._load_changed(), 0.1 if self.running else 0.5)
        finally:
            self.totals["watches_ended"] += 1
            self.changed()

    async def _load_changed(self) -> None:
        before = (self.load.SerializeToString(), bool(self.running), *self.adapters)
        while (self.load.SerializeToString(), bool(self.running), *self.adapters) == before:
            await self._changed.wait()

    async def Abort(self, request: engine_pb2.AbortRequest, context: Any) -> engine_pb2.AbortResponse:
        self.totals["aborts"] += 1
        if not self.faults.ignore_abort:
            for generation_id in request.generation_ids:
                if record := self.running.get(generation_id):
                    record.abort.set()
        return engine_pb2.AbortResponse()

    async def PrefetchAdapter(self, request: engine_pb2.PrefetchAdapterRequest, context: Any) -> engine_pb2.PrefetchAdapterResponse:
        record = await self._begin("PrefetchAdapter", request, context, "")
        was = self._owner(record), request.adapter_digest
        known = was in self.adapters
        await self._adapt(request.adapter_digest, record, context)
        adapter = engine_pb2.Adapter(adapter_digest=request.adapter_digest, rank=16, labels=self.adapters[was])
        reply = engine_pb2.PrefetchAdapterResponse(adapter=adapter)
        reply.load.FromMilliseconds(0 if known else 250)
        return reply

    async def EvictAdapter(self, request: engine_pb2.EvictAdapterRequest, context: Any) -> engine_pb2.EvictAdapterResponse:
        record = await self._begin("EvictAdapter", request, context, "")
        evicted = self.adapters.pop((self._owner(record), request.adapter_digest), None) is not None
        self.changed()
        return engine_pb2.EvictAdapterResponse(evicted=evicted)

    async def ListAdapters(self, request: engine_pb2.ListAdaptersRequest, context: Any) -> engine_pb2.ListAdaptersResponse:
        owner = self._owner(await self._begin("ListAdapters", request, context, ""))
        mine = [(digest, labels) for (project, digest), labels in reversed(self.adapters.items()) if project == owner]
        return engine_pb2.ListAdaptersResponse(
            adapters=[engine_pb2.Adapter(adapter_digest=digest, rank=16, labels=labels) for digest, labels in mine]
        )

    async def Attribute(self, request: engine_pb2.AttributeRequest, context: Any) -> explanation_pb2.ExplainResponse:
        text = request.explain.classify.text or request.explain.generation.prompt
        record = await self._begin("Attribute", request, context, text)
        try:
            await self._step(record, context)
            words = _words(text)
            found = [explanation_pb2.Attribution(span=content_pb2.Span(text=word), weight=0.5) for word in words]
            usage = usage_pb2.Usage(input_tokens=len(words), passes=len(words) + 2)
            record.ended = "DONE"
            return explanation_pb2.ExplainResponse(attributions=found, target_score=-0.5, model=request.model, usage=usage)
        finally:
            self._end(record, request.generation_id)

    @staticmethod
    def _owner(record: Record) -> str:
        return record.caller.project_uid if record.caller is not None else ""

    async def _adapt(self, digest: str, record: Record, context: Any) -> None:
        """Have an adapter of the caller's project loaded, as a pod does before it computes."""
        if digest in self.faults.unloadable or (self.stored and (self._owner(record), digest) not in self.stored):
            await _refuse(context, ResourceNotFound("model"))
        key = (self._owner(record), digest)
        self.adapters[key] = self.adapters.pop(key, self.labels.get(digest, []))
        while len(self.adapters) > self.adapter_slots:
            del self.adapters[next(iter(self.adapters))]
        self.changed()

    async def Generate(self, request: engine_pb2.GenerateRequest, context: Any) -> AsyncIterator[bytes]:
        record = await self._begin("Generate", request, context, _prompt_of(request))
        try:
            async for event in self._events(request, record, context):
                yield event
            record.ended = record.ended or "DONE"
        except (asyncio.CancelledError, GeneratorExit):
            record.ended = record.ended or "CANCELLED"
            raise
        finally:
            self._end(record, request.generation_id)

    async def _events(self, request: engine_pb2.GenerateRequest, record: Record, context: Any) -> AsyncIterator[bytes]:
        config = request.config
        outputs = max(1, config.sampling.n)
        tokens = list(self.says) if self.says is not None else _words(_prompt_of(request))
        limit = (
            config.stopping.max_output_tokens if config.stopping.HasField("max_output_tokens") else request.output_token_ceiling or 4_096
        )
        finish = stream_pb2.FINISH_REASON_STOP if len(tokens) <= limit else stream_pb2.FINISH_REASON_LENGTH
        tokens = tokens[:limit]
        sequence = 0

        def event(**fields: Any) -> bytes:
            nonlocal sequence
            sequence += 2 if self.faults.skip_sequence and sequence == 1 else 1
            return stream_pb2.GenerationEvent(sequence=sequence, **fields).SerializeToString()

        yield event(
            started=stream_pb2.Started(
                generation_id=request.generation_id, request_id=request.request_id, model=request.model, prompt_tokens=record.input_tokens
            )
        )
        began = time.monotonic()
        time_limit_s = config.stopping.time_limit.ToNanoseconds() / 1e9 if config.stopping.HasField("time_limit") else float("inf")
        for index in range(outputs):
            held: list[str] = []
            reason = finish
            for token in tokens:
                if time.monotonic() - began > time_limit_s:
                    reason = stream_pb2.FINISH_REASON_TIME_LIMIT
                    break
                await self._step(record, context)
                record.output_tokens += 1
                self.totals["output_tokens"] += 1
                held.append(token)
                if record.output_tokens == 1 or len(held) >= self.coalesce:
                    yield event(text=stream_pb2.TextDelta(index=index, text="".join(held)))
                    held.clear()
                self.changed()
                if self.faults.short_after is not None and record.output_tokens >= self.faults.short_after:
                    return
            if held:
                yield event(text=stream_pb2.TextDelta(index=index, text="".join(held)))
            yield event(output_finished=stream_pb2.OutputFinished(index=index, reason=reason))
        yield event(completed=stream_pb2.Completed(usage=record.usage(), effective_config=config))

    async def _step(self, record: Record, context: Any) -> None:
        """What the engine does before a token: wait its turn, see aborts, or go wrong."""
        faults = self.faults
        if faults.crash_after is not None and record.output_tokens >= faults.crash_after:
            record.ended = "CRASHED"
            await context.abort(faults.crash_code, "")
        if faults.hang_after is not None and record.output_tokens >= faults.hang_after:
            await asyncio.Event().wait()
        if self.gate is not None:
            await self._unless_aborted(self.gate.acquire(), record)
        if self.token_s:
            await self._unless_aborted(asyncio.sleep(self.token_s * faults.slow), record)
        if record.abort.is_set():
            record.ended = "ABORTED"
            await context.abort(grpc.StatusCode.CANCELLED, "", ((USAGE_KEY, record.usage().SerializeToString()),))

    async def _unless_aborted(self, wait: Any, record: Record) -> None:
        waits = (asyncio.ensure_future(wait), asyncio.ensure_future(record.abort.wait()))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in waits:
                one.cancel()

    async def Encode(self, request: engine_pb2.EncodeRequest, context: Any) -> engine_pb2.EncodeResponse:
        task = request.WhichOneof("task")
        record = await self._begin("Encode", request, context, request.SerializeToString().decode(errors="replace"))
        try:
            await self._step(record, context)
            record.ended = "DONE"
            return getattr(self, f"_{task}")(request, record.usage())  # type: ignore[no-any-return]
        except asyncio.CancelledError:
            record.ended = "CANCELLED"
            raise
        finally:
            self._end(record, request.generation_id)

    def _classify(self, request: engine_pb2.EncodeRequest, usage: usage_pb2.Usage) -> engine_pb2.EncodeResponse:
        asked = request.classify
        tuned = self.labels.get(request.model.adapter_digest, []) if asked.WhichOneof("label_source") is None else []
        labels = list(asked.zero_shot.labels) or tuned or ["positive", "neutral", "negative"]
        weights = [2.0**-n for n in range(len(labels))]
        scores = [content_pb2.LabelScore(label=label, probability=w / sum(weights)) for label, w in zip(labels, weights, strict=True)]
        results = [language_pb2.Classification(labels=scores, windows=1) for _ in asked.texts]
        return engine_pb2.EncodeResponse(classify=language_pb2.ClassifyTextResponse(results=results, model=request.model, usage=usage))

    def _embed(self, request: engine_pb2.EncodeRequest, usage: usage_pb2.Usage) -> engine_pb2.EncodeResponse:
        vectors = [embedding_pb2.Embedding(values=[1.0] + [0.0] * 7) for _ in request.embed.texts]
        return engine_pb2.EncodeResponse(embed=embedding_pb2.EmbedTextsResponse(embeddings=vectors, model=request.model, usage=usage))

    def _answer(self, request: engine_pb2.EncodeRequest, usage: usage_pb2.Usage) -> engine_pb2.EncodeResponse:
        answer = language_pb2.AnswerQuestionResponse(no_answer_probability=1.0, model=request.model, usage=usage)
        return engine_pb2.EncodeResponse(answer=answer)

    async def CountTokens(self, request: generation_pb2.CountTokensRequest, context: Any) -> generation_pb2.CountTokensResponse:
        await self._begin("CountTokens", request, context, request.prompt)
        tokens = len(_words(request.prompt))
        return generation_pb2.CountTokensResponse(tokens=tokens, room=self.context_tokens - tokens)

    async def Tokenize(self, request: generation_pb2.TokenizeRequest, context: Any) -> generation_pb2.TokenizeResponse:
        await self._begin("Tokenize", request, context, request.text)
        return generation_pb2.TokenizeResponse(
            tokens=[generation_pb2.TextToken(token_id=1, token=w.encode()) for w in _words(request.text)]
        )

    async def _begin(self, method: str, request: Any, context: Any, prompt: str) -> Record:
        """Admit a call as a pod does: refuse, or send initial metadata and count it."""
        if self.faults.hang_before:
            self.totals["hung"] += 1
            self.changed()
            await asyncio.Event().wait()
        if self.faults.refuse is not None and self.faults.refusals != 0:
            if self.faults.refusals is not None:
                self.faults.refusals -= 1
            self.totals["refused"] += 1
            await _refuse(context, self.faults.refuse)
        caller = await self._caller(context)
        left = context.time_remaining()
        input_tokens = len(_words(prompt))
        if method == "Generate":
            await self._check(request, context)
        record = Record(method, request, caller, left, input_tokens)
        self.totals["calls"] += 1
        self.totals["input_tokens"] += input_tokens
        if self.keep:
            self.calls.append(record)
        if method in COMPUTES:
            if request.model.adapter_digest:
                await self._adapt(request.model.adapter_digest, record, context)
            self.running[request.generation_id] = record
        try:
            await context.send_initial_metadata(ACCEPTED)
        except BaseException:
            record.ended = "CANCELLED"
            if method in COMPUTES:
                self._end(record, request.generation_id)
            raise
        self.changed()
        return record

    async def _caller(self, context: Any) -> Caller | None:
        if self.verifier is None:
            return None
        blob = dict(context.invocation_metadata()).get(CALLER_KEY)
        try:
            return self.verifier.verify(blob if isinstance(blob, bytes) else b"", time.time())
        except CallerRefused as refused:
            return await _refuse(context, refused)

    async def _check(self, request: engine_pb2.GenerateRequest, context: Any) -> None:
        if request.WhichOneof("prompt") is None or not request.generation_id:
            await _refuse(context, FieldInvalid("prompt"))
        room = self.context_tokens - len(_words(_prompt_of(request)))
        asked = request.config.stopping.max_output_tokens
        if asked > room:
            await _refuse(context, FieldOutOfRange("config.stopping.max_output_tokens", asked, room, "tokens"))

    def _end(self, record: Record, generation_id: str) -> None:
        self.running.pop(generation_id, None)
        self.totals[record.ended] += 1
        record.over.set()
        self.changed()


def _prompt_of(request: engine_pb2.GenerateRequest) -> str:
    match request.WhichOneof("prompt"):
        case "text":
            return request.text
        case "chat":
            return " ".join(part.text for message in request.chat.messages for part in message.parts)
        case "summarize":
            return " ".join(request.summarize.documents)
        case "translate":
            return " ".join(request.translate.texts)
        case "answer":
            return request.answer.question
        case _:
            return ""


def _words(text: str) -> list[str]:
    """The fake's tokens: words with the space before them."""
    return [word if n == 0 else " " + word for n, word in enumerate(text.split())]


async def _refuse(context: Any, error: ServiceError) -> NoReturn:
    reply = rich(error)
    await context.abort(reply.code, reply.sentence, reply.trailers)
    raise AssertionError("abort raises")


def _as_it_is(event: bytes) -> bytes:
    return event


def _handlers(fake: FakeEngine) -> grpc.GenericRpcHandler:
    """EngineService's handlers; Generate's events leave as the bytes they are."""
    service = engine_pb2.DESCRIPTOR.services_by_name["EngineService"]
    handlers = {}
    for method in service.methods:
        request = _class_of(method.input_type.full_name)
        handler = getattr(fake, method.name)
        if method.server_streaming:
            serializer = _as_it_is if method.name == "Generate" else _serialize
            handlers[method.name] = grpc.unary_stream_rpc_method_handler(handler, request.FromString, serializer)
        else:
            handlers[method.name] = grpc.unary_unary_rpc_method_handler(handler, request.FromString, _serialize)
    return grpc.method_handlers_generic_handler(service.full_name, handlers)


def _serialize(message: Any) -> bytes:
    return message.SerializeToString()  # type: ignore[no-any-return]


def _class_of(full_name: str) -> Any:
    from google.protobuf import message_factory, symbol_database

    return message_factory.GetMessageClass(symbol_database.Default().pool.FindMessageTypeByName(full_name))


@asynccontextmanager
async def fake_engine(
    says: Sequence[str] | None = None, *, address: str = "127.0.0.1:0", tls: grpc.ServerCredentials | None = None, **script: Any
) -> AsyncIterator[FakeEngine]:
    """A running fake. `script` are FakeEngine's fields, and `faults`."""
    fake = FakeEngine(says=says, **script)
    server = grpc.aio.server(options=list(SERVER.items()))
    server.add_generic_rpc_handlers((_handlers(fake),))
    fake.health = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(fake.health, server)
    await fake.health.set("ready", health_pb2.HealthCheckResponse.SERVING)
    port = server.add_insecure_port(address) if tls is None else server.add_secure_port(address, tls)
    fake.address = f"{address.rsplit(':', 1)[0]}:{port}"
    fake.server = server
    await server.start()
    try:
        yield fake
    finally:
        await server.stop(0)


async def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", default="127.0.0.1:0")
    parser.add_argument("--tokens", type=int, default=0, help="of each answer; 0: echo the prompt")
    parser.add_argument("--coalesce", type=int, default=1)
    parser.add_argument("--token-s", type=float, default=0.0)
    asked = parser.parse_args()
    says = [" token"] * asked.tokens if asked.tokens else None
    async with fake_engine(says, address=asked.address, coalesce=asked.coalesce, token_s=asked.token_s, keep=False) as fake:
        print(fake.address, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_main())
