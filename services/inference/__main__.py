"""One inference replica as a process: `python -m services.inference`. SIGTERM drains it, a second one hurries."""

import asyncio
import logging
import os
import sys

import uvloop

from services.chassis import settings as environment
from services.chassis.telemetry import Telemetry
from services.inference.server import replica
from services.inference.settings import InferenceSettings

log = logging.getLogger(__name__)


async def serve(settings: InferenceSettings) -> int:
    """Serve until a signal has drained the replica: 0. Where the model cannot be served: 1."""
    telemetry = Telemetry.start("argosy-inference")
    try:
        async with replica(settings, telemetry=telemetry, signals=True) as running:
            print(running.serving.address, flush=True)
            stopped = asyncio.create_task(running.serving.stopped())
            await asyncio.wait({stopped, running.following}, return_when=asyncio.FIRST_COMPLETED)
            if stopped.done():
                return 0
            stopped.cancel()
            return 1
    finally:
        await telemetry.close()


def main() -> int:
    """Exit 0 after a drain, 1 where the model cannot be served, 2 where the environment is not usable."""
    try:
        settings = environment.read(InferenceSettings, os.environ)
    except environment.SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    return uvloop.run(serve(settings))  # 15 % less CPU for the same streamed tokens than asyncio's own loop


if __name__ == "__main__":
    sys.exit(main())
