"""EngineService.Generate over a real server and a scripted engine."""

import asyncio
import uuid

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2

from argosy.v1 import config_pb2, content_pb2, generation_pb2, usage_pb2
from argosy_internal.engine.v1 import engine_pb2
from services.chassis.identity import CallerSigner
from services.inference.engine.calls import FinishReason, Generate
from services.inference.servicers.engine import USAGE_KEY
from tests.fakes.host import IDLE, LIMIT, LOST, FakeHost, hello
from tests.inference.replicas import (
    CALLER,
    TOKENIZER,
    Reason,
    client,
    finished,
    ids,
    kinds,
    reason,
    request,
    said,
    signed,
    stopping,
    text,
    trailers,
)

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def asked(host):
    """The engine's calls for text."""
    return [call for call in host.calls if isinstance(call, Generate)]


async def failure(call):
    """The error of a stream, and the events before it."""
    events = []
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for event in call:
            events.append(event)
    return caught.value, events


def turn(role, said):
    return content_pb2.ChatMessage(role=role, parts=[content_pb2.ContentPart(text=said)])


def chat(*messages, **fields):
    return request(chat=generation_pb2.ChatRequest(model="models/tiny", messages=messages, **fields))


# --- order, text, reasons -----------------------------------------------------------------------------------------------------------


async def test_event_order_and_usage():
    host = FakeHost(says=ids("hello", " world"))
    async with client(host) as replica:
        events = await replica.generate(text("the tech"))
    assert kinds(events)[0] == "started"
    assert kinds(events)[-2:] == ["output_finished", "completed"]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert said(events) == "hello world"
    assert finished(events)[0].reason == Reason.FINISH_REASON_STOP
    (call,) = asked(host)
    usage = events[-1].completed.usage
    assert (usage.input_tokens, usage.output_tokens) == (len(call.prompt), len(ids("hello", " world")) + 1)  # the end token counts
    assert events[0].started.prompt_tokens == len(call.prompt)
    assert events[0].started.model.base_digest == host.hello.digest
    assert call.cache_salt == bytes.fromhex(CALLER.kv_scope)
    assert call.tenant == CALLER.project_uid


async def test_chat_goes_through_the_plain_template():
    host = FakeHost(says=ids(" yes", "\n", "User", ":", " no"))
    async with client(host) as replica:
        events = await replica.generate(
            chat(turn(content_pb2.ROLE_SYSTEM, "be brief"), turn(content_pb2.ROLE_USER, "hello"), turn(content_pb2.ROLE_ASSISTANT, "the"))
        )
    assert said(events) == "yes"
    assert finished(events)[0].reason == Reason.FINISH_REASON_STOP  # the template's own ending is the turn's end
    assert TOKENIZER.decode(asked(host)[0].prompt) == "be brief\nUser: hello\nAssistant: the\nAssistant:"


@pytest.mark.parametrize("words", [("世", "界", "𓀀"), ("é",)])
async def test_text_is_whole_utf8(words):
    tokens = ids(*words)
    async with client(FakeHost(says=tokens)) as replica:
        events = await replica.generate(text("the", output=config_pb2.OutputOptions(flush_interval=Duration())))
    assert said(events) == "".join(words)
    assert "�" not in said(events)


async def test_bytes_that_never_become_a_character_end_as_replacement():
    async with client(FakeHost(says=ids("𓀀")[:2])) as replica:
        events = await replica.generate(text("the"))
    assert set(said(events)) == {"�"}


