"""How versions come in and go out: an adapter trained elsewhere, and an archive that we write."""

import asyncio
import hashlib
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import google_crc32c
from sqlalchemy.ext.asyncio import AsyncConnection

from argosy.v1 import model_pb2 as pb
from argosy.v1.finetune_pb2 import TuneMethod
from argosy_internal.training.v1.training_pb2 import POOLING_LAST, AdapterManifest, Part
from services.chassis import bounds
from services.chassis.errors import FieldInvalid, FieldOutOfRange, ModelCapability, ResourceNotFound, Shed, WrongState
from services.chassis.objects import Objects
from services.finetune import exports, importing, lineage, publishing, sql_models
from services.finetune.bases import Base, Bases
from services.finetune.importing import CONFIG, HEAD, WEIGHTS, Arriving
from services.finetune.imports import Checked, Order
from services.finetune.lineage import Signer
from services.finetune.publishing import Origin, Prepared
from services.finetune.queries import Record
from services.finetune.servicers import model_shown as shown
from services.finetune.servicers.model_aliases import MODEL_NAME, VERSION_NAME, found_model
from services.finetune.servicers.resources import Desk, caller, own

PIECE_BYTES = 512 << 10  # of one message
WINDOW_TOKENS = 1_024  # of a classified text, where training did not say
ARRIVALS, CHECKS = 8, 2
ARRIVAL_RETRY_SECONDS = 5.0
PARTS = {pb.IMPORT_PART_CONFIG: CONFIG, pb.IMPORT_PART_WEIGHTS: WEIGHTS, pb.IMPORT_PART_HEAD: HEAD}
METHODS = {
    TuneMethod.TUNE_METHOD_CHAT: "CHAT", TuneMethod.TUNE_METHOD_PREFERENCE: "CHAT", TuneMethod.TUNE_METHOD_CLASSIFY: "CLASSIFY",
}  # fmt: skip


@dataclass(frozen=True)
class _Whole:
    """A client stream as one request: replayed only for the same header and the same bytes."""

    header: pb.ImportHeader
    digest: bytes

    @property
    def request_id(self) -> str:
        """Of the header."""
        return self.header.request_id

    def SerializeToString(self, *, deterministic: bool) -> bytes:
        """What is compared."""
        return self.header.SerializeToString(deterministic=deterministic) + self.digest


