"""The proxy's own faults, and what our channel and door make of them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from tests.chassis.echo import calling, echo, text
from tests.chassis.test_status import drained, failure
from tests.faults.proxy import Proxy, fault_proxy


@asynccontextmanager
async def mirror() -> AsyncIterator[str]:
    """Sends back what it gets, and ends when its peer does."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            return
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


@asynccontextmanager
async def connected(proxy: Proxy) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    host, _, port = proxy.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield reader, writer
    finally:
        writer.close()


async def test_bytes_pass_whole_whatever_the_weather() -> None:
    sent = bytes(range(256)) * 400
    async with mirror() as target, fault_proxy(target) as proxy:
        proxy.up.slice_bytes, proxy.down.slice_bytes = 7, 1_000
        proxy.down.latency_s, proxy.down.jitter_s, proxy.down.bytes_per_s = 0.01, 0.01, 2e6
        async with connected(proxy) as (reader, writer):
            writer.write(sent)
            writer.write_eof()
            assert await asyncio.wait_for(reader.read(-1), 20) == sent
        assert proxy.up.passed == proxy.down.passed == len(sent)


async def test_latency_delays_by_at_least_itself() -> None:
    async with mirror() as target, fault_proxy(target) as proxy, connected(proxy) as (reader, writer):
        proxy.up.latency_s = 0.2
        began = asyncio.get_running_loop().time()
        writer.write(b"x")
        assert await reader.read(1) == b"x"
        assert asyncio.get_running_loop().time() - began >= 0.2


async def test_a_blackhole_holds_and_heals() -> None:
    async with mirror() as target, fault_proxy(target) as proxy, connected(proxy) as (reader, writer):
        proxy.blackhole()
        writer.write(b"held")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(4), 0.05)
        proxy.heal()
        assert await asyncio.wait_for(reader.readexactly(4), 10) == b"held"


async def test_reset_at_a_byte() -> None:
    async with mirror() as target, fault_proxy(target) as proxy, connected(proxy) as (reader, writer):
        proxy.up.reset_at = 10
        writer.write(b"x" * 9)
        assert await asyncio.wait_for(reader.readexactly(9), 10) == b"x" * 9
        writer.write(b"yz")
        with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
            await asyncio.wait_for(reader.readexactly(2), 10)


async def test_half_open_hides_the_end() -> None:
    async with mirror() as target, fault_proxy(target) as proxy, connected(proxy) as (reader, writer):
        proxy.down.half_open = True
        writer.write(b"last")
        writer.write_eof()
        assert await asyncio.wait_for(reader.readexactly(4), 10) == b"last"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.05)


async def test_refusing_and_resetting() -> None:
    async with mirror() as target, fault_proxy(target) as proxy:
        async with connected(proxy) as (reader, writer):
            writer.write(b"x")
            await reader.readexactly(1)
            proxy.reset()
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(reader.readexactly(1), 10)
        proxy.refusing = True
        async with connected(proxy) as (reader, _):
            with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
                await asyncio.wait_for(reader.readexactly(1), 10)
        assert proxy.accepted == 2 and proxy.connections == 0


# --- our own edges --------------------------------------------------------------------------------------------------------------------


async def words(request: Any, context: Any) -> AsyncIterator[Any]:
    for number in range(40):
        yield text(f"word {number}")


async def test_F13_slices_and_jitter_are_slower_and_never_wrong() -> None:
    async with echo({"Stream": words}) as serving, fault_proxy(serving.address) as proxy:
        proxy.up.slice_bytes = proxy.down.slice_bytes = 1
        proxy.down.jitter_s = 0.005
        async with calling(proxy.address) as caller:
            assert await drained(caller.stream(text(""), timeout=30)) == [f"word {number}" for number in range(40)]


async def test_F14_a_reset_at_any_byte_is_a_clean_code() -> None:
    """At 60 offsets of the answer: UNAVAILABLE, never a hang, never a short stream that ends OK."""
    async with echo({"Stream": words}) as serving, fault_proxy(serving.address) as proxy:
        async with calling(proxy.address) as caller:
            whole = await drained(caller.stream(text("")))
        size = proxy.down.passed
        for offset in range(1, size, max(1, size // 60)):
            proxy.down.reset_at = offset
            async with calling(proxy.address) as caller:
                call = caller.stream(text(""), timeout=20)
                got = []
                try:
                    async for event in call:
                        got.append(event.value)
                except grpc.aio.AioRpcError as error:
                    assert error.code() is grpc.StatusCode.UNAVAILABLE, offset
                    assert got == whole[: len(got)]
                else:
                    assert got == whole, f"a short stream ended OK at byte {offset}"


async def test_F12_a_partition_ends_at_the_caller_s_deadline() -> None:
    async with echo() as serving, fault_proxy(serving.address) as proxy, calling(proxy.address) as caller:
        assert (await caller.unary(text("a"))).value == "unary a"
        proxy.blackhole()
        assert (await failure(caller.unary(text("b"), timeout=0.2))).code() is grpc.StatusCode.DEADLINE_EXCEEDED
        proxy.heal()
        assert (await caller.unary(text("c"), timeout=20)).value == "unary c"
