"""May this call start now? By predicted wait against the time it has left, never by a fixed queue length alone (R7).

One `Admission` guards one budget: the streams, or the unary calls, of one model. A call starts at once when a replica has room and
nobody waits; else it queues, if it is predicted to start in time; else it is refused at once, which is cheap and safe to retry.
Interactive calls go before batch ones. Inside a rank, projects take turns by the tokens they were given, so that a flood of one
delays only itself. Pure: time is an argument.
"""

import enum
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from services.chassis.errors import Shed

P = TypeVar("P")  # a placement: whatever `start` returns for a call that found room

RETRY_AFTER_MIN_S = 0.1
RETRY_AFTER_MAX_S = 30.0
SMOOTHING = 0.1  # weight of the newest call in the mean cost
KEEP = 0.9  # share of the past that each start from the line leaves: the mean of about the last ten


class Rank(enum.IntEnum):
    """Lower starts first."""

    INTERACTIVE = 0
    BATCH = 1


@dataclass(frozen=True, slots=True)
class Ask:
    """What one call asks of the fleet."""

    project_uid: str
    rank: Rank
    cost: float  # tokens, prompt and expected output
    latest_start: float  # monotonic seconds; a later start could no longer answer in time
    latest_end: float = float("inf")  # monotonic seconds; a later end is of no use to the caller
    key: bytes | None = None  # prefix affinity, for `start`
    prompt_tokens: int = 0
    adapter: str = ""  # digest, for `start`; empty: the base alone


@dataclass(slots=True, eq=False)
class Waiting(Generic[P]):
    """A call that was offered. Exactly one of `placement` and `refusal` is set in the end, then `settled` is called."""

    ask: Ask
    offered_at: float
    settled: Callable[[], None] = lambda: None
    placement: P | None = None
    refusal: Shed | None = None
    gone: bool = False


@dataclass(slots=True)
class _Flow:
    """How fast the line moves: tokens of the calls that started from it, over the time that somebody waited."""

    tokens: float = 0.0
    seconds: float = 0.0
    since: float = 0.0  # of the last start, or of when the line formed

    def started(self, cost: float, now: float) -> None:
        """The first in line has started."""
        self.tokens = self.tokens * KEEP + cost
        self.seconds = self.seconds * KEEP + max(now - self.since, 1e-6)
        self.since = now

    def wait_s(self, cost: float, now: float) -> float:
        """Seconds that so many tokens take to start. A line that has stopped counts as slower by the second. 0 until known."""
        return cost * (self.seconds + max(0.0, now - self.since)) / self.tokens if self.tokens else 0.0


@dataclass(slots=True)
class _Line(Generic[P]):
    """The calls of one project in one rank, and the tokens it was given (a virtual counter)."""

    calls: deque[Waiting[P]] = field(default_factory=deque)
    cost: float = 0.0
    given: float = 0.0


