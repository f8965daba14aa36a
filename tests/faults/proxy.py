"""A TCP proxy that misbehaves on demand, for any edge: latency, jitter, throttle, slices, blackhole, reset at a byte, half-open.

`async with fault_proxy("127.0.0.1:5432") as proxy:` listens on `proxy.address`. Faults are set on `proxy.up` (towards the target) and
`proxy.down` (towards the client) at any time, and hold for every connection.
"""

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

CHUNK_BYTES = 65_536
QUEUED_CHUNKS = 64  # on the way in one direction of one connection


@dataclass
class Faults:
    """What is wrong with one direction."""

    latency_s: float = 0.0
    jitter_s: float = 0.0  # added to the latency, uniform in 0..jitter; order is kept
    bytes_per_s: float | None = None
    slice_bytes: int | None = None  # at most so many bytes a write
    reset_at: int | None = None  # RST to both sides once so many bytes have passed on a connection
    half_open: bool = False  # the end of the stream is not passed on
    passed: int = 0  # bytes of all connections, for assertions
    _open: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._open.set()

    def blackhole(self) -> None:
        """Hold every byte, connections stay: a partition."""
        self._open.clear()

    def heal(self) -> None:
        """End the blackhole; what was held goes on."""
        self._open.set()


class Reset(Exception):
    """The connection is to be reset."""


class Proxy:
    """One running proxy."""

    def __init__(self, target: str, seed: int) -> None:
        self._target = target
        self._random = random.Random(seed)
        self._pairs: dict[asyncio.Task[None], tuple[asyncio.StreamWriter, ...]] = {}
        self._server: asyncio.Server | None = None
        self.up, self.down = Faults(), Faults()
        self.refusing = False  # new connections are reset at once
        self.accepted = 0
        self.address = ""

    @property
    def connections(self) -> int:
        """Connections that are open now."""
        return len(self._pairs)

    def reset(self) -> None:
        """RST on every open connection."""
        for writers in self._pairs.values():
            for writer in writers:
                _reset(writer)

    def blackhole(self) -> None:
        """Hold every byte in both directions."""
        self.up.blackhole()
        self.down.blackhole()

    def heal(self) -> None:
        """End blackholes and refusal."""
        self.refusing = False
        self.up.heal()
        self.down.heal()

    async def _start(self, host: str) -> None:
        self._server = await asyncio.start_server(self._accept, host, 0)
        self.address = f"{host}:{self._server.sockets[0].getsockname()[1]}"

    async def _stop(self) -> None:
        assert self._server is not None
        self._server.close()
        tasks = list(self._pairs)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        if self.refusing:
            _reset(writer)
            return
        task = asyncio.current_task()
        assert task is not None
        self._pairs[task] = (writer,)
        onward: asyncio.StreamWriter | None = None
        try:
            host, _, port = self._target.rpartition(":")
            back, onward = await asyncio.open_connection(host, int(port))
            self._pairs[task] = (writer, onward)
            await asyncio.gather(self._carry(reader, onward, self.up), self._carry(back, writer, self.down))
        except (Reset, OSError):
            for each in (writer, onward):
                if each is not None:
                    _reset(each)
        except asyncio.CancelledError:
            pass  # only `_stop` cancels, and it waits for this task
        finally:
            del self._pairs[task]
            for each in (writer, onward):
                if each is not None:
                    each.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, faults: Faults) -> None:
        """Read and write apart, so that latency delays bytes without thinning them out."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED_CHUNKS)
        writing = asyncio.create_task(self._write(queue, writer, faults))
        reading = asyncio.create_task(self._read(reader, queue, faults))
        try:
            await asyncio.wait((writing, reading), return_when=asyncio.FIRST_EXCEPTION)
            for task in (writing, reading):
                if task.done():
                    task.result()
        finally:
            for task in (writing, reading):
                task.cancel()
            await asyncio.gather(writing, reading, return_exceptions=True)

    async def _read(self, reader: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]], faults: Faults) -> None:
        due = 0.0
        while True:
            data = await reader.read(CHUNK_BYTES)
            late = faults.latency_s + self._random.uniform(0, faults.jitter_s)
            due = max(due, asyncio.get_running_loop().time() + late)
            await queue.put((due, data))
            if not data:
                return

    async def _write(self, queue: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter, faults: Faults) -> None:
        carried = 0
        while True:
            due, data = await queue.get()
            await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
            await faults._open.wait()
            if not data:
                if faults.half_open:
                    await asyncio.Event().wait()  # until the proxy stops: the socket stays open with nobody behind it
                with contextlib.suppress(OSError):
                    writer.write_eof()
                return
            step = faults.slice_bytes or len(data)
            for start in range(0, len(data), step):
                piece = data[start : start + step]
                await faults._open.wait()
                if faults.reset_at is not None and carried + len(piece) >= faults.reset_at:
                    writer.write(piece[: faults.reset_at - carried])
                    await writer.drain()
                    raise Reset
                writer.write(piece)
                await writer.drain()
                carried += len(piece)
                faults.passed += len(piece)
                if faults.bytes_per_s is not None:
                    await asyncio.sleep(len(piece) / faults.bytes_per_s)


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN."""
    sock = writer.get_extra_info("socket")
    if sock is not None and not writer.transport.is_closing():
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@asynccontextmanager
async def fault_proxy(target: str, *, host: str = "127.0.0.1", seed: int = 0) -> AsyncIterator[Proxy]:
    """A proxy in front of `target` (host:port) while the block runs."""
    proxy = Proxy(target, seed)
    await proxy._start(host)
    try:
        yield proxy
    finally:
        await proxy._stop()
