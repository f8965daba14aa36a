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

from services.finetune.schema import METADATA as FINETUNE
from services.finetune.store import SCHEMA
from services.finetune.store import migrate as migrate_finetune
from services.gateway.schema import METADATA
from services.gateway.store import migrate
from services.postgres import embedded_postgres

TEMPLATE = "argosy_template"
# The newest schema versions: a test that leaves another leaves a database that cannot be used again.
HEAD, FINETUNE_HEAD = "0001", "f0003"
# Nothing here outlives a test run, so nothing waits for a disk.
QUICK = {"fsync": "off", "full_page_writes": "off", "max_connections": "200"}


def _database(url: str, name: str) -> str:
    return url.replace("/postgres?", f"/{name}?")


class Server:
    """An embedded server in a thread with an event loop of its own, since each test has another."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._url = ""
        self._clean: list[str] = []
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

    def take(self) -> str:
        """The URL of a database with the tables and nothing in them."""
        return asyncio.run_coroutine_threadsafe(self._take(), self._loop).result(30)

    def give_back(self, url: str) -> None:
        asyncio.run_coroutine_threadsafe(self._give_back(url), self._loop).result(30)

    async def _take(self) -> str:
        if self._clean:
            return self._clean.pop()
        name = f"test_{uuid4().hex}"
        await self._execute(self._url, f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}")
        return _database(self._url, name)

    async def _give_back(self, url: str) -> None:
        """Empty the database for the next test: a new one costs half a second, and a dropped one needs no emptying."""
        name = url.partition("?")[0].rpartition("/")[2]
        try:
            await self._execute(
                url,
                f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}' AND pid <> pg_backend_pid()",
                "SET session_replication_role = replica",  # the ledger's own guard would refuse
                *(f"DELETE FROM {table.name}" for table in reversed(METADATA.sorted_tables)),
                *(f"DELETE FROM {SCHEMA}.{table.name}" for table in reversed(FINETUNE.sorted_tables)),
                f"DO $$ BEGIN ASSERT (SELECT version_num FROM schema_version) = '{HEAD}'; END $$",
                f"DO $$ BEGIN ASSERT (SELECT version_num FROM {SCHEMA}.schema_version) = '{FINETUNE_HEAD}'; END $$",
            )
        except asyncpg.PostgresError:
            await self._execute(self._url, f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        else:
            self._clean.append(url)

    async def _execute(self, url: str, *statements: str) -> None:
        connection = await asyncpg.connect(url.replace("+asyncpg", ""))
        try:
            for statement in statements:
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
            await self._execute(url, f"CREATE DATABASE {TEMPLATE}")
            engine = create_async_engine(_database(url, TEMPLATE))
            async with engine.begin() as connection:
                await connection.run_sync(migrate)
            async with engine.begin() as connection:
                await connection.run_sync(migrate_finetune)
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
    """The URL of a migrated, empty database of the test's own."""
    url = _postgres_server.take()
    yield url
    _postgres_server.give_back(url)


@pytest.fixture
def finetune_url(postgres_url: str) -> str:
    """The same, by the name of the schema a test is about: both are in every database."""
    return postgres_url
