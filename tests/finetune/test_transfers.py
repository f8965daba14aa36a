import io
import tarfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import google_crc32c
import pytest

from argosy.v1 import finetune_pb2
from argosy.v1 import model_pb2 as pb
from services.chassis.errors import (
    ArtifactRejected,
    ChecksumMismatch,
    FieldInvalid,
    FieldOutOfRange,
    IdempotencyKeyReused,
    ResourceNotFound,
    Shed,
    WrongState,
)
from services.chassis.lists import PageTokens
from services.finetune import lineage
from services.finetune.bases import Bases, linear_layers
from services.finetune.lineage import ADAPTER
from services.finetune.servicers.model import ModelServicer
from services.finetune.servicers.model_transfers import ARRIVALS
from services.finetune.servicers.resources import Desk
from tests.finetune import zoo
from tests.finetune.adapters import BASE, SIGNER, House, called, file, lora, registry, tenant

NAME = "projects/news/models/titles"


class Service:
    def __init__(self, house: House, bases: Bases) -> None:
        self.house = house
        self.servicer = ModelServicer(Desk(house.store, PageTokens(b"t" * 32)), house.objects, bases, SIGNER)

    async def __call__(self, method: str, **fields: Any) -> Any:
        with called(self.house.caller):
            return await getattr(self.servicer, method)(getattr(pb, f"{method}Request")(**fields), None)

    async def send(self, requests: Sequence[pb.ImportModelVersionRequest]) -> pb.ModelVersion:
        async def stream() -> AsyncIterator[pb.ImportModelVersionRequest]:
            for request in requests:
                yield request

        with called(self.house.caller):
            return await self.servicer.ImportModelVersion(stream(), None)

    async def export(self, caller: Any = None, **fields: Any) -> tuple[bytes, int]:
        data, total = b"", -1
        with called(caller or self.house.caller):
            async for message in self.servicer.ExportModelVersion(pb.ExportModelVersionRequest(**fields), None):
                assert message.offset == fields.get("offset", 0) + len(data)
                assert message.crc32c == (google_crc32c.value(message.data) if message.data else 0)
                data, total = data + message.data, message.total_bytes
        return data, total


@asynccontextmanager
async def serving(url: str, base: Path, tmp_path: Path) -> AsyncIterator[Service]:
    async with registry(url) as house:
        service = Service(house, Bases([f"tiny={base}"], str(tmp_path / "cache")))
        await service("CreateModel", parent="projects/news", model_id="titles", model=pb.Model(base_model=BASE))
        yield service


def header(labels: Sequence[str] = (), parent: str = NAME, request_id: str = "", **changed: Any) -> pb.ImportModelVersionRequest:
    method = finetune_pb2.TUNE_METHOD_CLASSIFY if labels else finetune_pb2.TUNE_METHOD_CHAT
    said: dict[str, Any] = {"parent": parent, "tuned_labels": labels, "method": method, "request_id": request_id} | changed
    return pb.ImportModelVersionRequest(header=pb.ImportHeader(**said))


def chunks(part: "pb.ImportPart", data: bytes, size: int = 100_000) -> list[pb.ImportModelVersionRequest]:
    found = []
    for at in range(0, len(data), size):
        piece = data[at : at + size]
        chunk = pb.ImportChunk(part=part, offset=at, data=piece, crc32c=google_crc32c.value(piece))
        found.append(pb.ImportModelVersionRequest(chunk=chunk))
    return found


def adapter(base: Path, seed: int = 0) -> bytes:
    return file(lora(seed, 2, {path: shape for path, shape in linear_layers(base).items() if path.endswith("q_proj")}), "BF16")


CONFIG = zoo.config(target_modules=["q_proj"])


def parts(base: Path, size: int = 100_000, seed: int = 0) -> list[pb.ImportModelVersionRequest]:
    return [*chunks(pb.IMPORT_PART_CONFIG, CONFIG, size), *chunks(pb.IMPORT_PART_WEIGHTS, adapter(base, seed), size)]


