"""Brings jobs from what their rows want to what the launcher shows: one look, one decision, one step, again.

Stateless: every step may be cut off and repeated, by this process or another. Ownership of a job is a lease with an epoch; a write of a
reconciler that has lost it changes nothing. Workers do not notice a restart: their leases are their own, and after an outage of ours
nobody is called lost before one whole lease has passed.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

from sqlalchemy.ext.asyncio import AsyncConnection

from services.chassis.errors import StoreUnavailable
from services.chassis.telemetry import Telemetry
from services.finetune import crash, events, sql_jobs
from services.finetune.jobs import (
    TERMINAL,
    WORKING,
    Attempt,
    Do,
    Job,
    Launcher,
    LauncherUnavailable,
    NameTaken,
    State,
    Step,
    Waits,
    Where,
    attempt_name,
    decide,
)
from services.finetune.queries import Record
from services.finetune.settings import JobQuotas, JobSettings
from services.finetune.store import FineTuneStore
from services.finetune.tokens import TokenMint

__all__ = ["Reconciler", "job_of"]

log = logging.getLogger(__name__)

BATCH = 32  # jobs of one look
OWNER_SECONDS = 30.0  # of a reconciler not heard from, another takes the jobs
SWEEP_SECONDS = 10.0  # between looks for orphans
NO_POD_SECONDS = 10.0  # without a pod, until somebody may have to help
FORGET_SECONDS = 60.0  # what an attempt waits for is forgotten when nobody has looked for so long
BACKOFF = 16  # times the first pause at most


@dataclass(frozen=True, slots=True)
class Waiting:
    """What an attempt waits for: since when, last seen when (seconds of the loop's clock), and whether its job's log says so."""

    waits: Waits
    since: float
    seen: float
    told: bool


@dataclass(eq=False)
class Reconciler:
    """One of perhaps several; `run` is its life."""

    store: FineTuneStore
    launcher: Launcher
    mint: TokenMint
    settings: JobSettings
    quotas: JobQuotas
    clean: Callable[[Record], Awaitable[None]] | None = None  # what an ended attempt left in the object store
    name: str = field(default_factory=lambda: str(uuid4()))
    telemetry: Telemetry = field(default_factory=Telemetry.off)
    _waits: dict[str, Waiting] = field(default_factory=dict)  # by job uid
    _woken: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        """Something was committed that may want a step."""
        self._woken.set()

    async def run(self) -> None:
        """Until cancelled."""
        await self.store.ready.wait()
        swept = -SWEEP_SECONDS
        clock = asyncio.get_running_loop().time
        began = clock()
        while True:
            self._woken.clear()
            try:
                patient = clock() - began < self.settings.lease_seconds
                busy = await self.once(patient=patient)
                if clock() - swept > SWEEP_SECONDS:
                    await self.sweep()
                    swept = clock()
            except StoreUnavailable:
                log.warning("the reconciler waits for the database")
                busy, began = False, clock()  # workers could not renew, either: give them a lease to be heard again
            except Exception:  # a fault of ours, or of the launcher's listing, must not leave all jobs to themselves
                log.exception("the reconciler failed on our side")
                busy = False
            if not busy:
                try:
                    async with asyncio.timeout(self.settings.poll_seconds):
                        await self._woken.wait()
                except TimeoutError:
                    continue

    async def once(self, *, patient: bool = False) -> bool:
        """One look at all due jobs; whether any was moved. `patient`: leases are not judged yet."""
        async with self.store.transaction() as connection:
            rows = await sql_jobs.claim(connection, self.name, OWNER_SECONDS, BATCH)
            now = await sql_jobs.now(connection)
            total, of_project = await sql_jobs.working(connection)
        moved = False
        for row in in_turn(rows, of_project):
            if row["state"] == State.QUEUED and row["reaped"]:
                mine = of_project.get(row["project_uid"], 0)
                limit = self.quotas.running_jobs_per_project
                if total >= self.settings.training_slots or (limit and mine >= limit):
                    await self._later(row)
                    continue
            try:
                step = await self._step(row, now, patient)
            except sql_jobs.Moved:
                moved = True  # by somebody else: look again
                continue
            except NameTaken:
                log.error("an attempt's name is taken by something that is not ours", extra={"job": row["uid"]})
                await self._later(row)
                continue
            except LauncherUnavailable as error:  # nothing is known of it, and nothing is lost: again a little later
                await self._tell(row, error.waits, str(error))
                total += row["state"] == State.QUEUED
                await self._later(row)
                continue
            except StoreUnavailable:
                raise
            except Exception:  # one job's folder, base or pod must not keep all others from being looked at
                log.exception("a job's step failed", extra={"job": row["uid"]})
                total += row["state"] == State.QUEUED  # its attempt may have been written
                await self._later(row)
                continue
            if step.do is Do.START:
                total += 1
                of_project[row["project_uid"]] = of_project.get(row["project_uid"], 0) + 1
            if step.do in (Do.WAIT, Do.STOP, Do.HOLD):
                await self._later(row)
            else:
                moved = True
        self._measure()
        return moved or len(rows) == BATCH  # what waits at the front must not hide what is due behind it

    async def _later(self, row: Record) -> None:
        async with self.store.transaction() as connection:
            await sql_jobs.later(connection, row, self.settings.poll_seconds)

    async def _step(self, row: Record, now: datetime, patient: bool) -> Step:
        job = job_of(row, patient)
        looks = job.attempt > 0 and (job.state in WORKING or not job.reaped)
        seen = await self.launcher.observe(job.name) if looks else None
        step = decide(job, seen, now)
        waits = None if seen is None else seen.waits
        if seen is not None and waits is not None:
            await self._tell(row, waits, seen.reason)
        await self._apply(row, job, step)
        if waits is None:  # and what was asked for was done
            self._waits.pop(row["uid"], None)
        return step

    async def _tell(self, row: Record, waits: Waits, why: str) -> None:
        """Say in the job's log what it waits for, once for each cause; what the cluster said of it is for the operator alone."""
        clock = asyncio.get_running_loop().time()
        known = self._waits.get(row["uid"])
        if known is None or known.waits is not waits:
            known = Waiting(waits, clock, clock, told=False)
        # A pod that is only just being made is no news.
        news = not known.told and waits is not Waits.STARTING and (waits is not Waits.NO_POD or clock - known.since > NO_POD_SECONDS)
        self._waits[row["uid"]] = replace(known, seen=clock, told=known.told or news)
        if not news:
            return
        log.warning("an attempt waits", extra={"job": row["uid"], "attempt": row["attempt"], "waits": waits.value, "why": why})
        async with self.store.transaction() as connection:
            found = await sql_jobs.any_job(connection, row["uid"], lock=True)
            if found is not None and State(found["state"]) not in TERMINAL:
                await sql_jobs.say(connection, found, events.warning(f"attempt.{waits.value.lower()}", 0, 1))

    def _measure(self) -> None:
        clock = asyncio.get_running_loop().time()
        self._waits = {uid: each for uid, each in self._waits.items() if clock - each.seen < FORGET_SECONDS}
        found = Counter(each.waits for each in self._waits.values())
        for waits in Waits:
            self.telemetry.record("argosy.attempt.waiting", found[waits], {"argosy.reason": waits.value})

    async def _apply(self, row: Record, job: Job, step: Step) -> None:
        match step.do:
            case Do.WAIT:
                if job.state is State.PAUSED and job.expire_time is None:  # it was paused while it was queued
                    await self._write(row, expire_time=sql_jobs.NOW + timedelta(days=self.settings.paused_days))
            case Do.START:
                row = await self._start(row)
                await self._ensure(row)
            case Do.ENSURE:
                await self._ensure(row)
            case Do.HOLD:
                await self._write(row, lease_time=sql_jobs.NOW + self._first_lease)
            case Do.STOP:
                at_once = job.state is State.CANCELLING or row["delete_time"] is not None
                grace = 0.0 if at_once else self.settings.stop_seconds
                await self.launcher.stop(job.name, max(grace, 1.0))
            case Do.REAP:
                await self.launcher.reap(job.name)
                if self.clean is not None and job.state in TERMINAL:
                    await self.clean(row)
                await self._write(row, reaped=True)
                self._ended(row, job)
            case Do.LOST:
                await self._lost(row, step)
            case Do.PAUSED:
                expires = timedelta(days=self.settings.paused_days)
                await self._move(row, State.PAUSED, row["reason"], expire_time=sql_jobs.NOW + expires, **_freed(row))
            case Do.CANCELLED:
                await self._move(row, State.CANCELLED, step.why or row["reason"], **_freed(row))
            case Do.FAIL_DEADLINE:
                await self._move(row, State.FAILED, "DEADLINE", error=None)

    async def _start(self, row: Record) -> Record:
        """A new attempt, before anything is launched: what asks for it is this row."""
        async with self.store.transaction() as connection:
            row = await sql_jobs.owned(connection, row)
            row = await sql_jobs.move(
                connection, row, State.PREPARING, why="", attempt=row["attempt"] + 1, salt=self.mint.salt(), nonce="", report=0,
                lease_time=None, launch_time=None, reaped=False, attempt_step=row["step"], attempt_seconds=0.0,
            )  # fmt: skip
        crash.point("attempt-written")
        return row

    async def _ensure(self, row: Record) -> None:
        await self.launcher.ensure(
            Attempt(
                name=attempt_name(row["uid"], row["attempt"]),
                job_uid=row["uid"],
                attempt=row["attempt"],
                project_uid=row["project_uid"],
                base_model=row["base_model"],
                token=self.mint.token(row["uid"], row["attempt"], row["salt"]),
                spec_digest=row["spec_digest"],
            )
        )
        crash.point("attempt-launched")
        lease = sql_jobs.NOW + self._first_lease
        async with self.store.transaction() as connection:
            found = await sql_jobs.any_job(connection, row["uid"], lock=True)
            if found is not None and found["attempt"] == row["attempt"] and found["launch_time"] is None:
                values: dict[str, Any] = {"launch_time": sql_jobs.NOW}
                await sql_jobs.change(connection, found, **values | ({} if found["lease_time"] else {"lease_time": lease}))

    @property
    def _first_lease(self) -> timedelta:
        """Until it claims, an attempt has two leases: a process starts, loads its weights, and only then speaks."""
        return timedelta(seconds=2 * self.settings.lease_seconds + 60)

    def _ended(self, row: Record, job: Job) -> None:
        outcome = {State.QUEUED: "LOST"}.get(job.state, job.state.value)
        self.telemetry.record("argosy.attempt.ended", 1, {"argosy.outcome": outcome})
        if job.state in TERMINAL:
            self.telemetry.record("argosy.job.ended", 1, {"argosy.outcome": outcome, "argosy.reason": row["reason"] or "NONE"})

    async def _lost(self, row: Record, step: Step) -> None:
        """Again from the last checkpoint, a little later; a job whose attempts commit nothing new in a row has failed."""
        barren = 0 if row["step"] > row["attempt_step"] else row["barren"] + (0 if step.disrupted else 1)
        if barren >= self.settings.attempts_without_progress:
            why = "OUT_OF_MEMORY" if step.why in ("exit 137", "signal 9") else "ATTEMPTS_SPENT"
            error = {"reason": "INTERNAL", "message": f"{barren} attempts in a row ended without a result ({step.why})."}
            await self._move(row, State.FAILED, why, error=error, barren=barren, **_freed(row))
            return
        pause = self.settings.retry_seconds * min(BACKOFF, 2 ** max(0, barren - 1)) * random.SystemRandom().uniform(0.5, 1.0)
        log.info("attempt lost", extra={"job": row["uid"], "attempt": row["attempt"], "why": step.why})
        due = sql_jobs.NOW + timedelta(seconds=pause if barren else 0.0)
        await self._move(row, State.QUEUED, "ATTEMPT_LOST", barren=barren, due_time=due, **_freed(row))

    async def _move(self, row: Record, to: State, why: str, **values: Any) -> None:
        async with self.store.transaction() as connection:
            row = await sql_jobs.owned(connection, row)
            await sql_jobs.move(connection, row, to, why=why, **values)

    async def _write(self, row: Record, **values: Any) -> None:
        async with self.store.transaction() as connection:
            row = await sql_jobs.owned(connection, row)
            await sql_jobs.change(connection, row, **values)

    async def sweep(self) -> None:
        """Clear away attempts that no job knows: of an earlier attempt, or of a job that was erased."""
        try:
            names = await self.launcher.list()
        except LauncherUnavailable as error:
            log.debug("no orphans are looked for: %s", error)
            return
        async with self.store.transaction() as connection:
            known = await sql_jobs.live_names(connection)
        for name in names:
            uid, _, attempt = name.removeprefix("ft-").rpartition("-a")
            if known.get(uid) == int(attempt) or (await self._newer(uid, int(attempt))):
                continue
            seen = await self.launcher.observe(name)
            if seen.where in (Where.RUNNING, Where.PENDING):
                await self.launcher.stop(name, 1.0)
            else:
                await self.launcher.reap(name)

    async def _newer(self, uid: str, attempt: int) -> bool:
        """Whether the job has begun this attempt since we looked."""
        async with self.store.transaction() as connection:
            row = await sql_jobs.any_job(connection, uid)
        return row is not None and row["attempt"] == attempt and not row["reaped"]


def in_turn(rows: Sequence[Record], busy: Mapping[str, int]) -> list[Record]:
    """Who is looked at first: what runs; then, of the queued, each project's first before any one's second.

    Priority counts within a project alone. `busy`: attempts that each project has under way.
    """
    before, ranked = Counter(busy), list[tuple[int, datetime, int, Record]]()
    for row in sorted(rows, key=lambda each: (-each["priority"], each["create_time"])):
        queued = row["state"] == State.QUEUED
        ranked.append((before[row["project_uid"]] if queued else -1, row["create_time"], len(ranked), row))
        before[row["project_uid"]] += queued
    return [row for *_, row in sorted(ranked, key=lambda each: each[:3])]


def _freed(row: Record) -> dict[str, Any]:
    """What no attempt has any more; the bill stays."""
    return {"lease_time": None, "launch_time": None, "nonce": ""}


def job_of(row: Record, patient: bool = False) -> Job:
    """A row as decisions see it."""
    return Job(
        uid=row["uid"],
        state=State(row["state"]),
        attempt=row["attempt"],
        launched=row["launch_time"] is not None,
        reaped=row["reaped"],
        claimed=bool(row["nonce"]),
        lease_time=None if patient else row["lease_time"],
        update_time=row["update_time"],
        deadline=row["deadline"],
        expire_time=row["expire_time"],
    )


async def wanted(connection: AsyncConnection, row: Record, to: State, why: str) -> Record:
    """What a caller asks of a locked job: pause or cancel, by way of the state that waits for its attempt."""
    if State(row["state"]) in (State.QUEUED, State.PAUSED):  # an attempt left to clear away does not keep it
        return await sql_jobs.move(connection, row, State.PAUSED if to is State.PAUSING else State.CANCELLED, why=why)
    return await sql_jobs.move(connection, row, to, why=why)
