import asyncio

import grpc
import pytest

from tests.fakes.host import FakeHost
from tests.inference.replicas import Reason, client, finished, ids, kinds, said, stopping, text


async def test_event_order_and_usage():
    host = FakeHost(says=ids("hello", " world"))
    async with client(host) as replica:
        events = await replica.generate(text("the tech"))
    assert kinds(events)[0] == "started"
    assert kinds(events)[-2:] == ["output_finished", "completed"]
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert said(events) == "hello world"
    assert finished(events)[0].reason == Reason.FINISH_REASON_STOP
    (call,) = [call for call in host.calls if not call.id.startswith("argosy-canary")]
    usage = events[-1].completed.usage
    assert (usage.input_tokens, usage.output_tokens) == (len(call.prompt), len(ids("hello", " world")) + 1)  # the end token counts
    assert events[0].started.prompt_tokens == len(call.prompt)
    assert events[0].started.model.base_digest == host.hello.digest
