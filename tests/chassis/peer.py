"""Another process to stop, signal and kill: `python -m tests.chassis.peer serve|call [address]`. It tells on stdout."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from services.chassis.server import Listener, serve
from tests.chassis.echo import PLAIN, SERVICE, calling, register, text

ROOT = Path(__file__).parents[2]


async def hold(request: Any, context: Any) -> AsyncIterator[Any]:
    """One event, then silence."""
    yield text("here")
    await asyncio.Event().wait()


async def run_server(ready: bool) -> None:
    listener = Listener(announce_seconds=60, grace_seconds=60)
    async with serve(listener, register({**PLAIN, "Stream": hold}), [SERVICE], signals=True) as serving:
        if ready:
            await serving.ready()
        print(serving.address, flush=True)
        await serving.stopped()
    print("stopped", flush=True)


async def run_client(address: str) -> None:
    async with calling(address) as caller:
        async for event in caller.stream(text("")):
            print(event.value, flush=True)


class Peer:
    """A running one."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def line(self) -> str:
        assert self.process.stdout is not None
        return (await asyncio.wait_for(self.process.stdout.readline(), 60)).decode().strip()

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


@asynccontextmanager
async def peer(*arguments: str) -> AsyncIterator[Peer]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.chassis.peer", *arguments, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield Peer(process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.communicate()


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    asyncio.run(run_client(rest[0]) if what == "call" else run_server(what == "serve"))
