"""vLLM behind the border: what is asked of it, and what its answers become, over an AsyncLLM without a model."""

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from services.inference.engine.calls import (
    Abort,
    AdapterReady,
    Done,
    Drain,
    Embed,
    Ended,
    FinishReason,
    FromEngine,
    Generate,
    Limits,
    Load,
    Prefetch,
    Sampling,
    Score,
    Scored,
    Stop,
    ToEngine,
    Token,
    Usage,
    Weigh,
    Weighed,
    WorkClass,
)
from services.inference.engine.settings import EngineSettings
from services.inference.engine.vllm import MOST_ASKED, MOST_IDS, ArgumentRefused, Engine, arguments, places, sampled, top
from tests.fakes.host import hello
from tests.fakes.runner import alone, history_of, logprob
from tests.fakes.vllm import VOCABULARY, FakeAsyncLLM, params

PROMPT = tuple(range(2, 42))
SAMPLING = Sampling(seed=3, temperature=0.0)


class Subject:
    """An engine and all that it has said."""

    def __init__(self, **settings: Any) -> None:
        self.vllm = FakeAsyncLLM()
        self.said: list[FromEngine] = []
        self.changed = asyncio.Event()
        about = hello(model="fake", blocks=256, context=4096, vocabulary=VOCABULARY)
        self.engine = Engine(self.vllm, params, about, EngineSettings(**settings), self.heard)

    def heard(self, events: Sequence[FromEngine]) -> None:
        self.said.extend(events)
        self.changed.set()

    async def until(self, count: int, kind: type = Done) -> list[FromEngine]:
        """All so far, once it has said `count` of `kind`."""
        async with asyncio.timeout(10):
            while sum(isinstance(message, kind) for message in self.said) < count:
                self.changed.clear()
                await self.changed.wait()
        return self.said

    async def answer(self, call: ToEngine) -> list[FromEngine]:
        self.said.clear()
        self.engine.take(call)
        return list(await self.until(1))


def generate(id: str = "a", count: int = 5, ends: tuple[int, ...] = (), **changes: Any) -> Generate:
    fields: dict[str, Any] = {"deadline_s": 60.0, "tenant": "t", "cache_salt": b"salt"}
    return Generate(id, PROMPT, SAMPLING, Limits(count, ends, ignore_end_token=not ends), **(fields | changes))


SHARED: dict[str, Any] = {"deadline_s": 60.0, "tenant": "t", "cache_salt": b"salt"}
SAID = alone(PROMPT, SAMPLING, 0, 50, VOCABULARY)


async def test_an_output_streams_to_its_end_and_costs_what_it_says():
    messages = await Subject().answer(generate())
    assert [message.token_id for message in messages if isinstance(message, Token)] == SAID[:5]
    ended, done = messages[-2:]
    assert ended == Ended("a", 0, FinishReason.LENGTH)
    assert isinstance(done, Done) and done.usage == Usage(40, 16, 5) and done.error is None


async def test_an_end_token_is_counted_and_not_sent():
    messages = await Subject().answer(generate(count=50, ends=(SAID[3],)))
    assert [message.token_id for message in messages if isinstance(message, Token)] == SAID[:3]
    assert messages[-2] == Ended("a", 0, FinishReason.END_TOKEN)
    assert isinstance(messages[-1], Done) and messages[-1].usage.output_tokens == 4


async def test_outputs_have_seeds_and_requests_of_their_own():
    subject = Subject()
    messages = await subject.answer(generate(count=2, outputs=3))
    assert [m.index for m in messages if isinstance(m, Ended)] == [0, 1, 2]
    assert len({each.params.seed for each in subject.vllm.asked}) == 3
    assert len({each.id for each in subject.vllm.asked}) == 3
    assert isinstance(messages[-1], Done) and messages[-1].usage == Usage(40, 16, 6)  # the prompt is counted once


