"""Events on their way to a reader, without a server: what waits, what is sent together, and who is given up on."""

import asyncio

import pytest

from argosy.v1.stream_pb2 import GenerationEvent, OutputFinished, Started
from services.chassis.errors import SlowConsumer
from services.inference.servicers.outbox import FLUSH_TOKENS, WAITING_EVENTS, Outbox

STARTED = GenerationEvent(started=Started())
FINISHED = GenerationEvent(output_finished=OutputFinished())


async def drained(outbox):
    return [event async for event in outbox.events()]


def texts(events):
    return [event.text.text for event in events if event.WhichOneof("event") == "text"]


async def test_first_text_goes_at_once_and_later_text_together():
    outbox = Outbox(flush_s=None)
    outbox.put(STARTED)
    for _ in range(1 + 2 * FLUSH_TOKENS + 3):
        outbox.text(0, "a")
    outbox.put(FINISHED, after=0)
    outbox.close()
    assert texts(await drained(outbox)) == ["a", "a" * FLUSH_TOKENS, "a" * FLUSH_TOKENS, "aaa"]


async def test_text_waits_no_longer_than_the_interval():
    outbox = Outbox(flush_s=0.01)
    outbox.text(0, "a")
    outbox.text(0, "b")
    events = outbox.events()
    assert [(await anext(events)).text.text, (await anext(events)).text.text] == ["a", "b"]


async def test_interval_zero_sends_each_token():
    outbox = Outbox(flush_s=0)
    for letter in "abc":
        outbox.text(0, letter)
    outbox.close()
    assert texts(await drained(outbox)) == ["a", "b", "c"]


async def test_outputs_do_not_wait_for_each_other():
    outbox = Outbox(flush_s=1)
    for index in range(3):
        outbox.text(index, "a")
        outbox.text(index, "b")
    outbox.put(FINISHED, after=1)
    outbox.close()
    events = await drained(outbox)
    assert [(event.text.index, event.text.text) for event in events[:5] if event.text.text] == [(0, "a"), (1, "a"), (2, "a"), (1, "b")]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))


async def test_A4_what_waits_is_bounded_and_nothing_is_lost_to_a_late_reader():
    outbox = Outbox(flush_s=0, stall_s=100)
    for number in range(1_000):
        outbox.text(0, chr(ord("a") + number % 26))
    outbox.close()
    events = await drained(outbox)
    assert len(events) == WAITING_EVENTS + 1  # the rest in one piece
    assert "".join(texts(events)) == "".join(chr(ord("a") + number % 26) for number in range(1_000))


async def test_A4_a_reader_that_stops_is_noticed_and_one_that_reads_is_not():
    outbox = Outbox(flush_s=0, stall_s=0.05)
    noticed = asyncio.Event()
    outbox.stalled = noticed.set
    for _ in range(WAITING_EVENTS + 1):
        outbox.text(0, "a")
    await asyncio.wait_for(noticed.wait(), 10)
    outbox.close(SlowConsumer(), drop=True)
    with pytest.raises(SlowConsumer):
        await drained(outbox)
    outbox = Outbox(flush_s=0, stall_s=0.05)
    outbox.stalled = lambda: pytest.fail("the reader reads")
    for _ in range(WAITING_EVENTS + 1):
        outbox.text(0, "a")
    events = outbox.events()
    for _ in range(WAITING_EVENTS + 1):
        await anext(events)


async def test_an_error_comes_after_what_was_said():
    outbox = Outbox()
    outbox.put(STARTED)
    outbox.close(SlowConsumer())
    events = outbox.events()
    assert (await anext(events)).WhichOneof("event") == "started"
    with pytest.raises(SlowConsumer):
        await anext(events)


async def test_heartbeats_never_come_before_started():
    outbox = Outbox(heartbeat_s=0.01)
    events = outbox.events()
    first = asyncio.ensure_future(anext(events))
    done, _ = await asyncio.wait({first}, timeout=0.1)
    assert not done
    outbox.put(STARTED)
    assert (await first).WhichOneof("event") == "started"
    assert (await anext(events)).WhichOneof("event") == "heartbeat"
