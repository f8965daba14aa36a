"""Admission in virtual time: offers, starts and endings are plain calls."""

import heapq
import itertools
import random
from collections import Counter

import pytest

from services.chassis.errors import Shed
from services.gateway.admission import Admission, Ask, Rank, Waiting


class Slots:
    """A fleet with `size` places."""

    def __init__(self, size: int) -> None:
        self.size, self.taken = size, 0

    def start(self, ask: Ask) -> str | None:
        if self.taken == self.size:
            return None
        self.taken += 1
        return ask.project_uid

    def free(self) -> None:
        self.taken -= 1


def ask(project: str = "p", *, by: float = 100.0, rank: Rank = Rank.INTERACTIVE, cost: float = 10.0) -> Ask:
    return Ask(project, rank, cost, by)


def test_starts_at_once_when_there_is_room() -> None:
    slots = Slots(1)
    assert Admission(slots.start).offer(ask(), 0.0).placement == "p"


def test_the_next_in_line_starts_when_one_leaves() -> None:
    slots = Slots(1)
    admission = Admission(slots.start)
    first = admission.offer(ask(), 0.0)
    told: list[str] = []
    second = admission.offer(ask(), 0.0, lambda: told.append("started"))
    assert second.placement is None and admission.queued == 1
    slots.free()
    admission.leave(first, 1.0)
    assert second.placement == "p" and told == ["started"] and admission.queued == 0


def test_R7_refused_at_once_when_it_could_not_start_in_time() -> None:
    slots = Slots(1)
    admission = Admission(slots.start)
    first = admission.offer(ask(), 0.0)
    admission.offer(ask(by=99.0), 0.0)
    slots.free()
    admission.leave(first, 2.0)  # the line moves by a call in two seconds
    admission.offer(ask(by=99.0), 2.0)
    with pytest.raises(Shed) as refused:
        admission.offer(ask(by=3.0), 2.0)
    assert refused.value.retry_after_s == pytest.approx(3.0)
    assert admission.queued == 1


def test_a_burst_at_an_idle_fleet_is_judged_by_how_fast_it_starts_not_by_the_few_that_run() -> None:
    slots = Slots(1)
    admission = Admission(slots.start)
    slow = admission.offer(ask(), 0.0)
    slots.free()
    admission.leave(slow, 100.0)  # the only call so far took long
    burst = [admission.offer(ask(by=110.0), 100.0) for _ in range(5)]
    for at in (100.1, 100.2, 100.3, 100.4):  # a prompt every tenth of a second, whatever its answer takes
        slots.size += 1
        admission.pump(at)
    assert all(each.placement for each in burst)
    assert admission.offer(ask(by=101.0), 100.4).refusal is None


def test_a_line_that_stands_still_is_judged_by_it() -> None:
    slots = Slots(1)
    admission = Admission(slots.start)
    admission.offer(ask(), 0.0)
    admission.offer(ask(), 0.0)
    slots.size += 1
    admission.pump(1.0)
    admission.offer(ask(), 1.0)
    assert admission.predicted_s(ask(), 11.0) > 10 > admission.predicted_s(ask(), 1.0)


def test_F31_a_call_that_would_end_too_late_is_refused_and_the_next_one_starts() -> None:
    room = Slots(1)

    def start(asked: Ask) -> str | None:
        if room.taken < room.size and asked.latest_end < 10.0:
            raise Shed(0.5)
        return room.start(asked)

    admission: Admission[str] = Admission(start)
    running = admission.offer(ask(), 0.0)
    late = admission.offer(Ask("p", Rank.INTERACTIVE, 10.0, 100.0, latest_end=9.0), 0.0)
    behind = admission.offer(ask(), 0.0)
    room.free()
    admission.leave(running, 1.0)
    assert late.refusal is not None and late.refusal.retry_after_s == 0.5 and behind.placement == "p"
    assert admission.queued == 0
    room.free()
    admission.leave(behind, 2.0)
    with pytest.raises(Shed):
        admission.offer(Ask("p", Rank.INTERACTIVE, 10.0, 100.0, latest_end=9.0), 2.0)
    assert admission.running == 0


