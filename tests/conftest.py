"""The one heavy fixture of the tests: a real PostgreSQL, one server a test process, one cheap database a test."""

import asyncio
import contextlib
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from services.gateway.store import migrate
from services.postgres import embedded_postgres

TEMPLATE = "argosy_template"
# Nothing here outlives a test run, so nothing waits for a disk.
QUICK = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off", "max_connections": "200"}


def _database(url: str, name: str) -> str:
    return url.replace("/postgres?", f"/{name}?")


async def _serve(folder: Path, urls: list[str], up: threading.Event, leave: threading.Event) -> None:
    async with embedded_postgres(folder, QUICK) as url:
        connection = await asyncpg.connect(url.replace("+asyncpg", ""))
        await connection.execute(f"CREATE DATABASE {TEMPLATE}")
        await connection.close()
        engine = create_async_engine(_database(url, TEMPLATE))
        async with engine.begin() as setup:
            await setup.run_sync(migrate)
        await engine.dispose()
        urls.append(url)
        up.set()
        await asyncio.to_thread(leave.wait)


@pytest.fixture(scope="session")
def _postgres_server() -> Iterator[str]:
    """The server's URL; it runs in a thread, since each test has an event loop of its own."""
    folder = Path(tempfile.mkdtemp(prefix="argosy-test-"))
    urls: list[str] = []
    up, leave = threading.Event(), threading.Event()

    def run() -> None:
        try:
            asyncio.run(_serve(folder, urls, up, leave))
        finally:
            up.set()

    thread = threading.Thread(target=run, name="postgres")
    thread.start()
    up.wait()
    try:
        assert urls, "the embedded server did not start"
        yield urls[0]
    finally:
        leave.set()
        thread.join()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
async def postgres_url(_postgres_server: str) -> AsyncIterator[str]:
    """The URL of a fresh, migrated database, dropped after the test."""
    name = f"test_{uuid4().hex}"
    admin = await asyncpg.connect(_postgres_server.replace("+asyncpg", ""))
    await admin.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} STRATEGY wal_log")
    try:
        yield _database(_postgres_server, name)
    finally:
        with contextlib.suppress(asyncpg.InvalidCatalogNameError):  # a test may have dropped it
            await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await admin.close()