async def test_T13_an_adapter_from_outside_becomes_a_version(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with serving(finetune_url, base, tmp_path) as service:
        version = await service.send([header(), *parts(base, size=777)])
        assert (version.name, version.state) == (f"{NAME}/versions/1", pb.ModelVersion.STATE_READY)
        assert (version.lineage.imported, version.lineage.fine_tune_job) == (True, "")
        assert (await service("GetModel", name=NAME)).default_version == version.name
        whole = await service("GetModelVersion", name=version.name)
        said, digest = lineage.unsign(whole.signed_manifest.encode(), SIGNER.keys())
        assert (digest, said.rank, said.alpha, list(said.targets)) == (version.adapter_digest, 2, 4.0, ["q_proj"])
        at = lineage.place(service.house.caller.project_uid, digest)
        assert await service.house.objects.size(f"{at}/{ADAPTER}") == said.parts[0].total_bytes
        assert [path async for path, _ in service.house.objects.list("uploads")] == []


async def test_an_import_is_replayed_for_the_same_bytes_however_they_are_cut(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with serving(finetune_url, base, tmp_path) as service:
        request_id = str(uuid4())
        first = await service.send([header(request_id=request_id), *parts(base)])
        again = await service.send([header(request_id=request_id), *parts(base, size=5_000)])
        assert again == first
        listed = await service("ListModelVersions", parent=NAME)
        assert [version.name for version in listed.model_versions] == [first.name]
        stored = [path async for path, _ in service.house.objects.list("adapters")]
        assert {path.split("/")[2] for path in stored} == {first.adapter_digest}
        with pytest.raises(IdempotencyKeyReused):
            await service.send([header(request_id=request_id), *parts(base, seed=1)])
        stored = [path async for path, _ in service.house.objects.list("adapters")]
        assert {path.split("/")[2] for path in stored} == {first.adapter_digest}


async def test_T13_A16_a_refused_import_leaves_nothing(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with serving(finetune_url, base, tmp_path) as service:
        poisoned = chunks(pb.IMPORT_PART_WEIGHTS, zoo.pickled(tmp_path / "canary") + b"\0" * 64)
        with pytest.raises(ArtifactRejected) as caught:
            await service.send([header(), *chunks(pb.IMPORT_PART_CONFIG, CONFIG), *poisoned])
        assert caught.value.metadata["rule"] == "weights.header_size"
        assert not (tmp_path / "canary").exists()
        assert not (await service("ListModelVersions", parent=NAME)).model_versions
        for prefix in ("adapters", "uploads"):
            assert [path async for path, _ in service.house.objects.list(prefix)] == []


async def test_a_stream_of_another_form_is_refused(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with serving(finetune_url, base, tmp_path) as service:
        config, weights = chunks(pb.IMPORT_PART_CONFIG, CONFIG), chunks(pb.IMPORT_PART_WEIGHTS, adapter(base))
        broken = chunks(pb.IMPORT_PART_CONFIG, CONFIG)
        broken[0].chunk.crc32c ^= 1
        for requests, error in (
            ([], FieldInvalid),
            (config, FieldInvalid),
            ([header(), header()], FieldInvalid),
            ([header(), *config], ArtifactRejected),
            ([header(), *config, *weights, *config], ArtifactRejected),
            ([header(), *broken, *weights], ChecksumMismatch),
            ([header(method=finetune_pb2.TUNE_METHOD_UNSPECIFIED), *config, *weights], FieldInvalid),
            ([header(tuned_labels=["a", "b"]), *config, *weights], FieldInvalid),
            ([header(parent="projects/news/models/none"), *config, *weights], ResourceNotFound),
            ([header(parent="projects/other/models/titles"), *config, *weights], ResourceNotFound),
        ):
            with pytest.raises(error):
                await service.send(requests)


async def test_only_so_many_imports_arrive_at_once(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with serving(finetune_url, base, tmp_path) as service:
        for _ in range(ARRIVALS):
            await service.servicer.arrivals.acquire()
        with pytest.raises(Shed):
            await service.send([header(), *parts(base)])
        service.servicer.arrivals.release()
        assert (await service.send([header(), *parts(base)])).name == f"{NAME}/versions/1"


async def test_an_export_is_one_archive_from_any_offset(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with serving(finetune_url, base, tmp_path) as service:
        version = await service.send([header(), *parts(base)])
        data, total = await service.export(name=version.name)
        assert len(data) == total
        with tarfile.open(fileobj=io.BytesIO(data)) as opened:
            assert opened.getnames() == ["adapter_config.json", "adapter_model.safetensors", "manifest.json", "README.md"]
        for offset in (1, 600, total - 1, total):
            assert await service.export(name=version.name, offset=offset) == (data[offset:], total)
        with pytest.raises(FieldOutOfRange):
            await service.export(name=version.name, offset=total + 1)
        merged, size = await service.export(name=version.name, content=pb.EXPORT_CONTENT_MERGED)
        assert len(merged) == size
        with tarfile.open(fileobj=io.BytesIO(merged)) as opened:
            assert {"config.json", "tokenizer.json", "model.safetensors", "manifest.json", "README.md"} <= set(opened.getnames())
        with pytest.raises(ResourceNotFound):
            await service.export(tenant("other"), name=version.name)
        checking = await service.house.prepared()
        with pytest.raises(WrongState):
            await service.export(name=checking.name)


async def test_what_is_exported_can_be_imported_again(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with serving(finetune_url, base, tmp_path) as service:
        first = await service.send([header(), *parts(base)])
        data, _ = await service.export(name=first.name)
        with tarfile.open(fileobj=io.BytesIO(data)) as opened:
            files = {member.name: opened.extractfile(member).read() for member in opened.getmembers()}  # type: ignore[union-attr]
        again = await service.send([
            header(), *chunks(pb.IMPORT_PART_CONFIG, files["adapter_config.json"]),
            *chunks(pb.IMPORT_PART_WEIGHTS, files["adapter_model.safetensors"]),
        ])  # fmt: skip
        one, two = [
            lineage.unsign((await service("GetModelVersion", name=v.name)).signed_manifest.encode(), SIGNER.keys())[0]
            for v in (first, again)
        ]
        assert [part.sha256 for part in one.parts] == [part.sha256 for part in two.parts]
