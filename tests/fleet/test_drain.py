"""An operator stops the fleet: streams finish within the grace, the process leaves with 0, and nothing of it is left."""

import asyncio
import signal
import socket
from pathlib import Path

import psutil
import pytest

import argosy
from argosy import AsyncClient
from argosy.errors import Unavailable
from argosy.v1.config_pb2 import GenerationConfig
from tests.fleet.running import running, until

CONFIG = argosy.config(temperature=1, seed=5, max_output_tokens=300, min_output_tokens=300)


async def test_F2_F3_sigterm_with_open_streams_ends_in_order_and_leaves_no_process(folder: Path, tiny_settings: dict[str, str]) -> None:
    with running(folder / "drained", "models/tiny", "services.fleet", **tiny_settings) as fleet:
        family = psutil.Process(fleet.process.pid).children(recursive=True)
        postmaster = psutil.Process(int((fleet.home / "postgres" / "cluster" / "postmaster.pid").read_text().split()[0]))
        assert family, "an engine"
        tenant = fleet.tenant()
        async with tenant.client() as client:
            began = [asyncio.Event() for _ in range(8)]
            streams = [asyncio.ensure_future(_read(client, event)) for event in began]
            await asyncio.gather(*(event.wait() for event in began))
            fleet.process.send_signal(signal.SIGTERM)
            assert await asyncio.gather(*streams) == [300] * 8
        assert await asyncio.to_thread(fleet.process.wait, 30) == 0
    gone, alive = psutil.wait_procs([*family, postmaster], timeout=10)
    assert gone and not alive
    # Its state is kept: a second start finds it, and the keys.
    with running(folder / "drained", "models/tiny", "services.fleet", **tiny_settings) as again:
        assert again.api_key == fleet.api_key
        async with AsyncClient(again.address, tenant.key, model=again.model) as client:
            (total,) = [found async for found in client.usage(tenant.project)]
            assert (total.requests, total.usage.output_tokens) == (8, 8 * 300), "what was acknowledged is in the books"
            assert (await client.generate("hello", config=argosy.config(max_output_tokens=4))).outputs


async def _read(client: AsyncClient, began: asyncio.Event, config: GenerationConfig = CONFIG) -> int:
    async with client.stream_generate("One, two,", config=config) as stream:
        async for event in stream.events():
            if event.HasField("text"):
                began.set()
    return int(stream.result.completed.usage.output_tokens)


async def test_F3_a_second_sigterm_does_not_wait_for_streams(folder: Path, tiny_settings: dict[str, str]) -> None:
    with running(folder / "hurried", "models/tiny", "services.fleet", **tiny_settings) as fleet:
        async with fleet.tenant().client() as client:
            began = asyncio.Event()
            endless = argosy.config(temperature=1, seed=5, max_output_tokens=4_000, min_output_tokens=4_000)
            stream = asyncio.ensure_future(_read(client, began, endless))
            await began.wait()
            fleet.process.send_signal(signal.SIGTERM)
            await until(lambda: _closed(fleet.address))
            fleet.process.send_signal(signal.SIGTERM)
            with pytest.raises(Unavailable) as cut:
                await stream
            assert cut.value.reason in ("DRAINING", "")  # cut in the middle of a send, a stream ends with core's own UNAVAILABLE
        assert await asyncio.to_thread(fleet.process.wait, 10) == 0


def _closed(address: str) -> bool:
    """Whether nobody listens there any more: the drain has begun."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 5).close()
    except ConnectionRefusedError:
        return True
    except ConnectionResetError:
        return False  # it was accepted in the moment of closing
    return False
