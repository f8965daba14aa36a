"""What a job may become, and what is done next: pure."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.finetune.jobs import LIVE, MOVES, TERMINAL, Do, Job, Seen, State, Step, Where, allowed, attempt_name, decide

NOW = datetime(2026, 11, 25, tzinfo=UTC)
S = State


def job(state: State, **changed: object) -> Job:
    said: dict[str, object] = {
        "uid": "u", "state": state, "attempt": 1, "launched": True, "reaped": False, "claimed": True,
        "lease_time": NOW + timedelta(seconds=30), "update_time": NOW,
    }  # fmt: skip
    return Job(**(said | changed))  # type: ignore[arg-type]


RUNNING, ABSENT, PENDING = Seen(Where.RUNNING), Seen(Where.ABSENT), Seen(Where.PENDING)


@pytest.mark.parametrize(
    ("given_job", "seen", "expected"),
    [
        (job(S.QUEUED, attempt=0, reaped=True), None, Do.START),
        (job(S.QUEUED), Seen(Where.EXITED, 1), Do.REAP),  # the attempt before is cleared away first
        (job(S.QUEUED), RUNNING, Do.STOP),  # and never two at once
        (job(S.PREPARING, launched=False), ABSENT, Do.ENSURE),  # F22: asked for in SQL, not yet launched
        (job(S.PREPARING, launched=False), RUNNING, Do.ENSURE),  # F23: launched, but the reply was lost
        (job(S.PREPARING), RUNNING, Do.WAIT),
        (job(S.RUNNING), RUNNING, Do.WAIT),
        (job(S.RUNNING), ABSENT, Do.LOST),
        (job(S.RUNNING), Seen(Where.EXITED, 0), Do.LOST),  # T7: exit 0 is no success
        (job(S.RUNNING, lease_time=NOW), RUNNING, Do.STOP),
        (job(S.RUNNING, lease_time=None), RUNNING, Do.WAIT),
        (job(S.RUNNING, lease_time=NOW - timedelta(hours=1)), PENDING, Do.HOLD),  # it waits for a place: nobody could have renewed it
        (job(S.PREPARING, lease_time=NOW + timedelta(seconds=59)), PENDING, Do.HOLD),
        (job(S.PREPARING, lease_time=NOW + timedelta(seconds=61)), PENDING, Do.WAIT),
        (job(S.PREPARING, deadline=NOW), PENDING, Do.FAIL_DEADLINE),
        (job(S.RUNNING, deadline=NOW), RUNNING, Do.FAIL_DEADLINE),
        (job(S.QUEUED, reaped=True, deadline=NOW), None, Do.FAIL_DEADLINE),
        (job(S.CANCELLING), RUNNING, Do.STOP),
        (job(S.CANCELLING), Seen(Where.EXITED, 0), Do.CANCELLED),
        (job(S.PAUSING), RUNNING, Do.WAIT),
        (job(S.PAUSING, update_time=NOW - timedelta(minutes=2)), RUNNING, Do.STOP),
        (job(S.PAUSING, claimed=False), RUNNING, Do.STOP),
        (job(S.PAUSING), Seen(Where.EXITED, 0), Do.PAUSED),
        (job(S.PAUSED), Seen(Where.EXITED, 0), Do.REAP),
        (job(S.PAUSED, reaped=True, expire_time=NOW), None, Do.CANCELLED),
        (job(S.PAUSED, reaped=True), None, Do.WAIT),
        (job(S.SUCCEEDED), RUNNING, Do.STOP),
        (job(S.SUCCEEDED), Seen(Where.EXITED, 0), Do.REAP),
        (job(S.FAILED, reaped=True), None, Do.WAIT),
    ],
)
def test_the_next_step(given_job: Job, seen: Seen | None, expected: Do) -> None:
    assert decide(given_job, seen, NOW).do is expected


def test_a_disruption_is_told_from_a_crash() -> None:
    assert decide(job(S.RUNNING), Seen(Where.EXITED, 143), NOW) == Step(Do.LOST, True, "exit 143")
    assert decide(job(S.RUNNING), Seen(Where.EXITED, 75), NOW) == Step(Do.LOST, True, "exit 75")
    assert decide(job(S.RUNNING), Seen(Where.EXITED, 1), NOW) == Step(Do.LOST, False, "exit 1")
    assert decide(job(S.RUNNING), Seen(Where.EXITED, None, "node gone", disrupted=True), NOW) == Step(Do.LOST, True, "node gone")


MINUTES = st.sampled_from([None, -1, 1])
AFTER = {
    Do.START: S.PREPARING, Do.PAUSED: S.PAUSED, Do.CANCELLED: S.CANCELLED, Do.FAIL_DEADLINE: S.FAILED, Do.LOST: S.QUEUED,
}  # fmt: skip


@given(
    st.sampled_from(list(State)), st.booleans(), st.booleans(), st.booleans(), MINUTES, MINUTES,
    st.one_of(st.none(), st.builds(Seen, st.sampled_from(list(Where)), st.sampled_from([None, 0, 1, 65, 75, 137, 143]))),
)  # fmt: skip
def test_C4_every_decision_is_a_move_that_exists(
    state: State, launched: bool, reaped: bool, claimed: bool, lease: int | None, deadline: int | None, seen: Seen | None
) -> None:
    def at(minutes: int | None) -> datetime | None:
        return None if minutes is None else NOW + timedelta(minutes=minutes)

    given_job = job(
        state, launched=launched, reaped=reaped, claimed=claimed, lease_time=at(lease), deadline=at(deadline), expire_time=at(deadline)
    )
    step = decide(given_job, seen, NOW)
    if step.do in AFTER:
        assert allowed(state, AFTER[step.do])
    if step.do is Do.START:  # never beside an attempt that may still be there
        assert reaped
    assert step == decide(given_job, seen, NOW)


def test_terminal_states_are_for_good_and_every_live_one_has_a_way_out() -> None:
    assert all(not MOVES[state] for state in TERMINAL)
    for state in LIVE:
        reached, found = set(), {state}
        while found - reached:
            reached |= found
            found = {after for each in reached for after in MOVES[each]}
        assert (reached | found) & TERMINAL


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (S.SUCCEEDED, S.RUNNING), (S.CANCELLED, S.QUEUED), (S.FAILED, S.QUEUED), (S.QUEUED, S.RUNNING), (S.QUEUED, S.SUCCEEDED),
        (S.PREPARING, S.SUCCEEDED), (S.PAUSED, S.RUNNING), (S.CANCELLING, S.SUCCEEDED), (S.CANCELLING, S.QUEUED), (S.RUNNING, S.CANCELLED),
    ],
)  # fmt: skip
def test_I3_what_is_no_move_is_not_allowed(before: State, after: State) -> None:
    assert not allowed(before, after)


def test_attempts_have_one_name_each() -> None:
    assert attempt_name("u", 3) == "ft-u-a3"
    assert len({attempt_name(uid, n) for uid in ("a", "b") for n in (1, 2, 11)}) == 6
