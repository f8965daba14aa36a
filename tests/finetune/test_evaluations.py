import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import text

from argosy.v1 import model_pb2 as pb
from services.chassis import signing
from services.chassis.errors import FieldInvalid, GateNotPassed, QuotaExceeded, ResourceNotFound, WrongState
from services.chassis.lists import PageTokens
from services.chassis.objects import open_objects
from services.finetune import publishing, sql_charges, sql_evaluations
from services.finetune.bases import Bases, linear_layers
from services.finetune.evaluations import Evaluators, Measured, MeasurerDied, ProcessHost
from services.finetune.examining import Task
from services.finetune.gate import Outcomes
from services.finetune.lineage import ADAPTER, HEAD
from services.finetune.publishing import Origin
from services.finetune.servicers import model_evaluations
from services.finetune.servicers.model import ModelServicer
from services.finetune.servicers.resources import Desk
from services.finetune.store import open_store
from tests.finetune.adapters import BASE, SIGNER, House, called, file, lora, manifest
from tests.finetune.held_out import dataset_version
from tests.finetune.trainer import world

NAME = "projects/news/models/titles"
LABELS = ["sport", "tech"]


@dataclass
class Host:
    """Says how many of 100 rows each model gets right; may be told to die or to wait first."""

    right: dict[str, int] = field(default_factory=dict)
    dies: int = 0
    started: asyncio.Event = field(default_factory=asyncio.Event)
    go: asyncio.Event | None = None
    tasks: list[Task] = field(default_factory=list)

    async def __call__(self, task: Task, progress: Callable[[int], Awaitable[bool]]) -> Measured | None:
        self.tasks.append(task)
        self.started.set()
        if self.go is not None:
            await self.go.wait()
        if self.dies:
            self.dies -= 1
            raise MeasurerDied
        if not await progress(50):
            return None
        values = {each.name: tuple(float(row < self.right[each.name]) for row in range(100)) for each in task.examinees}
        return Measured(outcomes={name: Outcomes(found) for name, found in values.items()})


@dataclass
class Service:
    house: House
    evaluators: Evaluators
    servicer: ModelServicer
    host: Host

    async def __call__(self, method: str, **fields: Any) -> Any:
        with called(self.house.caller):
            return await getattr(self.servicer, method)(getattr(pb, f"{method}Request")(**fields), None)

    async def evaluation(self, candidate: int, held_out: str, **fields: Any) -> pb.Evaluation:
        asked = pb.Evaluation(candidate=f"{NAME}/versions/{candidate}", dataset_version=held_out, **fields)
        return await self("CreateEvaluation", parent=NAME, evaluation=asked)


@asynccontextmanager
async def serving(url: str, tmp_path: Path, base: Path) -> AsyncIterator[Service]:
    async with open_store(url, wait=True) as store:
        store_url = f"file://{tmp_path}/objects"
        objects = open_objects(store_url)
        house, host, bases = House(store, objects), Host(), Bases([f"tiny={base}"], str(tmp_path / "cache"))
        evaluators = Evaluators(store, store_url, bases, SIGNER, host, objects)
        servicer = ModelServicer(Desk(store, PageTokens(b"t" * 32)), objects, bases, SIGNER, evaluate=evaluators.wake)
        try:
            yield Service(house, evaluators, servicer, host)
        finally:
            objects.close()


def trained(number: int = 1) -> list[dict[str, str]]:
    return [{"dataset_version": f"projects/news/datasets/train/versions/{number}", "sha256": "a" * 64, "use": "train"}]


@pytest.fixture
async def service(finetune_url: str, tmp_path: Path, base: Path) -> AsyncIterator[Service]:
    """Two versions of one model, trained on rows that the held-out ones are not among."""
    async with serving(finetune_url, tmp_path, base) as service:
        await dataset_version(service.house, "train", 1, world.classify_rows(40, seed=1))
        await dataset_version(service.house, "held", 1, b'{"text": "goal in the last minute", "label": "sport"}\n')
        for seed in (1, 2):
            await service.house.publish(seed=seed, labels=LABELS, datasets=trained())
        yield service


