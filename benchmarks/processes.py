"""The processes that are measured: a whole fleet, or a gateway with its database before fake engines. Each ends with its block."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from services.gateway.keys import PEPPER_BYTES
from services.gateway.store import StoreSettings, bootstrap, open_store
from services.postgres import embedded_postgres

STOP_SECONDS = 60.0
READY_SECONDS = 300.0  # a first start converts the weights and makes a database


@dataclass(frozen=True)
class Door:
    """A gateway that answers: in a process of its own, or in a fleet's."""

    address: str
    api_key: str
    pid: int


class Failed(Exception):
    """A process did not come up; its log says why."""


@asynccontextmanager
async def process(*arguments: str, log: Path, environ: Mapping[str, str] | None = None) -> AsyncIterator[asyncio.subprocess.Process]:
    """`python -m ARGUMENTS` with its standard output piped and its log in a file; terminated, and waited for, at the end."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("ARGOSY_")}
    if task := asyncio.current_task():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # else what was started would outlive us
    with log.open("wb") as errors:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", *arguments, env=own | dict(environ or {}), stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=errors,
        )  # fmt: skip
    try:
        yield child
    finally:
        with suppress(ProcessLookupError):
            child.terminate()
        try:
            await asyncio.wait_for(child.wait(), STOP_SECONDS)
        except TimeoutError:
            child.kill()
            await child.wait()


async def first_line(child: asyncio.subprocess.Process, log: Path) -> str:
    """What it prints once it is up. Raises Failed if it ends before."""
    assert child.stdout is not None
    line = (await asyncio.wait_for(child.stdout.readline(), READY_SECONDS)).decode().strip()
    if not line:
        raise Failed(f"exit {await child.wait()}; the end of {log}:\n{log.read_text()[-2_000:]}")
    return line


@asynccontextmanager
async def fleet(folder: Path, **environ: str) -> AsyncIterator[Door]:
    """`python -m services.fleet` on the default model, with its state in `folder`."""
    log = folder / "fleet.log"
    settings = {"ARGOSY_HOME": str(folder), "ARGOSY_ADDRESS": "127.0.0.1:0", "ARGOSY_ANNOUNCE_SECONDS": "0"} | environ
    async with process("services.fleet", "--json", log=log, environ=settings) as child:
        while "ready" not in (said := json.loads(await first_line(child, log))):
            continue
        yield Door(said["ready"]["address"], said["ready"]["api_key"], child.pid)


@asynccontextmanager
async def gateway(folder: Path, engines: Sequence[str], **environ: str) -> AsyncIterator[Door]:
    """`python -m services.gateway` before these engines, with an embedded PostgreSQL that writes to the disk, as in production."""
    pepper, log = os.urandom(PEPPER_BYTES), folder / "gateway.log"
    async with embedded_postgres(folder / "postgres") as url:
        async with open_store(StoreSettings(url), pepper, wait=True) as store:
            key = await bootstrap(store)
        settings = {
            "ARGOSY_ADDRESS": "127.0.0.1:0",
            "ARGOSY_DATABASE_URL": url,
            "ARGOSY_KEY_PEPPER": pepper.hex(),
            "ARGOSY_INFERENCE_ADDRESSES": ",".join(engines),
            "ARGOSY_JOURNAL_DIR": str(folder / "journal"),
            "ARGOSY_ANNOUNCE_SECONDS": "0",
        } | environ
        async with process("services.gateway", log=log, environ=settings) as child:
            yield Door(await first_line(child, log), key, child.pid)
