"""Demand over all gateways, and KEDA's scaler on it: a real PostgreSQL, a cluster's API, and the wire."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from argosy_internal.scaler.v1 import scaler_pb2, scaler_pb2_grpc
from services.chassis.channel import open_channel
from services.chassis.errors import StoreUnavailable
from services.chassis.server import Listener
from services.chassis.status import error_info
from services.chassis.telemetry import Telemetry
from services.gateway.demand import Demand
from services.gateway.endpoints import LABELS
from services.gateway.sql_demand import SqlDemand
from services.gateway.store import Store, StoreSettings, open_store
from tests.fakes.authority import Authority, secret
from tests.fakes.edge import Edge, chat, edge, events_of, metadata, text_of
from tests.fakes.engine import fake_engine
from tests.fakes.kubernetes import Fault, Kubernetes, running
from tests.faults.test_replicas import reason
from tests.gateway.test_discovery import listed

TRIGGER = {"model": "fake", "signal": "queue", "target": "4"}


@pytest.fixture
def cluster() -> Iterator[Kubernetes]:
    """With one model that sleeps."""
    with running() as api:
        labels = dict(label.split("=") for label in LABELS.split(",")) | {"argosy.dev/model": "fake", "argosy.dev/load-seconds": "2"}
        api.put("endpointslices", {"metadata": {"name": "empty", "labels": labels}, "addressType": "IPv4", "endpoints": None}, "models")
        yield api


@pytest.fixture
async def store(postgres_url: str) -> AsyncIterator[Store]:
    async with open_store(StoreSettings(database_url=postgres_url), b"p" * 32, wait=True) as opened:
        yield opened


@asynccontextmanager
async def scaler(at: Edge, **how: Any) -> AsyncIterator[Any]:
    """A stub of the scaler, once the gateway has seen its cluster."""
    async with asyncio.timeout(20):
        while not at.replicas.installed:
            await asyncio.sleep(0.01)
    async with open_channel(at.gate.scaler_address, **how) as channel:
        yield scaler_pb2_grpc.ExternalScalerStub(channel)


def ref(**trigger: str) -> scaler_pb2.ScaledObjectRef:
    return scaler_pb2.ScaledObjectRef(name="argosy-chat", namespace="models", scaler_metadata=TRIGGER | trigger)


async def test_gateways_tell_each_other_and_forget_what_is_over(store: Store) -> None:
    one, two = SqlDemand(store), SqlDemand(store)
    busy = {"models/a": Demand(3, 2, 80), "models/b": Demand()}
    assert await one.exchange(busy) == ([], {})
    assert await two.exchange({}) == ([("models/a", Demand(3, 2, 80))], {}), "what is asked of nothing is not written"
    await one.exchange({"models/a": Demand(1, 0, 7)})
    assert (await two.exchange({}))[0] == [("models/a", Demand(1, 0, 7))]
    await one.exchange({})
    assert (await two.exchange({}))[0] == []
    await two.loaded("models/a", 12.5)
    await two.loaded("models/a", 11.0)
    assert (await one.exchange({}))[1] == {"models/a": 11.0}


async def test_a_gateway_that_has_gone_wants_nothing(store: Store) -> None:
    one, two = SqlDemand(store), SqlDemand(store)
    await one.exchange({"models/a": Demand(3)})
    await store.hot.rows("UPDATE model_demands SET beat_time = clock_timestamp() - interval '6 seconds'")
    assert (await two.exchange({}))[0] == []
    await store.hot.rows("UPDATE model_demands SET beat_time = clock_timestamp() - interval '2 hours'")
    await two.exchange({"models/a": Demand(1)})
    assert len(await store.hot.rows("SELECT FROM model_demands")) == 1


async def test_wake_seen_by_any_gateway(cluster: Kubernetes, store: Store) -> None:
    """A call at one gateway, KEDA at another: told within seconds, a replica comes, and the call that was held is answered."""
    async with fake_engine(["awake"]) as engine:
        options: dict[str, Any] = {"cluster": cluster.client(), "reachable": 0, "scaler_address": "127.0.0.1:0"}
        async with (
            edge(**options, demand=SqlDemand(store)) as at,
            edge(**options, demand=SqlDemand(store)) as other,
            scaler(other) as keda,
        ):
            stream = keda.StreamIsActive(ref(), timeout=60)
            assert (await stream.read()).result is False
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await at.generation.Chat(chat(), metadata=metadata(), timeout=20)
            assert reason(error.value) == "NOT_STARTED", "nobody has described it yet: it is to come again"
            assert (await stream.read()).result is True
            assert (await keda.IsActive(ref(), timeout=5)).result is True
            metrics = await keda.GetMetrics(scaler_pb2.GetMetricsRequest(scaled_object_ref=ref(), metric_name="queue"), timeout=5)
            (value,) = metrics.metric_values
            assert (value.metric_name, value.metric_value, value.metric_value_float) == ("queue", 1, 1.0)
            listed(cluster, engine)  # KEDA has scaled it up
            await at.replicas.until(1)
            assert text_of(await events_of(at.generation.StreamChat(chat(), metadata=metadata(), timeout=20))) == "awake"
            assert (await stream.read()).result is False, "nobody asks any more"
            cluster.delete("endpointslices", f"s{engine.address.rpartition(':')[2]}", "models")  # and down again, after its cooldown
            await at.replicas.until(0)
            held = asyncio.ensure_future(events_of(at.generation.StreamChat(chat(), metadata=metadata(), timeout=30)))
            assert (await stream.read()).result is True
            listed(cluster, engine)
            assert text_of(await held) == "awake"


async def test_hpa_reads_the_same_numbers_as_metrics(cluster: Kubernetes) -> None:
    telemetry = Telemetry.start("test", {})
    async with edge(cluster=cluster.client(), reachable=0, telemetry=telemetry) as at:
        for queue in (0, 1):
            async with asyncio.timeout(20):
                while f'argosy_demand_queue{{model="fake"}} {queue}.0' not in telemetry.exposition().decode():
                    await asyncio.sleep(0.02)
            assert f'argosy_demand_inflight{{model="fake"}} {queue}.0' in telemetry.exposition().decode()
            assert f'argosy_demand_kv{{model="fake"}} {queue}.0' in telemetry.exposition().decode()
            with pytest.raises(grpc.aio.AioRpcError):
                await at.generation.Chat(chat(), metadata=metadata(), timeout=1)


async def test_a_trigger_is_read_or_refused_by_its_field(cluster: Kubernetes) -> None:
    async with edge(cluster=cluster.client(), reachable=0, scaler_address="127.0.0.1:0") as at, scaler(at) as keda:
        (spec,) = (await keda.GetMetricSpec(ref(signal="kv", target="2.5"), timeout=5)).metric_specs
        assert (spec.metric_name, spec.target_size, spec.target_size_float) == ("kv", 3, 2.5)
        wrong = [("signal", "hope"), ("target", "0"), ("target", "many"), ("target", "inf"), ("target", "")]
        for field, value in wrong:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await keda.GetMetricSpec(ref(**{field: value}), timeout=5)
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT and f"scaler_metadata.{field}" in str(error_info(error.value))
        for model, code in (("", grpc.StatusCode.INVALID_ARGUMENT), ("nobodys", grpc.StatusCode.NOT_FOUND)):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await keda.IsActive(ref(model=model), timeout=5)
            assert error.value.code() is code


async def test_before_the_first_view_of_the_cluster_no_model_is_unknown(cluster: Kubernetes) -> None:
    cluster.fault = lambda method, path: Fault(503)
    async with (
        edge(cluster=cluster.client(), reachable=0, scaler_address="127.0.0.1:0") as at,
        open_channel(at.gate.scaler_address) as channel,
    ):
        keda: Any = scaler_pb2_grpc.ExternalScalerStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await keda.IsActive(ref(), timeout=5)
        assert (error.value.code(), reason(error.value)) == (grpc.StatusCode.UNAVAILABLE, "NOT_STARTED")


async def test_the_scaler_asks_for_a_certificate_and_the_public_listener_knows_nothing_of_it(cluster: Kubernetes, tmp_path: Path) -> None:
    authority = Authority()
    own, keda = secret(tmp_path / "gateway", authority, "127.0.0.1"), secret(tmp_path / "keda", authority)
    trusts = grpc.ssl_channel_credentials(authority.pem)
    shows = grpc.ssl_channel_credentials(authority.pem, keda.private_key.read_bytes(), keda.certificate.read_bytes())
    listener = Listener("127.0.0.1:0", own.certificate, own.private_key, announce_seconds=0)
    tls = own.tls()
    async with edge(
        cluster=cluster.client(), reachable=0, scaler_address="127.0.0.1:0", listener=listener, tls=tls, credentials=trusts
    ) as at:
        async with scaler(at, credentials=trusts) as stub:
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await stub.IsActive(ref(), timeout=5)
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        async with scaler(at, credentials=shows) as stub:
            assert (await stub.GetMetricSpec(ref(), timeout=5)).metric_specs
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await scaler_pb2_grpc.ExternalScalerStub(at.channel).IsActive(ref(), timeout=5)
        assert error.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_scaler_that_could_know_nobody_does_not_start(cluster: Kubernetes, tmp_path: Path) -> None:
    own = secret(tmp_path / "gateway", Authority(), "127.0.0.1")
    listener = Listener("127.0.0.1:0", own.certificate, own.private_key, announce_seconds=0)
    with pytest.raises(ValueError, match="set the client CA"):
        async with edge(cluster=cluster.client(), reachable=0, scaler_address="127.0.0.1:0", listener=listener):
            pass


async def test_without_its_store_a_gateway_answers_for_itself(cluster: Kubernetes, caplog: pytest.LogCaptureFixture) -> None:
    class Away:
        async def exchange(self, own: Any) -> Any:
            raise StoreUnavailable

        async def loaded(self, model: str, seconds: float) -> None:
            raise StoreUnavailable

    async with (
        edge(cluster=cluster.client(), reachable=0, scaler_address="127.0.0.1:0", demand=Away()) as at,
        scaler(at) as keda,
    ):
        stream = keda.StreamIsActive(ref(), timeout=60, wait_for_ready=True)
        assert (await stream.read()).result is False
        with pytest.raises(grpc.aio.AioRpcError):
            await at.generation.Chat(chat(), metadata=metadata(), timeout=1)
        assert (await stream.read()).result is True
        assert caplog.text.count("the store is away") == 1
