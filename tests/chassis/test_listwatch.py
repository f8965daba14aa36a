"""Following a collection of the cluster's: whatever a watch does, the view is right within a minute, and nothing is hammered."""

import itertools
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest

from services.chassis.listwatch import Event, Expired, Freshness, Kind, Pace, Unreachable, follow

Change = tuple[float, str, str | None]  # when, key, what it is from then on; None: gone
LATE_S = 65.0  # F21
FAULTS = ("refused", "silent", "expired", "closing", "deaf", "doubled", "reordered", "broken")


@dataclass
class World:
    """A collection that changes as planned, and its API, in a time of its own: whoever waits, or is kept waiting, moves the clock."""

    plan: Sequence[Change]
    fault: Callable[[float], str] = lambda now: ""
    ends: float = 400.0
    now: float = 0.0
    asked: list[float] = field(default_factory=list)  # when requests were sent
    views: list[tuple[float, dict[str, str]]] = field(default_factory=list)
    failures: list[tuple[float, str]] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)

    def follow(self) -> Freshness:
        """Follow until the end; how fresh the view is then."""
        fresh, pace = Freshness(clock=lambda: self.now), Pace(clock=lambda: self.now)

        def failed(error: Exception) -> None:
            fresh.failed(error)
            self.failures.append((self.now, str(error)))

        follow(
            self.list,
            self.watch,
            self.seen,
            stopped=self.stopped,
            heard=fresh.heard,
            failed=failed,
            pace=pace,
            wait=self.pass_,
            clock=lambda: self.now,
            chance=random.Random(1).random,
        )
        return fresh

    def pass_(self, seconds: float) -> None:
        self.now += seconds
        if self.now >= self.ends:
            self.stopped.set()

    def seen(self, view: Mapping[str, str]) -> None:
        self.views.append((self.now, dict(view)))

    def version(self) -> int:
        return sum(when <= self.now for when, _, _ in self.plan)

    def truth(self, when: float | None = None) -> dict[str, str]:
        found: dict[str, str] = {}
        for at, key, value in self.plan:
            if at <= (self.now if when is None else when):
                found.pop(key, None)
                found |= {} if value is None else {key: value}
        return found

    def _ask(self) -> None:
        self.asked.append(self.now)
        match self.fault(self.now):
            case "refused":
                raise Unreachable("connection refused")
            case "silent":
                self.pass_(10.0)
                raise Unreachable("read timed out")
            case "busy":
                raise Unreachable("HTTP 429", 20.0)
            case "broken":
                raise KeyError("metadata")

    def list(self) -> tuple[dict[str, str], str]:
        self._ask()
        return self.truth(), str(self.version())

    def watch(self, version: str) -> Iterator[Event[str]]:
        self._ask()
        told, until = int(version), self.now + 50.0
        while self.now < until and not self.stopped.is_set():
            self.pass_(0.5)
            fault = self.fault(self.now)
            if fault in ("refused", "silent", "broken"):
                raise Unreachable("the connection broke")
            if fault == "expired":
                raise Expired("too old resource version")
            if fault == "closing":
                return
            news = [self._event(change) for change in self.plan[told : self.version()]]
            told = self.version()
            if fault == "deaf":
                continue  # what was to be told now is told never
            news = news * 2 if fault == "doubled" else news[::-1] if fault == "reordered" else news
            yield from news or [Event(Kind.BOOKMARK, "", None, str(told))]

    def _event(self, change: Change) -> Event[str]:
        _, key, value = change
        return Event(Kind.MODIFIED if value else Kind.DELETED, key, value, "")


def outage(begins: float, ends: float, kind: str = "refused") -> Callable[[float], str]:
    return lambda now: kind if begins <= now < ends else ""


def random_plan(chance: random.Random, until: float) -> list[Change]:
    times = sorted(chance.uniform(0, until) for _ in range(chance.randint(5, 60)))
    return [(when, chance.choice("abcdef"), chance.choice((None, f"v{when:.0f}"))) for when in times]


def test_a_change_is_in_the_view_as_soon_as_it_is_told() -> None:
    world = World([(0, "a", "1"), (10, "b", "1"), (20, "a", "2"), (30, "b", None)], ends=45.0)
    world.follow()
    assert [(round(when), view) for when, view in world.views] == [
        (0, {"a": "1"}), (10, {"a": "1", "b": "1"}), (20, {"a": "2", "b": "1"}), (30, {"a": "2"}),
    ]  # fmt: skip
    assert len(world.asked) == 2


