"""Adapters in the engine's loop: who waits, who goes on, and what is left behind."""

import struct
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from services.inference.engine.adapters import READY_BYTES, RETRY_S, Fetched, key_of
from services.inference.engine.calls import (
    Abort,
    AdapterReady,
    Done,
    Drain,
    Evict,
    FinishReason,
    Label,
    Labelled,
    Prefetch,
    WorkClass,
)
from services.inference.engine.engine import Engine
from services.inference.engine.settings import EngineSettings
from services.inference.engine.slots import SLICE_S
from services.inference.engine.step import Adapter, AdapterProblem, Row
from tests.fakes.runner import HELLO, FakeRunner, alone, history_of
from tests.inference.engine.test_engine import GREEDY, POISON, Bench, Clock, cannot_bear, embed, generate, prompt, score

OWNER = "owner"


class Tuned(Bench):
    """An engine with a store that answers when told."""

    def __init__(self, runner: FakeRunner | None = None, **asked: Any) -> None:
        self.runner = runner or FakeRunner(slots=2, blocks=256)
        self.clock = Clock()
        self.asked: list[str] = []
        self.engine = Engine(self.runner, HELLO, EngineSettings(**asked), self.clock, fetch=self.asked.append)
        self.events, self.loads = [], []

    def answer(self, error: str = "") -> "Tuned":
        """Let the fetches asked so far end: as the runner's `fetch` would, or with an error."""
        asked, self.asked[:] = list(self.asked), []
        for key in asked:
            owner, _, digest = key.rpartition("/")
            try:
                self.engine.take(Fetched(key, None, error) if error else Fetched(key, self.runner.fetch(owner, digest)))
            except AdapterProblem as problem:
                self.engine.take(Fetched(key, None, problem.word))
        return self

    def tuned(self, *digests: str, **fields: Any) -> "Tuned":
        for digest in digests:
            self.runner.tune(OWNER, digest, **fields)
        return self

    def ready(self, id: str) -> AdapterReady:
        (ready,) = [event for event in self.events if isinstance(event, AdapterReady) and event.id == id]
        return ready

    def finish(self) -> "Tuned":
        super().finish()
        assert not self.engine._expecting and not self.engine._prefetches
        assert not any(entry.users for entry in self.engine._adapters._entries.values())
        assert not self.engine._scheduler.slots.parked
        assert not any(holder.active for holder in self.engine._scheduler.slots._holders.values())
        return self


def of(digest: str, id: str, tokens: Sequence[int] = prompt(20), count: int = 5, **changes: Any) -> Any:
    return generate(id, tokens, count, adapter=digest, owner=OWNER, **changes)


def wanted(digest: str, tokens: Sequence[int] = prompt(20), count: int = 5) -> list[int]:
    return alone(tokens, GREEDY, 0, count, 1000, adapter=digest)


def label(id: str, digest: str, *inputs: Sequence[int]) -> Label:
    return Label(id, tuple(map(tuple, inputs)), digest, OWNER, 100.0, "t", b"salt")


def test_a_call_waits_for_its_adapter_and_the_others_go_on():
    b = Tuned().tuned("a").take(of("a", "1"), generate("base"))
    for _ in range(10):
        b.step()
    assert b.done("base").error is None and b.asked == [key_of(OWNER, "a")]
    assert b.engine.wait_s > 0  # it sleeps while only the store can help
    b.answer().finish()
    assert b.tokens("1") == wanted("a") != b.tokens("base")


def test_an_adapter_is_fetched_once_for_all_that_wait_and_stays():
    b = Tuned().tuned("a").take(of("a", "1"), of("a", "2"), of("a", "3"))
    assert b.asked == [key_of(OWNER, "a")]
    b.answer().finish().take(of("a", "4")).finish()
    assert b.asked == []
    assert b.tokens("4") == wanted("a")
    assert b.loads[-1].adapters == ("a",)


