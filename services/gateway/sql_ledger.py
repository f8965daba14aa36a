"""The books in PostgreSQL: one round trip to reserve, settlements written together, a journal for when the store is away.

The database's functions `reserve` and `settle` decide (`migrations/`); this file carries. A reservation runs in a task of its own: its
caller may leave at any moment, its connection may not. Whoever leaves between the question and the answer is settled as CANCELLED.
"""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec

from services.chassis.errors import (
    IdempotencyKeyReused,
    QuotaExceeded,
    RateLimited,
    RequestAlreadySettled,
    RequestInFlight,
    ServiceError,
    StoreUnavailable,
)
from services.gateway.journal import Entry, Journal, JournalBroken, JournalFull, read
from services.gateway.ledger import Outcome, Reservation, Settlement, Tariff, check
from services.gateway.store import STATEMENT_SECONDS, Store

log = logging.getLogger(__name__)

BATCH = 256  # settlements in one statement
TICK_SECONDS = 0.1
# No answer to anything for this many ticks is a store that is away (F16). Ticks, not seconds: while our own loop is late, none pass.
STALLED_TICKS = 5
PROBE_SECONDS = 0.5  # between tries while away
BEAT_SECONDS = 5.0
LEASE_SECONDS = 30.0  # a gateway silent for longer is dead, and its reservations are swept
CLEAN_SECONDS = 600.0
SWEEPER = "sweeper"

_RESERVE = "SELECT verdict, subject, retry_after_s FROM reserve($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)"
_SETTLE = "SELECT settle($1)"
_BEAT = "INSERT INTO gateways (uid) VALUES ($1) ON CONFLICT (uid) DO UPDATE SET beat_time = clock_timestamp()"
_STALE = """
    SELECT r.project_uid::text, r.generation_id::text, r.request_id::text, r.key_uid::text, r.method, r.model, r.version,
        encode(r.body_digest, 'hex') AS body_digest
    FROM reservations r LEFT JOIN gateways g ON g.uid = r.owner
    WHERE g.uid IS NULL OR g.beat_time < clock_timestamp() - make_interval(secs => $1)
    ORDER BY r.create_time LIMIT 256
"""
_CLEAN = (
    "DELETE FROM gateways g WHERE beat_time < clock_timestamp() - interval '1 day'"
    " AND NOT EXISTS (SELECT FROM reservations r WHERE r.owner = g.uid)",
    "DELETE FROM request_replays WHERE create_time < clock_timestamp() - interval '24 hours'",
    "DELETE FROM api_keys WHERE delete_time < clock_timestamp() - interval '30 days'",
)


@dataclass(frozen=True)
class LedgerSettings:
    """How the books are kept (`ARGOSY_…`)."""

    journal_dir: Path = Path("argosy-journal")  # on a disk that survives the process
    journal_bytes: int = field(default=64 << 20, metadata={"minimum": 1 << 16})
    price_currency: str = "USD"
    input_token_nanos: int = field(default=100, metadata={"minimum": 0})  # 10^-9 of the currency's unit
    cached_token_nanos: int = field(default=25, metadata={"minimum": 0})
    output_token_nanos: int = field(default=400, metadata={"minimum": 0})
    pass_nanos: int = field(default=50_000, metadata={"minimum": 0})

    def tariff(self) -> Tariff:
        """The price list."""
        return Tariff(self.price_currency, self.input_token_nanos, self.cached_token_nanos, self.output_token_nanos, self.pass_nanos)


def _refusal(verdict: str, subject: str, retry_after_s: float) -> ServiceError:
    match verdict:
        case "RATE":
            return RateLimited(retry_after_s, subject)
        case "QUOTA":
            return QuotaExceeded(subject)
        case "SETTLED":
            return RequestAlreadySettled()
        case "IN_FLIGHT":
            return RequestInFlight()
        case "REUSED":
            return IdempotencyKeyReused()
    raise ValueError(f"unknown verdict {verdict}")


def _lost(reservation: Reservation) -> Settlement:
    return Settlement(reservation.generation_id, Outcome.LOST, 0, 0, 0, 0, SWEEPER)


_Request = tuple[str, str, str]


