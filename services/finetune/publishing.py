"""From a run's parts to a version that replicas may load: verify, copy, sign, and only then say so in SQL.

The order makes a crash harmless: a number is reserved in CHECKING, weights are copied under the digest of the manifest that names them,
the signed manifest goes last, and the row is READY in the transaction that ends the job. What a crash leaves is found again by the job.
"""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import func
from sqlalchemy.ext.asyncio import AsyncConnection

from argosy.v1.finetune_pb2 import TuneMethod
from argosy_internal.training.v1.training_pb2 import AdapterManifest, Part
from services.chassis.errors import ArtifactRejected, ResourceNotFound, StoreUnavailable, WrongState
from services.chassis.objects import ObjectMissing, Objects
from services.finetune import fit, lineage, nearest, sql_models, tensors
from services.finetune.lineage import ADAPTER, HEAD, MANIFEST, Signer
from services.finetune.queries import Record
from services.finetune.store import FineTuneStore

log = logging.getLogger(__name__)

PART_BYTES = {ADAPTER: 2 << 30, HEAD: 64 << 20}  # at most
INDEX_BYTES = 1 << 30  # of the rows' vectors
PIECE_BYTES = 4 << 20  # of a tensor looked at once; a multiple of every number's size
FIRST = "CREATED"
ABANDONED = timedelta(hours=2)  # longer than a run's end takes, however often it is repeated
SWEEP_SECONDS = 300.0


@dataclass(frozen=True)
class Prepared:
    """A version in CHECKING whose files and signed manifest are in place."""

    project_uid: str
    model_uid: str
    number: int
    name: str  # resource name of the version
    manifest: AdapterManifest
    signed: lineage.Signed
    size_bytes: int


@dataclass(frozen=True)
class Origin:
    """Where a version comes from."""

    source: str  # JOB, CHECKPOINT or IMPORT
    job_uid: str | None = None
    step: int | None = None


# --- verify -----------------------------------------------------------------------------------------------------------------------------


async def verify(objects: Objects, manifest: AdapterManifest, prefix: str, modules: fit.Modules | None = None) -> None:
    """Return if the stored parts are what the manifest says: size, digest, names, shapes, and numbers that are finite.

    Args:
        objects: where the parts are.
        manifest: as the trainer sent it, or an import made it.
        prefix: of the parts, with or without a slash behind.
        modules: the base's linear layers, if they are known here.

    Raises:
        ArtifactRejected: they are not; says which rule.
        ObjectsUnavailable: the store cannot say.
    """
    parts = {part.name: part for part in manifest.parts}
    if ADAPTER not in parts or not parts.keys() <= PART_BYTES.keys() or len(parts) != len(manifest.parts):
        raise ArtifactRejected("part_name")
    if (HEAD in parts) != bool(manifest.labels) or (manifest.method == TuneMethod.TUNE_METHOD_CLASSIFY) != bool(manifest.labels):
        raise ArtifactRejected("head_labels")
    for part in parts.values():
        await _verify_part(objects, f"{prefix.rstrip('/')}/{part.name}", part, manifest, modules)
    await _verify_index(objects, f"{prefix.rstrip('/')}/{nearest.FILE}", manifest)


async def _verify_index(objects: Objects, path: str, manifest: AdapterManifest) -> None:
    said = manifest.hyperparameters.get(nearest.KEY, "")
    if not said:
        return
    if manifest.HasField("privacy"):
        raise ArtifactRejected("index_private")  # who is near a text tells who is among the rows
    try:
        size = await objects.size(path)
        if size is None or size > INDEX_BYTES:
            raise ArtifactRejected("index_size")
        await asyncio.to_thread(nearest.Index.read, await objects.get(path), said)
    except (ObjectMissing, nearest.Misshapen):
        raise ArtifactRejected("index") from None


def lora_of(manifest: AdapterManifest) -> fit.Lora:
    """What a manifest says of its adapter."""
    return fit.Lora(manifest.rank, manifest.alpha, manifest.rslora, manifest.dora, tuple(manifest.targets))