def test_A10_anothers_adapter_ends_as_an_unknown_one():
    b = Tuned().tuned("a").take(of("a", "mine")).answer().finish()
    foreign = generate("foreign", adapter="a", owner="other")
    unknown = generate("unknown", adapter="b", owner="other")
    b.take(foreign, unknown).answer().finish()
    assert {b.done(id).error for id in ("foreign", "unknown")} == {"adapter_unknown"}
    assert b.done("foreign").usage == b.done("unknown").usage
    assert b.reason("foreign") is FinishReason.ERROR
    assert len(b.engine._adapters._entries) == 1  # made-up names leave nothing behind


def test_more_adapters_than_slots_take_turns_and_all_say_what_they_say_alone():
    runner = FakeRunner(slots=2, blocks=256)
    names = [f"a{n}" for n in range(7)]
    b = Tuned(runner).tuned(*names).take(*(of(name, name, count=9) for name in names), generate("base", count=9)).answer().finish()
    for name in names:
        assert b.tokens(name) == wanted(name, count=9)
    assert runner.mixed == 2
    assert b.tokens("base") == alone(prompt(20), GREEDY, 0, 9, 1000)


def test_work_without_end_yields_its_slot_after_a_slice_and_resumes_its_tokens():
    b = Tuned(FakeRunner(slots=1, blocks=256)).tuned("long", "short")
    b.take(of("long", "long", count=60), of("short", "short", count=3)).answer()
    b.step(10)
    assert not b.tokens("short")
    b.clock.now += SLICE_S
    b.step(5)
    assert b.tokens("short") == wanted("short", count=3)
    b.finish()
    assert b.tokens("long") == wanted("long", count=60)


def test_urgent_work_takes_a_slot_from_explanations_at_once():
    b = Tuned(FakeRunner(slots=1, blocks=256)).tuned("slow", "fast")
    b.take(of("slow", "slow", count=60, work_class=WorkClass.EXPLAIN)).answer().step(5)
    b.take(of("fast", "fast", count=2)).answer().step(4)
    assert b.tokens("fast") == wanted("fast", count=2)
    b.finish()
    assert b.tokens("slow") == wanted("slow", count=60)


def test_scores_and_vectors_use_the_adapter_too():
    b = Tuned().tuned("a")
    b.take(score("s", prompt(9), [prompt(3)], adapter="a", owner=OWNER), embed("e", prompt(5), adapter="a", owner=OWNER))
    b.take(score("t", prompt(9), [prompt(3)])).answer().finish()
    assert b.done("s").error is b.done("e").error is None
    scored = {event.id: event for event in b.events if type(event).__name__ == "Scored"}
    assert scored["s"].continuations != scored["t"].continuations


def test_T10_heads_answer_from_the_last_token_of_each_input():
    b = (
        Tuned()
        .tuned("a", "b", labels=("x", "y"))
        .take(label("1", "a", prompt(20), prompt(40)), label("2", "b", prompt(20)))
        .answer()
        .finish()
    )
    logits = {event.id: event.logits for event in b.events if isinstance(event, Labelled)}
    assert logits["1"] == tuple(struct.pack("<f", history_of(prompt(n), "a")) for n in (20, 40))
    assert logits["2"] == (struct.pack("<f", history_of(prompt(20), "b")),)
    assert b.done("1").usage.input_tokens == 60


def test_labels_of_an_adapter_without_a_head_are_refused():
    b = Tuned().tuned("a").take(label("1", "a", prompt(5))).answer().finish()
    assert b.done("1").error == "adapter_headless"


@pytest.mark.parametrize("error", ["adapter_refused", "adapter_unavailable"])
def test_an_adapter_that_cannot_be_had_fails_its_calls_once_and_is_tried_again_later(error: str):
    b = Tuned().tuned("a").take(of("a", "1"), generate("base")).answer(error).finish()
    assert b.done("1").error == error and b.done("base").error is None
    b.take(of("a", "2")).finish()
    assert b.done("2").error == error and b.asked == []  # it rests
    b.clock.now += RETRY_S[error]
    b.take(of("a", "3")).answer().finish()
    assert b.tokens("3") == wanted("a")


