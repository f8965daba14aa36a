"""Bytes by path in an object store: a directory, S3, GCS or Azure. A path is visible whole or not at all.

Paths are ours, made of server-made ids and digests (`[A-Za-z0-9._-]` segments); nothing a caller names becomes a part of one. A
directory is walked segment by segment without following links, and what is written there is on disk before its name is.
"""

import asyncio
import contextlib
import errno
import os
import re
import shutil
import stat
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, ParamSpec, Protocol, TypeVar
from urllib.parse import unquote, urlsplit

from services.chassis.errors import StoreUnavailable

STREAM_BYTES = 1 << 20  # read at once
THREADS = 16  # of one async store; a call waits for one
REQUEST_SECONDS = 30.0  # of one remote request
RETRY_SECONDS = 20.0  # after which a remote request is not tried again

_SEGMENT = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")  # no leading dot: neither `..` nor a temporary file
_TEMPORARY = ".tmp-"
_NO_LINK = os.O_NOFOLLOW | os.O_CLOEXEC

P = ParamSpec("P")
T = TypeVar("T")


class ObjectMissing(LookupError):
    """Nothing is stored at this path."""


class ObjectsUnavailable(StoreUnavailable):
    """The object store cannot be reached, or takes no more: a full disk, a refused request. Callers see STORE_UNAVAILABLE."""


class Writer(Protocol):
    """An object being written; nobody sees it before its `with` block ends well."""

    def write(self, data: bytes) -> None:
        """Append `data`."""
        ...


class SyncObjects(Protocol):
    """An object store for code without a loop. Every method may raise ObjectsUnavailable, and ValueError for a path that is none."""

    def put(self, path: str, data: bytes) -> None:
        """Store `data`, in place of what was there."""
        ...

    def writing(self, path: str) -> AbstractContextManager[Writer]:
        """Write an object piece by piece; it appears when the block ends, and not at all when the block raises."""
        ...

    def get(self, path: str) -> bytes:
        """All bytes. Raises ObjectMissing."""
        ...

    def get_range(self, path: str, start: int, length: int) -> bytes:
        """At most `length` bytes from `start`; fewer at the end. Raises ObjectMissing."""
        ...

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        """All bytes from `start`, in pieces of at most 1 MiB. Raises ObjectMissing."""
        ...

    def size(self, path: str) -> int | None:
        """Bytes stored; None: nothing is."""
        ...

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """(path, size) of everything below `prefix`, which is whole segments, in order of path."""
        ...

    def copy(self, source: str, target: str) -> None:
        """Store at `target` what `source` holds. Raises ObjectMissing."""
        ...

    def delete(self, path: str) -> None:
        """Remove it; nothing there is no error."""
        ...

    def delete_prefix(self, prefix: str) -> int:
        """Remove everything below `prefix`, whole segments. Returns how many objects there were."""
        ...

    def fetch(self, path: str, to: Path) -> None:
        """Copy an object into the file `to`, which appears whole. Raises ObjectMissing."""
        ...

    def store(self, from_: Path, path: str) -> None:
        """Copy a file into the store."""
        ...


def segments(path: str) -> tuple[str, ...]:
    """The segments of a path. Raises ValueError for anything but plain names between single slashes."""
    parts = tuple(path.split("/"))
    if not all(_SEGMENT.fullmatch(part) for part in parts):
        raise ValueError("not an object path")
    return parts


def open_objects_sync(url: str) -> SyncObjects:
    """The store at `url`: `file:///directory` (made if absent), `s3://`, `gs://`, `az://bucket/prefix`, or `memory://`, new each time.

    Raises:
        ValueError: another kind of URL.
    """
    parts = urlsplit(url)
    if parts.scheme == "file" and not parts.netloc and parts.path:
        return LocalObjects(Path(unquote(parts.path)))
    if parts.scheme in ("s3", "gs", "az", "memory"):
        return RemoteObjects(url)
    raise ValueError("a store is file:///directory, s3://, gs://, az:// or memory://")


class _Copying:
    """What every store does by its other methods."""

    def put(self: Any, path: str, data: bytes) -> None:
        """See SyncObjects."""
        with self.writing(path) as writer:
            writer.write(data)

    def get(self: Any, path: str) -> bytes:
        """See SyncObjects."""
        return b"".join(self.stream(path))

    def copy(self: Any, source: str, target: str) -> None:
        """See SyncObjects."""
        with self.writing(target) as writer:
            for piece in self.stream(source):
                writer.write(piece)

    def fetch(self: Any, path: str, to: Path) -> None:
        """See SyncObjects."""
        fresh = to.with_name(f"{_TEMPORARY}{uuid.uuid4()}")
        try:
            with _disk(), fresh.open("xb") as file:
                for piece in self.stream(path):
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
                os.replace(fresh, to)
        finally:
            fresh.unlink(missing_ok=True)

    def store(self: Any, from_: Path, path: str) -> None:
        """See SyncObjects."""
        with from_.open("rb") as file, self.writing(path) as writer:
            while piece := file.read(STREAM_BYTES):
                writer.write(piece)


