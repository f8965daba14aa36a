"""Where the engine runs: in a process of its own (`ProcessHost`), or in a thread to debug it (`InlineHost`).

The only file that knows. It imports no torch: the process on the wire stays light, and its loop never waits for a step.
"""

import asyncio
import contextlib
import importlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import msgspec

from services.inference.engine.calls import Asked, Drain, FromEngine, Hello, Load, ToEngine
from services.inference.engine.engine import Engine, offered, run
from services.inference.engine.fetching import Fetcher
from services.inference.engine.frames import FrameError, encode, from_engine, sealed
from services.inference.engine.inbox import Inbox
from services.inference.engine.settings import EngineSettings
from services.inference.engine.step import Runner
from services.inference.engine.streams import EngineLost, EngineNotReady, SlowReader, Streaming
from services.inference.engine.weighing import Weigher
from services.pretrained import weights

__all__ = ["EngineLost", "EngineNotReady", "Host", "InlineHost", "ProcessHost", "Restarts", "SlowReader"]

BUILD = "services.inference.engine.build:build"
PROGRAMS = {"argosy": "services.inference.engine", "vllm": "services.inference.engine.vllm"}
LEAVE_S = 2.0  # for a child to go by itself

log = logging.getLogger(__name__)


class Host(Protocol):
    """An engine as the process on the wire sees it. All methods are for one event loop."""

    @property
    def hello(self) -> Hello:
        """What the engine said when it was warm. Raises EngineNotReady before `start`."""
        ...

    @property
    def load(self) -> Load:
        """The latest; zeros before the first."""
        ...

    @property
    def ready(self) -> bool:
        """Whether `submit` would be sent now."""
        ...

    async def start(self) -> Hello:
        """Returns when the engine is warm. Raises EngineLost if it ends before."""
        ...

    def watch_load(self) -> AsyncIterator[Load]:
        """The load now and at each change; a slow reader skips to the latest."""
        ...

    def watch_ready(self) -> AsyncIterator[bool]:
        """Readiness now and at each change: for the health service."""
        ...

    def submit(self, call: Asked) -> AsyncGenerator[FromEngine, None]:
        """Messages about one call, ending with `Done`. Closing it early aborts the call.

        Raises EngineNotReady, EngineLost or SlowReader; ValueError if a live call has this id.
        """
        ...

    def stop(self, id: str, index: int) -> None:
        """End one output as STOPPED, before the next step."""
        ...

    def abort(self, *ids: str) -> None:
        """End calls as CANCELLED; their streams go on to `Done`, which says what they cost."""
        ...

    async def drain(self, grace_s: float) -> None:
        """Take no more calls, let the running ones finish for `grace_s`, abort the rest, and end the engine."""
        ...

    async def close(self) -> None:
        """End the engine now. Safe to repeat."""
        ...


@dataclass(frozen=True)
class Restarts:
    """How a lost child is replaced: waiting `first_s`, twice as long each time, `most_s` at most, and `limit` times without a Hello."""

    first_s: float = 0.5
    most_s: float = 30.0
    limit: int = 8


class _Wire(asyncio.Protocol):
    """The parent's end of the socket to one child."""

    def __init__(self, received: Callable[[Sequence[FromEngine]], None], lost: Callable[[], None]) -> None:
        self.closed = asyncio.Event()
        self._received = received
        self._lost = lost
        self._reader = from_engine()
        self._transport: asyncio.Transport | None = None
        self._outbox: list[msgspec.Raw] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one without saying so

    def data_received(self, data: bytes) -> None:
        try:
            self._received(self._reader.feed(data))
        except FrameError:
            log.exception("the engine sent what is not a frame")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost()
        self.closed.set()

    def post(self, message: ToEngine) -> None:
        """All that is posted in one turn of the loop goes out as one frame. Raises FrameError for what cannot be sent."""
        raw = sealed(message)
        if not self._outbox:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outbox.append(raw)

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, []
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode(outbox))

    def close(self) -> None:
        """Hang up; the child ends itself when it sees that."""
        if self._transport is not None:
            self._transport.abort()


