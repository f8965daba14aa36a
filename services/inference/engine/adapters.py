"""Every adapter that this engine has heard of, and in what state. Pure: fetching is done elsewhere, and told by `Fetched`.

    (absent) → FETCHING → READY → (dropped)         a failed fetch, or a step that raises, leads to ERRORED, and after a while
                        ↘ ERRORED → FETCHING        the next call for it tries again

An adapter is known by owner and digest together: a digest that is another project's is as unknown as one that nobody has.
"""

import enum
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from services.inference.engine.step import Adapter

READY_BYTES = 1 << 30  # of ready adapters kept in memory, beside those in use
RETRY_S = {"adapter_unavailable": 1.0, "adapter_failed": 30.0, "adapter_refused": 60.0}  # an unknown one is asked for again at once


class State(enum.Enum):
    """Where an adapter is."""

    FETCHING = enum.auto()
    READY = enum.auto()
    ERRORED = enum.auto()


@dataclass(frozen=True, slots=True)
class Fetched:
    """What became of a fetch: an adapter, or a word of `engine.ERRORS`."""

    key: str
    adapter: Adapter | None
    error: str = ""


@dataclass(slots=True)
class Entry:
    """One adapter."""

    key: str
    state: State
    began: float  # of its fetch; engine's clock, seconds
    adapter: Adapter | None = None
    error: str = ""
    retry_at: float = 0.0
    users: int = 0  # calls that wait for it or run with it


def key_of(owner: str, digest: str) -> str:
    """What an adapter is known by."""
    return f"{owner}/{digest}"


def digest_of(key: str) -> str:
    """The digest in a key."""
    return key.rpartition("/")[2]


class Adapters:
    """`fetch` is asked for a key and answers later with `Fetched`; `clock` counts seconds."""

    def __init__(self, fetch: Callable[[str], None], clock: Callable[[], float], most_bytes: int = READY_BYTES) -> None:
        self._fetch = fetch
        self._clock = clock
        self._most_bytes = most_bytes
        self._entries: OrderedDict[str, Entry] = OrderedDict()  # least recently used first
        self._bytes = 0
        self.changes = 0  # so far, of what is ready

    @property
    def ready(self) -> tuple[str, ...]:
        """Digests of those that need no fetch, most recently used last."""
        return tuple(digest_of(key) for key, entry in self._entries.items() if entry.state is State.READY)

    def keys(self, digest: str, owner: str) -> list[str]:
        """Those of a digest; `owner` empty: whoever's."""
        return [key for key in self._entries if digest_of(key) == digest and owner in ("", key.rpartition("/")[0])]

    def use(self, key: str) -> Entry:
        """Somebody needs it: fetched if it is not here and need not rest. `release` once for each."""
        entry = self._entries.get(key)
        now = self._clock()
        if entry is None or (entry.state is State.ERRORED and now >= entry.retry_at):
            entry = self._entries[key] = Entry(key, State.FETCHING, now)
            self._fetch(key)
        self._entries.move_to_end(key)
        entry.users += 1
        return entry

    def release(self, entry: Entry) -> None:
        """The call that used it has ended."""
        entry.users -= 1

    def arrived(self, fetched: Fetched) -> Entry | None:
        """A fetch has ended; None: nobody asks for it any more, or it was dropped meanwhile."""
        entry = self._entries.get(fetched.key)
        if entry is None or entry.state is not State.FETCHING:
            return None
        if fetched.adapter is None:
            self.fail(entry, fetched.error)
        else:
            entry.state, entry.adapter = State.READY, fetched.adapter
            self._bytes += fetched.adapter.memory_bytes
            self.changes += 1
        return entry

    def fail(self, entry: Entry, error: str) -> None:
        """It cannot be used until it may be tried again."""
        self._shed(entry)
        entry.state, entry.error = State.ERRORED, error
        entry.retry_at = self._clock() + RETRY_S.get(error, 0.0)
        if error not in RETRY_S:  # nothing is kept of what does not exist: names cost nothing to make up
            self._entries.pop(entry.key, None)

    def drop(self, key: str) -> None:
        """Forget it, whatever its state."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._shed(entry)

    def surplus(self) -> list[str]:
        """Forget what was not used longest, of what no call uses, down to the limit; returns their keys."""
        over = []
        for key, entry in list(self._entries.items()):
            if self._bytes <= self._most_bytes:
                break
            if entry.state is State.READY and not entry.users:
                self.drop(key)
                over.append(key)
        if len(self._entries) > 4096:  # errors of long ago
            now = self._clock()
            for key in [key for key, e in self._entries.items() if e.state is State.ERRORED and e.retry_at <= now and not e.users]:
                del self._entries[key]
        return over

    def _shed(self, entry: Entry) -> None:
        if entry.adapter is not None:
            self._bytes -= entry.adapter.memory_bytes
            entry.adapter = None
            self.changes += 1
