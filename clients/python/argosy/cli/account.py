"""Who is calling: login, keys, usage."""

import json
import os
from pathlib import Path
from typing import Annotated

import typer
from google.protobuf.json_format import MessageToDict
from rich.table import Table

from argosy.admin.v1 import usage_pb2
from argosy.cli.session import app, chosen, err, fleet, login_file, out, show_json
from argosy.client import Client

keys = typer.Typer(no_args_is_help=True, help="API keys of your project.")
app.add_typer(keys, name="keys")


@app.command()
def login(
    address: Annotated[str, typer.Option(prompt=True, help="host:port of the gateway")] = "127.0.0.1:8443",
    api_key: Annotated[str, typer.Option(prompt=True, hide_input=True, help="an API key")] = "",
    ca: Annotated[Path | None, typer.Option(help="PEM file of the authority that signed the gateway")] = None,
) -> None:
    """Check an address and a key, and keep them for later calls."""
    chosen.address, chosen.api_key, chosen.ca = address, api_key, ca
    with fleet(model=False) as client:
        caller = client.caller()
    path = login_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = {"address": address, "api_key": api_key} | ({"ca": str(ca.resolve())} if ca else {})
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.writelines(f"{name} = {json.dumps(value)}\n" for name, value in saved.items())
    if chosen.json:
        show_json(caller)
    else:
        out.print(f"Logged in to {address} as {caller.project} with {', '.join(sorted(caller.scopes))}", markup=False)


def _project(client: Client, name: str | None) -> str:
    return name or client.caller().project


ProjectOption = Annotated[str | None, typer.Option("--project", help="projects/NAME; default: the key's own")]


@keys.command("list")
def keys_list(project: ProjectOption = None) -> None:
    """The keys of a project; never a secret."""
    with fleet(model=False) as client:
        found = list(client.keys(_project(client, project)))
    if chosen.json:
        for key in found:
            show_json(key)
        return
    table = Table("name", "state", "scopes", "display name", "created")
    for key in found:
        row = MessageToDict(key, preserving_proto_field_name=True)
        table.add_row(
            key.name, str(row.get("state", "")).removeprefix("STATE_"), ", ".join(key.scopes), key.display_name, row.get("create_time", "")
        )
    out.print(table)


@keys.command("create")
def keys_create(
    scope: Annotated[list[str] | None, typer.Option("--scope", "-s", help="repeat it; default: generate, models.read")] = None,
    display_name: Annotated[str, typer.Option(help="to tell it from others")] = "",
    days: Annotated[float | None, typer.Option(help="valid so long; default: until deleted")] = None,
    project: ProjectOption = None,
) -> None:
    """A new key. Its secret is shown now and never again."""
    with fleet(model=False) as client:
        reply = client.create_key(
            _project(client, project),
            scope or ["generate", "models.read"],
            display_name=display_name,
            ttl_s=days * 86_400 if days else None,
        )
    if chosen.json:
        show_json(reply)
    else:
        out.print(reply.secret, markup=False, soft_wrap=True)
        err.print(f"{reply.api_key.name}: keep it, it is shown only once", style="dim")


@keys.command("delete")
def keys_delete(name: Annotated[str, typer.Argument(help="projects/P/apiKeys/K")]) -> None:
    """Revoke a key."""
    with fleet(model=False) as client:
        client.delete_key(name)
    if chosen.json:
        show_json({"deleted": name})
    else:
        out.print(f"{name} is revoked", markup=False)


@app.command()
def usage(
    request_id: Annotated[str | None, typer.Option("--request", help="of one request only")] = None, project: ProjectOption = None
) -> None:
    """What a project used."""
    with fleet(model=False) as client:
        name = _project(client, project)
        if request_id:
            show_json(client.request_usage(name, request_id))
            return
        found = list(client.usage(name, group_by=[usage_pb2.USAGE_GROUP_MODEL, usage_pb2.USAGE_GROUP_METHOD]))
    if chosen.json:
        for each in found:
            show_json(each)
        return
    table = Table("model", "method", "requests", "tokens in", "cached", "tokens out", "cost", title=name, title_justify="left")
    for each in found:
        seen = each.usage
        cost = f"{seen.cost.nanos / 1e9:.6f} {seen.cost.currency_code}"
        counts = (each.requests, seen.input_tokens, seen.cached_input_tokens, seen.output_tokens)
        table.add_row(each.model, each.method.rpartition("/")[2], *(f"{count:,}" for count in counts), cost)
    out.print(table)
