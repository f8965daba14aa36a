"""The store's lifetime, schema and bootstrap, on a real PostgreSQL."""

import asyncio
import stat
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from services.chassis.errors import StoreUnavailable
from services.gateway import keys
from services.gateway.schema import METADATA
from services.gateway.store import StoreSettings, bootstrap, lend, migrate, open_store

PEPPER = b"p" * 32


@pytest.mark.filterwarnings("ignore:Can't validate argument 'dialect_options'")  # of a check that is NOT VALID
async def test_schema_matches_migrations(postgres_url: str) -> None:
    def differences(connection: object) -> list[str]:
        context = MigrationContext.configure(connection, opts={"version_table": "schema_version"})  # type: ignore[arg-type]
        return [str(found) for found in compare_metadata(context, METADATA) if found[0] not in ("remove_index", "remove_constraint")]

    engine = create_async_engine(postgres_url)
    async with engine.connect() as connection:
        assert await connection.run_sync(differences) == []
    await engine.dispose()


async def test_two_gateways_migrate_one_database(postgres_url: str) -> None:
    engine = create_async_engine(postgres_url)
    async with engine.begin() as connection:
        await connection.execute(text("DROP SCHEMA public CASCADE"))
        await connection.execute(text("CREATE SCHEMA public"))
    settings = StoreSettings(database_url=postgres_url)
    async with open_store(settings, PEPPER, wait=True) as one, open_store(settings, PEPPER, wait=True) as two:
        assert one.ready.is_set()
        assert two.ready.is_set()
    await engine.dispose()


async def test_F33_later_schema_is_left_alone(postgres_url: str) -> None:
    engine = create_async_engine(postgres_url)
    async with engine.begin() as connection:
        await connection.execute(text("UPDATE schema_version SET version_num = '9999'"))
        await connection.run_sync(migrate)
        assert (await connection.execute(text("SELECT version_num FROM schema_version"))).scalar() == "9999"
    await engine.dispose()


async def test_bootstrap_is_idempotent(postgres_url: str, tmp_path: Path) -> None:
    kept = tmp_path / "platform.key"
    async with open_store(StoreSettings(database_url=postgres_url), PEPPER, wait=True) as store:
        first = await bootstrap(store, kept)
        assert await bootstrap(store, kept) == first
        assert stat.S_IMODE(kept.stat().st_mode) == 0o600
        assert await bootstrap(store) == ""
        presented = keys.parse(first)
        assert presented is not None
        record = await store.key(presented.uid)
        assert record is not None
        assert keys.proves(presented, record, PEPPER)
        assert "platform" in record.grant.scopes
        kept.unlink()
        assert await bootstrap(store, kept) not in ("", first)


async def test_F15_store_opens_while_database_is_away(postgres_url: str) -> None:
    away = postgres_url.replace("/argosy-pg-", "/argosy-none-")
    async with open_store(StoreSettings(database_url=away), PEPPER) as store:
        with pytest.raises(StoreUnavailable):
            await store.key("00000000-0000-0000-0000-000000000001")
        with pytest.raises(StoreUnavailable):
            async with store.transaction() as connection:
                await connection.execute(text("SELECT 1"))
        assert not store.ready.is_set()


async def test_F16_locked_table_is_a_store_away(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(open_store.__wrapped__.__globals__["_SERVER_SETTINGS"], "statement_timeout", "50")  # type: ignore[attr-defined]
    engine = create_async_engine(postgres_url)
    async with open_store(StoreSettings(database_url=postgres_url), PEPPER, wait=True) as store, engine.begin() as blocker:
        await blocker.execute(text("LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE"))
        with pytest.raises(StoreUnavailable):
            await store.key("00000000-0000-0000-0000-000000000001")
    await engine.dispose()


async def test_L2_cancelled_statement_takes_its_connection_along(postgres_url: str) -> None:
    async with open_store(StoreSettings(database_url=postgres_url, database_connections=2), PEPPER, wait=True) as store:
        before = {row[0] for row in await asyncio.gather(*(_backend(store) for _ in range(2)))}
        for _ in range(2):
            asked = asyncio.create_task(store.hot.rows("SELECT pg_sleep(60), 'secret of another'"))
            await _until_sleeping(store)
            asked.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asked
        answers = await asyncio.gather(*(store.hot.rows("SELECT $1::int AS n", n) for n in range(20)))
        assert [rows[0]["n"] for rows in answers] == list(range(20))
        after = {row[0] for row in await asyncio.gather(*(_backend(store) for _ in range(2)))}
        assert not before & after


async def _backend(store: object) -> tuple[int]:
    rows = await store.hot.rows("SELECT pg_backend_pid() AS pid, pg_sleep(0.05)")  # type: ignore[attr-defined]
    return (rows[0]["pid"],)


async def _until_sleeping(store: object) -> None:
    engine = store._engine  # type: ignore[attr-defined]
    while True:
        async with engine.connect() as connection:
            sleeping = await connection.execute(
                text("SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%sleep(60)%' AND pid <> pg_backend_pid()")
            )
            if sleeping.scalar():
                return


async def test_bootstrap_makes_another_key_for_who_lost_it_and_lends_one_that_ends(postgres_url: str) -> None:
    async with open_store(StoreSettings(database_url=postgres_url), PEPPER, wait=True) as store:
        await bootstrap(store)
        assert await bootstrap(store) == ""
        another = keys.parse(await bootstrap(store, another=True))
        lent = keys.parse(await lend(store, 60, frozenset({"generate"})))
        assert another is not None
        assert lent is not None
        found = [await store.key(each.uid) for each in (another, lent)]
        assert [record is not None and record.live for record in found] == [True, True]
        assert found[0] is not None
        assert found[0].grant.expire_time is None
        assert found[1] is not None
        assert found[1].grant.expire_time is not None
        assert found[1].grant.scopes == {"generate"}
        ended = keys.parse(await lend(store, 0, frozenset({"generate"})))
        assert ended is not None
        record = await store.key(ended.uid)
        assert record is not None
        assert not record.live
