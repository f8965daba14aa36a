"""A model's process dies under streams: each that it had begun says so and from where, and the other replica takes the rest (F4)."""

import asyncio
import time
from dataclasses import dataclass

import pytest

import argosy
from argosy import AsyncClient
from argosy.errors import StreamLost
from services.gateway.replicas import label
from tests.deploy.node.installed import Installed
from tests.deploy.node.load import TOKENS
from tools.cluster.node import SOCKET
from tools.cluster.processes import wait_until

STREAMS = 32  # so many that a gateway which prefers one replica for its cached prefix uses the other too
BACK_SECONDS = 300


@dataclass
class Told:
    """What one caller saw: how many events, and what ended them when."""

    events: int = 0
    lost: StreamLost | None = None
    at: float = 0.0
    tokens: int = 0


async def ask(client: AsyncClient, number: int, seen: Told, begun: asyncio.Semaphore) -> Told:
    """One stream to its end; any end but a whole answer or STREAM_LOST is an error of the test's."""
    config = argosy.config(temperature=1, seed=number, max_output_tokens=TOKENS, min_output_tokens=TOKENS)
    try:
        async with client.stream_generate(f"{number},", config=config) as stream:
            async for event in stream.events():
                seen.events += 1
                assert event.sequence == seen.events
                if seen.events == 2:  # the first is Started
                    begun.release()
        seen.tokens = stream.result.completed.usage.output_tokens
    except StreamLost as error:
        seen.lost, seen.at = error, time.monotonic()
    return seen


def kill(installed: Installed, container: str) -> None:
    """SIGKILL to the first process of a container, and so to all of it."""
    assert installed.node.cluster
    node = installed.node.cluster.node(installed.node.toolbox)
    words = ("--address", SOCKET, "--namespace", "k8s.io", "tasks", "kill", "--signal", "SIGKILL", container.rpartition("/")[2])
    node.room.run(node.programs.ctr, *words)


def returns(installed: Installed, uid: str) -> int:
    """How often a gateway has said that it can use the replica in the pod of this uid."""
    said = ("logs", "-n", installed.namespace, "-l", "app.kubernetes.io/component=gateway", "--tail=-1")
    return sum(f"replica {label(uid)} serves" in line for line in installed.node.kubectl(*said).splitlines())


@pytest.mark.timeout(900)
async def test_F4_pod_kill_mid_stream(installed: Installed) -> None:
    pods = sorted(installed.pods().items())
    uids = [pod["metadata"]["uid"] for _, pod in pods]
    name, container = pods[0][0], pods[0][1]["status"]["containerStatuses"][0]
    # The test before may have replaced one: a gateway that does not know it yet has all streams on the other.
    known = lambda: all(returns(installed, uid) for uid in uids)  # noqa: E731
    assert await asyncio.to_thread(wait_until, known, BACK_SECONDS), "the gateway has not found both"
    before = await asyncio.to_thread(returns, installed, uids[0])
    async with installed.tenant() as client:
        begun, told = asyncio.Semaphore(0), [Told() for _ in range(STREAMS)]
        async with asyncio.TaskGroup() as group:
            for number, seen in enumerate(told):
                group.create_task(ask(client, number, seen, begun))
            for _ in told:
                await begun.acquire()
            killed = time.monotonic()
            await asyncio.to_thread(kill, installed, container["containerID"])
            # Nobody waits for the dead one's restart: these begin, and end, on the other.
            later = [await ask(client, STREAMS + number, Told(), begun) for number in range(4)]
        lost = [seen for seen in told if seen.lost]
        assert 0 < len(lost) < STREAMS
        assert [(seen.lost.reason, seen.lost.last_sequence) for seen in lost if seen.lost] == [
            ("STREAM_LOST", seen.events) for seen in lost
        ]
        assert {seen.tokens for seen in [*told, *later] if not seen.lost} == {TOKENS}
        assert not [seen for seen in later if seen.lost]
        print(f"{len(lost)} of {STREAMS} lost, told after at most {max(seen.at for seen in lost) - killed:.2f} s, the killing included")
        again = f"jsonpath={{.status.containerStatuses[0].restartCount}}={container['restartCount'] + 1}"
        await asyncio.to_thread(installed.node.wait, installed.namespace, f"pod/{name}", again, BACK_SECONDS)
        await asyncio.to_thread(installed.node.wait, installed.namespace, f"pod/{name}", "condition=Ready", BACK_SECONDS)
        assert await asyncio.to_thread(wait_until, lambda: returns(installed, uids[0]) > before, BACK_SECONDS), (
            "the gateway has not taken it back"
        )
        answers = await asyncio.gather(*(ask(client, number, Told(), begun) for number in range(STREAMS)))
        assert {seen.tokens for seen in answers} == {TOKENS}
    # Another pod takes its place, for tests beside this one that look for restarts.
    await asyncio.to_thread(installed.node.kubectl, "delete", "pod", name, "-n", installed.namespace)
    await asyncio.to_thread(installed.ready)
