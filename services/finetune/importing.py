"""Parts of an import as they arrive, and the process that checks them."""

import asyncio
import contextlib
import os
import sys
from pathlib import Path

import msgspec

from services.chassis.errors import ArtifactRejected, ChecksumMismatch, FieldInvalid
from services.finetune import imports
from services.finetune.imports import Checked, Order

CONFIG, WEIGHTS, HEAD = "config.json", "weights.safetensors", "head.safetensors"
PARTS = {CONFIG: imports.CONFIG_BYTES, WEIGHTS: imports.WEIGHTS_BYTES, HEAD: imports.HEAD_BYTES}  # at most
SECONDS = 120.0  # of a check
ANSWER_BYTES = 65_536
_CODE = str(Path(__file__).resolve().parents[2])


class Arriving:
    """Writes parts into a private folder, one after the other, each from its start."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._part = ""
        self._size = 0
        self._seen: set[str] = set()

    async def write(self, part: str, offset: int, data: bytes, crc_holds: bool) -> None:
        """Append bytes of a part.

        Raises:
            ArtifactRejected: a part comes twice or is too large.
            ChecksumMismatch: the bytes are not what was sent.
            FieldInvalid: they do not continue the part.
        """
        if part != self._part:
            if part in self._seen:
                raise ArtifactRejected("part_order")
            self._seen.add(part)
            self._part, self._size = part, 0
        if not crc_holds:
            raise ChecksumMismatch(offset)
        if offset != self._size:
            raise FieldInvalid("chunk.offset", "gap")
        if self._size + len(data) > PARTS[part]:
            raise ArtifactRejected(f"{part.partition('.')[0]}.size", byte_offset=PARTS[part])
        await asyncio.to_thread(_append, self._folder / part, data)
        self._size += len(data)

    def check_whole(self) -> None:
        """Raises ArtifactRejected where config or weights are missing."""
        for part in (CONFIG, WEIGHTS):
            if part not in self._seen:
                raise ArtifactRejected(f"{part.partition('.')[0]}.missing")


def _append(file: Path, data: bytes) -> None:
    with file.open("ab") as out:
        out.write(data)


async def check(folder: Path, order: Order, seconds: float = SECONDS) -> Checked:
    """Check the parts in `folder` in a child process, which leaves `adapter.safetensors` and perhaps `head.out` beside them.

    Raises:
        ArtifactRejected: a rule is broken, or the child died of the files.
    """
    await asyncio.to_thread((folder / "order.json").write_bytes, msgspec.json.encode(order))
    environment = {"PYTHONPATH": _CODE, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PATH": os.defpath}
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.finetune.imports", cwd=folder, env=environment, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL, limit=ANSWER_BYTES, start_new_session=True,
    )  # fmt: skip
    try:
        assert child.stdout is not None
        async with asyncio.timeout(seconds):
            said = msgspec.json.decode(await child.stdout.readline(), type=Checked)
    except (TimeoutError, msgspec.DecodeError, ValueError):
        raise ArtifactRejected("parser") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.wait()
        child._transport.close()  # type: ignore[attr-defined]  # its pipe, at once rather than when collected
    if said.rule:
        raise ArtifactRejected(said.rule, byte_offset=said.at)
    return said
