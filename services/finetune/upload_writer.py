"""One writer of an upload: chunks in, parts of 8 MiB stored and acknowledged, one being stored while the next arrives."""

import asyncio
import hashlib
from collections import OrderedDict
from typing import Any
from uuid import uuid4

import google_crc32c
import msgspec

from services.chassis.errors import ChecksumMismatch, QuotaExceeded, UnsupportedFormat, UploadFenced, UploadOffset
from services.chassis.objects import Objects
from services.finetune import upload_store
from services.finetune.queries import Record
from services.finetune.schema.datasets import uploads
from services.finetune.settings import DatasetSettings
from services.finetune.store import FineTuneStore
from services.finetune.uploads import FLUSH_BYTES, Breach, Scan

HASHERS = 256  # of uploads that are under way; an upload without one is hashed again when it is finalised


class Hashers:
    """SHA-256 of what each upload has stored, as long as this process has seen all of it."""

    def __init__(self) -> None:
        self._found: OrderedDict[str, tuple[int, Any]] = OrderedDict()

    def at(self, uid: str, offset: int) -> Any | None:
        """A copy of the state behind `offset` bytes, if it is known."""
        if offset == 0:
            return hashlib.sha256()
        known = self._found.get(uid)
        return known[1].copy() if known is not None and known[0] == offset else None

    def keep(self, uid: str, offset: int, state: Any) -> None:
        """What was hashed is stored."""
        self._found[uid] = (offset, state)
        self._found.move_to_end(uid)
        while len(self._found) > HASHERS:
            self._found.popitem(last=False)

    def forget(self, uid: str) -> None:
        """The upload has ended."""
        self._found.pop(uid, None)


class UploadWriter:
    """Takes the chunks of one stream. What `persisted` says is stored for good; what came later is not."""

    def __init__(
        self,
        store: FineTuneStore,
        objects: Objects,
        settings: DatasetSettings,
        hashers: Hashers,
        row: Record,
        epoch: int,
        max_rows: int,
    ) -> None:
        self._store, self._objects, self._settings, self._hashers = store, objects, settings, hashers
        self._project, self._uid, self._epoch = row["project_uid"], row["uid"], epoch
        self._max_rows = max_rows
        self._scan = msgspec.convert(row["scan"], Scan)
        self.persisted = int(row["persisted_bytes"])
        self._hash = hashers.at(self._uid, self.persisted)
        self._received = self.persisted
        self._pieces: list[bytes] = []
        self._gathered = 0
        self._storing: asyncio.Task[None] | None = None
        limit = settings.upload_bytes
        announced = row["total_bytes"]
        self._limit = min(limit or announced, announced) if announced is not None else limit

    async def write(self, offset: int, data: bytes, crc32c: int | None) -> None:
        """Take a chunk.

        Raises:
            ChecksumMismatch: it is not what was sent; it is dropped.
            UploadOffset: it leaves a gap.
            QuotaExceeded: more bytes than were announced, or than one version may have.
            UnsupportedFormat: V1, V2 or V3; the upload is REJECTED.
            UploadFenced: another writer has taken over.
            StoreUnavailable: bytes behind `persisted` are not stored.
        """
        if crc32c is not None and google_crc32c.value(data) != crc32c:
            await self.flush()
            raise ChecksumMismatch(offset)
        if offset > self._received:
            await self.flush()
            raise UploadOffset(self.persisted)
        data = data[self._received - offset :]
        if not data:
            return
        if self._limit and self._received + len(data) > self._limit:
            raise QuotaExceeded("upload_bytes")
        self._pieces.append(data)
        self._gathered += len(data)
        self._received += len(data)
        if self._gathered >= FLUSH_BYTES:
            await self._begin()

    async def flush(self) -> None:
        """Store what has come. Raises as `write` does."""
        if self._gathered:
            await self._begin()
        await self._settled()

    async def close(self) -> None:
        """Wait for what is being stored, whatever becomes of it: no part is written behind the back of the next writer."""
        if self._storing is not None:
            await asyncio.wait((self._storing,))

    async def _begin(self) -> None:
        await self._settled()
        pieces, start = self._pieces, self._received - self._gathered
        self._pieces, self._gathered = [], 0
        self._storing = asyncio.create_task(self._put(start, pieces), name="upload part")

    async def _settled(self) -> None:
        storing, self._storing = self._storing, None
        if storing is not None:
            try:
                await asyncio.shield(storing)
            except asyncio.CancelledError:
                self._storing = storing
                raise

    async def _put(self, start: int, pieces: list[bytes]) -> None:
        path = f"uploads/{self._project}/{self._uid}/{start:016x}-{uuid4()}"  # a name of its own: writers cannot overwrite each other
        breach = await self._objects.run(self._stored, path, pieces)
        if breach is not None:
            await self._reject(breach)
        size = sum(map(len, pieces))
        async with self._store.transaction() as connection:
            limit = self._settings.stored_bytes_per_project
            row = await upload_store.add_part(
                connection, self._project, self._uid, self._epoch, start, size, path, msgspec.to_builtins(self._scan)
            )
            if row is None:
                await self._objects.delete(path)  # nobody will know of it
                raise UploadFenced
            if limit and row["total_bytes"] is None and await upload_store.stored_bytes(connection, self._project) > limit:
                raise QuotaExceeded("stored_bytes")
        self.persisted = start + size
        if self._hash is not None:
            self._hashers.keep(self._uid, self.persisted, self._hash.copy())

    def _stored(self, path: str, pieces: list[bytes]) -> Breach | None:
        """In a thread: judge, hash and store."""
        with self._objects.sync.writing(path) as writer:
            for piece in pieces:
                breach = self._scan.feed(piece, self._max_rows)
                if breach is not None:
                    break
                if self._hash is not None:
                    self._hash.update(piece)
                writer.write(piece)
        if breach is not None:
            self._objects.sync.delete(path)
        return breach

    async def _reject(self, breach: Breach) -> None:
        u = uploads.c
        metadata = {"rule": breach.rule, "line": str(breach.line), "byte_offset": str(breach.byte_offset)}
        async with self._store.transaction() as connection:
            row = await upload_store.change_upload(
                connection, self._project, self._uid, u.state == "OPEN", u.writer_epoch == self._epoch, state="REJECTED",
                failure={"reason": "UNSUPPORTED_FORMAT", "metadata": metadata},
            )  # fmt: skip
            if row is None:
                raise UploadFenced
        self._hashers.forget(self._uid)
        raise UnsupportedFormat(breach.rule, breach.line, breach.byte_offset)


async def hash_parts(objects: Objects, parts: list[str]) -> Any:
    """SHA-256's state behind parts in order, read back from the store."""

    def work() -> Any:
        found = hashlib.sha256()
        for part in parts:
            for piece in objects.sync.stream(part):
                found.update(piece)
        return found

    return await objects.run(work)
