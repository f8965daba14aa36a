"""Wakes whoever follows a log: one LISTEN connection a process and channel, and a slow look where it is down."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from weakref import WeakValueDictionary

from services.chassis.errors import StoreUnavailable
from services.finetune.store import FineTuneStore

log = logging.getLogger(__name__)

CHANNEL = "argosy_registry"
QUIET_SECONDS = 15.0  # then a bookmark says that the feed lives
BLIND_SECONDS = 1.0  # between looks while nothing can wake us
RETRY_SECONDS = 1.0


class Feed:
    """Opened by `following`. A pulse says that something changed, not what: whoever follows looks at its own rows."""

    def __init__(self, channel: str = CHANNEL) -> None:
        self._channel = channel
        self._pulses: WeakValueDictionary[str, asyncio.Event] = WeakValueDictionary()  # by subject, while anybody waits for it
        self._sighted = False

    def pulse(self, subject: str = "") -> asyncio.Event:
        """Taken before a look at the table, it is set by whatever is committed after.

        `subject`: what the notifications name, such as a job's uid, where nothing else is of interest; empty: everything is.
        """
        found = self._pulses.get(subject)
        if found is None:
            found = self._pulses[subject] = asyncio.Event()
        return found

    async def wait(self, pulse: asyncio.Event, quiet_s: float = QUIET_SECONDS) -> bool:
        """Until something was committed after `pulse` was taken; False: nothing in `quiet_s`, as far as is known."""
        try:
            async with asyncio.timeout(quiet_s if self._sighted else min(quiet_s, BLIND_SECONDS)):
                await pulse.wait()
        except TimeoutError:
            return False
        return True

    def wake(self, subject: str = "") -> None:
        """Something was committed about this subject."""
        for name in {subject, ""}:
            pulse = self._pulses.pop(name, None)
            if pulse is not None:
                pulse.set()

    def _sees(self) -> None:
        self._sighted = True
        for subject in tuple(self._pulses):  # what was committed while nobody listened
            self.wake(subject)

    async def follow(self, store: FineTuneStore) -> None:
        """Listen, and again when the connection breaks, until cancelled."""
        await store.ready.wait()
        while True:
            try:
                await store.listen(self.wake, channel=self._channel, ready=self._sees)
            except StoreUnavailable:
                log.warning("nothing wakes the registry's feed: the database is away")
            except Exception:  # else nobody would be woken again, nor know that a slow look is all there is
                log.exception("listening failed on our side")
            self._sighted = False
            await asyncio.sleep(RETRY_SECONDS)


@asynccontextmanager
async def following(store: FineTuneStore, channel: str = CHANNEL) -> AsyncIterator[Feed]:
    """A feed that is awake while the block runs."""
    feed = Feed(channel)
    task = asyncio.create_task(feed.follow(store), name="registry feed")
    try:
        yield feed
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
