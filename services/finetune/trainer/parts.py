"""What a run stores: objects under its prefix, told by digest."""

import hashlib
from collections.abc import Mapping

from services.chassis.objects import SyncObjects
from services.finetune.trainer.control import Part

__all__ = ["store"]


def store(objects: SyncObjects, prefix: str, files: Mapping[str, bytes]) -> tuple[Part, ...]:
    """Put files below `prefix`; what they are."""
    for name, data in files.items():
        objects.put(f"{prefix}{name}", data)
    return tuple(Part(name, hashlib.sha256(data).hexdigest(), len(data)) for name, data in sorted(files.items()))
