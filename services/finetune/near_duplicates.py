"""Texts that are nearly alike: 16 minima of hashed word pairs a text (MinHash, 32 bytes), found again by bands of four.

Two texts that share nine of ten word pairs are found with 98 %, and told apart from chance by comparing the minima themselves.
"""

import re
import zlib
from collections.abc import Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

MINIMA = 16
BAND = 4  # minima that must all agree for two texts to be compared
ALIKE = 13  # of 16 minima: about 80 % of word pairs shared
MAX_WORDS = 512  # of a text; what follows is not compared
KNOWN_WORDS = 200_000  # whose hashes are kept
MAX_TEXTS = 2_000_000  # compared with each other: 64 MB of minima

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
_MIX = np.uint32(0x9E3779B1)
_FACTORS = np.random.Generator(np.random.PCG64(20)).integers(0, 1 << 32, MINIMA, dtype=np.uint32) | np.uint32(1)


class _Hashes(dict[str, int]):
    """Word → hash; a word that was met before costs a look-up."""

    def __missing__(self, word: str) -> int:
        found = self[word] = zlib.crc32(word.encode())
        return found


_HASHES = _Hashes()


def minima(texts: Sequence[str]) -> NDArray[np.uint16]:
    """[texts, 16]: the least hash of all its word pairs by each of 16 hash functions, case and punctuation aside."""
    words = [_WORD.findall(text.casefold())[:MAX_WORDS] or [""] for text in texts]
    counts = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
    hashes = np.fromiter(map(_HASHES.__getitem__, chain.from_iterable(words)), dtype=np.uint32, count=int(counts.sum()))
    if len(_HASHES) > KNOWN_WORDS:
        _HASHES.clear()
    follow = np.roll(hashes, -1)
    ends = np.cumsum(counts) - 1
    follow[ends] = 0  # the last word of a text pairs with nothing
    pairs = (hashes * _MIX) ^ (follow * np.uint32(0x85EBCA6B))
    pairs ^= pairs >> np.uint32(15)
    pairs *= np.uint32(0x2C1B3C6D)
    pairs ^= pairs >> np.uint32(12)
    keep = np.ones(len(pairs), dtype=bool)
    keep[ends[counts > 1]] = False
    sizes = np.maximum(counts - 1, 1)
    starts = np.cumsum(sizes) - sizes
    hashed = (pairs[keep][:, None] * _FACTORS) >> np.uint32(16)
    return np.minimum.reduceat(hashed, starts, axis=0).astype(np.uint16) if len(texts) else np.zeros((0, MINIMA), dtype=np.uint16)


def repeats(found: NDArray[np.uint16], skip: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Indices of texts nearly alike an earlier one, in order.

    Args:
        found: [texts, 16] of `minima`.
        skip: [texts]: exact repeats, which are told otherwise.
    """
    alike = np.zeros(len(found), dtype=bool)
    index = np.flatnonzero(~skip)
    for start in range(0, MINIMA, BAND):
        band = np.ascontiguousarray(found[index, start : start + BAND]).view(np.uint64).ravel()
        order = np.argsort(band, kind="stable")
        ordered = band[order]
        new = np.concatenate(([True], ordered[1:] != ordered[:-1]))
        first = index[order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]] if len(order) else index
        here = index[order]
        same = (found[here] == found[first]).sum(axis=1) >= ALIKE
        alike[here[same & ~new]] = True
    return np.flatnonzero(alike)


def overlap(ours: NDArray[np.uint16], theirs: NDArray[np.uint16]) -> NDArray[np.int64]:
    """Indices in `theirs` of texts nearly alike one in `ours`."""
    both = np.concatenate((ours, theirs))
    alike = np.zeros(len(both), dtype=bool)
    for start in range(0, MINIMA, BAND):
        band = np.ascontiguousarray(both[:, start : start + BAND]).view(np.uint64).ravel()
        known, first = np.unique(band[: len(ours)], return_index=True)
        place = np.searchsorted(known, band[len(ours) :])
        hit = (
            np.flatnonzero((place < len(known)) & (known[np.minimum(place, len(known) - 1)] == band[len(ours) :]))
            if len(known)
            else place[:0]
        )
        same = (theirs[hit] == ours[first[place[hit]]]).sum(axis=1) >= ALIKE
        alike[len(ours) + hit[same]] = True
    return np.flatnonzero(alike[len(ours) :])
