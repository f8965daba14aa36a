"""A version of any committed checkpoint: what a run had learnt by then."""

import asyncio
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from google.protobuf import json_format

from argosy.v1 import finetune_pb2
from argosy.v1 import model_pb2 as pb
from argosy_internal.training.v1.training_pb2 import POOLING_LAST, AdapterManifest, CheckpointManifest, ManifestDataset
from services.chassis import bounds
from services.chassis.errors import ArtifactRejected, FieldInvalid, ResourceNotFound, WrongState
from services.chassis.objects import ObjectMissing
from services.finetune import dataset_store, lineage, publishing, sql_jobs, tensors
from services.finetune.bases import Base
from services.finetune.datasets import TrainingVersion
from services.finetune.publishing import Origin
from services.finetune.queries import Record
from services.finetune.servicers.model_aliases import MODEL_NAME, found_model
from services.finetune.servicers.model_transfers import TransferMethods
from services.finetune.servicers.resources import NUMBER, SEGMENT, UUID_SEGMENT, caller, own
from services.pretrained.fingerprint import fingerprint
from services.pretrained.templates import load_template
from services.pretrained.tokenizer import Tokenizer

CHECKPOINT_NAME = re.compile(rf"projects/({SEGMENT})/fineTuneJobs/({UUID_SEGMENT})/checkpoints/({NUMBER})")
FILES = (lineage.ADAPTER, lineage.HEAD)


class CheckpointMethods(TransferMethods):
    """The part of ModelService that makes versions of checkpoints."""

    async def CreateModelVersion(self, request: pb.CreateModelVersionRequest, context: Any) -> pb.ModelVersion:
        """Verify a checkpoint's adapter, sign it and publish it; the job goes on as it was."""
        bounds.check(request)
        (segment,) = own(request.parent, MODEL_NAME, "parent")
        job_uid, step = own(request.checkpoint, CHECKPOINT_NAME, "checkpoint")
        project_uid = caller().project_uid
        async with self.desk.store.transaction() as connection:
            model = await found_model(connection, segment, "parent")
            job = await sql_jobs.job(connection, project_uid, job_uid)
            found = await sql_jobs.checkpoint(connection, project_uid, job_uid, int(step))
            if job is None or found is None:
                raise ResourceNotFound("checkpoint")
            if job["base_model"] != model["base_model"]:
                raise WrongState("checkpoint", "other_base")
            spec = finetune_pb2.FineTuneSpec.FromString(job["resolved_spec"])
            if not spec.HasField("lora"):
                raise FieldInvalid("checkpoint", "full_tune")
            data = {
                use: await dataset_store.version_for_training(connection, project_uid, name, "checkpoint")
                for use, name in (("train", spec.train_version), ("validation", spec.validation_version))
                if name
            }
        base = await self.bases.get(model["base_model"], "parent")
        manifest = await self._manifest(request.parent, job, found, spec, data, base)
        await publishing.verify(self.objects, manifest, found["prefix"], base.modules)
        origin = Origin("CHECKPOINT", job_uid, int(step))
        prepared = await publishing.prepare(self.desk.store, self.objects, self.signer, manifest, found["prefix"], origin)
        return await self._published("CreateModelVersion", request, prepared)

    async def _manifest(
        self, model: str, job: Record, found: Record, spec: finetune_pb2.FineTuneSpec, data: Mapping[str, TrainingVersion], base: Base
    ) -> AdapterManifest:
        written = await self._committed(found)
        labels = sorted(data["train"].labels) if spec.method == finetune_pb2.TUNE_METHOD_CLASSIFY else []
        parts = [part for part in written.parts if part.name in FILES]
        manifest = AdapterManifest(
            project_uid=job["project_uid"], model=model, base_model=job["base_model"], base_digest=base.digest, method=spec.method,
            rank=spec.lora.rank, alpha=spec.lora.alpha, dropout=spec.lora.dropout, rslora=spec.lora.rslora, dora=spec.lora.dora,
            targets=await self._targets(found["prefix"]), parts=parts, labels=labels, temperature=1.0 if labels else 0.0,
            pooling=POOLING_LAST, max_tokens=spec.seq_len if labels else 0,
            template_hash="" if labels else await asyncio.to_thread(rendering_digest, base.directory), seed=spec.seed,
            datasets=[ManifestDataset(dataset_version=of.name, sha256=of.sha256, use=use, rows=of.rows) for use, of in data.items()],
            hyperparameters=chosen(spec), metrics=dict(written.metrics), job=job["uid"], attempt=written.attempt, step=written.step,
            train_seconds=job["device_seconds"], checkpoint_digest=found["manifest_digest"],
        )  # fmt: skip
        if spec.HasField("privacy"):
            said = manifest.privacy
            said.epsilon, said.delta, said.unit, said.accountant = job["epsilon"], spec.privacy.delta, spec.privacy.unit, "prv"
        return manifest

    async def _committed(self, found: Record) -> CheckpointManifest:
        try:
            stored = await self.objects.get(f"{found['prefix'].rstrip('/')}/manifest.json")
        except ObjectMissing:
            raise ArtifactRejected("manifest_missing") from None
        if hashlib.sha256(stored).hexdigest() != found["manifest_digest"]:
            raise ArtifactRejected("manifest_digest")
        return json_format.ParseDict(json.loads(stored), CheckpointManifest(), ignore_unknown_fields=True)

    async def _targets(self, prefix: str) -> list[str]:
        """The last names of the layers that the adapter has: a spec without targets means all."""
        path = f"{prefix.rstrip('/')}/{lineage.ADAPTER}"
        try:
            size = await self.objects.size(path) or 0
            length = int.from_bytes(await self.objects.get_range(path, 0, 8), "little")
            head = await self.objects.get_range(path, 0, 8 + min(length, tensors.HEADER_BYTES))
            found = tensors.read_header(lambda start, count: head[start : start + count], size)
        except ObjectMissing:
            raise ArtifactRejected("part_missing") from None
        except tensors.Refused as error:
            raise ArtifactRejected(error.rule, byte_offset=error.at) from None
        return sorted({name.rpartition(".lora_")[0].rpartition(".")[2] for name in found})


def chosen(spec: finetune_pb2.FineTuneSpec) -> dict[str, str]:
    """A resolved spec's numbers, as text by name."""
    found = {field.name: f"{value:.9g}" for field, value in spec.hyperparameters.ListFields()}
    return found | {"seq_len": str(spec.seq_len), "packing": str(spec.packing).lower()}


def rendering_digest(directory: Path) -> str:
    """What must be the same where the version is served. Blocking."""
    tokenizer = Tokenizer.from_directory(directory)
    return fingerprint(directory, tokenizer, load_template(directory, tokenizer, tokenizer.prefix))
