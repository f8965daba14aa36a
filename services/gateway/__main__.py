"""One gateway as a process: `python -m services.gateway`. SIGTERM drains it, a second one hurries.

Beside a running gateway, with its environment: `… bootstrap` prints the platform's first API key, `… trial ADDRESS` makes a real call.
"""

import argparse
import asyncio
import contextlib
import os
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import uvloop

from services.chassis import settings as environment
from services.chassis.certificates import CertificateRefused
from services.chassis.channel import PlaintextRefused, is_local
from services.chassis.cluster import NoCluster
from services.chassis.telemetry import Telemetry, TelemetrySettings, configure_logs
from services.gateway.server import gateway, secret
from services.gateway.settings import GatewaySettings
from services.gateway.sql_ledger import LedgerSettings
from services.gateway.store import Store, StoreSettings, bootstrap, open_store
from services.gateway.trial import TrialFailed, trial


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
            await stack.enter_async_context(telemetry.prometheus(read.telemetry.metrics_address, _metrics_tls(read)))
        gate = await stack.enter_async_context(gateway(read.gateway, store=read.store, books=read.books, telemetry=telemetry, signals=True))
        print(gate.address, flush=True)
        await gate.serving.stopped()


def _metrics_tls(read: Environment) -> Callable[[], ssl.SSLContext] | None:
    address = read.telemetry.metrics_address
    return None if is_local(address) else read.gateway.inside(address).metrics_tls()


DATABASE_SECONDS = 30.0  # a command waits so long for the database, and for its schema


@contextlib.asynccontextmanager
async def _opened(read: Environment) -> AsyncIterator[Store]:
    """The gateway's store, its schema ready. Raises TimeoutError."""
    async with open_store(read.store, secret("key pepper", read.gateway.key_pepper)) as store:
        async with asyncio.timeout(DATABASE_SECONDS):
            await store.ready.wait()
        yield store


async def _bootstrap(read: Environment, asked: argparse.Namespace) -> int:
    async with _opened(read) as store:
        key = await bootstrap(store, environment=read.gateway.key_environment, another=asked.another)
    if not key:
        print("The platform has a key already, and nobody can tell it again: `bootstrap --another` makes one beside it.", file=sys.stderr)
        return 3
    print(key)
    return 0


async def _trial(read: Environment, asked: argparse.Namespace) -> int:
    async with _opened(read) as store:
        try:
            seen = await trial(store, asked.address, asked.ca, asked.model, read.gateway.key_environment)
        except (TrialFailed, PlaintextRefused, OSError) as error:
            print(error, file=sys.stderr)
            return 1
    print(f"{seen.model} wrote {seen.text!r} ({seen.output_tokens} token)")
    return 0


def _asked(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m services.gateway", description="Without a command: serve.")
    commands = parser.add_subparsers(dest="command")
    first = commands.add_parser("bootstrap", help="print the platform's API key, once; it may create projects and keys")
    first.add_argument("--another", action="store_true", help="make a key beside the one there is, for whoever has lost it")
    real = commands.add_parser("trial", help="make one real call, with a key that ends in ten minutes")
    real.add_argument("address", help="host:port of the gateway")
    real.add_argument("--ca", type=Path, help="PEM of who signed its certificate; without it only this machine is called")
    real.add_argument("--model", default="", help="models/{name}; the first that is listed without it")
    return parser.parse_args(words)


def main(words: Sequence[str] = ()) -> int:
    """Exit 0 after a drain or a command, 1 where a trial fails, 2 where the environment is not usable, 3 where a key was not made."""
    asked = _asked(words)
    try:
        read = environment.read(Environment, os.environ)
    except environment.SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    configure_logs(read.telemetry.log_level)
    if asked.command is None:
        try:
            uvloop.run(serve(read))
        except (CertificateRefused, NoCluster) as refused:
            print(refused, file=sys.stderr)
            return 2
        return 0
    try:
        return uvloop.run((_bootstrap if asked.command == "bootstrap" else _trial)(read, asked))
    except TimeoutError:
        print(f"The database did not answer within {DATABASE_SECONDS:.0f} s.", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
