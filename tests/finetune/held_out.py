"""READY dataset versions as validation leaves them, without an upload."""

import hashlib
from uuid import uuid4

import msgspec
from sqlalchemy import text

from services.finetune.near_duplicates import minima
from services.finetune.rows import Layout, Row, read_rows
from tests.finetune.adapters import House


async def dataset_version(house: House, name: str, number: int, data: bytes, form: str = "classify") -> str:
    """Rows, their digests and minima; returns the version's resource name."""
    layout = Layout(form)  # type: ignore[arg-type]
    rows = [row for row in read_rows([data], layout) if isinstance(row, Row)]
    labels = {row.label: sum(other.label == row.label for other in rows) for row in rows if row.label}
    project, uid = house.caller.project_uid, str(uuid4())
    async with house.store.transaction() as connection:
        found = (
            await connection.execute(
                text(
                    "INSERT INTO datasets (project_uid, uid, project, name, layout) VALUES (:p, :u, :n, :d, :l)"
                    " ON CONFLICT (project_uid, name) WHERE state <> 'DELETED' DO UPDATE SET name = :d RETURNING uid"
                ),
                {"p": project, "u": str(uuid4()), "n": house.caller.project, "d": name, "l": msgspec.json.encode(layout).decode()},
            )
        ).scalar_one()
        await connection.execute(
            text(
                "INSERT INTO dataset_versions (project_uid, uid, dataset_uid, number, state, layout, sha256, total_bytes, rows, report)"
                " VALUES (:p, :u, :d, :n, 'READY', :l, :s, :b, :r, :report)"
            ),
            {
                "p": project, "u": uid, "d": found, "n": number, "l": msgspec.json.encode(layout).decode(),
                "s": hashlib.sha256(data).hexdigest(), "b": len(data), "r": len(rows),
                "report": msgspec.json.encode({"summary": {"labels": labels, "tokens": []}}).decode(),
            },
        )  # fmt: skip
    above = f"datasets/{project}/{found}/{uid}"
    await house.objects.put(f"{above}/data", data)
    await house.objects.put(f"{above}/digests", b"".join(row.digest[:8] for row in rows))
    await house.objects.put(f"{above}/digests-near", minima(["\n".join(row.said) for row in rows]).astype("<u2").tobytes())
    return f"projects/{house.caller.project}/datasets/{name}/versions/{number}"
