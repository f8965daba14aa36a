"""Traces, metrics and JSON logs. Telemetry is dropped rather than waited for, and carries no content.

Spans come from our own door and take their status from the wire. Every metric is a row of `METRICS`; a label value is one of a bounded
number, so that no caller can grow the series. A log event is one line of ASCII, its fields capped, scrubbed of secrets and of content.
"""

import asyncio
import collections
import contextlib
import json
import logging
import os
import re
import ssl
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self, TextIO

import grpc
import grpc.aio
import prometheus_client
import structlog
from opentelemetry import trace
from opentelemetry.context import Context, attach
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from services.chassis.channel import PlaintextRefused, is_local
from services.chassis.interceptors import Incoming, client_interceptors
from services.chassis.status import Metadatum

log = logging.getLogger(__name__)

# --- metrics ------------------------------------------------------------------------------------------------------------------------

OTHER = "_OTHER"
LABEL_VALUES = 100  # distinct values of one label of one metric; the rest are _OTHER
LABEL_CHARS = 100


@dataclass(frozen=True, slots=True)
class Metric:
    """One row of the table."""

    name: str
    kind: Literal["counter", "histogram", "gauge"]
    unit: str
    says: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)
_TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2.5)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_024, 2_048, 4_096, 16_384, 65_536)
_RPC = ("rpc.method", "rpc.response.status_code")
_MODEL = ("argosy.service", "gen_ai.operation.name", "gen_ai.request.model")  # both the gateway and the replica behind it measure
_CLASS = ("argosy.work_class",)
_REASON = ("argosy.reason",)

