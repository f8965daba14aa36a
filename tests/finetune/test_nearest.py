"""The index of a version's rows: what it finds, what it takes for one, and who may ask."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from argosy_internal.registry.v1 import registry_pb2 as pb
from services.chassis.errors import ArtifactRejected, FieldInvalid, ModelCapability, ResourceNotFound, ScopeMissing
from services.chassis.objects import open_objects
from services.finetune import lineage, nearest
from services.finetune.feed import Feed
from services.finetune.neighbours import KEPT_S, Neighbours
from services.finetune.servicers.registry import CONTENT, RegistryServicer
from tests.finetune.adapters import called, registry, tenant

NAME = "projects/news/models/titles"
DATASET = "projects/news/datasets/rows/versions/1"


def vectors(count: int = 40, width: int = 8, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def packed(count: int = 40) -> bytes:
    return nearest.pack(range(100, 100 + count), vectors(count))


def test_the_nearest_come_first_with_their_rows_and_cosines() -> None:
    data = packed()
    index = nearest.Index.read(data, nearest.promise(data))
    asked = vectors()[7] * 3
    found = index.nearest(asked, 3)
    assert found[0][0] == 107 and found[0][1] == pytest.approx(1, abs=1e-3)
    exact = vectors() @ asked / np.linalg.norm(vectors(), axis=1) / np.linalg.norm(asked)
    assert [row - 100 for row, _ in found] == np.argsort(-exact)[:3].tolist()
    assert [likeness for _, likeness in found] == pytest.approx(np.sort(exact)[::-1][:3].tolist(), abs=2e-3)


@pytest.mark.parametrize("spoilt", ["promise", "short", "magic", "nan", "rows"])
def test_bytes_that_are_no_index_are_refused(spoilt: str) -> None:
    data = bytearray(packed())
    if spoilt == "short":
        data = data[:-2]
    elif spoilt == "magic":
        data[:8] = b"argosyN9"
    elif spoilt == "nan":
        data[-2:] = b"\xff\x7f"
    elif spoilt == "rows":
        data[8:12] = (2**31).to_bytes(4, "little")
    said = "40 " + "0" * 64 if spoilt == "promise" else f"40 {hashlib.sha256(data).hexdigest()}"
    with pytest.raises(nearest.Misshapen):
        nearest.Index.read(bytes(data), said)


@pytest.mark.parametrize("vector", [np.zeros(8), np.ones(7), np.full(8, np.nan), np.full(8, np.inf)])
def test_a_vector_of_another_model_or_of_nothing_finds_nothing(vector: Any) -> None:
    data = packed()
    with pytest.raises(nearest.Misshapen):
        nearest.Index.read(data, nearest.promise(data)).nearest(vector.astype(np.float32), 3)


async def test_an_index_is_kept_for_less_than_an_erasure_may_take(tmp_path: Path) -> None:
    data, now = packed(), [0.0]
    objects = open_objects(f"file://{tmp_path}")
    await objects.put(f"adapters/p/d/{nearest.FILE}", data)
    neighbours = Neighbours(objects, lambda: now[0])
    ask = vectors()[0].tobytes()
    assert (await neighbours.find("adapters/p/d", nearest.promise(data), ask, 1))[0][0] == 100
    await objects.delete_prefix("adapters/p/d")
    assert KEPT_S < 60
    now[0] = KEPT_S + 1
    with pytest.raises(ModelCapability):
        await neighbours.find("adapters/p/d", nearest.promise(data), ask, 1)
    with pytest.raises(ModelCapability):
        await neighbours.find("adapters/p/d", "", b"", 1)


async def test_neighbours_are_the_owners_alone_and_go_with_the_version(finetune_url: str) -> None:
    async with registry(finetune_url) as house:
        data = packed()
        said = {"datasets": [{"dataset_version": DATASET, "sha256": "a" * 64, "use": "train"}], "labels": ["a", "b"]}
        made = await house.publish(**said, hyperparameters={nearest.KEY: nearest.promise(data)}, extra={nearest.FILE: data})
        where = lineage.place(made.project_uid, made.signed.digest)
        assert await house.objects.get(f"{where}/{nearest.FILE}") == data
        bare = await house.publish(seed=1, **said)
        owner = replace(house.caller, scopes=frozenset({CONTENT}))
        servicer = RegistryServicer(house.store, Feed(), neighbours=Neighbours(house.objects))

        async def find(version: str, caller: Any = None, vector: bytes = vectors()[3].tobytes()) -> pb.FindNearestResponse:
            with called(caller or owner):
                return await servicer.FindNearest(pb.FindNearestRequest(version=version, vector=vector, top_k=2), None)

        found = (await find(made.name)).examples
        assert (found[0].dataset_version, found[0].row) == (DATASET, 103) and len(found) == 2
        assert not (await find(made.name, vector=b"")).examples
        with pytest.raises(FieldInvalid):
            await find(made.name, vector=b"123")
        with pytest.raises(ModelCapability):
            await find(bare.name)
        with pytest.raises(ResourceNotFound):
            await find(made.name, tenant("news", CONTENT))  # another project, whatever it is called
        with pytest.raises(ScopeMissing):
            await find(made.name, tenant("news", "explain"))


@pytest.mark.parametrize("spoilt", ["absent", "other", "private"])
async def test_a_result_whose_index_is_not_the_promised_one_is_refused(finetune_url: str, spoilt: str) -> None:
    async with registry(finetune_url) as house:
        data = packed()
        extra = {} if spoilt == "absent" else {nearest.FILE: packed(39) if spoilt == "other" else data}
        more: dict[str, Any] = {"privacy": {"epsilon": 8.0, "accountant": "prv"}} if spoilt == "private" else {}
        with pytest.raises(ArtifactRejected):
            await house.publish(hyperparameters={nearest.KEY: nearest.promise(data)}, extra=extra, **more)
