"""`python -m services.inference` as a supervisor sees it."""

import asyncio
import contextlib
import os
import signal
import sys

import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.chassis.channel import open_channel

SERVING = health_pb2.HealthCheckResponse.SERVING


@contextlib.asynccontextmanager
async def process(**environment):
    path = os.pathsep.join(entry for entry in sys.path if entry)
    own = {name: value for name, value in os.environ.items() if not name.startswith("ARGOSY_")}
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "services.inference"),
        env=own | {"PYTHONPATH": path, "ARGOSY_THREADS": "1", "ARGOSY_ANNOUNCE_SECONDS": "0"} | environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield child
    finally:
        with contextlib.suppress(ProcessLookupError):
            child.kill()
        await child.communicate()


async def ready(address):
    async with open_channel(address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="ready"), timeout=250)
        async for state in watch:
            if state.status == SERVING:
                watch.cancel()
                return


@pytest.mark.timeout(300)
@pytest.mark.parametrize("warm", [False, True], ids=["during load", "when ready"])
async def test_F3_sigterm_leaves_no_child(warm):
    async with process() as child:
        address = (await child.stdout.readline()).decode().strip()
        if warm:
            await ready(address)
        children = psutil.Process(child.pid).children(recursive=True)
        child.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(child.wait(), 60) == 0
    gone, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert not warm or gone


async def test_bad_variables_are_named_all_at_once():
    async with process(ARGOSY_DEVICE="tpu", ARGOSY_KV_TOKENS="many") as child:
        _, said = await asyncio.wait_for(child.communicate(), 60)
        assert child.returncode == 2
    assert b"ARGOSY_DEVICE" in said
    assert b"ARGOSY_KV_TOKENS" in said


async def test_a_model_that_cannot_be_had_ends_the_process():
    async with process(ARGOSY_MODEL="/nonexistent") as child:
        _, said = await asyncio.wait_for(child.communicate(), 60)
        assert child.returncode == 1
    assert b"nonexistent" in said