@contextmanager
def _disk() -> Generator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ObjectMissing from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):  # a link, or a file where a directory belongs: not ours
            raise ObjectMissing from error
        raise ObjectsUnavailable from error


class _File:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            with _disk():
                left = left[os.write(self._descriptor, left) :]


class LocalObjects(_Copying):
    """A directory as an object store."""

    def __init__(self, root: Path) -> None:
        with _disk():
            root.mkdir(parents=True, exist_ok=True)
        self._root = root

    @contextmanager
    def _directory(self, parts: tuple[str, ...], *, make: bool = False) -> Generator[int]:
        """A descriptor of the directory `parts` below the root."""
        at = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in parts:
                try:
                    below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | _NO_LINK, dir_fd=at)
                except FileNotFoundError:
                    if not make:
                        raise
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, 0o700, dir_fd=at)
                    os.fsync(at)
                    below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | _NO_LINK, dir_fd=at)
                os.close(at)
                at = below
            yield at
        finally:
            os.close(at)

    @contextmanager
    def _reading(self, path: str) -> Generator[int]:
        *above, name = segments(path)
        with _disk(), self._directory(tuple(above)) as directory:
            descriptor = os.open(name, os.O_RDONLY | _NO_LINK, dir_fd=directory)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ObjectMissing
            yield descriptor
        finally:
            os.close(descriptor)

    @contextmanager
    def writing(self, path: str) -> Generator[Writer]:
        """See SyncObjects."""
        *above, name = segments(path)
        fresh = f"{_TEMPORARY}{uuid.uuid4()}"
        with contextlib.ExitStack() as stack:
            with _disk():
                directory = stack.enter_context(self._directory(tuple(above), make=True))
                descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK, 0o600, dir_fd=directory)
            try:
                try:
                    yield _File(descriptor)
                    with _disk():
                        os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                with _disk():
                    os.rename(fresh, name, src_dir_fd=directory, dst_dir_fd=directory)
                    os.fsync(directory)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(fresh, dir_fd=directory)
                raise

    def get_range(self, path: str, start: int, length: int) -> bytes:
        """See SyncObjects."""
        with self._reading(path) as descriptor, _disk():
            found = b""
            while len(found) < length and (piece := os.pread(descriptor, length - len(found), start + len(found))):
                found += piece
            return found

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        """See SyncObjects."""
        with self._reading(path) as descriptor:
            while True:
                with _disk():
                    piece = os.pread(descriptor, STREAM_BYTES, start)
                if not piece:
                    return
                yield piece
                start += len(piece)

    def size(self, path: str) -> int | None:
        """See SyncObjects."""
        try:
            with self._reading(path) as descriptor:
                return os.fstat(descriptor).st_size
        except ObjectMissing:
            return None

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """See SyncObjects."""
        parts = segments(prefix.rstrip("/"))
        try:
            with _disk(), self._directory(parts) as directory:
                found = list(os.scandir(directory))
                sizes = {entry.name: entry.stat(follow_symlinks=False) for entry in found if not entry.name.startswith(_TEMPORARY)}
        except ObjectMissing:
            return
        for name, facts in sorted(sizes.items()):
            if stat.S_ISDIR(facts.st_mode):
                yield from self.list("/".join((*parts, name)))
            elif stat.S_ISREG(facts.st_mode):
                yield "/".join((*parts, name)), facts.st_size

    def delete(self, path: str) -> None:
        """See SyncObjects."""
        *above, name = segments(path)
        with contextlib.suppress(ObjectMissing), _disk(), self._directory(tuple(above)) as directory:
            os.unlink(name, dir_fd=directory)
            os.fsync(directory)

    def delete_prefix(self, prefix: str) -> int:
        """See SyncObjects."""
        *above, name = segments(prefix.rstrip("/"))
        count = sum(1 for _ in self.list(prefix))
        with contextlib.suppress(ObjectMissing), _disk(), self._directory(tuple(above)) as directory:
            shutil.rmtree(name, dir_fd=directory)
            os.fsync(directory)
        return count


@contextmanager
def _remote() -> Generator[None]:
    from obstore.exceptions import BaseError

    try:
        yield
    except FileNotFoundError as error:
        raise ObjectMissing from error
    except (BaseError, OSError) as error:
        raise ObjectsUnavailable from error


class _Upload:
    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: bytes) -> None:
        with _remote():
            self._file.write(data)


