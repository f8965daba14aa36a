"""Errors on the wire, in both directions, over a real server and channel."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2 as details
from google.rpc import status_pb2

from services.chassis import errors, status
from services.chassis.errors import DOMAIN, REASONS, ServiceError
from services.chassis.interceptors import Policy, progress
from tests.chassis.echo import calling, echo, text

EXAMPLES: dict[str, ServiceError] = {
    error.reason: error
    for error in (
        errors.FieldOutOfRange("config.top_p", 2.5, "0..1", ""),
        errors.FieldInvalid("model", "name"),
        errors.PromptTooLong("text", 300_000, 262_144),
        errors.UnsupportedFormat("zip", line=3, byte_offset=77),
        errors.ArtifactRejected("pickle"),
        errors.PageTokenInvalid(),
        errors.MetadataInvalid("authorization"),
        errors.UnsupportedLanguage("target_language"),
        errors.ApiKeyInvalid(),
        errors.ScopeMissing("generate"),
        errors.KeyRevoked(41),
        errors.ResourceNotFound("model"),
        errors.ResourceExists(),
        errors.RequestAlreadySettled(),
        errors.WrongState(state="DELETED"),
        errors.HasDependants(),
        errors.GateNotPassed(),
        errors.PrivacyBudgetExceeded(),
        errors.ModelCapability(capability="embed"),
        errors.ModelNotServed(),
        errors.IdempotencyKeyReused(),
        errors.EtagMismatch(),
        errors.UploadFenced(),
        errors.WorkerFenced(),
        errors.RequestInFlight(),
        errors.UploadOffset(4_096),
        errors.EventSequenceAhead(12),
        errors.ChecksumMismatch(512),
        errors.RateLimited(1.5, "requests_per_minute"),
        errors.QuotaExceeded("tokens_per_day"),
        errors.SlowConsumer(9),
        errors.MetadataTooLarge(16_384),
        errors.NotStarted(),
        errors.Draining(),
        errors.Shed(0.4),
        errors.StoreUnavailable(),
        errors.StreamLost(7),
        errors.DeadlineExceeded(),
        errors.CallerLeft(),
        errors.Internal(),
    )
}
PUSHBACK = {
    "KEY_REVOKED": "-1", "REQUEST_IN_FLIGHT": "1000", "RATE_LIMITED": "1500", "QUOTA_EXCEEDED": "-1", "SLOW_CONSUMER": "-1",
    "METADATA_TOO_LARGE": "-1", "NOT_STARTED": "500", "DRAINING": "100", "SHED": "400", "STORE_UNAVAILABLE": "2000", "STREAM_LOST": "-1",
}  # fmt: skip
BESIDES = {"BadRequest", "QuotaFailure", "PreconditionFailure", "RequestInfo"}
BESIDE = {
    "FIELD_OUT_OF_RANGE": "BadRequest", "FIELD_INVALID": "BadRequest", "PROMPT_TOO_LONG": "BadRequest", "PAGE_TOKEN_INVALID": "BadRequest",
    "UNSUPPORTED_LANGUAGE": "BadRequest", "RATE_LIMITED": "QuotaFailure", "QUOTA_EXCEEDED": "QuotaFailure", "INTERNAL": "RequestInfo",
    **dict.fromkeys(
        ["WRONG_STATE", "HAS_DEPENDANTS", "GATE_NOT_PASSED", "PRIVACY_BUDGET_EXCEEDED", "MODEL_CAPABILITY", "MODEL_NOT_SERVED",
         "IDEMPOTENCY_KEY_REUSED"], "PreconditionFailure"),
}  # fmt: skip


def unpacked(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """The details of a rich status by message name."""
    found = status_pb2.Status.FromString(dict(error.trailing_metadata())[status.STATUS_KEY])
    assert (found.code, found.message) == (error.code().value[0], error.details())
    out = {}
    for any_ in found.details:
        name = any_.TypeName().rsplit(".", 1)[-1]
        out[name] = getattr(details, name).FromString(any_.value)
    return out


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def drained(call: Any) -> list[str]:
    return [event.value async for event in call]


async def rest(call: Any) -> list[str]:
    """What a call that was read from with `read` still has to say."""
    events = []
    while (event := await call.read()) is not grpc.aio.EOF:
        events.append(event.value)
    return events


def raising(make: Callable[[str], BaseException]) -> Any:
    async def body(request: Any, context: Any) -> Any:
        context.set_trailing_metadata(((status.REQUEST_ID_KEY, "r-1"), (status.SERVED_BY_KEY, "pod-7")))
        raise make(request.value)

    return body


async def test_error_table() -> None:
    assert EXAMPLES.keys() == REASONS.keys()
    async with echo({"Unary": raising(EXAMPLES.__getitem__)}) as serving, calling(serving.address) as caller:
        for reason, example in EXAMPLES.items():
            error = await failure(caller.unary(text(reason)))
            trailers, found = dict(error.trailing_metadata()), unpacked(error)
            assert (error.code().name, error.details()) == (example.code, example.sentence), reason
            info = found["ErrorInfo"]
            assert (info.reason, info.domain, dict(info.metadata)) == (reason, DOMAIN, example.metadata)
            assert BESIDES & found.keys() == ({BESIDE[reason]} if reason in BESIDE else set()), reason
            assert trailers.get(status.PUSHBACK_KEY) == PUSHBACK.get(reason), reason
            wait = int(PUSHBACK.get(reason, "-1"))
            assert ("RetryInfo" in found) == (wait >= 0), reason
            if wait >= 0:
                assert found["RetryInfo"].retry_delay.ToMilliseconds() == wait
            assert trailers.get(status.LAST_SEQUENCE_KEY) == (None if example.last_sequence is None else str(example.last_sequence))
            assert trailers[status.REQUEST_ID_KEY] == "r-1" and trailers[status.SERVED_BY_KEY] == "pod-7"


async def test_details_name_the_field_and_the_subject() -> None:
    async with echo({"Unary": raising(EXAMPLES.__getitem__)}) as serving, calling(serving.address) as caller:
        bad = unpacked(await failure(caller.unary(text("FIELD_OUT_OF_RANGE"))))["BadRequest"].field_violations[0]
        assert (bad.field, bad.reason) == ("config.top_p", "FIELD_OUT_OF_RANGE")
        quota = unpacked(await failure(caller.unary(text("RATE_LIMITED"))))["QuotaFailure"].violations[0]
        assert quota.subject == "requests_per_minute"
        state = unpacked(await failure(caller.unary(text("IDEMPOTENCY_KEY_REUSED"))))["PreconditionFailure"].violations[0]
        assert (state.type, state.subject) == ("IDEMPOTENCY_KEY_REUSED", "request_id")
        assert unpacked(await failure(caller.unary(text("INTERNAL"))))["RequestInfo"].request_id == "r-1"


async def test_a_defect_shows_nothing_of_itself(caplog: pytest.LogCaptureFixture) -> None:
    async with echo({"Unary": raising(lambda word: ValueError(f"{word} /etc/passwd"))}) as serving, calling(serving.address) as caller:
        error = await failure(caller.unary(text("canary")))
    assert error.code() is grpc.StatusCode.INTERNAL and unpacked(error)["ErrorInfo"].reason == "INTERNAL"
    assert b"canary" not in repr((error.details(), error.trailing_metadata())).encode()
    assert [record.getMessage() for record in caplog.records if "unhandled" in record.message] == ["unhandled in /test.Echo/Unary"]


async def test_malformed_request() -> None:
    """Field 1 as a length that runs past the end: no parser accepts it, and core would answer UNKNOWN with the exception's text."""
    async with echo() as serving, calling(serving.address) as caller:
        for path, arity in (("Unary", caller.channel.unary_unary), ("Stream", caller.channel.unary_stream)):
            call = arity(f"/test.Echo/{path}", None, None)(b"\x0a\xff\x01")
            error = await failure(call if path == "Unary" else drained(call))
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert unpacked(error)["ErrorInfo"].reason == "FIELD_INVALID"


