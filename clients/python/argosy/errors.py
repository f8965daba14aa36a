"""What can go wrong, as types. One family, so that `except argosy.ArgosyError` catches all of it and nothing else.

A failed call carries the service's stable `reason` (an `ErrorReason` without its prefix, such as `RATE_LIMITED`), its fixed sentence, the
field it names, and how long to wait where waiting helps.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

import grpc
from google.rpc import error_details_pb2, status_pb2

from argosy.v1 import dataset_pb2, error_pb2, finetune_pb2, model_pb2

_DETAILS = "grpc-status-details-bin"


class ArgosyError(Exception):
    """A call failed. `code` is the gRPC status, `reason` ours, empty when the status came from gRPC itself."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.UNKNOWN

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        field: str | None = None,
        metadata: Mapping[str, str] | None = None,
        retry_after_s: float | None = None,
        request_id: str | None = None,
        last_sequence: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.field = field  # path in the request, as `config.sampling.top_p`
        self.metadata = dict(metadata or {})  # of the reason: asked, limit, unit, scope, ...
        self.retry_after_s = retry_after_s  # seconds; None: the service did not say
        self.request_id = request_id
        self.last_sequence = last_sequence  # of a stream that broke: the last event that was sent

    def __str__(self) -> str:
        parts = [self.message]
        if self.field:
            bounds = ", ".join(f"{key} {self.metadata[key]}" for key in ("asked", "limit", "unit") if self.metadata.get(key))
            parts.append(f"field {self.field}" + (f" ({bounds})" if bounds else ""))
        elif "rule" in self.metadata:
            parts.append(", ".join(f"{key} {self.metadata[key]}" for key in ("rule", "line", "byte_offset") if self.metadata.get(key)))
        elif "subject" in self.metadata:
            left = ", ".join(f"{key} {self.metadata[key]}" for key in ("asked", "limit") if self.metadata.get(key))
            parts.append(self.metadata["subject"] + (f" ({left})" if left else ""))
        elif "scope" in self.metadata:
            parts.append(f"scope {self.metadata['scope']}")
        if self.retry_after_s:
            parts.append(f"try again in {self.retry_after_s:.1f} s")
        return f"{'; '.join(parts)} [{self.reason or self.code.name}]"


class InvalidArgument(ArgosyError):
    """The request is wrong and will stay wrong: see `field` and `metadata`."""

    code = grpc.StatusCode.INVALID_ARGUMENT


class Unauthenticated(ArgosyError):
    """The API key is missing, malformed, unknown, expired or revoked; the service does not say which."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(ArgosyError):
    """The key is good but lacks the scope, or was revoked while a stream ran."""

    code = grpc.StatusCode.PERMISSION_DENIED


class NotFound(ArgosyError):
    """No such thing in your project."""

    code = grpc.StatusCode.NOT_FOUND


class AlreadyExists(ArgosyError):
    """The name is taken, or this request_id has already completed."""

    code = grpc.StatusCode.ALREADY_EXISTS


class FailedPrecondition(ArgosyError):
    """Right request, wrong state or capability."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class Aborted(ArgosyError):
    """Somebody else was faster (an etag, a request in flight): read again and repeat."""

    code = grpc.StatusCode.ABORTED


class OutOfRange(ArgosyError):
    """A cursor or offset lies past the end."""

    code = grpc.StatusCode.OUT_OF_RANGE


class DataLoss(ArgosyError):
    """A checksum did not match."""

    code = grpc.StatusCode.DATA_LOSS


class ResourceExhausted(ArgosyError):
    """A rate, a quota, a size or a slow reader: see `reason` and `retry_after_s`."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unavailable(ArgosyError):
    """The fleet could not take the call, or nothing answers at the address. Nothing was charged unless the reason is STREAM_LOST."""

    code = grpc.StatusCode.UNAVAILABLE


class StreamLost(Unavailable):
    """A stream broke after its start; what came before stands, and is billed. Ask again with a new request id."""


class DeadlineExceeded(ArgosyError):
    """The timeout passed first."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class Cancelled(ArgosyError):
    """The call was cancelled, here or by a proxy."""

    code = grpc.StatusCode.CANCELLED


class Unimplemented(ArgosyError):
    """This fleet does not know the method: is it older than the library?"""

    code = grpc.StatusCode.UNIMPLEMENTED


class InternalError(ArgosyError):
    """A defect in the fleet. `request_id` finds it in the operator's logs."""

    code = grpc.StatusCode.INTERNAL


class UnsupportedFormat(InvalidArgument):
    """An upload is of no known format: `metadata` has rule, line and byte_offset."""


class ArtifactRejected(InvalidArgument):
    """An imported file breaks a rule: `metadata` has it."""


class HasDependants(FailedPrecondition):
    """Something else needs it; `cascade` deletes both."""


class GateNotPassed(FailedPrecondition):
    """An alias moves only on an evaluation that PASSED against what it points to now."""


class PrivacyBudgetExceeded(FailedPrecondition):
    """The dataset's privacy budget would be overspent."""


class WrongState(FailedPrecondition):
    """Not in this state."""


class ModelNotServed(FailedPrecondition):
    """No replica serves the model's base."""


class UploadFenced(Aborted):
    """Another writer has taken over the upload."""


class UploadOffset(OutOfRange):
    """The offset is past what is stored: `metadata` has persisted_bytes."""


