"""The real vLLM behind `ProcessHost`, on the weights that everybody gets, beside our own engine on the same weights.

ARGOSY_VLLM_PYTHON names an interpreter with vLLM in it; `make test` makes one. What its engine cannot do is held in test_vllm.py.
"""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import psutil
import pytest
import pytest_asyncio

from services.inference.engine.calls import Asked, Done, Ended, FinishReason, FromEngine, Generate, Limits, Sampling, Score, Scored, Token
from services.inference.engine.host import ProcessHost, Restarts
from services.inference.engine.settings import EngineSettings

PYTHON = os.environ.get("ARGOSY_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON, reason="ARGOSY_VLLM_PYTHON is not set: `make test` sets it"),
]
PROMPT = (2, 9259, 1902, 563, 496, 1535, 529, 506, 1902, 236764, 532)
GREEDY = Sampling(seed=0, temperature=0.0)
SHARED: dict[str, Any] = {"deadline_s": 300.0, "tenant": "t", "cache_salt": b"salt"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vllm() -> AsyncIterator[ProcessHost]:
    """One engine for the whole module: its start takes longer than all that is asked of it."""
    given = ("enforce_eager=true", "gpu_memory_utilization=0.1")
    settings = EngineSettings(kind="vllm", python=PYTHON, engine_args=given, kv_tokens=2048, max_sequences=8, dtype="bfloat16", threads=1)
    host = ProcessHost(settings, restarts=Restarts(first_s=0.1, limit=1))
    await host.start()
    yield host
    assert host.pid is not None
    family = psutil.Process(host.pid).children(recursive=True)
    await host.drain(30.0)
    assert not host.ready
    assert not psutil.wait_procs(family, timeout=60)[1]


async def answer(host: ProcessHost, call: Asked) -> list[FromEngine]:
    return [message async for message in host.submit(call)]


def generate(id: str, count: int, **changes: Any) -> Generate:
    return Generate(id, PROMPT, GREEDY, Limits(count, (), ignore_end_token=True), **(SHARED | changes))


def said(messages: list[FromEngine]) -> list[int]:
    return [message.token_id for message in messages if isinstance(message, Token)]


async def test_it_says_who_it_is(vllm: ProcessHost):
    hello = vllm.hello
    assert (hello.backend, hello.embeds, hello.adapter_slots, hello.context) == ("vllm", False, 0, 2048)
    assert hello.vocabulary == 262_144 and hello.blocks > 0 and hello.end_token_ids


async def test_both_engines_say_the_same_of_one_model(vllm: ProcessHost):
    own = ProcessHost(EngineSettings(kv_tokens=2048, threads=1))
    await own.start()
    try:
        assert own.hello.digest == vllm.hello.digest
        score = Score("s", PROMPT, ((506, 1902), (496,)), probes=(108,), first_probes=(506, 496), **SHARED)
        answers = [(await answer(host, generate("g", 8)), await answer(host, score)) for host in (own, vllm)]
    finally:
        await own.close()
    assert said(answers[0][0]) == said(answers[1][0])
    scores = [messages[0] for _, messages in answers]
    assert all(isinstance(each, Scored) for each in scores)
    for one, other in zip(*(each.continuations for each in scores if isinstance(each, Scored)), strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=0.1)  # nats: both compute in bfloat16, in another order
        assert [row[0] for row in one.probes] == pytest.approx([row[0] for row in other.probes], abs=0.5)
    ended, done = answers[1][0][-2:]
    assert ended == Ended("g", 0, FinishReason.LENGTH)
    assert isinstance(done, Done) and (done.usage.input_tokens, done.usage.output_tokens, done.error) == (len(PROMPT), 8, None)


async def test_many_calls_at_once_are_not_mixed_up(vllm: ProcessHost):
    (alone,) = [said(await answer(vllm, generate("one", 12)))]
    answers = await asyncio.gather(*(answer(vllm, generate(str(n), 1 + n)) for n in range(12)))
    for n, messages in enumerate(answers):
        assert len(said(messages)) == 1 + n
    assert sum(said(messages) == alone[: 1 + n] for n, messages in enumerate(answers)) >= 9  # a batch may tip a close choice in bfloat16


async def test_A5_leaving_early_frees_what_was_held(vllm: ProcessHost):
    async with aclosing(vllm.submit(generate("left", 1900))) as stream:
        async for _ in stream:
            break
    async with asyncio.timeout(60):
        async for load in vllm.watch_load():
            if load.free_blocks == load.total_blocks and not load.running_sequences:
                break
    assert said(await answer(vllm, generate("left", 3)))


async def test_a_deadline_ends_it(vllm: ProcessHost):
    messages = await answer(vllm, generate("late", 1900, deadline_s=0.5))
    assert messages[-2] == Ended("late", 0, FinishReason.DEADLINE)
    assert isinstance(messages[-1], Done) and messages[-1].usage.output_tokens == len(said(messages))


async def test_a_killed_engine_leaves_nothing_behind_and_comes_back(vllm: ProcessHost):
    assert vllm.pid is not None
    family = psutil.Process(vllm.pid).children(recursive=True)
    assert family  # vLLM's core and its workers
    os.kill(vllm.pid, signal.SIGKILL)
    lost = False
    async with asyncio.timeout(600):
        async for ready in vllm.watch_ready():
            lost = lost or not ready
            if lost and ready:
                break
    gone, alive = psutil.wait_procs(family, timeout=60)
    assert len(gone) == len(family) and not alive
    assert said(await answer(vllm, generate("again", 3)))
