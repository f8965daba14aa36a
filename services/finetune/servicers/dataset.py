"""DatasetService: datasets, uploads, versions and their erasure."""

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import google_crc32c
import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from argosy.v1 import dataset_pb2 as pb
from argosy.v1 import deletion_pb2
from services.chassis import bounds, lists
from services.chassis.channel import remaining
from services.chassis.errors import (
    ChecksumMismatch,
    FieldInvalid,
    FieldOutOfRange,
    HasDependants,
    QuotaExceeded,
    RequestInFlight,
    ResourceExists,
    ResourceNotFound,
    ScopeMissing,
    Shed,
    UploadFenced,
    UploadOffset,
    WrongState,
)
from services.chassis.objects import Objects
from services.finetune import dataset_store, upload_store
from services.finetune.dataset_store import layout_of
from services.finetune.datasets import Dependants
from services.finetune.pii import KINDS
from services.finetune.queries import Record, after_of
from services.finetune.rows import Layout
from services.finetune.schema.datasets import uploads
from services.finetune.servicers import dataset_messages as messages
from services.finetune.servicers.resources import NUMBER, SEGMENT, UUID_SEGMENT, Desk, caller, own, paths
from services.finetune.settings import DatasetSettings
from services.finetune.upload_writer import Hashers, UploadWriter, hash_parts
from services.finetune.uploads import Scan
from services.finetune.validating import data_path

SERVICE = "argosy.v1.DatasetService"
PROJECT_NAME = re.compile(rf"projects/({SEGMENT})")
DATASET_NAME = re.compile(rf"projects/({SEGMENT})/datasets/({SEGMENT})")
VERSION_NAME = re.compile(rf"projects/({SEGMENT})/datasets/({SEGMENT})/versions/({NUMBER})")
UPLOAD_NAME = re.compile(rf"projects/({SEGMENT})/datasets/({SEGMENT})/uploads/({UUID_SEGMENT})")
DELETION_NAME = re.compile(rf"projects/({SEGMENT})/deletions/({UUID_SEGMENT})")
MUTABLE = ("display_name", "labels", "layout", "retention")
DATASET_ORDERS = frozenset({"name", "create_time", "update_time", "display_name"})
VERSION_ORDERS = frozenset({"create_time", "update_time"})
VERSION_STATES = frozenset({"VALIDATING", "READY", "REJECTED"})
CONTENT = "datasets.content"
READ_BYTES = 512 << 10  # of one message
ANSWER_SECONDS = 0.5  # of a deadline, kept to say that an upload is still being hashed


