"""Signals of an autoscaler and the time a model takes to wake, as values."""

import pytest

from services.gateway.demand import LOAD_S, WANTED_S, Demand, Signal, Waking, bare, idle, total


@pytest.mark.parametrize(
    "demand, queue, inflight, kv",
    [
        (Demand(), 0, 0, 0),
        (Demand(queued=3), 3, 3, 1),
        (Demand(queued=3, running=4, kv_percent=250), 3, 7, 250),
        (Demand(running=2), 1, 2, 1),  # the last replica does not go under a call
        (Demand(kv_percent=7), 0, 0, 7),
    ],
)
def test_a_signal_is_at_least_one_while_anything_is_asked(demand: Demand, queue: int, inflight: int, kv: int) -> None:
    assert [demand.value(signal) for signal in (Signal.QUEUE, Signal.INFLIGHT, Signal.KV)] == [queue, inflight, kv]
    assert idle({"m": demand}) is (not demand.active)


def test_gateways_add_up_but_for_the_cache_that_each_of_them_sees_whole() -> None:
    parts = [("a", Demand(1, 2, 80)), ("a", Demand(3, 4, 70)), ("b", Demand(5))]
    assert total(parts) == {"a": Demand(4, 6, 80), "b": Demand(5)}


def test_what_is_predicted_is_what_was_seen_less_what_has_passed() -> None:
    waking = Waking()
    assert waking.remaining_s(0.0) == LOAD_S
    waking.want(10.0)
    assert waking.remaining_s(30.0) == LOAD_S - 20
    assert waking.woke(30.0) == 20.0 and waking.load_s == 20.0, "the first that is seen replaces the guess"
    assert waking.woke(31.0) is None, "nobody had waited"
    waking.want(100.0)
    assert waking.woke(140.0) == 40.0 and waking.load_s == 30.0, "then the last counts half"
    waking.want(200.0)
    assert waking.remaining_s(300.0) == pytest.approx(20.0), "overdue: a fifth of the wait again"


def test_a_caller_who_was_told_to_come_again_is_waited_for() -> None:
    waking = Waking(load_s=40.0)
    waking.want(0.0)
    assert waking.wanted(40.0 + WANTED_S - 1) and not waking.wanted(40.0 + WANTED_S)
    waking.lost_interest(40.0 + WANTED_S - 1)
    assert waking.since == 0.0
    waking.lost_interest(40.0 + WANTED_S)
    assert waking.since is None and waking.woke(500.0) is None


def test_charts_say_names_bare() -> None:
    assert bare("models/chat-8b") == "chat-8b"
