"""What every command shares: the options before it, a client, one sentence for each failure, and JSON for scripts."""

import json
import os
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from rich.console import Console
from typer.core import TyperGroup

from argosy import errors, names
from argosy.client import Client


class Root(TyperGroup):
    """Takes `--json` anywhere in the line, as people type it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Move the option to where it is declared; what follows `--` is text."""
        end = args.index("--") if "--" in args else len(args)
        if "--json" in args[:end]:
            args = ["--json", *(each for at, each in enumerate(args) if each != "--json" or at >= end)]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=Root, no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, help="Ask a model, tune one, and see what it cost."
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

EXIT_CODES: tuple[tuple[type[errors.ArgosyError], int], ...] = (
    (errors.JobFailed, 8),
    (errors.EvaluationNotPassed, 8),
    (errors.InvalidArgument, 2),
    (errors.FailedPrecondition, 2),
    (errors.Unauthenticated, 3),
    (errors.PermissionDenied, 3),
    (errors.NotFound, 4),
    (errors.Unavailable, 5),
    (errors.ResourceExhausted, 6),
    (errors.DeadlineExceeded, 7),
)


@dataclass
class Chosen:
    """What the options before the command, the environment and the login file say, in that order."""

    address: str | None = None
    api_key: str | None = None
    ca: Path | None = None
    model: str = ""
    json: bool = False


chosen = Chosen()


def login_file() -> Path:
    """Where `argosy login` keeps address and key, readable by its owner only."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "argosy" / "login.toml"


@app.callback()
def options(
    address: Annotated[str | None, typer.Option(envvar="ARGOSY_ADDRESS", help="host:port of the gateway")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="ARGOSY_API_KEY", help="an API key", show_envvar=True)] = None,
    ca: Annotated[Path | None, typer.Option(envvar="ARGOSY_CA", help="PEM file of the authority that signed the gateway")] = None,
    model: Annotated[str, typer.Option("--model", "-m", envvar="ARGOSY_DEFAULT_MODEL", help="a model; default: the first one served")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line, nothing else")] = False,
) -> None:
    """Options of every command."""
    saved: dict[str, str] = tomllib.loads(login_file().read_text()) if login_file().is_file() else {}
    chosen.address = address or saved.get("address")
    chosen.api_key = api_key or saved.get("api_key")
    chosen.ca = ca or (Path(saved["ca"]) if saved.get("ca") else None)
    chosen.model, chosen.json = model, as_json


@contextmanager
def fleet(*, model: bool = True) -> Iterator[Client]:
    """A client; any failure becomes one sentence on stderr and an exit code."""
    try:
        with Client(chosen.address, chosen.api_key, ca=chosen.ca, model=chosen.model) as client:
            if model:
                client.model = served(client, client.model)
            yield client
    except errors.ArgosyError as error:
        sentence = str(error)
        if isinstance(error, errors.Unavailable) and not error.reason:
            sentence = f"No fleet answers at {chosen.address or '127.0.0.1:8443'}. Start one with `make fleet`, or name yours: argosy login"
        elif isinstance(error, errors.Unauthenticated) and not chosen.api_key:
            sentence = "No API key: give one with --api-key or ARGOSY_API_KEY, or run argosy login"
        if chosen.json:
            print(
                json.dumps({"error": {"code": error.code.name, "reason": error.reason, "message": sentence, "field": error.field}}),
                file=sys.stderr,
            )
        else:
            err.print(f"[red]argosy:[/red] {sentence}", markup=True)
        raise typer.Exit(next((code for kind, code in EXIT_CODES if isinstance(error, kind)), 1)) from None
    except ValueError as error:
        err.print(f"argosy: {error}", markup=False)
        raise typer.Exit(2) from None


def served(client: Client, name: str) -> str:
    """The full name of a model: `news` and `news/3` are the project's own if it has one, else a base; nothing is the first one served."""
    if "/" in name and not name.rpartition("/")[2].isdigit():
        return name
    if name.startswith("projects/"):
        return names.version("", "models", name)
    model, _, version = name.partition("/")
    found = [each.name for each in client.models()]
    if not name:
        return next(iter(found), "")
    alike = [each for each in found if names.last(each) == model]
    whole = max(alike, default=names.base(model), key=lambda each: each.startswith("projects/"))
    return f"{whole}/versions/{version}" if version else whole


def show_json(message: Message | dict[str, Any]) -> None:
    """One line of JSON in the proto's own JSON form."""
    value = message if isinstance(message, dict) else MessageToDict(message, preserving_proto_field_name=True)
    print(json.dumps(value, ensure_ascii=False))


def show_messages(**named: Message) -> None:
    """Messages of several kinds on one line of JSON, each under its name."""
    show_json({name: MessageToDict(message, preserving_proto_field_name=True) for name, message in named.items()})
