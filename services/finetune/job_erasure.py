"""How jobs go with what they were made from: cancelled, or erased with their checkpoints."""

from collections.abc import Sequence

from sqlalchemy.ext.asyncio import AsyncConnection

from services.finetune import lineage, sql_jobs, sql_models
from services.finetune.datasets import Erased
from services.finetune.jobs import TERMINAL, State
from services.finetune.queries import Record
from services.finetune.reconciler import wanted

__all__ = ["JobDependants", "cancel_paused"]


class JobDependants:
    """See datasets.Dependants and model_erasure.ModelJobs."""

    async def of_versions(self, connection: AsyncConnection, project_uid: str, version_uids: Sequence[str]) -> bool:
        """Whether any job was made from one of these dataset versions."""
        return bool(await sql_jobs.reading(connection, project_uid, version_uids))

    async def erase(self, connection: AsyncConnection, project_uid: str, project: str, version_uids: Sequence[str]) -> Erased:
        """End and erase them all: their checkpoints hold what was learnt from the rows."""
        names, prefixes, digests = [], [], {}
        for row in await sql_jobs.reading(connection, project_uid, version_uids):
            name = f"projects/{project}/fineTuneJobs/{row['uid']}"
            await sql_jobs.erase(connection, row)
            names.append(name)
            prefixes += [f"jobs/{project_uid}/{row['uid']}", *await _unfinished(connection, row)]
            digests[name] = row["spec_digest"]
        return Erased(tuple(names), tuple(prefixes), digests)

    async def of_model(self, connection: AsyncConnection, project_uid: str, model: str) -> bool:
        """Whether a job that is not at rest would publish into this model."""
        return bool(await sql_jobs.publishing(connection, project_uid, model))

    async def cancel_of_model(self, connection: AsyncConnection, project_uid: str, model: str) -> None:
        """Cancel them all."""
        for row in await sql_jobs.publishing(connection, project_uid, model):
            await _cancel(connection, row)


async def cancel_paused(connection: AsyncConnection, project_uid: str, version_uid: str) -> None:
    """Rows whose time is over take the paused jobs with them that would have gone on with them."""
    for row in await sql_jobs.reading(connection, project_uid, [version_uid]):
        if State(row["state"]) is State.PAUSED:
            await wanted(connection, row, State.CANCELLING, "ERASED")


async def _unfinished(connection: AsyncConnection, row: Record) -> list[str]:
    """Where the result is put that a job was about to publish."""
    version = await sql_models.version_of_job(connection, row["project_uid"], row["uid"])
    if version is None or version["state"] != "CHECKING":
        return []
    await sql_models.change_version(connection, version, state="REJECTED", delete_time=sql_jobs.NOW)
    return [lineage.place(row["project_uid"], version["adapter_digest"])] if version["adapter_digest"] else []


async def _cancel(connection: AsyncConnection, row: Record) -> None:
    if State(row["state"]) not in TERMINAL | {State.CANCELLING}:
        await wanted(connection, row, State.CANCELLING, "ERASED")