class ProcessHost(Streaming):
    """The engine in a child process that dies with this one, and is replaced when it dies before.

    `build` names, as `module:function`, what the child calls with the settings to get `(Runner, Hello)`.
    """

    def __init__(self, settings: EngineSettings, build: str = BUILD, restarts: Restarts | None = None) -> None:
        super().__init__()
        self.restarted = 0  # times so far
        self._settings = settings
        self._build = build
        self._restarts = restarts or Restarts()
        self._wire: _Wire | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._greeted: asyncio.Future[Hello] | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._ending = False  # draining or closing: a child that exits is not replaced
        self._heard_at = 0.0  # loop time of the child's last sign of life, or of the call it owes one since

    @property
    def pid(self) -> int | None:
        """Of the current child, or of the last one."""
        return self._process.pid if self._process is not None else None

    async def start(self) -> Hello:
        """Spawn the child and wait until it is warm. A first child that ends before is not replaced."""
        try:
            hello = await self._spawn()
        except BaseException:
            await self.close()
            raise
        self._keeper = asyncio.create_task(self._keep(), name="engine keeper")
        return hello

    async def drain(self, grace_s: float) -> None:
        """Let the calls finish, then abort them, then kill the child: `grace_s + 2 * LEAVE_S` at most."""
        self._ending = True
        self._ready.set(False)
        self._post(Drain())
        if not await self._exits(grace_s):
            self.abort(*self._streams)
            await self._exits(LEAVE_S)
        await self.close()

    async def close(self) -> None:
        """Hang up; kill the child if it does not leave by itself."""
        self._ending = True
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        await self._reap()
        self._gone("the engine was closed")

    async def _spawn(self) -> Hello:
        """A new child, warm. Raises EngineLost if it ends before."""
        loop = asyncio.get_running_loop()
        self._greeted = greeted = loop.create_future()
        settings = self._settings
        if settings.kind == "vllm":  # its environment has nothing to prepare a model with
            settings = msgspec.structs.replace(settings, directory=str(await asyncio.to_thread(_prepared, settings)))
        environment = dict(os.environ)
        if self._settings.threads is not None:
            environment["OMP_NUM_THREADS"] = str(self._settings.threads)  # read once, when torch is imported
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *(settings.python or sys.executable, "-m", PROGRAMS[settings.kind]),
                    *(msgspec.json.encode(settings).decode(), str(theirs.fileno()), str(os.getpid()), self._build),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    env=environment,
                )
            except BaseException:
                ours.close()
                raise
        self._heard_at = loop.time()
        _, self._wire = await loop.create_unix_connection(lambda: _Wire(self._heard, self._lost), sock=ours)
        try:
            hello: Hello = await greeted
        except EngineLost:
            await self._reap()
            raise
        return hello

    async def _keep(self) -> None:
        """Replace the child each time it is lost."""
        loop = asyncio.get_running_loop()
        attempts = 0
        while True:
            warm_at = loop.time()
            await self._until_lost()
            await self._reap()
            if self._ending:
                return
            if loop.time() - warm_at > self._restarts.most_s:
                attempts = 0  # it has lived: this is no loop of crashes
            hello = None
            while hello is None:
                if attempts == self._restarts.limit:
                    log.critical("the engine is lost for good")
                    return
                wait_s = min(self._restarts.first_s * 2**attempts, self._restarts.most_s)
                log.error("the engine is lost; a new one starts in %.1f s", wait_s)
                await asyncio.sleep(wait_s)
                attempts += 1
                with contextlib.suppress(EngineLost):
                    hello = await self._spawn()
            self.restarted += 1

    async def _until_lost(self) -> None:
        wire, process, hang_s = self._wire, self._process, self._settings.hang_s
        assert wire is not None and process is not None  # after `_spawn`
        while not wire.closed.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(hang_s / 4):  # not wait_for, which on Python 3.11 may swallow a cancellation
                    await wire.closed.wait()
            owes = self._streams or self._leaving
            if owes and asyncio.get_running_loop().time() - self._heard_at > hang_s and process.returncode is None:
                log.error("the engine has said nothing for %.0f s", hang_s)
                process.kill()

    async def _exits(self, within_s: float) -> bool:
        if self._process is None:
            return True
        try:
            async with asyncio.timeout(within_s):
                await self._process.wait()
        except TimeoutError:
            return False
        return True

    async def _reap(self) -> None:
        """Hang up, and see to it that the child is gone."""
        if self._wire is not None:
            self._wire.close()
        if self._process is not None:
            if not await self._exits(LEAVE_S):
                self._process.kill()
                await self._process.wait()
            if self._settings.kind == "vllm":  # it leads a group of processes that outlive it where it was killed
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)

    def _post(self, message: ToEngine) -> None:
        if not self._streams and not self._leaving:  # from here on it owes an answer
            self._heard_at = asyncio.get_running_loop().time()
        if self._wire is not None:
            self._wire.post(message)

    def _heard(self, messages: Sequence[FromEngine]) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        self._received(messages)

    def _warm(self, hello: Hello) -> None:
        super()._warm(hello)
        if self._greeted is not None and not self._greeted.done():
            self._greeted.set_result(hello)

    def _lost(self) -> None:
        self._gone("the engine's process ended")
        if self._greeted is not None and not self._greeted.done():
            self._greeted.set_exception(EngineLost("the engine ended before it was ready"))