def test_A20_an_adapter_that_raises_is_errored_by_digest_and_its_neighbours_go_on():
    runner = FakeRunner(slots=2, blocks=256)

    def fails(rows: Sequence[Row]) -> None:
        if any(row.adapter and runner.installed[row.adapter] == "bad" for row in rows):
            raise RuntimeError("shapes")

    runner.fails = fails
    b = Tuned(runner).tuned("bad", "good").take(of("bad", "1"), of("bad", "2"), of("good", "3"), generate("base")).answer().finish()
    assert b.done("1").error in ("step_failed", "adapter_failed") and b.done("2").error in ("step_failed", "adapter_failed")
    assert b.tokens("3") == wanted("good") and b.done("base").error is None
    b.take(of("bad", "4")).finish()
    assert b.done("4").error == "adapter_failed"
    assert b.loads[-1].adapters == ("good",)


def test_A20_a_poisoned_prompt_of_the_base_errors_no_adapter():
    runner = FakeRunner(slots=2, blocks=256, fails=lambda rows: cannot_bear(POISON, rows))
    b = Tuned(runner).tuned("a").take(generate("bad", (POISON, 5)), of("a", "1")).answer().finish()
    assert b.done("bad").error == "step_failed" and b.tokens("1") == wanted("a")


def test_an_adapter_that_cannot_be_installed_fails_alone():
    runner = FakeRunner(slots=2, blocks=256)
    install = runner.install

    def failing(slot: int, adapter: Adapter | None) -> None:
        if adapter is not None and adapter.weights == "big":
            raise MemoryError
        install(slot, adapter)

    runner.install = failing  # type: ignore[method-assign]
    b = Tuned(runner).tuned("big", "a").take(of("big", "1"), of("a", "2")).answer().finish()
    assert b.done("1").error == "adapter_failed" and b.tokens("2") == wanted("a")


def test_waiting_calls_end_by_their_deadline_and_by_abort():
    b = Tuned().tuned("a").take(of("a", "late", deadline_s=3.0), of("a", "left"))
    b.take(Abort(("left",))).step()
    assert b.reason("left") is FinishReason.CANCELLED
    assert b.engine.wait_s == pytest.approx(3.0)
    b.clock.now += 3.0
    b.step()
    assert b.reason("late") is FinishReason.DEADLINE
    b.answer().finish().step()
    assert b.loads[-1].adapters == ("a",)  # it came all the same, for the next


def test_prefetch_answers_when_the_adapter_is_loaded_and_at_once_when_it_is_here():
    b = Tuned().tuned("a", labels=("x",), temperature=2.0, pooling="MEAN", max_tokens=9).take(Prefetch("p", "a", OWNER, 10.0))
    b.clock.now += 0.5
    b.answer().finish().take(Prefetch("q", "a", OWNER, 10.0)).finish()
    first, second = b.ready("p"), b.ready("q")
    assert (first.seconds, second.seconds) == (0.5, 0.0)
    assert (first.labels, first.temperature, first.pooling, first.max_tokens, first.error) == (("x",), 2.0, "MEAN", 9, None)
    assert b.done("p").error is None


def test_prefetch_of_what_cannot_be_had_says_why():
    b = (
        Tuned()
        .take(Prefetch("p", "none", OWNER, 10.0))
        .answer()
        .take(Prefetch("late", "slow", OWNER, 1.0), Prefetch("left", "slow", OWNER, 9.0))
    )
    b.clock.now += 1.0
    b.step()
    b.take(Abort(("left",))).answer().finish()
    assert [b.ready(id).error for id in ("p", "late", "left")] == ["adapter_unknown", "deadline", "cancelled"]
    assert [b.done(id).error for id in ("p", "late", "left")] == ["adapter_unknown", "deadline", "cancelled"]


def test_evict_ends_the_adapters_calls_and_forgets_it_with_what_it_cached():
    b = Tuned().tuned("a", "b").take(of("a", "0", prompt(40))).answer().finish()
    b.take(of("a", "1", prompt(40), 50), of("b", "2", prompt(40), 9)).answer()
    b.step(4)
    b.take(Evict("e", "a", "other"), Evict("f", "a", OWNER)).finish()
    assert b.done("e").error is None and b.done("f").error is None
    assert b.done("1").error == "adapter_unknown" and b.tokens("2") == wanted("b", prompt(40), 9)
    assert b.loads[-1].adapters == ("b",)
    b.take(of("a", "3", prompt(40), 2)).answer().finish()
    assert b.done("3").usage.cached_input_tokens == 0
    b.take(of("b", "4", prompt(40), 2)).finish()
    assert b.done("4").usage.cached_input_tokens == 32


