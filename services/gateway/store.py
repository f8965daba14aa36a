"""PostgreSQL as the gateway uses it: one pool for the hot statements, one for transactions, and the migrations.

Everything waits at most `STATEMENT_SECONDS`. A connection whose statement was cancelled or timed out is closed, never given back: its
next reader would get the answer to the last question (L2).
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from services.chassis import database
from services.chassis.errors import StoreUnavailable
from services.gateway import keys
from services.gateway.access import SCOPES
from services.gateway.keys import Grant, KeyRecord

STATEMENT_SECONDS = 2.0
MIGRATION_LOCK = 0x4152474F5359  # any number that only we use
PLATFORM_PROJECT = "platform"

_SERVER_SETTINGS = database.server_settings("argosy-gateway", STATEMENT_SECONDS, 10.0)


@dataclass(frozen=True)
class StoreSettings:
    """How the gateway reaches its database (`ARGOSY_…`)."""

    database_url: str = ""  # postgresql://…; empty: the fleet's embedded server
    database_connections: int = field(default=8, metadata={"minimum": 2, "maximum": 64})  # hot statements; as many again / 2 for the rest


async def _as_it_was(_: object) -> None:
    """Nothing to reset: the pool's statements leave no state in the session, and a reset would cost each a second round trip."""


class HotPool:
    """Prepared single statements, each its own transaction and one round trip."""

    def __init__(self, dsn: str, connections: int) -> None:
        self._pool = asyncpg.create_pool(
            dsn,
            min_size=0,  # so that the gateway starts while the database is away
            max_size=connections,
            timeout=database.CONNECT_SECONDS,
            max_inactive_connection_lifetime=300.0,
            server_settings=_SERVER_SETTINGS,
            reset=_as_it_was,
        )

    async def open(self) -> None:
        """Bind the pool to the running loop; no connection is made yet."""
        await self._pool

    async def rows(self, statement: str, *arguments: object) -> list[asyncpg.Record]:
        """Run one statement.

        Raises:
            StoreUnavailable: no connection or no answer in time; the statement may or may not have been applied.
        """
        try:
            async with self._pool.acquire(timeout=STATEMENT_SECONDS) as connection:
                try:
                    rows: list[asyncpg.Record] = await connection.fetch(statement, *arguments, timeout=STATEMENT_SECONDS + 0.5)
                except asyncpg.PostgresError:
                    raise  # the server has answered: the connection is at rest
                except BaseException:
                    connection.terminate()
                    raise
                return rows
        except Exception as error:
            if database.down(error):
                raise StoreUnavailable from error
            raise

    async def close(self) -> None:
        """Close every connection at once."""
        self._pool.terminate()  # whoever still waits gets an error; settlements were awaited before


