"""The `ServiceError` family: every failure a caller may see has one class, one stable reason and one fixed sentence (pure).

The docstring of a class is the sentence that goes out. A class knows its code as a string; `status.py` alone turns it into a gRPC
status. Numbers and field paths travel as metadata, never in the sentence, so that a reply holds no content and two refusals for the same
reason differ in nothing but their metadata.
"""

import enum
import re
from typing import ClassVar

DOMAIN = "argosy.dev"
FIELD_BYTES = 200  # a field path longer than this is cut: trailers stay under 4 KiB
VALUE_BYTES = 100  # any other metadata value


class Detail(enum.Enum):
    """A google.rpc message that goes out beside ErrorInfo."""

    BAD_REQUEST = enum.auto()
    QUOTA_FAILURE = enum.auto()
    PRECONDITION_FAILURE = enum.auto()
    REQUEST_INFO = enum.auto()


class Retry(enum.Enum):
    """What the trailer grpc-retry-pushback-ms says."""

    UNSAID = enum.auto()  # no trailer: the code speaks for itself
    NEVER = enum.auto()  # -1
    AFTER = enum.auto()  # `retry_after_s`, also as RetryInfo


REASONS: dict[str, type["ServiceError"]] = {}


class ServiceError(Exception):
    """A refusal or failure with a public face. Raise a subclass."""

    code: ClassVar[str]  # name of a gRPC status code
    reason: ClassVar[str]  # ErrorInfo.reason
    sentence: ClassVar[str]  # the status message, the same every time
    details: ClassVar[frozenset[Detail]] = frozenset()
    retry: ClassVar[Retry] = Retry.UNSAID

    def __init_subclass__(cls, *, code: str = "", details: frozenset[Detail] = frozenset(), retry: Retry = Retry.UNSAID) -> None:
        """A subclass that names a code is a reason of its own; one that does not is a private variant of its parent."""
        super().__init_subclass__()
        if not code:
            return
        cls.code, cls.sentence, cls.details, cls.retry = code, cls.__doc__ or "", details, retry
        cls.reason = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).upper()
        REASONS[cls.reason] = cls

    def __init__(
        self,
        *,
        field: str | None = None,
        retry_after_s: float | None = None,
        last_sequence: int | None = None,
        **metadata: object,
    ) -> None:
        """`field` is a path such as "config.top_p", never a value; `metadata` values are cut at 100 bytes, None left out."""
        super().__init__(self.sentence)
        self.field = None if field is None else _cut(field, FIELD_BYTES)
        self.retry_after_s = retry_after_s
        self.last_sequence = last_sequence
        self.metadata: dict[str, str] = {} if self.field is None else {"field": self.field}
        self.metadata |= {key: _cut(str(value), VALUE_BYTES) for key, value in metadata.items() if value is not None}

    @property
    def pushback_ms(self) -> int | None:
        """Value of grpc-retry-pushback-ms; None: no trailer. Nothing is repeated once events have reached the caller."""
        if self.last_sequence is not None or self.retry is Retry.NEVER:
            return -1
        if self.retry is Retry.AFTER and self.retry_after_s is not None:
            return max(1, round(self.retry_after_s * 1_000))
        return None


def _cut(text: str, limit: int) -> str:
    """`text` in at most `limit` bytes of UTF-8, whole characters, unprintable ones replaced."""
    clean = "".join(c if c.isprintable() else "?" for c in text[:limit])
    return clean.encode(errors="replace")[:limit].decode(errors="ignore")


# --- INVALID_ARGUMENT ---------------------------------------------------------------------------------------------------------------

_BAD = frozenset({Detail.BAD_REQUEST})


class FieldOutOfRange(ServiceError, code="INVALID_ARGUMENT", details=_BAD):
    """A field of the request is outside its allowed range."""

    def __init__(self, field: str, asked: object, limit: object, unit: str) -> None:
        super().__init__(field=field, asked=asked, limit=limit, unit=unit)


class FieldInvalid(ServiceError, code="INVALID_ARGUMENT", details=_BAD):
    """A field of the request is missing, malformed or not allowed here."""

    def __init__(self, field: str = "", rule: str | None = None) -> None:
        """An empty `field` means the message as a whole; `rule` is the short name of what it breaks."""
        super().__init__(field=field, rule=rule)


class PromptTooLong(ServiceError, code="INVALID_ARGUMENT", details=_BAD):
    """The prompt is longer than it may be."""

    def __init__(self, field: str, asked: object, limit: object, unit: str = "bytes") -> None:
        super().__init__(field=field, asked=asked, limit=limit, unit=unit)


class UnsupportedFormat(ServiceError, code="INVALID_ARGUMENT"):
    """The data is not in a format we accept."""

    def __init__(self, rule: str, line: int | None = None, byte_offset: int | None = None) -> None:
        super().__init__(rule=rule, line=line, byte_offset=byte_offset)


