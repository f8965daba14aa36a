"""The books in PostgreSQL: exact under races, faults and restarts."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from services.chassis.errors import QuotaExceeded, RateLimited, RequestAlreadySettled, RequestInFlight
from services.gateway.ledger import Outcome, Reservation, Tariff
from services.gateway.sql_ledger import LedgerSettings, SqlLedger, open_ledger
from services.gateway.store import Store, StoreSettings, open_store
from tests.gateway.books import PEPPER, a_reservation, a_settlement, add_key, add_project, rows

TARIFF = Tariff()


@dataclass
class Books:
    store: Store
    ledger: SqlLedger
    project: str
    key: str

    def ask(self, **changes: object) -> Reservation:
        return a_reservation(self.project, self.key, **changes)

    async def counters(self) -> tuple[int, int, int, int]:
        """(tokens of the day, nanos of the day, running, requests of the day) of the project."""
        (row,) = await rows(
            self.store,
            "SELECT day_tokens, day_nanos, running, day_requests FROM quota_counters WHERE project_uid = :uid AND key_uid = :nobody",
            uid=self.project,
            nobody="00000000-0000-0000-0000-000000000000",
        )
        return tuple(row.values())


@asynccontextmanager
async def opened(url: str, folder: Path, *, project: str = "", key: str = "", **policy: int) -> AsyncIterator[Books]:
    async with open_store(StoreSettings(database_url=url), PEPPER, wait=True) as store:
        project = project or await add_project(store, **policy)
        key = key or (await add_key(store, project))[0]
        async with open_ledger(store, LedgerSettings(journal_dir=folder)) as ledger:
            yield Books(store, ledger, project, key)


@pytest.fixture
async def books(postgres_url: str, tmp_path: Path) -> AsyncIterator[Books]:
    async with opened(postgres_url, tmp_path) as found:
        yield found


async def test_I4_ledger_is_what_the_engine_counted(books: Books) -> None:
    counted = 0
    for n, outcome in enumerate(Outcome):
        r = books.ask()
        await books.ledger.reserve(r)
        await books.ledger.settle(a_settlement(r, outcome, output_tokens=n))
        counted += 10 + n
    (row,) = await rows(books.store, "SELECT sum(input_tokens + output_tokens) AS n FROM ledger WHERE kind = 'SETTLE'")
    assert row["n"] == counted
    tokens, nanos, running, requests = await books.counters()
    assert (tokens, running, requests) == (counted, 0, len(Outcome))
    billed = [n for n, outcome in enumerate(Outcome) if outcome not in (Outcome.SHED, Outcome.FAILED)]
    assert nanos == sum(6 * 100 + 4 * 25 + n * 400 for n in billed)


async def test_A28_five_hundred_at_the_last_token(postgres_url: str, tmp_path: Path) -> None:
    async with opened(postgres_url, tmp_path, tokens_per_day=30 * 41) as books:
        asked = [books.ask() for _ in range(500)]
        outcomes = await asyncio.gather(*(books.ledger.reserve(r) for r in asked), return_exceptions=True)
        admitted = [r for r, outcome in zip(asked, outcomes, strict=True) if outcome is None]
        assert len(admitted) == 41
        assert all(isinstance(outcome, QuotaExceeded) and outcome.pushback_ms == -1 for outcome in outcomes if outcome is not None)
        await asyncio.gather(*(books.ledger.settle(a_settlement(r)) for r in admitted))
        (row,) = await rows(books.store, "SELECT sum(input_tokens + output_tokens) AS n, count(*) AS c FROM ledger WHERE kind = 'SETTLE'")
        assert (row["n"], row["c"]) == (41 * 15, 41)
        assert (await books.counters())[0] == 41 * 15


async def test_A28_two_gateways_share_one_limit(postgres_url: str, tmp_path: Path) -> None:
    async with (
        opened(postgres_url, tmp_path, requests_per_minute=20) as one,
        opened(postgres_url, tmp_path, project=one.project, key=one.key) as other,
    ):
        asked = [(books.ledger, books.ask()) for _ in range(50) for books in (one, other)]
        outcomes = await asyncio.gather(*(ledger.reserve(r) for ledger, r in asked), return_exceptions=True)
        assert outcomes.count(None) in (20, 40)  # 40 only if the minute turned on the way
        assert all(isinstance(outcome, RateLimited) and outcome.retry_after_s for outcome in outcomes if outcome is not None)


async def test_A29_spend_stays_under_the_keys_cap(postgres_url: str, tmp_path: Path) -> None:
    price = TARIFF.highest(a_reservation("", ""))
    async with opened(postgres_url, tmp_path) as books:
        capped, _ = await add_key(books.store, books.project, nanos_per_day=3 * price)
        asked = [books.ask(key_id=capped) for _ in range(20)]
        outcomes = await asyncio.gather(*(books.ledger.reserve(r) for r in asked), return_exceptions=True)
        assert outcomes.count(None) == 3
        assert {type(outcome) for outcome in outcomes if outcome} == {QuotaExceeded}
        await books.ledger.reserve(books.ask())  # another key of the project is not held by it


async def test_windows_turn_by_the_databases_clock(postgres_url: str, tmp_path: Path) -> None:
    async with opened(postgres_url, tmp_path, requests_per_minute=1, tokens_per_day=30) as books:
        first = books.ask()
        await books.ledger.reserve(first)
        async with books.store.transaction() as connection:
            for table in ("quota_counters", "reservations"):  # as if a day had passed
                await connection.execute(text(f"UPDATE {table} SET minute = minute - interval '1 day', day = day - interval '1 day'"))
        second = books.ask()
        await books.ledger.reserve(second)
        await books.ledger.settle(a_settlement(first))  # charged to a day that is over: this day keeps its own
        assert (await books.counters())[0] == 30
        (row,) = await rows(books.store, "SELECT running FROM quota_counters WHERE key_uid = :key", key=books.key)
        assert row["running"] == 1


async def test_ledger_is_append_only(books: Books) -> None:
    r = books.ask()
    await books.ledger.reserve(r)
    for statement in ("UPDATE ledger SET input_tokens = 0", "DELETE FROM ledger", "TRUNCATE ledger"):
        with pytest.raises(Exception, match="append-only"):
            async with books.store.transaction() as connection:
                await connection.execute(text(statement))


async def test_L2_caller_that_leaves_while_reserving_holds_nothing(postgres_url: str, tmp_path: Path) -> None:
    async with opened(postgres_url, tmp_path, concurrent_streams=1) as books:
        leaving = asyncio.create_task(books.ledger.reserve(books.ask()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        async with asyncio.timeout(10):
            while True:
                try:
                    await books.ledger.reserve(r := books.ask())
                    break
                except RateLimited:
                    await asyncio.sleep(0.01)
        await books.ledger.settle(a_settlement(r))
        async with asyncio.timeout(10):
            while (await books.counters())[2]:
                await asyncio.sleep(0.01)


async def test_settlement_outlives_its_waiter(books: Books) -> None:
    r = books.ask()
    await books.ledger.reserve(r)
    leaving = asyncio.create_task(books.ledger.settle(a_settlement(r)))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.wait((leaving,))
    await books.ledger.settle(a_settlement(r, output_tokens=999))
    (row,) = await rows(books.store, "SELECT output_tokens FROM ledger WHERE kind = 'SETTLE'")
    assert row["output_tokens"] == 5


async def test_F1_dead_gateways_reservations_are_swept(postgres_url: str, tmp_path: Path) -> None:
    async with opened(postgres_url, tmp_path, concurrent_streams=1) as books:
        r = books.ask()
        await books.ledger.reserve(r)
        assert await books.ledger.sweep(30.0) == 0  # its gateway lives
        async with books.store.transaction() as connection:
            await connection.execute(text("UPDATE gateways SET beat_time = beat_time - interval '1 minute'"))
        async with opened(postgres_url, tmp_path, project=books.project, key=books.key) as other:
            assert await other.ledger.sweep(30.0) == 1
            assert await other.ledger.sweep(30.0) == 0
            again = replace(r, generation_id=str(uuid4()))
            await other.ledger.reserve(again)  # lost, so the request may run again
            await other.ledger.settle(a_settlement(again, Outcome.FAILED))
        # The gateway was slow, not dead: what it counted is billed after all, once.
        for _ in range(2):
            await books.ledger.settle(a_settlement(r))
        found = await rows(
            books.store, "SELECT kind, outcome, output_tokens FROM ledger WHERE generation_id = :g AND kind <> 'RESERVE' ORDER BY entry",
            g=r.generation_id,
        )  # fmt: skip
        assert [tuple(row.values()) for row in found] == [("SETTLE", "LOST", 0), ("AMEND", "DONE", 5)]
        assert (await books.counters())[2] == 0


async def test_closing_settles_what_is_open(postgres_url: str, tmp_path: Path) -> None:
    async with opened(postgres_url, tmp_path) as books:
        await books.ledger.reserve(books.ask())
    async with opened(postgres_url, tmp_path, project=books.project, key=books.key) as later:
        assert (await later.counters())[2] == 0
        (row,) = await rows(later.store, "SELECT outcome FROM ledger WHERE kind = 'SETTLE'")
        assert row["outcome"] == "LOST"


# --- the store goes away ------------------------------------------------------------------------------------------------------------


@dataclass
class Wire:
    """A proxy before the database that can be cut and mended."""

    url: str
    upstream: str
    _writers: set[asyncio.StreamWriter]
    open: bool = True

    def cut(self) -> None:
        self.open = False
        for writer in list(self._writers):
            writer.transport.abort()

    def mend(self) -> None:
        self.open = True


@asynccontextmanager
async def wire(url: str, folder: Path) -> AsyncIterator[Wire]:
    """A unix socket that leads to the database's."""
    upstream = Path(url.partition("?host=")[2]) / ".s.PGSQL.5432"
    found = Wire(f"{url.partition('?host=')[0]}?host={folder}", str(upstream), set())

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.transport.abort()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not found.open:
            writer.transport.abort()
            return
        there, back = await asyncio.open_unix_connection(found.upstream)
        found._writers.update((writer, back))
        await asyncio.gather(pump(reader, back), pump(there, writer))
        found._writers.difference_update((writer, back))

    server = await asyncio.start_unix_server(serve, folder / ".s.PGSQL.5432")
    try:
        yield found
    finally:
        server.close()
        found.cut()
        async with asyncio.timeout(5):
            while found._writers:
                await asyncio.sleep(0.01)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("w")  # a socket's path is at most 107 bytes


