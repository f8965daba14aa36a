"""List, watch, back off, list again: how a service follows a collection of the cluster's. Pure over two callables, `list_` and `watch`.

Synchronous, for a thread of its own: the cluster's client blocks. The view is level-triggered: a list replaces it whole, so whatever a
watch lost, doubled or told out of order is put right at the next list, at most RELIST_SECONDS later. Through an outage no more than one
request a second leaves by one Pace, however many follow with it.
"""

import enum
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

__all__ = ["Event", "Expired", "Freshness", "Kind", "Pace", "Unreachable", "follow"]

log = logging.getLogger(__name__)

T = TypeVar("T")

RELIST_SECONDS = 55.0  # a watch never lasts longer, so that what it lost is back within a minute
BACKOFF_SECONDS = (1.0, 8.0)  # first and longest pause after a failure; jobs are launched within 10 s of an outage's end
RETRY_AFTER_SECONDS = 60.0  # the longest Retry-After that is believed
SPACING_SECONDS = 1.0
BURST = 4  # requests at once while all is well: two lists and their watches


class Expired(Exception):
    """The version to watch from is too old (410): list again."""


class Unreachable(Exception):
    """The cluster did not answer, or refused; `reason` is for people. `retry_after_s`: it asked for that much patience."""

    def __init__(self, reason: str, retry_after_s: float | None = None) -> None:
        """Bound what is believed of `retry_after_s`."""
        super().__init__(reason)
        self.reason = reason
        self.retry_after_s = min(max(retry_after_s or 0.0, 0.0), RETRY_AFTER_SECONDS)


class Kind(enum.StrEnum):
    """What a watch tells of an object; BOOKMARK tells only a version."""

    ADDED = "ADDED"
    MODIFIED = "MODIFIED"
    DELETED = "DELETED"
    BOOKMARK = "BOOKMARK"


@dataclass(frozen=True, slots=True)
class Event(Generic[T]):
    """One line of a watch. `key` and `object` mean nothing in a bookmark."""

    kind: Kind
    key: str
    object: T | None
    version: str


@dataclass(eq=False)
class Pace:
    """One request a second and a few at once; a failure spends what was saved, so an outage sees one a second and no more.

    Shared by all that ask one API server: those who follow wait for their turn, and a command asks whether it may go at once. Safe from
    several threads.
    """

    spacing_s: float = SPACING_SECONDS
    burst: int = BURST
    clock: Callable[[], float] = time.monotonic
    _next: float = field(default=float("-inf"))  # the next turn, but for those that were saved
    _down: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> float:
        """Claim the next request's turn; seconds to wait for it."""
        with self._lock:
            now = self.clock()
            saved = 0 if self._down else self.burst - 1
            turn = max(self._next, now - saved * self.spacing_s)
            self._next = turn + self.spacing_s
            return max(0.0, turn - now)

    def go(self) -> bool:
        """Whether a command may be sent now: always while all is well, once a turn through an outage."""
        with self._lock:
            now = self.clock()
            if not self._down:
                return True
            if self._next > now:
                return False
            self._next = now + self.spacing_s
            return True

    def answered(self) -> None:
        """All is well: commands go freely."""
        with self._lock:
            self._down = False

    def failed(self, retry_after_s: float = 0.0) -> None:
        """Spend what was saved: the next turn is a spacing away, or as long as was asked for."""
        with self._lock:
            self._down = True
            self._next = max(self._next, self.clock() + max(self.spacing_s, retry_after_s))


@dataclass(eq=False)
class Freshness:
    """When the cluster last answered, and what it said when it did not. Safe from several threads."""

    clock: Callable[[], float] = time.monotonic
    trouble: str = ""  # why the last request failed; empty: it did not
    _heard: float | None = None

    def heard(self) -> None:
        """The view is as of now."""
        self._heard, self.trouble = self.clock(), ""

    def failed(self, error: Exception) -> None:
        """It is older than it should be."""
        self.trouble = str(error) or type(error).__name__

    @property
    def age_s(self) -> float | None:
        """Seconds since the last answer; None: there was none yet."""
        return None if self._heard is None else self.clock() - self._heard


def follow(
    list_: Callable[[], tuple[Mapping[str, T], str]],
    watch: Callable[[str], Iterator[Event[T]]],
    seen: Callable[[Mapping[str, T]], None],
    *,
    stopped: threading.Event,
    heard: Callable[[], None] = lambda: None,
    failed: Callable[[Exception], None] = lambda error: None,
    pace: Pace | None = None,
    wait: Callable[[float], object] | None = None,
    clock: Callable[[], float] = time.monotonic,
    chance: Callable[[], float] = random.random,
) -> None:
    """Keep a view of a collection until `stopped`; it never raises for the cluster's sake.

    Args:
        list_: all objects by key, and their version.
        watch: changes since a version. It must end by itself, or raise, within RELIST_SECONDS, silence included.
        seen: gets the whole view after each list and each change; do not keep it, it changes.
        stopped: ends the loop at the next event or the end of a pause.
        heard: the cluster has answered: the view is as of now.
        failed: it has not; the view stays, and ages.
        pace: shared with whoever else asks this cluster.
        wait: sleeps for seconds; `stopped.wait` unless a test drives time.
        clock: monotonic seconds.
        chance: 0 to 1, the jitter.
    """
    pace = pace or Pace(clock=clock)
    wait = wait or stopped.wait
    pause = 0.0
    while not stopped.is_set():
        try:
            _turn(pace, wait)
            if stopped.is_set():
                return
            listed = clock()
            found, version = list_()
            view = dict(found)
            pace.answered()
            heard()
            seen(view)
            _turn(pace, wait)
            for event in () if stopped.is_set() else watch(version):
                pause = 0.0  # only a watch that tells something says that all is well
                pace.answered()
                heard()
                if _apply(view, event):
                    seen(view)
                if stopped.is_set() or clock() - listed > RELIST_SECONDS:
                    break
            else:
                heard()
            pause = 0.0
        except Expired:
            pace.failed()
        except Exception as error:
            if not isinstance(error, Unreachable):
                log.exception("a view of the cluster failed on our side")
            asked = error.retry_after_s if isinstance(error, Unreachable) else 0.0
            pace.failed(asked)
            failed(error)
            first, longest = BACKOFF_SECONDS
            pause = min(longest, max(first, pause * 2))
            wait(max(pause * (0.5 + chance() / 2), asked))


def _turn(pace: Pace, wait: Callable[[float], object]) -> None:
    seconds = pace.take()
    if seconds > 0:
        wait(seconds)


def _apply(view: dict[str, T], event: Event[T]) -> bool:
    """Whether the event changed the view."""
    if event.kind == Kind.BOOKMARK:
        return False
    if event.kind == Kind.DELETED or event.object is None:
        return view.pop(event.key, None) is not None
    view[event.key] = event.object
    return True
