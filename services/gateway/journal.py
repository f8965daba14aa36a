"""Where the books are kept while the store is away: fsynced files of one line a record, replayed when it returns.

A process writes to a segment of its own, locked while it lives. To replay, it seals the segment and goes on in a new one; segments left
by dead processes are adopted. Replaying is idempotent, so a segment is deleted only after all of it has been applied.
"""

import asyncio
import fcntl
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from uuid import uuid4

import msgspec

from services.gateway.ledger import Reservation, Settlement

SUFFIX = ".journal"


class JournalFull(Exception):
    """The bound is reached: what is not yet acknowledged has to be refused."""


class JournalBroken(Exception):
    """A write or fsync failed. What the disk holds is unknown: no more is written, and a restart reads what is there (F17)."""


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line: a reservation made while the store was away, or a settlement with the reservation that it ends."""

    reservation: Reservation
    settlement: Settlement | None = None


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Entry).decode


def _line(entry: Entry) -> bytes:
    body = _encode(entry)
    return b"%08x %b\n" % (zlib.crc32(body), body)


@dataclass(frozen=True)
class Segment:
    """A sealed file of entries."""

    path: Path
    own: bool  # written by this process, which knows what became of its reservations


def read(segment: Segment) -> list[Entry]:
    """The entries of a segment, up to the first torn line: only the last may be, and it was never acknowledged."""
    entries = []
    with segment.path.open("rb") as lines:
        for line in lines:
            if len(line) < 11 or not line.endswith(b"\n"):
                break
            body = line[9:-1]
            if line[:9] != b"%08x " % zlib.crc32(body):
                break
            entries.append(_decode(body))
    return entries


@dataclass
class Journal:
    """The segments of one process in `folder`; `max_bytes` bounds all of its own together."""

    folder: Path
    max_bytes: int = 64 << 20
    _file: IO[bytes] | None = None
    _path: Path | None = None
    _bytes: int = 0
    _sealed: dict[Path, tuple[IO[bytes], int]] = field(default_factory=dict)  # with their locks
    _own: set[Path] = field(default_factory=set)
    _waiting: list[tuple[bytes, asyncio.Future[None]]] = field(default_factory=list)
    _writing: asyncio.Task[None] | None = None
    _broken: bool = False
    # One thread: an fsync must not wait behind other blocking work, nor two writes for one file overlap.
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "journal"))

    async def append(self, entries: Sequence[Entry]) -> None:
        """Return once the entries are on the disk; entries that arrive together share an fsync.

        Raises:
            JournalFull, JournalBroken: nothing of this call is acknowledged.
        """
        if self._broken:
            raise JournalBroken
        data = b"".join(map(_line, entries))
        if self.bytes + len(data) > self.max_bytes:
            raise JournalFull
        self._bytes += len(data)
        written = asyncio.get_running_loop().create_future()
        self._waiting.append((data, written))
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
        await asyncio.shield(written)

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                await loop.run_in_executor(self._thread, self._flush, b"".join(data for data, _ in batch))
            except OSError as error:
                self._broken = True
                for _, written in batch + self._waiting:
                    if not written.done():
                        written.set_exception(JournalBroken(str(error)))
                    written.exception()  # its waiter may be gone
                self._waiting = []
            else:
                for _, written in batch:
                    if not written.done():
                        written.set_result(None)
        self._writing = None

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = self.folder / f"{uuid4().hex}{SUFFIX}"
        self._file = os.fdopen(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600), "ab", buffering=0)
        fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)  # the name, too, has to survive
        finally:
            os.close(folder)

    def _flush(self, data: bytes) -> None:
        if self._file is None:
            self._open()
        assert self._file is not None
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        os.fsync(self._file.fileno())

    @property
    def holds_any(self) -> bool:
        """Whether this process has written what is not yet replayed."""
        return bool(self._bytes or self._sealed)

    @property
    def bytes(self) -> int:
        """On the disk and on its way there, not yet replayed."""
        return self._bytes + sum(size for _, size in self._sealed.values())

    async def seal(self) -> list[Segment]:
        """Close the open segment to new entries; return all segments to replay: own sealed ones and those of dead processes."""
        while self._writing is not None:
            await asyncio.shield(self._writing)
        if self._file is not None and self._path is not None:
            self._sealed[self._path] = (self._file, self._bytes)
            self._own.add(self._path)
            self._file, self._path, self._bytes = None, None, 0
        for path in sorted(self.folder.glob(f"*{SUFFIX}")) if self.folder.is_dir() else []:
            if path not in self._sealed and path != self._path:
                self._adopt(path)
        return [Segment(path, path in self._own) for path in self._sealed]

    def _adopt(self, path: Path) -> None:
        try:
            orphan = path.open("rb")
        except FileNotFoundError:
            return  # another process has just replayed it
        try:
            fcntl.flock(orphan, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            orphan.close()  # its process lives
            return
        if path.exists():
            self._sealed[path] = (orphan, os.fstat(orphan.fileno()).st_size)
        else:
            orphan.close()

    def drop(self, segment: Segment) -> None:
        """Delete a segment of which every entry has been applied."""
        file, _ = self._sealed.pop(segment.path)
        self._own.discard(segment.path)
        segment.path.unlink(missing_ok=True)
        file.close()

    async def close(self) -> None:
        """Let go of the segments; what they hold is replayed by the next process in this folder."""
        while self._writing is not None:
            await asyncio.shield(self._writing)
        for file in (self._file, *(file for file, _ in self._sealed.values())):
            if file is not None:
                file.close()
        self._file, self._path, self._sealed = None, None, {}
        self._thread.shutdown(wait=True)
