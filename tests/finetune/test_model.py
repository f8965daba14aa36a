from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest
from google.protobuf.field_mask_pb2 import FieldMask
from sqlalchemy import text

from argosy.v1 import model_pb2 as pb
from services.chassis import signing
from services.chassis.errors import (
    EtagMismatch,
    FieldInvalid,
    GateNotPassed,
    HasDependants,
    IdempotencyKeyReused,
    PageTokenInvalid,
    ResourceExists,
    ResourceNotFound,
    ScopeMissing,
    WrongState,
)
from services.chassis.lists import PageTokens
from services.finetune import lineage, sql_evaluations, sql_models
from services.finetune.bases import Bases
from services.finetune.erasing import Eraser
from services.finetune.model_erasure import ModelDependants
from services.finetune.servicers.model import ModelServicer
from services.finetune.servicers.resources import Desk
from services.finetune.settings import DatasetSettings
from tests.finetune.adapters import BASE, SIGNER, House, called, registry, tenant

NAME = "projects/news/models/titles"
PROD = f"{NAME}/aliases/prod"


class Jobs:
    """Jobs that would publish into a model."""

    def __init__(self, *models: str) -> None:
        self.models = set(models)

    async def of_model(self, connection: Any, project_uid: str, model: str) -> bool:
        return model in self.models

    async def cancel_of_model(self, connection: Any, project_uid: str, model: str) -> None:
        self.models.discard(model)


class Service:
    """Calls of a tenant: `await service("GetModel", name=…)`."""

    def __init__(self, house: House, jobs: Jobs | None = None) -> None:
        self.house = house
        self.caller = house.caller
        self.erasures = 0
        self.servicer = ModelServicer(
            Desk(house.store, PageTokens(b"t" * 32)), house.objects, Bases(["tiny=nowhere"]), SIGNER, jobs, self._erase
        )

    def _erase(self) -> None:
        self.erasures += 1

    async def __call__(self, method: str, *, caller: Any = None, **fields: Any) -> Any:
        with called(caller or self.caller):
            return await getattr(self.servicer, method)(getattr(pb, f"{method}Request")(**fields), None)

    async def passed(self, candidate: int, current: int | None, state: str = "PASSED", alias: str = "prod") -> str:
        async with self.house.store.transaction() as connection:
            model = await sql_models.model(connection, self.caller.project_uid, "titles")
            assert model is not None
            row = await sql_evaluations.add_evaluation(
                connection, self.caller.project_uid, model["uid"], candidate=candidate, current=current, alias=alias, metric="ACCURACY",
                dataset_version="projects/news/datasets/d/versions/1", dataset_version_uid=str(uuid4()), dataset_digest="d" * 64,
                margin=0.0, seed=0, state=state,
            )  # fmt: skip
        return f"{NAME}/evaluations/{row['uid']}"


@asynccontextmanager
async def serving(url: str, jobs: Jobs | None = None) -> AsyncIterator[Service]:
    async with registry(url) as house:
        yield Service(house, jobs)


def made(model: pb.Model) -> tuple[str, str, str, dict[str, str]]:
    return model.name, model.display_name, model.base_model, dict(model.labels)


async def test_a_model_is_made_read_changed_and_listed(finetune_url: str) -> None:
    async with serving(finetune_url) as service:
        asked = pb.Model(base_model=BASE, display_name="Titles", labels={"team": "a"})
        model = await service("CreateModel", parent="projects/news", model_id="titles", model=asked)
        assert made(model) == (NAME, "Titles", BASE, {"team": "a"})
        assert (model.default_version, list(model.capabilities)) == ("", [])
        assert await service("GetModel", name=NAME) == model
        changed = await service(
            "UpdateModel", model=pb.Model(name=NAME, display_name="T", etag=model.etag), update_mask=FieldMask(paths=["display_name"])
        )
        assert made(changed) == (NAME, "T", BASE, {"team": "a"})
        assert changed.etag != model.etag
        with pytest.raises(EtagMismatch):
            await service("UpdateModel", model=pb.Model(name=NAME, display_name="U", etag=model.etag))
        with pytest.raises(FieldInvalid):
            await service("UpdateModel", model=pb.Model(name=NAME), update_mask=FieldMask(paths=["base_model"]))
        cleared = await service("UpdateModel", model=pb.Model(name=NAME), update_mask=FieldMask(paths=["*"]))
        assert made(cleared) == (NAME, "", BASE, {})
        await service.house.publish(labels=["a", "b"])
        (listed,) = (await service("ListModels")).models
        assert (listed.default_version, list(listed.tuned_labels)) == (f"{NAME}/versions/1", ["a", "b"])
        assert listed.base_digest == "b" * 64


