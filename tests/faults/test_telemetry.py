"""Telemetry on the whole way, client to engine: one trace, nothing of the caller's in it, bounded, and never in a request's way."""

import asyncio
import contextlib
import gzip
import io
import json
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest
import structlog
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from argosy.aio import AsyncClient
from argosy.v1 import content_pb2, embedding_pb2, generation_pb2, language_pb2, model_pb2
from services.chassis.telemetry import METRICS, SPANS_WAITING, Telemetry, configure_logs
from services.gateway.sql_ledger import LedgerSettings, open_ledger
from services.inference.server import inference
from services.inference.servicers.measured import SPANS
from services.inference.settings import InferenceSettings
from tests.fakes.edge import VERIFIER, Edge, caller, chat, edge, events_of, metadata
from tests.fakes.host import FakeHost
from tests.inference.replicas import PLAIN, TOKENIZER

ENGINE = "argosy.internal.engine.v1.EngineService/"
PUBLIC = "argosy.v1."


@asynccontextmanager
async def served(gate: Telemetry, pod: Telemetry, host: FakeHost | None = None, **more: Any) -> AsyncIterator[Edge]:
    """A real gateway before a real replica over a scripted engine, which says back what it is asked."""
    async with (
        inference(
            InferenceSettings(canary_seconds=3_600.0), host or FakeHost(), verifier=VERIFIER, vocabulary=(TOKENIZER, PLAIN), telemetry=pod
        ) as address,
        edge(addresses=(address,), reachable=1, telemetry=gate, **more) as at,
    ):
        yield at


@dataclass
class Told:
    """What left the processes as telemetry."""

    gate: Telemetry
    pod: Telemetry
    exporter: InMemorySpanExporter

    def spans(self) -> list[ReadableSpan]:
        self.gate.flush()
        self.pod.flush()
        return list(self.exporter.get_finished_spans())

    def series(self) -> dict[tuple[str, ...], float]:
        found = {}
        for service, telemetry in (("gateway", self.gate), ("inference", self.pod)):
            for family in text_string_to_metric_families(telemetry.exposition().decode()):
                for sample in family.samples:
                    found[(service, sample.name, *(f"{key}={value}" for key, value in sorted(sample.labels.items())))] = sample.value
        return found

    def value(self, name: str, *labels: str) -> float:
        """The sum over the series with these labels."""
        return sum(value for key, value in self.series().items() if key[1] == name and set(labels) <= set(key))


@pytest.fixture
async def told() -> AsyncIterator[Told]:
    exporter = InMemorySpanExporter()
    found = Told(Telemetry.start("gateway", {}, spans=exporter), Telemetry.start("inference", {}, spans=exporter), exporter)
    yield found
    await found.gate.close()
    await found.pod.close()


# --- one trace ----------------------------------------------------------------------------------------------------------------------


async def traced(told: Told, ask: Callable[[AsyncClient], Awaitable[Any]]) -> list[ReadableSpan]:
    """The spans of the trace in which a program asks something of the client library."""
    program = TracerProvider()
    program.add_span_processor(SimpleSpanProcessor(told.exporter))
    async with served(told.gate, told.pod) as at, AsyncClient(at.gate.address, "acme", model="models/tiny") as client:
        with program.get_tracer("program").start_as_current_span("program") as root:
            await ask(client)
        trace_id = root.get_span_context().trace_id
    return [span for span in told.spans() if span.context.trace_id == trace_id]


def paths(spans: list[ReadableSpan]) -> set[tuple[str, ...]]:
    """Each span's name, after those of all it lies in. A parent that is missing fails."""
    by_id = {span.context.span_id: span for span in spans}

    def path(span: ReadableSpan) -> tuple[str, ...]:
        return (*(path(by_id[span.parent.span_id]) if span.parent is not None else ()), span.name)

    return {path(span) for span in spans}


