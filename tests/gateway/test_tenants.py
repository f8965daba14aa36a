"""A10 over every resource that fine-tuning keeps: gateway and finetune as they are, and a stranger who knows all names.

Made from the descriptors and the bounds table, so a new method is in it on the day it is declared.
"""

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import MethodDescriptor

from argosy.v1 import dataset_pb2, dataset_pb2_grpc, finetune_pb2, model_pb2
from services.chassis.bounds import BOUNDS
from services.chassis.errors import DOMAIN
from services.chassis.identity import CallerVerifier
from services.chassis.status import error_info
from services.finetune.server import finetune
from services.finetune.settings import FineTuneSettings
from services.gateway.finetune import AUDIENCE
from services.gateway.servicers.forwarded import SERVICES
from tests.fakes.edge import KEY, Edge, caller, edge, metadata
from tests.fakes.engine import fake_engine
from tests.samples import smallest

METHODS = [(service.full_name, method) for service in SERVICES for method in service.methods]
ADDRESS = ("name", "parent", "dataset.name", "model.name", "header.upload", "header.parent")  # where a request says what it is about
ROW = b'{"text": "it rained", "label": "dull"}\n{"text": "it shone", "label": "bright"}\n'
UNKNOWN = "00000000-0000-4000-8000-000000000000"


def address(method: MethodDescriptor) -> tuple[str, str]:
    """The field that says what a request is about, and the pattern of its names."""
    for path in ADDRESS:
        kind, *rest = method.input_type, *path.split(".")
        for step in rest[:-1]:
            field = kind.fields_by_name.get(step)
            if field is None or field.message_type is None:
                break
            kind = field.message_type
        else:
            rule = BOUNDS[kind.full_name].get(rest[-1], {})
            if "projects/{s}" in rule.get("pattern", "").replace("(projects/{s}/)?", "projects/{s}/"):
                return path, rule["pattern"].replace("(projects/{s}/)?", "projects/{s}/")
    raise AssertionError(f"{method.full_name} is about nothing")


def request(method: MethodDescriptor, name: str) -> Any:
    """The smallest request about `name`."""
    made = smallest(method.input_type.full_name)
    if method.name == "ImportModelVersion":
        made.header.method = finetune_pb2.TUNE_METHOD_CHAT  # the other one needs labels
    *outer, last = address(method)[0].split(".")
    inside = made
    for step in outer:
        inside = getattr(inside, step)
    setattr(inside, last, name)
    return made


async def ask(at: Edge, service: str, method: MethodDescriptor, asked: Any, project: str) -> Any:
    """The reply's bytes, or what the error shows to its caller but for the request's own id."""
    path = f"/{service}/{method.name}"
    try:
        if method.client_streaming:
            return await at.channel.stream_unary(path)(iter([asked.SerializeToString()]), metadata=metadata(project), timeout=10)
        if method.server_streaming:
            return await at.channel.unary_stream(path)(asked.SerializeToString(), metadata=metadata(project), timeout=10).read()
        return await at.channel.unary_unary(path)(asked.SerializeToString(), metadata=metadata(project), timeout=10)
    except grpc.aio.AioRpcError as error:
        info = error_info(error)
        trailers = sorted((key, value) for key, value in error.trailing_metadata() or () if key != "request_id")
        return error.code().name, error.details(), info.reason if info is not None else "", repr(trailers)


@asynccontextmanager
async def tenants(url: str, folder: Path) -> AsyncIterator[Edge]:
    """Gateway and finetune, with two projects."""
    settings = FineTuneSettings(database_url=url, store_url=folder.as_uri())
    callers = {name: caller(name, project_uid=str(uuid.uuid4())) for name in ("acme", "evil")}
    async with (
        finetune(settings, verifier=CallerVerifier({"k": KEY.public_key()}, AUDIENCE)) as behind,
        fake_engine(model="models/gemma-3-270m") as engine,
        edge(engine, finetune=behind.address, callers=callers) as at,
    ):
        yield at


async def furnished(at: Edge, project: str = "acme") -> dict[str, str]:
    """Something of each kind in a project: its name by its pattern."""
    key = metadata(project)
    data: Any = dataset_pb2_grpc.DatasetServiceStub(at.channel)
    dataset = dataset_pb2.Dataset(format=dataset_pb2.DATASET_FORMAT_CLASSIFY)
    made = await data.CreateDataset(
        dataset_pb2.CreateDatasetRequest(parent=f"projects/{project}", dataset_id="d", dataset=dataset), metadata=key, timeout=10
    )

    async def uploaded() -> dataset_pb2.Upload:
        opened: dataset_pb2.Upload = await data.CreateUpload(dataset_pb2.CreateUploadRequest(parent=made.name), metadata=key, timeout=10)
        parts = [
            dataset_pb2.WriteUploadRequest(header=dataset_pb2.UploadHeader(upload=opened.name, writer_epoch=opened.writer_epoch)),
            dataset_pb2.WriteUploadRequest(chunk=dataset_pb2.UploadChunk(data=ROW)),
        ]
        assert (await data.WriteUpload(iter(parts), metadata=key, timeout=10)).persisted_bytes == len(ROW)
        return opened

    finalized = dataset_pb2.FinalizeUploadRequest(
        name=(await uploaded()).name, total_bytes=len(ROW), sha256=hashlib.sha256(ROW).hexdigest()
    )
    version = await data.FinalizeUpload(finalized, metadata=key, timeout=10)
    async with asyncio.timeout(20):
        while version.state == dataset_pb2.DatasetVersion.STATE_VALIDATING:
            await asyncio.sleep(0.02)
            version = await data.GetDatasetVersion(dataset_pb2.GetDatasetVersionRequest(name=version.name), metadata=key, timeout=10)
    assert version.state == dataset_pb2.DatasetVersion.STATE_READY
    model = await at.models.CreateModel(
        model_pb2.CreateModelRequest(parent=f"projects/{project}", model_id="m", model=model_pb2.Model(base_model="models/gemma-3-270m")),
        metadata=key,
        timeout=10,
    )
    return {
        "projects/{s}": f"projects/{project}",
        "projects/{s}/datasets/{s}": made.name,
        "projects/{s}/datasets/{s}/uploads/{s}": (await uploaded()).name,
        "projects/{s}/datasets/{s}/versions/{s}": version.name,
        "projects/{s}/models/{s}": model.name,
    }


