"""What the gateway expects of any EngineService: held by the fake engine, and by a real replica over a fake host."""

import asyncio
import dataclasses
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from argosy.v1 import config_pb2, content_pb2, generation_pb2, language_pb2, stream_pb2, usage_pb2
from argosy_internal.engine.v1 import engine_pb2, engine_pb2_grpc
from services.chassis.identity import CallerVerifier
from services.chassis.status import error_info
from services.gateway.replicas import AUDIENCE
from services.gateway.servicers.relay import USAGE_KEY
from tests.fakes.engine import fake_engine
from tests.fakes.host import FakeHost
from tests.inference.replicas import CALLER, KEY, client, ids, signed


@dataclass
class Subject:
    """One EngineService, and what a test may do to the engine behind it."""

    stub: Any
    model: str
    running: Callable[[], int]
    output_tokens: Callable[[], int]
    lose: Callable[[], Any]  # the engine dies, the wire process says so
    store: Callable[[str, str], object]  # lets a project (by uid) have an adapter of this digest

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the ground truth satisfies `condition`; the two engines have no event in common."""
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.002)

    def call(self, prompt: str = "hello world", *, metadata: Any = None, adapter: str = "", **config: Any) -> Any:
        request = engine_pb2.GenerateRequest(
            generation_id=str(uuid.uuid4()),
            request_id=str(uuid.uuid4()),
            model=content_pb2.ServedModel(version=self.model, adapter_digest=adapter),
            text=prompt,
            config=config_pb2.GenerationConfig(**config),
        )
        call = self.stub.Generate(request, metadata=signed() if metadata is None else metadata, timeout=20)
        call.generation_id = request.generation_id
        return call

    async def events(self, call: Any) -> list[stream_pb2.GenerationEvent]:
        return [event async for event in call]


WORDS = ["hello", "world"]


@asynccontextmanager
async def fake(words: list[str], *, hold: bool = False) -> AsyncIterator[Subject]:
    """The fake engine; with `hold` it waits for ever after its words."""
    verifier = CallerVerifier({"gateway": KEY.public_key()}, AUDIENCE)
    gate = asyncio.Semaphore(len(words)) if hold else None
    async with (
        fake_engine([*words, *["never"] * 9] if hold else words, verifier=verifier, context_tokens=512, gate=gate) as engine,
        grpc.aio.insecure_channel(engine.address) as channel,
    ):

        def lose() -> None:
            engine.faults.crash_after = 0
            assert gate is not None
            gate.release()

        def store(owner: str, digest: str) -> None:
            engine.stored.add((owner, digest))

        yield Subject(
            engine_pb2_grpc.EngineServiceStub(channel),
            engine.model,
            lambda: len(engine.running),
            lambda: engine.output_tokens,
            lose,
            store,
        )


@asynccontextmanager
async def real(words: list[str], *, hold: bool = False) -> AsyncIterator[Subject]:
    """A replica's own server over a scripted host."""
    host = FakeHost()
    never = asyncio.Event()
    host.says = [*ids(*words), never] if hold else [*ids(*words), 2]
    async with client(host) as replica:
        yield Subject(
            replica.stub,
            "models/tiny",
            lambda: len(host.running),
            lambda: host.totals["tokens"],
            host.lose,
            host.tuned,
        )


Made = Callable[..., Any]


@pytest.fixture(params=[fake, real], ids=["fake", "replica"])
def engine(request: pytest.FixtureRequest) -> Made:
    return request.param  # type: ignore[no-any-return]


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        async for _ in call:
            pass
    return error.value


def usage_in(error: grpc.aio.AioRpcError) -> usage_pb2.Usage:
    return usage_pb2.Usage.FromString(dict(error.trailing_metadata() or ())[USAGE_KEY])  # type: ignore[arg-type]


async def test_event_order(engine: Made) -> None:
    async with engine(WORDS) as subject:
        events = await subject.events(subject.call())
        kinds = [event.WhichOneof("event") for event in events]
        assert kinds[0] == "started" and kinds[-1] == "completed"
        assert kinds.count("started") == kinds.count("completed") == kinds.count("output_finished") == 1
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        said = "".join(event.text.text for event in events if event.WhichOneof("event") == "text")
        assert said.replace(" ", "") == "helloworld"
        assert events[-1].completed.usage.input_tokens == events[0].started.prompt_tokens > 0


