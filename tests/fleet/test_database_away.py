"""The database is away for some seconds: who is known goes on being served, and what was used is booked once, later."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import argosy
from argosy import AsyncClient
from argosy.errors import Unavailable
from services import postgres
from tests.fleet.running import SETTLED, Fleet, Tenant

SHORT = argosy.config(max_output_tokens=8, min_output_tokens=8)
LONG = argosy.config(temperature=1, seed=4, max_output_tokens=400, min_output_tokens=400)


@contextlib.asynccontextmanager
async def database_away(fleet: Fleet) -> AsyncIterator[None]:
    """Kill the fleet's embedded server, and start it again as it was."""
    cluster, account = fleet.home / "postgres" / "cluster", postgres._account()
    await postgres._call(account, postgres._binary("pg_ctl"), "stop", "-w", "-s", "-m", "immediate", "-D", str(cluster))
    try:
        yield
    finally:
        # `restart` takes the options of the last start from the data directory.
        command = (postgres._binary("pg_ctl"), "restart", "-w", "-s", "-D", str(cluster), "-l", str(cluster / "server.log"))
        await postgres._call(account, *command)


async def test_F15_streams_go_on_and_the_books_are_written_once(tenant: Tenant) -> None:
    async with tenant.client() as client:
        await client.generate("hello", config=SHORT)  # the key is known from here on
        began = asyncio.Event()
        running = asyncio.ensure_future(_read(client, began))
        await began.wait()
        async with database_away(tenant.fleet):
            assert await running == 400, "a stream that runs needs no database"
            away = await asyncio.gather(*(client.generate(f"hello {number}", config=SHORT) for number in range(5)))
            assert all(result.completed.usage.output_tokens == 8 for result in away)
            await _refused(tenant.fleet)
        rows = await tenant.records(7)
        assert {row.outcome for row in rows} == {SETTLED.USAGE_OUTCOME_COMPLETED}
        truth = await tenant.fleet.truth([row.generation_id for row in rows])
        assert truth == {row.generation_id: (row.usage.input_tokens, row.usage.output_tokens) for row in rows}
        again = await client.generate("hello", config=SHORT)
        assert again.completed.usage.output_tokens == 8
        assert len({row.generation_id for row in await tenant.records(8)}) == 8, "nothing is replayed twice"


async def _read(client: AsyncClient, began: asyncio.Event) -> int:
    async with client.stream_generate("One, two,", config=LONG) as stream:
        async for event in stream.events():
            if event.HasField("text"):
                began.set()
    return int(stream.result.completed.usage.output_tokens)


async def _refused(fleet: Fleet) -> None:
    """What must be written is not taken."""
    async with AsyncClient(fleet.address, fleet.api_key) as platform:
        try:
            await platform.create_project("t-not-now")
        except Unavailable as error:
            assert error.reason == "STORE_UNAVAILABLE"
        else:
            raise AssertionError("a project was made without a database")
