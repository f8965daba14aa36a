"""What can go wrong, as types. One family, so that `except argosy.ArgosyError` catches all of it and nothing else.

A failed call carries the service's stable `reason` (an `ErrorReason` without its prefix, such as `RATE_LIMITED`), its fixed sentence, the
field it names, and how long to wait where waiting helps.
"""

from collections.abc import Iterable, Mapping
from typing import ClassVar

import grpc
from google.rpc import error_details_pb2, status_pb2

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


def _family(root: type[ArgosyError]) -> Iterable[type[ArgosyError]]:
    for child in root.__subclasses__():
        if child is not StreamLost:
            yield child


_BY_CODE = {child.code: child for child in _family(ArgosyError)}


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
    kind = StreamLost if reason == "STREAM_LOST" else _BY_CODE.get(error.code(), ArgosyError)
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
