import asyncio
import json
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from services.chassis.errors import ArtifactRejected, ResourceNotFound, WrongState
from services.finetune import lineage, model_erasure, publishing, sql_models
from services.finetune.lineage import ADAPTER, HEAD, MANIFEST
from tests.finetune.adapters import MODULES, SIGNER, WIDTH, file, head, lora, manifest, registry

NAME = "projects/news/models/titles"


async def test_a_run_becomes_a_version_that_replicas_can_load(finetune_url: str) -> None:
    async with registry(finetune_url) as house:
        prepared = await house.publish(labels=["tech", "sport"])
        at = lineage.place(house.caller.project_uid, prepared.signed.digest)
        said, digest = lineage.unsign(await house.objects.get(f"{at}/{MANIFEST}"), SIGNER.keys())
        assert (digest, said.version) == (prepared.signed.digest, f"{NAME}/versions/1")
        for part in said.parts:
            assert await house.objects.size(f"{at}/{part.name}") == part.total_bytes
        async with house.store.transaction() as connection:
            model = await sql_models.model(connection, house.caller.project_uid, "titles")
            assert model is not None
            row = await sql_models.version(connection, house.caller.project_uid, model["uid"], 1)
            alias = await sql_models.alias(connection, house.caller.project_uid, model["uid"], "prod")
            events = await sql_models.events(connection, 0)
        assert row is not None
        assert (row["state"], row["adapter_digest"], row["method"]) == ("READY", digest, "CLASSIFY")
        assert alias is not None
        assert alias["target"] == 1
        assert [(event["kind"], event["body"].get("adapter_digest")) for event in events] == [("ready", digest), ("moved", None)]


async def test_F28_nothing_is_served_before_the_job_ends_in_the_same_transaction(finetune_url: str) -> None:
    async with registry(finetune_url) as house:
        prepared = await house.prepared()
        with pytest.raises(RuntimeError, match="lost"):
            async with house.store.transaction() as connection:
                await publishing.publish(connection, prepared)
                raise RuntimeError("the job lost its compare-and-set")
        async with house.store.transaction() as connection:
            row = await sql_models.version(connection, prepared.project_uid, prepared.model_uid, prepared.number)
            assert row is not None
            assert row["state"] == "CHECKING"
            assert await sql_models.events(connection, 0) == []
        await publishing.discard(house.store, house.objects, prepared)
        async with house.store.transaction() as connection:
            assert await sql_models.version(connection, prepared.project_uid, prepared.model_uid, prepared.number) is None
            with pytest.raises(ResourceNotFound):
                await publishing.publish(connection, prepared)
        assert await house.objects.size(f"{lineage.place(prepared.project_uid, prepared.signed.digest)}/{ADAPTER}") is None


async def test_T12_what_was_copied_behind_an_erasure_goes_when_it_is_not_published(finetune_url: str) -> None:
    async with registry(finetune_url) as house:
        prepared = await house.prepared()
        async with house.store.transaction() as connection:
            model = await sql_models.model(connection, prepared.project_uid, "titles", lock=True)
            assert model is not None
            await model_erasure.erase_model(connection, model)
        async with house.store.transaction() as connection:
            with pytest.raises(ResourceNotFound):
                await publishing.publish(connection, prepared)
        await publishing.discard(house.store, house.objects, prepared)
        assert await house.objects.size(f"{lineage.place(prepared.project_uid, prepared.signed.digest)}/{ADAPTER}") is None


async def test_a_repeated_end_of_a_job_makes_one_version(finetune_url: str) -> None:
    async with registry(finetune_url) as house:
        parts = {ADAPTER: file(lora())}
        job = "5f0c3f64-6d2b-4f4e-9a40-6f8f1c3b2a10"
        said = manifest(house.caller.project_uid, NAME, parts, job=job)
        prefix = await house.put(parts)
        origin = publishing.Origin("JOB", job)
        for _ in range(2):  # the reply to the first was lost
            prepared = await publishing.prepare(house.store, house.objects, SIGNER, said, prefix, origin)
            async with house.store.transaction() as connection:
                assert await publishing.publish(connection, prepared) == f"{NAME}/versions/1"
        async with house.store.transaction() as connection:
            assert len(await sql_models.events(connection, 0)) == 2


async def test_what_a_crash_left_unpublished_is_swept_with_its_bytes(finetune_url: str) -> None:
    async with registry(finetune_url) as house:
        kept = await house.publish(seed=1)
        left = await house.prepared(seed=2)
        assert await publishing.sweep(house.store, house.objects, timedelta(hours=1)) == 0
        assert await publishing.sweep(house.store, house.objects, timedelta(0)) == 1
        assert await publishing.sweep(house.store, house.objects, timedelta(0)) == 0
        stored = {path.split("/")[2] async for path, _ in house.objects.list("adapters")}
        assert stored == {kept.signed.digest}
        async with house.store.transaction() as connection:
            with pytest.raises(ResourceNotFound):
                await publishing.publish(connection, left)


