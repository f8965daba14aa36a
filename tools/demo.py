"""`make demo`: start the fleet on real weights and show its main job, each line a real call through the gateway.

Exits 0 when every call was answered and the books agree with what the calls said they cost.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from argosy import Client, GenerationStream, config
from argosy.errors import AlreadyExists, ArgosyError
from argosy.v1 import finetune_pb2, stream_pb2, usage_pb2
from services.fleet import FleetSettings

Reply = TypeVar("Reply")
STOP_SECONDS = 60.0
PROJECT = "demo"
CATEGORIES = ("科技", "政治", "体育", "财经", "娱乐", "教育")
HEADLINE = "新款折叠屏手机搭载自研芯片，电池续航提升三成"
REVIEW = "The hotel was spotless, the staff kind, and the breakfast the best I have had in years."
STORY = "Once upon a time, in a harbour town at the edge of the sea, there lived a"
ARTICLE = (
    "The city council voted on Tuesday to turn the old ferry terminal into a public library. Work starts in spring and should take two"
    " years. The building has stood empty since 2009, when the last ferry to the islands was replaced by a bridge. Residents had asked for"
    " a library on the north shore for decades; the nearest one is forty minutes away by bus."
)
PASSAGE = "The Eiffel Tower was completed in 1889 for the World's Fair and is 330 metres tall. It stands in Paris, on the Champ de Mars."
QUESTION = "When was the Eiffel Tower completed?"
PAIR = ("A cat sleeps on the sofa.", "A kitten naps on the couch.")
SENTENCES = Path(__file__).parents[1] / "examples" / "data" / "sentences.tsv"
UNSEEN = ("新一代量子芯片在低温实验室完成首次测试", "The goalkeeper saved two penalties in the final minutes")
SCOPES = (
    *("generate", "explain", "usage.read", "models.read", "models.write"),
    *("datasets.read", "datasets.write", "finetune.read", "finetune.write"),
)

out = Console(highlight=False)


@dataclass
class Measured:
    """One call: seconds on this side of the wire, and what it was billed."""

    name: str
    usage: usage_pb2.Usage
    latency_s: float
    first_s: float | None = None  # to the first text; None: not a stream

    @property
    def rate(self) -> float | None:
        """Output tokens a second after the first."""
        if self.first_s is None or self.usage.output_tokens < 2 or self.latency_s <= self.first_s:
            return None
        return (self.usage.output_tokens - 1) / (self.latency_s - self.first_s)


@dataclass
class Show:
    """Runs the calls in turn, prints what they say and keeps what they cost."""

    client: Client
    rows: list[Measured] = field(default_factory=list)

    def title(self, text: str) -> None:
        """What the next lines are."""
        out.print(f"\n[bold cyan]{escape(text)}[/]")

    def stream(self, name: str, stream: GenerationStream) -> str:
        """Print a stream as it comes."""
        began, first = time.perf_counter(), None
        with stream:
            for piece in stream:
                first = first or time.perf_counter()
                out.print(piece, end="", markup=False, soft_wrap=True)
            ended = time.perf_counter()
        out.print()
        result = stream.result
        self.rows.append(Measured(name, result.completed.usage, ended - began, first and first - began))
        return result.outputs[0].text

    def unary(self, name: str, call: Callable[[], Reply], usage: Callable[[Reply], usage_pb2.Usage]) -> Reply:
        """Make a call and keep its time and cost."""
        began = time.perf_counter()
        reply = call()
        self.rows.append(Measured(name, usage(reply), time.perf_counter() - began))
        return reply


def chat(show: Show) -> None:
    """Two turns, streamed."""
    show.title("A chat of two turns (StreamChat)")
    messages = [("user", "What is the capital of France?")]
    for follow_up in ("And which river runs through it?", None):
        out.print(f"[green]user[/]       {escape(messages[-1][1])}\n[green]assistant[/]  ", end="")
        said = show.stream("StreamChat", show.client.stream_chat(messages, config=config(temperature=0, max_output_tokens=24)))
        if follow_up:
            messages += [("assistant", said or " "), ("user", follow_up)]


def story(show: Show) -> None:
    """A sampled story, streamed."""
    show.title("A story (StreamGenerateText, seed 7)")
    out.print(STORY, end="", style="dim")
    show.stream("StreamGenerateText", show.client.stream_generate(STORY, config=config(temperature=0.8, seed=7, max_output_tokens=64)))


def labels(show: Show) -> None:
    """A headline's category and a review's sentiment."""
    show.title("A headline into categories (ClassifyText)")
    out.print(HEADLINE)
    reply = show.unary("ClassifyText", lambda: show.client.classify(HEADLINE, CATEGORIES), lambda reply: reply.usage)
    out.print("  " + "   ".join(f"{score.label} {score.probability:.3f}" for score in reply.results[0].labels))
    show.title("A review's sentiment (ClassifyText, preset)")
    out.print(REVIEW)
    reply = show.unary("ClassifyText sentiment", lambda: show.client.sentiment(REVIEW), lambda reply: reply.usage)
    out.print("  " + "   ".join(f"{score.label} {score.probability:.3f}" for score in reply.results[0].labels))


def summary(show: Show) -> None:
    """A summary of 12 to 40 tokens."""
    show.title("A summary of 12 to 40 tokens (StreamSummarizeText)")
    stream = show.client.stream_summarize(ARTICLE, min_length=12, max_length=40, config=config(temperature=0))
    show.stream("StreamSummarizeText", stream)


def translation(show: Show) -> None:
    """English to French."""
    show.title("English to French (TranslateText)")
    text = "Good morning, the ship is in the harbour."
    result: stream_pb2.GenerationResult = show.unary(
        "TranslateText",
        lambda: show.client.translate(text, "fr", source_language="en", config=config(temperature=0, max_output_tokens=32)),
        lambda reply: reply.completed.usage,
    )
    out.print(f"{text}\n  {escape(result.outputs[0].text.strip())}")


def answer(show: Show) -> None:
    """A question answered by a span."""
    show.title("A question answered by a span of the passage (AnswerQuestion)")
    out.print(f"{PASSAGE}\n[green]{QUESTION}[/]")
    reply = show.unary("AnswerQuestion", lambda: show.client.answer(QUESTION, PASSAGE, top_k=2), lambda reply: reply.usage)
    for found in reply.answers:
        out.print(f"  {found.probability:.3f}  {escape(found.span.text)}  (bytes {found.span.start_byte}-{found.span.end_byte})")
    out.print(f"  {reply.no_answer_probability:.3f}  no answer")


def embeddings(show: Show) -> None:
    """Two sentences compared."""
    show.title("Two sentences embedded and compared (EmbedTexts)")
    reply = show.unary("EmbedTexts", lambda: show.client.embed(PAIR), lambda reply: reply.usage)
    left, right = (list(each.values) for each in reply.embeddings)
    cosine = sum(a * b for a, b in zip(left, right, strict=True))
    out.print(f"{PAIR[0]}  ·  {PAIR[1]}\n  cosine {cosine:.3f} in {len(left)} dimensions")


def tuning(show: Show) -> None:
    """Labelled sentences in, a tuned model out: upload, checks, quote, training as it goes, and the first answers."""
    show.title("A classifier tuned on 624 labelled sentences (CreateFineTuneJob), and asked at once")
    client = show.client
    job = client.tune(SENTENCES, base=client.model, method="classify", model="sentences", epochs=1, seed=7)
    report, quote = job.data.report, job.job.quote
    out.print(f"{report.rows:,} rows checked, {len(report.labels)} labels: {report.errors} errors, {report.warnings} warnings")
    tokens, seconds = quote.tokens, quote.device_seconds
    out.print(f"Quote: {tokens.low:,.0f} to {tokens.high:,.0f} tokens, {seconds.low:,.0f} to {seconds.high:,.0f} s")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    with Progress(*columns, console=out, transient=True) as bars:
        bar = bars.add_task("training", total=None)

        def seen(event: finetune_pb2.JobEvent) -> None:
            match event.WhichOneof("event"):
                case "progress":
                    bars.update(bar, completed=event.progress.step, total=event.progress.target_step or None)
                case "metric" if event.metric.name == "loss":
                    bars.update(bar, description=f"loss {event.metric.value:.3f}")
                case "servable":
                    elapsed = event.servable.elapsed.ToTimedelta().total_seconds()
                    bars.console.print(f"servable on {event.servable.replicas} replica(s) {elapsed * 1e3:,.0f} ms after success")

        version = job.wait(seen=seen)
    metrics = version.metrics
    out.print(f"{version.name}: " + ", ".join(f"{name} {metrics[name]:.3f}" for name in sorted(metrics)))
    for text in UNSEEN:
        ask = partial(client.classify, text, model=version.name, top_k=3)
        reply = show.unary("ClassifyText tuned", ask, lambda reply: reply.usage)
        out.print(f"{text}\n  " + "   ".join(f"{score.label} {score.probability:.3f}" for score in reply.results[0].labels))


def table(rows: list[Measured]) -> Table:
    """Latency, time to first token, speed and cost of every call."""
    shown = Table("call", title="\nMeasured at the client, through the gateway", title_justify="left")
    for column in ("latency ms", "first token ms", "tokens/s", "billed in", "of it cached", "billed out"):
        shown.add_column(column, justify="right")
    for row in rows:
        first = f"{row.first_s * 1e3:,.0f}" if row.first_s else "–"
        rate = f"{row.rate:,.1f}" if row.rate else "–"
        used = row.usage
        counts = (f"{count:,}" for count in (used.input_tokens, used.cached_input_tokens, used.output_tokens))
        shown.add_row(row.name, f"{row.latency_s * 1e3:,.0f}", first, rate, *counts)
    return shown


def books_agree(client: Client, project: str, before: tuple[int, int], rows: list[Measured]) -> bool:
    """Whether the ledger grew by exactly what the replies said; it settles right after a stream's last event."""
    expected = (sum(row.usage.input_tokens for row in rows), sum(row.usage.output_tokens for row in rows))
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        now = used(client, project)
        if (now[0] - before[0], now[1] - before[1]) == expected:
            out.print(f"\nThe ledger of {project} agrees: {expected[0]:,} tokens in, {expected[1]:,} out.")
            return True
    out.print(f"[red]The ledger says {now[0] - before[0]:,} in and {now[1] - before[1]:,} out, the replies {expected}.[/]")
    return False