def test_R7_the_replicas_own_queue_counts() -> None:
    admission: Admission[str] = Admission(lambda ask: None, lambda: 7.0)
    with pytest.raises(Shed):
        admission.offer(ask(by=5.0), 0.0)
    assert admission.offer(ask(by=8.0), 0.0).placement is None


def test_no_replica_refuses_at_once() -> None:
    admission: Admission[str] = Admission(lambda ask: None, lambda: float("inf"))
    with pytest.raises(Shed):
        admission.offer(ask(by=1e9), 0.0)


def test_interactive_before_batch() -> None:
    slots = Slots(1)
    admission = Admission(slots.start)
    running = admission.offer(ask(), 0.0)
    batch = admission.offer(ask(rank=Rank.BATCH), 0.0)
    interactive = admission.offer(ask(), 0.1)
    slots.free()
    admission.leave(running, 1.0)
    assert interactive.placement and not batch.placement


def test_a_withdrawn_call_leaves_no_trace_and_may_be_withdrawn_twice() -> None:
    slots = Slots(1)
    admission = Admission(slots.start)
    running = admission.offer(ask(), 0.0)
    waiting = admission.offer(ask(), 0.0)
    admission.withdraw(waiting)
    admission.withdraw(waiting)
    assert admission.queued == 0
    slots.free()
    admission.leave(running, 1.0)
    assert waiting.placement is None and slots.taken == 0
    admission.withdraw(running)


def test_a_call_that_waited_too_long_is_refused_not_started() -> None:
    slots = Slots(1)
    admission = Admission(slots.start)
    running = admission.offer(ask(), 0.0)
    late = admission.offer(ask(by=1.0), 0.0)
    slots.free()
    admission.leave(running, 5.0)
    assert late.placement is None and isinstance(late.refusal, Shed) and slots.taken == 0


def test_a_full_queue_takes_from_the_longest_line() -> None:
    slots = Slots(0)
    admission = Admission(slots.start, max_queued=10)
    flood = [admission.offer(ask("flood"), 0.0) for _ in range(10)]
    with pytest.raises(Shed):
        admission.offer(ask("flood"), 0.0)
    assert admission.offer(ask("quiet"), 0.0).refusal is None
    assert flood[-1].refusal is not None and flood[0].refusal is None
    assert admission.queued == 10


def test_fairness_a_quiet_project_waits_for_its_turn_not_for_the_flood() -> None:
    slots = Slots(1)
    admission = Admission(slots.start)
    running = admission.offer(ask("flood"), 0.0)
    flood = [admission.offer(ask("flood"), 0.0) for _ in range(50)]
    quiet = [admission.offer(ask("quiet"), 0.0) for _ in range(3)]
    for now in range(1, 8):
        slots.free()
        admission.leave(running, float(now))
        running = next(w for w in [*quiet, *flood] if w.placement and w is not running and not w.gone)
        running.gone = True
    assert all(w.placement for w in quiet)


def test_close_refuses_all_that_waits() -> None:
    admission = Admission(Slots(0).start)
    waiting = [admission.offer(ask(rank=rank), 0.0) for rank in (Rank.INTERACTIVE, Rank.BATCH, Rank.BATCH)]
    admission.close(1.0)
    assert all(w.refusal for w in waiting) and admission.queued == 0


