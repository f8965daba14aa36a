"""`argosy`: the fleet from a terminal.

Tables and live text for people, `--json` for scripts. Exit codes: 0 done, 2 the request is wrong, 3 the key is not good enough, 4 not
found, 5 the fleet cannot be reached or is shedding, 6 a limit or quota, 7 the timeout passed, 1 anything else.
"""

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
from rich.table import Table

from argosy import errors, requests
from argosy.admin.v1 import usage_pb2
from argosy.client import Client, GenerationStream
from argosy.v1 import config_pb2, model_pb2, stream_pb2

app = typer.Typer(no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False, help="Ask a model, and see what it cost.")
keys = typer.Typer(no_args_is_help=True, help="API keys of your project.")
app.add_typer(keys, name="keys")
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

EXIT_CODES: tuple[tuple[type[errors.ArgosyError], int], ...] = (
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
            if model and not client.model:
                client.model = next((each.name for each in client.models()), "")
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


def show_json(message: Message | dict[str, Any]) -> None:
    """One line of JSON in the proto's own JSON form."""
    value = message if isinstance(message, dict) else MessageToDict(message, preserving_proto_field_name=True)
    print(json.dumps(value, ensure_ascii=False))


def _text(argument: str | None) -> str:
    """The argument, or standard input for `-` and for none."""
    return sys.stdin.read() if argument in (None, "-") else argument or ""


def _footer(result: stream_pb2.GenerationResult) -> None:
    usage = result.completed.usage
    model = result.started.model.version
    err.print(f"{model} · {usage.input_tokens} tokens in ({usage.cached_input_tokens} cached), {usage.output_tokens} out", style="dim")


def _stream(stream: GenerationStream) -> str:
    """Print the text as it comes and return it."""
    said: list[str] = []
    with stream:
        if chosen.json:
            for event in stream.events():
                show_json(event)
                if event.WhichOneof("event") == "text":
                    said.append(event.text.text)
            return "".join(said)
        for piece in stream:
            said.append(piece)
            out.print(piece, end="", markup=False, soft_wrap=True)
        out.print()
        _footer(stream.result)
    return "".join(said)


MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="most tokens to write; default: the room left")]
Temperature = Annotated[float | None, typer.Option("--temperature", "-t", help="0 is greedy; default: the model's")]
TopP = Annotated[float | None, typer.Option("--top-p", help="nucleus, above 0 to 1")]
Seed = Annotated[int | None, typer.Option("--seed", help="same seed, same text; default: drawn")]
Stop = Annotated[list[str] | None, typer.Option("--stop", help="end before this text; may be repeated")]
TextArgument = Annotated[str | None, typer.Argument(help="the text; - or nothing reads standard input")]


def _config(
    max_tokens: int | None, temperature: float | None, top_p: float | None = None, seed: int | None = None, stop: list[str] | None = None
) -> config_pb2.GenerationConfig:
    return requests.config(max_output_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop or ())


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


@app.command()
def models() -> None:
    """What this fleet serves."""
    with fleet(model=False) as client:
        found = list(client.models())
    if chosen.json:
        for model in found:
            show_json(model)
        return
    table = Table("model", "context", "can")
    for model in found:
        able = (model_pb2.ModelCapability.Name(each).removeprefix("MODEL_CAPABILITY_").lower() for each in model.capabilities)
        table.add_row(model.name, f"{model.context_tokens:,}", ", ".join(able))
    out.print(table)


@app.command()
def generate(
    prompt: TextArgument = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = None,
) -> None:
    """Continue a text, as it is written."""
    with fleet() as client:
        _stream(client.stream_generate(_text(prompt), config=_config(max_tokens, temperature, top_p, seed, stop)))


@app.command()
def chat(
    message: Annotated[str | None, typer.Argument(help="one message; without it a conversation begins, and Ctrl-D ends it")] = None,
    system: Annotated[str, typer.Option(help="what the assistant should be")] = "",
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    stop: Stop = None,
) -> None:
    """Talk with a model: once with a message, in turns without."""
    history: list[requests.Message] = [("system", system)] if system else []
    config = _config(max_tokens, temperature, top_p, seed, stop)
    with fleet() as client:
        if message is not None:
            _stream(client.stream_chat([*history, ("user", _text(message))], config=config))
            return
        if not chosen.json:
            err.print(f"{client.model} · Ctrl-D ends", style="dim")
        while True:
            try:
                said = input("" if chosen.json else "> ")
            except EOFError:
                return
            if said.strip():
                history.append(("user", said))
                history.append(("assistant", _stream(client.stream_chat(history, config=config)) or " "))


def _show_classes(texts: list[str], reply: Any) -> None:
    if chosen.json:
        show_json(reply)
        return
    for text, result in zip(texts, reply.results, strict=True):
        table = Table("label", "probability", "", title=text if len(text) <= 80 else text[:77] + "…", title_justify="left")
        for score in result.labels:
            table.add_row(score.label, f"{score.probability:.3f}", "█" * round(score.probability * 30))
        out.print(table)