async def test_started_names_what_the_gateway_named(engine: Made) -> None:
    async with engine(WORDS) as subject:
        call = subject.call()
        started = (await subject.events(call))[0].started
        assert started.generation_id == call.generation_id and started.model.version == subject.model


async def test_a_limit_ends_with_length_and_is_counted(engine: Made) -> None:
    async with engine(["a"] * 8) as subject:
        events = await subject.events(subject.call(stopping=config_pb2.Stopping(max_output_tokens=3)))
        finished = next(event.output_finished for event in events if event.WhichOneof("event") == "output_finished")
        assert finished.reason == stream_pb2.FINISH_REASON_LENGTH
        assert events[-1].completed.usage.output_tokens == 3


async def test_metadata_at_admission_before_any_token(engine: Made) -> None:
    async with engine([], hold=True) as subject:
        call = subject.call()
        await call.initial_metadata()
        assert not call.done() and subject.output_tokens() == 0
        call.cancel()


async def test_outputs_are_told_apart(engine: Made) -> None:
    async with engine(WORDS) as subject:
        events = await subject.events(subject.call(sampling=config_pb2.Sampling(n=3)))
        ends = [event.output_finished.index for event in events if event.WhichOneof("event") == "output_finished"]
        assert sorted(ends) == [0, 1, 2]


async def test_an_abort_ends_cancelled_with_the_exact_usage(engine: Made) -> None:
    async with engine(WORDS, hold=True) as subject:
        call = subject.call()
        await call.initial_metadata()
        await subject.until(lambda: subject.output_tokens() >= 2)
        await subject.stub.Abort(engine_pb2.AbortRequest(generation_ids=[call.generation_id]), metadata=signed(), timeout=5)
        error = await failure(call)
        assert error.code() is grpc.StatusCode.CANCELLED
        usage = usage_in(error)
        assert usage.input_tokens > 0 and usage.output_tokens == subject.output_tokens()
        assert subject.running() == 0


async def test_an_abort_of_nothing_is_nothing(engine: Made) -> None:
    async with engine(WORDS) as subject:
        for _ in range(2):
            await subject.stub.Abort(engine_pb2.AbortRequest(generation_ids=[str(uuid.uuid4())]), metadata=signed(), timeout=5)


async def test_A5_a_hang_up_stops_the_engine(engine: Made) -> None:
    async with engine(WORDS, hold=True) as subject:
        call = subject.call()
        await subject.until(lambda: subject.output_tokens() >= 2)
        call.cancel()
        await subject.until(lambda: subject.running() == 0)


async def test_F4_a_lost_engine_is_unavailable_and_never_completed(engine: Made) -> None:
    async with engine(WORDS, hold=True) as subject:
        call = subject.call()
        await call.initial_metadata()
        await subject.until(lambda: subject.output_tokens() >= 2)
        subject.lose()
        assert (await failure(call)).code() is grpc.StatusCode.UNAVAILABLE


