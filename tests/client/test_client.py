"""The published library against a scripted server: what it sends, what it repeats, what it raises, when it stops."""

import threading
import uuid

import grpc
import pytest

import argosy
from argosy import errors
from argosy.channel import Target
from argosy.streams import Fold
from argosy.v1 import stream_pb2
from services.chassis.errors import (
    ApiKeyInvalid,
    FieldOutOfRange,
    Internal,
    NotStarted,
    RateLimited,
    RequestAlreadySettled,
    ResourceNotFound,
    ScopeMissing,
    StreamLost,
)
from tests.fakes.gateway import KEY, events, fake_gateway


def client(fake, **more):
    return argosy.Client(fake.address, KEY, model="models/a", **more)


def test_a_call_carries_key_deadline_and_request_id():
    with fake_gateway() as fake, client(fake) as library:
        assert library.caller().project == "projects/p"
        assert library.generate("Hello").outputs[0].text == "To sea."
        assert uuid.UUID(fake.seen[-1].request_id).version == 4
        assert fake.seen[-1].model == "models/a"
        assert all(left is not None and left <= 60.5 for left in fake.timeouts)
        library.generate("Hello", timeout_s=7)
        assert fake.timeouts[-1] <= 7.5
        assert fake.seen[-1].request_id != fake.seen[-2].request_id


def test_config_leaves_unset_what_is_left_out():
    assert argosy.config() == argosy.config(stop=())
    config = argosy.config(temperature=0, n=2, time_limit_s=1.5)
    assert config.sampling.HasField("temperature") and not config.sampling.HasField("top_p")
    assert config.stopping.time_limit.ToMilliseconds() == 1500


def test_a_stream_gives_text_then_its_result():
    with fake_gateway() as fake, client(fake) as library, library.stream_chat("Where to?") as stream:
        with pytest.raises(ValueError):
            _ = stream.result
        assert list(stream) == ["To", " sea", "."]
        assert stream.result.completed.usage.output_tokens == 3
        assert stream.result.outputs[0].finished.reason == stream_pb2.FINISH_REASON_STOP


def test_leaving_the_block_cancels_the_call():
    with fake_gateway(hold=threading.Event()) as fake, client(fake) as library:
        with library.stream_generate("Count") as stream:
            assert next(iter(stream)) == "To"
        assert fake.cancelled.wait(10)


async def test_leaving_the_block_cancels_the_asyncio_call():
    with fake_gateway(hold=threading.Event()) as fake:
        async with argosy.AsyncClient(fake.address, KEY, model="models/a") as library, library.stream_generate("Count") as stream:
            async for piece in stream:
                assert piece == "To"
                break
        assert fake.cancelled.wait(10)


async def test_the_asyncio_client_is_the_same():
    with fake_gateway() as fake:
        async with argosy.AsyncClient(fake.address, KEY, model="models/a") as library:
            assert [each.name async for each in library.models()] == fake.models
            result = await library.generate("Hello")
            async with library.stream_generate("Hello") as stream:
                assert "".join([piece async for piece in stream]) == result.outputs[0].text
            fake.refusals.append(ScopeMissing("generate"))
            with pytest.raises(errors.PermissionDenied) as caught:
                await library.generate("Hello")
            assert caught.value.metadata["scope"] == "generate"


@pytest.mark.parametrize(
    ("refusal", "kind", "reason"),
    [
        (FieldOutOfRange("config.sampling.top_p", asked=2, limit="(0, 1]", unit=""), errors.InvalidArgument, "FIELD_OUT_OF_RANGE"),
        (ApiKeyInvalid(), errors.Unauthenticated, "API_KEY_INVALID"),
        (ScopeMissing("explain"), errors.PermissionDenied, "SCOPE_MISSING"),
        (ResourceNotFound("model"), errors.NotFound, "RESOURCE_NOT_FOUND"),
        (RequestAlreadySettled(), errors.AlreadyExists, "REQUEST_ALREADY_SETTLED"),
        (RateLimited(1.5, "requests"), errors.ResourceExhausted, "RATE_LIMITED"),
        (Internal(), errors.InternalError, "INTERNAL"),
    ],
)
def test_errors_are_types(refusal, kind, reason):
    with fake_gateway(refusals=[refusal]) as fake, client(fake) as library:
        with pytest.raises(kind) as caught:
            library.generate("Hello")
        assert (caught.value.reason, caught.value.request_id) == (reason, "r-1")
        assert fake.calls == 1
        if reason == "FIELD_OUT_OF_RANGE":
            assert caught.value.field == "config.sampling.top_p"
        if reason == "RATE_LIMITED":
            assert caught.value.retry_after_s == pytest.approx(1.5)