@dataclass(eq=False)
class DatasetServicer:
    """argosy.v1.DatasetService. Each of `changed` is called when there may be something to validate or to erase."""

    desk: Desk
    objects: Objects
    settings: DatasetSettings
    dependants: Sequence[Dependants] = ()
    changed: Sequence[Callable[[], None]] = ()
    _hashers: Hashers = field(default_factory=Hashers)
    _reading: dict[tuple[str, int], "asyncio.Task[Any]"] = field(default_factory=dict)  # uid and bytes of uploads that are hashed again
    _writers: int = 0  # streams that upload now

    # --- datasets -----------------------------------------------------------------------------------------------------------------------

    async def CreateDataset(self, request: pb.CreateDatasetRequest, context: Any) -> pb.Dataset:
        """Make an empty dataset."""
        bounds.check(request)
        own(request.parent, PROJECT_NAME, "parent")
        layout = messages.layout_from(request.dataset)
        who = caller()

        async def work(connection: AsyncConnection) -> pb.Dataset:
            if await dataset_store.dataset(connection, who.project_uid, request.dataset_id) is not None:
                raise ResourceExists("dataset_id")
            asked = request.dataset
            row = await dataset_store.add_dataset(
                connection, who.project_uid, who.project, request.dataset_id, layout,
                display_name=asked.display_name, labels=dict(asked.labels),
                retention_seconds=asked.retention.seconds if asked.HasField("retention") else None,
            )  # fmt: skip
            return messages.dataset(row, who.project)

        return await self.desk.change("CreateDataset", request, pb.Dataset, work)

    async def GetDataset(self, request: pb.GetDatasetRequest, context: Any) -> pb.Dataset:
        """One dataset."""
        bounds.check(request)
        async with self.desk.store.transaction() as connection:
            return await self._shown(connection, await _dataset(connection, request.name))

    async def ListDatasets(self, request: pb.ListDatasetsRequest, context: Any) -> pb.ListDatasetsResponse:
        """The project's datasets."""
        bounds.check(request)
        own(request.parent, PROJECT_NAME, "parent")
        conditions = lists.conditions(request.filter, frozenset())
        order = lists.order(request.order_by, DATASET_ORDERS, "create_time")
        listing = self.desk.listing(request.page_size, request.page_token, "ListDatasets", request.parent, request.filter, request.order_by)
        who = caller()
        async with self.desk.store.transaction() as connection:
            rows = await dataset_store.list_datasets(connection, who.project_uid, conditions, order, listing.after, listing.limit)
            latest = await dataset_store.latest_ready(connection, who.project_uid, [row["uid"] for row in rows])
        shown, token = self.desk.page(
            listing, rows, lambda row: messages.dataset(row, who.project, latest.get(row["uid"])), lambda row: after_of(row, order[0])
        )
        return pb.ListDatasetsResponse(datasets=shown, next_page_token=token)

    async def UpdateDataset(self, request: pb.UpdateDatasetRequest, context: Any) -> pb.Dataset:
        """Change what may change; a new layout holds for versions made from now on."""
        bounds.check(request)
        asked = request.dataset
        fields = paths(asked, request.update_mask, MUTABLE)
        own(asked.name, DATASET_NAME, "dataset.name")
        who = caller()

        async def work(connection: AsyncConnection) -> pb.Dataset:
            row = await _dataset(connection, asked.name, "dataset.name", lock=True)
            lists.check_etag(asked.etag, row["uid"], row["revision"], "dataset.etag")
            values: dict[str, Any] = {}
            if "display_name" in fields:
                values["display_name"] = asked.display_name
            if "labels" in fields:
                values["labels"] = dict(asked.labels)
            if "layout" in fields:
                values["layout"] = msgspec.to_builtins(messages.layout_from(asked, layout_of(row).format))
            elif asked.format and messages.FORMATS[asked.format] != layout_of(row).format:
                raise FieldInvalid("dataset.format", "immutable")
            if "retention" in fields:
                values["retention_seconds"] = asked.retention.seconds if asked.HasField("retention") else None
            changed = await dataset_store.change_dataset(connection, who.project_uid, row["uid"], **values) if values else row
            return await self._shown(connection, changed)

        return await self.desk.change("UpdateDataset", request, pb.Dataset, work)

    def _tell(self) -> None:
        for each in self.changed:
            each()

    async def _shown(self, connection: AsyncConnection, row: Record) -> pb.Dataset:
        latest = await dataset_store.latest_ready(connection, row["project_uid"], [row["uid"]])
        return messages.dataset(row, caller().project, latest.get(row["uid"]))

    # --- uploads ------------------------------------------------------------------------------------------------------------------------

    async def CreateUpload(self, request: pb.CreateUploadRequest, context: Any) -> pb.Upload:
        """Open an upload; what is announced over the quota is refused now."""
        bounds.check(request)
        own(request.parent, DATASET_NAME, "parent")
        who = caller()
        announced = request.total_bytes if request.HasField("total_bytes") else None

        async def work(connection: AsyncConnection) -> pb.Upload:
            parent = await _dataset(connection, request.parent, "parent", lock=True)
            limit = self.settings.upload_bytes
            if limit and (announced or 0) > limit:
                raise QuotaExceeded("upload_bytes")
            row = await upload_store.add_upload(connection, who.project_uid, parent["uid"], announced, request.sha256)
            limit = self.settings.stored_bytes_per_project
            if limit and await upload_store.stored_bytes(connection, who.project_uid) > limit:
                raise QuotaExceeded("stored_bytes")
            limit = self.settings.open_uploads_per_project
            if limit and await upload_store.open_uploads(connection, who.project_uid) > limit:
                raise QuotaExceeded("open_uploads")
            return messages.upload(row, request.parent)

        return await self.desk.change("CreateUpload", request, pb.Upload, work)

    async def GetUpload(self, request: pb.GetUploadRequest, context: Any) -> pb.Upload:
        """One upload."""
        bounds.check(request)
        async with self.desk.store.transaction() as connection:
            row = await _upload(connection, request.name)
            above = _above(request.name)
            return messages.upload(row, above, await self._version_name(connection, row["version_uid"], above))

    async def ResumeUpload(self, request: pb.ResumeUploadRequest, context: Any) -> pb.Upload:
        """Fence off every writer there was."""
        bounds.check(request)
        own(request.name, UPLOAD_NAME)

        async def work(connection: AsyncConnection) -> pb.Upload:
            row = _open(await _upload(connection, request.name, lock=True))
            changed = await upload_store.change_upload(connection, row["project_uid"], row["uid"], writer_epoch=uploads.c.writer_epoch + 1)
            assert changed is not None  # its row is locked
            return messages.upload(changed, _above(request.name))

        return await self.desk.change("ResumeUpload", request, pb.Upload, work)

    async def WriteUpload(self, requests: AsyncIterator[pb.WriteUploadRequest], context: Any) -> pb.WriteUploadResponse:
        """Store chunks; what is acknowledged is stored for good."""
        writer: UploadWriter | None = None
        if self._writers >= self.settings.upload_streams:
            raise Shed  # each may hold 16 MiB that are not stored yet
        self._writers += 1
        try:
            async for request in requests:
                bounds.check(request)
                if writer is None:
                    writer = await self._writer(request)
                    continue
                if request.WhichOneof("part") != "chunk":
                    raise FieldInvalid("header", "first_only")
                chunk = request.chunk
                await writer.write(chunk.offset, chunk.data, chunk.crc32c if chunk.HasField("crc32c") else None)
            if writer is None:
                raise FieldInvalid("header", "missing")
            await writer.flush()
            return pb.WriteUploadResponse(persisted_bytes=writer.persisted)
        finally:
            self._writers -= 1
            if writer is not None:
                await writer.close()

    async def _writer(self, request: pb.WriteUploadRequest) -> UploadWriter:
        if request.WhichOneof("part") != "header":
            raise FieldInvalid("header", "missing")
        async with self.desk.store.transaction() as connection:
            row = await _upload(connection, request.header.upload, "header.upload")
            parent = await _dataset(connection, _above(request.header.upload), "header.upload")
            if row["writer_epoch"] != request.header.writer_epoch:
                raise UploadFenced
            _open(row, "header.upload")
        return UploadWriter(
            self.desk.store, self.objects, self.settings, self._hashers, row, request.header.writer_epoch, self._rows(parent)
        )

    def _rows(self, parent: Record) -> int:
        """Lines an upload may have; 0: any number, for a record of a CSV may span lines, and its rows are counted in validation."""
        return self.settings.rows_per_version if layout_of(parent).encoding == "jsonl" else 0

    async def FinalizeUpload(self, request: pb.FinalizeUploadRequest, context: Any) -> pb.DatasetVersion:
        """End an upload: a version to validate, or the live one of the same bytes."""
        bounds.check(request)
        own(request.name, UPLOAD_NAME)
        above = _above(request.name)
        who = caller()
        async with self.desk.store.transaction() as connection:
            before = await _upload(connection, request.name)
            parts = await upload_store.parts(connection, who.project_uid, before["uid"])
        sha256 = ""
        if before["state"] == "OPEN" and before["persisted_bytes"] == request.total_bytes:
            sha256 = await self._sha256(before, parts)

        async def work(connection: AsyncConnection) -> pb.DatasetVersion:
            parent = await _dataset(connection, above, lock=True)
            row = await _upload(connection, request.name, lock=True)
            if row["state"] == "FINALIZED" and row["version_uid"] is not None:
                made = await dataset_store.version_of_uid(connection, who.project_uid, row["version_uid"])
                if made is not None and made["state"] != "DELETED" and made["sha256"] == request.sha256:
                    return await self._version(connection, made, above)  # the reply was lost
            _open(row)
            if row["persisted_bytes"] != request.total_bytes or row["persisted_bytes"] != before["persisted_bytes"]:
                raise UploadOffset(row["persisted_bytes"])
            if sha256 != request.sha256 or row["sha256"] not in ("", sha256):
                raise ChecksumMismatch(0)
            breach = msgspec.convert(row["scan"], Scan).finish(self._rows(parent))
            if breach is not None:
                raise messages.refused(breach)
            layout = layout_of(parent)
            found = await dataset_store.same_bytes(connection, who.project_uid, parent["uid"], sha256, layout)
            if found is None:
                found = await dataset_store.add_version(
                    connection, parent, layout, sha256=sha256, total_bytes=row["persisted_bytes"], upload_uid=row["uid"],
                    skip_errors=request.on_error == pb.ON_ROW_ERROR_SKIP,
                )  # fmt: skip
            await upload_store.change_upload(connection, who.project_uid, row["uid"], state="FINALIZED", version_uid=found["uid"])
            return await self._version(connection, found, above)

        shown = await self.desk.change("FinalizeUpload", request, pb.DatasetVersion, work)
        self._hashers.forget(before["uid"])
        self._tell()
        return shown

    async def _sha256(self, row: Record, parts: list[str]) -> str:
        """Of all that an upload has stored. Where another process has hashed it, it is read back, once for all who ask meanwhile.

        Raises:
            RequestInFlight: the caller's time is up before that; it goes on, and the next call finds it done.
        """
        uid, size = row["uid"], row["persisted_bytes"]
        known = self._hashers.at(uid, size)
        if known is not None:
            return str(known.hexdigest())
        reading = self._reading.get((uid, size))
        if reading is None:
            reading = self._reading[uid, size] = asyncio.create_task(hash_parts(self.objects, parts), name="upload hash")
            reading.add_done_callback(partial(self._read, uid, size))
        await asyncio.wait({reading}, timeout=remaining(ANSWER_SECONDS))
        if not reading.done():
            raise RequestInFlight
        return str(reading.result().hexdigest())

    def _read(self, uid: str, size: int, reading: "asyncio.Task[Any]") -> None:
        self._reading.pop((uid, size), None)
        if not reading.cancelled() and reading.exception() is None:
            self._hashers.keep(uid, size, reading.result())

    async def DeleteUpload(self, request: pb.DeleteUploadRequest, context: Any) -> deletion_pb2.Deletion:
        """Give an upload up. A version it became is not touched."""
        bounds.check(request)
        own(request.name, UPLOAD_NAME)
        who = caller()

        async def work(connection: AsyncConnection) -> deletion_pb2.Deletion:
            row = await _upload(connection, request.name, lock=True)
            needed = row["state"] == "FINALIZED"  # its parts are the version's until they are put together; then they go anyway
            await upload_store.change_upload(connection, who.project_uid, row["uid"], state="DELETED", scan={}, failure=None)
            gone = () if needed else (f"uploads/{who.project_uid}/{row['uid']}",)
            made = await dataset_store.add_deletion(connection, who.project_uid, request.name, [request.name], gone, {})
            return messages.deletion(made, who.project)

        shown = await self.desk.change("DeleteUpload", request, deletion_pb2.Deletion, work, resource=lambda made: made.target)
        self._tell()
        return shown

    # --- versions -----------------------------------------------------------------------------------------------------------------------

    async def GetDatasetVersion(self, request: pb.GetDatasetVersionRequest, context: Any) -> pb.DatasetVersion:
        """One version."""
        bounds.check(request)
        async with self.desk.store.transaction() as connection:
            _, row = await _version(connection, request.name)
            return await self._version(connection, row, _above(request.name))

    async def ListDatasetVersions(self, request: pb.ListDatasetVersionsRequest, context: Any) -> pb.ListDatasetVersionsResponse:
        """A dataset's versions."""
        bounds.check(request)
        conditions = lists.conditions(request.filter, VERSION_STATES)
        if any(each.field.startswith("labels.") for each in conditions):
            raise FieldInvalid("filter", "field")
        order = lists.order(request.order_by, VERSION_ORDERS, "create_time")
        scope = ("ListDatasetVersions", request.parent, request.filter, request.order_by)
        listing = self.desk.listing(request.page_size, request.page_token, *scope)
        async with self.desk.store.transaction() as connection:
            parent = await _dataset(connection, request.parent, "parent")
            rows = await dataset_store.list_versions(
                connection, parent["project_uid"], parent["uid"], conditions, order, listing.after, listing.limit
            )  # fmt: skip
            names = await self._names(connection, rows, request.parent)
        shown, token = self.desk.page(
            listing, rows, lambda row: messages.version(row, request.parent, names), lambda row: after_of(row, order[0])
        )  # fmt: skip
        return pb.ListDatasetVersionsResponse(dataset_versions=shown, next_page_token=token)

    async def _version(self, connection: AsyncConnection, row: Record, above: str) -> pb.DatasetVersion:
        return messages.version(row, above, await self._names(connection, (row,), above))

    async def _names(self, connection: AsyncConnection, rows: Sequence[Record], above: str) -> Mapping[str, str]:
        """Names of the versions that these came from or led to."""
        uids = {uid for row in rows for uid in (row["source_uid"], row["derived_uid"]) if uid is not None}
        return {uid: await self._version_name(connection, uid, above) for uid in uids}

    async def _version_name(self, connection: AsyncConnection, uid: str | None, above: str) -> str:
        row = None if uid is None else await dataset_store.version_of_uid(connection, caller().project_uid, uid)
        return "" if row is None or row["state"] == "DELETED" else f"{above}/versions/{row['number']}"

    async def RedactDatasetVersion(self, request: pb.RedactDatasetVersionRequest, context: Any) -> pb.DatasetVersion:
        """Make a version without the personal data that was found."""
        bounds.check(request)
        own(request.name, VERSION_NAME)
        above = _above(request.name)
        for index, kind in enumerate(request.kinds):
            if kind not in KINDS:
                raise FieldInvalid(f"kinds[{index}]", "unknown")

        async def work(connection: AsyncConnection) -> pb.DatasetVersion:
            parent, row = await _version(connection, request.name, lock=True)
            if row["state"] != "READY":
                raise WrongState(state=row["state"])
            found = list((row["report"].get("summary") or {}).get("pii") or {})
            kinds = [kind for kind in (request.kinds or found) if kind in found]
            if not kinds:
                return await self._version(connection, row, above)  # there is nothing to take out: it is that version
            made = await dataset_store.add_version(
                connection, parent, layout_of(row), sha256="", total_bytes=row["total_bytes"], source_uid=row["uid"], redacted=kinds
            )  # fmt: skip
            limit = self.settings.stored_bytes_per_project
            if limit and await upload_store.stored_bytes(connection, row["project_uid"]) > limit:
                raise QuotaExceeded("stored_bytes")  # it is as large as what it is made from
            return await self._version(connection, made, above)

        shown = await self.desk.change("RedactDatasetVersion", request, pb.DatasetVersion, work)
        self._tell()
        return shown

    async def ListRowErrors(self, request: pb.ListRowErrorsRequest, context: Any) -> pb.ListRowErrorsResponse:
        """Findings that were kept, by line."""
        bounds.check(request)
        severity = messages.SEVERITIES.get(request.severity, "")
        listing = self.desk.listing(request.page_size, request.page_token, "ListRowErrors", request.parent, severity)
        async with self.desk.store.transaction() as connection:
            _, row = await _version(connection, request.parent, "parent")
            after = int(listing.after[0]) if listing.after else 0
            rows = await dataset_store.list_row_errors(connection, row["project_uid"], row["uid"], severity, after, listing.limit)
        shown, token = self.desk.page(listing, rows, messages.row_error, lambda found: [str(found["ordinal"])])
        return pb.ListRowErrorsResponse(row_errors=shown, next_page_token=token)

    async def ReadDatasetVersion(self, request: pb.ReadDatasetVersionRequest, context: Any) -> AsyncIterator[pb.ReadDatasetVersionResponse]:
        """The bytes, from an offset."""
        bounds.check(request)
        if CONTENT not in caller().scopes:
            raise ScopeMissing(CONTENT)
        async with self.desk.store.transaction() as connection:
            _, row = await _version(connection, request.name)
        if row["state"] == "VALIDATING":
            raise WrongState(state=row["state"])
        if request.offset > row["total_bytes"]:
            raise FieldOutOfRange("offset", request.offset, row["total_bytes"], "bytes")
        offset = request.offset
        path = data_path(row["project_uid"], row["dataset_uid"], row["uid"])
        if await self.objects.size(path) is None:  # refused before its bytes were put together
            raise WrongState(state=row["state"])
        async with contextlib.aclosing(self.objects.stream(path, offset)) as pieces:
            async for piece in pieces:
                for at in range(0, len(piece), READ_BYTES):
                    data = piece[at : at + READ_BYTES]
                    yield pb.ReadDatasetVersionResponse(offset=offset, data=data, crc32c=google_crc32c.value(data))
                    offset += len(data)

    # --- erasure ------------------------------------------------------------------------------------------------------------------------

    async def DeleteDataset(self, request: pb.DeleteDatasetRequest, context: Any) -> deletion_pb2.Deletion:
        """Erase a dataset with its versions and uploads."""
        bounds.check(request)
        own(request.name, DATASET_NAME)

        async def work(connection: AsyncConnection) -> deletion_pb2.Deletion:
            row = await _dataset(connection, request.name, lock=True)
            lists.check_etag(request.etag, row["uid"], row["revision"])
            project = row["project_uid"]
            versions = await dataset_store.versions_of(connection, project, row["uid"])
            opened = await upload_store.uploads_of(connection, project, row["uid"])
            for each in opened:
                await upload_store.change_upload(connection, project, each["uid"], state="DELETED", scan={}, failure=None)
            made = await self._erase(
                connection, request.name, versions, request.name, request.cascade, also=(request.name,),
                prefixes=(f"datasets/{project}/{row['uid']}", *(f"uploads/{project}/{each['uid']}" for each in opened)),
            )  # fmt: skip
            await dataset_store.change_dataset(
                connection, project, row["uid"], state="DELETED", delete_time=dataset_store.NOW, display_name="", labels={},
                layout=msgspec.to_builtins(Layout(layout_of(row).format)),
            )  # fmt: skip
            return made

        shown = await self.desk.change("DeleteDataset", request, deletion_pb2.Deletion, work, resource=lambda made: made.target)
        self._tell()
        return shown

    async def DeleteDatasetVersion(self, request: pb.DeleteDatasetVersionRequest, context: Any) -> deletion_pb2.Deletion:
        """Erase a version."""
        bounds.check(request)
        own(request.name, VERSION_NAME)

        async def work(connection: AsyncConnection) -> deletion_pb2.Deletion:
            parent, row = await _version(connection, request.name, lock=True)
            lists.check_etag(request.etag, row["uid"], row["revision"])
            prefixes = [f"datasets/{row['project_uid']}/{parent['uid']}/{row['uid']}"]
            if row["upload_uid"] is not None:
                prefixes.append(f"uploads/{row['project_uid']}/{row['upload_uid']}")
            return await self._erase(connection, request.name, (row,), _above(request.name), request.cascade, prefixes=prefixes)

        shown = await self.desk.change("DeleteDatasetVersion", request, deletion_pb2.Deletion, work, resource=lambda made: made.target)
        self._tell()
        return shown

    async def _erase(
        self, connection: AsyncConnection, target: str, versions: Sequence[Record], above: str, cascade: bool, *,
        also: Sequence[str] = (), prefixes: Sequence[str],
    ) -> deletion_pb2.Deletion:  # fmt: skip
        """Put versions and what depends on them out of reach, and have their bytes erased."""
        who = caller()
        uids = [row["uid"] for row in versions]
        names = [*also, *(f"{above}/versions/{row['number']}" for row in versions)]
        gone = list(prefixes)
        digests = {f"{above}/versions/{row['number']}": row["sha256"] for row in versions if row["sha256"]}
        for each in self.dependants if uids else ():
            if not cascade:
                if await each.of_versions(connection, who.project_uid, uids):
                    raise HasDependants
                continue
            erased = await each.erase(connection, who.project_uid, who.project, uids)
            names += erased.names
            gone += erased.prefixes
            digests |= erased.digests
        for row in versions:
            await dataset_store.bury_version(connection, row["project_uid"], row["uid"])
        made = await dataset_store.add_deletion(connection, who.project_uid, target, names, gone, digests)
        return messages.deletion(made, who.project)

    async def GetDeletion(self, request: pb.GetDeletionRequest, context: Any) -> deletion_pb2.Deletion:
        """One erasure."""
        bounds.check(request)
        (uid,) = own(request.name, DELETION_NAME)
        who = caller()
        async with self.desk.store.transaction() as connection:
            row = await dataset_store.deletion(connection, who.project_uid, uid)
        if row is None:
            raise ResourceNotFound("name")
        return messages.deletion(row, who.project)


