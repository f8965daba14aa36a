"""What the gateway costs: relayed tokens a second, added latency, and memory over many requests.

Three processes: a fake engine, a gateway with books in memory that forget, and this client, which reads events unopened. Direct and relayed
runs alternate, so that a noisy machine disturbs both alike.

    python -m benchmarks.relay                      # throughput and latency
    python -m benchmarks.relay --requests 100000    # and the gateway's memory over so many
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import psutil
import uvloop

from argosy.v1 import generation_pb2
from argosy_internal.engine.v1 import engine_pb2
from services.chassis.channel import ENGINE
from services.gateway.ledger import Reservation, Settlement
from services.gateway.replicas import GENERATE
from tests.fakes.edge import chat, edge, metadata

STREAM_CHAT = "/argosy.v1.GenerationService/StreamChat"
Call = Any  # a multi-callable and what to call it with


class Forgetful:
    """A ledger that keeps nothing: its own memory must not show."""

    async def reserve(self, reservation: Reservation) -> None:
        """Allow."""

    async def settle(self, settlement: Settlement) -> None:
        """Forget."""


@asynccontextmanager
async def process(*arguments: str) -> AsyncIterator[tuple[str, int]]:
    """A child that prints its address first; yields that and its process id."""
    child = await asyncio.create_subprocess_exec(sys.executable, "-m", *arguments, stdout=asyncio.subprocess.PIPE)
    assert child.stdout is not None
    try:
        yield (await child.stdout.readline()).decode().strip(), child.pid
    finally:
        child.terminate()
        await child.wait()


async def serve_gateway(engine: str) -> None:
    """The gateway's process."""
    async with edge(addresses=(engine,), ledger=Forgetful(), reachable=1, streams_per_replica=1_024) as at:
        print(at.gate.address, flush=True)
        await asyncio.Event().wait()


async def one(call: Call) -> tuple[float, float]:
    """Run a stream to its end; seconds to the first event that holds text, and to the last."""
    began = time.perf_counter()
    stream = call[0](call[1], metadata=call[2], timeout=120)
    await stream.read()  # Started
    await stream.read()
    first = time.perf_counter() - began
    while await stream.read() is not grpc.aio.EOF:  # type: ignore[attr-defined]
        pass
    if await stream.code() is not grpc.StatusCode.OK:
        raise RuntimeError(await stream.details())
    return first, time.perf_counter() - began


async def throughput(call: Call, streams: int, tokens: int, rounds: int) -> float:
    """Tokens a second over `streams` at once."""
    began = time.perf_counter()
    for _ in range(rounds):
        await asyncio.gather(*(one(call) for _ in range(streams)))
    return streams * tokens * rounds / (time.perf_counter() - began)


def calls(channel: grpc.aio.Channel, engine: grpc.aio.Channel) -> dict[str, Call]:
    """The same answer, relayed and direct."""
    asked = chat("one two three four")
    inner = engine_pb2.GenerateRequest(generation_id="g", request_id="r", chat=asked)
    chat_bytes = generation_pb2.ChatRequest.SerializeToString
    return {
        "relayed": (channel.unary_stream(STREAM_CHAT, request_serializer=chat_bytes, response_deserializer=None), asked, metadata()),
        "direct": (
            engine.unary_stream(GENERATE, request_serializer=engine_pb2.GenerateRequest.SerializeToString, response_deserializer=None),
            inner,
            (),
        ),
    }


def percentile(values: list[float], share: float) -> float:
    """Of sorted or unsorted values."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run."""
    result: dict[str, Any] = {
        "python": platform.python_version(),
        "grpcio": grpc.__version__,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "streams": asked.streams,
        "tokens_per_stream": asked.tokens,
        "tokens_per_event": asked.coalesce,
    }
    async with contextlib.AsyncExitStack() as stack:
        engine, _ = await stack.enter_async_context(
            process("tests.fakes.engine", "--tokens", str(asked.tokens), "--coalesce", str(asked.coalesce))
        )
        gate, gate_pid = await stack.enter_async_context(process("benchmarks.relay", "--gateway", engine))
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(gate, options=[*ENGINE.items()]))
        direct = await stack.enter_async_context(grpc.aio.insecure_channel(engine, options=[*ENGINE.items()]))
        both = calls(channel, direct)
        gateway = psutil.Process(gate_pid)
        for call in both.values():
            await throughput(call, asked.streams, asked.tokens, 1)
        rates: dict[str, list[float]] = {"relayed": [], "direct": []}
        for _ in range(asked.runs):
            for name, call in both.items():
                spent = sum(gateway.cpu_times()[:2])
                rates[name].append(await throughput(call, asked.streams, asked.tokens, asked.rounds))
                if name == "relayed":
                    used = sum(gateway.cpu_times()[:2]) - spent
                    result.setdefault("tokens_per_gateway_cpu_second", []).append(
                        round(asked.streams * asked.tokens * asked.rounds / max(used, 0.01))
                    )
        result["tokens_per_second"] = {name: round(statistics.median(values)) for name, values in rates.items()}
        first: dict[str, list[float]] = {"relayed": [], "direct": []}
        for _ in range(asked.latencies):
            for name, call in both.items():
                first[name].append((await one(call))[0] * 1e3)
        result["first_text_ms"] = {
            name: {"p50": round(statistics.median(v), 3), "p99": round(percentile(v, 0.99), 3)} for name, v in first.items()
        }
        result["added_ms"] = {
            share: round(result["first_text_ms"]["relayed"][share] - result["first_text_ms"]["direct"][share], 3)
            for share in ("p50", "p99")
        }
        if asked.requests:
            result["memory_mib"] = await memory(both["relayed"], gateway, asked.requests)
    return result


async def memory(call: Call, gateway: psutil.Process, requests: int) -> dict[str, float]:
    """The gateway's resident memory in MiB: at a tenth, at half, and at the end of `requests`; and how many of these failed."""
    seen: dict[str, float] = {"failed_requests": 0.0}
    done = 0
    for name, share in (("tenth", 0.1), ("half", 0.5), ("end", 1.0)):
        while done < share * requests:
            outcomes = await asyncio.gather(*(one(call) for _ in range(50)), return_exceptions=True)
            seen["failed_requests"] += sum(isinstance(outcome, BaseException) for outcome in outcomes)
            done += 50
        seen[name] = round(gateway.memory_info().rss / 2**20, 1)
    return seen


def main() -> None:
    """Measure and print, or be the gateway."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gateway", metavar="ENGINE", help="be the gateway before this engine")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--coalesce", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--latencies", type=int, default=300)
    parser.add_argument("--requests", type=int, default=0)
    asked = parser.parse_args()
    if asked.gateway:
        with contextlib.suppress(KeyboardInterrupt):
            uvloop.run(serve_gateway(asked.gateway))  # as services.gateway does
    else:
        print(json.dumps(asyncio.run(measure(asked)), indent=2))


if __name__ == "__main__":
    main()
