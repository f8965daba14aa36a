"""ModelService and RegistryService behind the real server, as gateways reach them."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from argosy.v1 import model_pb2 as pb
from argosy.v1 import model_pb2_grpc
from argosy_internal.registry.v1 import registry_pb2, registry_pb2_grpc
from services.chassis.identity import CALLER_KEY, Caller, CallerSigner, CallerVerifier
from services.chassis.server import Listener
from services.finetune.server import AUDIENCE, finetune
from services.finetune.settings import FineTuneSettings
from tests.finetune.adapters import BASE, tenant
from tests.finetune.test_transfers import header, parts

NAME = "projects/news/models/titles"
KEY = Ed25519PrivateKey.generate()


@dataclass
class Wire:
    models: Any
    registry: Any

    @staticmethod
    def by(caller: Caller) -> dict[str, Any]:
        return {"metadata": ((CALLER_KEY, CallerSigner(KEY, "k").sign(caller, AUDIENCE, time.time())),), "timeout": 60}


@asynccontextmanager
async def wire(url: str, tmp_path: Path, base: Path) -> AsyncIterator[Wire]:
    settings = FineTuneSettings(
        listener=Listener(address="127.0.0.1:0"), database_url=url, store_url=f"file://{tmp_path}/objects", bases=(f"tiny={base}",),
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    async with (
        finetune(settings, verifier=CallerVerifier({"k": KEY.public_key()}, AUDIENCE)) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        yield Wire(model_pb2_grpc.ModelServiceStub(channel), registry_pb2_grpc.RegistryServiceStub(channel))  # type: ignore[no-untyped-call]


async def test_an_import_is_resolved_exported_and_told_to_every_gateway(finetune_url: str, tmp_path: Path, base: Path) -> None:
    owner = tenant("news", "models.read", "models.write")
    fleet = replace(owner, scopes=frozenset({"fleet"}))
    async with wire(finetune_url, tmp_path, base) as served, asyncio.timeout(90):
        model = pb.Model(base_model=BASE)
        await served.models.CreateModel(pb.CreateModelRequest(parent="projects/news", model_id="titles", model=model), **served.by(owner))
        watch = served.registry.WatchVersions(registry_pb2.WatchVersionsRequest(), **served.by(fleet))
        assert (await watch.read()).WhichOneof("event") == "bookmark"

        async def stream() -> AsyncIterator[pb.ImportModelVersionRequest]:
            for request in [header(), *parts(base)]:
                yield request

        version = await served.models.ImportModelVersion(stream(), **served.by(owner))
        ready = (await watch.read()).ready
        assert (ready.version, ready.adapter_digest, ready.project_uid) == (version.name, version.adapter_digest, owner.project_uid)
        resolved = await served.registry.ResolveModel(registry_pb2.ResolveModelRequest(name=NAME), **served.by(owner))
        assert resolved.targets[0].model.adapter_digest == version.adapter_digest
        reported = registry_pb2.ReportServableRequest(version=version.name, replicas=1)
        assert (await served.registry.ReportServable(reported, **served.by(fleet))).first
        assert (await served.models.GetModelVersion(pb.GetModelVersionRequest(name=version.name), **served.by(owner))).HasField(
            "servable_time"
        )
        sizes = {
            message.total_bytes
            async for message in served.models.ExportModelVersion(pb.ExportModelVersionRequest(name=version.name), **served.by(owner))
        }
        assert len(sizes) == 1
        watch.cancel()


async def test_only_the_fleet_follows_all_projects(finetune_url: str, tmp_path: Path, base: Path) -> None:
    async with wire(finetune_url, tmp_path, base) as served:
        for call in (
            served.registry.WatchVersions(registry_pb2.WatchVersionsRequest(), **served.by(tenant("news", "models.read"))),
            served.registry.WatchVersions(registry_pb2.WatchVersionsRequest(), timeout=10),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            reported = registry_pb2.ReportServableRequest(version=f"{NAME}/versions/1", replicas=1)
            await served.registry.ReportServable(reported, **served.by(tenant("news", "models.write")))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