HELD = "projects/news/datasets/held/versions/1"


async def test_T11_the_gate_keeps_a_worse_model_out(service: Service) -> None:
    asked = await service.evaluation(2, HELD)
    assert (asked.state, asked.target, asked.alias) == (pb.Evaluation.STATE_QUEUED, f"{NAME}/versions/1", "prod")
    service.host.right = {"candidate": 70, "current": 80, "base": 20}
    assert await service.evaluators.step()
    ended = await service("GetEvaluation", name=asked.name)
    assert (ended.state, ended.measured_rows) == (pb.Evaluation.STATE_NOT_PASSED, 100)
    assert {score.model: score.value for score in ended.scores} == {f"{NAME}/versions/2": 0.7, f"{NAME}/versions/1": 0.8, BASE: 0.2}
    assert {each.against: (each.passed, round(each.gain, 6), each.test) for each in ended.comparisons} == {
        f"{NAME}/versions/1": (False, -0.1, "mcnemar_exact"), BASE: (True, 0.5, "mcnemar_exact"),
    }  # fmt: skip
    with pytest.raises(GateNotPassed):
        await service("MoveModelAlias", name=f"{NAME}/aliases/prod", version=f"{NAME}/versions/2", evaluation=asked.name)
    service.host.right = {"candidate": 95, "current": 80, "base": 20}
    better = await service.evaluation(2, HELD, margin=0.1)
    assert await service.evaluators.step()
    assert not await service.evaluators.step()
    assert (await service("GetEvaluation", name=better.name)).state == pb.Evaluation.STATE_PASSED
    await service("MoveModelAlias", name=f"{NAME}/aliases/prod", version=f"{NAME}/versions/2", evaluation=better.name)
    assert (await service("GetModel", name=NAME)).default_version == f"{NAME}/versions/2"
    listed = await service("ListEvaluations", parent=NAME, filter="state = PASSED")
    assert [each.name for each in listed.evaluations] == [better.name]


async def test_the_verdict_is_signed_about_the_candidates_digest(service: Service) -> None:
    asked = await service.evaluation(2, HELD)
    service.host.right = {"candidate": 95, "current": 80, "base": 20}
    await service.evaluators.step()
    ended = await service("GetEvaluation", name=asked.name)
    payload = signing.unseal(ended.signed_verdict.encode(), SIGNER.keys(), signing.IN_TOTO)
    said, subjects = signing.predicate_of(payload, signing.GATE_VERDICT)
    version = await service("GetModelVersion", name=f"{NAME}/versions/2")
    assert subjects[f"{NAME}/versions/2"] == version.adapter_digest
    assert (said["evaluation"], said["verdict"]["passed"], said["current"]) == (asked.name, True, f"{NAME}/versions/1")


async def test_V12_held_out_rows_nearly_alike_trained_ones_are_counted_and_signed(service: Service) -> None:
    long = "the river rose over the market square at night and the council closed both bridges until the morning after the storm had gone"
    await dataset_version(service.house, "train", 2, json.dumps({"text": long, "label": "tech"}).encode() + b"\n")
    await service.house.publish(seed=3, labels=LABELS, datasets=trained(2))
    rows = (f"{long} by", "nothing like it", f"{long} at last")
    held = await dataset_version(
        service.house, "held", 2, b"".join(json.dumps({"text": text, "label": "tech"}).encode() + b"\n" for text in rows)
    )
    service.host.right = {"candidate": 95, "current": 80, "base": 20}
    for number, near in ((3, 2), (2, 0)):
        asked = await service.evaluation(number, held)
        await service.evaluators.step()
        ended = await service("GetEvaluation", name=asked.name)
        assert ended.near_rows == near
        payload = signing.unseal(ended.signed_verdict.encode(), SIGNER.keys(), signing.IN_TOTO)
        assert signing.predicate_of(payload, signing.GATE_VERDICT)[0]["verdict"]["near_rows"] == near