METRICS: Mapping[str, Metric] = {
    row.name: row
    for row in (
        Metric("rpc.server.call.duration", "histogram", "s", "Time from the door to the status.", _RPC, _SECONDS),
        Metric("rpc.client.call.duration", "histogram", "s", "Time of a call to another of our services.", _RPC, _SECONDS),
        Metric(
            "gen_ai.server.request.duration", "histogram", "s", "Time of one generation or encoding.", (*_MODEL, "error.type"), _SECONDS
        ),
        Metric("gen_ai.server.time_to_first_token", "histogram", "s", "From its acceptance to the first token.", _MODEL, _SECONDS),
        Metric("gen_ai.server.time_per_output_token", "histogram", "s", "Mean gap between tokens after it.", _MODEL, _TOKEN_SECONDS),
        Metric("gen_ai.client.token.usage", "histogram", "{token}", "Tokens of one request.", (*_MODEL, "gen_ai.token.type"), _COUNTS),
        Metric("argosy.inflight", "gauge", "{call}", "Calls inside the door."),
        Metric("argosy.queue.length", "gauge", "{request}", "Requests that wait for admission.", _CLASS),
        Metric("argosy.queue.tokens", "gauge", "{token}", "Tokens that wait for admission.", _CLASS),
        Metric("argosy.queue.predicted", "gauge", "s", "Predicted wait of a request that came now.", _CLASS),
        Metric("argosy.queue.wait", "histogram", "s", "Time from arrival to admission.", _CLASS, _SECONDS),
        Metric("argosy.queue.refused", "counter", "{request}", "Requests not admitted: quotas, books, shed, no replica.", _REASON),
        Metric("argosy.auth.refused", "counter", "{call}", "Credentials not accepted.", _REASON),
        Metric("argosy.auth.revoked", "counter", "{call}", "Running calls cut for a revoked key."),
        Metric("argosy.ledger.duration", "histogram", "s", "Time of one entry in the books.", ("argosy.operation",), _SECONDS),
        Metric("argosy.ledger.settled", "counter", "{request}", "Requests settled.", ("argosy.outcome",)),
        Metric("argosy.ledger.away", "gauge", "1", "1 while the store is away and the books are kept in the journal."),
        Metric("argosy.ledger.spooled", "gauge", "By", "Entries in the journal that wait for the store."),
        Metric("argosy.replica.ready", "gauge", "{replica}", "Replicas that can be reached and say they are well."),
        Metric("argosy.replica.barred", "gauge", "{replica}", "Reachable replicas that are ejected for their failures now."),
        Metric("argosy.replica.inflight", "gauge", "{call}", "Calls of ours on a replica.", ("argosy.replica",)),
        Metric("argosy.replica.ejected", "counter", "{replica}", "Replicas that took no more calls, for a time.", _REASON),
        Metric("argosy.replica.retried", "counter", "{request}", "Requests started again elsewhere.", _REASON),
        Metric("argosy.adapter.push", "histogram", "s", "Time of pushing a version to one replica.", ("argosy.outcome",), _SECONDS),
        Metric("argosy.engine.waiting", "gauge", "{sequence}", "Sequences that wait for the engine."),
        Metric("argosy.engine.running", "gauge", "{sequence}", "Sequences that the engine runs."),
        Metric("argosy.engine.queued", "gauge", "{token}", "Prompt tokens not yet computed."),
        Metric("argosy.kv.tokens.total", "gauge", "{token}", "Size of the KV cache."),
        Metric("argosy.kv.tokens.free", "gauge", "{token}", "Room in the KV cache, evictable blocks included."),
        Metric("argosy.kv.tokens.hit", "counter", "{token}", "Prompt tokens found in the prefix cache."),
        Metric("argosy.kv.blocks.total", "gauge", "{block}", "Blocks of the KV cache."),
        Metric("argosy.kv.blocks.free", "gauge", "{block}", "Blocks that a new sequence could have, evictable ones included."),
        Metric("argosy.batch.rows", "histogram", "{sequence}", "Sequences in one engine step.", (), _COUNTS),
        Metric("argosy.batch.duration", "histogram", "s", "Time of one engine step.", (), _SECONDS),
        Metric("argosy.engine.restarted", "counter", "{process}", "Starts of an engine process after its first."),
        Metric("argosy.loop.lag", "histogram", "s", "How late the event loop ran a timer.", (), _SECONDS),
        Metric("argosy.drain.cut", "counter", "{call}", "Calls that a drain did not wait for any longer."),
        Metric("argosy.demand.queue", "gauge", "{request}", "Requests that wait for a model, at all gateways.", ("model",)),
        Metric("argosy.demand.inflight", "gauge", "{request}", "Requests that wait for or run on a model, at all gateways.", ("model",)),
        Metric("argosy.demand.kv", "gauge", "{percent}", "KV cache in use, summed over a model's replicas.", ("model",)),
        Metric("argosy.cluster.view_age", "gauge", "s", "Time since the cluster last told how things are."),
        Metric("argosy.gpu.unhealthy", "gauge", "{device}", "GPUs of replicas that the cluster reports as unhealthy."),
        Metric("argosy.certificate.remaining", "gauge", "s", "Time until the certificate in use ends.", ("argosy.certificate",)),
        Metric("argosy.certificate.life", "gauge", "1", "Share of the certificate's life that is left.", ("argosy.certificate",)),
        Metric("argosy.attempt.waiting", "gauge", "{attempt}", "Training attempts that wait for a place.", _REASON),
        Metric("argosy.attempt.ended", "counter", "{attempt}", "Training attempts at an end.", ("argosy.outcome",)),
        Metric("argosy.job.ended", "counter", "{job}", "Training jobs at an end.", ("argosy.outcome", "argosy.reason")),
        Metric("argosy.telemetry.dropped", "counter", "{item}", "Telemetry given up on.", ("argosy.signal",)),
    )
}


class Labels:
    """Folds label values beyond the first `LABEL_VALUES` of a label into `_OTHER`, so that early series stay intact under a flood."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], set[str]] = collections.defaultdict(set)

    def bounded(self, metric: Metric, labels: Mapping[str, str]) -> dict[str, str]:
        """`labels`, each with a bounded value; raises KeyError for one the metric's row does not list."""
        if unlisted := labels.keys() - set(metric.labels):
            raise KeyError(f"{metric.name} has no label {sorted(unlisted)}")
        return {name: self._bounded(metric.name, name, value) for name, value in labels.items()}

    def forget(self, metric: Metric, label: str, value: str) -> None:
        """What it names is gone: another may have its place."""
        self._seen[metric.name, label].discard(value)

    def _bounded(self, metric: str, label: str, value: str) -> str:
        seen = self._seen[metric, label]
        if value in seen:
            return value
        if len(seen) >= LABEL_VALUES or len(value) > LABEL_CHARS or not value.isprintable():
            return OTHER
        seen.add(value)
        return value


# --- spans that never hold anybody up -----------------------------------------------------------------------------------------------

SPANS_WAITING = 2_048
EXPORT_TIMEOUT_S = 5.0


