"""A user chats: the answer streams, adds up to what the unary method says, and costs what the books say."""

import argosy
from argosy.v1 import stream_pb2
from tests.fleet.running import SETTLED, Tenant

GREEDY = argosy.config(temperature=0, max_output_tokens=24, min_output_tokens=24)


async def test_a_chat_streams_and_is_billed(tenant: Tenant) -> None:
    async with tenant.client() as client, client.stream_chat("Where do ships sleep?", config=GREEDY) as stream:
        events = [event async for event in stream.events()]
        result = stream.result
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started" and kinds[-2:] == ["output_finished", "completed"] and "text" in kinds
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert result.outputs[0].finished.reason == stream_pb2.FINISH_REASON_LENGTH
    used = result.completed.usage
    assert used.output_tokens == 24 and used.input_tokens == events[0].started.prompt_tokens
    (row,) = await tenant.records(1)
    assert row.outcome == SETTLED.USAGE_OUTCOME_COMPLETED
    assert row.generation_id == events[0].started.generation_id
    assert (row.usage.input_tokens, row.usage.output_tokens) == (used.input_tokens, 24)
    assert await tenant.fleet.truth([row.generation_id]) == {row.generation_id: (used.input_tokens, 24)}


async def test_the_stream_adds_up_to_the_unary_answer(tenant: Tenant) -> None:
    async with tenant.client() as client:
        async with client.stream_chat("Where do ships sleep?", config=GREEDY) as stream:
            pieces = [piece async for piece in stream]
            streamed = stream.result
        whole = await client.chat("Where do ships sleep?", config=GREEDY)
    assert "".join(pieces) == streamed.outputs[0].text == whole.outputs[0].text
    assert streamed.outputs[0].finished == whole.outputs[0].finished
    assert streamed.completed.usage.output_tokens == whole.completed.usage.output_tokens


async def test_a_dialogue_goes_on(tenant: Tenant) -> None:
    async with tenant.client() as client:
        first = await client.chat("Hello", config=GREEDY)
        turns = [("user", "Hello"), ("assistant", first.outputs[0].text or "…"), ("user", "And then?")]
        second = await client.chat(turns, config=GREEDY)
    assert second.started.prompt_tokens > first.started.prompt_tokens
