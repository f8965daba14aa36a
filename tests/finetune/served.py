"""DatasetService over real gRPC for tests: a PostgreSQL of their own, a folder of objects, callers signed as the gateway signs them."""

import asyncio
import hashlib
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import google_crc32c
import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from argosy.v1 import dataset_pb2 as pb
from argosy.v1 import dataset_pb2_grpc, deletion_pb2
from services.chassis.identity import CALLER_KEY, Caller, CallerSigner, CallerVerifier
from services.chassis.interceptors import Policy, verified
from services.chassis.lists import PageTokens
from services.chassis.objects import Objects, open_objects
from services.chassis.server import Listener, serve
from services.finetune.erasing import Eraser
from services.finetune.hosts import ThreadHost
from services.finetune.servicers.dataset import SERVICE, DatasetServicer
from services.finetune.servicers.resources import Desk
from services.finetune.settings import DatasetSettings
from services.finetune.store import FineTuneStore, open_store
from services.finetune.validating import Validators

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))  # the same in every process of a benchmark
AUDIENCE = "argosy.finetune"
DEFAULTS = DatasetSettings()
SCOPES = frozenset({"datasets.read", "datasets.write", "datasets.content"})


@dataclass
class Tenant:
    """A project and a stub that calls for it."""

    stub: Any
    project: str
    uid: str = field(default_factory=lambda: str(uuid4()))
    scopes: frozenset[str] = SCOPES
    limits: dict[str, int] = field(default_factory=dict)  # what the gateway says is left to the project
    key_id: str = ""  # empty: another one each call

    def metadata(self) -> tuple[tuple[str, bytes], ...]:
        caller = Caller(self.uid, self.project, self.key_id or str(uuid4()), self.scopes, str(uuid4()), "", **self.limits)
        return ((CALLER_KEY, CallerSigner(KEY, "test").sign(caller, AUDIENCE, time.time())),)

    async def __call__(self, method: str, request: Any) -> Any:
        return await getattr(self.stub, method)(request, metadata=self.metadata(), timeout=20)

    async def dataset(self, name: str = "news", form: str = "CLASSIFY", **values: Any) -> pb.Dataset:
        request = pb.CreateDatasetRequest(parent=f"projects/{self.project}", dataset_id=name)
        request.dataset.CopyFrom(pb.Dataset(format=pb.DatasetFormat.Value(f"DATASET_FORMAT_{form}"), **values))
        return await self("CreateDataset", request)

    async def write(self, upload: pb.Upload, data: bytes, offset: int = 0, epoch: int | None = None, size: int = 65_536) -> int:
        """Bytes stored, after `data` was sent from `offset` on."""

        async def requests() -> AsyncIterator[pb.WriteUploadRequest]:
            yield pb.WriteUploadRequest(header=pb.UploadHeader(upload=upload.name, writer_epoch=epoch or upload.writer_epoch))
            for at in range(0, len(data), size):
                piece = data[at : at + size]
                yield pb.WriteUploadRequest(chunk=pb.UploadChunk(offset=offset + at, data=piece, crc32c=google_crc32c.value(piece)))

        reply = await self.stub.WriteUpload(requests(), metadata=self.metadata(), timeout=60)
        return reply.persisted_bytes

    async def finalize(self, upload: pb.Upload, data: bytes, skip: bool = False) -> pb.DatasetVersion:
        on_error = pb.ON_ROW_ERROR_SKIP if skip else pb.ON_ROW_ERROR_REJECT
        asked = pb.FinalizeUploadRequest(
            name=upload.name, total_bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), on_error=on_error
        )
        return await self("FinalizeUpload", asked)

    async def upload(self, dataset: str, data: bytes, skip: bool = False) -> pb.DatasetVersion:
        """A version of these bytes, VALIDATING."""
        upload = await self("CreateUpload", pb.CreateUploadRequest(parent=dataset))
        assert await self.write(upload, data) == len(data)
        return await self.finalize(upload, data, skip)

    async def validated(self, name: str) -> pb.DatasetVersion:
        """The version once it is READY or REJECTED."""
        async with asyncio.timeout(30):
            while (version := await self("GetDatasetVersion", pb.GetDatasetVersionRequest(name=name))).state == version.STATE_VALIDATING:
                await asyncio.sleep(0.02)
        return version

    async def version(self, dataset: str, data: bytes, skip: bool = False) -> pb.DatasetVersion:
        """A version of these bytes, READY or REJECTED."""
        return await self.validated((await self.upload(dataset, data, skip)).name)

    async def deleted(self, deletion: deletion_pb2.Deletion) -> deletion_pb2.Deletion:
        """The erasure once it is DONE."""
        async with asyncio.timeout(30):
            while (found := await self("GetDeletion", pb.GetDeletionRequest(name=deletion.name))).state != found.STATE_DONE:
                await asyncio.sleep(0.02)
        return found

    async def findings(self, version: str, **asked: Any) -> list[tuple[int, int, str, str]]:
        reply = await self("ListRowErrors", pb.ListRowErrorsRequest(parent=version, page_size=1_000, **asked))
        return [(found.line, found.byte_offset, found.field, found.rule) for found in reply.row_errors]


@dataclass
class Served:
    """What a test talks to, and what is behind it."""

    address: str
    channel: grpc.aio.Channel
    store: FineTuneStore
    objects: Objects
    servicer: DatasetServicer
    validators: Validators
    eraser: Eraser

    def tenant(self, project: str = "") -> Tenant:
        return Tenant(dataset_pb2_grpc.DatasetServiceStub(self.channel), project or f"t-{uuid4().hex[:8]}")


@asynccontextmanager
async def datasets_served(
    database_url: str, folder: Any, settings: DatasetSettings = DEFAULTS, *, validate: bool = True, processes: bool = False, **values: Any
) -> AsyncIterator[Served]:
    """Serve, with validators if wanted: in threads, which start at once, or in processes of their own."""
    url = f"file://{folder}"
    objects = open_objects(url)
    async with open_store(database_url, wait=True) as store:
        validators = Validators(store, objects, settings, host=None if processes else ThreadHost(objects))
        eraser = Eraser(store, objects, settings, KEY, "test")
        servicer = DatasetServicer(
            Desk(store, PageTokens(os.urandom(32))), objects, settings, changed=(validators.wake, eraser.wake), **values
        )
        verifier = CallerVerifier({"test": KEY.public_key()}, AUDIENCE)
        policy = Policy(authenticate=verified(verifier), deadline_cap_s=lambda method: 60.0)
        async with serve(
            Listener(),
            lambda server: dataset_pb2_grpc.add_DatasetServiceServicer_to_server(servicer, server),
            [SERVICE],
            policy=policy,
        ) as serving:
            await serving.ready()
            working = [asyncio.create_task(each.run()) for each in (validators, eraser) if validate]
            options = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(serving.address, options=options) as channel:
                try:
                    yield Served(serving.address, channel, store, objects, servicer, validators, eraser)
                finally:
                    for task in working:
                        task.cancel()
                    await asyncio.gather(*working, return_exceptions=True)
            await serving.drain(announce_s=0, grace_s=0)
    objects.close()


async def main(database_url: str, folder: str) -> None:
    """Serve in a process of its own until killed; the first line is the address."""
    async with datasets_served(database_url, folder, processes=True) as served:
        print(served.address, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