async def test_a_model_needs_a_base_we_have_and_a_free_name(finetune_url: str) -> None:
    async with serving(finetune_url) as service:
        ask: dict[str, Any] = {"parent": "projects/news", "model_id": "titles", "model": pb.Model(base_model=BASE)}
        with pytest.raises(ResourceNotFound) as caught:
            await service("CreateModel", **ask | {"model": pb.Model(base_model="models/none")})
        assert caught.value.metadata == {"field": "model.base_model"}
        with pytest.raises(ResourceNotFound):
            await service("CreateModel", **ask | {"parent": "projects/other"})
        first = await service("CreateModel", **ask, request_id=(request_id := str(uuid4())))
        assert await service("CreateModel", **ask, request_id=request_id) == first
        with pytest.raises(IdempotencyKeyReused):
            await service("CreateModel", **ask | {"model_id": "more"}, request_id=request_id)
        with pytest.raises(ResourceExists):
            await service("CreateModel", **ask)


async def test_pages_follow_each_other_and_a_token_is_of_one_list(finetune_url: str) -> None:
    async with serving(finetune_url) as service:
        for number in range(5):
            await service("CreateModel", parent="projects/news", model_id=f"m{number}", model=pb.Model(base_model=BASE))
        seen, token = [], ""
        while True:
            page = await service("ListModels", parent="projects/news", page_size=2, page_token=token, order_by="name desc")
            seen += [model.name.rpartition("/")[2] for model in page.models]
            if not (token := page.next_page_token):
                break
            with pytest.raises(PageTokenInvalid):
                await service("ListModels", parent="projects/news", page_size=2, page_token=token)
            with pytest.raises(PageTokenInvalid):
                await service("ListModels", caller=tenant("other"), page_size=2, page_token=token, order_by="name desc")
        assert seen == ["m4", "m3", "m2", "m1", "m0"]


async def test_A10_foreign_models_are_as_unknown_ones(finetune_url: str) -> None:
    async with serving(finetune_url) as service:
        await service.house.publish()
        stranger = tenant("other", "models.force")
        twin = replace(stranger, project="news")
        asks: list[tuple[str, dict[str, Any], str]] = [
            ("GetModel", {"name": NAME}, "name"), ("UpdateModel", {"model": pb.Model(name=NAME)}, "model.name"),
            ("DeleteModel", {"name": NAME, "cascade": True}, "name"), ("GetModelVersion", {"name": f"{NAME}/versions/1"}, "name"),
            ("ListModelVersions", {"parent": NAME}, "parent"), ("DeleteModelVersion", {"name": f"{NAME}/versions/1"}, "name"),
            ("GetModelAlias", {"name": PROD}, "name"), ("ListModelAliases", {"parent": NAME}, "parent"),
            ("MoveModelAlias", {"name": PROD, "version": f"{NAME}/versions/1", "force": True}, "name"),
            ("RollbackModelAlias", {"name": PROD}, "name"), ("DeleteModelAlias", {"name": PROD}, "name"),
        ]  # fmt: skip
        for method, fields, field in asks:
            for caller in (stranger, twin):
                with pytest.raises(ResourceNotFound) as caught:
                    await service(method, caller=caller, **fields)
                assert caught.value.metadata == {"field": field}, method
        assert (await service("GetModelAlias", name=PROD)).targets[0].version == f"{NAME}/versions/1"


