"""Channels between our own processes."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from services.chassis.channel import is_local, open_channel, streaming
from services.chassis.server import Listener
from tests.chassis.echo import Client, calling, echo, text
from tests.chassis.peer import peer
from tests.chassis.test_status import drained, failure


async def peers(request: Any, context: Any) -> Any:
    return text(context.peer())


async def test_channels_do_not_share() -> None:
    """Four channels to one target are four connections; by default core would give them one."""
    async with echo({"Unary": peers}) as serving:
        channels = [open_channel(serving.address) for _ in range(4)]
        seen = {(await Client(channel).unary(text(""))).value for channel in channels}
        assert len(seen) == 4
        for channel in channels:
            await channel.close()


async def test_no_proxy_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "no_grpc_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    async with echo() as serving, calling(serving.address) as caller:
        assert (await caller.unary(text("a"), timeout=20)).value == "unary a"


async def test_abandoned_stream_stops_engine() -> None:
    """Leaving the block by break, return or error ends the call at the server; dropping the call does not."""
    ended: asyncio.Queue[str] = asyncio.Queue()

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            while True:
                yield text("token")
                await asyncio.sleep(0)
        finally:
            ended.put_nowait(request.value)

    async def returning(caller: Client) -> str:
        async with streaming(caller.stream(text("return"))) as events:
            async for event in events:
                return str(event.value)
        return ""

    async with echo({"Stream": stream}) as serving, calling(serving.address) as caller:
        async with streaming(caller.stream(text("break"))) as events:
            async for _ in events:
                break
        assert await asyncio.wait_for(ended.get(), 10) == "break"
        assert await returning(caller) == "token"
        assert await asyncio.wait_for(ended.get(), 10) == "return"
        with pytest.raises(ZeroDivisionError):
            async with streaming(caller.stream(text("error"))) as events:
                await events.read()
                raise ZeroDivisionError
        assert await asyncio.wait_for(ended.get(), 10) == "error"
        assert await serving.inflight.idle(10)


async def test_streaming_leaves_a_finished_call_as_it_was() -> None:
    async with echo() as serving, calling(serving.address) as caller:
        async with streaming(caller.stream(text("a b"))) as events:
            assert await drained(events) == ["a", "b"]
        assert await events.code() is grpc.StatusCode.OK


async def test_run_ahead_is_bounded() -> None:
    """A server stops a few thousand small messages ahead of a stopped reader; by default it ran 51,000 ahead, and went on."""
    written = 0

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        nonlocal written
        while written < 100_000:
            written += 1
            yield text("x" * 38)  # 40 B on the wire

    async with echo({"Stream": stream}) as serving, calling(serving.address) as caller, streaming(caller.stream(text(""))) as events:
        await events.read()
        before = -1
        while before < written < 100_000:  # until it stands still, of which nothing tells
            before = written
            await asyncio.sleep(0.5)
        assert written < 10_000
        ahead = written
        for _ in range(ahead):
            assert len((await events.read()).value) == 38
        assert written > ahead, "a reader who reads on sets it going again"


@pytest.mark.parametrize(
    "address, local",
    [
        ("127.0.0.1:1", True), ("localhost:1", True), ("[::1]:1", True), ("unix:/a", True), ("unix:///a", True), ("unix-abstract:a", True),
        ("ipv4:127.0.0.1:1", False), ("0.0.0.0:1", False), ("[::]:1", False), ("10.1.2.3:1", False), ("127.evil.example:1", False),
        ("localhost.evil.example:1", False), ("dns:///localhost:1", True), ("dns:///pod:1", False),
    ],
)  # fmt: skip
def test_what_is_local(address: str, local: bool) -> None:
    assert is_local(address) == local


# --- a peer that is there and says nothing: thirteen seconds each, so they wait together ---------------------------------------------


async def frozen_peer(silent_s: float) -> None:
    """A stopped server is noticed though its socket stays open."""
    async with peer("serve") as process, calling(await process.line()) as caller, streaming(caller.stream(text(""))) as events:
        await events.read()
        await asyncio.sleep(silent_s)  # a prefill: nothing on the wire but pings
        process.send(signal.SIGSTOP)
        error = await asyncio.wait_for(failure(events.read()), 25)  # 13 s; without `ping_timeout_ms` 70
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        process.send(signal.SIGCONT)


async def frozen_client() -> None:
    """A stopped client's stream is freed."""
    left = asyncio.Event()

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            yield text("here")
            await asyncio.Event().wait()
        finally:
            left.set()

    async with echo({"Stream": stream}) as serving, peer("call", serving.address) as process:
        assert await process.line() == "here"
        process.send(signal.SIGSTOP)
        await asyncio.wait_for(left.wait(), 25)  # 13 s; without keepalive at the server never
        assert await serving.inflight.idle(5)


async def returning_pod() -> None:
    """A pod that was away for 10.5 s is found within core's capped backoff, 2 s and a fifth; the default would look again 5 s later."""
    async with echo() as serving:
        address = serving.address
        async with calling(address) as caller:
            assert (await caller.unary(text("a"))).value == "unary a"
            await serving.drain(announce_s=0, grace_s=0)
            assert (await failure(caller.unary(text("b"), timeout=20))).code() is grpc.StatusCode.UNAVAILABLE
            waiting = caller.unary(text("c"), wait_for_ready=True, timeout=30)
            asked = asyncio.ensure_future(waiting)
            await asyncio.sleep(10.5)  # away, while the channel knocks
            async with echo(listener=Listener(address, announce_seconds=0)), asyncio.timeout(3.5):
                assert (await asked).value == "unary c"


async def test_F5_frozen_peer_and_test_frozen_client_is_freed_and_test_pod_returns_fast() -> None:
    await asyncio.gather(frozen_peer(0), frozen_client(), returning_pod())


@pytest.mark.skipif("ARGOSY_SOAK" not in os.environ, reason="a minute of silence; set ARGOSY_SOAK to run it")
async def test_F5_frozen_after_45_s_of_silence() -> None:
    """By default pings thin out on a quiet stream, and this takes 38 s instead of 8."""
    await frozen_peer(45)
