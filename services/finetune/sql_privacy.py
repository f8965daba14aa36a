"""The privacy ledger: one row a private job, written with the job and never taken back, whatever is erased later."""

from sqlalchemy import case, func, insert, or_, select
from sqlalchemy.ext.asyncio import AsyncConnection

from services.finetune.jobs import TERMINAL
from services.finetune.privacy import Spent
from services.finetune.schema.jobs import jobs
from services.finetune.schema.privacy import privacy_ledger

__all__ = ["add", "spent"]

_l, _j = privacy_ledger.c, jobs.c


async def spent(connection: AsyncConnection, project_uid: str, dataset_uid: str, digest: str) -> Spent:
    """What the jobs on a dataset's rows cost together: of one that has ended what it was charged, of any other all that it may be.

    Its rows are those of any of its versions, and of any other dataset of the project with the same bytes as the version asked about.
    """
    over = _j.state.in_([state.value for state in TERMINAL])
    epsilon = case((over, func.least(_j.epsilon, _l.epsilon)), else_=_l.epsilon)
    delta = case((over & (_j.epsilon == 0), 0.0), else_=_l.delta)
    statement = (
        select(func.coalesce(func.sum(epsilon), 0.0), func.coalesce(func.sum(delta), 0.0))
        .select_from(privacy_ledger.join(jobs, (_j.project_uid == _l.project_uid) & (_j.uid == _l.job_uid)))
        .where(_l.project_uid == project_uid, or_(_l.dataset_uid == dataset_uid, _l.digest == digest))
    )
    found = (await connection.execute(statement)).one()
    return Spent(float(found[0]), float(found[1]))


async def add(connection: AsyncConnection, project_uid: str, job_uid: str, dataset_uid: str, digest: str, promised: Spent) -> None:
    """Reserve a new job's promise, in the transaction that makes the job."""
    values = {
        "project_uid": project_uid, "job_uid": job_uid, "dataset_uid": dataset_uid, "digest": digest, "epsilon": promised.epsilon,
        "delta": promised.delta,
    }  # fmt: skip
    await connection.execute(insert(privacy_ledger).values(**values))
