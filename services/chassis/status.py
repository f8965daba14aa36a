"""The one translation between a `ServiceError` and a gRPC status, both ways. No other module names a status code."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from services.chassis.errors import DOMAIN, REASONS, DeadlineExceeded, Detail, FieldInvalid, Internal, NotStarted, ServiceError, StreamLost

Metadatum = tuple[str, str | bytes]
STATUS_KEY = "grpc-status-details-bin"
PUSHBACK_KEY = "grpc-retry-pushback-ms"  # all that the gRPC core reads; people read RetryInfo
LAST_SEQUENCE_KEY = "last_seq"
REQUEST_ID_KEY = "request_id"
SERVED_BY_KEY = "served_by"
TRAILER_BYTES = 4_096  # at 12 KB a client sees RESOURCE_EXHAUSTED instead of the real status
KEPT_KEYS = frozenset({REQUEST_ID_KEY, SERVED_BY_KEY, LAST_SEQUENCE_KEY})  # what an over-full set of trailers is cut down to

# A pod that refuses our own credential is our defect; the caller's key was found good at the door.
OUR_FAULT = frozenset({"API_KEY_INVALID"})


@dataclass(frozen=True, slots=True)
class Answer:
    """A status ready for the wire."""

    code: grpc.StatusCode
    sentence: str
    trailers: tuple[Metadatum, ...]


def rich(error: ServiceError, request_id: str = "") -> Answer:
    """The status of `error`: ErrorInfo, the details its class names, RetryInfo, and the trailers that belong to it."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    code = grpc.StatusCode[error.code]
    status = status_pb2.Status(code=code.value[0], message=error.sentence)
    for message in (info, *_details(error, request_id)):
        status.details.add().Pack(message)
    trailers: list[Metadatum] = [(STATUS_KEY, status.SerializeToString())]
    if (pushback := error.pushback_ms) is not None:
        trailers.append((PUSHBACK_KEY, str(pushback)))
    if error.last_sequence is not None:
        trailers.append((LAST_SEQUENCE_KEY, str(error.last_sequence)))
    return Answer(code, error.sentence, tuple(trailers))


def _details(error: ServiceError, request_id: str) -> Iterable[Any]:
    subject = error.field or error.metadata.get("subject", "")
    if Detail.BAD_REQUEST in error.details:
        yield error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(field=error.field or "", description=error.sentence, reason=error.reason)
            ]
        )
    if Detail.QUOTA_FAILURE in error.details:
        yield error_details_pb2.QuotaFailure(
            violations=[error_details_pb2.QuotaFailure.Violation(subject=subject, description=error.sentence)]
        )
    if Detail.PRECONDITION_FAILURE in error.details:
        yield error_details_pb2.PreconditionFailure(
            violations=[error_details_pb2.PreconditionFailure.Violation(type=error.reason, subject=subject, description=error.sentence)]
        )
    if Detail.REQUEST_INFO in error.details and request_id:
        yield error_details_pb2.RequestInfo(request_id=request_id[:64])
    if (pushback := error.pushback_ms) is not None and pushback >= 0:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(pushback)
        yield error_details_pb2.RetryInfo(retry_delay=delay)


def named(error: Exception, *, admitted: bool, last_sequence: int | None = None) -> ServiceError | Answer:
    """What an exception means on the wire; an `Answer` is an upstream's own, passed on unchanged.

    `admitted` says whether our initial metadata has gone out: before it nothing was done, after it the answer is lost.
    """
    if isinstance(error, ServiceError):
        return error
    if isinstance(error, DecodeError):
        return FieldInvalid(rule="wire_format")
    if isinstance(error, grpc.aio.AioRpcError):
        return upstream(error) or _bare(error.code(), admitted, last_sequence)
    return Internal()


def _bare(code: grpc.StatusCode, admitted: bool, last_sequence: int | None) -> ServiceError:
    """The gRPC core's own statuses have no ErrorInfo."""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(last_sequence)
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return StreamLost(last_sequence) if admitted else NotStarted()
    return Internal()


def error_info(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo | None:
    """Our own ErrorInfo in an upstream's status, or None if it has none or does not fit its code."""
    blob = dict(_trailers(error)).get(STATUS_KEY)
    if not isinstance(blob, bytes):
        return None
    info = error_details_pb2.ErrorInfo()
    try:
        status = status_pb2.Status.FromString(blob)
        found = any(detail.Is(info.DESCRIPTOR) and detail.Unpack(info) for detail in status.details)
    except DecodeError:
        return None
    known = REASONS.get(info.reason)
    if not found or info.domain != DOMAIN or known is None or known.code != error.code().name:
        return None
    return info


def _trailers(error: grpc.aio.AioRpcError) -> tuple[Metadatum, ...]:
    trailers: Any = error.trailing_metadata()  # grpc's stubs call an entry not iterable
    return tuple((key, value) for key, value in trailers or ())


def upstream(error: grpc.aio.AioRpcError) -> Answer | ServiceError | None:
    """An upstream's answer that carries our ErrorInfo, unchanged; None if it carries none."""
    info = error_info(error)
    if info is None:
        return None
    if info.reason in OUR_FAULT:
        return Internal()
    ours = (STATUS_KEY, PUSHBACK_KEY, LAST_SEQUENCE_KEY)
    trailers = tuple((key, value) for key, value in _trailers(error) if key in ours)
    return Answer(error.code(), REASONS[info.reason].sentence, trailers)


def trailers_of(answer: Answer, kept: Iterable[Metadatum], request_id: str = "") -> tuple[Metadatum, ...]:
    """Every trailer of a failed call: those the handler had set, those of the answer, under 4 KiB in all."""
    own = {key for key, _ in answer.trailers}
    before = [(key, value) for key, value in kept if key not in own]
    if request_id and all(key != REQUEST_ID_KEY for key, _ in before):
        before.append((REQUEST_ID_KEY, request_id))
    if _bytes(before) + _bytes(answer.trailers) >= TRAILER_BYTES:
        before = [(key, value[:64]) for key, value in before if key in KEPT_KEYS]
    return (*before, *answer.trailers)


def _bytes(metadata: Iterable[Metadatum]) -> int:
    return sum(len(key) + len(value) + 32 for key, value in metadata)  # 32: HTTP/2 counts an entry so
