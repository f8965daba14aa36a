"""PostgreSQL as every service with tables uses it: which errors mean that it is away, transactions, notifications, migrations.

A connection whose statement was cancelled or timed out is closed, never given back: its next reader would get the answer to the last
question (L2).
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
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

CONNECT_SECONDS = 2.0
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


def server_settings(application: str, statement_s: float, idle_s: float, **more: str) -> dict[str, str]:
    """What each connection tells the server: its name, how long a statement may run and a transaction may idle, in seconds, and `more`."""
    return {
        "application_name": application,
        "statement_timeout": f"{statement_s * 1000:.0f}",
        "idle_in_transaction_session_timeout": f"{idle_s * 1000:.0f}",
        "tcp_user_timeout": "5000",
        "timezone": "UTC",
        "jit": "off",
    } | more


def pool(url: str, connections: int, statement_s: float, settings: Mapping[str, str]) -> tuple[AsyncEngine, str]:
    """A pool of transactions, and the same database's URL for asyncpg itself."""
    made = make_url(url).set(drivername="postgresql+asyncpg")
    engine = create_async_engine(
        made,
        pool_size=connections,
        max_overflow=0,
        pool_timeout=statement_s,
        pool_pre_ping=True,  # a restart of the database must not fail the next change
        hide_parameters=True,  # an error's text goes to the log
        connect_args={"timeout": CONNECT_SECONDS, "command_timeout": statement_s + 0.5, "server_settings": dict(settings)},
    )
    return engine, made.set(drivername="postgresql").render_as_string(hide_password=False)


@asynccontextmanager
async def transaction(engine: AsyncEngine) -> AsyncIterator[AsyncConnection]:
    """One transaction, committed at the end of the block.

    Raises:
        StoreUnavailable: the database is away, slow or full; nothing was acknowledged.
        sqlalchemy.exc.IntegrityError: a rule of the schema was broken; the caller names it.
    """
    try:
        async with engine.begin() as connection:
            yield connection
    except _DRIVER_ERRORS as error:
        if down(error):
            raise StoreUnavailable from error
        raise


async def listen(
    dsn: str, settings: Mapping[str, str], channel: str, changed: Callable[[str], None], ready: Callable[[], None] | None = None
) -> None:
    """Call `changed` with the payload of each notification, for as long as a connection lasts; returns when it breaks.

    `ready` is called once nothing can be missed any more. Raises StoreUnavailable where no connection is to be had.
    """
    broken = asyncio.Event()
    try:
        connection = await asyncpg.connect(dsn, timeout=CONNECT_SECONDS, server_settings=dict(settings))
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


def migrate(connection: Any, folder: Path, lock: int, schema: str | None = None) -> None:
    """Bring a schema to this release's version, on a synchronous connection inside a transaction; one process at a time does it.

    Args:
        connection: in a transaction of its own.
        folder: alembic's, with `env.py` and `versions/`; its version table is called `schema_version`.
        lock: number of the advisory lock, any that only this schema uses.
        schema: made if absent, and first in the search path; None: the connection's own.
    """
    connection.execute(text("SELECT set_config('statement_timeout', '0', true)"))
    connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": lock})
    if schema is not None:
        connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {schema}"))
        connection.execute(text(f"SET LOCAL search_path TO {schema}"))
    config = alembic.config.Config()
    config.set_main_option("script_location", str(folder))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    known = {revision.revision for revision in alembic.script.ScriptDirectory.from_config(config).walk_revisions()}
    table = "schema_version" if schema is None else f"{schema}.schema_version"
    if connection.execute(text("SELECT to_regclass(:name)"), {"name": table}).scalar() is not None:
        present = connection.execute(text(f"SELECT version_num FROM {table}")).scalar()
        if present is not None and present not in known:
            return  # a later release has expanded it; we still fit (F33)
    alembic.command.upgrade(config, "head")


async def until_migrated(engine: AsyncEngine, migrate: Callable[[Any], None], ready: asyncio.Event) -> None:
    """Migrate, trying again until the database is there; then set `ready`."""
    pause_s = 0.1
    while True:
        try:
            async with engine.begin() as connection:
                await connection.run_sync(migrate)
        except _DRIVER_ERRORS as error:
            if not down(error):
                raise
            log.warning("the database is away; next try in %.1f s", pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(2.0, pause_s * 2)
        else:
            ready.set()
            return
