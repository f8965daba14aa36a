"""Reserve before the work, settle once after it: what the gateway asks of its books.

Every generation (one attempt at one request) has one reservation and one settlement, whatever becomes of the process between them.
The books are append-only; quotas are charged at the reservation with the most it may cost and corrected by the settlement.
"""

import enum
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from services.chassis.identity import Caller


class Outcome(enum.Enum):
    """How a generation ended. Only DONE completes a request id; after any other it may run again."""

    DONE = "DONE"
    CANCELLED = "CANCELLED"  # the caller left
    DEADLINE = "DEADLINE"
    LOST = "LOST"  # the pod, or the gateway itself, died
    SHED = "SHED"  # refused after the reservation: nothing ran
    FAILED = "FAILED"


@dataclass(frozen=True)
class Reservation:
    """The most one generation may cost. Counts are tokens, but for `passes`."""

    generation_id: str  # UUID, one an attempt
    request_id: str  # the caller's UUID; empty: no protection against running twice
    project_uid: str
    key_id: str  # the key's uid
    method: str  # exact RPC path
    model: str  # as asked
    version: str  # as resolved
    input_tokens: int
    output_tokens: int
    body_digest: bytes  # of the request; another body under the same request id is refused. Empty: not compared
    passes: int = 0  # forward + backward, of Explain


@dataclass(frozen=True)
class Settlement:
    """What the engine counted, exactly; zeros if it never started."""

    generation_id: str
    outcome: Outcome
    input_tokens: int
    cached_input_tokens: int  # part of input_tokens; 0 if the engine cannot tell
    output_tokens: int
    passes: int  # forward + backward, of Explain
    served_by: str  # opaque replica label; empty: none


@dataclass(frozen=True)
class Tariff:
    """Prices in nanos (10^-9 of the currency's unit) a token or pass."""

    currency_code: str = "USD"  # ISO 4217
    input_nanos: int = 100
    cached_input_nanos: int = 25
    output_nanos: int = 400
    pass_nanos: int = 50_000

    def highest(self, reservation: Reservation) -> int:
        """The most the reservation may cost, in nanos."""
        return (
            reservation.input_tokens * self.input_nanos
            + reservation.output_tokens * self.output_nanos
            + reservation.passes * self.pass_nanos
        )

    def price(self, settlement: Settlement) -> int:
        """What the settlement costs, in nanos."""
        fresh = settlement.input_tokens - settlement.cached_input_tokens
        return (
            fresh * self.input_nanos
            + settlement.cached_input_tokens * self.cached_input_nanos
            + settlement.output_tokens * self.output_nanos
            + settlement.passes * self.pass_nanos
        )


class Ledger(Protocol):
    """The books, as admission uses them. Implementations: `sql_ledger.SqlLedger`, and `tests.fakes.ledger.MemoryLedger`."""

    async def reserve(self, reservation: Reservation) -> None:
        """Charge the reservation to its project and key, or refuse it whole. Safe to repeat for one generation id.

        Raises (all from `services.chassis.errors`):
            RateLimited: a minute's requests or tokens, or running generations; `retry_after_s` says when to come back.
            QuotaExceeded: a day's tokens, spend, or a bound this request alone is over: waiting a minute does not help.
            RequestAlreadySettled: this request id has completed.
            RequestInFlight: this request id is running.
            IdempotencyKeyReused: this request id came with another body.
            StoreUnavailable: the books can be neither written nor spooled.
        """
        ...

    async def settle(self, settlement: Settlement) -> None:
        """Write what a reserved generation cost, exactly once; returns when that is durable.

        Settling again is a no-op, as is settling what was never reserved. Never raises for a store that is down: it spools.
        """
        ...


@dataclass(frozen=True)
class Charge:
    """What a job or an evaluation owes since its last charge. `work_uid` and `number` name it for good."""

    sequence: int  # cursor of the feed
    project_uid: str
    project: str  # projects/{project}
    key_uid: str
    work_uid: str  # stands where a call has its request id
    number: int
    method: str  # exact RPC path that asked for the work
    model: str
    version: str
    currency: str
    nanos: int
    device_seconds: float
    outcome: Outcome | None  # None: the work goes on
    time: datetime  # says which day pays


class JobBooks(Protocol):
    """The books, as jobs use them. Every method may raise StoreUnavailable."""

    @property
    def currency(self) -> str:
        """ISO 4217: what all of it is counted in."""
        ...

    async def cursor(self) -> int:
        """Sequence of the last charge in the books; 0: none. Waits for the schema."""
        ...

    async def settle(self, charge: Charge) -> tuple[str, ...]:
        """Write a charge and the cursor, once however often it is told.

        Returns:
            Who has used up the day, of those it concerns: the key's uid, and "" for the whole project.
        """
        ...

    async def reset(self) -> None:
        """Read the feed from its start again: charges that are known change nothing."""
        ...

    async def allowed(self, who: Caller) -> Caller:
        """The caller, with what jobs of its project and key may still take today."""
        ...


def check(settlement: Settlement) -> None:
    """Refuse counts no engine can have meant (A28).

    Raises:
        ValueError: a negative count, more cached than input tokens, or a count over 2^53.
    """
    counts = (settlement.input_tokens, settlement.cached_input_tokens, settlement.output_tokens, settlement.passes)
    if min(counts) < 0 or max(counts) > 1 << 53 or settlement.cached_input_tokens > settlement.input_tokens:
        raise ValueError(f"impossible counts {counts}")