async def test_one_trace_from_the_client_to_the_engines_steps(told: Told) -> None:
    async def ask(client: AsyncClient) -> None:
        async with client.stream_chat("hello world") as stream:
            assert [text async for text in stream]

    spans = await traced(told, ask)
    engine = ("program", PUBLIC + "GenerationService/StreamChat", ENGINE + "Generate", "engine generate")
    whole = {engine[:length] for length in range(1, 5)} | {(*engine, name) for name in ("queue", "prefill", "decode")}
    assert paths(spans) == whole
    by_name = {span.name: span for span in spans}
    call = by_name["engine generate"]
    assert call.attributes["gen_ai.request.model"] == "models/tiny" and call.attributes["gen_ai.operation.name"] == "chat"
    assert call.attributes["gen_ai.response.finish_reasons"] == ("END_TOKEN",) and "argosy.batch.rows" in call.attributes
    gate = by_name[PUBLIC + "GenerationService/StreamChat"]
    for count in ("gen_ai.usage.input_tokens", "gen_ai.usage.output_tokens"):
        assert call.attributes[count] == gate.attributes[count] > 0
    assert gate.attributes["argosy.outcome"] == "DONE"
    steps = [by_name[name] for name in ("queue", "prefill", "decode")]  # the engine's own times, one after the other
    assert [round((step.end_time - step.start_time) / 1e6) for step in steps] == [1, 2, 3]
    edges = [call.start_time, *(edge for step in steps for edge in (step.start_time, step.end_time)), call.end_time]
    assert edges == sorted(edges)


async def test_one_trace_of_what_generates_nothing(told: Told) -> None:
    async def ask(client: AsyncClient) -> None:
        await client.classify("hello", ["tech", "sport"])
        await client.embed(["hello", "world"])

    found = paths(await traced(told, ask))
    for method, call in (("LanguageService/ClassifyText", "engine score"), ("EmbeddingService/EmbedTexts", "engine embed")):
        assert ("program", PUBLIC + method, ENGINE + "Encode", call, "prefill") in found
    assert not [path for path in found if path[-1] == "decode"]
    assert told.value("gen_ai_server_request_duration_seconds_count", "argosy_service=inference", "gen_ai_operation_name=embeddings") == 1


async def test_a_program_without_traces_sends_none(told: Told) -> None:
    async with served(told.gate, told.pod) as at, AsyncClient(at.gate.address, "acme", model="models/tiny") as client:
        assert "traceparent" not in dict(client._target.metadata)
        await client.chat("hello")


def test_the_library_needs_no_opentelemetry() -> None:
    script = (
        "import sys; sys.modules['opentelemetry'] = None; from argosy.client import Client; from argosy.channel import Target;"
        " assert dict(Target('127.0.0.1:1', 'k').metadata) == {'authorization': 'Bearer k'}"
    )
    path = ":".join(entry for entry in sys.path if entry)
    done = subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": path}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


async def test_a_request_of_many_engine_calls_shows_the_first_of_them(told: Told) -> None:
    async def ask(client: AsyncClient) -> None:
        await client.classify([f"hello {number}" for number in range(40)], ["tech", "sport"])

    found = [span.name for span in await traced(told, ask)]
    assert found.count("engine score") == SPANS and len(found) <= 3 + 3 * SPANS


async def test_an_engine_that_comes_back_is_counted(told: Told) -> None:
    host = FakeHost()
    async with served(told.gate, told.pod, host=host) as at:
        host.lose()
        await at.replicas.until(0)
        host._lost.clear()
        host.changed()
        await at.replicas.until(1)
        assert told.value("argosy_engine_restarted_total") == 1


async def test_the_pod_and_the_gateway_measure_a_generation(told: Told) -> None:
    async with served(told.gate, told.pod) as at:
        await events_of(at.generation.StreamChat(chat("hello world", model="models/tiny"), metadata=metadata(), timeout=10))
    for service in ("gateway", "inference"):
        labels = (service, f"argosy_service={service}", "gen_ai_operation_name=chat", "gen_ai_request_model=models/tiny")
        for name in ("request_duration", "time_to_first_token", "time_per_output_token"):
            assert told.value(f"gen_ai_server_{name}_seconds_count", *labels) == 1, (service, name)
        assert told.value("gen_ai_client_token_usage_count", *labels) == 2
    called = told.value("rpc_client_call_duration_seconds_count", f"rpc_method={ENGINE}Generate", "rpc_response_status_code=OK")
    assert called == 1
    assert told.value("argosy_ledger_duration_seconds_count", "argosy_operation=reserve") == 1
    assert told.value("argosy_ledger_duration_seconds_count", "argosy_operation=settle") == 1


