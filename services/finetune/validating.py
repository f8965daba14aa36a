"""The validators: versions in VALIDATING are claimed in SQL, judged in child processes, and made READY or REJECTED.

State is in SQL and objects alone: a service that dies leaves a claim that runs out, and the next one begins again.
"""

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import msgspec

from services.chassis.errors import ServiceError, StoreUnavailable
from services.chassis.objects import Objects
from services.finetune import dataset_store, upload_store
from services.finetune.hosts import Host, ProcessHost, ThreadHost, ValidatorDied
from services.finetune.queries import Record
from services.finetune.schema.datasets import dataset_versions
from services.finetune.settings import DatasetSettings
from services.finetune.store import FineTuneStore
from services.finetune.validation import Outcome, Task

log = logging.getLogger(__name__)

ATTEMPTS = 3  # a version whose validator dies this often is REJECTED: its rows kill whoever reads them
BASE_SECONDS = 5.0  # a validation waits so long for a base that is being fetched
POLL_SECONDS = 1.0  # between looks for versions that nothing woke us for


class Base(Protocol):
    """A base that lies here."""

    @property
    def directory(self) -> Path:
        """Its files."""
        ...


class Bases(Protocol):
    """The bases by resource name."""

    @property
    def names(self) -> frozenset[str]:
        """What there is."""
        ...

    async def get(self, name: str) -> Base:
        """One of them; fetched if it is not here yet."""
        ...


def data_path(project_uid: str, dataset_uid: str, version_uid: str) -> str:
    """The object that holds a version's bytes."""
    return f"datasets/{project_uid}/{dataset_uid}/{version_uid}/data"


