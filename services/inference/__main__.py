"""One inference replica as a process: `python -m services.inference`. SIGTERM drains it, a second one hurries."""

import asyncio
import logging
import os
import sys

from services.chassis import settings as environment
from services.chassis.telemetry import Telemetry
from services.inference.server import replica
from services.inference.settings import InferenceSettings

log = logging.getLogger(__name__)


async def serve(settings: InferenceSettings) -> None:
    """Serve until a signal has drained the replica."""
    telemetry = Telemetry.start("argosy-inference")
    try:
        async with replica(settings, telemetry=telemetry, signals=True) as serving:
            print(serving.address, flush=True)
            await serving.stopped()
    finally:
        await telemetry.close()


def main() -> int:
    """Exit 0 after a drain, 2 where the environment is not usable."""
    try:
        settings = environment.read(InferenceSettings, os.environ)
    except environment.SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    asyncio.run(serve(settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
