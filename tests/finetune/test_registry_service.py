import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest
from google.protobuf.duration_pb2 import Duration

from argosy.v1 import model_pb2
from argosy_internal.registry.v1 import registry_pb2 as pb
from services.chassis.errors import EventSequenceAhead, FieldInvalid, FieldOutOfRange, ResourceNotFound, WrongState
from services.finetune import sql_models
from services.finetune.feed import Feed, following
from services.finetune.servicers.registry import RegistryServicer
from tests.finetune.adapters import BASE, House, called, registry, tenant

NAME = "projects/news/models/titles"


def servicer(house: House, feed: Feed | None = None, *told: Any) -> RegistryServicer:
    return RegistryServicer(house.store, feed or Feed(), *told)


async def resolve(house: House, name: str, caller: Any = None) -> pb.ResolveModelResponse:
    with called(caller or house.caller):
        return await servicer(house).ResolveModel(pb.ResolveModelRequest(name=name), None)


async def test_a_name_means_prod_a_version_or_an_alias(finetune_url: str) -> None:
    async with registry(finetune_url) as house:
        first, second = await house.publish(labels=["a", "b"]), await house.publish(seed=1, privacy={"epsilon": 8.0, "accountant": "prv"})
        for name, number, alias in (
            (NAME, 1, f"{NAME}/aliases/prod"), (f"{NAME}/aliases/prod", 1, f"{NAME}/aliases/prod"), (f"{NAME}/versions/2", 2, ""),
        ):  # fmt: skip
            reply = await resolve(house, name)
            (target,) = reply.targets
            assert (target.percent, target.model.version, reply.alias) == (100, f"{NAME}/versions/{number}", alias)
            assert target.model.adapter_digest == (first, second)[number - 1].signed.digest
            assert (target.base_model, target.model.base_digest, target.private) == (BASE, "b" * 64, number == 2)
            assert list(target.tuned_labels) == (["a", "b"] if number == 1 else [])
            assert (model_pb2.MODEL_CAPABILITY_CLASSIFY_TUNED in target.capabilities) == (number == 1)
            assert reply.sequence == 4


async def test_a_split_alias_means_two_versions_the_stable_one_first(finetune_url: str) -> None:
    async with registry(finetune_url) as house:
        first = await house.publish()
        await house.publish(seed=1)
        async with house.store.transaction() as connection:
            await sql_models.point(connection, first.project_uid, first.model_uid, "prod", "MOVED", 1, 2, 10, actor="k")
        reply = await resolve(house, NAME)
        assert [(target.percent, target.model.version) for target in reply.targets] == [
            (90, f"{NAME}/versions/1"),
            (10, f"{NAME}/versions/2"),
        ]


async def test_without_prod_the_newest_version_answers(finetune_url: str) -> None:
    async with registry(finetune_url) as house:
        first = await house.publish()
        await house.publish(seed=1)
        async with house.store.transaction() as connection:
            row = await sql_models.alias(connection, first.project_uid, first.model_uid, "prod")
            assert row is not None
            await sql_models.drop_alias(connection, row, actor="k")
        reply = await resolve(house, NAME)
        assert (reply.targets[0].model.version, reply.alias) == (f"{NAME}/versions/2", "")


async def test_A10_foreign_unknown_and_absent_names_are_one_answer(finetune_url: str) -> None:
    async with registry(finetune_url) as house:
        await house.publish()
        stranger = tenant("other")
        twin = replace(stranger, project="news")  # the name alone opens nothing: rows are found by uid
        for caller, name in (
            (stranger, NAME), (twin, NAME), (house.caller, "projects/news/models/none"), (house.caller, f"{NAME}/versions/9"),
            (house.caller, f"{NAME}/aliases/none"),
        ):  # fmt: skip
            with pytest.raises(ResourceNotFound) as caught:
                await resolve(house, name, caller)
            assert caught.value.metadata == {"field": "name"}
        with pytest.raises(FieldInvalid):
            await resolve(house, "projects/news/models/titles/versions/1/x")


