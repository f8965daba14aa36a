"""Routing decides from values alone: no socket, no clock."""

import heapq
import itertools
import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.routing import (
    CONSECUTIVE_FAILURES,
    RAMP_S,
    Load,
    Replica,
    RetryBudget,
    Standing,
    Work,
    affinity,
    answer_s,
    choose,
    cost_s,
    start_s,
    token_s,
    usable,
)

WORK = Work(prompt_tokens=100, output_tokens=50)


def replica(name: str, **load: float) -> Replica:
    made = Replica(name, reachable=True)
    made.report(Load(**{"prefill_tokens_per_s": 1_000.0, "decode_tokens_per_s": 100.0, **load}), 0.0)  # type: ignore[arg-type]
    return made


def fail(target: Replica, times: int, now: float) -> None:
    for _ in range(times):
        target.ended(target.place(WORK, now), now, failed=True)


def test_the_one_that_finishes_first_is_chosen() -> None:
    busy, idle = replica("a", queued_tokens=5_000), replica("b", queued_tokens=100)
    assert choose([busy, idle], WORK, 1.0) is idle


def test_a_slower_replica_is_left_alone_even_when_idle() -> None:
    slow = replica("a", prefill_tokens_per_s=100.0, decode_tokens_per_s=10.0, step_s=0.1)
    fast = replica("b", running_tokens=100, step_s=0.01)
    assert choose([slow, fast], WORK, 1.0) is fast


def test_a_fuller_batch_is_no_faster_replica() -> None:
    full = replica("a", decode_tokens_per_s=900.0, batch=9, step_s=0.01, running_sequences=9, running_tokens=450)
    idle = replica("b", decode_tokens_per_s=100.0, batch=1, step_s=0.01)
    assert choose([full, idle], WORK, 1.0) is idle


def test_own_calls_count_until_a_report_can_have_seen_them() -> None:
    one, two = replica("a"), replica("b")
    first = choose([one, two], WORK, 1.0)
    assert first is not None
    call = first.place(WORK, 1.0)
    assert choose([one, two], WORK, 1.0) is not first
    assert start_s(first, [one, two]) == WORK.prompt_tokens / 1_000
    first.report(first.load, 1.1)  # left the replica before it had queued the call
    assert start_s(first, [one, two]) > 0
    first.started(call, 1.15)
    first.report(first.load, 1.2)
    assert start_s(first, [one, two]) == 0
    first.ended(call, 2.0, failed=False)
    assert not first.in_flight


def steps(target: Replica, batch: int, step_s: float, now: float = 0.0) -> None:
    target.report(Load(prefill_tokens_per_s=1_000.0, decode_tokens_per_s=batch / step_s, step_s=step_s, batch=batch), now)


def test_F31_an_answer_takes_the_longer_the_more_share_the_replica() -> None:
    one = replica("a")
    steps(one, 40, 0.05)  # 800 tokens a second is the most it has shown
    steps(one, 1, 0.01)
    assert token_s(one) == 0.01  # alone it is as fast as its steps are now
    for _ in range(19):
        one.place(WORK, 1.0)
    assert token_s(one) == 20 / 800
    assert answer_s(one, WORK, [one]) == start_s(one, [one]) + 0.1 + WORK.output_tokens * 20 / 800


def test_beyond_the_fullest_batch_seen_more_streams_are_taken_to_cost_nothing() -> None:
    one = replica("a")
    steps(one, 2, 0.01)
    for _ in range(50):
        one.place(WORK, 1.0)
    assert token_s(one) == 0.01


def test_a_replica_that_became_slower_is_believed_in_time() -> None:
    one = replica("a")
    steps(one, 40, 0.05)
    for at in range(100):
        steps(one, 40, 0.1, at / 10)
    steps(one, 1, 0.01)
    for _ in range(39):
        one.place(WORK, 20.0)
    assert token_s(one) == 40 / 400


def test_a_replica_that_tells_nothing_of_its_steps_is_never_too_slow() -> None:
    one = Replica("a", reachable=True)
    one.place(WORK, 0.0)
    assert token_s(one) == 0


def test_unreachable_and_draining_ones_get_nothing() -> None:
    gone, draining = replica("a"), replica("b", draining=True)
    gone.reachable = False
    assert choose([gone, draining], WORK, 1.0) is None