# --- A21: nothing of the caller's -----------------------------------------------------------------------------------------------------


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    stream = io.StringIO()
    configure_logs("DEBUG", stream)
    yield stream
    root.handlers[:], logging.raiseExceptions = before, raising
    root.setLevel(level)
    structlog.reset_defaults()


class Away:
    """A store that never answers: the books are kept in the journal."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()


CANARY = "canary7f3a9"
DRESSES = ("{}", "a\n{}", "\x1b[31m{}\x1b[0m", "\u202e{}\u2066", "%n%s{}", '"}}\n{{"event":"{}"')
KEY = f"argosy_test_{uuid4().hex}_{CANARY}"


def plants(at: Edge) -> list[tuple[str, Callable[[str], Any]]]:
    """Every place where a caller's text goes in, and a call with the text there."""
    g, words, model = at.generation, at.language, {"model": "models/tiny"}
    turn, part = content_pb2.ChatMessage, content_pb2.ContentPart

    def header(key: str) -> Callable[[str], Any]:
        def call(text: str) -> Any:
            value: Any = text.encode() if key.endswith("-bin") else CANARY  # what is no ASCII cannot be sent in the others
            sent = (("traceparent", f"00-{'ab' * 16}-{'cd' * 8}-01"), ("tracestate", f"{CANARY}={CANARY}")) if key == "tracestate" else ()
            return g.CountTokens(
                generation_pb2.CountTokensRequest(prompt="x", **model), metadata=(*auth, *(sent or ((key, value),))), timeout=10
            )

        return call

    def both(role: Any) -> Callable[[str], Any]:
        said = lambda text: turn(role=role, parts=[part(text=text)])  # noqa: E731
        last = turn(role=content_pb2.ROLE_USER, parts=[part(text="hi")])
        return lambda text: g.Chat(generation_pb2.ChatRequest(messages=[said(text), last], **model), metadata=auth, timeout=10)

    auth = (("authorization", f"Bearer {KEY}"),)
    to: dict[str, Any] = {"metadata": auth, "timeout": 10}
    tool = content_pb2.ToolDeclaration
    return [
        ("stream", lambda text: events_of(g.StreamChat(chat(text, **model), **to))),
        ("prompt", lambda text: g.GenerateText(generation_pb2.GenerateTextRequest(prompt=text, **model), **to)),
        ("system", both(content_pb2.ROLE_SYSTEM)),
        ("assistant", both(content_pb2.ROLE_ASSISTANT)),
        ("a role out of place", both(content_pb2.ROLE_TOOL)),
        ("tool name", lambda text: g.Chat(chat("x", tools=[tool(name=text)], **model), **to)),
        ("tool schema", lambda text: g.Chat(chat("x", tools=[tool(name="t", parameters_json_schema=text)], **model), **to)),
        ("count", lambda text: g.CountTokens(generation_pb2.CountTokensRequest(prompt=text, **model), **to)),
        ("tokenize", lambda text: g.Tokenize(generation_pb2.TokenizeRequest(text=text, **model), **to)),
        ("model", lambda text: g.Chat(chat("x", model=f"models/{text}"), **to)),
        ("request id", lambda text: g.Chat(chat("x", request_id=text, **model), **to)),
        ("document", lambda text: words.SummarizeText(language_pb2.SummarizeTextRequest(documents=[text], **model), **to)),
        (
            "language",
            lambda text: words.TranslateText(language_pb2.TranslateTextRequest(texts=["x"], target_language=text, **model), **to),
        ),
        (
            "translated",
            lambda text: words.TranslateText(language_pb2.TranslateTextRequest(texts=[text], target_language="fr", **model), **to),
        ),
        (
            "label",
            lambda text: words.ClassifyText(
                language_pb2.ClassifyTextRequest(
                    texts=[text], zero_shot=language_pb2.ZeroShotLabels(labels=[text, "b"], instruction=text), **model
                ),
                **to,
            ),
        ),
        (
            "question",
            lambda text: words.AnswerQuestion(
                language_pb2.AnswerQuestionRequest(
                    question=text,
                    passages=[language_pb2.Passage(id=text, text=text)],
                    mode=language_pb2.ANSWER_MODE_EXTRACTIVE,
                    **model,
                ),
                **to,
            ),
        ),
        ("embedded", lambda text: at.embedding.EmbedTexts(embedding_pb2.EmbedTextsRequest(texts=[text], **model), **to)),
        ("page token", lambda text: at.models.ListModels(model_pb2.ListModelsRequest(page_token=text), **to)),
        ("path", lambda text: at.channel.unary_unary(f"/argosy.v1.GenerationService/{CANARY}", None, None)(b"", **to)),
        ("no key", lambda text: g.Chat(chat(text), metadata=(("authorization", f"Bearer {CANARY}-{CANARY}"),), timeout=10)),
        ("bytes", lambda text: at.channel.unary_unary("/argosy.v1.GenerationService/Chat", None, None)(b"\xff" + text.encode(), **to)),
        *((key, header(key)) for key in ("cookie", "user", "traceparent", "tracestate", "baggage", "x-forwarded-for", "session-bin")),
    ]