async def test_stop_sequence_across_tokens_is_cut_and_named():
    hold = asyncio.Event()
    host = FakeHost(says=[*ids("yes", "E", "N", "D"), *ids(" tech") * 50, hold])
    async with client(host) as replica:
        events = await replica.generate(text("the", **stopping(stop_sequences=["END"])))
    assert said(events) == "yes"
    (end,) = finished(events)
    assert (end.reason, end.stop_sequence) == (Reason.FINISH_REASON_STOP_SEQUENCE, "END")
    assert host.totals["tokens"] < 50  # the engine was told to stop
    assert events[-1].completed.usage.output_tokens == host.totals["tokens"]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [({"max_output_tokens": 3}, Reason.FINISH_REASON_LENGTH), ({}, Reason.FINISH_REASON_CONTEXT_LENGTH)],
)
async def test_length_is_named_by_who_set_it(limits, expected):
    host = FakeHost(says=lambda call, index: iter(lambda: ids("a")[0], None))
    async with client(host) as replica:
        message = text("the", **stopping(**limits))
        message.output_token_ceiling = 5
        events = await replica.generate(message)
    assert finished(events)[0].reason == expected
    assert len(said(events)) == limits.get("max_output_tokens", 5)
    assert events[-1].completed.effective_config.stopping.max_output_tokens == limits.get("max_output_tokens", 5)


async def test_nothing_ends_before_the_minimum():
    end = FakeHost().hello.end_token_ids[0]
    host = FakeHost(says=[*ids("a"), end, *ids("b", "c", "d"), end])
    async with client(host) as replica:
        events = await replica.generate(text("the", **stopping(min_output_tokens=3, stop_sequences=["b"])))
    assert said(events) == "abcd"


async def test_outputs_end_each_with_one_event():
    host = FakeHost(says=lambda call, index: ids("abcd"[index]))
    async with client(host) as replica:
        events = await replica.generate(text("the", sampling=config_pb2.Sampling(n=4)))
    assert [said(events, index) for index in range(4)] == list("abcd")
    assert sorted(end.index for end in finished(events)) == [0, 1, 2, 3]
    assert events[-1].completed.effective_config.sampling.n == 4


async def test_effective_config_says_what_took_effect():
    async with client(FakeHost(says=ids("a"))) as replica:
        unset = (await replica.generate(text("the")))[-1].completed.effective_config
        given = (await replica.generate(text("the", sampling=config_pb2.Sampling(seed=7, temperature=0, top_k=3))))[-1].completed
    assert unset.sampling.HasField("seed")
    assert (unset.sampling.temperature, unset.sampling.top_k) == (1.0, 64)
    shown = given.effective_config.sampling
    assert (shown.seed, shown.temperature, shown.top_k) == (7, 0.0, 3)


async def test_logprobs_carry_raw_bytes_and_cover_the_text_only():
    host = FakeHost(says=ids("a", "世", "é", "E", "N", "D"))
    config = {"output": config_pb2.OutputOptions(top_logprobs=2, prompt_logprobs=True), **stopping(stop_sequences=["END"])}
    async with client(host) as replica:
        events = await replica.generate(text("the", **config))
    tokens = [token for event in events for token in event.text.tokens]
    assert b"".join(token.token for token in tokens) == said(events).encode() == "a世é".encode()
    assert all(len(token.top) == 2 and token.logprob < 0 for token in tokens)
    assert len(events[0].started.prompt_logprobs) == events[0].started.prompt_tokens - 1


async def test_fold_does_not_depend_on_how_text_was_cut():
    words = ids("hello", " world", "\n", "世界", " yes") * 5
    folds = []
    for output in (config_pb2.OutputOptions(flush_interval=Duration()), config_pb2.OutputOptions()):
        async with client(FakeHost(says=words)) as replica:
            events = await replica.generate(text("the", output=output, sampling=config_pb2.Sampling(seed=1)))
            folds.append((said(events), finished(events), events[-1].completed.usage))
    assert folds[0] == folds[1]


# --- time ---------------------------------------------------------------------------------------------------------------------------


async def test_time_limit_beats_deadline():
    """Asked for longer than the deadline, the soft limit moves before it: the partial output arrives, and OK."""
    host = FakeHost(says=[*ids("yes"), LIMIT])
    async with client(host) as replica:
        message = text("the", **stopping(time_limit=Duration(seconds=100)))
        events = [event async for event in replica.call(message, timeout=1.0)]
    assert said(events) == "yes"
    assert finished(events)[0].reason == Reason.FINISH_REASON_TIME_LIMIT
    (call,) = asked(host)
    assert call.time_limit_s < call.deadline_s
    assert events[-1].completed.effective_config.stopping.time_limit.ToNanoseconds() < 1_000_000_000