@app.command()
def classify(
    texts: Annotated[list[str] | None, typer.Argument(help="texts; none reads one a line from standard input")] = None,
    label: Annotated[list[str] | None, typer.Option("--label", "-l", help="a label; repeat it. None: the model's own")] = None,
    instruction: Annotated[str, typer.Option(help="what is being judged")] = "",
    multi_label: Annotated[bool, typer.Option("--multi-label", help="judge each label alone")] = False,
    top_k: Annotated[int | None, typer.Option(help="only the best so many")] = None,
) -> None:
    """Labels with probabilities."""
    given = texts or [line for line in sys.stdin.read().splitlines() if line]
    with fleet() as client:
        _show_classes(given, client.classify(given, label or (), instruction=instruction, multi_label=multi_label, top_k=top_k))


@app.command()
def sentiment(texts: Annotated[list[str] | None, typer.Argument(help="texts; none reads one a line from standard input")] = None) -> None:
    """Positive, neutral or negative."""
    given = texts or [line for line in sys.stdin.read().splitlines() if line]
    with fleet() as client:
        _show_classes(given, client.sentiment(given))


@app.command()
def summarize(
    document: TextArgument = None,
    min_length: Annotated[int | None, typer.Option(help="fewest tokens")] = None,
    max_length: Annotated[int | None, typer.Option(help="most tokens")] = 128,
    instruction: Annotated[str, typer.Option(help="for whom, or about what")] = "",
    temperature: Temperature = 0.0,
) -> None:
    """A summary within bounds."""
    with fleet() as client:
        _stream(
            client.stream_summarize(
                _text(document),
                instruction=instruction,
                min_length=min_length,
                max_length=max_length,
                config=requests.config(temperature=temperature),
            )
        )


@app.command()
def translate(
    text: TextArgument = None,
    to: Annotated[str, typer.Option("--to", help="target language, BCP 47")] = "en",
    source: Annotated[str, typer.Option("--from", help="source language, BCP 47; default: detected")] = "",
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
) -> None:
    """A translation."""
    with fleet() as client:
        result = client.translate(_text(text), to, source_language=source, config=_config(max_tokens, temperature))
        if chosen.json:
            show_json(result)
            return
        for output in result.outputs:
            out.print(output.text, markup=False, soft_wrap=True)
        _footer(result)


@app.command()
def answer(
    question: Annotated[str, typer.Argument(help="what you want to know")],
    passage: Annotated[list[str] | None, typer.Option("--passage", "-p", help="text to find it in; none reads standard input")] = None,
    generative: Annotated[bool, typer.Option("--generative", help="in the model's words, not a span")] = False,
    top_k: Annotated[int | None, typer.Option(help="so many spans, 1 to 10")] = None,
    max_tokens: MaxTokens = None,
) -> None:
    """An answer from passages, with where it stands."""
    texts = passage or ([] if generative and sys.stdin.isatty() else [sys.stdin.read()])
    config = requests.config(max_output_tokens=max_tokens) if max_tokens else None
    with fleet() as client:
        reply = client.answer(question, texts, generative=generative, top_k=top_k, config=config)
        if chosen.json:
            show_json(reply)
        elif generative:
            out.print(reply.generation.outputs[0].text, markup=False, soft_wrap=True)
            _footer(reply.generation)
        else:
            table = Table("answer", "probability", "passage", "bytes")
            for found in reply.answers:
                span = found.span
                table.add_row(span.text, f"{found.probability:.3f}", span.source_id, f"{span.start_byte}-{span.end_byte}")
            table.add_row("(no answer)", f"{reply.no_answer_probability:.3f}", "", "")
            out.print(table)


@app.command()
def embed(
    texts: Annotated[list[str] | None, typer.Argument(help="texts; none reads one a line from standard input")] = None,
    dimensions: Annotated[int | None, typer.Option(help="fewer than the model's own, where it was trained for that")] = None,
) -> None:
    """Vectors: as JSON, or their pairwise cosines as a table."""
    given = texts or [line for line in sys.stdin.read().splitlines() if line]
    with fleet() as client:
        reply = client.embed(given, dimensions=dimensions)
    if chosen.json:
        show_json(reply)
        return
    vectors = [list(each.values) for each in reply.embeddings]
    table = Table("cosine", *(str(number + 1) for number in range(len(vectors))), title=f"{len(vectors[0])} dimensions")
    for number, (text, left) in enumerate(zip(given, vectors, strict=True)):
        cosines = (sum(a * b for a, b in zip(left, right, strict=True)) for right in vectors)
        table.add_row(f"{number + 1} {text[:40]}", *(f"{cosine:.3f}" for cosine in cosines))
    out.print(table)


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


def main() -> None:
    """The console script."""
    app()
