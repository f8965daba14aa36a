"""Progress from trainers of the operator's own: what transformers' KubeflowCallback posts becomes events of the job.

    POST /jobs/{uid}/attempts/{n}/status          authorization: Bearer <token of this attempt>
    {"trainerStatus": {"progressPercentage": 12, "estimatedRemainingSeconds": 340, "metrics": [{"name": "loss", "value": "1.5"}]}}

Advisory only: nothing posted here ends a job, pays for it, or makes a checkpoint count. Its ETA counts the steps before a resume, and an
early stop posts 100 %. The attempt's wrapper says what is true (`trainer/hosted.py`). A poster waits 5 s for an answer, then gives up in
silence.
"""

import asyncio
import json
import logging
import math
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any

from services.chassis.channel import PlaintextRefused, is_local
from services.chassis.errors import StoreUnavailable
from services.finetune import events, sql_jobs
from services.finetune.jobs import State
from services.finetune.store import FineTuneStore
from services.finetune.tokens import Tokens

__all__ = ["Callback", "Malformed", "Status", "listening", "parse", "status_path"]

log = logging.getLogger(__name__)

HEAD_BYTES, BODY_BYTES = 8_192, 65_536
SECONDS = 4.0  # from the first byte to the answer: a poster leaves after 5
CONNECTIONS = 64  # at once; more are turned away
RELOAD_SECONDS = 10.0  # between looks for a renewed certificate
METRICS = 64  # of one post; the rest is left out
LARGEST = 1e9  # either way, as in every other report
QUIET = timedelta(seconds=1)  # posts closer than that to what was written write nothing, but for the first and the last
RUNNING = frozenset({State.RUNNING, State.PAUSING, State.CANCELLING})
PATH = re.compile(r"/jobs/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})/attempts/([1-9][0-9]{0,6})/status")
TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{16,6000}")  # derived ones and a cluster's
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./@-]{0,63}")
STEP, STEPS, EPOCH = "current_step", "total_steps", "current_epoch"  # names under which the callback hides its counters


class Malformed(ValueError):
    """A body that is no trainer's status."""


@dataclass(frozen=True, slots=True)
class Status:
    """One post. `step` of `steps`; None where it does not say. `metrics` are finite."""

    step: int | None = None
    steps: int | None = None
    percent: int | None = None
    epoch: float | None = None
    remaining_s: float | None = None
    metrics: tuple[tuple[str, float], ...] = ()

    @property
    def first(self) -> bool:
        """Whether it says that training begins: the only post that counts no step."""
        return self.percent == 0 and self.step is None

    @property
    def last(self) -> bool:
        """Whether the trainer believes that it is done."""
        return self.percent == 100

    def place(self, known: int) -> tuple[int, int]:
        """Step and target to show: its own counters, else its percentage; `known` is the job's step."""
        if self.step is not None:
            return self.step, self.steps or 0
        if self.steps is None and self.percent is not None and not known:
            return self.percent, 100
        return known, self.steps or 0


def status_path(job_uid: str, attempt: int) -> str:
    """Where an attempt posts."""
    return f"/jobs/{job_uid}/attempts/{attempt}/status"


def parse(body: bytes) -> Status:
    """A post's body. What is not finite or badly named is dropped, not refused: it is a hint. Raises Malformed."""
    try:
        said = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Malformed from error
    status = said.get("trainerStatus") if isinstance(said, dict) else None
    listed = status.get("metrics", []) if isinstance(status, dict) else None
    if not isinstance(status, dict) or not isinstance(listed, list):
        raise Malformed
    found: dict[str, float] = {}
    for each in listed:
        name, value = (each.get("name"), _number(each.get("value"))) if isinstance(each, dict) else (None, None)
        if isinstance(name, str) and NAME.fullmatch(name) and value is not None and len(found) < METRICS:
            found[_ours(name)] = value
    step, steps, epoch = (found.pop(name, None) for name in (STEP, STEPS, EPOCH))
    percent, left = _number(status.get("progressPercentage")), _number(status.get("estimatedRemainingSeconds"))
    return Status(
        step=None if step is None else max(0, int(step)),
        steps=None if steps is None else max(0, int(steps)),
        percent=None if percent is None else min(100, max(0, int(percent))),
        epoch=None if epoch is None else min(1e6, max(0.0, epoch)),
        remaining_s=None if left is None else min(3e8, max(0.0, left)),
        metrics=tuple(found.items()),
    )


def _ours(name: str) -> str:
    """What it is called in a log of ours: transformers' `eval_loss` is our `validation_loss`."""
    return f"validation_{name.removeprefix('eval_')}"[:64] if name.startswith("eval_") else name


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str) or (isinstance(value, str) and len(value) > 64):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return min(LARGEST, max(-LARGEST, number)) if math.isfinite(number) else None


