"""Spans, metrics and logs: true to the wire, bounded, without content, and never in a request's way."""

import asyncio
import io
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import structlog
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families

from services.chassis import errors
from services.chassis.channel import PlaintextRefused, streaming
from services.chassis.telemetry import LABEL_VALUES, METRICS, OTHER, SPANS_WAITING, Labels, Telemetry, configure_logs, scrub
from tests.chassis.echo import PLAIN, calling, echo, text
from tests.chassis.test_status import drained, failure

NAMES = Path(__file__).with_name("metric_names.txt")


def samples(telemetry: Telemetry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(telemetry.exposition().decode())
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def calls(telemetry: Telemetry, side: str = "server") -> dict[tuple[str, str], float]:
    """(method, status) → how many."""
    found = {}
    for (name, labels), value in samples(telemetry).items():
        if name == f"rpc_{side}_call_duration_seconds_count":
            by = dict(labels)
            found[by["rpc_method"], by["rpc_response_status_code"]] = value
    return found


# --- metrics ------------------------------------------------------------------------------------------------------------------------


def test_metric_names() -> None:
    """Dashboards and alerts stand on these; a change is a line in the changelog."""
    rows = [f"{row.name} {row.kind} {row.unit} {','.join(row.labels)}".rstrip() for row in METRICS.values()]
    assert rows == NAMES.read_text().splitlines()


def test_every_metric_of_the_table_can_be_shown() -> None:
    telemetry = Telemetry.start("test", {})
    for row in METRICS.values():
        telemetry.record(row.name, 1, dict.fromkeys(row.labels, "x"))
    shown = telemetry.exposition().decode()
    for row in METRICS.values():
        assert row.name.replace(".", "_") in shown, row.name


def test_a_name_or_label_outside_the_table_is_refused() -> None:
    for telemetry in (Telemetry.off(), Telemetry.start("test", {})):
        with pytest.raises(KeyError):
            telemetry.record("argosy.made.up", 1)
        with pytest.raises(KeyError, match="no label"):
            telemetry.record("argosy.inflight", 1, {"project": "news"})


def test_A22_a_flood_of_label_values_makes_no_series() -> None:
    telemetry = Telemetry.start("test", {})
    honest = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "gemma"}
    telemetry.record("gen_ai.server.time_to_first_token", 0.1, honest)
    for number in range(10_000):
        telemetry.record("gen_ai.server.time_to_first_token", 0.1, honest | {"gen_ai.request.model": f"model-{number}"})
    telemetry.record("gen_ai.server.time_to_first_token", 0.1, honest)
    counts = {dict(k[1])["gen_ai_request_model"]: v for k, v in samples(telemetry).items() if k[0].endswith("first_token_seconds_count")}
    assert len(counts) == LABEL_VALUES + 1
    assert counts["gemma"] == 2 and counts[OTHER] == 10_000 - (LABEL_VALUES - 1)


def test_replicas_that_come_and_go_do_not_use_up_the_names_of_those_that_stay() -> None:
    telemetry = Telemetry.start("test", {})
    for number in range(3 * LABEL_VALUES):
        telemetry.record("argosy.replica.inflight", 7, {"argosy.replica": f"r{number}"})
        telemetry.forget("argosy.replica.inflight", "argosy.replica", f"r{number}")
    telemetry.record("argosy.replica.inflight", 5, {"argosy.replica": "here"})
    shown = {dict(k[1])["argosy_replica"]: v for k, v in samples(telemetry).items() if k[0] == "argosy_replica_inflight"}
    assert shown.pop("here") == 5 and set(shown.values()) == {0}


@pytest.mark.parametrize("value", ["x" * 101, "a\nb", "\x1b[31m", "\u202e"])
def test_A22_a_strange_label_value_is_other(value: str) -> None:
    assert Labels().bounded(METRICS["argosy.auth.refused"], {"argosy.reason": value}) == {"argosy.reason": OTHER}


