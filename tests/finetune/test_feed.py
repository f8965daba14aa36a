import asyncio
from typing import Any, cast

import pytest

from services.finetune import feed as module
from services.finetune import sql_models
from services.finetune.feed import Feed, following
from services.finetune.store import FineTuneStore, open_store

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
