"""Which replica gets the next call: the one that would finish it first, judged from its load and from what we just sent it.

Pure: time comes in as monotonic seconds, load as values. A replica that fails is ejected, probed and ramped back (R9, F7).
"""

import enum
import hashlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median

# Until a replica has measured itself and none of its peers has: any positive value ranks equals as equals.
ASSUMED_PREFILL_TOKENS_PER_S = 1_000.0
ASSUMED_DECODE_TOKENS_PER_S = 100.0
BACKLOG_WEIGHT = 0.25  # of the time all of a replica's tokens take, beside the time of the answer itself
VISIBLE_AFTER_S = 0.3  # three load reports: by then the replica counts a call itself, even one that never says Started
CONSECUTIVE_FAILURES = 5
WINDOW = 20  # calls; ejected at half of them failed
EJECTED_S = 5.0  # doubled with each ejection in a row
EJECTED_CAP_S = 20.0
FULL_SHARE = 0.9  # of the fullest batch seen: one so full tells what the replica can do now
FORGET = 0.02  # of its best rate, with each report of a full batch that was slower
RAMP_S = 8.0  # after a probe succeeds, its share grows over this time
PANIC_SHARE = 0.5  # never eject more than this share of the reachable
ADAPTER_LOAD_S = 0.4  # taken to fetch, verify and load an adapter that a replica does not hold
PREFIX_BYTES = 1_024
PREFIX_MIN_BYTES = 128  # a shorter prefix fills no KV block worth travelling for


@dataclass(frozen=True, slots=True)
class Load:
    """What a replica last said about itself. Rates are measured by it; 0 until known."""

    queued_tokens: int = 0
    running_tokens: int = 0
    waiting_sequences: int = 0
    running_sequences: int = 0
    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float = 0.0
    step_s: float = 0.0  # of the recent steps, each of which gives every running sequence a token
    batch: int = 0  # sequences in the last step
    draining: bool = False
    adapters: frozenset[str] = frozenset()  # digests of the loaded ones
    kv_used: float = 0.0  # share of the KV cache that no new sequence could have


@dataclass(frozen=True, slots=True)
class Work:
    """The price of one call in tokens: its prompt, and the output it will probably write."""

    prompt_tokens: int
    output_tokens: int
    adapter: str = ""  # digest; empty: the base alone


class Standing(enum.Enum):
    """What the calls of the recent past say about a replica."""

    TRUSTED = enum.auto()
    EJECTED = enum.auto()
    PROBING = enum.auto()  # one call at a time until one succeeds
    RAMPING = enum.auto()


@dataclass(slots=True)
class Placed:
    """A call that was sent to a replica."""

    work: Work
    at: float
    started_at: float | None = None
    probe: bool = False


