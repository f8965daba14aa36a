"""The half of a host that does not care where its engine runs: streams by call id, readiness and load. For one event loop."""

import asyncio
from abc import abstractmethod
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Generic, TypeVar

from services.inference.engine.calls import Abort, Asked, Done, FromEngine, Hello, Load, Stop, ToEngine

STREAM_FRAMES = 64  # that a stream may be behind
NO_LOAD = Load(0, 0, 0, 0, 0.0, 0.0, 0, 0, 0, 0, 0.0, 0)
T = TypeVar("T")


class EngineLost(Exception):
    """The engine ended under a call, or could not start. What was streamed so far is true, and it is all there will be."""


class EngineNotReady(EngineLost):
    """The call was not sent: the engine is starting, draining or gone. It may be retried elsewhere."""


class SlowReader(Exception):
    """A stream was not read for `STREAM_FRAMES` frames; its call was aborted."""


class Latest(Generic[T]):
    """A value that can be watched; a watcher who is late sees only the newest."""

    def __init__(self, value: T) -> None:
        self.value = value
        self._changed = asyncio.Event()

    def set(self, value: T) -> None:
        """Tell every watcher."""
        self.value = value
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch(self) -> AsyncIterator[T]:
        """The value now and after each change."""
        while True:
            changed = self._changed
            yield self.value
            await changed.wait()


class Stream:
    """What the loop has read for one call and its reader has not."""

    def __init__(self) -> None:
        self._frames: deque[list[FromEngine]] = deque()
        self._changed = asyncio.Event()
        self._failure: Exception | None = None

    def feed(self, messages: list[FromEngine]) -> bool:
        """False: it is full."""
        if len(self._frames) >= STREAM_FRAMES:
            return False
        self._frames.append(messages)
        self._changed.set()
        return True

    def fail(self, failure: Exception) -> None:
        """Raise it to the reader, after what it has not read yet."""
        self._failure = failure
        self._changed.set()

    async def read(self) -> list[FromEngine]:
        """The oldest frame. Raises what `fail` was given, once all is read."""
        while not self._frames:
            if self._failure is not None:
                raise self._failure
            self._changed.clear()
            await self._changed.wait()
        return self._frames.popleft()


class Streaming:
    """What `ProcessHost` and `InlineHost` have in common; see `host.Host`. They `_post`, and tell what was `_received` or is `_gone`."""

    def __init__(self) -> None:
        self._hello: Hello | None = None
        self._load = Latest(NO_LOAD)
        self._ready = Latest(False)
        self._streams: dict[str, Stream] = {}
        self._leaving: dict[str, asyncio.Event] = {}  # calls aborted by their reader, until the engine says Done

    @abstractmethod
    def _post(self, message: ToEngine) -> None:
        """Send it, soon and without waiting."""

    @property
    def hello(self) -> Hello:
        """See `host.Host`."""
        if self._hello is None:
            raise EngineNotReady("the engine has not started")
        return self._hello

    @property
    def load(self) -> Load:
        """See `host.Host`."""
        return self._load.value

    @property
    def ready(self) -> bool:
        """See `host.Host`."""
        return self._ready.value

    def watch_load(self) -> AsyncIterator[Load]:
        """See `host.Host`."""
        return self._load.watch()

    def watch_ready(self) -> AsyncIterator[bool]:
        """See `host.Host`."""
        return self._ready.watch()

    def stop(self, id: str, index: int) -> None:
        """See `host.Host`."""
        self._post(Stop(id, index))

    def abort(self, *ids: str) -> None:
        """See `host.Host`."""
        self._post(Abort(ids))

    async def submit(self, call: Asked) -> AsyncGenerator[FromEngine, None]:
        """See `host.Host`."""
        id = call.id
        while (leaving := self._leaving.get(id)) is not None:
            await leaving.wait()  # its predecessor's last messages would be taken for its own
        if not self.ready:
            raise EngineNotReady("the engine is not ready")
        if id in self._streams:
            raise ValueError(f"call {id} is running")
        self._post(call)
        stream = self._streams[id] = Stream()
        try:
            while True:
                for message in await stream.read():
                    yield message
                    if isinstance(message, Done):
                        return
        finally:
            if self._streams.get(id) is stream:
                self._leave(id)

    def _leave(self, id: str) -> None:
        del self._streams[id]
        self._leaving[id] = asyncio.Event()
        self._post(Abort((id,)))

    def _received(self, messages: Sequence[FromEngine]) -> None:
        """Sort one frame by call. Never waits."""
        frames: dict[str, list[FromEngine]] = {}
        for message in messages:
            if isinstance(message, Load):
                self._load.set(message)
            elif isinstance(message, Hello):
                self._warm(message)
            else:
                frames.setdefault(message.id, []).append(message)
        for id, frame in frames.items():
            over = isinstance(frame[-1], Done)
            stream = self._streams.get(id)
            if stream is None:
                if over and (leaving := self._leaving.pop(id, None)) is not None:
                    leaving.set()
                continue
            if not stream.feed(frame):
                stream.fail(SlowReader(f"call {id} was not read"))
                self._leave(id)
                if over:
                    self._leaving.pop(id).set()
            elif over:
                del self._streams[id]

    def _warm(self, hello: Hello) -> None:
        self._hello = hello
        self._ready.set(True)

    def _gone(self, why: str) -> None:
        """Every stream ends: with EngineLost, after what it has not read yet."""
        self._ready.set(False)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(EngineLost(why))
        leaving, self._leaving = self._leaving, {}
        for event in leaving.values():
            event.set()
