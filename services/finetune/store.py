"""PostgreSQL as fine-tuning uses it: transactions in the schema `finetune`, its migrations, and its notifications.

Everything waits at most `STATEMENT_SECONDS`.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from services.chassis import database

SCHEMA = "finetune"
STATEMENT_SECONDS = 5.0
MIGRATION_LOCK = 0x4152474F5446  # any number that only we use
CHANNEL = "argosy_jobs"  # a notification's payload is a job's uid

_SERVER_SETTINGS = database.server_settings("argosy-finetune", STATEMENT_SECONDS, 15.0, search_path=SCHEMA)


@dataclass(eq=False)
class FineTuneStore:
    """The service's tables. Opened by `open_store`."""

    engine: AsyncEngine
    dsn: str
    ready: asyncio.Event = field(default_factory=asyncio.Event)  # migrations are done

    def transaction(self) -> AbstractAsyncContextManager[AsyncConnection]:
        """See database.transaction."""
        return database.transaction(self.engine)

    async def listen(self, changed: Callable[[str], None], *, channel: str = CHANNEL, ready: Callable[[], None] | None = None) -> None:
        """See database.listen."""
        await database.listen(self.dsn, _SERVER_SETTINGS, channel, changed, ready)


def migrate(connection: Any) -> None:
    """See database.migrate."""
    database.migrate(connection, Path(__file__).parent / "migrations", MIGRATION_LOCK, SCHEMA)


@asynccontextmanager
async def open_store(database_url: str, connections: int = 8, *, wait: bool = False) -> AsyncIterator[FineTuneStore]:
    """Open the pool and migrate in the background, trying again until the database is there; `store.ready` says when.

    `wait`: return only when the schema is ready.
    """
    engine, dsn = database.pool(database_url, connections, STATEMENT_SECONDS, _SERVER_SETTINGS)
    store = FineTuneStore(engine, dsn)
    migrating = asyncio.create_task(database.until_migrated(engine, migrate, store.ready), name="migrations")
    try:
        if wait:
            await migrating
        yield store
    finally:
        migrating.cancel()
        await asyncio.gather(migrating, return_exceptions=True)
        await engine.dispose()