class ArtifactRejected(ServiceError, code="INVALID_ARGUMENT"):
    """The model files were refused by a safety rule."""

    def __init__(self, rule: str, line: int | None = None, byte_offset: int | None = None) -> None:
        super().__init__(rule=rule, line=line, byte_offset=byte_offset)


class PageTokenInvalid(ServiceError, code="INVALID_ARGUMENT", details=_BAD):
    """The page token was altered or belongs to another list."""

    def __init__(self, field: str = "page_token") -> None:
        super().__init__(field=field)


class MetadataInvalid(ServiceError, code="INVALID_ARGUMENT"):
    """The call's metadata is malformed or repeated."""

    def __init__(self, key: str) -> None:
        """`key` is one of ours, such as "authorization", never a name the caller made up."""
        super().__init__(key=key)


class UnsupportedLanguage(ServiceError, code="INVALID_ARGUMENT", details=_BAD):
    """The model does not know this language."""

    def __init__(self, field: str) -> None:
        super().__init__(field=field)


# --- who asks, and for what ---------------------------------------------------------------------------------------------------------


class ApiKeyInvalid(ServiceError, code="UNAUTHENTICATED"):
    """The API key is missing or not valid."""

    def __init__(self) -> None:
        super().__init__()  # nothing that could tell unknown, wrong, expired and revoked apart


class ScopeMissing(ServiceError, code="PERMISSION_DENIED"):
    """The API key lacks the scope this method needs."""

    def __init__(self, scope: str) -> None:
        super().__init__(scope=scope)


class KeyRevoked(ServiceError, code="PERMISSION_DENIED", retry=Retry.NEVER):
    """The API key was revoked during the call."""

    def __init__(self, last_sequence: int | None = None) -> None:
        super().__init__(last_sequence=last_sequence)


class ResourceNotFound(ServiceError, code="NOT_FOUND"):
    """The named resource does not exist."""

    def __init__(self, field: str) -> None:
        """Foreign and random names must give the same bytes: only the field's path goes out."""
        super().__init__(field=field)


class ResourceExists(ServiceError, code="ALREADY_EXISTS"):
    """A resource of this name already exists."""

    def __init__(self, field: str = "name") -> None:
        super().__init__(field=field)


class RequestAlreadySettled(ServiceError, code="ALREADY_EXISTS"):
    """A request of this id has already completed."""

    def __init__(self) -> None:
        super().__init__(field="request_id")


# --- FAILED_PRECONDITION ------------------------------------------------------------------------------------------------------------

_STATE = frozenset({Detail.PRECONDITION_FAILURE})


class WrongState(ServiceError, code="FAILED_PRECONDITION", details=_STATE):
    """The resource is in a state that does not allow this."""

    def __init__(self, field: str = "name", state: str | None = None) -> None:
        super().__init__(field=field, state=state)


class HasDependants(ServiceError, code="FAILED_PRECONDITION", details=_STATE):
    """Other resources still depend on this one."""

    def __init__(self, field: str = "name") -> None:
        super().__init__(field=field)


class GateNotPassed(ServiceError, code="FAILED_PRECONDITION", details=_STATE):
    """The evaluation gate has not been passed."""

    def __init__(self, field: str = "name") -> None:
        super().__init__(field=field)


class PrivacyBudgetExceeded(ServiceError, code="FAILED_PRECONDITION", details=_STATE):
    """The privacy budget does not allow this training."""

    def __init__(self, field: str = "privacy", asked: float | None = None, limit: float | None = None) -> None:
        super().__init__(field=field, asked=asked, limit=limit)


class ModelCapability(ServiceError, code="FAILED_PRECONDITION", details=_STATE):
    """The model cannot do what was asked."""

    def __init__(self, field: str = "model", capability: str | None = None) -> None:
        super().__init__(field=field, capability=capability)


class ModelNotServed(ServiceError, code="FAILED_PRECONDITION", details=_STATE):
    """No replica of this fleet serves the model."""

    def __init__(self, field: str = "model") -> None:
        super().__init__(field=field)


class IdempotencyKeyReused(ServiceError, code="FAILED_PRECONDITION", details=_STATE):
    """The request id was used before with another request."""

    def __init__(self) -> None:
        super().__init__(field="request_id")


# --- ABORTED, OUT_OF_RANGE, DATA_LOSS: the caller may repeat with care --------------------------------------------------------------


class EtagMismatch(ServiceError, code="ABORTED"):
    """The resource changed since it was read."""

    def __init__(self, field: str = "etag") -> None:
        super().__init__(field=field)


class UploadFenced(ServiceError, code="ABORTED"):
    """Another writer has taken over this upload."""

    def __init__(self) -> None:
        super().__init__(field="writer_epoch")


