"""Replicas are replaced under streams, and no caller sees it."""

import asyncio
import os

import pytest

from tests.deploy.node.installed import Installed
from tests.deploy.node.load import streaming

STREAMS = int(os.environ.get("ARGOSY_TEST_STREAMS", "16"))
ROLLOUTS = int(os.environ.get("ARGOSY_TEST_ROLLOUTS", "1"))  # of each kind


@pytest.mark.timeout(900 * ROLLOUTS)
@pytest.mark.parametrize("surge", [0, 1])
async def test_rollout_drops_no_stream(installed: Installed, surge: int) -> None:
    async with installed.tenant() as client, streaming(client, STREAMS) as load:
        await load.more(1)
        for number in range(ROLLOUTS):
            before = set(installed.pods())
            changes = {"podAnnotations": {"argosy.dev/test": f"{surge}-{number}"}, "rollout": {"surge": surge}}
            await asyncio.to_thread(installed.upgrade, **changes)
            for pod in before:
                await asyncio.to_thread(installed.node.wait, installed.namespace, f"pod/{pod}", "delete", 300)
            assert len(installed.pods()) == 2 and before.isdisjoint(installed.pods())
            await load.more(STREAMS)
    print(load.line(f"{ROLLOUTS} rollouts with surge {surge} under {STREAMS} streams"))
    assert load.broken == [] and load.open == 0 and load.whole > STREAMS * ROLLOUTS


@pytest.mark.timeout(900)
async def test_sigterm_finishes_generation(installed: Installed) -> None:
    """A pod that is deleted ends what it has begun, takes nothing new, and exits with 0."""
    name = sorted(installed.pods())[0]
    keep = '{"metadata": {"finalizers": ["argosy.dev/test"]}}'  # its last state is to be read
    installed.node.kubectl("patch", "pod", name, "-n", installed.namespace, "--type=merge", "-p", keep)
    try:
        async with installed.tenant() as client, streaming(client, STREAMS) as load:
            await load.more(1)
            await asyncio.to_thread(installed.node.kubectl, "delete", "pod", name, "-n", installed.namespace, "--wait=false")
            ended = "jsonpath={.status.containerStatuses[0].state.terminated.exitCode}=0"
            await asyncio.to_thread(installed.node.wait, installed.namespace, f"pod/{name}", ended, 300)
        assert load.broken == [] and load.whole >= STREAMS
    finally:
        gone = '{"metadata": {"finalizers": null}}'
        installed.node.kubectl("patch", "pod", name, "-n", installed.namespace, "--type=merge", "-p", gone)
        installed.ready()
