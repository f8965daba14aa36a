"""GenerationService through a real gateway server to fake engines."""

import asyncio
import contextlib
import random
import uuid
from collections.abc import Callable, Iterator

import grpc
import pytest

from argosy.v1 import config_pb2, generation_pb2, language_pb2, stream_pb2
from services.chassis.errors import NotStarted, StoreUnavailable
from services.chassis.status import error_info
from services.chassis.telemetry import Telemetry
from services.gateway.ledger import Outcome, Settlement
from services.gateway.servicers.relay import peek
from tests.fakes.edge import VERIFIER, Edge, caller, chat, edge, events_of, metadata, text_of
from tests.fakes.engine import FakeEngine, fake_engine
from tests.fakes.ledger import Limits, MemoryLedger

INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT
UNAUTHENTICATED = grpc.StatusCode.UNAUTHENTICATED
PERMISSION_DENIED = grpc.StatusCode.PERMISSION_DENIED
NOT_FOUND = grpc.StatusCode.NOT_FOUND
ALREADY_EXISTS = grpc.StatusCode.ALREADY_EXISTS
FAILED_PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION
RESOURCE_EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED
UNAVAILABLE = grpc.StatusCode.UNAVAILABLE


class Revoker:
    """Revocations that a test decides."""

    def __init__(self) -> None:
        self.watching: dict[str, Callable[[], None]] = {}

    @contextlib.contextmanager
    def watch(self, key_id: str, cut: Callable[[], None]) -> Iterator[None]:
        self.watching[key_id] = cut
        try:
            yield
        finally:
            del self.watching[key_id]


def classify() -> language_pb2.ClassifyTextRequest:
    return language_pb2.ClassifyTextRequest(model="models/fake", texts=["x"], preset=language_pb2.LABEL_PRESET_SENTIMENT)


async def replica_reports(at: Edge, engine: FakeEngine) -> None:
    """Wait until the gateway has seen the load the fake now reports."""
    link = next(link for link in at.replicas.links if link.address == engine.address)
    async with asyncio.timeout(10):
        while link.replica.load.queued_tokens != engine.load.queued_tokens:
            await at.replicas.judged()


async def one_settled(at: Edge) -> list[Settlement]:
    """The settlements, once there is one, whatever else is open."""
    async with asyncio.timeout(10):
        while not at.ledger.settled:
            at.ledger.changed.clear()
            await at.ledger.changed.wait()
    return [settlement for _, settlement in at.ledger.settled.values()]


async def refused(call: object) -> tuple[grpc.StatusCode, str]:
    """Code and reason of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call  # type: ignore[misc]
    info = error_info(error.value)
    return error.value.code(), info.reason if info else ""


async def settled(at: Edge, count: int = 1) -> list[Settlement]:
    """The ledger's settlements, once there are `count` and nothing is open."""
    async with asyncio.timeout(10):
        while len(at.ledger.settled) < count or at.ledger.open:
            at.ledger.changed.clear()
            await at.ledger.changed.wait()
    return [settlement for _, settlement in at.ledger.settled.values()]


async def test_stream_chat_says_what_the_engine_says_and_settles() -> None:
    async with fake_engine(["to", "day"]) as engine, edge(engine) as at:
        call = at.generation.StreamChat(chat("one two three"), metadata=metadata(), timeout=10)
        events = await events_of(call)
        assert text_of(events) == "today"
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert events[0].WhichOneof("event") == "started" and events[-1].WhichOneof("event") == "completed"
        (done,) = await settled(at)
        assert (done.outcome, done.input_tokens, done.output_tokens) == (Outcome.DONE, 3, 2)
        trailers = dict(await call.trailing_metadata())
        assert trailers["served_by"] == done.served_by and uuid.UUID(trailers["request_id"])


async def test_fold_equals_unary() -> None:
    async with fake_engine(["a", "b", "c"], coalesce=2) as engine, edge(engine) as at:
        config = config_pb2.GenerationConfig(sampling=config_pb2.Sampling(n=2))
        result = await at.generation.Chat(chat(config=config), metadata=metadata(), timeout=10)
        assert [output.text for output in result.outputs] == ["abc", "abc"]
        assert result.completed.usage.output_tokens == 6 == engine.output_tokens
        assert (await settled(at))[0].output_tokens == 6


async def test_generate_text_both_ways() -> None:
    async with fake_engine() as engine, edge(engine) as at:
        request = generation_pb2.GenerateTextRequest(model="models/fake", prompt="once upon a time")
        events = await events_of(at.generation.StreamGenerateText(request, metadata=metadata(), timeout=10))
        result = await at.generation.GenerateText(request, metadata=metadata(), timeout=10)
        assert text_of(events) == result.outputs[0].text == "once upon a time"
        assert len(await settled(at, 2)) == 2