async def test_trailer_budget() -> None:
    """At 12 KB of trailers a client saw RESOURCE_EXHAUSTED: an error's own stay under 4 KiB, and an over-full handler's are thinned."""
    worst = [
        errors.FieldOutOfRange("é" * 9_000, "9" * 9_000, "9" * 9_000, "u" * 9_000),
        errors.WrongState("f" * 9_000, "s" * 9_000),
        errors.QuotaExceeded("q" * 9_000),
        errors.ArtifactRejected("r" * 9_000, 10**300, 10**300),
    ]
    for error in (*worst, *EXAMPLES.values()):
        answer = status.rich(error, "r" * 9_000)
        assert len(answer.sentence.encode()) <= 1_024
        assert sum(len(k) + len(v) + 32 for k, v in status.trailers_of(answer, ())) < 4_096, error.reason

    async def greedy(request: Any, context: Any) -> Any:
        context.set_trailing_metadata((("served_by", "pod-7"), *((f"key-{n}", "v" * 200) for n in range(40))))
        raise errors.ResourceNotFound("model")

    async with echo({"Unary": greedy}) as serving, calling(serving.address) as caller:
        error = await failure(caller.unary(text("")))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert [key for key, _ in error.trailing_metadata() if key.startswith(("served", "key"))] == ["served_by"]


