"""The one heavy fixture of the tests: a real PostgreSQL, one server a test process, one cheap database a test."""

import asyncio
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from services.gateway.store import migrate
from services.postgres import embedded_postgres

TEMPLATE = "argosy_template"
# Nothing here outlives a test run, so nothing waits for a disk.
QUICK = {"fsync": "off", "full_page_writes": "off", "max_connections": "200"}


def _database(url: str, name: str) -> str:
    return url.replace("/postgres?", f"/{name}?")


class Server:
    """An embedded server in a thread with an event loop of its own, since each test has another."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._url = ""
        self._loop = asyncio.new_event_loop()
        self._up, self._leave = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="postgres")

    def start(self) -> None:
        self._thread.start()
        self._up.wait()
        assert self._url, "the embedded server did not start"

    def stop(self) -> None:
        if self._url:
            self._loop.call_soon_threadsafe(self._leave.set)
        self._thread.join()
        self._loop.close()

    def make(self, name: str) -> str:
        self._do(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} STRATEGY wal_log")
        return _database(self._url, name)

    def drop(self, name: str) -> None:
        self._do(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def _do(self, statement: str) -> None:
        asyncio.run_coroutine_threadsafe(self._execute(statement), self._loop).result(30)

    async def _execute(self, statement: str) -> None:
        connection = await asyncpg.connect(self._url.replace("+asyncpg", ""))
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._up.set()

    async def _serve(self) -> None:
        async with embedded_postgres(self._folder, QUICK) as url:
            self._url = url
            await self._execute(f"CREATE DATABASE {TEMPLATE}")
            engine = create_async_engine(_database(url, TEMPLATE))
            async with engine.begin() as connection:
                await connection.run_sync(migrate)
            await engine.dispose()
            self._up.set()
            await self._leave.wait()


@pytest.fixture(scope="session")
def _postgres_server() -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="argosy-test-"))
    server = Server(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres_url(_postgres_server: Server) -> Iterator[str]:
    """The URL of a fresh, migrated database, dropped after the test."""
    name = f"test_{uuid4().hex}"
    yield _postgres_server.make(name)
    _postgres_server.drop(name)