async def test_T11_rows_that_a_compared_version_was_trained_on_are_refused(service: Service) -> None:
    rows = world.classify_rows(40, seed=1).splitlines(keepends=True)
    relabelled = json.dumps({"text": json.loads(rows[3])["text"], "label": "other"}).encode() + b"\n"
    shared = await dataset_version(service.house, "held", 2, b'{"text": "x", "label": "tech"}\n' + relabelled)
    with pytest.raises(FieldInvalid) as caught:
        await service.evaluation(2, shared)
    assert caught.value.metadata == {"field": "evaluation.dataset_version", "rule": "trained_on"}
    assert (await service("ListEvaluations", parent=NAME)).evaluations == []


async def test_an_evaluation_of_what_does_not_fit_is_refused(service: Service) -> None:
    chats = await dataset_version(service.house, "chats", 1, world.chat_rows(2), "chat")
    for held_out, candidate, error in (
        (chats, 2, FieldInvalid), ("projects/news/datasets/none/versions/1", 2, ResourceNotFound), (HELD, 9, ResourceNotFound),
        ("projects/other/datasets/held/versions/1", 2, ResourceNotFound),
    ):  # fmt: skip
        with pytest.raises(error):
            await service.evaluation(candidate, held_out)
    checking = await service.house.prepared(seed=8, labels=LABELS)
    with pytest.raises(WrongState):
        await service.evaluation(checking.number, HELD)
    chatting = await service.house.publish(seed=9, datasets=trained())
    with pytest.raises(FieldInvalid):
        await service.evaluation(chatting.number, HELD)


async def test_the_first_version_is_measured_against_the_base_alone(service: Service) -> None:
    asked = await service.evaluation(1, HELD, alias="beta")
    assert asked.target == ""
    service.host.right = {"candidate": 90, "base": 20}
    await service.evaluators.step()
    assert [each.name for each in service.host.tasks[-1].examinees] == ["candidate", "base"]
    moved = await service("MoveModelAlias", name=f"{NAME}/aliases/beta", version=f"{NAME}/versions/1", evaluation=asked.name)
    assert moved.history[0].evaluation == asked.name


async def test_a_stopped_service_gives_the_work_back_and_another_ends_it(service: Service) -> None:
    asked = await service.evaluation(2, HELD)
    service.host.right = {"candidate": 95, "current": 80, "base": 20}
    service.host.go = asyncio.Event()
    running = asyncio.create_task(service.evaluators.run())
    await service.host.started.wait()
    assert (await service("GetEvaluation", name=asked.name)).state == pb.Evaluation.STATE_RUNNING
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert (await service("GetEvaluation", name=asked.name)).state == pb.Evaluation.STATE_QUEUED
    service.host.go = None
    assert await service.evaluators.step()
    assert (await service("GetEvaluation", name=asked.name)).state == pb.Evaluation.STATE_PASSED


async def test_a_dead_service_leaves_a_lease_that_runs_out_and_its_late_word_counts_for_nothing(service: Service) -> None:
    asked = await service.evaluation(2, HELD)
    async with service.house.store.transaction() as connection:
        dead = await sql_evaluations.claim(connection)
        assert dead is not None
        assert await sql_evaluations.claim(connection) is None
        await connection.execute(text("UPDATE model_evaluations SET lease_time = clock_timestamp()"))
    service.host.right = {"candidate": 95, "current": 80, "base": 20}
    assert await service.evaluators.step()
    async with service.house.store.transaction() as connection:
        assert not await sql_evaluations.renew(connection, dead, 1)
        assert not await sql_evaluations.end(connection, dead, "NOT_PASSED")
    assert (await service("GetEvaluation", name=asked.name)).state == pb.Evaluation.STATE_PASSED