async def test_error_keeps_trailers() -> None:
    """`abort` with trailers of its own drops those set before; pushback and ours have to go out together."""

    async def body(request: Any, context: Any) -> Any:
        context.set_trailing_metadata((("request_id", "r-9"), ("served_by", "pod-1"), ("cached", "12")))
        raise errors.Shed(0.4)

    async with echo({"Unary": body}) as serving, calling(serving.address) as caller:
        trailers = (await failure(caller.unary(text("")))).trailing_metadata()
    assert {"request_id": "r-9", "served_by": "pod-1", "cached": "12", "grpc-retry-pushback-ms": "400"}.items() <= dict(trailers).items()
    assert len(trailers) == len(dict(trailers)) == 5


# --- what an upstream said ----------------------------------------------------------------------------------------------------------


async def relayed(upstream: Any, *, admit: bool = False, sequence: int | None = None) -> grpc.aio.AioRpcError:
    """The error a client sees when `upstream` fails behind a relay of ours."""
    async with echo({"Unary": upstream}) as pod, calling(pod.address) as inner:

        async def relay(request: Any, context: Any) -> Any:
            context.set_trailing_metadata((("served_by", "pod-1"),))
            if admit:
                await context.send_initial_metadata(())
                progress().last_sequence = sequence
            return await inner.unary(request)

        async with echo({"Unary": relay}) as gateway, calling(gateway.address) as caller:
            return await failure(caller.unary(text("")))


def aborting(code: grpc.StatusCode, trailers: Any = ()) -> Any:
    async def body(request: Any, context: Any) -> Any:
        await context.abort(code, "secret detail of the pod", trailers)

    return body


async def test_an_upstream_with_our_error_info_is_passed_on_unchanged() -> None:
    error = await relayed(raising(lambda _: errors.RateLimited(1.5, "requests_per_minute")))
    want = status.rich(errors.RateLimited(1.5, "requests_per_minute"))
    trailers = dict(error.trailing_metadata())
    assert (error.code(), error.details()) == (want.code, want.sentence)
    assert {key: trailers[key] for key, _ in want.trailers} == dict(want.trailers)
    assert trailers["served_by"] == "pod-1"


