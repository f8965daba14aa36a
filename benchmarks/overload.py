"""Goodput under a load of five and ten times what can be served, in an open loop with deadlines, and the way back.

    python -m benchmarks.overload

A gateway process with its PostgreSQL stands before a fake engine of known capacity: its streams share so many tokens a second, and none
gets more than one stream alone would. What it can serve is measured first, in a closed loop of four times as many streams as fill it. Then
calls arrive at random moments that do not depend on the answers, each with the same deadline, and nobody tries again. A call is good if
it ended OK within its deadline, counted from the moment it was due. Back: after the overload, no later call is refused or late.
"""

import argparse
import asyncio
import random
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import psutil
import uvloop

from argosy.v1 import generation_pb2
from benchmarks.processes import Door, first_line, gateway, process
from benchmarks.record import header, percentile, spread, table
from services.chassis.channel import ENGINE
from tests.fakes.edge import chat
from tests.fakes.engine import fake_engine

STREAM_CHAT = "/argosy.v1.GenerationService/StreamChat"
EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # the stubs forgot it
CHANNELS = 16  # a connection carries 100 calls; the rest would queue in this process, unseen by the gateway
TICK_SECONDS = 0.01
SETTLE = 0.8  # of capacity, before and after


async def serve_engine(asked: argparse.Namespace) -> None:
    """The engine's process: `rate` tokens a second between all, `alone` for one, and load reports as a real one makes them."""
    gate = asyncio.Semaphore(0)
    says, alone_s = [" token"] * asked.tokens, 1 / asked.alone
    async with fake_engine(says, token_s=alone_s, gate=gate, coalesce=8, keep=False) as fake:
        print(fake.address, flush=True)
        loop = asyncio.get_running_loop()
        at, allowed, reported, counted = loop.time(), 0.0, loop.time(), 0
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = loop.time()
            allowed, at = allowed + asked.rate * (now - at), now
            if gate.locked():  # all that was allowed is taken; what nobody wanted is not saved up
                for _ in range(int(allowed)):
                    gate.release()
                allowed -= int(allowed)
            else:
                allowed = 0.0
            if now - reported >= 0.1:
                spent, fake.load.batch = fake.output_tokens - counted, len(fake.running)
                if spent and fake.running:
                    fake.load.decode_tokens_per_second = spent / (now - reported)
                    fake.load.step_time.FromNanoseconds(round(1e9 * max(alone_s, len(fake.running) / asked.rate)))
                fake.load.running_tokens = sum(asked.tokens - each.output_tokens for each in fake.running.values())
                reported, counted = now, fake.output_tokens


@dataclass
class Ended:
    """One call: moments in seconds of the monotonic clock."""

    due: float
    at: float
    code: grpc.StatusCode


@dataclass
class Phase:
    """A stretch of one load."""

    load: float  # times capacity
    began: float = 0.0
    ended: float = 0.0
    cpu_s: float = 0.0  # of the gateway
    lag_s: float = 0.0  # of this process behind its own schedule
    running: "list[asyncio.Task[Ended]]" = field(default_factory=list)
    calls: list[Ended] = field(default_factory=list)  # all of them, once they have ended

    def good(self) -> list[Ended]:
        """Those that ended well."""
        return [call for call in self.calls if call.code is grpc.StatusCode.OK]

    def late(self) -> list[Ended]:
        """Those that were taken and not finished in time."""
        return [call for call in self.calls if call.code is grpc.StatusCode.DEADLINE_EXCEEDED]

    def refused(self) -> list[Ended]:
        """The others."""
        return [call for call in self.calls if call.code not in (grpc.StatusCode.OK, grpc.StatusCode.DEADLINE_EXCEEDED)]

    def goodput(self, settled_s: float) -> float:
        """Good calls a second, of those that were due after the first `settled_s`: by then queues are as this load makes them."""
        return sum(call.due >= self.began + settled_s for call in self.good()) / (self.ended - self.began - settled_s)

    def back_s(self) -> float:
        """Seconds from the beginning until the last call was due that did not end well."""
        return max((call.due - self.began for call in self.calls if call.code is not grpc.StatusCode.OK), default=0.0)


class Callers:
    """As many as there are calls, over a few connections."""

    def __init__(self, channels: Sequence[grpc.aio.Channel], door: Door, deadline_s: float) -> None:
        serialize = generation_pb2.ChatRequest.SerializeToString
        self._calls = [channel.unary_stream(STREAM_CHAT, request_serializer=serialize, response_deserializer=None) for channel in channels]
        self._metadata = (("authorization", f"Bearer {door.api_key}"),)
        self._deadline_s = deadline_s
        self._gateway = psutil.Process(door.pid)
        self._made = 0

    async def one(self, due: float) -> Ended:
        """A call that was due then."""
        self._made += 1
        left = max(0.001, due + self._deadline_s - time.monotonic())
        call = self._calls[self._made % len(self._calls)](chat("Where do ships sleep?"), metadata=self._metadata, timeout=left)
        try:
            while await call.read() is not EOF:
                pass
        except grpc.aio.AioRpcError:
            pass  # its code is asked for next
        return Ended(due, time.monotonic(), await call.code())

    async def closed(self, streams: int, seconds: float) -> float:
        """Good calls a second with so many open at any time."""
        began = time.monotonic()

        async def caller() -> int:
            good = 0
            while (due := time.monotonic()) < began + seconds:
                good += (await self.one(due)).code is grpc.StatusCode.OK
            return good

        good = sum(await asyncio.gather(*(caller() for _ in range(streams))))
        return good / (time.monotonic() - began)

    async def open(self, load: float, per_second: float, seconds: float, chance: random.Random) -> Phase:
        """Calls at random moments, `per_second` on average. Those still open at its end are the next phase's burden, as they would be."""
        phase = Phase(load, began=time.monotonic())
        spent = sum(self._gateway.cpu_times()[:2])
        due = phase.began
        while (due := due + chance.expovariate(per_second)) < phase.began + seconds:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            phase.lag_s = max(phase.lag_s, time.monotonic() - due)
            phase.running.append(asyncio.create_task(self.one(due)))
        await asyncio.sleep(max(0.0, phase.began + seconds - time.monotonic()))
        phase.ended = phase.began + seconds
        phase.cpu_s = sum(self._gateway.cpu_times()[:2]) - spent
        return phase


