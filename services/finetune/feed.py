"""Wakes whoever follows the gateways' feed: one LISTEN connection a process, and a slow look where it is down."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

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
        self._changed = asyncio.Event()
        self._sighted = False

    def pulse(self) -> asyncio.Event:
        """Taken before a look at the table, it is set by whatever is committed after."""
        return self._changed

    async def wait(self, pulse: asyncio.Event, quiet_s: float = QUIET_SECONDS) -> bool:
        """Until something was committed after `pulse` was taken; False: nothing in `quiet_s`, as far as is known."""
        try:
            async with asyncio.timeout(quiet_s if self._sighted else min(quiet_s, BLIND_SECONDS)):
                await pulse.wait()
        except TimeoutError:
            return False
        return True

    def wake(self) -> None:
        """Something was committed."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _sees(self) -> None:
        self._sighted = True
        self.wake()  # what was committed while nobody listened

    async def follow(self, store: FineTuneStore) -> None:
        """Listen, and again when the connection breaks, until cancelled."""
        await store.ready.wait()
        while True:
            try:
                await store.listen(lambda _: self.wake(), channel=self._channel, ready=self._sees)
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