def test_a_shared_prefix_meets_on_one_replica_until_that_costs_more_than_it_saves() -> None:
    fleet = [replica(name) for name in "abc"]
    key = affinity("project", b"You are a helpful assistant. " * 20)
    homes = {choose(fleet, WORK, 1.0, key=key, salt=bytes([n])).name for n in range(20)}  # type: ignore[union-attr]
    assert len(homes) == 1
    home = next(r for r in fleet if r.name in homes)
    home.report(Load(queued_tokens=WORK.prompt_tokens + 50, prefill_tokens_per_s=1_000, decode_tokens_per_s=100), 1.0)
    assert choose(fleet, WORK, 1.0, key=key) is not home


def test_affinity_is_per_project_and_ignores_short_prompts() -> None:
    text = b"x" * 400
    assert affinity("p", b"short") is None
    assert affinity("p", text) != affinity("q", text)
    assert affinity("p", b"y" * 1_024 + b"one") == affinity("p", b"y" * 1_024 + b"two")


def test_F7_ejected_after_consecutive_failures_then_probed_and_ramped_back() -> None:
    bad, good, third = replica("a"), replica("b"), replica("c")
    fleet = [bad, good, third]
    fail(bad, CONSECUTIVE_FAILURES, 10.0)
    assert bad.standing is Standing.EJECTED
    assert bad not in usable(fleet, 12.0)
    probe = choose(fleet, WORK, 15.5)
    assert probe is bad
    call = bad.place(WORK, 15.5)
    assert choose(fleet, WORK, 15.5) is not bad, "one probe at a time"
    bad.ended(call, 16.0, failed=False)
    assert bad.standing is Standing.RAMPING
    assert bad.share(16.0) < 0.2 and bad.share(16.0 + 0.95 * RAMP_S) > 0.9
    bad.tick(16.0 + RAMP_S)
    assert bad.standing is Standing.TRUSTED


def test_F7_a_failed_probe_ejects_for_longer() -> None:
    bad, fleet = replica("a"), [replica("b"), replica("c")]
    fail(bad, CONSECUTIVE_FAILURES, 0.0)
    assert choose([bad, *fleet], WORK, 5.1) is bad
    fail(bad, 1, 5.1)
    assert choose([bad, *fleet], WORK, 5.1 + 9.0) is not bad
    assert choose([bad, *fleet], WORK, 5.1 + 10.1) is bad


def test_F7_half_of_twenty_failed_ejects_without_a_run_of_five() -> None:
    flaky = replica("a")
    for failed in [False, True] * 10:
        flaky.ended(flaky.place(WORK, 0.0), 0.0, failed=failed)
        if flaky.standing is Standing.EJECTED:
            break
    assert flaky.standing is Standing.EJECTED
    steady = replica("b")
    for failed in [True, False, False] * 20:
        steady.ended(steady.place(WORK, 0.0), 0.0, failed=failed)
    assert steady.standing is Standing.TRUSTED


def test_cancels_and_refusals_say_nothing_about_a_replica() -> None:
    one = replica("a")
    for _ in range(100):
        one.ended(one.place(WORK, 0.0), 0.0, failed=None)
    fail(one, CONSECUTIVE_FAILURES - 1, 0.0)
    assert one.standing is Standing.TRUSTED


def test_F7_panic_when_most_would_be_ejected() -> None:
    fleet = [replica(name) for name in "abc"]
    fail(fleet[0], CONSECUTIVE_FAILURES, 0.0)
    assert len(usable(fleet, 1.0)) == 2
    fail(fleet[1], CONSECUTIVE_FAILURES, 0.0)
    assert len(usable(fleet, 1.0)) == 3
    alone = replica("solo")
    fail(alone, CONSECUTIVE_FAILURES, 0.0)
    assert choose([alone], WORK, 1.0) is alone


def test_a_retry_goes_elsewhere() -> None:
    fleet = [replica("a"), replica("b")]
    assert choose(fleet, WORK, 1.0, without=frozenset("a")) is fleet[1]
    assert choose(fleet, WORK, 1.0, without=frozenset("ab")) is None


def test_R8_retries_stay_within_a_tenth_of_attempts() -> None:
    budget = RetryBudget()
    retried = 0
    for _ in range(1_000):
        budget.attempted()
        retried += budget.take()
    assert 100 <= retried <= 110