def others(pattern: str, project: str) -> list[str]:
    """Names of the pattern that nobody has, in a project."""
    tail = pattern.removeprefix("projects/{s}")
    return [f"projects/{project}{tail.replace('{s}', segment)}" for segment in (UNKNOWN, "9", "nothing-here")]


async def test_A10_what_a_stranger_hears_of_a_name_says_nothing(finetune_url: str, tmp_path: Path) -> None:
    """Foreign and there, foreign and not there, of no project at all, and one's own and not there: the same bytes, method by method."""
    async with tenants(finetune_url, tmp_path) as at:
        existing = await furnished(at)
        for service, method in METHODS:
            _, pattern = address(method)
            names = [*others(pattern, "acme"), *others(pattern, "no-such-project")]
            names += [existing[pattern]] if pattern in existing else []
            # One's own and not there, too; a request that names something else besides may be told about that first.
            names += [] if pattern == "projects/{s}" or references(method) else others(pattern, "evil")
            said = {await ask(at, service, method, request(method, name), "evil") for name in names}
            assert len(said) == 1, f"{method.name}: {said}"
            (answer,) = said
            assert not isinstance(answer, bytes) and answer[0] == "NOT_FOUND" and answer[2] == "RESOURCE_NOT_FOUND", (method.name, answer)
            assert DOMAIN in answer[3] and "acme" not in answer[3] and "nothing-here" not in answer[3]


async def test_A10_the_owner_finds_each_of_them(finetune_url: str, tmp_path: Path) -> None:
    """The other half of the proof: the names above are there for those whose they are."""
    async with tenants(finetune_url, tmp_path) as at:
        existing = await furnished(at)
        reads = [(service, method) for service, method in METHODS if method.name.startswith(("Get", "List"))]
        for service, method in reads:
            _, pattern = address(method)
            if pattern in existing:
                reply = await ask(at, service, method, request(method, existing[pattern]), "acme")
                assert isinstance(reply, bytes), (method.name, reply)


def references(method: MethodDescriptor) -> list[tuple[str, str]]:
    """Other names inside a request, by path and pattern."""
    found: list[tuple[str, str]] = []
    own_address = address(method)[0]

    def walk(kind: Any, at: str, depth: int) -> None:
        for field in kind.fields:
            rule, path = BOUNDS[kind.full_name].get(field.name, {}), f"{at}{field.name}"
            if rule.get("ignored") or field.is_repeated:
                continue
            if field.message_type is not None and field.message_type.full_name in BOUNDS and depth < 4:
                walk(field.message_type, f"{path}.", depth + 1)
            elif rule.get("pattern", "").startswith("projects/{s}/") and path != own_address and not path.endswith(".name"):
                found.append((path, rule["pattern"]))

    walk(method.input_type, "", 0)
    return found


def put(made: Any, path: str, name: str) -> Any:
    *outer, last = path.split(".")
    inside = made
    for step in outer:
        inside = getattr(inside, step)
    setattr(inside, last, name)
    return made


async def test_A10_a_strangers_own_request_learns_nothing_by_what_it_refers_to(finetune_url: str, tmp_path: Path) -> None:
    """Asked about one's own things, but naming somebody else's: as if they were not there."""
    async with tenants(finetune_url, tmp_path) as at:
        existing, mine = await furnished(at), await furnished(at, "evil")
        tried = 0
        for service, method in METHODS:
            _, about = address(method)
            if about not in mine and not about.endswith("/aliases/{s}"):
                continue
            name = mine.get(about) or f"{mine['projects/{s}/models/{s}']}/aliases/prod"
            for path, pattern in references(method):
                foreign = [*others(pattern, "acme"), *others(pattern, "no-such-project")]
                foreign += [existing[pattern]] if pattern in existing else []
                said = {await ask(at, service, method, put(request(method, name), path, each), "evil") for each in foreign}
                assert len(said) == 1 and not isinstance(next(iter(said)), bytes), f"{method.name} {path}: {said}"
                assert "acme" not in next(iter(said))[3]
                tried += 1
        assert tried >= 6