def test_unavailable_before_the_answer_is_repeated():
    with fake_gateway(refusals=[NotStarted(), NotStarted()]) as fake, client(fake) as library:
        assert library.generate("Hello").outputs[0].text == "To sea."
        assert fake.calls == 3
        assert len({request.request_id for request in fake.seen}) == 1


def test_a_stream_lost_after_its_start_is_not_repeated():
    with fake_gateway(breaks=(2, StreamLost(2))) as fake, client(fake) as library:
        with library.stream_generate("Hello") as stream, pytest.raises(errors.StreamLost) as caught:
            list(stream)
        assert (caught.value.last_sequence, fake.calls) == (2, 1)


def test_no_completed_is_failure():
    with fake_gateway(breaks=(3, None)) as fake, client(fake) as library:
        with library.stream_generate("Hello") as stream, pytest.raises(errors.StreamLost):
            list(stream)
        with pytest.raises(ValueError):
            _ = stream.result


def test_a_missing_event_is_failure():
    said = events(["a", "b"])
    del said[2]
    with (
        fake_gateway(script=said) as fake,
        client(fake) as library,
        library.stream_generate("Hello") as stream,
        pytest.raises(errors.StreamLost),
    ):
        list(stream)


def test_fold_adds_up_outputs_logprobs_and_tool_calls():
    fold = Fold()
    fold.add(stream_pb2.GenerationEvent(sequence=1, started=stream_pb2.Started(request_id="r")))
    token = stream_pb2.TokenLogprob(token_id=5, token=b"x", logprob=-1)
    fold.add(stream_pb2.GenerationEvent(sequence=2, text=stream_pb2.TextDelta(index=1, text="x", tokens=[token])))
    for number, part in enumerate(('{"city"', ': "Bergen"}'), 3):
        delta = stream_pb2.ToolCallDelta(id="c1" if number == 3 else "", name="weather" if number == 3 else "", arguments_json=part)
        fold.add(stream_pb2.GenerationEvent(sequence=number, tool_call=delta))
    fold.add(stream_pb2.GenerationEvent(sequence=5, completed=stream_pb2.Completed()))
    first, second = fold.result().outputs
    assert first.tool_calls[0].arguments_json == '{"city": "Bergen"}'
    assert first.tool_calls[0].name == "weather"
    assert (second.text, second.tokens[0].token_id, second.finished.index) == ("x", 5, 1)


def test_models_are_paged():
    with fake_gateway() as fake, client(fake) as library:
        assert [each.name for each in library.models()] == fake.models
        assert fake.calls == 2


def test_nobody_there_is_unavailable():
    with argosy.Client("127.0.0.1:1", timeout_s=5) as library, pytest.raises(errors.Unavailable) as caught:
        library.caller()
    assert caught.value.reason == ""


def test_plaintext_never_leaves_the_machine():
    assert Target("127.0.0.1:1", "").plaintext and Target("[::1]:1", "").plaintext and Target("unix:/tmp/x", "").plaintext
    assert not Target("gateway.example:443", "").plaintext
    assert not Target("10.0.0.1:443", "").plaintext


def test_every_status_has_its_type():
    known = {kind.code for kind in errors.ArgosyError.__subclasses__()}
    assert known >= set(grpc.StatusCode) - {grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN}


def test_messages_may_be_plain():
    from argosy import requests

    assert requests.message(("user", "x")) == requests.message({"role": "user", "content": "x"})
    with pytest.raises(ValueError, match="narrator"):
        requests.message(("narrator", "x"))
    assert [(each.id, each.text) for each in requests.passages({"a": "b"})] == [("a", "b")]
    assert [each.id for each in requests.passages(["x", "y"])] == ["0", "1"]