async def test_a_version_shows_its_card_and_its_signed_manifest(finetune_url: str) -> None:
    async with serving(finetune_url) as service:
        job = str(uuid4())
        prepared = await service.house.publish(
            labels=["a", "b"], job=job, privacy={"epsilon": 7.5, "delta": 1e-5, "accountant": "prv"},
            metrics={"accuracy": 0.9, "calibration_error_before": 0.2, "calibration_error": 0.05},
            datasets=[{"dataset_version": "projects/news/datasets/d/versions/1", "sha256": "a" * 64, "use": "train", "rows": 9},
                      {"dataset_version": "projects/news/datasets/d/versions/2", "sha256": "a" * 64, "use": "validation"}],
        )  # fmt: skip
        version = await service("GetModelVersion", name=f"{NAME}/versions/1")
        assert version.state == pb.ModelVersion.STATE_READY
        assert (version.adapter_digest, version.base_digest, version.rendering_digest) == (prepared.signed.digest, "b" * 64, "c" * 64)
        assert (version.calibration.error_before, version.calibration.error_after, version.calibration.temperature) == (0.2, 0.05, 1.5)
        assert (version.privacy.epsilon, version.privacy.accountant) == (7.5, "prv")
        assert version.lineage.fine_tune_job == f"projects/news/fineTuneJobs/{job}"
        assert list(version.lineage.train_versions) == ["projects/news/datasets/d/versions/1"]
        assert list(version.lineage.validation_versions) == ["projects/news/datasets/d/versions/2"]
        assert (version.lineage.seed, version.lineage.step, version.lineage.imported) == (3, 7, False)
        assert (version.metrics["accuracy"], version.total_bytes) == (0.9, prepared.size_bytes)
        assert not version.HasField("servable_time")
        said, digest = lineage.unsign(version.signed_manifest.encode(), SIGNER.keys())
        assert (digest, said.version) == (version.adapter_digest, version.name)
        (listed,) = (await service("ListModelVersions", parent=NAME, filter="state = READY")).model_versions
        assert (listed.name, listed.signed_manifest) == (version.name, "")
        assert not (await service("ListModelVersions", parent=NAME, filter="state = CHECKING")).model_versions


async def test_T11_an_alias_moves_only_on_a_passed_evaluation(finetune_url: str) -> None:
    async with serving(finetune_url) as service:
        for seed in range(3):
            await service.house.publish(seed=seed)
        two = f"{NAME}/versions/2"
        for evaluation in ("", await service.passed(2, 1, "NOT_PASSED"), await service.passed(3, 1), await service.passed(2, 3)):
            with pytest.raises(GateNotPassed):
                await service("MoveModelAlias", name=PROD, version=two, evaluation=evaluation)
        good = await service.passed(2, 1)
        before = await service("GetModelAlias", name=PROD)
        tried = await service("MoveModelAlias", name=PROD, version=two, evaluation=good, percent=10, validate_only=True)
        assert [(target.version[-1], target.percent) for target in tried.targets] == [("1", 90), ("2", 10)]
        assert await service("GetModelAlias", name=PROD) == before
        with pytest.raises(GateNotPassed):
            await service("MoveModelAlias", name=PROD, version=two, validate_only=True)
        split = await service("MoveModelAlias", name=PROD, version=two, evaluation=good, percent=10, etag=before.etag)
        assert [(target.version[-1], target.percent) for target in split.targets] == [("1", 90), ("2", 10)]
        with pytest.raises(EtagMismatch):
            await service("MoveModelAlias", name=PROD, version=two, evaluation=good, etag=before.etag)
        whole = await service("MoveModelAlias", name=PROD, version=two, evaluation=good)
        assert [(target.version, target.percent) for target in whole.targets] == [(two, 100)]
        assert [move.evaluation for move in whole.history] == [good, good, ""]
        assert whole.history[0].api_key == f"projects/news/apiKeys/{service.caller.key_id}"
        async with service.house.store.transaction() as connection:
            events = await sql_models.events(connection, 6)
        assert [event["body"]["alias"] for event in events] == [PROD, PROD]
        with pytest.raises(GateNotPassed):  # the evaluation was against version 1
            await service("MoveModelAlias", name=PROD, version=f"{NAME}/versions/3", evaluation=await service.passed(3, 1))


async def test_a_forced_move_needs_its_scope_and_is_audited(finetune_url: str) -> None:
    async with serving(finetune_url) as service:
        for seed in range(2):
            await service.house.publish(seed=seed)
        ask = {"name": PROD, "version": f"{NAME}/versions/2", "force": True}
        with pytest.raises(ScopeMissing):
            await service("MoveModelAlias", **ask)
        forcing = replace(service.caller, scopes=frozenset({"models.promote", "models.force"}))
        moved = await service("MoveModelAlias", caller=forcing, **ask)
        assert (moved.history[0].forced, moved.history[1].forced) == (True, False)
        async with service.house.store.transaction() as connection:
            audited = (await connection.execute(text("SELECT method, resource, actor_key FROM audit_events ORDER BY method"))).all()
        assert [tuple(row) for row in audited] == [
            ("MoveModelAlias", PROD, service.caller.key_id), ("MoveModelAlias.force", PROD, service.caller.key_id),
        ]  # fmt: skip