def test_an_adapter_evicted_while_it_is_fetched_does_not_come_back():
    b = Tuned().tuned("a").take(of("a", "1"), Prefetch("p", "a", OWNER, 9.0), Evict("e", "a", OWNER)).answer().finish()
    assert b.done("1").error == b.done("p").error == "adapter_unknown"
    assert b.engine._adapters.ready == ()


def test_prefixes_of_adapters_are_apart_and_their_own_is_found():
    b = Tuned().tuned("a", "b").take(of("a", "1", prompt(40))).answer().finish()
    b.take(of("b", "2", prompt(40)), of("a", "3", prompt(40)), generate("4", prompt(40))).answer().finish()
    assert [b.done(id).usage.cached_input_tokens for id in "234"] == [0, 32, 0]


def test_unused_adapters_leave_memory_beyond_the_limit_oldest_first():
    b = Tuned().tuned("a", "b", "c", memory_bytes=READY_BYTES // 2)
    for name in "abc":
        b.take(of(name, name)).answer().finish()
    assert b.engine._adapters.ready == ("b", "c")
    b.take(of("a", "again"))
    assert b.asked == [key_of(OWNER, "a")]  # reloaded on demand, never refused
    b.answer().finish()
    assert b.tokens("again") == wanted("a")


def test_an_engine_without_slots_or_draining_takes_no_adapters():
    b = Bench().take(of("a", "1"), Prefetch("p", "a", OWNER, 1.0), label("l", "a", prompt(3))).finish()
    assert {b.done(id).error for id in ("1", "p", "l")} == {"no_adapters"}
    d = Tuned().tuned("a").take(of("a", "1"), Drain(), Prefetch("p", "a", OWNER, 1.0)).answer().finish()
    assert d.done("p").error == "draining" and d.tokens("1") == wanted("a")


CALLS = st.lists(
    st.tuples(st.sampled_from(["", "a", "b", "c", "none"]), st.integers(1, 40), st.integers(1, 8), st.sampled_from(list(WorkClass))),
    min_size=1,
    max_size=12,
)
EVENTS = st.lists(st.sampled_from(["step", "answer", "abort", "evict", "time", "prefetch"]), max_size=40)


@settings(max_examples=60, deadline=None)
@given(calls=CALLS, events=EVENTS, slots=st.integers(1, 3), blocks=st.sampled_from([8, 64]))
def test_I7_whatever_happens_every_call_is_answered_once_and_nothing_is_left(
    calls: list[tuple[str, int, int, WorkClass]], events: list[str], slots: int, blocks: int
):
    b = Tuned(FakeRunner(slots=slots, blocks=blocks)).tuned("a", "b", "c")
    waiting = list(enumerate(calls))
    for place, event in enumerate(events):
        if waiting:
            number, (name, length, count, work_class) = waiting.pop()
            b.take(of(name, str(number), prompt(length, number), count, work_class=work_class))
        match event:
            case "step":
                b.step()
            case "answer":
                b.answer()
            case "abort":
                b.take(Abort(("0", "3")))
            case "evict":
                b.take(Evict(f"evict {place}", "a", OWNER))
            case "time":
                b.clock.now += SLICE_S
            case "prefetch":
                b.take(Prefetch(f"prefetch {place}", "b", OWNER, 50.0))
    b.take(*(of(name, str(n), prompt(length, n), count, work_class=c) for n, (name, length, count, c) in waiting))
    b.answer().finish()
    for number, (name, length, count, _) in enumerate(calls):
        done = b.done(str(number))
        if done.error is None and b.reason(str(number)) is FinishReason.LENGTH:
            assert b.tokens(str(number)) == wanted(name, prompt(length, number), count)
        elif done.error is not None:
            assert done.error == "adapter_unknown" and name in ("a", "none")
    assert len({event.id for event in b.events if isinstance(event, Done)}) == sum(isinstance(event, Done) for event in b.events)