def test_F21_two_hundred_scripts_of_bad_watches_are_healed_within_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    for seed in range(200):
        chance = random.Random(seed)
        spells = [(begins := chance.uniform(0, 250), begins + chance.uniform(0, 50), chance.choice(FAULTS)) for _ in range(6)]
        spell = lambda now, spells=spells: next((which for begins, ends, which in spells if begins <= now < ends), "")  # noqa: E731
        world = World(random_plan(chance, 300.0), spell, ends=300.0 + LATE_S)
        world.follow()
        assert world.views[-1][1] == world.truth(), seed
        # A second more or less: the pace is of whole seconds, and four may go at once while all is well.
        for first, last in zip(world.asked, world.asked[5:], strict=False):
            assert last - first >= 1.0, seed


def test_F19_an_outage_of_ten_minutes_sees_a_request_a_second_at_most_and_is_over_in_ten() -> None:
    for kind in ("refused", "silent", "busy"):
        world = World([(0, "a", "1"), (610, "b", "1")], outage(60, 660, kind), ends=720.0)
        fresh = world.follow()
        during = [when for when in world.asked if 60 <= when < 660]
        assert during
        assert all(later - earlier >= 1.0 for earlier, later in itertools.pairwise(during)), kind
        back = next(when for when, view in world.views if when >= 660)
        assert back < 670 + (20 if kind == "busy" else 0), kind
        assert [view for when, view in world.views if 60 <= when < 660] == [], "the last view stays as it was"
        assert (fresh.trouble, fresh.age_s) == ("", 0.0)


def test_F20_a_server_that_asks_for_patience_gets_it() -> None:
    world = World([(0, "a", "1")], outage(60, 200, "busy"), ends=300.0)
    world.follow()
    during = [when for when in world.asked if 60 <= when < 200]
    assert all(later - earlier >= 20.0 for earlier, later in itertools.pairwise(during))


def test_one_that_is_idle_costs_a_list_and_a_watch_a_minute() -> None:
    world = World([(0, "a", "1")], ends=600.0)
    world.follow()
    assert len(world.asked) <= 2 * 600 / 50


def test_the_age_of_a_view_grows_while_nobody_answers() -> None:
    world = World([(0, "a", "1")], outage(60, 10_000), ends=360.0)
    fresh = world.follow()
    assert fresh.age_s is not None
    assert 295 < fresh.age_s < 320
    assert fresh.trouble == "connection refused"


def test_a_fault_of_our_own_is_told_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    world = World([(0, "a", "1")], outage(0, 5, "broken"), ends=60.0)
    world.follow()
    assert world.views[0][1] == {"a": "1"}
    assert world.failures
    assert "failed on our side" in caplog.text


def test_a_stop_ends_it_at_the_next_event() -> None:
    world = World([(0, "a", "1"), (10, "b", "1"), (20, "c", "1")])
    world.seen = lambda view: world.stopped.set() if "b" in view else None  # type: ignore[method-assign]
    world.follow()
    assert world.now == 10.0


def test_commands_go_freely_while_all_is_well_and_one_a_second_through_an_outage() -> None:
    now = [100.0]
    pace = Pace(clock=lambda: now[0])
    assert all(pace.go() for _ in range(100))
    pace.failed()
    assert not pace.go()
    now[0] += 1.0
    assert [pace.go() for _ in range(3)] == [True, False, False]
    now[0] += 1.0
    assert pace.take() == 0.0
    assert not pace.go(), "who follows has this second's turn"
    assert pace.take() == 1.0
    pace.answered()
    assert all(pace.go() for _ in range(100))


def test_two_that_follow_share_the_one_request_a_second_of_an_outage() -> None:
    now = [0.0]
    pace = Pace(clock=lambda: now[0])
    pace.failed()
    now[0] = 60.0
    assert [pace.take() for _ in range(3)] == [0.0, 1.0, 2.0]


def test_patience_that_is_asked_for_has_a_bound() -> None:
    assert Unreachable("busy", 86_400).retry_after_s == 60.0
    assert Unreachable("busy", -1).retry_after_s == 0.0
    assert Unreachable("busy").retry_after_s == 0.0
