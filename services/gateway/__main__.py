"""One gateway as a process: `python -m services.gateway`. SIGTERM drains it, a second one hurries."""

import contextlib
import os
import sys
from dataclasses import dataclass, field

import uvloop

from services.chassis import settings as environment
from services.chassis.telemetry import Telemetry, TelemetrySettings, configure_logs
from services.gateway.server import gateway
from services.gateway.settings import GatewaySettings
from services.gateway.sql_ledger import LedgerSettings
from services.gateway.store import StoreSettings


@dataclass(frozen=True)
class Environment:
    """Every variable of the process."""

    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    store: StoreSettings = field(default_factory=StoreSettings)
    books: LedgerSettings = field(default_factory=LedgerSettings)
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)


async def serve(read: Environment) -> None:
    """Serve until a signal has drained the gateway."""
    telemetry = Telemetry.start("argosy-gateway")
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(telemetry.close)
        if read.telemetry.metrics_address:
            await stack.enter_async_context(telemetry.prometheus(read.telemetry.metrics_address))
        gate = await stack.enter_async_context(gateway(read.gateway, store=read.store, books=read.books, telemetry=telemetry, signals=True))
        print(gate.address, flush=True)
        await gate.serving.stopped()


def main() -> int:
    """Exit 0 after a drain, 2 where the environment is not usable."""
    try:
        read = environment.read(Environment, os.environ)
    except environment.SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    configure_logs(read.telemetry.log_level)
    uvloop.run(serve(read))
    return 0


if __name__ == "__main__":
    sys.exit(main())
