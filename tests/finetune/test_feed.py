import asyncio
import gc
from typing import Any, cast

import pytest
from sqlalchemy import text

from services.finetune import feed as module
from services.finetune import sql_models
from services.finetune.feed import Feed, following
from services.finetune.store import CHANNEL, FineTuneStore, open_store

PROJECT = "0b0e5a5e-0a4c-4a39-9d0f-2f6a6f0f4a01"


async def test_a_commit_wakes_who_took_the_pulse_before_it(finetune_url: str) -> None:
    async with open_store(finetune_url, wait=True) as store, following(store) as feed:
        pulse = feed.pulse()
        await pulse.wait()  # it listens now
        for _ in range(3):
            pulse = feed.pulse()
            waiting = asyncio.create_task(feed.wait(pulse, 20))
            async with store.transaction() as connection:
                await sql_models.emit(connection, PROJECT, "moved", {"model": "m", "alias": ""})
            assert await waiting


async def test_without_a_listener_a_wait_is_short_and_says_that_it_knows_nothing() -> None:
    feed = Feed()
    assert not await asyncio.wait_for(feed.wait(feed.pulse(), 3_600), 30)


async def test_a_pulse_taken_before_a_look_is_not_lost_by_a_change_during_it() -> None:
    feed = Feed()
    pulse = feed.pulse()
    feed.wake()
    assert await feed.wait(pulse, 20)


async def test_a_change_wakes_who_waits_for_its_subject_and_who_waits_for_all() -> None:
    feed = Feed()
    mine, other, every = feed.pulse("job-1"), feed.pulse("job-2"), feed.pulse()
    assert feed.pulse("job-1") is mine  # all watchers of one job have one
    feed.wake("job-1")
    assert mine.is_set() and every.is_set() and not other.is_set()
    assert feed.pulse("job-1") is not mine and not feed.pulse("job-1").is_set()
    feed._sees()  # the connection is back: anything may have changed
    assert other.is_set()


async def test_subjects_that_nobody_waits_for_are_not_kept() -> None:
    feed = Feed()
    for number in range(100):
        feed.pulse(f"job-{number}")
    gc.collect()
    assert len(feed._pulses) == 0


async def test_a_watch_is_woken_by_its_own_job_alone(finetune_url: str) -> None:
    async with open_store(finetune_url, wait=True) as store, following(store, CHANNEL) as feed:
        await feed.pulse("").wait()  # it listens now
        other, mine = feed.pulse("other"), feed.pulse("mine")
        async with store.transaction() as connection:
            await connection.execute(text("SELECT pg_notify(:channel, 'mine')"), {"channel": CHANNEL})
        assert await feed.wait(mine, 20)
        assert not other.is_set()


async def test_the_feed_forgets_what_no_gateway_needs(finetune_url: str) -> None:
    async with open_store(finetune_url, wait=True) as store, store.transaction() as connection:
        before = await sql_models.last_sequence(connection)
        for kind in ("moved", "erased", "moved", "erased", "ready"):
            await sql_models.emit(connection, PROJECT, kind, {"model": "m", "alias": ""})
        for sequence, days in ((1, 2), (2, 2), (3, 0), (4, 40), (5, 2)):
            aged = text("UPDATE registry_events SET create_time = clock_timestamp() - make_interval(days => :d) WHERE sequence = :s")
            await connection.execute(aged, {"d": days, "s": before + sequence})
        await sql_models.fold_events(connection)
        assert [row["sequence"] - before for row in await sql_models.events(connection, before)] == [2, 3]
        assert await sql_models.last_sequence(connection) == before + 5  # a cursor past them is none ahead


async def test_a_fault_does_not_end_the_listening(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = asyncio.Event()

    class Store:
        ready = asyncio.Event()
        tries = 0

        async def listen(self, changed: Any, **options: Any) -> None:
            self.tries += 1
            if self.tries == 1:
                raise ValueError("a payload of another release")
            heard.set()
            await asyncio.Event().wait()

    Store.ready.set()
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.01)
    async with following(cast("FineTuneStore", Store())), asyncio.timeout(30):
        await heard.wait()