def _above(name: str) -> str:
    """The dataset's name within that of a version or upload."""
    return name.rsplit("/", 2)[0]


async def _dataset(connection: AsyncConnection, name: str, field: str = "name", *, lock: bool = False) -> Record:
    (segment,) = own(name, DATASET_NAME, field)
    row = await dataset_store.dataset(connection, caller().project_uid, segment, lock=lock)
    if row is None:
        raise ResourceNotFound(field)
    return row


async def _version(connection: AsyncConnection, name: str, field: str = "name", *, lock: bool = False) -> tuple[Record, Record]:
    """A version and its dataset, both locked where asked."""
    segment, number = own(name, VERSION_NAME, field)
    parent = await dataset_store.dataset(connection, caller().project_uid, segment, lock=lock)
    row = None if parent is None else await dataset_store.version(connection, parent["project_uid"], parent["uid"], int(number), lock=lock)
    if parent is None or row is None:
        raise ResourceNotFound(field)
    return parent, row


async def _upload(connection: AsyncConnection, name: str, field: str = "name", *, lock: bool = False) -> Record:
    segment, uid = own(name, UPLOAD_NAME, field)
    parent = await dataset_store.dataset(connection, caller().project_uid, segment)
    row = None if parent is None else await upload_store.upload(connection, parent["project_uid"], parent["uid"], uid, lock=lock)
    if row is None:
        raise ResourceNotFound(field)
    return row


def _open(row: Record, field: str = "name") -> Record:
    """Raises WrongState unless the upload takes bytes."""
    state = "EXPIRED" if row["state"] == "OPEN" and row["late"] else row["state"]
    if state != "OPEN":
        raise WrongState(field, state)
    return row