async def test_F15_books_are_kept_while_the_store_is_away(postgres_url: str, tmp_path: Path, short: Path) -> None:
    async with wire(postgres_url, short) as line, opened(line.url, tmp_path) as books:
        before, cut_between = books.ask(), books.ask()
        await books.ledger.reserve(before)
        await books.ledger.reserve(cut_between)
        line.cut()
        await books.ledger.settle(a_settlement(cut_between))
        during, running = books.ask(), books.ask()
        await books.ledger.reserve(during)
        await books.ledger.reserve(running)
        with pytest.raises(RequestInFlight):
            await books.ledger.reserve(replace(during, generation_id=str(uuid4())))
        for _ in range(2):
            await books.ledger.settle(a_settlement(during))
        with pytest.raises(RequestAlreadySettled):
            await books.ledger.reserve(replace(during, generation_id=str(uuid4())))
        assert books.ledger.away
        line.mend()
        await until(lambda: not books.ledger.away)
        await books.ledger.settle(a_settlement(before))
        assert (await books.counters())[2] == 1  # what runs on is known again
        await books.ledger.settle(a_settlement(running))
        found = await rows(books.store, "SELECT kind, count(*) AS n FROM ledger GROUP BY kind ORDER BY kind")
        assert [tuple(row.values()) for row in found] == [("RESERVE", 4), ("SETTLE", 4)]
        tokens, nanos, open_now, requests = await books.counters()
        assert (tokens, open_now, requests) == (4 * 15, 0, 4)
        assert nanos == 4 * TARIFF.price(a_settlement(before))
        await until(lambda: not list(tmp_path.iterdir()))