async def test_a_rollback_is_one_call_and_goes_to_what_was_before(finetune_url: str) -> None:
    async with serving(finetune_url) as service:
        for seed in range(3):
            await service.house.publish(seed=seed)
        with pytest.raises(WrongState):
            await service("RollbackModelAlias", name=PROD)
        await service("MoveModelAlias", name=PROD, version=f"{NAME}/versions/2", evaluation=await service.passed(2, 1))
        back = await service("RollbackModelAlias", name=PROD)
        assert ([target.version for target in back.targets], back.history[0].rolled_back) == ([f"{NAME}/versions/1"], True)
        await service("MoveModelAlias", name=PROD, version=f"{NAME}/versions/2", evaluation=await service.passed(2, 1), percent=20)
        whole = await service("MoveModelAlias", name=PROD, version=f"{NAME}/versions/1")  # to the stable one: no proof needed
        assert [target.percent for target in whole.targets] == [100]
        again = await service("RollbackModelAlias", name=PROD)
        assert [(target.version[-1], target.percent) for target in again.targets] == [("1", 80), ("2", 20)]
        await service("DeleteModelVersion", name=f"{NAME}/versions/2", cascade=True)
        gone = await service("GetModelAlias", name=PROD)
        assert [target.version for target in gone.targets] == [f"{NAME}/versions/1"]
        with pytest.raises(WrongState):
            await service("RollbackModelAlias", name=PROD)


async def test_other_aliases_are_made_by_a_move_and_removed(finetune_url: str) -> None:
    async with serving(finetune_url) as service:
        await service.house.publish()
        beta = f"{NAME}/aliases/beta"
        with pytest.raises(FieldInvalid):
            await service("MoveModelAlias", name=beta, version=f"{NAME}/versions/1", percent=50)
        with pytest.raises(EtagMismatch):
            await service("MoveModelAlias", name=beta, version=f"{NAME}/versions/1", etag="x")
        await service("MoveModelAlias", name=beta, version=f"{NAME}/versions/1", evaluation=await service.passed(1, None, alias="beta"))
        assert [alias.name for alias in (await service("ListModelAliases", parent=NAME)).model_aliases] == [beta, PROD]
        removed = await service("DeleteModelAlias", name=beta)
        assert removed.targets[0].version == f"{NAME}/versions/1"
        with pytest.raises(ResourceNotFound):
            await service("GetModelAlias", name=beta)
        await service("MoveModelAlias", name=beta, version=f"{NAME}/versions/1", evaluation=await service.passed(1, None, alias="beta"))
        assert len((await service("GetModelAlias", name=beta)).history) == 1


async def test_a_version_of_another_model_or_not_ready_is_no_target(finetune_url: str) -> None:
    async with serving(finetune_url) as service:
        await service.house.publish()
        await service.house.publish("other", seed=1)
        checking = await service.house.prepared(seed=2)
        forcing = replace(service.caller, scopes=frozenset({"models.force"}))
        for version, error in (
            ("projects/news/models/other/versions/1", FieldInvalid), (checking.name, WrongState), (f"{NAME}/versions/9", ResourceNotFound),
        ):  # fmt: skip
            with pytest.raises(error):
                await service("MoveModelAlias", caller=forcing, name=PROD, version=version, force=True)


async def test_T12_a_version_goes_with_its_bytes_and_every_gateway_is_told(finetune_url: str) -> None:
    async with serving(finetune_url) as service:
        prepared = await service.house.publish()
        name = f"{NAME}/versions/1"
        with pytest.raises(HasDependants):
            await service("DeleteModelVersion", name=name)
        etag = (await service("GetModelVersion", name=name)).etag
        with pytest.raises(EtagMismatch):
            await service("DeleteModelVersion", name=name, cascade=True, etag="0" * 32)
        deletion = await service("DeleteModelVersion", name=name, cascade=True, etag=etag)
        assert (deletion.target, list(deletion.erased), service.erasures) == (name, [name, PROD], 1)
        for method, gone in (("GetModelVersion", name), ("GetModelAlias", PROD)):
            with pytest.raises(ResourceNotFound):
                await service(method, name=gone)
        async with service.house.store.transaction() as connection:
            events = await sql_models.events(connection, 2)
            row = (await connection.execute(text("SELECT prefixes, digests FROM deletions"))).mappings().one()
        assert [event["kind"] for event in events] == ["erased", "moved"]
        assert events[0]["body"]["adapter_digest"] == prepared.signed.digest
        assert row["prefixes"] == [lineage.place(service.caller.project_uid, prepared.signed.digest)]
        assert row["digests"] == {name: prepared.signed.digest}
        again = await service.house.publish(seed=5)
        assert again.name == f"{NAME}/versions/2"


