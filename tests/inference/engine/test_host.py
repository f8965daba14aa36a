"""What only `ProcessHost` does: children that die, hang, and are replaced. What every host does is in `tests/protocols/test_host.py`."""

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
import uvloop

from services.inference.engine.calls import Done, FromEngine, Generate, Limits, Sampling, Token
from services.inference.engine.frames import FrameError
from services.inference.engine.host import EngineLost, EngineNotReady, ProcessHost, Restarts, SlowReader
from services.inference.engine.settings import EngineSettings
from services.inference.engine.streams import STREAM_FRAMES
from tests.fakes.runner import HANG, alone

PROMPT = tuple(range(20, 60))
SAMPLING = Sampling(seed=3)
SOON = Restarts(first_s=0.001, limit=3)


def generate(id: str = "a", count: int = 900, prompt: tuple[int, ...] = PROMPT) -> Generate:
    return Generate(id, prompt, SAMPLING, Limits(count, (), ignore_end_token=True), deadline_s=60.0, tenant="t", cache_salt=b"salt")


@asynccontextmanager
async def started(settings: EngineSettings | None = None, build: str = "build", restarts: Restarts = SOON) -> AsyncIterator[ProcessHost]:
    host = ProcessHost(settings or EngineSettings(kv_tokens=4096), f"tests.fakes.runner:{build}", restarts)
    try:
        await host.start()
        yield host
    finally:
        await host.close()


async def becomes(host: ProcessHost, ready: bool) -> None:
    async with asyncio.timeout(30):
        async for now in host.watch_ready():
            if now is ready:
                return


async def answer(host: ProcessHost, call: Generate) -> list[FromEngine]:
    return [message async for message in host.submit(call)]


def child(host: ProcessHost) -> int:
    assert host.pid is not None
    return host.pid


def gone(pid: int, within_s: float = 10.0) -> bool:
    """Wait for a process that need not be our child."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], within_s)[0])
    finally:
        os.close(descriptor)


async def test_F4_a_killed_child_is_told_to_every_stream_and_replaced():
    async with started() as host:
        begun: asyncio.Queue[None] = asyncio.Queue()

        async def lost(number: int) -> None:
            async with asyncio.timeout(30), aclosing(host.submit(generate(str(number)))) as stream:
                with pytest.raises(EngineLost):
                    async for message in stream:
                        assert not isinstance(message, Done)
                        begun.put_nowait(None)

        async with asyncio.TaskGroup() as group:
            for number in range(5):
                group.create_task(lost(number))
            for _ in range(50):
                await begun.get()
            os.kill(child(host), signal.SIGKILL)
        assert host.restarted == 0 or host.ready
        await becomes(host, ready=True)
        messages = await answer(host, generate(count=5))
        assert [m.token_id for m in messages if isinstance(m, Token)] == alone(PROMPT, SAMPLING, 0, 5, 1000)
        assert host.restarted == 1


def test_F4_the_same_on_uvloop():
    uvloop.run(test_F4_a_killed_child_is_told_to_every_stream_and_replaced())


async def test_F4_it_is_not_ready_while_the_child_is_replaced():
    async with started(restarts=Restarts(first_s=60.0)) as host:
        os.kill(child(host), signal.SIGKILL)
        await becomes(host, ready=False)
        with pytest.raises(EngineNotReady):
            await answer(host, generate())


async def test_F4_a_child_that_cannot_start_again_is_given_up(tmp_path: Path):
    async with started(EngineSettings(cache_dir=str(tmp_path)), "build_once") as host:
        os.kill(child(host), signal.SIGKILL)
        assert host._keeper is not None
        await asyncio.wait_for(host._keeper, 30)
        assert not host.ready


async def test_F5_a_child_that_hangs_is_ended_and_replaced():
    async with started(EngineSettings(hang_s=0.2), "build_hanging") as host:
        with pytest.raises(EngineLost):
            await asyncio.wait_for(answer(host, generate(prompt=(HANG,))), 30)
        await becomes(host, ready=True)
        assert isinstance((await answer(host, generate(count=2)))[-1], Done)


async def test_an_idle_child_is_not_taken_for_a_hung_one():
    async with started(EngineSettings(hang_s=0.01), "build") as host:
        before = host.pid
        changed = asyncio.Event()
        asyncio.get_running_loop().call_later(0.1, changed.set)  # ten times as long as it may hang
        await changed.wait()
        assert host.ready and host.pid == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_F3_the_parent_decides_when_the_child_ends(number: signal.Signals):
    async with started() as host:
        os.kill(child(host), number)
        assert isinstance((await answer(host, generate(count=3)))[-1], Done)
        pid = child(host)
    assert gone(pid)


async def test_a_stream_that_is_not_read_is_aborted_and_stops_nobody_else():
    async with started() as host, aclosing(host.submit(generate("slow", 3000))) as slow:
        await anext(slow)
        messages = await answer(host, generate("quick", 900))  # as long as the slow one's bound many times over
        assert isinstance(messages[-1], Done)
        read = 0
        with pytest.raises(SlowReader):
            async for _ in slow:
                read += 1
        assert read >= STREAM_FRAMES - 1
        async with asyncio.timeout(10):
            async for load in host.watch_load():
                if load.free_blocks == load.total_blocks:
                    break


async def test_A20_a_call_that_cannot_be_sent_hurts_only_its_maker():
    async with started() as host:
        stream = host.submit(generate(count=50))
        await anext(stream)
        with pytest.raises(FrameError):
            await answer(host, generate("b", count=2**70))
        assert isinstance([message async for message in stream][-1], Done)
        assert isinstance((await answer(host, generate("b", count=2)))[-1], Done)


PARENT = """
import asyncio, sys
from services.inference.engine.host import ProcessHost
from services.inference.engine.settings import EngineSettings
from services.inference.engine.streams import STREAM_FRAMES

