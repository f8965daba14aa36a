"""Which training rows are most like a text: a tuned version's own vectors of its rows, searched one by one (pure but for numpy).

The file lies beside the version's adapter, under the same digest, so that what erases one erases the other. It holds numbers of rows and
vectors, no text. Its SHA-256 and row count stand in the signed manifest (`KEY`); a version without that has no index.
"""

import hashlib
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FILE", "KEY", "MAX_ROWS", "Index", "Misshapen", "pack", "promise", "promised"]

FILE = "nearest.index"
KEY = "nearest_examples"  # of the manifest's hyperparameters: "<rows> <sha256 of the file>"
MAX_ROWS = 20_000  # of a version; of more, the first by digest, which is a sample that does not depend on their order
MAX_WIDTH = 16_384
_HEAD = struct.Struct("<8sII")
_MAGIC = b"argosyN1"
_PROMISE = re.compile(r"([1-9][0-9]{0,4}) ([0-9a-f]{64})")


class Misshapen(ValueError):
    """Bytes that are no index, or not the one promised."""


def pack(rows: Iterable[int], vectors: NDArray[np.float32]) -> bytes:
    """An index of `vectors` [n, width], scaled to length 1 as float16; `rows` are their numbers in the dataset version, from 0."""
    numbers = np.fromiter(rows, dtype="<u8")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled = (vectors / np.maximum(lengths, 1e-12)).astype("<f2")
    return b"".join((_HEAD.pack(_MAGIC, *scaled.shape), numbers.tobytes(), scaled.tobytes()))


def promise(data: bytes) -> str:
    """What a manifest says of a packed index."""
    return f"{_HEAD.unpack_from(data)[1]} {hashlib.sha256(data).hexdigest()}"


def promised(said: str) -> int:
    """Rows of the index that a manifest promises; 0: none."""
    found = _PROMISE.fullmatch(said)
    return int(found[1]) if found else 0


@dataclass(frozen=True)
class Index:
    """One version's rows."""

    rows: NDArray[np.uint64]  # [n]
    vectors: NDArray[np.float32]  # [n, width], of length 1

    @classmethod
    def read(cls, data: bytes, said: str) -> "Index":
        """The index in `data`, if it is the one promised. Raises Misshapen."""
        if len(data) < _HEAD.size or not promised(said) or promise(data) != said:
            raise Misshapen("promise")
        magic, count, width = _HEAD.unpack_from(data)
        if magic != _MAGIC or not 1 <= count <= MAX_ROWS or not 1 <= width <= MAX_WIDTH:
            raise Misshapen("header")
        if len(data) != _HEAD.size + count * (8 + 2 * width):
            raise Misshapen("size")
        rows = np.frombuffer(data, dtype="<u8", count=count, offset=_HEAD.size)
        vectors = np.frombuffer(data, dtype="<f2", offset=_HEAD.size + 8 * count).reshape(count, width).astype(np.float32)
        if not bool(np.isfinite(vectors).all()):
            raise Misshapen("not_finite")
        return cls(rows.astype(np.uint64), vectors)

    def nearest(self, vector: NDArray[np.float32], count: int) -> list[tuple[int, float]]:
        """Row and cosine of the `count` nearest, nearest first. Raises Misshapen for a vector of another width, or none."""
        length = float(np.linalg.norm(vector))
        if vector.shape != self.vectors.shape[1:] or not 0 < length < float("inf"):
            raise Misshapen("vector")
        likeness = self.vectors @ (vector / length)
        best = np.argsort(-likeness, kind="stable")[:count]
        return [(int(self.rows[at]), min(1.0, max(-1.0, float(likeness[at])))) for at in best]
