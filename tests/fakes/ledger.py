"""Books in memory, with the verdicts of the real ones; `tests/protocols/test_ledger.py` holds both to one suite."""

import asyncio
from dataclasses import dataclass, field

from services.chassis.errors import IdempotencyKeyReused, QuotaExceeded, RateLimited, RequestAlreadySettled, RequestInFlight
from services.gateway.ledger import Outcome, Reservation, Settlement, check


@dataclass(frozen=True)
class Limits:
    """Of one project; None: unlimited."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    concurrent_streams: int | None = None


@dataclass
class MemoryLedger:
    """One minute that never ends: a window does not pass."""

    limits: Limits = field(default_factory=Limits)
    failing: Exception | None = None  # raised by every `reserve`
    open: dict[str, Reservation] = field(default_factory=dict)
    reserved: list[Reservation] = field(default_factory=list)
    settled: dict[str, tuple[Reservation, Settlement]] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)  # set by each settlement

    async def reserve(self, reservation: Reservation) -> None:
        """As `ledger.Ledger.reserve`."""
        if self.failing is not None:
            raise self.failing
        r, limits = reservation, self.limits
        if r.generation_id in self.open or r.generation_id in self.settled:
            return
        if r.request_id:
            self._check_request(r)
        mine = [past for past in self.reserved if past.project_uid == r.project_uid]
        asked, used = r.input_tokens + r.output_tokens, sum(self._tokens(past) for past in mine)
        running = sum(past.project_uid == r.project_uid for past in self.open.values())
        if limits.tokens_per_day is not None and used + asked > limits.tokens_per_day:
            raise QuotaExceeded("tokens_per_day")
        if limits.tokens_per_minute is not None and asked > limits.tokens_per_minute:
            raise QuotaExceeded("tokens_per_minute")
        for limit, level, subject in (
            (limits.requests_per_minute, len(mine) + 1, "requests_per_minute"),
            (limits.tokens_per_minute, used + asked, "tokens_per_minute"),
            (limits.concurrent_streams, running + 1, "concurrent_streams"),
        ):
            if limit is not None and level > limit:
                raise RateLimited(1.0, subject)
        self.open[r.generation_id] = r
        self.reserved.append(r)

    async def settle(self, settlement: Settlement) -> None:
        """As `ledger.Ledger.settle`."""
        check(settlement)
        if (reservation := self.open.pop(settlement.generation_id, None)) is not None:
            self.settled[settlement.generation_id] = (reservation, settlement)
            self.changed.set()

    def _check_request(self, r: Reservation) -> None:
        def same(past: Reservation) -> bool:
            return (past.project_uid, past.method, past.request_id) == (r.project_uid, r.method, r.request_id)

        earlier = [past for past in self.reserved if same(past)]
        if any(past.body_digest != r.body_digest for past in earlier):
            raise IdempotencyKeyReused
        if any(same(past) for past in self.open.values()):
            raise RequestInFlight
        if any(self.settled[past.generation_id][1].outcome is Outcome.DONE for past in earlier):
            raise RequestAlreadySettled

    def _tokens(self, past: Reservation) -> int:
        if past.generation_id in self.settled:
            settlement = self.settled[past.generation_id][1]
            return settlement.input_tokens + settlement.output_tokens
        return past.input_tokens + past.output_tokens
