"""The embedded PostgreSQL: started once, shared, stopped by the last, found again after a crash."""

import asyncio
import os
import signal
from pathlib import Path

import asyncpg
import pytest

from services.postgres import PostgresFailed, embedded_postgres

QUICK = {"fsync": "off", "full_page_writes": "off"}


async def ask(url: str, statement: str) -> object:
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()


async def test_data_outlives_the_server_and_users_share_it(tmp_path: Path) -> None:
    async with embedded_postgres(tmp_path, QUICK) as url:
        await ask(url, "CREATE TABLE kept AS SELECT 7 AS n")
        async with embedded_postgres(tmp_path, QUICK) as same:
            assert same == url
        assert await ask(url, "SELECT n FROM kept") == 7  # leaving first stops nothing
        folder = Path(url.partition("?host=")[2])
        assert (tmp_path / "password").stat().st_mode & 0o077 == 0
    assert not folder.exists()
    async with embedded_postgres(tmp_path, QUICK) as again:
        assert await ask(again, "SELECT n FROM kept") == 7


async def test_password_is_asked_for(tmp_path: Path) -> None:
    async with embedded_postgres(tmp_path, QUICK) as url:
        password = url.partition("argosy:")[2].partition("@")[0]
        with pytest.raises(asyncpg.InvalidPasswordError):
            await ask(url.replace(password, "guessed"), "SELECT 1")
        assert await ask(url, "SHOW listen_addresses") == ""


async def test_F18_killed_server_is_started_again_with_its_rows(tmp_path: Path) -> None:
    async with embedded_postgres(tmp_path) as url:
        await ask(url, "CREATE TABLE kept AS SELECT 7 AS n")
        postmaster = int((tmp_path / "cluster" / "postmaster.pid").read_text().splitlines()[0])
        os.kill(postmaster, signal.SIGKILL)
        async with asyncio.timeout(20):
            while Path(f"/proc/{postmaster}").exists():
                await asyncio.sleep(0.01)
    async with embedded_postgres(tmp_path) as url:
        assert await ask(url, "SELECT n FROM kept") == 7


async def test_failure_says_why(tmp_path: Path) -> None:
    with pytest.raises(PostgresFailed, match="no_such_setting"):
        async with embedded_postgres(tmp_path, {"no_such_setting": "1"}):
            pass