class Admission(Generic[P]):
    """The queue before one budget.

    `start(ask)` places the call on a replica with room, or returns None; it raises Shed where there is room, but the call could not
    end in time. `ready_s()` predicts the seconds until the least loaded replica would begin one more prompt; infinite when there is
    no replica.
    """

    def __init__(self, start: Callable[[Ask], P | None], ready_s: Callable[[], float] = lambda: 0.0, *, max_queued: int = 1_024) -> None:
        self._start = start
        self._ready_s = ready_s
        self._max_queued = max_queued
        self._lines: tuple[dict[str, _Line[P]], ...] = ({}, {})
        self._given: tuple[dict[str, float], ...] = ({}, {})
        self.queued = 0
        self.running = 0
        self._flow = _Flow()
        self._mean_cost = 0.0  # of a call, smoothed; 0 until one has ended

    def predicted_s(self, ask: Ask, now: float) -> float:
        """Seconds until a call like this would start if it queued now.

        From how fast the line moves, whatever holds it up: judged by the calls that run, a burst at an idle fleet would look hopeless.
        """
        ahead = own = 0.0
        projects = 1
        for rank in Rank:
            if rank > ask.rank:
                break
            for project, line in self._lines[rank].items():
                ahead += line.cost
                if project == ask.project_uid:
                    own += line.cost
                else:
                    projects += 1
        # Turns are fair: nobody waits for more than its own tokens once for each project in line.
        before = min(ahead, own * projects + ask.cost * (projects - 1))
        return max(self._flow.wait_s(before + self._mean_cost, now if self.queued else self._flow.since), self._ready_s())

    def waiting(self, rank: Rank) -> tuple[int, float]:
        """Calls of a rank in line, and their tokens."""
        lines = self._lines[rank].values()
        return sum(len(line.calls) for line in lines), sum(line.cost for line in lines)

    def would_wait_s(self, rank: Rank) -> float:
        """`predicted_s` of a newcomer with a call of mean cost; the replicas' own wait while nobody is before it."""
        ask = Ask(project_uid="", rank=rank, cost=self._mean_cost, latest_start=float("inf"))
        return self.predicted_s(ask, self._flow.since) if self._anyone_before(ask) else self._ready_s()

    def offer(self, ask: Ask, now: float, settled: Callable[[], None] = lambda: None) -> Waiting[P]:
        """Start the call, or queue it and call `settled` later. Raises Shed when it could not start, or end, in time."""
        waiting: Waiting[P] = Waiting(ask, now, settled)
        if not self._anyone_before(ask) and (placement := self._start(ask)) is not None:
            self.running += 1
            waiting.placement = placement
            return waiting
        predicted = self.predicted_s(ask, now)
        left = ask.latest_start - now
        if predicted > left:
            raise Shed(_retry_after(predicted - left))
        if self.queued >= self._max_queued:
            self._make_place(ask, predicted)
        if not self.queued:
            self._flow.since = now
        line = self._line(ask)
        line.calls.append(waiting)
        line.cost += ask.cost
        self.queued += 1
        return waiting

    def check(self, ask: Ask, now: float, room: Callable[[Ask], bool]) -> None:
        """Raise the Shed that `offer` would raise now, and change nothing. `room` tells what `start` would, without its effect."""
        if not self._anyone_before(ask) and room(ask):
            return
        predicted = self.predicted_s(ask, now)
        left = ask.latest_start - now
        if predicted > left:
            raise Shed(_retry_after(predicted - left))
        if self.queued >= self._max_queued:
            self._longest(ask, predicted)

    def withdraw(self, waiting: Waiting[P]) -> None:
        """The caller left while queued. Safe to repeat, and after a start."""
        if waiting.placement is None and waiting.refusal is None and not waiting.gone:
            waiting.gone = True
            self._lines[waiting.ask.rank][waiting.ask.project_uid].calls.remove(waiting)
            self._forget(waiting)

    def leave(self, waiting: Waiting[P], now: float, *, cost: float | None = None) -> None:
        """A started call has ended, having cost this many tokens; its place goes to the next in line."""
        self.running -= 1
        spent = max(1.0, waiting.ask.cost if cost is None else cost)
        self._mean_cost += (SMOOTHING if self._mean_cost else 1.0) * (spent - self._mean_cost)
        self.pump(now)

    def pump(self, now: float) -> None:
        """Start what has room now; refuse what can no longer start in time. Call it whenever room may have grown."""
        while (line := self._next()) is not None:
            waiting = line.calls[0]
            if waiting.ask.latest_start < now:
                self._pop(line)
                self._refuse(waiting, 0.0)
                continue
            try:
                placement = self._start(waiting.ask)
            except Shed as refusal:  # it would end too late by now; whoever is next may still be in time
                self._pop(line)
                self._refuse(waiting, refusal.retry_after_s or 0.0)
                continue
            if placement is None:
                return
            self._pop(line)
            self._flow.started(waiting.ask.cost, now)
            self._given[waiting.ask.rank][waiting.ask.project_uid] = line.given = line.given + waiting.ask.cost
            self.running += 1
            waiting.placement = placement
            waiting.settled()

    def close(self, now: float) -> None:
        """Refuse all that waits."""
        while (line := self._next()) is not None:
            self._refuse(self._pop(line), 0.0)

    def _anyone_before(self, ask: Ask) -> bool:
        return any(self._lines[rank] for rank in Rank if rank <= ask.rank)

    def _line(self, ask: Ask) -> _Line[P]:
        lines, given = self._lines[ask.rank], self._given[ask.rank]
        line = lines.get(ask.project_uid)
        if line is None:
            # A newcomer starts level with the least served in line: absence earns no credit, and owes none.
            floor = min((other.given for other in lines.values()), default=None)
            if floor is None:
                given.clear()
            line = lines[ask.project_uid] = _Line(given=max(floor or 0.0, given.get(ask.project_uid, 0.0)))
        return line

    def _next(self) -> _Line[P] | None:
        for lines in self._lines:
            if lines:
                return min(lines.values(), key=lambda line: line.given)
        return None

    def _pop(self, line: _Line[P]) -> Waiting[P]:
        waiting = line.calls.popleft()
        self._forget(waiting)
        return waiting

    def _forget(self, waiting: Waiting[P]) -> None:
        self.queued -= 1
        lines = self._lines[waiting.ask.rank]
        line = lines[waiting.ask.project_uid]
        line.cost -= waiting.ask.cost
        if not line.calls:
            del lines[waiting.ask.project_uid]

    def _refuse(self, waiting: Waiting[P], over_s: float) -> None:
        waiting.refusal = Shed(_retry_after(over_s))
        waiting.settled()

    def _make_place(self, ask: Ask, predicted: float) -> None:
        """The queue is full: the longest line gives up its newest call."""
        newest = self._longest(ask, predicted).calls.pop()
        self._forget(newest)
        self._refuse(newest, predicted)

    def _longest(self, ask: Ask, predicted: float) -> _Line[P]:
        """The longest line of the lowest rank. Raises Shed where the asker's own is as long, or of a lower rank."""
        rank, line = max(
            ((rank, line) for rank in Rank for line in self._lines[rank].values()), key=lambda item: (item[0], len(item[1].calls))
        )
        own = len(self._lines[ask.rank][ask.project_uid].calls) if ask.project_uid in self._lines[ask.rank] else 0
        if rank < ask.rank or (rank == ask.rank and len(line.calls) <= own + 1):
            raise Shed(_retry_after(predicted))
        return line


def _retry_after(over_s: float) -> float:
    return min(RETRY_AFTER_MAX_S, max(RETRY_AFTER_MIN_S, over_s))
