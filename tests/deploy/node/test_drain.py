"""A node is emptied under streams: the budget lets one replica go at a time, and no caller sees it."""

import asyncio
import os

import pytest

from tests.deploy.node.installed import MODEL, Installed
from tests.deploy.node.load import streaming
from tools.cluster.node import NAME

STREAMS = int(os.environ.get("ARGOSY_TEST_STREAMS", "16"))
DRAINS = int(os.environ.get("ARGOSY_TEST_DRAINS", "1"))


@pytest.mark.timeout(900 * DRAINS)
async def test_node_drain_drops_no_stream(installed: Installed) -> None:
    """There is one node, so it is opened again once the first replica has gone: the second may go when the first is replaced."""
    node = installed.node
    emptied = ("drain", NAME, f"--pod-selector=argosy.dev/model={MODEL}", "--delete-emptydir-data", "--timeout=300s")
    async with installed.tenant() as client, streaming(client, STREAMS) as load:
        await load.more(1)
        for _ in range(DRAINS):
            before = set(installed.pods())
            drain = asyncio.create_task(asyncio.to_thread(node.kubectl, *emptied, seconds=310))
            try:
                first = await asyncio.to_thread(_gone, installed, before)
                assert len(first) == 1, "two replicas were evicted at once"
            finally:
                await asyncio.to_thread(node.kubectl, "uncordon", NAME)
            await drain
            await asyncio.to_thread(installed.ready)
            assert before.isdisjoint(installed.pods())
            await load.more(STREAMS)
    print(load.line(f"{DRAINS} drains under {STREAMS} streams"))
    assert load.broken == [] and load.open == 0 and load.whole > STREAMS * DRAINS


def _gone(installed: Installed, before: set[str]) -> set[str]:
    """The replicas that are on their way out, once there is one."""
    while True:
        pods = installed.pods()
        leaving = {name for name in before if name not in pods or "deletionTimestamp" in pods[name]["metadata"]}
        if leaving:
            return leaving
