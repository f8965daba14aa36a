"""Small adapters as a trainer stores them, and versions published from them."""

import hashlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from argosy.v1 import finetune_pb2
from argosy_internal.training.v1.training_pb2 import AdapterManifest, Part
from services.chassis.identity import CALLER, Caller
from services.chassis.objects import Objects, open_objects
from services.finetune import publishing
from services.finetune.lineage import ADAPTER, HEAD, Signer
from services.finetune.publishing import Origin, Prepared
from services.finetune.store import FineTuneStore, open_store
from services.finetune.tensors import header, packed

SIGNER = Signer(Ed25519PrivateKey.from_private_bytes(bytes(range(32))), "test")
BASE = "models/tiny"
WIDTH, RANK = 8, 2
MODULES = {f"model.layers.{layer}.self_attn.{name}": (WIDTH, WIDTH) for layer in (0, 1) for name in ("q_proj", "v_proj")}


def file(values: Mapping[str, np.ndarray[Any, Any]], dtype: str = "F32") -> bytes:
    """A safetensors file."""
    head = header([(name, dtype, value.shape) for name, value in values.items()], {"format": "pt"})
    return head + b"".join(packed(value.astype(np.float32), dtype) for value in values.values())


def lora(seed: int = 0, rank: int = RANK, modules: Mapping[str, tuple[int, int]] = MODULES) -> dict[str, np.ndarray[Any, Any]]:
    """Tensors of an adapter over all `modules`."""
    draw = np.random.default_rng(seed)
    found: dict[str, np.ndarray[Any, Any]] = {}
    for module, (out, width) in modules.items():
        found[f"base_model.model.{module}.lora_A.weight"] = draw.normal(size=(rank, width)).astype(np.float32)
        found[f"base_model.model.{module}.lora_B.weight"] = draw.normal(size=(out, rank)).astype(np.float32)
    return found


def head(labels: Sequence[str], seed: int = 0) -> dict[str, np.ndarray[Any, Any]]:
    draw = np.random.default_rng(seed)
    weight, bias = draw.normal(size=(len(labels), WIDTH)), draw.normal(size=len(labels))
    return {"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)}


def manifest(project_uid: str, model: str, parts: Mapping[str, bytes], **changed: Any) -> AdapterManifest:
    """As the trainer fills it in; `version` is empty."""
    labels = changed.get("labels", ())
    said: dict[str, Any] = {
        "project_uid": project_uid, "model": model, "base_model": BASE, "base_digest": "b" * 64, "rank": RANK, "alpha": 4.0,
        "method": finetune_pb2.TUNE_METHOD_CLASSIFY if labels else finetune_pb2.TUNE_METHOD_CHAT,
        "targets": ["q_proj", "v_proj"], "seed": 3, "metrics": {"loss": 0.5}, "template_hash": "c" * 64, "step": 7,
        "hyperparameters": {"learning_rate": "0.001"}, "temperature": 1.5 if labels else 0.0,
    }  # fmt: skip
    listed = [Part(name=name, sha256=hashlib.sha256(data).hexdigest(), total_bytes=len(data)) for name, data in parts.items()]
    return AdapterManifest(**(said | {"parts": listed} | changed))


@contextmanager
def called(caller: Caller) -> Iterator[None]:
    """Calls of a servicer inside the block come from `caller`."""
    token = CALLER.set(caller)
    try:
        yield
    finally:
        CALLER.reset(token)


@dataclass
class House:
    """A registry with a store of objects, and one tenant."""

    store: FineTuneStore
    objects: Objects
    caller: Caller = field(default_factory=lambda: tenant("news"))

    async def put(self, parts: Mapping[str, bytes], prefix: str = "") -> str:
        """Store a run's parts; returns their prefix."""
        prefix = prefix or f"jobs/{self.caller.project_uid}/{uuid4()}/f1/result"
        for name, data in parts.items():
            await self.objects.put(f"{prefix}/{name}", data)
        return prefix

    async def prepared(self, model: str = "titles", seed: int = 0, labels: Sequence[str] = (), **changed: Any) -> Prepared:
        parts = {ADAPTER: file(lora(seed))} | ({HEAD: file(head(labels, seed))} if labels else {})
        name = f"projects/{self.caller.project}/models/{model}"
        named = {key: value for key, value in changed.items() if key != "extra"}
        said = manifest(self.caller.project_uid, name, parts, **({"labels": list(labels)} | named))
        prefix = await self.put(parts | changed.pop("extra", {}))  # `extra`: stored beside the parts, and no part
        await publishing.verify(self.objects, said, prefix, MODULES)
        origin = Origin("JOB", changed.get("job") or str(uuid4()))
        return await publishing.prepare(self.store, self.objects, SIGNER, said, prefix, origin)

    async def publish(self, model: str = "titles", seed: int = 0, labels: Sequence[str] = (), **changed: Any) -> Prepared:
        """A READY version of the tenant's model."""
        prepared = await self.prepared(model, seed, labels, **changed)
        async with self.store.transaction() as connection:
            await publishing.publish(connection, prepared)
        return prepared


def tenant(project: str, *scopes: str) -> Caller:
    return Caller(str(uuid4()), project, str(uuid4()), frozenset(scopes), str(uuid4()), "")


@asynccontextmanager
async def registry(url: str) -> AsyncIterator[House]:
    """A house over the database at `url`, its objects in memory."""
    async with open_store(url, wait=True) as store:
        objects = open_objects("memory://")
        try:
            yield House(store, objects)
        finally:
            objects.close()
