"""Tuned models: versions, evidence, aliases, files. `registry.py` is made from this file by tools/gen_sync_client.py.

A version is promoted by what it does on rows that no training has seen, or not at all.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from argosy import errors, names, requests
from argosy.chunks import HashedFile, crc32c
from argosy.layouts import METHODS
from argosy.v1 import deletion_pb2, model_pb2

if TYPE_CHECKING:
    from argosy.aio import AsyncClient

STREAM_TIMEOUT_S = 300.0  # the fleet's cap
BREAKS = (errors.Unavailable, errors.DeadlineExceeded, errors.Cancelled, errors.ChecksumMismatch)
FRUITLESS = 6  # tries in a row that brought nothing: then the trouble is raised
UNDECIDED = (model_pb2.Evaluation.STATE_QUEUED, model_pb2.Evaluation.STATE_RUNNING)
_PARTS = (
    ("adapter_config.json", model_pb2.IMPORT_PART_CONFIG),
    ("adapter_model.safetensors", model_pb2.IMPORT_PART_WEIGHTS),
    ("head.safetensors", model_pb2.IMPORT_PART_HEAD),
)


@dataclass(frozen=True)
class Promotion:
    """An alias that moved, and the evidence; no evidence where the move was forced."""

    alias: model_pb2.ModelAlias
    evaluation: model_pb2.Evaluation | None


class AsyncRegistry:
    """The project's own models: `client.registry`. A model may be called by its bare name, a version as `name/1`."""

    def __init__(self, client: "AsyncClient") -> None:
        self._client = client
        self._stub = client.model_service

    async def _own(self, name: str) -> str:
        return names.own(await self._client.project(), "models", name)

    async def _version(self, name: str) -> str:
        return names.version(await self._client.project(), "models", name)

    async def get(self, name: str) -> model_pb2.Model:
        """One own model; `models/{base}` for a shared one."""
        whole = name if name.startswith("models/") else await self._own(name)
        return await self._client.call(self._stub.GetModel, model_pb2.GetModelRequest(name=whole))

    async def list(self) -> AsyncIterator[model_pb2.Model]:
        """The project's own models."""
        request = model_pb2.ListModelsRequest(parent=await self._client.project())
        async for found in self._client.pages(self._stub.ListModels, request, "models"):
            yield found

    async def versions(self, name: str) -> AsyncIterator[model_pb2.ModelVersion]:
        """A model's versions."""
        request = model_pb2.ListModelVersionsRequest(parent=await self._own(name))
        async for found in self._client.pages(self._stub.ListModelVersions, request, "model_versions"):
            yield found

    async def version(self, name: str) -> model_pb2.ModelVersion:
        """One version: metrics, calibration, lineage, signed manifest."""
        return await self._client.call(self._stub.GetModelVersion, model_pb2.GetModelVersionRequest(name=await self._version(name)))

    async def aliases(self, name: str) -> AsyncIterator[model_pb2.ModelAlias]:
        """A model's aliases."""
        request = model_pb2.ListModelAliasesRequest(parent=await self._own(name))
        async for found in self._client.pages(self._stub.ListModelAliases, request, "model_aliases"):
            yield found

    async def publish(self, model: str, checkpoint: str) -> model_pb2.ModelVersion:
        """A version from a job's checkpoint, `projects/p/fineTuneJobs/j/checkpoints/{step}`."""
        request = model_pb2.CreateModelVersionRequest(
            parent=await self._own(model), checkpoint=checkpoint, request_id=requests.request_id()
        )
        return await self._client.call(self._stub.CreateModelVersion, request)

    async def evaluate(
        self, version: str, held_out: str, *, alias: str = "prod", margin: float | None = None, max_rows: int | None = None
    ) -> model_pb2.Evaluation:
        """Measure a version against the alias's target and the base on rows that no training has seen; answers once it is decided."""
        candidate, project = await self._version(version), await self._client.project()
        evaluation = model_pb2.Evaluation(
            candidate=candidate,
            dataset_version=names.version(project, "datasets", held_out),
            alias=alias,
            margin=margin,
            max_rows=max_rows,
        )
        request = model_pb2.CreateEvaluationRequest(parent=names.parent(candidate), evaluation=evaluation, request_id=requests.request_id())
        decided = await self._client.call(self._stub.CreateEvaluation, request)
        pause_s = 0.1
        while decided.state in UNDECIDED:
            await asyncio.sleep(pause_s)
            pause_s = min(2.0, pause_s * 1.5)
            decided = await self.evaluation(decided.name)
        return decided

    async def evaluation(self, name: str) -> model_pb2.Evaluation:
        """One evaluation as it stands."""
        return await self._client.call(self._stub.GetEvaluation, model_pb2.GetEvaluationRequest(name=name))

    async def promote(
        self,
        version: str,
        held_out: str = "",
        *,
        alias: str = "prod",
        percent: int | None = None,
        margin: float | None = None,
        max_rows: int | None = None,
        force: bool = False,
    ) -> Promotion:
        """Move an alias to a version that is better on the held-out rows. Raises EvaluationNotPassed, with the evidence, where it is not.

        `percent` sends only that share of callers there. `force` moves without evidence: scope `models.force`, and audited.
        """
        whole = await self._version(version)
        if not force and not held_out:
            raise ValueError("a version is promoted on evidence: name a dataset version of held-out rows, or force it")
        evaluation = None
        if held_out:
            evaluation = await self.evaluate(whole, held_out, alias=alias, margin=margin, max_rows=max_rows)
            if evaluation.state != model_pb2.Evaluation.STATE_PASSED and not force:
                raise errors.EvaluationNotPassed.of(evaluation)
        passed = evaluation is not None and evaluation.state == model_pb2.Evaluation.STATE_PASSED
        request = model_pb2.MoveModelAliasRequest(
            name=f"{names.parent(whole)}/aliases/{alias}",
            version=whole,
            percent=percent,
            evaluation=evaluation.name if evaluation is not None and passed else "",
            force=force and not passed,
            request_id=requests.request_id(),
        )
        return Promotion(await self._client.call(self._stub.MoveModelAlias, request), evaluation)

    async def rollback(self, model: str, *, alias: str = "prod") -> model_pb2.ModelAlias:
        """Point an alias back to what it pointed to before."""
        request = model_pb2.RollbackModelAliasRequest(name=f"{await self._own(model)}/aliases/{alias}", request_id=requests.request_id())
        return await self._client.call(self._stub.RollbackModelAlias, request)

    async def import_adapter(self, model: str, folder: str | Path, *, method: str, labels: Sequence[str] = ()) -> model_pb2.ModelVersion:
        """A version from an adapter as PEFT saves it: `adapter_config.json`, `adapter_model.safetensors`, perhaps our `head.safetensors`.

        The model must exist: see `create`. Raises ArtifactRejected with rule where a file is not safe or does not fit.
        """
        header = model_pb2.ImportHeader(
            parent=await self._own(model), tuned_labels=labels, method=METHODS[method], request_id=requests.request_id()
        )
        missing = [name for name, _ in _PARTS[:2] if not (Path(folder) / name).is_file()]
        if missing:
            raise ValueError(f"{folder} has no {missing[0]}")
        return await self._client.call(self._stub.ImportModelVersion, self._files(header, Path(folder)), timeout_s=STREAM_TIMEOUT_S)

    async def _files(self, header: model_pb2.ImportHeader, folder: Path) -> AsyncIterator[model_pb2.ImportModelVersionRequest]:
        yield model_pb2.ImportModelVersionRequest(header=header)
        for name, part in _PARTS:
            if not (folder / name).is_file():
                continue
            file = await asyncio.to_thread(HashedFile, folder / name)
            try:
                offset = 0
                while offset < file.total_bytes:
                    data = await asyncio.to_thread(file.read, offset)
                    chunk = model_pb2.ImportChunk(part=part, offset=offset, data=data, crc32c=crc32c(data))
                    yield model_pb2.ImportModelVersionRequest(chunk=chunk)
                    offset += len(data)
            finally:
                file.close()

    async def create(self, name: str, base: str, *, display_name: str = "") -> model_pb2.Model:
        """An empty model on a base, for imports; tuning makes its own."""
        whole = await self._own(name)
        request = model_pb2.CreateModelRequest(
            parent=names.parent(whole),
            model_id=names.last(whole),
            model=model_pb2.Model(base_model=names.base(base), display_name=display_name),
            request_id=requests.request_id(),
        )
        return await self._client.call(self._stub.CreateModel, request)

    async def export(self, version: str, path: str | Path, *, merged: bool = False) -> int:
        """Write a version's tar archive to a file and return its bytes: the adapter in PEFT's form, or `merged` into the base's weights.

        A download that breaks goes on where it stood; the file has its name only once it is whole.
        """
        name, target = await self._version(version), Path(path)
        partial = target.with_name(f"{target.name}.part")
        content = model_pb2.EXPORT_CONTENT_MERGED if merged else model_pb2.EXPORT_CONTENT_ADAPTER
        written, total, fruitless = 0, -1, 0
        with partial.open("wb") as file:
            while written != total:
                stood = written
                trouble: errors.ArgosyError | None = None
                request = model_pb2.ExportModelVersionRequest(name=name, content=content, offset=written)
                try:
                    async for part in self._client.stream(self._stub.ExportModelVersion, request, timeout_s=STREAM_TIMEOUT_S):
                        if part.offset != written or crc32c(part.data) != part.crc32c:
                            raise errors.ChecksumMismatch("A part of the archive arrived altered", reason="CHECKSUM_MISMATCH")
                        await asyncio.to_thread(file.write, part.data)
                        written, total = written + len(part.data), part.total_bytes
                except BREAKS as error:
                    trouble = error
                fruitless = 0 if written > stood else fruitless + 1
                if fruitless > FRUITLESS:
                    raise trouble or errors.StreamLost("The archive came without its end", reason="STREAM_LOST")
                if written != total:
                    await asyncio.sleep((trouble and trouble.retry_after_s) or min(5.0, 0.1 * 2**fruitless))
        partial.replace(target)
        return written

    async def delete(self, name: str, *, cascade: bool = False) -> deletion_pb2.Deletion:
        """Erase a model, or `name/1` one version. With `cascade` also what hangs on it; without, that refuses (HasDependants)."""
        request_id = requests.request_id()
        try:
            version = await self._version(name)
        except ValueError:
            whole = model_pb2.DeleteModelRequest(name=await self._own(name), cascade=cascade, request_id=request_id)
            return await self._client.call(self._stub.DeleteModel, whole)
        request = model_pb2.DeleteModelVersionRequest(name=version, cascade=cascade, request_id=request_id)
        return await self._client.call(self._stub.DeleteModelVersion, request)
