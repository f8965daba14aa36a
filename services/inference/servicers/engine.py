"""EngineService: messages in, calls to the engine, events out. Every method checks the bounds again; the door has checked the caller."""

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from google.protobuf.duration_pb2 import Duration

from argosy.v1 import content_pb2, explanation_pb2, generation_pb2, model_pb2, stream_pb2, usage_pb2
from argosy.v1.config_pb2 import GenerationConfig
from argosy.v1.config_pb2 import WorkClass as PublicWorkClass
from argosy_internal.engine.v1 import engine_pb2, engine_pb2_grpc
from services.chassis import bounds
from services.chassis.channel import remaining
from services.chassis.errors import CallerLeft, Internal, ModelCapability, ModelNotServed, NotStarted, ServiceError, Shed, SlowConsumer
from services.chassis.identity import CALLER, Caller
from services.chassis.interceptors import progress
from services.chassis.telemetry import Telemetry
from services.inference.engine.calls import AdapterReady, Hello, Load, Sampling, WorkClass
from services.inference.engine.host import Host
from services.inference.servicers.config import asked_from_proto, default_config
from services.inference.servicers.encoding import Encoder
from services.inference.servicers.explaining import Explainer
from services.inference.servicers.generating import Generation, Who, served
from services.inference.servicers.measured import Work
from services.inference.servicers.outbox import Outbox
from services.inference.servicers.plans import Planner, messages_from_proto, tools_from_proto
from services.inference.servicers.tuned import Tuned
from services.pretrained.templates import ChatTemplate
from services.pretrained.tokenizer import Tokenizer

__all__ = ["USAGE_KEY", "EngineServicer", "Model", "Pace"]

USAGE_KEY = "argosy-usage-bin"  # argosy.v1.Usage in the trailers of every end that has no Completed
ACCEPTED = (("argosy-accepted", "1"),)  # initial metadata: what the gateway knows an accepted call by
VERSION = "0.1.0"
Reply = TypeVar("Reply")
WORK = {PublicWorkClass.WORK_CLASS_BATCH: WorkClass.BATCH}


@dataclass(frozen=True, slots=True)
class Pace:
    """Times of a stream, in seconds."""

    heartbeat_s: float = 15.0
    write_stall_s: float = 30.0
    load_s: float = 15.0  # a load report at least this often


@dataclass(frozen=True, slots=True)
class Model:
    """What is loaded, as this process sees it."""

    name: str  # `models/{name}`
    hello: Hello
    tokenizer: Tokenizer
    template: ChatTemplate
    instance_id: str
    fingerprint: str = ""  # of how prompts are made; an adapter trained on prompts made otherwise is refused