class Spool(SpanProcessor):
    """At most `SPANS_WAITING` finished spans wait for the exporter's thread; the rest, and those it fails to send, are counted."""

    def __init__(self, exporter: SpanExporter, dropped: Callable[[int], None], delay_s: float = 2.0) -> None:
        self._dropped = dropped
        self._waiting = 0
        self._lock = threading.Lock()
        self._batch = BatchSpanProcessor(
            _Counted(exporter, self._left), max_queue_size=SPANS_WAITING, schedule_delay_millis=delay_s * 1_000, max_export_batch_size=512
        )

    def on_end(self, span: ReadableSpan) -> None:
        """Queue or count; never wait."""
        if span.context is None or not span.context.trace_flags.sampled:
            return
        with self._lock:
            room = self._waiting < SPANS_WAITING
            self._waiting += room
        if room:
            self._batch.on_end(span)
        else:
            self._dropped(1)

    def _left(self, spans: int, sent: bool) -> None:
        with self._lock:
            self._waiting -= spans
        if not sent:
            self._dropped(spans)

    def shutdown(self) -> None:
        """Send what waits."""
        self._batch.shutdown()  # type: ignore[no-untyped-call]

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Send what waits, now."""
        return self._batch.force_flush(timeout_millis)


class _Counted(SpanExporter):
    """Tells how many spans left the queue, and whether the collector took them."""

    def __init__(self, exporter: SpanExporter, left: Callable[[int, bool], None]) -> None:
        self._exporter = exporter
        self._left = left

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        try:
            result = self._exporter.export(spans)
        finally:
            self._left(len(spans), result is SpanExportResult.SUCCESS)
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()


# --- one object for a process -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TelemetrySettings:
    """May be a field of a service's settings."""

    metrics_address: str = "127.0.0.1:0"  # Prometheus; off this machine over HTTPS, with the server's certificate and client CA
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"