@asynccontextmanager
async def callers(asked: argparse.Namespace) -> AsyncIterator[Callers]:
    """Engine, gateway and connections."""
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="argosy-bench-")))
        log = folder / "engine.log"
        script = ("--engine", "--rate", str(asked.rate), "--alone", str(asked.alone), "--tokens", str(asked.tokens))
        engine = await stack.enter_async_context(process("benchmarks.overload", *script, log=log))
        address = await first_line(engine, log)
        door = await stack.enter_async_context(gateway(folder, [address]))
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(door.address, options=[*ENGINE.items()])) for _ in range(CHANNELS)
        ]
        for channel in channels:
            await channel.channel_ready()
        yield Callers(channels, door, asked.deadline)


async def measure(asked: argparse.Namespace) -> None:
    """Up and back, `repeats` times."""
    header()
    print(
        f"- fake engine: {asked.rate} tokens/s together, {asked.alone} alone, {asked.tokens} a call; deadline {asked.deadline} s;"
        f" gateway with PostgreSQL, fsync on",
        flush=True,
    )
    chance = random.Random(7)
    ratios: dict[float, list[float]] = {load: [] for load in asked.loads}
    backs: list[float] = []
    async with callers(asked) as calling:
        enough = 4 * round(asked.rate / asked.alone)  # streams: the engine never waits for a caller
        await calling.closed(enough, 1.0)
        for _ in range(asked.repeats):
            capacity = await calling.closed(enough, asked.seconds / 2)
            phases = [await calling.open(load, load * capacity, asked.seconds, chance) for load in (SETTLE, 1.0, *asked.loads, SETTLE)]
            for phase in phases:
                phase.calls = list(await asyncio.gather(*phase.running))
            for phase in phases[2:-1]:
                ratios[phase.load].append(phase.goodput(asked.deadline) / phases[1].goodput(asked.deadline))
            backs.append(phases[-1].back_s())
            report(capacity, phases, asked.deadline)
    print()
    for load, found in ratios.items():
        print(f"goodput at {load:g}× / at 1×: **{spread(found, '.3f')}** (target {0.95 if load <= 5 else 0.9})")
    print(f"back after **{spread(backs, '.1f')}** s (target 5)")


def report(capacity: float, phases: Sequence[Phase], settled_s: float) -> None:
    """One table of one way up and back."""
    rows: list[Sequence[object]] = [
        (f"capacity {capacity:.1f}/s", "offered", "accepted, good", "accepted, late", "refused", "goodput/s", "good p50/p99 s",
         "refused p50/p99 ms", "gateway CPU ms a call", "own lag ms"),
    ]  # fmt: skip
    for phase in phases:
        good, refused = ([call.at - call.due for call in calls] for calls in (phase.good(), phase.refused()))
        took = f"{percentile(good, 0.5):.2f}/{percentile(good, 0.99):.2f}" if good else "–"
        told = f"{1e3 * percentile(refused, 0.5):.0f}/{1e3 * percentile(refused, 0.99):.0f}" if refused else "–"
        rows.append(
            (f"{phase.load:g}×", len(phase.calls), len(good), len(phase.late()), len(refused), f"{phase.goodput(settled_s):.1f}", took,
             told, f"{1e3 * phase.cpu_s / len(phase.calls):.2f}", f"{1e3 * phase.lag_s:.0f}")
        )  # fmt: skip
    print()
    table(*rows)
    odd = {call.code.name for phase in phases for call in phase.refused()} - {"RESOURCE_EXHAUSTED", "UNAVAILABLE"}
    if odd:
        print(f"refused with {', '.join(sorted(odd))}")


def main() -> None:
    """Measure and print, or be the engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", action="store_true", help="be the fake engine")
    parser.add_argument("--rate", type=float, default=800.0, help="tokens a second of the engine")
    parser.add_argument("--alone", type=float, default=100.0, help="tokens a second of one stream by itself")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--deadline", type=float, default=3.0, help="seconds of each call")
    parser.add_argument("--loads", type=float, nargs="+", default=[5.0, 10.0], help="times capacity")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each phase; more than the deadline")
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    uvloop.run(serve_engine(asked) if asked.engine else measure(asked))


if __name__ == "__main__":
    main()
