"""How versions and models go: out of reach at once, told to every gateway, their objects named for the eraser."""

from collections.abc import Sequence
from typing import Any, Protocol

from sqlalchemy import delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from services.finetune import lineage, sql_models
from services.finetune.datasets import Erased
from services.finetune.queries import Record
from services.finetune.schema.datasets import dataset_versions, datasets
from services.finetune.schema.models import model_aliases, model_evaluations, model_versions, models

_now = func.clock_timestamp()


class ModelJobs(Protocol):
    """The jobs that would publish into a model."""

    async def of_model(self, connection: Any, project_uid: str, model: str) -> bool:
        """Whether a job that is not at rest has this model, by resource name, for its target."""
        ...

    async def cancel_of_model(self, connection: Any, project_uid: str, model: str) -> None:
        """Cancel them all."""
        ...


class NoJobs:
    """A registry without training."""

    async def of_model(self, connection: Any, project_uid: str, model: str) -> bool:
        """Never."""
        return False

    async def cancel_of_model(self, connection: Any, project_uid: str, model: str) -> None:
        """Nothing to do."""


async def erase_version(connection: AsyncConnection, model: Record, row: Record, actor: str = "") -> Erased:
    """Empty a version's row, drop what points to it, and tell the gateways. Both rows are locked by the caller.

    An alias that only sends a share of its callers there keeps its stable version.
    """
    name = f"projects/{model['project']}/models/{model['name']}"
    version = f"{name}/versions/{row['number']}"
    key = (row["project_uid"], row["model_uid"])
    names = [version]
    for alias in await sql_models.aliases_of(connection, *key, row["number"]):
        if alias["split"] == row["number"]:
            await sql_models.point(connection, *key, alias["name"], "ROLLED_BACK", alias["target"], actor=actor)
        else:
            await sql_models.drop_alias(connection, alias, actor=actor)
            names.append(f"{name}/aliases/{alias['name']}")
    digest = row["adapter_digest"]
    await sql_models.change_version(
        connection, row, state="REJECTED", delete_time=_now, manifest={}, envelope=None, adapter_digest="", size_bytes=0, failure=None
    )
    await _stop_evaluations(connection, row)
    body = {"project": f"projects/{model['project']}", "version": version, "base_model": model["base_model"], "adapter_digest": digest}
    await sql_models.emit(connection, row["project_uid"], "erased", body)
    await sql_models.emit(connection, row["project_uid"], "moved", {"model": name, "alias": ""})
    if not digest:
        return Erased(tuple(names))
    return Erased(tuple(names), (lineage.place(row["project_uid"], digest),), {version: digest})


async def _stop_evaluations(connection: AsyncConnection, row: Record) -> None:
    """What is measured cannot go on without its candidate or its opponent."""
    e = model_evaluations.c
    failure = {"reason": "RESOURCE_NOT_FOUND", "metadata": {"field": "candidate"}}
    await connection.execute(
        update(model_evaluations)
        .where(
            e.project_uid == row["project_uid"], e.model_uid == row["model_uid"], e.state.in_(("QUEUED", "RUNNING")),
            (e.candidate == row["number"]) | (e.current == row["number"]),
        )
        .values(state="FAILED", failure=failure, end_time=_now, update_time=_now, revision=e.revision + 1)
    )  # fmt: skip


async def erase_model(connection: AsyncConnection, model: Record, actor: str = "") -> Erased:
    """Empty a model with its versions, aliases and evaluations; its row is locked by the caller."""
    v = model_versions.c
    of = (v.project_uid == model["project_uid"], v.model_uid == model["uid"])
    rows = (await connection.execute(select(model_versions).where(*of, v.delete_time.is_(None)).order_by(v.number))).mappings()
    gone = [await erase_version(connection, model, row, actor) for row in list(rows)]
    e, a = model_evaluations.c, model_aliases.c
    name = f"projects/{model['project']}/models/{model['name']}"
    mine = (e.project_uid == model["project_uid"], e.model_uid == model["uid"])
    evaluations = [
        f"{name}/evaluations/{uid}" for uid in (await connection.execute(delete(model_evaluations).where(*mine).returning(e.uid))).scalars()
    ]
    await connection.execute(delete(model_aliases).where(a.project_uid == model["project_uid"], a.model_uid == model["uid"]))
    await sql_models.change_model(connection, model["project_uid"], model["uid"], delete_time=_now, display_name="", labels={})
    return together([Erased((name, *evaluations)), *gone])


def together(gone: Sequence[Erased]) -> Erased:
    """All of it."""
    digests = {name: digest for each in gone for name, digest in each.digests.items()}
    return Erased(tuple(name for each in gone for name in each.names), tuple(path for each in gone for path in each.prefixes), digests)


class ModelDependants:
    """Versions that were trained on, or measured with, rows of a dataset version."""

    async def of_versions(self, connection: AsyncConnection, project_uid: str, version_uids: Sequence[str]) -> bool:
        """Whether there are any."""
        return bool(await _trained_on(connection, project_uid, version_uids))

    async def erase(self, connection: AsyncConnection, project_uid: str, project: str, version_uids: Sequence[str]) -> Erased:
        """Erase them all."""
        gone = []
        for row in await _trained_on(connection, project_uid, version_uids):
            m = models.c
            statement = select(models).where(m.project_uid == project_uid, m.uid == row["model_uid"]).with_for_update()
            model = (await connection.execute(statement)).mappings().one()
            gone.append(await erase_version(connection, model, row))
        return together(gone)


async def _trained_on(connection: AsyncConnection, project_uid: str, version_uids: Sequence[str]) -> list[Record]:
    """By name, as manifests say it: the numbers of a dataset's name are never used again, so it cannot mean other rows."""
    d, v = datasets.c, dataset_versions.c
    statement = (
        select(d.name, v.number)
        .join(datasets, (d.project_uid == v.project_uid) & (d.uid == v.dataset_uid))
        .where(v.project_uid == project_uid, v.uid.in_(list(version_uids)))
    )
    ends = [f"/datasets/{name}/versions/{number}" for name, number in await connection.execute(statement)]
    if not ends:
        return []
    m = model_versions.c
    said = func.jsonb_array_elements(func.coalesce(m.manifest["datasets"], func.jsonb_build_array())).table_valued("value", name="said")
    named = (
        select(1).select_from(said).where(func.regexp_replace(said.c.value.op("->>")("dataset_version"), "^projects/[^/]*", "").in_(ends))
    )
    rows = select(model_versions).where(m.project_uid == project_uid, m.delete_time.is_(None), named.exists())
    return list((await connection.execute(rows.order_by(m.model_uid, m.number).with_for_update())).mappings())