class Telemetry:
    """Tracer, meter and their exporters: one a process, handed to whoever measures. `off()` measures nothing and costs next to nothing."""

    def __init__(self, tracer: trace.Tracer, registry: prometheus_client.CollectorRegistry, meters: MeterProvider | None) -> None:
        self.tracer = tracer
        self._registry = registry
        self._labels = Labels()
        self._meters = meters
        self._spans: TracerProvider | None = None
        self._instruments: dict[str, Any] = {}
        self._records: set[asyncio.Task[None]] = set()
        self._inside = 0  # calls, of every server that shares this object
        self._propagator = TraceContextTextMapPropagator()
        if meters is not None:
            meter = meters.get_meter("argosy")
            for row in METRICS.values():
                self._instruments[row.name] = _instrument(meter, row)

    @classmethod
    def off(cls) -> Self:
        """Nothing is measured; a trace still passes through."""
        return cls(trace.NoOpTracer(), prometheus_client.CollectorRegistry(), None)

    @classmethod
    def start(cls, service: str, environ: Mapping[str, str] = os.environ, *, spans: SpanExporter | None = None) -> Self:
        """Metrics for Prometheus always; spans and metrics by OTLP over HTTP if OTEL_EXPORTER_OTLP_ENDPOINT is set.

        Without a collector no span is recorded, but a caller's trace still passes through. `spans` takes the place of the collector.
        """
        registry = prometheus_client.CollectorRegistry()
        resource = Resource.create({"service.name": service})
        readers: list[MetricReader] = [PrometheusMetricReader(disable_target_info=True, scope_info_enabled=False, registry=registry)]
        endpoint = environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "").rstrip("/")
        if endpoint:
            sender = OTLPMetricExporter(endpoint=f"{endpoint}/v1/metrics", timeout=EXPORT_TIMEOUT_S)
            readers.append(PeriodicExportingMetricReader(sender, export_interval_millis=15_000))
            spans = spans or OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces", timeout=EXPORT_TIMEOUT_S)
        meters = MeterProvider(readers, resource, shutdown_on_exit=False)
        if spans is None:
            return cls(trace.NoOpTracer(), registry, meters)
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        telemetry = cls(provider.get_tracer("argosy"), registry, meters)
        provider.add_span_processor(Spool(spans, telemetry._dropped_spans))
        telemetry._spans = provider
        return telemetry

    def _dropped_spans(self, count: int) -> None:
        self.record("argosy.telemetry.dropped", count, {"argosy.signal": "span"})

    def record(self, name: str, value: float, labels: Mapping[str, str] | None = None) -> None:
        """Add to a counter, observe in a histogram, set a gauge. KeyError if the table has no such name or label."""
        row = METRICS[name]
        attributes = self._labels.bounded(row, labels or {})
        instrument = self._instruments.get(name)
        if instrument is not None:
            instrument(value, attributes)

    def forget(self, name: str, label: str, value: str) -> None:
        """What a gauge's label named is gone: it stands at 0, and does not count among the label's values."""
        self.record(name, 0, {label: value})
        self._labels.forget(METRICS[name], label, value)

    def exposition(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return prometheus_client.generate_latest(self._registry)

    def flush(self) -> None:
        """Send every finished span now; blocks while it does. For tests."""
        if self._spans is not None:
            self._spans.force_flush()

    async def close(self, timeout_s: float = 2.0) -> None:
        """Send what is left, for at most `timeout_s`: a collector that is away delays no exit."""
        done = asyncio.Event()
        loop = asyncio.get_running_loop()

        def shut() -> None:
            for provider in (self._spans, self._meters):
                if provider is not None:
                    provider.shutdown()
            loop.call_soon_threadsafe(done.set)

        # A daemon: an executor's thread would be joined at interpreter exit, for as long as the exporter retries.
        threading.Thread(target=_quietly, args=(shut,), name="telemetry-close", daemon=True).start()
        try:
            async with asyncio.timeout(timeout_s):
                await done.wait()
        except TimeoutError:
            log.warning("telemetry was not flushed in %.0f s", timeout_s)

    # --- at the door

    @asynccontextmanager
    async def around(self, incoming: Incoming, context: Any) -> AsyncIterator[None]:
        """The outermost step: a server span and a duration, both with the status that goes out on the wire."""
        began = time.perf_counter()
        span = self.tracer.start_span(incoming.method.lstrip("/"), self._parent(incoming), trace.SpanKind.SERVER, {"rpc.system": "grpc"})
        attach(trace.set_span_in_context(span))  # never detached: the task dies with the RPC
        code = grpc.StatusCode.OK
        self._count(incoming, +1)
        try:
            yield
        except BaseException as error:
            code = wire_status(error, context)
            raise
        finally:
            span.set_attribute("rpc.method", incoming.method.lstrip("/"))
            span.set_attribute("rpc.response.status_code", code.name)
            if code is not grpc.StatusCode.OK:
                span.set_status(trace.StatusCode.ERROR, code.name)
            span.end()
            self._count(incoming, -1)
            self._observe("rpc.server.call.duration", began, incoming.method, code)

    def _count(self, incoming: Incoming, by: int) -> None:
        if not incoming.exempt:
            self._inside += by
            self.record("argosy.inflight", self._inside)

    def _parent(self, incoming: Incoming) -> Context:
        # No tracestate: it is free text of the caller's, and spans would carry it on (A21).
        carrier = {key: value for key, value in incoming.invocation_metadata if key == "traceparent" and isinstance(value, str)}
        return self._propagator.extract(carrier, Context())

    def _observe(self, name: str, began: float, method: str, code: grpc.StatusCode) -> None:
        self.record(name, time.perf_counter() - began, {"rpc.method": method.lstrip("/"), "rpc.response.status_code": code.name})

    def unknown_method(self) -> None:
        """A call to a path that does not exist; the path itself is the caller's invention and no label."""
        self.record("rpc.server.call.duration", 0.0, {"rpc.method": OTHER, "rpc.response.status_code": "UNIMPLEMENTED"})

    # --- at a channel

    def inject(self, metadata: Iterable[Metadatum] = ()) -> tuple[Metadatum, ...]:
        """`metadata` with the current trace as its W3C traceparent."""
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier)
        return (*((key, value) for key, value in metadata if key not in carrier), *carrier.items())

    def interceptors(self) -> Sequence[grpc.aio.ClientInterceptor]:
        """For `open_channel`: the trace goes along, the duration is measured."""
        return client_interceptors(lambda details: details._replace(metadata=self.inject(details.metadata or ())), self._watch_call)

    def _watch_call(self, details: Any, call: Any) -> None:
        self.watch_call(details.method.decode() if isinstance(details.method, bytes) else details.method, call)

    def watch_call(self, method: str, call: Any) -> None:
        """Measure a grpc.aio call that has just been made; for a channel without `interceptors`, which cost a hop an event."""
        began = time.perf_counter()

        async def observe() -> None:
            self._observe("rpc.client.call.duration", began, method, await call.code())

        def ended(_: Any) -> None:
            task = asyncio.get_running_loop().create_task(observe())
            self._records.add(task)  # the loop itself keeps only a weak reference
            task.add_done_callback(self._records.discard)

        call.add_done_callback(ended)

    # --- listeners and samplers

    @asynccontextmanager
    async def prometheus(self, address: str, tls: Callable[[], ssl.SSLContext] | None = None) -> AsyncIterator[str]:
        """Serve /metrics while inside, over HTTP on a loopback address, over HTTPS elsewhere; yields the address with its real port.

        `tls` is asked at each connection, so that a renewed certificate is used. Raises PlaintextRefused where it is needed and missing.
        """
        if is_local(address):
            tls = None
        elif tls is None:
            raise PlaintextRefused("show metrics on", address)
        context = _renewing(tls) if tls is not None else None
        host, _, port = address.rpartition(":")
        # Not start_tls in the handler: under uvloop the stream may have read the client's first bytes by then.
        handshake_s = None if context is None else 5
        server = await asyncio.start_server(
            self._scraped, host.strip("[]"), int(port), limit=8_192, ssl=context, ssl_handshake_timeout=handshake_s
        )
        try:
            yield f"{host}:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            await server.wait_closed()

    async def _scraped(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(5):
                head = await reader.readuntil(b"\r\n\r\n")
            found = head.startswith((b"GET /metrics ", b"GET /metrics?"))
            body = await asyncio.to_thread(self.exposition) if found else b""
            status = b"200 OK" if found else b"404 Not Found"
            kind = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4.encode()
            writer.write(b"HTTP/1.1 %b\r\nContent-Type: %b\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (status, kind, len(body)))
            writer.write(body)
            async with asyncio.timeout(5):
                await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
            log.debug("a scrape broke off")
        finally:
            writer.close()

    @asynccontextmanager
    async def watching_lag(
        self, unready_s: float, late: Callable[[bool], Awaitable[None]], *, period_s: float = 0.25, alarm_s: float = 0.1
    ) -> AsyncIterator[None]:
        """Sample how late the loop runs; warn over `alarm_s`; tell `late` when it passes `unready_s` and when it is well again."""

        async def sample() -> None:
            loop, good = asyncio.get_running_loop(), 0
            while True:
                due = loop.time() + period_s
                await asyncio.sleep(period_s)
                lag = max(0.0, loop.time() - due)
                self.record("argosy.loop.lag", lag)
                good = good + 1 if lag < alarm_s else 0
                if lag >= alarm_s:
                    log.warning("the event loop was blocked for %.0f ms", lag * 1_000)
                if lag >= unready_s:
                    await late(True)
                elif good == LAG_GOOD_SAMPLES:
                    await late(False)

        task = asyncio.create_task(sample(), name="loop-lag")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def _renewing(tls: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    """A context that each connection leaves for the newest: certificate and authority are those of the files as they are then."""
    first = tls()

    def newest(connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _context: ssl.SSLContext) -> None:
        with contextlib.suppress(ssl.SSLError):  # amid a swap of the files: this connection still has the old ones
            connection.context = tls()

    first.sni_callback = newest  # called for each hello, with or without a name in it
    return first


LAG_GOOD_SAMPLES = 4  # a second without a block


def _quietly(shut: Callable[[], None]) -> None:
    """The thread may outlive its loop; what it has to say then interests nobody."""
    try:
        shut()
    except RuntimeError:
        log.debug("telemetry closed after the loop")


def _instrument(meter: Any, row: Metric) -> Callable[[float, Mapping[str, str]], None]:
    if row.kind == "counter":
        return meter.create_counter(row.name, row.unit, row.says).add  # type: ignore[no-any-return]
    if row.kind == "gauge":
        return meter.create_gauge(row.name, row.unit, row.says).set  # type: ignore[no-any-return]
    histogram = meter.create_histogram(row.name, row.unit, row.says, explicit_bucket_boundaries_advisory=row.buckets or None)
    return histogram.record  # type: ignore[no-any-return]


def wire_status(error: BaseException, context: Any) -> grpc.StatusCode:
    """The status the caller saw when `error` left the handler."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        left = context.time_remaining()
        return grpc.StatusCode.DEADLINE_EXCEEDED if left is not None and left <= 0 else grpc.StatusCode.CANCELLED
    code = context.code()
    if isinstance(code, grpc.StatusCode):
        return code
    return next((known for known in grpc.StatusCode if known.value[0] == code), grpc.StatusCode.UNKNOWN)


# --- logs ---------------------------------------------------------------------------------------------------------------------------

FIELD_CHARS = 1_024
FIELDS = 32
FRAMES = 20
REDACTED = "[secret]"
CONTENT = "[content]"
SECRET_FIELD = re.compile(r"authorization|password|passwd|secret|token$|api_?key|pepper|private_key|cookie|credential|-bin$", re.IGNORECASE)
CONTENT_FIELD = re.compile(
    r"^(prompt|text|texts|content|contents|message|messages|document|documents|passage|passages|question|answer|completion|output|input"
    r"|request|response|body|metadata)$",
    re.IGNORECASE,
)
SECRET_TEXT = re.compile(
    r"argosy_[A-Za-z0-9]+_[A-Za-z0-9]+_[A-Za-z0-9_]+"  # an API key
    r"|(?i:bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}"
    r"|-----BEGIN[^-]*PRIVATE KEY-----.*?(?:-----END[^-]*-----|$)"
    r"|(?<=://)[^/@\s]+@"  # user:password@ of a URL
    r"|eyJ[A-Za-z0-9_-]{16,}(?:\.[A-Za-z0-9_-]+)*",  # base64 of a JSON object: a caller token, a JWT
    re.DOTALL,
)
EVENT = MutableMapping[str, Any]


def scrub(text: str) -> str:
    """`text` without secrets, at most `FIELD_CHARS` characters."""
    clean = SECRET_TEXT.sub(REDACTED, text[: 4 * FIELD_CHARS])
    return clean if len(clean) <= FIELD_CHARS else clean[: FIELD_CHARS - 1] + "…"


def _safe(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, BaseException):
        return type(value).__name__  # its text may quote a request
    if isinstance(value, bytes | bytearray | memoryview):
        return f"[{len(value)} bytes]"
    if isinstance(value, Mapping):
        return {scrub(str(key)): _field(str(key), item) for key, item in list(value.items())[:FIELDS]}
    if isinstance(value, list | tuple | set | frozenset):
        return [_safe(item) for item in list(value)[:FIELDS]]
    return scrub(str(value))


def _field(name: str, value: Any) -> Any:
    if SECRET_FIELD.search(name):
        return REDACTED
    return CONTENT if CONTENT_FIELD.search(name) and not isinstance(value, bool | int | float) else _safe(value)


def clean(_: Any, __: str, event: EVENT) -> EVENT:
    """structlog processor: caps, secrets, content."""
    kept = list(event.items())[:FIELDS]
    return {scrub(name): _safe(value) if name in ("event", "at") else _field(name, value) for name, value in kept}


def frames(_: Any, __: str, event: EVENT) -> EVENT:
    """structlog processor: of an exception its type and where it passed, never its text, which may quote a request."""
    info = event.pop("exc_info", None)
    event.pop("stack_info", None)
    error = info if isinstance(info, BaseException) else info[1] if isinstance(info, tuple) else sys.exc_info()[1] if info else None
    if error is not None:
        event["error"] = type(error).__name__
        walked = traceback.extract_tb(error.__traceback__)[-FRAMES:]
        event["at"] = [f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in walked]
    return event


_add_extra = structlog.stdlib.ExtraAdder()


def extras(logger: Any, method: str, event: EVENT) -> EVENT:
    """structlog processor: the `extra` of our own records; what other libraries hang on theirs may be content."""
    record = event.get("_record")
    return _add_extra(logger, method, event) if record is not None and record.name.startswith("services.") else event


def trace_ids(_: Any, __: str, event: EVENT) -> EVENT:
    """structlog processor: which trace an event belongs to."""
    span = trace.get_current_span().get_span_context()
    if span.is_valid:
        event["trace_id"], event["span_id"] = f"{span.trace_id:032x}", f"{span.span_id:016x}"
    return event


def one_line(_: Any, __: str, event: EVENT) -> str:
    """structlog processor: JSON in printable ASCII; control, bidirectional and line-separator characters come out escaped."""
    return json.dumps(event, ensure_ascii=True, allow_nan=True, default=lambda value: type(value).__name__).replace("\x7f", "\\u007f")


class _Unwanted(logging.Filter):
    """grpc logs a traceback for each cancellation that is re-raised, as ours all are."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
        return not isinstance(error, asyncio.CancelledError)


def configure_logs(level: str = "INFO", stream: TextIO | None = None) -> None:
    """JSON lines on `stream` (standard error) for structlog and for the standard library alike. Call once, in `__main__`."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        trace_ids,
        frames,
    ]
    final: list[Any] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta, clean, one_line]
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=[extras, *shared], processors=final))
    handler.addFilter(_Unwanted())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.raiseExceptions = False  # a full disk drops the line, not the request
    for exporter in ("opentelemetry", "urllib3"):
        logging.getLogger(exporter).setLevel(logging.CRITICAL)  # a collector that is away is counted, not told each time
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