@dataclass(slots=True)
class Replica:
    """One replica as routing sees it. `reachable` is the word of its connection and health, the rest our own experience."""

    name: str
    reachable: bool = False
    load: Load = Load()
    in_flight: dict[int, Placed] = field(default_factory=dict)
    standing: Standing = Standing.TRUSTED
    best: tuple[int, float] = (0, 0.0)  # sequences of the fullest batch it has reported, and its best tokens a second
    _load_at: float = float("-inf")
    _failures: int = 0
    _window: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))
    _ejections: int = 0
    _until: float = 0.0
    _next: int = 0

    def report(self, load: Load, now: float) -> None:
        """Take a load report that arrived at `now`."""
        self.load = load
        self._load_at = now
        batch, rate = self.best
        if load.decode_tokens_per_s >= rate or load.batch >= FULL_SHARE * batch:
            self.best = (max(batch, load.batch), max(load.decode_tokens_per_s, (1 - FORGET) * rate))

    def place(self, work: Work, now: float) -> int:
        """Note a call sent at `now`; the number returned names it in `started` and `ended`."""
        self._next += 1
        self.in_flight[self._next] = Placed(work, now, probe=self.standing is Standing.PROBING)
        return self._next

    def started(self, call: int, now: float) -> None:
        """The replica has tokenised and queued the call: its next load report counts it."""
        if placed := self.in_flight.get(call):
            placed.started_at = now

    def ended(self, call: int, now: float, *, failed: bool | None) -> None:
        """Forget a call. `failed` is None when the ending says nothing about the replica (a cancel, a refused value)."""
        self.in_flight.pop(call, None)
        if failed is None:
            return
        self._window.append(failed)
        self._failures = self._failures + 1 if failed else 0
        if self.standing is Standing.PROBING:
            if failed:
                self._eject(now)
            else:
                self.standing = Standing.RAMPING
                self._until = now + RAMP_S
                self._window.clear()
        elif self.standing is not Standing.EJECTED and failed and self._is_outlier():
            self._eject(now)

    def _is_outlier(self) -> bool:
        return self._failures >= CONSECUTIVE_FAILURES or (len(self._window) == WINDOW and 2 * sum(self._window) >= WINDOW)

    def _eject(self, now: float) -> None:
        self._ejections += 1
        self.standing = Standing.EJECTED
        self._until = now + min(EJECTED_CAP_S, EJECTED_S * 2 ** (self._ejections - 1))
        self._failures = 0
        self._window.clear()

    def tick(self, now: float) -> None:
        """Let time pass: an ejection ends in a probe, a ramp ends in trust."""
        if now < self._until:
            return
        if self.standing is Standing.EJECTED:
            self.standing = Standing.PROBING
        elif self.standing is Standing.RAMPING:
            self.standing = Standing.TRUSTED
            self._ejections = 0

    def share(self, now: float) -> float:
        """0..1: how much of a trusted replica's share it may have."""
        match self.standing:
            case Standing.TRUSTED:
                return 1.0
            case Standing.RAMPING:
                return min(1.0, max(0.1, 1 - (self._until - now) / RAMP_S))
            case Standing.PROBING:
                return 0.0 if any(placed.probe for placed in self.in_flight.values()) else 1.0
            case Standing.EJECTED:
                return 0.0

    def holds(self, adapter: str) -> bool:
        """It said that it has the adapter loaded, or a call of ours has made it load it."""
        return adapter in self.load.adapters or any(placed.work.adapter == adapter for placed in self.in_flight.values())

    def unseen(self) -> Work:
        """Tokens we sent that its last load report cannot have counted yet."""
        prompt = output = 0
        for placed in self.in_flight.values():
            seen_at = placed.at + VISIBLE_AFTER_S if placed.started_at is None else placed.started_at
            if self._load_at < seen_at:
                prompt += placed.work.prompt_tokens
                output += placed.work.output_tokens
        return Work(prompt, output)


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens a second of one replica, both above 0."""

    prefill: float
    decode: float


def rates(replica: Replica, peers: Iterable[Replica]) -> Rates:
    """What it measured; where it has measured nothing, the median of its peers."""
    known = [peer.load for peer in peers]

    def settled(own: float, others: list[float], assumed: float) -> float:
        return own if own > 0 else median(others) if others else assumed

    return Rates(
        settled(
            replica.load.prefill_tokens_per_s,
            [load.prefill_tokens_per_s for load in known if load.prefill_tokens_per_s > 0],
            ASSUMED_PREFILL_TOKENS_PER_S,
        ),
        settled(
            replica.load.decode_tokens_per_s,
            [load.decode_tokens_per_s for load in known if load.decode_tokens_per_s > 0],
            ASSUMED_DECODE_TOKENS_PER_S,
        ),
    )


def start_s(replica: Replica, peers: Iterable[Replica]) -> float:
    """Predicted seconds until the replica begins the prompt of one more call."""
    return (replica.load.queued_tokens + replica.unseen().prompt_tokens) / rates(replica, peers).prefill


def token_s(replica: Replica) -> float:
    """Predicted seconds a token of each stream once one more runs; 0 while the replica has told nothing of its steps.

    As fast as now, but all together no faster than the replica has ever been. Beyond the fullest batch it has shown, more streams are
    taken to cost nothing: a call that is let in shows whether that is so, one that is refused shows nothing.
    """
    streams = 1 + max(len(replica.in_flight), replica.load.running_sequences + replica.load.waiting_sequences)
    batch, tokens_per_s = replica.best
    return max(replica.load.step_s, min(streams, batch) / tokens_per_s if tokens_per_s else 0.0)


def answer_s(replica: Replica, work: Work, peers: Iterable[Replica]) -> float:
    """Predicted seconds until one more call would have its whole answer, among the calls the replica has."""
    prompt_s = work.prompt_tokens / rates(replica, peers).prefill
    return start_s(replica, peers) + prompt_s + work.output_tokens * token_s(replica)


def backlog_s(replica: Replica, work: Work, peers: Sequence[Replica]) -> float:
    """Seconds all its tokens and `work` would take at the fleet's usual rate: what spreads calls over replicas that are equally fast.

    Not at its own rate: a replica that runs many streams writes more tokens a second than an idle one of the same make, and would
    be sent ever more of them.
    """
    known = [peer.best[1] for peer in peers if peer.best[1] > 0]
    output = replica.load.running_tokens + replica.unseen().output_tokens + work.output_tokens
    return output / (median(known) if known else ASSUMED_DECODE_TOKENS_PER_S)


def cost_s(replica: Replica, work: Work, peers: Sequence[Replica]) -> float:
    """What one more call costs there: the time of its answer; between replicas about as fast, the backlog decides.

    Loading an adapter costs as much as the time it takes: calls meet where it is, until the line there is longer than that.
    """
    load_s = ADAPTER_LOAD_S if work.adapter and not replica.holds(work.adapter) else 0.0
    return load_s + answer_s(replica, work, peers) + BACKLOG_WEIGHT * backlog_s(replica, work, peers)


def usable(replicas: Sequence[Replica], now: float) -> list[Replica]:
    """The reachable ones that experience does not bar; all the reachable if that would leave less than half of them (panic)."""
    reachable = [replica for replica in replicas if replica.reachable and not replica.load.draining]
    for replica in reachable:
        replica.tick(now)
    trusted = [replica for replica in reachable if replica.share(now) > 0]
    barred = sum(replica.standing is Standing.EJECTED for replica in reachable)
    return reachable if barred > PANIC_SHARE * len(reachable) else trusted


def affinity(project_uid: str, prefix: bytes) -> bytes | None:
    """The key under which calls that share a prompt's beginning meet on one replica; None when it is too short to matter."""
    if len(prefix) < PREFIX_MIN_BYTES:
        return None
    return hashlib.blake2b(prefix[:PREFIX_BYTES], key=project_uid.encode()[:64], digest_size=16).digest()


