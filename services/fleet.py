"""Every service in one process, on real weights with the embedded defaults: `python -m services.fleet`, or `async with fleet(settings)`.

The wire between the services stays real, so deadlines, cancellation and statuses are too; only the engine has a process of its own, as
everywhere. State is kept in one folder: the embedded database, the ledger's journal, and three secrets.
"""

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import uvloop
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from services.chassis import settings as environment
from services.chassis.identity import CallerVerifier
from services.chassis.server import Listener
from services.chassis.telemetry import Telemetry, TelemetrySettings, configure_logs
from services.finetune import server as tuning
from services.finetune.settings import FineTuneSettings
from services.gateway.keys import PEPPER_BYTES
from services.gateway.server import gateway as serve_gateway
from services.gateway.server import signing_key as load_key
from services.gateway.settings import GatewaySettings
from services.gateway.sql_ledger import LedgerSettings
from services.gateway.store import StoreSettings, bootstrap
from services.inference.server import AUDIENCE, DEFAULT_MODEL, replica
from services.inference.servicers.engine import model_name
from services.inference.settings import InferenceSettings
from services.postgres import PostgresFailed, embedded_postgres
from services.pretrained import weights

Progress = Callable[[int, int, str], None]
ADDRESS = "127.0.0.1:8443"
KEYS = ("signing-key.pem", "manifest-key.pem")


def _home() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "argosy"


@dataclass(frozen=True)
class FleetSettings:
    """Where a fleet in one process keeps its state, and how many replicas it runs (`ARGOSY_…`); the services read their own beside it."""

    home: Path = field(default_factory=_home)  # database, journal, datasets, models and secrets
    replicas: int = field(default=1, metadata={"minimum": 1, "maximum": 8})  # of the one model; each is an engine process


@dataclass(frozen=True)
class Running:
    """A fleet that answers."""

    address: str  # of the gateway
    api_key: str  # the platform's: may create projects and keys
    hurry: Callable[[], None] = lambda: None  # cut what a drain still waits for


class FleetFailed(Exception):
    """The fleet cannot start; one sentence says why."""


@asynccontextmanager
async def fleet(
    settings: FleetSettings,
    *,
    gateway: GatewaySettings,
    store: StoreSettings,
    books: LedgerSettings,
    engine: InferenceSettings,
    training: FineTuneSettings,
    progress: Progress | None = None,
    telemetry: Telemetry | None = None,
) -> AsyncIterator[Running]:
    """Start every service and yield once a call can be answered; leaving the block drains.

    Raises:
        FleetFailed: weights, database or engine are not to be had.
    """
    telemetry = telemetry or Telemetry.off()
    secrets = _secrets(settings.home / "secrets")
    try:
        # First and alone: it says what it does, and what it makes every replica reads.
        await asyncio.to_thread(weights.prepare, engine.model, weights.cache_directory(engine.cache_dir), progress)
    except (weights.ModelRefused, weights.ModelUnavailable) as error:
        raise FleetFailed(str(error)) from error
    async with AsyncExitStack() as stack:
        if not store.database_url:
            try:
                url = await stack.enter_async_context(embedded_postgres(settings.home / "postgres"))
            except PostgresFailed as error:
                raise FleetFailed(str(error)) from error
            store = replace(store, database_url=url)
        public = {gateway.caller_signing_kid: load_key(secrets.signing_key).public_key()}
        objects = training.store_url or (settings.home / "objects").as_uri()
        engine = replace(
            engine,
            listener=Listener(),
            store_url=objects,
            manifest_public_keys=(*engine.manifest_public_keys, f"{training.manifest_kid}={secrets.manifest_public_key}"),
        )
        tuner = await stack.enter_async_context(
            tuning.finetune(
                replace(
                    training,
                    listener=Listener(),
                    database_url=training.database_url or store.database_url,
                    store_url=objects,
                    bases=(_base(engine),) if training.bases == FineTuneSettings.bases else training.bases,
                    cache_dir=engine.cache_dir,
                    # A folder of its own: two fleets on one machine would sweep each other's attempts as orphans.
                    jobs=replace(training.jobs, runs_dir=training.jobs.runs_dir or settings.home / "runs"),
                    manifest_key=training.manifest_key or secrets.manifest_key,
                    page_token_key=gateway.page_token_key or secrets.page_token_key,
                ),
                verifier=CallerVerifier(public, tuning.AUDIENCE),
                telemetry=telemetry,
            )
        )
        replicas = [
            await stack.enter_async_context(replica(engine, verifier=CallerVerifier(public, AUDIENCE), telemetry=telemetry))
            for _ in range(settings.replicas)
        ]
        gate = await stack.enter_async_context(
            serve_gateway(
                replace(
                    gateway,
                    inference_addresses=tuple(each.serving.address for each in replicas),
                    finetune_address=tuner.address,
                    caller_signing_key=secrets.signing_key,
                    key_pepper=gateway.key_pepper or secrets.pepper,
                    page_token_key=gateway.page_token_key or secrets.page_token_key,
                ),
                store=store,
                books=books,
                telemetry=telemetry,
                wait=True,
            )
        )
        ready = asyncio.create_task(gate.serving.until_ready())
        await asyncio.wait((ready, *(each.following for each in replicas)), return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            ready.cancel()
            raise FleetFailed("The engine could not start; its own words are in the log above.")
        assert gate.store is not None  # `serve_gateway` opened it
        yield Running(gate.address, await bootstrap(gate.store, settings.home / "secrets" / "platform-key"), gate.serving.hurry)
        await gate.serving.drain(announce_s=0)  # in order, not after an error: streams may finish within the gateway's grace


def _base(engine: InferenceSettings) -> str:
    """What jobs may start from, where nothing else is said: the model that is served, under the name it is served by."""
    served = engine.model_name or (DEFAULT_MODEL if engine.model == "default" else engine.model)
    return f"{model_name(served).removeprefix('models/')}={engine.model}"


@dataclass(frozen=True)
class _Secrets:
    signing_key: Path  # PEM: signs callers
    manifest_key: Path  # PEM: signs what fine-tuning publishes
    manifest_public_key: Path
    pepper: str  # of API keys, hex
    page_token_key: str  # hex


def _secrets(folder: Path) -> _Secrets:
    """What a fleet keeps to itself; made once, for its owner's eyes only."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    pem = {name: Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) for name in KEYS}
    for name, content in (pem | {name: os.urandom(PEPPER_BYTES).hex().encode() for name in ("pepper", "page-token-key")}).items():
        with suppress(FileExistsError), os.fdopen(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
    signing_key, manifest_key = (folder / name for name in KEYS)
    public = folder / "manifest-key.pub.pem"
    public.write_bytes(load_key(manifest_key).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return _Secrets(signing_key, manifest_key, public, (folder / "pepper").read_text(), (folder / "page-token-key").read_text())


def _say(line: str) -> None:
    print(line, flush=True)


def _announce(at: Running, metrics: str, as_json: bool) -> None:
    if as_json:
        _say(json.dumps({"ready": {"address": at.address, "api_key": at.api_key, "metrics": metrics}}))
        return
    _say(f"Argosy answers at {at.address}; Prometheus at http://{metrics}/metrics. Ctrl-C drains it.")
    _say(f"  export ARGOSY_ADDRESS={at.address} ARGOSY_API_KEY={at.api_key}")
    _say("  argosy chat 'Where do ships sleep?'                     # .venv/bin/argosy --help")
    _say('  python -c \'import argosy; print(argosy.Client(model="models/gemma-3-270m").generate("Ships sleep in").outputs[0].text)\'')
    _say(f"  grpcurl -plaintext -H \"authorization: Bearer $ARGOSY_API_KEY\" -d '{{}}' {at.address} argosy.v1.ModelService/ListModels")


class _Bar:
    """Progress of the weights on a terminal, or as JSON lines for the program that started us."""

    def __init__(self, as_json: bool) -> None:
        self._as_json, self._percent = as_json, -1

    def __call__(self, done: int, total: int, what: str) -> None:
        percent = 100 * done // max(total, 1)
        if percent == self._percent:
            return
        self._percent = percent
        if self._as_json:
            _say(json.dumps({"progress": {"done": done, "total": total, "what": what}}))
        elif sys.stdout.isatty():
            ended = "\n" if done >= total else ""
            print(f"\r{what:>10} {'█' * (percent // 4):25} {percent:3} %  {total / 1e6:,.0f} MB", end=ended, flush=True)
        elif percent % 25 == 0:
            _say(f"{what} {percent} %")


@dataclass(frozen=True)
class Environment:
    """Every variable of the process. What gateway and replicas both have, as the address they listen on, is the gateway's."""

    fleet: FleetSettings = field(default_factory=FleetSettings)
    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    store: StoreSettings = field(default_factory=StoreSettings)
    books: LedgerSettings = field(default_factory=LedgerSettings)
    engine: InferenceSettings = field(default_factory=InferenceSettings)
    training: FineTuneSettings = field(default_factory=FineTuneSettings)
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)


