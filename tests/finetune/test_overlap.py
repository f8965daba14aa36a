from dataclasses import replace

import numpy as np

from services.chassis.objects import open_objects
from services.finetune.datasets import TrainingVersion
from services.finetune.overlap import shared_rows
from services.finetune.rows import Layout

TRAIN = TrainingVersion("t", "t", "d", "t/data", "t/digests", "0" * 64, 1, Layout("classify"), 4, {}, {})


async def test_V12_shared_rows_are_counted_without_the_slow_comparison() -> None:
    objects = open_objects("memory://")
    held = replace(TRAIN, name="h", uid="h", digests_path="h/digests")
    await objects.put(TRAIN.digests_path, np.array([1, 2, 3, 4], "<u8").tobytes())
    await objects.put(held.digests_path, np.array([9, 3, 8, 1, 1], "<u8").tobytes())  # and no `h/digests-near`, which is not read
    assert await shared_rows(objects, TRAIN, held) == 3
    objects.close()