async def _verify_part(objects: Objects, path: str, part: Part, manifest: AdapterManifest, modules: fit.Modules | None) -> None:
    try:
        size = await objects.size(path)
        if size is None or size != part.total_bytes or size > PART_BYTES[part.name]:
            raise ArtifactRejected("part_size")
        length = int.from_bytes(await objects.get_range(path, 0, 8), "little")
        head = await objects.get_range(path, 0, min(size, 8 + min(length, tensors.HEADER_BYTES)))
        try:
            found = tensors.read_header(lambda start, count: head[start : start + count], size)
            if part.name == ADAPTER:
                fit.check_adapter(found, lora_of(manifest), modules)
            else:
                fit.check_head(found, manifest.labels)
        except tensors.Refused as error:
            raise ArtifactRejected(error.rule, byte_offset=error.at) from None
        await _verify_bytes(objects.stream(path), part, list(found.values()))
    except ObjectMissing:
        raise ArtifactRejected("part_missing") from None


async def _verify_bytes(pieces: AsyncIterator[bytes], part: Part, found: list[tensors.Tensor]) -> None:
    """One pass for the digest and for numbers that are none; tensors lie one behind the other."""
    digest = hashlib.sha256()
    at, waiting = found[0].begin, bytearray()
    skip = at  # bytes of the header still to pass over
    async for piece in pieces:
        await asyncio.to_thread(digest.update, piece)
        body = memoryview(piece)[min(skip, len(piece)) :]
        skip -= len(piece) - len(body)
        waiting += body
        while found and len(waiting) >= (take := min(found[0].end - at, PIECE_BYTES)):
            if not await asyncio.to_thread(tensors.finite, found[0].dtype, bytes(waiting[:take])):
                raise ArtifactRejected("not_finite", byte_offset=at)
            del waiting[:take]
            at += take
            if at == found[0].end:
                found.pop(0)
    if digest.hexdigest() != part.sha256 or found:
        raise ArtifactRejected("part_digest")


# --- prepare and publish ----------------------------------------------------------------------------------------------------------------


async def ensure_model(connection: AsyncConnection, project_uid: str, name: str, base_model: str) -> Record:
    """The model of this resource name, made if absent, its row locked.

    Raises:
        WrongState: it is one of another base.
    """
    _, project, _, segment = name.split("/")
    row = await sql_models.model(connection, project_uid, segment, lock=True)
    if row is None:
        await sql_models.add_model(connection, project_uid, project, segment, base_model)
        row = await sql_models.model(connection, project_uid, segment, lock=True)
        assert row is not None  # added here, or by whoever was faster
    if row["base_model"] != base_model:
        raise WrongState("model", "other_base")
    return row


async def prepare(
    store: FineTuneStore, objects: Objects, signer: Signer, manifest: AdapterManifest, prefix: str, origin: Origin
) -> Prepared:
    """Reserve a number, copy verified parts to their place, and put the signed manifest beside them.

    Repeating it for the same job goes on with the same number and gives the same digest. Nothing is served before `publish`.

    Args:
        store: of the reservation, in a transaction of its own.
        objects: where the parts are and go.
        signer: the control plane's key.
        manifest: verified; `version` is filled in here.
        prefix: of the parts.
        origin: job, checkpoint or import.

    Raises:
        WrongState: the model has another base.
    """
    async with store.transaction() as connection:
        model = await ensure_model(connection, manifest.project_uid, manifest.model, manifest.base_model)
        row = None
        if origin.source == "JOB" and origin.job_uid is not None:
            row = await sql_models.version_of_job(connection, manifest.project_uid, origin.job_uid)
        if row is None:
            row = await sql_models.add_version(
                connection, manifest.project_uid, model["uid"], origin.source, job_uid=origin.job_uid, step=origin.step
            )
        prepared = _signed(manifest, signer, row)
        if row["state"] == "CHECKING":  # before the bytes: what a crash leaves of them is found by it
            await sql_models.change_version(connection, row, adapter_digest=prepared.signed.digest)
    target = lineage.place(prepared.project_uid, prepared.signed.digest)
    for part in prepared.manifest.parts:
        await objects.copy(f"{prefix.rstrip('/')}/{part.name}", f"{target}/{part.name}")
    if nearest.KEY in manifest.hyperparameters:
        await objects.copy(f"{prefix.rstrip('/')}/{nearest.FILE}", f"{target}/{nearest.FILE}")
    await objects.put(f"{target}/{MANIFEST}", prepared.signed.envelope)
    return prepared


