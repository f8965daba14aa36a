"""Tokens weighed beside the step loop: turns, cancels, deadlines and faults."""

import threading

import pytest

from services.inference.engine.calls import Abort, Done, Drain, Load, Score, Weigh, Weighed
from services.inference.engine.engine import ERRORS, MOST_WEIGHING, Engine
from services.inference.engine.inbox import Inbox
from services.inference.engine.settings import EngineSettings
from services.inference.engine.weighing import Weigher
from tests.fakes.runner import HELLO, FakeRunner


def call(id="w", prefix=(3, 4, 5), continuations=((6, 7),), deadline_s=10.0, **fields):
    return Weigh(id, prefix, continuations, deadline_s, "t", **fields)


class Bench:
    """An engine whose weighing waits for `gate`."""

    def __init__(self, failing=None):
        self.inbox, self.gate, self.began = Inbox(), threading.Event(), []
        self.runner, self.failing = FakeRunner(), failing
        self.engine = Engine(self.runner, HELLO, EngineSettings(), weighing=Weigher(self.weigh, self.inbox))

    def weigh(self, asked):
        self.began.append(asked.id)
        assert self.gate.wait(10)
        if self.failing is not None:
            raise self.failing
        return self.runner.weigh(asked)

    def take(self, *messages):
        for message in messages:
            self.engine.take(message)
        return [event for event in self.engine.step() if not isinstance(event, Load)]

    def arrive(self, count=1):
        """Take so many answers from the thread, as the loop does, and step."""
        events = []
        while count:
            messages = self.inbox.take(wait_s=10)
            assert messages, "an answer"
            count -= len(messages)
            events += self.take(*messages)
        return events


def test_a_call_is_answered_beside_the_batch_with_exact_usage():
    bench = Bench()
    assert bench.take(call(), Score("s", (3, 4), ((5,),), 10.0, "t", b"")) and not bench.engine.idle
    assert bench.engine.wait_s is None or bench.engine.wait_s > 0, "the loop sleeps while another thread works"
    bench.gate.set()
    weighed, done = bench.arrive()
    assert (weighed.weights, weighed.target) == ((3.0, 4.0, 5.0), 0)
    assert (done.id, done.usage.input_tokens, done.error) == ("w", 3 + 2, None)
    assert bench.engine.idle


def test_candidates_each_read_the_prompt():
    bench = Bench()
    bench.gate.set()
    bench.take(call(continuations=((6,), (7, 8)), contrast=(0.0, 0.0)))
    _, done = bench.arrive()
    assert done.usage.input_tokens == 2 * 3 + 1 + 2


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        (call(prefix=()), "empty_input"),
        (call(continuations=((6,), ())), "empty_input"),
        (call(prefix=(3, 10**6)), "token_out_of_range"),
        (call(contrast=(0.0, 0.0)), "out_of_bounds"),
        (call(target=1), "out_of_bounds"),
        (call(prefix=(3,) * 100_000), "over_context"),
    ],
)
def test_what_cannot_be_weighed_is_refused(asked, word):
    bench = Bench()
    (done,) = bench.take(asked)
    assert (done.error, done.usage.input_tokens) == (word, 0)
    assert word in ERRORS and bench.engine.idle and not bench.began


def test_an_engine_without_gradients_says_so():
    engine = Engine(FakeRunner(), HELLO, EngineSettings())
    engine.take(call())
    assert [event.error for event in engine.step() if isinstance(event, Done)] == ["no_gradients"]


def test_one_at_a_time_and_no_more_than_a_bound_wait():
    bench = Bench()
    events = bench.take(*(call(f"w{number}") for number in range(MOST_WEIGHING + 1)))
    assert [(event.id, event.error) for event in events] == [(f"w{MOST_WEIGHING}", "queue_full")]
    bench.gate.set()
    events = bench.arrive(MOST_WEIGHING)
    assert [event.id for event in events if isinstance(event, Weighed)] == [f"w{number}" for number in range(MOST_WEIGHING)]
    assert bench.engine.idle


def test_A5_a_cancelled_call_ends_at_once_and_never_begins():
    bench = Bench()
    bench.take(call("first"), call("second"))
    events = bench.take(Abort(("second", "first")))
    assert {(event.id, event.error) for event in events} == {("first", "cancelled"), ("second", "cancelled")}
    assert bench.engine.idle
    bench.gate.set()
    assert bench.arrive(2) == [], "what still comes is told to nobody"
    assert "second" not in bench.began


def test_a_call_past_its_deadline_is_not_begun():
    bench = Bench()
    bench.gate.set()
    bench.take(call(deadline_s=0.0))
    (done,) = bench.arrive()
    assert (done.error, bench.began) == ("deadline", [])


def test_A20_a_model_that_raises_ends_one_call():
    bench = Bench(failing=ValueError("quotes the input"))
    bench.gate.set()
    bench.take(call("bad"))
    (done,) = bench.arrive()
    assert (done.id, done.error) == ("bad", "step_failed")
    bench.failing = None
    bench.take(call("good"))
    assert isinstance(bench.arrive()[0], Weighed)


def test_a_drain_waits_for_what_is_weighed_and_takes_no_more():
    bench = Bench()
    bench.take(call("before"), Drain())
    assert not bench.engine.idle
    assert [event.error for event in bench.take(call("after"))] == ["draining"]
    bench.gate.set()
    bench.arrive()
    assert bench.engine.idle