async def test_A2_more_than_the_room_is_refused_before_anything_starts(engine: Made) -> None:
    async with engine(WORDS) as subject:
        error = await failure(subject.call(stopping=config_pb2.Stopping(max_output_tokens=512)))
        info = error_info(error)
        assert info is not None and (error.code(), info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE")
        assert subject.output_tokens() == 0


async def test_A11_nobody_enters_unsigned(engine: Made) -> None:
    async with engine(WORDS) as subject:
        for metadata in ((), (("x-argosy-caller-bin", b"forged"),)):
            assert (await failure(subject.call(metadata=metadata))).code() is grpc.StatusCode.UNAUTHENTICATED
        assert subject.output_tokens() == 0


async def test_it_describes_itself_and_reports_its_load_at_once(engine: Made) -> None:
    async with engine(WORDS) as subject:
        info = await subject.stub.GetEngineInfo(engine_pb2.GetEngineInfoRequest(), metadata=signed(), timeout=5)
        assert info.model == subject.model and len(info.base_digest) == 64
        assert info.context_tokens == 512 and info.capabilities and info.embedding_dimensions and info.total_blocks
        loads = subject.stub.WatchLoad(engine_pb2.WatchLoadRequest(), metadata=signed(), timeout=10)
        load = await loads.read()
        assert not load.draining and load.running_sequences == 0
        loads.cancel()


async def test_a_classification_is_whole_and_counted(engine: Made) -> None:
    async with engine(WORDS) as subject:
        asked = language_pb2.ClassifyTextRequest(
            model=subject.model, texts=["hello", "world"], zero_shot=language_pb2.ZeroShotLabels(labels=["hello", "world"])
        )
        request = engine_pb2.EncodeRequest(
            generation_id=str(uuid.uuid4()),
            request_id=str(uuid.uuid4()),
            model=content_pb2.ServedModel(version=subject.model),
            classify=asked,
        )
        reply = await subject.stub.Encode(request, metadata=signed(), timeout=10)
        assert len(reply.classify.results) == 2
        for result in reply.classify.results:
            assert sum(score.probability for score in result.labels) == pytest.approx(1.0)
        assert reply.classify.usage.input_tokens > 0


async def test_tokens_are_counted_without_generating(engine: Made) -> None:
    async with engine(WORDS) as subject:
        request = generation_pb2.CountTokensRequest(model=subject.model, prompt="hello world")
        counted = await subject.stub.CountTokens(request, metadata=signed(), timeout=5)
        assert counted.tokens > 0 and counted.tokens + counted.room == 512
        assert subject.output_tokens() == 0


# --- adapters -----------------------------------------------------------------------------------------------------------------------

ADAPTER = "ad" * 32
OTHER = dataclasses.replace(CALLER, project_uid="p-2", project="evil")


def reason(error: grpc.aio.AioRpcError) -> str:
    info = error_info(error)
    return info.reason if info is not None else error.code().name


async def prefetch(subject: Subject, digest: str = ADAPTER, metadata: Any = None) -> engine_pb2.PrefetchAdapterResponse:
    request = engine_pb2.PrefetchAdapterRequest(adapter_digest=digest)
    reply: engine_pb2.PrefetchAdapterResponse = await subject.stub.PrefetchAdapter(request, metadata=metadata or signed(), timeout=5)
    return reply


async def held(subject: Subject, metadata: Any = None) -> list[str]:
    reply = await subject.stub.ListAdapters(engine_pb2.ListAdaptersRequest(), metadata=metadata or signed(), timeout=5)
    return [adapter.adapter_digest for adapter in reply.adapters]


async def test_an_adapter_is_loaded_listed_and_evicted(engine: Made) -> None:
    async with engine(WORDS) as subject:
        subject.store(CALLER.project_uid, ADAPTER)
        assert (await prefetch(subject)).adapter.adapter_digest == ADAPTER
        await prefetch(subject)  # safe to repeat
        assert await held(subject) == [ADAPTER]
        evict = engine_pb2.EvictAdapterRequest(adapter_digest=ADAPTER)
        for evicted in (True, False):
            assert (await subject.stub.EvictAdapter(evict, metadata=signed(), timeout=5)).evicted is evicted
        assert await held(subject) == []


async def test_a_call_with_an_adapter_names_it_and_leaves_it_loaded(engine: Made) -> None:
    async with engine(WORDS) as subject:
        subject.store(CALLER.project_uid, ADAPTER)
        events = await subject.events(subject.call(adapter=ADAPTER))
        assert events[0].started.model.adapter_digest == ADAPTER and events[-1].WhichOneof("event") == "completed"
        assert await held(subject) == [ADAPTER]


async def test_the_load_names_what_is_resident(engine: Made) -> None:
    async with engine(WORDS) as subject:
        subject.store(CALLER.project_uid, ADAPTER)
        await prefetch(subject)
        loads = subject.stub.WatchLoad(engine_pb2.WatchLoadRequest(), metadata=signed(), timeout=10)
        async with asyncio.timeout(10):
            while ADAPTER not in (await loads.read()).resident_adapters:
                pass
        loads.cancel()


async def test_A10_another_projects_adapter_is_as_unknown_as_a_random_one(engine: Made) -> None:
    async with engine(WORDS) as subject:
        subject.store(CALLER.project_uid, ADAPTER)
        await prefetch(subject)
        said = set()
        for digest in (ADAPTER, "00" * 32):
            error = await failure(subject.call(adapter=digest, metadata=signed(OTHER)))
            said.add((error.code(), reason(error), error.details()))
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await prefetch(subject, digest, signed(OTHER))
            said.add((refused.value.code(), reason(refused.value), refused.value.details()))
        assert {(code, why) for code, why, _ in said} == {(grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND")} and len(said) == 1
        assert await held(subject, signed(OTHER)) == [] and subject.output_tokens() == 0
        evict = engine_pb2.EvictAdapterRequest(adapter_digest=ADAPTER)
        assert not (await subject.stub.EvictAdapter(evict, metadata=signed(OTHER), timeout=5)).evicted
        assert await held(subject) == [ADAPTER]