class EngineServicer(engine_pb2_grpc.EngineServiceServicer):
    """One replica. Until `warm` is called every method answers NOT_STARTED."""

    def __init__(
        self,
        host: Host,
        pace: Pace = Pace(),
        max_waiting: int = 1_024,
        draining: Callable[[], bool] = lambda: False,
        telemetry: Telemetry | None = None,
    ) -> None:
        self._host = host
        self._telemetry = telemetry or Telemetry.off()
        self._pace = pace
        self._max_waiting = max_waiting
        self._draining = draining
        self._model: Model | None = None
        self._planner: Planner | None = None
        self._encoder: Encoder | None = None
        self._explainer: Explainer | None = None
        self._tuned = Tuned(host)
        self._running: dict[tuple[str, str], Generation] = {}  # by project and generation id
        self._encoding: dict[tuple[str, str], asyncio.Task[Any]] = {}

    def warm(self, model: Model) -> None:
        """The engine said Hello: answer from now on."""
        self._planner = Planner(model.tokenizer, model.template, model.hello)
        self._encoder = Encoder(self._host, self._planner)
        self._explainer = Explainer(self._host, self._planner, self._encoder)
        self._model = model

    # --- generation ---------------------------------------------------------------------------------------------------------------

    async def Generate(self, request: engine_pb2.GenerateRequest, context: Any) -> AsyncIterator[stream_pb2.GenerationEvent]:
        """Admit, then stream: initial metadata goes out once the prompt is known to fit and the engine takes work."""
        bounds.check(request)
        model, caller, who = await self._enter(request.model, request)
        assert self._planner is not None and self._encoder is not None  # `warm` set them together
        is_task = request.WhichOneof("prompt") not in ("text", "chat")
        # A task has one output a text, and is greedy unless asked otherwise: its wording leaves little to chance.
        defaults = Sampling(seed=0, temperature=0.0) if is_task else model.hello.default_sampling
        asked = asked_from_proto(request.config, defaults, model.hello.vocabulary, most_outputs=1 if is_task else 4)
        encoder = self._encoder
        work = self._work(model, request.WhichOneof("prompt"))
        before = usage_pb2.Usage()  # what planning costs: finding a language may ask the engine
        try:
            plan = await self._planner.plan(request, lambda text: encoder.language(text, who, work, before, _left_s))
        except Exception:
            _tell_usage(context, before)
            raise
        ceilings = [caller.output_token_ceiling, request.output_token_ceiling if request.HasField("output_token_ceiling") else None]
        outbox = Outbox(
            flush_s=asked.flush_s,
            heartbeat_s=self._pace.heartbeat_s,
            stall_s=self._pace.write_stall_s,
        )
        generation = Generation(
            host=self._host,
            tokenizer=model.tokenizer,
            context_tokens=model.hello.context,
            who=who,
            work=work,
            asked=asked,
            plan=plan,
            started=stream_pb2.Started(
                generation_id=request.generation_id, request_id=request.request_id, model=served(request.model, model.hello.digest)
            ),
            outbox=outbox,
            left_s=_left_s,
            ceiling=min((ceiling for ceiling in ceilings if ceiling is not None), default=None),
        )
        outbox.stalled = lambda: generation.abort(SlowConsumer())
        generation.spent.input_tokens += before.input_tokens
        generation.spent.cached_input_tokens += before.cached_input_tokens
        generation.check()
        key = (caller.project_uid, request.generation_id)
        if key in self._running:
            raise NotStarted  # the attempt before it is still ending
        self._admit(plan.prompt_tokens)
        self._running[key] = generation
        pump = asyncio.create_task(generation.run(), name="generation")
        how_far = progress()
        try:
            await context.send_initial_metadata(ACCEPTED)
            with work.measured(generation.spent.usage):
                async with aclosing(outbox.events()) as events:
                    async for event in events:
                        how_far.last_sequence = event.sequence
                        yield event
        except Exception as error:
            if isinstance(error, ServiceError) and error.last_sequence is None:
                error.last_sequence = how_far.last_sequence
            _tell_usage(context, generation.spent.usage())
            raise
        finally:
            # The caller left, or all is said. Ending the pump ends the engine's calls within a step.
            del self._running[key]
            pump.cancel()
            await asyncio.wait([pump])

    async def _enter(self, asked: content_pb2.ServedModel, request: Any) -> tuple[Model, Caller, Who]:
        """Who asks, of what is loaded; an adapter that nobody has asked for yet is loaded first."""
        model, caller = self._loaded(), _caller()
        if asked.base_digest and asked.base_digest != model.hello.digest:
            raise ModelNotServed
        ready = await self._adapter(model, caller, asked.adapter_digest) if asked.adapter_digest else None
        work_class = WORK.get(request.work_class, WorkClass.INTERACTIVE)
        return model, caller, Who(request.generation_id, caller.project_uid, bytes.fromhex(caller.kv_scope), work_class, ready)

    async def _adapter(self, model: Model, caller: Caller, digest: str, *, fresh: bool = False) -> AdapterReady:
        if not model.hello.adapter_slots:
            raise ModelCapability("model", "adapters")
        ready = await self._tuned.find(caller.project_uid, digest, _left_s(), fresh=fresh)
        self._tuned.fits(ready, model.fingerprint)
        return ready

    def _work(self, model: Model, task: str | None) -> Work:
        return Work(self._telemetry, self._host, task or "", model.name)

    def _loaded(self) -> Model:
        if self._model is None or not self._host.ready:
            raise NotStarted
        return self._model

    def _admit(self, prompt_tokens: int) -> None:
        """Raise Shed where the queue is full, or where waiting and prefill alone are predicted to outlast the deadline."""
        load = self._host.load
        rate = load.prefill_tokens_per_s
        wait_s = (load.queued_tokens + prompt_tokens) / rate if rate > 0 else 0.0
        if load.waiting_sequences >= self._max_waiting or wait_s > _left_s():
            raise Shed(retry_after_s=max(0.1, min(5.0, wait_s / 2)))

    # --- everything else ----------------------------------------------------------------------------------------------------------

    async def Encode(self, request: engine_pb2.EncodeRequest, context: Any) -> engine_pb2.EncodeResponse:
        """Labels, vectors or spans."""
        bounds.check(request)
        model, caller, who = await self._enter(request.model, request)
        assert self._encoder is not None  # `warm` set it
        spent = usage_pb2.Usage()
        answers = served(request.model, model.hello.digest)
        work = self._work(model, request.WhichOneof("task"))
        encoding = partial(self._encoder.encode, request, who, work, answers, spent, _left_s)
        return await self._answer(encoding, (caller.project_uid, request.generation_id), work, spent, context)

    async def Attribute(self, request: engine_pb2.AttributeRequest, context: Any) -> explanation_pb2.ExplainResponse:
        """What in an input speaks for a label or a continuation."""
        bounds.check(request)
        model, caller, who = await self._enter(request.model, request)
        assert self._explainer is not None  # `warm` set it
        spent = usage_pb2.Usage()
        answers = served(request.model, model.hello.digest)
        work = self._work(model, "explain")
        explaining = partial(self._explainer.explain, request.explain, who, work, answers, spent, _left_s)
        return await self._answer(explaining, (caller.project_uid, request.generation_id), work, spent, context)

    async def _answer(
        self, answer: Callable[[], Coroutine[Any, Any, Reply]], key: tuple[str, str], work: Work, spent: usage_pb2.Usage, context: Any
    ) -> Reply:
        """Admit, then run to a reply in one message; Abort finds it by its key, and whatever ends it early tells what was `spent`."""
        self._admit(0)
        if key in self._encoding:
            raise NotStarted
        await context.send_initial_metadata(ACCEPTED)
        task = asyncio.create_task(answer(), name="encoding")
        self._encoding[key] = task
        try:
            with work.measured(lambda: spent):
                return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise  # the caller left, and the task was cancelled with us
            _tell_usage(context, spent)
            raise CallerLeft from None  # Abort ended it
        except Exception:
            _tell_usage(context, spent)
            raise
        finally:
            del self._encoding[key]

    async def CountTokens(self, request: generation_pb2.CountTokensRequest, context: Any) -> generation_pb2.CountTokensResponse:
        """Tokens of a prompt or a dialogue, and the room left."""
        bounds.check(request)
        model = self._loaded()
        assert self._planner is not None  # `warm` set it
        if request.WhichOneof("input") == "chat":
            chat = request.chat
            tokens = len(await self._planner.chat(messages_from_proto(chat.messages), tools_from_proto(chat.tools)))
        else:
            tokens = len(await self._planner.text(request.prompt))
        room = max(0, model.hello.context - tokens)
        ceiling = _caller().output_token_ceiling
        return generation_pb2.CountTokensResponse(
            tokens=tokens, room=room if ceiling is None else min(room, ceiling), usage=usage_pb2.Usage()
        )

    async def Tokenize(self, request: generation_pb2.TokenizeRequest, context: Any) -> generation_pb2.TokenizeResponse:
        """Ids, raw bytes and the source bytes each covers."""
        bounds.check(request)
        pieces = await asyncio.to_thread(self._loaded().tokenizer.pieces, request.text)
        tokens = [
            generation_pb2.TextToken(token_id=piece.id, token=piece.token, start_byte=piece.start_byte, end_byte=piece.end_byte)
            for piece in pieces
        ]
        return generation_pb2.TokenizeResponse(tokens=tokens, usage=usage_pb2.Usage())

    async def Abort(self, request: engine_pb2.AbortRequest, context: Any) -> engine_pb2.AbortResponse:
        """End the caller's own calls. Unknown ids are ignored; the streams end CANCELLED with their usage in the trailers."""
        bounds.check(request)
        project = _caller().project_uid
        for id in request.generation_ids:
            if generation := self._running.get((project, id)):
                generation.abort(CallerLeft())
            if task := self._encoding.get((project, id)):
                task.cancel()
        return engine_pb2.AbortResponse()

    async def GetEngineInfo(self, request: engine_pb2.GetEngineInfoRequest, context: Any) -> engine_pb2.EngineInfo:
        """What this replica is."""
        model = self._loaded()
        hello = model.hello
        return engine_pb2.EngineInfo(
            model=model.name,
            base_digest=hello.digest,
            architecture=hello.architecture,
            device=hello.device,
            dtype=hello.dtype,
            vocabulary_size=hello.vocabulary,
            context_tokens=hello.context,
            embedding_dimensions=hello.width,
            block_tokens=hello.block_size,
            total_blocks=hello.blocks,
            default_config=self._default_config(model),
            end_token_ids=hello.end_token_ids,
            backend=hello.backend,
            capabilities=_capabilities(model),
            version=VERSION,
            instance_id=model.instance_id,
            adapter_slots=hello.adapter_slots,
        )

    def _default_config(self, model: Model) -> GenerationConfig:
        return default_config(model.hello)

    async def WatchLoad(self, request: engine_pb2.WatchLoadRequest, context: Any) -> AsyncIterator[engine_pb2.EngineLoad]:
        """The load now, on change, and at least each 15 s. The engine itself reports at most each 100 ms."""
        self._loaded()
        await context.send_initial_metadata(())
        source = self._host.watch_load()
        following: asyncio.Future[Load] | None = None
        try:
            load = self._host.load
            while True:
                following = following or asyncio.ensure_future(anext(source))  # the first is the load now
                done, _ = await asyncio.wait({following}, timeout=self._pace.load_s)
                if done:
                    load, following = following.result(), None
                yield self._load_message(load)
        finally:
            if following is not None:
                following.cancel()

    def _load_message(self, load: Load) -> engine_pb2.EngineLoad:
        return engine_pb2.EngineLoad(
            waiting_sequences=load.waiting_sequences,
            running_sequences=load.running_sequences,
            queued_tokens=load.queued_tokens,
            running_tokens=load.running_tokens,
            prefill_tokens_per_second=load.prefill_tokens_per_s,
            decode_tokens_per_second=load.decode_tokens_per_s,
            free_blocks=load.free_blocks,
            total_blocks=load.total_blocks,
            cached_tokens=load.cached_tokens,
            steps=load.steps,
            step_time=_duration(load.step_s),
            batch=load.batch,
            draining=self._draining() or not self._host.ready,
            resident_adapters=load.adapters,
        )

    # --- adapters -----------------------------------------------------------------------------------------------------------------

    async def PrefetchAdapter(self, request: engine_pb2.PrefetchAdapterRequest, context: Any) -> engine_pb2.PrefetchAdapterResponse:
        """Load one of the caller's adapters beside the batch."""
        bounds.check(request)
        ready = await self._adapter(self._loaded(), _caller(), request.adapter_digest, fresh=True)
        return engine_pb2.PrefetchAdapterResponse(adapter=_adapter_message(ready), load=_duration(ready.seconds))

    async def EvictAdapter(self, request: engine_pb2.EvictAdapterRequest, context: Any) -> engine_pb2.EvictAdapterResponse:
        """Forget one of the caller's adapters."""
        bounds.check(request)
        self._loaded()
        return engine_pb2.EvictAdapterResponse(evicted=await self._tuned.evict(_caller().project_uid, request.adapter_digest))

    async def ListAdapters(self, request: engine_pb2.ListAdaptersRequest, context: Any) -> engine_pb2.ListAdaptersResponse:
        """Those of the caller's that are loaded."""
        bounds.check(request)
        self._loaded()
        return engine_pb2.ListAdaptersResponse(adapters=map(_adapter_message, self._tuned.loaded(_caller().project_uid)))