def used(client: Client, project: str) -> tuple[int, int]:
    """Tokens in and out of a project so far."""
    sums = list(client.usage(project))
    return sum(each.usage.input_tokens for each in sums), sum(each.usage.output_tokens for each in sums)


def project_key(platform: Client) -> tuple[str, str]:
    """The demo's project, made once, and a new key for an hour."""
    name = f"projects/{PROJECT}"
    try:
        platform.create_project(PROJECT, display_name="The demo")
        out.print(f"Made {name}", end="")
    except AlreadyExists:
        out.print(f"Found {name}", end="")
    issued = platform.create_key(name, SCOPES, display_name="make demo", ttl_s=3_600)
    out.print(f" and an API key of one hour, {issued.api_key.name}")
    return name, issued.secret


class Failed(Exception):
    """The fleet did not come up; its log says why."""


@contextmanager
def a_fleet(log: Path) -> Iterator[tuple[str, str]]:
    """Address and platform key of a fleet in a process of its own; stopped in order at the end."""
    log.parent.mkdir(parents=True, exist_ok=True)
    environ = os.environ | {"ARGOSY_ADDRESS": "127.0.0.1:0"}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "services.fleet", "--json"],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        yield _ready(process, log)
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(process: "subprocess.Popen[str]", log: Path) -> tuple[str, str]:
    """Follow the fleet's lines, with a bar while weights are prepared, until it answers."""
    assert process.stdout is not None
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=out, transient=True) as bars, out.status("Starting gateway, PostgreSQL and the engine"):
        tasks: dict[str, int] = {}
        for line in process.stdout:
            said = json.loads(line)
            if step := said.get("progress"):
                if step["what"] not in tasks:
                    tasks[step["what"]] = bars.add_task(f"Weights: {step['what']}", total=step["total"])
                bars.update(tasks[step["what"]], completed=step["done"])  # type: ignore[arg-type]  # rich's TaskID is an int
            elif ready := said.get("ready"):
                return ready["address"], ready["api_key"]
    raise Failed(f"The fleet did not start (exit code {process.wait()}). The end of {log}:\n{log.read_text()[-2_000:]}")


def main() -> int:
    """0 when everything was shown and the books agree."""
    began = time.perf_counter()
    log = FleetSettings().home / "demo.log"
    try:
        with a_fleet(log) as (address, platform_key):
            out.print(f"The fleet answers at {address} after {time.perf_counter() - began:.1f} s: gateway, inference, PostgreSQL")
            with Client(address, platform_key) as platform:
                project, key = project_key(platform)
            with Client(address, key) as client:
                model = next(iter(client.models()))
                client.model = model.name
                out.print(f"Model {model.name}, {model.architecture}, context {model.context_tokens:,} tokens")
                before = used(client, project)
                show = Show(client)
                for part in (chat, story, labels, summary, translation, answer, embeddings, tuning):
                    part(show)
                out.print(table(show.rows))
                agreed = books_agree(client, project, before, show.rows)
            out.print(
                "A 270M base model gives weak answers; MODEL=/path/to/a/model make demo shows a better one. make fleet keeps it running."
            )
    except (ArgosyError, Failed) as error:
        out.print(f"[red]demo:[/] {escape(str(error))}")
        return 1
    out.print(f"Done in {time.perf_counter() - began:.1f} s")
    return 0 if agreed else 1


if __name__ == "__main__":
    sys.exit(main())