class Store:
    """The gateway's tables. Opened by `open_store`."""

    def __init__(self, engine: AsyncEngine, hot: HotPool, dsn: str, pepper: bytes) -> None:
        self.hot = hot
        self.pepper = pepper
        self.ready = asyncio.Event()  # migrations are done
        self._engine = engine
        self._dsn = dsn

    def transaction(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """See database.transaction."""
        return database.transaction(self._engine)

    async def key(self, uid: str) -> KeyRecord | None:
        """The key of this uid, dead or alive, judged by the database's clock. An unknown uid costs the same work."""
        (row,) = await self.hot.rows(_KEY, uid)
        record = KeyRecord(
            uid=str(row["uid"]),
            project_uid=str(row["project_uid"]),
            project=row["project"] or "",
            live=bool(row["live"]),
            macs=(row["mac"], row["previous_mac"]) if row["overlap"] else (row["mac"],),
            grant=Grant(
                scopes=frozenset(row["scopes"] or ()) & SCOPES,
                models=tuple(row["models"] or ()),
                expire_time=row["expire_time"],
                requests_per_minute=row["requests_per_minute"],
                tokens_per_minute=row["tokens_per_minute"],
                concurrent_requests=row["concurrent_requests"],
                output_token_ceiling=row["ceiling"],
                nanos_per_day=row["nanos_per_day"],
            ),
            kv_scope=(row["kv_secret"] or b"").hex(),
        )
        return None if row["uid"] is None else record

    async def used(self, uids: Sequence[str]) -> None:
        """Note that these keys have opened something."""
        await self.hot.rows("UPDATE api_keys SET last_use_time = clock_timestamp() WHERE uid = ANY($1)", sorted(uids))

    async def dead_keys(self, uids: Sequence[str]) -> set[str]:
        """Those of `uids` that may no longer be used."""
        alive = {str(row["uid"]) for row in await self.hot.rows(_ALIVE, list(uids))}
        return set(uids) - alive

    async def listen(self, changed: Callable[[], None]) -> None:
        """Call `changed` whenever a key or project was changed, for as long as a connection lasts; returns when it breaks."""
        await database.listen(self._dsn, _SERVER_SETTINGS, "argosy_keys", lambda _: changed())


_LIVE = """k.state = 'ACTIVE' AND p.state = 'ACTIVE' AND (k.expire_time IS NULL OR k.expire_time > clock_timestamp())"""
_KEY = f"""
    SELECT k.uid, k.project_uid, p.name AS project, p.kv_secret, {_LIVE} AS live, k.mac, k.previous_mac, k.scopes, k.models, k.expire_time,
        k.requests_per_minute, k.tokens_per_minute, k.concurrent_requests, k.nanos_per_day,
        k.previous_mac IS NOT NULL AND k.previous_expire_time > clock_timestamp() AS overlap,
        least(k.output_token_ceiling, q.output_token_ceiling) AS ceiling
    FROM (VALUES ($1::uuid)) asked(uid) LEFT JOIN api_keys k ON k.uid = asked.uid LEFT JOIN projects p ON p.uid = k.project_uid
        LEFT JOIN quota_policies q ON q.project_uid = p.uid
"""
_ALIVE = f"SELECT k.uid FROM api_keys k JOIN projects p ON p.uid = k.project_uid WHERE k.uid = ANY($1) AND {_LIVE}"


def migrate(connection: Any) -> None:
    """See database.migrate."""
    database.migrate(connection, Path(__file__).parent / "migrations", MIGRATION_LOCK)


@asynccontextmanager
async def open_store(settings: StoreSettings, pepper: bytes, *, wait: bool = False) -> AsyncIterator[Store]:
    """Open the pools and migrate in the background, trying again until the database is there; `store.ready` says when.

    Args:
        settings: where the database is.
        pepper: the secret of `keys.mac_of`, 32 bytes.
        wait: return only when the schema is ready.
    """
    # Hot statements have a pool of their own.
    engine, dsn = database.pool(settings.database_url, max(1, settings.database_connections // 2), STATEMENT_SECONDS, _SERVER_SETTINGS)
    hot = HotPool(dsn, settings.database_connections)
    store = Store(engine, hot, dsn, pepper)
    await hot.open()
    migrating = asyncio.create_task(database.until_migrated(engine, migrate, store.ready))
    try:
        if wait:
            await migrating
        yield store
    finally:
        migrating.cancel()
        await asyncio.gather(migrating, return_exceptions=True)
        await hot.close()
        await engine.dispose()


async def bootstrap(store: Store, kept: Path | None = None, environment: str = "live", *, another: bool = False) -> str:
    """Make the platform project and its key, if there are none, and return the key.

    Args:
        store: with its schema ready.
        kept: a file, mode 0600, where the key is kept between starts: the store cannot tell it again.
        environment: goes into the key's text.
        another: make a key even if there is one, for whoever has lost it.

    Returns:
        The key; empty if one exists and `kept` does not hold it. With `kept`, a lost file is answered by a new key.
    """
    held = kept.read_text().strip() if kept is not None and kept.exists() else ""
    if held and (presented := keys.parse(held)) and keys.proves(presented, await store.key(presented.uid), store.pepper):
        return held
    async with store.transaction() as connection:
        project = await _platform(connection)
        if kept is None and not another and (await connection.execute(text(_HAS_KEY), {"uid": project})).scalar():
            return ""
        token = await _minted(connection, project, "bootstrap", environment, store.pepper, SCOPES)
        if kept is not None:
            _keep(kept, token)
    return token


async def lend(store: Store, seconds: int, scopes: frozenset[str], environment: str = "live") -> str:
    """A key of the platform's with these scopes, which ends by itself after `seconds`."""
    async with store.transaction() as connection:
        return await _minted(connection, await _platform(connection), "lent", environment, store.pepper, scopes, seconds)


_HAS_KEY = "SELECT 1 FROM api_keys WHERE project_uid = :uid AND 'platform' = ANY(scopes) AND state = 'ACTIVE' LIMIT 1"


async def _platform(connection: AsyncConnection) -> str:
    """The uid of the platform's project, made if there is none."""
    await connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
    asked = text("SELECT uid FROM projects WHERE name = :name AND state <> 'DELETED'")
    found = (await connection.execute(asked, {"name": PLATFORM_PROJECT})).scalar()
    if found is not None:
        return str(found)
    uid = str(uuid4())
    await connection.execute(
        text("INSERT INTO projects (uid, name, display_name, kv_secret) VALUES (:uid, :name, 'Platform', :secret)"),
        {"uid": uid, "name": PLATFORM_PROJECT, "secret": os.urandom(32)},
    )
    await connection.execute(text("INSERT INTO quota_policies (project_uid) VALUES (:uid)"), {"uid": uid})
    return uid


async def _minted(
    connection: AsyncConnection,
    project: str,
    display_name: str,
    environment: str,
    pepper: bytes,
    scopes: frozenset[str],
    seconds: int | None = None,
) -> str:
    """The text of a new key of the project; without `seconds` it does not end."""
    minted = keys.mint(str(uuid4()), environment, pepper)
    await connection.execute(
        text(
            """INSERT INTO api_keys (project_uid, uid, display_name, mac, scopes, expire_time)
            VALUES (:project, :uid, :name, :mac, :scopes, clock_timestamp() + make_interval(secs => CAST(:seconds AS double precision)))"""
        ),
        {
            "project": project,
            "uid": minted.uid,
            "name": display_name,
            "mac": minted.mac,
            "scopes": sorted(scopes),
            "seconds": seconds,
        },
    )
    return minted.token


def _keep(file: Path, token: str) -> None:
    fresh = file.with_name(file.name + ".new")
    fresh.unlink(missing_ok=True)
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as handle:
        handle.write(token)
    fresh.rename(file)
