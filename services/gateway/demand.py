"""What a model's callers want of it, as the numbers an autoscaler steers by; and how long it takes to wake (pure).

The gateway has them, so they exist while a model has no replica. A call that waits for a model to wake is queued like any other.
"""

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

FRESH_S = 5.0  # a gateway that has not written for so long has gone, and its demand with it
WANTED_S = 30.0  # beyond the load time: so long a model stays wanted by a caller who was told to come again
LOAD_S = 60.0  # until a model has been seen to wake, and if its Service does not say
WEIGHT = 0.5  # of the last load in what the next is taken to need


class Signal(enum.StrEnum):
    """What a model may be scaled by."""

    QUEUE = "queue"  # calls that wait for a place
    INFLIGHT = "inflight"  # calls that wait or run
    KV = "kv"  # percent of the KV cache in use, summed over the replicas


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked of one model now."""

    queued: int = 0
    running: int = 0
    kv_percent: int = 0  # every gateway sees every replica's: never added up

    @property
    def active(self) -> bool:
        """Whether a replica is needed at all."""
        return self.queued > 0 or self.running > 0

    def value(self, signal: Signal) -> int:
        """The signal; at least 1 while there is any demand, so that the last replica never goes under a call, and the first comes."""
        raw = {Signal.QUEUE: self.queued, Signal.INFLIGHT: self.queued + self.running, Signal.KV: self.kv_percent}[signal]
        return max(raw, int(self.active))


def total(parts: Iterable[tuple[str, Demand]]) -> dict[str, Demand]:
    """The demand of all gateways together, by model."""
    found: dict[str, Demand] = {}
    for model, part in parts:
        so_far = found.get(model, Demand())
        found[model] = Demand(so_far.queued + part.queued, so_far.running + part.running, max(so_far.kv_percent, part.kv_percent))
    return found


@dataclass(slots=True)
class Waking:
    """One model's way from no replica to the first: since when it is under way, and how long it usually takes."""

    load_s: float = LOAD_S
    since: float | None = None  # monotonic seconds; None: it is not asleep, or nobody wants it
    wanted_until: float = float("-inf")
    seen: bool = False  # a load has been seen: what anybody else says of it counts no more

    def want(self, now: float) -> None:
        """Somebody asks for it."""
        if self.since is None:
            self.since = now
        self.wanted_until = max(self.wanted_until, now + self.load_s + WANTED_S)

    def wanted(self, now: float) -> bool:
        """Whether somebody did who may still come again."""
        return now < self.wanted_until

    def woke(self, now: float) -> float | None:
        """A replica is there. Returns the seconds that took, if it was waited for."""
        since, self.since, self.wanted_until = self.since, None, float("-inf")
        if since is None:
            return None
        took = now - since
        self.load_s = took if not self.seen else WEIGHT * took + (1 - WEIGHT) * self.load_s
        self.seen = True
        return took

    def lost_interest(self, now: float) -> None:
        """Nobody waits: what a replica takes from here on says nothing of how long it loads."""
        if not self.wanted(now):
            self.since = None

    def remaining_s(self, now: float) -> float:
        """Predicted seconds until the first replica. One that is overdue is taken to need a fifth of the wait so far again."""
        waited = 0.0 if self.since is None else now - self.since
        return max(self.load_s - waited, 0.2 * waited, 0.1)


def bare(model: str) -> str:
    """`chat` of `models/chat`: how charts and metrics name a model."""
    return model.removeprefix("models/")


def idle(models: Mapping[str, Demand]) -> bool:
    """Whether nothing is asked of anything."""
    return not any(demand.active for demand in models.values())