def _signed(manifest: AdapterManifest, signer: Signer, row: Record) -> Prepared:
    whole = AdapterManifest()
    whole.CopyFrom(manifest)
    whole.version = f"{manifest.model}/versions/{row['number']}"
    whole.create_time.FromDatetime(row["create_time"])  # of the reservation, so that a repetition signs the same bytes
    size = sum(part.total_bytes for part in whole.parts)
    return Prepared(row["project_uid"], row["model_uid"], row["number"], whole.version, whole, lineage.sign(whole, signer), size)


async def publish(connection: AsyncConnection, prepared: Prepared, actor: str = "") -> str:
    """Make a prepared version READY, point a first `prod` to it, and tell the gateways, all at commit. Returns its resource name.

    Repeating it changes nothing. `actor`: uid of the API key that asked, if one did.

    Raises:
        ResourceNotFound: the version or its model was erased meanwhile.
    """
    row = await sql_models.version(connection, prepared.project_uid, prepared.model_uid, prepared.number, lock=True)
    if row is None or row["state"] == "REJECTED":
        raise ResourceNotFound("model")
    if row["state"] == "READY":
        return prepared.name
    said = prepared.manifest
    row = await sql_models.change_version(
        connection, row, state="READY", method=TuneMethod.Name(said.method).removeprefix("TUNE_METHOD_"), base_digest=said.base_digest,
        adapter_digest=prepared.signed.digest, manifest=lineage.as_json(said), envelope=prepared.signed.envelope,
        size_bytes=prepared.size_bytes, ready_time=func.clock_timestamp(),
    )  # fmt: skip
    key = (prepared.project_uid, prepared.model_uid)
    if await sql_models.alias(connection, *key, sql_models.PROD) is None and not await sql_models.moves(connection, *key, sql_models.PROD):
        await sql_models.point(connection, *key, sql_models.PROD, FIRST, prepared.number, actor=actor)
    await sql_models.emit(connection, prepared.project_uid, "ready", ready_body(row, said))
    await sql_models.emit(connection, prepared.project_uid, "moved", {"model": said.model, "alias": ""})
    return prepared.name


async def discard(store: FineTuneStore, objects: Objects, prepared: Prepared) -> None:
    """Take back what was prepared and never published: the job was cancelled meanwhile, or the version erased."""
    async with store.transaction() as connection:
        row = await sql_models.version(connection, prepared.project_uid, prepared.model_uid, prepared.number, lock=True)
        if row is not None and row["state"] != "CHECKING":
            return
        if row is not None:  # an erased one's bytes may have been copied behind the eraser's back; no other version has its digest
            await sql_models.change_version(connection, row, state="REJECTED", delete_time=func.clock_timestamp())
    await objects.delete_prefix(lineage.place(prepared.project_uid, prepared.signed.digest))


async def sweep(store: FineTuneStore, objects: Objects, older: timedelta = ABANDONED) -> int:
    """Take back reservations that nobody finished: a process died between `prepare` and `publish`. Returns how many."""
    async with store.transaction() as connection:
        rows = await sql_models.abandoned(connection, older)
        for row in rows:
            await sql_models.change_version(connection, row, state="REJECTED", delete_time=func.clock_timestamp())
    for row in rows:
        if row["adapter_digest"]:
            await objects.delete_prefix(lineage.place(row["project_uid"], row["adapter_digest"]))
    return len(rows)


async def sweeping(store: FineTuneStore, objects: Objects, pause_s: float = SWEEP_SECONDS) -> None:
    """Sweep until cancelled."""
    await store.ready.wait()
    while True:
        try:
            await sweep(store, objects)
        except StoreUnavailable:
            log.warning("the sweep of unfinished versions waits for the database or the object store")
        except Exception:  # one row's fault must not end the sweep of all
            log.exception("the sweep of unfinished versions failed on our side")
        await asyncio.sleep(pause_s)


def ready_body(row: Record, manifest: AdapterManifest) -> dict[str, Any]:
    """What gateways are told of a READY version."""
    return {
        "project": "/".join(manifest.model.split("/")[:2]),
        "version": manifest.version,
        "base_model": manifest.base_model,
        "base_digest": row["base_digest"],
        "adapter_digest": row["adapter_digest"],
        "ready_time": row["ready_time"].isoformat(),
    }
