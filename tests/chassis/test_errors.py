import inspect
import re

from services.chassis.errors import FIELD_BYTES, REASONS, ApiKeyInvalid, Draining, FieldInvalid, FieldOutOfRange, RateLimited, ServiceError
from services.chassis.identity import CallerRefused

TABLE = {  # api.md section 7
    "INVALID_ARGUMENT": "FIELD_OUT_OF_RANGE FIELD_INVALID PROMPT_TOO_LONG UNSUPPORTED_FORMAT ARTIFACT_REJECTED PAGE_TOKEN_INVALID"
    " METADATA_INVALID UNSUPPORTED_LANGUAGE",
    "UNAUTHENTICATED": "API_KEY_INVALID",
    "PERMISSION_DENIED": "SCOPE_MISSING KEY_REVOKED",
    "NOT_FOUND": "RESOURCE_NOT_FOUND",
    "ALREADY_EXISTS": "RESOURCE_EXISTS REQUEST_ALREADY_SETTLED",
    "FAILED_PRECONDITION": "WRONG_STATE HAS_DEPENDANTS GATE_NOT_PASSED PRIVACY_BUDGET_EXCEEDED MODEL_CAPABILITY MODEL_NOT_SERVED"
    " IDEMPOTENCY_KEY_REUSED",
    "ABORTED": "ETAG_MISMATCH UPLOAD_FENCED REQUEST_IN_FLIGHT WORKER_FENCED",
    "OUT_OF_RANGE": "UPLOAD_OFFSET EVENT_SEQUENCE_AHEAD",
    "DATA_LOSS": "CHECKSUM_MISMATCH",
    "RESOURCE_EXHAUSTED": "RATE_LIMITED QUOTA_EXCEEDED SLOW_CONSUMER METADATA_TOO_LARGE",
    "UNAVAILABLE": "NOT_STARTED DRAINING SHED STORE_UNAVAILABLE STREAM_LOST",
    "DEADLINE_EXCEEDED": "DEADLINE_EXCEEDED",
    "CANCELLED": "CALLER_LEFT",
    "INTERNAL": "INTERNAL",
}


def test_every_reason_of_the_design_has_one_class_and_its_code() -> None:
    assert {reason: cls.code for reason, cls in REASONS.items()} == {
        reason: code for code, reasons in TABLE.items() for reason in reasons.split()
    }


def test_a_sentence_is_fixed_and_says_nothing_of_a_request() -> None:
    sentences = [cls.sentence for cls in REASONS.values()]
    assert len(set(sentences)) == len(sentences)
    for sentence in sentences:
        assert sentence.endswith(".") and len(sentence) <= 120
        assert not re.search(r"[\d{}%]", sentence)


def test_every_class_says_how_it_is_made() -> None:
    for cls in REASONS.values():
        assert "__init__" in vars(cls), cls
        kinds = {p.kind for p in inspect.signature(cls).parameters.values()}
        assert inspect.Parameter.VAR_KEYWORD not in kinds, cls


def test_metadata_is_text_and_capped() -> None:
    error = FieldOutOfRange("config.temperature", float("nan"), "0..2", "")
    assert error.metadata == {"field": "config.temperature", "asked": "nan", "limit": "0..2", "unit": ""}
    assert len(FieldOutOfRange("f", "9" * 10_000, 1, "tokens").metadata["asked"]) == 100
    assert len((FieldInvalid("é" * 10_000).field or "").encode()) <= FIELD_BYTES


def test_a_field_path_cannot_carry_control_characters() -> None:
    assert FieldInvalid("labels[\n\x1b[31m]").field == "labels[??[31m]"


def test_api_key_invalid_tells_nothing_apart() -> None:
    assert ApiKeyInvalid().metadata == {} and ApiKeyInvalid().field is None


def test_a_private_variant_is_no_new_reason() -> None:
    refused = CallerRefused("expired")
    assert (refused.reason, refused.code, refused.metadata) == ("API_KEY_INVALID", "UNAUTHENTICATED", {})
    assert REASONS["API_KEY_INVALID"] is ApiKeyInvalid


def test_pushback() -> None:
    assert RateLimited(0.4, "requests_per_minute").pushback_ms == 400
    assert RateLimited(0.0, "requests_per_minute").pushback_ms == 1
    assert Draining().pushback_ms == 100
    assert Draining(last_sequence=0).pushback_ms == -1
    assert FieldInvalid("x").pushback_ms is None


def test_a_service_error_reads_as_its_sentence() -> None:
    assert all(str(make()) == make.sentence for make in (ApiKeyInvalid, Draining))
    assert issubclass(ApiKeyInvalid, ServiceError)
