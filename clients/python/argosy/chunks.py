"""A file in pieces, each with its checksum, and the whole with its digest after one reading."""

import hashlib
import threading
from pathlib import Path

import google_crc32c

CHUNK_BYTES = 512 * 1024  # the most that one message may carry


def crc32c(data: bytes) -> int:
    """CRC-32C of the bytes, as chunks carry it."""
    return int(google_crc32c.value(data))


class HashedFile:
    """A file that is read from any offset and hashed on the way. A call that broke may still be reading: hence the lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("rb")
        self.total_bytes = path.stat().st_size
        self._hash = hashlib.sha256()
        self._hashed = 0  # bytes; always a prefix of the file
        self._lock = threading.Lock()

    def read(self, offset: int) -> bytes:
        """Up to CHUNK_BYTES from the offset. Raises ValueError where the file ends before its size."""
        with self._lock:
            self._hash_to(offset)
            self._file.seek(offset)
            data = self._file.read(min(CHUNK_BYTES, self.total_bytes - offset))
            if not data:
                raise ValueError(f"{self.path} shrank while it was uploaded")
            fresh = offset + len(data) - self._hashed
            if fresh > 0:
                self._hash.update(data[-fresh:])
                self._hashed += fresh
            return data

    def sha256(self) -> str:
        """Of the whole file, in hex."""
        with self._lock:
            self._hash_to(self.total_bytes)
            return self._hash.hexdigest()

    def _hash_to(self, end: int) -> None:
        self._file.seek(self._hashed)
        while self._hashed < end:
            data = self._file.read(min(CHUNK_BYTES, end - self._hashed))
            if not data:
                raise ValueError(f"{self.path} shrank while it was uploaded")
            self._hash.update(data)
            self._hashed += len(data)

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._file.close()