async def test_A22_unknown_methods_share_one_series() -> None:
    telemetry = Telemetry.start("test", {})
    async with echo(telemetry=telemetry) as serving, calling(serving.address) as caller:
        for number in range(20):
            await failure(caller.channel.unary_unary(f"/made.Up/Method{number}", None, None)(b""))
    assert calls(telemetry) == {(OTHER, "UNIMPLEMENTED"): 20}


async def scrape(address: str, request: bytes) -> bytes:
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(request)
    writer.write_eof()
    try:
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


async def test_prometheus_endpoint() -> None:
    telemetry = Telemetry.start("test", {})
    telemetry.record("argosy.replica.ready", 3)
    async with telemetry.prometheus("127.0.0.1:0") as address:
        page = await scrape(address, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert page.startswith(b"HTTP/1.1 200 OK\r\n") and b"argosy_replica_ready 3.0" in page
        assert (await scrape(address, b"GET /../etc/passwd HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 404")
        assert (await scrape(address, b"POST /metrics HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 404")
        assert await scrape(address, b"x" * 20_000) == b""
        assert await scrape(address, b"GET") == b""
        assert b"200 OK" in await scrape(address, b"GET /metrics HTTP/1.0\r\n\r\n")
    with pytest.raises(PlaintextRefused, match="show metrics"):
        async with telemetry.prometheus("0.0.0.0:0"):
            pass


# --- spans --------------------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def traced(bodies: Any) -> AsyncIterator[tuple[Any, Any, Telemetry, Callable[[], list[Any]]]]:
    exporter = InMemorySpanExporter()
    telemetry = Telemetry.start("test", {}, spans=exporter)

    def finished() -> list[Any]:
        telemetry.flush()
        return [span for span in exporter.get_finished_spans() if "/grpc." not in span.name]

    async with echo(bodies, telemetry=telemetry) as serving, calling(serving.address, interceptors=telemetry.interceptors()) as caller:
        yield serving, caller, telemetry, finished
    await telemetry.close()


async def test_span_has_wire_status() -> None:
    """OK, refused, a defect, expired, cancelled at an await and in a yield: the span says what the caller saw."""
    entered = asyncio.Event()

    async def unary(request: Any, context: Any) -> Any:
        entered.set()
        if request.value == "refused":
            raise errors.ResourceNotFound("model")
        if request.value == "defect":
            raise ValueError("boom")
        if request.value == "wait":
            await asyncio.Event().wait()
        return text("")

    async def stream(request: Any, context: Any) -> AsyncIterator[Any]:
        while True:
            yield text("x" * 60_000)

    async with traced({**PLAIN, "Unary": unary, "Stream": stream}) as (serving, caller, telemetry, finished):
        await caller.unary(text(""))
        await failure(caller.unary(text("refused")))
        await failure(caller.unary(text("defect")))
        await failure(caller.unary(text("wait"), timeout=0.1))
        entered.clear()
        call = caller.unary(text("wait"))
        await entered.wait()
        call.cancel()
        async with streaming(caller.stream(text(""))) as events:
            async for _ in events:
                break
        await failure(caller.channel.unary_unary("/test.Echo/Unary", None, None)(b"\xff"))
        assert await serving.inflight.idle(10)
        for _ in range(100):  # an abandoned generator is closed by a task of its own
            await asyncio.sleep(0)
        spans = finished()
        server = calls(telemetry)
    codes = ("OK", "NOT_FOUND", "INTERNAL", "DEADLINE_EXCEEDED", "CANCELLED", "INVALID_ARGUMENT")
    wanted = {*(("test.Echo/Unary", code) for code in codes), ("test.Echo/Stream", "CANCELLED")}
    seen = [(span.name, span.attributes["rpc.response.status_code"]) for span in spans]
    assert len(seen) == len(wanted) and set(seen) == wanted
    assert all((span.status.status_code.name == "ERROR") == (span.attributes["rpc.response.status_code"] != "OK") for span in spans)
    assert server == dict.fromkeys(wanted, 1)


TRACEPARENT = f"00-{'ab' * 16}-{'cd' * 8}-01"


async def test_one_trace_from_the_client_to_the_last_service() -> None:
    exporter = InMemorySpanExporter()
    telemetry = Telemetry.start("test", {}, spans=exporter)
    async with echo(telemetry=telemetry) as pod, calling(pod.address, interceptors=telemetry.interceptors()) as inner:

        async def relay(request: Any, context: Any) -> AsyncIterator[Any]:
            async with streaming(inner.stream(request)) as events:
                async for event in events:
                    yield event

        async with echo({"Stream": relay}, telemetry=telemetry) as gateway, calling(gateway.address) as caller:
            assert await drained(caller.stream(text("a b"), metadata=(("traceparent", TRACEPARENT),))) == ["a", "b"]
    telemetry.flush()
    pod_span, gateway_span = exporter.get_finished_spans()
    assert f"{gateway_span.context.trace_id:032x}" == f"{pod_span.context.trace_id:032x}" == "ab" * 16
    assert gateway_span.parent.span_id == int("cd" * 8, 16) and pod_span.parent.span_id == gateway_span.context.span_id
    assert calls(telemetry, "client") == {("test.Echo/Stream", "OK"): 1}
    await telemetry.close()


async def test_a_trace_passes_through_where_no_collector_is_set() -> None:
    telemetry = Telemetry.start("test", {})

    async def shown(request: Any, context: Any) -> Any:
        return text(dict(telemetry.inject())["traceparent"])

    async with echo({"Unary": shown}, telemetry=telemetry) as serving, calling(serving.address) as caller:
        assert (await caller.unary(text(""), metadata=(("traceparent", TRACEPARENT),))).value == TRACEPARENT
        for junk in (f"00-{'0' * 32}-{'cd' * 8}-01", "00-zz-1", "~" * 4_000):
            error = await failure(caller.unary(text(""), metadata=(("traceparent", junk),)))
            assert error.code() is grpc.StatusCode.INTERNAL  # KeyError in the body: there is no trace, and no other harm


# --- F34: a collector that is away --------------------------------------------------------------------------------------------------


async def test_F34_no_request_waits_for_the_collector() -> None:
    """A collector that takes connections and says nothing: calls go on, the flood of spans is dropped and counted, the exit is prompt."""
    connections: list[asyncio.StreamWriter] = []

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        await reader.read()

    hole = await asyncio.start_server(silent, "127.0.0.1", 0)
    endpoint = f"http://127.0.0.1:{hole.sockets[0].getsockname()[1]}"
    telemetry = Telemetry.start("test", {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint})
    async with echo(telemetry=telemetry) as serving, calling(serving.address) as caller:
        for _ in range(SPANS_WAITING + 600):
            telemetry.tracer.start_span("filler").end()
        assert (await caller.unary(text("a"), timeout=20)).value == "unary a"
        dropped = samples(telemetry)["argosy_telemetry_dropped_total", (("argosy_signal", "span"),)]
        assert dropped >= 600
    await asyncio.wait_for(telemetry.close(timeout_s=0.2), 5)
    for writer in connections:
        writer.close()
    hole.close()


async def test_F34_a_refused_export_is_counted() -> None:
    telemetry = Telemetry.start("test", {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"})
    telemetry.tracer.start_span("lost").end()
    await asyncio.to_thread(telemetry.flush)
    assert samples(telemetry)["argosy_telemetry_dropped_total", (("argosy_signal", "span"),)] == 1
    await telemetry.close(timeout_s=0.2)


# --- logs ---------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def lines() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    root = logging.getLogger()
    before, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    stream = io.StringIO()
    configure_logs("DEBUG", stream)

    def read() -> list[dict[str, Any]]:
        got = stream.getvalue()
        assert got.isascii() and not any(ord(c) < 32 and c != "\n" for c in got) and "\x7f" not in got
        return [json.loads(line) for line in got.splitlines()]

    yield read
    root.handlers[:], logging.raiseExceptions = before, raising
    root.setLevel(level)
    structlog.reset_defaults()


HOSTILE = [
    "a\nb",
    "\r\n{}",
    "\x1b[31mred\x1b[0m",
    "%n%s%d",
    "\u202eevil\u2066",
    "\u2028\u2029\x85",
    "\0\x07\x7f\x9b",
    '"}{"event":"forged"',
]


def test_A21_one_event_is_one_line(lines: Callable[[], list[dict[str, Any]]]) -> None:
    log = structlog.get_logger("test")
    for text_ in HOSTILE:
        log.info(text_, field=text_, **{text_: 1})
        logging.getLogger("std").info("%s", text_)
        logging.getLogger("std").info(text_)
    got = lines()
    assert len(got) == 3 * len(HOSTILE)
    assert [line["event"] for line in got] == [text_ for text_ in HOSTILE for _ in range(3)]


def test_A21_a_megabyte_is_cut(lines: Callable[[], list[dict[str, Any]]]) -> None:
    structlog.get_logger().warning("x" * 1_000_000, big="y" * 1_000_000, many=list(range(10_000)), **{f"k{n}": n for n in range(500)})
    logging.getLogger("std").error("z" * 1_000_000)
    assert all(len(json.dumps(line)) < 8_000 for line in lines()) and len(lines()) == 2


CANARY = "canary7f3a9"
SECRETS = {
    "authorization": f"Bearer {CANARY}-{CANARY}",
    "note": f"key argosy_live_k1_{CANARY}secret_a1b2c3 end",
    "url": f"postgresql://argosy:{CANARY}@db:5432/argosy",
    "header": f"authorization: bearer {CANARY}{CANARY}",
    "pem": f"-----BEGIN PRIVATE KEY-----\n{CANARY}\n-----END PRIVATE KEY-----",
    "password": CANARY, "api_key": CANARY, "apiKey": CANARY, "pepper": CANARY, "client_secret": CANARY, "access_token": CANARY,
    "x-argosy-caller-bin": CANARY.encode(), "cookie": CANARY, "private_key": CANARY,
    "prompt": CANARY, "text": CANARY, "messages": [{"content": CANARY}], "document": CANARY, "request": CANARY, "body": CANARY.encode(),
    "metadata": {"anything": CANARY}, "raw": CANARY.encode(), "nested": {"password": CANARY, "deep": [{"prompt": CANARY}]},
    "error_value": ValueError(CANARY), "jwt": f"eyJhbGciOiJFZERTQSJ9abc.eyJ{CANARY}{CANARY}.{CANARY}",
}  # fmt: skip


def test_A21_secrets_and_content_are_not_logged(lines: Callable[[], list[dict[str, Any]]]) -> None:
    log = structlog.get_logger()
    for name, value in SECRETS.items():
        log.info("event", **{name: value})
        logging.getLogger("std").info("event %s", scrub(str(value)) if name in ("note", "url", "header", "pem", "jwt") else "")
    for name in ("note", "url", "header", "pem", "jwt"):
        logging.getLogger("std").info("it said %s", SECRETS[name])
    assert CANARY not in json.dumps(lines())


def test_a_record_keeps_its_extra_fields_and_other_libraries_theirs_out(lines: Callable[[], list[dict[str, Any]]]) -> None:
    logging.getLogger("services.finetune.reconciler").warning("attempt lost", extra={"job": "j1", "why": "exit 137"})
    logging.getLogger("elsewhere").warning("seen", extra={"body": "a prompt"})
    ours, theirs = lines()
    assert (ours["event"], ours["job"], ours["why"]) == ("attempt lost", "j1", "exit 137")
    assert "body" not in theirs


def test_A21_an_exception_is_logged_by_type_and_place(lines: Callable[[], list[dict[str, Any]]]) -> None:
    try:
        raise ValueError(CANARY)
    except ValueError:
        logging.getLogger("std").exception("unhandled in %s", "/test.Echo/Unary")
        structlog.get_logger().exception("unhandled")
    got = lines()
    assert [line["error"] for line in got] == ["ValueError"] * 2
    assert got[0]["at"][-1].startswith("test_telemetry.py:") and CANARY not in json.dumps(got)


async def test_A21_a_call_leaves_no_content_anywhere(lines: Callable[[], list[dict[str, Any]]]) -> None:
    async def fail(request: Any, context: Any) -> Any:
        raise ValueError(request.value)

    metadata = (("authorization", f"Bearer {CANARY}"), ("user", CANARY), ("odd", f"%n {CANARY}"))
    async with traced({"Unary": fail}) as (_, caller, telemetry, finished):
        error = await failure(caller.unary(text(CANARY), metadata=metadata))
        shown = [span.to_json() for span in finished()]
        page = telemetry.exposition().decode()
    assert shown and [line for line in lines() if line["event"] == "unhandled in /test.Echo/Unary"]
    for place in (json.dumps(lines()), "".join(shown), page, repr(error)):
        assert CANARY not in place


async def test_logs_name_their_trace(lines: Callable[[], list[dict[str, Any]]]) -> None:
    async def body(request: Any, context: Any) -> Any:
        logging.getLogger("std").info("inside")
        return text("")

    async with traced({"Unary": body}) as (_, caller, _, _):
        await caller.unary(text(""), metadata=(("traceparent", TRACEPARENT),))
    (inside,) = [line for line in lines() if line["event"] == "inside"]
    assert inside["trace_id"] == "ab" * 16


async def test_a_reraised_cancellation_makes_no_traceback(lines: Callable[[], list[dict[str, Any]]]) -> None:
    entered = asyncio.Event()

    async def body(request: Any, context: Any) -> Any:
        entered.set()
        await asyncio.Event().wait()

    async with echo({"Unary": body}) as serving, calling(serving.address) as caller:
        call = caller.unary(text(""))
        await entered.wait()
        call.cancel()
        assert await serving.inflight.idle(10)
    assert not [line for line in lines() if line.get("error") == "CancelledError"]


def test_F34_a_full_log_disk_raises_nothing() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    root = logging.getLogger()
    before, level, raising = root.handlers[:], root.level, logging.raiseExceptions
    try:
        configure_logs("INFO", Full())
        logging.getLogger("std").info("lost")
        structlog.get_logger().info("lost")
    finally:
        root.handlers[:], logging.raiseExceptions = before, raising
        root.setLevel(level)
        structlog.reset_defaults()


# --- the loop -----------------------------------------------------------------------------------------------------------------------


async def test_a_blocked_loop_alarms_and_turns_unready(caplog: pytest.LogCaptureFixture) -> None:
    told: asyncio.Queue[bool] = asyncio.Queue()

    async def late(is_late: bool) -> None:
        told.put_nowait(is_late)

    telemetry = Telemetry.start("test", {})
    async with telemetry.watching_lag(0.15, late, period_s=0.01, alarm_s=0.1):
        await asyncio.sleep(0.02)
        time.sleep(0.3)  # noqa: ASYNC251  # the fault
        assert await asyncio.wait_for(told.get(), 10) is True
        while await asyncio.wait_for(told.get(), 10):
            pass
    assert "the event loop was blocked for" in caplog.text
    assert samples(telemetry)["argosy_loop_lag_seconds_count", ()] >= 2


async def test_a_cancellation_on_the_way_is_not_lost() -> None:
    """`asyncio.wait_for` of 3.11 drops one that meets an inner call just done: the sampler lived on, and its server never stopped."""
    async with echo() as serving:
        for turns in range(6):
            task = asyncio.create_task(serving._set("ready", 1))
            for _ in range(turns):
                await asyncio.sleep(0)
            asked = task.cancel()
            (result,) = await asyncio.gather(task, return_exceptions=True)
            assert isinstance(result, asyncio.CancelledError) == asked, turns


async def test_a_late_loop_shows_in_health() -> None:
    async with echo() as serving:
        assert serving.is_ready
        await serving.lagging(True)
        assert not serving.is_ready
        await serving.lagging(False)
        assert serving.is_ready