@pytest.mark.parametrize(
    ("message", "reason"), [(Stop("a", 0), FinishReason.STOPPED), (Abort(("a", "unknown")), FinishReason.CANCELLED)], ids=["stop", "abort"]
)
async def test_A5_a_cut_ends_the_request_at_vllm_and_says_what_it_cost(message: ToEngine, reason: FinishReason):
    subject = Subject()
    subject.engine.take(generate(count=4000))
    await subject.until(3, Token)
    subject.engine.take(message)
    messages = await subject.until(1)
    assert messages[-2] == Ended("a", 0, reason)
    tokens = [m for m in messages if isinstance(m, Token)]
    assert isinstance(messages[-1], Done) and messages[-1].usage.output_tokens == len(tokens) and messages[-1].error is None
    assert subject.vllm.aborted == ["a/0"]


async def test_a_deadline_that_has_passed_ends_a_call_before_its_first_token():
    messages = await Subject().answer(generate(count=100, deadline_s=0.0))
    assert messages[0] == Ended("a", 0, FinishReason.DEADLINE)
    assert [type(message) for message in messages] == [Ended, Done]


async def test_a_time_limit_leaves_the_partial_output():
    messages = await Subject().answer(generate(count=4000, time_limit_s=0.05))
    assert messages[-2] == Ended("a", 0, FinishReason.TIME_LIMIT)
    assert isinstance(messages[-1], Done) and messages[-1].error is None


async def test_a_score_is_the_sum_of_its_places():
    call = Score("s", PROMPT, ((5, 6), (5, 7)), probes=(1,), first_probes=(8, 9), **SHARED)
    subject = Subject()
    scored, done = await subject.answer(call)
    assert isinstance(scored, Scored)
    for continuation, found in zip(call.continuations, scored.continuations, strict=True):
        states = [history_of((*PROMPT, *continuation[:place])) for place in range(3)]
        assert found.logprobs == tuple(logprob(states[place], token) for place, token in enumerate(continuation))
        assert found.probes == tuple((logprob(state, 1),) for state in states)
    assert scored.first_probes == (logprob(history_of(PROMPT), 8), logprob(history_of(PROMPT), 9))
    assert isinstance(done, Done) and done.usage == Usage(44, 16, 0)
    # "", "5", "5 6", "5 7": what continuations share is asked once.
    assert len(subject.vllm.asked) == len(places(call)) == 4


async def test_a_score_can_be_cut():
    subject = Subject()
    subject.engine.take(Score("s", PROMPT, ((5, 6),), **SHARED))
    (done,) = await subject.answer(Abort(("s",)))
    assert isinstance(done, Done) and done.error == "cancelled"
    (done,) = await subject.answer(Score("s", PROMPT, ((5, 6),), **(SHARED | {"deadline_s": 0.0})))
    assert isinstance(done, Done) and done.error == "deadline"


