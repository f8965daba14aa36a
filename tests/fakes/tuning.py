"""The half of the scripted gateway that tunes: rows, jobs, own models, explanations. It stores bytes and fences writers."""

import hashlib
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc

from argosy.chunks import CHUNK_BYTES, crc32c
from argosy.v1 import (
    dataset_pb2,
    dataset_pb2_grpc,
    deletion_pb2,
    explanation_pb2,
    explanation_pb2_grpc,
    finetune_pb2,
    finetune_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    usage_pb2,
)
from services.chassis.errors import NotStarted, ResourceExists, ResourceNotFound, ServiceError, UploadFenced, WrongState

PROJECT = "projects/p"
Job = finetune_pb2.FineTuneJob
Version = dataset_pb2.DatasetVersion


def job_events() -> list[finetune_pb2.JobEvent]:
    """The log of a job that succeeds."""
    said: list[dict[str, Any]] = [
        {"state": finetune_pb2.StateChanged(state=Job.STATE_QUEUED)},
        {"state": finetune_pb2.StateChanged(state=Job.STATE_RUNNING, attempt=1)},
    ]
    for step in (2, 4, 6, 8):
        said.append({"progress": finetune_pb2.JobProgress(phase=2, step=step, target_step=8, epoch=step / 4, tokens_per_second=1234)})
        said.append({"metric": finetune_pb2.JobMetric(name="loss", value=2 / step, step=step)})
    said += [
        {"warning": finetune_pb2.JobWarning(rule="V9.too_long", line=7, count=2, message="Longer than seq_len.")},
        {"evaluation": finetune_pb2.JobEvaluated(step=8, metrics={"validation_accuracy": 0.96}, best=True)},
        {"checkpoint": finetune_pb2.CheckpointCommitted(step=8)},
        {"cost": finetune_pb2.CostChanged(spent=usage_pb2.Cost(currency_code="USD", nanos=420_000), device_seconds=21)},
        {"state": finetune_pb2.StateChanged(state=Job.STATE_SUCCEEDED, attempt=1, model_version=f"{PROJECT}/models/news/versions/1")},
        {"servable": finetune_pb2.JobServable(model_version=f"{PROJECT}/models/news/versions/1", replicas=3)},
    ]
    said[-1]["servable"].elapsed.FromMilliseconds(412)
    return [finetune_pb2.JobEvent(sequence=number, **each) for number, each in enumerate(said, 1)]


def version() -> model_pb2.ModelVersion:
    """What that job makes."""
    return model_pb2.ModelVersion(
        name=f"{PROJECT}/models/news/versions/1",
        state=model_pb2.ModelVersion.STATE_READY,
        tuned_labels=["technology", "sports"],
        metrics={"accuracy": 0.96, "base_accuracy": 0.41},
        calibration=model_pb2.CalibrationReport(temperature=1.25, error_before=0.081, error_after=0.019),
    )


@dataclass
class _Upload:
    message: dataset_pb2.Upload
    data: bytearray = field(default_factory=bytearray)