class RequestInFlight(ServiceError, code="ABORTED", retry=Retry.AFTER):
    """A request of this id is still running."""

    def __init__(self, retry_after_s: float = 1.0) -> None:
        super().__init__(field="request_id", retry_after_s=retry_after_s)


class WorkerFenced(ServiceError, code="ABORTED"):
    """Another attempt has taken this run over."""

    def __init__(self) -> None:
        super().__init__(field="fence")


class UploadOffset(ServiceError, code="OUT_OF_RANGE"):
    """The chunk does not continue what is stored."""

    def __init__(self, persisted_bytes: int) -> None:
        super().__init__(persisted_bytes=persisted_bytes)


class EventSequenceAhead(ServiceError, code="OUT_OF_RANGE"):
    """The cursor lies past the last event."""

    def __init__(self, last: int) -> None:
        super().__init__(last=last)


class ChecksumMismatch(ServiceError, code="DATA_LOSS"):
    """A chunk did not match its checksum and was dropped."""

    def __init__(self, offset: int) -> None:
        super().__init__(offset=offset)


# --- RESOURCE_EXHAUSTED -------------------------------------------------------------------------------------------------------------

_QUOTA = frozenset({Detail.QUOTA_FAILURE})


class RateLimited(ServiceError, code="RESOURCE_EXHAUSTED", details=_QUOTA, retry=Retry.AFTER):
    """The rate limit is reached; try again later."""

    def __init__(self, retry_after_s: float, subject: str) -> None:
        """`subject` is a limit's name, such as "requests_per_minute"."""
        super().__init__(retry_after_s=retry_after_s, subject=subject)


class QuotaExceeded(ServiceError, code="RESOURCE_EXHAUSTED", details=_QUOTA, retry=Retry.NEVER):
    """The quota is used up."""

    def __init__(self, subject: str, asked: object = None, limit: object = None) -> None:
        """`subject` is a limit's name; `asked` and `limit`, what is left of it, are in its unit."""
        super().__init__(subject=subject, asked=asked, limit=limit)


class SlowConsumer(ServiceError, code="RESOURCE_EXHAUSTED", retry=Retry.NEVER):
    """The stream was not read fast enough."""

    def __init__(self, last_sequence: int | None = None) -> None:
        super().__init__(last_sequence=last_sequence)


class MetadataTooLarge(ServiceError, code="RESOURCE_EXHAUSTED", retry=Retry.NEVER):
    """The call's metadata is too large."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(limit=limit_bytes, unit="bytes")


# --- UNAVAILABLE: a fault of the fleet ----------------------------------------------------------------------------------------------


class NotStarted(ServiceError, code="UNAVAILABLE", retry=Retry.AFTER):
    """The request could not be started; nothing was done."""

    def __init__(self, retry_after_s: float = 0.5) -> None:
        super().__init__(retry_after_s=retry_after_s)


class Draining(ServiceError, code="UNAVAILABLE", retry=Retry.AFTER):
    """This server is shutting down."""

    def __init__(self, retry_after_s: float = 0.1, last_sequence: int | None = None) -> None:
        """`last_sequence` marks a stream that was cut; it is not to be repeated."""
        super().__init__(retry_after_s=retry_after_s, last_sequence=last_sequence)


class Shed(ServiceError, code="UNAVAILABLE", retry=Retry.AFTER):
    """The fleet is too busy to answer in time."""

    def __init__(self, retry_after_s: float = 1.0) -> None:
        super().__init__(retry_after_s=retry_after_s)


class StoreUnavailable(ServiceError, code="UNAVAILABLE", retry=Retry.AFTER):
    """The store behind this call is not reachable."""

    def __init__(self, retry_after_s: float = 2.0) -> None:
        super().__init__(retry_after_s=retry_after_s)


class StreamLost(ServiceError, code="UNAVAILABLE", retry=Retry.NEVER):
    """The answer was lost part of the way; ask again with a new request id."""

    def __init__(self, last_sequence: int | None = None) -> None:
        super().__init__(last_sequence=last_sequence)


# --- the end of a call --------------------------------------------------------------------------------------------------------------


class DeadlineExceeded(ServiceError, code="DEADLINE_EXCEEDED"):
    """The deadline passed before the answer was complete."""

    def __init__(self, last_sequence: int | None = None) -> None:
        super().__init__(last_sequence=last_sequence)


class CallerLeft(ServiceError, code="CANCELLED"):
    """The caller ended the call."""

    def __init__(self) -> None:
        super().__init__()


class Internal(ServiceError, code="INTERNAL", details=frozenset({Detail.REQUEST_INFO})):
    """Something failed on our side; report it with the request id."""

    def __init__(self) -> None:
        super().__init__()
