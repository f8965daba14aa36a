"""Where a validation runs: a child process that may be killed, or a thread where no other process can see the objects."""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import msgspec

from services.chassis.errors import StoreUnavailable
from services.chassis.objects import Objects
from services.finetune.validation import AGAIN, Outcome, Progress, Task, validate

LINE_BYTES = 4 << 20  # of an outcome: a thousand findings and a thousand labels
SILENT_SECONDS = 900.0  # a child that says nothing for longer is given up; five million rows are compared in a third of it


class ValidatorDied(Exception):
    """The child ended without an outcome."""


class Host(Protocol):
    """Where a task runs."""

    async def __call__(self, task: Task, progress: Callable[[int], Awaitable[bool]]) -> Outcome | None:
        """The outcome; None: `progress` said that nobody wants it any more. Raises ValidatorDied, StoreUnavailable."""
        ...


class ProcessHost:
    """Each task in a child process, killed when it is not wanted any more."""

    async def __call__(self, task: Task, progress: Callable[[int], Awaitable[bool]]) -> Outcome | None:
        """See Host."""
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.finetune.validation", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            limit=LINE_BYTES, start_new_session=True, env=_environment(os.environ),
        )  # fmt: skip
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(msgspec.json.encode(task) + b"\n")
            with suppress(ConnectionError):  # it died: its output ends, too
                await child.stdin.drain()
            while line := await asyncio.wait_for(child.stdout.readline(), SILENT_SECONDS):
                said = msgspec.json.decode(line, type=Progress | Outcome)
                if isinstance(said, Outcome):
                    return said
                if not await progress(said.validated_bytes):
                    return None
            if await child.wait() == AGAIN:
                raise StoreUnavailable
            raise ValidatorDied
        except TimeoutError as error:
            raise ValidatorDied from error
        finally:
            with suppress(ProcessLookupError):
                child.kill()
            await child.wait()
            child._transport.close()  # type: ignore[attr-defined]  # its pipes, at once rather than when collected


_PASSED = frozenset({"PATH", "PYTHONPATH", "LANG", "LC_ALL", "HOME", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR"})
_STORES = ("AWS_", "AZURE_", "GOOGLE_")  # credentials of the object store, which the child opens for itself


def allowed(ours: Mapping[str, str], *names: str) -> dict[str, str]:
    """What a child that reads strangers' bytes may know, beside `names`: nothing of the database, no key of ours."""
    return {name: value for name, value in ours.items() if name in _PASSED or name in names or name.startswith(_STORES)}


def credentials(ours: Mapping[str, str]) -> dict[str, str]:
    """Those of the object store alone, for children whose environment is otherwise empty."""
    return {name: value for name, value in ours.items() if name.startswith(_STORES)}


def _environment(ours: Mapping[str, str]) -> dict[str, str]:
    return allowed(ours) | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class ThreadHost:
    """In a thread of this process, for a store that no other process can see (`memory://`)."""

    objects: Objects

    async def __call__(self, task: Task, progress: Callable[[int], Awaitable[bool]]) -> Outcome | None:
        """See Host."""
        return await asyncio.to_thread(validate, self.objects.sync, task, lambda done: None)