async def test_an_evaluation_whose_process_keeps_dying_fails(service: Service) -> None:
    asked = await service.evaluation(2, HELD)
    service.host.dies = 9
    for _ in range(sql_evaluations.ATTEMPTS):
        assert await service.evaluators.step()
    assert await service.evaluators.step()  # says so
    ended = await service("GetEvaluation", name=asked.name)
    assert ended.state == pb.Evaluation.STATE_FAILED
    assert ended.error.message
    assert len(service.host.tasks) == sql_evaluations.ATTEMPTS


async def test_a_project_cannot_fill_the_queue_that_all_share(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_evaluations, "MOST_WAITING", 2)
    for _ in range(2):
        await service.evaluation(2, HELD)
    with pytest.raises(QuotaExceeded):
        await service.evaluation(2, HELD)
    service.host.right = {"candidate": 95, "current": 80, "base": 20}
    assert await service.evaluators.step()
    await service.evaluation(2, HELD)


async def test_an_evaluation_ends_with_the_version_it_was_about(service: Service) -> None:
    asked = await service.evaluation(2, HELD)
    await service("DeleteModelVersion", name=f"{NAME}/versions/2")
    assert (await service("GetEvaluation", name=asked.name)).state == pb.Evaluation.STATE_FAILED
    assert not await service.evaluators.step()


async def test_a_real_process_measures_a_trained_classifier(finetune_url: str, tmp_path: Path, base: Path) -> None:
    async with serving(finetune_url, tmp_path, base) as service:
        service.evaluators.host = ProcessHost()
        service.evaluators.threads = 1
        modules = linear_layers(base)
        targets = {path: shape for path, shape in modules.items() if path.endswith("q_proj")}
        width = next(iter(targets.values()))[1]
        parts = {ADAPTER: file(lora(1, 2, targets)), HEAD: file(classifier(width))}
        said = manifest(service.house.caller.project_uid, NAME, parts, labels=LABELS, targets=["q_proj"], max_tokens=96)
        prefix = await service.house.put(parts)
        await publishing.verify(service.house.objects, said, prefix, modules)
        prepared = await publishing.prepare(service.house.store, service.house.objects, SIGNER, said, prefix, Origin("IMPORT"))
        async with service.house.store.transaction() as connection:
            await publishing.publish(connection, prepared)
        held_out = await dataset_version(service.house, "held", 1, world.classify_rows(20))
        asked = await service.evaluation(1, held_out, alias="beta")
        assert await service.evaluators.step()
        ended = await service("GetEvaluation", name=asked.name)
        assert ended.state in (pb.Evaluation.STATE_PASSED, pb.Evaluation.STATE_NOT_PASSED)
        scores = {score.model: score.value for score in ended.scores}
        assert scores[f"{NAME}/versions/1"] == 0.5  # it always says `sport`
        assert ended.measured_rows == 20


def classifier(width: int) -> dict[str, Any]:
    return {"weight": np.zeros((2, width), np.float32), "bias": np.array([1.0, 0.0], np.float32)}


async def test_I4_an_evaluation_owes_once_for_the_process_that_ended_it(service: Service) -> None:
    service.evaluators.nanos_per_second = 1_000_000_000
    service.host.right = {"candidate": 95, "current": 80, "base": 20}
    service.host.dies = 1  # what died on the way is ours to pay
    asked = await service.evaluation(2, HELD)
    assert await service.evaluators.step()
    assert await service.evaluators.step()
    async with service.house.store.transaction() as connection:
        (owed,) = [row for row in await sql_charges.after(connection, 0, 1_000) if row["work_uid"] == asked.uid]
    assert (owed["kind"], owed["number"], owed["outcome"], owed["key_id"]) == ("EVALUATION", 1, "DONE", service.house.caller.key_id)
    assert (owed["model"], owed["version"]) == (NAME, f"{NAME}/versions/2")
    assert owed["nanos"] == sql_charges.nanos_of(owed["device_seconds"], 1_000_000_000) > 0