class SqlLedger:
    """A `ledger.Ledger`. Opened by `open_ledger`, which runs its tasks."""

    def __init__(self, store: Store, journal: Journal, tariff: Tariff) -> None:
        self.away = True  # the store does not answer (yet): reservations and settlements are spooled
        self.in_touch = asyncio.Event()  # it has answered once
        self.owner = str(uuid4())
        self.tariff = tariff
        self._store = store
        self._journal = journal
        self._open: dict[str, Reservation] = {}
        self._requests: dict[_Request, str] = {}  # open here → generation id
        self._done_away: dict[_Request, None] = {}  # completed while the store was away
        self._settling: dict[str, asyncio.Future[None]] = {}
        self._outbox: list[tuple[Entry, asyncio.Future[None]]] = []
        self._posted = asyncio.Event()
        self._lost_touch = asyncio.Event()
        self._pending: dict[asyncio.Future[Any], asyncio.Task[Any]] = {}
        self._silent_ticks = 0
        self._in_touch_since = 0.0

    @property
    def spooled_bytes(self) -> int:
        """What the journal holds for the store's return."""
        return self._journal.bytes

    # --- the two verbs ----------------------------------------------------------------------------------------------------------

    async def reserve(self, reservation: Reservation) -> None:
        """See `ledger.Ledger.reserve`."""
        r = reservation
        request = (r.project_uid, r.method, r.request_id)
        if r.request_id and self._requests.get(request, r.generation_id) != r.generation_id:
            raise self._in_flight(r)
        if not self.away:
            asked = self._start(self._store.hot.rows(_RESERVE, *self._reserve_arguments(r, spooled=False)))
            try:
                (answer,) = await asked
            except StoreUnavailable:
                pass
            except asyncio.CancelledError:
                self._abandon(asked, r)
                raise
            else:
                if answer["verdict"] != "OK":
                    raise _refusal(*answer)
                self._opened(r)
                return
        if r.request_id and request in self._done_away:
            raise RequestAlreadySettled
        self._opened(r)  # before the wait: a second call of the same id must find it
        try:
            await self._journal.append([Entry(r)])
        except (JournalFull, JournalBroken) as error:
            self._closed(r)
            raise StoreUnavailable from error
        except asyncio.CancelledError:
            self._post(r, Settlement(r.generation_id, Outcome.CANCELLED, 0, 0, 0, 0, ""))
            raise

    async def settle(self, settlement: Settlement) -> None:
        """See `ledger.Ledger.settle`."""
        check(settlement)
        if (settling := self._settling.get(settlement.generation_id)) is None:
            reservation = self._open.get(settlement.generation_id)
            if reservation is None:
                return
            settling = self._post(reservation, settlement)
        await asyncio.shield(settling)

    def _in_flight(self, r: Reservation) -> ServiceError:
        first = self._open[self._requests[(r.project_uid, r.method, r.request_id)]]
        return RequestInFlight() if first.body_digest == r.body_digest else IdempotencyKeyReused()

    def _reserve_arguments(self, r: Reservation, *, spooled: bool) -> tuple[object, ...]:
        return (
            r.project_uid, r.generation_id, r.request_id or None, r.key_id, r.method, r.model, r.version, r.input_tokens,
            r.output_tokens, self.tariff.highest(r), r.body_digest, self.owner, spooled,
        )  # fmt: skip

    def _opened(self, r: Reservation) -> None:
        self._open[r.generation_id] = r
        if r.request_id:
            self._requests[(r.project_uid, r.method, r.request_id)] = r.generation_id

    def _closed(self, r: Reservation) -> None:
        self._open.pop(r.generation_id, None)
        request = (r.project_uid, r.method, r.request_id)
        if self._requests.get(request) == r.generation_id:
            del self._requests[request]

    def _post(self, reservation: Reservation, settlement: Settlement) -> asyncio.Future[None]:
        """Hand a settlement to the writer; the reservation stays open until it is durable."""
        settling: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._settling[settlement.generation_id] = settling
        self._outbox.append((Entry(reservation, settlement), settling))
        self._posted.set()
        return settling

    def _abandon(self, asked: "asyncio.Future[Any]", r: Reservation) -> None:
        task = self._pending.get(asked)
        if task is None:
            return

        def answered(done: "asyncio.Task[Any]") -> None:
            if not done.cancelled() and done.exception() is None and done.result()[0]["verdict"] == "OK":
                self._opened(r)
                self._post(r, Settlement(r.generation_id, Outcome.CANCELLED, 0, 0, 0, 0, ""))

        task.add_done_callback(answered)

    # --- asking the store -------------------------------------------------------------------------------------------------------

    def _start(self, rows: Any) -> "asyncio.Future[Any]":
        """Run a statement to its end, whoever waits; the future also ends, with `StoreUnavailable`, when the store falls silent."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        task: asyncio.Task[Any] = asyncio.ensure_future(rows)
        if not self._pending:
            self._silent_ticks = 0
        self._pending[future] = task

        def finished(done: "asyncio.Task[Any]") -> None:
            self._pending.pop(future, None)
            error = None if done.cancelled() else done.exception()
            if isinstance(error, StoreUnavailable) or done.cancelled():
                self._lose_touch()
            else:
                self._silent_ticks = 0
            if future.done():
                return
            if done.cancelled() or error is not None:
                future.set_exception(error or StoreUnavailable())
                future.exception()  # whoever waited may have left
            else:
                future.set_result(done.result())

        task.add_done_callback(finished)
        return future

    def _lose_touch(self) -> None:
        if not self.away:
            log.warning("the store does not answer: the books are kept in the journal")
            self.away = True
            self._lost_touch.set()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._silent_ticks = self._silent_ticks + 1 if self._pending else 0
            if self._silent_ticks >= STALLED_TICKS:
                self._lose_touch()
                for future in [f for f in self._pending if not f.done()]:
                    future.set_exception(StoreUnavailable())
                    future.exception()

    # --- settling ---------------------------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        """The one writer of settlements: takes what has gathered, so that a busy second costs few commits."""
        while True:
            await self._posted.wait()
            self._posted.clear()
            while self._outbox:
                batch, self._outbox = self._outbox[:BATCH], self._outbox[BATCH:]
                await self._durable(batch)

    async def _durable(self, batch: list[tuple[Entry, "asyncio.Future[None]"]]) -> None:
        entries = [entry for entry, _ in batch]
        failure: Exception | None = None
        if self.away:
            failure = await self._spool(entries)
        else:
            try:
                await self._start(self._store.hot.rows(_SETTLE, self._items(entries)))
            except StoreUnavailable:
                failure = await self._spool(entries)
            except Exception:
                if len(batch) > 1:  # one of them is refused by the schema: find it, and hold up no other
                    for one in batch:
                        await self._durable([one])
                    return
                log.exception("a settlement was refused by the store: generation %s", entries[0].reservation.generation_id)
                failure = StoreUnavailable()
        for entry, settling in batch:
            self._closed(entry.reservation)
            self._settling.pop(entry.reservation.generation_id, None)
            if failure is None:
                settling.set_result(None)
            else:
                settling.set_exception(failure)
                settling.exception()

    async def _spool(self, entries: list[Entry]) -> Exception | None:
        for r, s in ((entry.reservation, entry.settlement) for entry in entries):
            if r.request_id and s is not None and s.outcome is Outcome.DONE:
                self._done_away[(r.project_uid, r.method, r.request_id)] = None
        try:
            await self._journal.append(entries)
        except (JournalFull, JournalBroken) as error:
            log.error("settlements are lost with this process: the journal takes no more (%s)", type(error).__name__)
            return StoreUnavailable()
        return None

    def _items(self, entries: list[Entry]) -> str:
        items = []
        for entry in entries:
            r, s = entry.reservation, entry.settlement or _lost(entry.reservation)
            billed = s.outcome not in (Outcome.SHED, Outcome.FAILED)
            items.append(
                {
                    "project_uid": r.project_uid, "generation_id": r.generation_id, "request_id": r.request_id or None,
                    "key_uid": r.key_id, "method": r.method, "model": r.model, "version": r.version,
                    "body_digest": r.body_digest.hex(), "reserved_input": r.input_tokens, "reserved_output": r.output_tokens,
                    "reserved_nanos": self.tariff.highest(r), "outcome": s.outcome.value, "swept": False,
                    "input_tokens": s.input_tokens, "cached_input_tokens": s.cached_input_tokens, "output_tokens": s.output_tokens,
                    "passes": s.passes, "nanos": self.tariff.price(s) if billed else 0, "served_by": s.served_by,
                }
            )  # fmt: skip
        return msgspec.json.encode(items).decode()

    # --- away and back ----------------------------------------------------------------------------------------------------------

    async def _keep_touch(self) -> None:
        """Beat while in touch; while away, knock, and on an answer replay the journal."""
        loop = asyncio.get_running_loop()
        await self._store.ready.wait()
        next_clean = loop.time()
        while True:
            try:
                await self._store.hot.rows(_BEAT, self.owner)
                if self.away:
                    await self._replay()
                    self._in_touch_since = loop.time()
                    self._lost_touch.clear()
                    self.away = False
                    self._done_away.clear()
                    self.in_touch.set()
                if self._journal.holds_any:
                    await self._replay()  # what was on its way to the journal when the store came back
                await self._sweep(loop.time())
                if loop.time() >= next_clean:
                    next_clean = loop.time() + CLEAN_SECONDS
                    for statement in _CLEAN:
                        await self._store.hot.rows(statement)
            except StoreUnavailable:
                self._lose_touch()
            except Exception:
                log.exception("keeping the books failed; trying again")
            try:
                async with asyncio.timeout(PROBE_SECONDS if self.away else BEAT_SECONDS):  # not wait_for: it may swallow a cancellation
                    await self._lost_touch.wait()
            except TimeoutError:
                continue
            await asyncio.sleep(PROBE_SECONDS)

    async def _replay(self) -> None:
        for segment in await self._journal.seal():
            entries = await asyncio.to_thread(read, segment)
            settled = {e.reservation.generation_id for e in entries if e.settlement is not None}
            ended = [e for e in entries if e.settlement is not None]
            for entry in entries:
                r = entry.reservation
                if entry.settlement is None and r.generation_id not in settled:
                    if r.generation_id in self._open:
                        await self._store.hot.rows(_RESERVE, *self._reserve_arguments(r, spooled=True))
                    elif not segment.own:
                        ended.append(Entry(r, _lost(r)))
            for start in range(0, len(ended), BATCH):
                await self._store.hot.rows(_SETTLE, self._items(ended[start : start + BATCH]))
            self._journal.drop(segment)
            log.info("replayed %d entries of the journal", len(entries))

    async def _sweep(self, now: float) -> None:
        # After an outage all gateways have been silent: each gets a whole lease to beat again before anybody judges it.
        if now - self._in_touch_since < LEASE_SECONDS:
            return
        await self.sweep(LEASE_SECONDS)

    async def sweep(self, lease_s: float) -> int:
        """Settle as LOST, with zero counts, what gateways silent for `lease_s` seconds have left open. Returns how many."""
        stale = await self._store.hot.rows(_STALE, lease_s)
        items = [
            {**row, "outcome": "LOST", "swept": True, "input_tokens": 0, "cached_input_tokens": 0, "output_tokens": 0, "passes": 0,
             "nanos": 0, "served_by": SWEEPER}
            for row in stale
        ]  # fmt: skip
        if items:
            (row,) = await self._store.hot.rows(_SETTLE, msgspec.json.encode(items).decode())
            log.warning("swept %d reservations of gateways that are gone", row[0])
            return int(row[0])
        return 0

    async def _close(self) -> None:
        """Settle what is still open and wait until it is durable, here or in the journal."""
        for generation_id, reservation in list(self._open.items()):
            if generation_id not in self._settling:
                self._post(reservation, Settlement(generation_id, Outcome.LOST, 0, 0, 0, 0, ""))
        while self._settling:
            await asyncio.gather(*self._settling.values(), return_exceptions=True)
        while self._pending:
            await asyncio.wait(list(self._pending.values()))
            await asyncio.sleep(0)


@asynccontextmanager
async def open_ledger(store: Store, settings: LedgerSettings) -> AsyncIterator[SqlLedger]:
    """Keep the books until the block is left; leaving it settles as LOST whatever its handlers did not settle."""
    journal = Journal(settings.journal_dir, settings.journal_bytes)
    ledger = SqlLedger(store, journal, settings.tariff())
    tasks = [asyncio.create_task(work()) for work in (ledger._write, ledger._watch, ledger._keep_touch)]
    try:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(ledger.in_touch.wait(), STATEMENT_SECONDS)  # quotas are judged from the first call on
        yield ledger
    finally:
        await ledger._close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await journal.close()