@dataclass(frozen=True)
class Callback:
    """Writes posts into the log of the job that they are of."""

    store: FineTuneStore
    tokens: Tokens

    async def __call__(self, uid: str, attempt: int, token: str, status: Status) -> bool:
        """Whether the token is of this job's current attempt, and it runs; then it is written. Raises StoreUnavailable."""
        shown = await self.tokens.shown(token, anew=False)
        async with self.store.transaction() as connection:
            row = await sql_jobs.any_job(connection, uid, lock=True)
            salt = bytes(row["salt"]) if row is not None else b""
            if not shown.of(uid, attempt, salt) or row is None or row["attempt"] != attempt:
                return False
            if State(row["state"]) not in RUNNING:
                return False
            now = await sql_jobs.now(connection)
            seen = row["progress_time"]  # of a post or of the wrapper's report
            if not status.first and not status.last and seen is not None and now - seen < QUIET:
                return True
            step, target = status.place(row["step"])
            ends = None if status.remaining_s is None or status.last else now + timedelta(seconds=status.remaining_s)
            epoch = row["epoch"] if status.epoch is None else status.epoch
            training = events.phase("TRAINING")
            said = [events.progress(training, step, row["target_step"] or target, epoch, row["tokens"], row["tokens_per_second"], ends)]
            said += [events.metric(name, value, step) for name, value in status.metrics]
            values: dict[str, Any] = {"progress_time": now, "epoch": epoch, "phase": "TRAINING", "estimated_end_time": ends}
            if status.step is not None:  # shown, but no progress that an attempt's budget counts: nothing is committed
                values |= {"step": step, "attempt_step": step}
            await sql_jobs.change(connection, row, *said, **values)
        return True


# --- HTTP -------------------------------------------------------------------------------------------------------------------------------

Take = Callable[[str, int, str, Status], Awaitable[bool]]


@asynccontextmanager
async def listening(take: Take, address: str, certificate: Path | None = None, private_key: Path | None = None) -> AsyncIterator[str]:
    """Take posts at `address` (host:port) while the block runs; yields where, as a URL without a path.

    A token is all that is asked for: an attempt has no certificate. Raises PlaintextRefused without a certificate off this machine.
    """
    if certificate is None and not is_local(address):
        raise PlaintextRefused("take attempts' tokens on", address)
    context = None
    if certificate is not None:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(certificate, private_key)
    open_now: set[object] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        key = object()
        open_now.add(key)
        try:
            async with asyncio.timeout(SECONDS):
                status = HTTPStatus.SERVICE_UNAVAILABLE if len(open_now) > CONNECTIONS else await _one(take, reader)
                _answer(writer, status)
                await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError, ssl.SSLError):
            log.debug("a post broke off")
        finally:
            open_now.discard(key)
            writer.close()

    host, _, port = address.rpartition(":")
    server = await asyncio.start_server(serve, host.strip("[]"), int(port), limit=HEAD_BYTES, ssl=context)
    renewing = asyncio.create_task(_renew(context, certificate, private_key)) if context is not None else None
    try:
        yield f"{'http' if context is None else 'https'}://{host}:{server.sockets[0].getsockname()[1]}"
    finally:
        if renewing is not None:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)
        server.close()
        await server.wait_closed()


async def _renew(context: ssl.SSLContext, certificate: Path | None, private_key: Path | None) -> None:
    """Hand new handshakes the certificate that the files hold by then; a pair that does not fit leaves the old one in use."""
    assert certificate is not None
    seen = certificate.stat().st_mtime_ns
    while True:
        await asyncio.sleep(RELOAD_SECONDS)
        with suppress(OSError):  # ssl.SSLError is one: half of a renewed pair is read again at the next look
            if (now := certificate.stat().st_mtime_ns) != seen:
                context.load_cert_chain(certificate, private_key)
                seen = now


async def _one(take: Take, reader: asyncio.StreamReader) -> HTTPStatus:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, _, rest = head[0].partition(" ")
    found = PATH.fullmatch(rest.partition(" ")[0])
    headers = _headers(head[1:])
    length = headers.get("content-length", "")
    token = headers.get("authorization", "").removeprefix("Bearer ").strip()
    if found is None:
        return HTTPStatus.NOT_FOUND
    if method != "POST":
        return HTTPStatus.METHOD_NOT_ALLOWED
    if not TOKEN.fullmatch(token):
        return HTTPStatus.UNAUTHORIZED
    if not re.fullmatch(r"[0-9]{1,9}", length):
        return HTTPStatus.LENGTH_REQUIRED
    if int(length) > BODY_BYTES:
        return HTTPStatus.REQUEST_ENTITY_TOO_LARGE
    try:
        status = parse(await reader.readexactly(int(length)))
        return HTTPStatus.OK if await take(found[1], int(found[2]), token, status) else HTTPStatus.UNAUTHORIZED
    except Malformed:
        return HTTPStatus.BAD_REQUEST
    except StoreUnavailable:
        return HTTPStatus.SERVICE_UNAVAILABLE


def _headers(lines: list[str]) -> Mapping[str, str]:
    pairs = (line.partition(":") for line in lines)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _answer(writer: asyncio.StreamWriter, status: HTTPStatus) -> None:
    writer.write(f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