async def test_T12_nothing_of_an_erased_version_is_left_and_a_certificate_says_so(finetune_url: str) -> None:
    canary = "canary-7f3a"
    async with serving(finetune_url) as service:
        prepared = await service.house.publish(labels=[canary, "b"])
        kept = await service.house.publish("other", seed=1)
        await service("DeleteModelVersion", name=prepared.name, cascade=True)
        await Eraser(service.house.store, service.house.objects, DatasetSettings(), SIGNER.key, SIGNER.keyid).once()
        stored = [path async for path, _ in service.house.objects.list("adapters")]
        assert {path.split("/")[2] for path in stored} == {kept.signed.digest}
        async with service.house.store.transaction() as connection:
            row = (await connection.execute(text("SELECT state, certificate FROM deletions"))).mappings().one()
            tables = (
                await connection.execute(text("SELECT table_name FROM information_schema.tables WHERE table_schema = 'finetune'"))
            ).scalars()
            left = {
                table: (await connection.execute(text(f"SELECT count(*) FROM {table} t WHERE t::text LIKE '%{canary}%'"))).scalar_one()
                for table in list(tables)
            }
        assert row["state"] == "DONE"
        said, digests = signing.predicate_of(
            signing.unseal(row["certificate"].encode(), SIGNER.keys(), signing.IN_TOTO), signing.DELETION_CERTIFICATE
        )
        assert (said["target"], digests) == (prepared.name, {prepared.name: prepared.signed.digest})
        assert {table: count for table, count in left.items() if count} == {}


async def test_T12_a_model_goes_whole_and_its_numbers_do_not_come_back(finetune_url: str) -> None:
    jobs = Jobs(NAME)
    async with serving(finetune_url, jobs) as service:
        prepared = [await service.house.publish(seed=seed) for seed in range(2)]
        evaluation = await service.passed(2, 1)
        with pytest.raises(HasDependants):
            await service("DeleteModel", name=NAME)
        deletion = await service("DeleteModel", name=NAME, cascade=True)
        assert set(deletion.erased) == {NAME, PROD, evaluation, *(each.name for each in prepared)}
        assert jobs.models == set()
        with pytest.raises(ResourceNotFound):
            await service("GetModel", name=NAME)
        again = await service.house.publish(seed=9)
        assert again.name == f"{NAME}/versions/3"
        assert (await service("GetModel", name=NAME)).default_version == again.name


async def test_a_model_with_a_running_job_is_not_deleted_without_cascade(finetune_url: str) -> None:
    async with serving(finetune_url, Jobs(NAME)) as service:
        await service("CreateModel", parent="projects/news", model_id="titles", model=pb.Model(base_model=BASE))
        with pytest.raises(HasDependants):
            await service("DeleteModel", name=NAME)
        await service("DeleteModel", name=NAME, cascade=True)


async def test_T12_versions_go_with_the_rows_they_were_trained_on(finetune_url: str) -> None:
    async with serving(finetune_url) as service:
        uids = {number: str(uuid4()) for number in (1, 2)}
        dataset = str(uuid4())
        async with service.house.store.transaction() as connection:
            await connection.execute(
                text("INSERT INTO datasets (project_uid, uid, project, name, layout) VALUES (:p, :u, 'news', 'd', '{}')"),
                {"p": service.caller.project_uid, "u": dataset},
            )
            for number, uid in uids.items():
                await connection.execute(
                    text(
                        "INSERT INTO dataset_versions (project_uid, uid, dataset_uid, number, layout, sha256, total_bytes)"
                        " VALUES (:p, :u, :d, :n, '{}', :s, 1)"
                    ),
                    {"p": service.caller.project_uid, "u": uid, "d": dataset, "n": number, "s": str(number) * 64},
                )
        for number in (1, 2):
            name = f"projects/news/datasets/d/versions/{number}"
            await service.house.publish(seed=number, datasets=[{"dataset_version": name, "sha256": "a" * 64, "use": "train"}])
        dependants = ModelDependants()
        async with service.house.store.transaction() as connection:
            assert not await dependants.of_versions(connection, service.caller.project_uid, [str(uuid4())])
            assert not await dependants.of_versions(connection, str(uuid4()), [uids[1]])
            assert await dependants.of_versions(connection, service.caller.project_uid, [uids[1]])
            gone = await dependants.erase(connection, service.caller.project_uid, "news", [uids[1]])
        assert gone.names == (f"{NAME}/versions/1", PROD)
        assert (await service("GetModelVersion", name=f"{NAME}/versions/2")).state == pb.ModelVersion.STATE_READY
        with pytest.raises(ResourceNotFound):
            await service("GetModelVersion", name=f"{NAME}/versions/1")