class RemoteObjects(_Copying):
    """A bucket, by way of obstore; `memory://` for what need not last."""

    def __init__(self, url: str) -> None:
        import obstore
        from obstore.store import from_url

        self._obstore: Any = obstore
        options: dict[str, Any] = {}
        if not url.startswith("memory:"):
            options = {
                "client_options": {"timeout": timedelta(seconds=REQUEST_SECONDS)},
                "retry_config": {"max_retries": 4, "retry_timeout": timedelta(seconds=RETRY_SECONDS)},
            }
        self._store: Any = from_url(url, **options)

    @contextmanager
    def writing(self, path: str) -> Generator[Writer]:
        """See SyncObjects."""
        segments(path)
        with _remote():
            file = self._obstore.open_writer(self._store, path, buffer_size=8 * STREAM_BYTES, max_concurrency=2)
        yield _Upload(file)  # left by an error it is never closed, so the store never puts its parts together
        with _remote():
            file.close()

    def get_range(self, path: str, start: int, length: int) -> bytes:
        """See SyncObjects."""
        segments(path)
        whole = self.size(path)
        if whole is None:
            raise ObjectMissing
        if start >= whole or length <= 0:
            return b""
        with _remote():
            return bytes(self._obstore.get_range(self._store, path, start=start, end=min(whole, start + length)))

    def stream(self, path: str, start: int = 0) -> Iterator[bytes]:
        """See SyncObjects."""
        whole = self.size(path)
        if whole is None:
            raise ObjectMissing
        if start >= whole:
            return
        with _remote():
            pieces = iter(self._obstore.get(self._store, path, options={"range": {"offset": start}}).stream(min_chunk_size=STREAM_BYTES))
        while True:
            with _remote():
                piece = next(pieces, None)
            if piece is None:
                return
            view = memoryview(piece)
            for at in range(0, len(view), STREAM_BYTES):
                yield bytes(view[at : at + STREAM_BYTES])

    def size(self, path: str) -> int | None:
        """See SyncObjects."""
        segments(path)
        try:
            with _remote():
                return int(self._obstore.head(self._store, path)["size"])
        except ObjectMissing:
            return None

    def list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """See SyncObjects."""
        below = "/".join(segments(prefix.rstrip("/"))) + "/"
        with _remote():
            found = [(str(meta["path"]), int(meta["size"])) for page in self._obstore.list(self._store, below) for meta in page]
        yield from sorted(found)

    def delete(self, path: str) -> None:
        """See SyncObjects."""
        segments(path)
        with contextlib.suppress(ObjectMissing), _remote():
            self._obstore.delete(self._store, path)

    def delete_prefix(self, prefix: str) -> int:
        """See SyncObjects."""
        found = [path for path, _ in self.list(prefix)]
        for path in found:
            self.delete(path)
        return len(found)


def open_objects(url: str) -> "Objects":
    """The store at `url`, as `open_objects_sync` reads it, for code on a loop."""
    return Objects(open_objects_sync(url), url)


class Objects:
    """A store for code on a loop: each call runs in one of a few threads, and goes on to its end if given up."""

    def __init__(self, store: SyncObjects, url: str) -> None:
        self.sync = store
        self.url = url  # for a child process that opens it for itself
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="objects")

    async def run(self, work: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """`work` in one of the store's threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: work(*args, **kwargs))

    def close(self) -> None:
        """End the threads that are idle; others end with their work."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def put(self, path: str, data: bytes) -> None:
        """See SyncObjects."""
        await self.run(self.sync.put, path, data)

    async def put_stream(self, path: str, pieces: AsyncIterator[bytes]) -> None:
        """Store what `pieces` give; nothing, if they raise."""
        writing = self.sync.writing(path)
        writer = await self.run(writing.__enter__)
        try:
            async for piece in pieces:
                await self.run(writer.write, piece)
        except BaseException as error:
            await asyncio.shield(self.run(_leave, writing, error))
            raise
        await self.run(writing.__exit__, None, None, None)

    async def get(self, path: str) -> bytes:
        """See SyncObjects."""
        return await self.run(self.sync.get, path)

    async def get_range(self, path: str, start: int, length: int) -> bytes:
        """See SyncObjects."""
        return await self.run(self.sync.get_range, path, start, length)

    async def stream(self, path: str, start: int = 0) -> AsyncGenerator[bytes, None]:
        """See SyncObjects."""
        pieces = self.sync.stream(path, start)
        reading = self._threads.submit(next, pieces, None)
        try:
            while (piece := await asyncio.wrap_future(reading)) is not None:
                yield piece
                reading = self._threads.submit(next, pieces, None)
        finally:
            closing: Any = getattr(pieces, "close", None)
            if closing is not None:  # behind a read that goes on: a generator at work cannot be closed
                reading.add_done_callback(lambda _: closing())

    async def size(self, path: str) -> int | None:
        """See SyncObjects."""
        return await self.run(self.sync.size, path)

    async def list(self, prefix: str) -> AsyncIterator[tuple[str, int]]:
        """See SyncObjects."""
        for found in await self.run(lambda: [*self.sync.list(prefix)]):
            yield found

    async def copy(self, source: str, target: str) -> None:
        """See SyncObjects."""
        await self.run(self.sync.copy, source, target)

    async def delete(self, path: str) -> None:
        """See SyncObjects."""
        await self.run(self.sync.delete, path)

    async def delete_prefix(self, prefix: str) -> int:
        """See SyncObjects."""
        return await self.run(self.sync.delete_prefix, prefix)


def _leave(writing: AbstractContextManager[Writer], error: BaseException) -> None:
    with contextlib.suppress(BaseException):
        writing.__exit__(type(error), error, error.__traceback__)
