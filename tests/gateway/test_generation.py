"""GenerationService through a real gateway server to fake engines."""

import asyncio
import uuid

import grpc
import pytest
from argosy.v1 import config_pb2, generation_pb2

from services.chassis.status import error_info
from services.gateway.ledger import Outcome
from tests.fakes.edge import Edge, chat, edge, events_of, metadata, text_of
from tests.fakes.engine import FakeEngine, fake_engine


async def refused(call: object) -> tuple[grpc.StatusCode, str]:
    """Code and reason of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await call  # type: ignore[misc]
    info = error_info(error.value)
    return error.value.code(), info.reason if info else ""


async def settled(at: Edge, count: int = 1) -> list:
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