class TransferMethods:
    """The part of ModelService that moves weights."""

    desk: Desk
    objects: Objects
    bases: Bases
    signer: Signer
    arrivals: asyncio.Semaphore  # imports whose parts lie here: each may take half a gigabyte of the disk
    checks: asyncio.Semaphore  # processes that check them

    # --- in -----------------------------------------------------------------------------------------------------------------------------

    async def ImportModelVersion(self, request_iterator: AsyncIterator[pb.ImportModelVersionRequest], context: Any) -> pb.ModelVersion:
        """Make a version of files whose every name, shape and number has been checked; nothing in them is run."""
        first = await anext(request_iterator, None)
        if first is None or first.WhichOneof("part") != "header":
            raise FieldInvalid("header", "missing")
        bounds.check(first)
        header = first.header
        (segment,) = own(header.parent, MODEL_NAME, "header.parent")
        if header.method not in METHODS:
            raise FieldInvalid("header.method", "not_importable")
        if (header.method == TuneMethod.TUNE_METHOD_CLASSIFY) != bool(header.tuned_labels):
            raise FieldInvalid("header.tuned_labels", "classify_only" if header.tuned_labels else "missing")
        async with self.desk.store.transaction() as connection:
            model = await found_model(connection, segment, "header.parent")
        base = await self.bases.get(model["base_model"], "header.parent")
        if self.arrivals.locked():
            raise Shed(ARRIVAL_RETRY_SECONDS)
        async with self.arrivals, _private_folder() as folder:
            whole = _Whole(header, await _receive(request_iterator, folder))
            order = Order(METHODS[header.method], tuple(header.tuned_labels), dict(base.modules), base.width)
            async with self.checks:
                checked = await importing.check(folder, order)
            return await self._publish_import(model, base, whole, checked, folder)

    async def _publish_import(self, model: Record, base: Base, whole: _Whole, checked: Checked, folder: Path) -> pb.ModelVersion:
        files = {lineage.ADAPTER: folder / "adapter.safetensors"}
        if whole.header.tuned_labels:
            files[lineage.HEAD] = folder / "head.out"
        prefix = f"uploads/{model['project_uid']}/{uuid4()}"
        try:
            parts = [await self._stored(prefix, name, file) for name, file in files.items()]
            manifest = AdapterManifest(
                project_uid=model["project_uid"], model=whole.header.parent, base_model=model["base_model"], base_digest=base.digest,
                method=whole.header.method, rank=checked.rank, alpha=checked.alpha, dropout=checked.dropout, targets=checked.targets,
                rslora=checked.rslora, dora=checked.dora, parts=parts, labels=whole.header.tuned_labels, pooling=POOLING_LAST,
                temperature=1.0 if whole.header.tuned_labels else 0.0, max_tokens=WINDOW_TOKENS if whole.header.tuned_labels else 0,
            )  # fmt: skip
            await publishing.verify(self.objects, manifest, prefix, base.modules)  # what the child wrote is not believed either
            prepared = await publishing.prepare(self.desk.store, self.objects, self.signer, manifest, prefix, Origin("IMPORT"))
        finally:
            await self.objects.delete_prefix(prefix)
        return await self._published("ImportModelVersion", whole, prepared)

    async def _stored(self, prefix: str, name: str, file: Path) -> Part:
        def work() -> Part:
            with file.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            self.objects.sync.store(file, f"{prefix}/{name}")
            return Part(name=name, sha256=digest, total_bytes=file.stat().st_size)

        return await self.objects.run(work)

    async def _published(self, method: str, request: Any, prepared: Prepared) -> pb.ModelVersion:
        """Publish under the request's id; a repetition gets the first reply, and what was prepared for it goes."""

        async def work(connection: AsyncConnection) -> pb.ModelVersion:
            await publishing.publish(connection, prepared, caller().key_id)
            model = await sql_models.model_by_uid(connection, prepared.project_uid, prepared.model_uid)
            row = await sql_models.version(connection, prepared.project_uid, prepared.model_uid, prepared.number)
            if model is None or row is None:
                raise ResourceNotFound("parent")
            return shown.version(row, model)

        try:
            made = await self.desk.change(method, request, pb.ModelVersion, work)
        except BaseException:
            await publishing.discard(self.desk.store, self.objects, prepared)
            raise
        if made.name != prepared.name:
            await publishing.discard(self.desk.store, self.objects, prepared)
        return made

    # --- out ----------------------------------------------------------------------------------------------------------------------------

    async def ExportModelVersion(self, request: pb.ExportModelVersionRequest, context: Any) -> AsyncIterator[pb.ExportModelVersionResponse]:
        """The archive from an offset on; the same version gives the same bytes."""
        bounds.check(request)
        segment, number = own(request.name, VERSION_NAME)
        async with self.desk.store.transaction() as connection:
            model = await found_model(connection, segment, "name")
            row = await sql_models.version(connection, model["project_uid"], model["uid"], int(number))
        if row is None:
            raise ResourceNotFound("name")
        if row["state"] != "READY":
            raise WrongState("name", row["state"])
        entries = await self._entries(row, merged=request.content == pb.EXPORT_CONTENT_MERGED)
        total = exports.archive_bytes(entries)
        if request.offset > total:
            raise FieldOutOfRange("offset", request.offset, total, "bytes")
        at = request.offset
        async for data in _pieces(exports.archive(entries, int(row["ready_time"].timestamp()), at)):
            yield pb.ExportModelVersionResponse(offset=at, data=data, crc32c=google_crc32c.value(data), total_bytes=total)
            at += len(data)
        if at == request.offset:
            yield pb.ExportModelVersionResponse(offset=at, total_bytes=total)

    async def _entries(self, row: Record, *, merged: bool) -> list[exports.Entry]:
        manifest = lineage.from_json(row["manifest"])
        place = lineage.place(row["project_uid"], row["adapter_digest"])
        if not merged:
            return await exports.adapter_entries(self.objects, place, manifest, bytes(row["envelope"]))
        base = await self.bases.get(manifest.base_model, "name")
        if base.digest != manifest.base_digest:
            raise ModelCapability("name", "base_changed")
        return await exports.merged_entries(self.objects, place, manifest, bytes(row["envelope"]), base.directory)


@asynccontextmanager
async def _private_folder() -> AsyncIterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="argosy-import-"))
    try:
        yield folder
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


async def _receive(requests: AsyncIterator[pb.ImportModelVersionRequest], folder: Path) -> bytes:
    """Write the parts as they come; the digest of all of them."""
    arriving, digests = Arriving(folder), {part: hashlib.sha256() for part in PARTS}
    async for request in requests:
        bounds.check(request)
        if request.WhichOneof("part") != "chunk":
            raise FieldInvalid("header", "repeated")
        chunk = request.chunk
        holds = not chunk.HasField("crc32c") or google_crc32c.value(chunk.data) == chunk.crc32c
        await arriving.write(PARTS[chunk.part], chunk.offset, chunk.data, holds)
        digests[chunk.part].update(chunk.data)
    arriving.check_whole()
    return b"".join(digest.digest() for digest in digests.values())


async def _pieces(source: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in messages that are full but for the last."""
    waiting = bytearray()
    async for piece in source:
        waiting += piece
        while len(waiting) >= PIECE_BYTES:
            yield bytes(waiting[:PIECE_BYTES])
            del waiting[:PIECE_BYTES]
    if waiting:
        yield bytes(waiting)