@dataclass
class FakeTuning(
    dataset_pb2_grpc.DatasetServiceServicer,
    finetune_pb2_grpc.FineTuneServiceServicer,
    model_pb2_grpc.ModelServiceServicer,
    explanation_pb2_grpc.ExplanationServiceServicer,
):
    """Keeps uploads, plays `log` to watchers. `cuts` and `watch_cuts` say after how many bytes, or events, each next call breaks."""

    cuts: list[int] = field(default_factory=list)  # bytes after which a WriteUpload ends UNAVAILABLE
    watch_cuts: list[tuple[int, ServiceError | None]] = field(default_factory=list)  # events, then this error or a silent OK
    stuck: ServiceError | None = None  # every WriteUpload ends so
    hold_watch: threading.Event | None = None  # a watch waits here after its first event
    log: list[finetune_pb2.JobEvent] = field(default_factory=job_events)
    bad_rows: list[dataset_pb2.RowError] = field(default_factory=list)  # any: the next version is REJECTED
    job: finetune_pb2.FineTuneJob = field(
        default_factory=lambda: Job(name=f"{PROJECT}/fineTuneJobs/0b7d", state=Job.STATE_SUCCEEDED, model_version=version().name)
    )
    archive: bytes = b"archive" * 200_000
    passes: bool = True  # whether an evaluation does
    uploads: dict[str, _Upload] = field(default_factory=dict)
    datasets: dict[str, dataset_pb2.Dataset] = field(default_factory=dict)
    versions: dict[str, Version] = field(default_factory=dict)
    imported: dict[int, bytes] = field(default_factory=dict)
    writes: list[tuple[int, int]] = field(default_factory=list)  # of each WriteUpload: first offset and bytes
    watched_from: list[int] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def _enter(self, request: Any, context: grpc.ServicerContext) -> None: ...

    @staticmethod
    def _refuse(error: ServiceError, context: grpc.ServicerContext) -> None: ...

    # Rows

    def CreateDataset(self, request: Any, context: grpc.ServicerContext) -> dataset_pb2.Dataset:
        self._enter(request, context)
        name = f"{request.parent}/datasets/{request.dataset_id}"
        if name in self.datasets:
            self._refuse(ResourceExists(), context)
        self.datasets[name] = dataset_pb2.Dataset(name=name, format=request.dataset.format, layout=request.dataset.layout)
        return self.datasets[name]

    def GetDataset(self, request: Any, context: grpc.ServicerContext) -> dataset_pb2.Dataset:
        self._enter(request, context)
        return self.datasets[request.name]

    def ListDatasets(self, request: Any, context: grpc.ServicerContext) -> dataset_pb2.ListDatasetsResponse:
        self._enter(request, context)
        return dataset_pb2.ListDatasetsResponse(datasets=self.datasets.values())

    def UpdateDataset(self, request: Any, context: grpc.ServicerContext) -> dataset_pb2.Dataset:
        self._enter(request, context)
        self.datasets[request.dataset.name].layout.CopyFrom(request.dataset.layout)
        return self.datasets[request.dataset.name]

    def CreateUpload(self, request: Any, context: grpc.ServicerContext) -> dataset_pb2.Upload:
        self._enter(request, context)
        name = f"{request.parent}/uploads/{uuid.uuid4()}"
        self.uploads[name] = _Upload(dataset_pb2.Upload(name=name, state=dataset_pb2.Upload.STATE_OPEN, writer_epoch=1))
        return self.uploads[name].message

    def ResumeUpload(self, request: Any, context: grpc.ServicerContext) -> dataset_pb2.Upload:
        self._enter(request, context)
        if request.name not in self.uploads:
            self._refuse(ResourceNotFound("name"), context)
        upload = self.uploads[request.name]
        if upload.message.state != dataset_pb2.Upload.STATE_OPEN:
            self._refuse(WrongState(), context)
        with self.lock:
            upload.message.writer_epoch += 1
            upload.message.persisted_bytes = len(upload.data)
        return upload.message

    def WriteUpload(self, parts: Iterator[dataset_pb2.WriteUploadRequest], context: grpc.ServicerContext) -> Any:
        header = next(parts).header
        self._enter(header, context)
        if self.stuck is not None:
            self._refuse(self.stuck, context)
        upload = self.uploads[header.upload]
        cut = self.cuts.pop(0) if self.cuts else None
        first, taken = -1, 0
        try:
            for part in parts:
                chunk = part.chunk
                assert crc32c(chunk.data) == chunk.crc32c and len(chunk.data) <= CHUNK_BYTES
                first = chunk.offset if first < 0 else first
                with self.lock:
                    if header.writer_epoch != upload.message.writer_epoch:
                        self._refuse(UploadFenced(), context)
                    assert chunk.offset <= len(upload.data)
                    upload.data[chunk.offset :] = chunk.data
                taken += len(chunk.data)
                if cut is not None and taken >= cut:
                    self._refuse(NotStarted(), context)
        finally:
            self.writes.append((first, taken))
        return dataset_pb2.WriteUploadResponse(persisted_bytes=len(upload.data))

    def FinalizeUpload(self, request: Any, context: grpc.ServicerContext) -> Version:
        self._enter(request, context)
        upload = self.uploads[request.name]
        assert len(upload.data) == request.total_bytes
        assert hashlib.sha256(upload.data).hexdigest() == request.sha256
        upload.message.state = dataset_pb2.Upload.STATE_FINALIZED
        name = f"{request.name.rpartition('/uploads/')[0]}/versions/{len(self.versions) + 1}"
        made = Version(name=name, state=Version.STATE_VALIDATING, total_bytes=request.total_bytes, sha256=request.sha256)
        self.versions[name] = made
        return made

    def GetDatasetVersion(self, request: Any, context: grpc.ServicerContext) -> Version:
        """VALIDATING when first asked for, decided from then on."""
        self._enter(request, context)
        found = self.versions[request.name]
        if found.validated_bytes < found.total_bytes:
            found.validated_bytes = found.total_bytes
        elif found.state == Version.STATE_VALIDATING:
            found.state = Version.STATE_REJECTED if self.bad_rows else Version.STATE_READY
            found.report.rows, found.report.valid_rows, found.report.errors = 12, 12 - len(self.bad_rows), len(self.bad_rows)
            found.report.labels.add(label="technology", rows=7)
            found.report.labels.add(label="sports", rows=5)
            for each in self.bad_rows:
                found.report.rules.add(rule=each.rule, severity=each.severity, count=1, first_line=each.line)
        return found

    def ListDatasetVersions(self, request: Any, context: grpc.ServicerContext) -> dataset_pb2.ListDatasetVersionsResponse:
        self._enter(request, context)
        found = [each for name, each in self.versions.items() if name.startswith(f"{request.parent}/")]
        return dataset_pb2.ListDatasetVersionsResponse(dataset_versions=found)

    def ListRowErrors(self, request: Any, context: grpc.ServicerContext) -> dataset_pb2.ListRowErrorsResponse:
        self._enter(request, context)
        return dataset_pb2.ListRowErrorsResponse(row_errors=self.bad_rows)

    def RedactDatasetVersion(self, request: Any, context: grpc.ServicerContext) -> Version:
        self._enter(request, context)
        made = Version(name=f"{request.name.rpartition('/')[0]}/versions/9", state=Version.STATE_READY, source_version=request.name)
        self.versions[made.name] = made
        return made

    def ReadDatasetVersion(self, request: Any, context: grpc.ServicerContext) -> Iterator[dataset_pb2.ReadDatasetVersionResponse]:
        self._enter(request, context)
        yield dataset_pb2.ReadDatasetVersionResponse(data=b"rows", crc32c=crc32c(b"rows"))
        yield dataset_pb2.ReadDatasetVersionResponse(offset=4, data=b"more", crc32c=1)

    def _delete(self, request: Any, context: grpc.ServicerContext) -> deletion_pb2.Deletion:
        self._enter(request, context)
        return deletion_pb2.Deletion(
            name=f"{PROJECT}/deletions/d", state=deletion_pb2.Deletion.STATE_RUNNING, target=request.name, erased=[request.name, "more"]
        )

    DeleteDataset = DeleteDatasetVersion = DeleteModel = DeleteModelVersion = DeleteFineTuneJob = GetDeletion = _delete

    # Jobs

    def CreateFineTuneJob(self, request: Any, context: grpc.ServicerContext) -> finetune_pb2.FineTuneJob:
        self._enter(request, context)
        made = Job()
        made.CopyFrom(request.fine_tune_job)
        made.state = Job.STATE_QUEUED
        made.name = "" if request.validate_only else self.job.name
        made.quote.CopyFrom(
            finetune_pb2.Quote(
                tokens=finetune_pb2.Estimate(low=9_000, high=11_000),
                steps=finetune_pb2.Estimate(low=8, high=8),
                device_seconds=finetune_pb2.Estimate(low=18, high=65),
                peak_bytes=finetune_pb2.Estimate(low=1.5 * 2**30, high=2 * 2**30),
                low_cost=usage_pb2.Cost(currency_code="USD", nanos=360_000),
                high_cost=usage_pb2.Cost(currency_code="USD", nanos=1_300_000),
                device="cpu",
            )
        )
        return made

    def GetFineTuneJob(self, request: Any, context: grpc.ServicerContext) -> finetune_pb2.FineTuneJob:
        self._enter(request, context)
        return self.job

    CancelFineTuneJob = PauseFineTuneJob = ResumeFineTuneJob = GetFineTuneJob

    def ListFineTuneJobs(self, request: Any, context: grpc.ServicerContext) -> finetune_pb2.ListFineTuneJobsResponse:
        self._enter(request, context)
        return finetune_pb2.ListFineTuneJobsResponse(fine_tune_jobs=[self.job])

    def ListCheckpoints(self, request: Any, context: grpc.ServicerContext) -> finetune_pb2.ListCheckpointsResponse:
        self._enter(request, context)
        kept = finetune_pb2.Checkpoint(name=f"{self.job.name}/checkpoints/8", step=8, total_bytes=45_800_000, metrics={"loss": 0.25})
        return finetune_pb2.ListCheckpointsResponse(checkpoints=[kept])

    def ListFineTuneJobEvents(self, request: Any, context: grpc.ServicerContext) -> finetune_pb2.ListFineTuneJobEventsResponse:
        self._enter(request, context)
        return finetune_pb2.ListFineTuneJobEventsResponse(events=[each for each in self.log if each.sequence > request.after_sequence])

    def WatchFineTuneJob(self, request: Any, context: grpc.ServicerContext) -> Iterator[finetune_pb2.WatchFineTuneJobResponse]:
        self._enter(request, context)
        self.watched_from.append(request.after_sequence)
        cut = self.watch_cuts.pop(0) if self.watch_cuts else None
        left = [each for each in self.log if each.sequence > request.after_sequence]
        for number, event in enumerate(left):
            if cut is not None and number == cut[0]:
                if cut[1] is not None:
                    self._refuse(cut[1], context)
                return
            yield finetune_pb2.WatchFineTuneJobResponse(event=event)
            if self.hold_watch is not None:
                if not context.add_callback(self.hold_watch.set):  # it has hung up already
                    self.hold_watch.set()
                self.hold_watch.wait(20)
        mark = finetune_pb2.Bookmark(sequence=self.log[-1].sequence, final=self.job.state != Job.STATE_PAUSED)
        yield finetune_pb2.WatchFineTuneJobResponse(bookmark=mark)

    # Own models

    def GetModel(self, request: Any, context: grpc.ServicerContext) -> model_pb2.Model:
        self._enter(request, context)
        return model_pb2.Model(name=request.name, base_model="models/a", default_version=version().name, tuned_labels=["technology"])

    def CreateModel(self, request: Any, context: grpc.ServicerContext) -> model_pb2.Model:
        self._enter(request, context)
        return model_pb2.Model(name=f"{request.parent}/models/{request.model_id}", base_model=request.model.base_model)

    def GetModelVersion(self, request: Any, context: grpc.ServicerContext) -> model_pb2.ModelVersion:
        self._enter(request, context)
        return version()

    CreateModelVersion = GetModelVersion

    def ListModelVersions(self, request: Any, context: grpc.ServicerContext) -> model_pb2.ListModelVersionsResponse:
        self._enter(request, context)
        return model_pb2.ListModelVersionsResponse(model_versions=[version()])

    def ListModelAliases(self, request: Any, context: grpc.ServicerContext) -> model_pb2.ListModelAliasesResponse:
        self._enter(request, context)
        return model_pb2.ListModelAliasesResponse(model_aliases=[self._alias(f"{request.parent}/aliases/prod", version().name)])

    @staticmethod
    def _alias(name: str, target: str) -> model_pb2.ModelAlias:
        return model_pb2.ModelAlias(name=name, targets=[model_pb2.AliasTarget(version=target, percent=100)])

    def CreateEvaluation(self, request: Any, context: grpc.ServicerContext) -> model_pb2.Evaluation:
        self._enter(request, context)
        made = model_pb2.Evaluation()
        made.CopyFrom(request.evaluation)
        made.name, made.state = f"{request.parent}/evaluations/e", model_pb2.Evaluation.STATE_RUNNING
        return made

    def GetEvaluation(self, request: Any, context: grpc.ServicerContext) -> model_pb2.Evaluation:
        self._enter(request, context)
        score = model_pb2.EvaluationScore
        against = model_pb2.EvaluationComparison(
            against="models/a", metric="accuracy", gain=0.55, gain_low=0.5, p_value=1e-9, test="mcnemar_exact", passed=self.passes
        )
        return model_pb2.Evaluation(
            name=request.name,
            state=model_pb2.Evaluation.STATE_PASSED if self.passes else model_pb2.Evaluation.STATE_NOT_PASSED,
            measured_rows=132,
            scores=[
                score(model=version().name, metric="accuracy", value=0.96, rows=132),
                score(model="models/a", metric="accuracy", value=0.41, rows=132),
            ],
            comparisons=[against],
        )

    def MoveModelAlias(self, request: Any, context: grpc.ServicerContext) -> model_pb2.ModelAlias:
        self._enter(request, context)
        return self._alias(request.name, request.version)

    def RollbackModelAlias(self, request: Any, context: grpc.ServicerContext) -> model_pb2.ModelAlias:
        self._enter(request, context)
        return self._alias(request.name, f"{PROJECT}/models/news/versions/4")

    def ImportModelVersion(self, parts: Iterator[model_pb2.ImportModelVersionRequest], context: grpc.ServicerContext) -> Any:
        self._enter(next(parts).header, context)
        for part in parts:
            whole = self.imported.get(part.chunk.part, b"")
            assert part.chunk.offset == len(whole) and crc32c(part.chunk.data) == part.chunk.crc32c
            self.imported[part.chunk.part] = whole + part.chunk.data
        return version()

    def ExportModelVersion(self, request: Any, context: grpc.ServicerContext) -> Iterator[model_pb2.ExportModelVersionResponse]:
        self._enter(request, context)
        for number, offset in enumerate(range(request.offset, len(self.archive), CHUNK_BYTES)):
            if self.cuts and number == self.cuts[0]:
                self.cuts.pop(0)
                self._refuse(NotStarted(), context)
            data = self.archive[offset : offset + CHUNK_BYTES]
            yield model_pb2.ExportModelVersionResponse(offset=offset, data=data, crc32c=crc32c(data), total_bytes=len(self.archive))

    # Explanations

    def Explain(self, request: Any, context: grpc.ServicerContext) -> explanation_pb2.ExplainResponse:
        self._enter(request, context)
        text = request.classify.text or request.generation.prompt
        reply = explanation_pb2.ExplainResponse(target_score=-0.1, baseline_score=-1.8, faithfulness=0.9)
        at = 0
        for number, word in enumerate(text.split(" ")):
            end = at + len(word.encode())
            each = reply.attributions.add(weight=0.5 if number else -0.25)
            each.span.start_byte, each.span.end_byte, each.span.text = at, end, word
            at = end + 1
        reply.usage.passes = 3
        return reply

    def FindNearestExamples(self, request: Any, context: grpc.ServicerContext) -> explanation_pb2.FindNearestExamplesResponse:
        self._enter(request, context)
        reply = explanation_pb2.FindNearestExamplesResponse()
        for row in range(request.top_k or 10):
            reply.examples.add(dataset_version="projects/p/datasets/rows/versions/1", row=1 - row % 2, similarity=0.9 - row / 100)
        return reply


SERVICES = (
    dataset_pb2_grpc.add_DatasetServiceServicer_to_server,
    finetune_pb2_grpc.add_FineTuneServiceServicer_to_server,
    explanation_pb2_grpc.add_ExplanationServiceServicer_to_server,
)
