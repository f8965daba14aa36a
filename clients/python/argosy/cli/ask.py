"""Ask a model: text, dialogues and the typed tasks."""

import sys
from typing import Annotated, Any

import typer
from rich.table import Table

from argosy import requests
from argosy.cli.session import app, chosen, err, fleet, out, show_json
from argosy.client import GenerationStream
from argosy.v1 import config_pb2, stream_pb2


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