@dataclass(eq=False)
class Validators:
    """Works through versions in VALIDATING, `settings.validators` at once."""

    store: FineTuneStore
    objects: Objects
    settings: DatasetSettings
    bases: Bases | None = None  # whose tokenizers count; None: none
    host: Host | None = None
    _wake: asyncio.Event = field(default_factory=asyncio.Event)

    def wake(self) -> None:
        """There is a version to validate."""
        self._wake.set()

    async def run(self) -> None:
        """Work until cancelled; what is under way then is left to the next start at once."""
        await self.store.ready.wait()
        async with asyncio.TaskGroup() as group:
            for _ in range(self.settings.validators):
                group.create_task(self._work(), name="validator")

    async def _work(self) -> None:
        while True:
            try:
                async with self.store.transaction() as connection:
                    row = await dataset_store.claim_validation(connection, str(uuid4()))
                if row is not None:
                    await self._one(row)
                    continue
            except StoreUnavailable:
                log.warning("validation waits for the database or the object store")
            except Exception:  # a fault of ours in one version must not end the validation of all
                log.exception("a validation failed on our side")
            self._wake.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), POLL_SECONDS)

    async def _one(self, row: Record) -> None:
        if row["attempts"] > ATTEMPTS:
            await self._reject(row, {"reason": "INTERNAL", "metadata": {}})
            return
        host = self.host or (ThreadHost(self.objects) if self.objects.url.startswith("memory:") else ProcessHost())
        task, derived_uid = await self._task(row)
        started = time.monotonic()
        beating = asyncio.create_task(self._beat(row), name="validator's claim")
        try:
            outcome = await host(task, lambda done: self._progress(row, done))
        except ValidatorDied:
            log.warning("a validator died; version %s, attempt %d", row["uid"], row["attempts"])
            return
        except BaseException:
            with suppress(StoreUnavailable):
                await asyncio.shield(self._free(row))
            raise
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
        try:
            if outcome is None:
                raise _NotOurs
            await self._settle(row, outcome, derived_uid)
            log.info("validated %d rows in %.1f s", outcome.rows, time.monotonic() - started)
        except _NotOurs:
            await self._give_up(row, derived_uid)

    async def _free(self, row: Record) -> str:
        async with self.store.transaction() as connection:
            return await dataset_store.free_validation(connection, row["project_uid"], row["uid"], row["claim_uid"])

    async def _give_up(self, row: Record, derived_uid: str) -> None:
        """Remove what was written of a version that was deleted meanwhile; then its erasure may say that it is done."""
        above = f"datasets/{row['project_uid']}/{row['dataset_uid']}"
        async with self.store.transaction() as connection:
            now = await dataset_store.version_of_uid(connection, row["project_uid"], row["uid"])
        if now is not None and now["state"] == "DELETED":
            for uid in filter(None, (row["uid"], derived_uid)):
                await self.objects.delete_prefix(f"{above}/{uid}")
        await self._free(row)

    async def _beat(self, row: Record) -> None:
        """Keep the claim while the host works: duplicates are found in minutes in which no byte is judged."""
        while True:
            await asyncio.sleep(dataset_store.LEASE.total_seconds() / 4)
            await self._progress(row, None)

    async def _progress(self, row: Record, done: int | None) -> bool:
        try:
            async with self.store.transaction() as connection:
                return await dataset_store.renew_validation(connection, row["project_uid"], row["uid"], row["claim_uid"], done)
        except StoreUnavailable:
            return True  # the claim may run out; its outcome then finds that it has

    async def _task(self, row: Record) -> tuple[Task, str]:
        project, whole = row["project_uid"], row["dataset_uid"]
        parts: tuple[str, ...] = ()
        source = ""
        async with self.store.transaction() as connection:
            if row["upload_uid"] is not None:
                parts = tuple(await upload_store.parts(connection, project, row["upload_uid"]))
        if row["redacted"]:
            source = data_path(project, whole, row["source_uid"])
        data = data_path(project, whole, row["uid"])
        derived_uid = str(uuid4()) if row["skip_errors"] else ""
        return Task(
            store_url=self.objects.url,
            data=data,
            sha256=row["sha256"],
            total_bytes=row["total_bytes"],
            layout=dataset_store.layout_of(row),
            parts=parts,
            source=source,
            kinds=tuple(row["redacted"]),
            digests=data.removesuffix("data") + "digests",
            derived=data_path(project, whole, derived_uid) if derived_uid else "",
            max_rows=self.settings.rows_per_version,
            row_tokens=self.settings.row_tokens,
            bases=await self._tokenizers(),
            memory_bytes=self.settings.validator_memory_bytes,
        ), derived_uid

    async def _tokenizers(self) -> tuple[tuple[str, str], ...]:
        """Base model and directory of each base that is here soon; the others' tokens are not counted."""
        found = []
        for name in sorted(self.bases.names) if self.bases is not None else ():
            assert self.bases is not None
            with suppress(TimeoutError, ServiceError):
                found.append((name, str((await asyncio.wait_for(self.bases.get(name), BASE_SECONDS)).directory)))
        return tuple(found)

    async def _settle(self, row: Record, outcome: Outcome, derived_uid: str) -> None:
        """One transaction: the verdict, its findings, and the clean version if one was made."""
        v = dataset_versions.c
        project = row["project_uid"]
        ours = (v.state == "VALIDATING", v.claim_uid == row["claim_uid"])
        report = msgspec.to_builtins(outcome)
        for name in ("findings", "derived", "type", "sha256", "total_bytes"):
            report.pop(name, None)
        failure: dict[str, Any] | None = None
        if outcome.errors:
            worst = next(found for found in outcome.findings if found.severity == "error")
            failure = {
                "reason": "UNSUPPORTED_FORMAT",
                "metadata": {"rule": worst.rule, "line": str(worst.line), "byte_offset": str(worst.byte_offset), "field": worst.field},
            }
        async with self.store.transaction() as connection:
            parent = await dataset_store.dataset_of_uid(connection, project, row["dataset_uid"], lock=True)
            clean: str | None = None
            if outcome.derived is not None and parent is not None:
                layout = dataset_store.layout_of(row)
                found = await dataset_store.same_bytes(connection, project, row["dataset_uid"], outcome.derived.sha256, layout)
                if found is None:
                    found = await dataset_store.add_version(
                        connection, parent, layout, uid=derived_uid, sha256=outcome.derived.sha256,
                        total_bytes=outcome.derived.total_bytes, source_uid=row["uid"], skipped_lines=outcome.derived.skipped_lines,
                        skipped_rows=outcome.derived.skipped_rows,
                    )  # fmt: skip
                clean = found["uid"]
            changed = await dataset_store.change_version(
                connection, project, row["uid"], *ours, state="REJECTED" if failure else "READY", report=report, failure=failure,
                rows=outcome.valid_rows, validated_bytes=outcome.total_bytes, total_bytes=outcome.total_bytes, sha256=outcome.sha256,
                end_time=dataset_store.NOW, derived_uid=clean, claim_uid=None, upload_uid=None,
            )  # fmt: skip
            if changed is None:
                raise _NotOurs
            await dataset_store.keep_row_errors(connection, project, row["uid"], outcome.findings)
        if clean is not None:
            self.wake()

    async def _reject(self, row: Record, failure: dict[str, Any]) -> None:
        async with self.store.transaction() as connection:
            await dataset_store.change_version(
                connection, row["project_uid"], row["uid"], dataset_versions.c.claim_uid == row["claim_uid"], state="REJECTED",
                failure=failure, end_time=dataset_store.NOW,
            )  # fmt: skip


class _NotOurs(Exception):
    """The version was deleted or taken over while it was judged: nothing of the verdict is written."""