@pytest.mark.parametrize(("count", "requests"), [(MOST_IDS, 1), (MOST_IDS + 1, 2), (MOST_ASKED + 1, 1)])
async def test_many_probes_are_asked_for_in_turns_and_too_many_at_once(count: int, requests: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("services.inference.engine.vllm.MOST_ASKED", min(MOST_ASKED, VOCABULARY - 1))
    probes = tuple(range(min(count, VOCABULARY)))
    subject = Subject()
    scored, _ = await subject.answer(Score("s", PROMPT, (), first_probes=probes, **SHARED))
    assert isinstance(scored, Scored) and scored.first_probes == tuple(logprob(history_of(PROMPT), probe) for probe in probes)
    assert len(subject.vllm.asked) == requests


async def test_tenants_and_classes_reach_vllm():
    subject = Subject()
    await subject.answer(generate(work_class=WorkClass.EXPLAIN))
    await subject.answer(generate("b", tenant="other"))
    first, second = subject.vllm.asked
    assert first.inputs["cache_salt"] != second.inputs["cache_salt"]
    assert (first.priority, second.priority) == (2, 0)


async def test_what_it_cannot_do_it_says():
    subject = Subject()
    (done,) = await subject.answer(Embed("e", (PROMPT,), **SHARED))
    assert isinstance(done, Done) and done.error == "unsupported"
    weighed, done = await subject.answer(Weigh("w", PROMPT, ((5,),), 60.0, "t"))
    assert isinstance(weighed, Weighed) and weighed.error == "unsupported"
    ready, done = await subject.answer(Prefetch("p", "digest", "owner", 9.0))
    assert isinstance(ready, AdapterReady) and ready.error == "no_adapters"
    for call in (
        generate(adapter="digest", owner="owner"),
        generate(count=5000),
        Generate("a", (VOCABULARY,), SAMPLING, Limits(1, ()), **SHARED),
    ):
        *ended, done = await subject.answer(call)
        assert ended == [Ended("a", 0, FinishReason.ERROR)]
        assert isinstance(done, Done) and done.error in ("no_adapters", "over_context", "token_out_of_range")
    assert subject.vllm.asked == []


async def test_a_call_that_fails_fails_alone():
    subject = Subject()
    subject.vllm.fails = lambda id: ValueError("no content in logs") if id.startswith("a") else None
    subject.engine.take(generate("b"))
    messages = await subject.answer(generate("a"))
    failed = [m for m in messages if isinstance(m, Done) and m.id == "a"]
    assert failed[0].error == "step_failed"
    await subject.until(2)
    assert [m.error for m in subject.said if isinstance(m, Done) and m.id == "b"] == [None]


async def test_a_drain_finishes_what_runs_and_refuses_the_rest():
    subject = Subject()
    subject.engine.take(generate(count=20))
    subject.engine.take(Drain())
    subject.engine.take(generate("b"))
    messages = await subject.until(2)
    assert [m.error for m in messages if isinstance(m, Done) and m.id == "b"] == ["draining"]
    assert [m.reason for m in messages if isinstance(m, Ended) and m.id == "a"] == [FinishReason.LENGTH]
    async with asyncio.timeout(10):
        await subject.engine.ended.wait()


async def test_the_load_is_vllms_own():
    subject = Subject()
    reporting = asyncio.create_task(subject.engine.report())
    scheduler = SimpleNamespace(
        num_waiting_reqs=2,
        num_skipped_waiting_reqs=1,
        num_running_reqs=4,
        kv_cache_usage=0.25,
        prefix_cache_stats=SimpleNamespace(hits=32),
    )
    subject.engine.take(generate(count=4000))
    subject.engine.record(scheduler, SimpleNamespace(num_prompt_tokens=40, num_generation_tokens=4))
    await subject.until(1, Load)
    reporting.cancel()
    load = [message for message in subject.said if isinstance(message, Load)][-1]
    assert (load.waiting_sequences, load.running_sequences, load.cached_tokens, load.steps) == (3, 4, 32, 1)
    assert (load.total_blocks, load.free_blocks) == (256, 192)
    subject.engine.take(Abort(("a",)))
    await subject.until(1)
    assert subject.engine.load().running_tokens == 0


def test_only_arguments_of_an_operator_pass(tmp_path):
    found = arguments(EngineSettings(engine_args=("tensor_parallel_size=2", "quantization=fp8"), kv_tokens=4096), tmp_path)
    assert (found["tensor_parallel_size"], found["quantization"], found["max_model_len"]) == (2, "fp8", 4096)
    assert found["trust_remote_code"] is False
    for refused in ("trust_remote_code=true", "model=/etc", "tensor_parallel_size"):
        with pytest.raises(ArgumentRefused, match=refused.partition("=")[0]):
            arguments(EngineSettings(engine_args=(refused,)), tmp_path)


def test_end_tokens_are_the_calls_own():
    asked = sampled(generate(ends=(7,)), 0)
    assert (asked["ignore_eos"], asked["stop_token_ids"]) == (True, [7])
    assert sampled(generate(), 0)["stop_token_ids"] == []
    assert 0 <= sampled(generate(), 3)["seed"] < 2**63


def test_the_likeliest_are_ranked():
    row = {4: SimpleNamespace(logprob=-3.0, rank=3), 9: SimpleNamespace(logprob=-0.1, rank=1), 2: SimpleNamespace(logprob=-1.0, rank=2)}
    assert top(row, 2) == ((9, -0.1), (2, -1.0))
