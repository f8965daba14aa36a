"""Warm starts, from `exec` to the first call that can be answered: an inference replica, the fleet, and the whole of `make demo`.

    python -m benchmarks.start

Warm means: weights converted, kernels compiled, database made. The kernel's page cache is as the run before left it.
"""

import argparse
import asyncio
import os
import subprocess
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.processes import Failed, first_line, fleet, process
from benchmarks.record import ROOT, header, spread, table
from services.chassis.channel import open_channel, streaming

TARGETS = {"inference": 5.0, "make demo": 30.0}


async def inference(folder: Path) -> float:
    """Seconds until a replica's health says SERVING."""
    log = folder / "inference.log"
    began = time.perf_counter()
    async with process("services.inference", log=log, environ={"ARGOSY_ANNOUNCE_SECONDS": "0"}) as child:
        async with open_channel(await first_line(child, log)) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="ready"))
            async with streaming(watch) as states:
                while (state := await states.read()).status != health_pb2.HealthCheckResponse.SERVING:
                    if state is grpc.aio.EOF:  # type: ignore[attr-defined]  # the stubs forgot it
                        raise Failed(log.read_text()[-2_000:])
        return time.perf_counter() - began


async def whole_fleet(folder: Path) -> float:
    """Seconds until a fleet says that it answers."""
    began = time.perf_counter()
    async with fleet(folder):
        return time.perf_counter() - began


async def demo(folder: Path) -> float:
    """Seconds that `make demo` takes, from the prompt to the prompt."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("ARGOSY_")}
    began = time.perf_counter()
    done = await asyncio.to_thread(
        subprocess.run, ("make", "demo"), cwd=ROOT, env=own | {"ARGOSY_HOME": str(folder)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Failed(f"make demo: exit {done.returncode}\n{(done.stdout + done.stderr)[-2_000:]}")
    return time.perf_counter() - began


async def measure(asked: argparse.Namespace) -> None:
    """Each start in turn, `repeats` times, after one of each that is not kept."""
    header()
    starts = {"inference": inference, "fleet": whole_fleet} | ({} if asked.no_demo else {"make demo": demo})
    seconds: dict[str, list[float]] = {name: [] for name in starts}
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="argosy-bench-")))
        for repeat in range(-1, asked.repeats):
            for name, start in starts.items():
                taken = await start(folder)
                if repeat >= 0:
                    seconds[name].append(taken)
    print()
    rows = [(name, spread(taken), TARGETS.get(name, "–"), len(taken)) for name, taken in seconds.items()]
    table(("start", "seconds", "target", "runs"), *rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-demo", action="store_true")
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
