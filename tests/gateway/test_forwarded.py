"""Dataset-, FineTune- and ModelService through a real gateway, with a scripted finetune behind it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor

from argosy.v1 import dataset_pb2, dataset_pb2_grpc, finetune_pb2, finetune_pb2_grpc, model_pb2
from services.chassis.errors import Internal, UploadOffset, WrongState
from services.chassis.identity import CallerVerifier
from services.chassis.status import error_info
from services.gateway.finetune import AUDIENCE
from services.gateway.servicers.forwarded import SERVICES
from tests.fakes.edge import KEY, Edge, caller, edge, metadata
from tests.fakes.engine import fake_engine
from tests.fakes.finetune import FakeFineTune, fake_finetune

VERIFIER = CallerVerifier({"k": KEY.public_key()}, AUDIENCE)
JOB = "projects/acme/fineTuneJobs/0b5f1d3e-8c1a-4e53-9c43-1f6f8a3f9b10"


@asynccontextmanager
async def tuned(**fields: Any) -> AsyncIterator[tuple[FakeFineTune, Edge]]:
    """A gateway before one engine and one finetune."""
    script = {name: fields.pop(name) for name in ("replies", "hang", "end", "names") if name in fields}
    async with (
        fake_engine() as engine,
        fake_finetune(verifier=VERIFIER, **script) as fake,
        edge(engine, finetune=fake.address, **fields) as at,
    ):
        yield fake, at


def jobs(at: Edge) -> Any:
    return finetune_pb2_grpc.FineTuneServiceStub(at.channel)


def data(at: Edge) -> Any:
    return dataset_pb2_grpc.DatasetServiceStub(at.channel)


def refused(error: grpc.aio.AioRpcError) -> tuple[str, str]:
    info = error_info(error)
    return error.code().name, info.reason if info is not None else ""


async def call(at: Edge, service: str, method: MethodDescriptor, request: bytes, project: str = "acme") -> list[bytes]:
    """Any method, by its descriptor."""
    path = f"/{service}/{method.name}"
    if method.client_streaming:
        return [await at.channel.stream_unary(path)(iter([request]), metadata=metadata(project), timeout=5)]
    if method.server_streaming:
        return [message async for message in at.channel.unary_stream(path)(request, metadata=metadata(project), timeout=5)]
    return [await at.channel.unary_unary(path)(request, metadata=metadata(project), timeout=5)]


METHODS = [(service.full_name, method) for service in SERVICES for method in service.methods]
FORWARDED = [(service, method) for service, method in METHODS if method.name not in ("GetModel", "ListModels")]


async def test_every_method_arrives_unopened_with_the_signed_caller() -> None:
    """Fields that this gateway has never heard of go through both ways."""
    newer = b"\xfa\x7f\x03new"  # field 2047, of a client and a server newer than us
    async with tuned() as (fake, at):
        for service, method in FORWARDED:
            reply = message_factory.GetMessageClass(method.output_type).FromString(newer)
            fake.replies[method.name] = reply
            assert await call(at, service, method, newer) == [newer], method.name
            (asked,) = fake.of(method.name)
            (request,) = asked.request if method.client_streaming else [asked.request]
            assert request.SerializeToString() == newer
            assert asked.caller is not None and (asked.caller.project_uid, asked.caller.project) == ("uid-acme", "acme")
            assert asked.caller.scopes == caller().scopes
            assert asked.time_left_s is not None and 0 < asked.time_left_s <= 5
            assert "authorization" not in asked.metadata


async def test_without_a_scope_nothing_is_forwarded() -> None:
    async with tuned(callers={"acme": caller(scopes=frozenset({"generate"}))}) as (fake, at):
        for service, method in METHODS:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call(at, service, method, b"")
            assert refused(error.value) == ("PERMISSION_DENIED", "SCOPE_MISSING"), method.name
        assert {asked.method for asked in fake.asked} <= {"WatchVersions"}  # the gateway's own


async def test_a_refusal_comes_through_with_its_details() -> None:
    async with tuned(replies={"PauseFineTuneJob": WrongState(state="SUCCEEDED"), "WriteUpload": UploadOffset(4_096)}) as (_, at):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await jobs(at).PauseFineTuneJob(finetune_pb2.PauseFineTuneJobRequest(name=JOB), metadata=metadata(), timeout=5)
        info = error_info(error.value)
        assert info is not None and (info.reason, info.metadata["state"]) == ("WRONG_STATE", "SUCCEEDED")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await data(at).WriteUpload(chunks(64), metadata=metadata(), timeout=5)
        info = error_info(error.value)
        assert info is not None and (info.reason, info.metadata["persisted_bytes"]) == ("UPLOAD_OFFSET", "4096")


def chunks(count: int, size: int = 1_000) -> Iterator[dataset_pb2.WriteUploadRequest]:
    yield dataset_pb2.WriteUploadRequest(header=dataset_pb2.UploadHeader(upload="projects/acme/datasets/d/uploads/u", writer_epoch=1))
    for number in range(count):
        yield dataset_pb2.WriteUploadRequest(chunk=dataset_pb2.UploadChunk(offset=number * size, data=b"x" * size))


async def test_an_upload_streams_in_order() -> None:
    async with tuned(replies={"WriteUpload": dataset_pb2.WriteUploadResponse(persisted_bytes=50_000)}) as (fake, at):
        reply = await data(at).WriteUpload(chunks(50), metadata=metadata(), timeout=5)
        assert reply.persisted_bytes == 50_000
        (asked,) = fake.of("WriteUpload")
        assert [message.chunk.offset for message in asked.request[1:]] == [n * 1_000 for n in range(50)]


async def test_A1_a_chunk_over_the_cap_goes_no_further() -> None:
    async with tuned() as (fake, at):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await data(at).WriteUpload(chunks(1, size=(1 << 20) + 1), metadata=metadata(), timeout=5)
        assert refused(error.value) == ("INVALID_ARGUMENT", "FIELD_OUT_OF_RANGE")
        await fake.until(lambda f: bool(f.of("WriteUpload")))
        assert all(message.WhichOneof("part") == "header" for message in fake.of("WriteUpload")[0].request)


async def test_a_watch_streams_and_a_hang_up_reaches_finetune() -> None:
    event = finetune_pb2.WatchFineTuneJobResponse(event=finetune_pb2.JobEvent(sequence=1))
    async with tuned(replies={"WatchFineTuneJob": [event, event, ...]}) as (fake, at):
        watch = jobs(at).WatchFineTuneJob(finetune_pb2.WatchFineTuneJobRequest(name=JOB), metadata=metadata(), timeout=30)
        assert [await watch.read(), await watch.read()] == [event, event]
        watch.cancel()
        await fake.until(lambda f: f.of("WatchFineTuneJob")[0].cancelled)


async def test_the_deadline_of_the_caller_ends_the_call_behind() -> None:
    async with tuned(hang={"GetFineTuneJob"}) as (fake, at):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await jobs(at).GetFineTuneJob(finetune_pb2.GetFineTuneJobRequest(name=JOB), metadata=metadata(), timeout=0.6)
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await fake.until(lambda f: f.of("GetFineTuneJob")[0].cancelled)


async def test_F15_without_finetune_one_clear_word_and_inference_goes_on() -> None:
    async with tuned() as (fake, at):
        await fake.kill()
        for service, method in FORWARDED:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call(at, service, method, b"")
            assert refused(error.value) == ("UNAVAILABLE", "STORE_UNAVAILABLE"), method.name
            assert "grpc-retry-pushback-ms" in dict(error.value.trailing_metadata() or ())
            assert "127.0.0.1" not in (error.value.details() or "")
        page = await at.models.ListModels(model_pb2.ListModelsRequest(), metadata=metadata(), timeout=5)
        assert [model.name for model in page.models] == ["models/fake"]
        with pytest.raises(grpc.aio.AioRpcError) as error:  # what is missing is said, one page later
            await at.models.ListModels(model_pb2.ListModelsRequest(page_token=page.next_page_token), metadata=metadata(), timeout=5)
        assert refused(error.value) == ("UNAVAILABLE", "STORE_UNAVAILABLE")


async def test_what_finetune_says_without_a_reason_stays_inside() -> None:
    event = finetune_pb2.WatchFineTuneJobResponse(event=finetune_pb2.JobEvent(sequence=1))
    async with tuned(replies={"WatchFineTuneJob": [event], "GetFineTuneJob": Internal()}) as (fake, at):
        for code, reason in (("UNAVAILABLE", "STREAM_LOST"), ("UNKNOWN", "INTERNAL"), ("UNAUTHENTICATED", "INTERNAL")):
            fake.end["WatchFineTuneJob"] = grpc.StatusCode[code]
            watch = jobs(at).WatchFineTuneJob(finetune_pb2.WatchFineTuneJobRequest(name=JOB), metadata=metadata(), timeout=5)
            with pytest.raises(grpc.aio.AioRpcError) as error:
                [message async for message in watch]
            assert refused(error.value)[1] == reason
            assert "nobody outside" not in (error.value.details() or "")


async def test_where_fine_tuning_is_off_its_methods_say_so() -> None:
    async with fake_engine() as engine, edge(engine) as at:
        for service, method in FORWARDED:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call(at, service, method, b"")
            assert refused(error.value) == ("FAILED_PRECONDITION", "MODEL_CAPABILITY"), method.name
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await at.models.GetModel(model_pb2.GetModelRequest(name="projects/acme/models/m"), metadata=metadata(), timeout=5)
        assert refused(error.value) == ("NOT_FOUND", "RESOURCE_NOT_FOUND")


class Keys:
    """Revocations that a test decides."""

    def __init__(self) -> None:
        self.cuts: list[Callable[[], None]] = []

    @contextmanager
    def watch(self, key_id: str, cut: Callable[[], None]) -> Iterator[None]:
        self.cuts.append(cut)
        try:
            yield
        finally:
            self.cuts.remove(cut)


async def test_A9_a_revoked_key_ends_a_watch_and_an_upload() -> None:
    keys = Keys()
    event = finetune_pb2.WatchFineTuneJobResponse(event=finetune_pb2.JobEvent(sequence=1))
    async with tuned(replies={"WatchFineTuneJob": [event, ...]}, revocations=keys) as (fake, at):
        watch = jobs(at).WatchFineTuneJob(finetune_pb2.WatchFineTuneJobRequest(name=JOB), metadata=metadata(), timeout=30)
        assert await watch.read() == event
        keys.cuts[0]()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await watch.read()
            await watch.read()
        assert refused(error.value) == ("PERMISSION_DENIED", "KEY_REVOKED")
        await fake.until(lambda f: f.of("WatchFineTuneJob")[0].cancelled)
        upload = data(at).WriteUpload(metadata=metadata(), timeout=30)
        await upload.write(next(chunks(0)))
        await fake.until(lambda f: bool(f.of("WriteUpload")) and bool(f.of("WriteUpload")[0].request))
        keys.cuts[0]()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await upload
        assert refused(error.value) == ("PERMISSION_DENIED", "KEY_REVOKED")
        assert not keys.cuts


async def test_bases_and_own_models_are_one_list() -> None:
    own = [model_pb2.Model(name=f"projects/acme/models/m{n}", base_model="models/fake", default_version="v") for n in range(3)]

    def listed(request: model_pb2.ListModelsRequest) -> model_pb2.ListModelsResponse:
        at = int(request.page_token or 0)
        more = str(at + request.page_size) if at + request.page_size < len(own) else ""
        return model_pb2.ListModelsResponse(models=own[at : at + request.page_size], next_page_token=more)

    async with tuned(replies={"ListModels": listed}) as (fake, at):
        for size in (1, 2, 3, 4, 50):
            seen, token, pages = [], "", 0
            while pages == 0 or token:
                page = await at.models.ListModels(
                    model_pb2.ListModelsRequest(page_size=size, page_token=token), metadata=metadata(), timeout=5
                )
                seen += page.models
                token, pages = page.next_page_token, pages + 1
                assert len(page.models) <= size
            assert [model.name for model in seen] == ["models/fake", *(model.name for model in own)]
            assert all((model.context_tokens, model.ready_replicas) == (4_096, 1) for model in seen)
        assert {asked.request.parent for asked in fake.of("ListModels")} == {"projects/acme"}
        page = await at.models.ListModels(model_pb2.ListModelsRequest(parent="projects/acme"), metadata=metadata(), timeout=5)
        assert [model.name for model in page.models] == [model.name for model in own]


async def test_a_watch_ends_well_near_our_cap_and_a_download_does_not() -> None:
    event = finetune_pb2.WatchFineTuneJobResponse(event=finetune_pb2.JobEvent(sequence=1))
    piece = dataset_pb2.ReadDatasetVersionResponse(data=b"half")
    script = {"WatchFineTuneJob": [event, ...], "ReadDatasetVersion": [piece, ...]}
    async with tuned(replies=script, max_stream_seconds=0.7) as (fake, at):
        watch = jobs(at).WatchFineTuneJob(finetune_pb2.WatchFineTuneJobRequest(name=JOB), metadata=metadata(), timeout=30)
        assert [message async for message in watch] == [event]
        assert await watch.code() is grpc.StatusCode.OK
        for stub, method, asked in (
            (data(at), "ReadDatasetVersion", dataset_pb2.ReadDatasetVersionRequest()),
            (jobs(at), "WatchFineTuneJob", finetune_pb2.WatchFineTuneJobRequest()),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as error:  # the second at a deadline of the caller's own
                timeout = 30 if method == "ReadDatasetVersion" else 0.5
                [message async for message in getattr(stub, method)(asked, metadata=metadata(), timeout=timeout)]
            assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await fake.until(lambda f: all(asked.cancelled for asked in f.of("WatchFineTuneJob")))


async def test_an_own_model_shows_what_a_call_would_be_let_do() -> None:
    tuned_head, enough = model_pb2.MODEL_CAPABILITY_CLASSIFY_TUNED, model_pb2.MODEL_CAPABILITY_GENERATE
    shown = {
        "projects/acme/models/head": model_pb2.Model(base_model="models/fake", default_version="v", capabilities=[tuned_head]),
        "projects/acme/models/chat": model_pb2.Model(base_model="models/fake", default_version="v", capabilities=[enough]),
        "projects/acme/models/none": model_pb2.Model(base_model="models/fake"),
    }
    async with tuned(replies={"GetModel": lambda request: shown[request.name]}) as (_, at):
        found = [
            set((await at.models.GetModel(model_pb2.GetModelRequest(name=name), metadata=metadata(), timeout=5)).capabilities)
            for name in shown
        ]
        assert tuned_head in found[0] and enough not in found[0]
        assert tuned_head not in found[1] and {enough, model_pb2.MODEL_CAPABILITY_CHAT_PLAIN} <= found[1]
        assert not found[2]


async def test_A4_a_silent_upload_ends_at_its_deadline() -> None:
    """A client that opens an upload and says nothing is cut at its deadline."""
    async with tuned() as (fake, at):
        upload = data(at).WriteUpload(metadata=metadata(), timeout=0.5)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await asyncio.wait_for(upload, 10)
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert not fake.of("WriteUpload") or not fake.of("WriteUpload")[0].request
