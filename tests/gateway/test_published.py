"""From a published version to its first answer: gateway and finetune as they are, over engines that are told what to say."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import grpc
import pytest

from argosy.v1 import language_pb2, model_pb2
from services.chassis.errors import DOMAIN
from services.chassis.identity import Caller, CallerVerifier
from services.chassis.status import error_info
from services.finetune import sql_models
from services.finetune.server import finetune
from services.finetune.settings import FineTuneSettings
from services.gateway.access import SCOPES
from services.gateway.finetune import AUDIENCE
from tests.fakes.edge import KEY, VERIFIER, Edge, caller, chat, edge, metadata
from tests.fakes.engine import FakeEngine, fake_engine
from tests.finetune.adapters import BASE, House, registry

MODEL = "projects/news/models/titles"
PROD = f"{MODEL}/aliases/prod"


@dataclass
class Town:
    """A gateway, its engines, and the registry behind it."""

    house: House
    engines: list[FakeEngine]
    at: Edge

    async def holds(self, digest: str) -> None:
        """Wait until every engine has the adapter."""
        for engine in self.engines:
            await engine.until(lambda e: any(held == digest for _, held in e.adapters))


@asynccontextmanager
async def town(url: str, engines: int = 2, **script: object) -> AsyncIterator[Town]:
    """Callers `news`, whose the models are, and `evil`."""
    async with AsyncExitStack() as stack:
        house = await stack.enter_async_context(registry(url))
        behind = await stack.enter_async_context(
            finetune(
                FineTuneSettings(database_url=url, store_url="memory://"),
                store=house.store,
                objects=house.objects,
                verifier=CallerVerifier({"k": KEY.public_key()}, AUDIENCE),
            )
        )
        fakes = [
            await stack.enter_async_context(fake_engine(model=BASE, digest="b" * 64, verifier=VERIFIER, **script)) for _ in range(engines)
        ]
        callers = {
            "news": owner(house),
            "evil": caller("evil", project_uid=house.caller.key_id),
        }
        yield Town(house, fakes, await stack.enter_async_context(edge(*fakes, finetune=behind.address, callers=callers)))


def owner(house: House) -> Caller:
    """The house's tenant at the gateway, where each call gets a request id of its own."""
    return replace(house.caller, scopes=SCOPES, kv_scope="00" * 32, request_id="")


async def adapter_of(town: Town, model: str = MODEL) -> str:
    reply = await town.at.generation.Chat(chat(model=model), metadata=metadata("news"), timeout=10)
    return str(reply.started.model.adapter_digest)


async def test_a_published_version_is_pushed_reported_and_answers(finetune_url: str) -> None:
    async with town(finetune_url) as here:
        published = await here.house.publish()
        await here.holds(published.signed.digest)
        assert await adapter_of(here) == published.signed.digest
        async with asyncio.timeout(10):
            while True:
                asked = model_pb2.GetModelVersionRequest(name=f"{MODEL}/versions/1")
                version = await here.at.models.GetModelVersion(asked, metadata=metadata("news"), timeout=5)
                if version.HasField("servable_time"):
                    break
                await asyncio.sleep(0.02)
        assert version.adapter_digest == published.signed.digest
        model = await here.at.models.GetModel(model_pb2.GetModelRequest(name=MODEL), metadata=metadata("news"), timeout=5)
        assert (model.default_version, model.context_tokens, model.ready_replicas) == (f"{MODEL}/versions/1", 4_096, 2)
        listed = await here.at.models.ListModels(model_pb2.ListModelsRequest(), metadata=metadata("news"), timeout=5)
        assert [model.name for model in listed.models] == [BASE, MODEL]


async def test_a_head_is_asked_by_its_models_name(finetune_url: str) -> None:
    async with town(finetune_url, 1) as here:
        published = await here.house.publish(labels=["tech", "sport"])
        here.engines[0].labels[published.signed.digest] = ["tech", "sport"]
        await here.holds(published.signed.digest)
        asked = language_pb2.ClassifyTextRequest(model=MODEL, texts=["chips"])
        reply = await here.at.language.ClassifyText(asked, metadata=metadata("news"), timeout=10)
        assert [score.label for score in reply.results[0].labels] == ["tech", "sport"]
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await adapter_of(here)
        info = error_info(error.value)
        assert info is not None and (info.domain, info.reason) == (DOMAIN, "MODEL_CAPABILITY")


async def test_F11_an_alias_that_is_moved_back_and_forth_is_followed(finetune_url: str) -> None:
    async with town(finetune_url) as here:
        first, second = await here.house.publish(), await here.house.publish(seed=1)
        digests = {1: first.signed.digest, 2: second.signed.digest}
        assert await adapter_of(here, PROD) == digests[1]
        for number in (2, 1, 2):
            move = model_pb2.MoveModelAliasRequest(name=PROD, version=f"{MODEL}/versions/{number}", force=True)
            await here.at.models.MoveModelAlias(move, metadata=metadata("news"), timeout=10)
            async with asyncio.timeout(5):
                while await adapter_of(here, PROD) != digests[number]:
                    await asyncio.sleep(0.01)
        assert await adapter_of(here, f"{MODEL}/versions/1") == digests[1]


async def test_A10_a_published_name_is_nobody_elses(finetune_url: str) -> None:
    async with town(finetune_url, 1) as here:
        await here.house.publish()
        said = set()
        for name in (MODEL, PROD, f"{MODEL}/versions/1", "projects/news/models/none", "projects/evil/models/titles"):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await here.at.generation.Chat(chat(model=name), metadata=metadata("evil"), timeout=10)
            said.add((error.value.code(), error.value.details(), str(error_info(error.value))))
        assert len(said) == 1


async def test_a_gateway_that_comes_later_follows_a_split(finetune_url: str) -> None:
    async with registry(finetune_url) as house:
        first = await house.publish()
        second = await house.publish(seed=1)
        async with house.store.transaction() as connection:
            await sql_models.point(connection, first.project_uid, first.model_uid, "prod", "MOVED", 1, 2, 50, actor="k")
        async with (
            finetune(
                FineTuneSettings(database_url=finetune_url, store_url="memory://"),
                store=house.store,
                objects=house.objects,
                verifier=CallerVerifier({"k": KEY.public_key()}, AUDIENCE),
            ) as behind,
            fake_engine(model=BASE, digest="b" * 64, verifier=VERIFIER) as engine,
            edge(engine, finetune=behind.address, callers={"news": owner(house)}) as at,
        ):
            here = Town(house, [engine], at)
            assert {await adapter_of(here) for _ in range(40)} == {first.signed.digest, second.signed.digest}