async def test_numbers_are_not_used_again_and_prod_stays_where_it_is(finetune_url: str) -> None:
    async with registry(finetune_url) as house:
        first = await house.publish(seed=1)
        doomed = await house.prepared(seed=2)
        await publishing.discard(house.store, house.objects, doomed)
        third = await house.publish(seed=3)
        assert (first.number, doomed.number, third.number) == (1, 2, 3)
        assert len({first.signed.digest, doomed.signed.digest, third.signed.digest}) == 3
        async with house.store.transaction() as connection:
            alias = await sql_models.alias(connection, house.caller.project_uid, first.model_uid, "prod")
        assert alias is not None
        assert alias["target"] == 1


async def test_publishing_at_once_gives_each_a_number_and_the_feed_an_order(finetune_url: str) -> None:
    async with registry(finetune_url) as house:
        made = await asyncio.gather(*(house.publish(seed=seed) for seed in range(4)))
        assert sorted(prepared.number for prepared in made) == [1, 2, 3, 4]
        async with house.store.transaction() as connection:
            events = await sql_models.events(connection, 0)
        assert [event["sequence"] for event in events] == list(range(1, 9))
        assert sorted(event["body"]["version"] for event in events if event["kind"] == "ready") == [
            f"{NAME}/versions/{n}" for n in (1, 2, 3, 4)
        ]


async def test_a_model_of_another_base_is_not_published_into(finetune_url: str) -> None:
    async with registry(finetune_url) as house:
        await house.publish()
        with pytest.raises(WrongState):
            await house.prepared(seed=1, base_model="models/other")


def spoilt(change: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Parts with one thing wrong, and what the manifest says differently."""
    values = lora()
    key = next(iter(values))
    labels = ["a", "b"]
    if change == "not_finite":
        values[key][0, 0] = np.nan
    elif change == "tensor_rank":
        return {ADAPTER: file(values)}, {"rank": 3}
    elif change == "tensor_shape":
        values[key] = np.zeros((2, WIDTH + 1), dtype=np.float32)
    elif change == "tensor_missing":
        del values[key]
    elif change == "tensor_target":
        return {ADAPTER: file(values)}, {"targets": ["q_proj"]}
    elif change == "tensor_module":
        values = {name.replace("layers.0", "layers.7"): value for name, value in values.items()}
    elif change == "tensor_name":
        values["base_model.model.lm_head.weight"] = np.zeros((2, 2), dtype=np.float32)
    elif change == "head_shape":
        return {ADAPTER: file(values), HEAD: file(head(labels))}, {"labels": ["a", "b", "c"]}
    elif change == "head_labels":
        return {ADAPTER: file(values), HEAD: file(head(labels))}, {}
    elif change == "part_name":
        return {ADAPTER: file(values), "training_args.bin": b"x"}, {}
    return {ADAPTER: file(values)}, {}


@pytest.mark.parametrize(
    "rule",
    ["not_finite", "tensor_rank", "tensor_shape", "tensor_missing", "tensor_target", "tensor_module", "tensor_name", "head_shape",
     "head_labels", "part_name", "part_missing", "part_size", "part_digest", "header_json"],
)  # fmt: skip
async def test_T6_parts_that_are_not_what_the_manifest_says_are_refused(finetune_url: str, rule: str) -> None:
    async with registry(finetune_url) as house:
        parts, changed = spoilt(rule)
        said = manifest(house.caller.project_uid, NAME, parts, **changed)
        data = bytearray(parts[ADAPTER])
        if rule == "part_size":
            data += b"x"
        elif rule == "part_digest":
            data[-1] ^= 1
        elif rule == "header_json":
            data[8] = ord("[")
        prefix = await house.put({} if rule == "part_missing" else {**parts, ADAPTER: bytes(data)})
        with pytest.raises(ArtifactRejected) as caught:
            await publishing.verify(house.objects, said, prefix, MODULES)
        assert caught.value.metadata["rule"] == {"part_missing": "part_size"}.get(rule, rule)


def test_a_signed_manifest_is_bound_to_its_parts() -> None:
    said = manifest("p", NAME, {ADAPTER: b"x"}, version=f"{NAME}/versions/1")
    signed = lineage.sign(said, SIGNER)
    assert lineage.sign(said, SIGNER) == signed
    again, digest = lineage.unsign(signed.envelope, SIGNER.keys())
    assert (again, digest) == (said, signed.digest)
    assert json.loads(signed.envelope)["payloadType"] == "application/vnd.in-toto+json"


async def test_a_fault_does_not_end_the_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    swept = asyncio.Event()
    tries = 0

    async def sweep(store: Any, objects: Any) -> int:
        nonlocal tries
        tries += 1
        if tries == 1:
            raise ValueError("a row of another release")
        swept.set()
        return 0

    monkeypatch.setattr(publishing, "sweep", sweep)
    ready = asyncio.Event()
    ready.set()
    running = asyncio.create_task(publishing.sweeping(cast("Any", SimpleNamespace(ready=ready)), cast("Any", None), pause_s=0.01))
    async with asyncio.timeout(30):
        await swept.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
