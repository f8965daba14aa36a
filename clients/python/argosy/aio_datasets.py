"""Rows on their way up, and what the fleet found in them. `datasets.py` is made from this file by tools/gen_sync_client.py.

An upload survives a lost connection, a drained gateway and a call's deadline: it goes on where the fleet's stored bytes end.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from argosy import errors, names, requests
from argosy.chunks import HashedFile, crc32c
from argosy.layouts import FORMATS
from argosy.v1 import dataset_pb2, deletion_pb2

if TYPE_CHECKING:
    from argosy.aio import AsyncClient

Progress = Callable[[int, int], None]  # bytes so far, bytes in all
STREAM_TIMEOUT_S = 300.0  # the fleet's cap
FINALIZE_TIMEOUT_S = 300.0  # the fleet may have to read back all that it has stored
TURN_S = 60.0  # a call's share of an upload: below the cap, and seldom enough to cost nothing
FRUITLESS = 6  # tries in a row that stored nothing: then the trouble is raised
BREAKS = (errors.Unavailable, errors.DeadlineExceeded, errors.Cancelled, errors.UploadOffset, errors.ChecksumMismatch)


class AsyncDatasets:
    """The project's datasets: `client.datasets`. A dataset may be called by its bare name, a version as `name/1`."""

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client
        self._stub = client.dataset_service

    async def _own(self, name: str) -> str:
        return names.own(await self._client.project(), "datasets", name)

    async def _version(self, name: str) -> str:
        return names.version(await self._client.project(), "datasets", name)

    async def create(
        self,
        name: str,
        format: str,
        *,
        layout: dataset_pb2.RowLayout | None = None,
        display_name: str = "",
        retention_s: float | None = None,
    ) -> dataset_pb2.Dataset:
        """A new, empty dataset; `format` is classify, chat or preference. Raises AlreadyExists where the name is taken."""
        whole = await self._own(name)
        dataset = dataset_pb2.Dataset(display_name=display_name, format=FORMATS[format], layout=layout)
        if retention_s is not None:
            dataset.retention.CopyFrom(requests.duration(retention_s))
        request = dataset_pb2.CreateDatasetRequest(
            parent=names.parent(whole), dataset_id=names.last(whole), dataset=dataset, request_id=requests.request_id()
        )
        return await self._client.call(self._stub.CreateDataset, request)

    async def ensure(self, name: str, format: str, *, layout: dataset_pb2.RowLayout | None = None) -> dataset_pb2.Dataset:
        """The dataset of that name, made if it is not there; an existing one reads what comes from now on by `layout`.

        Raises ValueError where it holds rows of another format.
        """
        try:
            return await self.create(name, format, layout=layout)
        except errors.AlreadyExists:
            found = await self.get(name)
        if found.format != FORMATS[format]:
            raise ValueError(f"{found.name} holds rows of another format than {format}: choose another name")
        if layout is None or layout == found.layout:
            return found
        changed = dataset_pb2.Dataset(name=found.name, layout=layout)
        request = dataset_pb2.UpdateDatasetRequest(dataset=changed, request_id=requests.request_id())
        request.update_mask.paths.append("layout")
        return await self._client.call(self._stub.UpdateDataset, request)

    async def get(self, name: str) -> dataset_pb2.Dataset:
        """One dataset."""
        return await self._client.call(self._stub.GetDataset, dataset_pb2.GetDatasetRequest(name=await self._own(name)))

    async def list(self, *, filter: str = "") -> AsyncIterator[dataset_pb2.Dataset]:
        """The project's datasets."""
        request = dataset_pb2.ListDatasetsRequest(parent=await self._client.project(), filter=filter)
        async for found in self._client.pages(self._stub.ListDatasets, request, "datasets"):
            yield found

    async def versions(self, name: str) -> AsyncIterator[dataset_pb2.DatasetVersion]:
        """A dataset's versions."""
        request = dataset_pb2.ListDatasetVersionsRequest(parent=await self._own(name))
        async for found in self._client.pages(self._stub.ListDatasetVersions, request, "dataset_versions"):
            yield found

    async def version(self, name: str) -> dataset_pb2.DatasetVersion:
        """One version, with the report of its validation."""
        request = dataset_pb2.GetDatasetVersionRequest(name=await self._version(name))
        return await self._client.call(self._stub.GetDatasetVersion, request)

    async def upload(
        self,
        name: str,
        path: str | Path,
        *,
        skip_bad_rows: bool = False,
        progress: Progress | None = None,
        resume: str = "",
        opened: Callable[[str], None] | None = None,
    ) -> dataset_pb2.DatasetVersion:
        """Send a file to a dataset: a version in VALIDATING, or the one that already has these bytes.

        `progress` is told bytes sent and bytes in all. `opened` is told the upload's name: given back as `resume`, even by another
        process, the upload goes on where it broke off. Raises ValueError for an empty file.
        """
        file = await asyncio.to_thread(HashedFile, Path(path))
        try:
            if file.total_bytes == 0:
                raise ValueError(f"{path} is empty")
            upload = await self._open(name, file.total_bytes, resume)
            if opened:
                opened(upload.name)
            if upload.state == dataset_pb2.Upload.STATE_FINALIZED:
                return await self.version(upload.dataset_version)
            await self._send(upload, file, progress)
            request = dataset_pb2.FinalizeUploadRequest(
                name=upload.name,
                total_bytes=file.total_bytes,
                sha256=await asyncio.to_thread(file.sha256),
                on_error=dataset_pb2.ON_ROW_ERROR_SKIP if skip_bad_rows else dataset_pb2.ON_ROW_ERROR_REJECT,
                request_id=requests.request_id(),
            )
            return await self._client.call(self._stub.FinalizeUpload, request, timeout_s=FINALIZE_TIMEOUT_S)
        finally:
            file.close()

    async def _open(self, name: str, total_bytes: int, resume: str) -> dataset_pb2.Upload:
        """The upload to write to: the one to resume if it still can be, else a new one."""
        if resume:
            try:
                return await self._resume(resume)
            except (errors.NotFound, errors.FailedPrecondition, errors.InvalidArgument):
                pass  # given up, finalised or expired since: start anew
        request = dataset_pb2.CreateUploadRequest(parent=await self._own(name), total_bytes=total_bytes, request_id=requests.request_id())
        return await self._client.call(self._stub.CreateUpload, request)

    async def _resume(self, upload: str) -> dataset_pb2.Upload:
        request = dataset_pb2.ResumeUploadRequest(name=upload, request_id=requests.request_id())
        return await self._client.call(self._stub.ResumeUpload, request)

    async def _send(self, upload: dataset_pb2.Upload, file: HashedFile, progress: Progress | None) -> None:
        trouble: errors.ArgosyError | None = None
        fruitless = 0
        while upload.persisted_bytes < file.total_bytes:
            stood = upload.persisted_bytes
            try:
                if trouble is not None:
                    upload = await self._resume(upload.name)
                reply = await self._client.call(self._stub.WriteUpload, self._parts(upload, file, progress), timeout_s=STREAM_TIMEOUT_S)
                upload.persisted_bytes, trouble = reply.persisted_bytes, None
            except BREAKS as error:
                trouble = error
            fruitless = 0 if upload.persisted_bytes > stood else fruitless + 1
            if fruitless > FRUITLESS:
                raise trouble or errors.InternalError("The fleet stores no more of the upload")
            if trouble is not None:
                await asyncio.sleep(trouble.retry_after_s or min(5.0, 0.1 * 2**fruitless))
        if progress:
            progress(file.total_bytes, file.total_bytes)

    async def _parts(
        self, upload: dataset_pb2.Upload, file: HashedFile, progress: Progress | None
    ) -> AsyncIterator[dataset_pb2.WriteUploadRequest]:
        header = dataset_pb2.UploadHeader(upload=upload.name, writer_epoch=upload.writer_epoch)
        yield dataset_pb2.WriteUploadRequest(header=header)
        offset, end = upload.persisted_bytes, time.monotonic() + TURN_S
        while offset < file.total_bytes and time.monotonic() < end:
            data = await asyncio.to_thread(file.read, offset)
            chunk = dataset_pb2.UploadChunk(offset=offset, data=data, crc32c=crc32c(data))
            yield dataset_pb2.WriteUploadRequest(chunk=chunk)
            offset += len(data)
            if progress:
                progress(offset, file.total_bytes)

    async def wait(self, name: str, *, progress: Progress | None = None) -> dataset_pb2.DatasetVersion:
        """A version once it is READY or REJECTED; `progress` is told bytes checked and bytes in all."""
        pause_s = 0.05
        while True:
            version = await self.version(name)
            if progress:
                progress(version.validated_bytes, version.total_bytes)
            if version.state != dataset_pb2.DatasetVersion.STATE_VALIDATING:
                return version
            await asyncio.sleep(pause_s)
            pause_s = min(1.0, pause_s * 1.5)

    async def row_errors(self, name: str, *, errors_only: bool = False) -> AsyncIterator[dataset_pb2.RowError]:
        """The findings of a version's validation by line: where and which rule, never what stands there; at most 1,000 are kept."""
        severity = dataset_pb2.ROW_SEVERITY_ERROR if errors_only else dataset_pb2.ROW_SEVERITY_UNSPECIFIED
        request = dataset_pb2.ListRowErrorsRequest(parent=await self._version(name), page_size=1_000, severity=severity)
        async for found in self._client.pages(self._stub.ListRowErrors, request, "row_errors"):
            yield found

    async def redact(self, name: str, kinds: Sequence[str] = ()) -> dataset_pb2.DatasetVersion:
        """A new version without the personal data found in this one: the kinds named, or all."""
        request = dataset_pb2.RedactDatasetVersionRequest(name=await self._version(name), kinds=kinds, request_id=requests.request_id())
        return await self._client.call(self._stub.RedactDatasetVersion, request)

    async def read(self, name: str, *, offset: int = 0) -> AsyncIterator[bytes]:
        """The bytes of a version. Needs the scope `datasets.content`. Raises ChecksumMismatch where a part arrives altered."""
        request = dataset_pb2.ReadDatasetVersionRequest(name=await self._version(name), offset=offset)
        async for part in self._client.stream(self._stub.ReadDatasetVersion, request, timeout_s=STREAM_TIMEOUT_S):
            if crc32c(part.data) != part.crc32c:
                raise errors.ChecksumMismatch("A part of the version arrived altered", reason="CHECKSUM_MISMATCH")
            yield part.data

    async def delete(self, name: str, *, cascade: bool = False) -> deletion_pb2.Deletion:
        """Erase a dataset, or `name/1` one version. With `cascade` also what was made from it; without, that refuses (HasDependants)."""
        request_id = requests.request_id()
        try:
            version = await self._version(name)
        except ValueError:
            whole = dataset_pb2.DeleteDatasetRequest(name=await self._own(name), cascade=cascade, request_id=request_id)
            return await self._client.call(self._stub.DeleteDataset, whole)
        request = dataset_pb2.DeleteDatasetVersionRequest(name=version, cascade=cascade, request_id=request_id)
        return await self._client.call(self._stub.DeleteDatasetVersion, request)

    async def deletion(self, name: str) -> deletion_pb2.Deletion:
        """How far an erasure is; its signed certificate once it is DONE."""
        return await self._client.call(self._stub.GetDeletion, dataset_pb2.GetDeletionRequest(name=name))
