"""The blocking datasets. Made from aio_datasets.py by tools/gen_sync_client.py: edit that file, then run `make protos`.

An upload survives a lost connection, a drained gateway and a call's deadline: it goes on where the fleet's stored bytes end.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from argosy import errors, names, requests
from argosy.chunks import HashedFile, crc32c
from argosy.layouts import FORMATS
from argosy.v1 import dataset_pb2, deletion_pb2

if TYPE_CHECKING:
    from argosy.client import Client

Progress = Callable[[int, int], None]  # bytes so far, bytes in all
STREAM_TIMEOUT_S = 300.0  # the fleet's cap
FINALIZE_TIMEOUT_S = 300.0  # the fleet may have to read back all that it has stored
TURN_S = 60.0  # a call's share of an upload: below the cap, and seldom enough to cost nothing
FRUITLESS = 6  # tries in a row that stored nothing: then the trouble is raised
BREAKS = (errors.Unavailable, errors.DeadlineExceeded, errors.Cancelled, errors.UploadOffset, errors.ChecksumMismatch)


class Datasets:
    """The project's datasets: `client.datasets`. A dataset may be called by its bare name, a version as `name/1`."""

    def __init__(self, client: "Client") -> None:
        self._client = client
        self._stub = client.dataset_service

    def _own(self, name: str) -> str:
        return names.own(self._client.project(), "datasets", name)

    def _version(self, name: str) -> str:
        return names.version(self._client.project(), "datasets", name)

    def create(
        self,
        name: str,
        format: str,
        *,
        layout: dataset_pb2.RowLayout | None = None,
        display_name: str = "",
        retention_s: float | None = None,
    ) -> dataset_pb2.Dataset:
        """A new, empty dataset; `format` is classify, chat or preference. Raises AlreadyExists where the name is taken."""
        whole = self._own(name)
        dataset = dataset_pb2.Dataset(display_name=display_name, format=FORMATS[format], layout=layout)
        if retention_s is not None:
            dataset.retention.CopyFrom(requests.duration(retention_s))
        request = dataset_pb2.CreateDatasetRequest(
            parent=names.parent(whole), dataset_id=names.last(whole), dataset=dataset, request_id=requests.request_id()
        )
        return self._client.call(self._stub.CreateDataset, request)

    def ensure(self, name: str, format: str, *, layout: dataset_pb2.RowLayout | None = None) -> dataset_pb2.Dataset:
        """The dataset of that name, made if it is not there; an existing one reads what comes from now on by `layout`.

        Raises ValueError where it holds rows of another format.
        """
        try:
            return self.create(name, format, layout=layout)
        except errors.AlreadyExists:
            found = self.get(name)
        if found.format != FORMATS[format]:
            raise ValueError(f"{found.name} holds rows of another format than {format}: choose another name")
        if layout is None or layout == found.layout:
            return found
        changed = dataset_pb2.Dataset(name=found.name, layout=layout)
        request = dataset_pb2.UpdateDatasetRequest(dataset=changed, request_id=requests.request_id())
        request.update_mask.paths.append("layout")
        return self._client.call(self._stub.UpdateDataset, request)

    def get(self, name: str) -> dataset_pb2.Dataset:
        """One dataset."""
        return self._client.call(self._stub.GetDataset, dataset_pb2.GetDatasetRequest(name=self._own(name)))

    def list(self, *, filter: str = "") -> Iterator[dataset_pb2.Dataset]:
        """The project's datasets."""
        request = dataset_pb2.ListDatasetsRequest(parent=self._client.project(), filter=filter)
        yield from self._client.pages(self._stub.ListDatasets, request, "datasets")

    def versions(self, name: str) -> Iterator[dataset_pb2.DatasetVersion]:
        """A dataset's versions."""
        request = dataset_pb2.ListDatasetVersionsRequest(parent=self._own(name))
        yield from self._client.pages(self._stub.ListDatasetVersions, request, "dataset_versions")

    def version(self, name: str) -> dataset_pb2.DatasetVersion:
        """One version, with the report of its validation."""
        request = dataset_pb2.GetDatasetVersionRequest(name=self._version(name))
        return self._client.call(self._stub.GetDatasetVersion, request)

    def upload(
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
        file = HashedFile(Path(path))
        try:
            if file.total_bytes == 0:
                raise ValueError(f"{path} is empty")
            upload = self._open(name, file.total_bytes, resume)
            if opened:
                opened(upload.name)
            if upload.state == dataset_pb2.Upload.STATE_FINALIZED:
                return self.version(upload.dataset_version)
            self._send(upload, file, progress)
            request = dataset_pb2.FinalizeUploadRequest(
                name=upload.name,
                total_bytes=file.total_bytes,
                sha256=file.sha256(),
                on_error=dataset_pb2.ON_ROW_ERROR_SKIP if skip_bad_rows else dataset_pb2.ON_ROW_ERROR_REJECT,
                request_id=requests.request_id(),
            )
            return self._client.call(self._stub.FinalizeUpload, request, timeout_s=FINALIZE_TIMEOUT_S)
        finally:
            file.close()

    def _open(self, name: str, total_bytes: int, resume: str) -> dataset_pb2.Upload:
        """The upload to write to: the one to resume if it still can be, else a new one."""
        if resume:
            try:
                return self._resume(resume)
            except (errors.NotFound, errors.FailedPrecondition, errors.InvalidArgument):
                pass  # given up, finalised or expired since: start anew
        request = dataset_pb2.CreateUploadRequest(parent=self._own(name), total_bytes=total_bytes, request_id=requests.request_id())
        return self._client.call(self._stub.CreateUpload, request)

    def _resume(self, upload: str) -> dataset_pb2.Upload:
        request = dataset_pb2.ResumeUploadRequest(name=upload, request_id=requests.request_id())
        return self._client.call(self._stub.ResumeUpload, request)

    def _send(self, upload: dataset_pb2.Upload, file: HashedFile, progress: Progress | None) -> None:
        trouble: errors.ArgosyError | None = None
        fruitless = 0
        while upload.persisted_bytes < file.total_bytes:
            stood = upload.persisted_bytes
            try:
                if trouble is not None:
                    upload = self._resume(upload.name)
                reply = self._client.call(self._stub.WriteUpload, self._parts(upload, file, progress), timeout_s=STREAM_TIMEOUT_S)
                upload.persisted_bytes, trouble = reply.persisted_bytes, None
            except BREAKS as error:
                trouble = error
            fruitless = 0 if upload.persisted_bytes > stood else fruitless + 1
            if fruitless > FRUITLESS:
                raise trouble or errors.InternalError("The fleet stores no more of the upload")
            if trouble is not None:
                time.sleep(trouble.retry_after_s or min(5.0, 0.1 * 2**fruitless))
        if progress:
            progress(file.total_bytes, file.total_bytes)

    def _parts(self, upload: dataset_pb2.Upload, file: HashedFile, progress: Progress | None) -> Iterator[dataset_pb2.WriteUploadRequest]:
        header = dataset_pb2.UploadHeader(upload=upload.name, writer_epoch=upload.writer_epoch)
        yield dataset_pb2.WriteUploadRequest(header=header)
        offset, end = upload.persisted_bytes, time.monotonic() + TURN_S
        while offset < file.total_bytes and time.monotonic() < end:
            data = file.read(offset)
            chunk = dataset_pb2.UploadChunk(offset=offset, data=data, crc32c=crc32c(data))
            yield dataset_pb2.WriteUploadRequest(chunk=chunk)
            offset += len(data)
            if progress:
                progress(offset, file.total_bytes)

    def wait(self, name: str, *, progress: Progress | None = None) -> dataset_pb2.DatasetVersion:
        """A version once it is READY or REJECTED; `progress` is told bytes checked and bytes in all."""
        pause_s = 0.05
        while True:
            version = self.version(name)
            if progress:
                progress(version.validated_bytes, version.total_bytes)
            if version.state != dataset_pb2.DatasetVersion.STATE_VALIDATING:
                return version
            time.sleep(pause_s)
            pause_s = min(1.0, pause_s * 1.5)

    def row_errors(self, name: str, *, errors_only: bool = False) -> Iterator[dataset_pb2.RowError]:
        """The findings of a version's validation by line: where and which rule, never what stands there; at most 1,000 are kept."""
        severity = dataset_pb2.ROW_SEVERITY_ERROR if errors_only else dataset_pb2.ROW_SEVERITY_UNSPECIFIED
        request = dataset_pb2.ListRowErrorsRequest(parent=self._version(name), page_size=1_000, severity=severity)
        yield from self._client.pages(self._stub.ListRowErrors, request, "row_errors")

    def redact(self, name: str, kinds: Sequence[str] = ()) -> dataset_pb2.DatasetVersion:
        """A new version without the personal data found in this one: the kinds named, or all."""
        request = dataset_pb2.RedactDatasetVersionRequest(name=self._version(name), kinds=kinds, request_id=requests.request_id())
        return self._client.call(self._stub.RedactDatasetVersion, request)

    def read(self, name: str, *, offset: int = 0) -> Iterator[bytes]:
        """The bytes of a version. Needs the scope `datasets.content`. Raises ChecksumMismatch where a part arrives altered."""
        request = dataset_pb2.ReadDatasetVersionRequest(name=self._version(name), offset=offset)
        for part in self._client.stream(self._stub.ReadDatasetVersion, request, timeout_s=STREAM_TIMEOUT_S):
            if crc32c(part.data) != part.crc32c:
                raise errors.ChecksumMismatch("A part of the version arrived altered", reason="CHECKSUM_MISMATCH")
            yield part.data

    def delete(self, name: str, *, cascade: bool = False) -> deletion_pb2.Deletion:
        """Erase a dataset, or `name/1` one version. With `cascade` also what was made from it; without, that refuses (HasDependants)."""
        request_id = requests.request_id()
        try:
            version = self._version(name)
        except ValueError:
            whole = dataset_pb2.DeleteDatasetRequest(name=self._own(name), cascade=cascade, request_id=request_id)
            return self._client.call(self._stub.DeleteDataset, whole)
        request = dataset_pb2.DeleteDatasetVersionRequest(name=version, cascade=cascade, request_id=request_id)
        return self._client.call(self._stub.DeleteDatasetVersion, request)

    def deletion(self, name: str) -> deletion_pb2.Deletion:
        """How far an erasure is; its signed certificate once it is DONE."""
        return self._client.call(self._stub.GetDeletion, dataset_pb2.GetDeletionRequest(name=name))