@pytest.mark.parametrize(
    "code, admitted, reason",
    [
        (grpc.StatusCode.UNAVAILABLE, False, "NOT_STARTED"),
        (grpc.StatusCode.UNAVAILABLE, True, "STREAM_LOST"),
        (grpc.StatusCode.CANCELLED, False, "NOT_STARTED"),
        (grpc.StatusCode.CANCELLED, True, "STREAM_LOST"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, True, "DEADLINE_EXCEEDED"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, False, "INTERNAL"),
        (grpc.StatusCode.UNIMPLEMENTED, False, "INTERNAL"),
        (grpc.StatusCode.UNKNOWN, True, "INTERNAL"),
    ],
)
async def test_a_bare_upstream_status_is_named(code: grpc.StatusCode, admitted: bool, reason: str) -> None:
    error = await relayed(aborting(code), admit=admitted, sequence=3)
    assert unpacked(error)["ErrorInfo"].reason == reason
    assert "secret detail" not in repr((error.details(), error.trailing_metadata()))
    if reason == "STREAM_LOST":
        assert dict(error.trailing_metadata())["last_seq"] == "3"


async def test_an_upstream_that_refuses_our_own_credential_is_our_defect() -> None:
    assert (await relayed(raising(lambda _: errors.ApiKeyInvalid()))).code() is grpc.StatusCode.INTERNAL


@pytest.mark.parametrize(
    "blob",
    [
        b"\xff\xff not a status",
        status_pb2.Status(code=8).SerializeToString(),
        dict(status.rich(errors.ResourceNotFound("model")).trailers)[status.STATUS_KEY],  # does not fit the code
    ],
)
async def test_a_status_that_is_not_ours_is_not_believed(blob: bytes) -> None:
    error = await relayed(aborting(grpc.StatusCode.RESOURCE_EXHAUSTED, ((status.STATUS_KEY, blob),)))
    assert unpacked(error)["ErrorInfo"].reason == "INTERNAL"


def test_decode_errors_are_named() -> None:
    named = status.named(DecodeError("bytes of a caller"), admitted=False)
    assert isinstance(named, errors.FieldInvalid) and named.metadata == {"field": "", "rule": "wire_format"}


# --- the order of things in the error step ------------------------------------------------------------------------------------------


async def test_stray_cancel_has_status() -> None:
    """A CancelledError nobody asked for, as from an upstream call cancelled here, would leave the client without any status."""

    async def unary(request: Any, context: Any) -> Any:
        raise asyncio.CancelledError

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        yield text("one")
        progress().last_sequence = 1
        raise asyncio.CancelledError

    async with echo({"Unary": unary, "Stream": stream}) as serving, calling(serving.address) as caller:
        for call in (caller.unary(text(""), timeout=20), drained(caller.stream(text(""), timeout=20))):
            error = await failure(call)
            assert (error.code(), unpacked(error)["ErrorInfo"].reason) == (grpc.StatusCode.UNAVAILABLE, "STREAM_LOST")


async def test_I8_a_call_without_a_deadline_ends_at_the_cap() -> None:
    async def unary(request: Any, context: Any) -> Any:
        await asyncio.Event().wait()

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        yield text("one")
        progress().last_sequence = 1
        await asyncio.Event().wait()

    policy = Policy(deadline_cap_s=lambda path: 0.05 if path.startswith("/test.Echo/") else 300.0)
    async with echo({"Unary": unary, "Stream": stream}, policy=policy) as serving, calling(serving.address) as caller:
        for call in (caller.unary(text("")), drained(caller.stream(text(""))), caller.unary(text(""), timeout=90)):
            error = await failure(call)
            assert (error.code(), unpacked(error)["ErrorInfo"].reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
        assert serving.inflight.count == 0


async def test_I8_the_cap_does_not_cut_a_stream_in_its_send() -> None:
    """Many messages race with the cap: whichever wins, the client gets a status."""

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        while True:
            yield text("x" * 1_000)

    async with echo({"Stream": stream}, policy=Policy(deadline_cap_s=0.1)) as serving, calling(serving.address) as caller:
        error = await failure(drained(caller.stream(text(""), timeout=30)))
        assert unpacked(error)["ErrorInfo"].reason == "DEADLINE_EXCEEDED"
