"""Own models through a real gateway: names, aliases, pinned digests, and adapters pushed to replicas that hold none."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest

from argosy.v1 import content_pb2, explanation_pb2, generation_pb2, language_pb2, model_pb2
from argosy_internal.registry.v1 import registry_pb2
from services.chassis.errors import Internal, WrongState
from services.chassis.identity import CallerVerifier
from services.chassis.status import error_info
from services.gateway import finetune, registry
from tests.fakes.edge import KEY, VERIFIER, Edge, caller, chat, edge, events_of, metadata
from tests.fakes.engine import FakeEngine, fake_engine
from tests.fakes.finetune import fake_finetune

BASE = "fa" * 32
ONE, TWO = "01" * 32, "02" * 32
MODEL = "projects/acme/models/m"
PROD = f"{MODEL}/aliases/prod"
TUNED = model_pb2.MODEL_CAPABILITY_CLASSIFY_TUNED


def target(version: int, adapter: str, percent: int = 100, **fields: Any) -> registry_pb2.ResolvedTarget:
    served = content_pb2.ServedModel(version=f"{MODEL}/versions/{version}", base_digest=BASE, adapter_digest=adapter)
    return registry_pb2.ResolvedTarget(percent=percent, model=served, base_model="models/fake", **fields)


def means(*targets: registry_pb2.ResolvedTarget, sequence: int = 0) -> registry_pb2.ResolveModelResponse:
    return registry_pb2.ResolveModelResponse(targets=targets, alias=PROD, sequence=sequence)


def ready(adapter: str, version: int = 1, ago_s: float = 0.0) -> dict[str, Any]:
    event = registry_pb2.VersionReady(
        project_uid="uid-acme",
        project="projects/acme",
        version=f"{MODEL}/versions/{version}",
        base_model="models/fake",
        base_digest=BASE,
        adapter_digest=adapter,
    )
    event.ready_time.FromSeconds(round(time.time() - ago_s))
    return {"ready": event}


@asynccontextmanager
async def tuned(*, engines: int = 1, says: Any = None, script: dict[str, Any] | None = None, **fields: Any) -> AsyncIterator[Any]:
    """(finetune, engines, gateway), every caller verified."""
    async with AsyncExitStack() as stack:
        fakes = [await stack.enter_async_context(fake_engine(says, verifier=VERIFIER, **(script or {}))) for _ in range(engines)]
        verifier = CallerVerifier({"k": KEY.public_key()}, finetune.AUDIENCE)
        fake = await stack.enter_async_context(fake_finetune(verifier=verifier))
        fake.names["uid-acme", MODEL] = fake.names["uid-acme", PROD] = means(target(1, ONE))
        at = await stack.enter_async_context(edge(*fakes, finetune=fake.address, **fields))
        await fake.until(lambda f: bool(f.of("WatchVersions")))
        yield fake, fakes, at


def refused(error: grpc.aio.AioRpcError) -> str:
    info = error_info(error)
    return info.reason if info is not None else error.code().name


async def say(at: Edge, model: str = PROD, project: str = "acme", sticky: str = "", **fields: Any) -> Any:
    keys = metadata(project) + ((("argosy-sticky-key", sticky),) if sticky else ())
    return await at.generation.Chat(chat(model=model, **fields), metadata=keys, timeout=5)


async def test_a_name_is_resolved_once_and_its_digest_carried_to_the_pod() -> None:
    async with tuned() as (fake, (engine,), at):
        for _ in range(3):
            reply = await say(at)
            assert (reply.started.model.version, reply.started.model.adapter_digest) == (f"{MODEL}/versions/1", ONE)
        assert {call.request.model.adapter_digest for call in engine.calls} == {ONE}
        assert {call.request.model.base_digest for call in engine.calls} == {BASE}
        (asked,) = fake.of("ResolveModel")
        assert (asked.caller.project_uid, asked.caller.project, asked.request.name) == ("uid-acme", "acme", PROD)


async def test_F11_a_stream_ends_on_the_version_it_began_with() -> None:
    async with tuned(says=["a", " b", " c"], script={"gate": asyncio.Semaphore(1)}) as (fake, (engine,), at):
        stream = at.generation.StreamChat(chat(model=PROD), metadata=metadata(), timeout=10)
        first = [await stream.read(), await stream.read()]
        fake.names["uid-acme", PROD] = means(target(2, TWO), sequence=1)
        fake.tell(moved=registry_pb2.AliasMoved(project_uid="uid-acme", model=MODEL, alias=PROD))
        await fake.until(lambda f: bool(f.feed))
        for _ in range(2):
            engine.gate.release()
        rest = []
        while (event := await stream.read()) is not grpc.aio.EOF:
            rest.append(event)
        assert first[0].started.model.adapter_digest == ONE
        assert rest[-1].WhichOneof("event") == "completed"
        assert engine.calls[0].request.model.adapter_digest == ONE
        for _ in range(3):
            engine.gate.release()
        async with asyncio.timeout(5):
            while (await _released(engine, at)).started.model.adapter_digest != TWO:
                await asyncio.sleep(0)


async def _released(engine: FakeEngine, at: Edge) -> Any:
    for _ in range(3):
        engine.gate.release()  # type: ignore[union-attr]
    return await say(at)


async def test_a_told_move_is_followed_at_once() -> None:
    async with tuned() as (fake, _, at):
        await say(at)
        fake.names["uid-acme", PROD] = means(target(2, TWO), sequence=1)
        fake.tell(moved=registry_pb2.AliasMoved(project_uid="uid-acme", model=MODEL, alias=PROD))
        async with asyncio.timeout(1.5):  # below the 2 s for which an answer is fresh
            while (await say(at)).started.model.adapter_digest != TWO:
                await asyncio.sleep(0.01)


async def test_a_split_follows_the_sticky_key() -> None:
    async with tuned() as (fake, _, at):
        fake.names["uid-acme", PROD] = means(target(1, ONE, 60), target(2, TWO, 40))
        drawn: Counter[str] = Counter()
        for number in range(40):
            replies = [await say(at, sticky=f"user-{number}") for _ in range(2)]
            versions = {reply.started.model.adapter_digest for reply in replies}
            assert len(versions) == 1
            drawn.update(versions)
        assert drawn[ONE] >= 10 and drawn[TWO] >= 5
        versions = {(await say(at)).started.model.adapter_digest for _ in range(40)}
        assert versions == {ONE, TWO}  # without a key each request draws for itself
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await say(at, sticky="x" * 129)
        assert refused(error.value) == "METADATA_INVALID"


async def test_A10_foreign_and_random_names_are_the_same_bytes() -> None:
    """Own models, versions and aliases, by every method that takes a model."""
    async with tuned(callers={"acme": caller(), "evil": caller("evil")}) as (fake, (engine,), at):
        said = set()
        for name in (MODEL, PROD, f"{MODEL}/versions/1", "projects/acme/models/none", "projects/none/models/m", "projects/evil/models/m"):
            for ask in _asks(at, name):
                with pytest.raises(grpc.aio.AioRpcError) as error:
                    await ask("evil")
                trailers = sorted((k, v) for k, v in error.value.trailing_metadata() or () if k not in ("request_id",))
                said.add((error.value.code(), error.value.details(), repr(trailers)))
        assert len(said) == 1 and next(iter(said))[0] is grpc.StatusCode.NOT_FOUND
        assert not engine.calls
        assert all(asked.caller.project == "evil" and asked.request.name == "projects/evil/models/m" for asked in fake.of("ResolveModel"))


def _asks(at: Edge, name: str) -> list[Any]:
    classify = language_pb2.ClassifyTextRequest(model=name, texts=["x"])
    explain = explanation_pb2.ExplainRequest(model=name, classify=explanation_pb2.ClassifyTarget(text="x"))
    count = generation_pb2.CountTokensRequest(model=name, prompt="x")
    return [
        lambda who: at.generation.Chat(chat(model=name), metadata=metadata(who), timeout=5),
        lambda who: at.generation.CountTokens(count, metadata=metadata(who), timeout=5),
        lambda who: at.language.ClassifyText(classify, metadata=metadata(who), timeout=5),
        lambda who: at.explanation.Explain(explain, metadata=metadata(who), timeout=5),
        lambda who: events_of(at.generation.StreamChat(chat(model=name), metadata=metadata(who), timeout=5)),
    ]


async def test_A10_a_keys_list_hides_own_models_too() -> None:
    listed = {"acme": caller(models=(MODEL,)), "other": caller(models=("models/fake",))}
    async with tuned(callers=listed) as (_, _engines, at):
        assert (await say(at, PROD)).started.model.adapter_digest == ONE  # its model is on the list
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await say(at, PROD, "other")
        assert refused(error.value) == "RESOURCE_NOT_FOUND"


async def test_a_head_classifies_and_writes_nothing() -> None:
    async with tuned(script={"labels": {TWO: ["tech", "sport"]}}) as (fake, _, at):
        fake.names["uid-acme", MODEL] = means(target(2, TWO, capabilities=[TUNED], tuned_labels=["tech", "sport"]))
        request = language_pb2.ClassifyTextRequest(model=MODEL, texts=["a", "b"])
        reply = await at.language.ClassifyText(request, metadata=metadata(), timeout=5)
        assert [label.label for label in reply.results[0].labels] == ["tech", "sport"] and reply.model.adapter_digest == TWO
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await say(at, MODEL)
        assert refused(error.value) == "MODEL_CAPABILITY"
        with pytest.raises(grpc.aio.AioRpcError) as error:  # and a version without one does not classify by it
            await at.language.ClassifyText(language_pb2.ClassifyTextRequest(model=PROD, texts=["a"]), metadata=metadata(), timeout=5)
        assert refused(error.value) == "MODEL_CAPABILITY"


async def test_a_base_has_no_head_whatever_its_engine_can_do_with_one() -> None:
    async with tuned(script={"capabilities": ("GENERATE", "CLASSIFY_TUNED")}) as (_, _engines, at):
        model = await at.models.GetModel(model_pb2.GetModelRequest(name="models/fake"), metadata=metadata(), timeout=5)
        assert TUNED not in model.capabilities
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await at.language.ClassifyText(
                language_pb2.ClassifyTextRequest(model="models/fake", texts=["a"]), metadata=metadata(), timeout=5
            )
        assert refused(error.value) == "MODEL_CAPABILITY"


async def test_an_explanation_is_billed_by_passes() -> None:
    async with tuned(script={"capabilities": ("GENERATE", "EXPLAIN")}) as (fake, (engine,), at):
        fake.names["uid-acme", MODEL] = means(target(2, TWO, tuned_labels=["tech", "sport"]))
        request = explanation_pb2.ExplainRequest(model=MODEL, classify=explanation_pb2.ClassifyTarget(text="chips are up"))
        reply = await at.explanation.Explain(request, metadata=metadata(), timeout=5)
        assert (len(reply.attributions), reply.usage.passes, reply.model.adapter_digest) == (3, 5, TWO)
        assert engine.calls[-1].request.explain == request


async def test_F15_what_a_name_meant_is_believed_while_finetune_is_away() -> None:
    async with tuned() as (fake, _, at):
        await say(at)
        await fake.kill()
        at.gate.names._meanings.moved("uid-acme", MODEL, 9)
        assert (await say(at)).started.model.adapter_digest == ONE
        with pytest.raises(grpc.aio.AioRpcError) as error:  # never asked for: nothing to believe
            await say(at, f"{MODEL}/versions/9")
        assert refused(error.value) == "STORE_UNAVAILABLE"
        assert (await say(at, "models/fake")).started.model.version == "models/fake"


async def test_a_finetune_that_hangs_costs_a_known_name_half_a_second() -> None:
    async with tuned() as (fake, _, at):
        await say(at)
        fake.hang.add("ResolveModel")
        at.gate.names._meanings.moved("uid-acme", MODEL, 9)
        assert (await at.generation.Chat(chat(model=PROD), metadata=metadata(), timeout=1.8)).started.model.adapter_digest == ONE


async def test_many_calls_for_one_name_ask_once() -> None:
    async with tuned() as (fake, _, at):
        await asyncio.gather(*(say(at) for _ in range(20)))
        assert len(fake.of("ResolveModel")) == 1


async def test_a_version_on_a_base_that_nobody_serves() -> None:
    async with tuned() as (fake, _, at):
        lost = target(1, ONE)
        lost.model.base_digest = "00" * 32
        fake.names["uid-acme", MODEL] = means(lost)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await say(at, MODEL)
        assert refused(error.value) == "MODEL_NOT_SERVED"


async def test_a_name_without_a_version_that_answers_says_so() -> None:
    async with tuned() as (fake, _, at):
        for refusal, reason in ((WrongState("name", "CHECKING"), "WRONG_STATE"), (Internal(), "STORE_UNAVAILABLE")):
            fake.replies["ResolveModel"] = refusal
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await say(at)
            assert refused(error.value) == reason


async def test_a_feed_that_began_anew_is_followed_from_its_end() -> None:
    async with tuned() as (fake, (engine,), _):
        for version in range(1, 4):
            fake.tell(**ready(ONE, version))
        await fake.until(lambda f: len(f.of("ReportServable")) == 3)
        await fake.server.stop(None)
        async with fake_finetune(address=fake.address, verifier=fake.verifier) as back:
            back.tell(**ready("0d" * 32))
            await back.until(lambda f: any(asked.request.after_sequence == 1 for asked in f.of("WatchVersions")))
            back.tell(**ready(TWO))
            await engine.until(lambda e: ("uid-acme", TWO) in e.adapters)


# --- the feed -----------------------------------------------------------------------------------------------------------------------


async def test_a_ready_version_is_loaded_everywhere_and_reported() -> None:
    async with tuned(engines=2) as (fake, engines, _):
        fake.tell(**ready(ONE))
        await fake.until(lambda f: any(asked.request.replicas == 2 for asked in f.of("ReportServable")))
        assert all(("uid-acme", ONE) in engine.adapters for engine in engines)
        (first,) = fake.of("ReportServable")  # one word, once every replica has it
        assert (first.request.version, first.request.replicas) == (f"{MODEL}/versions/1", 2)
        assert first.request.load.ToMilliseconds() == 250
        assert first.caller.project_uid == "uid-acme" and "fleet" in first.caller.scopes
        before = [call.caller for engine in engines for call in engine.calls]
        assert {who.project_uid for who in before} == {"uid-acme"}


async def test_one_replica_that_cannot_load_does_not_keep_the_other_from_serving() -> None:
    async with tuned(engines=2) as (fake, (broken, fine), _):
        broken.faults.unloadable.add(ONE)
        fake.tell(**ready(ONE))
        await fake.until(lambda f: bool(f.of("ReportServable")))
        assert ("uid-acme", ONE) in fine.adapters and not broken.adapters
        assert [asked.request.replicas for asked in fake.of("ReportServable")] == [1]  # those that hold it, not those that were asked


async def test_what_is_erased_is_evicted_and_forgotten() -> None:
    async with tuned(engines=2) as (fake, engines, at):
        fake.tell(**ready(ONE))
        await fake.until(lambda f: bool(f.of("ReportServable")))
        await say(at)
        del fake.names["uid-acme", PROD]
        fake.tell(
            erased=registry_pb2.VersionErased(
                project_uid="uid-acme", project="projects/acme", version=f"{MODEL}/versions/1", base_model="models/fake", adapter_digest=ONE
            )
        )
        for engine in engines:
            await engine.until(lambda e: not e.adapters)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await say(at)
        assert refused(error.value) == "RESOURCE_NOT_FOUND"


async def test_the_feed_goes_on_where_it_broke() -> None:
    async with tuned() as (fake, (engine,), _):
        fake.tell(**ready(ONE))
        await engine.until(lambda e: bool(e.adapters))
        await fake.server.stop(None)
        async with fake_finetune(address=fake.address, verifier=fake.verifier, feed=fake.feed) as back:
            back.tell(**ready(TWO, 2))
            await engine.until(lambda e: ("uid-acme", TWO) in e.adapters)
            assert [asked.request.after_sequence for asked in back.of("WatchVersions")][-1] == 1
            assert Counter(call.request.adapter_digest for call in engine.calls if call.method == "PrefetchAdapter")[ONE] == 1


async def test_a_change_that_is_not_understood_does_not_end_the_feed(monkeypatch: pytest.MonkeyPatch) -> None:
    take = registry.Pusher._take

    def failing(self: Any, event: registry_pb2.VersionEvent) -> None:
        if event.WhichOneof("event") == "ready" and event.ready.adapter_digest == ONE:
            raise ValueError("no such change")
        take(self, event)

    monkeypatch.setattr(registry.Pusher, "_take", failing)
    async with tuned() as (fake, (engine,), _):
        fake.tell(**ready(ONE))
        fake.tell(**ready(TWO, 2))
        await engine.until(lambda e: ("uid-acme", TWO) in e.adapters)
        assert ("uid-acme", ONE) not in engine.adapters


async def test_a_gateway_that_starts_pushes_only_what_may_have_been_missed() -> None:
    async with fake_finetune() as fake, fake_engine() as engine:
        fake.tell(**ready("0d" * 32, 1, ago_s=86_400))
        fake.tell(**ready("0e" * 32, 2, ago_s=5))
        async with edge(engine, finetune=fake.address):
            await fake.until(lambda f: bool(f.of("ReportServable")))
            assert [digest for _, digest in engine.adapters] == ["0e" * 32]


async def test_calls_meet_where_the_adapter_is() -> None:
    async with tuned(engines=3) as (_, engines, at):
        engines[1].adapters["uid-acme", ONE] = []
        engines[1].changed()
        async with asyncio.timeout(5):
            while not any(ONE in link.replica.load.adapters for link in at.replicas.links):
                await at.replicas.judged()
        for number in range(6):
            await say(at, text=f"question {number}")
        assert [len(engine.calls) for engine in engines] == [0, 6, 0]


async def test_two_gateways_push_the_same_version_and_nothing_comes_twice() -> None:
    async with tuned(engines=2) as (fake, engines, _), edge(*engines, finetune=fake.address):
        await fake.until(lambda f: len(f.of("WatchVersions")) == 2)
        fake.tell(**ready(ONE))
        await fake.until(lambda f: len(f.of("ReportServable")) == 2)
        assert {asked.request.replicas for asked in fake.of("ReportServable")} == {2}
        assert all([digest for _, digest in engine.adapters] == [ONE] for engine in engines)
