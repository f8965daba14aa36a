"""From a file to a served model in one call. `tuning.py` is made from this file by tools/gen_sync_client.py.

Upload, validation and queueing are the steps of `datasets` and `jobs`, in that order.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from argosy import errors, names, specs
from argosy.layouts import layout_of
from argosy.specs import Money
from argosy.v1 import dataset_pb2, finetune_pb2, model_pb2

if TYPE_CHECKING:
    from argosy.aio import AsyncClient

Sent = Callable[[str, int, int], None]  # "upload" or "check", bytes so far, bytes in all


class AsyncTuning:
    """A job under way, as `client.tune` gives it. `job` is what was last heard of it; with `quote_only` it was never written."""

    def __init__(self, client: "AsyncClient", job: finetune_pb2.FineTuneJob, data: dataset_pb2.DatasetVersion) -> None:
        self._client = client
        self.job = job
        self.data = data

    @property
    def name(self) -> str:
        """The job's resource name."""
        return self.job.name

    @property
    def quote(self) -> finetune_pb2.Quote:
        """What it will use, each number with an interval."""
        return self.job.quote

    def events(self, *, after: int = 0) -> AsyncIterator[finetune_pb2.JobEvent]:
        """Its log, stored and live, until it is complete."""
        return self._client.jobs.watch(self.name, after=after)

    async def wait(self, *, seen: Callable[[finetune_pb2.JobEvent], None] | None = None) -> model_pb2.ModelVersion:
        """The version it made, once a replica can answer with it. Raises JobFailed unless it SUCCEEDED."""
        self.job = await self._client.jobs.wait(self.name, seen=seen)
        return await self._client.registry.version(self.job.model_version)

    async def cancel(self) -> None:
        """End it for good."""
        self.job = await self._client.jobs.cancel(self.name)

    async def pause(self) -> None:
        """Commit a checkpoint and free the device."""
        self.job = await self._client.jobs.pause(self.name)

    async def resume(self, *, max_cost: Money | None = None) -> None:
        """Go on from the last checkpoint."""
        self.job = await self._client.jobs.resume(self.name, max_cost=max_cost)


async def prepared(
    client: "AsyncClient",
    path: str | Path,
    method: str,
    *,
    dataset: str = "",
    text_columns: Sequence[str] = (),
    label_column: str = "",
    delimiter: str = "",
    header: bool | None = None,
    skip_bad_rows: bool = False,
    sent: Sent | None = None,
    resume: str = "",
    opened: Callable[[str], None] | None = None,
) -> dataset_pb2.DatasetVersion:
    """A file as a READY dataset version; the dataset is called like the file unless `dataset` says otherwise.

    Raises DatasetRejected, which has the report and the first findings, where rows are bad; with `skip_bad_rows` they are left out instead.
    """
    file = Path(path)
    layout = layout_of(file, text_columns=text_columns, label_column=label_column, delimiter=delimiter, header=header)
    made = await client.datasets.ensure(dataset or names.segment(file), method, layout=layout)

    def told(what: str) -> Callable[[int, int], None] | None:
        return None if sent is None else lambda done, total: sent(what, done, total)

    version = await client.datasets.upload(
        made.name, file, skip_bad_rows=skip_bad_rows, progress=told("upload"), resume=resume, opened=opened
    )
    version = await client.datasets.wait(version.name, progress=told("check"))
    if version.derived_version:
        version = await client.datasets.wait(version.derived_version)
    if version.state != dataset_pb2.DatasetVersion.STATE_READY:
        findings = [found async for found in client.datasets.row_errors(version.name, errors_only=True)]
        raise errors.DatasetRejected.of(version, findings)
    return version


async def tune(
    client: "AsyncClient",
    path: str | Path,
    *,
    base: str,
    method: str,
    model: str = "",
    held_out: str | Path = "",
    text_columns: Sequence[str] = (),
    label_column: str = "",
    delimiter: str = "",
    header: bool | None = None,
    skip_bad_rows: bool = False,
    max_cost: Money | None = None,
    deadline_s: float | None = None,
    quote_only: bool = False,
    sent: Sent | None = None,
    **choices: Any,
) -> AsyncTuning:
    """What `client.tune` does: upload, check, queue."""
    rows: dict[str, Any] = {
        "text_columns": text_columns,
        "label_column": label_column,
        "delimiter": delimiter,
        "header": header,
        "skip_bad_rows": skip_bad_rows,
        "sent": sent,
    }
    specs.spec(base, "", method, **choices)  # a wrong keyword shows before a byte is sent
    data = await prepared(client, path, method, **rows)
    measured = (await prepared(client, held_out, method, **rows)).name if held_out else ""
    job = await client.jobs.create(
        specs.spec(base, data.name, method, validation_version=measured, **choices),
        model or names.segment(Path(path)),
        max_cost=max_cost,
        deadline_s=deadline_s,
        quote_only=quote_only,
    )
    return AsyncTuning(client, job, data)
