"""PostgreSQL as fine-tuning uses it: transactions in the schema `finetune`, its migrations, and its notifications.

Everything waits at most `STATEMENT_SECONDS`. A connection whose statement was cancelled or timed out is closed, never given back: its
next reader would get the answer to the last question (L2).
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import alembic.command
import alembic.config
import alembic.script
import asyncpg
import sqlalchemy.exc
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from services.chassis.errors import StoreUnavailable

log = logging.getLogger(__name__)

SCHEMA = "finetune"
STATEMENT_SECONDS = 5.0
CONNECT_SECONDS = 2.0
MIGRATION_LOCK = 0x4152474F5446  # any number that only we use
CHANNEL = "argosy_jobs"  # a notification's payload is a job's uid

_SERVER_SETTINGS = {
    "application_name": "argosy-finetune",
    "search_path": SCHEMA,
    "statement_timeout": f"{STATEMENT_SECONDS * 1000:.0f}",
    "idle_in_transaction_session_timeout": "15000",
    "tcp_user_timeout": "5000",
    "timezone": "UTC",
    "jit": "off",
}
# Classes of SQLSTATE that speak of the server, not of the statement: connection, credentials, resources, operator, system, rollback.
_DOWN_CLASSES = {"08", "28", "40", "53", "55", "57", "58", "XX"}
_READ_ONLY = "25006"  # a primary that has become a standby
_DRIVER_ERRORS = (sqlalchemy.exc.SQLAlchemyError, OSError, asyncpg.PostgresError, asyncpg.InterfaceError)


def down(error: BaseException) -> bool:
    """Whether an error of the driver means that the store cannot answer now, rather than that it refused."""
    if isinstance(error, sqlalchemy.exc.DBAPIError):
        state = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
        return error.connection_invalidated or state is None or state[:2] in _DOWN_CLASSES or state == _READ_ONLY
    if isinstance(error, asyncpg.PostgresError):
        state = error.sqlstate or ""
        return state[:2] in _DOWN_CLASSES or state == _READ_ONLY
    return isinstance(error, OSError | TimeoutError | asyncpg.InterfaceError | asyncpg.InternalClientError | sqlalchemy.exc.TimeoutError)


@dataclass(eq=False)
class FineTuneStore:
    """The service's tables. Opened by `open_store`."""

    engine: AsyncEngine
    dsn: str
    ready: asyncio.Event = field(default_factory=asyncio.Event)  # migrations are done

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """One transaction, committed at the end of the block.

        Raises:
            StoreUnavailable: the database is away, slow or full; nothing was acknowledged.
            sqlalchemy.exc.IntegrityError: a rule of the schema was broken; the caller names it.
        """
        try:
            async with self.engine.begin() as connection:
                yield connection
        except _DRIVER_ERRORS as error:
            if down(error):
                raise StoreUnavailable from error
            raise

    async def listen(self, changed: Callable[[str], None], *, channel: str = CHANNEL, ready: Callable[[], None] | None = None) -> None:
        """Call `changed` with the payload of each notification, for as long as a connection lasts; returns when it breaks.

        `ready` is called once nothing can be missed any more.
        """
        broken = asyncio.Event()
        try:
            connection = await asyncpg.connect(self.dsn, timeout=CONNECT_SECONDS, server_settings=_SERVER_SETTINGS)
        except Exception as error:
            if down(error):
                raise StoreUnavailable from error
            raise
        try:
            connection.add_termination_listener(lambda _: broken.set())
            await connection.add_listener(channel, lambda _connection, _pid, _channel, payload: changed(payload))
            if ready is not None:
                ready()
            await broken.wait()
        finally:
            connection.terminate()


def migrate(connection: Any) -> None:
    """Bring the schema to this release's version, on a synchronous connection inside a transaction; one process at a time does it."""
    connection.execute(text("SELECT set_config('statement_timeout', '0', true)"))
    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
    connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {SCHEMA}"))
    connection.execute(text(f"SET LOCAL search_path TO {SCHEMA}"))
    config = alembic.config.Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    known = {revision.revision for revision in alembic.script.ScriptDirectory.from_config(config).walk_revisions()}
    if connection.execute(text(f"SELECT to_regclass('{SCHEMA}.schema_version')")).scalar() is not None:
        present = connection.execute(text(f"SELECT version_num FROM {SCHEMA}.schema_version")).scalar()
        if present is not None and present not in known:
            return  # a later release has expanded it; we still fit (F33)
    alembic.command.upgrade(config, "head")


async def _until_migrated(store: FineTuneStore) -> None:
    pause_s = 0.1
    while True:
        try:
            async with store.engine.begin() as connection:
                await connection.run_sync(migrate)
        except _DRIVER_ERRORS as error:
            if not down(error):
                raise
            log.warning("the database is away; next try in %.1f s", pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2.0, pause_s * 2)
        else:
            store.ready.set()
            return


@asynccontextmanager
async def open_store(database_url: str, connections: int = 8, *, wait: bool = False) -> AsyncIterator[FineTuneStore]:
    """Open the pool and migrate in the background, trying again until the database is there; `store.ready` says when.

    `wait`: return only when the schema is ready.
    """
    url = make_url(database_url).set(drivername="postgresql+asyncpg")
    engine = create_async_engine(
        url,
        pool_size=connections,
        max_overflow=0,
        pool_timeout=STATEMENT_SECONDS,
        hide_parameters=True,  # an error's text goes to the log
        pool_pre_ping=True,  # a restart of the database must not fail the next change
        connect_args={"timeout": CONNECT_SECONDS, "command_timeout": STATEMENT_SECONDS + 0.5, "server_settings": _SERVER_SETTINGS},
    )
    store = FineTuneStore(engine, url.set(drivername="postgresql").render_as_string(hide_password=False))
    migrating = asyncio.create_task(_until_migrated(store), name="migrations")
    try:
        if wait:
            await migrating
        yield store
    finally:
        migrating.cancel()
        await asyncio.gather(migrating, return_exceptions=True)
        await engine.dispose()