async def _run(environ: dict[str, str], as_json: bool) -> None:
    environ.setdefault("ARGOSY_ADDRESS", ADDRESS)
    environ.setdefault("ARGOSY_REFLECTION", "true")  # a laptop's fleet; a release's gateway keeps it off
    read = environment.read(Environment, environ)
    configure_logs(read.telemetry.log_level)
    books = replace(read.books, journal_dir=read.fleet.home / "journal") if "ARGOSY_JOURNAL_DIR" not in environ else read.books
    leave = asyncio.Event()
    hurry: list[Callable[[], None]] = []

    def told() -> None:
        """Leave; told again, at once."""
        for each in hurry if leave.is_set() else ():
            each()
        leave.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told)
    telemetry = Telemetry.start("argosy-fleet")
    async with AsyncExitStack() as stack:
        stack.push_async_callback(telemetry.close)
        metrics = read.telemetry.metrics_address
        if metrics:
            metrics = await stack.enter_async_context(telemetry.prometheus(metrics))
        starting = asyncio.ensure_future(
            stack.enter_async_context(
                fleet(
                    read.fleet,
                    gateway=read.gateway,
                    store=read.store,
                    books=books,
                    engine=read.engine,
                    training=read.training,
                    progress=_Bar(as_json),
                    telemetry=telemetry,
                )
            )
        )
        leaving = asyncio.ensure_future(leave.wait())
        await asyncio.wait((starting, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not starting.done():
            starting.cancel()
            await asyncio.wait((starting,))
            return
        leaving.cancel()
        hurry.append(starting.result().hurry)
        _announce(starting.result(), metrics, as_json)
        await leave.wait()
        if not as_json:
            _say("\nDraining")


def main() -> int:
    """Exit 0 after a drain, 1 where the fleet cannot start, 2 where the environment is not usable."""
    as_json = "--json" in sys.argv[1:]
    environ = dict(os.environ)
    if model := environ.pop("MODEL", ""):
        environ.setdefault("ARGOSY_MODEL", model)
    for name in ("ARGOSY_API_KEY", "ARGOSY_CA", "ARGOSY_DEFAULT_MODEL"):  # the client's, in the same shell
        environ.pop(name, None)
    try:
        uvloop.run(_run(environ, as_json))
    except environment.SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    except (FleetFailed, PostgresFailed, OSError) as error:
        logging.getLogger(__name__).debug("the fleet failed", exc_info=True)
        print(f"argosy: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