class InlineHost(Streaming):
    """The engine in a thread, for a debugger and for tests of the wire. It computes under this process's interpreter lock, so streams
    stutter; and when it fails, it is not replaced. Without `build`, the process's own loads the model."""

    def __init__(
        self, settings: EngineSettings | None = None, build: Callable[[EngineSettings], tuple[Runner, Hello]] | None = None
    ) -> None:
        super().__init__()
        self._settings = settings or EngineSettings()
        self._build = build
        self._inbox = Inbox()
        self._fresh: list[FromEngine] = []  # said by the engine, not yet seen by the loop
        self._fresh_lock = threading.Lock()
        self._ended = asyncio.Event()
        self._thread: threading.Thread | None = None

    async def start(self) -> Hello:
        """Load in the thread and wait until it is warm."""
        loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, args=(loop,), name="engine", daemon=True)
        self._thread.start()
        async for ready in self._ready.watch():
            if ready:
                break
            if self._ended.is_set():
                raise EngineLost("the engine ended before it was ready")
        return self.hello

    async def drain(self, grace_s: float) -> None:
        """Let the calls finish, then abort them."""
        self._ready.set(False)
        self._post(Drain())
        for within_s in (grace_s, LEAVE_S):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await self._ended.wait()
                break
            self.abort(*self._streams)
        await self.close()

    async def close(self) -> None:
        """End the thread after the step in flight."""
        self._inbox.close()
        if self._thread is not None:
            await self._ended.wait()
            self._thread.join()
        self._gone("the engine was closed")

    def _post(self, message: ToEngine) -> None:
        self._inbox.put((message,))

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        def send(events: Sequence[FromEngine]) -> None:
            # What a busy loop has not fetched yet grows by one frame, as it would in a socket.
            with self._fresh_lock:
                if not self._fresh:
                    loop.call_soon_threadsafe(self._fetch)
                self._fresh.extend(events)

        try:
            runner, hello = (self._build or _named(BUILD))(self._settings)
            fetcher, weigher = Fetcher(runner.fetch, self._inbox), Weigher(runner.weigh, self._inbox)
            engine = Engine(runner, hello, self._settings, fetch=fetcher.ask, weighing=weigher)
            send([offered(hello, runner)])
            run(engine, self._inbox, send)
        except Exception:
            log.exception("the engine ends")
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(self._over)

    def _fetch(self) -> None:
        with self._fresh_lock:
            fresh, self._fresh = self._fresh, []
        self._received(fresh)

    def _over(self) -> None:
        self._gone("the engine's thread ended")
        self._ended.set()


def _prepared(settings: EngineSettings) -> Path:
    return weights.prepare(settings.model, weights.cache_directory(settings.cache_dir))


def _named(build: str) -> Callable[[EngineSettings], tuple[Runner, Hello]]:
    module, _, function = build.partition(":")
    found: Callable[[EngineSettings], tuple[Runner, Hello]] = getattr(importlib.import_module(module), function)
    return found
