"""The eraser: what is out of reach is emptied from the object store and certified; what is over its time goes the same way.

Level-triggered from SQL: an erasure interrupted anywhere is done again, and says DONE only when nothing is left.
"""

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.chassis import signing
from services.chassis.errors import StoreUnavailable
from services.chassis.objects import Objects
from services.finetune import dataset_store, replays, sql_charges, sql_models, upload_store
from services.finetune.job_erasure import cancel_paused
from services.finetune.queries import Record
from services.finetune.settings import DatasetSettings
from services.finetune.store import FineTuneStore

log = logging.getLogger(__name__)

LATE = timedelta(seconds=60)  # what is erased is gone within that, unless something cannot be stopped
AT_ONCE = 100  # of each kind, in one look
REPLAY_SWEEP_SECONDS = 60.0


@dataclass(eq=False)
class Eraser:
    """Looks every `settings.erase_seconds`, and when woken."""

    store: FineTuneStore
    objects: Objects
    settings: DatasetSettings
    key: Ed25519PrivateKey  # signs the certificates
    kid: str
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _swept: float = 0.0

    def wake(self) -> None:
        """There is something to erase."""
        self._wake.set()

    async def run(self) -> None:
        """Work until cancelled."""
        await self.store.ready.wait()
        while True:
            self._wake.clear()
            try:
                await self.once()
            except StoreUnavailable:
                log.warning("erasing waits for the database or the object store")
            except Exception:  # one fault of ours must not keep everything else from being erased
                log.exception("erasing failed on our side")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self.settings.erase_seconds)

    async def once(self) -> None:
        """Erase what there is now."""
        async with self.store.transaction() as connection:
            await upload_store.expire_uploads(connection)
            for row in await dataset_store.expired_versions(connection, AT_ONCE):
                if await dataset_store.held(connection, row["project_uid"], row["uid"]):
                    continue  # since a moment ago
                await cancel_paused(connection, row["project_uid"], row["uid"])
                name = f"projects/{row['project']}/datasets/{row['dataset_name']}/versions/{row['number']}"
                prefix = f"datasets/{row['project_uid']}/{row['dataset_uid']}/{row['uid']}"
                await dataset_store.bury_version(connection, row["project_uid"], row["uid"])
                await dataset_store.add_deletion(connection, row["project_uid"], name, [name], [prefix], {name: row["sha256"]})
            if time.monotonic() - self._swept > REPLAY_SWEEP_SECONDS:
                self._swept = time.monotonic()
                await replays.sweep(connection)
                await sql_charges.fold(connection)
                await sql_models.fold_events(connection)
                late = await dataset_store.late_deletions(connection, LATE)
                if late:
                    log.warning("%d erasures wait for what may still write to end", late)
        async with self.store.transaction() as connection:
            full = await upload_store.full_uploads(connection, AT_ONCE)
            running = await dataset_store.running_deletions(connection, AT_ONCE)
        for row in full:
            await self.objects.delete_prefix(f"uploads/{row['project_uid']}/{row['uid']}")
            async with self.store.transaction() as connection:
                await upload_store.clear_upload(connection, row["project_uid"], row["uid"])
        for row in running:
            await self._erase(row)

    async def _erase(self, row: Record) -> None:
        found = 0
        for prefix in row["prefixes"]:
            found += await self.objects.delete_prefix(prefix)
        left = [path for prefix in row["prefixes"] async for path, _ in self.objects.list(prefix)]
        if left:
            return  # written meanwhile: the next look finds it
        certificate = signing.seal(
            signing.statement(
                {name: digest for name, digest in row["digests"].items() if digest},
                signing.DELETION_CERTIFICATE,
                {
                    "target": row["target"],
                    "erased": row["erased"],
                    "objects": found,
                    "asked": row["create_time"].astimezone(UTC).isoformat(),
                    "done": datetime.now(UTC).isoformat(),
                },
            ),
            signing.IN_TOTO,
            self.key,
            self.kid,
        )
        async with self.store.transaction() as connection:
            await dataset_store.end_deletion(connection, row["project_uid"], row["uid"], certificate.decode())
