"""Whether two versions share rows (V12; the gate's disjointness): by digests and minima that validation left beside the bytes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.chassis.objects import Objects, SyncObjects
from services.finetune import near_duplicates
from services.finetune.datasets import TrainingVersion


@dataclass(frozen=True)
class Overlap:
    """Rows of the second version that the first has, too, and that are nearly alike one of the first's."""

    exact_rows: int
    near_rows: int


def digests_of(store: SyncObjects, version: TrainingVersion) -> NDArray[np.uint64]:
    """[rows]: the first 8 bytes, little-endian, of each row's digest, in the order of the rows. Raises ObjectMissing."""
    return np.frombuffer(store.get(version.digests_path), dtype="<u8").astype(np.uint64)


def minima_of(store: SyncObjects, version: TrainingVersion) -> NDArray[np.uint16]:
    """[rows, 16] of `near_duplicates.minima`, for the first two million rows. Raises ObjectMissing."""
    found = np.frombuffer(store.get(f"{version.digests_path}-near"), dtype="<u2")
    return found.astype(np.uint16).reshape(-1, near_duplicates.MINIMA)


async def shared_rows(objects: Objects, train: TrainingVersion, held_out: TrainingVersion) -> int:
    """How many rows of `held_out` are in `train`, quick enough for a request. Raises ObjectMissing, ObjectsUnavailable."""
    return await objects.run(lambda: int(np.isin(digests_of(objects.sync, held_out), digests_of(objects.sync, train)).sum()))


async def overlap(objects: Objects, train: TrainingVersion, held_out: TrainingVersion) -> Overlap:
    """The same with those that are nearly alike: minutes, where there are millions. Raises ObjectMissing, ObjectsUnavailable."""

    def work() -> Overlap:
        shared = np.isin(digests_of(objects.sync, held_out), digests_of(objects.sync, train))
        near = near_duplicates.overlap(minima_of(objects.sync, train), minima_of(objects.sync, held_out))
        return Overlap(int(shared.sum()), int((~shared[near]).sum()))

    return await objects.run(work)
