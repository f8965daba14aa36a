"""Indexes of training rows where they are searched: read from the object store, kept for a minute, never for an erased version."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from services.chassis.errors import FieldInvalid, ModelCapability
from services.chassis.objects import ObjectMissing, Objects
from services.finetune.nearest import FILE, Index, Misshapen, promised

__all__ = ["CAPABILITY", "Neighbours"]

CAPABILITY = "NEAREST_EXAMPLES"
KEPT = 8  # indexes in memory, at most 50 MB each at a width of 640
KEPT_S = 30.0  # an erasure has a minute to reach every cache


@dataclass(eq=False)
class Neighbours:
    """Searches the indexes that lie beside adapters."""

    objects: Objects
    clock: Callable[[], float] = time.monotonic
    _known: "OrderedDict[str, tuple[float, Index]]" = field(default_factory=OrderedDict)

    async def find(self, place: str, said: str, vector: bytes, count: int) -> list[tuple[int, float]]:
        """Row and cosine of the `count` rows nearest to a float32 vector; none for an empty vector, which only asks whether it can be.

        Args:
            place: of the version's files.
            said: what its manifest promises.
            vector: little-endian.
            count: 1..50.

        Raises:
            ModelCapability: this version has no index.
            FieldInvalid: the vector is not of its width, or not finite.
            ObjectsUnavailable: the store cannot say.
        """
        if not promised(said):
            raise ModelCapability("model", CAPABILITY)
        if not vector:
            return []
        index = await self._index(place, said)
        try:
            return await asyncio.to_thread(index.nearest, np.frombuffer(vector, dtype="<f4").astype(np.float32), count)
        except (Misshapen, ValueError):
            raise FieldInvalid("vector", "shape") from None

    async def _index(self, place: str, said: str) -> Index:
        now = self.clock()
        while self._known and next(iter(self._known.values()))[0] + KEPT_S < now:
            self._known.popitem(last=False)
        if place in self._known:
            return self._known[place][1]
        try:
            found = await asyncio.to_thread(Index.read, await self.objects.get(f"{place}/{FILE}"), said)
        except (ObjectMissing, Misshapen):  # erased a moment ago, or spoilt
            raise ModelCapability("model", CAPABILITY) from None
        self._known[place] = (now, found)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return found
