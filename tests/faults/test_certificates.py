"""F30 on every hop of the gateway: client to it, it to a replica, it to finetune. Real handshakes, real streams."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from argosy.v1 import finetune_pb2, finetune_pb2_grpc
from services.chassis.certificates import ClientTls
from services.chassis.server import Listener
from services.gateway.endpoints import Endpoint, View
from tests.fakes.authority import HOUR, Authority, Secret, secret
from tests.fakes.edge import VERIFIER, chat, edge, events_of, metadata, text_of
from tests.fakes.engine import fake_engine
from tests.fakes.finetune import fake_finetune

NAME = "argosy-chat.models.svc"
JOBS = finetune_pb2.ListFineTuneJobsResponse()


def server(files: Secret) -> Any:
    found = Listener("127.0.0.1:0", files.certificate, files.private_key, files.ca).certificates()
    assert found is not None
    return found.server_credentials()


async def test_F30_rotation_on_every_hop_fails_no_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates and authority are renewed in cert-manager's order while 20 streams run and others begin: no call fails."""
    monkeypatch.setattr("services.chassis.certificates.LOOK_S", 0.05)
    old, new = Authority(), Authority()
    names = {"model": (NAME,), "finetune": ("127.0.0.1",), "gateway": ("127.0.0.1",)}
    mounts = {role: secret(tmp_path / role, old, *has, spiffe=f"spiffe://cluster.local/{role}") for role, has in names.items()}
    own = mounts["gateway"]
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(fake_engine(["x"] * 100, token_s=0.01, tls=server(mounts["model"]), verifier=VERIFIER))
        tuner = await stack.enter_async_context(fake_finetune(tls=server(mounts["finetune"]), replies={"ListFineTuneJobs": JOBS}))
        at = await stack.enter_async_context(
            edge(
                reachable=0,
                finetune=tuner.address,
                tls=ClientTls(own.ca, own.certificate, own.private_key),
                listener=Listener("127.0.0.1:0", own.certificate, own.private_key),
                credentials=grpc.ssl_channel_credentials(old.pem + new.pem),
            )
        )
        await at.replicas.follow(View({"u": Endpoint("u", engine.address, NAME)}, frozenset({"models/fake"})))
        await at.replicas.until(1)
        jobs: Any = finetune_pb2_grpc.FineTuneServiceStub(at.channel)
        asked = finetune_pb2.ListFineTuneJobsRequest(parent="projects/acme")

        async def both() -> None:
            """A short call to each neighbour."""
            assert await jobs.ListFineTuneJobs(asked, metadata=metadata(), timeout=20) == JOBS
            text = text_of(await events_of(at.generation.StreamChat(chat(), metadata=metadata(), timeout=30)))
            assert text == "x" * 100

        streams = [asyncio.ensure_future(both()) for _ in range(20)]
        await engine.until(lambda e: len(e.running) == 20)
        for step in ("trust both", "sign anew", "trust the new"):
            for role, files in mounts.items():
                pair = files.certificate.read_bytes(), files.private_key.read_bytes()
                pair = new.issue(*names[role], spiffe=f"spiffe://cluster.local/{role}") if step == "sign anew" else pair
                files.put(pair, [new] if step == "trust the new" else [old, new])
            watches = engine.totals["watches"]
            await engine.until(lambda e, before=watches: e.totals["watches"] > before)  # type: ignore[misc]  # the gateway has renewed
            streams.append(asyncio.ensure_future(both()))
        await asyncio.gather(*streams)
        assert engine.totals["calls"] == len(streams) and at.replicas.links[0].replica.reachable
        async with grpc.aio.secure_channel(at.gate.address, grpc.ssl_channel_credentials(new.pem)) as channel:
            await asyncio.wait_for(channel.channel_ready(), 10)


WRONG = {
    "another name": "Hostname Verification Check failed",
    "another authority": "CERTIFICATE_VERIFY_FAILED: unable to get local issuer certificate",
    "expired": "CERTIFICATE_VERIFY_FAILED: certificate has expired",
    "plaintext": "WRONG_VERSION_NUMBER",
}


@pytest.mark.parametrize("wrong", WRONG)
async def test_F30_a_gateway_uses_no_replica_that_is_not_who_it_should_be(
    tmp_path: Path, wrong: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is passed over, and the log says once why."""
    authority = Authority()
    own = secret(tmp_path / "gateway", authority)
    signer = Authority() if wrong == "another authority" else authority
    ended = {"begins": -2 * HOUR, "ends": -HOUR} if wrong == "expired" else {}
    chain, key = signer.issue("argosy-other.models.svc" if wrong == "another name" else NAME, **ended)  # type: ignore[arg-type]
    shown = None if wrong == "plaintext" else grpc.ssl_server_credentials([(key, chain)])
    async with fake_engine(tls=shown) as engine, edge(reachable=0, tls=ClientTls(own.ca, own.certificate, own.private_key)) as at:
        await at.replicas.follow(View({"u": Endpoint("u", engine.address, NAME)}, frozenset({"models/fake"})))
        async with asyncio.timeout(20):
            while "cannot be reached" not in caplog.text:
                await at.replicas.judged()
        (link,) = at.replicas.links
        said = f"replica {link.replica.name} cannot be reached: UNAVAILABLE, no handshake: {WRONG[wrong]}"
        for _ in range(4):  # it goes on trying
            await at.replicas.judged()
        assert caplog.text.count(said) == 1 and not link.replica.reachable and not engine.totals["watches"]