@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 10_000)), min_size=1, max_size=6),
    st.integers(0, 4_000),
    st.binary(max_size=8),
)
def test_without_affinity_nobody_would_cost_less(loads: list[tuple[int, int]], prompt: int, salt: bytes) -> None:
    fleet = [replica(str(n), queued_tokens=queued, running_tokens=running) for n, (queued, running) in enumerate(loads)]
    work = Work(prompt, 64)
    chosen = choose(fleet, work, 1.0, salt=salt)
    assert chosen is not None
    assert cost_s(chosen, work, fleet) == min(cost_s(r, work, fleet) for r in fleet)


def test_F6_a_replica_ten_times_slower_gets_under_a_fifth_of_its_share() -> None:
    """Open loop at 60 % of the fleet's capacity; loads are reported each 100 ms; each replica serves one token stream."""
    rng = random.Random(7)
    speed = {"a": 1.0, "b": 1.0, "c": 0.1}
    fleet = [replica(n, prefill_tokens_per_s=2_000 * s, decode_tokens_per_s=200 * s) for n, s in speed.items()]
    free_at = dict.fromkeys(speed, 0.0)
    counts: Counter[str] = Counter()
    ends: list[tuple[float, int, Replica, int]] = []
    now, next_report, order = 0.0, 0.0, itertools.count()
    for _ in range(2_000):
        now += rng.expovariate(0.6 * 2.1 / 0.3)  # a call takes 0.3 s on a fast replica
        while ends and ends[0][0] <= now:
            at, _, done_by, call = heapq.heappop(ends)
            done_by.ended(call, at, failed=False)
        if now >= next_report:
            for r in fleet:
                behind = max(0.0, free_at[r.name] - now) * speed[r.name]
                r.report(Load(int(behind * 666), int(behind * 133), 0, len(r.in_flight), 2_000 * speed[r.name], 200 * speed[r.name]), now)
            next_report = now + 0.1
        target = choose(fleet, WORK, now, salt=rng.randbytes(4))
        assert target is not None
        counts[target.name] += 1
        call = target.place(WORK, now)
        target.started(call, now + 0.002)
        free_at[target.name] = max(free_at[target.name], now) + 0.3 / speed[target.name]
        heapq.heappush(ends, (free_at[target.name], next(order), target, call))
    assert counts["c"] <= 0.2 * sum(counts.values()) / 3
    assert abs(counts["a"] - counts["b"]) < 0.1 * counts["a"]


def holding(name: str, *adapters: str, **load: float) -> Replica:
    made = replica(name, **load)
    made.report(Load(**{"prefill_tokens_per_s": 1_000.0, "decode_tokens_per_s": 100.0, **load}, adapters=frozenset(adapters)), 0.0)  # type: ignore[arg-type]
    return made


def test_a_call_goes_where_its_adapter_is() -> None:
    fleet = [holding("a"), holding("b", "d1"), holding("c", "d2")]
    for digest, name in (("d1", "b"), ("d2", "c")):
        for salt in range(20):
            chosen = choose(fleet, Work(100, 50, digest), 1.0, salt=bytes([salt]))
            assert chosen is not None and chosen.name == name


def test_a_line_longer_than_a_load_is_not_joined_for_the_adapter() -> None:
    there, elsewhere = holding("a", "d1", queued_tokens=1_000), holding("b")  # a second of prefill against 0.4 s
    assert choose([there, elsewhere], Work(100, 50, "d1"), 1.0) is elsewhere
    there.report(Load(prefill_tokens_per_s=1_000.0, decode_tokens_per_s=100.0, queued_tokens=300, adapters=frozenset({"d1"})), 1.0)
    assert choose([there, elsewhere], Work(100, 50, "d1"), 1.0) is there


def test_the_first_call_makes_the_next_ones_follow_before_any_report() -> None:
    fleet = [holding("a"), holding("b"), holding("c")]
    work = Work(100, 5, "d1")
    first = choose(fleet, work, 1.0, salt=b"1")
    assert first is not None
    first.place(work, 1.0)
    assert all(choose(fleet, work, 1.0, salt=bytes([salt])) is first for salt in range(20))


def test_a_base_alone_is_spread_as_ever() -> None:
    fleet = [holding("a", "d1"), holding("b")]
    assert {choose(fleet, WORK, 1.0, salt=bytes([salt])).name for salt in range(30)} == {"a", "b"}  # type: ignore[union-attr]