async def test_a_model_without_a_version_says_so(finetune_url: str) -> None:
    async with registry(finetune_url) as house:
        prepared = await house.prepared()
        for name in (NAME, prepared.name):
            with pytest.raises(WrongState):
                await resolve(house, name)


async def test_a_watch_replays_marks_and_goes_on_live(finetune_url: str) -> None:
    async with registry(finetune_url) as house, following(house.store) as feed:
        first = await house.publish()
        with called(tenant("fleet", "fleet")):
            watch = servicer(house, feed).WatchVersions(pb.WatchVersionsRequest(), None)
            async with aclosing(watch), asyncio.timeout(60):
                ready, moved, mark = [await anext(watch) for _ in range(3)]
                assert ready.ready.adapter_digest == first.signed.digest
                assert (ready.ready.version, ready.ready.project) == (first.name, "projects/news")
                assert (ready.ready.project_uid, ready.ready.base_digest) == (house.caller.project_uid, "b" * 64)
                assert ready.ready.ready_time.seconds > 0
                assert (moved.moved.model, moved.moved.alias) == (NAME, "")
                assert (mark.WhichOneof("event"), mark.sequence) == ("bookmark", 2)
                live = asyncio.create_task(anext(watch))
                second = await house.publish(seed=1)
                assert (await live).ready.version == second.name
            resumed = servicer(house, feed).WatchVersions(pb.WatchVersionsRequest(after_sequence=3), None)
            async with aclosing(resumed), asyncio.timeout(60):
                assert [(await anext(resumed)).WhichOneof("event") for _ in range(2)] == ["moved", "bookmark"]


async def test_a_cursor_past_the_end_is_refused(finetune_url: str) -> None:
    async with registry(finetune_url) as house:
        await house.publish()
        with called(house.caller), pytest.raises(EventSequenceAhead) as caught:
            await anext(servicer(house).WatchVersions(pb.WatchVersionsRequest(after_sequence=3), None))
        assert caught.value.metadata == {"last": "2"}


async def test_the_first_report_of_a_version_is_its_servable_time_and_its_jobs_event(finetune_url: str) -> None:
    told: list[Any] = []

    async def note(*said: Any) -> None:
        told.append(said[1:])

    async with registry(finetune_url) as house:
        job = str(uuid4())
        prepared = await house.publish(job=job)
        service = servicer(house, None, note)
        request = pb.ReportServableRequest(version=prepared.name, replicas=2, load=Duration(nanos=300_000_000))
        gateways = [house.caller, house.caller, replace(house.caller, key_id=str(uuid4()))]
        firsts = []
        for gateway in gateways:
            with called(gateway):
                firsts.append((await service.ReportServable(request, None)).first)
        assert firsts == [True, False, False]
        ((project_uid, job_uid, version, replicas, seconds),) = told
        assert (project_uid, job_uid, version, replicas) == (house.caller.project_uid, job, prepared.name, 2)
        async with house.store.transaction() as connection:
            row = await sql_models.version(connection, prepared.project_uid, prepared.model_uid, 1)
        assert row is not None
        assert seconds == 0.3
        assert row["servable_seconds"] == (row["servable_time"] - row["ready_time"]).total_seconds()


async def test_a_report_of_what_is_not_ready_or_not_there_is_refused(finetune_url: str) -> None:
    async with registry(finetune_url) as house:
        prepared = await house.prepared()
        for name, replicas, error in (
            (prepared.name, 1, WrongState), (f"{NAME}/versions/9", 1, ResourceNotFound), (prepared.name, 0, FieldOutOfRange),
        ):  # fmt: skip
            with called(house.caller), pytest.raises(error):
                await servicer(house).ReportServable(pb.ReportServableRequest(version=name, replicas=replicas), None)