class EventSequenceAhead(OutOfRange):
    """The cursor is past the last event: `metadata` has last."""


class ChecksumMismatch(DataLoss):
    """A chunk does not match its checksum and was dropped: send it again."""


class QuotaExceeded(ResourceExhausted):
    """A quota is used up; waiting will not help soon."""


class SlowConsumer(ResourceExhausted):
    """The reader fell behind and was cut off: resume at the cursor."""


class DatasetRejected(InvalidArgument):
    """Rows break rules: `version` has the report, `row_errors` the first findings. Raised by the library, not by a call."""

    version: dataset_pb2.DatasetVersion
    row_errors: Sequence[dataset_pb2.RowError]

    @classmethod
    def of(cls, version: dataset_pb2.DatasetVersion, row_errors: Sequence[dataset_pb2.RowError]) -> Self:
        """From the version and its findings."""
        message = f"{version.report.errors:,} of {version.report.rows:,} rows break a rule"
        if row_errors:
            first = row_errors[0]
            message += f", first line {first.line}" + (f" in {first.field}" if first.field else "") + f": {first.rule}"
        made = cls(message, reason=_reason(version.error) or "DATASET_REJECTED", metadata=version.error.metadata)
        made.version, made.row_errors = version, tuple(row_errors)
        return made


class JobFailed(FailedPrecondition):
    """A job ended without a version: `job` says why. Raised by the library, not by a call."""

    job: finetune_pb2.FineTuneJob

    @classmethod
    def of(cls, job: finetune_pb2.FineTuneJob) -> Self:
        """From the job as it ended."""
        state = finetune_pb2.FineTuneJob.State.Name(job.state).removeprefix("STATE_")
        why = finetune_pb2.JobReason.Name(job.state_reason).removeprefix("JOB_REASON_")
        made = cls(job.error.message or f"The job is {state}", reason=why, metadata=job.error.metadata)
        made.job = job
        return made


class EvaluationNotPassed(GateNotPassed):
    """A version is not better than the alias's target and the base: `evaluation` has the evidence. Raised by the library."""

    evaluation: model_pb2.Evaluation

    @classmethod
    def of(cls, evaluation: model_pb2.Evaluation) -> Self:
        """From the evaluation as it was decided."""
        if evaluation.state == model_pb2.Evaluation.STATE_FAILED:
            message = evaluation.error.message or "The evaluation failed"
        else:
            lost = [each for each in evaluation.comparisons if not each.passed]
            message = "It is not better by the margin than " + (", ".join(each.against for each in lost) or "what is served")
        made = cls(message, reason=_reason(evaluation.error) or "GATE_NOT_PASSED", metadata=evaluation.error.metadata)
        made.evaluation = evaluation
        return made


def _reason(failure: error_pb2.Failure) -> str:
    if failure.reason not in error_pb2.ErrorReason.values() or not failure.reason:
        return ""
    return error_pb2.ErrorReason.Name(failure.reason).removeprefix("ERROR_REASON_")


_BY_CODE = {child.code: child for child in ArgosyError.__subclasses__()}
_BY_REASON: dict[str, type[ArgosyError]] = {
    "ARTIFACT_REJECTED": ArtifactRejected,
    "CHECKSUM_MISMATCH": ChecksumMismatch,
    "EVENT_SEQUENCE_AHEAD": EventSequenceAhead,
    "GATE_NOT_PASSED": GateNotPassed,
    "HAS_DEPENDANTS": HasDependants,
    "MODEL_NOT_SERVED": ModelNotServed,
    "PRIVACY_BUDGET_EXCEEDED": PrivacyBudgetExceeded,
    "QUOTA_EXCEEDED": QuotaExceeded,
    "SLOW_CONSUMER": SlowConsumer,
    "STREAM_LOST": StreamLost,
    "UNSUPPORTED_FORMAT": UnsupportedFormat,
    "UPLOAD_FENCED": UploadFenced,
    "UPLOAD_OFFSET": UploadOffset,
    "WRONG_STATE": WrongState,
}


def from_rpc(error: grpc.RpcError) -> ArgosyError:
    """The typed error of a failed call, blocking or asyncio."""
    trailers: dict[str, str | bytes] = dict(error.trailing_metadata() or ())  # type: ignore[arg-type]  # both kinds iterate as pairs
    reason, field, retry_after_s = "", None, None
    metadata: dict[str, str] = {}
    raw = trailers.get(_DETAILS)
    if isinstance(raw, bytes):
        for detail in status_pb2.Status.FromString(raw).details:
            info, retry, bad = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo(), error_details_pb2.BadRequest()
            if detail.Unpack(info):
                reason, metadata = info.reason, dict(info.metadata)
            elif detail.Unpack(retry):
                retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
            elif detail.Unpack(bad) and bad.field_violations:
                field = bad.field_violations[0].field
    last = trailers.get("last_seq")
    kind = _BY_REASON.get(reason) or _BY_CODE.get(error.code(), ArgosyError)
    request_id = trailers.get("request_id")
    return kind(
        error.details() or error.code().name,
        reason=reason,
        field=field or metadata.get("field"),
        metadata=metadata,
        retry_after_s=retry_after_s,
        request_id=str(request_id) if request_id else None,
        last_sequence=int(last) if last else None,
    )