class Simulation:
    """`size` servers, calls of 0.1 to 0.3 s that want to be answered within 1 s of their arrival."""

    def __init__(self, size: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.slots = Slots(size)
        self.admission: Admission[str] = Admission(self.slots.start)
        self.events: list[tuple[float, int, Waiting[str]]] = []
        self.order = itertools.count()
        self.good: list[float] = []
        self.refused = 0
        self.by_project: Counter[str] = Counter()
        self.capacity = size / 0.2

    def offer(self, now: float, project: str = "p") -> None:
        waiting: list[Waiting[str]] = []
        began: list[float] = []

        def settled() -> None:
            if waiting and waiting[0].placement and not began:
                began.append(self.now)
                self.begin(waiting[0])

        self.now = now
        try:
            waiting.append(self.admission.offer(Ask(project, Rank.INTERACTIVE, 10.0, now + 0.7), now, settled))
        except Shed:
            self.refused += 1
            return
        settled()

    def begin(self, waiting: Waiting[str]) -> None:
        heapq.heappush(self.events, (self.now + self.rng.uniform(0.1, 0.3), next(self.order), waiting))

    def run(self, until: float, per_s: float, start: float, project: str = "p") -> None:
        now = start
        while True:
            now += self.rng.expovariate(per_s)
            self.advance(min(now, until))
            if now >= until:
                return
            self.offer(now, project)

    def advance(self, to: float) -> None:
        while self.events and self.events[0][0] <= to:
            self.now, _, waiting = heapq.heappop(self.events)
            self.slots.free()
            if self.now <= waiting.offered_at + 1.0:
                self.good.append(self.now)
                self.by_project[waiting.ask.project_uid] += 1
            self.admission.leave(waiting, self.now)
        self.now = to

    def goodput(self, start: float, end: float) -> float:
        return sum(start <= at < end for at in self.good) / (end - start)


def test_admission_simulation_F31_goodput_holds_at_five_times_the_load_and_returns() -> None:
    calm = Simulation(16, seed=1)
    calm.run(30.0, calm.capacity, 0.0)
    storm = Simulation(16, seed=2)
    storm.run(30.0, storm.capacity, 0.0)
    storm.run(60.0, 5 * storm.capacity, 30.0)
    storm.run(90.0, 0.8 * storm.capacity, 60.0)
    once = calm.goodput(5.0, 30.0)
    assert storm.goodput(35.0, 60.0) >= 0.95 * once
    assert storm.goodput(65.0, 90.0) >= 0.95 * 0.8 * once, "not back five seconds after the storm"
    assert storm.refused > 0
    assert storm.goodput(30.0, 35.0) >= 0.90 * once, "the onset may cost a little"


def test_F31_a_flood_does_not_starve_a_quiet_project() -> None:
    fleet = Simulation(8, seed=3)
    now, offered = 0.0, 0
    next_quiet = 0.5
    while now < 30.0:
        now += fleet.rng.expovariate(20 * fleet.capacity / 4)
        while next_quiet <= now:
            fleet.advance(next_quiet)
            fleet.offer(next_quiet, "quiet")
            offered += 1
            next_quiet += 0.1  # a quarter of the capacity
        fleet.advance(now)
        fleet.offer(now, "flood")
    fleet.advance(40.0)
    assert fleet.by_project["quiet"] >= 0.97 * offered


@pytest.mark.parametrize("seed", range(20))
def test_R7_a_check_refuses_exactly_what_an_offer_would_and_changes_nothing(seed: int) -> None:
    """Most refusals are told by `check` alone, before any books are opened."""
    chance = random.Random(seed)
    slots = Slots(3)
    admission = Admission(slots.start, lambda: 0.5, max_queued=12)
    running: list[Waiting[str]] = []
    told = Counter[bool]()
    for now in range(120):
        asked = ask(chance.choice("abc"), by=now + chance.choice([0.1, 2.0, 8.0, 50.0]), rank=chance.choice(list(Rank)))
        before = (admission.queued, admission.running, slots.taken, [admission.waiting(rank) for rank in Rank])
        try:
            admission.check(asked, now, lambda _: slots.taken < slots.size)
            refused = False
        except Shed:
            refused = True
        assert before == (admission.queued, admission.running, slots.taken, [admission.waiting(rank) for rank in Rank])
        try:
            running.append(admission.offer(asked, now))
            assert not refused
        except Shed:
            assert refused
        told[refused] += 1
        started = [waiting for waiting in running if waiting.placement is not None]
        if started and chance.random() < 0.4:
            running.remove(started[0])
            slots.free()
            admission.leave(started[0], now)
    assert told[True] and told[False]
