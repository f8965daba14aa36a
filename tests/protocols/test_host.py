"""One suite for every `Host`: real ones over the fake runner, and the fake that the wire's tests use, scripted to say the same."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from services.inference.engine.calls import (
    AdapterReady,
    Asked,
    Done,
    Embed,
    Embedded,
    Ended,
    Evict,
    FinishReason,
    FromEngine,
    Generate,
    Label,
    Labelled,
    Limits,
    Prefetch,
    Sampling,
    Score,
    Scored,
    Token,
    Usage,
)
from services.inference.engine.host import EngineLost, EngineNotReady, Host, InlineHost, ProcessHost
from services.inference.engine.settings import EngineSettings
from tests.fakes import runner
from tests.fakes.host import FakeHost
from tests.fakes.host import hello as scripted_hello
from tests.fakes.runner import alone

PROMPT = tuple(range(2, 42))
SAMPLING = Sampling(seed=3)
LONG = 900  # tokens: a call that does not end by itself while a test looks at it


def made(kind: str, settings: EngineSettings) -> Host:
    if kind == "process":
        return ProcessHost(settings, "tests.fakes.runner:build")
    if kind == "inline":
        return InlineHost(settings, runner.build)
    hello = scripted_hello(model="fake", blocks=256, context=4096)
    return FakeHost(lambda call, index: alone(call.prompt, call.sampling, index, call.limits.max_output_tokens, 1000), hello=hello)


async def opened(kind: str) -> AsyncIterator[Host]:
    host = made(kind, EngineSettings(kv_tokens=4096))
    await host.start()
    yield host
    await host.close()


@pytest.fixture(params=["process", "inline", "fake"])
async def host(request: pytest.FixtureRequest) -> AsyncIterator[Host]:
    """Every host."""
    async for host in opened(request.param):
        yield host


@pytest.fixture(params=["process", "inline"])
async def real(request: pytest.FixtureRequest) -> AsyncIterator[Host]:
    """Those with an engine, for what the fake leaves to scripts."""
    async for host in opened(request.param):
        yield host


def generate(id: str = "a", count: int = 5, **changes: Any) -> Generate:
    fields: dict[str, Any] = {"deadline_s": 60.0, "tenant": "t", "cache_salt": b"salt"}
    return Generate(id, PROMPT, SAMPLING, Limits(count, (0,), ignore_end_token=True), **(fields | changes))


async def answer(host: Host, call: Asked) -> list[FromEngine]:
    return [message async for message in host.submit(call)]


async def settled(host: Host) -> None:
    """Until the engine reports that nothing runs and no block is held."""
    async with asyncio.timeout(10):
        async for load in host.watch_load():
            if load.total_blocks and load.free_blocks == load.total_blocks and not load.running_sequences:
                return


def said(messages: list[FromEngine], index: int = 0) -> list[int]:
    return [m.token_id for m in messages if isinstance(m, Token) and m.index == index]


async def test_it_says_who_it_is(host: Host):
    assert host.ready
    assert (host.hello.model, host.hello.blocks, host.hello.context) == ("fake", 256, 4096)


async def test_an_output_streams_to_its_end(host: Host):
    messages = await answer(host, generate())
    assert said(messages) == alone(PROMPT, SAMPLING, 0, 5, 1000)
    ended, done = messages[-2:]
    assert ended == Ended("a", 0, FinishReason.LENGTH)
    assert isinstance(done, Done) and done.usage == Usage(40, 0, 5) and done.error is None


async def test_many_calls_at_once_are_not_mixed_up(host: Host):
    answers = await asyncio.gather(*(answer(host, generate(str(n), 1 + n, outputs=2)) for n in range(20)))
    for n, messages in enumerate(answers):
        for index in range(2):
            assert said(messages, index) == alone(PROMPT, SAMPLING, index, 1 + n, 1000)


async def test_a_score_and_an_embedding_are_answered_in_the_order_asked(host: Host):
    shared: dict[str, Any] = {"deadline_s": 60.0, "tenant": "t", "cache_salt": b"salt"}
    scored, done = await answer(host, Score("s", PROMPT, ((5, 6), (7,)), first_probes=(8,), **shared))
    assert isinstance(scored, Scored) and [len(c.logprobs) for c in scored.continuations] == [2, 1] and len(scored.first_probes) == 1
    assert isinstance(done, Done) and done.usage == Usage(43, 0, 0)
    embedded, done = await answer(host, Embed("e", (PROMPT, (5,)), **shared))
    assert isinstance(embedded, Embedded) and [len(vector) for vector in embedded.vectors] == [4 * host.hello.width] * 2
    assert isinstance(done, Done) and done.usage == Usage(41, 0, 0)


async def test_an_adapter_is_fetched_by_its_owner_used_and_forgotten(host: Host):
    if isinstance(host, FakeHost):
        host.tuned("owner", "tuned", labels=("x",), max_tokens=9)
    ready, done = await answer(host, Prefetch("p", "tuned", "owner", 30.0))
    assert isinstance(ready, AdapterReady) and (ready.labels, ready.max_tokens, ready.error) == (("x",), 9, None)
    assert isinstance(done, Done) and done.error is None
    tuned = {"adapter": "tuned", "owner": "owner", "deadline_s": 60.0, "tenant": "t", "cache_salt": b"salt"}
    labelled, done = await answer(host, Label("l", (PROMPT, (5,)), **tuned))
    assert isinstance(labelled, Labelled) and list(map(len, labelled.logits)) == [4, 4]
    assert isinstance(done, Done) and done.usage == Usage(41, 0, 0)
    done = (await answer(host, generate("g", adapter="tuned", owner="owner")))[-1]
    assert isinstance(done, Done) and done.error is None and done.usage.output_tokens == 5
    for call in (
        generate("f", adapter="tuned", owner="other"),
        generate("u", adapter="none", owner="owner"),
        Prefetch("q", "none", "owner", 9.0),
    ):
        done = (await answer(host, call))[-1]
        assert isinstance(done, Done) and done.error == "adapter_unknown"
    (done,) = await answer(host, Evict("e", "tuned", "owner"))
    assert isinstance(done, Done) and done.error is None


async def test_what_cannot_run_is_refused(real: Host):
    messages = await answer(real, generate(count=5000))
    assert [type(m) for m in messages] == [Ended, Done]
    assert isinstance(messages[-1], Done) and messages[-1].error == "over_context"


async def test_a_stop_ends_an_output(host: Host):
    messages: list[FromEngine] = []
    async with aclosing(host.submit(generate(count=LONG))) as stream:
        async for message in stream:
            messages.append(message)
            if len(messages) == 3:
                host.stop("a", 0)
    assert messages[-2] == Ended("a", 0, FinishReason.STOPPED)
    assert isinstance(messages[-1], Done) and messages[-1].usage.output_tokens == len(said(messages))


async def test_A5_an_abort_says_what_it_cost(host: Host):
    messages: list[FromEngine] = []
    async with aclosing(host.submit(generate(count=LONG))) as stream:
        async for message in stream:
            messages.append(message)
            if len(messages) == 3:
                host.abort("a", "unknown")
    assert messages[-2] == Ended("a", 0, FinishReason.CANCELLED)
    assert isinstance(messages[-1], Done) and messages[-1].usage.output_tokens == len(said(messages))
    await settled(host)


async def test_A5_leaving_early_aborts_and_the_id_can_be_used_again(host: Host):
    for _ in range(20):
        async with aclosing(host.submit(generate(count=LONG))) as stream:
            async for _message in stream:
                break
    assert said(await answer(host, generate())) == alone(PROMPT, SAMPLING, 0, 5, 1000)
    await settled(host)


async def test_a_live_id_cannot_be_used_twice(real: Host):
    async with aclosing(real.submit(generate(count=LONG))) as stream:
        await anext(stream)
        with pytest.raises(ValueError, match="running"):
            await answer(real, generate())


async def test_a_deadline_ends_it(real: Host):
    messages = await answer(real, generate(count=LONG, deadline_s=0.0))
    assert messages[-2] == Ended("a", 0, FinishReason.DEADLINE)
    assert said(messages) == []


async def test_load_is_reported(real: Host):
    await answer(real, generate())
    await settled(real)
    assert real.load.steps == 5
    assert real.load.total_blocks == 256


async def test_readiness_can_be_watched(host: Host):
    seen: list[bool] = []

    async def watch() -> None:
        async for ready in host.watch_ready():
            seen.append(ready)
            if not ready:
                return

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    await host.close()
    await asyncio.wait_for(watching, 10)
    assert seen == [True, False]


async def test_a_drain_finishes_what_runs_and_refuses_the_rest(real: Host):
    running = real.submit(generate(count=50))
    first = await anext(running)
    draining = asyncio.create_task(real.drain(30.0))
    messages = [first, *[m async for m in running]]
    assert messages[-2] == Ended("a", 0, FinishReason.LENGTH)
    await asyncio.wait_for(draining, 30)
    assert not real.ready
    with pytest.raises(EngineNotReady):
        await answer(real, generate("b"))


async def test_a_drain_aborts_what_outlasts_the_grace(real: Host):
    stream = real.submit(generate(count=LONG * 4))
    first = await anext(stream)
    real.stop("unknown", 0)
    draining = asyncio.create_task(real.drain(0.0))
    messages = [first, *[m async for m in stream]]
    assert messages[-2] == Ended("a", 0, FinishReason.CANCELLED)
    await draining


async def test_closing_loses_what_runs_and_is_safe_to_repeat(real: Host):
    stream = real.submit(generate(count=LONG))
    await anext(stream)
    await real.close()
    with pytest.raises(EngineLost):
        async for _ in stream:
            pass
    await real.close()


@pytest.mark.parametrize("kind", ["process", "inline"])
async def test_a_model_that_cannot_be_loaded_is_told_at_the_start(kind: str):
    settings = EngineSettings()
    host = ProcessHost(settings, "tests.fakes.runner:build_nothing") if kind == "process" else InlineHost(settings, runner.build_nothing)
    with pytest.raises(EngineLost):
        await asyncio.wait_for(host.start(), 30)
    assert not host.ready
    with pytest.raises(EngineNotReady):
        _ = host.hello
    await host.close()