async def test_the_pod_sees_deadline_caller_and_ceiling() -> None:
    async with fake_engine(verifier=VERIFIER) as engine:
        who = caller(output_token_ceiling=7, kv_scope="ab" * 32)
        async with edge(engine, callers={"acme": who}) as at:
            await events_of(at.generation.StreamChat(chat(), metadata=metadata(), timeout=9))
            (record,) = engine.calls
            assert record.time_left_s is not None and 7 < record.time_left_s < 8.9  # of 9, less what the gateway keeps to answer in
            assert record.caller is not None and record.caller.kv_scope == "ab" * 32 and record.caller.project_uid == "uid-acme"
            assert record.request.output_token_ceiling == 7
            assert at.ledger.reserved[0].output_tokens == 7
            assert record.request.model.base_digest == engine.digest


async def test_R4_a_call_without_a_deadline_gets_the_cap() -> None:
    async with fake_engine() as engine, edge(engine) as at:
        await events_of(at.generation.StreamChat(chat(), metadata=metadata()))
        left = engine.calls[0].time_left_s
        assert left is not None and 290 < left <= 300


async def test_a_ceiling_is_a_bound_not_a_wish() -> None:
    async with fake_engine() as engine, edge(engine, callers={"acme": caller(output_token_ceiling=7)}) as at:
        config = config_pb2.GenerationConfig(stopping=config_pb2.Stopping(max_output_tokens=8))
        assert await refused(at.generation.Chat(chat(config=config), metadata=metadata())) == (INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE")
        assert not engine.calls and not at.ledger.reserved


async def test_order_of_refusals_key_then_bounds_then_lookup() -> None:
    async with fake_engine() as engine, edge(engine) as at:
        bad = chat(model="models/none", config=config_pb2.GenerationConfig(sampling=config_pb2.Sampling(n=9)))
        assert await refused(at.generation.Chat(bad, metadata=metadata("nobody"))) == (UNAUTHENTICATED, "API_KEY_INVALID")
        assert await refused(at.generation.Chat(bad, metadata=metadata())) == (INVALID_ARGUMENT, "FIELD_OUT_OF_RANGE")
        assert await refused(at.generation.Chat(chat(model="models/none"), metadata=metadata())) == (NOT_FOUND, "RESOURCE_NOT_FOUND")
        assert not engine.calls and not at.ledger.reserved


async def test_A10_an_unknown_model_and_a_hidden_one_are_the_same_bytes() -> None:
    async with fake_engine() as engine, edge(engine, callers={"acme": caller(models=("models/other",))}) as at:
        answers = []
        for name in ("models/fake", "models/none"):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await at.generation.Chat(chat(model=name), metadata=metadata())
            trailers = {key: value for key, value in error.value.trailing_metadata() or () if key != "request_id"}
            answers.append((error.value.code(), error.value.details(), trailers))
        assert answers[0] == answers[1]


async def test_a_key_without_the_scope_is_told_which() -> None:
    async with fake_engine() as engine, edge(engine, callers={"acme": caller(scopes=frozenset({"models.read"}))}) as at:
        assert await refused(at.generation.Chat(chat(), metadata=metadata())) == (PERMISSION_DENIED, "SCOPE_MISSING")


async def test_A23_a_request_id_completes_once() -> None:
    async with fake_engine() as engine, edge(engine) as at:
        request = chat(request_id=str(uuid.uuid4()))
        call = at.generation.Chat(request, metadata=metadata())
        await call
        assert dict(await call.trailing_metadata())["request_id"] == request.request_id
        assert await refused(at.generation.Chat(request, metadata=metadata())) == (ALREADY_EXISTS, "REQUEST_ALREADY_SETTLED")
        other = chat("another body", request_id=request.request_id)
        assert await refused(at.generation.Chat(other, metadata=metadata())) == (FAILED_PRECONDITION, "IDEMPOTENCY_KEY_REUSED")
        assert len(engine.calls) == 1


async def test_a_used_up_quota_refuses_before_the_fleet_hears_of_it() -> None:
    async with fake_engine() as engine, edge(engine, ledger=MemoryLedger(limits=Limits(requests_per_minute=1))) as at:
        await at.generation.Chat(chat(), metadata=metadata())
        assert await refused(at.generation.Chat(chat(), metadata=metadata())) == (RESOURCE_EXHAUSTED, "RATE_LIMITED")
        assert len(engine.calls) == 1 and len(at.ledger.settled) == 1


async def test_F15_without_books_nothing_starts() -> None:
    async with fake_engine() as engine, edge(engine, ledger=MemoryLedger(failing=StoreUnavailable())) as at:
        assert await refused(at.generation.Chat(chat(), metadata=metadata())) == (UNAVAILABLE, "STORE_UNAVAILABLE")
        assert not engine.calls


async def test_metadata_at_admission() -> None:
    """Initial metadata goes out when the replica has accepted, before it has said anything."""
    gate = asyncio.Semaphore(0)
    async with fake_engine(["x"], gate=gate) as engine, edge(engine, attempt_seconds=30.0) as at:
        engine.faults.hang_before = True
        call = at.generation.StreamChat(chat(), metadata=metadata(), timeout=20)
        await engine.until(lambda e: e.totals["hung"] == 1)
        waiting = asyncio.ensure_future(call.initial_metadata())
        assert at.ledger.reserved and not waiting.done()
        call.cancel()
        engine.faults.hang_before = False
        call = at.generation.StreamChat(chat(), metadata=metadata(), timeout=20)
        await call.initial_metadata()
        assert engine.output_tokens == 0
        call.cancel()
        outcomes = [settlement.outcome for settlement in await settled(at, 2)]
        assert outcomes == [Outcome.CANCELLED] * 2


async def test_R8_a_refusal_before_admission_is_retried_elsewhere_once() -> None:
    async with fake_engine(["one"]) as bad, fake_engine(["two"]) as good, edge(bad, good) as at:
        bad.faults.refuse = NotStarted()
        good.load.queued_tokens = 1_000  # the other looks better
        good.changed()
        await replica_reports(at, good)
        events = await events_of(at.generation.StreamChat(chat(), metadata=metadata(), timeout=10))
        assert text_of(events) == "two"
        assert bad.totals["refused"] == 1 and len(await settled(at)) == 1


async def test_no_retry_after_admission() -> None:
    async with fake_engine(["one", "two"]) as bad, fake_engine(["three"]) as good, edge(bad, good) as at:
        bad.faults.crash_after = 1
        good.load.queued_tokens = 1_000
        good.changed()
        await replica_reports(at, good)
        call = at.generation.StreamChat(chat(), metadata=metadata(), timeout=10)
        assert await refused(events_of(call)) == (UNAVAILABLE, "STREAM_LOST")
        assert not good.calls


async def test_no_replica_fails_fast_and_opens_no_books() -> None:
    async with fake_engine() as engine, edge(engine) as at:
        await engine.kill()
        await at.replicas.until(0)
        assert await refused(at.generation.Chat(chat(), metadata=metadata())) == (UNAVAILABLE, "NOT_STARTED")
        assert not at.ledger.reserved


async def test_R7_a_busy_fleet_sheds_what_it_could_not_start_in_time() -> None:
    gate = asyncio.Semaphore(0)
    async with fake_engine(["x"], gate=gate) as engine, edge(engine, streams_per_replica=1) as at:
        engine.load.queued_tokens = 50_000  # five seconds of prefill
        engine.changed()
        await replica_reports(at, engine)
        first = at.generation.StreamChat(chat(), metadata=metadata(), timeout=30)
        await first.initial_metadata()
        call = at.generation.StreamChat(chat(), metadata=metadata(), timeout=2)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await events_of(call)
        info = error_info(error.value)
        assert info is not None and info.reason == "SHED"
        assert int(dict(error.value.trailing_metadata() or ())["grpc-retry-pushback-ms"]) > 0
        gate.release()
        assert text_of(await events_of(first)) == "x"
        assert [settlement.outcome for settlement in await settled(at)] == [Outcome.DONE]
        assert len(at.ledger.reserved) == 1, "a call without a chance costs no entry in the books"


async def test_a_queued_call_starts_when_its_turn_comes() -> None:
    gate = asyncio.Semaphore(0)
    async with fake_engine(["x"], gate=gate) as engine, edge(engine, streams_per_replica=1) as at:
        calls = [asyncio.ensure_future(events_of(at.generation.StreamChat(chat(), metadata=metadata(), timeout=20))) for _ in range(5)]
        await engine.until(lambda e: len(e.running) == 1)
        for _ in calls:
            gate.release()
        assert [text_of(events) for events in await asyncio.gather(*calls)] == ["x"] * 5
        assert len(await settled(at, 5)) == 5


async def test_a_queued_call_that_is_cancelled_is_settled_and_forgotten() -> None:
    gate = asyncio.Semaphore(0)
    async with fake_engine(["x"], gate=gate) as engine, edge(engine, streams_per_replica=1) as at:
        first = asyncio.ensure_future(events_of(at.generation.StreamChat(chat(), metadata=metadata(), timeout=20)))
        await engine.until(lambda e: len(e.running) == 1)
        second = at.generation.StreamChat(chat(), metadata=metadata(), timeout=20)
        while not at.replicas.pool(engine.digest).admission(True).queued:  # the queue has no event
            await asyncio.sleep(0)
        second.cancel()
        (cancelled,) = await one_settled(at)
        assert cancelled.outcome is Outcome.CANCELLED and cancelled.output_tokens == 0
        gate.release()
        await first
        assert len(engine.calls) == 1


async def test_no_completed_is_failure() -> None:
    async with fake_engine(["a", "b", "c"]) as engine, edge(engine) as at:
        engine.faults.short_after = 2
        call = at.generation.StreamChat(chat("one two"), metadata=metadata(), timeout=10)
        assert await refused(events_of(call)) == (UNAVAILABLE, "STREAM_LOST")
        (lost,) = await settled(at)
        assert lost.outcome is Outcome.LOST and lost.input_tokens == 2


async def test_I6_a_gap_in_the_sequence_is_a_lost_stream() -> None:
    async with fake_engine(["a", "b"]) as engine, edge(engine) as at:
        engine.faults.skip_sequence = True
        call = at.generation.StreamChat(chat(), metadata=metadata(), timeout=10)
        assert await refused(events_of(call)) == (UNAVAILABLE, "STREAM_LOST")


async def test_a_pods_own_refusal_passes_unchanged() -> None:
    async with fake_engine(context_tokens=64) as engine, edge(engine) as at:
        config = config_pb2.GenerationConfig(stopping=config_pb2.Stopping(max_output_tokens=63))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await at.generation.Chat(chat("one two three", config=config), metadata=metadata())
        info = error_info(error.value)
        assert info is not None and dict(info.metadata)["limit"] == "61"
        assert (await settled(at))[0].outcome is Outcome.SHED


async def test_metadata_at_admission_a_refusal_is_never_taken_for_an_acceptance() -> None:
    """gRPC shows a refusal's empty initial metadata before its status; in one of six such calls the status came late."""
    async with fake_engine(context_tokens=64) as engine, edge(engine) as at:
        config = config_pb2.GenerationConfig(stopping=config_pb2.Stopping(max_output_tokens=63))
        for _ in range(60):
            await refused(at.generation.Chat(chat("one two three", config=config), metadata=metadata()))
        assert {settlement.outcome for settlement in await settled(at, 60)} == {Outcome.SHED}


async def test_A5_hang_up_stops_the_engine_and_bills_what_it_did() -> None:
    gate = asyncio.Semaphore(3)
    async with fake_engine(["a"] * 100, gate=gate) as engine, edge(engine) as at:
        call = at.generation.StreamChat(chat("one two"), metadata=metadata(), timeout=30)
        async for event in call:
            if event.sequence == 3:
                break
        call.cancel()
        (cut,) = await settled(at)
        (record,) = engine.calls
        assert record.ended == "ABORTED"
        assert (cut.outcome, cut.input_tokens, cut.output_tokens) == (Outcome.CANCELLED, 2, record.output_tokens)


async def test_A5_a_pod_that_ignores_the_abort_is_cut_and_billed_by_what_was_seen() -> None:
    gate = asyncio.Semaphore(3)
    async with fake_engine(["a"] * 100, gate=gate) as engine, edge(engine, abort_seconds=0.3) as at:
        engine.faults.ignore_abort = True
        call = at.generation.StreamChat(chat("one two"), metadata=metadata(), timeout=30)
        async for event in call:
            if event.sequence == 4:
                break
        call.cancel()
        (cut,) = await settled(at)
        assert (cut.input_tokens, cut.output_tokens) == (2, 3)
        await engine.until(lambda e: not e.running)


async def test_A5_a_unary_call_that_is_cancelled_stops_the_engine_too() -> None:
    gate = asyncio.Semaphore(2)
    async with fake_engine(["a"] * 10, gate=gate) as engine, edge(engine) as at:
        for method, request in ((at.generation.Chat, chat()), (at.language.ClassifyText, classify())):
            call = method(request, metadata=metadata(), timeout=20)
            await engine.until(lambda e: len(e.running) == 1 and gate.locked())
            call.cancel()
            await engine.until(lambda e: not e.running)
        first, second = await settled(at, 2)
        assert first.outcome is second.outcome is Outcome.CANCELLED
        assert [record.ended for record in engine.calls] == ["ABORTED", "ABORTED"]
        assert (first.output_tokens, second.input_tokens) == (2, engine.calls[1].input_tokens)


async def test_the_deadline_ends_a_call_and_it_is_settled() -> None:
    gate = asyncio.Semaphore(1)
    async with fake_engine(["a"] * 10, gate=gate) as engine, edge(engine) as at:
        call = at.generation.StreamChat(chat(), metadata=metadata(), timeout=0.7)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await events_of(call)
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        (late,) = await settled(at)
        assert late.outcome is Outcome.DEADLINE and late.output_tokens == 1
        await engine.until(lambda e: not e.running)


async def test_A9_a_revoked_key_cuts_its_live_streams() -> None:
    gate, revocations = asyncio.Semaphore(2), Revoker()
    async with fake_engine(["a"] * 10, gate=gate) as engine, edge(engine, revocations=revocations) as at:
        call = at.generation.StreamChat(chat(), metadata=metadata(), timeout=30)
        seen = []
        with pytest.raises(grpc.aio.AioRpcError) as error:
            async for event in call:
                seen.append(event.sequence)
                if event.sequence == 3:
                    revocations.watching["key-acme"]()
        info = error_info(error.value)
        assert info is not None and (error.value.code(), info.reason) == (PERMISSION_DENIED, "KEY_REVOKED")
        assert dict(error.value.trailing_metadata() or ())["last_seq"] == str(seen[-1])
        (cut,) = await settled(at)
        assert (cut.outcome, cut.output_tokens) == (Outcome.CANCELLED, 2)


async def test_count_tokens_and_tokenize_cost_no_tokens() -> None:
    async with fake_engine() as engine, edge(engine) as at:
        asked = generation_pb2.CountTokensRequest(model="models/fake", prompt="one two three")
        counted = await at.generation.CountTokens(asked, metadata=metadata(), timeout=5)
        assert (counted.tokens, counted.room) == (3, 4_093)
        text = generation_pb2.TokenizeRequest(model="models/fake", text="a b")
        split = await at.generation.Tokenize(text, metadata=metadata(), timeout=5)
        assert [token.token for token in split.tokens] == [b"a", b" b"]
        assert {(s.input_tokens, s.output_tokens) for s in await settled(at, 2)} == {(0, 0)}


async def test_a_generation_is_measured_by_the_conventions_names() -> None:
    telemetry = Telemetry.start("test", {})
    async with fake_engine(["a", "b"]) as engine, edge(engine, telemetry=telemetry) as at:
        await events_of(at.generation.StreamChat(chat("one two three"), metadata=metadata(), timeout=5))
        await settled(at)
        seen = telemetry.exposition().decode()
    await telemetry.close()
    told = 'argosy_service="gateway",gen_ai_operation_name="chat",gen_ai_request_model="models/fake"'
    for line in (
        f'gen_ai_client_token_usage_sum{{{told},gen_ai_token_type="input"}} 3.0',
        f'gen_ai_client_token_usage_sum{{{told},gen_ai_token_type="output"}} 2.0',
        f"gen_ai_server_time_to_first_token_seconds_count{{{told}}} 1.0",
        'argosy_outcome="DONE"',
    ):
        assert line in seen, seen


async def test_I5_a_canary_reaches_its_own_caller_only() -> None:
    who = {name: caller(name) for name in ("acme", "bolt", "cone")}
    async with fake_engine() as one, fake_engine() as two, edge(one, two, callers=who) as at:
        rng = random.Random(5)

        async def ask(project: str, number: int) -> None:
            canary = f"canary-{project}-{number}"
            call = at.generation.StreamChat(chat(f"say {canary} now"), metadata=metadata(project), timeout=20)
            if rng.random() < 0.2:
                call.cancel()
                return
            assert text_of(await events_of(call)) == f"say {canary} now"

        await asyncio.gather(*(ask(project, number) for project in who for number in range(40)))


def test_peek_reads_what_protobuf_writes() -> None:
    for sequence in (1, 127, 128, 2**40):
        for name in ("started", "text", "reasoning", "tool_call", "output_finished", "heartbeat", "completed"):
            event = stream_pb2.GenerationEvent(sequence=sequence)
            getattr(event, name).SetInParent()
            assert peek(event.SerializeToString()) == (sequence, event.DESCRIPTOR.fields_by_name[name].number)
    for broken in (b"", b"\x12\x00", b"\x08", b"\x08\xff\xff"):
        with pytest.raises(ValueError, match=r"sequence|varint"):
            peek(broken)
    assert peek(b"\x08\x05") == (5, 0)
