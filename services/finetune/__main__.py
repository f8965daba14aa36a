"""The fine-tuning service as a process: `python -m services.finetune`. SIGTERM drains it, a second one hurries."""

import contextlib
import os
import sys
from dataclasses import dataclass, field

import uvloop

from services.chassis import settings as environment
from services.chassis.certificates import CertificateRefused
from services.chassis.telemetry import Telemetry, TelemetrySettings, configure_logs
from services.finetune.server import finetune
from services.finetune.settings import FineTuneSettings


@dataclass(frozen=True)
class Environment:
    """Every variable of the process."""

    finetune: FineTuneSettings = field(default_factory=FineTuneSettings)
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)


async def serve(read: Environment) -> None:
    """Serve until a signal has drained the service."""
    telemetry = Telemetry.start("argosy-finetune")
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(telemetry.close)
        if read.telemetry.metrics_address:
            await stack.enter_async_context(telemetry.prometheus(read.telemetry.metrics_address, read.finetune.listener.metrics_tls()))
        running = await stack.enter_async_context(finetune(read.finetune, telemetry=telemetry, signals=True))
        print(running.address, flush=True)
        await running.serving.stopped()


def main() -> int:
    """Exit 0 after a drain, 2 where the environment is not usable."""
    try:
        read = environment.read(Environment, os.environ)
    except environment.SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    configure_logs(read.telemetry.log_level)
    try:
        uvloop.run(serve(read))
    except CertificateRefused as refused:
        print(refused, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