def everything(error: grpc.aio.AioRpcError) -> str:
    return f"{error.details()} {dict(error.trailing_metadata() or ())} {dict(error.initial_metadata() or ())}"


async def test_A21_of_planted_canaries_none_is_seen_again(
    told: Told, logged: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.gateway.sql_ledger.STATEMENT_SECONDS", 0.01)
    errors, planted, answered = [], 0, 0
    books: Any = Away()
    async with (
        open_ledger(books, LedgerSettings(journal_dir=tmp_path)) as ledger,
        served(told.gate, told.pod, ledger=ledger, callers={KEY: caller()}) as at,
    ):
        for place, (name, plant) in enumerate(plants(at)):
            for dress in (DRESSES[place % 6], DRESSES[(place + 1) % 6]):
                planted += 1
                try:
                    await plant(dress.format(CANARY))
                    answered += 1
                except grpc.aio.AioRpcError as error:
                    assert error.code() not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN), (name, error)
                    errors.append(everything(error))
        assert ledger.away and ledger.spooled_bytes == sum(file.stat().st_size for file in tmp_path.iterdir()) > 0
        seen = {
            "metrics": told.gate.exposition().decode() + told.pod.exposition().decode(),
            "journal": "".join(file.read_text() for file in tmp_path.iterdir()),
        }
    seen |= {"spans": "".join(span.to_json() for span in told.spans()), "logs": logged.getvalue(), "errors": "".join(errors)}
    assert planted >= 50 and answered >= 25 and errors
    for where, what in seen.items():
        assert what, where
        assert CANARY not in what, (where, what[max(0, what.index(CANARY) - 200) :][:400])
    lines = seen["logs"].split("\n")
    assert lines.pop() == "" and seen["logs"].isascii() and not any(ord(char) < 32 and char != "\n" for char in seen["logs"])
    assert all({"event", "level", "timestamp"} <= json.loads(line).keys() for line in lines)


# --- A22: no caller can grow the series -----------------------------------------------------------------------------------------------


async def test_A22_a_flood_of_names_adds_no_series_and_hides_none(told: Told) -> None:
    honest = ("rpc_server_call_duration_seconds_count", f"rpc_method={PUBLIC}GenerationService/StreamChat", "rpc_response_status_code=OK")

    async def ask(at: Edge) -> None:
        await events_of(at.generation.StreamChat(chat("hello", model="models/tiny"), metadata=metadata(), timeout=10))

    async def flood(at: Edge, first: int) -> None:
        async def one(call: Any) -> None:
            with pytest.raises(grpc.aio.AioRpcError):
                await call

        for number in range(first, first + 150):
            await one(at.generation.Chat(chat("x", model=f"models/m{number}"), metadata=metadata(), timeout=10))
            await one(at.channel.unary_unary(f"/argosy.v1.Made{number}/Up{number}", None, None)(b"", timeout=10))
            await one(at.generation.Chat(chat("x"), metadata=(("authorization", f"Bearer {number}"),), timeout=10))
        for number in range(first, first + 5):
            async with grpc.aio.insecure_channel(at.gate.address, options=[("grpc.primary_user_agent", f"agent-{number}")]) as channel:
                await one(channel.unary_unary("/argosy.v1.GenerationService/Chat", None, None)(b"", timeout=10))

    async with served(told.gate, told.pod) as at:
        await ask(at)
        await flood(at, 0)
        before = told.series().keys()
        await flood(at, 1_000)
        await ask(at)
        after = told.series()
    assert {key[:2] for key in after} >= {key[:2] for key in before} and len(after) <= 2_000
    flooded = [key for key in after.keys() - before if any(mark in "".join(key) for mark in ("m1", "Made", "agent"))]
    assert not flooded
    assert told.value(*honest) == 2
    assert told.value("rpc_server_call_duration_seconds_count", "rpc_method=_OTHER") == 300
    assert told.value("argosy_auth_refused_total", "argosy_reason=API_KEY_INVALID") == 310