async def test_F15_journal_survives_the_process(postgres_url: str, tmp_path: Path, short: Path) -> None:
    async with AsyncExitStack() as stack:
        line = await stack.enter_async_context(wire(postgres_url, short))
        async with opened(line.url, tmp_path) as books:
            line.cut()
            settled, unsettled = books.ask(), books.ask()
            await books.ledger.reserve(settled)
            await books.ledger.settle(a_settlement(settled))
            await books.ledger.reserve(unsettled)
            books.ledger._open.clear()  # as kill -9 would leave it
        assert list(tmp_path.iterdir())
    async with opened(postgres_url, tmp_path, project=books.project, key=books.key) as later:
        assert not later.ledger.away
        found = await rows(later.store, "SELECT generation_id::text, outcome, output_tokens FROM ledger WHERE kind = 'SETTLE'")
        assert {tuple(row.values()) for row in found} == {
            (settled.generation_id, "DONE", 5),
            (unsettled.generation_id, "LOST", 0),
        }
        assert list(tmp_path.iterdir()) == []


async def test_F15_unknown_answer_is_not_billed_twice(postgres_url: str, tmp_path: Path, short: Path) -> None:
    async with wire(postgres_url, short) as line, opened(line.url, tmp_path) as books:
        r = books.ask()
        await books.ledger.reserve(r)
        rows_of = books.store.hot.rows

        async def executes_then_fails(statement: str, *arguments: object) -> list[asyncpg.Record]:
            await rows_of(statement, *arguments)
            line.cut()
            return await rows_of("SELECT 1")

        books.store.hot.rows = executes_then_fails  # type: ignore[method-assign]
        await books.ledger.settle(a_settlement(r))
        books.store.hot.rows = rows_of  # type: ignore[method-assign]
        assert books.ledger.away
        line.mend()
        await until(lambda: not books.ledger.away)
        found = await rows(books.store, "SELECT count(*) AS n FROM ledger WHERE kind = 'SETTLE'")
        assert found[0]["n"] == 1
        assert (await books.counters())[0] == 15


async def test_F16_locked_table_holds_nobody_up(postgres_url: str, tmp_path: Path) -> None:
    engine = create_async_engine(postgres_url)
    async with opened(postgres_url, tmp_path) as books:
        async with engine.begin() as blocker:
            await blocker.execute(text("LOCK TABLE quota_counters, ledger IN ACCESS EXCLUSIVE MODE"))
            asked = [books.ask() for _ in range(5)]
            async with asyncio.timeout(10):
                for r in asked:
                    await books.ledger.reserve(r)
                    await books.ledger.settle(a_settlement(r))
            assert books.ledger.away
        await until(lambda: not books.ledger.away)
        await until(lambda: not list(tmp_path.iterdir()))
        found = await rows(books.store, "SELECT kind, count(*) AS n FROM ledger GROUP BY kind ORDER BY kind")
        assert [tuple(row.values()) for row in found] == [("RESERVE", 5), ("SETTLE", 5)]
        assert (await books.counters())[:3:2] == (5 * 15, 0)
    await engine.dispose()