def model_name(said: str) -> str:
    """`models/{name}` from what the engine or the operator calls the model: a path, a hub id, a file."""
    last = said.rstrip("/").rsplit("/", 1)[-1].lower()
    segment = re.sub(r"[^a-z0-9]+", "-", last).strip("-")[:63] or "model"
    return f"models/{segment}"


def new_instance() -> str:
    """An id for one life of an engine process."""
    return str(uuid.uuid4())


def _adapter_message(ready: AdapterReady) -> engine_pb2.Adapter:
    return engine_pb2.Adapter(adapter_digest=ready.digest, rank=ready.rank, labels=ready.labels, memory_bytes=ready.memory_bytes)


def _duration(seconds: float) -> Duration:
    found = Duration()
    found.FromNanoseconds(round(seconds * 1e9))
    return found


def _capabilities(model: Model) -> Sequence[model_pb2.ModelCapability.ValueType]:
    names = ["GENERATE", "CHAT_PLAIN" if model.template.name == "plain" else "CHAT_TEMPLATE"]
    names += ["EMBED"] if model.hello.embeds else []
    names += ["CLASSIFY_ZERO_SHOT", "ANSWER_EXTRACTIVE", "EXPLAIN", "LOGPROBS", "PROMPT_LOGPROBS", "LOGIT_BIAS", "SEED"]
    names += ["CLASSIFY_TUNED"] if model.hello.adapter_slots else []
    return [model_pb2.ModelCapability.Value(f"MODEL_CAPABILITY_{name}") for name in names]


def _caller() -> Caller:
    caller = CALLER.get()
    if caller is None:
        raise Internal  # a door without its caller step: never answer for nobody
    return caller


def _left_s() -> float:
    """Seconds to the call's deadline."""
    return remaining(margin_s=0.0, cap_s=900.0)


def _tell_usage(context: Any, usage: usage_pb2.Usage) -> None:
    """What was used up to a failure, for the gateway to settle."""
    kept = [pair for pair in context.trailing_metadata() or () if pair[0] != USAGE_KEY]
    context.set_trailing_metadata((*kept, (USAGE_KEY, usage.SerializeToString())))
