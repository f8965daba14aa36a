"""Evaluations as desired state: claimed in SQL, measured in a child process, judged by the gate, ended once with a signed verdict.

A process that dies leaves a lease that runs out, and the next one begins again; one that is stopped gives its work back at once.
"""

import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from services.chassis import signing
from services.chassis.errors import NotStarted, ResourceNotFound, ServiceError, StoreUnavailable, WrongState
from services.chassis.objects import ObjectMissing, Objects
from services.finetune import dataset_store, gate, lineage, sql_charges, sql_evaluations, sql_models
from services.finetune.bases import Bases
from services.finetune.examining import Examinee, Task
from services.finetune.gate import Outcomes
from services.finetune.hosts import SILENT_SECONDS, allowed
from services.finetune.lineage import Signer
from services.finetune.overlap import overlap
from services.finetune.queries import Record
from services.finetune.store import FineTuneStore

log = logging.getLogger(__name__)

CANDIDATE, CURRENT, BASE = "candidate", "current", "base"
LINE_BYTES = 64 << 20  # of outcomes: a million rows and four models
DEVICE = ("OMP_NUM_THREADS", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "XDG_CACHE_HOME")  # what a measuring child finds its device by
POLL_SECONDS = 2.0  # between looks for evaluations that nothing woke us for
DIED = {"reason": "INTERNAL", "metadata": {}}


class MeasurerDied(Exception):
    """The child ended without outcomes."""


class Measured(msgspec.Struct, frozen=True):
    """What the child says: progress, or outcomes by name, or why there are none."""

    rows: int | None = None
    outcomes: dict[str, Outcomes] | None = None
    failed: str = ""


class Host(Protocol):
    """Where a task runs."""

    async def __call__(self, task: Task, progress: Callable[[int], Awaitable[bool]]) -> Measured | None:
        """Outcomes or why there are none; None: `progress` said that nobody wants them any more. Raises MeasurerDied."""
        ...


class ProcessHost:
    """Each task in a child process, killed when it is not wanted any more."""

    async def __call__(self, task: Task, progress: Callable[[int], Awaitable[bool]]) -> Measured | None:
        """See Host."""
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.finetune.trainer.evaluate", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            limit=LINE_BYTES, start_new_session=True, env=allowed(os.environ, *DEVICE),
        )  # fmt: skip
        try:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(msgspec.json.encode(task) + b"\n")
            with suppress(ConnectionError):  # it died: its output ends, too
                await child.stdin.drain()
            while line := await asyncio.wait_for(child.stdout.readline(), SILENT_SECONDS):
                said = msgspec.json.decode(line, type=Measured)
                if said.rows is None:
                    return said
                if not await progress(said.rows):
                    return None
            raise MeasurerDied
        except TimeoutError as error:
            raise MeasurerDied from error
        finally:
            with suppress(ProcessLookupError):
                child.kill()
            await child.wait()
            child._transport.close()  # type: ignore[attr-defined]  # its pipes, at once rather than when collected


def verdict_statement(row: Record, name: str, candidate_digest: str, verdict: Mapping[str, Any]) -> bytes:
    """What is signed of an ended evaluation: the verdict about the candidate's digest, on rows by their digest."""
    said: dict[str, Any] = {
        "evaluation": f"{name}/evaluations/{row['uid']}",
        "candidate": f"{name}/versions/{row['candidate']}",
        "current": f"{name}/versions/{row['current']}" if row["current"] is not None else "",
        "alias": row["alias"],
        "dataset_version": row["dataset_version"],
        "seed": row["seed"],
        "verdict": verdict,
    }
    subjects = {said["candidate"]: candidate_digest, row["dataset_version"]: row["dataset_digest"]}
    return signing.statement(subjects, signing.GATE_VERDICT, said)