async def main():
    host = ProcessHost(EngineSettings(), "tests.fakes.runner:build")
    await host.start()
    print(host.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_the_child_dies_with_its_parent():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    assert gone(pid)


def test_the_process_that_answers_the_wire_has_no_torch():
    code = (
        "import sys, services.inference.engine.host;"
        "print([m for m in ('torch', 'transformers', 'numpy', 'grpc', 'google.protobuf') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


async def test_a_start_that_is_given_up_leaves_no_child():
    host = ProcessHost(EngineSettings(), "tests.fakes.runner:build")
    starting = asyncio.create_task(host.start())
    while host.pid is None:
        await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert gone(child(host))


async def test_I7_descriptors_and_tasks_return_to_the_baseline():
    async with started():
        pass
    descriptors, tasks = len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())
    for _ in range(3):
        async with started() as host:
            stream = host.submit(generate())
            await anext(stream)
            os.kill(child(host), signal.SIGKILL)
            await becomes(host, ready=False)
            await becomes(host, ready=True)
            await stream.aclose()
    assert (len(os.listdir("/proc/self/fd")), len(asyncio.all_tasks())) == (descriptors, tasks)


async def test_logs_are_json_lines_without_content(capfd: pytest.CaptureFixture[str]):
    async with started(EngineSettings(), "build_failing") as host:
        messages = await answer(host, generate(prompt=(777, 778)))
        assert isinstance(messages[-1], Done) and messages[-1].error == "step_failed"
    lines = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    (line,) = [line for line in lines if line["message"] == "a step failed"]
    assert line["failure"] == "ValueError" and "fakes/runner.py" in line["where"][-1]
    assert "777" not in json.dumps(lines)


async def test_the_reason_why_a_model_was_not_loaded_is_logged(capfd: pytest.CaptureFixture[str]):
    with pytest.raises(EngineLost):
        async with started(EngineSettings(), "build_nothing"):
            pass
    assert "the model was not loaded: no such model" in capfd.readouterr().err