# --- a collector that is there, and F34: one that is away ---------------------------------------------------------------------------------


@asynccontextmanager
async def collecting() -> AsyncIterator[tuple[str, dict[str, bytes]]]:
    """A collector over HTTP; its address, and what came to each path."""
    came: dict[str, bytes] = {}

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                first, *rest = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                headers = {key.lower(): value for key, _, value in (line.partition(": ") for line in rest)}
                body = await reader.readexactly(int(headers["content-length"]))
                path = first.split(" ")[1]
                came[path] = came.get(path, b"") + (gzip.decompress(body) if headers.get("content-encoding") == "gzip" else body)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", came
    finally:
        server.close()


async def test_a_collector_gets_traces_and_metrics_over_http() -> None:
    async with collecting() as (endpoint, came):
        telemetry = Telemetry.start("fleet", {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint})
        async with served(telemetry, telemetry) as at:
            await events_of(at.generation.StreamChat(chat("hello", model="models/tiny"), metadata=metadata(), timeout=10))
        await telemetry.close(timeout_s=10)
        spans = [
            span
            for resource in trace_service_pb2.ExportTraceServiceRequest.FromString(came["/v1/traces"]).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        sums = metrics_service_pb2.ExportMetricsServiceRequest.FromString(came["/v1/metrics"]).resource_metrics
        names = {metric.name for resource in sums for scope in resource.scope_metrics for metric in scope.metrics}
    assert {"engine generate", "decode", PUBLIC + "GenerationService/StreamChat"} <= {span.name for span in spans}
    assert {"gen_ai.server.request.duration", "argosy.queue.length", "argosy.kv.blocks.free"} <= names


@asynccontextmanager
async def silent() -> AsyncIterator[str]:
    """A collector that takes what comes and never answers."""
    open_now: list[asyncio.StreamWriter] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_now.append(writer)
        while await reader.read(65_536):
            pass

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for writer in open_now:
            writer.close()


@asynccontextmanager
async def refusing() -> AsyncIterator[str]:
    """A port where nobody listens."""
    yield "http://127.0.0.1:9"


@pytest.mark.parametrize("collector", [silent, refusing])
async def test_F34_no_request_is_the_worse_for_a_collector_that_is_away(collector: Callable[[], Any]) -> None:
    async with collector() as endpoint:
        lost = Telemetry.start("fleet", {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint})
        async with served(lost, lost) as at:
            for _ in range(SPANS_WAITING + 600):
                lost.tracer.start_span("filler").end()
            calls = [at.generation.StreamChat(chat("hello", model="models/tiny"), metadata=metadata(), timeout=10) for _ in range(20)]
            streams = await asyncio.gather(*map(events_of, calls))
        found = Told(lost, Telemetry.off(), InMemorySpanExporter())
        assert [events[-1].WhichOneof("event") for events in streams] == ["completed"] * 20
        assert found.value("argosy_ledger_settled_total", "argosy_outcome=DONE") == 20  # Prometheus is served as ever
        assert found.value("argosy_telemetry_dropped_total", "argosy_signal=span") > 0
        await asyncio.wait_for(lost.close(timeout_s=0.1), 10)


# --- the page -------------------------------------------------------------------------------------------------------------------------


def test_every_metric_is_on_the_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "telemetry.md").read_text().splitlines()
    rows = [
        f"| `{row.name}` | {row.kind} | {row.unit.strip('{}')} | {', '.join(f'`{label}`' for label in row.labels)} | {row.says} |"
        for row in METRICS.values()
    ]
    assert [line for line in page if line.startswith(("| `rpc.", "| `gen_ai.", "| `argosy."))] == rows