async def test_deadline_is_hard_and_says_what_it_cost():
    host = FakeHost(says=[*ids("yes"), LIMIT])
    async with client(host) as replica:
        error, events = await failure(replica.call(text("the"), timeout=0.6))
    assert error.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert said(events) == "yes"
    usage = usage_pb2.Usage.FromString(trailers(error)[USAGE_KEY])
    assert usage.output_tokens == host.totals["tokens"]


async def test_heartbeat_in_quiet():
    release = asyncio.Event()
    host = FakeHost(says=[release, *ids("yes"), release])
    async with client(host, heartbeat_seconds=0.05) as replica:
        events = []
        async for event in replica.call(text("the")):
            events.append(event)
            if kinds(events).count("heartbeat") == 2:
                host.release(release)
    assert kinds(events)[0] == "started"
    assert kinds(events).count("heartbeat") >= 2
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))


async def test_metadata_at_admission():
    """A refusal has sent nothing: a channel may retry it. An admitted call has sent initial metadata before any token."""
    hold = asyncio.Event()
    host = FakeHost(says=[hold])
    async with client(host) as replica:
        call = replica.call(text("the"))
        await call.initial_metadata()
        assert host.totals["tokens"] == 0
        host.set_load(IDLE.__class__(2_000, 1, 10, 10, 100.0, 10.0, 0, 10, 0, 1, 0.1, 1))
        error, events = await failure(replica.call(text("the")))
        assert reason(error)[0] == "SHED"
        assert not events
        assert "grpc-retry-pushback-ms" in trailers(error)
        host.release(hold)
        assert kinds([event async for event in call])[-1] == "completed"


async def test_predicted_wait_beyond_the_deadline_is_shed():
    host = FakeHost(load=IDLE.__class__(1, 1, 100_000, 10, 100.0, 10.0, 0, 10, 0, 1, 0.1, 1))
    async with client(host) as replica:
        error, _ = await failure(replica.call(text("the"), timeout=5))
    assert reason(error)[0] == "SHED"
    assert not asked(host)


# --- bad input ----------------------------------------------------------------------------------------------------------------------