def _weight(key: bytes, name: str) -> bytes:
    return hashlib.blake2b(name.encode(), key=key[:64], digest_size=8).digest()


def choose(
    replicas: Sequence[Replica],
    work: Work,
    now: float,
    *,
    key: bytes | None = None,
    salt: bytes = b"\0",
    without: frozenset[str] = frozenset(),
    retry: bool = False,
) -> Replica | None:
    """The replica to send `work` to, or None when there is none.

    `key` (see `affinity`) prefers its rendezvous replica while that costs less than the prefill it may save; `salt` spreads ties;
    `without` names those that are full or that this call has failed on; a `retry` is never a probe.
    """
    candidates = [replica for replica in usable(replicas, now) if replica.name not in without]
    if not candidates:
        return None
    probing = next((r for r in candidates if r.standing is Standing.PROBING and r.share(now) > 0), None)
    if probing is not None and not retry:  # the first try may probe: it can still fail over
        return probing
    # A ramping replica looks as much slower as its share is smaller.
    cost = {r.name: cost_s(r, work, candidates) / max(r.share(now), 0.1) for r in candidates}
    best = min(candidates, key=lambda r: (cost[r.name], _weight(salt, r.name)))
    if key is not None:
        home = max(candidates, key=lambda r: _weight(key, r.name))
        if cost[home.name] - cost[best.name] <= work.prompt_tokens / rates(best, candidates).prefill:
            return home
    return best


@dataclass(slots=True)
class RetryBudget:
    """Retries at most `ratio` of first attempts, `most` of them at once: enough to pass over a replica until it is ejected (R8)."""

    ratio: float = 0.1
    most: float = 2.0 * CONSECUTIVE_FAILURES
    _tokens: float = 2.0 * CONSECUTIVE_FAILURES

    def attempted(self) -> None:
        """A first attempt was made."""
        self._tokens = min(self.most, self._tokens + self.ratio)

    def take(self) -> bool:
        """True if one retry may be made now."""
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True
