import hashlib
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from google.protobuf import json_format

from argosy.v1 import finetune_pb2
from argosy.v1 import model_pb2 as pb
from argosy_internal.training.v1.training_pb2 import CheckpointManifest, Part
from services.chassis.errors import ArtifactRejected, ResourceNotFound, WrongState
from services.chassis.lists import PageTokens
from services.finetune import lineage, sql_jobs, sql_models
from services.finetune.bases import Bases, linear_layers
from services.finetune.lineage import ADAPTER, HEAD
from services.finetune.servicers.model import ModelServicer
from services.finetune.servicers.model_checkpoints import rendering_digest
from services.finetune.servicers.resources import Desk
from tests.finetune.adapters import BASE, SIGNER, House, called, file, head, lora, registry
from tests.finetune.held_out import dataset_version
from tests.finetune.trainer import world

NAME = "projects/news/models/titles"


async def checkpoint(house: House, base: Path, method: str = "CHAT", step: int = 40, spoil: bool = False, **spec: Any) -> str:
    """A committed checkpoint of a job; returns its resource name."""
    classify = method == "CLASSIFY"
    rows = world.classify_rows(8) if classify else world.chat_rows(8)
    train = await dataset_version(house, method.lower(), 1, rows, method.lower())
    resolved = finetune_pb2.FineTuneSpec(
        base_model=BASE, train_version=train, method=finetune_pb2.TuneMethod.Value(f"TUNE_METHOD_{method}"), seed=5, seq_len=96,
        lora=finetune_pb2.Lora(rank=2, alpha=4.0), hyperparameters=finetune_pb2.Hyperparameters(learning_rate=0.001, batch_size=8), **spec,
    )  # fmt: skip
    layers = {path: shape for path, shape in linear_layers(base).items() if path.endswith(("q_proj", "up_proj"))}
    files = {ADAPTER: file(lora(1, 2, layers)), "random.bin": b"r", "state.json": b"{}"}
    if classify:
        width = next(shape[1] for path, shape in layers.items() if path.endswith("q_proj"))
        values = head(["sport", "tech"])
        files[HEAD] = file({"weight": values["weight"].repeat(width // values["weight"].shape[1], axis=1), "bias": values["bias"]})
    async with house.store.transaction() as connection:
        job = await sql_jobs.add(
            connection,
            {"project_uid": house.caller.project_uid, "project": "news", "key_id": "k", "spec": b"", "quote": b"", "spec_digest": "s" * 64,
             "resolved_spec": resolved.SerializeToString(), "model": NAME, "base_model": BASE, "train_uid": str(uuid4()), "currency": "USD",
             "nanos_per_second": 1},
        )  # fmt: skip
        prefix = f"jobs/{house.caller.project_uid}/{job['uid']}/f1/step-{step}/"
        written = CheckpointManifest(
            job=job["uid"], attempt=1, fence=1, step=step, spec_digest="s" * 64, metrics={"validation_loss": 0.25},
            parts=[Part(name=name, sha256=hashlib.sha256(data).hexdigest(), total_bytes=len(data)) for name, data in files.items()],
        )  # fmt: skip
        stored = json.dumps(json_format.MessageToDict(written, preserving_proto_field_name=True)).encode()
        await sql_jobs.add_checkpoint(
            connection, job,
            {"step": step, "fence": 1, "prefix": prefix, "manifest_digest": hashlib.sha256(stored).hexdigest(), "total_bytes": 1,
             "metrics": {}},
        )  # fmt: skip
    if spoil:
        files[ADAPTER] = files[ADAPTER][:-1] + b"\x7f"
    for name, data in (files | {"manifest.json": stored}).items():
        await house.objects.put(f"{prefix}{name}", data)
    return f"projects/news/fineTuneJobs/{job['uid']}/checkpoints/{step}"


async def create(house: House, base: Path, tmp_path: Path, name: str, parent: str = NAME) -> pb.ModelVersion:
    bases = Bases([f"tiny={base}"], str(tmp_path / "cache"))
    servicer = ModelServicer(Desk(house.store, PageTokens(b"t" * 32)), house.objects, bases, SIGNER)
    with called(house.caller):
        made = await servicer.CreateModelVersion(pb.CreateModelVersionRequest(parent=parent, checkpoint=name), None)
        return await servicer.GetModelVersion(pb.GetModelVersionRequest(name=made.name), None)


async def model(house: House, name: str = "titles", base_model: str = BASE) -> None:
    async with house.store.transaction() as connection:
        await sql_models.add_model(connection, house.caller.project_uid, "news", name, base_model)


@pytest.mark.parametrize("method", ["CHAT", "CLASSIFY"])
async def test_any_checkpoint_becomes_a_version(finetune_url: str, base: Path, tmp_path: Path, method: str) -> None:
    async with registry(finetune_url) as house:
        await model(house)
        name = await checkpoint(house, base, method)
        version = await create(house, base, tmp_path, name)
        assert (version.name, version.lineage.checkpoint, version.lineage.step) == (f"{NAME}/versions/1", name, 40)
        assert list(version.tuned_labels) == (["sport", "tech"] if method == "CLASSIFY" else [])
        assert version.rendering_digest == ("" if method == "CLASSIFY" else rendering_digest(base))
        assert version.metrics["validation_loss"] == 0.25
        said, _ = lineage.unsign(version.signed_manifest.encode(), SIGNER.keys())
        assert list(said.targets) == ["q_proj", "up_proj"]
        assert {part.name for part in said.parts} == ({ADAPTER, HEAD} if method == "CLASSIFY" else {ADAPTER})
        assert said.hyperparameters["learning_rate"] == "0.001"
        assert (said.max_tokens, said.seed) == (96 if method == "CLASSIFY" else 0, 5)
        assert [each.dataset_version for each in said.datasets] == [f"projects/news/datasets/{method.lower()}/versions/1"]


async def test_T6_a_checkpoint_whose_bytes_changed_is_refused(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with registry(finetune_url) as house:
        await model(house)
        with pytest.raises(ArtifactRejected) as caught:
            await create(house, base, tmp_path, await checkpoint(house, base, spoil=True))
        assert caught.value.metadata["rule"] in ("part_digest", "not_finite")
        async with house.store.transaction() as connection:
            row = await sql_models.model(connection, house.caller.project_uid, "titles")
        assert row is not None
        assert row["next_version"] == 1


async def test_a_checkpoint_that_is_not_there_or_of_another_base_is_refused(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with registry(finetune_url) as house:
        await model(house)
        await model(house, "other", "models/other")
        name = await checkpoint(house, base)
        with pytest.raises(ResourceNotFound) as caught:
            await create(house, base, tmp_path, name.replace("/40", "/41"))
        assert caught.value.metadata == {"field": "checkpoint"}
        with pytest.raises(ResourceNotFound):
            await create(house, base, tmp_path, name, "projects/news/models/none")
        with pytest.raises(WrongState):
            await create(house, base, tmp_path, name, "projects/news/models/other")


async def test_a_private_checkpoint_says_what_was_spent(finetune_url: str, base: Path, tmp_path: Path) -> None:
    async with registry(finetune_url) as house:
        await model(house)
        private = finetune_pb2.Privacy(epsilon=8.0, delta=1e-5, unit=finetune_pb2.PRIVACY_UNIT_EXAMPLE)
        version = await create(house, base, tmp_path, await checkpoint(house, base, privacy=private))
        assert version.HasField("privacy")
        assert (version.privacy.delta, version.privacy.accountant) == (1e-5, "prv")