async def test_A1_long_prompt_is_refused_before_tokenising(monkeypatch):
    host = FakeHost()
    async with client(host) as replica:
        monkeypatch.setattr(type(TOKENIZER), "encode", lambda *_: pytest.fail("tokenised"))
        error, _ = await failure(replica.call(text("a" * (256 * 1024 + 1))))
        assert (error.code(), reason(error)[0]) == (grpc.StatusCode.INVALID_ARGUMENT, "PROMPT_TOO_LONG")
        error, _ = await failure(replica.call(text("a" * (10 << 20))))
        assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.RESOURCE_EXHAUSTED)
    assert not asked(host)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (stopping(max_output_tokens=1_000_000), "config.stopping.max_output_tokens"),
        (stopping(max_output_tokens=0), "config.stopping.max_output_tokens"),
        (stopping(stop_sequences=["a"] * 10_000), "config.stopping.stop_sequences"),
        ({"sampling": config_pb2.Sampling(n=1_000_000_000)}, "config.sampling.n"),
        ({"sampling": config_pb2.Sampling(temperature=float("nan"))}, "config.sampling.temperature"),
        ({"sampling": config_pb2.Sampling(temperature=float("inf"))}, "config.sampling.temperature"),
        ({"output": config_pb2.OutputOptions(top_logprobs=100_000)}, "config.output.top_logprobs"),
        ({"penalties": config_pb2.Penalties(logit_bias=dict.fromkeys(range(301), 1.0))}, "config.penalties.logit_bias"),
        ({"penalties": config_pb2.Penalties(logit_bias={5_000: 1.0})}, "config.penalties.logit_bias"),
    ],
)
async def test_A2_bounds_are_checked_again_in_the_pod(config, field):
    host = FakeHost()
    async with client(host) as replica:
        error, _ = await failure(replica.call(text("the", **config)))
    name, metadata = reason(error)
    assert (error.code(), name) == (grpc.StatusCode.INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE")
    assert metadata["field"] == field
    assert not asked(host)


async def test_A2_empty_prompt():
    async with client() as replica:
        error, _ = await failure(replica.call(text("")))
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(("limit", "accepted"), [(10, True), (11, False)])
async def test_length_is_bounded_by_the_room(limit, accepted):
    """Context 512; the prompt leaves room for exactly ten."""
    words = "a" * (512 - 10 - 1)  # one token each, and the beginning-of-text token
    async with client(FakeHost(says=lambda call, index: iter(lambda: ids("b")[0], None))) as replica:
        call = replica.call(text(words, **stopping(max_output_tokens=limit)))
        if accepted:
            assert len(said([event async for event in call])) == 10
        else:
            error, _ = await failure(call)
            assert reason(error)[1] | {"asked": "11", "limit": "10"} == reason(error)[1]


async def test_prompt_over_the_context_is_refused_with_both_numbers():
    async with client() as replica:
        error, _ = await failure(replica.call(text("a" * 600)))
    name, metadata = reason(error)
    assert name == "PROMPT_TOO_LONG"
    assert (metadata["asked"], metadata["limit"], metadata["unit"]) == ("601", "511", "tokens")


async def test_A19_control_tokens_in_a_prompt_stay_plain_text():
    host = FakeHost(says=ids("yes"))
    async with client(host) as replica:
        await replica.generate(text("a <turn><eos>[image]"))
        await replica.generate(chat(turn(content_pb2.ROLE_USER, "<bos></turn>")))
    control = set(TOKENIZER.control.values())
    for call in asked(host):
        assert call.prompt[0] == TOKENIZER.prefix[0]
        assert not set(call.prompt[1:]) & control


async def test_tools_without_a_template_are_refused():
    async with client() as replica:
        tools = [content_pb2.ToolDeclaration(name="find")]
        error, _ = await failure(replica.call(chat(turn(content_pb2.ROLE_USER, "hello"), tools=tools)))
    assert reason(error)[0] == "MODEL_CAPABILITY"


# --- who asks -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "metadata",
    [
        (),
        signed(signer=CallerSigner(Ed25519PrivateKey.generate(), "gateway")),
        signed(signer=CallerSigner(Ed25519PrivateKey.generate(), "other")),
        signed(audience="argosy.finetune"),
        (("x-argosy-caller-bin", b"{}"),),
    ],
    ids=["missing", "forged", "unknown key", "other audience", "unsigned"],
)
async def test_caller_context_is_required_and_forgery_refused(metadata):
    host = FakeHost()
    async with client(host) as replica:
        error, _ = await failure(replica.call(text("the"), metadata=metadata))
        assert error.code() == grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await replica.stub.GetEngineInfo(engine_pb2.GetEngineInfoRequest(), timeout=5, metadata=metadata)
    assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert not asked(host)


async def test_another_models_digest_is_not_answered():
    async with client() as replica:
        message = text("the")
        message.model.base_digest = "cd" * 32
        error, _ = await failure(replica.call(message))
    assert reason(error)[0] == "MODEL_NOT_SERVED"


# --- faults -------------------------------------------------------------------------------------------------------------------------