@dataclass(eq=False)
class Evaluators:
    """Works through evaluations, one at a time: each loads a base."""

    store: FineTuneStore
    store_url: str
    bases: Bases
    signer: Signer
    host: Host = field(default_factory=ProcessHost)
    objects: Objects | None = None  # where rows' minima are; None: nearly alike rows are not looked for
    threads: int | None = None
    nanos_per_second: int = 0  # of a measuring process, 1e-9 of `currency`'s unit
    currency: str = "USD"
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        """There is one to do."""
        self._wake.set()

    async def run(self) -> None:
        """Work until cancelled."""
        await self.store.ready.wait()
        while True:
            self._wake.clear()
            try:
                if await self.step():
                    continue
            except (StoreUnavailable, NotStarted):
                log.warning("evaluations wait for the database or a base")
            except Exception:  # a fault of ours in one evaluation must not end all; its lease runs out
                log.exception("an evaluation failed on our side")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), POLL_SECONDS)

    async def step(self) -> bool:
        """Do the oldest evaluation that is due; False: there is none."""
        async with self.store.transaction() as connection:
            row = await sql_evaluations.claim(connection)
            if row is not None and row["attempts"] > sql_evaluations.ATTEMPTS:
                await self._end(connection, row, "FAILED", 0.0, failure=DIED)
                return True
        if row is None:
            return False
        try:
            await self._one(row)
        except asyncio.CancelledError:
            await self._give_back(row)
            raise
        return True

    async def _one(self, row: Record) -> None:
        try:
            task, name, digest = await self._task(row)
        except (StoreUnavailable, NotStarted):
            await self._give_back(row)
            raise
        except ServiceError as error:
            await self._fail(row, failure_of(error))
            return
        measured_rows, began = 0, time.monotonic()

        async def progress(rows: int) -> bool:
            nonlocal measured_rows
            measured_rows = rows
            return await self._renew(row, rows)

        holding = asyncio.create_task(self._hold(row, lambda: measured_rows), name="evaluation lease")
        try:
            said = await self.host(task, progress)
            if said is None:
                return
            if said.outcomes is None:
                await self._fail(row, {"reason": "ARTIFACT_REJECTED", "metadata": {"rule": said.failed}}, time.monotonic() - began)
                return
            await self._judged(row, name, digest, said.outcomes, time.monotonic() - began)
        except MeasurerDied:
            log.warning("the measuring process died", extra={"evaluation": row["uid"]})
            await self._give_back(row, spent=True)
        finally:
            holding.cancel()
            await asyncio.gather(holding, return_exceptions=True)

    async def _judged(self, row: Record, name: str, digest: str, outcomes: Mapping[str, Outcomes], seconds: float) -> None:
        others = {other: found for other, found in outcomes.items() if other != CANDIDATE}
        verdict = await asyncio.to_thread(gate.judge, row["metric"], outcomes[CANDIDATE], others, row["margin"], row["seed"])
        said = verdict.as_json() | {"near_rows": await self._near_rows(row)}
        envelope = self.signer.seal(verdict_statement(row, name, digest, said))
        async with self.store.transaction() as connection:
            await self._end(
                connection, row, "PASSED" if verdict.passed else "NOT_PASSED", seconds,
                verdict=json.loads(json.dumps(said)), envelope=envelope, measured_rows=len(outcomes[CANDIDATE].values),
            )  # fmt: skip

    async def _near_rows(self, row: Record) -> int:
        """Held-out rows nearly alike one that the candidate was trained on (V12); 0 where the rows are gone by now."""
        if self.objects is None:
            return 0
        try:
            async with self.store.transaction() as connection:
                version = await sql_models.version(connection, row["project_uid"], row["model_uid"], row["candidate"])
                datasets = lineage.from_json(version["manifest"]).datasets if version is not None else ()
                names = [row["dataset_version"], *(each.dataset_version for each in datasets if each.use == "train")]
                held, *trained = [await dataset_store.version_for_training(connection, row["project_uid"], name) for name in names]
            return max([(await overlap(self.objects, train, held)).near_rows for train in trained], default=0)
        except (ResourceNotFound, WrongState, ObjectMissing):
            return 0

    async def _end(self, connection: AsyncConnection, row: Record, state: str, seconds: float, **values: Any) -> None:
        """End it and say what it owes: the seconds of the process that ended it. What died or was given back on the way is ours to pay."""
        if not await sql_evaluations.end(connection, row, state, **values):
            return
        model = await sql_models.model_by_uid(connection, row["project_uid"], row["model_uid"])
        if model is None:
            return
        name = f"projects/{model['project']}/models/{model['name']}"
        owed = sql_charges.Charge(
            row["project_uid"], model["project"], row["key_id"], row["uid"], 1, "EVALUATION", name, f"{name}/versions/{row['candidate']}",
            self.currency, sql_charges.nanos_of(seconds, self.nanos_per_second), seconds, "FAILED" if state == "FAILED" else "DONE",
        )  # fmt: skip
        await sql_charges.add(connection, owed)

    async def _task(self, row: Record) -> tuple[Task, str, str]:
        """What to measure, the model's resource name, and the candidate's digest. Raises ResourceNotFound for what was erased."""
        async with self.store.transaction() as connection:
            model = await sql_models.model_by_uid(connection, row["project_uid"], row["model_uid"])
            if model is None:
                raise ResourceNotFound("candidate")
            examinees = []
            for role, number in ((CANDIDATE, row["candidate"]), (CURRENT, row["current"])):
                if number is not None:
                    version = await sql_models.version(connection, row["project_uid"], row["model_uid"], number)
                    if version is None or version["state"] != "READY":
                        raise ResourceNotFound("candidate" if role == CANDIDATE else "alias")
                    examinees.append(examinee(role, version))
            data = await dataset_store.version_for_training(connection, row["project_uid"], row["dataset_version"], "dataset_version")
        base = await self.bases.get(model["base_model"])
        task = Task(
            self.store_url, str(base.directory), data.path, data.sha256, data.layout, (*examinees, Examinee(BASE)), row["max_rows"],
            row["seed"], self.threads,
        )  # fmt: skip
        return task, f"projects/{model['project']}/models/{model['name']}", examinees[0].place.rpartition("/")[2]

    async def _renew(self, row: Record, rows: int) -> bool:
        try:
            async with self.store.transaction() as connection:
                return await sql_evaluations.renew(connection, row, rows)
        except StoreUnavailable:
            return True  # the lease is longer than a short outage; if it runs out, the end will be refused

    async def _hold(self, row: Record, rows: Callable[[], int]) -> None:
        """Loading a base says nothing for longer than a lease."""
        while True:
            await asyncio.sleep(sql_evaluations.LEASE.total_seconds() / 3)
            await self._renew(row, rows())

    async def _give_back(self, row: Record, *, spent: bool = False) -> None:
        """Let another claim have it. A lost database needs no word: the lease runs out."""
        with suppress(StoreUnavailable):
            async with self.store.transaction() as connection:
                await sql_evaluations.release(connection, row, spent=spent)

    async def _fail(self, row: Record, failure: Mapping[str, Any], seconds: float = 0.0) -> None:
        async with self.store.transaction() as connection:
            await self._end(connection, row, "FAILED", seconds, failure=failure)


def examinee(role: str, version: Record) -> Examinee:
    """A READY version as the child loads it."""
    said = lineage.from_json(version["manifest"])
    return Examinee(
        role, lineage.place(version["project_uid"], version["adapter_digest"]), {part.name: part.sha256 for part in said.parts}, said.rank,
        said.alpha, said.rslora, said.dora, tuple(said.labels), said.temperature or 1.0, said.max_tokens,
    )  # fmt: skip


def failure_of(error: ServiceError) -> dict[str, Any]:
    """An error as it is kept: what its status would have said."""
    return {"reason": error.reason, "metadata": dict(error.metadata)}
