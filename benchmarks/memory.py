"""Resident memory of a gateway process, with its PostgreSQL, over many requests of mixed outcome before a fake engine.

    python -m benchmarks.memory --requests 100000

Eight of ten calls are streams read to their end, one is a stream that its caller leaves after the first event, one is unary.
"""

import argparse
import asyncio
import tempfile
import time
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import uvloop

from argosy.v1 import generation_pb2
from benchmarks.processes import Door, first_line, gateway, process
from benchmarks.record import header, table
from services.chassis.channel import ENGINE
from tests.fakes.edge import chat

SERVICE = "/argosy.v1.GenerationService"
EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs forgot it
CHANNELS = 4
MIB = 2**20


class Callers:
    """Makes the calls and counts how they ended."""

    def __init__(self, channels: list[grpc.aio.Channel], door: Door) -> None:
        serialize = generation_pb2.ChatRequest.SerializeToString
        self._streams = [each.unary_stream(f"{SERVICE}/StreamChat", serialize, None) for each in channels]  # type: ignore[arg-type]
        self._unary = [each.unary_unary(f"{SERVICE}/Chat", serialize, None) for each in channels]  # type: ignore[arg-type]
        self._metadata = (("authorization", f"Bearer {door.api_key}"),)
        self.made = self.accepted = self.left = self.refused = 0

    async def one(self) -> None:
        """The next call of the mixture."""
        self.made += 1
        number = self.made
        kinds = self._unary if number % 10 == 0 else self._streams
        call: Any = kinds[number % CHANNELS](chat("Where do ships sleep?"), metadata=self._metadata, timeout=60.0)
        with suppress(grpc.aio.AioRpcError, asyncio.CancelledError):
            if number % 10 == 0:
                await call
            elif number % 10 == 5:
                await call.read()
                call.cancel()
                self.left += 1
                return
            else:
                while await call.read() is not EOF:
                    pass
        if await call.code() is grpc.StatusCode.OK:
            self.accepted += 1
        else:
            self.refused += 1

    async def until(self, total: int, at_once: int) -> None:
        """Keep calls open until so many have been made."""

        async def caller() -> None:
            while self.made < total:
                await self.one()

        await asyncio.gather(*(caller() for _ in range(at_once)))


async def measure(asked: argparse.Namespace) -> None:
    """A row for each tenth of the requests."""
    header()
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="argosy-bench-")))
        log = folder / "engine.log"
        script = ("--tokens", str(asked.tokens), "--coalesce", "8")
        engine = await stack.enter_async_context(process("tests.fakes.engine", *script, log=log))
        door = await stack.enter_async_context(gateway(folder, [await first_line(engine, log)]))
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(door.address, options=[*ENGINE.items()])) for _ in range(CHANNELS)
        ]
        for channel in channels:
            await channel.channel_ready()
        calls, seen = Callers(channels, door), psutil.Process(door.pid)
        points = [(0, seen.memory_info().rss / MIB)]
        rows: list[tuple[object, ...]] = [
            ("requests", "resident MiB", "open files", "threads"),
            (0, f"{points[0][1]:.1f}", seen.num_fds(), 0),
        ]
        began = time.perf_counter()
        for tenth in range(1, 11):
            await calls.until(asked.requests * tenth // 10, asked.at_once)
            points.append((calls.made, seen.memory_info().rss / MIB))
            rows.append((calls.made, f"{points[-1][1]:.1f}", seen.num_fds(), seen.num_threads()))
        took = time.perf_counter() - began
        print()
        table(*rows)
        (half, at_half), (end, at_end) = points[5], points[10]
        print(
            f"\nmost **{max(size for _, size in points):.0f} MiB** (target 200); from half to end {at_end - at_half:+.1f} MiB,"
            f" {slope(points[5:]):+.1f} MiB per 100,000 requests (least squares over {half}–{end})"
        )
        print(f"offered {calls.made} ({calls.made / took:.0f}/s, {asked.at_once} at once, {asked.tokens} tokens each), accepted"
              f" {calls.accepted + calls.left}, of them left by the caller {calls.left}, refused {calls.refused}")  # fmt: skip


def slope(points: list[tuple[int, float]]) -> float:
    """MiB per 100,000 requests."""
    x, y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    spread = sum((count - x) ** 2 for count, _ in points)
    return 1e5 * sum((count - x) * (size - y) for count, size in points) / spread


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    uvloop.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