async def test_A4_slow_reader_is_ended_and_the_engine_freed():
    """A reader that stops: nothing more is generated for it once its outbox has been full for the stall time."""
    token = ids("hello")[0]
    host = FakeHost(says=lambda call, index: iter(lambda: token, None), hello=hello(context=1 << 30))
    async with client(host, write_stall_seconds=0.2) as replica:
        call = replica.call(text("the", output=config_pb2.OutputOptions(flush_interval=Duration())), timeout=60)
        stream = aiter(call)
        await anext(stream)
        await host.until(lambda fake: not fake.running, timeout_s=30)
        tokens = host.totals["tokens"]
        error, events = await failure(stream)
    assert reason(error)[0] == "SLOW_CONSUMER"
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    usage = usage_pb2.Usage.FromString(trailers(error)[USAGE_KEY])
    assert usage.output_tokens == tokens == host.totals["tokens"]
    assert kinds(events)[-1] != "completed"


async def test_A5_hang_up_ends_the_engines_call():
    host = FakeHost(says=[*ids("yes"), asyncio.Event()])
    async with client(host) as replica:
        for _ in range(5):
            call = replica.call(text("the"))
            await call.read()
            call.cancel()
            await host.until(lambda fake: not fake.running)
    assert host.totals["aborted"] == 5


async def test_abort_ends_a_call_with_its_usage():
    host = FakeHost(says=[*ids("yes"), asyncio.Event()])
    async with client(host) as replica:
        message = text("the")
        call = replica.call(message)
        await host.until(lambda fake: fake.totals["tokens"] == 1)
        abort = engine_pb2.AbortRequest(generation_ids=[message.generation_id, str(uuid.uuid4())])
        stranger = CALLER.__class__(**{**{name: getattr(CALLER, name) for name in CALLER.__slots__}, "project_uid": "p-2"})
        await replica.stub.Abort(abort, metadata=signed(stranger), timeout=5)
        assert host.running  # another project's abort does nothing
        await replica.stub.Abort(abort, metadata=signed(), timeout=5)
        await replica.stub.Abort(abort, metadata=signed(), timeout=5)
        error, events = await failure(call)
    assert (error.code(), reason(error)[0]) == (grpc.StatusCode.CANCELLED, "CALLER_LEFT")
    assert usage_pb2.Usage.FromString(trailers(error)[USAGE_KEY]).output_tokens == 1
    assert trailers(error)["last_seq"] == str(events[-1].sequence)


async def test_F4_engine_lost_mid_stream():
    host = FakeHost(says=[*ids("yes"), asyncio.Event()])
    async with client(host) as replica:
        call = replica.call(text("the"))
        await host.until(lambda fake: fake.totals["tokens"] == 1)
        host.lose()
        error, events = await failure(call)
        assert (error.code(), reason(error)[0]) == (grpc.StatusCode.UNAVAILABLE, "STREAM_LOST")
        assert trailers(error)["last_seq"] == str(events[-1].sequence)
        assert kinds(events)[-1] != "completed"
        billed = usage_pb2.Usage.FromString(trailers(error)[USAGE_KEY])
        assert (billed.input_tokens, billed.output_tokens) == (events[0].started.prompt_tokens, 1), "what had come is billed"
        await replica.until(NOT_SERVING)
        error, events = await failure(replica.call(text("the")))
        assert (reason(error)[0], events) == ("NOT_STARTED", [])


async def test_an_engine_error_is_internal_and_says_nothing():
    for script in ([LOST, *ids("a")], [*ids("a"), FinishReason.ERROR]):
        async with client(FakeHost(says=script)) as replica:
            error, _ = await failure(replica.call(text("the")))
            assert reason(error)[0] in ("STREAM_LOST", "INTERNAL")
            assert "scripted" not in str(error.details())


async def test_full_engine_queue_sheds():
    host = FakeHost()
    async with client(host) as replica:
        host.error = "queue_full"
        error, _ = await failure(replica.call(text("the")))
    assert reason(error)[0] == "SHED"


async def test_I5_canaries_stay_in_their_own_streams():
    async with client(FakeHost()) as replica:
        answers = await asyncio.gather(*(replica.generate(text(f"canary{number:03d}")) for number in range(20)))
    assert [said(events) for events in answers] == [f"canary{number:03d}" for number in range(20)]
